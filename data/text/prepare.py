"""
Prepare your own text, or a dataset of the Hugging Face hub.

    python data/text/prepare.py --source=book.txt
    python data/text/prepare.py --source=FOLDER --tokenizer=char
    python data/text/prepare.py --source=chat.jsonl --column=message.content
    python data/text/prepare.py --source=roneneldan/TinyStories --tokenizer=bpe --vocab_size=4096
    python data/text/prepare.py --source=roneneldan/TinyStories@main

Reads text files (.txt, .md or no suffix), with <|endoftext|> between documents, and one column of
.jsonl, .json, .csv and .parquet files. Writes train.bin and val.bin to this folder, or with
--out_dir=data/NAME to that one.

In a folder, files named train and val (or valid, validation) are the splits. Otherwise every 20th
document is held out for validation. With fewer than 20, the end of the text is held out.
"""
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.checkpoint import make_tokenizer
from lib.configurator import at_least, configure, one_line, user_errors
from lib.corpus import hub_documents, hub_source, is_local, local_documents, write_dataset
from lib.tokenizer import KINDS

# -----------------------------------------------------------------------------
source = ""  # a file, a folder or a dataset on the hub: NAME or NAME@REVISION
column = "text"  # the column to read; in local files also a nested field: message.content
encoding = "utf-8"  # of text, JSON and CSV files, such as windows-1252 or utf-16
subset = ""  # of a hub dataset with several subsets
tokenizer = "gpt2"  # or bpe, char, word, pieces (learned from the text), or that of a model
vocab_size = 0  # at most this many tokens (0: 4,096 of bpe, 10,000 words, all characters)
out_dir = ""  # where to write (empty: this folder)
configure(globals(), vocab_size=at_least(0, at_most=65536))
# -----------------------------------------------------------------------------


def documents(split: str) -> Iterator[str]:
    if is_local(source):
        return local_documents(source, split, column, encoding)
    return hub_documents(source, split, column, subset)


def next_command(folder: Path) -> str:
    """Return a command that trains a small model, or the one that gave the tokenizer."""
    args = ["config/train_nano.py", "config/tuned.py", "--max_minutes=10"]
    if tokenizer in ("char", "word"):
        args = [f"config/train_{tokenizer}_nano.py"]
    elif tokenizer not in KINDS:  # of a model
        args = ["config/finetune.py", f"--init_from={tokenizer}"]
    inside = folder.parent == HERE.resolve().parent
    dataset = folder.name if inside else str(folder)
    return shlex.join(["python", "train.py", *args, f"--dataset={dataset}",
                       f"--out_dir=out-{folder.name}"])


with user_errors():
    if not source:
        raise ValueError("set --source to a file, a folder or the name of a Hugging Face dataset")
    try:
        "".encode(encoding)
    except LookupError as error:
        raise ValueError(f"--encoding={encoding}: {error}") from None
    trained = make_tokenizer(tokenizer, documents("train"), vocab_size)
    folder = Path(out_dir) if out_dir else HERE
    write_dataset(folder, documents, trained,
                  source="" if is_local(source) else hub_source(source, subset))
    print(one_line(f"next: {next_command(folder.resolve())}"))
