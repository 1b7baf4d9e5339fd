"""
The scripts run on a simulated Windows.

fake_windows.py runs all commands in one process of its own.
"""
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import HERE, TINY
from lib import files, runlog

TEXT = "".join(f"你好 {i}, l'été, 🦊 and the fox\n<|endoftext|>\n" for i in range(60))
SHAPE = [option for option in TINY if option.startswith(("--n_", "--block_size", "--batch_size"))]
MACHINE = ["--device=cpu", "--dtype=float32"]
# what would fail on Windows, with the error
MISTAKES = {
    "import fcntl": "ModuleNotFoundError",
    "import resource": "ModuleNotFoundError",
    "import os; os.getuid()": "AttributeError",
    "import os; os.sched_getaffinity(0)": "AttributeError",
    "from os import fork": "ImportError",
    "import signal; signal.SIGKILL": "AttributeError",
    "import multiprocessing; multiprocessing.get_context('fork')": "ValueError",
    "import sys; assert sys.platform == 'linux'": "AssertionError",
    "print('\U0001f98a')": "UnicodeEncodeError",
    "open('README.md')": "EncodingWarning",
    "from pathlib import Path; Path('README.md').read_text()": "EncodingWarning",
    "import os; os.fsync(open('README.md', 'rb').fileno())": "OSError",
    "import os; file = open('old', 'wb'); os.replace('old', 'new')": "PermissionError",
    "import os; file = open('old', 'wb'); os.rename('new', 'old')": "PermissionError",
    "from pathlib import Path; file = open('old', 'wb'); Path('old').unlink()": "PermissionError",
    "import numpy, os; file = numpy.memmap('mapped', mode='w+', shape=9); os.remove('mapped')":
        "PermissionError",
    "import msvcrt; file = open('old', 'wb'); msvcrt.locking(file.fileno(), 2, 1)":
        "AssertionError",
}
APP = """
import runpy, signal, sys, threading, urllib.request

def visit():
    while b"Ctrl-C" not in sys.stdout.buffer.getvalue():
        threading.Event().wait(0.05)
    url = sys.stdout.buffer.getvalue().split()[0].decode()
    sys.stderr.write(f"the page has {len(urllib.request.urlopen(url).read())} bytes")
    signal.raise_signal(signal.SIGINT)

threading.Thread(target=visit, daemon=True).start()
sys.argv[:] = ["app.py", "--folder={folder}", "--port=0", "--device=cpu"]
runpy.run_path("app.py", run_name="__main__")
"""
PREPARE_AGAIN = """
import numpy, runpy, sys

mapped = numpy.memmap("{folder}/char/train.bin", mode="r")
sys.argv[:] = ["data/text/prepare.py", "--source={folder}/text.txt", "--tokenizer=char",
               "--out_dir={folder}/char"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FULL_DISK = """
import runpy, sys
from gguf import GGUFWriter

def fail(writer):
    raise OSError("the disk is full")

GGUFWriter.write_kv_data_to_file = fail
sys.argv[:] = ["export.py", "--out_dir={folder}/run", "--format=gguf", "--to={folder}/full.gguf"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LOCK_TWICE = """
import os
from lib.files import lock_run

lock = lock_run("{folder}/locked")
print(open("{folder}/locked/lock", encoding="utf-8").read() == str(os.getpid()))
lock_run("{folder}/locked")
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """Return all commands by name, in the order in which they run."""
    run, of_run = f"{folder}/run", [f"--dataset={folder}/char", f"--out_dir={folder}/run", *TINY]
    out_dir = f"--out_dir={run}"
    prepare = {f"prepare {kind}": ["data/text/prepare.py", f"--source={folder}/text.txt",
                                   f"--tokenizer={kind}", f"--out_dir={folder}/{kind}"]
               for kind in ("char", "word", "pieces", "bpe")}
    export = {f"export {kind}": ["export.py", f"{out_dir}/", f"--format={kind}"]
              for kind in ("hf", "gguf", "int8")}
    sample = ["sample.py", "--num_samples=1", "--max_new_tokens=5", "--device=cpu"]
    return {
        "prepare fables": ["data/fables/prepare.py", f"--out_dir={folder}/fables",
                           "--train_stories=60", "--val_stories=8"],
        **prepare,
        "train": ["train.py", *of_run, "--max_iters=3"],
        "resume": ["train.py", *of_run, "--init_from=resume"],
        "overwrite": ["train.py", *of_run, "--overwrite=True"],
        "eval": ["eval.py", out_dir, *MACHINE],
        "eval again": ["eval.py", out_dir, *MACHINE],
        "sample": [*sample, out_dir, f"--start=FILE:{folder}/prompt.txt"],
        **export,
        "export again": [*export["export hf"], "--overwrite=True"],
        "sample hf": [*sample, f"--out_dir={folder}/run-hf"],
        "bench train": ["bench.py", "--rounds=1", "--steps=1", "--compile=False", "--vocab_size=99",
                        *SHAPE, *MACHINE],
        "bench data": ["bench.py", "--mode=data", "--rounds=1", "--steps=1",
                       f"--dataset={folder}/fables", *SHAPE, *MACHINE],
        "bench generate": ["bench.py", "--mode=generate", "--rounds=1", "--max_new_tokens=5",
                           "--texts=1", "--vocab_size=99", *SHAPE, *MACHINE],
        "bench loss": ["bench.py", "--mode=loss", "--max_iters=2", "--compile=False",
                       f"--dataset={folder}/fables", *SHAPE, *MACHINE],
        "bench report": ["bench.py", "--mode=report", "--rounds=1", "--steps=1", "--texts=1",
                         "--max_new_tokens=5", "--compile=False", "--vocab_size=99", *SHAPE,
                         *MACHINE],
        "plan": ["plan.py", f"--dataset={folder}/fables", *SHAPE, *MACHINE],
        "app": ["-c", APP.replace("{folder}", str(folder))],
        "prepare again": ["-c", PREPARE_AGAIN.replace("{folder}", str(folder))],
        "full disk": ["-c", FULL_DISK.replace("{folder}", str(folder))],
        "lock twice": ["-c", LOCK_TWICE.replace("{folder}", str(folder))],
        **{code: ["-c", code.replace("'old'", f"'{folder}/old'").replace("'mapped'",
                                                                         f"'{folder}/mapped'")]
           for code in MISTAKES},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "prompt.txt").write_bytes("\ufeff你好 🦊\r\n".encode())  # as Notepad saves it
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[str, SimpleNamespace]:
    """The status, stdout and stderr of each command."""
    if sys.platform != "linux":
        pytest.skip("fake_windows.py reads /proc")
    asked = commands(folder)
    (folder / "commands.json").write_text(json.dumps(list(asked.values())), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "tests/fake_windows.py",
         folder / "commands.json"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: SimpleNamespace(**result) for name, result in zip(asked, json.loads(done.stdout))}


FAILING = ("prepare again", "full disk", "lock twice", *MISTAKES)
SCRIPTS = [name for name in commands(Path()) if name not in FAILING]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_succeeds(results, name):
    done = results[name]
    assert done.status == 0 and "Traceback" not in done.stderr, done


@pytest.mark.parametrize("code", MISTAKES)
def test_mistake_is_found(results, code):
    assert results[code].status == 1
    assert results[code].stderr.splitlines()[-1].startswith(MISTAKES[code])


def test_run_is_resumed_and_replaced(results):
    assert "at step 3" in results["resume"].stdout and "step 6/6" in results["resume"].stdout
    assert "resuming" not in results["overwrite"].stdout and "eval 0/6" in results[
        "overwrite"].stdout


def test_unknown_characters_are_printed_as_question_marks(results):
    assert results["sample"].stdout.startswith("?? ?\n")
    assert re.search(r"sample +\| .*\?", results["train"].stdout)


def test_byte_order_mark_is_no_part_of_a_prompt(results):
    assert "feff" not in results["sample"].stderr.lower()
    assert "the characters '\\n' of the prompt" in results["sample"].stderr


def test_memory_is_unknown(results, folder):
    summary = json.loads((folder / "run/metrics_summary.json").read_text(encoding="utf-8"))
    assert summary["peak_memory_bytes"] is None and "memory" not in results["train"].stdout


def test_app_serves_the_page_until_ctrl_c(results):
    assert re.fullmatch(r"the page has \d{4,} bytes", results["app"].stderr)


def test_dataset_in_use_is_an_error_that_says_what_to_do(results, folder):
    done = results["prepare again"]
    assert done.status == 2 and done.stderr == (
        f"error: {folder}/char/train.bin cannot be replaced: close the programs that use it, then "
        "try again\n")


def test_unfinished_export_is_closed_and_removed(results, folder):
    done = results["full disk"]
    assert done.status == 2 and done.stderr == "error: the disk is full\n"
    assert not [*folder.glob("full.gguf*"), *folder.glob(".export*")]


def test_run_is_locked(results, folder):
    done = results["lock twice"]
    assert done.status == 1 and done.stdout == "True\n"
    assert re.search(rf"ValueError: process \d+ is training in {folder}/locked", done.stderr)


# -----------------------------------------------------------------------------
# Without a simulated Windows

@pytest.mark.parametrize("failures", [0, 3, 99, 100])
def test_replacing_waits_for_other_programs(monkeypatch, tmp_path, failures):
    sleeps, left, replace = [], iter(range(failures)), os.replace

    def replace_later(source, target):
        if next(left, None) is not None:
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(files, "time", SimpleNamespace(sleep=sleeps.append))
    monkeypatch.setattr(files.os, "replace", replace_later)
    (tmp_path / "new").write_text("new")
    expected = contextlib.nullcontext()
    if failures == 100:
        expected = pytest.raises(PermissionError, match="old cannot be replaced")
    with expected:
        files.replace_file(tmp_path / "new", tmp_path / "old")
    assert len(sleeps) == failures and (tmp_path / "old").exists() == (failures < 100)


def test_viewer_that_holds_the_chart_does_not_end_the_run(monkeypatch, tmp_path):
    def refuse(source, target):
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(files.os, "replace", refuse)
    runlog.draw_losses(runlog.RunLog(tmp_path, write=True), "title")


def test_source_is_ascii():
    """exec(open(...).read()) in a config file decodes it with the encoding of the system."""
    for pattern in ("*.py", "lib/*.py", "config/*.py", "data/*/*.py"):
        for path in HERE.glob(pattern):
            assert path.read_bytes().isascii(), path
