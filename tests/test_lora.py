"""LoRA adapters against the plain model, and runs of train.py that train them."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import (
    TINY,
    assert_same,
    one_line_error,
    randomize,
    read_log,
    run,
    tiny,
    train,
    train_on_ranks,
)
from lib import lora
from lib.checkpoint import load_checkpoint, model_from_weights, read_checkpoint
from lib.loss import make_loss
from lib.optim import make_optimizers

ARCHS = [dict(arch="gpt2"), dict(arch="qwen3", n_kv_head=2, tied=False)]
IDX = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))


def adapted(rank: int = 3, **changes):
    """A model whose weights and adapters are far from their initial values."""
    model = tiny(**changes)
    randomize(model)
    lora.add_adapters(model, rank)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                p.normal_(std=0.02)
    return model


def merged(model):
    return model_from_weights(model.config, lora.merge_adapters(model.state_dict())).eval()


@pytest.mark.parametrize("changes", ARCHS)
def test_new_adapters_change_nothing(changes):
    plain = tiny(**changes)
    model = lora.add_adapters(tiny(**changes), 4)
    assert model(IDX)[0].equal(plain(IDX)[0])
    assert_same(lora.merge_adapters(model.state_dict()), dict(plain.state_dict()))
    assert lora.rank_of(model.state_dict()) == 4 and lora.rank_of(plain.state_dict()) == 0
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    linear = {name for name, module in plain.named_modules()
              if isinstance(module, torch.nn.Linear) and ".h." in name}
    assert trained == linear and len(linear) == 8


@pytest.mark.parametrize("changes", ARCHS)
def test_the_merged_model_computes_what_the_adapted_one_does(changes):
    model = adapted(**changes)
    base = tiny(**changes)
    randomize(base)
    plain = merged(model)
    assert list(plain.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(plain(IDX)[0], model(IDX)[0], atol=1e-5, rtol=0)
    assert (base(IDX)[0] - model(IDX)[0]).abs().max() > 0.1
    assert plain.generate(IDX, 8, temperature=0).equal(model.generate(IDX, 8, temperature=0))


LOSSES = [dict(), dict(loss_chunk=7), dict(softmax_tokens=60, token_counts=torch.ones(61))]


@pytest.mark.parametrize("loss", LOSSES, ids=["whole", "chunked", "sampled"])
@pytest.mark.parametrize("changes", ARCHS)
def test_gradients_are_those_of_the_merged_matrices(changes, loss):
    """With W + s B A, the gradient G of W gives s B^T G for A and s G A^T for B."""
    model = adapted(**changes)
    plain = merged(model)
    model.remat = True
    for one in (model, plain):
        one.loss_fn = make_loss(**loss)
        torch.manual_seed(2)  # of the sampled tokens
        one.train()(IDX[:, :-1], IDX[:, 1:])[1].backward()
    scale = lora.ALPHA / 3
    checked = 0
    for name, p in model.named_parameters():
        layer, _, part = name.rpartition(".")
        if not part.startswith("lora_"):
            assert p.grad is None and not p.requires_grad
            continue
        a, b = (getattr(model.get_submodule(layer), key) for key in ("lora_a", "lora_b"))
        g = plain.get_submodule(layer).weight.grad
        expected = scale * (b.T @ g if part == "lora_a" else g @ a.T)
        torch.testing.assert_close(p.grad, expected, atol=1e-6, rtol=1e-4)
        checked += 1
    assert checked == 16


def test_the_chunked_loss_computes_no_gradient_of_a_frozen_head():
    x, head = torch.randn(1, 9, 4, requires_grad=True), torch.randn(7, 4)
    targets = torch.randint(7, (1, 9))
    chunked = make_loss(loss_chunk=4)
    grads = []
    for frozen in (False, True):
        loss = chunked(x, head.requires_grad_(not frozen), targets, True)
        assert (loss.grad_fn.saved_tensors[1] is None) == frozen
        grads.append(torch.autograd.grad(loss, x)[0])
    assert grads[0].equal(grads[1])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("changes", ARCHS)
def test_optimizers_update_the_adapters_only(changes, optimizer):
    model = adapted(**changes)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, optimizer, 0.0, 1e-2, (0.9, 0.99), "cpu", 2.0)
    given = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(given) == 16
    losses = []
    for _ in range(30):
        loss = model(IDX[:, :-1], IDX[:, 1:])[1]
        loss.backward()
        for o in optimizers:
            o.step()
        model.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    for name, p in model.named_parameters():
        assert p.equal(before[name]) == ("lora_" not in name), name


def test_flops_of_frozen_weights():
    """Matrix products that PyTorch counts, without attention. The first layer needs no input's."""
    model = adapted(arch="qwen3").train()
    with FlopCounterMode(display=False) as counter:
        model(IDX[:, :-1], IDX[:, 1:])[1].backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op)) / 40
    layer, c = model.transformer.h[0].attn.c_attn, model.config
    skipped = 2 * (layer.weight.numel() + layer.lora_a.numel())
    gains = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 1)
    attention = 12 * c.n_layer * c.n_embd * c.block_size
    ours = model.flops_per_token() - attention - 4 * gains - 6 * c.n_embd
    assert products == ours - skipped


def test_a_compiled_model_is_one_graph():
    model = adapted(arch="qwen3").train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert compiled(IDX, IDX)[1].item() == pytest.approx(model(IDX, IDX)[1].item(), rel=1e-5)


# -----------------------------------------------------------------------------
# train.py


@pytest.mark.parametrize("how", [
    ["--keep_every=3"],
    ["--optimizer=muon", "--remat", "--loss_chunk=48", "--keep_every=3"],
    ["--batching=by_length", "--softmax_tokens=128", "--dtype=bfloat16", "--keep_every=3"],
])
def test_stopped_and_resumed_equals_undisturbed(tmp_path, fables_data, trained, how):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    how = [*how, "--learning_rate=0.02"]
    tuned = [*how, f"--init_from={trained}", "--lora_rank=2"]
    done = train(fables_data, whole, *tuned)
    train(fables_data, parts, *tuned, "--max_iters=3")
    resumed = train(fables_data, parts, *how, "--init_from=resume")
    assert "resuming" in resumed.stdout and "lora_rank" not in resumed.stdout.split("resuming")[1]
    for text in (done.stdout, resumed.stdout):
        assert "rank 2, " in text and "trained parameters" in text
    for name in ("last.pt", "best.pt", "step_000006.pt"):
        a, b = read_checkpoint(whole / name), read_checkpoint(parts / name)
        for checkpoint in (a, b):
            del checkpoint["config"]["out_dir"], checkpoint["config"]["init_from"]
            checkpoint.pop("seconds", None)
        assert_same(a, b)
        assert a["config"]["lora_rank"] == 2 and lora.rank_of(a["model"]) == 2 * (name == "last.pt")
    assert read_log(whole) == read_log(parts)

    # only adapters were trained, and the other files have them merged
    base, last = (read_checkpoint(path / "last.pt")["model"] for path in (trained, whole))
    assert_same({name: last[name] for name in base}, dict(base))
    assert list(a["model"]) == list(base)
    assert_same(load_checkpoint(whole / "last.pt")["model"], a["model"])
    assert not a["model"]["transformer.h.0.mlp.c_fc.weight"].equal(
        base["transformer.h.0.mlp.c_fc.weight"])
    losses = [record["val_loss"] for record in read_log(whole) if "val_loss" in record]
    assert losses[-1] < losses[0] - 0.001

    # which is what other scripts and further runs start from
    start = read_log(trained)[-1]["val_loss"]
    if "--batching=by_length" not in how:
        assert losses[0] == pytest.approx(start, rel=1e-6)
    train(fables_data, tmp_path / "next", *how, f"--init_from={whole / 'last.pt'}", "--max_iters=0")
    assert read_log(tmp_path / "next")[0]["val_loss"] == pytest.approx(losses[-1], rel=1e-4)
    assert lora.rank_of(read_checkpoint(tmp_path / "next/last.pt")["model"]) == 0
    done = run("sample.py", f"--out_dir={whole}", "--num_samples=1", "--max_new_tokens=5")
    assert done.returncode == 0, done.stderr


def test_two_ranks_equal_one(tmp_path, fables_data, trained):
    how = [f"--init_from={trained}", "--lora_rank=2", "--max_iters=20", "--eval_interval=10"]
    train(fables_data, tmp_path / "one", *how)
    train_on_ranks(2, fables_data, tmp_path / "two", *how)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert len(one) == len(two) == 23
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        assert b == pytest.approx(a, rel=1e-4), a["step"]


def test_what_does_not_fit_is_one_line(tmp_path, fables_data, trained):
    """Adapters of random weights, and a resume with another rank; without the setting, it is 0."""
    out = tmp_path / "out"
    how = ["train.py", f"--dataset={fables_data}", *TINY]
    for scratch in ("scratch", "auto"):
        error = one_line_error(run(*how, f"--out_dir={out}", f"--init_from={scratch}",
                                   "--lora_rank=2"))
        assert "lora_rank needs a trained model: set --init_from" in error
        assert not out.exists()
    assert "at least 0" in one_line_error(run(*how, f"--out_dir={out}", "--lora_rank=-1"))
    train(fables_data, out, f"--init_from={trained}", "--lora_rank=2", "--max_iters=3")
    again = [*how, f"--out_dir={out}", "--init_from=resume", "--max_iters=4"]
    for rank in (0, 3):
        assert "has lora_rank=2" in one_line_error(run(*again, f"--lora_rank={rank}"))
    assert run(*again, "--lora_rank=2").returncode == 0
    last = read_checkpoint(out / "last.pt")
    assert last["step"] == 4
    for part, shape in (("a", (3, 16)), ("a", (2, 8)), ("b", (48, 1)), ("b", (48,))):
        damaged = last["model"] | {f"transformer.h.1.attn.c_attn.lora_{part}": torch.ones(shape)}
        torch.save(last | {"model": damaged}, tmp_path / "last.pt")
        with pytest.raises(ValueError, match="last.pt is damaged: the adapter of transformer.h.1"):
            load_checkpoint(tmp_path)

    train(fables_data, tmp_path / "old", "--max_iters=3")
    old = read_checkpoint(tmp_path / "old/last.pt")
    del old["config"]["lora_rank"]  # as an earlier version saved it
    torch.save(old, tmp_path / "old/last.pt")
    again = [*how, f"--out_dir={tmp_path}/old", "--init_from=resume", "--max_iters=4"]
    assert "has lora_rank=0" in one_line_error(run(*again, "--lora_rank=2"))
    assert run(*again).returncode == 0
    assert read_checkpoint(tmp_path / "old/last.pt")["config"]["lora_rank"] == 0
    assert math.isfinite(read_log(tmp_path / "old")[-1]["val_loss"])
