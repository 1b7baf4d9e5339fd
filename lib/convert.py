"""
Convert to and from our weights and config: Hugging Face folders, its hub, nanoGPT checkpoints.

GPT2LMHeadModel has our names but keeps the matrices of its blocks transposed. LlamaForCausalLM and
Qwen3ForCausalLM keep apart what we stack: queries, keys and values, and the halves of a SwiGLU.
"""
import json
import os
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from lib.configurator import one_line
from lib.console import hide_hub_progress, visible
from lib.files import check_regular, load_json, read_text
from lib.machine import system_memory
from lib.tokenizer import meta_of, read_nanogpt_characters, read_tokenizer_json
from model import GPT, GPTConfig

# fields of GPTConfig that other programs also have, or that follow from those
EXPORTED = {"arch", "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias",
            "gelu", "n_kv_head", "head_dim", "n_inner", "rope_theta", "norm_eps", "tied"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # their names on the Hugging Face hub
CLASSES = {"gpt2": "GPT2LMHeadModel", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
# files to download from the hub: no pickles and no code. meta.json is written by export.py
HUB_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "chat_template.jinja", "meta.json", "*.safetensors"]

LLAMA_BLOCK = {
    "ln_1.weight": ["input_layernorm.weight"],
    "attn.c_attn.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight",
                           "self_attn.v_proj.weight"],
    "attn.c_proj.weight": ["self_attn.o_proj.weight"],
    "ln_2.weight": ["post_attention_layernorm.weight"],
    "mlp.c_fc.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.c_proj.weight": ["mlp.down_proj.weight"],
}
QWEN3_BLOCK = LLAMA_BLOCK | {
    "attn.q_norm.weight": ["self_attn.q_norm.weight"],
    "attn.k_norm.weight": ["self_attn.k_norm.weight"],
}


# -----------------------------------------------------------------------------
# Weights

class SkipNormal(TorchFunctionMode):
    """
    Skip normal_() while a model is built on the meta device.

    It would change nothing there, but makes torch import its compiler, which takes a second.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func.__name__ == "normal_" else func(*args, **(kwargs or {}))


def check_layers(config: GPTConfig, weights: dict[str, torch.Tensor]) -> None:
    """
    Raise ValueError if a model would be larger than its weights, before it is built.

    weights: under our names or those of Hugging Face. Once the number of layers fits, building the
    model on the meta device is cheap and tells the shapes; only rotary positions take memory there.
    """
    numbers = (re.search(r"\b(?:h|layers)\.(\d+)\.", name) for name in weights)
    layers = {number[1] for number in numbers if number}
    if config.n_layer > len(layers):
        raise ValueError(f"weights are missing: its n_layer is {config.n_layer:,}, and it has "
                         f"those of {len(layers):,} layers")
    positions = 4 * config.block_size * config.head_dim * (config.arch != "gpt2")
    if positions > max(1 << 25, sum(w.nbytes for w in weights.values())):
        raise ValueError(f"its block_size of {config.block_size:,} is too large for its weights")


def hf_names(config: GPTConfig) -> dict[str, list[str]]:
    """Map each of our names to the Hugging Face names whose tensors are stacked in it."""
    if config.arch == "gpt2":
        with torch.device("meta"), SkipNormal():
            return {name: [name] for name in GPT(config).state_dict()}
    names = {"transformer.wte.weight": ["model.embed_tokens.weight"],
             "transformer.ln_f.weight": ["model.norm.weight"],
             "lm_head.weight": ["lm_head.weight"]}
    block = QWEN3_BLOCK if config.arch == "qwen3" else LLAMA_BLOCK
    for i in range(config.n_layer):
        for ours, theirs in block.items():
            names[f"transformer.h.{i}.{ours}"] = [f"model.layers.{i}.{name}" for name in theirs]
    return names


def is_transposed(name: str) -> bool:
    """Return whether GPT2LMHeadModel keeps the matrix of this name transposed."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def to_hf(model: GPT) -> dict[str, torch.Tensor]:
    """Return the weights under the names of the class in transformers. GPT-2 gets all biases."""
    weights, state, config = {}, model.state_dict(), model.config
    for ours, theirs in hf_names(config).items():
        w = state[ours]
        if config.arch == "gpt2" and not config.bias and (".ln_" in ours or is_transposed(ours)):
            weights[ours.replace(".weight", ".bias")] = w.new_zeros(len(w))
        if ours.endswith("c_attn.weight") and config.arch != "gpt2":
            parts = w.split(model.transformer.h[0].attn.qkv_sizes)
        else:
            parts = w.chunk(len(theirs))
        for name, part in zip(theirs, parts):
            weights[name] = (part.t() if is_transposed(name) else part).contiguous()
    return weights


def interleave(w: torch.Tensor, head_dim: int) -> torch.Tensor:
    """
    Reorder a query or key projection (n_head * hs, C) for GGUF files of llama.

    llama.cpp rotates rows 2i and 2i + 1 of a head together; we rotate i and i + hs / 2.
    """
    return w.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def deinterleave(w: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo interleave()."""
    return w.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def from_hf(weights: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """Return our state dict. Raise ValueError that names missing, misshapen and unused weights."""
    check_layers(config, weights)
    names = hf_names(config)
    with torch.device("meta"), SkipNormal():
        expected = {name: w.shape for name, w in to_hf(GPT(config)).items()}
    if config.tied:
        embedding = names["transformer.wte.weight"][0]
        weights = weights | {"lm_head.weight": weights.get(embedding)}
    if missing := [name for name in expected if weights.get(name) is None]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"weights are missing: {missing[0]}{more}")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ValueError(f"{name} has the shape {tuple(weights[name].shape)}, "
                             f"not {tuple(shape)}")
    constants = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # in old files
    for name in weights:
        if name not in expected and not name.endswith(constants):
            raise ValueError(f"the weights have {name}, which a {config.arch} model does not have")
    return {ours: torch.cat([weights[name].t() if is_transposed(name) else weights[name]
                             for name in theirs])
            for ours, theirs in names.items()}


# -----------------------------------------------------------------------------
# Configurations

def config_from_hf(theirs: dict) -> GPTConfig:
    """Return the config of a config.json. Raise ValueError for settings that we do not have."""
    if theirs["model_type"] == "gpt2":
        known = {"activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu"],
                 "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True],
                 "scale_attn_by_inverse_layer_idx": [False], "tie_word_embeddings": [True]}
        exact = theirs.get("activation_function") == "gelu"
        args = dict(block_size=theirs["n_positions"], n_layer=theirs["n_layer"],
                    n_head=theirs["n_head"], n_embd=theirs["n_embd"],
                    gelu="none" if exact else "tanh")
    elif theirs["model_type"] in ("qwen3", "llama"):
        known = {"hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False],
                 "use_sliding_window": [False], "rope_interleaved": [False], "rope_scaling": [None]}
        # rope_parameters since transformers 5
        rope = theirs.get("rope_parameters") or {"rope_theta": theirs.get("rope_theta", 10000.0)}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"its rope_type is {rope['rope_type']!r}; only 'default' is supported")
        args = dict(block_size=theirs["max_position_embeddings"],
                    n_layer=theirs["num_hidden_layers"], n_head=theirs["num_attention_heads"],
                    n_kv_head=theirs.get("num_key_value_heads") or 0,
                    head_dim=theirs.get("head_dim") or 0, n_inner=theirs["intermediate_size"],
                    n_embd=theirs["hidden_size"], rope_theta=float(rope["rope_theta"]),
                    norm_eps=theirs["rms_norm_eps"],
                    tied=theirs.get("tie_word_embeddings", False))
    else:
        raise ValueError(f"its model_type is {theirs['model_type']!r}, not "
                         f"{' or '.join(map(repr, CLASSES))}")
    for name, values in known.items():
        if theirs.get(name, values[0]) not in values:
            raise ValueError(f"its {name} is {theirs[name]!r}; only "
                             f"{' or '.join(map(repr, values))} is supported")
    return GPTConfig(**args, arch=theirs["model_type"], vocab_size=theirs["vocab_size"])


def check_exportable(config: GPTConfig) -> None:
    """Raise ValueError if a field that other programs do not have differs from its default."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in EXPORTED and value != field.default:
            raise ValueError(f"other programs do not have {field.name}={value!r} of this model: it "
                             "cannot be exported")


def config_to_hf(c: GPTConfig, eot: int, dtype: str) -> dict:
    """Return the config.json of a model for transformers."""
    check_exportable(c)
    common = {"architectures": [CLASSES[c.arch]], "model_type": c.arch, "dtype": dtype,
              "vocab_size": c.vocab_size, "tie_word_embeddings": c.tied}
    if eot >= 0:
        common |= {"bos_token_id": eot, "eos_token_id": eot}
    if c.arch == "gpt2":
        return common | {
            "n_positions": c.block_size, "n_ctx": c.block_size, "n_layer": c.n_layer,
            "n_head": c.n_head, "n_embd": c.n_embd,
            "activation_function": "gelu_new" if c.gelu == "tanh" else "gelu",
            "layer_norm_epsilon": c.norm_eps, "resid_pdrop": c.dropout, "embd_pdrop": c.dropout,
            "attn_pdrop": c.dropout}
    return common | {
        "max_position_embeddings": c.block_size, "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim, "hidden_size": c.n_embd,
        "intermediate_size": c.n_inner, "hidden_act": "silu", "rms_norm_eps": c.norm_eps,
        # rope_theta is read by transformers 4, rope_parameters by 5
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "attention_bias": False}


# -----------------------------------------------------------------------------
# Files

def is_hub_name(name: str | Path) -> bool:
    """
    Return whether name is a model on the hub: USER/NAME or one of OPENAI, optionally @REVISION.

    An existing local path, or a Path, is never a hub name.
    """
    if not isinstance(name, str) or name.endswith((".pt", ".gguf")) or Path(name).exists():
        return False
    model, _, _ = name.partition("@")
    return model in OPENAI or bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model, re.ASCII))


def download(name: str) -> tuple[Path, str]:
    """
    Download a model of the Hugging Face hub; return its folder and USER/NAME@COMMIT.

    name: see is_hub_name(). The revision is a branch, a tag or a commit. Raises ValueError if the
    hub cannot be reached or does not have the model, its revision or weights in safetensors.
    """
    from huggingface_hub import errors, snapshot_download

    model, _, revision = name.partition("@")
    model = f"openai-community/{model}" if model in OPENAI else model
    page, is_first_rank = f"https://huggingface.co/{model}", os.environ.get("RANK", "0") == "0"
    hide_hub_progress()
    if is_first_rank:
        print(f"asking the Hugging Face hub for {visible(name)} ...", file=sys.stderr)
    try:
        folder = Path(snapshot_download(model, revision=revision or None, allow_patterns=HUB_FILES,
                                        ignore_patterns="*/*"))  # no files in subfolders
    except errors.GatedRepoError:
        raise ValueError(f"the model {model} is gated: accept its terms at {page}, then log in "
                         "with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"the model {model} has no revision {revision} on the Hugging Face hub: "
                         f"choose a branch, tag or commit of {page}") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"there is no folder {name}, and no model {model} on the Hugging Face hub "
                         "(a private one needs `hf auth login`)") from None
    except Exception as error:  # a download can fail in any way
        reason = f"{type(error).__name__}: {one_line(error, 150)}"
        raise ValueError(f"there is no folder {name}, and the Hugging Face hub cannot be reached "
                         f"or the download failed ({reason}): give a local "
                         "folder with the model's config.json and *.safetensors") from None
    for pattern, what in ("*.safetensors", "safetensors weights"), ("config.json", "config.json"):
        if not any(folder.glob(pattern)):
            raise ValueError(f"the model {model} on the Hugging Face hub has no {what}")
    if is_first_rank:
        print(f"using {model}@{folder.name}", file=sys.stderr)  # the folder is named by the commit
    return folder, f"{model}@{folder.name}"


def complete_template(template: str, **tokens: str) -> str:
    """Return a chat template that defines bos_token and eos_token itself, if it uses them."""
    used = [f"{{% set {name} = {json.dumps(token)} %}}" for name, token in tokens.items()
            if re.search(rf"\b{name}\b", template) and f"set {name} =" not in template]
    return "".join([*used, template])


def read_hf_tokenizer(folder: Path) -> dict:
    """
    Return the meta of a folder's tokenizer: the byte-level BPE of tokenizer.json, or GPT-2's.

    The chat template, if there is one, is under the key "chat_template". Raises ValueError for
    other tokenizers.
    """
    def special(name: str) -> str:
        token = about.get(name) or ""
        return token["content"] if isinstance(token, dict) else token

    files = {name: read_text(folder / name) for name in TOKENIZER_FILES
             if (folder / name).exists()}
    about = json.loads(files.get("tokenizer_config.json", "{}"))
    bos, eos, spec = special("bos_token"), special("eos_token"), {"kind": "gpt2"}
    if "tokenizer.json" in files:
        spec = read_tokenizer_json(files["tokenizer.json"], eos)
    template = files.get("chat_template.jinja") or about.get("chat_template")
    if isinstance(template, list):  # several with names
        template = {each["name"]: each["template"] for each in template}.get("default")
    if not template:
        return meta_of(spec)
    template = complete_template(template, bos_token=bos, eos_token=eos)
    return meta_of(spec) | {"chat_template": template}


def read_hugging_face(folder: Path) -> dict:
    """
    Read a folder with a model of transformers as a checkpoint.

    Step, dataset and tokenizer are in the meta.json that export.py writes. Without it, the
    tokenizer is that of read_hf_tokenizer().
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"to read {folder} a package is needed: pip install safetensors") from None

    try:
        config = config_from_hf(load_json(folder / "config.json"))
        trained = {"step": 0, "config": {"dataset": ""}}
        if (folder / "meta.json").exists():
            trained |= load_json(folder / "meta.json")
        else:
            trained["meta"] = read_hf_tokenizer(folder)
        tokens = trained["meta"]["vocab_size"]
        if not tokens <= config.vocab_size <= tokens + 4096:  # some models pad the vocabulary
            raise ValueError(f"its vocabulary of {config.vocab_size:,} tokens is not that of its "
                             f"tokenizer ({tokens:,}), which without a tokenizer.json is GPT-2's")
        weights = {}
        for path in sorted(folder.glob("*.safetensors")):
            check_regular(path, system_memory())
            weights |= load_file(path)
        if "wte.weight" in weights:  # OpenAI's own files have no prefix
            weights = {f"transformer.{name}": w for name, w in weights.items()}
        weights = from_hf(weights, config)
    except OSError:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        reason = one_line(error, 150)
        raise ValueError(f"{folder} is not a Hugging Face model that can be read here "
                         f"({type(error).__name__}: {reason})") from None
    return trained | {"model": weights, "model_args": asdict(config)}


def from_nanogpt(checkpoint: dict, path: Path) -> dict:
    """
    Return nanoGPT's ckpt.pt under our names: the same weights, and the exact GELU.

    A character-level model needs the meta.pkl of its dataset, beside the checkpoint or in data/.
    """
    if missing := {"model", "model_args", "config"} - set(checkpoint):
        raise ValueError(f"{path} is a nanoGPT checkpoint without {', '.join(sorted(missing))}")
    dataset = str(checkpoint["config"].get("dataset", ""))
    vocab_size = checkpoint["model_args"]["vocab_size"]
    spec = {"kind": "gpt2"}
    if vocab_size < 50257:
        candidates = path.with_name("meta.pkl"), Path("data", dataset, "meta.pkl")
        found = [file for file in candidates if file.is_file()]
        if not found:
            raise ValueError(f"the {vocab_size} characters of {path} are unknown: put the meta.pkl "
                             "of its dataset beside it")
        spec = read_nanogpt_characters(found[0])
    weights = checkpoint["model"].items()
    return {
        "model": {name.removeprefix("_orig_mod."): weight for name, weight in weights},
        "model_args": checkpoint["model_args"] | {"gelu": "none"},
        "step": checkpoint["iter_num"],
        "best_val_loss": float(checkpoint.get("best_val_loss", "inf")),
        "config": checkpoint["config"],
        "meta": meta_of(spec, dataset) | {"vocab_size": vocab_size},
    }
