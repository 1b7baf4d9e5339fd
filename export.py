"""
Write a trained model in a format that other programs read.

    python export.py --out_dir=out --format=hf    # out-hf: a folder for transformers and the hub
    python export.py --out_dir=out --format=gguf  # out-float16.gguf: a file for llama.cpp
    python export.py --out_dir=out --format=html  # out.html: a web page that runs the model offline
    python export.py --out_dir=out --format=int8  # out-int8: a run with a quarter of the size
    python export.py --out_dir=out/step_001000.pt --format=hf  # out/step_001000-hf

The tokenizer is exported with the model. sample.py, eval.py and app.py read out-hf and out-int8.
"""
import base64
import contextlib
import html
import importlib
import inspect
import json
import re
import shlex
import shutil
import sys
import tempfile
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

import lib.tokenizer
from lib.chat import answer_marks, page_frames
from lib.checkpoint import build_model, load_checkpoint, save_checkpoint
from lib.configurator import configure, one_line, one_of, read_settings, user_errors
from lib.console import hide_hub_progress
from lib.convert import (
    check_exportable,
    config_to_hf,
    interleave,
    is_hub_name,
    is_transposed,
    to_hf,
)
from lib.decoding import start_token
from lib.files import load_json, replace_file, results_file, sync_file, write_atomically
from lib.quantize import quantize_int8
from lib.tokenizer import (
    EOT,
    PATTERNS,
    PIECE,
    UNK,
    BytePairTokenizer,
    byte_level,
    get_tokenizer,
    gpt2_pattern,
    has_all_of,
)
from model import GPT

# -----------------------------------------------------------------------------
out_dir = "out"  # a run, a .pt or .gguf file, a Hugging Face folder, gpt2, USER/NAME@REVISION
format = "int8"  # or 'hf', 'gguf', 'html'
dtype = "auto"  # hf: float32 (auto), float16, bfloat16; gguf: float16 (auto), float32, q8_0
to = ""  # folder or file to write; '': named after out_dir
overwrite = False  # True: replace existing files
push = ""  # USER/NAME: also upload to the Hugging Face hub under this name
if __name__ == "__main__":
    configure(globals(), skip_settings_of="train.py", format=one_of("int8", "hf", "gguf", "html"))
# -----------------------------------------------------------------------------

DTYPES = {"hf": ["float32", "float16", "bfloat16"], "gguf": ["float16", "float32", "q8_0"],
          "int8": ["int8"], "html": ["int8"]}  # the first is 'auto'
PAGE_METRICS = {"loss": "loss, nats per token", "floor": "least possible loss",
                "bits_per_byte": "bits per byte"}
EXAMPLE = "Once upon a time"  # the prompt on a page, if the vocabulary has it
# of metrics_summary.json, for the model card
METRICS = ("loss", "floor", "perplexity", "word_perplexity", "bits_per_byte", "accuracy",
           "accuracy_top5", "last_word_accuracy", "valid_share", "obeyed_share")


# -----------------------------------------------------------------------------
# Tokenizers

# tokenization_word.py of an exported 'word' tokenizer: this text and the source of these functions
WORD_FUNCTIONS = ("nltk_tools", "split_words", "join_words")
WORD_TOKENIZER = '''\
"""A tokenizer of lower-cased words, as NLTK splits and joins them: pip install nltk"""
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


def write_hf_tokenizer(tokenizer, folder: Path, block_size: int, template: str = "") -> None:
    """
    Write the files of a transformers tokenizer that returns the same ids as ours.

    A prompt starts with end-of-text, if there is one, as in sample.py. Special tokens in a prompt
    are encoded as ordinary text. The tokenizer 'word' also gets a Python file and needs
    trust_remote_code=True.
    """
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
              "model_input_names": ["input_ids", "attention_mask"],
              "clean_up_tokenization_spaces": False,
              "split_special_tokens": not template}  # a template's tokens must not be split
    if tokenizer.eot >= 0:
        eot = tokenizer.spec.get("eot", EOT)
        config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), eot)
    if tokenizer.unk >= 0:
        config["unk_token"] = UNK
    if tokenizer.spec["kind"] == "word":
        config |= {"tokenizer_class": "WordTokenizer",
                   "auto_map": {"AutoTokenizer": ["tokenization_word.WordTokenizer", None]}}
        functions = (getattr(lib.tokenizer, name) for name in WORD_FUNCTIONS)
        code = "\n\n".join([WORD_TOKENIZER, *map(inspect.getsource, functions)])
        (folder / "tokenization_word.py").write_text(code, encoding="utf-8")
        write_json(folder / "vocab.json", tokenizer.vocab)
    else:
        rust = to_rust(tokenizer)
        with library_errors():
            rust.save(str(folder / "tokenizer.json"))
    if template:
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)


def to_rust(tokenizer):
    """
    Return our tokenizer as one of the library `tokenizers`.

    Without <UNK> in the vocabulary, unknown text is an error there too.
    """
    needed("tokenizers")
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    if isinstance(tokenizer, BytePairTokenizer):
        vocab, merges = byte_level(tokenizer)
        rust = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges,
                                    ignore_merges=True))  # as tiktoken
        rust.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(tokenizer.encoding._pat_str), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        rust.decoder = decoders.ByteLevel()
    else:
        rust = Tokenizer(models.WordLevel(tokenizer.ids, unk_token=UNK))
        pattern = r"[\s\S]" if tokenizer.spec["kind"] == "char" else PIECE.pattern
        rust.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
        rust.decoder = decoders.Fuse()
    specials = [*tokenizer.specials, *([UNK] if tokenizer.unk >= 0 else [])]
    rust.add_special_tokens([AddedToken(name, special=True) for name in specials])
    if tokenizer.eot >= 0:
        eot = tokenizer.spec.get("eot", EOT)
        rust.post_processor = TemplateProcessing(f"{eot} $A", f"{eot} $A {eot} $B",
                                                 [(eot, tokenizer.eot)])
    return rust


def add_gguf_tokenizer(writer, tokenizer, vocab_size: int) -> None:
    """
    Write our tokenizer as one of llama.cpp.

    A BPE is written as GPT-2's. Characters and pieces become a unigram model with equal scores,
    which splits a text into the fewest tokens: ours. A text starts with end-of-text, as in
    sample.py.
    """
    import gguf

    if isinstance(tokenizer, BytePairTokenizer):
        tokens, merges = byte_level(tokenizer)
        names = {pattern: name for name, pattern in PATTERNS.items()} | {gpt2_pattern(): "gpt-2"}
        if (pattern := tokenizer.encoding._pat_str) not in names:
            raise ValueError("llama.cpp does not know the pattern of this tokenizer "
                             f"({pattern[:60]!r} ...): use --format=hf")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(names[pattern])
        writer.add_token_merges([" ".join(merge) for merge in merges])
    elif tokenizer.spec["kind"] == "word":
        raise ValueError("llama.cpp has nothing like the tokenizer 'word': use --format=hf")
    elif tokenizer.eot < 0:  # it would use token 1
        raise ValueError("llama.cpp needs a token that ends a text, and this vocabulary has no "
                         "such token: use --format=hf")
    else:
        tokens = [token.replace(" ", "\u2581") for token in tokenizer.vocab]  # its sign for a space
        if len(set(tokens)) < len(tokens):
            raise ValueError("the vocabulary has the character \u2581, which llama.cpp uses for a "
                             "space: use --format=hf")
        writer.add_tokenizer_model("t5")
        writer.add_token_scores([-1.0] * vocab_size)
        writer.add_add_space_prefix(False)
        # it needs some id
        writer.add_unk_token_id(tokenizer.unk if tokenizer.unk >= 0 else tokenizer.eot)
    specials = {*tokenizer.specials.values(), tokenizer.unk}
    types = [gguf.TokenType.CONTROL if i in specials else gguf.TokenType.NORMAL
             for i in range(len(tokens))]
    padding = vocab_size - len(tokens)  # unused ids of a padded vocabulary
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in range(padding)])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * padding)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)


# -----------------------------------------------------------------------------
# Model card

def model_card(checkpoint: dict, model: GPT, kind: str, name: str) -> str:
    """Return the README.md of a model for transformers. kind: of the tokenizer."""
    c, params = model.config, model.num_params
    arch = {"gpt2": "GPT-2", "qwen3": "Qwen3", "llama": "Llama"}[c.arch]
    text = (f"A {arch} of {params():,} parameters ({params(non_embedding=True):,} without "
            f"embeddings): {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, a context of "
            f"{c.block_size:,} tokens, a vocabulary of {c.vocab_size:,} (tokenizer: {kind}).")
    if checkpoint["step"]:
        dataset = Path(checkpoint["config"]["dataset"]).name
        text += f" Trained on {dataset} for {checkpoint['step']:,} steps."
    if kind in ("char", "pieces") and UNK not in checkpoint["meta"]["tokenizer"]["vocab"]:
        text += " A prompt with text outside this vocabulary raises an error."
    if "chat_template" in checkpoint["meta"]:
        text += " It was tuned on conversations and has a chat template."
    else:
        text += (f" {EOT} in a prompt is read as text, except by programs that ignore "
                 "tokenizer_config.json.")
    measured = measured_table(measurements(checkpoint))
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


def measurements(checkpoint: dict) -> dict:
    """Return what eval.py measured at the checkpoint's step over a whole split, or {}."""
    summary = {}
    with contextlib.suppress(OSError, ValueError):
        path = results_file(out_dir, Path(checkpoint["path"]), "metrics_summary.json")
        summary = load_json(path)
    if not isinstance(summary, dict):
        return {}
    other = summary.get("quantize") or summary.get("eval_iters")  # other weights or part of a split
    return {} if other or summary.get("step") != checkpoint["step"] else summary


def measured_table(summary: dict) -> str:
    """Return measurements as a table in Markdown, or ''."""
    rows = [f"| {key} | {summary[key]:.4f} |" for key in METRICS
            if isinstance(summary.get(key), float)]
    if not rows or type(summary.get("tokens")) is not int:
        return ""
    head = (f"\nMeasured over {summary['tokens']:,} tokens of {summary.get('dataset')}, split "
            f"{summary.get('split')}; the loss is in nats per token:\n")
    return "\n".join([head, "| | |", "|---|---|", *rows, ""])


# -----------------------------------------------------------------------------
# Formats

def export_hf(checkpoint: dict, folder: Path, dtype: str) -> list[Path]:
    """Write a folder for transformers, or after an error nothing. Return its files."""
    save_file = needed("safetensors.torch").save_file
    model, tokenizer = load_float_model(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export") as temporary:
        new = Path(temporary)
        template = checkpoint["meta"].get("chat_template", "")
        write_hf_tokenizer(tokenizer, new, model.config.block_size, template)
        # GPT-2's names without a prefix, as in OpenAI's files: some programs know only these
        weights = {name.removeprefix("transformer."): w.to(getattr(torch, dtype))
                   for name, w in to_hf(model).items()
                   if not (name == "lm_head.weight" and model.config.tied)}
        with library_errors():
            save_file(weights, new / "model.safetensors", {"format": "pt"})
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot)
        if template:
            ends["eos_token_id"] = [tokenizer.eot, answer_marks(template, tokenizer)["end"]]
        write_json(new / "generation_config.json", ends if tokenizer.eot >= 0 else {})
        config = checkpoint["config"]
        kept = {key: config[key] for key in ("dataset", "batching") if key in config}
        write_json(new / "meta.json",
                   {"step": checkpoint["step"], "config": kept, "meta": checkpoint["meta"]})
        card = model_card(checkpoint, model, tokenizer.spec["kind"], push or folder.name)
        (new / "README.md").write_text(card, encoding="utf-8")
        write_json(new / "config.json", config_to_hf(model.config, tokenizer.eot, dtype))
        for file in new.iterdir():
            shutil.copymode(new / "config.json", file)  # safetensors makes its file private
            sync_file(file)
        order = {"model.safetensors": 0, "config.json": 2}  # config.json makes it a model
        files = sorted(new.iterdir(), key=lambda file: order.get(file.name, 1))
        for file in files:
            replace_file(file, folder / file.name)
    return [folder / file.name for file in files]


def export_gguf(checkpoint: dict, path: Path, dtype: str) -> list[Path]:
    """
    Write a GGUF file, for llama.cpp and programs that are built on it.

    Matrices and embeddings are in dtype, or float16 where their rows are not whole q8_0 blocks of
    32. Gains, biases and positions are in float32, as llama.cpp's own converter writes them.
    """
    gguf = needed("gguf")
    model, tokenizer = load_float_model(checkpoint)
    c = model.config
    if c.arch == "gpt2" and c.gelu != "tanh":
        print("warning: llama.cpp has only OpenAI's approximate GELU for GPT-2; this model uses "
              "the exact one, so its samples may differ there", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export") as folder:
        temporary = Path(folder, path.name)
        # closed also after an error: Windows cannot remove an open file
        with contextlib.closing(gguf.GGUFWriter(temporary, c.arch)) as writer:
            add_gguf_fields(writer, path.stem, model, dtype)
            add_gguf_tokenizer(writer, tokenizer, c.vocab_size)
            if template := checkpoint["meta"].get("chat_template"):
                writer.add_chat_template(template)
                # llama.cpp's end of turn
                writer.add_eot_token_id(answer_marks(template, tokenizer)["end"])
            add_gguf_tensors(writer, model, dtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        sync_file(temporary)
        replace_file(temporary, path)
    return [path]


def add_gguf_fields(writer, name: str, model: GPT, dtype: str) -> None:
    import gguf

    c, kinds = model.config, gguf.LlamaFileType
    check_exportable(c)
    writer.add_name(name)
    writer.add_file_type({"float32": kinds.ALL_F32, "float16": kinds.MOSTLY_F16,
                          "q8_0": kinds.MOSTLY_Q8_0}[dtype])
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_inner)
    writer.add_head_count(c.n_head)
    if c.arch == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
    else:
        writer.add_head_count_kv(c.n_kv_head)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        writer.add_layer_norm_rms_eps(c.norm_eps)
        writer.add_rope_freq_base(c.rope_theta)
        writer.add_rope_dimension_count(c.head_dim)


def add_gguf_tensors(writer, model: GPT, dtype: str) -> None:
    import gguf

    c, kinds = model.config, gguf.GGMLQuantizationType
    matrix_kind = {"float32": kinds.F32, "float16": kinds.F16, "q8_0": kinds.Q8_0}[dtype]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[c.arch.upper()], c.n_layer)
    for theirs, w in to_hf(model).items():
        if theirs == "lm_head.weight" and c.tied:
            continue
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        kind = kinds.F32 if w.dim() == 1 or name == "position_embd.weight" else matrix_kind
        if c.arch == "llama" and theirs.endswith(("q_proj.weight", "k_proj.weight")):
            w = interleave(w, c.head_dim)
        w = (w.t() if is_transposed(theirs) else w).contiguous().numpy()
        if kind == kinds.Q8_0 and w.shape[-1] % 32:
            kind = kinds.F16
        writer.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)


def export_int8(checkpoint: dict, folder: Path, dtype: str) -> list[Path]:
    """Write a run with int8 matrices and embeddings."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = quantize_int8(checkpoint["model"])
    save_checkpoint(folder, "best.pt", checkpoint | {"model": weights})
    return [folder / "best.pt"]


# -----------------------------------------------------------------------------
# A web page

def export_html(checkpoint: dict, path: Path, dtype: str) -> list[Path]:
    """Write one page that runs the model in any browser, without Python and without a network."""
    model = build_model(checkpoint, checkpoint["path"])
    tokenizer = get_tokenizer(checkpoint["meta"])
    tensors, floats, data = pack_weights(quantize_int8(model.state_dict()), model.config.tied)
    spec, tokens = tokenizer_for_page(tokenizer)
    data += json.dumps(tokens, separators=(",", ":")).encode()
    chat_template = checkpoint["meta"].get("chat_template")
    example = EXAMPLE if has_all_of(tokenizer, EXAMPLE) and not chat_template else ""
    content = {"config": asdict(model.config), "tensors": tensors, "floats": floats,
               "tokenizer": spec, "prompt": example,
               "chat": page_frames(chat_template, tokenizer) if chat_template else None,
               "card": page_card(checkpoint, model, tokenizer),
               "command": training_command(checkpoint["config"])}
    dataset = checkpoint["meta"].get("dataset")
    style = f" in the style of {dataset}" if dataset else ""
    does = "answers messages" if chat_template else f"continues a text{style}"
    about = (f"A language model of {model.num_params() / 1e6:.1f} million parameters in one file: "
             f"it {does}.")
    fields = {"title": html.escape(Path(out_dir).resolve().name), "about": html.escape(about),
              "model": json.dumps(content).replace("<", "\\u003c"),  # no tag can end the script
              "weights": base64.b64encode(zlib.compress(data, 9)).decode()}
    page = Path(__file__).with_name("lib").joinpath("page.html").read_text(encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, re.sub(r"{{(\w+)}}", lambda field: fields[field[1]], page))
    return [path]


def pack_weights(weights: dict[str, torch.Tensor], tied: bool) -> tuple[list, int, bytes]:
    """
    Return the names and shapes of int8 weights, the number of floats and the data.

    The data is all float32 values, gains, biases and scales, in the order of the names, followed
    by all int8 matrices.
    """
    tensors, floats, matrices = [], [], []
    for name, w in weights.items():
        if name.endswith("_scale") or (tied and name == "lm_head.weight"):
            continue
        is_matrix = w.dtype == torch.int8
        floats.append(weights[f"{name}_scale"] if is_matrix else w)
        matrices += [w] if is_matrix else []
        tensors.append([name.removeprefix("transformer."), *w.shape])
    values = torch.cat([w.float() for w in floats]).numpy().astype("<f4")
    data = [values.tobytes(), *(w.numpy().tobytes() for w in matrices)]
    return tensors, len(values), b"".join(data)


def tokenizer_for_page(tokenizer) -> tuple[dict, list[str]]:
    """Return what lib/page.html needs of a tokenizer, and its tokens."""
    kind = tokenizer.spec["kind"]
    if kind == "word":
        raise ValueError("a web page cannot run NLTK, which the tokenizer 'word' needs: use "
                         "--format=hf, or train with another tokenizer")
    is_bpe = isinstance(tokenizer, BytePairTokenizer)
    pattern = bpe_pattern(tokenizer.encoding._pat_str) if is_bpe else list_pattern(kind)
    spec = {"kind": "bpe" if is_bpe else kind, "pattern": pattern, "eot": tokenizer.eot,
            "unk": tokenizer.unk, "first": start_token(tokenizer),
            "control": sorted(tokenizer.specials.values())}
    if not is_bpe:
        return spec, tokenizer.vocab
    tokens = [""] * tokenizer.vocab_size
    for token, rank in tokenizer.encoding._mergeable_ranks.items():
        if rank < len(tokens):  # not a missing byte
            tokens[rank] = token.decode("latin-1")
    for token, rank in tokenizer.specials.items():
        tokens[rank] = token
    return spec, tokens


def bpe_pattern(pattern: str) -> str:
    """Return the pattern of a BPE as a regular expression of JavaScript."""
    pattern = pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
    # JavaScript has no possessive quantifiers. Without them the patterns of GPT-2, Qwen and Llama
    # match the same, as what follows a quantifier never begins with what it repeats.
    pattern = re.sub(r"([*+?]|\{\d+,\d*\})\+", r"\1", pattern)
    return re.sub(r"\(\?i:([^)]*)\)", expand_ignore_case, pattern)


def expand_ignore_case(group: re.Match) -> str:
    """
    Return a group (?i:...) with classes such as [tT], because older browsers lack the flag.

    With the flag, s also matches the long s, \u017f.
    """
    letters = re.sub("[a-z]", lambda c: f"[{c[0]}{c[0].upper()}]", group[1])
    return "(?:" + letters.replace("[sS]", "[sS\u017f]") + ")"


def list_pattern(kind: str) -> str:
    """Return the pattern that splits a text into 'char' or 'pieces', in JavaScript."""
    if kind == "char":
        return r"[\s\S]"
    word, space = r"\p{L}\p{N}_", r"\p{White_Space}\x1c-\x1f"  # Python's \w and \s
    return (PIECE.pattern.replace(r"[^\w\s]", f"[^{word}{space}]")
            .replace(r"\w", f"[{word}]").replace(r"\s", f"[{space}]"))


def page_card(checkpoint: dict, model: GPT, tokenizer) -> list[tuple[str, str]]:
    """Return the facts about a model that its page shows."""
    c, summary = model.config, measurements(checkpoint)
    return [("model", f"{c.arch}, {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}"),
            ("parameters", f"{model.num_params():,}, in int8"),
            ("context", f"{c.block_size:,} tokens"),
            ("tokenizer", f"{tokenizer.spec['kind']}, {tokenizer.vocab_size:,} tokens"),
            ("dataset", checkpoint["meta"].get("dataset") or "unknown"),
            ("steps", f"{checkpoint['step']:,}"),
            *((name, f"{summary[key]:.4f}") for key, name in PAGE_METRICS.items()
              if isinstance(summary.get(key), float))]


def training_command(config: dict) -> list[str]:
    """Return the parts of a train.py command with the settings that differ from its defaults."""
    config = config | {"dataset": Path(config["dataset"]).name}  # no path of this machine
    settings = read_settings(Path(__file__).with_name("train.py"))
    changed = [f"--{s.name}={shlex.quote(str(config[s.name]))}" for s in settings
               if s.group not in ("run", "system") and s.name in config
               and repr(config[s.name]) != s.default]
    return ["python train.py", *changed] if changed else []


# -----------------------------------------------------------------------------
# What the formats share

def needed(module: str):
    """Import a module that only some formats need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise ValueError(f"--format={format} needs a package: pip install {package}") from None


@contextlib.contextmanager
def library_errors():
    """Report a full disk as an OSError, also where a library has an exception of its own."""
    try:
        yield
    except Exception as error:
        raise OSError(f"the export could not be written ({one_line(error, 150)})") from None


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_float_model(checkpoint: dict) -> tuple[GPT, object]:
    """Return the model and the tokenizer of a checkpoint. Raise ValueError if it is in int8."""
    if any(w.dtype == torch.int8 for w in checkpoint["model"].values()):
        raise ValueError(f"{out_dir} is in int8 already: export the run that it was made from")
    return build_model(checkpoint, checkpoint["path"]), get_tokenizer(checkpoint["meta"])


def upload(files: list[Path], name: str) -> object:
    """Upload files of one folder, and no others, to a model on the hub. Return its address."""
    from huggingface_hub import HfApi

    hide_hub_progress()
    names = [file.name for file in files]
    print(f"uploading {', '.join(names)} to {name} ...", file=sys.stderr)
    try:
        url = HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=files[0].parent, allow_patterns=names)
    except Exception as error:  # an upload can fail in any way
        reason = one_line(error, 200)
        raise ValueError(f"{files[0]} is written, but could not be uploaded ({reason}): log in "
                         "with `hf auth login`, then retry with --overwrite=True") from None
    return url


# -----------------------------------------------------------------------------
# Command line

def resolve_weight_dtype() -> str:
    """Return the type of the exported weights. Raise ValueError if the format does not have it."""
    if dtype == "auto":
        return DTYPES[format][0]
    if dtype not in DTYPES[format]:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES[format])} with --format={format}, "
                         f"got {dtype!r}")
    return dtype


def resolve_path(dtype: str) -> Path:
    """Return the folder or file to write. Raise ValueError if that would destroy something."""
    name = re.sub(r"\.(pt|gguf)$", "", str(Path(out_dir)))  # without a slash at the end
    if is_hub_name(out_dir):
        name = out_dir.partition("@")[0].rpartition("/")[2]  # NAME of USER/NAME@REVISION
    names = {"gguf": f"{name}-{dtype}.gguf", "html": f"{name}.html"}
    path = Path(to or names.get(format, f"{name}-{format}"))
    if not to and path.is_symlink() and path.is_dir():
        raise ValueError(f"{path} is a link to another folder: set --to to the folder to write")
    if path.exists() and path.is_file() != (format in names):
        kind, other = ("file", "folder") if format in names else ("folder", "file")
        raise ValueError(f"--format={format} writes a {kind}, and {path} is a {other}")
    if (path.is_file() or path.is_dir() and any(path.iterdir())) and not overwrite:
        raise ValueError(f"{path} exists already: --overwrite=True replaces it, --to=OTHER writes "
                         "elsewhere")
    if format == "html" and path.suffix != ".html":
        raise ValueError(f"a browser shows {path} as a page only if its name ends in .html")
    return path


def check_target(path: Path, source: Path) -> None:
    """
    Raise ValueError if an export would replace the model that it is made from.

    source: what was loaded, a .pt or .gguf file or a Hugging Face folder.
    """
    source = source.resolve()  # the run may have a link to the file
    places = [source, source.parent] if format == "int8" else [source]
    if path.exists() and any(path.samefile(place) for place in places):
        raise ValueError(f"{path} has the model that is exported, which would be lost: --to=OTHER "
                         "writes elsewhere")


if __name__ == "__main__":
    with user_errors():
        weight_dtype = resolve_weight_dtype()
        if push and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
            raise ValueError(f"push takes USER/NAME, got {push!r}")
        path = resolve_path(weight_dtype)
        checkpoint = load_checkpoint(out_dir)
        check_target(path, Path(checkpoint["path"]))
        export = {"hf": export_hf, "gguf": export_gguf, "int8": export_int8,
                  "html": export_html}[format]
        files = export(checkpoint, path, weight_dtype)
        size = sum(file.stat().st_size for file in files) / 1e6
        print(one_line(f"wrote {path} ({weight_dtype}, {size:,.1f} MB) from {checkpoint['path']}, "
                       f"step {checkpoint['step']:,}"))
        if format == "gguf":
            print(f"note: with llama.cpp's parse_special, {EOT} in a prompt is read as the special "
                  "token; sample.py reads it as text")
        elif format == "html":
            print(one_line(f"next: open {path} in a browser"))
        else:
            print(one_line(f"next: python sample.py --out_dir={path}"))
        if push:
            print(upload(files, push))
