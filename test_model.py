"""The model against Hugging Face's, against closed forms, and against itself computed another way."""
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import (GPT, GPTConfig, Int8Linear, KVCache, Linear, Muon, candidates, from_hf, largest, measured_dtype,
                   median_seconds, orthogonalize, peak_flops, penalize, quantize_int8, resolve_device, resolve_dtype,
                   sample_token, sampled_loss, schedule_factor, scheduled_lr, to_hf)
from sample import stream_text
from tokenizer import EOT, ListTokenizer, gpt2_tokenizer


def tiny(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(block_size=32, vocab_size=61, n_layer=2, n_head=4, n_embd=32) | changes)).eval()


def randomize(model: GPT) -> None:
    """Weights far from their initial values, biases and gains included."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)


@pytest.mark.parametrize("gelu, theirs", [("tanh", "gelu_new"), ("none", "gelu")])
def test_same_logits_and_greedy_ids_as_hugging_face(gelu, theirs):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = tiny(gelu=gelu)
    randomize(model)
    c = model.config
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                                    n_head=c.n_head, activation_function=theirs, bos_token_id=None, eos_token_id=None)).eval()
    hf.load_state_dict(to_hf(model))
    assert_same_as_hugging_face(model, hf)


@pytest.mark.parametrize("changes", [
    dict(tied=True), dict(tied=False), dict(n_kv_head=2, n_inner=48), dict(n_kv_head=1, head_dim=6, tied=False),
])
def test_qwen3_is_that_of_hugging_face(changes):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = tiny(arch="qwen3", **changes)
    randomize(model)
    c, attn, mlp = model.config, model.transformer.h[0].attn, model.transformer.h[0].mlp
    hf = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=mlp.rows[0], num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=attn.n_kv_head, head_dim=attn.head_dim,
        max_position_embeddings=c.block_size, rope_theta=c.rope_theta, tie_word_embeddings=c.tied, bos_token_id=None,
        eos_token_id=None, pad_token_id=None)).eval()
    hf.load_state_dict(to_hf(model))
    assert_same_as_hugging_face(model, hf)
    randomize(hf)  # and the other way
    model.load_state_dict(from_hf(hf.state_dict(), c))
    assert_same_as_hugging_face(model, hf)


def assert_same_as_hugging_face(model: GPT, hf) -> None:
    idx = torch.randint(model.config.vocab_size, (3, 17))
    logits, loss = model(idx, idx)
    with torch.no_grad():
        assert (logits - hf(idx).logits).abs().max() < 1e-5
        assert loss.item() == pytest.approx(F.cross_entropy(hf(idx).logits.flatten(0, 1), idx.flatten()).item(), abs=1e-5)
        greedy = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert model.generate(idx, 12, temperature=0).equal(greedy)
        pad = torch.tensor([0, 4, 1])
        shown = (torch.arange(17) >= pad[:, None]).long()
        greedy = hf.generate(idx, attention_mask=shown, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert model.generate(idx, 12, temperature=0, pad=pad).equal(greedy)
        greedy = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=12, do_sample=False, pad_token_id=0,
                             repetition_penalty=1.4, no_repeat_ngram_size=2)
        assert model.generate(idx, 12, temperature=0, repetition_penalty=1.4, no_repeat_ngram=2).equal(greedy)
        for row, stop in ((idx[:1], -1), (idx[1:2], int(greedy[1, 20])), (idx[2:], int(idx[2, 3]))):
            for length_penalty in (-1.0, 0.0, 2.0):
                best = hf.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=12, do_sample=False, num_beams=4,
                                   length_penalty=length_penalty, eos_token_id=stop if stop >= 0 else None, pad_token_id=0)
                ours = model.beam_search(row, 12, 4, length_penalty, stop_token=stop)
                assert ours.equal(best[:, :ours.size(1)]) and not best[:, ours.size(1):].any()


def test_missing_weights_are_named():
    weights = to_hf(tiny(arch="qwen3"))
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"lack model.norm.weight and 1 more"):
        from_hf(weights, tiny(arch="qwen3").config)


def test_parameters_of_gpt2():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.num_params() == 124_439_808  # OpenAI's small GPT-2
    assert model.num_params(non_embedding=True) == 124_439_808 - (50257 + 1024) * 768


def test_loss_at_initialisation_is_that_of_a_uniform_guess():
    model = tiny(vocab_size=1000)
    _, loss = model(torch.randint(1000, (8, 32)), torch.randint(1000, (8, 32)))
    assert loss.item() == pytest.approx(math.log(1000), abs=0.05)


@pytest.mark.parametrize("n_embd, scale", [(192, 2.0), (768, 1.0)])
def test_initialisation(n_embd, scale):
    for name, p in tiny(n_embd=n_embd, n_layer=2, vocab_size=200).named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            std = 0.02 if "transformer.w" in name else scale * 0.02 / (2 if name.endswith("c_proj.weight") else 1)
            assert p.std().item() == pytest.approx(std, rel=0.1), name


@pytest.mark.parametrize("tied, loss_above_uniform", [(True, 0.1), (False, 1e-5)])
def test_initialisation_of_qwen3(tied, loss_above_uniform):
    model = tiny(arch="qwen3", tied=tied, vocab_size=1000)
    _, loss = model(torch.randint(1000, (8, 32)), torch.randint(1000, (8, 32)))
    assert loss.item() == pytest.approx(math.log(1000), abs=loss_above_uniform)
    for name, p in model.named_parameters():
        assert p.any() == (not name.endswith("c_proj.weight") and (tied or "lm_head" not in name)), name


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_no_position_sees_a_later_one(arch):
    model = tiny(arch=arch)
    randomize(model)
    idx = torch.randint(61, (1, 20))
    changed = idx.clone()
    changed[0, 12] = (idx[0, 12] + 1) % 61
    before, after = model(idx)[0], model(changed)[0]
    assert before[:, :12].equal(after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amax(-1).min() > 1e-3  # and every later one does see it


def test_masked_targets_do_not_count():
    model = tiny()
    idx, targets = torch.randint(61, (2, 10)), torch.randint(61, (2, 10))
    targets[:, 4:] = -1
    assert model(idx, targets)[1].item() == pytest.approx(model(idx[:, :4], targets[:, :4])[1].item(), abs=1e-6)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_overfits_one_batch(arch, optimizer):
    model = tiny(arch=arch).train()
    idx = torch.randint(61, (2, 17))
    optimizers = model.configure_optimizers(0.0, 3e-3, (0.9, 0.95), "cpu", optimizer)
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        for o in optimizers:
            o.step()
        model.zero_grad()
    assert loss.item() < 0.01


def test_only_matrices_decay():
    model = tiny()
    decay, rest = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")[0].param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decay["params"]} == {id(p) for p in model.parameters() if p.dim() == 2}
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(arch):
    model = tiny(arch=arch)
    adamw, muon = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", "muon")
    names = {p: name for name, p in model.named_parameters()}
    matrices = {names[p] for group in muon.param_groups for p in group["params"]}
    assert matrices == {name for p, name in names.items() if p.dim() == 2 and ".h." in name}
    assert {names[p] for group in adamw.param_groups for p in group["params"]} == set(names.values()) - matrices


def test_muon_is_that_of_torch():
    """Torch's works matrix by matrix and in bfloat16; the factor 4 is ours."""
    torch.manual_seed(0)
    shapes, rows = [(24, 16), (16, 48), (16, 16), (16, 16)], (4, 12, 8)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    # ours holds the first one as a stack of three matrices
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in (*ours[0].split(rows), *ours[1:])]
    muon = Muon([{"params": ours[:1], "rows": rows}, {"params": ours[1:]}], lr=0.01, weight_decay=0.5)
    oracle = torch.optim.Muon(theirs, lr=0.04, weight_decay=0.125, momentum=0.9)
    for _ in range(3):
        before = torch.cat([p.detach().flatten() for p in ours])
        for p in ours:
            p.grad = torch.randn_like(p)
        for p, grad in zip(theirs, (*ours[0].grad.split(rows), *(p.grad for p in ours[1:]))):
            p.grad = grad.clone()
        muon.step()
        oracle.step()
        after, expected = torch.cat([p.detach().flatten() for p in ours]), torch.cat([p.detach().flatten() for p in theirs])
        assert (after - expected).norm() < 0.03 * (expected - before).norm()


def test_a_bad_step_leaves_muon_as_it_was():
    p = torch.nn.Parameter(torch.randn(4, 6))
    muon = Muon([p], lr=0.1, weight_decay=0.1)
    for grad, found_inf in ((1.0, 0.0), (math.nan, 1.0)):
        before, momentum = p.detach().clone(), muon.state[p].get("momentum", torch.zeros(4, 6)).clone()
        p.grad = torch.full_like(p, grad)
        muon.found_inf = torch.tensor(found_inf)
        muon.step()
        assert p.equal(before) == muon.state[p]["momentum"].equal(momentum) == bool(found_inf)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 10, 40), (2, 40, 10)])
def test_orthogonalize_levels_the_singular_values(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    values = torch.diagonal(u.mT @ orthogonalize(g) @ v.mT, dim1=-2, dim2=-1)
    assert values.min() > 0.3 and values.max() < 1.3  # the smallest of a square matrix may need a step more
    assert ((u * values[:, None]) @ v - orthogonalize(g)).abs().max() < 1e-4  # and nothing but the values has changed


def test_schedules():
    assert [schedule_factor("linear", p) for p in (0, 0.25, 1)] == [1, 0.75, 0]
    assert [schedule_factor("trapezoid", p) for p in (0, 0.6, 0.8, 1)] == pytest.approx([1, 1, 0.5, 0])
    assert [schedule_factor("cosine", p) for p in (0, 1 / 3, 1)] == pytest.approx([1, 0.75, 0])
    rates = [scheduled_lr(step, "linear", 8.0, 2.0, warmup_iters=4, end=10) for step in (0, 3, 4, 7, 10, 11)]
    assert rates == pytest.approx([2, 8, 8, 5, 2, 2])
    assert scheduled_lr(5, "linear", 8.0, 2.0, warmup_iters=4, end=10, by_time=0.5) == pytest.approx(5)
    with pytest.raises(ValueError, match="warp"):
        schedule_factor("warp", 0)


@pytest.mark.parametrize("changes", [dict(bias=False), dict(arch="qwen3", n_kv_head=2, tied=False)])
def test_flops_per_token(changes):
    model = tiny(**changes)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it cannot look into fused attention
        model(torch.zeros(1, 32, dtype=torch.long))
    gains = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # ours counts the few of them, torch does not
    assert model.flops_per_token() - 6 * gains == 3 * counter.get_total_flops() / 32


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float32(dtype, arch):
    model = tiny(arch=arch)
    idx = torch.randint(61, (2, 32))
    with torch.autocast("cpu", dtype):
        low = model(idx, idx)[1]
    assert low.item() == pytest.approx(model(idx, idx)[1].item(), rel=1e-2)


def test_sampled_frequencies_are_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([sample_token(logits.expand(1000, -1), 0.7, top_k=3, generator=generator) for _ in range(20)])
    kept = (logits[0, :3] / 0.7).exp()
    expected = torch.cat([kept / kept.sum(), torch.zeros(2)])
    frequencies = torch.bincount(draws, minlength=5) / len(draws)
    assert (frequencies - expected).abs().max() < 0.015


def test_temperature_zero_and_top_k_one_are_argmax():
    logits = torch.randn(50, 61)
    best = logits.argmax(-1)
    for how in (dict(temperature=0.0), dict(temperature=5.0, top_k=1), dict(top_p=1e-6), dict(min_p=1.0)):
        assert sample_token(logits, **how).equal(best)


@pytest.mark.parametrize("how", [
    dict(top_k=5), dict(top_p=0.7), dict(min_p=0.2), dict(top_k=20, top_p=0.8), dict(top_p=0.9, min_p=0.05),
    dict(top_k=30, top_p=0.9, min_p=0.02), dict(top_k=500), dict(top_p=1e-3),
])
def test_what_is_drawn_from_is_what_transformers_leaves(how):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = 2 * torch.randn(40, 61)
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        expected = warper(how[name])(None, expected) if name in how else expected
    left, words = candidates(logits, **(dict(temperature=0.7, top_k=0, top_p=1.0, min_p=0.0) | how))
    ours = left if words is None else torch.full_like(logits, -math.inf).scatter(1, words, left)
    torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1))


@pytest.mark.parametrize("penalty, ngram", [(1.7, 0), (0.5, 0), (1.0, 1), (1.0, 2), (1.3, 3)])
def test_penalties_are_those_of_transformers(penalty, ngram):
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    logits, text = torch.randn(6, 9), torch.randint(9, (6, 14))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(text, logits.clone())
    expected = NoRepeatNGramLogitsProcessor(ngram)(text, expected) if ngram else expected
    assert penalize(logits, text, None, penalty, ngram).equal(expected)
    padded = torch.cat((torch.zeros(6, 3, dtype=torch.long), text), dim=1)
    assert penalize(logits, padded, torch.full((6,), 3), penalty, ngram).equal(expected)


def test_generation_repeats_with_the_seed_and_stops():
    model = tiny()
    idx = torch.zeros(4, 1, dtype=torch.long)

    def run(**how):
        return model.generate(idx, 40, generator=torch.Generator().manual_seed(3), **how)

    free = run()
    assert free.equal(run()) and free.shape == (4, 41)  # further than block_size
    stop = int(free[0, 5])
    ended = run(stop_token=stop)
    for row in ended.tolist():
        if stop in row[1:]:
            assert set(row[row.index(stop, 1):]) == {stop}
    assert ended[0, :6].tolist() == free[0, :6].tolist()


@pytest.mark.parametrize("changes", [{}, dict(arch="qwen3"), dict(arch="qwen3", n_kv_head=2, tied=False)])
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [7, 1, 4], [3, 9]])
def test_the_cache_changes_no_logit(changes, pieces):
    model = tiny(**changes)
    randomize(model)
    idx = torch.randint(61, (3, 12))
    cache = KVCache(model, 3)
    with torch.no_grad():
        logits = torch.cat([model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(logits, model(idx)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, dict(arch="qwen3", n_kv_head=1)])
@pytest.mark.parametrize("pieces", [[9], [8, 1], [4, 5], [1] * 9])
def test_padding_at_the_left_changes_no_logit(changes, pieces):
    model = tiny(**changes)
    randomize(model)
    idx, pad = torch.randint(61, (3, 9)), torch.tensor([0, 5, 2])
    cache = KVCache(model, 3, pad)
    with torch.no_grad():
        logits = torch.cat([model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)], dim=1)
        for row, n in enumerate(pad.tolist()):
            alone = model(idx[row:row + 1, n:])[0][0]
            torch.testing.assert_close(logits[row, n:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_generation_past_block_size_keeps_the_newest_half(arch):
    model = tiny(block_size=8, arch=arch)
    randomize(model)
    idx, pad = torch.randint(61, (2, 5)), torch.tensor([0, 2])
    out = model.generate(idx, 20, temperature=0, pad=pad)
    for row, n in enumerate(pad.tolist()):
        text, start = idx[row:row + 1], 0
        for _ in range(20):  # without a cache; the padding counts as part of the window
            if text.size(1) - start > 8:
                start = text.size(1) - 4
            text = torch.cat((text, model(text[:, max(start, n):])[0][:, -1].argmax(-1, keepdim=True)), dim=1)
        assert out[row].tolist() == text[0].tolist()
    long = torch.randint(61, (1, 30))  # of a prompt longer than the context, the end counts
    assert model.generate(long, 1, temperature=0)[0, -1] == model(long[:, -8:])[0][0, -1].argmax()


@pytest.mark.parametrize("shape", [(1, 24), (1, 1, 24), (5, 24), (2, 3, 24), (129, 24)])
@pytest.mark.parametrize("N", [40, 41])
def test_linear_is_that_of_torch(shape, N):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for bias in (True, False):
                layer, x = Linear(24, N, bias=bias), torch.randn(shape)
                with torch.no_grad():
                    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
                    assert layer(x).is_contiguous()
                    torch.testing.assert_close(layer(x.mT.contiguous().mT), F.linear(x, layer.weight, layer.bias))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("V, k", [(61, 3), (6400, 1), (6401, 5), (10000, 40), (10000, 400)])
def test_largest_is_topk(V, k):
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(largest(logits, k), logits.topk(k)):
        assert torch.equal(mine, theirs)


def in_int8(model: GPT) -> GPT:
    return GPT.from_weights(model.config, quantize_int8(model.state_dict())).eval()


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
    weights = quantize_int8(Linear(64, 300, bias=bias).state_dict())
    w, b = weights["weight"] * weights["weight_scale"][:, None], weights.get("bias")
    layer = Int8Linear(Linear(64, 300, bias=bias))
    layer.load_state_dict(weights)
    x = torch.randn(3, 2, 64) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    expected = F.linear(x, w, b)
    torch.testing.assert_close(layer(x), expected, atol=1e-3, rtol=1e-4)  # the way without fbgemm, as on a GPU
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
        cache = KVCache(int8, 3)
        pieces = [int8(piece, cache=cache)[0] for piece in idx.split([13, 1, 6], dim=1)]
        assert (torch.cat(pieces, dim=1) - expected).std() < 0.1 * expected.std()


def test_nothing_of_an_int8_model_is_float_but_gains_biases_and_scales():
    model = tiny(arch="qwen3")
    int8 = in_int8(model)
    tensors = list(int8.parameters()) + list(int8.buffers())
    assert all(t.dim() < 2 for t in tensors if t.is_floating_point() and t.data_ptr() not in
               (int8.cos.data_ptr(), int8.sin.data_ptr()))
    assert int8.num_params() == model.num_params()
    assert int8.num_params(non_embedding=True) == model.num_params(non_embedding=True)
    assert measured_dtype(int8) == "float32"
    out = int8.generate(torch.zeros(2, 1, dtype=torch.long), 5, top_k=3)
    assert out.shape == (2, 6)


@pytest.mark.parametrize("changes", [{}, dict(arch="qwen3"), dict(arch="qwen3", tied=False)])
def test_a_model_made_from_weights_is_the_same_model(changes):
    model = tiny(**changes)
    randomize(model)
    again = GPT.from_weights(model.config, model.state_dict())
    idx = torch.randint(61, (2, 9))
    assert torch.equal(again.eval()(idx)[0], model(idx)[0])
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert (again.lm_head.weight is again.transformer.wte.weight) == model.config.tied
    for wrong in ({"lm_head.weight_scale": torch.ones(61)}, {"transformer.ln_f.weight_scale": torch.ones(32)},
                  {"lm_head.weight": torch.zeros(61, 32, dtype=torch.int8)}, {"lm_head.weight": torch.zeros(60, 32)}):
        with pytest.raises((RuntimeError, TypeError)):
            GPT.from_weights(model.config, model.state_dict() | wrong)
    half = GPT.from_weights(model.config, {name: w.bfloat16() for name, w in model.state_dict().items()})
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def say_by_heart(tokenizer, texts: list[str]):
    """A stand-in for a model that continues row by row with these texts, whatever it is asked, and ends each."""
    rows = [tokenizer.encode(text) + [tokenizer.eot] for text in texts]

    def stream(idx, max_new_tokens, **how):
        for n in range(min(max_new_tokens, max(map(len, rows)))):
            yield torch.tensor([(row + [tokenizer.eot] * max_new_tokens)[n] for row in rows])

    return SimpleNamespace(device="cpu", stream=stream)


def test_streamed_text_grows_by_whole_characters():
    tokenizer = gpt2_tokenizer()
    texts = ["h\u00e9llo \U0001f642 w\u00f6rld \u4f60\u597d", "short"]
    steps = list(stream_text(say_by_heart(tokenizer, texts), tokenizer, ["a", "b c d"], 100))
    assert [text for text, _ in steps[-1]] == texts and all(ended for _, ended in steps[-1])
    for (before, ended), (after, _) in zip((step[0] for step in steps), (step[0] for step in steps[1:])):
        assert after.startswith(before) and "\ufffd" not in before and not ended
    cut = list(stream_text(say_by_heart(tokenizer, texts), tokenizer, ["a", "b"], 3))[-1]
    assert cut[0][1] and cut[1] == ("short", True)


@pytest.mark.parametrize("stop, left", [
    ("lo w", "hel"), ("o", "hell"), ("xyz", "hello worlds"), ("hello", ""), ("lds", "hello wor"),
    ("lo v||wo", "hello "), ("wo||o", "hell"), ("||", "hello worlds"),
])
def test_stop_texts_are_not_shown(stop, left):
    tokenizer = ListTokenizer("char", [EOT, *"abcdefghijklmnopqrstuvwxyz "])
    steps = [step[0][0] for step in stream_text(say_by_heart(tokenizer, ["hello worlds"]), tokenizer, ["a"], 100, stop)]
    assert steps[-1] == left and all(left.startswith(text) for text in steps)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_chunked_loss_and_remat_change_memory_only(dtype, tolerance):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=8)).train()
    idx, targets = torch.randint(50, (2, 3, 16)).unbind()
    targets[0, 3:9] = -1

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits, loss = model(idx, targets)
        (3 * loss).backward()
        return logits, loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    _, loss, grad = gradients()
    model.remat, model.loss_chunk = True, 7
    logits, chunked_loss, chunked_grad = gradients()
    assert logits is None and chunked_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert (chunked_grad - grad).norm() < tolerance * grad.norm()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits, chunked_loss = model.eval()(idx, targets)
    assert logits is None and chunked_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert model(idx)[0].shape == (3, 16, 50)  # without targets there is no loss to save memory on


@pytest.mark.parametrize("changes", [
    dict(n_head=3), dict(n_layer=0), dict(vocab_size=-1), dict(dropout=1.0), dict(arch="bert"), dict(tied=False),
    dict(n_kv_head=2), dict(arch="qwen3", n_kv_head=3), dict(arch="qwen3", n_inner=-1), dict(arch="qwen3", rope_theta=0),
])
def test_impossible_configurations_are_named(changes):
    with pytest.raises(ValueError, match=list(changes)[-1]):
        tiny(**changes)


def test_too_long_and_empty_input():
    with pytest.raises(ValueError, match="block_size"):
        tiny()(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match="empty"):
        tiny().generate(torch.zeros(1, 0, dtype=torch.long), 1)
    for model in (tiny(), in_int8(tiny())):
        for token in (-1, 61):
            with pytest.raises(ValueError, match="token ids from"):
                model.generate(torch.tensor([[3, token]]), 1)
            with pytest.raises(ValueError, match="token ids from"):
                model.beam_search(torch.tensor([[3, token]]), 1, 2)


def test_model_file_works_alone(tmp_path):
    shutil.copy("model.py", tmp_path)
    code = ("import torch, model; gpt = model.GPT(model.GPTConfig(n_layer=1, n_embd=12, n_head=1)); "
            "print(gpt.generate(torch.zeros(1, 1).long(), 3).shape)")
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); {code}"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert "torch.Size([1, 4])" in done.stdout, done.stderr


def test_softmax_over_fewer_words():
    torch.manual_seed(0)
    model = tiny(vocab_size=60).train()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)  # far from uniform
    counts = torch.arange(60).flip(0) // 3  # some words never
    idx, targets = torch.randint(60, (2, 8)), torch.randint(60, (2, 8))
    targets[0, :3] = -1
    whole = model(idx, targets)[1]
    states, weight = model.hidden(idx).flatten(0, 1), model.lm_head.weight
    weights = (counts + 0.2).sqrt()
    nearly_all = sampled_loss(states, weight, targets.flatten(), weights, 59)
    assert nearly_all.item() == pytest.approx(whole.item(), rel=0.1) and nearly_all != whole

    # the sum over the vocabulary is right on the average: exp of (loss + logit of the target) for one token
    x, target = states[5:6].detach(), targets.flatten()[5:6]
    sums = torch.stack([sampled_loss(x, weight.detach(), target, weights, 12).exp() for _ in range(5_000)])
    sums *= (x @ weight[target].t()).exp().item()
    exact = (x @ weight.t()).exp().sum().item()
    assert abs(sums.mean().item() - exact) < 4 * sums.std().item() / len(sums)**0.5 < 0.2 * exact

    # in training only, and with the words of the batch always among them
    model.sample_softmax(40, counts)
    losses = [model(idx, targets)[1].item() for _ in range(2)]
    assert losses[0] != losses[1] and losses == pytest.approx([whole.item()] * 2, rel=0.1)
    assert model.eval()(idx, targets)[1].item() == pytest.approx(whole.item())
    flops = [6 * 40 * 32, 6 * 60 * 32]  # of the head, forward and backward
    for words, count in ((60, flops[1]), (40, flops[0])):
        model.sample_softmax(words, counts)
        assert model.flops_per_token() - count == 6 * model.num_params(non_embedding=True) + 12 * 2 * 32 * 32
    model.train().sample_softmax(60, counts)
    assert model(idx, targets)[1].item() == pytest.approx(whole.item())


def test_device_and_dtype():
    assert resolve_dtype("float32", "cpu") == "float32"
    assert resolve_dtype("auto", "cpu") == "auto"
    assert measured_dtype(tiny()) in ("float32", "bfloat16")
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="float64"):
        resolve_dtype("float64", "cpu")
    with pytest.raises(ValueError, match="toaster"):
        resolve_device("toaster")
    flops, source = peak_flops("cpu", "float32")
    assert flops > 1e8 and "measured" in source
    assert median_seconds(lambda: None) < 1
