"""What the test files share: running the scripts, tiny models, texts and comparisons."""
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests themselves run side by side

import torch

from model import GPT, GPTConfig, quantize_int8

HERE = Path(__file__).parent.parent
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=4", "--gradient_accumulation_steps=2",
        "--max_iters=6", "--lr_decay_iters=6", "--warmup_iters=2", "--eval_interval=3", "--eval_iters=2", "--log_interval=1",
        "--compile=False", "--device=cpu", "--dtype=float32", "--dropout=0.1"]

SCRIPTS = ["train.py", "sample.py", "eval.py", "bench.py", "export.py", "app.py",
           *sorted(f"data/{path.parent.name}/prepare.py" for path in HERE.glob("data/*/prepare.py"))]

# Imports everything once and then forks for every run: five of the six seconds of a short run are imports. A child has the
# arguments, the standard streams and the exit status of a process of its own.
FORK_SERVER = """
import atexit, json, os, runpy, signal, sys, threading, traceback
import matplotlib.figure, torch._dynamo, torch.distributed, tqdm
import lib.checkpoint, lib.configurator, lib.corpus, lib.dataset, lib.tokenizer, model
for line in sys.stdin:
    args, streams = json.loads(line)
    pid = os.fork()
    if pid == 0:
        signal.alarm(300)
        for number, path in enumerate(streams):
            os.dup2(os.open(path, os.O_RDWR), number)
        sys.stdin = open(0)
        sys.argv, sys.path[0], status = args, os.path.dirname(os.path.abspath(args[0])), 0
        try:
            runpy.run_path(args[0], run_name="__main__")
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        threading._shutdown()  # what an interpreter does at its end, before the others
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@functools.lru_cache
def fork_server() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", FORK_SERVER], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True)


def run(script: str, *args: str, ranks: int = 0, stdin: str = "", **env: str) -> subprocess.CompletedProcess:
    """Run a script in the repository's folder, under torchrun if ranks is given."""
    if ranks or env:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        return subprocess.run([sys.executable, *launcher, script, *args], cwd=HERE, capture_output=True, text=True,
                              timeout=300, input=stdin, env=os.environ | env)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        for path, text in zip(streams, (stdin, "", "")):
            path.write_text(text)
        server = fork_server()
        server.stdin.write(json.dumps([[script, *args], [str(path) for path in streams]]) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        out, err = (path.read_text(errors="replace") for path in streams[1:])
        return subprocess.CompletedProcess([script, *args], status, out, err)


def train(data: Path, out_dir: Path, *args: str, **how) -> subprocess.CompletedProcess:
    """A tiny run of train.py that must succeed."""
    done = run("train.py", f"--dataset={data}", f"--out_dir={out_dir}", *TINY, *args, **how)
    assert done.returncode == 0, done.stderr
    return done


def read_log(out_dir: Path) -> list[dict]:
    """log.jsonl without the timings, which no two runs share."""
    timings = {"ms", "tokens_per_second", "mfu"}
    return [{k: v for k, v in json.loads(line).items() if k not in timings} for line in open(out_dir / "log.jsonl")]


def prepare(name: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    return run(f"data/{name}/prepare.py", *args, **env)


def one_line_error(done) -> str:
    """The error line of a run that failed as runs must fail."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def assert_same(a, b, where="checkpoint"):
    """Equality to the last bit, through dicts, lists and tensors."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b, where


def damage_by(kind: str, raw: bytes) -> bytes:
    middle = len(raw) // 2
    return {"truncated": raw[:middle], "empty": b"", "zeroed": bytes(len(raw)), "text": b"hello",
            "flipped": raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1:]}[kind]


# -----------------------------------------------------------------------------
# Models

def tiny(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(block_size=32, vocab_size=61, n_layer=2, n_head=4, n_embd=32) | changes)).eval()


def randomize(model: GPT) -> None:
    """Weights far from their initial values, biases and gains included."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)


def in_int8(model: GPT) -> GPT:
    return GPT.from_weights(model.config, quantize_int8(model.state_dict())).eval()


def export(out_dir: Path, to: Path, *args: str) -> None:
    done = run("export.py", f"--out_dir={out_dir}", f"--to={to}", "--format=hf", *args)
    assert done.returncode == 0 and done.stderr == "" and str(to) in done.stdout, done.stderr


def transformers_of(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (AutoModelForCausalLM.from_pretrained(folder).eval(),
            AutoTokenizer.from_pretrained(folder, trust_remote_code=(folder / "tokenization_word.py").exists()))


# -----------------------------------------------------------------------------
# Texts

SPLITS = ("train", "val")
ODD = "Zoë's café — 3.5%?!\n\n  \"hide-and-seek\"\tnaïve\u200b 🦊 l'été\r\n"
PROMPT = "Once upon a time"
TEXT = "Once upon a time, the cat's owner said: \"Don't!\"\n\n" \
       "Then 12 dogs -- well-fed -- ran\taway.  Fin\u00e9 \u4e2d\U0001f600 ...\n"
