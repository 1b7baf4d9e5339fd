"""
WikiText-103 (https://arxiv.org/abs/1609.07843), the raw variant: 28,475 articles of Wikipedia.

    python data/wikitext103/prepare.py
    python data/wikitext103/prepare.py --source=FOLDER

Writes train.bin (about 119M GPT-2 tokens), val.bin and test.bin into this folder. The text stays as it was published,
with spaces around its punctuation. meta.json counts the words as the paper did, an end of line being one (217,646 in the
validation split), so that eval.py's perplexity per word is comparable with published ones, whatever the tokenizer.
"""
import re
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.configurator import configure, user_errors
from lib.corpus import finish_dataset, hub_rows, read_rows, split_of, write_split
from lib.tokenizer import train_tokenizer

# -----------------------------------------------------------------------------
source = ""  # a local copy: a folder of wiki.train.raw, ... or .parquet files, one line of text a row; '': the hub
tokenizer = "gpt2"  # or 'bpe', 'char', 'word': those of the articles
vocab_size = 0  # tokens of bpe, char or word at most; 0: 4,096 of bpe, 10,000 words, all characters
out_dir = ""  # where to write; '': this folder
# -----------------------------------------------------------------------------

TITLE = re.compile(r" = [^=].* = ")
SUFFIXES = (".raw", ".tokens", ".txt", ".parquet")


def lines_of(split: str, source: str, subset: str) -> Iterator[str]:
    """The lines of one split, without their ends."""
    if not source:
        rows = hub_rows("Salesforce/wikitext", split, subset=subset)
    else:
        folder = Path(source) / subset if (Path(source) / subset).is_dir() else Path(source)  # a copy of all variants
        paths = [path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES and split_of(path) == split]
        if not paths:
            raise ValueError(f"{source} has no text for the {split} split: a folder is wanted whose files end in "
                             f"{', '.join(SUFFIXES)} and contain {split!r} in their names")
        rows = (row for path in paths for row in
                (read_rows(path) if path.suffix == ".parquet" else open(path, encoding="utf-8", newline="\n")))
    for row in rows:
        if not isinstance(row, str):
            raise ValueError(f"{source or 'Salesforce/wikitext'} has a row without a text column 'text'")
        yield row.removesuffix("\n") if row.strip() else ""  # the files have a space there, the hub has none


def articles(lines: Iterator[str], words: dict[str, int], split: str) -> Iterator[str]:
    """Articles, each from its title on; words[split] becomes the number of words in all lines."""
    article, words[split] = [], 0
    for line in lines:
        words[split] += len(line.split()) + 1
        if TITLE.fullmatch(line) and any(article):
            yield "\n".join(article).strip("\n")
            article = []
        article.append(line)
    if any(article):
        yield "\n".join(article).strip("\n")


def prepare(folder: Path, subset: str, source: str, kind: str, vocab_size: int) -> None:
    words: dict[str, int] = {}

    def documents(split: str) -> Iterator[str]:
        return articles(lines_of(split, source, subset), words, split)

    made = train_tokenizer(kind, documents("train"), vocab_size)
    splits = {split: write_split(folder, split, documents(split), made) for split in ("train", "val", "test")}
    finish_dataset(folder, made, {split: counts | {"words": words[split]} for split, counts in splits.items()})


if __name__ == "__main__":
    configure(globals())
    with user_errors():
        prepare(Path(out_dir) if out_dir else HERE, "wikitext-103-raw-v1", source, tokenizer, vocab_size)
