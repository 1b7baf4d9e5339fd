"""Device, dtype and the measured peak of the machine. GPUs are simulated."""
import functools
import json
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from helpers import HERE, tiny
from lib import machine
from lib.distributed import Ranks
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


@pytest.mark.parametrize("saved, seconds, expected", [
    ("", (1.0, 0.9), "float32"), ("", (1.0, 0.8), "bfloat16"),
    ("float32", (1.0, 0.8), "float32"), ("float32", (1.0, 0.5), "bfloat16"),
    ("bfloat16", (1.0, 1.1), "bfloat16"), ("bfloat16", (1.0, 1.5), "float32")])
def test_a_resumed_run_keeps_its_dtype_unless_the_other_is_clearly_faster(
        monkeypatch, saved, seconds, expected):
    """A CPU without bfloat16 units does not continue in bfloat16. Noise never changes the type."""
    monkeypatch.setattr(machine, "seconds_of", lambda f, device: 1.0)
    times = iter(seconds)  # of float32, of bfloat16
    monkeypatch.setattr(machine, "best_seconds", lambda f, at_least: next(times))
    assert machine.resolve_dtype_for(tiny(), "auto", "cpu", saved) == expected


def test_a_model_is_not_measured_without_bfloat16_units(monkeypatch):
    times = iter([9.0, 5.0, 9.0, 1.0, 2.0, 1.0])  # of three products in each type
    monkeypatch.setattr(machine, "seconds_of", lambda f, device: next(times))
    assert machine.resolve_dtype_for(tiny(), "auto", "cpu") == "float32"


@pytest.fixture
def cuda(monkeypatch):
    """A simulated torch.cuda of several GPUs; records what becomes the current one."""
    current, zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(
        torch, "zeros", lambda *size, device=None, **kw: None if "cuda" in str(device) else
        zeros(*size, device=device, **kw))
    return current


@pytest.mark.parametrize("device, local_rank, expected", [
    ("auto", None, "cuda:0"), ("cuda", None, "cuda:0"), ("cuda", "3", "cuda:3"),
    ("cuda:1", None, "cuda:1")])
def test_each_rank_uses_its_own_gpu(cuda, monkeypatch, device, local_rank, expected):
    """What asks torch for its current GPU (name, memory, capability) means the same one."""
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert resolve_device(device) == expected and cuda == [expected]


GPUS = [  # name, memory in GB, compute capability, chip in PEAK_FLOPS
    ("Tesla T4", 16, (7, 5), "T4"), ("NVIDIA GeForce RTX 3060", 12, (8, 6), "RTX 3060"),
    ("NVIDIA GeForce RTX 4090", 24, (8, 9), "RTX 4090"),
    ("NVIDIA H100 80GB HBM3", 80, (9, 0), "H100")]


@pytest.fixture(params=GPUS, ids=[chip for *_, chip in GPUS])
def gpu(request, cuda, monkeypatch) -> tuple:
    name, gigabytes, capability, _ = request.param
    memory = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    return request.param


def test_gpus(gpu):
    dtype = "float16" if gpu[0] == "Tesla T4" else "bfloat16"
    assert resolve_dtype("auto", "cuda:0") == dtype
    assert peak_flops("cuda:0", dtype) == (machine.PEAK_FLOPS[gpu[3]], f"{gpu[3]} datasheet")


def test_plan_uses_the_memory_and_speed_of_the_gpu(monkeypatch, capsys, gpu):
    _, gigabytes, capability, chip = gpu
    monkeypatch.setattr(sys, "argv", ["plan.py", "config/train_gpt2_124m.py", "--dataset=nothing"])
    monkeypatch.chdir(HERE)
    runpy.run_path("plan.py", run_name="__main__")
    said = capsys.readouterr().out
    assert f"into {gigabytes} GB" in said and f"({chip} datasheet)" in said
    planned = json.loads(said.strip().splitlines()[-1])
    assert planned["peak_flops"] == machine.PEAK_FLOPS[chip]
    assert planned["batch_size"] == {12: 6, 16: 10, 24: 16, 80: 60}[gigabytes]
    assert planned["fits"] == (gigabytes >= 24)


def test_macs(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda size, device: None)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 10**9)
    assert resolve_device("auto") == "mps" and resolve_dtype("auto", "mps") == "float32"
    assert machine.gpu_memory("mps") == 12 * 10**9 and machine.gpu_memory("cpu") == 0
    assert machine.resolve_loss_chunk(-1, "mps", 50257) == 0
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * 10**9)
    assert machine.describe_peak_memory("mps") == ", 3.0 GB peak memory"


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
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # restored after the test
    statuses, attempts = [], []
    monkeypatch.setattr(os, "_exit", statuses.append)
    machine.explain_out_of_memory()

    def attempt(compiled):
        attempts.append(compiled)
        raise error

    with pytest.raises(type(error)):
        machine.compile_or_eager(tiny(), attempt)
    sys.excepthook(type(error), error, None)
    said = capsys.readouterr().err
    assert statuses == [2] and len(attempts) == 1 and said.count("\n") == 1
    for hint in ("rank 3", "--batch_size", "--loss_chunk=256", "--remat", "plan.py"):
        assert hint in said
    sys.excepthook(RuntimeError, RuntimeError("wrong shape"), None)
    assert "RuntimeError: wrong shape" in capsys.readouterr().err and statuses == [2]


def test_unknown_peak_memory_is_not_printed(monkeypatch):
    """Windows has no module `resource`."""
    assert machine.describe_peak_memory("cpu").endswith(" GB peak memory")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_memory("cpu") == 0 and machine.describe_peak_memory("cpu") == ""


def test_switches_of_torch(monkeypatch):
    """cuDNN's attention is off for batches of many shapes; the rest is deterministic on demand."""
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    precision = torch.get_float32_matmul_precision()
    try:
        machine.set_up_torch()
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.are_deterministic_algorithms_enabled()
        machine.set_up_torch(many_shapes=True, deterministic=True)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.set_float32_matmul_precision(precision)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of CUDA on Linux")
def test_the_allocator_is_configured_before_torch_is_imported():
    code = """
import builtins, os, runpy
real_import = builtins.__import__
def stop_at_torch(name, *args, **kwargs):
    if name == "torch":
        print(os.environ.get("PYTORCH_ALLOC_CONF"))
        raise SystemExit
    return real_import(name, *args, **kwargs)
os.environ.pop("PYTORCH_ALLOC_CONF", None)
builtins.__import__ = stop_at_torch
runpy.run_path("train.py")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout.strip() == "expandable_segments:True", done.stderr


def test_ranks_exchange_gradients_during_the_backward_pass(monkeypatch):
    """DDP divides the graph where a bucket of gradients is full, only if it is outside."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    model = tiny(n_embd=128, n_layer=4).train()  # 3 MB; the first bucket takes one
    idx = torch.zeros(2, 8, dtype=torch.long)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped, form = machine.compile_or_eager(
            model, lambda compiled: compiled(idx, idx)[1].backward(), lambda line: None,
            Ranks(0, 0, 1, distributed=True).wrap)
        assert form == "compiled" and len(graphs) > 1
        n_graphs = len(graphs)
        wrapped(idx, idx)[1].backward()
        assert len(graphs) == n_graphs and not wrapped.broadcast_buffers
    finally:
        dist.destroy_process_group()
