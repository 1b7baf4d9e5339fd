"""
OpenWebText (https://skylion007.github.io/OpenWebTextCorpus): 8M web pages, what GPT-2 was trained on, made again.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --shards=10

Writes val.bin (the first 5,000 pages) and train_000.bin, train_001.bin, ... of a hundred million GPT-2 tokens each, nine
billion in all (18 GB), as data/fineweb/prepare.py does. nanoGPT holds out other pages, so its losses compare roughly.
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.configurator import configure, user_errors
from data.fineweb.prepare import prepare

# -----------------------------------------------------------------------------
source = ""  # a local copy, a folder of .parquet or .jsonl files with a column `text`; '': the hub
shards = 0  # stop after so many; 0: all of the text
tokenizer = "gpt2"  # or 'bpe', 'char', 'word': those of the first pages
vocab_size = 0  # tokens of bpe, char or word at most; 0: 4,096 of bpe, 10,000 words, all characters
out_dir = ""  # where to write; '': this folder
configure(globals())
# -----------------------------------------------------------------------------

with user_errors():
    prepare(Path(out_dir) if out_dir else HERE, "Skylion007/openwebtext", "", source, tokenizer, vocab_size, shards)
