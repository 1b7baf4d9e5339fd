"""
app.py: over HTTP, as any client may speak to it, and in a browser, as a user sees it.

    python tests/test_app.py --minutes=2

lets 60 clients use the page twice for that long and prints what they got and the server's memory.
"""
import argparse
import contextlib
import html
import http.client
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python tests/test_app.py`

import app
from helpers import HERE, run, train
from lib.checkpoint import VERSION, load_model, save_checkpoint
from lib.decoding import Sampling
from lib.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from sample import generate_text

SERVER = ["--device=cpu", "--max_tokens=1000000", "--max_prompt=500", "--at_once=1",
          "--queue_size=20"]
REQUEST = dict(run="fables", device="cpu", int8=False, prompt="Once upon", max_new_tokens=40,
               temperature=0.8, top_k=0, top_p=1, min_p=0, repetition_penalty=1, no_repeat_ngram=0,
               seed=5, stop="")
# what Gradio would read: every test shows that they change nothing
EXPOSING = dict(GRADIO_ROOT_PATH="https://evil.example/x", GRADIO_ALLOWED_PATHS="/",
                GRADIO_SHARE="True", GRADIO_MCP_SERVER="True", GRADIO_SSR_MODE="True")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram")


def save_untrained(folder: Path, model: GPT, meta: dict) -> None:
    save_checkpoint(folder, "last.pt", dict(
        model=model.state_dict(), model_args=vars(model.config), step=0, config={"dataset": ""},
        meta=meta, version=VERSION))


@pytest.fixture(scope="session")
def runs(tmp_path_factory, trained) -> Path:
    """A folder with a measured run, a slow one without end-of-text and a damaged one."""
    return make_runs(tmp_path_factory.mktemp("served") / "runs", trained)


def make_runs(folder: Path, trained: Path) -> Path:
    shutil.copytree(trained, folder / "fables")
    summary = dict(loss=1.23456, perplexity=3.4369, bits_per_byte=0.71, accuracy=0.5,
                   valid_share=None, tokens=12345, step=6)
    (folder / "fables/metrics_summary.json").write_text(json.dumps(summary))
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=16, vocab_size=4, n_layer=16, n_head=2, n_embd=32))
    meta = {"dataset": "<b>letters</b>", "tokenizer": {"kind": "char", "vocab": list("abc\n")}}
    (folder / "deep/letters").mkdir(parents=True)
    save_untrained(folder / "deep/letters", model, meta)
    for path in (folder / "damaged", folder.parent / "outside"):
        shutil.copytree(folder / "deep/letters", path)
    (folder / "damaged/last.pt").write_bytes(b"PK\x03\x04 and then nothing")
    return folder


@contextlib.contextmanager
def serve(log: Path, *command: str, **env: str):
    """Start a server; give its url, the numbers of its functions by name, and its process."""
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, *command, "--port=0"], cwd=HERE, stdout=file,
                                   stderr=subprocess.STDOUT, env={**os.environ, **env})
    try:
        until(lambda: "Ctrl-C" in log.read_text() or process.poll() is not None, seconds=300)
        port = re.search(r":(\d+) \(press", log.read_text())[1]
        url = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(f"{url}/config", timeout=30) as answer:
            config = json.load(answer)
        assert config["root"] == url
        fns = {fn["api_name"]: fn["id"] for fn in config["dependencies"]}
        yield SimpleNamespace(url=url, fns=fns, process=process)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory, runs):
    """A server whose output must be the expected lines and no others."""
    log = tmp_path_factory.mktemp("log") / "log"
    with serve(log, "app.py", f"--folder={runs}", *SERVER, **EXPOSING) as server:
        yield server
    lines = log.read_text().splitlines()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+ \(press Ctrl-C to stop\)", lines[0])
    for line in lines[1:]:
        loaded = r"loaded (fables|deep/letters)( in int8)? on cpu in [\d.]+ s"
        assert re.fullmatch(loaded, line), line


def until(holds, seconds: float = 60) -> None:
    """Wait until something holds."""
    for _ in range(int(seconds / 0.05)):
        if holds():
            return
        threading.Event().wait(0.05)
    raise AssertionError("waited in vain")


def post(server, path: str, body: object) -> tuple[int, str]:
    """Return the status and text of the answer."""
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def join(server, name: str, data: list, session: str) -> tuple[int, str]:
    body = dict(data=data, fn_index=server.fns[name], session_hash=session)
    return post(server, "/gradio_api/queue/join", body)


def messages(server, session: str):
    """Yield what the server sends to a client that has joined the queue."""
    url = f"{server.url}/gradio_api/queue/data?session_hash={session}"
    with urllib.request.urlopen(url, timeout=60) as lines:
        for line in lines:
            if line.startswith(b"data:"):
                yield json.loads(line[5:])


def ask(server, name: str, data: list, session: str) -> list:
    """Return the last outputs of a function."""
    status, text = join(server, name, data, session)
    assert status == 200, text
    *_, last = (message["output"] for message in messages(server, session)
                if message["msg"] == "process_completed")
    return last["data"]


def sample_of(server, session: str = "one", **changes) -> tuple[str, str, str]:
    """Return sample, chart and figures for a request."""
    return ask(server, "generate", list((REQUEST | changes).values()), session)


def expected(folder: Path, **changes) -> str:
    """Return the same sample as a program gets it."""
    given = REQUEST | changes
    given.pop("device")
    return generate_text(out_dir=str(folder / given.pop("run")), device="cpu",
                         quantize="int8" if given.pop("int8") else "",
                         max_length=given.pop("max_new_tokens"), **given)


def chart_rows(chart: str) -> list[tuple[str, str]]:
    return re.findall(r'<th scope="row" title="(.*?)">.*?<td>([\d.]+%)</td>', chart)


def expected_rows(folder: Path, n: int = 0, **changes) -> list[tuple[str, str]]:
    """Return the chart after the prompt and n more tokens, computed without a cache."""
    given = REQUEST | changes
    model, checkpoint = load_model(folder / given["run"], "cpu")
    tokenizer = get_tokenizer(checkpoint["meta"])
    # the letters have no end-of-text: their empty prompt is a newline
    start = [tokenizer.eot] if tokenizer.eot >= 0 else [] if given["prompt"] else [3]
    ids = torch.tensor([start + tokenizer.encode(given["prompt"])])
    if n:
        sampler = Sampling(*(given[name] for name in SAMPLING),
                           generator=torch.Generator().manual_seed(given["seed"]))
        ids = model.generate(ids, n, sampler=sampler, stop_token=tokenizer.eot)
    ids = ids[:, :-1] if n and ids[0, -1] == tokenizer.eot else ids
    p = model(ids[:, -model.config.block_size:])[0][0, -1].softmax(-1)
    top = p.argsort(descending=True)[:10].tolist()
    names = ["end of text" if token == tokenizer.eot else repr(tokenizer.decode([token]))
             for token in top]
    rows = [(html.escape(name), f"{p[token]:.1%}") for name, token in zip(names, top)]
    return [row for row in rows if row[1] != "0.0%"]


# -----------------------------------------------------------------------------
# Runs

def test_runs_are_found_and_nothing_else(tmp_path, monkeypatch):
    for path in ("best.pt", "a/last.pt", "a/b/ckpt.pt", "a/b/c/best.pt", ".venv/best.pt",
                 "__pycache__/best.pt", "a/prev.pt", "hf/config.json", "hf/model.safetensors",
                 "half/model.safetensors", "other/config.json", "old/prev.pt", "a/m.gguf",
                 "a/b/c/n.gguf", "a/m.gguf.tmp"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    monkeypatch.setattr(app, "folder", str(tmp_path))
    assert set(app.find_runs()) == {".", "a", "a/b", "hf", "a/m.gguf"}


def test_runs_are_listed_and_described(server, runs):
    update, = ask(server, "runs", [], "list")
    assert update["choices"] == [["damaged", "damaged"], ["deep/letters", "deep/letters"],
                                 ["fables, step 6, loss 1.23", "fables"]]
    facts, chart, *examples = ask(server, "show", ["fables", "cpu", False, "Once"], "facts")
    model, checkpoint = load_model(runs / "fables", "cpu")
    for fact in ("gpt2, 2 layers, 2 heads, width 16", f"{model.num_params():,}", "1.2346", "3.44",
                 "0.7100", "50.0%", "12,345 tokens"):
        assert f"<td>{fact}</td>" in facts
    assert "None" not in facts and "valid" not in facts
    assert "not yet" not in facts and "measured at" not in facts
    assert chart_rows(chart) == expected_rows(runs, prompt="Once")
    tokenizer = get_tokenizer(checkpoint["meta"])
    fit = [all(token in tokenizer.ids for token in tokenizer.split(example))
           for example in app.EXAMPLES]
    assert [button["visible"] for button in examples] == fit and fit[0] and not all(fit)


def test_a_run_that_is_not_measured_or_is_damaged(server, runs):
    facts, chart, *_ = ask(server, "show", ["deep/letters", "cpu", False, "\x00"], "letters")
    assert "not yet: python eval.py" in facts and "&lt;b&gt;letters" in facts
    assert "<b>" not in facts and chart == ""
    facts, *_ = ask(server, "show", ["damaged", "cpu", False, ""], "damaged")
    assert facts.startswith('<div role="alert">error: ') and "is damaged" in facts
    assert "is damaged" in sample_of(server, "damaged", run="damaged")[2]


@pytest.mark.parametrize("text, says", [
    ("{", "is damaged"), ("[]", "is damaged"), ('{"step": 6, "loss": "x"}', "is damaged"),
    ('{"step": 5}', "measured at step"),
])
def test_damaged_and_old_metrics(tmp_path, trained, monkeypatch, text, says):
    (tmp_path / "metrics_summary.json").write_text(text)
    monkeypatch.setattr(app, "folder", str(tmp_path))
    model, checkpoint = load_model(trained, "cpu")
    tokenizer = get_tokenizer(checkpoint["meta"])
    assert checkpoint["step"] == 6 and says in app.about(".", model, tokenizer, checkpoint)


def test_a_run_that_was_trained_further_is_loaded_again(tmp_path, runs, monkeypatch):
    shutil.copytree(runs / "deep/letters", tmp_path / "run")
    monkeypatch.setattr(app, "folder", str(tmp_path))
    monkeypatch.setattr(app, "device", "cpu")
    app.devices.cache_clear()
    first = app.load("run", "cpu", False)
    assert app.load("run", "cpu", False) is first
    path = tmp_path / "run/last.pt"
    torch.save(torch.load(path, weights_only=True) | {"step": 7}, path)
    assert app.load("run", "cpu", False)[2]["step"] == 7


def test_the_list_says_steps_and_loss(tmp_path, trained, monkeypatch):
    """Of metrics_summary.json, else of best.pt; nothing where neither can be read."""
    monkeypatch.setattr(app, "folder", str(tmp_path))
    shutil.copytree(trained, tmp_path / "run")
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert app.describe_run("run", 1) == f"run, step 6, loss {best['best_val_loss']:.2f}"
    (tmp_path / "run/metrics_summary.json").write_text('{"step": 1234, "loss": 0.987}')
    assert app.describe_run("run", 1) == "run, step 1,234, loss 0.99"
    (tmp_path / "run/metrics_summary.json").write_text("{" * 10**6)
    assert app.describe_run("run", 1) == "run"
    (tmp_path / "run/metrics_summary.json").unlink()
    (tmp_path / "run/best.pt").write_bytes(b"PK\x03\x04 and then nothing")
    assert app.describe_run("run", 2) == "run"


def test_the_list_reads_no_file_without_end(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(app, "folder", str(tmp_path))
    read, real = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **how: read.append(args) or real(*args, **how))
    shutil.copytree(trained, tmp_path / "run")
    with open(tmp_path / "run/metrics_summary.json", "wb") as file:
        file.truncate(10**10)
    with pytest.raises(ValueError, match="at most 100,000,000 can be read"):
        app.read_summary("run")
    with zipfile.ZipFile(tmp_path / "run/best.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("best/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match="its parts are compressed"):
        app.read_progress("run", 3)
    (tmp_path / "run/best.pt").unlink()
    (tmp_path / "run/best.pt").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="not a regular file"):
        app.read_progress("run", 4)
    assert not read


@pytest.mark.skipif(sys.platform == "win32", reason="file names are Unicode, without controls")
def test_names_cannot_control_the_terminal_or_damage_the_page(tmp_path, trained, monkeypatch,
                                                             capsys):
    """A name with control characters is escaped; one that is not text is not listed."""
    monkeypatch.setattr(app, "folder", str(tmp_path))
    monkeypatch.setattr(app, "device", "cpu")
    app.devices.cache_clear()
    for name in (b"a\x1b]0;b\x07", b"a\xff"):
        shutil.copytree(trained, tmp_path / os.fsdecode(name))
    assert list(app.find_runs()) == ["a\x1b]0;b\x07"]
    facts, *_ = app.show_run("a\x1b]0;b\x07", "cpu", False, "")
    text = facts + app.describe_run("a\x1b]0;b\x07", 1) + capsys.readouterr().out
    assert text.count(r"a\x1b]0;b\x07") >= 3 and text.replace("\n", "").isprintable()


def test_metrics_that_are_no_regular_file_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "metrics_summary.json").symlink_to("/dev/zero")
    monkeypatch.setattr(app, "folder", str(tmp_path))
    assert app.read_summary(".") == {}


def test_a_model_that_loads_slowly_delays_only_those_who_want_it(tmp_path, runs, chromium):
    """Loading waits here for a file. Also shows what a user sees who chooses another model then."""
    program, go = tmp_path / "program.py", tmp_path / "go"
    program.write_text(f"""
import os, sys, time
sys.path.insert(0, {str(HERE)!r})
import lib.checkpoint
real = lib.checkpoint.load_model
def slow(name, *args):
    while name.name == "letters" and not os.path.exists({str(go)!r}):
        time.sleep(0.05)
    return real(name, *args)
lib.checkpoint.load_model = slow
import runpy
sys.argv[0] = "app.py"
runpy.run_path("app.py", run_name="__main__")
""")
    with serve(tmp_path / "log", str(program), f"--folder={runs}", *SERVER) as slow:
        assert sample_of(slow)[0] == expected(runs)
        page = chromium.new_page()
        page.goto(slow.url)
        choose(page, "fables")
        page.get_by_label("model").click()
        page.get_by_role("option", name="deep/letters").click()
        page.locator(".facts caption").first.wait_for(state="detached")
        assert page.locator(".waiting").count() == 2
        waiting = {f"wait{i}": threading.Thread(target=ask, args=[
            slow, "show", ["deep/letters", "cpu", False, ""], f"wait{i}"]) for i in range(3)}
        for thread in waiting.values():
            thread.start()
        give_up = threading.Timer(200, go.touch)
        give_up.start()
        assert sample_of(slow, "meanwhile", seed=6)[0] == expected(runs, seed=6)
        facts, *_ = ask(slow, "show", ["fables", "cpu", False, ""], "facts")
        assert "1.2346" in facts
        page.get_by_label("model").click()
        page.get_by_role("option", name="fables").click()
        page.wait_for_timeout(300)
        give_up.cancel()
        assert not go.exists()
        go.touch()
        for thread in waiting.values():
            thread.join()
        page.locator(".facts caption", has_text=re.compile("^fables$")).wait_for()
        page.wait_for_timeout(500)  # a late answer would replace it now
        assert page.locator(".facts caption", has_text=re.compile("^fables$")).count()
        page.close()


# -----------------------------------------------------------------------------
# Samples

@pytest.mark.parametrize("changes", [
    {}, dict(seed=6), dict(temperature=0, prompt=""),
    dict(top_k=3, top_p=0.9, min_p=0.01, prompt="Once upon a time"),
    dict(repetition_penalty=1.5, no_repeat_ngram=2, int8=True), dict(max_new_tokens=1),
    dict(run="deep/letters", prompt="ab\nc", max_new_tokens=30),
    dict(run="deep/letters", prompt="ab", stop="ba||cc"), dict(run="deep/letters", prompt=""),
])
def test_samples_are_those_of_generate_text(server, runs, changes):
    text, chart, figures = sample_of(server, **changes)
    given = REQUEST | changes
    assert text == expected(runs, **changes)
    pattern = rf"(\d+) tokens?, [\d,]+ tokens/s, seed {given['seed']}"
    n = int(re.fullmatch(pattern, figures)[1])
    assert 1 <= n <= given["max_new_tokens"]
    if not given["int8"]:
        assert chart_rows(chart) == expected_rows(runs, n, **changes)


def test_without_a_seed_it_is_a_new_one(server, runs):
    seeds = set()
    for given in (None, -1, -1):
        text, _, figures = sample_of(server, seed=given)
        seeds.add(int(figures.split()[-1]))
        assert text == expected(runs, seed=int(figures.split()[-1]))
    assert len(seeds) == 3


def test_a_sample_grows_and_the_chart_follows(monkeypatch, runs):
    monkeypatch.setattr(app, "folder", str(runs))
    monkeypatch.setattr(app, "device", "cpu")
    clock = iter(range(10**6))  # a second passes between any two calls: no step is skipped
    monkeypatch.setattr(app, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    app.devices.cache_clear()
    steps = list(app.generate(dict(REQUEST)))
    texts = [text for text, _, _ in steps]
    assert len(steps) > 5 and texts[-1] == expected(runs)
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:]))
    drawn = [n for n, (step, last) in enumerate(zip(steps[1:], steps), 2) if step[1] != last[1]]
    assert 3 < len(drawn) < len(steps) - 3 and drawn[-1] == len(steps)
    for n in drawn:
        assert chart_rows(steps[n - 1][1]) == expected_rows(runs, n)


@pytest.mark.parametrize("probable, rows", [
    ([0.5, 0.25, 0.00051, 0.00049], [("100.0%", "50.0%"), ("50.0%", "25.0%"), ("0.1%", "0.1%")]),
    ([0.0004, 0.0003], []),
])
def test_bars_scale_to_the_most_probable_and_zeros_are_hidden(monkeypatch, probable, rows):
    monkeypatch.setattr(app.sample, "next_tokens", lambda *_: [*enumerate(probable)])
    chart = app.chart_after(None, SimpleNamespace(eot=-1, decode=str), [])
    assert re.findall(r'width: ([\d.]+%).*?<td>([\d.]+%)', chart) == rows
    assert ("all below 0.1%" in chart) == (not rows)


def test_a_tokenizer_that_fails_is_reported(tmp_path, monkeypatch):
    """tiktoken's PanicException is no Exception: Gradio would let the client wait for ever."""
    spec = {"kind": "bpe", "pattern": r"(?:a+a+)+(?!\S)b|\S+|\s+", "vocab": [*map(chr, range(257))]}
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    save_untrained(tmp_path, model, {"dataset": "", "tokenizer": spec})
    monkeypatch.setattr(app, "folder", str(tmp_path))
    monkeypatch.setattr(app, "device", "cpu")
    app.devices.cache_clear()
    for prompt, fails in (("a b", False), ("a" * 40, True)):
        *_, (_, _, status) = app.show_sample(**REQUEST | dict(run=".", prompt=prompt))
        assert ("Regex error" in status) == fails == ("alert" in status), status
        assert "measured" in app.show_run(".", "cpu", False, prompt)[0]


def test_unknown_words_are_named(tmp_path, monkeypatch):
    vocab = ["<PAD>", "<UNK>", "<|endoftext|>", "a", "b"]
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8))
    save_untrained(tmp_path, model,
                   {"dataset": "", "tokenizer": {"kind": "word", "vocab": vocab}})
    monkeypatch.setattr(app, "folder", str(tmp_path))
    monkeypatch.setattr(app, "device", "cpu")
    app.devices.cache_clear()
    warning = "<br>the vocabulary does not have the words &#x27;&lt;&#x27;, &#x27;c&#x27;"
    for prompt, says in (("a <c b", warning), ("a b", "")):
        *_, (_, _, figures) = app.generate(REQUEST | dict(run=".", prompt=prompt, max_new_tokens=2))
        assert figures.partition("seed 5")[2].startswith(says)
        assert bool(says) == ("does not have" in figures)
    *_, (_, chart, figures) = app.generate(REQUEST | dict(run=".", prompt="a b", max_new_tokens=99))
    n = int(figures.split()[0])
    assert n < 99  # it is likely that end-of-text is sampled
    assert chart_rows(chart) == expected_rows(tmp_path, n, run=".", prompt="a b")
    tokenizer = app.load(".", "cpu", False)[1]
    assert app.has_all_of(tokenizer, "a b") and not app.has_all_of(tokenizer, "a c")


def test_twenty_clients_at_once_get_their_own_samples(server, runs):
    answers = {}

    def request(i: int) -> None:
        answers[i] = sample_of(server, f"client{i}", seed=i)[0]

    clients = [threading.Thread(target=request, args=[i]) for i in range(20)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(60)
    assert answers == {i: expected(runs, seed=i) for i in range(20)}
    assert len(set(answers.values())) > 10


ENDLESS = dict(run="deep/letters", prompt="a", max_new_tokens=1_000_000)  # takes minutes


def begin_endless(server, session: str) -> tuple[str, object]:
    """Start a sample that takes minutes; return its event and its messages."""
    status, text = join(server, "generate", list((REQUEST | ENDLESS).values()), session)
    assert status == 200, text
    stream = messages(server, session)
    assert any(message["msg"] == "process_generating" for message in stream)
    return json.loads(text)["event_id"], stream


def stop_event(server, session: str, event: str) -> None:
    body = dict(session_hash=session, fn_index=server.fns["generate"], event_id=event)
    status, _ = post(server, "/gradio_api/cancel", body)
    assert status == 200


@pytest.mark.parametrize("how", ["stop", "leave"])
def test_a_sample_that_nobody_reads_is_stopped(server, runs, how):
    """This server generates one sample at a time: another one comes only if that has ended."""
    event, stream = begin_endless(server, how)
    if how == "stop":
        stop_event(server, how, event)
    stream.close()
    assert sample_of(server)[0] == expected(runs)


def test_a_full_queue_says_so(server, runs):
    event, stream = begin_endless(server, "first")
    waiting = [join(server, "generate", list(REQUEST.values()), f"waiting{i}") for i in range(21)]
    assert [status for status, _ in waiting] == [200] * 20 + [503] and "full" in waiting[-1][1]
    stop_event(server, "first", event)
    stream.close()
    for i in range(20):  # those that waited are served
        output, = (message["output"] for message in messages(server, f"waiting{i}")
                   if message["msg"] == "process_completed")
        assert output["data"][0] == expected(runs)


# -----------------------------------------------------------------------------
# Load

CLIENTS = 20  # of each kind


def be_honest(server, i: int, wanted: dict, done: Counter) -> None:
    assert sample_of(server, f"honest{i}", seed=i)[0] == wanted[i]
    done["samples, all those of their seeds"] += 1


def leave(server, i: int, wanted: dict, done: Counter) -> None:
    begin_endless(server, f"leaver{i}")[1].close()
    done["clients that left half-way"] += 1


def be_crafty(server, i: int, wanted: dict, done: Counter) -> None:
    rng, data = random.Random(f"{i} {done}"), list(REQUEST.values())
    bad = rng.choice([dict(run="../outside"), dict(prompt="\ud800"), dict(top_k=-1),
                      dict(temperature=10**400), dict(prompt="x" * 501), dict(seed="x")])
    session = f"crafty{i}"
    rng.choice([
        lambda: sample_of(server, session, **bad),
        lambda: ask(server, "show", [rng.choice(["damaged", None, "x" * 99]), 3, 4, "\0"], session),
        lambda: post(server, "/gradio_api/queue/join", dict(data=[data], fn_index=0)),
        lambda: post(server, "/gradio_api/queue/join", "x" * 20_000),
        lambda: post(server, "/gradio_api/cancel", dict(session_hash=session, fn_index=[])),
        lambda: post(server, "/gradio_api/upload", {}),
        lambda: answer_to(server, "evil.example"),
        lambda: join(server, "generate", data, session),  # nobody reads the answer
    ])()
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as raw:
        raw.sendall(rng.randbytes(50) if rng.random() < 0.5 else b"POST /gradio_api/queue/join HT")
    done["crafted requests"] += 1


def use_by_all(server, wanted: dict[int, str], seconds: float) -> Counter:
    """Let 60 clients use the page at once, each at least once. Return what they did."""
    done, errors, end = Counter(), [], time.monotonic() + seconds

    def repeat(client, i: int) -> None:
        try:
            client(server, i, wanted, done)
            while time.monotonic() < end and not errors:
                client(server, i, wanted, done)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=[client, i]) for i in range(CLIENTS)
               for client in (be_honest, leave, be_crafty)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return done


def resident(process) -> int:
    """Return the MB of memory that a process occupies."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) >> 10


def use_twice(runs: Path, log: Path, seconds: float) -> None:
    """Let all clients use the page twice, check what is left, and print figures."""
    wanted = {i: expected(runs, seed=i) for i in range(CLIENTS)}
    with serve(log, "app.py", f"--folder={runs}", *SERVER, "--at_once=2",
               "--queue_size=200") as server:
        memory = []
        for _ in range(2):
            done = use_by_all(server, wanted, seconds)
            both = [begin_endless(server, f"last{i}") for i in range(2)]  # no worker is busy
            for i, (event, stream) in enumerate(both):
                stop_event(server, f"last{i}", event)
                stream.close()
            memory.append(resident(server.process))
            print(f"{dict(done)}, then {memory[-1]} MB", flush=True)
            assert len(done) == 3
        assert memory[1] <= 1.05 * memory[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_sixty_clients_of_which_twenty_are_honest(runs, tmp_path):
    use_twice(runs, tmp_path / "log", 5)


def test_many_sessions_neither_stop_the_server_nor_replace_those_who_wait(tmp_path, runs):
    """Gradio keeps the messages of 2,000 sessions, here of 20, and stops when it misses some."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import runpy, sys
sys.path.insert(0, {str(HERE)!r})
import gradio.queueing
class Small(gradio.queueing.LRUCache):
    def __init__(self, max_size):
        super().__init__(20)
gradio.queueing.LRUCache = Small
sys.argv[0] = "app.py"
runpy.run_path("app.py", run_name="__main__")
""")
    with serve(tmp_path / "log", str(program), f"--folder={runs}", *SERVER) as server:
        event, stream = begin_endless(server, "first")
        assert join(server, "generate", list(REQUEST.values()), "honest")[0] == 200
        for i in range(30):
            assert "no run" in ask(server, "show", ["nowhere", "cpu", False, ""], f"other{i}")[0]
        stop_event(server, "first", event)
        stream.close()
        *_, last = (message["output"]["data"] for message in messages(server, "honest")
                    if message["msg"] == "process_completed")
        assert last[0] == expected(runs)
    assert "Traceback" not in (tmp_path / "log").read_text()


# -----------------------------------------------------------------------------
# Bad and hostile requests

@pytest.mark.parametrize("changes, says", [
    (dict(run="nowhere"), "there is no run"), (dict(run="../outside"), "there is no run"),
    (dict(run=None), "run takes str"), (dict(run="fables/../../outside"), "there is no run"),
    (dict(run="<i>"), "&lt;i&gt;"), (dict(device="cuda"), "device must be cpu"),
    (dict(int8="yes"), "int8 takes bool"), (dict(prompt=3), "prompt takes str"),
    (dict(prompt="x" * 501), "500 characters"), (dict(stop="x" * 501), "500 characters"),
    (dict(prompt="Qwertyuiop"), "does not have the words"), (dict(prompt="\ud800"), "surrogates"),
    (dict(prompt="Qwertyuiop"), "of the prompt; a prompt that works: &quot;"),
    (dict(run="deep/letters", no_repeat_ngram=1, prompt="a"), "no_repeat_ngram=1 excludes"),
    (dict(max_new_tokens=1_000_001), "at least 1 and at most 1000000"),
    (dict(max_new_tokens=0), "at least 1 and at most 1000000"),
    (dict(max_new_tokens=1.5), "takes int"), (dict(max_new_tokens=True), "takes int"),
    (dict(max_new_tokens="9"), "takes int"),
    (dict(temperature=math.nan), "temperature takes float"),
    (dict(temperature=-1), "temperature must be at least 0"),
    (dict(temperature=10**400), "too large"), (dict(top_k=-1), "top_k must be at least 0"),
    (dict(top_p=0), "top_p must be"), (dict(min_p=2), "min_p must be from 0 to 1"),
    (dict(repetition_penalty=0), "above 0"), (dict(no_repeat_ngram=None), "takes int"),
    (dict(seed=-2), "seed must be"), (dict(seed=2**60), "seed must be"),
    (dict(seed="x"), "seed takes int"),
])
def test_bad_requests_are_one_line(server, runs, changes, says):
    line = sample_of(server, "bad", **changes)[2]
    assert line.startswith('<div role="alert">error: ') and says in line and "\n" not in line


def test_requests_that_the_page_does_not_send_are_refused(server):
    generate, data = server.fns["generate"], list(REQUEST.values())
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    good = dict(data=data, fn_index=generate, session_hash="x")
    for change in (dict(data=[]), dict(data=data + [1]), dict(data=[file] * 13), dict(data=None),
                   dict(fn_index=99), dict(fn_index=[]), dict(fn_index=None),
                   dict(data=[[]] * 13)):
        assert post(server, "/gradio_api/queue/join", good | change)[0] == 400, change
    assert post(server, "/gradio_api/queue/join", [good])[0] == 400
    assert post(server, "/gradio_api/queue/join", good | dict(session_hash=3))[0] == 422
    assert post(server, "/gradio_api/queue/join", good | dict(more="x" * 20_000))[0] == 413
    # plain values pass: the page reports what is wrong with them
    assert join(server, "show", ["fables", "cpu", 3, 4], "y")[0] == 200


@pytest.mark.parametrize("path", [
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=README.md",
    "/gradio_api/file=../outside/last.pt", "/file=/etc/passwd", "/gradio_api/file/etc/passwd",
    "/static/../../../../../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/%2e%2e/app.py",
    "/svelte/..%2f..%2f..%2fapp.py", "/gradio_api/proxy=http://127.0.0.1/", "/gradio_api/runs",
    "/monitoring", "/docs", "/openapi.json", "/gradio_api/openapi.json", "/gradio_api/dev/reload",
])
def test_files_are_out_of_reach(server, path):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(server.url + path, timeout=30)
    assert error.value.code in (403, 404)


def test_uploads_and_other_calls_are_refused(server):
    for path in ("/gradio_api/upload", "/gradio_api/run/generate", "/gradio_api/call/generate",
                 "/gradio_api/component_server"):
        assert post(server, path, {})[0] == 403


def answer_to(server, host: str, path: str = "/config", **headers: str) -> int:
    """Return the status of a GET request with this Host header."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    with contextlib.closing(connection):
        connection.putrequest("GET", path, skip_host=True)
        for name, value in {"Host": host, **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse().status


def test_only_names_of_this_machine_are_served(server):
    """Else a site whose name resolves to 127.0.0.1 could use the page (DNS rebinding)."""
    port = server.url.rpartition(":")[2]
    for name in ("localhost", "127.0.0.1", "[::1]"):
        own = f"{name}:{port}"
        assert answer_to(server, own) == 200
        assert answer_to(server, own, Origin=f"http://{own}") == 200
        assert answer_to(server, name) == answer_to(server, f"{name}:1") == 403
        for origin in ("http://evil.example", f"http://evil.example:{port}", "null",
                       f"https://{own}"):
            assert answer_to(server, own, Origin=origin) == 403
    evil = f"evil.example:{port}"
    for host in ("evil.example", evil, f"localhost:{port}.evil.example", ""):
        assert answer_to(server, host) == answer_to(server, host, Origin=f"http://{host}") == 403
    for path in ("/", "/gradio_api/queue/data?session_hash=x", "/gradio_api/heartbeat/x",
                 "/assets/x.js", "/theme.css"):
        assert answer_to(server, evil, path) == 403
    request = urllib.request.Request(server.url + "/config",
                                     headers={"X-Forwarded-Host": "evil.example"})
    with urllib.request.urlopen(request, timeout=30) as response:
        assert b"evil.example" not in response.read()
    request = urllib.request.Request(server.url + "/gradio_api/queue/join", b"{}", {"Host": evil})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=30)
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    for host in (evil, f"localhost:{port}"):
        assert answer_to(server, host, "/gradio_api/queue/join", **upgrade) in (403, 405)


def test_on_the_network_a_warning_is_printed_and_all_names_are_served(tmp_path, runs):
    log = tmp_path / "log"
    with serve(log, "app.py", f"--folder={runs}", "--host=0.0.0.0") as server:
        assert answer_to(server, "my-machine.example", Origin="https://my-machine.example") == 200
    address, warning = log.read_text().splitlines()
    assert address.startswith("http://0.0.0.0:")
    assert warning.startswith("warning: --host=0.0.0.0 opens the page to the network")


# -----------------------------------------------------------------------------
# Starting

@pytest.mark.parametrize("args, says", [
    (["--folder=nowhere"], "there is no folder nowhere"),
    (["--quantize=int4"], "quantize must be int8"), (["--at_once=0"], "at_once must be at least 1"),
    (["--queue_size=0"], "queue_size must be at least 1"),
    (["--max_tokens=0"], "max_tokens must be at least 1"),
    (["--max_prompt=0"], "max_prompt must be at least 1"),
    (["--device=toaster"], "toaster"), (["--port=70000"], "port must be"),
    (["--host=no.such.host.invalid"], "not known"),
])
def test_bad_settings_are_one_line(args, says):
    done = run("app.py", "--port=0", *args)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = run("app.py", f"--port={listener.getsockname()[1]}")
    assert done.returncode == 2 and re.fullmatch("error: .*in use.*\n", done.stderr), done.stderr


def test_without_gradio_the_error_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError")
    done = run("app.py", "--port=0", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "error: the page needs a package: pip install gradio\n"


def test_a_space_says_where_to_listen():
    shown = run("app.py", "--help", GRADIO_SERVER_NAME="0.0.0.0", GRADIO_SERVER_PORT="7").stdout
    assert "--host=0.0.0.0 " in shown and "--port=7 " in shown
    assert "GRADIO_SERVER_PORT takes int" in run("app.py", GRADIO_SERVER_PORT="x").stderr


def test_a_space_needs_the_files_that_the_docstring_names(tmp_path):
    for name in ("app.py", "sample.py", "model.py", "train.py"):
        assert name in app.__doc__
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(HERE / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, str(tmp_path / "app.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--queue_size=50 " in done.stdout, done.stderr
    (tmp_path / "train.py").unlink()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch("error: .*train.py'\n", done.stderr), done.stderr


def test_an_empty_folder_says_how_to_fill_it(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "folder", str(tmp_path))
    with pytest.raises(ValueError, match="no checkpoint in .*make demo"):
        app.load(None, "cpu", False)


def test_the_page_opens_with_a_measured_run_or_the_shipped_model(tmp_path, monkeypatch):
    """The newest measured run; else the shipped model; else the newest, even if not measured."""
    monkeypatch.setattr(app, "folder", str(tmp_path))
    (tmp_path / "a").mkdir()
    found = {"a": 1, "b": 2, "models/fables": 8, "models/tinystories": 9}
    assert app.first_run(found) == "models/tinystories"
    for damaged in ("{}", "[]", '{"loss": "x"}', "x"):
        (tmp_path / "a/metrics_summary.json").write_text(damaged)
        assert app.first_run(found) == "models/tinystories"
    (tmp_path / "a/metrics_summary.json").write_text('{"loss": 1.5}')
    assert app.first_run(found) == "a"
    assert app.first_run({"b": 2, "c": 3}) == "c" and app.first_run({}) is None


# -----------------------------------------------------------------------------
# In a browser

@pytest.fixture
def page(chromium, server):
    """
    The page with the fables chosen.

    At the end its console must have no error, and it must have contacted only the server.
    """
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    asked, errors = [], []

    def on_console(message) -> None:
        if message.type in ("error", "warning"):
            errors.append(message.text)

    page.on("request", lambda request: asked.append(request.url))
    page.on("console", on_console)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    choose(page, "fables")
    yield page
    page.close()
    assert errors == [] and asked
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked)


def choose(page, name: str) -> None:
    page.locator(".facts caption, [role=alert]").first.wait_for()
    page.get_by_label("model").click()
    page.get_by_role("option", name=name).click()
    page.locator(".facts caption", has_text=re.compile(f"^{name}$")).wait_for()


def fill(page, label: str, value: object) -> None:
    page.get_by_label(f"number input for {label}").fill(str(value))
    page.get_by_label(f"number input for {label}").blur()


def figures(page, text: str) -> str:
    """Return the line of figures once it contains text."""
    page.locator("#status", has_text=text).wait_for()
    return page.locator("#status").inner_text()


def shown_rows(page) -> list[tuple[str, str]]:
    chart = page.locator("table.chart").evaluate("x => x.outerHTML")
    return chart_rows(chart.replace("'", "&#x27;"))


def wait_for_sample(page, text: str) -> None:
    page.wait_for_function("text => document.querySelector('#sample textarea').value == text",
                           arg=text)


def test_a_user_generates(page, runs):
    page.locator("#prompt textarea").fill("Once upon")
    fill(page, "temperature", 0)
    fill(page, "max_new_tokens", 30)
    page.get_by_label("seed").fill("77")
    page.get_by_role("button", name="Generate").click()
    figures(page, "seed 77")
    text = expected(runs, temperature=0, max_new_tokens=30)
    wait_for_sample(page, text)
    assert shown_rows(page) == expected_rows(runs, 30, temperature=0)
    page.get_by_role("button", name=app.EXAMPLES[0], exact=True).click()
    page.get_by_label("seed").fill("78")
    page.locator("#prompt textarea").press("Shift+Enter")
    figures(page, "seed 78")
    text = expected(runs, prompt=app.EXAMPLES[0], temperature=0, max_new_tokens=30)
    wait_for_sample(page, text)


def test_a_user_stops(page):
    choose(page, "deep/letters")
    page.locator("#prompt textarea").fill("ab")
    fill(page, "max_new_tokens", 1_000_000)
    page.get_by_role("button", name="Generate").click()
    texts, charts = set(), set()

    def grows() -> bool:
        page.wait_for_timeout(20)
        texts.add(page.locator("#sample textarea").input_value())
        if page.locator("table.chart").count():
            charts.add(page.locator("table.chart").inner_html())
        return len(texts) > 4 and len(charts) > 2

    until(grows)
    ordered = sorted(texts, key=len)
    assert all(b.startswith(a) for a, b in zip(ordered, ordered[1:]) if a.startswith("ab"))
    with page.expect_response("**/reset"):
        page.get_by_role("button", name="Stop").click()
    choose(page, "fables")  # another sample can be generated now
    page.locator("#prompt textarea").fill("Once upon")
    assert page.locator("#sample textarea").input_value() == ""
    fill(page, "max_new_tokens", 1)
    page.get_by_label("seed").fill("79")
    page.get_by_role("button", name="Generate").click()
    figures(page, "1 token, ")


def test_a_user_sees_what_is_wrong(page):
    page.locator("#prompt textarea").fill("<img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Generate").click()
    line = page.locator("#status [role=alert]")
    line.wait_for()
    assert line.inner_text().startswith("error: the vocabulary does not have the words '<', 'img'")
    assert not page.locator("img[src=x]").count()
    page.locator("#prompt textarea").fill("Once")
    page.get_by_role("button", name="Generate").click()
    figures(page, "tokens/s")
    page.get_by_label("model").click()
    page.get_by_role("option", name="damaged").click()
    page.get_by_role("alert").get_by_text("is damaged").wait_for()


@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_into_the_window_and_everything_has_a_label(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for kind in ("button", "textbox", "slider", "checkbox", "listbox"):
        for element in page.get_by_role(kind).all():
            label = element.evaluate(
                "x => x.innerText || x.ariaLabel || x.labels?.length || x.title")
            assert label, element


def test_a_sample_is_shown_at_first_and_leaves_with_its_model(chromium, server, runs):
    """The page opens with a sample; another model must not have it under its name."""
    page = chromium.new_page()
    page.goto(server.url)
    page.locator("#status", has_text="seed 1337").wait_for()
    shown = page.locator("#sample textarea").input_value()
    assert shown == expected(runs, prompt=app.EXAMPLES[0], max_new_tokens=300, seed=1337)
    choose(page, "deep/letters")
    wait_for_sample(page, "")
    assert page.locator("#status").inner_text() == ""
    page.close()


def test_it_says_loading_until_the_server_answers(chromium, server):
    page = chromium.new_page()
    page.route("**/queue/join*", lambda route: None)  # never answered
    page.goto(server.url)
    page.locator(".waiting").first.wait_for()
    assert page.locator(".waiting").all_inner_texts() == ["loading ..."] * 3
    page.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_a_narrow_window_has_room_for_what_matters(chromium, server, width):
    """The name of the model ends before the arrow, the caption of int8 is one line."""
    page = chromium.new_page(viewport={"width": width, "height": 900})
    page.goto(server.url)
    page.locator("#status", has_text="seed").wait_for()
    assert page.get_by_label("number input for temperature").is_visible() == (width > 640)
    box, arrow = (page.locator(x).bounding_box() for x in ("#model input", "#model .icon-wrap svg"))
    style = "x => [parseFloat(getComputedStyle(x).paddingRight), getComputedStyle(x).textOverflow]"
    padding, overflow = page.locator("#model input").evaluate(style)
    assert box["x"] + box["width"] - padding <= arrow["x"] and overflow == "ellipsis"
    assert page.get_by_text("a quarter of the size").bounding_box()["height"] < 25
    assert page.locator("#model").bounding_box()["width"] > 250
    page.close()


# -----------------------------------------------------------------------------

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2, help="of each of two identical runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        done = run("data/fables/prepare.py", f"--out_dir={folder / 'data'}", "--train_stories=60",
                   "--val_stories=8")
        assert done.returncode == 0, done.stderr
        train(folder / "data", folder / "trained")
        use_twice(make_runs(folder / "runs", folder / "trained"), folder / "log", args.minutes * 60)


if __name__ == "__main__":
    main()
