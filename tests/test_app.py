"""The page: over HTTP as any client may speak to it, and in a browser as a user sees it."""
import html
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import app
from lib.checkpoint import VERSION, load_model, save_checkpoint
from lib.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from helpers import HERE, run
from sample import generate_text

SERVER = ["--device=cpu", "--max_tokens=1000000", "--max_prompt=500", "--at_once=1", "--queue_size=20"]
REQUEST = dict(run="fables", device="cpu", int8=False, prompt="Once upon", max_new_tokens=40, temperature=0.8, top_k=0, top_p=1,
               min_p=0, repetition_penalty=1, no_repeat_ngram=0, seed=5, stop="")


@pytest.fixture(scope="session")
def runs(tmp_path_factory, trained) -> Path:
    """A folder of a measured run, one that never ends a text, one that is damaged; beside it another one."""
    folder = tmp_path_factory.mktemp("served") / "runs"
    shutil.copytree(trained, folder / "fables")
    (folder / "fables/metrics_summary.json").write_text(json.dumps(
        dict(loss=1.23456, perplexity=3.4369, bits_per_byte=0.71, accuracy=0.5, valid_share=None, tokens=12345, step=6)))
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=16, vocab_size=4, n_layer=16, n_head=2, n_embd=32))  # a slow one
    meta = {"dataset": "<b>letters</b>", "tokenizer": {"kind": "char", "vocab": list("abc\n")}}
    (folder / "deep/letters").mkdir(parents=True)
    save_checkpoint(folder / "deep/letters", "last.pt", dict(
        model=model.state_dict(), model_args=vars(model.config), step=0, config={"dataset": ""}, meta=meta, version=VERSION))
    for path in (folder / "damaged", folder.parent / "outside"):
        shutil.copytree(folder / "deep/letters", path)
    (folder / "damaged/last.pt").write_bytes(b"PK\x03\x04 and then nothing")
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory, runs):
    """`python app.py`: its url and what it calls its functions. In the end it has said what it should, and no more."""
    log = tmp_path_factory.mktemp("log") / "log"
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, "app.py", f"--folder={runs}", "--port=0", *SERVER], cwd=HERE, stdout=file,
                                   stderr=subprocess.STDOUT)
    try:
        until(lambda: "\n" in log.read_text() or process.poll() is not None)
        url = log.read_text().split()[0]
        with urllib.request.urlopen(f"{url}/config", timeout=30) as answer:
            config = json.load(answer)
        yield SimpleNamespace(url=url, fns={fn["api_name"]: fn["id"] for fn in config["dependencies"]})
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        lines = log.read_text().splitlines()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+ \(Ctrl-C ends it\)", lines[0])
        for line in lines[1:]:
            assert re.fullmatch(r"loaded (fables|deep/letters)( in int8)? on cpu in [\d.]+ s", line), line
    finally:
        process.kill()
        process.wait()

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram")


def until(holds, seconds: float = 60) -> None:
    """Wait until something holds."""
    for _ in range(int(seconds / 0.05)):
        if holds():
            return
        threading.Event().wait(0.05)
    raise AssertionError("waited in vain")


def post(server, path: str, body: object) -> tuple[int, str]:
    """Status and text of the answer."""
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def join(server, name: str, data: list, session: str) -> tuple[int, str]:
    return post(server, "/gradio_api/queue/join", dict(data=data, fn_index=server.fns[name], session_hash=session))


def messages(server, session: str):
    """What the server sends to a client that has joined the queue."""
    with urllib.request.urlopen(f"{server.url}/gradio_api/queue/data?session_hash={session}", timeout=60) as lines:
        for line in lines:
            if line.startswith(b"data:"):
                yield json.loads(line[5:])


def ask(server, name: str, data: list, session: str) -> list:
    """The last outputs of a function."""
    status, text = join(server, name, data, session)
    assert status == 200, text
    *_, last = (message["output"] for message in messages(server, session) if message["msg"] == "process_completed")
    return last["data"]


def told(server, session: str = "one", **changes) -> tuple[str, str, str]:
    """Text, chart and figures for a request."""
    return ask(server, "generate", list((REQUEST | changes).values()), session)


def expected(folder: Path, **changes) -> str:
    """The same text as a program gets it."""
    given = REQUEST | changes
    given.pop("device")
    return generate_text(out_dir=str(folder / given.pop("run")), device="cpu", quantize="int8" if given.pop("int8") else "",
                         max_length=given.pop("max_new_tokens"), **given)


def chart_rows(chart: str) -> list[tuple[str, str]]:
    return re.findall(r'<th scope="row" title="(.*?)">.*?<td>([\d.]+%)</td>', chart)


def expected_rows(folder: Path, n: int = 0, **changes) -> list[tuple[str, str]]:
    """The chart after the prompt and n tokens more, computed token by token from the start."""
    given = REQUEST | changes
    model, checkpoint = load_model(folder / given["run"], "cpu")
    tokenizer = get_tokenizer(checkpoint["meta"])
    ids = torch.tensor([[tokenizer.eot] * (tokenizer.eot >= 0) + tokenizer.encode(given["prompt"])])
    if n:
        ids = model.generate(ids, n, *(given[name] for name in SAMPLING), stop_token=tokenizer.eot,
                             generator=torch.Generator().manual_seed(given["seed"]))
    ids = ids[:, :-1] if n and ids[0, -1] == tokenizer.eot else ids
    p = model(ids[:, -model.config.block_size:])[0][0, -1].softmax(-1)
    names = [("end of text" if token == tokenizer.eot else repr(tokenizer.decode([token])), f"{p[token]:.1%}")
             for token in p.argsort(descending=True)[:10].tolist()]
    return [(html.escape(name), p) for name, p in names]


# -----------------------------------------------------------------------------
# What is offered

def test_runs_are_found_and_nothing_else(tmp_path, monkeypatch):
    for path in ("best.pt", "a/last.pt", "a/b/ckpt.pt", "a/b/c/best.pt", ".venv/best.pt", "__pycache__/best.pt", "a/prev.pt",
                 "hf/config.json", "hf/model.safetensors", "half/model.safetensors", "other/config.json", "old/prev.pt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    monkeypatch.setattr(app, "folder", str(tmp_path))
    assert set(app.find_runs()) == {".", "a", "a/b", "hf"}


def test_runs_are_listed_and_described(server, runs):
    update, = ask(server, "runs", [], "list")
    assert [value for _, value in update["choices"]] == ["damaged", "deep/letters", "fables"]
    facts, chart, *examples = ask(server, "show", ["fables", "cpu", False, "Once"], "facts")
    model, checkpoint = load_model(runs / "fables", "cpu")
    for fact in ("gpt2, 2 layers, 2 heads, 16 wide", f"{model.num_params():,}", "1.2346", "3.44", "0.7100", "50.0%",
                 "12,345 tokens"):
        assert f"<td>{fact}</td>" in facts
    assert "None" not in facts and "valid" not in facts and "not yet" not in facts and "measured at" not in facts
    assert chart_rows(chart) == expected_rows(runs, prompt="Once")
    tokenizer = get_tokenizer(checkpoint["meta"])
    fit = [all(token in tokenizer.ids for token in tokenizer.split(example)) for example in app.EXAMPLES]
    assert [button["visible"] for button in examples] == fit and fit[0] and not all(fit)


def test_a_run_that_is_not_measured_or_that_cannot_be_read(server, runs):
    facts, chart, *_ = ask(server, "show", ["deep/letters", "cpu", False, "\x00"], "letters")
    assert "not yet: python eval.py" in facts and "&lt;b&gt;letters" in facts and "<b>" not in facts and chart == ""
    facts, *_ = ask(server, "show", ["damaged", "cpu", False, ""], "damaged")
    assert facts.startswith('<div role="alert">error: ') and "is damaged" in facts
    assert "is damaged" in told(server, "damaged", run="damaged")[2]


@pytest.mark.parametrize("text, says", [
    ("{", "is damaged"), ("[]", "is damaged"), ('{"step": 6, "loss": "x"}', "is damaged"), ('{"step": 5}', "measured at step"),
])
def test_odd_metrics(tmp_path, trained, monkeypatch, text, says):
    (tmp_path / "metrics_summary.json").write_text(text)
    monkeypatch.setattr(app, "folder", str(tmp_path))
    model, checkpoint = load_model(trained, "cpu")
    assert checkpoint["step"] == 6 and says in app.about(".", model, get_tokenizer(checkpoint["meta"]), checkpoint)


def test_a_run_that_was_trained_on_is_loaded_again(tmp_path, runs, monkeypatch):
    shutil.copytree(runs / "deep/letters", tmp_path / "run")
    monkeypatch.setattr(app, "folder", str(tmp_path))
    monkeypatch.setattr(app, "device", "cpu")
    app.devices.cache_clear()
    first = app.load("run", "cpu", False)
    assert app.load("run", "cpu", False) is first
    torch.save(torch.load(tmp_path / "run/last.pt", weights_only=True) | {"step": 7}, tmp_path / "run/last.pt")
    assert app.load("run", "cpu", False)[2]["step"] == 7


# -----------------------------------------------------------------------------
# Text

@pytest.mark.parametrize("changes", [
    {}, dict(seed=6), dict(temperature=0, prompt=""), dict(top_k=3, top_p=0.9, min_p=0.01, prompt="Once upon a time"),
    dict(repetition_penalty=1.5, no_repeat_ngram=2, int8=True), dict(max_new_tokens=1),
    dict(run="deep/letters", prompt="ab\nc", max_new_tokens=30), dict(run="deep/letters", prompt="ab", stop="ba||cc"),
])
def test_text_is_that_of_generate_text(server, runs, changes):
    text, chart, figures = told(server, **changes)
    given = REQUEST | changes
    assert text == expected(runs, **changes)
    n, = map(int, re.fullmatch(rf"(\d+) tokens?, [\d,]+ tokens/s, seed {given['seed']}", figures).groups())
    assert 1 <= n <= given["max_new_tokens"]
    if not given["int8"]:
        assert chart_rows(chart) == expected_rows(runs, n, **changes)


def test_without_a_seed_it_is_a_new_one(server, runs):
    seeds = set()
    for given in (None, -1, -1):
        text, _, figures = told(server, seed=given)
        seeds.add(int(figures.split()[-1]))
        assert text == expected(runs, seed=int(figures.split()[-1]))
    assert len(seeds) == 3


def test_text_grows_as_it_is_written_and_the_chart_follows(monkeypatch, runs):
    monkeypatch.setattr(app, "folder", str(runs))
    monkeypatch.setattr(app, "device", "cpu")
    clock = iter(range(10**6))  # every look at the clock a second later: nothing is left out
    monkeypatch.setattr(app, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    app.devices.cache_clear()
    steps = list(app.tell(dict(REQUEST)))
    texts = [text for text, _, _ in steps]
    assert len(steps) > 5 and all(b.startswith(a) for a, b in zip(texts, texts[1:])) and texts[-1] == expected(runs)
    drawn = [n for n, (step, before) in enumerate(zip(steps[1:], steps), 2) if step[1] != before[1]]
    assert 3 < len(drawn) < len(steps) - 3 and drawn[-1] == len(steps)
    for n in drawn:
        assert chart_rows(steps[n - 1][1]) == expected_rows(runs, n)


def test_words_that_a_model_cannot_read_are_named(tmp_path, monkeypatch):
    vocab = ["<PAD>", "<UNK>", "<|endoftext|>", "a", "b"]
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8))
    save_checkpoint(tmp_path, "last.pt", dict(
        model=model.state_dict(), model_args=vars(model.config), step=0, config={"dataset": ""}, version=VERSION,
        meta={"dataset": "", "tokenizer": {"kind": "word", "vocab": vocab}}))
    monkeypatch.setattr(app, "folder", str(tmp_path))
    monkeypatch.setattr(app, "device", "cpu")
    app.devices.cache_clear()
    for prompt, says in (("a <c b", "<br>the vocabulary lacks the words &#x27;&lt;&#x27;, &#x27;c&#x27;"), ("a b", "")):
        *_, (_, _, figures) = app.tell(REQUEST | dict(run=".", prompt=prompt, max_new_tokens=2))
        assert figures.partition("seed 5")[2].startswith(says) and bool(says) == ("lacks" in figures)
    *_, (_, chart, figures) = app.tell(REQUEST | dict(run=".", prompt="a b", max_new_tokens=99))
    n = int(figures.split()[0])
    assert n < 99 and chart_rows(chart) == expected_rows(tmp_path, n, run=".", prompt="a b")  # its end was likely
    assert app.fits(app.load(".", "cpu", False)[1], "a b") and not app.fits(app.load(".", "cpu", False)[1], "a c")


def test_twenty_clients_at_once_have_each_their_own_text(server, runs):
    answers = {}
    clients = [threading.Thread(target=lambda i=i: answers.update({i: told(server, f"client{i}", seed=i)[0]}))
               for i in range(20)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(60)
    assert answers == {i: expected(runs, seed=i) for i in range(20)} and len(set(answers.values())) > 10


ENDLESS = dict(run="deep/letters", prompt="a", max_new_tokens=1_000_000)  # minutes


def begin_endless(server, session: str) -> tuple[str, object]:
    """The event of a text that takes minutes and is being written, and its messages."""
    status, text = join(server, "generate", list((REQUEST | ENDLESS).values()), session)
    assert status == 200, text
    stream = messages(server, session)
    assert any(message["msg"] == "process_generating" for message in stream)
    return json.loads(text)["event_id"], stream


def stop_event(server, session: str, event: str) -> None:
    status, _ = post(server, "/gradio_api/cancel", dict(session_hash=session, fn_index=server.fns["generate"], event_id=event))
    assert status == 200


@pytest.mark.parametrize("how", ["stop", "leave"])
def test_what_nobody_reads_is_not_computed(server, runs, how):
    """One text is written at a time here: another one comes only if that has ended."""
    event, stream = begin_endless(server, how)
    if how == "stop":
        stop_event(server, how, event)
    stream.close()
    assert told(server)[0] == expected(runs)


def test_a_full_queue_says_so(server, runs):
    event, stream = begin_endless(server, "first")
    waiting = [join(server, "generate", list(REQUEST.values()), f"waiting{i}") for i in range(21)]
    assert [status for status, _ in waiting] == [200] * 20 + [503] and "full" in waiting[-1][1]
    stop_event(server, "first", event)
    stream.close()
    for i in range(20):  # and whoever waited is served
        output, = (message["output"] for message in messages(server, f"waiting{i}") if message["msg"] == "process_completed")
        assert output["data"][0] == expected(runs)


# -----------------------------------------------------------------------------
# What it must not do

@pytest.mark.parametrize("changes, says", [
    (dict(run="nowhere"), "there is no run"), (dict(run="../outside"), "there is no run"), (dict(run=None), "run takes str"),
    (dict(run="fables/../../outside"), "there is no run"), (dict(run="<i>"), "&lt;i&gt;"),
    (dict(device="cuda"), "device must be cpu"), (dict(int8="yes"), "int8 takes bool"), (dict(prompt=3), "prompt takes str"),
    (dict(prompt="x" * 501), "500 characters"), (dict(stop="x" * 501), "500 characters"),
    (dict(prompt="Qwertyuiop"), "lacks the words"), (dict(prompt="\ud800"), "surrogates"),
    (dict(max_new_tokens=1_000_001), "from 1 to 1000000"), (dict(max_new_tokens=0), "from 1 to 1000000"),
    (dict(max_new_tokens=1.5), "takes int"), (dict(max_new_tokens=True), "takes int"), (dict(max_new_tokens="9"), "takes int"),
    (dict(temperature=math.nan), "temperature takes float"), (dict(temperature=-1), "must not be negative"),
    (dict(temperature=10**400), "too large"), (dict(top_k=-1), "must not be negative"), (dict(top_p=0), "top_p must be"),
    (dict(min_p=2), "min_p at least 0"), (dict(repetition_penalty=0), "above 0"), (dict(no_repeat_ngram=None), "takes int"),
    (dict(seed=-2), "seed must be"), (dict(seed=2**60), "seed must be"), (dict(seed="x"), "seed takes int"),
    (dict(run="deep/letters", prompt=""), "no end-of-text token"),
])
def test_bad_requests_are_one_line(server, runs, changes, says):
    line = told(server, "bad", **changes)[2]
    assert line.startswith('<div role="alert">error: ') and says in line and "\n" not in line


def test_requests_that_are_none_are_refused(server):
    generate, data = server.fns["generate"], list(REQUEST.values())
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    good = dict(data=data, fn_index=generate, session_hash="x")
    for change in (dict(data=[]), dict(data=data + [1]), dict(data=[file] * 13), dict(data=None), dict(fn_index=99),
                   dict(fn_index=[]), dict(fn_index=None), dict(data=[[]] * 13)):
        assert post(server, "/gradio_api/queue/join", good | change)[0] == 400, change
    assert post(server, "/gradio_api/queue/join", [good])[0] == 400
    assert post(server, "/gradio_api/queue/join", good | dict(session_hash=3))[0] == 422
    assert post(server, "/gradio_api/queue/join", good | dict(more="x" * 20_000))[0] == 413
    assert join(server, "show", ["fables", "cpu", 3, 4], "y")[0] == 200  # plain values: the page's to complain about


@pytest.mark.parametrize("path", [
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=README.md", "/gradio_api/file=../outside/last.pt", "/file=/etc/passwd",
    "/gradio_api/file/etc/passwd", "/static/../../../../../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/%2e%2e/app.py",
    "/svelte/..%2f..%2f..%2fapp.py", "/gradio_api/proxy=http://127.0.0.1/", "/gradio_api/runs", "/monitoring", "/docs",
    "/openapi.json", "/gradio_api/openapi.json", "/gradio_api/dev/reload",
])
def test_files_are_out_of_reach(server, path):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(server.url + path, timeout=30)
    assert error.value.code in (403, 404)


def test_nothing_is_taken_in(server):
    for path in ("/gradio_api/upload", "/gradio_api/run/generate", "/gradio_api/call/generate", "/gradio_api/component_server"):
        assert post(server, path, {})[0] == 403


# -----------------------------------------------------------------------------
# Starting

@pytest.mark.parametrize("args, says", [
    (["--folder=nowhere"], "there is no folder nowhere"), (["--quantize=int4"], "quantize must be int8"),
    (["--at_once=0"], "at_once must be at least 1"), (["--queue_size=0"], "queue_size must be at least 1"),
    (["--max_tokens=0"], "max_tokens must be at least 1"), (["--max_prompt=0"], "max_prompt must be at least 1"),
    (["--device=toaster"], "toaster"), (["--port=70000"], "port must be"), (["--host=no.such.host.invalid"], "not known"),
])
def test_bad_settings_are_one_line(args, says):
    done = run("app.py", "--port=0", *args)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = run("app.py", f"--port={listener.getsockname()[1]}")
    assert done.returncode == 2 and re.fullmatch("error: .*in use.*\n", done.stderr), done.stderr


def test_without_gradio_the_error_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError")
    done = run("app.py", "--port=0", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr == "error: the page needs a package: pip install gradio\n"


def test_a_space_says_where_to_listen():
    shown = run("app.py", "--help", GRADIO_SERVER_NAME="0.0.0.0", GRADIO_SERVER_PORT="7").stdout
    assert "--host=0.0.0.0 " in shown and "--port=7 " in shown
    assert "GRADIO_SERVER_PORT takes int" in run("app.py", GRADIO_SERVER_PORT="x").stderr


def test_an_empty_folder_says_how_to_fill_it(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "folder", str(tmp_path))
    with pytest.raises(ValueError, match="no checkpoint in .*make demo"):
        app.load(None, "cpu", False)


# -----------------------------------------------------------------------------
# In a browser

@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        if not path and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: install one, or run `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, server):
    """The page with the fables chosen; in the end its console has no error, and it has asked nobody but the server."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    choose(page, "fables")
    yield page
    page.close()
    assert errors == [] and asked and all(url.startswith((server.url, "data:", "blob:")) for url in asked)


def choose(page, name: str) -> None:
    page.locator(".facts caption, [role=alert]").first.wait_for()
    page.get_by_label("model").click()
    page.get_by_role("option", name=name).click()
    page.locator(".facts caption", has_text=re.compile(f"^{name}$")).wait_for()


def fill(page, label: str, value: object) -> None:
    page.get_by_label(f"number input for {label}").fill(str(value))
    page.get_by_label(f"number input for {label}").blur()


def figures(page, text: str) -> str:
    """The line of figures once it has the text."""
    page.locator("#status", has_text=text).wait_for()
    return page.locator("#status").inner_text()


def shown_rows(page) -> list[tuple[str, str]]:
    return chart_rows(page.locator("table.chart").evaluate("x => x.outerHTML").replace("'", "&#x27;"))


def test_a_user_generates(page, runs):
    page.locator("#prompt textarea").fill("Once upon")
    fill(page, "temperature", 0)
    fill(page, "max_new_tokens", 30)
    page.get_by_label("seed").fill("77")
    page.get_by_role("button", name="Generate").click()
    figures(page, "seed 77")
    text = expected(runs, temperature=0, max_new_tokens=30)
    page.wait_for_function("text => document.querySelector('#text textarea').value == text", arg=text)
    assert shown_rows(page) == expected_rows(runs, 30, temperature=0)
    page.get_by_role("button", name=app.EXAMPLES[0], exact=True).click()
    page.get_by_label("seed").fill("78")
    page.locator("#prompt textarea").press("Shift+Enter")
    figures(page, "seed 78")
    text = expected(runs, prompt=app.EXAMPLES[0], temperature=0, max_new_tokens=30)
    page.wait_for_function("text => document.querySelector('#text textarea').value == text", arg=text)


def test_a_user_stops(page):
    choose(page, "deep/letters")
    page.locator("#prompt textarea").fill("ab")
    fill(page, "max_new_tokens", 1_000_000)
    page.get_by_role("button", name="Generate").click()
    texts, charts = set(), set()

    def grows() -> bool:
        page.wait_for_timeout(20)
        texts.add(page.locator("#text textarea").input_value())
        charts.update([page.locator("table.chart").inner_html()] if page.locator("table.chart").count() else [])
        return len(texts) > 4 and len(charts) > 2

    until(grows)
    ordered = sorted(texts, key=len)
    assert all(b.startswith(a) for a, b in zip(ordered, ordered[1:]) if a.startswith("ab"))
    page.get_by_role("button", name="Stop").click()
    with page.expect_response("**/reset"):
        pass
    text = page.locator("#text textarea").input_value()
    choose(page, "fables")  # the only place at the counter is free again
    page.locator("#prompt textarea").fill("Once upon")
    assert page.locator("#text textarea").input_value() == text
    fill(page, "max_new_tokens", 1)
    page.get_by_label("seed").fill("79")
    page.get_by_role("button", name="Generate").click()
    figures(page, "1 token, ")


def test_a_user_sees_what_is_wrong(page):
    page.locator("#prompt textarea").fill("<img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Generate").click()
    line = page.locator("#status [role=alert]")
    line.wait_for()
    assert line.inner_text().startswith("error: the vocabulary lacks the words '<', 'img'")
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
            assert element.evaluate("x => x.innerText || x.ariaLabel || x.labels?.length || x.title"), element
