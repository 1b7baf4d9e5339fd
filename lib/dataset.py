"""
Data sets on disk, both ways.

data/<name>/ holds train.bin and val.bin, raw little-endian uint16 token ids with the end-of-text id behind every
document, and meta.json, which tells what they are: tokenizer, counts, checksums. A large split may lie in train_000.bin,
train_001.bin, ... and reads as one stream. nanoGPT's .bin files, which have no meta.json, count as GPT-2 tokens.
"""
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from lib.tokenizer import KINDS, meta_of, read_nanogpt_characters

FORMAT_VERSION = 1
POOL = 64  # batches


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
