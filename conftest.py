"""What the tests share: running the scripts as a user does, and a small data set to run them on."""
import base64
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests themselves run side by side
HERE = Path(__file__).parent
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=4", "--gradient_accumulation_steps=2",
        "--max_iters=6", "--lr_decay_iters=6", "--warmup_iters=2", "--eval_interval=3", "--eval_iters=2", "--log_interval=1",
        "--compile=False", "--device=cpu", "--dtype=float32", "--dropout=0.1"]


# Imports everything once and then forks for every run: five of the six seconds of a short run are imports. A child has the
# arguments, the standard streams and the exit status of a process of its own.
FORK_SERVER = """
import atexit, json, os, runpy, signal, sys, threading, traceback
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


# -----------------------------------------------------------------------------

COMMIT = "5" * 40  # the only one that every data set has


@pytest.fixture
def hub(tmp_path) -> Iterator[ThreadingHTTPServer]:
    """
    A stand-in for the Hugging Face hub: serves tmp_path/hub/<owner>/<name>/ as data sets to scripts that run with its `env`;
    `sent` has the paths that were asked for. It takes models: `created` has their names, `uploaded` their files.
    """
    folder = tmp_path / "hub"

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                server.sent.append(self.path)
                self.wfile.write(body)

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).removeprefix("/api").split("/")[1:]  # datasets/owner/name/what/commit/...
            repo, what, path = folder / "/".join(parts[1:3]), "/".join(parts[3:4]), "/".join(parts[5:])
            if parts[0] != "datasets" or len(parts) < 3 or not repo.is_dir():
                self.answer(401, X_Error_Code="RepoNotFound")
            elif what in ("", "revision"):
                self.answer(200, json.dumps({"id": "/".join(parts[1:3]), "sha": COMMIT}).encode())
            elif what == "tree" and (repo / path).is_dir():
                found = sorted((repo / path).rglob("*") if "recursive=true" in self.path else (repo / path).iterdir())
                self.answer(200, json.dumps([{"type": "directory" if item.is_dir() else "file", "size": item.stat().st_size,
                                              "path": str(item.relative_to(repo)), "oid": "0"} for item in found]).encode())
            elif what == "resolve" and (repo / path).is_file():
                body = (repo / path).read_bytes()
                headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
                if "Range" not in self.headers:
                    return self.answer(200, body, **headers)
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                part = body[int(first):int(last or len(body)) + 1]
                self.answer(206, part, **headers, Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}")
            else:
                self.answer(404, X_Error_Code="EntryNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/repos/create":
                server.created.append("/".join(filter(None, map(json.loads(body).get, ("organization", "name")))))
                self.answer(200, json.dumps({"url": f"{server.env['HF_ENDPOINT']}/{server.created[-1]}"}).encode())
            elif self.path == "/api/validate-yaml":  # of a model card
                self.answer(200, b"{}")
            elif "/preupload/" in self.path:
                files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                         for file in json.loads(body)["files"]]
                self.answer(200, json.dumps({"files": files}).encode())
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        server.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer(200, json.dumps({"commitUrl": f"{server.env['HF_ENDPOINT']}/{server.created[-1]}/commit/{COMMIT}",
                                             "commitOid": COMMIT}).encode())
            else:
                self.answer(404)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.sent, server.created, server.uploaded = [], [], {}
    server.env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*",
                  "no_proxy": "*", "HF_HOME": str(tmp_path / "hf")}
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
