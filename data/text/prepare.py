"""
Any text of yours, or any data set of the Hugging Face hub.

    python data/text/prepare.py --source=book.txt
    python data/text/prepare.py --source=FOLDER --tokenizer=char
    python data/text/prepare.py --source=roneneldan/TinyStories --tokenizer=bpe --vocab_size=4096

Writes train.bin and val.bin into this folder; `--out_dir=data/NAME` makes a data set of its own.
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
source = ""  # .txt (<|endoftext|> between documents), .jsonl, .csv or .parquet; a file, a folder, or a hub name
column = "text"  # of the rows that have several
subset = ""  # of a data set of the hub that has several
tokenizer = "gpt2"  # or 'bpe', 'char', 'word': those of the text
vocab_size = 0  # tokens of bpe, char or word at most; 0: 4,096 of bpe, 10,000 words, all characters
out_dir = ""  # where to write; '': this folder
configure(globals())
# -----------------------------------------------------------------------------


def documents(split: str) -> Iterator[str]:
    if Path(source).exists():
        return local_documents(source, split, column)
    return hub_documents(source, split, column, subset)


with user_errors():
    if not source:
        raise ValueError("--source says what to prepare: a file, a folder, or the name of a data set of the Hugging Face hub")
    made = train_tokenizer(tokenizer, documents("train"), vocab_size)
    write_dataset(Path(out_dir) if out_dir else HERE, documents, made)
