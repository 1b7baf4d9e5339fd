"""
Losses for large vocabularies: cross entropy that never holds all logits, and a sampled softmax.

make_loss() returns a function for GPT.loss_fn. evaluate() measures a model over batches.
"""
import math
from collections.abc import Callable, Iterable
from itertools import takewhile

import torch
from torch.nn import functional as F

from lib.distributed import Ranks, StopSignal
from model import GPT


def make_loss(loss_chunk: int = 0, softmax_tokens: int = 0,
              token_counts: torch.Tensor | None = None) -> Callable[..., torch.Tensor] | None:
    """
    Return a loss for GPT.loss_fn, or None for plain cross entropy.

    loss_chunk: compute the logits of this many tokens at a time (0: all). softmax_tokens: train
    with a softmax over this many tokens (0, or the vocabulary size: all); token_counts: (V,) how
    often each token occurs in the training text. Evaluation always uses the whole softmax.
    """
    if token_counts is not None and softmax_tokens >= len(token_counts):
        softmax_tokens = 0
    if not loss_chunk and not softmax_tokens:
        return None
    # near the best: frequent tokens dominate the sum over the vocabulary; 0.2 is for unseen ones
    weights = (token_counts + 0.2).sqrt() if softmax_tokens else None

    def loss_fn(x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor,
                training: bool) -> torch.Tensor:
        x, targets = x.flatten(0, 1), targets.flatten()  # (B * T, C), (B * T)
        if training and softmax_tokens:
            return sampled_cross_entropy(x, head, targets, weights, softmax_tokens)
        if loss_chunk:
            return chunked_cross_entropy(x, head, targets, loss_chunk)
        return F.cross_entropy(F.linear(x, head), targets, ignore_index=-1)

    return loss_fn


def check_softmax_tokens(softmax_tokens: int, tokens: int) -> None:
    """Raise ValueError where a softmax over softmax_tokens could miss a target of a micro-batch."""
    if 0 < softmax_tokens < tokens:
        raise ValueError(f"softmax_tokens ({softmax_tokens}) must not be less than the tokens of a "
                         f"micro-batch ({tokens}), which can all be different targets")


@torch.compiler.disable  # a graph of the chunk loop would be long and no faster
def chunked_cross_entropy(x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor,
                          chunk: int) -> torch.Tensor:
    """
    Return the mean cross entropy of states (N, C), head (V, C) and targets (N), -1 for no target.

    Equal to F.cross_entropy(x @ head.T, targets, ignore_index=-1), but only the logits of `chunk`
    tokens exist at a time.
    """
    return ChunkedCrossEntropy.apply(x, head, targets, chunk, torch.is_grad_enabled())


class ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient is computed in the forward pass, while the logits of a chunk exist."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: int,
                with_grad: bool) -> torch.Tensor:
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        w = head.to(dtype)
        grad_x = torch.empty_like(x) if with_grad else x
        grad_head = torch.zeros_like(head) if with_grad and ctx.needs_input_grad[1] else None
        total = x.new_zeros((), dtype=torch.float32)
        count = (targets >= 0).sum().clamp(min=1)
        # one buffer for all chunks: fresh pages for each would cost a quarter of the time
        buffer = w.new_empty(len(w), min(chunk, len(x)))
        chunks = zip(x.to(dtype).split(chunk), targets.split(chunk), grad_x.split(chunk))
        for xs, ys, grad_xs in chunks:
            valid = ys >= 0  # (n,)
            ys = ys.clamp(min=0)[None]  # (1, n)
            # logits as (V, n): the product is 1.5 times as fast on a CPU as one of shape (n, V)
            out = buffer if len(xs) == buffer.size(1) else None
            logits = torch.mm(w, xs.t(), out=out).float()  # (V, n)
            log_sum = logits.logsumexp(dim=0)  # (n,)
            total += ((log_sum - logits.gather(0, ys)[0]) * valid).sum()
            if not with_grad:
                continue
            # the gradient of the logits: softmax - one-hot
            p = logits.sub_(log_sum).exp_()
            p.scatter_add_(0, ys, -torch.ones_like(log_sum)[None]).mul_(valid)
            p = p.to(dtype)
            grad_xs.copy_(p.t() @ w)
            if grad_head is None:  # the head is frozen
                continue
            if dtype == grad_head.dtype:
                grad_head.addmm_(p, xs)
            else:
                grad_head.add_(p @ xs)
        ctx.save_for_backward(grad_x, grad_head, count)
        return total / count

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x, grad_head, count = ctx.saved_tensors
        scale = grad / count
        grad_head = None if grad_head is None else grad_head * scale
        return grad_x * scale, grad_head, None, None, None


def sampled_cross_entropy(x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor,
                          weights: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """
    Return the mean cross entropy of states (N, C), head (V, C) and targets (N), -1 for no target,
    with a softmax over n_tokens of the V tokens.

    All targets are in it, and others by priority sampling (https://arxiv.org/abs/cs/0509026) with
    weights (V). A token sampled with probability p counts 1 / p times, so that the sum over the
    vocabulary is unbiased. Its logarithm is not: with 3,072 of 50,257 tokens the loss is about
    0.006 too low. The gradient of the head is 19% off in one sample, 6% in the mean of 24.
    """
    priority = weights / torch.rand_like(weights)  # (V,)
    priority = priority.index_fill(0, targets.clamp(min=0), math.inf)
    top = priority.topk(n_tokens + 1)
    sampled, threshold = top.indices[:-1], top.values[-1]  # (n_tokens,), ()
    p = torch.where(top.values[:-1].isinf(), 1.0, (weights[sampled] / threshold).clamp(max=1))
    column = torch.arange(n_tokens, device=x.device)
    column_of = torch.empty_like(priority, dtype=torch.long).scatter(0, sampled, column)  # (V,)
    logits = x @ F.embedding(sampled, head).t() - p.log()  # (N, n_tokens)
    columns = torch.where(targets < 0, -1, column_of[targets])  # (N,)
    return F.cross_entropy(logits, columns, ignore_index=-1)


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
             autocast) -> tuple[float, int]:
    """Return the total loss in nats and the number of targets over batches of (idx, targets)."""
    model.eval()
    nats, tokens = 0.0, 0
    for idx, targets in batches:
        with autocast:
            _, loss = model(idx, targets)
        n = int((targets >= 0).sum())
        nats, tokens = nats + loss.item() * n, tokens + n
    model.train()
    return nats, tokens


def evaluate_splits(model: GPT, splits: dict[str, Iterable], autocast, ranks: Ranks,
                    stop: StopSignal) -> dict[str, float]:
    """
    Return the loss of each split in nats per token, or {} if any rank is told to stop.

    splits: this rank's batches of each split. A stop takes effect after the current batch.
    """
    losses = {}
    for split, batches in splits.items():
        until_stop = takewhile(lambda batch: not stop.requested, batches)
        nats, tokens = evaluate(model, until_stop, autocast)
        nats, tokens, stops = ranks.sum([nats, tokens, stop.requested], str(model.device))
        if stops:
            return {}
        losses[split] = nats / tokens
    return losses
