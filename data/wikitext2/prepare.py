"""
Prepare WikiText-2 raw, 600 articles of Wikipedia (https://arxiv.org/abs/1609.07843).

    python data/wikitext2/prepare.py
    python data/wikitext2/prepare.py --source=FOLDER

Writes train.bin (2.4M GPT-2 tokens), val.bin and test.bin to this folder. The validation and test
articles are those of WikiText-103; see data/wikitext103/prepare.py.
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.wikitext103.prepare import prepare
from lib.configurator import at_least, configure, user_errors

# -----------------------------------------------------------------------------
source = ""  # a local copy: a folder of wiki.train.raw, ... or of .parquet files (empty: the hub)
tokenizer = "gpt2"  # or bpe, char, word, pieces (learned from the articles), or that of a model
vocab_size = 0  # at most this many tokens (0: 4,096 of bpe, 10,000 words, all characters)
out_dir = ""  # where to write (empty: this folder)
configure(globals(), vocab_size=at_least(0, at_most=65536))
# -----------------------------------------------------------------------------

with user_errors():
    folder = Path(out_dir) if out_dir else HERE
    prepare(folder, "wikitext-2-raw-v1", source, tokenizer, vocab_size)
