"""models/: the trained models that come with the program."""
import json
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from helpers import HERE, one_line_error, prepare
from lib.checkpoint import load_checkpoint, load_model
from lib.corpus import load_meta
from lib.tokenizer import EOT, get_tokenizer
from sample import generate_text

MODELS = ["fables", "tinystories"]
PROMPT = "Once upon a time"
# 40 tokens at temperature 0, and the logits of five tokens after the prompt
GOLDEN = {
    "fables": (
        ', on a green island, there lived a curious bear named Pip. Pip loved painting '
        'snails. Every night Pip slept beside a battered bonnet.\n\nOne foggy Friday a gu'
        'sty wind stole the bonnet and hung',
        {3: 37.61, 5: 23.49, 1149: 19.05, 41: 18.86, 366: 18.39}),
    "tinystories": (
        ', there was a little girl named Lily. She loved to play outside in the sun. On'
        'e day, she saw a big tree with lots of leaves. She wanted to climb the tree, b'
        'ut she',
        {44: 14.95, 397: 12.71, 314: 7.54, 258: 6.26, 430: 6.18}),
}


def loss_of(name: str, documents: list[str]) -> float:
    """Return the mean loss in nats per token of documents, each from its start to its end."""
    model, checkpoint = load_model(HERE / "models" / name, "cpu")
    tokenizer, losses = get_tokenizer(checkpoint["meta"]), []
    for text in documents:
        ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text), tokenizer.eot]])
        logits = model(ids[:, :-1])[0]
        losses.append(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_small_and_has_a_card(name):
    folder = HERE / "models" / name
    size = (folder / "best.pt").stat().st_size
    assert size < {"fables": 500_000, "tinystories": 4_000_000}[name]
    summary = json.loads((folder / "metrics_summary.json").read_text())
    checkpoint = load_checkpoint(folder)
    assert summary["step"] == checkpoint["step"] and not summary.get("quantize")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{summary['bits_per_byte']:.3f}" in card and f"{checkpoint['step']:,} steps" in card
    assert "python train.py" in card and "license" in card.lower()
    assert "/" not in checkpoint["config"]["dataset"] and "/" not in checkpoint["config"]["out_dir"]


def test_loss_of_regenerated_fables(tmp_path):
    """Fables of another seed have the loss on the model card, within 2%."""
    done = prepare("fables", f"--out_dir={tmp_path}", "--train_stories=10", "--val_stories=100",
                   "--seed=7")
    assert done.returncode == 0, done.stderr
    tokenizer = get_tokenizer(load_meta(tmp_path))  # its ids are others
    ids = np.fromfile(tmp_path / "val.bin", dtype=np.uint16)
    documents = tokenizer.decode(ids.tolist()).split(EOT)[:-1]
    summary = json.loads((HERE / "models/fables/metrics_summary.json").read_text())
    assert len(documents) == 100
    assert loss_of("fables", documents) == pytest.approx(summary["loss"], rel=0.02)


def test_loss_of_stories():
    text = (HERE / "tests/data/stories.txt").read_text(encoding="utf-8")
    documents = [part.strip() for part in text.split(EOT)[:-1]]
    assert loss_of("tinystories", documents) == pytest.approx(2.497, abs=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_golden_text(name):
    text, logits = GOLDEN[name]
    folder = HERE / "models" / name
    model, checkpoint = load_model(folder, "cpu")
    tokenizer = get_tokenizer(checkpoint["meta"])
    idx = torch.tensor([[tokenizer.eot, *tokenizer.encode(PROMPT)]])
    found = model(idx)[0][0, -1]
    for token, value in logits.items():
        assert found[token].item() == pytest.approx(value, abs=0.2), token
    if platform.machine() in ("x86_64", "AMD64"):  # elsewhere rounding differs: no fbgemm
        found = generate_text(PROMPT, 40, temperature=0, out_dir=str(folder), device="cpu")
        assert found == PROMPT + text


def test_without_a_run_the_shipped_model_is_used(tmp_path):
    """Run in a copy without `out`; an explicit --out_dir must still fail."""
    for name in ("sample.py", "model.py", "train.py"):
        shutil.copy(HERE / name, tmp_path)
    for name in ("lib", "models"):
        shutil.copytree(HERE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "sample.py", "--max_new_tokens=5", "--device=cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    note, model, _ = done.stderr.splitlines()
    assert done.returncode == 0 and done.stdout.count("-" * 80) == 3
    assert note.startswith("note: there is no folder out") and "models/tinystories" in model
    done = subprocess.run([*command, "--out_dir=out"], cwd=tmp_path, capture_output=True, text=True)
    assert "there is no checkpoint in out" in one_line_error(done)
