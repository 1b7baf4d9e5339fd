"""
The device: which one, its data type, its speed and its memory.
"""
import contextlib
import ctypes
import math
import os
import re
import sys
import time
from collections.abc import Callable

import torch

# FLOP/s of dense matrix products in 16 bits with float32 accumulation, from the datasheets
PEAK_FLOPS = {
    "T4": 65e12, "V100": 125e12, "A10": 125e12, "L4": 121e12, "A100": 312e12, "H100": 989e12,
    "H200": 989e12, "B200": 2250e12, "MI300X": 1307e12, "RTX 3060": 25e12, "RTX 3070": 41e12,
    "RTX 3080": 60e12, "RTX 3090": 71e12, "RTX 4060": 30e12, "RTX 4070": 58e12, "RTX 4080": 97e12,
    "RTX 4090": 165e12, "RTX 5060": 38e12, "RTX 5070": 62e12, "RTX 5080": 113e12,
    "RTX 5090": 210e12,
}

SAVE_MEMORY = (
    "halve --batch_size and double --gradient_accumulation_steps, add --loss_chunk=256 or --remat, "
    "or train a smaller model; python plan.py with the same config file predicts what fits")


def resolve_device(device: str) -> str:
    """
    Resolve 'auto': cuda, else mps, else cpu. Raise ValueError if a device cannot be used.

    'cuda' is this rank's GPU, 'cuda:1' the second one; it becomes torch's current GPU, to which
    its name, capability, memory and synchronization refer.
    """
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", device):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:1 or mps, got {device!r}")
    asked = device
    try:
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.zeros(1, device=device)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\. |\n", str(error))[0]
        raise ValueError(f"device {asked!r} cannot be used here: {reason}") from None
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """
    Check dtype and replace 'auto' by the fastest type in which training is safe.

    On a CPU 'auto' stays, as only a measurement can decide: see resolve_dtype_for().
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    if dtype != "auto" or device == "cpu":
        return dtype
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"
    return "float32"


def resolve_dtype_for(model: torch.nn.Module, dtype: str, device: str, saved: str = "") -> str:
    """
    Like resolve_dtype, but on a CPU measure which type is faster for this model.

    saved: the type that a resumed run had on a CPU. It is kept unless the other is clearly faster.
    """
    dtype = resolve_dtype(dtype, device)
    return measure_dtype(model, saved) if dtype == "auto" else dtype


def measure_dtype(model: torch.nn.Module, saved: str = "") -> str:
    """Return float32 or bfloat16, whichever trains this GPT faster on the CPU."""
    if model.lm_head.weight.dtype == torch.int8:
        return "float32"  # its products are of integers, and it has no backward pass

    def product_seconds(dtype: torch.dtype) -> float:
        a = torch.ones(256, 256, dtype=dtype)
        return min(seconds_of(lambda: a @ a, "cpu") for _ in range(3))

    # without bfloat16 units, where training a large model in it would take a minute per step
    if product_seconds(torch.bfloat16) > 4 * product_seconds(torch.float32):
        return "float32"
    T = min(128, model.config.block_size)
    idx = torch.zeros(256 // T, T, dtype=torch.long)  # (B, T), enough for products to dominate

    def forward_and_backward(dtype: str) -> None:
        with torch.enable_grad(), torch.random.fork_rng([]), autocast("cpu", dtype):
            model(idx, idx)[1].backward()
        model.zero_grad(set_to_none=True)

    # the fastest of many calls, as other programs may slow down some of them
    float32 = best_seconds(lambda: forward_and_backward("float32"), at_least=0.2)
    bfloat16 = best_seconds(lambda: forward_and_backward("bfloat16"), at_least=0.2)
    # the margin keeps float32, or what the run had, where the difference is noise
    margin = {"float32": 1.5, "bfloat16": 0.8}.get(saved, 1.2)
    return "bfloat16" if margin * bfloat16 < float32 else "float32"


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    """Return a context that can be entered many times and computes matrix products in dtype."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, getattr(torch, dtype))


def resolve_loss_chunk(loss_chunk: int, device: str, vocab_size: int) -> int:
    """Resolve -1: 256 on a CPU with a large vocabulary, where it is faster, else 0."""
    if loss_chunk >= 0:
        return loss_chunk
    return 256 if device == "cpu" and vocab_size >= 4096 else 0


def is_out_of_memory(error: BaseException | None) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        phrase in str(error).lower() for phrase in ("out of memory", "can't allocate memory"))


def explain_out_of_memory(advice: str = SAVE_MEMORY) -> None:
    """
    From now on, end this process with one line of advice when the device is out of memory.

    A rank that loses its connection to another one ends with one line, too. Call this after the
    ranks are connected: torch then sets a hook of its own, which must be the earlier one.
    """
    before = sys.excepthook

    def explain(kind: type, error: BaseException, trace: object) -> None:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""  # any rank prints it
        lost = rank and isinstance(error, RuntimeError) and re.search(
            "connection (was )?(closed|reset)|remote process exited", str(error), re.IGNORECASE)
        if not lost and not is_out_of_memory(error):
            return before(kind, error, trace)
        reason = "another rank has ended" if lost else f"out of memory: {advice}"
        sys.stdout.flush()
        print(f"error: {rank}{reason}", file=sys.stderr, flush=True)
        os._exit(2)

    sys.excepthook = explain


def compile_or_eager(model: torch.nn.Module, attempt: Callable[[torch.nn.Module], None],
                     report: Callable[[str], None] = print,
                     wrap: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model
                     ) -> tuple[torch.nn.Module, str]:
    """
    Return the compiled model and 'compiled', or the model and 'eager' where compiling fails.

    attempt: a call of the compiled model, which compiles it. report: receives a line before and, if
    it fails, one that says why: a missing C compiler, an old GPU or an unknown operation. wrap:
    applied to the result. DDP has to be outside: it divides the graph, so that gradients are
    exchanged during the backward pass.
    """
    report("compiling the model ...")
    try:
        compiled = wrap(torch.compile(model))
        with getattr(compiled, "no_sync", contextlib.nullcontext)():
            attempt(compiled)
        return compiled, "compiled"
    except Exception as error:
        if is_out_of_memory(error):  # eager mode would need more
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        report(f"torch.compile does not work here ({type(error).__name__}: {reason[:80]}); "
               "continuing in eager mode")
        return wrap(model), "eager"
    finally:
        model.zero_grad(set_to_none=True)


def set_up_torch(many_shapes: bool = False, deterministic: bool = False) -> None:
    """
    Set torch's global switches for training.

    many_shapes: batches differ in length, so do not use cuDNN's attention. deterministic: use only
    kernels that give the same bits in every run, where an operation has one, or raise an error.
    """
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    if many_shapes:  # cuDNN's attention, the default on H100 and B200, plans anew for each shape
        torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it for this
        torch.use_deterministic_algorithms(True)


def keep_freed_memory(keep: bool = True) -> None:
    """
    Let glibc keep the memory that a step frees for the next step, or (False) restore its defaults.

    On a CPU, new pages for large tensors cost a fifth of a training step. By default glibc returns
    blocks above 32 MB to the system.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0 if keep else 65536)  # M_MMAP_MAX: number of separate mappings
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: size from which a mapping is used
        libc.mallopt(-1, 2**31 - 1 if keep else 2**26)  # M_TRIM_THRESHOLD
        if not keep:
            libc.malloc_trim(0)


def share_heap() -> None:
    """Let all threads share one heap of glibc: the heap of each thread keeps its freed memory."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-8, 1)  # M_ARENA_MAX


def synchronize(device: str) -> None:
    """Wait until a GPU has finished its work."""
    if not device.startswith("cpu"):
        torch.accelerator.synchronize()


def seconds_of(f: Callable[[], object], device: str = "cpu") -> float:
    """Return the seconds that one call takes."""
    synchronize(device)
    start = time.perf_counter()
    f()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(f: Callable[[], object], repeats: int = 5, device: str = "cpu") -> float:
    """Return the median time of a call over `repeats` calls after a first one."""
    times = [seconds_of(f, device) for _ in range(repeats + 1)]
    return sorted(times[1:])[repeats // 2]


def best_seconds(f: Callable[[], object], at_least: float = 0.5, device: str = "cpu") -> float:
    """Repeat a call for at_least seconds. Return the time of the fastest call in seconds."""
    times = [seconds_of(f, device)]
    while sum(times[1:]) < at_least:  # the first call also loads and allocates
        times.append(seconds_of(f, device))
    return min(times)


def peak_flops(device: str, dtype: str) -> tuple[float, str]:
    """
    Return the FLOP/s that the device can reach in dtype and the source of the figure.

    The source is a datasheet or, for unknown chips and in float32, the fastest of repeated matrix
    products. On a busy machine the measured peak can be too low.
    """
    if device.startswith("cuda") and dtype != "float32":
        name = torch.cuda.get_device_name()
        for chip in PEAK_FLOPS:
            # "RTX 4070 Ti" and "RTX 4070 Laptop GPU" are other chips than "RTX 4070"
            if re.search(rf"\b{chip}\b(?! Ti| SUPER| D| Laptop)", name):
                return PEAK_FLOPS[chip], f"{chip} datasheet"

    def time_product(n: int) -> float:
        a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype))
        return best_seconds(lambda: a @ b, device=device)

    n = 1024 if device == "cpu" else 4096
    if device == "cpu" and dtype != "float32" and time_product(128) > 1e-3:
        n = 128  # a type without hardware support, in which a large product would take seconds
    return 2 * n**3 / time_product(n), f"measured {n} x {n} matrix product"


def peak_memory(device: str) -> int:
    """
    Return the peak memory use so far in bytes, of the GPU or else of this process.

    0 if it is unknown, as on Windows.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    if device == "mps":  # it keeps what was freed, so this is about the peak
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, else kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def system_memory() -> float:
    """Return the memory of this machine in bytes, infinity if it is unknown, as on Windows."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def weight_bytes(c) -> int:
    """
    Return the bytes in float32 of the matrices, embeddings and positions of a GPTConfig.

    Counted without building the model, as a crafted config could be of any size.
    """
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    block = c.n_embd * (2 * q + 2 * kv + c.n_inner * (2 if c.arch == "gpt2" else 3))
    tables = c.n_embd * c.vocab_size * (1 if c.tied else 2)
    positions = c.block_size * (c.n_embd if c.arch == "gpt2" else c.head_dim)
    return 4 * (c.n_layer * block + tables + positions)


def check_memory(needed: int, device: str = "cpu") -> None:
    """Raise ValueError if a model that needs so many bytes cannot fit into a device's memory."""
    available = int(min(gpu_memory(device) or system_memory(), 1e15))
    if needed > available:
        raise ValueError(f"the model needs at least {needed // 10**9:,} GB of memory, and the "
                         f"device {device} has {available // 10**9:,} GB: choose a smaller model")


def gpu_memory(device: str) -> int:
    """Return the bytes of a GPU's memory, 0 for a CPU. On a Mac, those that Metal recommends."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return torch.mps.recommended_max_memory() if device == "mps" else 0


def describe_peak_memory(device: str) -> str:
    """Return text such as ', 0.6 GB peak memory', or '' if it is unknown."""
    peak = peak_memory(device)
    return f", {peak / 1e9:.1f} GB peak memory" if peak else ""
