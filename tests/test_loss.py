"""The loss in chunks and over sampled tokens against the plain one."""
import pytest
import torch

from helpers import tiny
from model import GPT, GPTConfig, sampled_loss


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
    model.remat, model.loss_chunk = True, 7
    logits, chunked_loss, chunked_grad = gradients()
    assert logits is None and chunked_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert (chunked_grad - grad).norm() < tolerance * grad.norm()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits, chunked_loss = model.eval()(idx, targets)
    assert logits is None and chunked_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert model(idx)[0].shape == (3, 16, 50)  # without targets there is no loss to save memory on


def test_softmax_over_fewer_words():
    torch.manual_seed(0)
    model = tiny(vocab_size=60).train()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)  # far from uniform
    counts = torch.arange(60).flip(0) // 3  # some words never
    idx, targets = torch.randint(60, (2, 8)), torch.randint(60, (2, 8))
    targets[0, :3] = -1
    whole = model(idx, targets)[1]
    states, weight = model.hidden(idx).flatten(0, 1), model.lm_head.weight
    weights = (counts + 0.2).sqrt()
    nearly_all = sampled_loss(states, weight, targets.flatten(), weights, 59)
    assert nearly_all.item() == pytest.approx(whole.item(), rel=0.1) and nearly_all != whole

    # the sum over the vocabulary is right on the average: exp of (loss + logit of the target) for one token
    x, target = states[5:6].detach(), targets.flatten()[5:6]
    sums = torch.stack([sampled_loss(x, weight.detach(), target, weights, 12).exp() for _ in range(5_000)])
    sums *= (x @ weight[target].t()).exp().item()
    exact = (x @ weight.t()).exp().sum().item()
    assert abs(sums.mean().item() - exact) < 4 * sums.std().item() / len(sums)**0.5 < 0.2 * exact

    # in training only, and with the words of the batch always among them
    model.sample_softmax(40, counts)
    losses = [model(idx, targets)[1].item() for _ in range(2)]
    assert losses[0] != losses[1] and losses == pytest.approx([whole.item()] * 2, rel=0.1)
    assert model.eval()(idx, targets)[1].item() == pytest.approx(whole.item())
    flops = [6 * 40 * 32, 6 * 60 * 32]  # of the head, forward and backward
    for words, count in ((60, flops[1]), (40, flops[0])):
        model.sample_softmax(words, counts)
        assert model.flops_per_token() - count == 6 * model.num_params(non_embedding=True) + 12 * 2 * 32 * 32
    model.train().sample_softmax(60, counts)
    assert model(idx, targets)[1].item() == pytest.approx(whole.item())
