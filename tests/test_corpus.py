"""Write token files and meta.json, and prepare text from files and from the Hugging Face hub."""
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

from lib import corpus
from lib.checkpoint import write_atomically
from lib.corpus import finish_dataset, write_split
from lib.dataset import TokenStream, load_meta
from lib.tokenizer import EOT, UNK, get_tokenizer, gpt2_tokenizer, train_tokenizer
from data.fineweb import prepare as fineweb
from helpers import HERE, ODD, SPLITS, prepare


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
    (_, counts), = corpus.tokenized(texts, train_tokenizer("char", texts))
    assert counts["words"] == sum(len(text.encode().split()) for text in texts)
    assert counts["bytes"] == sum(len(text.encode()) for text in texts) and counts["characters"] == sum(map(len, texts))


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
        assert list(corpus.hub_documents(str(tmp_path / "source"), split)) == texts
    for path in (tmp_path / "source/data").glob("validation*"):
        path.unlink()
    corpus.hub_dataset.cache_clear()
    held_out = [text for i, text in enumerate(DOCUMENTS["train"]) if i % 20 == 19]
    assert list(corpus.hub_documents(str(tmp_path / "source"), "val")) == held_out
    assert list(corpus.hub_documents(str(tmp_path / "source"), "train")) == [
        text for text in DOCUMENTS["train"] if text not in held_out]
    with pytest.raises(ValueError, match="no column 'story', only text"):
        corpus.hub_documents(str(tmp_path / "source"), "train", "story")


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
    monkeypatch.setattr(corpus, "PART", 1000)  # characters at a time
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

    monkeypatch.setattr(corpus.os, "replace", stop_there)
    if crash_at == 3:  # only three renames: it succeeds
        make()
        assert load_meta(tmp_path)
        return
    with pytest.raises(KeyboardInterrupt):
        make()
    with pytest.raises(ValueError, match="not prepared"):
        load_meta(tmp_path)
