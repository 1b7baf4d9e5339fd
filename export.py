"""
Write a trained model in a form that other programs run.

    python export.py --out_dir=out --format=hf      # out-hf: a folder for transformers and the Hugging Face hub
    python export.py --out_dir=out --format=gguf    # out-float16.gguf: a file for llama.cpp and what is built on it
    python export.py --out_dir=out --format=int8    # out-int8: a run whose best.pt has a quarter of the size

The tokenizer goes with the model. sample.py, eval.py and app.py take out-hf and out-int8 as --out_dir.
"""
import contextlib
import importlib
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from lib.checkpoint import build_model, load_checkpoint, save_checkpoint
from lib.configurator import configure, user_errors
from lib.convert import is_transposed, to_hf
from lib.tokenizer import (
    BytePairTokenizer, EOT, LETTER_OF_BYTE, PIECE, UNK, get_tokenizer, join_words, nltk_tools,
    split_words,
)
from model import GPT, quantize_int8

# -----------------------------------------------------------------------------
out_dir = "out"  # what to export: a run (its best.pt, else last.pt), a Hugging Face folder, or gpt2 ... gpt2-xl
format = "int8"  # or 'hf', 'gguf'
dtype = "auto"  # of the weights: hf float32 (auto), float16, bfloat16; gguf float16 (auto), float32, q8_0
to = ""  # folder, or .gguf file, to write; '': named after out_dir
overwrite = False  # True: replace what is there
push = ""  # USER/NAME: upload it to the Hugging Face hub under this name
# -----------------------------------------------------------------------------

DTYPES = {"hf": ["float32", "float16", "bfloat16"], "gguf": ["float16", "float32", "q8_0"], "int8": ["int8"]}  # auto first
METRICS = ("loss", "floor", "perplexity", "word_perplexity", "bits_per_byte", "accuracy", "accuracy_top5", "valid_share")


# -----------------------------------------------------------------------------
# Tokenizers

def byte_level(tokenizer: BytePairTokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    """
    A byte-level BPE as GPT-2 wrote it down: its tokens by id and its merges in their order, with a visible character for
    every byte. tiktoken knows only ranks: a token was merged from the two parts that the merges before it leave of it.
    """
    def spell(token: bytes) -> str:
        return "".join(LETTER_OF_BYTE[byte] for byte in token)

    ranks = tokenizer.encoding._mergeable_ranks
    vocab, merges = [""] * tokenizer.vocab_size, []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        vocab[rank] = spell(token)
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    vocab[tokenizer.eot] = tokenizer.encoding.decode([tokenizer.eot])
    return vocab, merges


# tokenization_word.py of an exported 'word' tokenizer, before the functions of tokenizer.py that it calls
WORD_TOKENIZER = '''"""A tokenizer of lower-cased words, as NLTK splits and joins them: pip install nltk"""
import functools
import json

from transformers import PreTrainedTokenizer

PAD, EOT = "<PAD>", "<|endoftext|>"


class WordTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "vocab.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **kwargs):
        with open(vocab_file, encoding="utf-8") as file:
            self.words = json.load(file)
        self.ids = {word: i for i, word in enumerate(self.words)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return dict(self.ids)

    def tokenize(self, text, **kwargs):
        return split_words(text)

    def _convert_token_to_id(self, token):
        return self.ids.get(token, self.ids.get("<UNK>"))

    def _convert_id_to_token(self, i):
        return self.words[i]

    def convert_tokens_to_string(self, tokens):
        return join_words(tokens)

    def build_inputs_with_special_tokens(self, ids, more=None):
        return [self.ids[EOT], *ids, *(more or [])]

    def save_vocabulary(self, folder, filename_prefix=None):
        path = f"{folder}/{filename_prefix + '-' if filename_prefix else ''}vocab.json"
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.words, file, ensure_ascii=False)
        return (path,)
'''


def write_hf_tokenizer(tokenizer, folder: Path, block_size: int) -> None:
    """
    Ours as files of which transformers makes a tokenizer that gives the same ids, with the end of text in front where there
    is one, as sample.py begins. The words of NLTK take a Python file beside them, and so trust_remote_code=True.
    """
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
              "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}
    if tokenizer.eot >= 0:
        config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOT)
    if tokenizer.unk >= 0:
        config["unk_token"] = UNK
    if tokenizer.spec["kind"] == "word":
        config |= {"tokenizer_class": "WordTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_word.WordTokenizer", None]}}
        functions = (inspect.getsource(f) for f in (nltk_tools, split_words, join_words))
        (folder / "tokenization_word.py").write_text("\n\n".join([WORD_TOKENIZER, *functions]), encoding="utf-8")
        write_json(folder / "vocab.json", tokenizer.vocab)
    else:
        rust_tokenizer(tokenizer).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)


def rust_tokenizer(tokenizer):
    """Ours as one of the library `tokenizers`. What 'char' or 'pieces' lack is an error there too, unless there is <UNK>."""
    needed("tokenizers")
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    if isinstance(tokenizer, BytePairTokenizer):
        vocab, merges = byte_level(tokenizer)
        made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
        split = pre_tokenizers.Split(Regex(tokenizer.encoding._pat_str), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
    else:
        made = Tokenizer(models.WordLevel(tokenizer.ids, unk_token=UNK))
        pattern = r"[\s\S]" if tokenizer.spec["kind"] == "char" else PIECE.pattern
        made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
        made.decoder = decoders.Fuse()
    specials = [name for name, i in ((EOT, tokenizer.eot), (UNK, tokenizer.unk)) if i >= 0]
    made.add_special_tokens([AddedToken(name, special=True) for name in specials])
    if tokenizer.eot >= 0:
        made.post_processor = processors.TemplateProcessing(f"{EOT} $A", f"{EOT} $A {EOT} $B", [(EOT, tokenizer.eot)])
    return made


def add_gguf_tokenizer(writer, tokenizer, vocab_size: int) -> None:
    """
    Ours as one of llama.cpp: a BPE as GPT-2's; characters and pieces as a unigram model in which every token costs the same,
    so that the fewest are taken, which are ours. The end of text comes in front, as in sample.py.
    """
    import gguf

    if isinstance(tokenizer, BytePairTokenizer):
        tokens, merges = byte_level(tokenizer)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2" if tokenizer.encoding._pat_str.startswith("(?i:") else "gpt-2")
        writer.add_token_merges([" ".join(merge) for merge in merges])
    elif tokenizer.spec["kind"] == "word":
        raise ValueError("llama.cpp has nothing like the tokenizer 'word': --format=hf takes it")
    elif tokenizer.eot < 0:  # it would take token 1 for it
        raise ValueError("llama.cpp needs a token that ends a text, and this vocabulary has none: --format=hf takes it")
    else:
        tokens = [token.replace(" ", "\u2581") for token in tokenizer.vocab]  # how it writes a space
        if len(set(tokens)) < len(tokens):
            raise ValueError("the vocabulary has the character \u2581, which llama.cpp takes for a space: --format=hf takes it")
        writer.add_tokenizer_model("t5")
        writer.add_token_scores([-1.0] * vocab_size)
        writer.add_add_space_prefix(False)
        writer.add_unk_token_id(tokenizer.unk if tokenizer.unk >= 0 else tokenizer.eot)  # something must stand there
    specials = {tokenizer.eot, tokenizer.unk}
    types = [gguf.TokenType.CONTROL if i in specials else gguf.TokenType.NORMAL for i in range(len(tokens))]
    padding = vocab_size - len(tokens)  # ids of a padded vocabulary, which say nothing
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in range(padding)])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * padding)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)


# -----------------------------------------------------------------------------
# Models

def hf_config(model: GPT, eot: int, dtype: str) -> dict:
    """config.json of GPT2LMHeadModel or Qwen3ForCausalLM."""
    c, attn = model.config, model.transformer.h[0].attn
    ends = {"bos_token_id": eot, "eos_token_id": eot} if eot >= 0 else {}
    if c.arch == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": dtype, "vocab_size": c.vocab_size,
            "n_positions": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
            "activation_function": "gelu_new" if c.gelu == "tanh" else "gelu", "layer_norm_epsilon": 1e-5,
            "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout, "tie_word_embeddings": True, **ends}
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": dtype, "vocab_size": c.vocab_size,
        "max_position_embeddings": c.block_size, "num_hidden_layers": c.n_layer, "num_attention_heads": attn.n_head,
        "num_key_value_heads": attn.n_kv_head, "head_dim": attn.head_dim, "hidden_size": c.n_embd,
        "intermediate_size": model.transformer.h[0].mlp.rows[0], "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": c.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},  # of 4, of 5
        "attention_bias": False, "tie_word_embeddings": c.tied, **ends}


def model_card(checkpoint: dict, model: GPT, kind: str, name: str) -> str:
    """README.md of the folder; `kind` is that of the tokenizer. With what eval.py measured, where it measured this step."""
    c, params = model.config, model.num_params
    text = (f"A {'GPT-2' if c.arch == 'gpt2' else 'Qwen3'} of {params():,} parameters ({params(non_embedding=True):,} without "
            f"embeddings): {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, a context of {c.block_size:,} tokens, a "
            f"vocabulary of {c.vocab_size:,} (tokenizer: {kind}).")
    if checkpoint["step"]:
        text += f" Trained on {Path(checkpoint['config']['dataset']).name} for {checkpoint['step']:,} steps."
    summary, measured = {}, ""
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads(Path(out_dir, "metrics_summary.json").read_text(encoding="utf-8"))
    if rows := [f"| {key} | {summary[key]:.4f} |" for key in METRICS if isinstance(summary.get(key), float)]:
        if summary.get("step") == checkpoint["step"]:
            measured = "\n".join([f"\nMeasured over {summary['tokens']:,} tokens of {summary['dataset']}, split "
                                  f"{summary['split']}; the loss is in nats per token:\n", "| | |", "|---|---|", *rows, ""])
    remote = ", trust_remote_code=True" if kind == "word" else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- {c.arch}
---

# {name}

{text}
{measured}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{remote})
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.8)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```
"""


def export_hf(checkpoint: dict, folder: Path) -> list[Path]:
    """A folder that transformers loads, complete or, where something fails, as it was before; its files, the weights first."""
    save_file = needed("safetensors.torch").save_file
    model, tokenizer = model_of(checkpoint)
    config = hf_config(model, tokenizer.eot, dtype)
    weights = {name: w.to(getattr(torch, dtype)) for name, w in to_hf(model).items()
               if not (name == "lm_head.weight" and model.config.tied)}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export") as temporary:
        new = Path(temporary)
        write_hf_tokenizer(tokenizer, new, model.config.block_size)
        save_file(weights, new / "model.safetensors", {"format": "pt"})
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot)
        write_json(new / "generation_config.json", ends if tokenizer.eot >= 0 else {})
        config_of_run = {key: checkpoint["config"][key] for key in ("dataset", "batching") if key in checkpoint["config"]}
        write_json(new / "meta.json", {"step": checkpoint["step"], "config": config_of_run, "meta": checkpoint["meta"]})
        (new / "README.md").write_text(model_card(checkpoint, model, tokenizer.spec["kind"], push or folder.name),
                                       encoding="utf-8")
        write_json(new / "config.json", config)
        for file in new.iterdir():
            shutil.copymode(new / "config.json", file)  # safetensors lets nobody else read
            flush_to_disk(file)
        order = ["model.safetensors", "config.json"]  # the last one makes it a model
        files = sorted(new.iterdir(), key=lambda file: order.index(file.name) if file.name in order else 0.5)
        for file in files:
            os.replace(file, folder / file.name)
    return [folder / file.name for file in files]


def export_gguf(checkpoint: dict, path: Path) -> list[Path]:
    """
    One GGUF file, for llama.cpp and its kin. Matrices and tables in dtype, but float16 where q8_0 has no whole blocks of 32;
    gains, biases and positions in float32, as llama.cpp's own converter has it.
    """
    gguf = needed("gguf")
    model, tokenizer = model_of(checkpoint)
    c, attn = model.config, model.transformer.h[0].attn
    if c.arch == "gpt2" and c.gelu != "tanh":
        print("warning: llama.cpp knows GPT-2 only with the GELU that OpenAI used; this model has the exact one, so that its "
              "texts may differ there", file=sys.stderr)
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(temporary, c.arch)
    writer.add_name(path.stem)
    writer.add_file_type({"float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16,
                          "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[dtype])
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(model.transformer.h[0].mlp.rows[0])
    writer.add_head_count(attn.n_head)
    if c.arch == "gpt2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_head_count_kv(attn.n_kv_head)
        writer.add_key_length(attn.head_dim)
        writer.add_value_length(attn.head_dim)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(c.rope_theta)
    add_gguf_tokenizer(writer, tokenizer, c.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[c.arch.upper()], c.n_layer)
    kinds = {"float32": gguf.GGMLQuantizationType.F32, "float16": gguf.GGMLQuantizationType.F16,
             "q8_0": gguf.GGMLQuantizationType.Q8_0}
    for theirs, w in to_hf(model).items():
        if theirs == "lm_head.weight" and c.tied:
            continue
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        kind = kinds["float32" if w.dim() == 1 or name == "position_embd.weight" else dtype]
        w = (w.t() if is_transposed(theirs) else w).contiguous().numpy()
        if kind == kinds["q8_0"] and w.shape[-1] % 32:
            kind = kinds["float16"]
        writer.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return [path]


def export_int8(checkpoint: dict, folder: Path) -> list[Path]:
    """A run of ours with matrices and tables of one byte a weight and one scale a row."""
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, "best.pt", checkpoint | {"model": quantize_int8(checkpoint["model"])})
    return [folder / "best.pt"]


# -----------------------------------------------------------------------------

def needed(module: str):
    """A module that only some exports need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"--format={format} needs a package: pip install {module.split('.')[0]}") from None


def flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def model_of(checkpoint: dict) -> tuple[GPT, object]:
    """Its model and its tokenizer; ValueError for weights that were rounded already."""
    if any(w.dtype == torch.int8 for w in checkpoint["model"].values()):
        raise ValueError(f"{out_dir} is in int8 already: export the run that it was made from")
    return build_model(checkpoint, checkpoint["path"]), get_tokenizer(checkpoint["meta"])


def upload(files: list[Path], name: str) -> None:
    """Upload files of one folder, and no others, to the Hugging Face hub, to a model that is made where there is none."""
    from huggingface_hub import HfApi

    print(f"uploading {', '.join(file.name for file in files)} to {name} ...", file=sys.stderr)
    try:
        where = HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=files[0].parent, allow_patterns=[file.name for file in files])
    except Exception as error:  # any way in which an upload fails
        raise ValueError(f"{files[0]} is written, but could not be uploaded ({' '.join(str(error).split())[:200]}): `hf auth "
                         "login` gives access, and the same command with --overwrite=True tries again") from None
    print(where)


if __name__ == "__main__":
    configure(globals(), skip_settings_of="train.py")
    with user_errors():
        if format not in DTYPES:
            raise ValueError(f"format must be int8, hf or gguf, got {format!r}")
        dtype = DTYPES[format][0] if dtype == "auto" else dtype
        if dtype not in DTYPES[format]:
            raise ValueError(f"dtype must be auto, {', '.join(DTYPES[format])} with --format={format}, got {dtype!r}")
        if push and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
            raise ValueError(f"push takes USER/NAME, got {push!r}")
        name = out_dir.rstrip("/")
        path = Path(to or (f"{name}-{dtype}.gguf" if format == "gguf" else f"{name}-{format}"))
        if (path.is_file() or path.is_dir() and any(path.iterdir())) and not overwrite:
            raise ValueError(f"{path} is there already: --overwrite=True replaces it, --to=OTHER writes elsewhere")
        if path.is_file() != (format == "gguf") and path.exists():
            raise ValueError(f"--format={format} writes a {'file' if format == 'gguf' else 'folder'}, and {path} is none")
        checkpoint = load_checkpoint(out_dir)
        files = {"hf": export_hf, "gguf": export_gguf, "int8": export_int8}[format](checkpoint, path)
        print(f"{files[0]}: {files[0].stat().st_size / 1e6:,.1f} MB")
        if push:
            upload(files, push)
