"""
Serve a web page to try your trained models.

    pip install gradio
    python app.py
    python app.py --folder=runs --port=8080

The page lists the runs, Hugging Face folders and GGUF files in `folder` and up to two levels below,
streams samples, and shows the most probable next tokens. No other files can be read through it, and
it contacts no other server.

A Hugging Face Space needs app.py, sample.py, model.py, train.py (for its list of settings), lib/,
the folder of a run, a requirements.txt with torch, numpy and tiktoken, and a README.md that begins
with

    ---
    title: fablegpt
    sdk: gradio
    sdk_version: 6.31.0
    app_file: app.py
    ---
"""
import contextlib
import functools
import html
import json
import math
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import sample
from lib.checkpoint import check_archive, load_model
from lib.configurator import (
    at_least,
    coerce,
    configure,
    from_text,
    one_line,
    one_of,
    read_settings,
    user_errors,
)
from lib.decoding import Sampling
from lib.files import check_regular, load_json, results_file
from lib.machine import keep_freed_memory, resolve_device, share_heap
from lib.tokenizer import get_tokenizer, has_all_of
from model import GPT

# -----------------------------------------------------------------------------
# models
folder = "."  # offer the runs in it and up to two folders below it
device = "auto"  # offered beside the CPU: cuda, else mps, else nothing; or 'cpu', 'cuda:1', ...
quantize = ""  # 'int8': the int8 switch of the page is on at first
# server
host = "127.0.0.1"  # this machine only; 0.0.0.0: the network (default: GRADIO_SERVER_NAME, if set)
port = 7860  # 0: any free one (default: GRADIO_SERVER_PORT, if set)
# limits
max_tokens = 500  # largest max_new_tokens that a request may have
max_prompt = 10_000  # most characters in a prompt
at_once = 2  # samples generated at the same time; others wait
queue_size = 50  # samples that may wait; further requests are rejected
if __name__ == "__main__":
    with user_errors():
        host = os.environ.get("GRADIO_SERVER_NAME", host)
        text = os.environ.get("GRADIO_SERVER_PORT", str(port))
        port = from_text("GRADIO_SERVER_PORT", text, port)
    configure(globals(), skip_settings_of="train.py", port=at_least(0, at_most=65535),
              quantize=one_of("int8", ""), max_tokens=at_least(1), max_prompt=at_least(1),
              at_once=at_least(1), queue_size=at_least(1))
# -----------------------------------------------------------------------------

# least, most and step of the sliders; a request may have any value that Sampling allows
SLIDERS = dict(temperature=(0, 2, 0.05), top_k=(0, 200, 1), top_p=(0.01, 1, 0.01),
               min_p=(0, 1, 0.01), repetition_penalty=(1, 2, 0.05), no_repeat_ngram=(0, 10, 1))
# those that the vocabulary of the chosen model has are shown
EXAMPLES = ["Once upon a time", "Once upon a time, in a hollow log, there lived",
            "Long ago, at the edge of town, lived", "One day, a little girl named Lily found",
            "The king said:"]
# keys of metrics_summary.json, with their name and format on the page
METRICS = dict(loss=("loss, nats per token", "{:.4f}"), floor=("least possible loss", "{:.4f}"),
               perplexity=("perplexity", "{:.2f}"), bits_per_byte=("bits per byte", "{:.4f}"),
               accuracy=("next token right", "{:.1%}"), valid_share=("valid fables", "{:.0%}"),
               tokens=("measured on", "{:,} tokens"))
# what the page requests; everything else of Gradio is closed: files, uploads, other clients
PATHS = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/info",
         "/gradio_api/startup-events", "/gradio_api/queue/join", "/gradio_api/queue/data",
         "/gradio_api/cancel", "/gradio_api/reset")
FOLDERS = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
WAITING = '<div class="waiting">loading ...</div>'  # until the server has answered
CSS = """
.gradio-container {max-width: 1200px !important; margin: 0 auto !important}
.facts {border: 0 !important; border-collapse: collapse; width: 100%; table-layout: fixed;
        font-size: 14px}
.facts tr {border: 0 !important; background: none !important}
.facts caption {text-align: left; padding: 0 0 6px; font-weight: 600}
.facts th, .facts td {padding: 2px 0 !important; border: 0 !important; font-weight: 400;
                      text-align: left; overflow-wrap: break-word}
.facts th {width: 45%; color: var(--body-text-color-subdued)}
.chart th {width: 38%; font-family: monospace; color: var(--body-text-color); overflow: hidden;
           white-space: pre; text-overflow: ellipsis}
.chart td:last-child {width: 4em; text-align: right; font-variant-numeric: tabular-nums}
.bar {height: 14px; min-width: 1px; border-radius: 2px; background: var(--color-accent)}
.waiting {color: var(--body-text-color-subdued)}
@media (max-width: 640px) {
  #chart {order: -1}
  #model {flex-basis: 100%}
  #model input {font-size: 13px}
}
#model input {padding-right: 40px; text-overflow: ellipsis}
#status {min-height: 1.5em; font-variant-numeric: tabular-nums}
[role=alert] {color: var(--error-text-color)}
.examples button {font-weight: 400}
"""


# -----------------------------------------------------------------------------
# Runs

def find_runs() -> dict[str, int]:
    """Return the models in `folder` and up to two levels below it, and when they were written."""
    found = {}
    for path, folders, files in os.walk(folder, followlinks=True):
        name = Path(path).relative_to(folder)
        folders[:] = sorted(x for x in folders if len(name.parts) < 2
                            and not x.startswith((".", "__")) and x not in ("venv", "node_modules"))
        weights = {"best.pt", "last.pt", "ckpt.pt"} & set(files)
        if "config.json" in files:
            weights |= {file for file in files if file.endswith(".safetensors")}
        # a file may be replaced or removed at this moment, and a name may not be text
        with contextlib.suppress(OSError, UnicodeError):
            name.as_posix().encode()
            if weights:
                found[name.as_posix()] = max(os.stat(Path(path, file)).st_mtime_ns
                                             for file in weights)
            for file in files:
                if file.endswith(".gguf"):
                    found[(name / file).as_posix()] = os.stat(Path(path, file)).st_mtime_ns
    return found


def load_version(run: str, device: str, quantize: str, written: int) -> tuple[GPT, object, dict]:
    """Load a run. written: when its files were, which only makes it another cache entry."""
    began = time.perf_counter()
    model, checkpoint = load_model(Path(folder, run), device, quantize)
    keep_freed_memory()
    tokenizer = get_tokenizer(checkpoint["meta"])
    note = " in int8" if quantize else ""
    seconds = time.perf_counter() - began
    print(one_line(f"loaded {run}{note} on {device} in {seconds:.1f} s"), flush=True)
    return model, tokenizer, checkpoint


LOADED: dict[tuple, tuple[GPT, object, dict]] = {}  # the last two runs, least recently used first
LOADING = threading.Lock()  # one run is loaded at a time; requests for a cached one do not wait


def load(run: str, device: str, int8: bool) -> tuple[GPT, object, dict]:
    """Return model, tokenizer and checkpoint of a listed run. The last two runs stay cached."""
    runs = find_runs()
    if not runs:
        raise ValueError(f"there is no checkpoint in {folder} or two folders below it: train one, "
                         "for example with `make demo`")
    if run not in runs:
        raise ValueError(f"there is no run {run!r} here: choose one from the list")
    if device not in devices():
        raise ValueError(f"device must be {' or '.join(devices())}, got {device!r}")
    version = run, device, "int8" if int8 else "", runs[run]
    loaded = LOADED.get(version)
    if not loaded:
        with LOADING:
            loaded = LOADED.get(version)  # another thread may have loaded it
            if not loaded:
                loaded = LOADED[version] = load_version(*version)
    LOADED.pop(version, None)  # the most recently used is the last
    LOADED[version] = loaded
    for old in list(LOADED)[:-2]:
        LOADED.pop(old, None)
    return loaded


@functools.lru_cache
def devices() -> list[str]:
    return list(dict.fromkeys((resolve_device(device), "cpu")))


def run_label(run: str) -> str:
    return one_line(run if run != "." else Path(folder).resolve().name)


def read_summary(run: str) -> dict:
    """Return what eval.py measured of a run, or {}."""
    path = results_file(Path(folder, run), Path(folder, run), "metrics_summary.json")
    return load_json(path) if path.is_file() else {}


@functools.lru_cache(maxsize=1000)
def read_progress(run: str, written: int) -> dict:
    """Return the step and validation loss of the best checkpoint, without reading its weights."""
    path = Path(folder, run, "best.pt")
    check_regular(path)
    check_archive(path, checksums=False)
    checkpoint = torch.load(path, weights_only=True, mmap=True)
    return {"step": checkpoint["step"], "loss": checkpoint["best_val_loss"]}


def describe_run(run: str, written: int) -> str:
    """Return the name of a run, with its steps and loss where they can be read quickly."""
    # a damaged file can make the reader fail in any way; it is reported when the run is chosen
    with contextlib.suppress(Exception):
        progress = read_summary(run) or read_progress(run, written)
        return f"{run_label(run)}, step {progress['step']:,}, loss {progress['loss']:.2f}"
    return run_label(run)


# -----------------------------------------------------------------------------
# Samples

def check_request(request: dict) -> dict:
    """
    Check what a client sent, which can be anything. Return it in the types of the settings.

    Raises ValueError for bad values, except for those that Sampling checks.
    """
    defaults = dict(run="", device="", int8=False, prompt="", stop="", seed=0, max_new_tokens=0)
    defaults |= {name: getattr(sample, name) for name in SLIDERS}
    request = request | {"seed": -1 if request["seed"] is None else request["seed"]}
    try:
        given = {name: coerce(name, request[name], default) for name, default in defaults.items()}
    except OverflowError:
        raise ValueError("a number is too large") from None
    text = given["prompt"] + given["stop"]
    text.encode()  # raises ValueError for half of a UTF-16 pair
    if len(text) > max_prompt:
        raise ValueError(f"prompt and stop may have {max_prompt:,} characters together, these have "
                         f"{len(text):,}")
    at_least(1, at_most=max_tokens)("max_new_tokens", given["max_new_tokens"])
    at_least(-1, below=2**53)("seed", given["seed"])
    return given


def generate(request: dict) -> Iterator[tuple[str, str, str]]:
    """Yield the sample so far, the chart of next tokens and a line of figures, until it ends."""
    given = check_request(request)
    model, tokenizer, _ = load(given["run"], given["device"], given["int8"])
    seed = given["seed"] if given["seed"] >= 0 else random.randrange(2**32)
    sampler = Sampling(**{name: given[name] for name in SLIDERS},
                       generator=torch.Generator(model.device).manual_seed(seed))
    unknown = sample.check_prompt(model, tokenizer, given["prompt"])
    note = "<br>" + html.escape(unknown) if unknown else ""
    began = shown = time.perf_counter()
    chart, chart_at, chart_seconds = "", began, 0.05
    steps = sample.stream_text(model, tokenizer, [given["prompt"]], given["max_new_tokens"],
                               sampler, given["stop"])
    for n, [(text, ended, tokens)] in enumerate(steps, 1):
        now = time.perf_counter()
        if not ended and n > 1 and now - shown < 0.04:  # faster than the eye
            continue
        # charts take at most a sixth of the time
        if ended or now - chart_at > max(0.25, 5 * chart_seconds):
            chart = chart_after(model, tokenizer, tokens)
            chart_at = time.perf_counter()
            chart_seconds = chart_at - now
        shown = time.perf_counter()
        speed = f"{n} token{'s' if n > 1 else ''}, {n / (now - began):,.0f} tokens/s"
        yield given["prompt"] + text, chart, f"{speed}, seed {seed}{note}"


# -----------------------------------------------------------------------------
# HTML

def table(caption: str, rows: str, kind: str = "facts") -> str:
    return f'<table class="{kind}"><caption>{caption}</caption>{rows}</table>'


def chart_after(model: GPT, tokenizer, ids: list[int]) -> str:
    """Return bars of the ten most probable tokens after ids."""
    rows, tokens = "", sample.next_tokens(model, ids, 10)
    for token, p in tokens:
        if f"{p:.1%}" == "0.0%":
            continue
        is_end = token == tokenizer.eot
        name = html.escape("end of text" if is_end else repr(tokenizer.decode([token])))
        rows += (f'<tr><th scope="row" title="{name}">{name}</th>'
                 f'<td><div class="bar" style="width: {p / tokens[0][1]:.1%}"></div></td>'
                 f"<td>{p:.1%}</td></tr>")
    return table("Most probable next tokens", rows or "<tr><td>all below 0.1%</td></tr>",
                 "facts chart")


def about(run: str, model: GPT, tokenizer, checkpoint: dict) -> str:
    """Return a table of what the model is and of what eval.py measured."""
    c = model.config
    facts = {"model": f"{c.arch}, {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}",
             "parameters": f"{model.num_params():,}", "context": f"{c.block_size:,} tokens",
             "tokenizer": f"{tokenizer.spec['kind']}, {tokenizer.vocab_size:,} tokens",
             "dataset": checkpoint["meta"].get("dataset") or "unknown",
             "steps": f"{checkpoint['step']:,}"}
    try:
        summary = read_summary(run)
        if not summary:
            facts["measured"] = f"not yet: python eval.py --out_dir={Path(folder, run)}"
        elif summary["step"] != checkpoint["step"]:
            facts["measured at step"] = f"{summary['step']:,}"
        facts |= {name: form.format(summary[key]) for key, (name, form) in METRICS.items()
                  if summary.get(key) is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        facts["measured"] = "metrics_summary.json is damaged: eval.py can write it again"
    rows = "".join(f'<tr><th scope="row">{html.escape(name)}</th>'
                   f"<td>{html.escape(one_line(value))}</td></tr>" for name, value in facts.items())
    return table(html.escape(run_label(run)), rows)


def alert(error: Exception) -> str:
    """Return an error as one line."""
    return f'<div role="alert">error: {html.escape(one_line(error))}</div>'


# -----------------------------------------------------------------------------
# What the widgets call

def list_runs():
    """Update the list of runs and choose one."""
    import gradio as gr

    found = find_runs()
    choices = [(describe_run(run, written), run) for run, written in found.items()]
    return gr.Dropdown(choices=choices, value=first_run(found))


def is_measured(run: str) -> bool:
    with contextlib.suppress(Exception):  # a damaged summary can have anything
        return math.isfinite(read_summary(run)["loss"])
    return False


def first_run(found: dict[str, int]) -> str | None:
    """Return the newest measured run of the user, else the shipped one, else the newest."""
    own = [run for run in found if run not in (sample.SHIPPED, "models/fables")]
    measured = [run for run in own if is_measured(run)]
    shipped = [run for run in found if run == sample.SHIPPED]
    return max(measured or shipped or found, key=found.get, default=None)


@functools.lru_cache(maxsize=4)
def first_sample(run: str, device: str, written: int) -> tuple[str, str, str]:
    """
    Return what `generate` yields last for the sample that the page opens with.

    All visitors share it. written: when the run was, which only makes it another cache entry.
    """
    sampling = {name: getattr(sample, name) for name in SLIDERS}
    *_, last = generate(dict(run=run, device=device, int8=False, prompt=EXAMPLES[0], stop="",
                             seed=sample.seed, max_new_tokens=min(300, max_tokens), **sampling))
    return last


def show_run(run, device, int8, prompt) -> list:
    """Load a model; show facts about it, what follows the prompt, and the examples it can read."""
    import gradio as gr

    try:
        prompt = coerce("prompt", prompt, "")
        model, tokenizer, checkpoint = load(run, device, coerce("int8", int8, False))
        buttons = [gr.Button(visible=has_all_of(tokenizer, example)) for example in EXAMPLES]
    except (ValueError, OSError) as error:
        return [alert(error), "", *(gr.skip() for _ in EXAMPLES)]
    chart = ""
    with contextlib.suppress(ValueError):  # a bad prompt is reported when it is used
        idx, _ = sample.encode_prompts([prompt[:max_prompt]], tokenizer, "cpu")
        chart = chart_after(model, tokenizer, idx[0].tolist())
    return [about(run, model, tokenizer, checkpoint), chart, *buttons]


def show_opening(run, device, status) -> tuple:
    """Show a sample of the model that the page opens with, if its vocabulary has the prompt."""
    import gradio as gr

    if status != WAITING:  # the user has already asked for a sample
        return gr.skip(), gr.skip(), gr.skip()
    # show_run reports what is wrong with the model
    with contextlib.suppress(ValueError, OSError, KeyError):
        if has_all_of(load(run, device, False)[1], EXAMPLES[0]):
            return first_sample(run, device, find_runs()[run])
    return "", gr.skip(), ""


def show_sample(**request) -> Iterator[tuple]:
    """Stream a sample into the page, or show what is wrong with the request."""
    import gradio as gr

    try:
        yield from generate(request)
    except (ValueError, OSError) as error:
        yield gr.skip(), gr.skip(), alert(error)


# -----------------------------------------------------------------------------
# The page

def make_sampling_inputs() -> dict:
    """Place the widgets of the sampling settings; return them by name."""
    import gradio as gr

    settings = read_settings(Path(__file__).with_name("sample.py"))
    comments = {setting.name: setting.comment for setting in settings}
    inputs = {"max_new_tokens": gr.Slider(
        1, max_tokens, min(300, max_tokens), step=1, label="max_new_tokens", min_width=280,
        info="fewer if the text ends")}
    for name, (least, most, step) in SLIDERS.items():
        inputs[name] = gr.Slider(least, most, getattr(sample, name), step=step, label=name,
                                 info=comments[name], min_width=280)
    inputs["seed"] = gr.Number(-1, label="seed", precision=0, min_width=280,
                               info="makes a sample repeatable; -1: a new one each time")
    inputs["stop"] = gr.Textbox(label="stop", info=comments["stop"], min_width=280)
    return inputs


def make_page():
    """Place the widgets and connect them with the functions above."""
    import gradio as gr

    with gr.Blocks(title="fablegpt", analytics_enabled=False) as page:
        gr.Markdown("# fablegpt\nSample a small GPT and see its most probable next tokens.")
        with gr.Row():
            with gr.Column(scale=3):
                with gr.Row():
                    run = gr.Dropdown([], label="model", scale=3, elem_id="model")
                    device_choice = gr.Radio(devices(), value=devices()[0], label="device",
                                             visible=len(devices()) > 1, scale=2)
                    int8 = gr.Checkbox(quantize == "int8", label="int8", scale=2,
                                       info="a quarter of the size")
                prompt = gr.Textbox(EXAMPLES[0], label="prompt", info="Shift+Enter generates",
                                    lines=3, max_lines=8, elem_id="prompt")
                with gr.Row(elem_classes="examples", equal_height=True):
                    examples = [gr.Button(example, size="sm", min_width=100)
                                for example in EXAMPLES]
                with gr.Row():
                    generate_button = gr.Button("Generate", variant="primary", min_width=100)
                    stop_button = gr.Button("Stop", min_width=100)
                status = gr.HTML(WAITING, elem_id="status")
                text = gr.Textbox(label="sample", lines=12, max_lines=24, buttons=["copy"],
                                  elem_id="sample", interactive=False)
            with gr.Column(scale=2):
                # the chart comes last, as its height changes
                facts = gr.HTML(WAITING, container=True)
                chart = gr.HTML(WAITING, container=True, elem_id="chart")
        with gr.Accordion("Sampling", elem_id="sampling"), gr.Row():
            sampling = make_sampling_inputs()

        # preprocess=False: the functions report bad values in one line, Gradio in a traceback
        to_show = dict(fn=show_run, inputs=[run, device_choice, int8, prompt], preprocess=False,
                       outputs=[facts, chart, *examples], show_progress="hidden", api_name="show",
                       concurrency_limit=None)  # clients that wait for a model delay no others
        listed = page.load(list_runs, None, run, show_progress="hidden", api_name="runs")
        shown = listed.then(**to_show | dict(api_name="first"))
        opened = shown.then(show_opening, [run, device_choice, status], [text, chart, status],
                            preprocess=False, show_progress="hidden", api_name="open",
                            concurrency_limit=at_once, concurrency_id="samples")
        to_generate = dict(fn=show_sample, outputs=[text, chart, status], preprocess=False,
                           inputs_kwargs=dict(run=run, device=device_choice, int8=int8,
                                              prompt=prompt, **sampling),
                           concurrency_limit=at_once, concurrency_id="samples",
                           show_progress_on=text, cancels=opened)
        samples = [generate_button.click(**to_generate, api_name="generate"),
                   prompt.submit(**to_generate, api_name="submit")]
        stop_button.click(None, cancels=samples)
        for button, example in zip(examples, EXAMPLES):
            button.click(None, None, prompt, js=f"() => {json.dumps(example)}")
        # first clear what belongs to the previous model
        changed = gr.on([run.input, device_choice.input, int8.input], None, None,
                        [text, status, chart, facts], show_progress="hidden",
                        js=f"() => {json.dumps(['', '', WAITING, WAITING])}",
                        cancels=[shown, opened, *samples])
        changed.then(**to_show, trigger_mode="always_last")
        # Gradio gives this textarea no label; narrow windows begin without the sliders
        page.load(None, js="""() => {
            document.querySelector('#sample textarea').ariaLabel = 'sample';
            if (innerWidth < 640) document.querySelector('#sampling button').click();
        }""")
    page.queue(max_size=queue_size)
    return page


# -----------------------------------------------------------------------------
# The server

async def read_body(receive) -> bytes | None:
    """Return the body of a request, or None if it is too large or the client has left."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
        # a character can take 12 bytes: \ud83d\ude00
        if len(body) > 12 * max_prompt + 10_000 or message["type"] == "http.disconnect":
            return None
    return body


def clean_join(body: bytes, page) -> bytes:
    """
    Return what the page itself would send to the queue: one plain value for each input.

    Raises an exception for anything else, such as a value that Gradio would read as a file.
    """
    sent = json.loads(body)
    values, inputs = sent["data"], page.fns[sent["fn_index"]].inputs
    if len(values) != len(inputs) or any(isinstance(value, (dict, list)) for value in values):
        raise ValueError
    return json.dumps({key: sent[key] for key in ("data", "fn_index", "session_hash")}).encode()


def keep_waiting_sessions(queue) -> None:
    """
    Make the sessions of waiting clients the newest ones.

    Gradio keeps the messages of 2,000 sessions and fails if those of a waiting one are missing.
    """
    for event in list(queue.event_ids_to_events.values()):
        if event.session_hash in queue.pending_messages_per_session:
            queue.pending_messages_per_session.move_to_end(event.session_hash)


def gate(app, page, hosts: list[bytes]):
    """
    Wrap the ASGI app of Gradio so that only the requests of the page reach it.

    hosts: accepted Host headers (empty: all). Another site can let its own name resolve to this
    machine, and a browser then regards the page as part of that site (DNS rebinding).
    """
    from starlette.responses import PlainTextResponse

    async def gated(scope, receive, send):
        async def refuse(status: int, reason: str) -> None:
            await PlainTextResponse(reason, status)(scope, receive, send)

        path, method = scope.get("path", ""), scope.get("method")
        if scope["type"] == "lifespan":
            return await app(scope, receive, send)
        if hosts:  # Gradio would let a client name the server that the page loads from
            scope["headers"] = [pair for pair in scope["headers"]
                                if not pair[0].startswith(b"x-forwarded-")]
        given = dict(scope["headers"])
        origin = given.get(b"origin", b"").removeprefix(b"http://")
        if hosts and (given.get(b"host") not in hosts or origin not in (*hosts, b"")):
            return await refuse(403, "this page is served to this machine only, as localhost")
        is_known = path in PATHS or path.startswith(FOLDERS)
        if not is_known or method not in ("GET", "HEAD", "POST"):
            return await refuse(403, "this page has nothing of that name")
        if method != "POST":
            return await app(scope, receive, send)
        if (body := await read_body(receive)) is None:
            return await refuse(413, "the request is too large")
        if path == "/gradio_api/queue/join":
            try:
                body = clean_join(body, page)
            except (ValueError, KeyError, TypeError, RecursionError):
                return await refuse(400, "this is not a request of this page")
            keep_waiting_sessions(page._queue)
            headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
            scope["headers"] = [*headers, (b"content-length", str(len(body)).encode())]
        replayed = iter([{"type": "http.request", "body": body}])

        async def replay():
            return next(replayed, None) or await receive()

        await app(scope, replay, send)

    return gated


def serve() -> None:
    """Serve the page until Ctrl-C."""
    listener = socket.create_server((host, port))
    share_heap()
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]  # Gradio would serve other addresses, paths or folders
    try:
        import fastapi
        import gradio as gr
        import uvicorn
    except ImportError:
        raise ValueError("the page needs a package: pip install gradio") from None
    page = make_page()
    # only one weight: the bold font that comes with Gradio has few letters
    font = gr.themes.LocalFont("Source Sans Pro", weights=(400,))
    theme = gr.themes.Default(font=[font, "system-ui", "sans-serif"]).set(
        body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
    app = gr.mount_gradio_app(fastapi.FastAPI(), page, "/", footer_links=[], run_history=False,
                              enable_monitoring=False, show_error=False, ssr_mode=False,
                              mcp_server=False, pwa=False, css=CSS, theme=theme)
    address, bound = listener.getsockname()
    hosts = [f"{name}:{bound}".removesuffix(":80").encode()
             for name in ("localhost", "127.0.0.1", "[::1]", address)]
    print(f"http://{host}:{bound} (press Ctrl-C to stop)", flush=True)
    if not address.startswith("127."):
        hosts = []
        print(f"warning: --host={host} opens the page to the network, without login or encryption",
              file=sys.stderr, flush=True)
    config = uvicorn.Config(gate(app, page, hosts), log_level="critical",
                            timeout_graceful_shutdown=1)
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    with user_errors(), contextlib.suppress(KeyboardInterrupt):
        if not Path(folder).is_dir():
            raise ValueError(f"there is no folder {folder}")
        devices()  # checks the device
        serve()
