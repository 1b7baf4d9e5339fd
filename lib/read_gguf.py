"""
Read the GGUF files of llama.cpp: their header, tokenizer and quantized weights.

A header has fields and, for each tensor, its name, shape, type and place in the data that follows.
Every length is checked against the size of the file before anything is allocated.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
import contextlib
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from lib.configurator import one_line
from lib.convert import (
    CLASSES,
    complete_template,
    deinterleave,
    from_hf,
    hf_names,
    is_transposed,
)
from lib.files import check_regular
from lib.machine import check_memory, system_memory, weight_bytes
from lib.tokenizer import EOT, PATTERNS, PIECE, UNK, bpe_of_model, gpt2_pattern, meta_of
from model import GPTConfig

# GGUF type id to the type code of struct and NumPy
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, NORMAL_TOKEN = 8, 9, 1
# GPTConfig field to GGUF field, which follows the prefix "llama." and so on
REQUIRED = {"block_size": "context_length", "n_layer": "block_count", "n_embd": "embedding_length",
            "n_inner": "feed_forward_length", "n_head": "attention.head_count"}
OPTIONAL = {"n_kv_head": "attention.head_count_kv", "head_dim": "attention.key_length",
            "rope_theta": "rope.freq_base"}


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    kind: int  # a GGMLQuantizationType
    offset: int  # in the file
    size: int  # bytes


def read_gguf(path: Path) -> dict:
    """Read a GGUF file as a checkpoint with weights in float32. Raise ValueError if it is bad."""
    with open_gguf(path) as file:
        fields, tensors = read_header(file)
        config, meta = config_of_fields(fields, tensors, file), meta_of_fields(fields)
        check_memory(weight_bytes(config))
        if meta["vocab_size"] > config.vocab_size:
            raise ValueError(f"its tokenizer has {meta['vocab_size']:,} tokens, and its vocabulary "
                             f"{config.vocab_size:,}")
        weights = read_weights(file, tensors, config)
    return {"step": 0, "config": {"dataset": ""}, "meta": meta, "model": weights,
            "model_args": asdict(config)}


def read_gguf_tokenizer(path: Path) -> dict:
    """Return the meta of the tokenizer of a GGUF file, from its header alone."""
    with open_gguf(path) as file:
        return meta_of_fields(read_header(file)[0])


@contextlib.contextmanager
def open_gguf(path: Path) -> Iterator[BinaryIO]:
    """Open a GGUF file. An error while it is read becomes a ValueError that names the file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError(f"to read {path} a package is needed: pip install gguf") from None
    check_regular(path, system_memory())
    with open(path, "rb") as file:
        try:
            yield file
        except OSError:
            raise
        except Exception as error:  # a damaged file can make the reader fail in any way
            raise ValueError(f"{path} is not a GGUF file that can be read here "
                             f"({one_line(error, 150)})") from None


class HeaderReader:
    """Reads values from the start of a file, but never more bytes than it has."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.left = self.size = os.fstat(file.fileno()).st_size

    def take(self, n: int) -> bytes:
        if n > self.left:
            raise ValueError("it is truncated or damaged")
        self.left -= n
        return self.file.read(n)

    def number(self, code: str) -> int | float:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> object:
        """Return a value of a GGUF type. An array of numbers is a NumPy array."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        if kind not in SCALARS:
            raise ValueError(f"a field has the unknown type {kind}")
        x = self.number(SCALARS[kind])
        return float(str(np.float32(x))) if SCALARS[kind] == "f" else x  # 1e-5, not 9.99999e-06

    def array(self, kind: int, n: int) -> list[str] | np.ndarray:
        if kind == STRING:
            return [self.text() for _ in range(n)]
        if kind not in SCALARS:
            raise ValueError(f"an array has elements of the type {kind}")
        dtype = np.dtype("<" + SCALARS[kind])
        return np.frombuffer(self.take(n * dtype.itemsize), dtype)


def read_header(file: BinaryIO) -> tuple[dict, dict[str, TensorInfo]]:
    """Return the fields and tensors of a GGUF file."""
    reader = HeaderReader(file)
    if reader.take(4) != b"GGUF" or reader.number("I") not in (2, 3):
        raise ValueError("it does not start as a little-endian GGUF file of version 2 or 3")
    fields, tensors, n_tensors, n_fields = {}, {}, reader.number("Q"), reader.number("Q")
    for _ in range(n_fields):
        name = reader.text()
        if name in fields:
            raise ValueError(f"the field {name!r} occurs twice")
        fields[name] = reader.value(reader.number("I"))
    for _ in range(n_tensors):
        name = reader.text()
        if name in tensors:
            raise ValueError(f"the tensor {name!r} occurs twice")
        tensors[name] = read_tensor_info(reader, name)
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its general.alignment is {alignment!r}")
    return fields, place_tensors(tensors, reader.size - reader.left, reader.size, alignment)


def read_tensor_info(reader: HeaderReader, name: str) -> TensorInfo:
    """Read what a header says of a tensor. Its offset is from the start of the data."""
    import gguf

    n_dims = reader.number("I")
    if not 1 <= n_dims <= 4:
        raise ValueError(f"the tensor {name!r} has {n_dims} dimensions")
    shape = tuple(reader.number("Q") for _ in range(n_dims))[::-1]
    kind, offset = gguf.GGMLQuantizationType(reader.number("I")), reader.number("Q")
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise ValueError(f"the tensor {name!r} of type {kind.name} has the shape {shape}")
    return TensorInfo(shape, kind, offset, math.prod(shape) // block * block_bytes)


def place_tensors(tensors: dict[str, TensorInfo], header_bytes: int, file_bytes: int,
                  alignment: int) -> dict[str, TensorInfo]:
    """Return the tensors with offsets in the file. Raise ValueError if any does not fit there."""
    end = start = -(-header_bytes // alignment) * alignment  # the data begins at a multiple
    placed = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        placed[name] = tensor = tensor._replace(offset=start + tensor.offset)
        if tensor.offset % alignment or not end <= tensor.offset <= file_bytes - tensor.size:
            raise ValueError(f"the data of {name!r} is outside of the file or overlaps others")
        end = tensor.offset + tensor.size
    return placed


def config_of_fields(fields: dict, tensors: dict[str, TensorInfo], file: BinaryIO) -> GPTConfig:
    """Return the config of a model. Raise ValueError for unsupported fields."""
    arch = fields.get("general.architecture")
    if arch not in CLASSES:
        raise ValueError(f"its architecture is {arch!r}, not {' or '.join(map(repr, CLASSES))}")
    values = {name.removeprefix(f"{arch}."): value for name, value in fields.items()
              if name.startswith(f"{arch}.")}
    eps = "attention.layer_norm_epsilon" if arch == "gpt2" else "attention.layer_norm_rms_epsilon"
    required = REQUIRED | {"norm_eps": eps}
    if missing := [name for name in required.values() if name not in values]:
        raise ValueError(f"it has no {arch}.{missing[0]}")
    if "token_embd.weight" not in tensors:
        raise ValueError("it has no token_embd.weight")
    names = required | OPTIONAL
    args = {ours: values[name] for ours, name in names.items() if name in values}
    config = GPTConfig(arch, **args, vocab_size=tensors["token_embd.weight"].shape[0],
                       tied=arch == "gpt2" or "output.weight" not in tensors)
    # any other field must have the value that the config implies, or be 0: not used
    implied = {"vocab_size": config.vocab_size, "attention.value_length": config.head_dim,
               "rope.dimension_count": config.head_dim, "rope.scaling.type": "none"}
    for name in sorted(values.keys() - set(names.values())):
        if str(values[name]) != str(implied.get(name, 0)):
            raise ValueError(f"its {arch} field {name!r} is {values[name]!r}, which is not "
                             "supported")
    if not config.rope_theta < 1e12 or not config.norm_eps < 1:
        raise ValueError(f"its rope_theta is {config.rope_theta:g} and its norm_eps "
                         f"{config.norm_eps:g}, which is too large")
    # a damaged header must not make us allocate far more than the file holds
    positions, size = 4 * config.block_size * config.head_dim, os.fstat(file.fileno()).st_size
    if config.n_layer > len(tensors) / 8 or positions > max(size, 1 << 25):  # 8 in each layer
        raise ValueError(f"its {arch}.* fields describe a larger model than the file holds")
    return config


def read_weights(file: BinaryIO, tensors: dict[str, TensorInfo],
                 config: GPTConfig) -> dict[str, torch.Tensor]:
    """Return our state dict in float32. Read one tensor at a time, to save memory."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.arch.upper()], config.n_layer)
    stacked = hf_names(config)
    if "output.weight" not in tensors:
        del stacked["lm_head.weight"]
    names = {name: table.get_name(name, try_suffixes=(".weight", ".bias"))
             for hf_parts in stacked.values() for name in hf_parts}
    if unknown := sorted(set(tensors) - set(names.values())):
        if "rope_freqs.weight" in unknown:
            raise ValueError("it uses the rope scaling of Llama 3.1, which is not supported")
        raise ValueError(f"it has the unexpected tensor {unknown[0]!r}")
    # check all names and shapes before reading any weights
    shapes = {hf_name: torch.empty(tensors[name].shape, device="meta")
              for hf_name, name in names.items() if name in tensors}
    from_hf({name: w.t() if is_transposed(name) else w for name, w in shapes.items()}, config)

    def read(hf_name: str) -> torch.Tensor:
        name, tensor = names[hf_name], tensors[names[hf_name]]
        file.seek(tensor.offset)
        data = np.fromfile(file, np.uint8, tensor.size).reshape(*tensor.shape[:-1], -1)
        with np.errstate(all="ignore"):
            w = gguf.quants.dequantize(data, tensor.kind)
            is_finite = math.isfinite(w.max() - w.min())
        if not is_finite:
            raise ValueError(f"{name} has values that are not finite")
        is_interleaved = (config.arch == "llama"
                          and hf_name.endswith(("q_proj.weight", "k_proj.weight")))
        w = torch.from_numpy(w)
        return deinterleave(w, config.head_dim) if is_interleaved else w

    weights = {name: torch.cat([read(part) for part in hf_parts])
               for name, hf_parts in stacked.items()}
    embedding = weights["transformer.wte.weight"]
    head = weights.setdefault("lm_head.weight", embedding)
    if config.tied and not head.equal(embedding):  # older files of GPT-2 repeat it
        raise ValueError("its output.weight differs from its token_embd.weight, which GPT-2 shares")
    return weights


def meta_of_fields(fields: dict) -> dict:
    """
    Return the meta of a file's tokenizer.

    The chat template, if there is one, is under the key "chat_template". Tokens of any other type
    than NORMAL become control tokens. Padding tokens at the end are dropped.
    """
    about = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    for name in ("model", "tokens", "token_type", "eos_token_id"):
        if name not in about:
            raise ValueError(f"it has no tokenizer.ggml.{name}")
    tokens, types = list(about["tokens"]), about["token_type"].tolist()
    while types[len(tokens) - 1] != NORMAL_TOKEN and re.fullmatch(r"\[PAD\d+\]", tokens[-1]):
        tokens.pop()
    control = {i for i in range(len(tokens)) if types[i] != NORMAL_TOKEN}
    kind, pre, eos = about["model"], about.get("pre"), about["eos_token_id"]
    if eos not in range(len(tokens)):
        raise ValueError(f"its eos_token_id is {eos!r}")
    if kind == "gpt2":
        patterns = PATTERNS | {"gpt-2": gpt2_pattern(), "llama3": PATTERNS["llama-bpe"]}
        if pre not in patterns:
            raise ValueError(f"its tokenizer has the pattern {pre!r}; only "
                             f"{', '.join(sorted(patterns))} can be read")
        merges = [pair.split(" ") for pair in about["merges"]]
        spec = bpe_of_model(tokens, merges, patterns[pre], control, tokens[eos],
                            pre.startswith("llama"))
    elif kind == "t5" and set(about["scores"].tolist()) == {-1.0} and tokens[eos] == EOT:
        spec = list_tokenizer_spec([token.replace("\u2581", " ") for token in tokens], control)
    else:
        raise ValueError(f"its tokenizer is of the kind {kind!r}; only byte-level BPE, called "
                         "'gpt2', can be read")
    template = fields.get("tokenizer.chat_template")
    if not template:
        return meta_of(spec)
    bos_id = about.get("bos_token_id")
    bos = tokens[bos_id] if bos_id in range(len(tokens)) else ""
    template = complete_template(str(template), bos_token=bos, eos_token=tokens[eos])
    return meta_of(spec) | {"chat_template": template}


def list_tokenizer_spec(vocab: list[str], control: set[int]) -> dict:
    """Return the spec of the characters or pieces that export.py wrote as a unigram model."""
    plain = [token for i, token in enumerate(vocab) if i not in control]
    if not all(PIECE.findall(token) == [token] for token in plain):
        raise ValueError("its tokenizer is a unigram model; only those of export.py can be read")
    spec = {"kind": "pieces" if any(len(token) > 1 for token in plain) else "char", "vocab": vocab}
    specials = {vocab[i]: i for i in sorted(control) if vocab[i] != UNK}
    return spec | ({} if list(specials) == [EOT] else {"specials": specials})
