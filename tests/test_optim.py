"""Muon against PyTorch's, parameter groups and learning rate schedules."""

import math

import pytest
import torch

from helpers import tiny
from lib import optim
from lib.optim import Muon, make_optimizers, orthogonalize, scheduled_lr, set_lr


@pytest.mark.parametrize("arch", ["gpt2", "qwen3", "llama"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_overfits_one_batch(arch, optimizer):
    model = tiny(arch=arch).train()
    idx = torch.randint(61, (2, 17))
    optimizers = make_optimizers(model, optimizer, 0.0, 3e-3, (0.9, 0.95), "cpu")
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        for o in optimizers:
            o.step()
        model.zero_grad()
    assert loss.item() < 0.01


def test_only_matrices_decay():
    model = tiny()
    decay, rest = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decay["params"]} == {id(p) for p in model.parameters() if p.dim() == 2}
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("arch", ["gpt2", "qwen3", "llama"])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(arch):
    model = tiny(arch=arch)
    adamw, muon = make_optimizers(model, "muon", 0.1, 1e-3, (0.9, 0.95), "cpu")
    names = {p: name for name, p in model.named_parameters()}
    matrices = {names[p] for group in muon.param_groups for p in group["params"]}
    assert matrices == {name for p, name in names.items() if p.dim() == 2 and ".h." in name}
    assert {names[p] for group in adamw.param_groups for p in group["params"]} == set(
        names.values()
    ) - matrices


def by_decomposition(g: torch.Tensor) -> torch.Tensor:
    """What orthogonalize() returns for one matrix, computed from its singular values."""
    g = g / g.norm(dim=1, keepdim=True)
    u, s, v = torch.linalg.svd(g / (1.01 * g.norm()), full_matrices=False)
    for a, b, c in optim.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return u * s @ v


def test_muon_is_the_plain_algorithm():
    """The oracle works matrix by matrix, with Nesterov's momentum as in torch.optim.Muon."""
    torch.manual_seed(0)
    shapes, heights = [(24, 16), (16, 48), (16, 16), (16, 16)], (4, 12, 8)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    # ours holds the first one as a stack of three matrices
    theirs = [p.detach().clone() for p in (*ours[0].split(heights), *ours[1:])]
    momenta = [torch.zeros_like(p) for p in theirs]
    muon = Muon(ours, lr=0.01, weight_decay=0.5, momentum=0.9, stacked={ours[0]: heights})
    for _ in range(3):
        for p in ours:
            p.grad = torch.randn_like(p)
        grads = [*ours[0].grad.split(heights), *(p.grad for p in ours[1:])]
        for p, momentum, grad in zip(theirs, momenta, grads):
            momentum.mul_(0.9).add_(0.1 * grad)
            update = by_decomposition(0.1 * grad + 0.9 * momentum)
            r, c = p.shape
            p.mul_(1 - 0.01 * 0.5).sub_(4 * 0.01 * max(1, r / c) ** 0.5 * update)
        muon.step()
        for p, expected in zip((*ours[0].detach().split(heights), *ours[1:]), theirs):
            torch.testing.assert_close(p.detach(), expected, atol=1e-5, rtol=1e-4)


def test_only_the_orthogonalization_differs_from_torchs_muon(monkeypatch):
    """With its own five steps on rows as they are, torch.optim.Muon does the same."""
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(16, 16))
    theirs = torch.nn.Parameter(ours.detach().clone())
    muon = Muon([ours], lr=0.01, weight_decay=0.5, momentum=0.9)
    oracle = torch.optim.Muon([theirs], lr=0.04, weight_decay=0.125, momentum=0.9)
    monkeypatch.setattr(
        "lib.optim.orthogonalize", lambda g: torch.stack([newton_schulz(m) for m in g])
    )
    for _ in range(3):
        before = ours.detach().clone()
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        muon.step()
        oracle.step()
        # torch works in bfloat16
        assert (ours - theirs).norm() < 0.03 * (ours - before).norm()


def newton_schulz(g: torch.Tensor) -> torch.Tensor:
    """Torch's five steps, on the singular values."""
    u, s, v = torch.linalg.svd(g / g.norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u * s @ v


def test_a_bad_step_leaves_muon_as_it_was():
    p = torch.nn.Parameter(torch.randn(4, 6))
    muon = Muon([p], lr=0.1, weight_decay=0.1)
    for grad, found_inf in ((1.0, 0.0), (math.nan, 1.0)):
        before, momentum = (
            p.detach().clone(),
            muon.state[p].get("momentum", torch.zeros(4, 6)).clone(),
        )
        p.grad = torch.full_like(p, grad)
        muon.found_inf = torch.tensor(found_inf)
        muon.step()
        assert p.equal(before) == muon.state[p]["momentum"].equal(momentum) == bool(found_inf)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 10, 40), (2, 40, 10)])
def test_orthogonalize_is_the_polynomial_of_the_singular_values(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    expected = torch.stack([by_decomposition(matrix) for matrix in g])
    torch.testing.assert_close(orthogonalize(g), expected, atol=1e-5, rtol=1e-4)
    # neither the norm of the matrix nor those of its rows matter
    scaled = g * torch.logspace(-5, 0, shape[1])[:, None]
    torch.testing.assert_close(orthogonalize(scaled), expected, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("smallest, least", [
    (1.0, 0.18), (0.01, 0.18), (0.003, 0.18), (0.001, 0.13)])
def test_polar_express_keeps_singular_values_in_the_documented_range(smallest, least):
    """Apply the polynomials to all singular values from `smallest` to 1, relative to the norm."""
    s = torch.logspace(math.log10(smallest), -math.log10(1.01), 1000)
    for a, b, c in optim.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    assert s.min() > least and s.max() < 1.87


def test_schedules():
    assert [optim.schedule_factor("linear", p) for p in (0, 0.25, 1)] == [1, 0.75, 0]
    assert [optim.schedule_factor("trapezoid", p) for p in (0, 0.6, 0.8, 1)] == pytest.approx(
        [1, 1, 0.5, 0]
    )
    cosine = [optim.schedule_factor("cosine", p) for p in (0, 1 / 3, 1)]
    assert cosine == pytest.approx([1, 0.75, 0])
    rates = [
        scheduled_lr(step, "linear", 8.0, 2.0, warmup_iters=4, end=10)
        for step in (0, 3, 4, 7, 10, 11)
    ]
    assert rates == pytest.approx([2, 8, 8, 5, 2, 2])
    assert scheduled_lr(
        5, "linear", 8.0, 2.0, warmup_iters=4, end=10, time_share=0.5
    ) == pytest.approx(5)
    with pytest.raises(ValueError, match="warp"):
        optim.schedule_factor("warp", 0)


@pytest.mark.parametrize("optimizer, embedding_lr_scale, factor", [
    ("adamw", 0.0, 1.0), ("adamw", 3.0, 3.0), ("muon", 3.0, 3.0),
    ("muon", 0.0, optim.EMBEDDING_LR_WIDTH / 16)])
def test_the_token_embedding_has_its_own_rate(optimizer, embedding_lr_scale, factor):
    model = tiny(arch="qwen3", tied=False, n_head=2, n_embd=16)
    optimizers = make_optimizers(model, optimizer, 0.1, 1e-3, (0.9, 0.95), "cpu",
                                 embedding_lr_scale)
    set_lr(optimizers, 0.01)
    rates = {p: group["lr"] for o in optimizers for group in o.param_groups
             for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates.pop(model.transformer.wte.weight) == 0.01 * factor
    assert set(rates.values()) == {0.01}
