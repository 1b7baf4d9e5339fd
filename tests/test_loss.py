"""The loss in chunks and over sampled tokens against the plain one."""

import pytest
import torch

from helpers import tiny
from lib.loss import make_loss, sampled_cross_entropy
from model import GPT, GPTConfig


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_chunked_loss_and_remat_change_memory_only(dtype, tolerance):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=8)).train()
    idx, targets = torch.randint(50, (2, 3, 16)).unbind()
    targets[0, 3:9] = -1

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits, loss = model(idx, targets)
        (3 * loss).backward()
        return logits, loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    _, loss, grad = gradients()
    model.remat, model.loss_fn = True, make_loss(loss_chunk=7)
    logits, chunked_loss, chunked_grad = gradients()
    assert logits is None and chunked_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert (chunked_grad - grad).norm() < tolerance * grad.norm()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits, chunked_loss = model.eval()(idx, targets)
    assert logits is None and chunked_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert model(idx)[0].shape == (3, 16, 50)  # without targets there is no loss to save memory on


def test_softmax_over_fewer_tokens():
    torch.manual_seed(0)
    model = tiny(vocab_size=60).train()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)  # far from uniform
    counts = torch.arange(60).flip(0) // 3  # some tokens never occur
    idx, targets = torch.randint(60, (2, 8)), torch.randint(60, (2, 8))
    targets[0, :3] = -1
    whole = model(idx, targets)[1]
    states, weight = model.hidden(idx).flatten(0, 1), model.lm_head.weight
    weights = (counts + 0.2).sqrt()
    nearly_all = sampled_cross_entropy(states, weight, targets.flatten(), weights, 59)
    assert nearly_all.item() == pytest.approx(whole.item(), rel=0.1) and nearly_all != whole

    # the expected sum over the vocabulary is exact: exp(loss + logit of the target) of a token
    x, target = states[5:6].detach(), targets.flatten()[5:6]
    sums = torch.stack(
        [sampled_cross_entropy(x, weight.detach(), target, weights, 12).exp() for _ in range(5_000)]
    )
    sums *= (x @ weight[target].t()).exp().item()
    exact = (x @ weight.t()).exp().sum().item()
    assert abs(sums.mean().item() - exact) < 4 * sums.std().item() / len(sums) ** 0.5 < 0.2 * exact

    # in training only, and always with the targets of the batch
    model.loss_fn = make_loss(softmax_tokens=40, token_counts=counts)
    losses = [model(idx, targets)[1].item() for _ in range(2)]
    assert losses[0] != losses[1] and losses == pytest.approx([whole.item()] * 2, rel=0.1)
    assert model.eval()(idx, targets)[1].item() == pytest.approx(whole.item())
    flops = [6 * 40 * 32, 6 * 60 * 32]  # of the head, forward and backward
    for n_tokens, count in ((60, flops[1]), (40, flops[0])):
        assert (
            model.flops_per_token(head_tokens=n_tokens) - count
            == 6 * model.num_params(non_embedding=True) + 12 * 2 * 32 * 32
        )
    model.loss_fn = make_loss(softmax_tokens=60, token_counts=counts)
    assert model.train()(idx, targets)[1].item() == pytest.approx(whole.item())


LOSSES = {
    "whole": dict(),
    "chunked": dict(loss_chunk=7),
    "sampled": dict(softmax_tokens=40, token_counts=torch.arange(61)),
}


@pytest.mark.parametrize("arch", ["gpt2", "qwen3", "llama"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_loss_under_autocast(arch, loss, dtype):
    """Loss and gradients are float32, and near those without autocast."""
    model = tiny(arch=arch).train()
    model.loss_fn = make_loss(**LOSSES[loss])
    idx, targets = torch.randint(61, (2, 2, 16)).unbind()
    targets[0, 5:9] = -1
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)  # the sampled tokens
        scaler = torch.amp.GradScaler("cpu", enabled=enabled and dtype == torch.float16)
        with torch.autocast("cpu", dtype, enabled=enabled):
            value = model(idx, targets)[1]
        scaler.scale(value).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()]) / scaler.get_scale()
        assert value.dtype == grads.dtype == torch.float32
        results.append((value.item(), grads))
        model.zero_grad()
    (loss32, grads32), (loss16, grads16) = results
    assert loss16 == pytest.approx(loss32, rel=0.005) and not grads16.equal(grads32)
    assert (grads16 - grads32).norm() < 0.03 * grads32.norm()


@pytest.mark.parametrize("arch", ["gpt2", "qwen3", "llama"])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    "loss, graphs, breaks", [("whole", 1, 0), ("chunked", 2, 2), ("sampled", 1, 0)]
)
def test_graphs_of_the_compiled_model(arch, remat, loss, graphs, breaks):
    """One graph for everything, and one around the chunked loss; none later for the same shape."""
    torch._dynamo.reset()
    model = tiny(arch=arch, block_size=16, n_layer=3).train()
    model.remat, model.loss_fn = remat, make_loss(**LOSSES[loss])
    compiled, idx = torch.compile(model, backend="eager"), torch.randint(61, (2, 16))
    counted = []
    for _ in range(3):
        torch._dynamo.utils.counters.clear()
        compiled(idx, idx)[1].backward()
        counters = torch._dynamo.utils.counters
        counted.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    assert counted == [(graphs, breaks), (0, 0), (0, 0)]
