"""
Optimizers, learning rate schedules and the update at the end of a step.
"""
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn

from model import GPT

SCHEDULES = ("cosine", "linear", "trapezoid")
# With Muon, the learning rate of the token embedding is multiplied by EMBEDDING_LR_WIDTH / n_embd.
# A tied embedding is also the head, whose best rate falls with the number of its inputs, n_embd.
EMBEDDING_LR_WIDTH = 640
# a, b and c of the first three steps a x + b x^3 + c x^5 of Polar Express
POLAR_EXPRESS = [(8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (3.9487, -2.9089, 0.5518)]


def make_optimizers(model: GPT, optimizer: str, weight_decay: float, learning_rate: float,
                    betas: tuple[float, float], device_type: str,
                    embedding_lr_scale: float = 0.0) -> list[torch.optim.Optimizer]:
    """
    Return the optimizers that together update all parameters of a model that are not frozen.

    'adamw': one AdamW. 'muon': Muon for the matrices of the blocks, AdamW for the rest.
    embedding_lr_scale: factor on the learning rate of the token embedding. 0: 1 with 'adamw',
    EMBEDDING_LR_WIDTH / n_embd with 'muon'.
    """
    if optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer must be adamw or muon, got {optimizer!r}")
    adamw = model.configure_optimizers(weight_decay, learning_rate, betas, device_type)
    if optimizer == "muon":
        embedding_lr_scale = embedding_lr_scale or EMBEDDING_LR_WIDTH / model.config.n_embd
    if embedding_lr_scale and model.transformer.wte.weight.requires_grad:
        move_to_own_group(adamw, model.transformer.wte.weight, lr_scale=embedding_lr_scale)
    if optimizer == "adamw":
        return [adamw]
    blocks, n_inner = model.transformer.h, model.config.n_inner
    groups = [
        {"params": matrices_of(block.attn.c_attn for block in blocks)},
        {"params": matrices_of(block.attn.c_proj for block in blocks)},
        {"params": matrices_of(block.mlp.c_fc for block in blocks)},
        {"params": matrices_of(block.mlp.c_proj for block in blocks)},
    ]
    stacked = {block.attn.c_attn.weight: block.attn.qkv_sizes for block in blocks}
    if model.config.arch != "gpt2":  # SwiGLU stacks gate and up
        stacked |= {block.mlp.c_fc.weight: [n_inner, n_inner] for block in blocks}
    matrices = {p for group in groups for p in group["params"]}
    for group in adamw.param_groups:
        group["params"] = [p for p in group["params"] if p not in matrices]
    return [adamw, Muon(groups, learning_rate, weight_decay, momentum=betas[0], stacked=stacked)]


def matrices_of(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the matrices of layers that are trained: weights or, with LoRA, adapters."""
    return [p for layer in layers for p in layer.parameters() if p.dim() == 2 and p.requires_grad]


def move_to_own_group(optimizer: torch.optim.Optimizer, param: nn.Parameter, **options) -> None:
    """Move a parameter to a new first group: a copy of its old group with these options changed."""
    group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))
    group["params"] = [p for p in group["params"] if p is not param]
    optimizer.param_groups.insert(0, group | {"params": [param]} | options)


class Muon(torch.optim.Optimizer):
    """
    Momentum with orthogonalized updates, which change every direction of a matrix equally.

    The update of an (r, c) matrix has the spectral norm 4 * lr * sqrt(max(1, r / c)). With
    the factor 4, one learning rate suits Muon and AdamW; with the root, models of any width
    (https://arxiv.org/abs/2310.17813). Source: https://kellerjordan.github.io/posts/muon/

    stacked: for parameters that hold several matrices on top of each other, their heights.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.9,
                 stacked: dict[nn.Parameter, Sequence[int]] | None = None):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.stacked = stacked or {}
        self._step_supports_amp_scaling = True  # it honors found_inf, see step_unless()

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters; change nothing where the tensor found_inf is 1."""
        device = self.param_groups[0]["params"][0].device
        # 1 to update, 0 to change nothing
        go = 1 - getattr(self, "found_inf", torch.zeros((), device=device))
        by_shape = {}  # (r, c, lr) -> [(update, matrix)], orthogonalized in one batch
        for group in self.param_groups:
            lr = group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                grad = p.grad.where(go > 0, 0.0)
                state["momentum"].lerp_(grad, (1 - group["momentum"]) * go)
                update = grad.lerp(state["momentum"], group["momentum"])  # Nesterov
                if group["weight_decay"]:
                    p.mul_(1 - lr * group["weight_decay"] * go)
                heights = self.stacked.get(p, [p.size(0)])
                for u, matrix in zip(update.split(heights), p.split(heights)):
                    by_shape.setdefault((*u.shape, lr), []).append((u, matrix))
        for (r, c, lr), items in by_shape.items():
            updates = orthogonalize(torch.stack([u for u, _ in items]))  # (n, r, c)
            updates *= 4 * lr * math.sqrt(max(1, r / c)) * go
            for u, (_, matrix) in zip(updates, items):
                matrix.sub_(u)


def orthogonalize(g: torch.Tensor) -> torch.Tensor:
    """
    Return about U V^T of the singular value decompositions U S V^T of matrices (n, r, c).

    The rows are first scaled to the same norm (MuonEq, https://arxiv.org/abs/2603.28254). Then
    three steps of Polar Express (https://arxiv.org/abs/2505.16932), which use only matrix products,
    bring singular values above 0.3% of the matrix norm to between 0.18 and 1.87. More accurate
    coefficients did not lower the loss.
    """
    x = g.bfloat16() if g.is_cuda else g  # few CPUs are fast in bfloat16
    row_norms = x.norm(dim=2, keepdim=True)  # (n, r, 1)
    # the norm of each matrix becomes 1 / 1.01: rounding must not bring a singular value above 1
    x = x / (1.01 * math.sqrt(g.size(1)) * row_norms + 1e-10)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT  # (n, r, r)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g.dtype)


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of each parameter group to lr, times its lr_scale if it has one."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = lr * group.get("lr_scale", 1.0)


def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler,
         grad_clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Clip the gradient norm to grad_clip (0: no clipping), update the parameters, clear gradients.

    A bad step, with a non-finite gradient, changes nothing. Return the norm before clipping and
    whether the step is bad, as tensors () on the device, so that nothing waits for it.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    bad = ~grad_norm.isfinite()
    for optimizer in optimizers:
        step_unless(bad, optimizer)
    scaler.update()
    model.zero_grad(set_to_none=True)
    return grad_norm, bad


def step_unless(bad: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """
    Step the optimizer unless the tensor bad () is true.

    Fused optimizers decide this on the device: torch's GradScaler tells them with the attribute
    found_inf, and grad_scale is None once the gradients are unscaled. Others wait for the value.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()
        optimizer.step()
    elif not bad:
        optimizer.step()


def scheduled_lr(step: int, schedule: str, learning_rate: float, min_lr: float, warmup_iters: int,
                 end: float, time_share: float = 0.0) -> float:
    """
    Return the learning rate of a step: linear warmup, then the schedule down to min_lr.

    min_lr is reached at step `end`, or earlier where time_share, the elapsed share of the
    time budget, is ahead of the steps.
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / warmup_iters
    progress = (step - warmup_iters) / max(1, end - warmup_iters)
    factor = schedule_factor(schedule, min(1.0, max(time_share, progress)))
    return min_lr + (learning_rate - min_lr) * factor


def schedule_factor(schedule: str, progress: float) -> float:
    """Return how much of the learning rate is left, 1 to 0, at a progress from 0 to 1."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if schedule == "linear":
        return 1 - progress
    if schedule == "trapezoid":  # constant, then linear over the last 40%
        return min(1.0, (1 - progress) / 0.4)
    raise ValueError(f"schedule must be {', '.join(SCHEDULES)}, got {schedule!r}")
