"""
The works of Shakespeare, character by character, as in nanoGPT: 65 characters, the first 90% to train on.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --source=input.txt

Writes train.bin (1,003,854 tokens) and val.bin (111,540 tokens) into this folder. data/shakespeare is the same text.
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.configurator import configure, user_errors
from data.shakespeare.prepare import prepare

# -----------------------------------------------------------------------------
source = ""  # a local copy of the text, or any other text file; '': download it
tokenizer = "char"  # or 'gpt2', 'bpe', 'word'
vocab_size = 0  # tokens of bpe, char or word at most; 0: 4,096 of bpe, 10,000 words, all characters
out_dir = ""  # where to write; '': this folder
configure(globals())
# -----------------------------------------------------------------------------

with user_errors():
    prepare(Path(out_dir) if out_dir else HERE, source, tokenizer, vocab_size)
