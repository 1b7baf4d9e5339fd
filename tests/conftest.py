"""Fixtures: small datasets, a trained run and a stand-in for the Hugging Face hub."""

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

from helpers import run, train  # first: sets OMP_NUM_THREADS before torch is imported


@pytest.fixture(scope="session")
def fables_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "fables"
    done = run(
        "data/fables/prepare.py", f"--out_dir={folder}", "--train_stories=60", "--val_stories=8"
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, fables_data) -> Path:
    """The out_dir of a finished tiny run."""
    out_dir = tmp_path_factory.mktemp("trained") / "out"
    train(fables_data, out_dir)
    return out_dir


@pytest.fixture(scope="session")
def gpt2_data(tmp_path_factory) -> Path:
    """Fables as GPT-2 tokens."""
    folder = tmp_path_factory.mktemp("data") / "gpt2"
    done = run(
        "data/fables/prepare.py",
        f"--out_dir={folder}",
        "--train_stories=60",
        "--val_stories=8",
        "--tokenizer=gpt2",
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def openai_folder(tmp_path_factory) -> Path:
    """A tiny GPT-2 as transformers saves it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    GPT2LMHeadModel(
        GPT2Config(
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            vocab_size=50304,
            activation_function="gelu",
        )
    ).save_pretrained(folder)
    return folder


# -----------------------------------------------------------------------------

COMMITS = {"main": "5" * 40, "v1": "1" * 40}  # the revisions that every repository has


@pytest.fixture
def hub(tmp_path) -> Iterator[ThreadingHTTPServer]:
    """
    Serve tmp_path/hub/<owner>/<name>/ as datasets and models of the Hugging Face hub.

    The revision v1 is <name>@v1/, where that exists. Scripts that run with its `env` use it. `sent`
    holds the paths that were requested, `gated` the names of repositories whose files nobody gets,
    `commits` those of the revisions. Of uploaded models, `created` holds the names and `uploaded`
    the files.
    """
    folder = tmp_path / "hub"

    def oid(path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else "0"

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
            parts = unquote(urlsplit(self.path).path).removeprefix("/api").split("/")[1:]
            if parts[0] not in ("datasets", "models"):  # a file of a model
                parts.insert(0, "models")
            # datasets/owner/name/what/revision/...
            name, what, path = "/".join(parts[1:3]), "/".join(parts[3:4]), "/".join(parts[5:])
            revision = parts[4] if parts[4:] else "main"
            commit = COMMITS.get(revision, revision)
            repo = folder / f"{name}@v1"
            if commit != COMMITS["v1"] or not repo.is_dir():
                repo = folder / name
            if len(parts) < 3 or not repo.is_dir():
                self.answer(401, X_Error_Code="RepoNotFound")
            elif commit not in COMMITS.values():
                self.answer(404, X_Error_Code="RevisionNotFound")
            elif what == "resolve" and name in server.gated:
                self.answer(401, X_Error_Code="GatedRepo")
            elif what in ("", "revision"):
                self.answer(200, json.dumps({"id": name, "sha": commit}).encode())
            elif what == "tree" and (repo / path).is_dir():
                found = sorted(
                    (repo / path).rglob("*")
                    if "recursive=true" in self.path
                    else (repo / path).iterdir()
                )
                self.answer(
                    200,
                    json.dumps(
                        [
                            {
                                "type": "directory" if item.is_dir() else "file",
                                "size": item.stat().st_size,
                                "path": str(item.relative_to(repo)),
                                "oid": oid(item),
                            }
                            for item in found
                        ]
                    ).encode(),
                )
            elif what == "resolve" and (repo / path).is_file():
                body = (repo / path).read_bytes()
                headers = {"ETag": f'"{oid(repo / path)}"', "X-Repo-Commit": commit}
                if "Range" not in self.headers:
                    return self.answer(200, body, **headers)
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                part = body[int(first) : int(last or len(body)) + 1]
                self.answer(
                    206,
                    part,
                    **headers,
                    Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}",
                )
            else:
                self.answer(404, X_Error_Code="EntryNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/repos/create":
                server.created.append(
                    "/".join(filter(None, map(json.loads(body).get, ("organization", "name"))))
                )
                self.answer(
                    200,
                    json.dumps(
                        {"url": f"{server.env['HF_ENDPOINT']}/{server.created[-1]}"}
                    ).encode(),
                )
            elif self.path == "/api/validate-yaml":  # of a model card
                self.answer(200, b"{}")
            elif "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.answer(200, json.dumps({"files": files}).encode())
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        server.uploaded[line["value"]["path"]] = base64.b64decode(
                            line["value"]["content"]
                        )
                self.answer(
                    200,
                    json.dumps(
                        {
                            "commitUrl": "/".join(
                                [server.env["HF_ENDPOINT"], server.created[-1], "commit", "5" * 40]
                            ),
                            "commitOid": "5" * 40,
                        }
                    ).encode(),
                )
            else:
                self.answer(404)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.sent, server.gated, server.created, server.uploaded = [], [], [], {}
    server.commits = COMMITS
    server.env = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "*",
        "no_proxy": "*",
        "HF_HOME": str(tmp_path / "hf"),
    }
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        if not path and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: install one, or run `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
