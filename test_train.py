"""The training loop: resuming, ranks, accumulation, checkpoints. Runs of train.py as a user starts them."""
import shutil

import pytest
import torch

from checkpoint import build_model, find_resumable, load_model, read_checkpoint, save_checkpoint
from conftest import read_log, run, train
from dataset import TokenStream, TrainBatches, load_meta
from model import GPT, GPTConfig


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


@pytest.mark.parametrize("batching", ["windows", "by_length"])
def test_stopped_and_resumed_equals_undisturbed(tmp_path, fables_data, batching):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(fables_data, whole, f"--batching={batching}")
    train(fables_data, parts, f"--batching={batching}", "--max_iters=3")
    resumed = train(fables_data, parts, f"--batching={batching}", "--init_from=resume")
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
    how = [f"--gradient_accumulation_steps={accumulation}", "--max_iters=20", "--eval_interval=10"]
    train(fables_data, tmp_path / "one", *how)
    train(fables_data, tmp_path / "two", *how, ranks=2)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert len(one) == len(two) == 23
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for key in a.keys() - {"step"}:
            assert b[key] == pytest.approx(a[key], rel=1e-6 if a["step"] <= 1 and "loss" in key else 1e-4), (a["step"], key)


def test_accumulation_equals_a_larger_batch(tmp_path, fables_data):
    train(fables_data, tmp_path / "a", "--gradient_accumulation_steps=4", "--batch_size=2", "--dropout=0")
    train(fables_data, tmp_path / "b", "--gradient_accumulation_steps=1", "--batch_size=8", "--dropout=0")
    for a, b in zip(read_log(tmp_path / "a"), read_log(tmp_path / "b")):
        if "loss" in a:
            assert b == pytest.approx(a, rel=1e-4)


def test_first_step_is_what_torch_computes_by_hand(tmp_path, fables_data):
    """One step of AdamW on the mean gradient of the step's windows, clipped, at the first warm-up rate."""
    train(fables_data, tmp_path / "out", "--dropout=0", "--max_iters=1", "--grad_clip=0.5", "--learning_rate=0.01")
    meta = load_meta(fables_data)
    batches = TrainBatches(TokenStream(fables_data, "train", meta), 32, 4, 1337)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=32, vocab_size=meta["vocab_size"], n_layer=2, n_head=2, n_embd=16))
    x, y = (torch.cat(parts) for parts in zip(batches.batch(0), batches.batch(1)))
    loss = model(x, y)[1]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    decay, rest = [p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]
    torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.01 / 2,
                      betas=(0.9, 0.99)).step()
    record = next(r for r in read_log(tmp_path / "out") if "loss" in r)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    trained = read_checkpoint(tmp_path / "out/last.pt")["model"]
    for name, weight in model.state_dict().items():
        assert torch.allclose(trained[name], weight, atol=2e-5), name


def test_loss_falls_on_a_known_corpus(tmp_path, fables_data):
    done = train(fables_data, tmp_path / "out", "--max_iters=60", "--lr_decay_iters=0", "--learning_rate=0.02",
                 "--eval_interval=30", "--batching=by_length")
    evaluations = [r for r in read_log(tmp_path / "out") if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [0, 30, 60]
    assert evaluations[2]["val_loss"] < evaluations[1]["val_loss"] < evaluations[0]["val_loss"] - 1
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "best validation loss" in done.stdout and "tok/s, mfu" in done.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_stays_close_to_float32(tmp_path, fables_data, trained, dtype):
    train(fables_data, tmp_path / "out", f"--dtype={dtype}")
    low, full = read_log(tmp_path / "out")[-1], read_log(trained)[-1]
    assert low["step"] == full["step"] == 6 and low["val_loss"] == pytest.approx(full["val_loss"], rel=0.01)
    assert (read_checkpoint(tmp_path / "out/last.pt")["scaler"]["scale"] > 1) == (dtype == "float16")


def test_compiled_equals_eager(tmp_path, fables_data, trained):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    done = train(fables_data, tmp_path / "out", "--compile=True", "--dropout=0")
    train(fables_data, tmp_path / "eager", "--dropout=0")
    assert "compiled;" in done.stdout
    assert read_log(tmp_path / "out")[-1] == pytest.approx(read_log(tmp_path / "eager")[-1], rel=1e-4)


def test_without_a_compiler_training_goes_on(tmp_path, fables_data, trained):
    done = train(fables_data, tmp_path / "out", "--compile=True", CXX="no-such-compiler",
                 TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "c"))
    assert done.stdout.count("torch.compile does not work here") == 1 and "eager;" in done.stdout
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
    for how in (["--init_from=auto"], ["--eval_only=True"], ["--init_from=resume", "--eval_only=True"]):
        assert again(*how).returncode == 0
    wrong = again("--init_from=resume", "--n_layer=3")
    assert wrong.returncode == 2 and "n_layer=2" in wrong.stderr
    assert contents() == before
    assert again("--overwrite=True", "--max_iters=3").returncode == 0
    assert read_checkpoint(out / "last.pt")["step"] == 3


def test_nothing_to_resume(tmp_path, fables_data):
    done = run("train.py", f"--dataset={fables_data}", f"--out_dir={tmp_path}/none", "--init_from=resume")
    assert done.returncode == 2 and "nothing to resume" in done.stderr and not (tmp_path / "none").exists()
    train(fables_data, tmp_path / "none", "--init_from=auto", "--max_iters=1")


# -----------------------------------------------------------------------------
# Checkpoint files

def test_checkpoints_hold_what_they_should(trained, fables_data):
    last, best = read_checkpoint(trained / "last.pt"), read_checkpoint(trained / "best.pt")
    assert set(best) == {"model", "model_args", "step", "best_val_loss", "config", "meta", "version"}
    assert set(last) == set(best) | {"optimizer", "scaler", "watch", "stale", "seconds", "lr_scale"}
    assert last["meta"] == load_meta(fables_data) and last["step"] == 6
    assert set(last["model"]) == set(GPT(GPTConfig(**last["model_args"])).state_dict())
    assert best["best_val_loss"] == min(r["val_loss"] for r in read_log(trained) if "val_loss" in r)
    assert {path.name for path in trained.iterdir()} == {"last.pt", "best.pt", "prev.pt", "log.jsonl", "loss.png", "lock"}
    assert read_checkpoint(trained / "prev.pt")["step"] == 3


def damage_by(kind: str, raw: bytes) -> bytes:
    middle = len(raw) // 2
    return {"truncated": raw[:middle], "empty": b"", "zeroed": bytes(len(raw)), "text": b"hello",
            "flipped": raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1:]}[kind]


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


def test_failed_save_keeps_the_old_file(tmp_path):
    save_checkpoint(tmp_path, "last.pt", {"step": 1})
    with pytest.raises(Exception):
        save_checkpoint(tmp_path, "last.pt", {"step": 2, "bad": (i for i in range(3))})  # cannot be pickled
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


def test_nanogpt_checkpoints_load(tmp_path):
    shape = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, bias=False, vocab_size=50304, dropout=0.0)
    theirs = GPT(GPTConfig(**shape, gelu="none")).eval()
    torch.save({"model": {f"_orig_mod.{k}": v for k, v in theirs.state_dict().items()}, "model_args": shape,
                "optimizer": {}, "iter_num": 7, "best_val_loss": torch.tensor(3.5), "config": {"dataset": "openwebtext"}},
               tmp_path / "ckpt.pt")
    model, checkpoint = load_model(tmp_path, "cpu")
    idx = torch.randint(50257, (1, 9))
    assert model(idx)[0].equal(theirs(idx)[0]) and (checkpoint["step"], checkpoint["best_val_loss"]) == (7, 3.5)
