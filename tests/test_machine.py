"""Device, dtype and the measured peak of the machine."""
import sys

import pytest
import torch

from helpers import tiny
from lib import machine
from lib.machine import measure_dtype, median_seconds, peak_flops, resolve_device, resolve_dtype


def test_device_and_dtype():
    assert resolve_dtype("float32", "cpu") == "float32"
    assert resolve_dtype("auto", "cpu") == "auto"
    assert measure_dtype(tiny()) in ("float32", "bfloat16")
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="float64"):
        resolve_dtype("float64", "cpu")
    with pytest.raises(ValueError, match="toaster"):
        resolve_device("toaster")
    if not torch.cuda.is_available():
        for device in ("cuda", "cuda:1"):
            with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
                resolve_device(device)
    flops, source = peak_flops("cpu", "float32")
    assert flops > 1e8 and "measured" in source
    assert median_seconds(lambda: None) < 1


def test_the_measured_peak_is_the_best_of_many(monkeypatch):
    """A clock on which single products take between 1 and 9 seconds."""
    clock, times = [0.0], iter([50.0, 9.0, 3.0, 1.0, 5.0, 9.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock[0])

    def product():
        clock[0] += next(times)

    assert machine.best_seconds(product, at_least=15) == 1.0
    assert list(times) == [9.0]  # the first call, which also loads and allocates, does not count
    monkeypatch.setattr(machine, "best_seconds", lambda f, device: 2.0)
    assert peak_flops("cpu", "float32")[0] == 1024**3  # of the 2 * 1024**3 in a product


@pytest.fixture
def cuda(monkeypatch):
    """A pretended torch.cuda of several GPUs; records what becomes the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(machine.torch, "zeros", lambda *size, device: None)
    return current


@pytest.mark.parametrize("device, local_rank, expected", [
    ("auto", None, "cuda:0"), ("cuda", None, "cuda:0"), ("cuda", "3", "cuda:3"),
    ("cuda:1", None, "cuda:1")])
def test_each_rank_uses_its_own_gpu(cuda, monkeypatch, device, local_rank, expected):
    """What asks torch for its current GPU (name, memory, capability) means the same one."""
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert resolve_device(device) == expected and cuda == [expected]


@pytest.mark.parametrize("chip, capability, dtype", [
    ("Tesla T4", (7, 5), "float16"), ("NVIDIA GeForce RTX 3060", (8, 6), "bfloat16"),
    ("NVIDIA GeForce RTX 4090", (8, 9), "bfloat16"), ("NVIDIA H100 80GB HBM3", (9, 0), "bfloat16")])
def test_gpus(monkeypatch, chip, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: chip)
    assert resolve_dtype("auto", "cuda:0") == dtype
    flops, source = peak_flops("cuda:0", dtype)
    assert source.removesuffix(" datasheet") in chip and flops == machine.PEAK_FLOPS[source[:-10]]


def test_every_device_but_the_cpu_is_waited_for(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
    for device in ("cuda:0", "cuda:1", "mps", "xpu"):
        machine.synchronize(device)
    assert len(waits) == 4
    machine.synchronize("cpu")
    assert len(waits) == 4


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes")])
def test_out_of_memory_is_one_line_and_not_tried_in_eager_mode(capsys, monkeypatch, error):
    monkeypatch.setenv("RANK", "3")
    attempts = []

    def attempt(compiled):
        attempts.append(compiled)
        with machine.out_of_memory_errors():
            raise error

    with pytest.raises(SystemExit) as stop:
        machine.compile_or_eager(tiny(), attempt)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(attempts) == 1 and said.count("\n") == 1
    for hint in ("rank 3", "--batch_size", "--loss_chunk=256", "--remat", "plan.py"):
        assert hint in said
    with pytest.raises(RuntimeError, match="shape"), machine.out_of_memory_errors():
        raise RuntimeError("wrong shape")


def test_unknown_peak_memory_is_not_printed(monkeypatch):
    """Windows has no module `resource`."""
    assert machine.describe_peak_memory("cpu").endswith(" GB peak memory")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_memory("cpu") == 0 and machine.describe_peak_memory("cpu") == ""
