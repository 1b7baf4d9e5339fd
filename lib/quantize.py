"""
Faster layers for inference: int8 weights, and a matrix product for few rows on a CPU.

model.py knows nothing of them. int8 layers replace its layers before int8 weights are loaded;
prepare_for_inference() replaces the float ones afterwards.
"""
import warnings

import torch
import torch.nn as nn
from torch.nn import functional as F

MAX_ROWS = 128  # with more rows, F.linear is faster than FastLinear


def quantize_int8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Return a state dict with matrices and embeddings in int8, for use_int8_layers().

    A row w becomes round(w / scale) with scale = max |w| / 127, stored as NAME_scale.
    """
    result, done = {}, {}
    for name, w in weights.items():
        if w.dim() < 2 or w.dtype == torch.int8:
            result[name] = w
            continue
        if w.data_ptr() not in done:  # a tied head has the same memory as the embedding
            scale = w.float().abs().amax(dim=1).clamp(min=1e-12) / 127
            done[w.data_ptr()] = (w / scale[:, None]).round().to(torch.int8), scale
        result[name], result[f"{name}_scale"] = done[w.data_ptr()]
    return result


def use_int8_layers(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Replace the layers of a model whose weights are in int8, so that load_state_dict fits."""
    for name, module in list(model.named_modules()):
        weight = weights.get(f"{name}.weight")
        if weight is not None and weight.dtype == torch.int8:
            layer = Int8Linear if isinstance(module, nn.Linear) else Int8Embedding
            replace_module(model, name, layer(module))


def prepare_for_inference(model: nn.Module) -> None:
    """
    Make a model with loaded weights faster; it is not to be trained afterwards.

    On a CPU, Linear layers become FastLinear and int8 layers are packed. Dropout is removed.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.weight.device.type == "cpu":
            replace_module(model, name, FastLinear(module))
        elif isinstance(module, nn.Dropout):
            replace_module(model, name, nn.Identity())
        elif isinstance(module, Int8Linear):
            module.pack()


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class FastLinear(nn.Module):
    """
    A Linear layer that is up to twice as fast on a CPU for few rows, as in generation.

    MKL uses the full memory bandwidth only for products (N, C) @ (C, rows) and, for a single row,
    only if they are batched.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, bias = self.weight, self.bias
        N, C = w.shape
        rows = x.numel() // C
        if (torch.is_grad_enabled() or torch.compiler.is_compiling() or rows > MAX_ROWS
                or not x.dtype == w.dtype == torch.float32
                or not torch.backends.mkl.is_available()):
            return F.linear(x, w, bias)
        if rows > 1:
            columns = x.reshape(rows, C).t()
            # in parts, which are transposed while they are in the cache
            parts = [torch.mm(part, columns).t() for part in w.split(2048)]
            y = torch.cat(parts, dim=1)  # (rows, N)
        else:
            n = torch.get_num_threads()
            end = N - N % n
            whole = w if end == N else w[:end]
            y = torch.bmm(whole.view(n, -1, C), x.expand(n, 1, C).mT)  # (n, N / n, 1)
            if end < N:
                y = torch.cat((y.view(end), torch.mv(w[end:], x.reshape(C))))
        y = y.view(*x.shape[:-1], N)
        return y if bias is None else y.add_(bias)


class Int8Linear(nn.Module):
    """
    A Linear with int8 weights and one scale per output.

    Activations stay float. After pack(), on x86 CPUs, they are rounded to 7 bits during the
    product, torch's fastest int8 product for two rows or more.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        int8 = torch.empty(linear.weight.shape, dtype=torch.int8)
        self.weight = nn.Parameter(int8, requires_grad=False)  # (N, C)
        self.register_buffer("weight_scale", torch.empty(len(int8)))
        self.bias = linear.bias
        self.packed = None  # the weights in fbgemm's order

    def pack(self) -> None:
        """Give the weights to fbgemm where torch has it and the layer is on the CPU."""
        engine = torch.backends.quantized.engine
        if self.weight.device.type != "cpu" or engine not in ("x86", "fbgemm"):
            return
        with warnings.catch_warnings():  # quantized tensors are deprecated; this one is temporary
            warnings.simplefilter("ignore")
            zeros = torch.zeros(len(self.weight), dtype=torch.long)
            w = torch._make_per_channel_quantized_tensor(self.weight, self.weight_scale.double(),
                                                         zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(w, self.bias)
        self.weight = nn.Parameter(self.weight.to("meta"), requires_grad=False)  # only its shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None:
            # a slice at a time, so that a wide head is never converted as a whole
            # scaled before the product: sums of whole numbers can be too large for float16
            parts = [F.linear(x, (w * scale[:, None]).to(x.dtype)) for w, scale
                     in zip(self.weight.split(8192), self.weight_scale.split(8192))]
            y = torch.cat(parts, dim=-1)
            return y if self.bias is None else y + self.bias
        linear = torch.ops.quantized.linear_dynamic
        # reduce_range: activations of 7 bits, as sums of 8-bit products can overflow
        if x.numel() == x.size(-1):
            return linear(x.float(), self.packed, reduce_range=True)
        # normalize the rows, or the largest one would decide how coarsely the others are rounded
        size = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
        y = linear(x / size, self.packed, reduce_range=True)
        if self.bias is None:
            return y.mul_(size)
        return torch.addcmul(self.bias, y.sub_(self.bias), size)


class Int8Embedding(nn.Module):
    """An embedding with int8 rows and one scale per row."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        int8 = torch.empty(embedding.weight.shape, dtype=torch.int8)
        self.weight = nn.Parameter(int8, requires_grad=False)  # (V, C)
        self.register_buffer("weight_scale", torch.empty(len(int8)))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.weight[idx] * self.weight_scale[idx][..., None]
