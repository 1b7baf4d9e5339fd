"""
A page in the browser to try the models that you trained.

    pip install gradio
    python app.py
    python app.py --folder=runs --port=8080

It lists every run below `folder` and every Hugging Face folder, streams the text that a model writes, and shows which next
tokens the model expects. Nothing else of the machine can be read through it, and it calls nobody.

As a Hugging Face Space it needs these scripts, the folder of a run, a requirements.txt with torch, numpy and tiktoken, and
a README.md that begins with

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
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import sample
from lib.checkpoint import load_model
from lib.configurator import coerce, configure, from_text, settings_of, user_errors
from lib.machine import keep_freed_memory, resolve_device
from lib.tokenizer import get_tokenizer
from model import GPT

# -----------------------------------------------------------------------------
folder = "."  # its runs, and those one and two folders below it, are what the page offers
host = "127.0.0.1"  # this machine only; 0.0.0.0: whoever reaches it. GRADIO_SERVER_NAME in the environment is the default
port = 7860  # 0: a free one. GRADIO_SERVER_PORT in the environment is the default
device = "auto"  # what the page offers beside the CPU: cuda, else mps, else nothing; or 'cpu', 'cuda:1', ...
quantize = ""  # 'int8': the page's switch for weights of a quarter of the size is on at first
max_tokens = 500  # that a text may have at most after its prompt
max_prompt = 10_000  # characters that a prompt may have at most
at_once = 2  # texts that are written at the same time; the others wait
queue_size = 50  # texts that may wait; who comes then is told to come later
# -----------------------------------------------------------------------------
SLIDERS = dict(temperature=(0, 2, 0.05), top_k=(0, 200, 1), top_p=(0.01, 1, 0.01), min_p=(0, 1, 0.01),
               repetition_penalty=(1, 2, 0.05), no_repeat_ngram=(0, 10, 1))  # least, most, step; more may be sent
EXAMPLES = ["Once upon a time", "Once upon a time, in a hollow log, there lived", "Long ago, at the edge of town, lived",
            "One day, a little girl named Lily found", "The king said:"]  # a model sees those that its vocabulary has
METRICS = dict(loss=("loss, nats per token", "{:.4f}"), floor=("least possible loss", "{:.4f}"),
               perplexity=("perplexity", "{:.2f}"), bits_per_byte=("bits per byte", "{:.4f}"),
               accuracy=("next token right", "{:.1%}"), valid_share=("valid fables", "{:.0%}"),
               tokens=("measured on", "{:,} tokens"))  # of metrics_summary.json, and how the page says them
# what the page itself asks the server for; all else that Gradio would answer is refused: files, uploads, other callers
PATHS = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/info", "/gradio_api/startup-events",
         "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/cancel", "/gradio_api/reset")
FOLDERS = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
CSS = """
.gradio-container {max-width: 1200px !important; margin: 0 auto !important}
.facts {border: 0 !important; border-collapse: collapse; width: 100%; table-layout: fixed; font-size: 14px}
.facts tr {border: 0 !important; background: none !important}
.facts caption {text-align: left; padding: 0 0 6px; font-weight: 600}
.facts th, .facts td {padding: 2px 0 !important; border: 0 !important; font-weight: 400; text-align: left;
                      overflow-wrap: break-word}
.facts th {width: 45%; color: var(--body-text-color-subdued)}
.chart th {width: 38%; font-family: monospace; color: var(--body-text-color); overflow: hidden; white-space: pre;
           text-overflow: ellipsis}
.chart td:last-child {width: 4em; text-align: right; font-variant-numeric: tabular-nums}
.bar {height: 14px; min-width: 1px; border-radius: 2px; background: var(--color-accent)}
#status {min-height: 1.5em; font-variant-numeric: tabular-nums}
[role=alert] {color: var(--error-text-color)}
.examples button {font-weight: 400}
"""


def find_runs() -> dict[str, int]:
    """Names of the folders, `folder` itself and two deep, that hold a model, and when it was written."""
    found = {}
    for path, folders, files in os.walk(folder, followlinks=True):
        name = Path(path).relative_to(folder)
        folders[:] = sorted(x for x in folders if not x.startswith((".", "__")) and x not in ("venv", "node_modules")
                            and len(name.parts) < 2)
        weights = {"best.pt", "last.pt", "ckpt.pt"} & set(files)
        weights |= {file for file in files if file.endswith(".safetensors") and "config.json" in files}
        with contextlib.suppress(OSError):  # a run that is being written, or removed, at this moment
            found |= {name.as_posix(): max(os.stat(Path(path, file)).st_mtime_ns for file in weights)} if weights else {}
    return found


@functools.lru_cache(maxsize=2)
def load_written(run: str, device: str, quantize: str, written: int) -> tuple[GPT, object, dict]:
    began = time.perf_counter()
    model, checkpoint = load_model(Path(folder, run), device, quantize)
    keep_freed_memory()
    tokenizer = get_tokenizer(checkpoint["meta"])
    print(f"loaded {run}{' in int8' * bool(quantize)} on {device} in {time.perf_counter() - began:.1f} s", flush=True)
    return model, tokenizer, checkpoint


loading = threading.Lock()  # nothing is loaded twice by two who ask at once


def load(run: str, device: str, int8: bool) -> tuple[GPT, object, dict]:
    """The model, tokenizer and checkpoint of a run that is listed; the two newest ones stay in memory."""
    runs = find_runs()
    if run not in runs:
        raise ValueError(f"there is no run {run!r} here: choose one of the list" if runs else no_runs())
    if device not in devices():
        raise ValueError(f"device must be {' or '.join(devices())}, got {device!r}")
    with loading:
        return load_written(run, device, "int8" if int8 else "", runs[run])


@functools.lru_cache
def devices() -> list[str]:
    return list(dict.fromkeys((resolve_device(device), "cpu")))


def no_runs() -> str:
    return f"there is no checkpoint in {folder} or two folders below it: train one, for example with `make demo`"


def check(request: dict) -> dict:
    """What a client sent, which may be anything, in the types of the settings; ValueError where GPT.stream has none."""
    kinds = dict(run="", device="", int8=False, prompt="", stop="", seed=0, max_new_tokens=0)
    kinds |= {name: getattr(sample, name) for name in SLIDERS}
    request["seed"] = -1 if request["seed"] is None else request["seed"]
    try:
        given = {name: coerce(name, request[name], default) for name, default in kinds.items()}
    except OverflowError:
        raise ValueError("a number is too large") from None
    (given["prompt"] + given["stop"]).encode()  # half a character of UTF-16 is no text
    if len(given["prompt"] + given["stop"]) > max_prompt:
        raise ValueError(f"the prompt may have {max_prompt:,} characters, this one has "
                         f"{len(given['prompt'] + given['stop']):,}")
    if not 1 <= given["max_new_tokens"] <= max_tokens:
        raise ValueError(f"max_new_tokens must be from 1 to {max_tokens}, got {given['max_new_tokens']}")
    if not -1 <= given["seed"] < 2**53:
        raise ValueError(f"seed must be at least 0, or empty for a new one each time, got {given['seed']}")
    return given


def tell(request: dict) -> Iterator[tuple[str, str, str]]:
    """The text so far, the chart of what may come next and a line of figures, again and again until the text has ended."""
    given = check(request)
    model, tokenizer, _ = load(given["run"], given["device"], given["int8"])
    seed = given["seed"] if given["seed"] >= 0 else random.randrange(2**32)
    note = "<br>" + html.escape(lacking) if (lacking := sample.lacking_words(tokenizer, given["prompt"])) else ""
    sampling = {name: given[name] for name in SLIDERS} | {"generator": torch.Generator(model.device).manual_seed(seed)}
    began = shown = time.perf_counter()
    chart, charted, cost, tokens = "", began, 0.05, []
    steps = sample.stream_text(model, tokenizer, [given["prompt"]], given["max_new_tokens"], given["stop"], tokens, **sampling)
    for n, ((text, ended),) in enumerate(steps, 1):
        now = time.perf_counter()
        if not ended and n > 1 and now - shown < 0.04:  # what comes faster than the eye need not be sent one by one
            continue
        if ended or now - charted > max(0.25, 5 * cost):  # a whole forward pass: a sixth of the time at most
            chart = chart_after(model, tokenizer, tokens[0])
            charted = time.perf_counter()
            cost = charted - now
        shown = time.perf_counter()
        yield (given["prompt"] + text, chart,
               f"{n} token{'s' * (n > 1)}, {n / (now - began):,.0f} tokens/s, seed {seed}" + note)


def chart_after(model: GPT, tokenizer, ids: list[int]) -> str:
    """Bars of the ten most probable tokens after those given."""
    rows = ""
    for token, p in sample.next_tokens(model, ids, 10):
        name = html.escape("end of text" if token == tokenizer.eot else repr(tokenizer.decode([token])))
        rows += (f'<tr><th scope="row" title="{name}">{name}</th><td><div class="bar" style="width: {p:.1%}"></div></td>'
                 f"<td>{p:.1%}</td></tr>")
    return table("What the model expects next", rows, "facts chart")


def table(caption: str, rows: str, kind: str = "facts") -> str:
    return f'<table class="{kind}"><caption>{caption}</caption>{rows}</table>'


def about(run: str, model: GPT, tokenizer, checkpoint: dict) -> str:
    """A table of what the model is and, where eval.py measured it, how good."""
    config = model.config
    facts = {"model": f"{config.arch}, {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide",
             "parameters": f"{model.num_params():,}", "context": f"{config.block_size:,} tokens",
             "tokenizer": f"{tokenizer.spec['kind']}, {tokenizer.vocab_size:,} tokens",
             "data set": checkpoint["meta"].get("dataset") or "unknown", "steps": f"{checkpoint['step']:,}"}
    path = Path(folder, run, "metrics_summary.json")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary["step"] != checkpoint["step"]:
            facts["measured at step"] = f"{summary['step']:,}"
        facts |= {name: form.format(summary[key]) for key, (name, form) in METRICS.items() if summary.get(key) is not None}
    except FileNotFoundError:
        facts["measured"] = f"not yet: python eval.py --out_dir={Path(folder, run)}"
    except (ValueError, KeyError, TypeError, AttributeError):
        facts["measured"] = f"{path.name} is damaged: eval.py writes it again"
    rows = "".join(f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>'
                   for name, value in facts.items())
    return table(html.escape(run if run != "." else Path(folder).resolve().name), rows)


def fits(tokenizer, prompt: str) -> bool:
    try:
        return tokenizer.unk not in tokenizer.encode(prompt)
    except ValueError:
        return False


def alert(error: Exception) -> str:
    """What was wrong, in one line of the page."""
    return f'<div role="alert">error: {html.escape(" ".join(str(error).split()))}</div>'


def make_page():
    """The page: widgets, and which function each of them calls."""
    import gradio as gr

    def runs():
        found = find_runs()
        choices = [(name if name != "." else Path(folder).resolve().name, name) for name in found]
        return gr.Dropdown(choices=choices, value=max(found, key=found.get, default=None))

    def show(run, device, int8, prompt):
        """Load a model, tell about it, and show what it expects after the prompt."""
        try:
            prompt = coerce("prompt", prompt, "")
            loaded = load(run, device, coerce("int8", int8, False))
            fit = [gr.Button(visible=fits(loaded[1], example)) for example in EXAMPLES]
        except (ValueError, OSError) as error:
            return [alert(error), "", *(gr.skip() for _ in EXAMPLES)]
        chart = ""
        with contextlib.suppress(ValueError):  # of the prompt: said when it is used
            idx, _ = sample.encode_prompts([prompt[:max_prompt]], loaded[1], "cpu")
            chart = chart_after(*loaded[:2], idx[0].tolist())
        return [about(run, *loaded), chart, *fit]

    def generate(**request):
        try:
            yield from tell(request)
        except (ValueError, OSError) as error:
            yield gr.skip(), gr.skip(), alert(error)

    comments = settings_of(Path(__file__).with_name("sample.py"))
    with gr.Blocks(title="fablegpt", analytics_enabled=False) as page:
        gr.Markdown("# fablegpt\nSmall GPTs that tell stories, and what they expect next.")
        with gr.Row():
            with gr.Column(scale=3):
                with gr.Row():
                    run = gr.Dropdown([], label="model", scale=3)
                    where = gr.Radio(devices(), value=devices()[0], label="device", visible=len(devices()) > 1, scale=2)
                    int8 = gr.Checkbox(quantize == "int8", label="int8", info="weights of a quarter of the size", scale=2)
                prompt = gr.Textbox(EXAMPLES[0], label="prompt", info="Shift+Enter generates", lines=3, max_lines=8,
                                    elem_id="prompt")
                with gr.Row(elem_classes="examples"):
                    examples = [gr.Button(example, size="sm", min_width=100) for example in EXAMPLES]
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", min_width=100)
                    halt = gr.Button("Stop", min_width=100)
                status = gr.HTML(elem_id="status")
                text = gr.Textbox(label="text", lines=12, max_lines=24, buttons=["copy"], elem_id="text", interactive=False)
            with gr.Column(scale=2):
                chart = gr.HTML(container=True)
                facts = gr.HTML(container=True)
        with gr.Accordion("Sampling"), gr.Row():
            sliders = dict(max_new_tokens=gr.Slider(1, max_tokens, min(200, max_tokens), step=1, label="max_new_tokens",
                                                    info="a text that reaches its end has fewer", min_width=280))
            for name, (least, most, step) in SLIDERS.items():
                sliders[name] = gr.Slider(least, most, getattr(sample, name), step=step, label=name, info=comments[name],
                                          min_width=280)
            seed = gr.Number(-1, label="seed", info="makes a text repeatable; -1: a new one each time", precision=0,
                             min_width=280)
            stop = gr.Textbox(label="stop", info="a text that ends what is written; several: first||second", min_width=280)
        inputs = dict(run=run, device=where, int8=int8, prompt=prompt, **sliders, seed=seed, stop=stop)
        # preprocess: not by the widgets, whose complaints are tracebacks, but by check
        writing = [listen(generate, inputs_kwargs=inputs, outputs=[text, chart, status], preprocess=False, api_name=name,
                          concurrency_limit=at_once, concurrency_id="tell", show_progress_on=text)
                   for listen, name in ((go.click, "generate"), (prompt.submit, "submit"))]
        halt.click(None, cancels=writing)
        for button, example in zip(examples, EXAMPLES):
            button.click(None, None, prompt, js=f"() => {json.dumps(example)}")
        shown = dict(fn=show, inputs=[run, where, int8, prompt], outputs=[facts, chart, *examples], preprocess=False,
                     show_progress="hidden", api_name="show")
        gr.on([run.input, where.input, int8.input], **shown)
        page.load(None, js="() => {document.querySelector('#text textarea').ariaLabel = 'text'}")  # Gradio leaves it without
        page.load(runs, None, run, show_progress="hidden", api_name="runs").then(**shown)
    page.queue(max_size=queue_size)
    return page


def gate(app, page):
    """
    The ASGI app, of which only PATHS and FOLDERS are reached. Of a request to the queue goes on what the page sends: one
    plain value for each input.
    """
    from starlette.responses import PlainTextResponse

    async def gated(scope, receive, send):
        path, method = scope.get("path", ""), scope.get("method")
        if scope["type"] != "http":
            return await app(scope, receive, send)
        if path not in PATHS and not path.startswith(FOLDERS) or method not in ("GET", "HEAD", "POST"):
            return await PlainTextResponse("this page has nothing of that name", 403)(scope, receive, send)
        if method != "POST":
            return await app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > 12 * max_prompt + 10_000 or message["type"] == "http.disconnect":  # \ud83d\ude00: one character
                return await PlainTextResponse("the request is too large", 413)(scope, receive, send)
        if path == "/gradio_api/queue/join":
            try:
                sent = json.loads(body)
                data, wanted = sent["data"], page.fns[sent["fn_index"]].inputs
                if len(data) != len(wanted) or any(isinstance(value, (dict, list)) for value in data):
                    raise ValueError
                body = json.dumps({key: sent[key] for key in ("data", "fn_index", "session_hash")}).encode()
            except (ValueError, KeyError, TypeError, RecursionError):
                return await PlainTextResponse("the request is none of this page's", 400)(scope, receive, send)
            scope["headers"] = [(key, value) for key, value in scope["headers"] if key != b"content-length"]
            scope["headers"].append((b"content-length", str(len(body)).encode()))
        whole = iter([{"type": "http.request", "body": body}])

        async def replay():
            return next(whole, None) or await receive()

        await app(scope, replay, send)

    return gated


def serve() -> None:
    """Serve the page until Ctrl-C."""
    listener = socket.create_server((host, port))
    try:
        import fastapi
        import gradio as gr
        import uvicorn
    except ImportError:
        raise ValueError("the page needs a package: pip install gradio") from None
    page = make_page()
    font = gr.themes.LocalFont("Source Sans Pro", weights=(400,))  # the bold one that comes with it lacks most letters
    app = gr.mount_gradio_app(fastapi.FastAPI(), page, "/", footer_links=[], run_history=False, enable_monitoring=False,
                              show_error=False, ssr_mode=False, mcp_server=False, pwa=False, css=CSS,
                              theme=gr.themes.Default(font=[font, "system-ui", "sans-serif"]).set(
                                  body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400"))
    print(f"http://{host}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
    uvicorn.Server(uvicorn.Config(gate(app, page), log_level="critical", timeout_graceful_shutdown=1)).run([listener])


if __name__ == "__main__":
    with user_errors():
        host = os.environ.get("GRADIO_SERVER_NAME", host)
        port = from_text("GRADIO_SERVER_PORT", os.environ.get("GRADIO_SERVER_PORT", str(port)), port)
    configure(globals(), skip_settings_of="train.py")
    with user_errors(), contextlib.suppress(KeyboardInterrupt):
        if not Path(folder).is_dir():
            raise ValueError(f"there is no folder {folder}")
        if quantize not in ("", "int8"):
            raise ValueError(f"quantize must be int8 or empty, got {quantize!r}")
        for name in ("max_tokens", "max_prompt", "at_once", "queue_size"):
            if globals()[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {globals()[name]}")
        if not 0 <= port < 65536:
            raise ValueError(f"port must be from 0 to 65535, got {port}")
        devices()
        serve()
