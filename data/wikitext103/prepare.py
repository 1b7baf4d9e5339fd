"""
Prepare WikiText-103 raw, 28,475 articles of Wikipedia (https://arxiv.org/abs/1609.07843).

    python data/wikitext103/prepare.py
    python data/wikitext103/prepare.py --source=FOLDER

Writes train.bin (119M GPT-2 tokens), val.bin and test.bin to this folder. The text is as published,
with spaces around punctuation.

meta.json counts words as the papers do, each line end as one: 217,646 in the validation split and
245,569 in the test split. The papers replace rare words by <unk>; the raw files spell them out,
which is harder to predict. The perplexity per word that eval.py prints is therefore only roughly
comparable with theirs.
"""
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.checkpoint import make_tokenizer
from lib.configurator import at_least, configure, user_errors
from lib.corpus import (
    finish_dataset,
    hub_rows,
    hub_source,
    read_rows,
    remove_temporary_files,
    split_of,
    text_files,
    write_split,
)

# -----------------------------------------------------------------------------
source = ""  # a local copy: a folder of wiki.train.raw, ... or of .parquet files (empty: the hub)
tokenizer = "gpt2"  # or bpe, char, word, pieces (learned from the articles), or that of a model
vocab_size = 0  # at most this many tokens (0: 4,096 of bpe, 10,000 words, all characters)
out_dir = ""  # where to write (empty: this folder)
# -----------------------------------------------------------------------------

NAME = "Salesforce/wikitext"
TITLE = re.compile(r" = [^=].* = ")
SUFFIXES = (".raw", ".tokens", ".txt", ".parquet")
NOTE = ("The perplexity per word uses the papers' word count, but the raw text spells out the rare "
        "words that they replace by <unk>.")  # printed by eval.py


def read_file(path: Path) -> Iterator[object]:
    if path.suffix.lower() == ".parquet":
        yield from read_rows(path)
    else:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            yield from file


def lines_of(split: str, source: str, subset: str) -> Iterator[str]:
    """Yield the lines of one split without their line ends."""
    if not source:
        rows = hub_rows(NAME, split, subset=subset)
    else:
        folder = Path(source)
        if (folder / subset).is_dir():  # a copy of all variants
            folder = folder / subset
        paths = [path for path in text_files(folder, SUFFIXES)
                 if split_of(path.relative_to(folder)) == split]
        if not paths:
            raise ValueError(f"{source} has no text for the {split} split: files must end in "
                             f"{', '.join(SUFFIXES)} and be named like wiki.{split}.raw")
        rows = (row for path in paths for row in read_file(path))
    for row in rows:
        if not isinstance(row, str):
            raise ValueError(f"{source or NAME} has a row without a text column 'text'")
        yield row.removesuffix("\n") if row.strip() else ""  # empty lines are " " in the files


def articles(lines: Iterable[str]) -> Iterator[str]:
    """
    Yield articles, each starting with the line of its title.

    A title has empty lines around it. Similar lines within text, such as the formula
    ` = 1 rad / s and k = `, do not.
    """
    article = []
    for line, following in pairwise(chain(lines, [""])):
        previous = article[-1] if article else ""
        if TITLE.fullmatch(line) and not previous and not following and any(article):
            yield "\n".join(article).strip("\n")
            article = []
        article.append(line)
    if any(article):
        yield "\n".join(article).strip("\n")


def prepare(folder: Path, subset: str, source: str, kind: str, vocab_size: int) -> None:
    trained = make_tokenizer(kind, articles(lines_of("train", source, subset)), vocab_size)
    splits = {}
    with remove_temporary_files(folder):
        for split in ("train", "val", "test"):
            counts = write_split(folder, split, articles(lines_of(split, source, subset)), trained)
            words = sum(len(line.split()) + 1 for line in lines_of(split, source, subset))
            splits[split] = counts | {"words": words}
        finish_dataset(folder, trained, splits, note=NOTE,
                       source="" if source else hub_source(NAME, subset))


if __name__ == "__main__":
    configure(globals(), vocab_size=at_least(0, at_most=65536))
    with user_errors():
        folder = Path(out_dir) if out_dir else HERE
        prepare(folder, "wikitext-103-raw-v1", source, tokenizer, vocab_size)
