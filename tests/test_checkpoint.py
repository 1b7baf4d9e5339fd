"""Checkpoints: their contents, damaged files, missing weights and missing runs."""

import copy
import functools
import math
import shutil
import subprocess
import sys

import pytest
import torch

from helpers import HERE, assert_same, damage_by, one_line_error, read_log, run, tiny
from lib.checkpoint import (
    RunState,
    build_model,
    check_checkpoint,
    find_resumable,
    load_checkpoint,
    model_to_finetune,
    read_checkpoint,
    remove_run,
    restore,
    save_checkpoint,
    step_file,
)
from lib.corpus import load_meta
from lib.optim import make_optimizers, set_lr
from lib.tokenizer import get_tokenizer
from model import GPT, GPTConfig


def test_missing_things_name_the_command_that_makes_them(tmp_path, trained):
    for script in ("sample.py", "eval.py"):
        error = one_line_error(run(script, f"--out_dir={tmp_path}"))
        assert f"there is no checkpoint in {tmp_path}: " in error
    shutil.copytree(
        HERE / "data/tinystories",
        tmp_path / "tinystories",
        ignore=shutil.ignore_patterns("*.bin", "*.json"),
    )
    error = one_line_error(
        run("train.py", f"--dataset={tmp_path}/tinystories", f"--out_dir={tmp_path}/out")
    )
    assert f"run `python {tmp_path}/tinystories/prepare.py`" in error
    assert "not prepared" in one_line_error(
        run("eval.py", f"--out_dir={trained}", f"--dataset={tmp_path}/tinystories")
    )


def test_a_dataset_of_a_config_names_the_command_that_prepares_it(tmp_path):
    command = "python data/shakespeare/prepare.py --tokenizer=word --out_dir=data/shakespeare_word"
    if not (HERE / "data/shakespeare_word").exists():
        error = one_line_error(
            run("train.py", "config/train_word_nano.py", f"--out_dir={tmp_path}/out"))
        assert f"run `{command}`" in error


def test_a_wrong_folder_lists_the_runs(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="train a model with `python train.py --out_dir=out`"):
        load_checkpoint("out")
    for name in ("out-b", "out-a"):
        shutil.copytree(trained, tmp_path / name)
    with pytest.raises(ValueError, match="there are runs in out-a, out-b"):
        load_checkpoint("out")


def test_one_file_of_a_run_can_be_loaded(tmp_path, trained):
    """By its path, also if the folder has a better one; a missing one names those that exist."""
    loaded = load_checkpoint(trained / "prev.pt")
    assert loaded["step"] == 3 and loaded["path"] == str(trained / "prev.pt")
    assert "optimizer" not in loaded
    assert_same(loaded["model"], read_checkpoint(trained / "prev.pt")["model"])
    with pytest.raises(ValueError, match=r"no file .*step_000009.pt: .* has best.pt, last.pt, "):
        load_checkpoint(trained / "step_000009.pt")
    with pytest.raises(ValueError, match="has no checkpoints"):
        load_checkpoint(tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes(b"hello")
    with pytest.raises(ValueError, match="last.pt is damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
    shutil.copytree(trained, tmp_path / "run.pt")  # a folder with such a name
    assert load_checkpoint(tmp_path / "run.pt")["path"] == str(tmp_path / "run.pt/best.pt")


def test_remove_run_leaves_other_files(tmp_path):
    for name in ("last.pt", "stop.pt", "prev.pt", "best.pt", "step_000010.pt", "step_1000000.pt",
                 "step_mine.pt", "ckpt.pt", "log.jsonl"):
        (tmp_path / name).touch()
    remove_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step_mine.pt", "ckpt.pt", "log.jsonl"}
    assert step_file(10) == "step_000010.pt" and step_file(1_000_000) == "step_1000000.pt"


def test_checkpoints_hold_what_they_should(trained, fables_data):
    last, best = read_checkpoint(trained / "last.pt"), read_checkpoint(trained / "best.pt")
    assert set(best) == {
        "model",
        "model_args",
        "step",
        "best_val_loss",
        "config",
        "meta",
        "version",
    }
    assert set(last) == set(best) | {
        "optimizer",
        "scaler",
        "stale",
        "seconds",
        "lr_scale",
        "bad_in_a_row",
        "bad_steps",
        "grad_norm_max",
        "evaluated_at",
    }
    assert last["meta"] == load_meta(fables_data) and last["step"] == 6
    assert set(last["model"]) == set(GPT(GPTConfig(**last["model_args"])).state_dict())
    assert best["best_val_loss"] == min(r["val_loss"] for r in read_log(trained) if "val_loss" in r)
    assert {path.name for path in trained.iterdir()} == {
        "last.pt",
        "best.pt",
        "prev.pt",
        "log.jsonl",
        "loss.png",
        "lock",
    }
    assert read_checkpoint(trained / "prev.pt")["step"] == 3


@pytest.mark.parametrize("kind", ["truncated", "empty", "zeroed", "text", "flipped"])
def test_damaged_last_falls_back_to_prev(tmp_path, trained, kind, capsys):
    shutil.copytree(trained, tmp_path / "out")
    last = tmp_path / "out/last.pt"
    last.write_bytes(damage_by(kind, last.read_bytes()))
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(last)
    assert find_resumable(tmp_path / "out")["step"] == 3
    assert "continuing from" in capsys.readouterr().err
    (tmp_path / "out/prev.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        find_resumable(tmp_path / "out")


def test_resume_takes_the_newest_step_and_a_return_only_evaluations(tmp_path, capsys):
    """A stop is saved beside last.pt, and replaced by the next evaluation."""
    def save(name, step):
        parts = dict(model={}, model_args={}, config={"dataset": "d"}, meta={"tokenizer": {}})
        save_checkpoint(tmp_path, name, parts | {"step": step, "from": name})

    def found(*names):
        return find_resumable(tmp_path, *names)["from"]

    save("last.pt", 10)
    save("stop.pt", 15)
    assert found() == "stop.pt" and found(("last.pt", "prev.pt")) == "last.pt"
    (tmp_path / "stop.pt").write_bytes(b"")
    assert found() == "last.pt" and "continuing from step 10" in capsys.readouterr().err
    save("stop.pt", 10)  # during the evaluation that was then repeated
    assert found() == "last.pt"
    save("last.pt", 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "prev.pt"]
    save("stop.pt", 25)
    (tmp_path / "last.pt").write_bytes(b"")
    assert found() == "stop.pt"


def test_failed_save_keeps_the_old_file(tmp_path):
    save_checkpoint(tmp_path, "last.pt", {"step": 1})
    with pytest.raises(TypeError):
        save_checkpoint(
            tmp_path, "last.pt", {"step": 2, "bad": (i for i in range(3))}
        )  # cannot be pickled
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"model": Evil()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "owned").exists()


def test_missing_and_misshapen_weights_are_named(trained):
    checkpoint = read_checkpoint(trained / "best.pt")
    del checkpoint["model"]["transformer.h.1.mlp.c_fc.bias"]
    with pytest.raises(ValueError, match="transformer.h.1.mlp.c_fc.bias"):
        build_model(checkpoint, "best.pt")
    checkpoint = read_checkpoint(trained / "best.pt")
    checkpoint["model_args"]["n_embd"] = 18
    with pytest.raises(ValueError, match="best.pt does not fit"):
        build_model(checkpoint, "best.pt")


def test_a_checkpoint_of_an_earlier_commit_is_read_and_saved_unchanged(tmp_path):
    """
    tests/data/last-1be6416.pt is the last.pt of a Muon run with early stopping and one bad step.

    It was made at commit 1be6416 on 60 training and 8 validation fables (data/fables60) with
    train_spoiled("nan", 7, 7, "fables60", "out-1be6416", "--arch=qwen3", "--n_kv_head=1",
    "--n_layer=1", "--n_embd=8", "--batch_size=8", "--optimizer=muon", "--learning_rate=1",
    "--min_lr=1", "--patience=2", "--max_iters=40", "--lr_decay_iters=40") of test_train.py.
    """
    old = read_checkpoint(HERE / "tests/data/last-1be6416.pt")
    model = GPT(GPTConfig(**old["model_args"]))
    optimizers = make_optimizers(model, "muon", 0.1, 1.0, (0.9, 0.99), "cpu")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = restore(old, model, optimizers, scaler, "cpu")
    assert (state.bad_steps.item(), state.bad_in_a_row.item(), state.stale) == (1, 0, 2)
    assert state.grad_norm_max.item() == 0
    new = {
        "model": model.state_dict(),
        "optimizer": [o.state_dict() for o in optimizers],
        "scaler": scaler.state_dict(),
        **state.to_dict(),
    }
    save_checkpoint(tmp_path, "last.pt", old | new)
    saved = read_checkpoint(tmp_path / "last.pt")
    for key in old.keys() - {"watch", "optimizer"}:
        assert_same(saved[key], old[key], key)
    # since then, the token embedding has a group of its own; in an old run it keeps its rate
    for was, now in zip(old["optimizer"], saved["optimizer"], strict=True):
        assert_same(now["state"], was["state"], "state")
        first, others = was["param_groups"][0], was["param_groups"][1:]
        if "betas" in first:  # AdamW
            table, *rest = first["params"]
            was["param_groups"] = [first | {"params": [table]}, first | {"params": rest}, *others]
        assert_same(now["param_groups"], was["param_groups"], "param_groups")
    set_lr(optimizers, 0.5)
    assert {group["lr"] for o in optimizers for group in o.param_groups} == {0.5}
    names = ("bad_in_a_row", "bad_steps", "grad_norm_max")
    assert [saved[name] for name in names] == old["watch"].tolist()
    config = GPTConfig(**old["model_args"])
    assert (config.n_kv_head, config.head_dim, config.n_inner, config.bias) == (1, 4, 64, False)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_loading_does_not_import_the_compiler(arch):
    code = f"""
import sys
from lib.checkpoint import model_from_weights
from model import GPT, GPTConfig
config = GPTConfig(arch="{arch}", n_layer=1, n_head=1, n_embd=8, vocab_size=50, block_size=8)
weights = GPT(config).state_dict()
loaded = model_from_weights(config, weights).state_dict()
assert all(loaded[name].equal(weight) for name, weight in weights.items())
assert "torch._dynamo" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_without_a_scaler_is_resumed_in_float16():
    """As on a GPU without bfloat16, after one that has it."""
    model = tiny()
    optimizers = make_optimizers(model, "adamw", 0.1, 1e-3, (0.9, 0.99), "cpu")
    enabled = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**10)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    checkpoint = {"model": model.state_dict(), "step": 3, "best_val_loss": 1.0,
                  "optimizer": [o.state_dict() for o in optimizers],
                  **RunState.start("cpu").to_dict()}
    restore(checkpoint | {"scaler": disabled.state_dict()}, model, optimizers, enabled, "cpu")
    assert enabled.get_scale() == 2.0**10
    restore(checkpoint | {"scaler": enabled.state_dict()}, model, optimizers, disabled, "cpu")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("damage", [
    lambda saved: saved.update(lr_scale="x"), lambda saved: saved.update(stale=[1]),
    lambda saved: saved.update(seconds=None), lambda saved: saved.update(optimizer=3),
    lambda saved: saved.update(seconds=10**400), lambda saved: saved.update(lr_scale=math.inf),
    lambda saved: saved["optimizer"][0]["state"][0].update(a=torch.zeros(1).expand(1 << 40)),
    lambda saved: saved["optimizer"][0]["param_groups"].__setitem__(0, "x"),
    lambda saved: saved["optimizer"][0]["param_groups"][0].update(lr="x"),
    lambda saved: saved["optimizer"][0]["param_groups"][0].update(weight_decay=None),
    lambda saved: saved["optimizer"][0]["param_groups"][0].update(params=7),
    lambda saved: [group.update(betas=(1, "x"), momentum="x")
                   for group in saved["optimizer"][-1]["param_groups"]],
    lambda saved: saved["optimizer"][0]["state"][0].update(momentum="x", exp_avg="x"),
    lambda saved: saved["optimizer"][0]["state"].__setitem__(0, torch.zeros(3))])
def test_wrong_types_in_what_is_resumed_are_named(damage, optimizer):
    model = tiny()
    optimizers = make_optimizers(model, optimizer, 0.1, 1e-3, (0.9, 0.95), "cpu")
    model(*torch.zeros(2, 1, 4, dtype=torch.long))[1].backward()
    for each in optimizers:
        each.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    saved = {"model": model.state_dict(), "optimizer": [o.state_dict() for o in optimizers],
             "scaler": {}, **RunState.start("cpu").to_dict()}
    restore(copy.deepcopy(saved), model, optimizers, scaler, "cpu")
    damage(saved)
    with pytest.raises(ValueError, match="the checkpoint of step 0 cannot be resumed"):
        restore(saved, model, optimizers, scaler, "cpu")


def test_a_best_loss_that_is_no_number_is_refused(tmp_path, trained):
    checkpoint = read_checkpoint(trained / "best.pt")
    for value in ("x", None, [1.0], 10**400):
        save_checkpoint(tmp_path, "best.pt", checkpoint | {"best_val_loss": value})
        with pytest.raises(ValueError, match="cannot read its contents"):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize("changes, says", [
    (dict(step=10**400), "cannot read its contents"),
    (dict(meta=dict(splits=5)), "cannot read its contents"),
    (dict(meta=dict(splits=dict(train=5))), "cannot read its contents"),
    (dict(meta=dict(tokenizer={})), "unknown tokenizer None"),
    (dict(meta=dict(tokenizer=dict(kind="gpt2", specials=5))), "control tokens are not a dict"),
    (dict(meta=dict(tokenizer=dict(kind="gpt2", specials={"a": 50256, "b": 60000}))),
     "an id without a token")])
def test_odd_values_are_one_line(tmp_path, trained, changes, says):
    checkpoint = read_checkpoint(trained / "best.pt")
    checkpoint |= changes | {"meta": checkpoint["meta"] | changes.get("meta", {})}
    save_checkpoint(tmp_path, "best.pt", checkpoint)
    with pytest.raises(ValueError, match=says):
        get_tokenizer(load_checkpoint(tmp_path)["meta"])


def test_a_model_without_weights_cannot_be_tuned(trained):
    checkpoint = read_checkpoint(trained / "best.pt") | {"model": {}}
    with pytest.raises(ValueError, match="it has no matrix transformer.wte.weight"):
        model_to_finetune(checkpoint, "out", checkpoint["meta"]["tokenizer"])


def test_a_model_with_a_damaged_tokenizer_cannot_be_tuned(trained):
    checkpoint = read_checkpoint(trained / "best.pt")
    for spec in ({}, {"kind": "char", "vocab": 5}, {"kind": "gpt2", "specials": 5}):
        damaged = checkpoint | {"meta": checkpoint["meta"] | {"tokenizer": spec}}
        with pytest.raises(ValueError, match="unknown tokenizer|no vocabulary|is damaged"):
            model_to_finetune(damaged, "out", checkpoint["meta"]["tokenizer"])


def test_adapters_that_do_not_fit_are_refused(tmp_path, trained):
    """The product of a column and a row could be of any size."""
    checkpoint = read_checkpoint(trained / "best.pt")
    name = "transformer.h.0.attn.c_attn"
    checkpoint["model"] |= {f"{name}.lora_a": torch.zeros(1, 50_000),
                            f"{name}.lora_b": torch.zeros(50_000, 1)}
    checkpoint["model"][f"{name}.weight"] = torch.zeros(1, 1)
    save_checkpoint(tmp_path, "best.pt", checkpoint)
    with pytest.raises(ValueError, match="adapter of .*c_attn.weight does not fit"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda meta: meta.update(deep=functools.reduce(lambda x, _: [x], range(5000), [])),
    lambda meta: meta.update(tensor=torch.zeros(3)), lambda meta: meta.update(chat_template=3),
    lambda meta: meta.update(itself=meta)])
def test_settings_that_are_not_plain_values_are_refused(tmp_path, trained, damage):
    checkpoint = read_checkpoint(trained / "best.pt")
    damage(checkpoint["meta"])
    with pytest.raises(ValueError, match="here is damaged: not all|here is not a checkpoint"):
        check_checkpoint(checkpoint, "here")
