"""Runs of train.py: resuming, ranks, accumulation, fine-tuning, bad steps, loggers."""

import contextlib
import hashlib
import json
import math
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from helpers import (
    HERE,
    TINY,
    assert_same,
    one_line_error,
    read_log,
    run,
    tiny,
    train,
    train_on_ranks,
)
from lib import runlog
from lib.checkpoint import load_model, read_checkpoint
from lib.configurator import read_config_file
from lib.console import duration
from lib.corpus import load_meta
from lib.dataset import TokenStream, TrainBatches, eval_batches
from lib.decoding import short_sample
from lib.loss import evaluate
from lib.runlog import StepTimer, sample_lines, step_line
from lib.tokenizer import get_tokenizer
from model import GPT, GPTConfig


@pytest.mark.parametrize(
    "how",
    [
        [],
        ["--batching=by_length"],
        ["--arch=qwen3", "--n_kv_head=1", "--optimizer=muon", "--softmax_tokens=128"],
    ],
)
def test_stopped_and_resumed_equals_undisturbed(tmp_path, fables_data, how):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(fables_data, whole, *how)
    train(fables_data, parts, *how, "--max_iters=3")
    resumed = train(fables_data, parts, *how, "--init_from=resume")
    assert "resuming" in resumed.stdout and "max_iters 3 -> 6" in resumed.stdout
    for name in ("last.pt", "best.pt"):
        a, b = read_checkpoint(whole / name), read_checkpoint(parts / name)
        for checkpoint in (a, b):
            del checkpoint["config"]["out_dir"], checkpoint["config"]["init_from"]
            checkpoint.pop("seconds", None)
        assert_same(a, b)
    assert a["step"] > 0 and read_log(whole) == read_log(parts)
    steps = [record["step"] for record in read_log(parts) if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("accumulation", [2, 4])
def test_two_ranks_equal_one(tmp_path, fables_data, accumulation):
    how = [f"--gradient_accumulation_steps={accumulation}", "--max_iters=50", "--eval_interval=25"]
    train(fables_data, tmp_path / "one", *how)
    train_on_ranks(2, fables_data, tmp_path / "two", *how)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert len(one) == len(two) == 53
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for key in a.keys() - {"step"}:
            assert b[key] == pytest.approx(
                a[key], rel=1e-6 if a["step"] <= 1 and "loss" in key else 1e-4
            ), (a["step"], key)


def test_accumulation_equals_a_larger_batch(tmp_path, fables_data):
    train(
        fables_data,
        tmp_path / "a",
        "--gradient_accumulation_steps=4",
        "--batch_size=2",
        "--dropout=0",
    )
    train(
        fables_data,
        tmp_path / "b",
        "--gradient_accumulation_steps=1",
        "--batch_size=8",
        "--dropout=0",
    )
    for a, b in zip(read_log(tmp_path / "a"), read_log(tmp_path / "b")):
        if "loss" in a:
            assert b == pytest.approx(a, rel=1e-4)


def test_accumulation_by_length_equals_a_larger_batch(tmp_path, fables_data):
    """Micro-batches weigh as many tokens as they have, also on two ranks and at an epoch's end."""
    how = ["--batching=by_length", "--dropout=0", "--max_iters=12"]
    for name, batch_size, accumulation in (("a", 28, 1), ("b", 14, 2), ("c", 7, 4)):
        size = [f"--batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}"]
        train(fables_data, tmp_path / name, *how, *size)
    train_on_ranks(2, fables_data, tmp_path / "d", *how, *size)
    whole = [record for record in read_log(tmp_path / "a") if "loss" in record]
    assert len(whole) == 12  # more than an epoch: its last step leaves a micro-batch empty
    for name in "bcd":
        parts = [record for record in read_log(tmp_path / name) if "loss" in record]
        for a, b in zip(whole, parts, strict=True):
            assert b == pytest.approx(a, rel=2e-4), (name, a["step"])


def test_first_step_is_what_torch_computes_by_hand(tmp_path, fables_data):
    """One step of AdamW on the mean gradient, clipped, at the first rate of the warmup."""
    train(
        fables_data,
        tmp_path / "out",
        "--dropout=0",
        "--max_iters=1",
        "--grad_clip=0.5",
        "--learning_rate=0.01",
    )
    meta = load_meta(fables_data)
    batches = TrainBatches(TokenStream(fables_data, "train", meta), 32, 4, 1337)
    torch.manual_seed(1337)
    model = GPT(
        GPTConfig(block_size=32, vocab_size=meta["vocab_size"], n_layer=2, n_head=2, n_embd=16)
    )
    x, y = (torch.cat(parts) for parts in zip(batches.batch(0), batches.batch(1)))
    loss = model(x, y)[1]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    decay, rest = (
        [p for p in model.parameters() if p.dim() >= 2],
        [p for p in model.parameters() if p.dim() < 2],
    )
    torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=0.01 / 2,
        betas=(0.9, 0.99),
    ).step()
    record = next(r for r in read_log(tmp_path / "out") if "loss" in r)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    trained = read_checkpoint(tmp_path / "out/last.pt")["model"]
    for name, weight in model.state_dict().items():
        assert torch.allclose(trained[name], weight, atol=2e-5), name


def test_loss_falls_on_a_known_corpus(tmp_path, fables_data):
    done = train(
        fables_data,
        tmp_path / "out",
        "--max_iters=60",
        "--lr_decay_iters=0",
        "--learning_rate=0.02",
        "--eval_interval=30",
        "--batching=by_length",
    )
    evaluations = [r for r in read_log(tmp_path / "out") if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [0, 30, 60]
    assert evaluations[2]["val_loss"] < evaluations[1]["val_loss"] < evaluations[0]["val_loss"] - 1
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"best     validation loss {evaluations[2]['val_loss']:.4f}, " in done.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_stays_close_to_float32(tmp_path, fables_data, trained, dtype):
    train(fables_data, tmp_path / "out", f"--dtype={dtype}")
    low, full = read_log(tmp_path / "out")[-1], read_log(trained)[-1]
    assert low["step"] == full["step"] == 6 and low["val_loss"] == pytest.approx(
        full["val_loss"], rel=0.01
    )
    assert (read_checkpoint(tmp_path / "out/last.pt")["scaler"].get("scale", 1) > 1) == (
        dtype == "float16"
    )


def test_deterministic_kernels_change_nothing_on_a_cpu(tmp_path, fables_data, trained):
    train(fables_data, tmp_path / "out", "--deterministic=True")
    assert_same(
        read_checkpoint(tmp_path / "out/last.pt")["model"],
        read_checkpoint(trained / "last.pt")["model"],
    )


def test_compiled_equals_eager(tmp_path, fables_data, trained):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    done = train(fables_data, tmp_path / "out", "--compile=True", "--dropout=0", "--loss_chunk=48")
    train(fables_data, tmp_path / "eager", "--dropout=0")
    assert ", compiled\n" in done.stdout
    assert read_log(tmp_path / "out")[-1] == pytest.approx(
        read_log(tmp_path / "eager")[-1], rel=1e-4
    )


def test_without_a_compiler_training_goes_on(tmp_path, fables_data, trained):
    done = train(
        fables_data,
        tmp_path / "out",
        "--compile=True",
        CXX="no-such-compiler",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "c"),
    )
    assert done.stdout.count("torch.compile does not work here") == 1 and ", eager\n" in done.stdout
    assert read_log(tmp_path / "out") == read_log(trained)


def test_existing_runs_are_safe(tmp_path, fables_data, trained):
    out = tmp_path / "out"
    shutil.copytree(trained, out)

    def contents():
        return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "lock"}

    before = contents()

    def again(*args):
        return run("train.py", f"--dataset={fables_data}", f"--out_dir={out}", *TINY_AGAIN, *args)

    saved = read_checkpoint(out / "last.pt")["config"]
    TINY_AGAIN = [f"--{k}={v}" for k, v in saved.items() if k not in ("out_dir", "dataset")]
    refused = again()
    assert refused.returncode == 2 and "already holds a run" in refused.stderr
    for how in (
        ["--init_from=auto"],
        ["--eval_only=True"],
        ["--init_from=resume", "--eval_only=True"],
    ):
        done = again(*how)
        assert done.returncode == 0
        assert ("| val " in done.stdout) == ("--eval_only=True" in how)
    wrong = again("--init_from=resume", "--n_layer=3")
    assert wrong.returncode == 2 and "n_layer=2" in wrong.stderr
    assert contents() == before
    assert again("--overwrite=True", "--max_iters=3").returncode == 0
    assert read_checkpoint(out / "last.pt")["step"] == 3


def test_a_finished_run_continues_only_with_a_larger_limit(tmp_path, fables_data):
    """At the rate that the new schedule has at this step, which it prints."""
    out, how = tmp_path / "out", ["--lr_decay_iters=0", "--warmup_iters=0", "--init_from=auto"]
    train(fables_data, out, *how)
    before = {path.name: path.read_bytes() for path in out.glob("*.pt")}
    for limit in ("--max_iters=6", "--max_iters=4"):
        done = train(fables_data, out, *how, limit)
        assert "nothing to train: the run in" in done.stdout and "at step 6" in done.stdout
        assert {path.name: path.read_bytes() for path in out.glob("*.pt")} == before
    done = train(fables_data, out, *how, "--max_iters=12")
    halfway = (1e-3 + 1e-4) / 2  # of a cosine from learning_rate to min_lr
    assert f"at step 6, learning rate {halfway:.2e}" in done.stdout
    rates = {r["step"]: r["lr"] for r in read_log(out) if "lr" in r}
    assert rates[7] == pytest.approx(halfway) and rates[12] < 2e-4 and len(rates) == 12


@pytest.mark.parametrize("with_meta", [True, False])
def test_a_resume_on_other_data_is_refused(tmp_path, fables_data, with_meta):
    """Also for data without meta.json, whose checksums the checkpoint has, not the folder."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(fables_data, data)
    how = [f"--dataset={data}", f"--out_dir={out}", *TINY]
    if not with_meta:  # as nanoGPT prepares data
        (data / "meta.json").unlink()
    train(data, out, "--max_iters=3")
    resumed = run("train.py", *how, "--init_from=resume", "--max_iters=4")
    assert resumed.returncode == 0, resumed.stderr
    raw = (data / "train.bin").read_bytes()
    (data / "train.bin").write_bytes(raw[2:] + raw[:2])  # another text of the same length
    if with_meta:
        meta = json.loads((data / "meta.json").read_text())
        meta["splits"]["train"]["sha256"] = hashlib.sha256(raw[2:] + raw[:2]).hexdigest()
        (data / "meta.json").write_text(json.dumps(meta))
    before = (out / "last.pt").read_bytes()
    error = one_line_error(run("train.py", *how, "--init_from=resume"))
    assert "the train split of" in error and f"--init_from={out}" in error
    assert (out / "last.pt").read_bytes() == before
    train(data, tmp_path / "new", f"--init_from={out}", "--max_iters=1")  # as it says


def test_a_resume_takes_the_shape_of_the_run(tmp_path, fables_data):
    """Sizes of the model that are not given come from the run; those that are must agree."""
    out = tmp_path / "out"
    train(fables_data, out, "--max_iters=3")
    shape = ("--n_layer", "--n_head", "--n_embd", "--block_size", "--dropout", "--max_iters")
    how = [f"--dataset={fables_data}", f"--out_dir={out}", "--init_from=resume", "--max_iters=4",
           *(arg for arg in TINY if not arg.startswith(shape))]
    done = run("train.py", *how)
    assert done.returncode == 0 and "max_iters 3 -> 4" in done.stdout, done.stderr
    assert "n_layer" not in done.stdout and "block_size" not in done.stdout
    last = read_checkpoint(out / "last.pt")
    assert last["step"] == 4 and last["config"]["block_size"] == 32
    assert "has block_size=32" in one_line_error(run("train.py", *how, "--block_size=16"))


def test_a_run_by_length_of_an_earlier_version_says_that_its_order_changed(tmp_path, fables_data):
    out, note = tmp_path / "out", "batch order by length has changed"
    train(fables_data, out, "--batching=by_length", "--max_iters=3")
    again = ["--init_from=resume", "--batching=by_length"]
    assert note not in train(fables_data, out, *again, "--max_iters=4").stdout
    for accumulation, said in (("2", 1), ("1", 0)):
        last = read_checkpoint(out / "last.pt")
        del last["evaluated_at"]
        torch.save(last, out / "last.pt")
        size = f"--gradient_accumulation_steps={accumulation}"
        done = train(fables_data, out, *again, size, f"--max_iters={last['step'] + 1}")
        assert done.stdout.count(note) == said


def test_nothing_to_resume(tmp_path, fables_data):
    done = run(
        "train.py", f"--dataset={fables_data}", f"--out_dir={tmp_path}/none", "--init_from=resume"
    )
    assert (
        done.returncode == 2
        and "nothing to resume" in done.stderr
        and not (tmp_path / "none").exists()
    )
    train(fables_data, tmp_path / "none", "--init_from=auto", "--max_iters=1")


# -----------------------------------------------------------------------------
# Epochs, fine-tuning, presets


@pytest.mark.parametrize("batching", ["windows", "by_length"])
def test_epochs_are_passes_over_the_data(tmp_path, fables_data, batching):
    done = train(
        fables_data,
        tmp_path / "out",
        "--max_epochs=1.5",
        "--max_iters=1000",
        f"--batching={batching}",
        "--eval_interval=999",
        "--log_interval=99",
        "--batch_size=16",
        "--lr_decay_iters=0",
    )
    stream = TokenStream(fables_data, "train", load_meta(fables_data))
    steps = read_checkpoint(tmp_path / "out/last.pt")["step"]
    if batching == "by_length":  # each epoch has steps of its own
        assert steps == math.ceil(1.5 * math.ceil(len(stream.document_spans(0, 32)) / 32)) > 10
    else:
        assert steps == math.ceil(1.5 * ((len(stream) - 32) // 32) / 32) > 10
    assert ("\npadding  " in done.stdout) == (batching == "by_length")


def test_training_goes_on_from_another_model(openai_folder, gpt2_data, tmp_path):
    """From a Hugging Face folder with a shorter context, then from that run."""
    first, second = tmp_path / "first", tmp_path / "second"
    train(gpt2_data, first, f"--init_from={openai_folder}", "--n_layer=7", "--learning_rate=0.01")
    state = read_checkpoint(first / "last.pt")
    assert (
        state["model_args"]["n_layer"] == state["config"]["n_layer"] == 2
        and state["model_args"]["block_size"] == 32
    )
    from_theirs = load_model(openai_folder, "cpu")[0].state_dict()
    assert not state["model"]["transformer.wte.weight"].equal(from_theirs["transformer.wte.weight"])
    train(gpt2_data, second, f"--init_from={first}", "--max_iters=0")
    assert_same(
        read_checkpoint(second / "last.pt")["model"], read_checkpoint(first / "best.pt")["model"]
    )
    assert read_log(second)[0]["val_loss"] == min(
        r["val_loss"] for r in read_log(first) if "val_loss" in r
    )
    train(
        gpt2_data, first, "--init_from=resume", "--max_iters=8"
    )  # with what no setting says: a padded vocabulary, its GELU
    args = read_checkpoint(first / "last.pt")["model_args"]
    assert read_checkpoint(first / "last.pt")["step"] == 8 and (
        args["vocab_size"],
        args["gelu"],
    ) == (50304, "none")


def test_what_cannot_be_tuned_is_one_line(openai_folder, gpt2_data, fables_data, trained, tmp_path):
    assert run("export.py", f"--out_dir={trained}", "--format=int8").returncode == 0
    for data, args, says in (
        (fables_data, [f"--init_from={openai_folder}"], "another tokenizer"),
        (gpt2_data, [f"--init_from={openai_folder}", "--block_size=65"], "more than the 64"),
        (fables_data, [f"--init_from={trained}-int8"], "is in int8"),
        (fables_data, [f"--init_from={tmp_path}"], "no checkpoint"),
        (fables_data, ["--init_from=gpt3"], "init_from must be"),
    ):
        done = run("train.py", f"--dataset={data}", f"--out_dir={tmp_path}/out", *TINY, *args)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )
        assert not list(tmp_path.glob("out/*.pt"))
    done = run(
        "train.py",
        f"--dataset={gpt2_data}",
        f"--out_dir={tmp_path}/out",
        *TINY,
        "--init_from=gpt2",
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="1",
    )
    assert (
        done.returncode == 2
        and "cannot be reached" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr


def test_what_is_not_set_comes_from_the_tuned_model(tmp_path, fables_data, trained):
    """A model with a shorter context than the default block_size can be tuned."""
    shape = ("--block_size", "--dropout")
    how = [arg for arg in TINY if not arg.startswith(shape)]
    done = run("train.py", f"--dataset={fables_data}", f"--out_dir={tmp_path}/out",
               f"--init_from={trained}", *how)
    assert done.returncode == 0, done.stderr
    args = read_checkpoint(tmp_path / "out/last.pt")["model_args"]
    assert (args["block_size"], args["dropout"]) == (32, 0.1)
    done = run("train.py", f"--dataset={fables_data}", f"--out_dir={tmp_path}/cut",
               f"--init_from={trained}", *how, "--block_size=16", "--dropout=0.2")
    args = read_checkpoint(tmp_path / "cut/last.pt")["model_args"]
    assert (args["block_size"], args["dropout"]) == (16, 0.2)


SHRUNK = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_iters": 20,
    "warmup_iters": 2,
    "eval_interval": 10,
    "eval_iters": 1,
    "log_interval": 10,
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (HERE / "config").glob("*.py")))
def test_every_config_trains(name, tmp_path, fables_data, gpt2_data, openai_folder):
    """Twenty steps of each, all but its sizes as it says."""
    said = read_config_file(f"config/{name}.py")
    args = [f"--{key}={value}" for key, value in SHRUNK.items()]
    if said.get("max_epochs"):
        data = TokenStream(gpt2_data, "train", load_meta(gpt2_data))
        rows = (
            len(data.document_spans(50256, 32))
            if said.get("batching") == "by_length"
            else (len(data) - 32) // 32
        )
        args.append(f"--max_epochs={20 * 4 / rows - 1e-6}")
    if name.startswith("finetune"):
        args.append(f"--init_from={openai_folder}")
    of_words = said.get("dataset", "tinystories") in (
        "fables",
        "shakespeare_char",
        "shakespeare_word",
    )
    configs = ["config/train_nano.py"] * (name == "tuned") + [f"config/{name}.py"]
    done = run(
        "train.py",
        *configs,
        f"--dataset={fables_data if of_words else gpt2_data}",
        f"--out_dir={tmp_path}/out",
        *args,
        "--compile=False",
        "--device=cpu",
        "--dtype=float32",
    )
    assert done.returncode == 0, done.stderr
    losses = [record["val_loss"] for record in read_log(tmp_path / "out") if "val_loss" in record]
    assert read_checkpoint(tmp_path / "out/best.pt")["step"] > 0 and min(losses) < losses[0]
    assert "done     step 20" in done.stdout or said.get("patience")


# -----------------------------------------------------------------------------
# What it reports


def test_the_training_split_is_evaluated_on_no_more_batches_than_the_validation_split(
        tmp_path, fables_data):
    train(fables_data, tmp_path / "out", "--eval_iters=0", "--max_iters=1")
    record = read_log(tmp_path / "out")[-1]
    model = load_model(tmp_path / "out", "cpu")[0]
    streams = {split: TokenStream(fables_data, split, load_meta(fables_data)) for split in
               ("train", "val")}
    n = math.ceil((len(streams["val"]) - 1) / 32 / 4)
    assert n < (len(streams["train"]) - 1) / 32 / 4 / 5
    for split, stream in streams.items():
        nats, tokens = evaluate(model, eval_batches(stream, 32, 4, max_batches=n),
                                contextlib.nullcontext())
        assert record[f"{split}_loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_mfu_counts_the_length_of_the_rows_and_is_at_most_1(tmp_path, fables_data):
    """Rows shorter than block_size have less attention; no measured peak is below the run."""
    low = ("import runpy, sys, os; sys.path.insert(0, os.getcwd()); sys.argv = sys.argv[1:]\n"
           "from lib import machine\n"
           "machine.peak_flops = lambda *_: (float(os.environ['PEAK']), 'test')\n"
           "runpy.run_path(sys.argv[0], run_name='__main__')")
    how = ["train.py", f"--dataset={fables_data}", *TINY, "--batching=by_length",
           "--block_size=4096", "--max_iters=3"]
    mfu = []
    for peak in ("1e15", "1"):
        done = run("-c", low, *how, f"--out_dir={tmp_path}/{peak}", PEAK=peak)
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in open(tmp_path / peak / "log.jsonl")]
        mfu.append([record for record in records if "mfu" in record])
    model = GPT(GPTConfig(**read_checkpoint(tmp_path / "1e15/last.pt")["model_args"]))
    stream = TokenStream(fables_data, "train", load_meta(fables_data))
    batches = TrainBatches(stream, 4096, 4, 1337, "by_length", 0, 2)
    for step, record in enumerate(mfu[0]):
        rows = [batches.batch(2 * step + i)[0] for i in range(2)]
        flops = sum(x.numel() * model.flops_per_token(x.size(1)) for x in rows)
        tokens = sum(x.numel() for x in rows)
        expected = record["tokens_per_second"] * flops / tokens / 1e15
        assert record["mfu"] == pytest.approx(expected, rel=1e-6)
    assert mfu[1][0]["mfu"] == 1.0 and all(record["mfu"] <= 1 for record in mfu[1])


def test_speed_after_a_resume_is_of_the_steps_since(tmp_path, fables_data):
    """The first log line after a resume may be of fewer steps than log_interval."""
    train(fables_data, tmp_path / "out", "--max_iters=3")
    train(fables_data, tmp_path / "out", "--init_from=resume", "--log_interval=4")
    records = [json.loads(line) for line in open(tmp_path / "out/log.jsonl")]
    ms, speed = next((r["ms"], r["tokens_per_second"]) for r in records if r["step"] == 4)
    assert ms / 1000 * speed == pytest.approx(2 * 4 * 32)


def test_a_split_of_one_token_is_one_line(tmp_path, fables_data):
    shutil.copytree(fables_data, tmp_path / "data")
    (tmp_path / "data/meta.json").unlink()
    (tmp_path / "data/val.bin").write_bytes(b"\0\0")
    done = run("train.py", f"--dataset={tmp_path}/data", f"--out_dir={tmp_path}/out", *TINY)
    assert "nothing to predict" in one_line_error(done)


def test_printed_lines_are_aligned_and_say_what_the_log_says(tmp_path, fables_data):
    done = train(fables_data, tmp_path / "out", "--max_iters=12")
    lines = done.stdout.splitlines()
    assert done.stderr == "" and max(len(line) for line in lines if " | " in line) <= 100
    records = [json.loads(line) for line in open(tmp_path / "out/log.jsonl")]
    steps = [line for line in lines if line.startswith("step")]
    assert [[i for i, c in enumerate(line) if c == "|"] for line in steps] == [
        [11, 25, 38, 50, 66, 78]] * 12
    for line, record in zip(steps, (r for r in records if "loss" in r), strict=True):
        assert line.startswith(
            f"step {record['step']:>2}/12 | loss {record['loss']:.4f} | lr {record['lr']:.1e} | "
            f"norm {record['grad_norm']:.2f} | {record['tokens_per_second']:>7,.0f} tok/s | "
            f"mfu {record['mfu']:5.1%} | ")
    assert all(re.search(r"\| +\d+s left$", line) for line in steps)
    assert steps[-1].endswith("|      0s left")
    evals = [line for line in lines if line.startswith("eval")]
    best = math.inf
    for line, record in zip(evals, (r for r in records if "val_loss" in r), strict=True):
        note = "new best" if record["val_loss"] < best else f"best {best:.4f}"
        assert line == (f"eval {record['step']:>2}/12 | train {record['train_loss']:.4f} | "
                        f"val {record['val_loss']:.4f} | {note}")
        best = min(best, record["val_loss"])
    assert re.fullmatch(r"done     step 12, \d+s, \d+\.\d GB peak memory", lines[-5])
    assert lines[-4:] == [
        f"best     validation loss {best:.4f}, {tmp_path}/out/best.pt",
        f"curve    {tmp_path}/out/loss.png",
        f"next     python eval.py --out_dir={tmp_path}/out",
        f"         python sample.py --out_dir={tmp_path}/out"]


def test_the_widest_lines_fit_100_columns():
    widest = step_line(100_000, 600_000, 1.5, 1e-3, 0.25, 234_567, 0.412, 99_999, False)
    assert len(widest) <= 100 and widest.endswith("1d 03h left")
    without_limit = step_line(5, math.inf, 1.5, 1e-3, 0.25, 999, 0.5, math.inf, False)
    assert without_limit == ("step      5 | loss 1.5000 | lr 1.0e-03 | norm 0.25 |     999 tok/s"
                             " | mfu 50.0%")
    assert step_line(5, 9, 1.5, 1e-3, 0.25, 999, 0.5, 7, True).endswith("| mfu 50.0% | spike")
    assert sample_lines(5, 2000, "One\n\n  two\t\x1b[31mthree\n") == (
        "sample         | One two [31mthree")
    assert sample_lines(5, 9, " \n") == "sample   | (empty)"
    for text in ("a word " * 50, "x" * 500):
        first, second = sample_lines(5, 2000, text).splitlines()
        assert 80 < len(first) <= 100 and len(second) <= 100 and second.endswith("...")
        assert first.index("|") == second.index("|") == step_line(
            5, 2000, 1.5, 1e-3, 0.25, 999, 0.5, 7, False).index("|")


@pytest.mark.parametrize("seconds, text", [
    (0.9, "0s"), (59.9, "59s"), (60, "1m 00s"), (3599, "59m 59s"), (3600, "1h 00m"),
    (86399, "23h 59m"), (90_000, "1d 01h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_time_left_is_that_of_the_steps_and_evaluations_since_the_resume(monkeypatch):
    """Steps of 2 seconds; an evaluation of 30 seconds every 100 steps. Resumed at step 500."""
    clock = [1000.0]
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: clock[0])
    timer = StepTimer(500, seconds=7000.0, device="cpu")
    for step in range(500, 1000):
        if step % 100 == 0 and step > 500:  # the one of step 500 was made before the resume
            with timer.evaluation():
                clock[0] += 30.0
        timer.count(64, 10)
        clock[0] += 2.0
        if (step + 1) % 10 == 0:
            assert timer.end_lap(step + 1) == pytest.approx((2000, 32, 5))
            # evaluations at step + 1, if it is due, at each multiple of 100 below 1000, and at 1000
            due = sum(n % 100 == 0 for n in range(step + 1, 1000)) + 1
            known = 30 if step > 600 else 0
            left = timer.seconds_left(step + 1, 1000, 100, 0)
            assert left == pytest.approx((1000 - step - 1) * 2.0 + due * known)
            timer.start_lap(step + 1)
    assert timer.seconds == 7000 + 1000 + 4 * 30
    assert timer.seconds_left(700, 1000, 100, 8200) == 80  # the nearer limit
    assert timer.seconds_left(700, math.inf, 100, 8000) == 0
    timer.start_lap(640)  # bad steps led back
    clock[0] += 20
    assert timer.end_lap(650)[0] == 2000
    rare = StepTimer(0, seconds=0.0, device="cpu")
    with rare.evaluation():
        clock[0] += 200.0
    clock[0] += 2.0
    rare.end_lap(1)
    assert rare.seconds_left(490, 500, 100_000, 0) == 10 * 2 + 200  # only the last evaluation


# -----------------------------------------------------------------------------
# Samples


def samples_of(output: str) -> list[str]:
    """Each evaluation's step with the lines of its sample."""
    return re.findall(r"^(eval +\d+/\d+) \|.*\n(sample +\|.*\n(?: +\|.*\n)?)", output, re.M)


def test_samples_change_nothing(tmp_path, fables_data):
    """The run is the same to the last bit without them, and a resumed run prints the same ones."""
    how = ["--max_iters=9", "--always_save_checkpoint=True"]
    whole = train(fables_data, tmp_path / "whole", *how)
    none = train(fables_data, tmp_path / "none", *how, "--sample_every_eval=False")
    parts = [train(fables_data, tmp_path / "parts", *how, f"--max_iters={n}", "--init_from=auto")
             for n in (3, 9)]
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "none") == read_log(
        tmp_path / "parts")
    a, b, c = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "none", "parts"))
    for checkpoint in (a, b, c):
        del checkpoint["config"], checkpoint["seconds"]
    assert_same(a, b)
    assert_same(a, c)
    assert "sample " not in none.stdout and len(samples_of(whole.stdout)) == 4
    resumed = samples_of(parts[0].stdout.replace("/3 ", "/9 ")) + samples_of(parts[1].stdout)
    assert resumed == samples_of(whole.stdout)


def test_a_sample_is_text_of_the_model(fables_data):
    """With probability 1 for one token, and from what follows the end of a text."""
    meta = load_meta(fables_data)
    tokenizer = get_tokenizer(meta)
    model = tiny(vocab_size=meta["vocab_size"])
    seen = []
    model.lm_head.forward = lambda x: torch.zeros(1, 1, meta["vocab_size"]).index_fill(
        2, torch.tensor([seen.append(model.training) or 20]), 1000.0)[:, 0]
    model.train()
    state = torch.get_rng_state()
    text = short_sample(model, tokenizer, 1)
    assert text == tokenizer.decode([20] * len(seen)) and 200 <= len(text) < 220
    assert torch.get_rng_state().equal(state)
    assert model.training and not any(seen)
    model = tiny(vocab_size=meta["vocab_size"])
    assert short_sample(model, tokenizer, 1) == short_sample(model, tokenizer, 1)
    assert short_sample(model, tokenizer, 1) != short_sample(model, tokenizer, 2)


def test_a_tokenizer_that_does_not_work_ends_no_run(tmp_path, fables_data):
    shutil.copytree(fables_data, tmp_path / "data")
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    meta["tokenizer"]["vocab"] = list(range(meta["vocab_size"]))
    (tmp_path / "data/meta.json").write_text(json.dumps(meta))
    done = train(tmp_path / "data", tmp_path / "out")
    assert done.stdout.count("no samples of the model: the ") == 1 and not samples_of(done.stdout)
    # ids that the tokenizer does not have
    tokenizer = get_tokenizer({"tokenizer": {"kind": "char", "vocab": ["a"]}})
    assert "is not in the vocabulary)" in short_sample(tiny(), tokenizer, 1)


@pytest.mark.parametrize("characters", [True, False])
def test_samples_of_data_that_nanogpt_prepared(tmp_path, gpt2_data, characters):
    data = tmp_path / "data"
    data.mkdir()
    if characters:  # no end of text, and characters that the terminal does not have
        text = torch.randint(4, (2000,), dtype=torch.uint16, generator=torch.Generator())
        for split in ("train", "val"):
            text.numpy().tofile(data / f"{split}.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate("\n\u4e2d\u00e9z"))}))
    else:
        for split in ("train", "val"):
            shutil.copy(gpt2_data / f"{split}.bin", data)
    done = run("-c", "import sys, runpy, os; sys.path.insert(0, os.getcwd())\n"
               "sys.stdout.reconfigure(encoding='ascii'); sys.argv = sys.argv[1:]\n"
               "runpy.run_path(sys.argv[0], run_name='__main__')",
               "train.py", f"--dataset={data}", f"--out_dir={tmp_path}/out", *TINY)
    assert done.returncode == 0 and len(samples_of(done.stdout)) == 3, done.stderr
    if characters:
        assert re.search(r"^sample +\| [?z ]+$", done.stdout, re.M)


# -----------------------------------------------------------------------------
# Numbered checkpoints


def test_numbered_checkpoints(tmp_path, fables_data, trained):
    """Every second step, the same ones after a resume; sample.py and init_from take them."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    how = ["--keep_every=2", "--sample_every_eval=False"]
    train(fables_data, whole, *how)
    for n in (1, 2, 5, 6):
        train(fables_data, parts, *how, f"--max_iters={n}", "--init_from=auto")
    names = ["step_000002.pt", "step_000004.pt", "step_000006.pt"]
    best = read_checkpoint(whole / "best.pt")
    for i, name in enumerate(names):
        a, b = read_checkpoint(whole / name), read_checkpoint(parts / name)
        assert a.keys() == best.keys() and a["step"] == 2 * (i + 1)
        assert_same(a["model"], b["model"])
    for folder in (whole, parts):
        assert sorted(path.name for path in folder.glob("step*")) == names
    assert_same(a["model"], read_checkpoint(whole / "last.pt")["model"])
    train(fables_data, tmp_path / "hand", "--max_iters=4")
    four = read_checkpoint(tmp_path / "hand/last.pt")["model"]
    assert_same(read_checkpoint(whole / names[1])["model"], four)
    train(fables_data, tmp_path / "tuned", f"--init_from={whole / names[1]}", "--max_iters=0")
    assert_same(read_checkpoint(tmp_path / "tuned/last.pt")["model"], four)
    done = run("sample.py", f"--out_dir={whole / names[1]}", "--num_samples=1")
    assert done.returncode == 0, done.stderr
    # a run that replaces this one has only its own
    train(fables_data, whole, "--keep_every=5", "--overwrite=True")
    assert sorted(path.name for path in whole.glob("step*")) == ["step_000005.pt"]
    assert not list(trained.glob("step*"))
    error = one_line_error(run("train.py", f"--dataset={fables_data}", *TINY,
                               f"--out_dir={tmp_path}/new", f"--init_from={whole / names[1]}"))
    assert f"there is no file {whole / names[1]}: {whole} has best.pt, last.pt, prev.pt" in error


# -----------------------------------------------------------------------------
# When it goes wrong

# runs a script in which a function has no memory left
NO_MEMORY = """
import os, runpy, sys, torch
sys.path.insert(0, os.getcwd())
import lib.loss, lib.optim, model
def fail(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")
exec(f"{sys.argv[1]} = fail")
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "function", ["model.GPT.__init__", "model.GPT.forward", "lib.optim.step", "lib.loss.evaluate"]
)
def test_out_of_memory_anywhere_is_one_line(tmp_path, fables_data, function):
    data, out_dir = f"--dataset={fables_data}", f"--out_dir={tmp_path}/out"
    done = run("-c", NO_MEMORY, function, "train.py", data, out_dir, *TINY)
    assert "out of memory: halve --batch_size" in one_line_error(done)


def test_switches_of_torch_follow_the_settings(tmp_path, fables_data):
    code = """
import atexit, os, runpy, sys, torch
sys.path.insert(0, os.getcwd())
atexit.register(lambda: print("at the end", torch.are_deterministic_algorithms_enabled(),
                              torch.backends.cuda.cudnn_sdp_enabled()))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    for args, expected in (
        ([], "False True"),
        (["--deterministic=True", "--batching=by_length", "--overwrite=True"], "True False"),
    ):
        data, out_dir = f"--dataset={fables_data}", f"--out_dir={tmp_path}/out"
        done = run("-c", code, "train.py", data, out_dir, *TINY, *args)
        assert f"at the end {expected}\n" in done.stdout, done.stderr


# runs a script in which the training loss is multiplied by a factor at the given calls
LOSS_TIMES = """
import os, runpy, sys, torch
factor, first, last = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sys.argv = sys.argv[4:]
sys.path.insert(0, os.getcwd())
real, calls = torch.nn.functional.cross_entropy, 0
def spoiled(*args, **kwargs):
    global calls
    calls += torch.is_grad_enabled()
    loss = real(*args, **kwargs)
    return loss * factor if torch.is_grad_enabled() and first <= calls <= last else loss
torch.nn.functional.cross_entropy = spoiled
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train_spoiled(
    factor: str, first: int, last: int, data: Path, out_dir: Path, *args: str
) -> subprocess.CompletedProcess:
    """Run with the loss of micro-batches first to last (from 1, two a step) times factor."""
    return run(
        "-c",
        LOSS_TIMES,
        factor,
        str(first),
        str(last),
        "train.py",
        f"--dataset={data}",
        f"--out_dir={out_dir}",
        *TINY,
        *args,
    )


@pytest.mark.parametrize("factor", ["nan", "inf"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, fables_data, factor):
    how = ["--optimizer=muon"]  # and AdamW for the rest
    train(fables_data, tmp_path / "two", *how, "--max_iters=2")
    done = train_spoiled(
        factor, 5, 5, fables_data, tmp_path / "three", *how, "--max_iters=3"
    )  # half of the third step
    assert done.returncode == 0, done.stderr
    two, three = (
        read_checkpoint(tmp_path / "two/last.pt"),
        read_checkpoint(tmp_path / "three/last.pt"),
    )
    assert_same(two["model"], three["model"])
    for a, b in zip(two["optimizer"], three["optimizer"]):
        assert_same(a["state"], b["state"])
    records = [r for r in read_log(tmp_path / "three") if "loss" in r]
    assert [r["bad_steps"] for r in records] == [0, 0, 1] and records[2]["loss"] is None


def test_many_bad_steps_lead_back_with_half_the_rate(tmp_path, fables_data):
    how = ["--eval_interval=4", "--max_iters=9"]
    done = train_spoiled(
        "nan", 11, 16, fables_data, tmp_path / "out", *how, "--max_bad_steps=3"
    )  # steps 6, 7 and 8
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("returned to step 4, continuing with 0.5 times the learning rate") == 1
    train(fables_data, tmp_path / "hand", *how, "--max_iters=4")
    train(
        fables_data,
        tmp_path / "hand",
        *how,
        "--init_from=resume",
        "--learning_rate=5e-4",
        "--min_lr=5e-5",
    )
    a, b = read_checkpoint(tmp_path / "out/last.pt"), read_checkpoint(tmp_path / "hand/last.pt")
    assert_same(a["model"], b["model"])
    assert [r["step"] for r in read_log(tmp_path / "out")] == [
        r["step"] for r in read_log(tmp_path / "hand")
    ]


def test_hopeless_runs_end_and_keep_the_last_good_checkpoint(tmp_path, fables_data):
    done = train_spoiled(
        "nan", 9, 10**9, fables_data, tmp_path / "out", "--max_bad_steps=2", "--max_iters=9"
    )
    assert done.returncode == 2 and "not finite" in done.stderr and "Traceback" not in done.stderr
    assert read_checkpoint(tmp_path / "out/last.pt")["step"] == 3
    assert all(
        p.isfinite().all() for p in read_checkpoint(tmp_path / "out/last.pt")["model"].values()
    )


def test_a_nan_validation_loss_does_not_replace_the_last_checkpoint(tmp_path, fables_data):
    """Or bad steps would return to a model that has already diverged."""
    script = LOSS_TIMES.replace("torch.is_grad_enabled()", "(not torch.is_grad_enabled())")
    done = run("-c", script, "nan", "5", "8", "train.py", f"--dataset={fables_data}",
               f"--out_dir={tmp_path}/out", *TINY)  # the second of three evaluations
    assert done.returncode == 0 and "eval 3/6 | train nan | val nan | best " in done.stdout
    steps = {path.name: read_checkpoint(path)["step"] for path in (tmp_path / "out").glob("*.pt")}
    assert steps == {"last.pt": 6, "prev.pt": 0, "best.pt": 6}


def test_spikes_are_in_the_log(tmp_path, fables_data):
    done = train_spoiled(
        "3", 31, 32, fables_data, tmp_path / "out", "--max_iters=20", "--eval_interval=20"
    )
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in read_log(tmp_path / "out") if r.get("spike")] == [16]
    assert "\nstep 16/20 | " in done.stdout and done.stdout.count(" | spike\n") == 1


def test_patience_ends_a_run_that_no_longer_learns(tmp_path, fables_data):
    done = train(
        fables_data,
        tmp_path / "out",
        "--max_iters=60",
        "--learning_rate=0",
        "--min_lr=0",
        "--patience=2",
    )
    assert "no lower validation loss in 2 evaluations" in done.stdout
    assert [r["step"] for r in read_log(tmp_path / "out") if "val_loss" in r] == [0, 3, 6]
    assert (
        read_checkpoint(tmp_path / "out/best.pt")["step"] == 0
        and read_checkpoint(tmp_path / "out/last.pt")["step"] == 6
    )


def test_a_budget_of_minutes_ends_the_schedule_too(tmp_path, fables_data):
    done = train(
        fables_data,
        tmp_path / "out",
        "--max_iters=100000",
        "--lr_decay_iters=0",
        "--max_minutes=0.1",
        "--eval_interval=100000",
    )
    assert "time limit reached" in done.stdout
    records = [r for r in read_log(tmp_path / "out") if "loss" in r]
    rates = [r["lr"] for r in records[2:]]
    assert rates == sorted(rates, reverse=True) and rates[0] > 2 * rates[-1] and rates[-1] < 2e-4
    assert records[-1]["step"] == read_checkpoint(tmp_path / "out/last.pt")["step"] > 5


# -----------------------------------------------------------------------------
# Data that is not what it should be, and ranks that differ


def test_damaged_data_is_refused_before_the_first_step(tmp_path, fables_data):
    def refused(change) -> str:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(fables_data, tmp_path / "data")
        change(tmp_path / "data")
        done = run("train.py", f"--dataset={tmp_path}/data", f"--out_dir={tmp_path}/out", *TINY)
        assert (
            done.returncode == 2
            and len(done.stderr.strip().splitlines()) == 1
            and not (tmp_path / "out").exists()
        )
        return done.stderr

    def set_first(folder, value, sign=False):
        raw = bytearray((folder / "train.bin").read_bytes())
        raw[:2] = value.to_bytes(2, "little")
        (folder / "train.bin").write_bytes(raw)
        if sign:
            meta = json.loads((folder / "meta.json").read_text())
            meta["splits"]["train"]["sha256"] = hashlib.sha256(raw).hexdigest()
            (folder / "meta.json").write_text(json.dumps(meta))

    assert "SHA-256" in refused(lambda folder: set_first(folder, 1))
    assert "token id 65535" in refused(lambda folder: set_first(folder, 65535, sign=True))
    assert "bytes" in refused(lambda folder: (folder / "val.bin").write_bytes(b"123"))
    assert "tokens" in refused(lambda folder: (folder / "train.bin").write_bytes(b"12" * 20))


def test_ranks_that_cannot_work_together_leave_with_one_line(tmp_path, fables_data):
    def refused(*args: str, script: str = "train.py") -> str:
        done = run(
            script, f"--dataset={fables_data}", f"--out_dir={tmp_path}/out", *TINY, *args, ranks=2
        )
        assert done.returncode != 0 and not (tmp_path / "out").exists()
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.stderr
        return lines[0]

    assert "multiple of the number of ranks" in refused("--gradient_accumulation_steps=3")
    assert "backend 'mpi'" in refused("--backend=mpi")
    shutil.copytree(fables_data, tmp_path / "other")
    text = (tmp_path / "other/meta.json").read_text().replace('"sha256": "', '"sha256": "0')
    (tmp_path / "other/meta.json").write_text(text)
    (tmp_path / "train_other.py").write_text(  # rank 1 has a copy of its own
        "import os, runpy, sys\nsys.path.insert(0, os.getcwd())\n"
        "from lib import corpus\nreal = corpus.load_meta\n"
        f"other = corpus.Path('{tmp_path}/other')\n"
        "if os.environ['RANK'] == '1': corpus.load_meta = lambda folder: real(other)\n"
        "sys.argv[0] = 'train.py'\nrunpy.run_path('train.py', run_name='__main__')\n"
    )
    assert "the data differs" in refused(script=str(tmp_path / "train_other.py"))


# -----------------------------------------------------------------------------
# Loggers, with the real libraries


@pytest.mark.parametrize("logger", ["tensorboard", "wandb", "trackio"])
def test_loggers_get_what_the_log_has(tmp_path, fables_data, logger):
    pytest.importorskip(logger)
    train(
        fables_data,
        tmp_path / "out",
        f"--logger={logger}",
        WANDB_MODE="offline",
        TRACKIO_DIR=str(tmp_path / "trackio"),
    )
    losses = [r["loss"] for r in read_log(tmp_path / "out") if "loss" in r]
    if logger == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "out")).Reload()
        assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    elif logger == "trackio":
        import sqlite3

        rows = sqlite3.connect(tmp_path / "trackio/fablegpt.db").execute(
            "select metrics from metrics order by step, id"
        )
        assert [
            m["loss"] for (text,) in rows if "loss" in (m := json.loads(text))
        ] == pytest.approx(losses)
    else:
        [path] = (tmp_path / "out/wandb").glob("offline-run-*/run-*.wandb")
        assert path.stat().st_size > 1000


def test_a_logger_that_is_not_installed_names_the_command(tmp_path, fables_data):
    (tmp_path / "wandb.py").write_text("raise ImportError('no', name='wandb')")
    done = run(
        "train.py",
        f"--dataset={fables_data}",
        f"--out_dir={tmp_path}/out",
        *TINY,
        "--logger=wandb",
        PYTHONPATH=str(tmp_path),
    )
    assert (
        done.returncode == 2
        and "pip install wandb" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )
