"""notebook.ipynb: run from top to bottom with small settings, its errors, and its form."""
import ast
import asyncio
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell

from helpers import HERE, read_log, run
from sample import generate_text

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=64", "--batch_size=2",
        "--max_iters=300", "--eval_interval=100", "--eval_iters=1", "--log_interval=10"]
SMALL = {"minutes": 0, "out_dir": "out-small", "interrupt_at": 100,
         "train_options": " ".join(TINY),
         "prepare_options": "--train_stories=60 --val_stories=8"}


def notebook_with(*only: str, **parameters) -> nbformat.NotebookNode:
    """Return the notebook, or its cells with these ids, with other parameters."""
    notebook = nbformat.read(HERE / "notebook.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not only or cell.id in only]
    for cell in notebook.cells:
        if cell.id == "parameters":
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return notebook


def client_of(notebook: nbformat.NotebookNode, folder: Path) -> NotebookClient:
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=120, resources=resources)


def printed(cell: nbformat.NotebookNode) -> str:
    assert all(output.get("name") != "stderr" for output in cell.outputs), cell.outputs
    return "".join(output.get("text", "") or output.get("data", {}).get("text/markdown", "")
                   for output in cell.outputs)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No network, no GPU, nothing installed, and nothing written into the home folder."""
    pip = {"NO_INDEX": "1", "NO_BUILD_ISOLATION": "0", "DRY_RUN": "1", "CONFIG_FILE": os.devnull,
           "REPORT": str(tmp_path / "pip.json")}
    for name, value in {**{f"PIP_{name}": value for name, value in pip.items()},
                        "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
                        "IPYTHONDIR": str(tmp_path / "ipython"),
                        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def code(tmp_path) -> Path:
    """A fresh copy of what the notebook needs."""
    folder = tmp_path / "fablegpt"
    (folder / "data/fables").mkdir(parents=True)
    scripts = [path for path in HERE.glob("*.py") if not path.name.startswith("test_")]
    for name in ("pyproject.toml", "README.md", "LICENSE", "data/fables/prepare.py"):
        scripts.append(HERE / name)
    for path in scripts:
        shutil.copy(path, folder / path.relative_to(HERE))
    for name in ("config", "lib", "models"):
        shutil.copytree(HERE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_from_top_to_bottom(code, tmp_path):
    notebook = notebook_with(**SMALL)
    client_of(notebook, code).execute()
    said = {cell.id: printed(cell) for cell in notebook.cells if cell.cell_type == "code"}
    to_install = json.loads((tmp_path / "pip.json").read_text())["install"]
    assert said["install"] == "" and said["device"].startswith("torch ")
    assert [package["metadata"]["name"] for package in to_install] == ["fablegpt"]
    assert said["story"].startswith("model: models/tinystories/best.pt") and "." in said["story"]
    assert "entropy of the validation split" in said["data"]

    # interrupted once and resumed, the run is the same as without an interruption
    stopped = int(re.search(r"stopped at step (\d+), saved", said["first-part"])[1])
    assert 100 <= stopped < 300
    assert f"resuming out-small at step {stopped}, learning rate" in said["second-part"]
    whole = run("train.py", "config/train_fables.py", *TINY, f"--dataset={code}/data/fables",
                f"--out_dir={tmp_path}/whole", "--device=cpu")
    assert whole.returncode == 0, whole.stderr
    assert read_log(code / "out-small") == read_log(tmp_path / "whole")
    assert {"best.pt", "last.pt"} <= {path.name for path in (code / "out-small").iterdir()}
    for part in ("first-part", "second-part"):
        outputs = next(cell for cell in notebook.cells if cell.id == part).outputs
        curves = sum("image/png" in output.get("data", {}) for output in outputs)
        assert curves == 1, "curves pile up"

    metrics = json.loads((code / "out-small/metrics_summary.json").read_text())
    for row in (f"| loss | {metrics['loss']:.4g} |", f"| parameters | {metrics['parameters']:,} |"):
        assert row in said["evaluate"]
    assert "it/s" not in said["evaluate"], "the progress bar stayed"
    assert said["sample"].count("Once upon a time") == 2 and said["sample"].count("-" * 80) == 2
    again = generate_text("Once upon a time", max_length=200, out_dir=str(code / "out-small"),
                          device="cpu", seed=1)
    assert said["sample-in-python"] == again + "\n" and len(again) > 50
    with zipfile.ZipFile(code / "out-small/download.zip") as archive:
        archive.extractall(tmp_path / "home")
    assert str(code / "out-small/download.zip") in said["download"]
    for folder in ("out-small", "out-small-int8", "out-small-hf"):
        done = run("eval.py", f"--out_dir={tmp_path}/home/{folder}",
                   f"--dataset={code}/data/fables", "--batching=by_length", "--dtype=float32",
                   "--device=cpu", "--valid_samples=0")
        loss = re.search(r"^  loss +([\d.]+) nats", done.stdout, re.M)
        assert loss and abs(float(loss[1]) - metrics["loss"]) < 0.02, done.stderr


def test_errors_and_interruptions(code, tmp_path):
    """In a notebook without the scripts, each error is one line, and the stop button saves."""
    for command in ("init", "add .",
                    "-c user.name=test -c user.email=test@localhost commit -m test"):
        subprocess.run(["git", *command.split()], cwd=code, check=True, capture_output=True)
    alone = tmp_path / "alone"
    alone.mkdir()
    notebook = notebook_with(**SMALL)
    cells = {cell.id: cell for cell in notebook.cells}
    client = client_of(notebook, alone)

    async def says(id_or_source: str, interrupt=None) -> str:
        cell = cells.get(id_or_source) or new_code_cell(id_or_source)
        index = [*cells].index(id_or_source) if id_or_source in cells else 0
        task = asyncio.ensure_future(client.async_execute_cell(cell, index))
        if interrupt:
            while not interrupt():
                await asyncio.sleep(0.05)
            await client.km.interrupt_kernel()
        try:
            await task
        except CellExecutionError as error:
            assert cell.outputs[-1].traceback == [f"error: {error.evalue}"]
            printed_text = "".join(output.get("text", "") for output in cell.outputs)
            assert "error: " not in printed_text  # it is shown only once
            return f"error: {error.evalue}"
        return printed(cell)

    async def run_cells() -> None:
        async with client.async_setup_kernel():
            await says("parameters")
            await says("code")
            said = await says("clone")
            assert said.startswith("error: train.py is not here: set `repository`")
            await says(f"repository = '{tmp_path}/nothing.git'")
            assert (await says("clone")).startswith("error: git cannot clone")
            await says(f"repository = 'file://{code}'")
            assert await says("clone") == f"the code is in {alone / 'fablegpt'}\n"

            project = alone / "fablegpt/pyproject.toml"
            project.write_text(project.read_text().replace('"tqdm', '"no-such-package'))
            said = await says("install")
            assert said == "error: the script ended with status 1, see above"
            assert "no-such-package" in cells["install"].outputs[0].text

            await says("use_drive = True")
            said = await says("drive")
            assert said == "error: use_drive works only in Google Colab: set it to False"
            await says("use_drive, dataset = False, 'nothing'")
            assert await says("data") == "error: the script ended with status 2, see above"
            assert "nothing/prepare.py" in cells["data"].outputs[0].text
            await says("dataset = 'fables'")
            await says("data")
            assert await says("data") == "data/fables is already prepared\n"

            await says("train")
            await says("train_options += ' --learning_rat=1'")
            assert await says("second-part") == (
                "error: --learning_rat=1: there is no setting 'learning_rat'; did you mean "
                "learning_rate?")
            # steps so long that a second signal would come within the same one
            slow = "--gradient_accumulation_steps=300 --log_interval=1"
            await says("minutes = 60")
            await says(f"train_options = train_options.replace('--learning_rat=1', '{slow}')")
            log = alone / "fablegpt/out-small/log.jsonl"
            said = await says("second-part", interrupt=lambda: (
                log.exists() and '"step": 2' in log.read_text()))
            assert said == "error: interrupted; run the cells again to continue"
            assert re.search(r"stopped at step \d+, saved", str(cells["second-part"].outputs))

            (alone / "fablegpt/tokenizers.py").write_text("raise ImportError")
            said = await says("export-hf")
            assert said == "error: --format=hf needs a package: pip install tokenizers"
            (alone / "fablegpt/tokenizers.py").unlink()
            await says("out_dir = 'nothing'")
            said = await says("export-hf")
            assert said.startswith("error: there is no checkpoint in nothing")

    asyncio.run(run_cells())


def test_colab(tmp_path):
    """With a stand-in for Colab's module, the run is on Drive, and the archive is downloaded."""
    notebook = notebook_with("parameters", "code", "drive", "download", use_drive=True)
    cells = {cell.id: cell for cell in notebook.cells}
    stand_in = """
import sys, types
called = []
colab = types.ModuleType('google.colab')
colab.drive = types.SimpleNamespace(mount=called.append)
colab.files = types.SimpleNamespace(download=called.append)
sys.modules |= {'google': types.ModuleType('google'), 'google.colab': colab}
"""
    cells["code"].source = stand_in + cells["code"].source
    unchanged = "out_dir = '/content/drive/MyDrive/fablegpt/out-fables'"
    on_drive = new_code_cell(
        f"assert {unchanged.replace('=', '==')} and called == ['/content/drive'] * 2\n"
        "out_dir = 'here'\nPath(out_dir).mkdir()\n"
        "for name in ('best.pt', 'log.jsonl', 'loss.png', 'metrics_summary.json'):\n"
        "    Path(out_dir, name).write_text(name)")
    sent = new_code_cell("assert called[2:] == ['here/download.zip']")
    drive_again = new_code_cell(cells["drive"].source)
    notebook.cells = [cells["parameters"], cells["code"], cells["drive"], drive_again, on_drive,
                      cells["download"], sent]
    client_of(notebook, tmp_path).execute()


def test_form():
    path = HERE / "notebook.ipynb"
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert text == nbformat.writes(notebook) + "\n" and notebook.metadata.accelerator == "GPU"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    parameters: dict[str, object] = {}
    exec(next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])),
         parameters)
    constants = {str(node.value) for cell in cells for node in ast.walk(ast.parse(cell.source))
                 if isinstance(node, ast.Constant)}
    names = {text for text in constants if re.fullmatch(r"\w[\w/]*\.py", text)}
    assert {"train.py", "eval.py", "sample.py", "export.py"} <= names
    prepare = f"data/{parameters['dataset']}/prepare.py"
    for name in {*names, parameters["config_file"], prepare}:
        assert (HERE / name).is_file(), name


def test_the_badge_opens_the_repository_that_is_cloned():
    intro, parameters = (notebook_with(name).cells[0].source for name in ("intro", "parameters"))
    badge = re.search(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/", intro)[1]
    assert f'repository = "https://github.com/{badge}"\n' in parameters


def test_lines_are_short():
    for cell in notebook_with().cells:
        assert len(cell.source.splitlines()) <= 60, cell.id
        for line in cell.source.splitlines():
            assert len(line) <= 100 or line.startswith("[!["), line
