"""
Measure training speed, on random tokens: no data set needed.

    python bench.py
    python bench.py config/train_fables.py --against=/path/to/nanoGPT/model.py

The last line of output is one JSON object; the ratio in it is ours over theirs.
"""
import contextlib
import importlib.util
import json
import statistics
import time
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

import model as ours
from configurator import configure, user_errors

# -----------------------------------------------------------------------------
against = ""  # a nanoGPT-style model.py with GPT and GPTConfig, measured in turns with ours
rounds = 5  # timed rounds; the figures are their medians
steps = 5  # training steps of a round
batch_size = 32  # rows of a micro-batch
block_size = 128  # context in tokens
vocab_size = 50257
arch = "gpt2"
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.1
bias = True
device = "auto"  # cuda, else mps, else cpu; or 'cpu', 'cuda:1', ...
dtype = "auto"  # fastest safe type on the device; or 'float32', 'bfloat16', 'float16'
compile = True  # torch.compile, where it works
seed = 1337
configure(globals(), skip_settings_of="train.py")
# -----------------------------------------------------------------------------


class Side:
    """One of the two programs: its model, its own optimizer, and training steps on the common batches."""

    def __init__(self, module: ModuleType, name: str, **extra):
        self.name = name
        self.times: list[float] = []  # seconds of the rounds
        torch.manual_seed(seed)
        shape = dict(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                     dropout=dropout, bias=bias)
        self.raw_model = module.GPT(module.GPTConfig(**shape, **extra)).to(device).train()
        self.optimizer = self.raw_model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device_type)
        self.scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
        self.model = torch.compile(self.raw_model) if compile else self.raw_model
        try:
            self.step(*batch)
        except Exception as error:
            if not compile:
                raise
            print(f"{name}: torch.compile does not work here ({type(error).__name__}); measured in eager mode")
            self.model = self.raw_model
            self.step(*batch)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        with autocast:
            _, loss = self.model(x, y)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def measure(self) -> None:
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step(*batch)
        synchronize()
        self.times.append(time.perf_counter() - start)

    def tokens_per_second(self) -> float:
        return steps * batch_size * block_size / statistics.median(self.times)

    def spread(self) -> float:
        """Slowest over fastest round, minus one."""
        return max(self.times) / min(self.times) - 1


def synchronize() -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()


def load_peer(path: str) -> ModuleType:
    if not Path(path).is_file():
        raise ValueError(f"--against: there is no file {path}")
    spec = importlib.util.spec_from_file_location("peer_model", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        _ = module.GPT, module.GPTConfig
    except Exception as error:
        raise ValueError(f"{path} is not a model.py with GPT and GPTConfig: {type(error).__name__}: {error}") from None
    return module


with user_errors():
    for name, least in (("rounds", 1), ("steps", 1), ("batch_size", 1), ("seed", 0)):
        if globals()[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {globals()[name]}")
    peer = load_peer(against) if against else None
    ours.GPTConfig(arch, block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias)
    device = ours.resolve_device(device)
    dtype = ours.resolve_dtype(dtype, device, n_embd)
device_type = device.split(":")[0]
autocast = contextlib.nullcontext() if dtype == "float32" else torch.autocast(device_type, getattr(torch, dtype))
torch.set_float32_matmul_precision("high")
torch.manual_seed(seed)
tokens = torch.randint(vocab_size, (batch_size, block_size + 1), device=device)
batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
peak, peak_source = ours.peak_flops(device, dtype)

sides = [Side(ours, "this model", arch=arch)] + ([Side(peer, against)] if peer else [])
for side in sides:
    side.step(*batch)
for _ in tqdm(range(rounds), desc="rounds"):
    for side in sides:  # in turns, so that a busy or throttled machine slows both
        side.measure()

mine = sides[0]
mfu = mine.tokens_per_second() * mine.raw_model.flops_per_token() / peak
print(f"{mine.raw_model.num_params():,} parameters, batch {batch_size} x {block_size}, {device}, {dtype}, "
      f"torch {torch.__version__}; medians of {rounds} rounds of {steps} steps")
for side in sides:
    print(f"{side.tokens_per_second():12,.0f} tok/s (spread {side.spread():.0%})  "
          f"{'eager' if side.model is side.raw_model else 'compiled'}  {side.name}")
print(f"{mfu:12.1%} MFU of this model, against {peak / 1e12:.3g} TFLOP/s ({peak_source})")
result = dict(mode="train", parameters=mine.raw_model.num_params(), device=device, dtype=dtype,
              compiled=mine.model is not mine.raw_model, tokens_per_second=mine.tokens_per_second(), spread=mine.spread(),
              mfu=mfu)
if peer:
    result |= dict(against=against, their_tokens_per_second=sides[1].tokens_per_second(),
                   ratio=mine.tokens_per_second() / sides[1].tokens_per_second())
    print(f"{result['ratio']:12.2f} times as fast")
print(json.dumps(result))
