"""Prepare datasets from files and from the hub: text in, token files and meta.json out."""
import csv
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from data.fables import prepare as fables
from data.fineweb import prepare as fineweb
from data.wikitext103 import prepare as wikitext103
from helpers import HERE, ODD, SPLITS, one_line_error, prepare, run, start
from lib import corpus
from lib.corpus import load_meta, write_dataset
from lib.dataset import TokenStream
from lib.files import write_atomically
from lib.tokenizer import EOT, UNK, get_tokenizer, gpt2_tokenizer, train_tokenizer


def ids_of(folder: Path, split: str) -> list[int]:
    """Return all token ids of a split."""
    stream = TokenStream(folder, split, load_meta(folder))
    return stream.read(0, len(stream)).tolist()


def gpt2_ids(texts: list[str]) -> list[int]:
    """Return the GPT-2 tokens of documents, each with the end of text behind it."""
    encode = gpt2_tokenizer().encode
    return [i for text in texts for i in [*encode(text), 50256]]


# -----------------------------------------------------------------------------
# Token files and meta.json

def test_meta_describes_what_was_written(tmp_path, capsys):
    texts = {"train": ["ab", "bé a"], "val": ["bxx"]}
    tokenizer = train_tokenizer("char", texts["train"])
    write_dataset(tmp_path, lambda split: texts[split], tokenizer)
    meta = load_meta(tmp_path)
    raw = (tmp_path / "train.bin").read_bytes()
    assert meta["splits"]["val"]["unknown"] == 2
    assert "2 of the tokens (50.00%) are unknown" in capsys.readouterr().out
    assert meta["splits"]["train"] == dict(
        tokens=8, documents=2, bytes=7, characters=6, words=3, unknown=0,
        sha256=hashlib.sha256(raw).hexdigest())
    ids = [*tokenizer.encode("ab"), 0, *tokenizer.encode("bé a"), 0]
    assert np.frombuffer(raw, "<u2").tolist() == ids
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "val.bin", "meta.json"}


def test_words_and_bytes_are_counted_as_python_does():
    texts = [" a bé\n\nc", "d", "  ", "e f ", ODD]
    (_, counts), = corpus.tokenized(texts, train_tokenizer("char", texts))
    assert counts["words"] == sum(len(text.encode().split()) for text in texts)
    assert counts["bytes"] == sum(len(text.encode()) for text in texts)
    assert counts["characters"] == sum(map(len, texts))


# -----------------------------------------------------------------------------
# Local files

DOCUMENTS = {"train": [f"Story {i}.\n\nIt was day {i}." for i in range(60)],
             "val": [f"Another one, {i}!" for i in range(7)]}


def write_source(folder: Path, layout: str) -> None:
    """Write DOCUMENTS to a folder: 'txt', 'jsonl' or, as on the hub, 'parquet' shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for split, texts in DOCUMENTS.items():
        if layout == "txt":
            path = folder / f"TinyStories-{'valid' if split == 'val' else split}.txt"
            path.write_text("".join(f"{text}\n{EOT}\n" for text in texts))
        elif layout == "jsonl":
            rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / f"{split}.jsonl").write_text(rows)
        else:
            (folder / "data").mkdir(exist_ok=True)
            name = {"train": "train", "val": "validation"}[split]
            for i, part in enumerate((texts[:4], texts[4:])):
                path = folder / f"data/{name}-0000{i}-of-00002-abc.parquet"
                pq.write_table(pa.table({"text": part}), path)


@pytest.mark.parametrize("layout", ["txt", "jsonl", "parquet"])
def test_tinystories_from_a_local_folder(tmp_path, layout):
    write_source(tmp_path / "source", layout)
    done = prepare("tinystories", f"--source={tmp_path}/source", f"--out_dir={tmp_path}/out",
                   HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    for split, texts in DOCUMENTS.items():
        assert ids_of(tmp_path / "out", split) == gpt2_ids(texts)


def test_tinystories_from_one_file(tmp_path):
    (tmp_path / "all.txt").write_text(f"\n{EOT}\n".join(DOCUMENTS["train"]))
    done = prepare("tinystories", f"--source={tmp_path}/all.txt", f"--out_dir={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    splits = load_meta(tmp_path / "out")["splits"]
    assert (splits["train"]["documents"], splits["val"]["documents"]) == (57, 3)


def prepare_text(out: Path, *args: str) -> tuple[dict[str, list[str]], dict, str]:
    """Run data/text/prepare.py; return the decoded documents of the splits, meta.json, stdout."""
    done = prepare("text", *args, f"--out_dir={out}")
    assert done.returncode == 0 and done.stderr == "", done.stderr  # without progress bars
    meta = load_meta(out)
    tokenizer = get_tokenizer(meta)
    parts = {split: tokenizer.decode(ids_of(out, split)).split(EOT)[:-1] for split in SPLITS}
    return parts, meta, done.stdout


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_the_end_of_a_single_document_is_for_validation(tmp_path, tokenizer):
    book = "It was the best of times, it was the worst of times, déjà vu. " * 40
    (tmp_path / "book.txt").write_text(book)
    parts, _, _ = prepare_text(tmp_path / "out", f"--source={tmp_path}/book.txt",
                               f"--tokenizer={tokenizer}")
    text = book.strip()
    assert parts["train"][0] + parts["val"][0] == text
    assert len(parts["val"][0]) == math.ceil(len(text) / 20)


def test_a_table_by_words(tmp_path):
    texts = DOCUMENTS["train"]
    with open(tmp_path / "table.csv", "w", newline="") as file:
        rows = [[i, text] for i, text in enumerate(texts)]
        csv.writer(file).writerows([["id", "story"], *rows])
    parts, meta, said = prepare_text(tmp_path / "out", f"--source={tmp_path}/table.csv",
                                     "--tokenizer=word", "--column=story")
    lower = [text.lower() for text in texts]
    assert parts["train"] == [text for i, text in enumerate(lower) if i % 20 != 19]
    # each number is in one story only
    assert parts["val"] == [re.sub(r"\d+", UNK, text) for text in lower[19::20]]
    assert meta["splits"]["val"]["unknown"] == 6 and "; 6 of the tokens" in said


@pytest.mark.parametrize("sizes, val", [
    ([2000], [100]),
    ([1, 1], [1]),
    ([10] * 19, [10]),
    ([100, 100, 15, 10], [15, 10]),  # from the start of a document: together at most a fifth
    ([100, 100, 100], [15]),  # its whole document would be a third
    ([5, 95, 900], [50]),
    ([7] * 20, [7]),
    ([1] * 59 + [10_000], [1, 1, 10_000]),
])
def test_how_much_is_held_out(sizes, val):
    texts = [chr(i + 65) * size for i, size in enumerate(sizes)]
    parts = {split: list(corpus.held_out(iter(texts), split)) for split in SPLITS}
    assert [len(text) for text in parts["val"]] == val and all(parts["train"])
    if len(sizes) < 20:
        assert "".join(parts["train"] + parts["val"]) == "".join(texts)
    else:
        assert parts["val"] == texts[19::20]
        assert sorted(parts["train"] + parts["val"]) == sorted(texts)


def test_holding_out_looks_ahead_20_documents():
    texts = iter(range(1000))
    next(corpus.held_out(map(str, texts), "train"))
    assert next(texts) == 20


def test_three_documents(tmp_path):
    texts = ["The first. " * 30, "The second. " * 30, "The third, shorter."]
    (tmp_path / "three.txt").write_text(EOT.join(texts))
    parts, _, _ = prepare_text(tmp_path / "out", f"--source={tmp_path}/three.txt")
    assert len(parts["train"]) == len(parts["val"]) == 2
    assert parts["val"][1] == texts[2]
    assert "".join(parts["train"] + parts["val"]) == "".join(map(str.strip, texts))


@pytest.mark.parametrize("name, split", [
    ("train-00000-of-00001.parquet", "train"),
    ("TinyStoriesV2-GPT4-valid.txt", "val"),
    ("wiki.validation.raw", "val"),
    ("2024_TEST_3.csv", "test"),
    ("test/part1.txt", "test"),
    ("train/val.txt", "val"),
    ("medieval.txt", ""), ("latest.txt", ""), ("constraint.txt", ""), ("trains/evaluate.md", ""),
])
def test_split_names_are_whole_words(name, split):
    assert corpus.split_of(Path(name)) == split


def write_files(folder: Path, *names: str) -> None:
    """Write files that contain their names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.mark.parametrize("names, train, val", [
    # the names decide
    ("train/a.txt train/b.md valid.txt test.txt other.txt", "train/a.txt train/b.md", "valid.txt"),
    # val is held out of the files named train
    ("train-1.txt train-2.txt test.txt other.txt", "train-1.txt train-2.t", "xt"),
    # all files are divided
    ("medieval.txt latest.txt constraint.txt", "constraint.txt latest.txt medieval.t", "xt"),
    ("train.txt other.txt", "other.txt train.tx", "t"),
    ("a.md b/c d.TXT .git/e .hidden.txt f.py", "a.md b/c d.TX", "T"),
])
def test_which_files_of_a_folder_are_read(tmp_path, names, train, val):
    write_files(tmp_path, *names.split())
    assert " ".join(corpus.local_documents(str(tmp_path), "train")) == train
    assert " ".join(corpus.local_documents(str(tmp_path), "val")) == val


def test_wikitext_reads_the_names_of_splits_too(tmp_path):
    write_files(tmp_path, "medieval.raw", ".val.raw", "test/val.txt")
    (tmp_path / "wiki.valid.raw").write_text("wiki.valid.raw", encoding="utf-8-sig")
    lines = wikitext103.lines_of("val", str(tmp_path), "")
    assert list(lines) == ["test/val.txt", "wiki.valid.raw"]
    with pytest.raises(ValueError, match="be named like wiki.test.raw"):  # not medieval.raw
        list(wikitext103.lines_of("test", str(tmp_path), ""))


BOOK = "It was the best of times, déjà vu – it was “the worst” of times.\n" * 40


@pytest.mark.parametrize("name, text", [
    ("book.txt", BOOK), ("rows.jsonl", json.dumps({"text": BOOK})),
    ("list.json", json.dumps([{"text": BOOK}])), ("rows.csv", f'text\n"{BOOK}"\n')])
def test_encodings(tmp_path, name, text):
    """A byte order mark is no text; of other encodings the error names the option that reads it."""
    path = tmp_path / name
    path.write_text(text, encoding="utf-8-sig")
    assert list(corpus.read_documents(path)) == [BOOK.strip()]
    text = text.replace("\\u00e9", "é")  # JSON is ASCII by default
    for encoding in ("windows-1252", "utf-16", "utf-16-le", "utf-16-be"):
        path.write_text(text, encoding=encoding)
        with pytest.raises(ValueError) as error:
            list(corpus.read_documents(path))
        assert str(path) in str(error.value)
        assert f"but probably {encoding}: " in str(error.value)
        assert f"data/text/prepare.py --encoding={encoding}, or convert" in str(error.value)
        assert list(corpus.read_documents(path, encoding=encoding)) == [BOOK.strip()]


@pytest.mark.parametrize("name", ["book.txt", "rows.jsonl", "rows.csv"])
@pytest.mark.parametrize("text, encoding", [("plain\n" * 9, "utf-16-le"),  # valid UTF-8, with NULs
                                            ("plain\n" * 99_999 + "é", "windows-1252")])
def test_encodings_of_texts_that_begin_in_ascii(tmp_path, name, text, encoding):
    if name == "rows.jsonl":
        text = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n"
                       for line in text.split())
    (tmp_path / name).write_text("text\n" + text if name == "rows.csv" else text, encoding)
    with pytest.raises(ValueError, match=f"but probably {encoding}: "):
        list(corpus.read_documents(tmp_path / name))


def test_the_encoding_is_a_setting(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK, encoding="windows-1252")
    source = [f"--source={tmp_path}/book.txt", f"--out_dir={tmp_path}/out"]
    for name in ("text", "tinystories", "shakespeare_char"):
        says = one_line_error(prepare(name, *source))
        assert "book.txt is not utf-8 text, but probably windows-1252" in says
    assert "unknown encoding: latin0" in one_line_error(
        prepare("text", *source, "--encoding=latin0"))
    assert one_line_error(prepare("text", *source, "--encoding=utf-16")).endswith(
        "book.txt is not utf-16 text")
    parts, _, _ = prepare_text(tmp_path / "out", source[0], "--encoding=windows-1252")
    assert parts["train"][0] + parts["val"][0] == BOOK.strip()


def test_shakespeare_without_a_byte_order_mark(tmp_path):
    (tmp_path / "input.txt").write_text("To be. " * 50, encoding="utf-8-sig")
    done = prepare("shakespeare_char", f"--source={tmp_path}/input.txt",
                   f"--out_dir={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert "\ufeff" not in load_meta(tmp_path / "out")["tokenizer"]["vocab"]


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_empty_files(tmp_path, text):
    folder = tmp_path / "folder"
    write_files(folder, "a.txt", "b.jsonl", "c.csv", "d.md")
    for path in folder.iterdir():
        path.write_text(text)
    (folder / "e.parquet").touch()
    for path in (*folder.iterdir(), folder):
        with pytest.raises(ValueError, match=r"folder/[a-e]\.[a-z]+ is empty"):
            corpus.local_documents(str(path), "train")
    (folder / "z.txt").write_text("Some text.")
    assert "".join(corpus.local_documents(str(folder), "train")) == "Some text"
    for name in ("text", "shakespeare_char"):
        says = one_line_error(prepare(name, f"--source={folder}/a.txt", f"--out_dir={tmp_path}/o"))
        assert "a.txt is empty" in says
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("source", ["nowhere.txt", "someone/rows.JSONL", "./folder", "../x", "/x",
                                    "~/folder", "C:\\folder"])
def test_a_path_is_not_asked_of_the_hub(tmp_path, source):
    done = prepare("text", f"--source={source}", f"--out_dir={tmp_path}", HF_HUB_OFFLINE="1")
    assert one_line_error(done) == f"error: there is no file or folder {source}"


def test_the_home_folder(tmp_path):
    (tmp_path / "books").write_text(BOOK)
    done = prepare("text", "--source=~/books", f"--out_dir={tmp_path}/out", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr


ROWS = [{"id": i, "a.b": f"dot {i}", "m": {"role": "user", "n": {"content": f"deep {i}"}}}
        for i in range(3)]


def write_rows(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, ROWS)))
    else:
        lines = [f"{i},dot {i},user,deep {i}\n" for i in range(3)]
        path.write_text("".join(["id,a.b,m.role,m.n.content\n", *lines]))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_columns(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    write_rows(path)
    assert list(corpus.read_documents(path, "a.b")) == ["dot 0", "dot 1", "dot 2"]
    assert list(corpus.read_documents(path, "m.n.content")) == ["deep 0", "deep 1", "deep 2"]
    says = one_line_error(prepare("text", f"--source={path}", f"--out_dir={tmp_path}/out"))
    assert "no column 'text', only id, a.b, m.role, m.n.content: choose" in says
    assert str(path) in says and "--column=" in says


def test_texts_of_tables_stay_texts(tmp_path):
    """Libraries that guess types would read a number, a missing value and a date."""
    texts = ["12", "NA", "2020-01-01", "two\nlines, “quoted”", "x" * 200_000]
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    for name in ("rows.csv", "rows.jsonl"):
        assert list(corpus.read_documents(tmp_path / name)) == texts


@pytest.mark.parametrize("name, raw, says", [
    ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "rows.jsonl: line 2 is not a JSON"),
    ("rows.json", b'["a", "b"]', "rows.json: row 1 has no column 'text', only values"),
    ("rows.jsonl", b'{"text": 1}', "rows.jsonl has a row whose column 'text' is not text"),
    ("rows.csv", b"id,text\n1,Hello, world\n", "rows.csv: line 2 has more or fewer columns"),
    ("rows.csv", b"id,text\n1\n", "rows.csv: line 2 has more or fewer columns"),
    ("rows.csv", b'id,text\n1,"Hello\n', "rows.csv: unexpected end of data"),
    ("rows.parquet", b"hello" * 100, "rows.parquet: Parquet magic bytes not found"),
])
def test_malformed_tables_are_one_line(tmp_path, name, raw, says):
    (tmp_path / name).write_bytes(raw)
    done = prepare("text", f"--source={tmp_path}/{name}", f"--out_dir={tmp_path}/out")
    assert says in one_line_error(done) and not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_malformed_streams_are_one_line(tmp_path, kind):
    (tmp_path / f"rows.{kind}").write_text('{"text": "a"}\n{"text": \n')
    one_line_error(prepare("fineweb", f"--source={tmp_path}", f"--out_dir={tmp_path}/out",
                           HF_HOME=str(tmp_path / "hf")))


@pytest.mark.parametrize("tokenizer", ["bpe", "char", "word"])
def test_the_next_command_trains(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text(BOOK * 5)
    out = tmp_path / "my book"
    _, _, said = prepare_text(out, f"--source={tmp_path}/book.txt", f"--tokenizer={tokenizer}")
    command = said.splitlines()[-1].removeprefix("next: ")
    python, *args = shlex.split(command)
    assert python == "python" and args[-1] == "--out_dir=out-my book"
    done = run(*args, f"--out_dir={tmp_path}/out", "--max_iters=2", "--device=cpu",
               "--compile=False", "--eval_iters=1")
    assert done.returncode == 0, done.stderr


def test_the_next_command_names_a_dataset_in_data(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK)
    out = HERE / f"data/book_{os.getpid()}"
    try:
        _, _, said = prepare_text(out, f"--source={tmp_path}/book.txt")
    finally:
        shutil.rmtree(out)
    assert said.endswith(f" --dataset={out.name} --out_dir=out-{out.name}\n")


# -----------------------------------------------------------------------------
# The Hugging Face hub

def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    """A local folder with the hub's layout, which load_dataset reads like a dataset of the hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    source = str(tmp_path / "source")
    write_source(tmp_path / "source", "parquet")
    for split, texts in DOCUMENTS.items():
        assert list(corpus.hub_documents(source, split)) == texts
    for path in (tmp_path / "source/data").glob("validation*"):
        path.unlink()
    corpus.hub_dataset.cache_clear()
    held_out = [text for i, text in enumerate(DOCUMENTS["train"]) if i % 20 == 19]
    assert list(corpus.hub_documents(source, "val")) == held_out
    assert list(corpus.hub_documents(source, "train")) == [
        text for text in DOCUMENTS["train"] if text not in held_out]
    with pytest.raises(ValueError, match="no column 'story', only text: choose one"):
        corpus.hub_documents(source, "train", "story")


def serve(repo: Path, **configs: dict[str, list[str]]) -> None:
    """Write a dataset as the hub stores it: parquet files, and a README.md that lists them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    header = "---\nconfigs:\n"
    for config, splits in configs.items():
        config = config.replace("_", "-")
        header += f"- config_name: {config}\n  data_files:\n"
        for split, texts in splits.items():
            (repo / config).mkdir(parents=True, exist_ok=True)
            path = repo / f"{config}/{split}-00000-of-00001.parquet"
            pq.write_table(pa.table({"text": texts}), path)
            header += f"  - split: {split}\n    path: {config}/{split}-*\n"
    (repo / "README.md").write_text(header + "---\n# Some text\n")


def test_download_from_the_hub(tmp_path, hub):
    write_source(tmp_path / "hub/roneneldan/TinyStories", "parquet")
    done = prepare("tinystories", f"--out_dir={tmp_path}/out", "--tokenizer=bpe",
                   "--vocab_size=300", **hub.env)
    assert done.returncode == 0, done.stderr
    # no progress bar, not even of the library that downloads
    assert done.stderr == "asking the Hugging Face hub for roneneldan/TinyStories ...\n"
    meta = load_meta(tmp_path / "out")
    tokenizer = get_tokenizer(meta)
    for split, texts in DOCUMENTS.items():
        ids = ids_of(tmp_path / "out", split)
        assert tokenizer.decode(ids) == "".join(text + EOT for text in texts)
    assert sum(path.endswith(".parquet") for path in hub.sent) == 4  # each file once
    assert meta["vocab_size"] == 300
    assert meta["source"] == f"roneneldan/TinyStories@{hub.commits['main']}"


def test_a_revision_of_a_dataset(tmp_path, hub):
    """NAME@REVISION is its text, meta.json has the commit; without a network no other is taken."""
    for repo, text in ("an/other", "new"), ("an/other@v1", "old"):
        serve(tmp_path / "hub" / repo, default={"train": [text] * 40, "validation": [text] * 3})
    main, v1 = hub.commits["main"], hub.commits["v1"]
    for revision, text, commit in (("", "new", main), ("@v1", "old", v1), (f"@{v1}", "old", v1)):
        done = prepare("text", f"--source=an/other{revision}", f"--out_dir={tmp_path}/out",
                       "--tokenizer=char", **hub.env)
        assert done.returncode == 0, done.stderr
        meta = load_meta(tmp_path / "out")
        assert get_tokenizer(meta).decode(ids_of(tmp_path / "out", "val")) == (text + EOT) * 3
        assert meta["source"] == f"an/other@{commit}"
    done = prepare("text", "--source=an/other@v9", f"--out_dir={tmp_path}/out", **hub.env)
    assert done.returncode == 2 and "an/other@v9 is not a local file" in done.stderr
    assert "Revision 'v9' doesn't exist" in done.stderr and "Traceback" not in done.stderr
    shutil.rmtree(tmp_path / "hf/hub")
    for path in (tmp_path / "hf/datasets").glob(f"*/*/*/{v1}"):
        shutil.rmtree(path)
    offline = hub.env | {"HF_HUB_OFFLINE": "1"}  # only the newest is in the cache
    for revision, status in ("", 0), (f"@{main}", 0), ("@v1", 2):
        done = prepare("text", f"--source=an/other{revision}", f"--out_dir={tmp_path}/out",
                       "--tokenizer=char", **offline)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
        assert load_meta(tmp_path / "out")["source"] == f"an/other@{main}"
    assert "cannot be reached" in done.stderr


def test_stream_from_the_hub(tmp_path, hub):
    pages = [f"Page {i}." for i in range(5050)]
    serve(tmp_path / "hub/HuggingFaceFW/fineweb", default={"train": ["all of it"]},
          sample_10BT={"train": pages})
    done = prepare("fineweb", f"--out_dir={tmp_path}/out", **hub.env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "asking the Hugging Face hub for HuggingFaceFW/fineweb ...\n"
    assert f"{tmp_path}/out/train_000.bin: " in done.stdout
    splits = load_meta(tmp_path / "out")["splits"]
    assert (splits["val"]["documents"], splits["train"]["documents"]) == (5000, 50)
    assert splits["train"]["shards"] == 1
    assert load_meta(tmp_path / "out")["source"] == f"HuggingFaceFW/fineweb@{hub.commits['main']}"


@pytest.mark.parametrize("source, says", [("no/body", "DatasetNotFoundError"),
                                          ("an/other", "'nonsense' not found")])
def test_what_the_hub_does_not_have(tmp_path, hub, source, says):
    serve(tmp_path / "hub/an/other", default={"train": ["text"]})
    done = prepare("text", f"--source={source}", "--subset=nonsense", f"--out_dir={tmp_path}/out",
                   **hub.env)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


# -----------------------------------------------------------------------------
# Single datasets

ARTICLE = ["", " = {0} = \n", "", " {0} , or {0}s , was @-@ is . \n", "", " = = Of {0} = = \n", "",
           " 3 @.@ 5 = 7 / 2 . \n"]


def test_wikitext_keeps_the_words_of_the_original(tmp_path, hub):
    names = {"train": ["Fox", "Hare", "Owl"], "val": ["Bee"], "test": ["Ant", "Elk"]}
    rows = {split: [line.format(name) for name in titles for line in ARTICLE]
            for split, titles in names.items()}
    on_hub = {"train": rows["train"], "validation": rows["val"], "test": rows["test"]}
    serve(tmp_path / "hub/Salesforce/wikitext", wikitext_2_raw_v1=on_hub,
          wikitext_103_raw_v1=on_hub | {"train": ["other"]})
    (tmp_path / "files").mkdir()
    for split, lines in rows.items():
        text = "".join(line or " \n" for line in lines)
        (tmp_path / f"files/wiki.{split}.raw").write_text(text)
    for source in "", tmp_path / "files", tmp_path / "hub/Salesforce/wikitext":
        env = {} if source else hub.env
        done = prepare("wikitext2", f"--out_dir={tmp_path}/out", f"--source={source}", **env)
        assert done.returncode == 0, done.stderr
        meta, tokenizer = load_meta(tmp_path / "out"), gpt2_tokenizer()
        for split, titles in names.items():
            articles = tokenizer.decode(ids_of(tmp_path / "out", split)).split(EOT)[:-1]
            first_lines = [article.split("\n")[0] for article in articles]
            assert first_lines == [f" = {name} = " for name in titles]
            assert all(article.endswith("\n 3 @.@ 5 = 7 / 2 . ") for article in articles)
            words = sum(len(line.split()) + 1 for line in rows[split])
            assert meta["splits"][split]["words"] == words
        assert ("source" in meta) == (not source)
        assert "papers' word count" in meta["note"] and "<unk>" in meta["note"]


def test_wikitext_titles_have_empty_lines_around_them():
    first = ["", " = Coil = ", "", " The inductance is ", " = 1 henry and capacitance C = ",
             " 1 farad .", "", " = 1 rad / s and a nominal impedance k = ", " 1 ohm .", "",
             " Last , ", " = 2 and L = ", "", " = = Units = = ", "", " None ."]
    second = [" = Dam = ", "", " A dam ."]
    found = list(wikitext103.articles([*first, "", *second, "", " = End = "]))
    assert found == ["\n".join(first[1:]), "\n".join(second), " = End = "]


def write_pages(folder: Path, layout: str) -> list[str]:
    """Write 300 pages to four files in FineWeb's layout and return them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, words = random.Random(0), ["sun", "moon", "sea"]
    pages = [f"Page {i}: " + " ".join(rng.choice(words) for _ in range(rng.randrange(50)))
             for i in range(300)]
    for i in range(0, 300, 75):
        path = folder / f"10BT/00{i // 75}_00000.{layout}"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"text": pages[i:i + 75], "url": ["x"] * 75})
        if layout == "parquet":
            pq.write_table(table, path, row_group_size=20)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return pages


@pytest.mark.parametrize("layout", ["parquet", "jsonl"])
@pytest.mark.parametrize("stops", [[1], [2, 3], []])
def test_an_interrupted_stream_resumes(tmp_path, monkeypatch, layout, stops):
    """An interruption before the progress is written costs one shard and nothing else."""
    source, out = tmp_path / "sample", tmp_path / "out"
    pages = write_pages(source, layout)
    monkeypatch.setattr(corpus, "PART", 1000)  # characters at a time
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def make(stop: int = 0) -> None:
        """Prepare; interrupt it at the write of progress number `stop`."""
        calls = iter(range(99))

        def write_or_stop(path: Path, text: str) -> None:
            if stop and next(calls) == stop:
                raise KeyboardInterrupt
            write_atomically(path, text)

        monkeypatch.setattr(fineweb, "write_atomically", write_or_stop)
        fineweb.prepare(out, "name", "", str(source), "gpt2", 0, 0, shard_tokens=1000,
                        validation=30)

    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            make(stop)
        with pytest.raises(ValueError, match="not prepared"):
            load_meta(out)
    make()
    meta = load_meta(out)
    for split, part in (("val", pages[:30]), ("train", pages[30:])):
        TokenStream(out, split, meta).check(meta)
        assert ids_of(out, split) == gpt2_ids([text.strip() for text in part])
        assert meta["splits"][split]["documents"] == len(part)
    assert len(list(out.glob("train_*.bin"))) == meta["splits"]["train"]["shards"] > 4
    assert not list(out.glob("*.tmp"))


def test_the_checksum_of_a_large_split_is_remembered(tmp_path, monkeypatch, fables_data):
    out = tmp_path / "fables"
    shutil.copytree(fables_data, out)
    meta, n_reads, check = load_meta(out), [], TokenStream.check
    monkeypatch.setattr(TokenStream, "check", lambda self, meta: n_reads.append(1) or check(
        self, meta))

    def check_again(meta: dict = meta) -> str:
        return corpus.check_once(TokenStream(out, "train", meta), meta)

    sha256 = meta["splits"]["train"]["sha256"]
    assert check_again() == check_again() == sha256 and len(n_reads) == 2  # a small one: each time
    assert not (out / "train.checked.json").exists()
    monkeypatch.setattr(corpus, "LARGE", 1)
    for _ in range(3):
        assert check_again() == sha256 and len(n_reads) == 3
    (out / "train.checked.json").write_text("damaged")
    assert check_again() == check_again() == sha256 and len(n_reads) == 4
    with pytest.raises(ValueError, match="vocabulary has only 10"):
        check_again(meta | {"vocab_size": 10})
    (out / "train.checked.json").unlink()
    check_again()
    time_ns = (out / "train.bin").stat().st_mtime_ns
    damaged = bytearray((out / "train.bin").read_bytes())
    (out / "train.bin").write_bytes(damaged[:-2])
    os.utime(out / "train.bin", ns=(time_ns, time_ns))
    with pytest.raises(ValueError):
        check_again(meta | {"splits": {"train": {"sha256": sha256}}})
    damaged[100] ^= 1
    (out / "train.bin").write_bytes(damaged)
    for _ in range(2):
        with pytest.raises(ValueError, match="SHA-256 differs"):
            check_again()


def test_shakespeare_is_split_as_nanogpt_does(tmp_path):
    text = "To be, or not to be.\nThat is the question: " * 50
    (tmp_path / "input.txt").write_text(text)
    done = prepare("shakespeare_char", f"--source={tmp_path}/input.txt",
                   f"--out_dir={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    ids = {char: i for i, char in enumerate(sorted(set(text)))}
    border = int(len(text) * 0.9)
    for split, part in (("train", text[:border]), ("val", text[border:])):
        found = np.fromfile(tmp_path / f"out/{split}.bin", "<u2").tolist()
        assert found == [ids[char] for char in part]
    assert load_meta(tmp_path / "out")["vocab_size"] == len(ids)


# -----------------------------------------------------------------------------
# Errors and interruptions

@pytest.mark.parametrize("name, args", [
    ("tinystories", ["--source=nowhere"]),
    ("tinystories", ["--source=config"]),
    ("tinystories", ["--source=pyproject.toml"]),
    ("shakespeare_char", ["--source=nowhere"]),
    ("fables", ["--train_stories=0"]),
    ("fables", ["--tokenizer=x", "--train_stories=5"]),
    ("fineweb", ["--shards=-1"]),
    ("text", []),
    ("text", ["--source=pyproject.toml"]),
    ("text", ["--source=constraints.txt", "--tokenizer=x"]),
])
def test_what_cannot_be_prepared_is_one_line(tmp_path, name, args):
    done = prepare(name, *args, f"--out_dir={tmp_path}/out")
    one_line_error(done)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("name", ["tinystories", "shakespeare_char", "text"])
def test_no_network_is_one_line(tmp_path, name):
    """Proxies that do not answer stand for a machine without a network."""
    nobody = "http://127.0.0.1:9"
    proxies = dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], nobody)
    source = ["--source=someone/something"] if name == "text" else []
    done = prepare(name, f"--out_dir={tmp_path}/out", *source, **proxies, HF_HOME=str(tmp_path),
                   HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "cannot be reached" in done.stderr, done.stderr
    assert "--source=" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out/meta.json").exists()


def test_killed_preparation_leaves_nothing_that_looks_finished(tmp_path):
    out = tmp_path / "out"
    process = start("data/fables/prepare.py", f"--out_dir={out}", "--train_stories=20000")
    while not (out / "train.bin.tmp").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(out.glob("*.bin")) and not (out / "meta.json").exists()
    with pytest.raises(ValueError, match="not prepared"):
        load_meta(out)


def test_an_error_while_writing_leaves_no_file(tmp_path):
    def documents():
        yield "hello"
        raise RuntimeError("disk on fire")

    tokenizer = train_tokenizer("char", ["hello"])
    for texts, error, says in ((documents(), RuntimeError, "disk on fire"),
                               ([], ValueError, "the val split is empty")):
        with pytest.raises(error, match=says):
            corpus.write_split(tmp_path, "val", texts, tokenizer)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["any", "fables", "wikitext103"])
def test_an_error_in_the_last_split_leaves_no_file(tmp_path, monkeypatch, name, error):
    module = {"any": corpus, "fables": fables, "wikitext103": wikitext103}[name]
    last = "test" if name == "wikitext103" else "val"
    write = corpus.write_split
    source, out = tmp_path / "source", tmp_path / "out"
    write_files(source, "wiki.train.raw", "wiki.valid.raw", "wiki.test.raw")

    def write_or_stop(folder, split, *args):
        if split == last:
            assert (folder / "train.bin.tmp").exists()
            raise error
        return write(folder, split, *args)

    monkeypatch.setattr(module, "write_split", write_or_stop)
    with pytest.raises(error):
        if name == "any":
            write_dataset(out, lambda split: ["hello"], train_tokenizer("char", ["hello"]))
        elif name == "fables":
            fables.prepare(out, 5, 5, 1, "char", 0)
        else:
            wikitext103.prepare(out, "", str(source), "char", 0)
    assert not list(out.iterdir())


@pytest.mark.parametrize("crash_at", range(4))
def test_crash_between_the_renames(tmp_path, monkeypatch, crash_at):
    """Replacing an older dataset: after a crash at any rename, no half of it is accepted."""
    tokenizer = train_tokenizer("char", ["hello"])

    def make():
        write_dataset(tmp_path, lambda split: ["hello"], tokenizer)

    make()
    calls, replace = iter(range(9)), os.replace

    def stop_there(*args):
        if next(calls) == crash_at:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(corpus.os, "replace", stop_there)
    if crash_at == 3:  # there are only three renames: it succeeds
        make()
        assert load_meta(tmp_path)
        return
    with pytest.raises(KeyboardInterrupt):
        make()
    with pytest.raises(ValueError, match="not prepared"):
        load_meta(tmp_path)
