"""
LoRA: train small adapters of the matrices in the blocks and freeze everything else.

A layer with the weight W (N, C) gets two matrices, A (rank, C) and B (N, rank), and computes with
W + ALPHA / rank * B A. model.py knows nothing of them: they replace its layers before training,
and merge_adapters() returns plain weights. Source: https://arxiv.org/abs/2106.09685
"""

import torch
import torch.nn as nn
from torch.nn import functional as F

from lib.quantize import replace_module
from model import GPT

ALPHA = 32  # an adapter is scaled by ALPHA / rank, so that one learning rate suits all ranks


class LoRALinear(nn.Module):
    """A frozen Linear layer plus a trainable low-rank adapter."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        N, C = linear.weight.shape
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, C, device=device).uniform_(-1, 1) / C**0.5)
        self.lora_b = nn.Parameter(torch.zeros(N, rank, device=device))  # B A starts at zero

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = F.linear(x, self.lora_a) * (ALPHA / len(self.lora_a))  # (..., rank)
        return F.linear(x, self.weight, self.bias) + F.linear(scaled, self.lora_b)


def add_adapters(model: GPT, rank: int) -> GPT:
    """Freeze a model, add adapters to the Linear layers of its blocks, and return it."""
    model.requires_grad_(False)
    blocks = model.transformer.h
    for name, module in list(blocks.named_modules()):
        if isinstance(module, nn.Linear):
            replace_module(blocks, name, LoRALinear(module, rank))
    return model


def rank_of(weights: dict[str, torch.Tensor]) -> int:
    """Return the rank of the adapters in a state dict, 0 if there are none."""
    return next((len(w) for name, w in weights.items() if name.endswith(".lora_a")), 0)


def merge_adapters(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Return the state dict of an equivalent model without adapters.

    Merged matrices are on the CPU, as a GPU may have no memory for a second copy. A state dict
    without adapters is returned as it is. Raises ValueError for adapters of other shapes.
    """
    if not rank_of(weights):
        return weights
    plain = {}
    for name, w in weights.items():
        layer, _, part = name.rpartition(".")
        a, b = weights.get(f"{layer}.lora_a"), weights.get(f"{layer}.lora_b")
        if part == "weight" and a is not None:
            if (b is None or not a.dim() == b.dim() == 2 or len(a) != b.size(1)
                    or w.shape != (len(b), a.size(1))):
                raise ValueError(f"the adapter of {name} does not fit it")
            plain[name] = torch.addmm(w.cpu(), b.cpu(), a.cpu(), alpha=ALPHA / len(a))
        elif part not in ("lora_a", "lora_b"):
            plain[name] = w
    return plain
