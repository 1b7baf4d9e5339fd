"""Read and batch token files: order, windows, documents, evaluation and damaged files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import SPLITS
from lib.corpus import finish_dataset, load_meta, write_split
from lib.dataset import TokenStream, TrainBatches, eval_batches, permute, prefetch
from lib.tokenizer import get_tokenizer, train_tokenizer


def bins(folder: Path, **splits: list[int]) -> dict:
    """Write token files without meta.json, as nanoGPT does. Return their meta."""
    folder.mkdir(exist_ok=True)
    for split, ids in splits.items():
        np.array(ids, dtype="<u2").tofile(folder / f"{split}.bin")
    return load_meta(folder)


def test_an_epoch_of_windows_covers_what_its_docstring_says(tmp_path):
    for n, share in ((300, 0.43), (10_000, 0.986)):
        stream = TokenStream(tmp_path, "train", bins(tmp_path, train=np.arange(n)))
        batches = TrainBatches(stream, 128, 1, 0)
        seen = sum((batches.batch(i)[1][0].tolist() for i in range(batches.n_windows)), [])
        assert len(seen) == len(set(seen)) and len(seen) / n == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000, 1025])
def test_permute_is_a_permutation(n):
    one, two = (permute(np.arange(n), n, key) for key in (1, 2))
    assert sorted(one) == sorted(two) == list(range(n))
    if n >= 64:
        assert (one != two).mean() > 0.8 and (one != np.arange(n)).mean() > 0.8
        assert abs(np.corrcoef(np.arange(n), one)[0, 1]) < 0.3


def test_permute_is_random_at_any_size():
    """Over many keys, each position goes to each place equally often (chi-squared test)."""
    n, keys = 6, 3000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, key)] += 1
    assert ((counts - keys / n) ** 2 / (keys / n)).sum() < 70
    big = permute(np.arange(1000), 10**11, 7)
    assert len(set(big)) == 1000 and 0.45e11 < big.mean() < 0.55e11


def test_an_epoch_serves_every_window_once(tmp_path):
    meta = bins(tmp_path / "d", train=list(range(1003)), val=[1, 2])
    stream = TokenStream(tmp_path / "d", "train", meta)
    batches = TrainBatches(stream, block_size=10, batch_size=4, seed=5)
    epochs = []
    position = iter(row for i in range(75) for row in zip(*batches.batch(i)))
    for _ in range(3):
        rows = [next(position) for _ in range(batches.n_windows)]
        for x, y in rows:
            assert (
                y.tolist() == [t + 1 for t in x.tolist()] and len(x) == 10
            )  # ids count up, so windows are contiguous
        firsts = [int(x[0]) for x, _ in rows]
        assert sorted(firsts) == list(
            range(min(firsts), min(firsts) + 10 * len(firsts), 10)
        )  # each window once
        assert min(firsts) < 10 and max(firsts) + 10 < 1003
        epochs.append(firsts)
    assert batches.n_windows == 99
    assert (
        len({min(firsts) for firsts in epochs}) > 1 and epochs[0] != epochs[1]
    )  # another offset, another order


@pytest.mark.parametrize("length", [11, 12, 19, 20, 21, 31])
def test_short_streams_have_windows(tmp_path, length):
    stream = TokenStream(tmp_path, "train", bins(tmp_path, train=list(range(length))))
    for i in range(50):
        x, y = TrainBatches(stream, 10, 1, seed=0).batch(i)
        assert x.shape == y.shape == (1, 10) and y[0, -1] < length


@pytest.mark.parametrize("batching", ["windows", "by_length"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batch_is_the_same_for_any_number_of_ranks(tmp_path, batching, world_size):
    """Ranks alternate in taking the micro-batches of a step, as train.py does."""
    ids = np.random.default_rng(0).integers(1, 9, 500)
    ids[::7] = 0
    stream = TokenStream(tmp_path, "train", bins(tmp_path, train=ids))
    accumulation, seen = 4, []
    for step in range(5):
        for rank in range(world_size):
            mine = TrainBatches(stream, 8, 3, seed=1, batching=batching, eot=0)
            for i in range(step * accumulation + rank, (step + 1) * accumulation, world_size):
                seen.append((step, i, mine.spans_of_batch(i).tolist()))
    reference = TrainBatches(stream, 8, 3, seed=1, batching=batching, eot=0)
    assert sorted(seen) == [
        (i // accumulation, i, reference.spans_of_batch(i).tolist())
        for i in range(5 * accumulation)
    ]


@pytest.mark.parametrize("batching", ["windows", "by_length"])
@pytest.mark.parametrize("n_documents", [2000, 97, 5])  # more than a pool, less, less than a step
def test_a_step_has_the_same_rows_for_any_batch_size(tmp_path, batching, n_documents):
    """And each target has the same weight; empty rows at the end of an epoch count 0."""
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(1, 50, n), 0] for n in rng.integers(6, 60, n_documents)]
    stream = TokenStream(tmp_path, "train", bins(tmp_path, train=sum(documents, [])))

    def rows_and_weights(batch_size: int, micro_batches: int, step: int) -> list:
        batches = TrainBatches(stream, 64, batch_size, 0, batching, 0, micro_batches)
        rows = []
        for i in range(step * micro_batches, (step + 1) * micro_batches):
            x, y = batches.batch(i)
            n, weight = int((y >= 0).sum()), batches.weight(i)
            # the weight of one target in the mean over the step, times the number of its targets
            rows += [(*row.tolist(), weight / n / micro_batches) for row in y if weight]
        total = sum(sum(t >= 0 for t in row[:-1]) for row in rows)
        assert sum(row[-1] * sum(t >= 0 for t in row[:-1]) for row in rows) == pytest.approx(1)
        assert all(row[-1] == pytest.approx(1 / total) for row in rows)
        return sorted(tuple(t for t in row[:-1] if t >= 0) for row in rows)

    for step in range(15):  # several epochs
        whole = rows_and_weights(16, 1, step)
        assert whole == rows_and_weights(8, 2, step) == rows_and_weights(2, 8, step)


@pytest.mark.parametrize("rows, batch_size, micro_batches", [(570, 560, 1), (570, 100, 1),
                                                             (57, 5, 4), (3, 2, 4)])
def test_an_epoch_of_documents_is_whole_steps(tmp_path, rows, batch_size, micro_batches):
    ids = [token for i in range(rows) for token in (i + 1, 0)]
    stream = TokenStream(tmp_path, "train", bins(tmp_path, train=ids))
    batches = TrainBatches(stream, 4, batch_size, 0, "by_length", 0, micro_batches)
    assert batches.steps_in(4) == 4 * -(-rows // (batch_size * micro_batches))
    served = [(batches.weight(i), batches.batch(i)[1])
              for i in range(batches.steps_in(4) * micro_batches)]
    seen = [int(row[0]) for weight, y in served if weight for row in y]
    assert sorted(seen) == sorted(4 * list(range(1, rows + 1)))


def test_documents_by_length(tmp_path):
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(1, 50, n), 0] for n in rng.integers(1, 60, 200)]
    stream = TokenStream(tmp_path, "train", bins(tmp_path, train=sum(documents, [])))
    batches = TrainBatches(stream, 64, 8, seed=0, batching="by_length", eot=0)
    served, padding, total = [], 0, 0
    for i in range(25):
        x, y = batches.batch(i)
        for row_x, row_y in zip(x, y):
            n = int((row_y >= 0).sum())
            assert row_x[0] == 0 and row_x[1:n].equal(row_y[: n - 1]) and (row_y[n:] == -1).all()
            served.append(row_y[:n].tolist())
        padding, total = padding + int((y < 0).sum()), total + y.numel()
    assert sorted(served) == sorted(
        documents
    )  # each once, from the end-of-text before it to its own
    assert padding / total < 0.05
    assert [batches.batch(i)[0].shape[1] for i in range(25)] != sorted(
        batches.batch(i)[0].shape[1] for i in range(25)
    )


def test_padding_by_length_is_a_quarter_of_that_in_random_order(tmp_path):
    rng = np.random.default_rng(0)
    documents = [
        [*rng.integers(1, 50, n), 0]
        for n in np.minimum(rng.lognormal(4, 0.6, 3000), 250).astype(int)
    ]
    stream = TokenStream(tmp_path, "train", bins(tmp_path, train=sum(documents, [])))
    batches = TrainBatches(stream, 256, 16, seed=0, batching="by_length", eot=0)
    targets = [batches.batch(i)[1] for i in range(len(documents) // 16)]
    counted = [sum(int((y < 0).sum()) for y in targets), sum(y.numel() for y in targets)]
    assert batches.padding() == pytest.approx(
        counted[0] / counted[1], abs=0.003
    )  # one batch of the epoch is not full
    order = np.random.default_rng(batches.key(0)).permutation(len(documents))
    rows = [[len(documents[i]) for i in order[j : j + 16]] for j in range(0, len(order) - 15, 16)]
    assert batches.padding(sort=False) == pytest.approx(
        1 - sum(map(sum, rows)) / sum(16 * max(row) for row in rows)
    )
    assert batches.padding() < batches.padding(sort=False) / 4


def test_long_documents_are_cut(tmp_path):
    stream = TokenStream(tmp_path, "train", bins(tmp_path, train=[5, 6, 7, 8, 9, 0, 1, 2, 3, 4]))
    assert stream.document_spans(0, 4).tolist() == [
        [0, 4],
        [4, 6],
        [6, 10],
    ]  # the last document was never ended
    rows = [
        (x, y)
        for xs, ys in eval_batches(stream, 4, 2, "by_length", 0)
        for x, y in zip(xs.tolist(), ys.tolist())
    ]
    assert sorted(rows) == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([0, 5, 6, 7], [5, 6, 7, 8]),
        ([8, 9], [9, 0]),
    ]


@pytest.mark.parametrize("batching, targets", [("windows", 1002), ("by_length", 1003)])
def test_evaluation_covers_the_whole_split_and_is_shared_out(tmp_path, batching, targets):
    ids = np.arange(1003) % 97
    stream = TokenStream(tmp_path, "val", bins(tmp_path, val=ids, train=[1]))

    def count(**how):
        ys = torch.cat([y.flatten() for _, y in eval_batches(stream, 50, 4, batching, 0, **how)])
        return torch.bincount(ys[ys >= 0], minlength=97)

    whole = count()
    assert whole.equal(torch.from_numpy(np.bincount(ids[1003 - targets :], minlength=97)))
    assert whole.equal(sum(count(rank=rank, world_size=3) for rank in range(3)))
    leading = count(max_batches=2)
    assert 0 < leading.sum() <= 8 * 50 and leading.equal(count(max_batches=2))


def test_shards_read_as_one_stream(tmp_path):
    ids = np.random.default_rng(1).integers(0, 1000, 300)
    bins(tmp_path / "one", train=ids, val=[1])
    bins(tmp_path / "many", val=[1], train_000=ids[:10], train_001=ids[10:11], train_002=ids[11:])
    one, many = (TokenStream(tmp_path / name, "train", {"splits": {}}) for name in ("one", "many"))
    assert len(one) == len(many) == 300
    for start, stop in [(0, 300), (9, 12), (10, 11), (5, 6), (250, 300)]:
        assert (
            one.read(start, stop).tolist()
            == many.read(start, stop).tolist()
            == ids[start:stop].tolist()
        )
    assert one.document_spans(5, 64).tolist() == many.document_spans(5, 64).tolist()


def test_prefetch_keeps_order_and_passes_errors_on():
    def batches():
        yield from ((torch.tensor([i]), torch.tensor([-i])) for i in range(5))
        raise RuntimeError("disk on fire")

    seen = []
    with pytest.raises(RuntimeError, match="disk on fire"):
        for x, y in prefetch(batches(), "cpu"):
            seen.append((x.item(), y.item()))
    assert seen == [(i, -i) for i in range(5)]


def test_nanogpt_bins_work_as_they_are(tmp_path):
    meta = bins(tmp_path, train=[1, 2, 50256], val=[3])
    assert get_tokenizer(meta).vocab_size == 50257 and meta["eot"] == 50256


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda d: (d / "meta.json").unlink(), None),
        (lambda d: (d / "meta.json").write_text("{"), "damaged"),
        (lambda d: (d / "meta.json").write_text('{"format_version": 9}'), "format version"),
        (lambda d: (d / "meta.json").write_text("[]"), "damaged"),
        (lambda d: (d / "train.bin").write_bytes(b"abc"), "3 bytes"),
        (lambda d: (d / "train.bin").write_bytes(b""), "0 bytes"),
        (lambda d: (d / "train.bin").write_bytes(b"ab"), "1 tokens"),
        (lambda d: (d / "train.bin").unlink(), "train.bin"),
        (lambda d: [(d / "meta.json").unlink(), (d / "meta.json.tmp").touch()], "not prepared"),
        (lambda d: [(d / "meta.json").unlink(), (d / "meta.pkl").touch()], "not what nanoGPT's"),
    ],
)
def test_damaged_data_is_named(tmp_path, damage, says):
    tokenizer = train_tokenizer("char", ["hello"])
    finish_dataset(
        tmp_path,
        tokenizer,
        {split: write_split(tmp_path, split, ["hello"], tokenizer) for split in SPLITS},
    )
    TokenStream(tmp_path, "train", load_meta(tmp_path))
    damage(tmp_path)
    if says is None:  # looks like nanoGPT's files then
        assert load_meta(tmp_path)["tokenizer"]["kind"] == "gpt2"
        return
    with pytest.raises(ValueError, match=says):
        TokenStream(tmp_path, "train", load_meta(tmp_path))


def test_too_short_for_a_window_and_no_documents(tmp_path):
    stream = TokenStream(tmp_path, "train", bins(tmp_path, train=[1, 2, 3]))
    with pytest.raises(ValueError, match="fewer than a window"):
        TrainBatches(stream, 3, 1, 0)
    with pytest.raises(ValueError, match="no end-of-text"):
        TrainBatches(stream, 2, 1, 0, "by_length", eot=-1)
    with pytest.raises(ValueError, match="windows.*by_length"):
        TrainBatches(stream, 2, 1, 0, "randomly")


class Traced:
    """A tensor that records how it is copied."""

    def __init__(self, pinned=False):
        self.pinned, self.copies = pinned, []

    def pin_memory(self):
        return Traced(pinned=True)

    def to(self, device, non_blocking=False):
        return device, self.pinned, non_blocking


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_only_pinned_memory_is_copied_without_waiting(device):
    """Memory that is not pinned may be freed and reused before such a copy has ended."""
    cuda = device == "cuda:0"
    assert list(prefetch([(Traced(), Traced())] * 2, device)) == [((device, cuda, cuda),) * 2] * 2
