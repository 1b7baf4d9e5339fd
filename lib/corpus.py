"""
Prepare datasets: text in, .bin files of token ids and meta.json out.

Text comes from local files and folders or from the Hugging Face hub. dataset.py reads the result.
"""
import codecs
import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import IO

import numpy as np

from lib.configurator import one_line
from lib.console import hide_hub_progress, progress, visible
from lib.dataset import TokenStream, split_files, token_dtype
from lib.files import is_number, load_json, open_synced, replace_file, write_atomically
from lib.tokenizer import EOT, KINDS, leading, meta_of, read_nanogpt_characters

FORMAT_VERSION = 1  # of meta.json
PART = 16_000_000  # characters that are tokenized at a time
LONGEST = 4_000_000  # characters of a document in a text file
LARGEST_VOCABULARY = 1 << 24
LARGE = 1 << 28  # bytes; the checksum of a larger split is remembered
TABLES = (".jsonl", ".json", ".csv", ".parquet")
SUFFIXES = (".txt", ".md", *TABLES)
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
WHITE_SPACE = np.isin(np.arange(256), [9, 10, 11, 12, 13, 32])


# -----------------------------------------------------------------------------
# Text from local files

def local_documents(source: str, split: str, column: str = "text", encoding: str = "utf-8",
                    to_documents: Callable[..., Iterator[str]] | None = None) -> Iterator[str]:
    """
    Return the documents of one split, 'train' or 'val', of a local file or folder.

    to_documents: a function of (rows, where, column) that yields documents. The default is
    stripped(); documents of any other function are never split.

    Reads text files with <|endoftext|> between documents, JSON, CSV and parquet. If files are named
    train and val, see split_of(), they are the splits, and other files are ignored. If they are
    named train and test only, held_out() divides train. Otherwise it divides all files.
    """
    root = Path(os.path.expanduser(source))
    if not root.exists():
        raise ValueError(f"there is no file or folder {source}")
    if not (files := text_files(root, TABLES if to_documents else ("", *SUFFIXES))):
        raise ValueError(f"{source} has no text: the names of files must end in "
                         f"{', '.join(SUFFIXES)} or have no suffix")
    named = [split_of(path.relative_to(root)) for path in files]
    has_val = {"train", "val"} <= set(named)
    if has_val or {"train", "test"} <= set(named):
        wanted = split if has_val else "train"
        files = [path for path, name in zip(files, named) if name == wanted]
    texts = (text for path in files
             for text in read_documents(path, column, encoding, to_documents))
    first = next(texts, None)
    if first is None:
        more = f", like the other {len(files) - 1} files of the {split} split" if files[1:] else ""
        raise ValueError(f"{files[0]} is empty{more}")
    texts = chain([first], texts)
    return texts if has_val else held_out(texts, split, can_split=to_documents is None)


def is_local(source: str) -> bool:
    """Return whether a source is a file or folder, possibly a missing one, not a hub dataset."""
    return (source.startswith((".", "/", "~")) or "\\" in source
            or source.lower().endswith(SUFFIXES) or os.path.exists(source))


def text_files(root: Path, suffixes: Iterable[str] = ("", *SUFFIXES)) -> list[Path]:
    """Return the files with these suffixes in a folder, except hidden ones, or a single file."""
    paths = [root] if root.is_file() else sorted(root.rglob("*"))
    return [path for path in paths if path.suffix.lower() in suffixes and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(root).parts)]


def split_of(path: Path) -> str:
    """
    Return 'train', 'val' or 'test' if it is a word in the name of a file, or else of its folder.

    Returns '' for other names. Examples of names: train-00000.parquet, TinyStories-valid.txt.
    """
    for name in (path.name.lower(), path.parent.name.lower()):
        for word in re.findall(r"[^\W\d_]+", name):
            if word in SPLITS:
                return SPLITS[word]
    return ""


def held_out(texts: Iterator[str], split: str, can_split: bool = True) -> Iterator[str]:
    """
    Hold out every 20th document for validation. With fewer than 20, hold out the end of the text.

    The end begins at the last start of a document in the first 95% of the characters. If that is
    more than a fifth of the text, the last 5% are held out instead. Raises ValueError for fewer
    than 20 documents if they cannot be split.
    """
    first = list(islice(texts, 20))
    if len(first) < 20 and not can_split:
        raise ValueError(f"there are only {len(first)} documents: 20 are needed to hold one out "
                         "for validation, or two files named train.jsonl and val.jsonl")
    if len(first) == 20:
        return (text for i, text in enumerate(chain(first, texts))
                if (i % 20 == 19) == (split == "val"))
    starts = [0, *accumulate(map(len, first))]
    size = starts[-1]
    cut = max(start for start in starts if start <= size * 19 // 20)
    if size - cut > size / 5:
        cut = size * 19 // 20
    ends = [max(0, cut - start) for start in starts]  # where each document's training part ends
    parts = [text[:end] if split == "train" else text[end:] for text, end in zip(first, ends)]
    return (part for part in parts if part)


def read_documents(path: Path, column: str = "text", encoding: str = "utf-8",
                   to_documents: Callable[..., Iterator[str]] | None = None) -> Iterator[str]:
    """Return the documents of one file. Only a JSON list is read into memory as a whole."""
    if to_documents or path.suffix.lower() in TABLES:
        return (to_documents or stripped)(read_rows(path, column, encoding), path, column)
    return stripped(read_text_file(path, encoding), path, column)


@contextlib.contextmanager
def open_text(path: Path, encoding: str = "utf-8") -> Iterator[IO[str]]:
    """Open a text file to read. If it is not UTF-8, the error suggests a likely encoding."""
    is_utf8 = codecs.lookup(encoding).name == "utf-8"
    try:
        with open(path, encoding="utf-8-sig" if is_utf8 else encoding) as file:
            if "\0" in file.read(4096):
                raise UnicodeError
            file.seek(0)
            yield file
    except UnicodeError:
        with open(path, "rb") as file:
            start = file.read(4096)
        probable = ("utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff"))  # byte order marks
                    else "utf-16-le" if b"\0" in start[1::2] else "utf-16-be" if b"\0" in start
                    else "windows-1252")
        hint = (f", but probably {probable}: give data/text/prepare.py --encoding={probable}, or "
                "convert the file to UTF-8") if is_utf8 else ""
        raise ValueError(f"{path} is not {encoding} text{hint}") from None


def read_text_file(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the documents of a text file. One longer than LONGEST is divided at line ends."""
    rest = ""
    with open_text(path, encoding) as file:
        while chunk := file.read(1 << 20):
            *whole, rest = (rest + chunk).split(EOT)
            yield from whole
            if len(rest) > LONGEST:
                end = max(rest.rfind("\n") + 1, LONGEST // 2)
                yield rest[:end]
                rest = rest[end:]
    yield rest


def read_rows(path: Path, column: str = "text", encoding: str = "utf-8") -> Iterator[object]:
    """Yield a column of a .jsonl, .json, .csv or .parquet file; a.b is field b of column a."""
    suffix = path.suffix.lower()
    with open(path, "rb") if suffix == ".parquet" else open_text(path, encoding) as file:
        rows = {".parquet": read_parquet, ".csv": read_csv}.get(suffix, read_json)(file)
        try:
            for number, row in enumerate(rows, 1):
                values = dict(flatten(row))
                if column not in values:
                    names = one_line(", ".join(values), 300) or "values without names"
                    raise ValueError(f"row {number} has no column {column!r}, only {names}: choose "
                                     "one with --column=NAME")
                yield values[column]
        except UnicodeError:  # open_text() explains it
            raise
        except (ValueError, OSError, csv.Error) as error:
            raise ValueError(f"{path}: {error}") from None


def flatten(row: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the columns of a row as (name, value). Nested fields are named outer.inner."""
    for name, value in row.items() if isinstance(row, dict) else ():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read_parquet(file: IO[bytes]) -> Iterator[dict]:
    from pyarrow.parquet import ParquetFile

    if file.read(1):  # not empty
        for batch in ParquetFile(file).iter_batches(1024):
            yield from batch.to_pylist()


def read_csv(file: IO[str]) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)  # the longest text
    rows = csv.DictReader(file, strict=True)
    for row in rows:
        if None in row or None in row.values():  # how DictReader marks extra and missing columns
            raise ValueError(f"line {rows.line_num} has more or fewer columns than the first one")
        yield row


def read_json(file: IO[str]) -> Iterator[object]:
    """Yield the rows of a JSON list, which is read as a whole, or of JSON lines."""
    is_list = file.read(1) == "["
    file.seek(0)
    if is_list:
        yield from json.load(file)
        return
    for number, line in enumerate(file, 1):
        try:
            rows = [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number} is not a JSON object: {error.msg}") from None
        yield from rows


def stripped(texts: Iterable[object], where: object, column: str) -> Iterator[str]:
    """Yield texts without surrounding white space. Skip empty ones, raise ValueError for others."""
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{where} has a row whose column {column!r} is not text")
        if text := text.strip():
            yield text


# -----------------------------------------------------------------------------
# Text from the Hugging Face hub

def import_datasets():
    """Import the library `datasets`. A redirected log does not get its progress bars."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def ask_hub(name: str, subset: str = "", stream: bool = False):
    """
    Load a dataset of the hub, or a local folder with the same layout.

    Return its splits, or if `stream` the rows of the train split, and NAME@COMMIT, '' for a folder.
    name: can end in @REVISION, a branch, tag or commit.
    """
    from huggingface_hub import HfApi

    datasets = import_datasets()
    hide_hub_progress()
    print(one_line(f"asking the Hugging Face hub for {name} ..."), file=sys.stderr)
    repo, _, revision = name.partition("@")
    try:
        builder = datasets.load_dataset_builder(repo, subset or None, revision=revision or None)
        commit = builder.hash
        # where the hub does not answer, the library takes any revision from its cache
        if (revision not in ("", commit)
                and HfApi().dataset_info(repo, revision=revision).sha != commit):
            raise ValueError(f"only the revision {commit} is in the cache")
        version = "" if Path(repo).is_dir() else f"{repo}@{commit}"
        if stream:
            return builder.as_streaming_dataset("train"), version
        builder.download_and_prepare()
        return builder.as_dataset(), version
    except Exception as error:  # a download can fail in any way
        reason = f"{type(error).__name__}: {one_line(error, 150)}"
        raise ValueError(f"{name} is not a local file, and the Hugging Face hub cannot be reached "
                         f"or does not have it ({reason}): give a local copy with "
                         "--source=FOLDER") from None


hub_dataset = functools.lru_cache(maxsize=1)(ask_hub)  # all splits with one request


def hub_rows(name: str, split: str, column: str = "text", subset: str = "") -> Iterator[object]:
    """Return a column of one split of a hub dataset, empty if it has no such split."""
    data, _ = hub_dataset(name, subset)
    if "train" not in data:
        raise ValueError(f"{name} has no train split, only {', '.join(data)}")
    columns = data["train"].column_names
    if column not in columns:
        raise ValueError(f"{name} has no column {column!r}, only {', '.join(columns)}: choose one "
                         "with --column=NAME")
    parts = [data[key].select_columns(column) for key in data if key.startswith(split)]
    return (value for part in parts for batch in part.iter(1024) for value in batch[column])


def hub_documents(name: str, split: str, column: str = "text", subset: str = "",
                  to_documents: Callable[..., Iterator[str]] | None = None) -> Iterator[str]:
    """
    Return the documents of one split of a hub dataset, if necessary divided by held_out().

    to_documents: see local_documents().
    """
    has_val = any(key.startswith("val") for key in hub_dataset(name, subset)[0])
    rows = hub_rows(name, split if has_val else "train", column, subset)
    texts = (to_documents or stripped)(rows, name, column)
    return texts if has_val else held_out(texts, split, can_split=to_documents is None)


def hub_source(name: str, subset: str = "") -> str:
    """Return NAME@COMMIT of a hub dataset, which is `source` in meta.json."""
    return hub_dataset(name, subset)[1]


# -----------------------------------------------------------------------------
# Token files

def tokenized(documents: Iterable[str], tokenizer) -> Iterator[tuple[np.ndarray, Counter]]:
    """
    Yield the ids of about PART characters of documents at a time, and their counts for meta.json.

    Each document is followed by the end-of-text id. The counts are tokens, documents, bytes (of
    UTF-8), characters, words (separated by ASCII white space) and, where the tokenizer has an
    unknown token, how many are unknown.
    """
    documents = iter(documents)
    eot = [np.array([tokenizer.eot], dtype=np.uint32)] if tokenizer.eot >= 0 else []
    while texts := list(leading(documents, PART)):
        parts = [part for ids in tokenizer.encode_many(texts) for part in (ids, *eot)]
        ids = np.concatenate(parts).astype(token_dtype(tokenizer.vocab_size))
        raw = "\n".join(["", *texts]).encode()
        # len(raw.split()) would take a fifth of the whole time
        space = WHITE_SPACE[np.frombuffer(raw, dtype=np.uint8)]
        words = int((space[:-1] & ~space[1:]).sum())
        counts = Counter(tokens=len(ids), documents=len(texts), bytes=len(raw) - len(texts),
                         characters=sum(map(len, texts)), words=words)
        if tokenizer.unk >= 0:
            counts["unknown"] = int((ids == tokenizer.unk).sum())
        yield ids, counts


def write_tokens(path: Path, parts: Iterator[tuple[np.ndarray, Counter]], digest,
                 enough: float = math.inf) -> Counter:
    """Write what tokenized() yields until there are enough tokens. Return the total counts."""
    total = Counter()
    with open_synced(path, "wb") as file:
        for ids, counts in parts:
            file.write(ids)
            digest.update(ids)
            total.update(counts)
            if total["tokens"] >= enough:
                break
    return total


def write_split(folder: Path, split: str, documents: Iterable[str], tokenizer,
                total: int | None = None) -> dict:
    """
    Tokenize documents on all cores and stream the ids to <split>.bin.tmp.

    Return the split's entry for meta.json: the counts of tokenized() and the sha256.
    finish_dataset() renames the file. total: number of documents, for the progress bar.
    """
    digest = hashlib.sha256()
    documents = progress(documents, f"tokenizing {split}", unit=" documents", total=total,
                         smoothing=0)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.bin.tmp"
    counts = write_tokens(path, tokenized(documents, tokenizer), digest)
    if not counts["tokens"]:
        path.unlink()
        raise ValueError(f"the {split} split is empty: the source has no text for it")
    return {**counts, "sha256": digest.hexdigest()}


@contextlib.contextmanager
def remove_temporary_files(folder: Path) -> Iterator[None]:
    """Remove the .bin.tmp files that finish_dataset() has not renamed, also after an error."""
    try:
        yield
    finally:
        for path in folder.glob("*.bin.tmp"):
            path.unlink()


def write_dataset(folder: Path, documents: Callable[[str], Iterable[str]], tokenizer,
                  **more) -> None:
    """
    Write a dataset. documents: a function of the split, 'train' or 'val'.

    more: other entries for meta.json, such as `source`, NAME@COMMIT of a hub dataset.
    """
    with remove_temporary_files(folder):
        splits = {split: write_split(folder, split, documents(split), tokenizer)
                  for split in ("train", "val")}
        finish_dataset(folder, tokenizer, splits, **more)


def finish_dataset(folder: Path, tokenizer, splits: dict[str, dict], **more) -> None:
    """
    Rename the files of the splits, and meta.json last: without it a dataset is not prepared.

    splits: their entries for meta.json. One with `shards` has that many files. more: other entries,
    left out if empty.
    """
    more = {name: value for name, value in more.items() if value}
    meta = {"format_version": FORMAT_VERSION, "dataset": folder.name, "tokenizer": tokenizer.spec,
            "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
            "dtype": token_dtype(tokenizer.vocab_size).name, "splits": splits, **more}
    temporary = folder / "meta.json.tmp"
    with open_synced(temporary) as file:
        json.dump(meta, file, indent=1, ensure_ascii=False)
    (folder / "meta.json").unlink(missing_ok=True)
    for split, counts in splits.items():
        names = [f"{split}.bin"]
        if "shards" in counts:
            names = [f"{split}_{i:03}.bin" for i in range(counts["shards"])]
        for old in set(split_files(folder, split)) - {folder / name for name in names}:
            old.unlink()  # of a dataset that this one replaces
        for name in names:
            replace_file(folder / f"{name}.tmp", folder / name)
    replace_file(temporary, folder / "meta.json")
    for split, counts in splits.items():
        n, documents, unknown = counts["tokens"], counts["documents"], counts.get("unknown", 0)
        note = f"; {unknown:,} of the tokens ({unknown / n:.2%}) are unknown" if unknown else ""
        names = [f"{split}.bin"]
        if "shards" in counts:  # the first and the last shard
            names = sorted({f"{split}_{i:03}.bin" for i in (0, counts["shards"] - 1)})
        where = visible(folder / " to ".join(names))
        print(f"{where}: {n:,} tokens, {documents:,} documents{note}")


# -----------------------------------------------------------------------------
# meta.json

def command_in_configs(folder: Path) -> str:
    """Return the command that writes a dataset, from a comment line of a config, or ''."""
    pattern = rf"^# +(python data/.*--out_dir={re.escape(folder.as_posix())})$"
    for config in sorted(Path("config").glob("*.py")):
        if line := re.search(pattern, config.read_text(encoding="utf-8"), re.MULTILINE):
            return line[1]
    return ""


def load_meta(folder: Path) -> dict:
    """Return a dataset's checked meta.json, or what is known of one that nanoGPT prepared."""
    prepare = f"python {folder}/prepare.py"
    if not folder.is_dir():
        if command := command_in_configs(folder):
            raise ValueError(f"the dataset {folder.name} is not prepared: run `{command}`")
        known = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/prepare.py")))
        raise ValueError(f"there is no dataset {folder.name} in {folder.parent}, which has "
                         f"{known or 'none'}; each prepare.py can write it with --out_dir={folder}")
    if not (folder / "meta.json").is_file():
        if not any(folder.glob("train*.bin")) or any(folder.glob("*.tmp")):
            raise ValueError(f"the dataset {folder.name} is not prepared: run `{prepare}`")
        pickled = folder / "meta.pkl"
        spec = read_nanogpt_characters(pickled) if pickled.is_file() else {"kind": "gpt2"}
        return {"format_version": FORMAT_VERSION} | meta_of(spec, folder.name)
    try:
        meta = load_json(folder / "meta.json")
        check_meta(meta)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}/meta.json is damaged ({error}): run `{prepare}` "
                         "again") from None
    return meta


def check_once(stream: TokenStream, meta: dict) -> str:
    """
    Check a split like stream.check(), but read a large one only once, as that takes minutes.

    <split>.checked.json has the result, which is valid while the names, sizes and modification
    times of the files are the same.
    """
    folder = Path(stream.name).parent
    stats = [(path.name, path.stat()) for path in split_files(folder, stream.split)]
    if sum(stat.st_size for _, stat in stats) < LARGE:
        return stream.check(meta)
    condition = {"files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
                 "vocab_size": meta["vocab_size"],
                 "expected": meta["splits"].get(stream.split, {}).get("sha256")}
    path = folder / f"{stream.split}.checked.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        checked = load_json(path)
        if checked["condition"] == condition:
            return checked["sha256"]
    sha256 = stream.check(meta)
    with contextlib.suppress(OSError):  # a folder that cannot be written: check again next time
        write_atomically(path, json.dumps({"condition": condition, "sha256": sha256}))
    return sha256


def check_meta(meta: dict) -> None:
    """Raise an exception unless meta.json has what is read from it later."""
    version = meta["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"its format version is {version}, not {FORMAT_VERSION}")
    vocab_size, eot = meta["vocab_size"], meta["eot"]
    if not (type(vocab_size) is type(eot) is int and 0 < vocab_size <= LARGEST_VOCABULARY):
        raise ValueError("vocab_size and eot must be integers, vocab_size at most "
                         f"{LARGEST_VOCABULARY:,}")
    if meta.get("dtype", (expected := token_dtype(vocab_size).name)) != expected:
        raise ValueError(f"dtype must be {expected} with a vocabulary of {vocab_size:,}")
    if not -1 <= eot < vocab_size:
        raise ValueError("eot must be a token id, or -1")
    tokenizer = meta["tokenizer"]
    size = len(tokenizer.get("vocab", range(vocab_size)))
    if tokenizer["kind"] not in KINDS or size != vocab_size:
        raise ValueError("its tokenizer is unknown or has another vocabulary")
    if type(meta["dataset"]) is not str or not is_number(meta.get("floor", 0.0)):
        raise ValueError("dataset must be a name, and floor a number")
    if "chat" in meta:
        chat = meta["chat"]
        ids = [chat["end"], *chat["answer"]]
        if chat.keys() != {"answer", "end"} or not all(type(i) is int for i in ids):
            raise ValueError("chat must have the ids of `answer` and `end`")
    for counts in (meta["splits"]["train"], meta["splits"]["val"]):
        numbers = [counts[name] for name in ("tokens", "bytes", "words", "characters")
                   if name in counts or name in ("tokens", "bytes")]
        if not (all(type(n) is int and 0 < n <= 2**53 for n in numbers)
                and type(counts["sha256"]) is str):
            raise ValueError("a count or the checksum of a split is missing")
