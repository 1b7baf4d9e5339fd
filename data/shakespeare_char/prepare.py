"""
Prepare tinyshakespeare, 1.1 MB of Shakespeare's plays, as characters.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --source=input.txt

Writes train.bin (1,003,854 tokens) and val.bin (111,540 tokens) to this folder. There are 65
different characters. As in nanoGPT, the first 90% of the text are for training and the rest for
validation. data/shakespeare/prepare.py writes the same text in GPT-2 tokens.
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.shakespeare.prepare import prepare
from lib.configurator import at_least, configure, user_errors

# -----------------------------------------------------------------------------
source = ""  # a local copy, or any other text file (empty: download it)
tokenizer = "char"  # or gpt2, bpe, word, or that of a model
vocab_size = 0  # at most this many tokens (0: 4,096 of bpe, 10,000 words, all characters)
out_dir = ""  # where to write (empty: this folder)
configure(globals(), vocab_size=at_least(0, at_most=65536))
# -----------------------------------------------------------------------------

with user_errors():
    prepare(Path(out_dir) if out_dir else HERE, source, tokenizer, vocab_size)
