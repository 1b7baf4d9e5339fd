"""
Read token files and batch them.

data/<name>/ holds train.bin and val.bin, raw little-endian uint16 token ids with the end-of-text id
after each document, and meta.json, which corpus.py writes and reads. With more than 65,536 tokens,
ids are uint32 (`dtype` in meta.json). A large split may be divided into train_000.bin, ...
"""
import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

POOL = 64  # steps whose documents are sorted by length together


def split_files(folder: Path, split: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{split}*.bin")
                  if re.fullmatch(rf"{split}(_\d+)?\.bin", path.name))


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type of the ids in .bin files."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


class TokenStream:
    """
    One split of a dataset: all its .bin files as one sequence of token ids.

    Its methods for spans return arrays of (start, stop), each the targets of one row of a batch:
    the tokens start to stop - 1, predicted from the tokens start - 1 to stop - 2.

    answers: (n, 2) spans of the assistant's answers, None unless the dataset holds conversations.
    """

    def __init__(self, folder: Path, split: str, meta: dict):
        paths = split_files(folder, split)
        dtype = np.dtype(meta.get("dtype", "uint16")).newbyteorder("<")
        if not paths:
            raise ValueError(f"there is no {folder}/{split}.bin: run `python {folder}/prepare.py`")
        for path in paths:
            size = path.stat().st_size
            if size == 0 or size % dtype.itemsize:
                raise ValueError(f"{path} has {size} bytes: not a file of {dtype.itemsize}-byte "
                                 "tokens")
        self.name, self.split, self.answers = f"{folder}/{split}", split, None
        self.shards = [np.memmap(path, dtype=dtype, mode="r") for path in paths]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        expected = meta["splits"].get(split, {}).get("tokens", len(self))
        if len(self) != expected:
            raise ValueError(f"{self.name} has {len(self):,} tokens, but meta.json says "
                             f"{expected:,}: prepare it again")

        if "chat" in meta:  # only the answers of conversations are trained and measured
            self.answers = self.answer_spans(**meta["chat"])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens start to stop - 1 as int64."""
        first, last = np.searchsorted(self.starts, [start, stop - 1], side="right") - 1
        parts = [self.shards[i][max(0, start - self.starts[i]):stop - self.starts[i]]
                 for i in range(first, last + 1)]
        return np.concatenate(parts).astype(np.int64)

    def token_counts(self, vocab_size: int) -> torch.Tensor:
        """Return how often each token occurs in the first four million, (vocab_size,)."""
        ids = self.read(0, min(len(self), 1 << 22))
        return torch.from_numpy(np.bincount(ids, minlength=vocab_size))

    def check(self, meta: dict) -> str:
        """Return the files' SHA-256. Raise ValueError for a wrong checksum or an unknown id."""
        digest, largest = hashlib.sha256(), 0
        for shard in self.shards:
            for i in range(0, len(shard), 1 << 22):
                part = shard[i:i + (1 << 22)]
                digest.update(part)
                largest = max(largest, int(part.max()))
        if largest >= meta["vocab_size"]:
            raise ValueError(f"{self.name} has the token id {largest}, but the vocabulary has only "
                             f"{meta['vocab_size']:,}")
        expected = meta["splits"].get(self.split, {}).get("sha256", digest.hexdigest())
        if digest.hexdigest() != expected:
            raise ValueError(f"{self.name} is not what meta.json describes (its SHA-256 differs): "
                             "prepare it again")
        return digest.hexdigest()

    def window_spans(self, block_size: int) -> np.ndarray:
        """Return spans of at most block_size tokens that cover every token but the first."""
        starts = np.arange(1, len(self), block_size)
        return np.stack([starts, np.minimum(starts + block_size, len(self))], axis=1)

    def document_spans(self, eot: int, block_size: int) -> np.ndarray:
        """
        Return the spans of the documents, divided where they are longer than block_size.

        The first token of a document is predicted from the end-of-text before it, but the first
        token of a conversation is only input, as in other programs.
        """
        if eot < 0:
            raise ValueError(f"{self.name} has no end-of-text tokens, so batching='by_length' and "
                             "last_words find no documents in it")
        ends = np.concatenate([start + 1 + np.flatnonzero(shard == eot)
                               for start, shard in zip(self.starts, self.shards)])
        if not len(ends) or ends[-1] != len(self):
            ends = np.append(ends, len(self))
        begins = np.append(0, ends[:-1]) + (0 if self.answers is None else 1)
        n_parts = -(-(ends - begins) // block_size)
        part = np.arange(n_parts.sum()) - np.repeat(n_parts.cumsum() - n_parts, n_parts)
        starts = np.repeat(begins, n_parts) + block_size * part
        stops = np.minimum(starts + block_size, np.repeat(ends, n_parts))
        spans = np.stack([starts, stops], axis=1)
        if self.answers is None:
            return spans
        # keep only spans that overlap an answer: the first answer that ends after the span begins
        first = np.searchsorted(self.answers[:, 1], starts, side="right")
        answer_starts = np.append(self.answers[:, 0], len(self))[first]
        return spans[answer_starts < stops]

    def answer_spans(self, answer: list[int], end: int) -> np.ndarray:
        """
        Return the span of each answer: it follows the ids `answer` and ends with the id `end`.

        See chat.answer_marks().
        """
        ids = np.concatenate(self.shards)
        found = np.ones(max(0, len(ids) - len(answer)), dtype=bool)
        for i, token in enumerate(answer):
            found &= ids[i:i + len(found)] == token
        starts = np.flatnonzero(found) + len(answer)
        if not len(starts):
            raise ValueError(f"{self.name} has no answers: no message is by the assistant")
        ends = np.append(np.flatnonzero(ids == end) + 1, len(ids))
        return np.stack([starts, ends[np.searchsorted(ends, starts, side="right")]], axis=1)

    def is_target(self, start: int, stop: int) -> np.ndarray:
        """Return which of the tokens start to stop - 1 are targets: all, or those of answers."""
        tokens = np.arange(start, stop)
        if self.answers is None:
            return np.ones(stop - start, dtype=bool)
        # the last answer that starts at or before each token
        last = np.searchsorted(self.answers[:, 0], tokens, side="right") - 1
        return (last >= 0) & (tokens < self.answers[last, 1])

    def sliding_spans(self, block_size: int, stride: int) -> np.ndarray:
        """
        Return spans of overlapping windows, each `stride` tokens after the last, as (start, stop,
        first): the tokens before `first` are only context, as an earlier window predicts them.

        Source: https://huggingface.co/docs/transformers/perplexity
        """
        if not 1 <= stride < block_size:
            raise ValueError(f"stride must be at least 1 and below block_size ({block_size}), "
                             f"got {stride}")
        begins = np.arange(0, len(self), stride)
        ends = np.minimum(begins + block_size, len(self))
        firsts = np.append(1, ends[:-1])
        return np.stack([begins + 1, ends, firsts], axis=1)[firsts < len(self)]


def collate(stream: TokenStream, spans: np.ndarray, eot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return inputs and targets (B, T) of B spans, T the length of the longest.

    Targets are -1 for padding, outside of the answers of conversations and, in spans of
    (start, stop, first), for the tokens before first.
    """
    T = int((spans[:, 1] - spans[:, 0]).max())
    x = np.zeros((len(spans), T), dtype=np.int64)
    y = np.full((len(spans), T), -1, dtype=np.int64)
    for i, (start, stop, *first) in enumerate(spans):
        tokens = stream.read(max(start - 1, 0), stop)
        x[i, :stop - start] = tokens[:-1] if start else np.append(eot, tokens[:-1])
        y[i, :stop - start] = tokens[-(stop - start):]
        if stream.answers is not None:
            y[i, :stop - start][~stream.is_target(start, stop)] = -1
        if first:
            y[i, :first[0] - start] = -1
    return torch.from_numpy(x), torch.from_numpy(y)


def permute(i: np.ndarray, n: int, key: int) -> np.ndarray:
    """
    Map positions i by a random permutation of 0 ... n - 1.

    Nothing is stored: a Feistel network permutes all numbers of an even bit width and is applied
    again while a result is n or more. If n is a power of 4 and at least 16, the permutation is
    always even.
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(key).generate_state(6, np.uint64)
    i = np.asarray(i, dtype=np.uint64)
    todo = np.ones(i.shape, dtype=bool)
    while todo.any():
        left, right = i[todo] >> np.uint64(half), i[todo] & mask
        for k in keys:
            mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)  # the overflow does the mixing
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        i[todo] = left << np.uint64(half) | right
        todo = i >= n
    return i.astype(np.int64)


class TrainBatches:
    """
    Micro-batches as a pure function of their number.

    batch(i) is the same on every rank and after every restart, so there is no state to save. Each
    epoch uses every row once, in a new order. micro_batches: how many make a step. Changing it
    and batch_size with the same product leaves the rows of each step unchanged.

    batching 'windows': rows of block_size tokens, cut at a new offset in each epoch. Tokens before
    the first and after the last whole window are skipped in that epoch: with windows of 128, 57% of
    a text of 300 tokens and 1.4% of one of 10,000. 'by_length': one document per row, batched with
    others of similar length and padded to the longest. Documents are sorted only within random
    pools of 64 steps, so that steps differ in every epoch. One step of an epoch may be smaller.
    """

    def __init__(self, stream: TokenStream, block_size: int, batch_size: int, seed: int,
                 batching: str = "windows", eot: int = -1, micro_batches: int = 1):
        check_batching(batching, stream)
        if batching == "windows" and len(stream) <= block_size:
            raise ValueError(f"{stream.name} has {len(stream):,} tokens, fewer than a window of "
                             f"block_size + 1 = {block_size + 1:,}")
        self.stream, self.block_size, self.batch_size = stream, block_size, batch_size
        self.seed, self.eot, self.micro_batches = seed, eot, micro_batches
        self.rows_per_step = batch_size * micro_batches
        self.n_offsets = min(block_size, len(stream) - block_size)  # where an epoch may begin
        self.n_windows = (len(stream) - self.n_offsets) // block_size  # from any of the offsets
        by_length = batching == "by_length"
        self.documents = stream.document_spans(eot, block_size) if by_length else None
        if by_length:
            self.steps_per_epoch = math.ceil(len(self.documents) / self.rows_per_step)
        self.order: tuple[int, np.ndarray] = (-1, np.empty(0))  # of the documents in an epoch

    def batch(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets (B, T) of global micro-batch i."""
        return collate(self.stream, self.spans_of_batch(i), self.eot)

    def spans_of_batch(self, i: int) -> np.ndarray:
        return self.windows_of_batch(i) if self.documents is None else self.documents_of_batch(i)

    def windows_of_batch(self, i: int) -> np.ndarray:
        position = i * self.batch_size + np.arange(self.batch_size)
        starts = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(position // self.n_windows):
            in_epoch = position // self.n_windows == epoch
            key = self.key(epoch)
            offset = np.random.default_rng(key).integers(self.n_offsets)
            window = permute(position[in_epoch] % self.n_windows, self.n_windows, key)
            starts[in_epoch] = 1 + offset + self.block_size * window
        return np.stack([starts, starts + self.block_size], axis=1)

    def documents_of_batch(self, i: int) -> np.ndarray:
        step, part = divmod(i, self.micro_batches)
        rows = self.documents_of_step(step)
        mine = rows[part * self.batch_size:(part + 1) * self.batch_size]
        return mine if len(mine) else rows[:1]  # past the end of a small step: a row of weight 0

    def documents_of_step(self, step: int) -> np.ndarray:
        epoch, step = divmod(step, self.steps_per_epoch)
        if self.order[0] != epoch:
            self.order = epoch, self.document_order(epoch)
        step = int(permute(np.array([step]), self.steps_per_epoch, self.key(epoch))[0])
        first = step * self.rows_per_step
        return self.documents[self.order[1][first:first + self.rows_per_step]]

    def weight(self, i: int) -> float:
        """
        Return the weight of micro-batch i in its step's mean loss, 1 on average over the step.

        It is proportional to the number of targets, so every target of a step counts the same.
        """
        if self.documents is None or self.micro_batches == 1:
            return 1.0
        step, part = divmod(i, self.micro_batches)
        n_targets = np.array([self.stream.is_target(*span).sum()
                              for span in self.documents_of_step(step)])
        mine = n_targets[part * self.batch_size:(part + 1) * self.batch_size]
        return self.micro_batches * float(mine.sum() / n_targets.sum())

    def document_order(self, epoch: int, sort: bool = True) -> np.ndarray:
        """Return a random order of the documents, sorted by length within each pool."""
        order = np.random.default_rng(self.key(epoch)).permutation(len(self.documents))
        if not sort:
            return order
        lengths = (self.documents[:, 1] - self.documents[:, 0])[order]
        pool = np.arange(len(order)) // (POOL * self.rows_per_step)
        return order[np.lexsort((lengths, pool))]

    def key(self, epoch: int) -> int:
        return (self.seed << 32) + int(epoch)

    def steps_in(self, epochs: float) -> int:
        """Return the number of steps in this many epochs, rounded up."""
        if self.documents is None:
            return math.ceil(epochs * self.n_windows / self.rows_per_step)
        return math.ceil(epochs * self.steps_per_epoch)

    def padding(self, sort: bool = True) -> float:
        """Return the share of padding in an epoch of documents, sorted by length or not."""
        order = self.document_order(0, sort)
        lengths = (self.documents[:, 1] - self.documents[:, 0])[order]
        whole = lengths[:len(lengths) // self.batch_size * self.batch_size]
        whole = whole.reshape(-1, self.batch_size)
        if not len(whole):
            return 0.0
        return 1 - whole.sum() / (self.batch_size * whole.max(axis=1).sum())


def check_batching(batching: str, stream: TokenStream) -> None:
    if batching not in ("windows", "by_length"):
        raise ValueError(f"batching must be 'windows' or 'by_length', got {batching!r}")
    if batching == "windows" and stream.answers is not None:
        raise ValueError(f"{stream.name} holds conversations: use --batching=by_length")


def eval_spans(stream: TokenStream, block_size: int, batching: str = "windows", eot: int = -1,
               stride: int = 0) -> np.ndarray:
    """Return the spans of the rows that eval_batches() reads."""
    check_batching(batching, stream)
    if stride and batching != "windows":
        raise ValueError(f"a stride needs batching='windows', got {batching!r}, which reads "
                         "documents one by one")
    if stride:
        return stream.sliding_spans(block_size, stride)
    if batching == "by_length":
        return stream.document_spans(eot, block_size)
    return stream.window_spans(block_size)


def eval_batches(stream: TokenStream, block_size: int, batch_size: int, batching: str = "windows",
                 eot: int = -1, max_batches: int = 0, rank: int = 0, world_size: int = 1,
                 stride: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    Yield the leading max_batches (0: all) batches of a split, always the same. Ranks share them.

    stride: overlap windows, so that each token is predicted from at least block_size - stride
    tokens, except at the start of the split (0: no overlap).
    """
    spans = eval_spans(stream, block_size, batching, eot, stride)
    if max_batches:
        spans = spans[:max_batches * batch_size]
    # longest first: little padding, and if memory is too small that shows early
    spans = spans[np.argsort(spans[:, 0] - spans[:, 1], kind="stable")]
    return (collate(stream, spans[i:i + batch_size], eot)
            for i in range(rank * batch_size, len(spans), world_size * batch_size))


def prefetch(batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
             device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the batches on the device; beside a GPU, prepare the next one in a thread."""
    if device.startswith("cpu"):  # a thread would slow down those that compute
        yield from batches
        return
    # CUDA copies without waiting, from pinned memory, which lives until the copy has ended
    batches, cuda = iter(batches), device.startswith("cuda")

    def load():
        batch = next(batches, None)
        if batch and cuda:
            return tuple(t.pin_memory() for t in batch)
        return batch

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(load)
        while batch := ahead.result():
            ahead = thread.submit(load)
            yield tuple(t.to(device, non_blocking=cuda) for t in batch)
