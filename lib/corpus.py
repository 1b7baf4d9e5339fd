"""Text in, .bin files and meta.json out."""
import functools
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.dataset import FORMAT_VERSION, split_files
from lib.tokenizer import EOT, leading

PART = 16_000_000  # characters that are tokenized at a time
LONGEST = 4_000_000  # characters of a document of a .txt file
WHITE_SPACE = np.isin(np.arange(256), [9, 10, 11, 12, 13, 32])


# -----------------------------------------------------------------------------
# Writing

def tokenized(documents: Iterable[str], tokenizer) -> Iterator[tuple[np.ndarray, Counter]]:
    """
    Token ids of the next PART characters or so, with an end of text behind every document, and what they are: tokens,
    documents, bytes (UTF-8), characters, words (between ASCII white space), and where the vocabulary can lack something,
    unknown tokens.
    """
    documents, eot = iter(documents), [np.array([tokenizer.eot], dtype=np.uint32)] if tokenizer.eot >= 0 else []
    while texts := list(leading(documents, PART)):
        ids = np.concatenate([part for ids in tokenizer.encode_many(texts) for part in (ids, *eot)]).astype("<u2")
        raw = "\n".join(["", *texts]).encode()
        space = WHITE_SPACE[np.frombuffer(raw, dtype=np.uint8)]  # len(raw.split()) would take a fifth of the time of it all
        counts = Counter(tokens=len(ids), documents=len(texts), bytes=len(raw) - len(texts),
                         characters=sum(map(len, texts)), words=int((space[:-1] & ~space[1:]).sum()))
        if tokenizer.unk >= 0:
            counts["unknown"] = int((ids == tokenizer.unk).sum())
        yield ids, counts


def write_tokens(path: Path, parts: Iterator[tuple[np.ndarray, Counter]], counts: Counter, digest,
                 enough: float = math.inf) -> int:
    """Write what tokenized() yields to path, until that is `enough` tokens, and add it to counts and digest; the tokens."""
    tokens = 0
    with open(path, "wb") as file:
        for ids, more in parts:
            file.write(ids)
            digest.update(ids)
            counts.update(more)
            tokens += len(ids)
            if tokens >= enough:
                break
        file.flush()
        os.fsync(file.fileno())
    return tokens


def write_split(folder: Path, split: str, documents: Iterable[str], tokenizer, total: int | None = None) -> dict:
    """
    Tokenize documents on all cores into `<split>.bin.tmp`, streaming, and return what meta.json says of them: the counts of
    tokenized() and the sha256. finish_dataset() gives the file its name.
    """
    counts, digest = Counter(), hashlib.sha256()
    documents = tqdm(documents, desc=split, unit=" documents", total=total, smoothing=0)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.bin.tmp"
    try:
        if not write_tokens(path, tokenized(documents, tokenizer), counts, digest):
            raise ValueError(f"there is no text for the {split} split")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return {**counts, "sha256": digest.hexdigest()}


def write_dataset(folder: Path, documents: Callable[[str], Iterable[str]], tokenizer) -> None:
    """A whole data set of the documents of its two splits."""
    finish_dataset(folder, tokenizer, {split: write_split(folder, split, documents(split), tokenizer)
                                       for split in ("train", "val")})


def finish_dataset(folder: Path, tokenizer, splits: dict[str, dict], **more) -> None:
    """Put the written splits in place and meta.json last: what was interrupted before that does not look finished."""
    meta = {"format_version": FORMAT_VERSION, "dataset": folder.name, "tokenizer": tokenizer.spec,
            "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "splits": splits, **more}
    temporary = folder / "meta.json.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    (folder / "meta.json").unlink(missing_ok=True)
    for split, counts in splits.items():
        names = [f"{split}_{i:03}.bin" for i in range(counts["shards"])] if "shards" in counts else [f"{split}.bin"]
        for old in set(split_files(folder, split)) - {folder / name for name in names}:
            old.unlink()  # of a data set that this one replaces
        for name in names:
            os.replace(folder / f"{name}.tmp", folder / name)
    os.replace(temporary, folder / "meta.json")
    for split, counts in splits.items():
        lacking = counts.get("unknown", 0)
        print(f"{folder / split}.bin: {counts['tokens']:,} tokens, {counts['documents']:,} documents"
              + (f"; the vocabulary lacks {lacking:,} of the tokens ({lacking / counts['tokens']:.2%})" if lacking else ""))


# -----------------------------------------------------------------------------
# Reading local text, for the `--source` of the prepare scripts

def split_of(path: Path) -> str:
    """'train', 'val', 'test' or '' by what a file or its folder is called: train-00000.parquet, TinyStories-valid.txt."""
    for name in (path.name.lower(), path.parent.name.lower()):
        if "train" in name:
            return "train"
        for split in ("val", "test"):
            if split in name:
                return split
    return ""


def local_documents(source: str, split: str, column: str = "text") -> Iterator[str]:
    """
    The documents of one split of a local copy: text files (documents between lines `<|endoftext|>`), JSON lines, CSV or
    parquet. A folder has files named train... and val...; of a single file every 20th document is for validation, or, where
    there is but one, its end.
    """
    root = Path(source)
    if not root.exists():
        raise ValueError(f"there is no file or folder {source}")
    known = (".txt", ".jsonl", ".json", ".csv", ".parquet")
    files = sorted(path for path in ([root] if root.is_file() else root.rglob("*")) if path.suffix in known)
    if root.is_dir():
        files = [path for path in files if split_of(path.relative_to(root)) == split]
    if not files:
        raise ValueError(f"{source} has no text for the {split} split: files must end in {', '.join(known)}, and in a folder "
                         f"their names must contain {split!r}")
    texts = (text for path in files for text in read_documents(path, column))
    return held_out(texts, split) if root.is_file() else texts


def held_out(texts: Iterator[str], split: str) -> Iterator[str]:
    """Of documents that nobody has split: every 20th for validation; of a single one its last twentieth."""
    first = list(islice(texts, 2))
    if len(first) == 1:
        end = len(first[0]) * 19 // 20
        return iter([first[0][:end] if split == "train" else first[0][end:]])
    return (text for i, text in enumerate(chain(first, texts)) if (i % 20 == 19) == (split == "val"))


def ask_hub(name: str, subset: str = "", **how):
    """A data set of the Hugging Face hub, downloaded where that has not been done, or of a folder laid out so."""
    from datasets import load_dataset
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it tells of each of its five retries
    print(f"asking the Hugging Face hub for {name} ...", file=sys.stderr)
    try:
        return load_dataset(name, subset or None, **how)
    except Exception as error:  # any way in which a download fails
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{name} is no local file, and the Hugging Face hub cannot be reached or does not have it "
                         f"({type(error).__name__}: {reason}): give a local copy with --source=FOLDER") from None


hub_dataset = functools.lru_cache(maxsize=1)(ask_hub)  # all splits, asked for once


def hub_rows(name: str, split: str, column: str = "text", subset: str = "") -> Iterator[object]:
    """A column of one split of a data set of the hub; without a validation split there are no rows for it."""
    data = hub_dataset(name, subset)
    if "train" not in data:
        raise ValueError(f"{name} has no train split, only {', '.join(data)}")
    if column not in data["train"].column_names:
        raise ValueError(f"{name} has no column {column!r}, only {', '.join(data['train'].column_names)}")
    rows = [data[other].select_columns(column) for other in data if other.startswith(split)]
    return (value for part in rows for batch in part.iter(1024) for value in batch[column])


def hub_documents(name: str, split: str, column: str = "text", subset: str = "") -> Iterator[str]:
    """The documents of one split of a data set of the hub, white space around them removed; held out where no one did."""
    if any(other.startswith("val") for other in hub_dataset(name, subset)):
        return stripped(hub_rows(name, split, column, subset), name, column)
    return held_out(stripped(hub_rows(name, "train", column, subset), name, column), split)


def read_rows(path: Path, column: str = "text") -> Iterator[object]:
    """A column of a .jsonl, .json, .csv or .parquet file, without reading the file into memory."""
    from datasets import load_dataset

    kind = {".parquet": "parquet", ".csv": "csv"}.get(path.suffix, "json")
    data = load_dataset(kind, data_files=str(path), split="train", streaming=True)
    return (value for batch in data.iter(1024) for value in batch.get(column, [None]))


def read_documents(path: Path, column: str = "text") -> Iterator[str]:
    """The documents of one file, white space around them removed, without reading the file into memory."""
    return stripped(split_text(path) if path.suffix == ".txt" else read_rows(path, column), path, column)


def stripped(texts: Iterable[object], where: object, column: str) -> Iterator[str]:
    """Texts without the white space around them, or those of nothing else; ValueError for what is not text."""
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{where} has a row without a text column {column!r}")
        if text := text.strip():
            yield text


def split_text(path: Path) -> Iterator[str]:
    """The documents of a .txt file; one of more than four million characters is cut into some, at ends of lines."""
    rest = ""
    try:
        with open(path, encoding="utf-8") as file:
            while chunk := file.read(1 << 20):
                *whole, rest = (rest + chunk).split(EOT)
                yield from whole
                if len(rest) > LONGEST:
                    end = max(rest.rfind("\n") + 1, LONGEST // 2)
                    yield rest[:end]
                    rest = rest[end:]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    yield rest
