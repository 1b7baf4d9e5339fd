"""
Measure what README.md and docs/ show, and write it there.

    python docs/figures.py  # the demo and both pages: about seven minutes
    python docs/figures.py --parts=shakespeare,tinystories --nanogpt=PATH/nanoGPT
    python docs/figures.py --parts=  # only write figures.json into the pages

A figure is a number after an invisible <!--name--> mark; its value is in docs/figures.json.
README.md's story and output are between <!--story--> or <!--output--> and <!--end-->. Nothing else
may run on the machine.

    demo         train, evaluate and sample the fables; the curve, the recording, the story
    page         the screenshot of app.py with the demo's model; needs Chromium and playwright
    html         docs/index.html, the page of models/tinystories, and its screenshot; Chromium too
    shakespeare  the time to nanoGPT's loss on Shakespeare, twelve minutes
    tinystories  the time to nanoGPT's loss on TinyStories, and training speed, half an hour
    ten_minutes  the loss after ten minutes on TinyStories
    sampling     tokens per second compared with nanoGPT, ten minutes
"""
import contextlib
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from lib.configurator import configure, one_of, user_errors
from lib.corpus import load_meta
from lib.files import write_atomically

# -----------------------------------------------------------------------------
parts = "demo,page,html"  # what to measure, with commas (empty: nothing)
nanogpt = ""  # a clone of nanoGPT
shakespeare_text = ""  # a local copy (empty: download it)
tinystories_text = ""  # a local copy (empty: download it)
folder = "out-figures"  # everything runs in this copy of the scripts; your runs and datasets stay
machine = "two cores of an AMD EPYC"  # written into the comments of the configs
# -----------------------------------------------------------------------------

DEMO = ("data/fables/prepare.py", "train.py config/train_fables.py", "eval.py --out_dir=out-fables",
        "sample.py --out_dir=out-fables")
# the lines of configs with figures, from "# Reaches" to the first setting
RESULTS = {
    "config/train_fables.py":
        "Reaches {fables_loss} nats per token, {fables_above_floor} above the floor of "
        "{fables_floor}, with {fables_valid} of 200 sampled fables valid, in {fables_minutes} "
        "minutes on {machine}.",
}


def run(command: str) -> list[tuple[float, str]]:
    """
    Run a script in the folder; return its output lines and the seconds at which each came.

    The first line is the command. Raises ValueError if the command fails.
    """
    print(f"$ python {command}", flush=True)
    start, lines = time.time(), [(0.0, f"$ python {command}")]
    process = subprocess.Popen([sys.executable, "-u", *shlex.split(command)], cwd=folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    here = f"{Path(folder).resolve()}/"  # no path of this machine in the recording
    for line in process.stdout:
        lines.append((time.time() - start, line.rstrip("\n").replace(here, "")))
    if process.wait():
        raise ValueError(f"python {command} failed: {lines[-1][1]}")
    return lines


def prepare(name: str, source: str) -> None:
    """Prepare a dataset, from a local copy if source names one."""
    local = f" --source={shlex.quote(str(Path(source).resolve()))}" if source else ""
    run(f"data/{name}/prepare.py{local}")


def bench(options: str) -> dict:
    """Return the JSON object that bench.py prints last. Raise ValueError if a target is missed."""
    last = run(f"bench.py {options}")[-1][1]
    print(last, flush=True)  # it has the loss of each seed
    result = json.loads(last)
    if result["mode"] == "loss" and result["ours"]["reached"] < result["seeds"]:
        raise ValueError("not every seed reached nanoGPT's loss")
    return result


def peer() -> Path:
    """Return the path of nanoGPT's model.py."""
    path = Path(nanogpt, "model.py").resolve()
    if not nanogpt or not path.exists():
        raise ValueError("this part needs --nanogpt=FOLDER, a clone of nanoGPT")
    return path


def copy_scripts() -> None:
    """Copy the files that git tracks into the folder."""
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True)
    for name in tracked.splitlines():
        if (ROOT / name).exists():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)


# -----------------------------------------------------------------------------
# Parts

def demo() -> dict[str, str]:
    """Run the demo; write the curve, the recording and the story; return the figures."""
    shutil.rmtree(Path(folder, "out-fables"), ignore_errors=True)
    outputs = [run(command) for command in DEMO]
    metrics = json.loads(Path(folder, "out-fables/metrics_summary.json").read_text())
    minutes = outputs[1][-1][0] / 60
    shutil.copy(Path(folder, "out-fables/loss.png"), ROOT / "assets/fables_loss.png")
    write_atomically(ROOT / "assets/demo.svg", animate(outputs))
    samples = "\n".join(line for _, line in outputs[3][2:])  # without the command and the model
    write_block("story", quotation(samples.split("-" * 80)[0]))
    last_lines = [line for _, line in outputs[1]][-5:]
    write_block("output", "\n".join(["```", *last_lines, "```"]))
    return {"fables_minutes": f"{minutes:.1f}", "fables_loss": f"{metrics['loss']:.4f}",
            "fables_floor": f"{metrics['floor']:.4f}",
            "fables_above_floor": f"{metrics['loss'] / metrics['floor'] - 1:.1%}",
            "fables_valid": f"{metrics['valid_share']:.0%}"}


@contextlib.contextmanager
def start_browser():
    """Start Chromium, and stop it at the end."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as browser:
            yield browser


def page() -> dict[str, str]:
    """Write a picture of app.py while it shows a sample of the demo's model."""
    server = subprocess.Popen([sys.executable, "-u", "app.py", "--port=7871"], cwd=folder,
                              text=True, stdout=subprocess.PIPE)
    try:
        while "http" not in server.stdout.readline():
            if server.poll() is not None:
                raise ValueError("app.py failed")
        with start_browser() as browser:
            view = browser.new_page(viewport={"width": 1120, "height": 900})
            view.goto("http://127.0.0.1:7871")
            view.locator(".facts caption").first.wait_for()
            view.get_by_label("number input for max_new_tokens").fill("71")
            view.get_by_label("seed").fill("7")
            view.get_by_role("button", name="Generate").click()
            view.locator("#status", has_text="seed 7").wait_for()
            view.evaluate("scrollTo(0, 0)")
            view.wait_for_timeout(500)
            view.screenshot(path=ROOT / "assets/app.png")
    finally:
        server.terminate()
    return {}


def html() -> dict[str, str]:
    """
    Write docs/index.html, the model in models/tinystories as a page, and a picture of it.

    Measure the pages of both models in models/: their size and the median speed of five samples.
    """
    figures = {}
    paths = {"fables": Path(folder, "fables.html").resolve(),
             "tinystories": ROOT / "docs/index.html"}
    for name, path in paths.items():
        run(f"export.py --out_dir=models/{name} --format=html --overwrite=True "
            f"--to={shlex.quote(str(path))}")
        with start_browser() as browser:
            view = browser.new_page(viewport={"width": 1120, "height": 760})
            view.goto(path.as_uri())
            view.locator("#status", has_text="Ready").wait_for()
            speeds = [sample_on_page(view, seed) for seed in (6, 5, 4, 3, 2)]
            if name == "tinystories":
                view.screenshot(path=ROOT / "assets/page.png")
        figures |= {f"page_{name}_size": f"{path.stat().st_size / 1e6:.1f}",
                    f"page_{name}_speed": f"{statistics.median(speeds):,.0f}"}
    return figures


def sample_on_page(view, seed: int) -> int:
    """Sample on an exported page that is open in a browser; return the tokens per second."""
    view.evaluate("seed => { document.getElementById('seed').value = seed; }", seed)
    view.get_by_role("button", name="Generate").click()
    view.locator("#stop:disabled").wait_for()
    status = view.locator("#status").inner_text()
    if speed := re.search(r"(\d+) tokens/s", status):
        return int(speed[1])
    raise ValueError(f"the page shows: {status}")


def shakespeare() -> dict[str, str]:
    """Measure the seconds to nanoGPT's loss on Shakespeare's characters, three seeds each."""
    prepare("shakespeare_char", shakespeare_text)
    own, tuned = (bench(
        f"--mode=loss config/train_shakespeare_char_qwen3.py --against={peer()} "
        f"--their_config=config/{name}.py --seeds=3 --target_loss=1.886")
        for name in ("train_shakespeare_char_cpu", "train_shakespeare_char_cpu_tuned"))
    return {"shakespeare_seconds": f"{own['ours']['final_seconds'][0]:.1f}",
            "shakespeare_nanogpt_seconds": f"{own['theirs']['final_seconds'][0]:.1f}",
            "shakespeare_tuned_seconds": f"{tuned['theirs']['final_seconds'][0]:.1f}"}


def tinystories() -> dict[str, str]:
    """Measure the seconds to nanoGPT's loss on TinyStories; its own follow from its speed."""
    prepare("tinystories", tinystories_text)
    speed = bench(f"--batch_size=16 --rounds=3 --steps=2 --dropout=0 --against={peer()}")
    result = bench("--mode=loss config/train_small_qwen3.py --target_loss=2.857 --seeds=3")
    loss = result["ours"]["final_loss"][0]
    val = load_meta(Path(folder, "data/tinystories"))["splits"]["val"]
    bits = loss / math.log(2) * val["tokens"] / val["bytes"]
    tokens = 800 * 16 * 128  # nanoGPT's steps x rows x context
    seconds = tokens / speed["their_tokens_per_second"]
    return {"tinystories_seconds": f"{result['ours']['final_seconds'][0]:,.0f}",
            "tinystories_nanogpt_seconds": f"{seconds:,.0f}",
            "tinystories_loss": f"{loss:.3f}", "tinystories_bits": f"{bits:.3f}",
            "train_speed": f"{speed['tokens_per_second']:,.0f}",
            "train_speed_nanogpt": f"{speed['their_tokens_per_second']:,.0f}"}


def ten_minutes() -> dict[str, str]:
    """Measure the loss after ten minutes on TinyStories with the command that README.md shows."""
    prepare("tinystories", tinystories_text)
    run("train.py config/train_best10.py --overwrite=True")
    run("eval.py --out_dir=out-best10")
    metrics = json.loads(Path(folder, "out-best10/metrics_summary.json").read_text())
    return {"ten_minutes_loss": f"{metrics['loss']:.3f}",
            "ten_minutes_bits": f"{metrics['bits_per_byte']:.3f}"}


def sampling() -> dict[str, str]:
    """Measure how many times as fast as nanoGPT's sampling 1 and 64 samples at a time are."""
    result = bench(f"--mode=generate --rounds=3 --against={peer()}")
    one, many = result["batch_1"], result["batch_64"]
    return {"sample_speedup_min": f"{one['ratio']:.1f}",
            "sample_speedup_max": f"{many['ratio']:.1f}",
            "sample_int8_speedup_max": f"{many['int8_ratio']:.1f}"}


# -----------------------------------------------------------------------------
# Pages

def animate(outputs: list[list[tuple[float, str]]], rows: int = 24, longest_pause: float = 0.3,
            at_end: float = 6.0) -> str:
    """
    Return an SVG that shows the lines of some commands as a terminal does.

    Pauses are shortened to at most longest_pause seconds. Lines rise from the bottom; the last
    screen stays for at_end seconds.
    """
    clock, times, lines = 0.5, [], []
    for output in outputs:
        before = 0.0
        for seconds, line in output:
            clock += min(longest_pause, max(0.08, seconds - before))
            before = seconds
            for part in textwrap.wrap(line, 98, subsequent_indent="    ") or [""]:
                times.append(clock)
                lines.append(part)
        clock += 1.2
    total, height = clock + at_end, 18
    frames = [f"0%{{transform:translateY({rows * height}px)}}"]
    for n, at in enumerate(times, 1):
        frames.append(f"{100 * at / total:.2f}%{{transform:translateY({(rows - n) * height}px)}}")
    texts = []
    for n, line in enumerate(lines, 1):
        style = ' class="c"' if line.startswith("$ ") else ""
        texts.append(f'<text y="{n * height}"{style}>{escape(line)}</text>')
    text = "\n".join(texts)
    width, box = 860, rows * height
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {box + 28}" role="img"
 aria-label="A terminal: the fables are prepared, a model is trained, measured and sampled">
<style>
text{{font:14px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#c9d1d9;
white-space:pre}}
.c{{fill:#7ee787}}
#lines{{transform:translateY({(rows - len(lines)) * height}px);
animation:scroll {total:.1f}s step-end infinite}}
@keyframes scroll{{{"".join(frames)}}}
@media (prefers-reduced-motion:reduce){{#lines{{animation:none}}}}
</style>
<rect width="{width}" height="{box + 28}" rx="8" fill="#0d1117"/>
<svg x="12" y="10" width="{width - 24}" height="{box + 6}"><g id="lines">
{text}
</g></svg>
</svg>
"""


def write_block(name: str, block: str) -> None:
    """Put a block between <!--name--> and <!--end--> in README.md."""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    start = old.index(f"<!--{name}-->") + len(f"<!--{name}-->")
    write_atomically(readme, old[:start] + f"\n{block}\n" + old[old.index("<!--end-->", start):])


def quotation(story: str) -> str:
    """Return a sample as a quotation of Markdown."""
    return "\n".join(f"> {line}".rstrip() for paragraph in story.strip().splitlines()
                     for line in textwrap.wrap(paragraph, 97) or [""])


def write_figures(figures: dict[str, str]) -> None:
    """Write the figures to figures.json, after their marks, and into the comments of configs."""
    write_atomically(ROOT / "docs/figures.json", json.dumps(figures, indent=1) + "\n")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = path.read_text(encoding="utf-8")
        new = re.sub(r"<!--(\w+)-->\d+([.,]\d+)*%?",
                     lambda mark: f"<!--{mark[1]}-->{figures[mark[1]]}", old)
        if new != old:
            write_atomically(path, new)
    for name, result in RESULTS.items():
        before, _, after = (ROOT / name).read_text(encoding="utf-8").partition("# Reaches")
        comment = textwrap.fill("# " + result.format(**figures, machine=machine), 100,
                                subsequent_indent="# ")
        write_atomically(ROOT / name, before + comment + after[after.index("\nout_dir"):])


PARTS = {part.__name__: part for part in
         (demo, page, html, shakespeare, tinystories, ten_minutes, sampling)}

if __name__ == "__main__":
    configure(globals())
    with user_errors():
        chosen = [part for part in parts.split(",") if part]
        for part in chosen:
            one_of(*PARTS)("parts", part)
        figures = json.loads((ROOT / "docs/figures.json").read_text())
        copy_scripts()
        for part in chosen:
            figures |= PARTS[part]()
            write_figures(figures)
        write_figures(figures)
