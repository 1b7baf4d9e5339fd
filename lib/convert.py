"""Other formats, to and from our weight names."""
import torch

from model import GPT, GPTConfig, NoWeights

# -----------------------------------------------------------------------------
# Hugging Face's names: GPT2LMHeadModel has ours, but keeps the matrices of its blocks transposed; Qwen3ForCausalLM
# keeps separate what is stacked here

QWEN3_BLOCK = {
    "ln_1.weight": ["input_layernorm.weight"],
    "attn.c_attn.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "attn.q_norm.weight": ["self_attn.q_norm.weight"],
    "attn.k_norm.weight": ["self_attn.k_norm.weight"],
    "attn.c_proj.weight": ["self_attn.o_proj.weight"],
    "ln_2.weight": ["post_attention_layernorm.weight"],
    "mlp.c_fc.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.c_proj.weight": ["mlp.down_proj.weight"],
}


def hf_names(config: GPTConfig) -> dict[str, list[str]]:
    """Each name in our state dict with theirs, whose tensors, stacked by rows, it holds."""
    if config.arch == "gpt2":
        with NoWeights():
            return {name: [name] for name in GPT(config).state_dict()}
    names = {"transformer.wte.weight": ["model.embed_tokens.weight"], "transformer.ln_f.weight": ["model.norm.weight"],
             "lm_head.weight": ["lm_head.weight"]}
    for i in range(config.n_layer):
        for ours, theirs in QWEN3_BLOCK.items():
            names[f"transformer.h.{i}.{ours}"] = [f"model.layers.{i}.{name}" for name in theirs]
    return names


def to_hf(model: GPT) -> dict[str, torch.Tensor]:
    """The weights as GPT2LMHeadModel, which always has biases, or Qwen3ForCausalLM names and shapes them."""
    weights, state, config = {}, model.state_dict(), model.config
    for ours, theirs in hf_names(config).items():
        w = state[ours]
        if config.arch == "gpt2" and not config.bias and (".ln_" in ours or is_transposed(ours)):
            weights[ours.replace(".weight", ".bias")] = w.new_zeros(len(w))
        if ours.endswith("c_attn.weight") and config.arch == "qwen3":
            parts = w.split(model.transformer.h[0].attn.rows)
        else:
            parts = w.chunk(len(theirs))
        weights |= {name: (part.t() if is_transposed(name) else part).contiguous() for name, part in zip(theirs, parts)}
    return weights


def from_hf(weights: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """A state dict of ours from theirs; ValueError names what is missing, misshapen or left over."""
    names = hf_names(config)
    with NoWeights():
        expected = {name: w.shape for name, w in to_hf(GPT(config)).items()}
    if config.tied:
        weights = weights | {"lm_head.weight": weights.get(names["transformer.wte.weight"][0])}
    if missing := [name for name in expected if weights.get(name) is None]:
        raise ValueError(f"the weights lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ValueError(f"{name} has the shape {tuple(weights[name].shape)}, not {tuple(shape)}")
    buffers = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that old files hold
    if left := [name for name in weights if name not in expected and not name.endswith(buffers)]:
        raise ValueError(f"the weights have {left[0]}, which has no place in the model")
    return {ours: torch.cat([weights[name].t() if is_transposed(name) else weights[name] for name in theirs])
            for ours, theirs in names.items()}


def is_transposed(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
