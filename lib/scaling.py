"""
Which model to train in a given time: a ladder of sizes, their speed here, and a scaling law.

docs/scaling.py fits the law to training runs; docs/scaling.md lists the runs and the errors.
"""
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch

from lib import machine, optim
from lib.loss import make_loss
from model import GPT, GPTConfig

TOKENS_PER_STEP = 3072
SOFTMAX_TOKENS = 4096  # tokens in the training softmax
MIN_STEPS = 90  # the law is too inaccurate for shorter runs
# (n_layer, n_embd) of the models to choose from, smallest first
LADDER = [(2, 48), (2, 64), (2, 96), (2, 128), (3, 128), (4, 128), (3, 192), (4, 192), (4, 256),
          (6, 256), (4, 384), (6, 384), (8, 384), (8, 512)]
MEASURED = [(2, 48), (4, 192), (6, 384)]  # plan.py interpolates the speed of the others


class Law(NamedTuple):
    """
    Bits per byte = floor + A / N^a + B / D^b.

    N: parameters in the blocks. D: training tokens, where repeated ones count less, see
    effective_tokens().
    """
    floor: float
    A: float
    a: float
    B: float
    b: float
    repeat_scale: float  # a token that is repeated forever counts as 1 + repeat_scale new ones

    def bits_per_byte(self, parameters, tokens, distinct_tokens):
        """Return the prediction, for numbers or NumPy arrays."""
        D = effective_tokens(tokens, distinct_tokens, self.repeat_scale)
        return self.floor + self.A * parameters ** -self.a + self.B * D ** -self.b


LAW = Law(floor=0.5463, A=11.59, a=0.3534, B=158.9, b=0.4486, repeat_scale=2.46)


def effective_tokens(tokens, distinct, repeat_scale: float):
    """
    Return how many new tokens teach as much as `tokens` that repeat `distinct` ones.

    Source: https://arxiv.org/abs/2305.16264
    """
    seen = np.minimum(tokens, distinct)
    repeats = tokens / seen - 1
    return seen * (1 + repeat_scale * (1 - np.exp(-repeats / repeat_scale)))


def meta_model(n_layer: int, n_embd: int, block_size: int, vocab_size: int) -> GPT:
    """
    Return a Qwen3 without weights, on the device 'meta'.

    Its heads have width 32 below n_embd = 192, and 64 from there on.
    """
    with torch.device("meta"):
        return GPT(GPTConfig(
            arch="qwen3", n_layer=n_layer, n_head=n_embd // (32 if n_embd < 192 else 64),
            n_embd=n_embd, block_size=block_size, vocab_size=vocab_size))


def flops_per_token(model: GPT) -> int:
    """Return the FLOPs per training token with SOFTMAX_TOKENS in the softmax."""
    return model.flops_per_token(head_tokens=min(SOFTMAX_TOKENS, model.config.vocab_size))


def train_and_evaluate(settings: dict[str, object], **environment: str) -> dict:
    """
    Run train.py with config/tuned.py and these settings, then eval.py; return its summary.

    Raises ValueError with the end of the error output if a script fails.
    """
    root = Path(__file__).parents[1]
    with TemporaryDirectory() as out_dir:
        settings = settings | dict(out_dir=out_dir, sample_every_eval=False, overwrite=True)
        options = [f"--{name}={value}" for name, value in settings.items()]
        eval_options = [f"--{name}={settings[name]}" for name in ("device", "dtype")
                        if name in settings]
        for command in (["train.py", "config/tuned.py", *options],
                        ["eval.py", f"--out_dir={out_dir}", *eval_options]):
            done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True,
                                  text=True, env=os.environ | environment)
            if done.returncode:
                raise ValueError(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
        return json.loads(Path(out_dir, "metrics_summary.json").read_text())


def measure_speed(config: GPTConfig, token_counts: torch.Tensor, device: str, dtype: str,
                  seconds: float = 4.0) -> float:
    """Train on random tokens for about `seconds` seconds; return the tokens per second."""
    model = GPT(config).to(device).train()
    chunk = machine.resolve_loss_chunk(-1, device, config.vocab_size)
    model.loss_fn = make_loss(chunk, SOFTMAX_TOKENS, token_counts.to(device))
    optimizers = optim.make_optimizers(model, "muon", 0.0, 1e-3, (0.85, 0.99), device.split(":")[0])
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=dtype == "float16")
    rows = TOKENS_PER_STEP // config.block_size
    data = torch.randint(config.vocab_size, (rows, config.block_size + 1), device=device)

    def step() -> None:
        with machine.autocast(device, dtype):
            loss = model(data[:, :-1], data[:, 1:])[1]
        scaler.scale(loss).backward()
        optim.step(model, optimizers, scaler, grad_clip=1.0)

    first = machine.seconds_of(step, device)
    repeats = min(20, max(2, int(seconds / first)))
    return TOKENS_PER_STEP / machine.median_seconds(step, repeats, device)


def interpolate_speed(token_flops: float, measured: Sequence[tuple[float, float]]) -> float:
    """
    Return the predicted tokens per second of a model with token_flops FLOPs per token.

    measured: (FLOPs per token, tokens per second) of some models, smallest first. The FLOP/s are
    interpolated linearly over the logarithm of the FLOPs per token.
    """
    logs, rates = zip(*((math.log(F), F * speed) for F, speed in measured))
    return float(np.interp(math.log(token_flops), logs, rates)) / token_flops
