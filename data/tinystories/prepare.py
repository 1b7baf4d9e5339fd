"""
TinyStories (https://arxiv.org/abs/2305.07759): 2.1M short stories in the words of a four-year-old.

    python data/tinystories/prepare.py
    python data/tinystories/prepare.py --source=FOLDER --tokenizer=bpe --vocab_size=4096 --out_dir=data/tinystories_bpe

Writes train.bin (about 470M GPT-2 tokens, 1 GB) and val.bin (4.7M tokens) into this folder.
"""
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.configurator import configure, user_errors
from lib.corpus import hub_documents, local_documents, write_dataset
from lib.tokenizer import train_tokenizer

# -----------------------------------------------------------------------------
source = ""  # a local copy: .txt with <|endoftext|> between stories, .jsonl or .parquet; a file, or a folder of train and val
tokenizer = "gpt2"  # or 'bpe', 'char', 'word': those of the stories
vocab_size = 0  # tokens of bpe, char or word at most; 0: 4,096 of bpe, 10,000 words, all characters
out_dir = ""  # where to write; '': this folder
configure(globals())
# -----------------------------------------------------------------------------


def documents(split: str) -> Iterator[str]:
    return local_documents(source, split) if source else hub_documents("roneneldan/TinyStories", split)


with user_errors():
    made = train_tokenizer(tokenizer, documents("train"), vocab_size)
    write_dataset(Path(out_dir) if out_dir else HERE, documents, made)
