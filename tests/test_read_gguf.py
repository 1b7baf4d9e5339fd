"""lib/read_gguf.py: exports read back, every quantized type, damaged files."""
import os
import random
import resource
import struct
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from export import add_gguf_fields, add_gguf_tensors, add_gguf_tokenizer, export_gguf
from helpers import (
    PROMPT,
    SHAPES,
    TEXT,
    expected_gguf_tensors,
    gguf_tensors,
    make_run,
    one_line_error,
    prepare,
    randomize,
    run,
    tiny,
    tokenizer_of,
    train,
)
from lib.checkpoint import load_checkpoint, load_model, load_tokenizer
from lib.read_gguf import read_gguf, read_gguf_tokenizer
from lib.tokenizer import PATTERNS, get_tokenizer
from model import GPT

# shape, tokenizer, unused ids at the end of the vocabulary
PAIRS = [("gpt2", "gpt2", 0), ("gpt2", "bpe", 0), ("qwen3", "bpe", 7), ("untied", "pieces", 3),
         ("llama", "bpe", 0), ("llama", "char", 5)]


def make_model(shape: str, kind: str, **changes) -> GPT:
    config = SHAPES[shape] | dict(vocab_size=tokenizer_of(kind).vocab_size) | changes
    model = tiny(**config)
    randomize(model)
    return model


def write_gguf(path: Path, model: GPT, kind: str = "char", fields: dict | None = None,
               tensors: dict | None = None, alignment: int = 0) -> Path:
    """
    Write a GGUF file in float32.

    fields: value and type of what to change, or None to leave it out. tensors: an array in float32,
    bytes and their type, or None.
    """
    writer = gguf.GGUFWriter(path, model.config.arch)
    if alignment:
        writer.add_custom_alignment(alignment)
    add_gguf_fields(writer, "m", model, "float32")
    add_gguf_tokenizer(writer, tokenizer_of(kind), model.config.vocab_size)
    add_gguf_tensors(writer, model, "float32")
    for name, value in (fields or {}).items():
        writer.kv_data[0].pop(name, None)
        if value is not None:
            writer.add_key_value(name, *value)
    for name, value in (tensors or {}).items():
        writer.tensors[-1].pop(name, None)
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        elif value is not None:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_weights(path: Path, model: GPT) -> None:
    """The weights of a model are those that llama.cpp's library reads from a file."""
    tensors, _ = gguf_tensors(path)
    expected = expected_gguf_tensors(model)
    assert tensors.keys() == expected.keys()
    for name, w in expected.items():
        assert torch.tensor(tensors[name]).equal(w), name


# -----------------------------------------------------------------------------
# Exports

@pytest.mark.parametrize("shape, kind, padding", PAIRS)
def test_an_export_comes_back(tmp_path, shape, kind, padding):
    model = make_run(tmp_path / "run", shape, kind, padding)
    exported = load_checkpoint(tmp_path / "run")
    for dtype in ("float32",) if kind == "gpt2" else ("float32", "float16", "q8_0"):
        path = tmp_path / f"{dtype}.gguf"
        export_gguf(exported, path, dtype)
        again, checkpoint = load_model(path, "cpu")
        assert vars(again.config) == vars(model.config)
        assert (checkpoint["step"], checkpoint["config"]) == (0, {"dataset": ""})
        ours, tokenizer = tokenizer_of(kind), get_tokenizer(checkpoint["meta"])
        assert tokenizer.spec == ours.spec and tokenizer.eot == ours.eot
        assert load_tokenizer(str(path))[0].spec == ours.spec
        for text in (TEXT, PROMPT):
            assert tokenizer.encode(text) == ours.encode(text)
        assert_same_weights(path, again)
        if dtype == "float32":
            idx = torch.randint(ours.vocab_size, (2, 64))
            assert torch.allclose(again(idx)[0], model(idx)[0], atol=1e-5)
            assert all(w.equal(again.state_dict()[n]) for n, w in model.state_dict().items())


def test_gpt2_without_biases_comes_back_with_zeros(tmp_path):
    model = make_model("nanogpt", "char", gelu="tanh")
    again = load_model(write_gguf(tmp_path / "m.gguf", model), "cpu")[0]
    idx = torch.randint(30, (2, 64))
    assert again.config.bias and torch.allclose(again(idx)[0], model(idx)[0], atol=1e-5)


def test_a_model_is_fine_tuned_with_its_tokenizer(tmp_path):
    make_run(tmp_path / "run", "llama", "bpe")
    path = tmp_path / "m.gguf"
    export_gguf(load_checkpoint(tmp_path / "run"), path, "float16")
    done = prepare("fables", f"--out_dir={tmp_path / 'data'}", "--train_stories=60",
                   "--val_stories=8", f"--tokenizer={path}")
    assert done.returncode == 0, done.stderr
    train(tmp_path / "data", tmp_path / "out", f"--init_from={path}", "--arch=llama")
    tuned = load_checkpoint(tmp_path / "out")
    assert tuned["meta"]["tokenizer"] == tokenizer_of("bpe").spec
    assert tuned["model_args"]["head_dim"] == 10 and tuned["step"] > 0
    done = run("eval.py", f"--out_dir={path}", f"--dataset={tmp_path / 'data'}",
               "--valid_samples=0", "--device=cpu")
    assert done.returncode == 0 and (tmp_path / "m_metrics_summary.json").exists(), done.stderr
    done = run("export.py", f"--out_dir={path}", "--format=hf")
    assert done.returncode == 0 and (tmp_path / "m-hf/config.json").exists(), done.stderr


# -----------------------------------------------------------------------------
# Types and layouts

def wide_model() -> GPT:
    """A llama whose rows are whole blocks of 256, as the K-quants need them."""
    return make_model("llama", "char", n_layer=1, n_head=2, n_kv_head=1, head_dim=128, n_embd=256,
                      n_inner=256)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_quantized_weights(tmp_path, kind):
    model, kind = wide_model(), Kind[kind]
    tensors = {name: (gguf.quants.quantize(w.numpy(), kind), kind)
               for name, w in expected_gguf_tensors(model).items() if w.dim() == 2}
    path = write_gguf(tmp_path / "m.gguf", model, tensors=tensors)
    again = load_model(path, "cpu")[0]
    assert_same_weights(path, again)
    error = again.lm_head.weight - model.lm_head.weight
    assert 0 < error.abs().max() < 0.1 and again.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_types_that_only_llama_cpp_can_write(tmp_path, kind):
    """Random bytes, but zeros where they are not finite numbers."""
    model, kind, rng = wide_model(), Kind[kind], np.random.default_rng(0)
    block, block_size = gguf.GGML_QUANT_SIZES[kind]
    tensors = {}
    for name, w in expected_gguf_tensors(model).items():
        if w.dim() == 2:
            data = rng.integers(256, size=(w.numel() // block, block_size), dtype=np.uint8)
            with np.errstate(all="ignore"):
                data[~np.isfinite(gguf.quants.dequantize(data, kind)).all(axis=1)] = 0
            tensors[name] = data.reshape(len(w), -1), kind
    path = write_gguf(tmp_path / "m.gguf", model, tensors=tensors)
    again = load_model(path, "cpu")[0]
    assert_same_weights(path, again)
    assert again.lm_head.weight.std() > 0


@pytest.mark.parametrize("alignment, version", [(8, 3), (32, 2), (4096, 3)])
def test_alignment_and_version(tmp_path, alignment, version):
    model = make_model("llama", "char")
    path = write_gguf(tmp_path / "m.gguf", model, alignment=alignment)
    with open(path, "r+b") as file:
        file.seek(4)
        file.write(struct.pack("<I", version))
    assert_same_weights(path, load_model(path, "cpu")[0])


def test_gpt2_may_repeat_its_embeddings(tmp_path):
    """As the files that llama.cpp converted before 2025."""
    model = make_model("gpt2", "char")
    w = model.lm_head.weight.detach().numpy()
    path = write_gguf(tmp_path / "m.gguf", model, tensors={"output.weight": w})
    idx = torch.randint(30, (2, 64))
    assert torch.allclose(load_model(path, "cpu")[0](idx)[0], model(idx)[0], atol=1e-5)
    write_gguf(path, model, tensors={"output.weight": 2 * w})
    with pytest.raises(ValueError, match="output.weight differs from its token_embd"):
        load_checkpoint(path)


def test_a_chat_template_is_kept(tmp_path):
    template = "{{ messages }}", gguf.GGUFValueType.STRING
    path = write_gguf(tmp_path / "m.gguf", make_model("qwen3", "bpe"), "bpe",
                      {"tokenizer.chat_template": template})
    assert load_checkpoint(path)["meta"]["chat_template"] == template[0]
    assert load_tokenizer(str(path))[1] == template[0]


# -----------------------------------------------------------------------------
# What cannot be read

U32, F32, STR = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING
EPS = "llama.attention.layer_norm_rms_epsilon"


@pytest.mark.parametrize("fields, says", [
    ({"general.architecture": ("mamba", STR)}, "its architecture is 'mamba', not 'gpt2' or"),
    ({"llama.block_count": None}, "it has no llama.block_count"),
    ({"llama.block_count": (1, U32)}, "it has the unexpected tensor 'blk.1.attn_k.weight'"),
    ({"llama.block_count": (2**31, U32)}, "n_layer must be at most 10,000"),
    ({"llama.block_count": (9_999, U32)}, "describe a larger model than the file holds"),
    ({"llama.context_length": (2**31, U32)}, "describe a larger model than the file holds"),
    ({"llama.attention.key_length": (2**31, U32)}, "'attention.value_length' is 10, which"),
    ({EPS: (float("nan"), F32)}, "norm_eps must be above 0"),
    ({EPS: (float("inf"), F32)}, "its norm_eps inf, which is too large"),
    ({"llama.rope.freq_base": (float("inf"), F32)}, "its rope_theta is inf and"),
    ({"llama.embedding_length": (40, U32)}, "has the shape (40, 36), not (40, 40)"),
    ({"llama.rope.scaling.type": ("yarn", STR)}, "field 'rope.scaling.type' is 'yarn', which"),
    ({"llama.rope.dimension_count": (8, U32)}, "field 'rope.dimension_count' is 8, which"),
    ({"llama.expert_count": (8, U32)}, "'expert_count' is 8, which is not supported"),
    ({"tokenizer.ggml.model": ("llama", STR)}, "of the kind 'llama'; only byte-level BPE"),
    ({"tokenizer.ggml.tokens": None}, "it has no tokenizer.ggml.tokens"),
    ({"general.alignment": (24, U32)}, "its general.alignment is 24"),
])
def test_fields_that_do_not_fit_are_named(tmp_path, fields, says):
    path = write_gguf(tmp_path / "m.gguf", make_model("llama", "char"), fields=fields)
    with pytest.raises(ValueError) as raised:
        load_checkpoint(path)
    assert str(raised.value).startswith(f"{path} is not a GGUF file that can be read here (")
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("at, skip, code, value, says", [
    (4, 0, "<I", 1, "little-endian GGUF file of version 2 or 3"),
    (4, 0, ">I", 3, "little-endian GGUF file of version 2 or 3"),
    ("blk.0.attn_k.weight", 0, "<I", 5, "'blk.0.attn_k.weight' has 5 dimensions"),
    ("blk.0.attn_k.weight", 20, "<I", 99, "99 is not a valid GGMLQuantizationType"),
    ("blk.0.attn_k.weight", 20, "<I", 12, "of type Q4_K has the shape (20, 36)"),
    ("blk.0.attn_k.weight", 24, "<Q", 1 << 40, "'blk.0.attn_k.weight' is outside of the file"),
    ("blk.0.attn_k.weight", 24, "<Q", 0, "is outside of the file or overlaps others"),
    ("blk.0.attn_k.weight", 24, "<Q", 1, "is outside of the file or overlaps"),
    ("general.name", 0, "<I", 13, "unknown type 13"),
    ("tokenizer.ggml.tokens", 8, "<Q", 1 << 60, "it is truncated or damaged"),
    ("tokenizer.ggml.scores", 8, "<Q", 1 << 60, "it is truncated or damaged"),
])
def test_a_damaged_header_is_named(tmp_path, at, skip, code, value, says):
    path = write_gguf(tmp_path / "m.gguf", make_model("llama", "char"))
    raw = bytearray(path.read_bytes())
    start = at if isinstance(at, int) else raw.index(at.encode()) + len(at)
    struct.pack_into(code, raw, start + skip, value)
    path.write_bytes(raw)
    with pytest.raises(ValueError) as raised:
        load_checkpoint(path)
    assert says in str(raised.value)


@pytest.mark.parametrize("name, other", [
    ("llama.block_count", "llama.block_cuont"), ("blk.0.attn_q.weight", "blk.0.attn_k.weight")])
def test_names_that_occur_twice_are_named(tmp_path, name, other):
    fields = {"llama.block_cuont": (2, U32)}
    path = write_gguf(tmp_path / "m.gguf", make_model("llama", "char"), fields=fields)
    path.write_bytes(path.read_bytes().replace(other.encode(), name.encode()))
    with pytest.raises(ValueError, match=f"'{name}' occurs twice"):
        load_checkpoint(path)


def test_other_fields_without_effect_are_read(tmp_path):
    fields = {"llama.expert_count": (0, U32), "llama.rope.scaling.type": ("none", STR),
              "llama.vocab_size": (tokenizer_of("char").vocab_size, U32)}
    load_checkpoint(write_gguf(tmp_path / "m.gguf", make_model("llama", "char"), fields=fields))


@pytest.mark.parametrize("tensors, says", [
    ({"blk.1.ffn_up.weight": None}, "missing: model.layers.1.mlp.up_proj.weight"),
    ({"token_embd.weight": None}, "it has no token_embd.weight"),
    ({"blk.1.ffn_up.weight": np.zeros((50, 35), np.float32)}, "has the shape (50, 35), not (50,"),
    ({"blk.1.ffn_up.weight": np.full((50, 36), np.nan, np.float32)},
     "blk.1.ffn_up.weight has values that are not finite"),
    ({"blk.1.ffn_up.weight": np.zeros((50, 36))}, "F64"),
    ({"blk.0.attn_q.bias": np.zeros(60, np.float32)}, "the unexpected tensor 'blk.0.attn_q.bias'"),
    ({"a\x1b[2J": np.ones(5, np.float32)}, r"the unexpected tensor 'a\x1b[2J'"),
    ({"rope_freqs.weight": np.ones(5, np.float32)}, "the rope scaling of Llama 3.1"),
])
def test_tensors_that_do_not_fit_are_named(tmp_path, tensors, says):
    path = write_gguf(tmp_path / "m.gguf", make_model("llama", "char"), tensors=tensors)
    with pytest.raises(ValueError) as raised:
        load_checkpoint(path)
    assert says in str(raised.value)


def test_tokenizers_that_differ_are_named(tmp_path):
    model = make_model("qwen3", "bpe")
    for fields, says in (
            ({"tokenizer.ggml.pre": ("default", STR)}, "has the pattern 'default'; only gpt-2,"),
            ({"tokenizer.ggml.pre": None}, "has the pattern None"),
            ({"tokenizer.ggml.eos_token_id": (300, U32)}, "its eos_token_id is 300")):
        path = write_gguf(tmp_path / "m.gguf", model, "bpe", fields)
        for read in (read_gguf, read_gguf_tokenizer):
            with pytest.raises(ValueError, match=says):
                read(path)
    for name in ("smollm", "llama-bpe", "llama3", "qwen2"):
        write_gguf(path, model, "bpe", {"tokenizer.ggml.pre": (name, STR)})
        spec = read_gguf_tokenizer(path)["tokenizer"]
        assert spec["pattern"] == PATTERNS[name.replace("llama3", "llama-bpe")]


def test_only_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    for name, says in (("pipe.gguf", "no file"), ("none.gguf", "no file"),
                       ("folder.gguf", "no checkpoint")):
        with pytest.raises(ValueError, match=f"there is {says}"):
            load_checkpoint(tmp_path / name)


def test_the_missing_package_is_named_before_the_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="pip install gguf"):
        load_checkpoint(tmp_path / "m.gguf")


def test_sampling_from_a_damaged_file_is_one_line(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_model("llama", "char"))
    assert run("sample.py", f"--out_dir={path}", "--device=cpu").returncode == 0
    path.write_bytes(path.read_bytes()[:-1])
    error = one_line_error(run("sample.py", f"--out_dir={path}"))
    assert f"{path} is not a GGUF file that can be read here (the data of " in error


# -----------------------------------------------------------------------------
# Damage

def places(raw: bytes) -> list[tuple[int, str]]:
    """Return the places and types of lengths, counts, types, dimensions and offsets in a header."""
    found = [(4, "I"), (8, "Q"), (16, "Q"), (24, "Q")]
    for name in (b"general.name", b"llama.block_count", b"llama.context_length",
                 b"llama.embedding_length", b"llama.attention.head_count",
                 b"llama.attention.key_length", b"llama.rope.freq_base", b"llama.rope.dimension",
                 b"tokenizer.ggml.bos_token_id"):
        at = raw.index(name) - 8
        end = at + 8 + struct.unpack_from("<Q", raw, at)[0]
        found += [(at, "Q"), (end, "I"), (end + 4, "I")]
    for name in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.scores", b"tokenizer.ggml.token_type"):
        at = raw.index(name) + len(name)
        found += [(at, "I"), (at + 4, "I"), (at + 8, "Q"), (at + 16, "Q")]
    for name in (b"token_embd.weight", b"blk.0.attn_q.weight", b"blk.1.ffn_down.weight"):
        at = raw.index(name) + len(name)
        found += [(at - len(name) - 8, "Q"), (at, "I"), (at + 4, "Q"), (at + 12, "Q"),
                  (at + 20, "I"), (at + 24, "Q")]
    return found


def damaged_files(raw: bytes, header: int) -> list[bytes]:
    rng = random.Random(0)
    files = [raw[:rng.randrange(len(raw))] for _ in range(30)]
    files += [raw[:rng.randrange(header)] for _ in range(40)]
    for _ in range(100):
        flipped = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            flipped[rng.randrange(header)] ^= 1 << rng.randrange(8)
        files.append(bytes(flipped))
    for at, code in places(raw):
        for value in (0, 1, 9, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1):
            if value < 256 ** struct.calcsize("<" + code):
                changed = bytearray(raw)
                struct.pack_into("<" + code, changed, at, value)
                files.append(bytes(changed))
    return files


def test_damaged_files_are_read_or_named(tmp_path):
    """In little memory and time: each loads, or raises ValueError that is not a lack of memory."""
    path = write_gguf(tmp_path / "m.gguf", make_model("llama", "char"))
    raw, read = path.read_bytes(), 0
    load_model(path, "cpu")  # imports all that it needs
    files = damaged_files(raw, raw.index(b"output_norm.weight"))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = pages * resource.getpagesize() + 80_000_000  # 50 MB and what the allocators round up
    resource.setrlimit(resource.RLIMIT_AS, (size, limits[1]))
    try:
        for i, damaged in enumerate(files):
            path.write_bytes(damaged)
            start = time.process_time()
            try:
                load_model(path, "cpu")
                read += 1
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                causes = f"{error!r} {error.__context__!r}"
                assert "MemoryError" not in causes and "allocate" not in causes, (i, causes)
            assert time.process_time() - start < 1, i
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert len(files) > 300 and 0 < read < len(files) / 2
