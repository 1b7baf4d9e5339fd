"""Muon against PyTorch's, parameter groups and learning rate schedules."""

import math

import pytest
import torch

from helpers import tiny
from lib.optim import Muon, make_optimizers, orthogonalize, schedule_factor, scheduled_lr


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
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


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(arch):
    model = tiny(arch=arch)
    adamw, muon = make_optimizers(model, "muon", 0.1, 1e-3, (0.9, 0.95), "cpu")
    names = {p: name for name, p in model.named_parameters()}
    matrices = {names[p] for group in muon.param_groups for p in group["params"]}
    assert matrices == {name for p, name in names.items() if p.dim() == 2 and ".h." in name}
    assert {names[p] for group in adamw.param_groups for p in group["params"]} == set(
        names.values()
    ) - matrices


def test_muon_is_that_of_torch():
    """Torch's works matrix by matrix and in bfloat16; the factor 4 is ours."""
    torch.manual_seed(0)
    shapes, heights = [(24, 16), (16, 48), (16, 16), (16, 16)], (4, 12, 8)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    # ours holds the first one as a stack of three matrices
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in (*ours[0].split(heights), *ours[1:])]
    muon = Muon(ours, lr=0.01, weight_decay=0.5, stacked={ours[0]: heights})
    oracle = torch.optim.Muon(theirs, lr=0.04, weight_decay=0.125, momentum=0.9)
    for _ in range(3):
        before = torch.cat([p.detach().flatten() for p in ours])
        for p in ours:
            p.grad = torch.randn_like(p)
        for p, grad in zip(theirs, (*ours[0].grad.split(heights), *(p.grad for p in ours[1:]))):
            p.grad = grad.clone()
        muon.step()
        oracle.step()
        after, expected = (
            torch.cat([p.detach().flatten() for p in ours]),
            torch.cat([p.detach().flatten() for p in theirs]),
        )
        assert (after - expected).norm() < 0.03 * (expected - before).norm()


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
def test_orthogonalize_levels_the_singular_values(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    values = torch.diagonal(u.mT @ orthogonalize(g) @ v.mT, dim1=-2, dim2=-1)
    assert (
        values.min() > 0.3 and values.max() < 1.3
    )  # the smallest of a square matrix may need a step more
    assert (
        (u * values[:, None]) @ v - orthogonalize(g)
    ).abs().max() < 1e-4  # and nothing but the values has changed


@pytest.mark.parametrize("condition, least", [(1, 0.68), (100, 0.68), (1000, 0.21)])
def test_orthogonalize_reaches_what_its_docstring_says(condition, least):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(64, 64))
    s = torch.logspace(0, -math.log10(condition), 64)
    values = torch.linalg.svdvals(orthogonalize((u * s @ v)[None])[0])
    assert values.min() == pytest.approx(least, abs=0.01) and values.max() < 1.21


def test_schedules():
    assert [schedule_factor("linear", p) for p in (0, 0.25, 1)] == [1, 0.75, 0]
    assert [schedule_factor("trapezoid", p) for p in (0, 0.6, 0.8, 1)] == pytest.approx(
        [1, 1, 0.5, 0]
    )
    assert [schedule_factor("cosine", p) for p in (0, 1 / 3, 1)] == pytest.approx([1, 0.75, 0])
    rates = [
        scheduled_lr(step, "linear", 8.0, 2.0, warmup_iters=4, end=10)
        for step in (0, 3, 4, 7, 10, 11)
    ]
    assert rates == pytest.approx([2, 8, 8, 5, 2, 2])
    assert scheduled_lr(
        5, "linear", 8.0, 2.0, warmup_iters=4, end=10, time_share=0.5
    ) == pytest.approx(5)
    with pytest.raises(ValueError, match="warp"):
        schedule_factor("warp", 0)
