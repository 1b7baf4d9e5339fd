"""
Data sets on disk, both ways.

data/<name>/ holds train.bin and val.bin, raw little-endian uint16 token ids with the end-of-text id behind every
document, and meta.json, which tells what they are: tokenizer, counts, checksums. A large split may lie in train_000.bin,
train_001.bin, ... and reads as one stream. nanoGPT's .bin files, which have no meta.json, count as GPT-2 tokens.
"""
import functools
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenizer import EOT, KINDS, leading, meta_of, read_nanogpt_characters

FORMAT_VERSION = 1
POOL = 64  # batches
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


# -----------------------------------------------------------------------------
# Reading tokens

def load_meta(folder: Path) -> dict:
    """A data set's meta.json, checked; what nanoGPT's own data sets are, where there is none."""
    prepare = f"python {folder}/prepare.py"
    if not folder.is_dir():
        known = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/prepare.py")))
        raise ValueError(f"there is no data set {folder.name}; there are {known or 'none'} in {folder.parent}, and each one's "
                         f"prepare.py can write {folder.name} with --out_dir={folder}")
    if not (folder / "meta.json").is_file():
        if not any(folder.glob("train*.bin")) or any(folder.glob("*.tmp")):
            raise ValueError(f"the data set {folder.name} is not prepared: run `{prepare}`")
        pickled = folder / "meta.pkl"
        spec = read_nanogpt_characters(pickled) if pickled.is_file() else {"kind": "gpt2"}
        return {"format_version": FORMAT_VERSION} | meta_of(spec, folder.name)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if type(meta["format_version"]) is not int or meta["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format version is {meta['format_version']}, not {FORMAT_VERSION}")
        tokenizer, vocab_size, eot, splits = meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["splits"]
        if not (type(vocab_size) is type(eot) is int and 0 < vocab_size <= 65536 and -1 <= eot < vocab_size):
            raise ValueError("vocab_size and eot must be whole numbers, with at most 65,536 tokens")
        if tokenizer["kind"] not in KINDS or len(tokenizer.get("vocab", range(vocab_size))) != vocab_size:
            raise ValueError("its tokenizer is unknown or has another vocabulary")
        for counts in (splits["train"], splits["val"]):
            if not (type(counts["tokens"]) is int and counts["tokens"] > 0 and type(counts["sha256"]) is str):
                raise ValueError("its splits lack the number of their tokens or their checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}/meta.json is damaged ({error}): run `{prepare}` again") from None
    return meta


def split_files(folder: Path, split: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{split}*.bin") if re.fullmatch(rf"{split}(_\d+)?\.bin", path.name))


class TokenStream:
    """One split of a data set: all its .bin files as one sequence of token ids."""

    def __init__(self, folder: Path, split: str, meta: dict):
        paths = split_files(folder, split)
        if not paths:
            raise ValueError(f"there is no {folder}/{split}.bin: run `python {folder}/prepare.py`")
        for path in paths:
            if path.stat().st_size == 0 or path.stat().st_size % 2:
                raise ValueError(f"{path} has {path.stat().st_size} bytes: not a file of 2-byte tokens")
        self.name, self.split = f"{folder}/{split}", split
        self.shards = [np.memmap(path, dtype="<u2", mode="r") for path in paths]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        expected = meta["splits"].get(split, {}).get("tokens", len(self))
        if len(self) != expected:
            raise ValueError(f"{self.name} has {len(self):,} tokens, but meta.json says {expected:,}: prepare it again")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1 as int64, across the borders of files."""
        first, last = np.searchsorted(self.starts, [start, stop - 1], side="right") - 1
        parts = [self.shards[i][max(0, start - self.starts[i]):stop - self.starts[i]] for i in range(first, last + 1)]
        return np.concatenate(parts).astype(np.int64)

    def word_counts(self, vocab_size: int) -> torch.Tensor:
        """How often each word occurs in the first four million tokens, (vocab_size)."""
        return torch.from_numpy(np.bincount(self.read(0, min(len(self), 1 << 22)), minlength=vocab_size))

    def check(self, meta: dict) -> None:
        """Read all of it once: ValueError where an id is outside the vocabulary or the bytes are not those that meta knows."""
        digest, largest = hashlib.sha256(), 0
        for shard in self.shards:
            for i in range(0, len(shard), 1 << 22):
                digest.update(shard[i:i + (1 << 22)])
                largest = max(largest, int(shard[i:i + (1 << 22)].max()))
        if largest >= meta["vocab_size"]:
            raise ValueError(f"{self.name} has the token id {largest}, but the vocabulary has only {meta['vocab_size']:,}")
        expected = meta["splits"].get(self.split, {}).get("sha256", digest.hexdigest())
        if digest.hexdigest() != expected:
            raise ValueError(f"{self.name} is not what meta.json describes (its SHA-256 differs): prepare it again")

    def document_rows(self, eot: int, block_size: int) -> np.ndarray:
        """
        Rows of (start, stop), one a document, or more where it is longer than block_size. Inputs are the tokens
        start - 1 to stop - 2 and targets start to stop - 1: a story is foretold from the end-of-text before it.
        """
        if eot < 0:
            raise ValueError(f"{self.name} has no end-of-text tokens, so batching='by_length' finds no documents in it")
        ends = np.concatenate([start + 1 + np.flatnonzero(shard == eot) for start, shard in zip(self.starts, self.shards)])
        ends = ends if len(ends) and ends[-1] == len(self) else np.append(ends, len(self))
        begins = np.append(0, ends[:-1])
        pieces = -(-(ends - begins) // block_size)
        piece = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)  # of its document, from 0
        starts = np.repeat(begins, pieces) + block_size * piece
        return np.stack([starts, np.minimum(starts + block_size, np.repeat(ends, pieces))], axis=1)

    def window_rows(self, block_size: int) -> np.ndarray:
        """Rows of (start, stop) as above that foretell every token but the first one, block_size at a time."""
        starts = np.arange(1, len(self), block_size)
        return np.stack([starts, np.minimum(starts + block_size, len(self))], axis=1)

    def sliding_rows(self, block_size: int, stride: int) -> np.ndarray:
        """
        Windows of block_size tokens, each `stride` further on, as rows of (start, stop, first): what is before `first` serves
        as context only, for an earlier window has foretold it. As in https://huggingface.co/docs/transformers/perplexity.
        """
        if not 1 <= stride < block_size:
            raise ValueError(f"stride must be at least 1 and below block_size ({block_size}), got {stride}")
        begins = np.arange(0, len(self), stride)
        ends = np.minimum(begins + block_size, len(self))
        firsts = np.append(1, ends[:-1])
        return np.stack([begins + 1, ends, firsts], axis=1)[firsts < len(self)]


def collate(stream: TokenStream, rows: np.ndarray, eot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rows of (start, stop) as inputs and targets (B, T), T the longest; padding is masked with the target -1, and in rows of
    (start, stop, first) what comes before `first`.
    """
    T = int((rows[:, 1] - rows[:, 0]).max())
    x = np.zeros((len(rows), T), dtype=np.int64)
    y = np.full((len(rows), T), -1, dtype=np.int64)
    for i, (start, stop, *first) in enumerate(rows):
        tokens = stream.read(max(start - 1, 0), stop)
        x[i, :stop - start] = tokens[:-1] if start else np.append(eot, tokens[:-1])
        y[i, :stop - start] = tokens[-(stop - start):]
        if first:
            y[i, :first[0] - start] = -1
    return torch.from_numpy(x), torch.from_numpy(y)


def shuffled(i: np.ndarray, n: int, key: int) -> np.ndarray:
    """
    Where a random permutation of 0 ... n - 1 puts the positions i, without ever writing that permutation down: a
    Feistel network on the next even number of bits, applied again to what falls outside of n.
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(key).generate_state(6, np.uint64)
    i = np.asarray(i, dtype=np.uint64)
    todo = np.ones(i.shape, dtype=bool)
    while todo.any():
        left, right = i[todo] >> np.uint64(half), i[todo] & mask
        for k in keys:
            mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)  # wraps around: that is the mixing
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        i[todo] = left << np.uint64(half) | right
        todo = i >= n
    return i.astype(np.int64)


class TrainBatches:
    """
    Micro-batches as a pure function of their number: `batch(i)` is the same on every rank and after every restart, so
    there is no state to save. Each epoch serves every row once, in another order.

    'windows': windows of block_size + 1 tokens, cut at another offset each epoch. 'by_length': documents, one a row,
    those of like length together and padded to the longest; sorted within pools of 64 batches, since batches of one
    length only would be too much alike in content too.
    """

    def __init__(self, stream: TokenStream, block_size: int, batch_size: int, seed: int, batching: str = "windows",
                 eot: int = -1):
        if batching not in ("windows", "by_length"):
            raise ValueError(f"batching must be 'windows' or 'by_length', got {batching!r}")
        if batching == "windows" and len(stream) <= block_size:
            raise ValueError(f"{stream.name} has {len(stream):,} tokens, fewer than a window of block_size + 1 = "
                             f"{block_size + 1:,}")
        self.stream, self.block_size, self.batch_size = stream, block_size, batch_size
        self.seed, self.batching, self.eot = seed, batching, eot
        self.offsets = min(block_size, len(stream) - block_size)  # an epoch's windows begin at one of so many offsets
        self.windows = (len(stream) - self.offsets) // block_size  # in an epoch, whatever its offset
        self.rows = stream.document_rows(eot, block_size) if batching == "by_length" else None
        self.order: tuple[int, np.ndarray] = (-1, np.empty(0))  # an epoch and its order of rows

    def batch(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (B, T) of global micro-batch i."""
        return collate(self.stream, self.rows_of_batch(i), self.eot)

    def rows_of_batch(self, i: int) -> np.ndarray:
        if self.batching == "by_length":
            return self.documents_of_batch(i)
        position = i * self.batch_size + np.arange(self.batch_size)
        starts = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(position // self.windows):
            here = position // self.windows == epoch
            key = self.key(epoch)
            offset = np.random.default_rng(key).integers(self.offsets)
            starts[here] = 1 + offset + self.block_size * shuffled(position[here] % self.windows, self.windows, key)
        return np.stack([starts, starts + self.block_size], axis=1)

    def documents_of_batch(self, i: int) -> np.ndarray:
        batches = -(-len(self.rows) // self.batch_size)
        epoch, i = divmod(i, batches)
        if self.order[0] != epoch:
            self.order = epoch, self.document_order(epoch)
        i = int(shuffled(np.array([i]), batches, self.key(epoch))[0])
        return self.rows[self.order[1][i * self.batch_size:(i + 1) * self.batch_size]]

    def document_order(self, epoch: int, sort: bool = True) -> np.ndarray:
        """The order of the rows in an epoch, random but for the pools being sorted by length."""
        order = np.random.default_rng(self.key(epoch)).permutation(len(self.rows))
        pool = np.arange(len(order)) // (POOL * self.batch_size)
        return order[np.lexsort(((self.rows[:, 1] - self.rows[:, 0])[order], pool))] if sort else order

    @property
    def rows_per_epoch(self) -> int:
        return self.windows if self.rows is None else len(self.rows)

    def padding(self, sort: bool = True) -> float:
        """Share of padding in the batches of an epoch of documents: by length, or, to compare, in random order."""
        lengths = (self.rows[:, 1] - self.rows[:, 0])[self.document_order(0, sort)]
        whole = lengths[:len(lengths) // self.batch_size * self.batch_size].reshape(-1, self.batch_size)
        return 1 - whole.sum() / (self.batch_size * whole.max(axis=1).sum()) if len(whole) else 0.0

    def key(self, epoch: int) -> int:
        return (self.seed << 32) + int(epoch)


def eval_batches(stream: TokenStream, block_size: int, batch_size: int, batching: str = "windows", eot: int = -1,
                 max_batches: int = 0, rank: int = 0, world_size: int = 1,
                 stride: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    The leading max_batches (0: all) batches of a split, always the same ones, in order; every rank its share. With a
    stride, windows overlap, so that a token is foretold from at least block_size - stride tokens where there are as many.
    """
    if batching not in ("windows", "by_length"):
        raise ValueError(f"batching must be 'windows' or 'by_length', got {batching!r}")
    if stride and batching != "windows":
        raise ValueError(f"a stride needs batching='windows', got {batching!r}, where documents are read one by one")
    if stride:
        rows = stream.sliding_rows(block_size, stride)
    else:
        rows = stream.document_rows(eot, block_size) if batching == "by_length" else stream.window_rows(block_size)
    if max_batches:
        rows = rows[:max_batches * batch_size]
    rows = rows[np.argsort(rows[:, 0] - rows[:, 1], kind="stable")]  # longest first: little padding, early out of memory
    return (collate(stream, rows[i:i + batch_size], eot) for i in range(rank * batch_size, len(rows), world_size * batch_size))


def prefetch(batches: Iterable[tuple[torch.Tensor, torch.Tensor]], device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches on `device`, the next one prepared in a thread (pinned for CUDA) while this one is in use."""
    batches = iter(batches)

    def load():
        batch = next(batches, None)
        return tuple(t.pin_memory() for t in batch) if batch and device.startswith("cuda") else batch

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(load)
        while batch := ahead.result():
            ahead = thread.submit(load)
            yield tuple(t.to(device, non_blocking=True) for t in batch)
