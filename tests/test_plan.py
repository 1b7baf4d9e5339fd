"""plan.py against the memory that PyTorch allocates and the FLOPs of the model."""

import json

import pytest
import torch

from helpers import one_line_error, run
from lib.corpus import load_meta
from lib.loss import make_loss
from lib.optim import make_optimizers
from model import GPT, GPTConfig


def plan(*args: str) -> dict:
    done = run("plan.py", "--device=cpu", "--dtype=float32", "--loss_chunk=0", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"text": done.stdout}


@pytest.mark.parametrize(
    "shape, training",
    [
        (dict(n_embd=96, vocab_size=300), dict()),
        (
            dict(n_embd=96, vocab_size=300, dropout=0.1, bias=False),
            dict(gradient_accumulation_steps=2),
        ),
        (dict(n_embd=96, vocab_size=9000), dict(loss_chunk=256, optimizer="muon")),
        (dict(n_embd=96, vocab_size=65, n_layer=8), dict(remat=True)),
        (dict(n_embd=192, vocab_size=20), dict(batch_size=1, block_size=32, optimizer="muon")),
        (dict(arch="qwen3", n_embd=96, vocab_size=300, n_kv_head=1, dropout=0.1), dict()),
        (dict(arch="llama", n_embd=96, vocab_size=300, n_kv_head=1), dict()),
        (
            dict(arch="qwen3", n_embd=96, vocab_size=2000),
            dict(softmax_tokens=600, optimizer="muon"),
        ),
        (
            dict(arch="qwen3", n_embd=96, vocab_size=9000, tied=False),
            dict(batch_size=1, gradient_accumulation_steps=2),
        ),
    ],
    ids=[
        *("gpt2", "dropout", "loss_chunk", "remat", "muon"),
        *("qwen3", "llama", "softmax_tokens", "untied"),
    ],
)
def test_plan_of_memory_beside_what_torch_allocates(shape, training):
    """The oracle: the peak of allocations in a second step, as the profiler records them."""
    shape = (
        dict(
            arch="gpt2",
            n_layer=3,
            n_head=3,
            n_kv_head=0,
            dropout=0.0,
            bias=True,
            tied=True,
            block_size=64,
        )
        | shape
    )
    training = (
        dict(
            batch_size=8,
            gradient_accumulation_steps=1,
            loss_chunk=0,
            softmax_tokens=0,
            remat=False,
            optimizer="adamw",
        )
        | training
    )
    shape["block_size"] = training.pop("block_size", shape["block_size"])
    B, accumulation = training["batch_size"], training["gradient_accumulation_steps"]
    model = GPT(GPTConfig(**shape)).train()
    model.remat = training["remat"]
    model.loss_fn = make_loss(
        training["loss_chunk"], training["softmax_tokens"], torch.zeros(shape["vocab_size"])
    )
    optimizers = make_optimizers(model, training["optimizer"], 0.1, 1e-3, (0.9, 0.99), "cpu")
    x = torch.randint(shape["vocab_size"], (B, shape["block_size"]))

    def step() -> None:
        for _ in range(accumulation):
            _, loss = model(x, x)
            loss.backward()
        for o in optimizers:
            o.step()
        model.zero_grad(set_to_none=True)

    step()
    states = [t for o in optimizers for state in o.state.values() for t in state.values()]
    alive = peak = sum(4 * t.numel() for t in [*model.parameters(), *states])
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()
    for event in sorted(
        profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()
    ):
        alive += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, alive)
    planned = plan(*(f"--{k}={v}" for k, v in (shape | training).items()))
    assert planned["memory_bytes"] == pytest.approx(peak, rel=0.15)
    assert planned["weights_bytes"] == planned["gradients_bytes"] == 4 * model.num_params()
    assert planned["optimizer_bytes"] == pytest.approx(sum(4 * t.numel() for t in states), rel=0.01)


def test_plan_of_time_and_batches():
    shape = dict(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=500)
    args = [
        *(f"--{k}={v}" for k, v in shape.items()),
        "--batch_size=8",
        "--gradient_accumulation_steps=3",
    ]
    model = GPT(GPTConfig(**shape))
    planned = plan(*args, "--gpu=rtx 3060", "--mfu=0.5", "--max_iters=7")
    assert planned["parameters"] == model.num_params() and planned["tokens"] == 7 * 24 * 64
    assert planned["parameters_non_embedding"] == model.num_params(non_embedding=True)
    assert planned["flops"] == 7 * 24 * 64 * model.flops_per_token() and planned["fits"] is None
    assert planned["seconds"] == pytest.approx(planned["flops"] / (0.5 * 25e12))
    assert plan(*args, "--tokens=1e6")["flops"] == 1e6 * model.flops_per_token()

    limit = plan(*args, "--batch_size=6", "--gradient_accumulation_steps=4")["with_runtime_bytes"]
    planned = plan(*args, f"--device_memory={limit}")
    assert "\ndoes not fit into " in planned["text"]
    assert "fits: --batch_size=6 --gradient_accumulation_steps=4, " in planned["text"]
    assert not planned["fits"] and (
        planned["batch_size"],
        planned["gradient_accumulation_steps"],
    ) == (6, 4)
    for B, fits in ((6, True), (8, False)):
        again = plan(
            *args,
            f"--batch_size={B}",
            f"--gradient_accumulation_steps={24 // B}",
            f"--device_memory={limit} b",
        )
        assert ("\nfits into " in again["text"]) == fits
        assert (
            again["fits"] == fits
            and again["batch_size"] == 6
            and again["with_runtime_bytes"] > again["memory_bytes"]
        )
    assert plan(*args, "--device_memory=1 GB")["batch_size"] == 24
    assert (
        plan(*args, "--device_memory=1GiB", "--softmax_tokens=512")["batch_size"] == 8
    )  # a target is one of those words
    nothing = plan(*args, "--device_memory=100MB")
    assert (
        nothing["batch_size"] is None
        and "try --loss_chunk=256, --remat=True, a smaller --block_size" in nothing["text"]
    )


@pytest.mark.parametrize(
    "args, says",
    [
        (["--device_memory=4XB"], "such as 4GB"),
        (["--device_memory=0"], "such as 4GB"),
        (["--device_memory=-1GB"], "such as 4GB"),
        (["--gpu=T5"], "one of T4, V100"),
        (["--mfu=1.1"], "mfu must"),
        (["--mfu=0"], "mfu must"),
        (["--tokens=-1"], "tokens must"),
    ],
)
def test_plan_errors_are_one_line(args, says):
    assert says in one_line_error(run("plan.py", *args))


def test_the_first_of_the_limits_ends_the_plan(fables_data):
    """As in train.py, max_iters counts beside max_epochs only if it is given."""
    epoch = load_meta(fables_data)["splits"]["train"]["tokens"]
    shape = [f"--dataset={fables_data}", "--n_layer=1", "--n_embd=16", "--n_head=2"]
    assert plan(*shape, "--max_epochs=2")["tokens"] == 2 * epoch
    assert plan(*shape, "--max_epochs=2", "--max_iters=1")["tokens"] == 2 * 32 * 128
    assert plan(*shape, "--max_epochs=0.01", "--max_iters=9")["tokens"] == int(0.01 * epoch)
