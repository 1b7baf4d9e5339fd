"""
WikiText-2 (https://arxiv.org/abs/1609.07843), the raw variant: 600 articles of Wikipedia, a fiftieth of WikiText-103 with
the same validation and test articles; data/wikitext103/prepare.py says more.

    python data/wikitext2/prepare.py
    python data/wikitext2/prepare.py --source=FOLDER

Writes train.bin (about 2.4M GPT-2 tokens), val.bin and test.bin into this folder.
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.configurator import configure, user_errors
from data.wikitext103.prepare import prepare

# -----------------------------------------------------------------------------
source = ""  # a local copy: a folder of wiki.train.raw, ... or .parquet files, one line of text a row; '': the hub
tokenizer = "gpt2"  # or 'bpe', 'char', 'word': those of the articles
vocab_size = 0  # tokens of bpe, char or word at most; 0: 4,096 of bpe, 10,000 words, all characters
out_dir = ""  # where to write; '': this folder
configure(globals())
# -----------------------------------------------------------------------------

with user_errors():
    prepare(Path(out_dir) if out_dir else HERE, "wikitext-2-raw-v1", source, tokenizer, vocab_size)
