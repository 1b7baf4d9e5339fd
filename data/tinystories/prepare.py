"""
Prepare TinyStories, 2.1M short stories in simple words (https://arxiv.org/abs/2305.07759).

    python data/tinystories/prepare.py
    python data/tinystories/prepare.py --tokenizer=bpe --out_dir=data/tinystories_bpe
    python data/tinystories/prepare.py --source=FOLDER

Writes train.bin (470M GPT-2 tokens, 1 GB) and val.bin (4.7M tokens) to this folder.
"""
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.checkpoint import make_tokenizer
from lib.configurator import at_least, configure, user_errors
from lib.corpus import hub_documents, hub_source, local_documents, write_dataset

# -----------------------------------------------------------------------------
source = ""  # a local copy: a file or a folder of .txt, .jsonl, .csv or .parquet (empty: the hub)
tokenizer = "gpt2"  # or bpe, char, word, pieces (learned from the stories), or that of a model
vocab_size = 0  # at most this many tokens (0: 4,096 of bpe, 10,000 words, all characters)
out_dir = ""  # where to write (empty: this folder)
configure(globals(), vocab_size=at_least(0, at_most=65536))
# -----------------------------------------------------------------------------

NAME = "roneneldan/TinyStories"


def documents(split: str) -> Iterator[str]:
    if source:
        return local_documents(source, split)
    return hub_documents(NAME, split)


with user_errors():
    trained = make_tokenizer(tokenizer, documents("train"), vocab_size)
    write_dataset(Path(out_dir) if out_dir else HERE, documents, trained,
                  source="" if source else hub_source(NAME))
