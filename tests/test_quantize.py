"""Linear against PyTorch's, and int8 weights within their rounding."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import in_int8, randomize, tiny
from lib.machine import measure_dtype
from lib.quantize import FastLinear, Int8Linear, quantize_int8
from model import KVCache


@pytest.mark.parametrize("shape", [(1, 24), (1, 1, 24), (5, 24), (2, 3, 24), (129, 24)])
@pytest.mark.parametrize("N", [40, 41])
def test_linear_is_that_of_torch(shape, N):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for bias in (True, False):
                layer, x = FastLinear(nn.Linear(24, N, bias=bias)), torch.randn(shape)
                with torch.no_grad():
                    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
                    assert layer(x).is_contiguous()
                    torch.testing.assert_close(
                        layer(x.mT.contiguous().mT), F.linear(x, layer.weight, layer.bias)
                    )
    finally:
        torch.set_num_threads(threads)


def test_int8_rounds_to_the_nearest_of_255_levels_of_a_row():
    model = tiny()
    randomize(model)
    weights = model.state_dict()
    int8 = quantize_int8(weights)
    for name, w in weights.items():
        if w.dim() == 1:
            assert int8[name] is w
            continue
        assert int8[name].dtype == torch.int8 and int8[name].abs().amax(dim=1).eq(127).all(), name
        scale = int8[f"{name}_scale"][:, None]
        torch.testing.assert_close(scale[:, 0], w.abs().amax(dim=1) / 127)
        assert ((int8[name] * scale - w).abs() <= 0.501 * scale).all(), name
    assert int8["lm_head.weight"] is int8["transformer.wte.weight"]
    assert quantize_int8(int8).keys() == int8.keys()
    assert quantize_int8({"w": torch.zeros(2, 3)})["w"].eq(0).all()


@pytest.mark.parametrize("bias", [True, False])
def test_int8_linear_rounds_each_row_by_itself(bias):
    torch.manual_seed(0)
    weights = quantize_int8(nn.Linear(64, 300, bias=bias).state_dict())
    w, b = weights["weight"] * weights["weight_scale"][:, None], weights.get("bias")
    layer = Int8Linear(nn.Linear(64, 300, bias=bias))
    layer.load_state_dict(weights)
    x = torch.randn(3, 2, 64) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    expected = F.linear(x, w, b)
    torch.testing.assert_close(
        layer(x), expected, atol=1e-3, rtol=1e-4
    )  # the way without fbgemm, as on a GPU
    layer.pack()
    assert (layer.packed is not None) == (torch.backends.quantized.engine in ("x86", "fbgemm"))
    step = 2 * x.abs().amax(dim=-1, keepdim=True) / 127  # an activation is at most half of it away
    bound = 0.51 * step * w.abs().sum(dim=1)
    assert ((layer(x) - expected).abs() <= bound).all()
    for i in range(3):
        assert ((layer(x[i, :1]) - expected[i, :1]).abs() <= bound[i, :1]).all()


@pytest.mark.parametrize("changes", [{}, dict(arch="qwen3", n_kv_head=2, tied=False)])
def test_int8_model_is_near_the_model(changes):
    model = tiny(**changes)
    randomize(model)
    int8, idx = in_int8(model), torch.randint(61, (3, 20))
    with torch.no_grad():
        expected, logits = model(idx)[0], int8(idx)[0]
        assert (logits - expected).std() < 0.1 * expected.std()
        cache = KVCache(32)
        pieces = [int8(piece, cache=cache)[0] for piece in idx.split([13, 1, 6], dim=1)]
        assert (torch.cat(pieces, dim=1) - expected).std() < 0.1 * expected.std()


def test_nothing_of_an_int8_model_is_float_but_gains_biases_and_scales():
    model = tiny(arch="qwen3")
    int8 = in_int8(model)
    tensors = list(int8.parameters()) + list(int8.buffers())
    assert all(
        t.dim() < 2
        for t in tensors
        if t.is_floating_point() and t.data_ptr() not in (int8.cos.data_ptr(), int8.sin.data_ptr())
    )
    assert int8.num_params() == model.num_params()
    assert int8.num_params(non_embedding=True) == model.num_params(non_embedding=True)
    assert measure_dtype(int8) == "float32"
    out = int8.generate(torch.zeros(2, 1, dtype=torch.long), 5, top_k=3)
    assert out.shape == (2, 6)


def test_int8_does_not_overflow_in_float16():
    """A sum of whole numbers would be 127 * 127 * 64, more than float16 holds."""
    linear = torch.nn.Linear(64, 8)
    layer = Int8Linear(linear)
    layer.weight.data.fill_(127)
    layer.weight_scale.fill_(1 / 127)
    layer.bias.data.zero_()
    x = torch.full((2, 64), 127.0)
    with torch.autocast("cpu", torch.float16):
        y = layer(x.half())
    assert torch.allclose(y.float(), torch.full((2, 8), 127.0 * 64), rtol=1e-2)
