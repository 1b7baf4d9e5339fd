"""
Run the model, a training step and generation on a simulated GPU: its tensors have a shape,
a type and a device, but no numbers. test_fake_gpu.py runs this file, as a process can have only one
such device.

It finds tensors that were left on the CPU, counts reads of a number on the device, each of which
makes the host wait, and rejects float64, which Apple's GPUs do not have. It does not see kernels,
numbers, the types of autocast, memory or NCCL, and cannot run a beam search, whose shapes depend on
numbers.
"""
import json
from itertools import product

import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from lib import optim
from lib.dataset import prefetch
from lib.decoding import Sampling
from lib.loss import make_loss
from lib.quantize import use_int8_layers
from model import GPT, GPTConfig

GPU = "fakegpu"
KERNELS = library.Library("_", "IMPL")  # unregistered when it is deleted


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Waits(TorchFunctionMode):
    """Count reads of a number on the device, answering 0 or False; reject float64 by default."""
    answers = {"item": 0.0, "tolist": [0.0] * 5, "__bool__": False, "__int__": 0, "__float__": 0.0,
               "__index__": 0}

    def __init__(self, float64: bool = False):
        super().__init__()
        self.count, self.float64 = 0, float64

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.answers and args[0].device.type == GPU:
            self.count += 1
            return self.answers[func.__name__]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if not isinstance(tensor, torch.Tensor):
                continue
            source = args[0].device.type if args and isinstance(args[0], torch.Tensor) else ""
            self.count += source == GPU and tensor.device.type == "cpu"  # a copy to the host
            if tensor.dtype == torch.float64 and tensor.device.type == GPU and not self.float64:
                raise TypeError(f"{func.__name__} gives float64, which MPS does not have")
        return result


def register() -> None:
    _setup_privateuseone_for_python_backend(GPU, Backend())
    # autocast can be entered, and changes no type
    KERNELS.fallback(library.fallthrough_kernel, "AutocastPrivateUse1")
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=GPU)


def training_waits(arch: str, optimizer: str, dtype: str, loss_chunk: int, softmax_tokens: int,
                   remat: bool) -> int:
    """Run a step of two micro-batches, as in train.py; return its waits."""
    model = make_model(arch)
    model.remat = remat
    counts = torch.zeros(300, device=GPU)
    model.loss_fn = make_loss(loss_chunk, softmax_tokens, counts if softmax_tokens else None)
    optimizers = optim.make_optimizers(model, optimizer, 0.1, 1e-3, (0.9, 0.95), GPU)
    scaler = torch.amp.GradScaler(GPU, enabled=dtype == "float16")
    cpu = torch.zeros(4, 8, dtype=torch.long)
    with Waits(float64=dtype == "float16") as waits:  # torch's own scaler uses it
        loss = torch.zeros((), device=GPU)
        for x, y, weight in prefetch([(cpu, cpu, torch.ones(()))] * 2, GPU):
            with torch.autocast(GPU, getattr(torch, dtype), enabled=dtype != "float32"):
                micro_loss = model(x, y)[1] * weight / 2
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        grad_norm, bad = optim.step(model, optimizers, scaler, 1.0)
    assert {t.device.type for t in (loss, grad_norm, bad)} == {GPU}
    return waits.count


def make_model(arch: str) -> GPT:
    config = GPTConfig(arch=arch, block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=32,
                       dropout=0.1)
    with torch.device(GPU):
        model = GPT(config)
    for name, buffer in model.named_buffers():  # model.to() cannot swap fake parameters
        setattr(model, name, buffer.to(GPU))
    return model


def decoding_waits(model: GPT, sampler: Sampling, pad: torch.Tensor | None, stop_token: int) -> int:
    """Generate 6 tokens after 4, beyond block_size; return the waits after the first token."""
    idx = torch.zeros(4, 4, dtype=torch.long, device=GPU)
    with Waits() as waits:
        columns = model.stream(idx, 6, sampler, stop_token=stop_token, pad=pad)
        assert next(columns).device.type == GPU
        waits.count = 0
        for column in columns:
            assert column.device.type == GPU
    return waits.count


def to_int8(model: GPT) -> None:
    layers = (name for name, module in model.named_modules()
              if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)))
    with torch.device(GPU):
        use_int8_layers(model, {f"{name}.weight": torch.empty(0, dtype=torch.int8)
                                for name in layers})


def mistakes_found(model: GPT) -> int:
    """Return how many planted mistakes are noticed: a tensor on the CPU, waits, float64."""
    found = 0
    try:
        model(torch.zeros(4, 8, dtype=torch.long))
    except RuntimeError as error:
        found += "same device" in str(error)
    with Waits() as waits:
        float(torch.zeros((), device=GPU))
        torch.zeros((), device=GPU).cpu()
        try:
            torch.zeros((), device=GPU).double()
        except TypeError:
            found += 1
    return found + waits.count


LOSSES = {"plain": (0, 0, False), "chunks, remat": (24, 0, True), "sampled": (0, 100, False)}
SAMPLERS = {
    "all": {}, "top_k": dict(top_k=2), "top_k, top_p": dict(top_k=2, top_p=0.9),
    "top_p, min_p": dict(top_p=0.9, min_p=0.1), "most probable": dict(temperature=0.0),
    "penalties": dict(repetition_penalty=1.2, no_repeat_ngram=2),
}


def main() -> None:
    """Print the waits of everything as a JSON object."""
    register()
    waits = {}
    with FakeTensorMode():
        for arch in ("gpt2", "qwen3"):
            for optimizer, dtype, loss in product(("adamw", "muon"),
                                                  ("float32", "bfloat16", "float16"), LOSSES):
                waits[f"train, {arch}, {optimizer}, {dtype}, {loss}"] = training_waits(
                    arch, optimizer, dtype, *LOSSES[loss])
            model = make_model(arch).eval()
            for weights in ("float32", "int8"):
                if weights == "int8":
                    to_int8(model)
                pad = torch.zeros(4, dtype=torch.long, device=GPU)
                for name, settings in SAMPLERS.items():
                    for stop_token, padding in ((-1, None), (3, pad)):
                        key = (f"decode, {arch}, {weights}, {name}" + ", stop" * (stop_token >= 0)
                               + ", pad" * (padding is not None))
                        sampler = Sampling(**settings, stop_token=stop_token)
                        waits[key] = decoding_waits(model, sampler, padding, stop_token)
        waits["mistakes found"] = mistakes_found(make_model("gpt2"))
    print(json.dumps(waits))


if __name__ == "__main__":
    main()
