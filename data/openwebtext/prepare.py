"""
Prepare OpenWebText, an open copy of the dataset that GPT-2 was trained on: 8M web pages
(https://skylion007.github.io/OpenWebTextCorpus).

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --shards=10

Writes val.bin (the first 5,000 pages) and train_000.bin, train_001.bin, ... of 100M GPT-2 tokens
each to this folder, nine billion tokens or 18 GB in all. After an interruption, the same command
resumes. nanoGPT holds out other pages, so its losses are only roughly comparable.
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.fineweb.prepare import prepare
from lib.configurator import at_least, configure, user_errors

# -----------------------------------------------------------------------------
source = ""  # a local copy: a folder of .parquet or .jsonl files, column text (empty: the hub)
shards = 0  # stop after this many (0: the whole text)
tokenizer = "gpt2"  # or bpe, char, word, pieces (learned from the first pages), or that of a model
vocab_size = 0  # at most this many tokens (0: 4,096 of bpe, 10,000 words, all characters)
out_dir = ""  # where to write (empty: this folder)
configure(globals(), shards=at_least(0), vocab_size=at_least(0, at_most=65536))
# -----------------------------------------------------------------------------

with user_errors():
    folder = Path(out_dir) if out_dir else HERE
    prepare(folder, "Skylion007/openwebtext", "", source, tokenizer, vocab_size, shards)
