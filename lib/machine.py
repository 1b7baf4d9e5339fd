"""The device, its data type, its speed and its memory."""
import ctypes
import re
import sys
import time

import torch

from model import GPT, Int8Linear

# -----------------------------------------------------------------------------
# The machine under the model

PEAK_FLOPS = {  # datasheets: dense matrix products in 16 bits with float32 accumulation, FLOP/s
    "T4": 65e12, "V100": 125e12, "A10": 125e12, "L4": 121e12, "A100": 312e12, "H100": 989e12, "H200": 989e12,
    "B200": 2250e12, "MI300X": 1307e12, "RTX 3060": 25e12, "RTX 3070": 41e12, "RTX 3080": 60e12, "RTX 3090": 71e12,
    "RTX 4060": 30e12, "RTX 4070": 58e12, "RTX 4080": 97e12, "RTX 4090": 165e12, "RTX 5060": 38e12, "RTX 5070": 62e12,
    "RTX 5080": 113e12, "RTX 5090": 210e12,
}


def resolve_device(device: str) -> str:
    """'auto' becomes cuda, else mps, else cpu; ValueError for a device that this machine or this torch lacks."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def keep_freed_memory(keep: bool = True) -> None:
    """
    Have glibc keep the memory that a step frees for the next one: on a CPU, new pages for large tensors cost a fifth of
    its time. False: as glibc comes to work by itself, handing back all above 32 MB.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0 if keep else 65536)  # M_MMAP_MAX: mappings of their own for large tensors
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: those from here on
        libc.mallopt(-1, 2**31 - 1 if keep else 2**26)  # M_TRIM_THRESHOLD
        if not keep:
            libc.malloc_trim(0)


def resolve_dtype(dtype: str, device: str) -> str:
    """
    'auto' becomes the fastest type that trains safely: on CUDA bfloat16 where the chip has it, else float16. On a CPU it
    stays 'auto', for measured_dtype to settle.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    if dtype != "auto" or device == "cpu":
        return dtype
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"
    return "float32"


def measured_dtype(model: GPT) -> str:
    """
    Whichever of float32 and bfloat16 takes this very model forward and backward faster: CPUs differ a hundredfold. A model
    in int8 has no backward, and does its sums in integers: float32.
    """
    if isinstance(model.lm_head, Int8Linear):
        return "float32"
    T = min(128, model.config.block_size)
    idx = torch.zeros(256 // T, T, dtype=torch.long)  # (B, T), enough for the products to be what takes the time

    def step(bfloat16: bool) -> None:
        with torch.enable_grad(), torch.random.fork_rng([]), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            model(idx, idx)[1].backward()
        model.zero_grad(set_to_none=True)

    seconds = {bfloat16: median_seconds(lambda: step(bfloat16), repeats=3) for bfloat16 in (False, True)}
    return "bfloat16" if 1.2 * seconds[True] < seconds[False] else "float32"  # the margin: float32 where it is noise


def resolve_loss_chunk(loss_chunk: int, device: str, vocab_size: int) -> int:
    """-1 becomes 256 on a CPU with a large vocabulary, where it is faster too, else 0."""
    return loss_chunk if loss_chunk >= 0 else 256 if device == "cpu" and vocab_size >= 4096 else 0


def peak_flops(device: str, dtype: str) -> tuple[float, str]:
    """FLOP/s that the device can reach in dtype, and where the figure is from: a datasheet, or a matrix product timed now."""
    if device.startswith("cuda") and dtype != "float32":
        name = torch.cuda.get_device_name()
        for chip in PEAK_FLOPS:
            if re.search(rf"\b{chip}\b(?! Ti| SUPER| D| Laptop)", name):  # those are other chips: measured
                return PEAK_FLOPS[chip], f"{chip} datasheet"
    n = 4096 if device.startswith("cuda") else 1024
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    b = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    return 2 * n**3 / median_seconds(lambda: a @ b, synchronize=device), f"measured {n} x {n} matrix product"


def median_seconds(f, repeats: int = 5, synchronize: str = "cpu") -> float:
    """Median time of a call, the first one left out."""
    times = []
    for _ in range(repeats + 1):
        if synchronize.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if synchronize.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]
