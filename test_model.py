"""model.py against Hugging Face, closed forms, and slower ways to compute the same."""

import math
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers import in_int8, randomize, tiny
from lib.checkpoint import model_from_weights
from lib.convert import from_hf, to_hf
from lib.decoding import Sampling, beam_search
from model import GPT, GPTConfig, KVCache


@pytest.mark.parametrize("gelu, theirs", [("tanh", "gelu_new"), ("none", "gelu")])
def test_same_logits_and_greedy_ids_as_hugging_face(gelu, theirs):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = tiny(gelu=gelu)
    randomize(model)
    c = model.config
    hf = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            activation_function=theirs,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    hf.load_state_dict(to_hf(model))
    assert_same_as_hugging_face(model, hf)


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(tied=True, norm_eps=1e-5),
        dict(tied=False, norm_eps=1e-6),
        dict(n_kv_head=2, n_inner=48, rope_theta=1e5),
        dict(n_kv_head=1, head_dim=6, tied=False),
    ],
)
def test_rotary_models_are_those_of_hugging_face(arch, changes):
    import transformers

    model = tiny(arch=arch, **changes)
    randomize(model)
    c = model.config
    name = {"qwen3": "Qwen3", "llama": "Llama"}[arch]
    hf = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=c.n_inner,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            head_dim=c.head_dim,
            max_position_embeddings=c.block_size,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=c.tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).eval()
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
        assert loss.item() == pytest.approx(
            F.cross_entropy(hf(idx).logits.flatten(0, 1), idx.flatten()).item(), abs=1e-5
        )
        greedy = hf.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        assert model.generate(idx, 12, temperature=0).equal(greedy)
        pad = torch.tensor([0, 4, 1])
        shown = (torch.arange(17) >= pad[:, None]).long()
        greedy = hf.generate(
            idx, attention_mask=shown, max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert model.generate(idx, 12, temperature=0, pad=pad).equal(greedy)
        greedy = hf.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            repetition_penalty=1.4,
            no_repeat_ngram_size=2,
        )
        sampler = Sampling(temperature=0, repetition_penalty=1.4, no_repeat_ngram=2)
        assert model.generate(idx, 12, sampler=sampler).equal(greedy)
        for row, stop in ((idx[:1], -1), (idx[1:2], int(greedy[1, 20])), (idx[2:], int(idx[2, 3]))):
            for length_penalty in (-1.0, 0.0, 2.0):
                best = hf.generate(
                    row,
                    attention_mask=torch.ones_like(row),
                    max_new_tokens=12,
                    do_sample=False,
                    num_beams=4,
                    length_penalty=length_penalty,
                    eos_token_id=stop if stop >= 0 else None,
                    pad_token_id=0,
                )
                ours = beam_search(model, row, 12, 4, length_penalty, stop_token=stop)
                assert ours.equal(best[:, : ours.size(1)]) and not best[:, ours.size(1) :].any()


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
            std = (
                0.02
                if "transformer.w" in name
                else scale * 0.02 / (2 if name.endswith("c_proj.weight") else 1)
            )
            assert p.std().item() == pytest.approx(std, rel=0.1), name


@pytest.mark.parametrize("tied, loss_above_uniform", [(True, 0.1), (False, 1e-5)])
def test_initialisation_of_qwen3(tied, loss_above_uniform):
    model = tiny(arch="qwen3", tied=tied, vocab_size=1000)
    _, loss = model(torch.randint(1000, (8, 32)), torch.randint(1000, (8, 32)))
    assert loss.item() == pytest.approx(math.log(1000), abs=loss_above_uniform)
    for name, p in model.named_parameters():
        assert p.any() == (
            not name.endswith("c_proj.weight") and (tied or "lm_head" not in name)
        ), name


@pytest.mark.parametrize("arch", ["gpt2", "qwen3", "llama"])
def test_no_position_sees_a_later_one(arch):
    model = tiny(arch=arch)
    randomize(model)
    idx = torch.randint(61, (1, 20))
    changed = idx.clone()
    changed[0, 12] = (idx[0, 12] + 1) % 61
    before, after = model(idx)[0], model(changed)[0]
    assert before[:, :12].equal(after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amax(
        -1
    ).min() > 1e-3  # and every later one does see it


def test_masked_targets_do_not_count():
    model = tiny()
    idx, targets = torch.randint(61, (2, 10)), torch.randint(61, (2, 10))
    targets[:, 4:] = -1
    assert model(idx, targets)[1].item() == pytest.approx(
        model(idx[:, :4], targets[:, :4])[1].item(), abs=1e-6
    )


@pytest.mark.parametrize("changes", [dict(bias=False), dict(arch="qwen3", n_kv_head=2, tied=False)])
def test_flops_per_token(changes):
    model = tiny(**changes)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # it cannot look into fused attention
        model(torch.zeros(1, 32, dtype=torch.long))
    gains = sum(
        p.numel() for p in model.parameters() if p.dim() == 1
    )  # ours counts the few of them, torch does not
    assert model.flops_per_token() - 6 * gains == 3 * counter.get_total_flops() / 32


@pytest.mark.parametrize("arch", ["gpt2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float32(dtype, arch):
    model = tiny(arch=arch)
    idx = torch.randint(61, (2, 32))
    with torch.autocast("cpu", dtype):
        low = model(idx, idx)[1]
    assert low.item() == pytest.approx(model(idx, idx)[1].item(), rel=1e-2)


def test_generation_repeats_with_the_seed_and_stops():
    model = tiny()
    idx = torch.zeros(4, 1, dtype=torch.long)

    def run(**how):
        sampler = Sampling(generator=torch.Generator().manual_seed(3))
        return model.generate(idx, 40, sampler=sampler, **how)

    free = run()
    assert free.equal(run()) and free.shape == (4, 41)  # further than block_size
    stop = int(free[0, 5])
    ended = run(stop_token=stop)
    for row in ended.tolist():
        if stop in row[1:]:
            assert set(row[row.index(stop, 1) :]) == {stop}
    assert ended[0, :6].tolist() == free[0, :6].tolist()


@pytest.mark.parametrize(
    "changes", [{}, dict(arch="qwen3"), dict(arch="qwen3", n_kv_head=2, tied=False)]
)
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [7, 1, 4], [3, 9]])
def test_the_cache_changes_no_logit(changes, pieces):
    model = tiny(**changes)
    randomize(model)
    idx = torch.randint(61, (3, 12))
    cache = KVCache(32)
    with torch.no_grad():
        logits = torch.cat(
            [model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)], dim=1
        )
        torch.testing.assert_close(logits, model(idx)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, dict(arch="qwen3", n_kv_head=1)])
@pytest.mark.parametrize("pieces", [[9], [8, 1], [4, 5], [1] * 9])
def test_padding_at_the_left_changes_no_logit(changes, pieces):
    model = tiny(**changes)
    randomize(model)
    idx, pad = torch.randint(61, (3, 9)), torch.tensor([0, 5, 2])
    cache = KVCache(32, pad)
    with torch.no_grad():
        logits = torch.cat(
            [model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)], dim=1
        )
        for row, n in enumerate(pad.tolist()):
            alone = model(idx[row : row + 1, n:])[0][0]
            torch.testing.assert_close(logits[row, n:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3", "llama"])
def test_generation_past_block_size_keeps_the_newest_half(arch):
    model = tiny(block_size=8, arch=arch)
    randomize(model)
    idx, pad = torch.randint(61, (2, 5)), torch.tensor([0, 2])
    out = model.generate(idx, 20, temperature=0, pad=pad)
    for row, n in enumerate(pad.tolist()):
        text, start = idx[row : row + 1], 0
        for _ in range(20):  # without a cache; the padding counts as part of the window
            if text.size(1) - start > 8:
                start = text.size(1) - 4
            text = torch.cat(
                (text, model(text[:, max(start, n) :])[0][:, -1].argmax(-1, keepdim=True)), dim=1
            )
        assert out[row].tolist() == text[0].tolist()
    long = torch.randint(61, (1, 30))  # of a prompt longer than the context, the end counts
    assert model.generate(long, 1, temperature=0)[0, -1] == model(long[:, -8:])[0][0, -1].argmax()


@pytest.mark.parametrize("changes", [{}, dict(arch="qwen3"), dict(arch="qwen3", tied=False)])
def test_a_model_made_from_weights_is_the_same_model(changes):
    model = tiny(**changes)
    randomize(model)
    again = model_from_weights(model.config, model.state_dict())
    idx = torch.randint(61, (2, 9))
    assert torch.equal(again.eval()(idx)[0], model(idx)[0])
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert (again.lm_head.weight is again.transformer.wte.weight) == model.config.tied
    for wrong in (
        {"lm_head.weight_scale": torch.ones(61)},
        {"transformer.ln_f.weight_scale": torch.ones(32)},
        {"lm_head.weight": torch.zeros(61, 32, dtype=torch.int8)},
        {"lm_head.weight": torch.zeros(60, 32)},
    ):
        with pytest.raises((RuntimeError, TypeError)):
            model_from_weights(model.config, model.state_dict() | wrong)
    half = model_from_weights(
        model.config, {name: w.bfloat16() for name, w in model.state_dict().items()}
    )
    assert {p.dtype for p in half.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_head=3),
        dict(n_layer=0),
        dict(vocab_size=-1),
        dict(dropout=1.0),
        dict(arch="bert"),
        dict(tied=False),
        dict(n_kv_head=2),
        dict(arch="qwen3", n_kv_head=3),
        dict(arch="qwen3", n_inner=-1),
        dict(arch="qwen3", rope_theta=0),
    ],
)
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
                beam_search(model, torch.tensor([[3, token]]), 1, 2)


ALONE = """
import sys
sys.path.insert(0, ".")
sys.modules.update(dict.fromkeys(("numpy", "lib", "tiktoken", "datasets"), None))  # not importable
import torch
from model import GPT, GPTConfig

torch.manual_seed(0)
model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=16))
optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
idx = torch.arange(9)[None] % 4
for _ in range(60):
    loss = model(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print("learned" if loss < 0.1 else loss)
print(model.eval().generate(idx[:, :1], 7, temperature=0)[0].tolist())
model.crop_block_size(4)
print(model.generate(idx[:, :1], 8, temperature=0.8, top_k=3).shape)
"""


def test_model_file_works_alone(tmp_path):
    shutil.copy("model.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "learned\n[0, 1, 2, 3, 0, 1, 2, 3]\ntorch.Size([1, 9])\n", done.stderr


@pytest.mark.parametrize("changes", [{}, dict(arch="qwen3")])
def test_a_shorter_context_changes_no_logit(changes):
    model, idx = tiny(**changes), torch.randint(61, (2, 8))
    randomize(model)
    before = model(idx)[0]
    model.crop_block_size(8)
    assert model(idx)[0].equal(before) and model.config.block_size == 8
    with pytest.raises(ValueError, match="block_size"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="more than the model's 8"):
        model.crop_block_size(9)


def test_generate_samples_the_top_k_with_their_probabilities():
    model = tiny()
    randomize(model)
    idx = torch.zeros(4000, 1, dtype=torch.long)
    torch.manual_seed(1)
    with torch.no_grad():
        best = (model(idx[:1])[0][0, -1] / 0.7).topk(3)
    sampled = model.generate(idx, 1, temperature=0.7, top_k=3)[:, -1]
    frequencies = torch.bincount(sampled, minlength=61) / len(sampled)
    expected = torch.zeros(61).scatter(0, best.indices, best.values.softmax(-1))
    assert (frequencies - expected).abs().max() < 0.03
    with pytest.raises(ValueError, match="temperature"):
        model.generate(idx, 1, temperature=-1)


def test_mfu_is_the_share_of_the_peak():
    model = tiny()
    flops = 3 * 32 * model.flops_per_token()  # 3 sequences
    assert model.estimate_mfu(3, dt=0.5, peak_flops=4 * flops) == pytest.approx(0.5)


def test_resolved_configurations_describe_the_same_model():
    """Checkpoints hold resolved values; older ones have zeros."""
    for changes in (
        {},
        dict(arch="qwen3"),
        dict(arch="qwen3", n_kv_head=2, head_dim=6, n_inner=48),
    ):
        config = tiny(**changes).config
        assert GPTConfig(**asdict(config)) == config
        assert config.n_kv_head and config.head_dim and config.n_inner
    assert GPTConfig(n_kv_head=12, head_dim=64, n_inner=3072) == GPTConfig()
    assert GPTConfig(arch="qwen3").n_inner == 2048 and not GPTConfig(arch="qwen3").bias


def test_remat_does_not_change_generation():
    model, idx = tiny().train(), torch.zeros(1, 3, dtype=torch.long)
    randomize(model)
    expected = model.generate(idx, 8, temperature=0)
    model.remat = True
    assert model.generate(idx, 8, temperature=0).equal(expected)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3", "llama"])
def test_rows_of_many_lengths_compile_to_two_graphs(arch):
    """One for the first length and one for all others, without a break."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = torch.compile(tiny(arch=arch), backend="eager")
    for T in (8, 9, 7, 5, 6, 4):
        idx = torch.zeros(2, T, dtype=torch.long)
        model(idx, idx)[1].backward()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
