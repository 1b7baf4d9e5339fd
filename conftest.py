"""What the tests share: running the scripts as a user does, and a small data set to run them on."""
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests themselves run side by side
HERE = Path(__file__).parent
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=4", "--gradient_accumulation_steps=2",
        "--max_iters=6", "--lr_decay_iters=6", "--warmup_iters=2", "--eval_interval=3", "--eval_iters=2", "--log_interval=1",
        "--compile=False", "--device=cpu", "--dtype=float32", "--dropout=0.1"]


# Imports everything once and then forks for every run: five of the six seconds of a short run are imports. A child has the
# arguments, the standard streams and the exit status of a process of its own.
FORK_SERVER = """
import atexit, json, os, runpy, signal, sys, traceback
import matplotlib.figure, torch._dynamo, torch.distributed, tqdm
import checkpoint, configurator, dataset, model, tokenizer
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


@pytest.fixture(scope="session")
def fables_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "fables"
    done = run("data/fables/prepare.py", f"--out_dir={folder}", "--train_stories=60", "--val_stories=8")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, fables_data) -> Path:
    """The out_dir of a finished tiny run."""
    out_dir = tmp_path_factory.mktemp("trained") / "out"
    train(fables_data, out_dir)
    return out_dir
