"""Models on their way out and in: what transformers and llama.cpp make of our exports, and we of their folders."""
import json
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import load_checkpoint, load_model, save_checkpoint
from conftest import run, train
from export import needed, write_hf_tokenizer
from model import GPT, GPTConfig
from sample import generate_text
from tokenizer import EOT, UNK, get_tokenizer, gpt2_tokenizer, read_tokenizer_json, train_tokenizer

SHAPES = {
    "gpt2": dict(arch="gpt2", n_layer=2, n_head=2, n_embd=32, block_size=64),
    "nanogpt": dict(arch="gpt2", n_layer=2, n_head=2, n_embd=32, block_size=64, gelu="none", bias=False),
    "qwen3": dict(arch="qwen3", n_layer=2, n_head=4, n_kv_head=2, head_dim=12, n_embd=32, n_inner=64, block_size=64),
    "untied": dict(arch="qwen3", n_layer=1, n_head=2, n_embd=32, block_size=64, tied=False, rope_theta=500.0),
}
PAIRS = [("gpt2", "gpt2", 47), ("nanogpt", "char", 0), ("qwen3", "bpe", 0), ("untied", "pieces", 3), ("gpt2", "word", 0),
         ("gpt2", "char", 0)]
PROMPT = "Once upon a time"
TEXT = "Once upon a time, the cat's owner said: \"Don't!\"\n\n" \
       "Then 12 dogs -- well-fed -- ran\taway.  Fin\u00e9 \u4e2d\U0001f600 ...\n"


def tokenizer_of(kind: str):
    return gpt2_tokenizer() if kind == "gpt2" else train_tokenizer(kind, [TEXT] * 50, 300 if kind == "bpe" else 0)


def make_run(folder: Path, shape: str, kind: str, padding: int = 0) -> GPT:
    """
    A run with random weights, large enough for a next token to depend on those before it, and of those the first in which
    the 40 greedy tokens after PROMPT are clear: where two are as probable, rounding to float16 decides.
    """
    tokenizer = tokenizer_of(kind)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size + padding, **SHAPES[shape])).eval()
    idx = torch.tensor([[tokenizer.eot] + tokenizer.encode(PROMPT)])
    for seed in range(100):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(1.0 if p.dim() == 1 and name.endswith("weight") else 0.0, 0.3)
            model.lm_head.weight[tokenizer.vocab_size:] = 0  # never the most probable, as in a trained model
            model.lm_head.weight[tokenizer.eot] = 0  # nor the end of the text
            logits = model(model.generate(idx, 40, temperature=0))[0][0, idx.size(1) - 1:-1]
        top = logits.topk(2).values
        if (top[:, 0] - top[:, 1]).min() > 0.01 * logits.std() and len(logits.argmax(dim=1).unique()) > 4:
            break
    meta = {"dataset": "tales", "tokenizer": tokenizer.spec, "eot": tokenizer.eot, "vocab_size": tokenizer.vocab_size,
            "splits": {}}
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, "best.pt", {"model": model.state_dict(), "model_args": vars(model.config), "step": 7,
                                        "best_val_loss": 1.0, "meta": meta,
                                        "config": {"dataset": "tales", "batching": "by_length", "seed": 1}})
    return model


def export(out_dir: Path, to: Path, *args: str) -> None:
    done = run("export.py", f"--out_dir={out_dir}", f"--to={to}", "--format=hf", *args)
    assert done.returncode == 0 and done.stderr == "" and str(to) in done.stdout, done.stderr


def transformers_of(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (AutoModelForCausalLM.from_pretrained(folder).eval(),
            AutoTokenizer.from_pretrained(folder, trust_remote_code=(folder / "tokenization_word.py").exists()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, GPT]]:
    """A run of each pair of shape and tokenizer that is tried, made once."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for shape, kind, padding in PAIRS:
        path = folder / f"{shape}-{kind}"
        made[f"{shape}-{kind}"] = path, make_run(path, shape, kind, padding)
    return made


@pytest.mark.parametrize("pair", [f"{shape}-{kind}" for shape, kind, _ in PAIRS[:-1]])
def test_transformers_says_the_same(runs, tmp_path, pair):
    """The same logits, greedy ids and text; and we read the folder back."""
    (out, model), kind = runs[pair], pair.split("-")[1]
    export(out, tmp_path / "hf")
    theirs, tokenizer = transformers_of(tmp_path / "hf")
    ours = tokenizer_of(kind)
    idx = torch.randint(1, ours.vocab_size - 1, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.allclose(theirs(idx).logits, model(idx)[0], atol=1e-4)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = theirs.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert ids.tolist() == model.generate(inputs.input_ids, 40, temperature=0).tolist()
    said = generate_text(PROMPT, 40, temperature=0, out_dir=str(out), device="cpu")
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == (said.lower() if kind == "word" else said).replace(UNK, "")
    again, checkpoint = load_model(tmp_path / "hf", "cpu")
    assert torch.allclose(again(idx)[0], model(idx)[0], atol=1e-5) and checkpoint["meta"]["tokenizer"] == ours.spec
    assert checkpoint["step"] == 7 and checkpoint["config"] == {"dataset": "tales", "batching": "by_length"}
    assert generate_text(PROMPT, 40, temperature=0, out_dir=str(tmp_path / "hf"), device="cpu") == said


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char", "pieces", "word"])
def test_tokenizers_say_the_same(tmp_path, kind):
    """The ids of ours behind the end of text, and the same text of them, for anything that is in the vocabulary."""
    from transformers import AutoTokenizer

    ours = tokenizer_of(kind)
    write_hf_tokenizer(ours, tmp_path, 64)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=kind == "word")
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (ours.eot, ours.eot, ours.vocab_size)
    texts = [TEXT, PROMPT, "", " ", "a  a", "a\n \n\n a", " \n", "\t"]
    if kind in ("gpt2", "bpe"):
        rng = random.Random(0)
        texts += ["".join(map(chr, rng.choices([*range(1, 0xd7ff), *range(0x20, 0x7f)], [1] * 0xd7fe + [900] * 0x5f, k=50)))
                  for _ in range(300)]
    for text in texts:
        if kind in ("pieces", "char") and text not in (TEXT, PROMPT) or kind == "word" and not text.strip():
            continue
        ids = ours.encode(text)
        assert theirs(text).input_ids == [ours.eot] + ids, repr(text)
        assert theirs.decode(ids) == ours.decode(ids), repr(text)
    if kind == "char":
        assert theirs("Zz").input_ids == [ours.eot] + ours.encode("Zz") and ours.unk in theirs("Zz").input_ids


def gguf_tensors(path: Path) -> tuple[dict, dict]:
    """The tensors of a GGUF file as float32 and its fields, by the library that llama.cpp's own converter writes with."""
    import gguf

    reader = gguf.GGUFReader(path)
    return ({t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()) for t in reader.tensors},
            {name: field.contents() for name, field in reader.fields.items()})


@pytest.mark.parametrize("dtype", ["float32", "float16", "q8_0"])
@pytest.mark.parametrize("pair", ["gpt2-gpt2", "qwen3-bpe", "untied-pieces", "nanogpt-char"])
def test_gguf_holds_the_model(runs, tmp_path, pair, dtype):
    """Every weight within the rounding of its type, every token, and what llama.cpp has to know of the shape."""
    (out, model), (shape, kind) = runs[pair], pair.split("-")
    done = run("export.py", f"--out_dir={out}", f"--to={tmp_path / 'm.gguf'}", "--format=gguf", f"--dtype={dtype}")
    assert done.returncode == 0 and ("GELU" in done.stderr) == (shape == "nanogpt") and len(done.stderr.splitlines()) < 2
    tensors, fields = gguf_tensors(tmp_path / "m.gguf")
    state, ours = model.state_dict(), tokenizer_of(kind)
    block = "transformer.h.0."
    pairs = {"token_embd.weight": state["transformer.wte.weight"], "output_norm.weight": state["transformer.ln_f.weight"],
             "blk.0.attn_output.weight": state[block + "attn.c_proj.weight"], "blk.0.ffn_down.weight":
             state[block + "mlp.c_proj.weight"], "blk.0.attn_norm.weight": state[block + "ln_1.weight"]}
    if model.config.arch == "gpt2":
        pairs |= {"position_embd.weight": state["transformer.wpe.weight"], "blk.0.attn_qkv.weight":
                  state[block + "attn.c_attn.weight"], "blk.0.ffn_up.weight": state[block + "mlp.c_fc.weight"]}
        if model.config.bias:
            pairs["blk.0.attn_qkv.bias"] = state[block + "attn.c_attn.bias"]
        else:
            pairs["blk.0.ffn_up.bias"] = torch.zeros(128)
    else:
        rows = model.transformer.h[0].attn.rows
        q, k, v = state[block + "attn.c_attn.weight"].split(rows)
        gate, up = state[block + "mlp.c_fc.weight"].chunk(2)
        pairs |= {"blk.0.attn_q.weight": q, "blk.0.attn_k.weight": k, "blk.0.attn_v.weight": v, "blk.0.ffn_gate.weight": gate,
                  "blk.0.ffn_up.weight": up, "blk.0.attn_q_norm.weight": state[block + "attn.q_norm.weight"]}
    for name, w in pairs.items():
        exact = dtype == "float32" or w.dim() == 1 or name.startswith("position")
        step = 2**-11 * w.abs() if dtype == "float16" or w.size(-1) % 32 else w.abs().max() / 127
        assert tensors[name].shape == w.shape
        assert ((torch.tensor(tensors[name]) - w).abs() <= (0 if exact else step + 1e-7)).all(), name
    assert ("output.weight" in tensors) == (not model.config.tied)
    arch, attn = model.config.arch, model.transformer.h[0].attn
    assert fields["general.architecture"] == arch and fields[f"{arch}.context_length"] == 64
    assert fields[f"{arch}.attention.head_count"] == attn.n_head
    if arch == "qwen3":
        keys = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")
        assert [fields[f"qwen3.{key}"] for key in keys] == [attn.n_kv_head, attn.head_dim, model.config.rope_theta]
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == model.config.vocab_size and tokens[ours.eot] == EOT == tokens[fields["tokenizer.ggml.eos_token_id"]]
    assert tokens[ours.encode(" a")[0]][0] == ("\u0120" if kind in ("gpt2", "bpe") else "\u2581")  # how each writes a space


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["gpt2-gpt2", "qwen3-bpe", "untied-pieces", "gpt2-char"])
def test_llama_cpp_says_the_same(runs, tmp_path, pair):
    """The ids of a prompt, and those that greedily follow it, in float16; near logits in q8_0."""
    from llama_cpp import Llama

    (out, model), kind = runs[pair], pair.split("-")[1]
    ours = tokenizer_of(kind)
    for dtype in ("float16", "q8_0"):
        path = tmp_path / f"{dtype}.gguf"
        export(out, path, "--format=gguf", f"--dtype={dtype}")
        llama = Llama(str(path), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0)  # keys and values in float32
        idx = [ours.eot] + ours.encode(PROMPT)
        for text in (PROMPT, TEXT):
            assert llama.tokenize(text.encode(), add_bos=True, special=False) == [ours.eot] + ours.encode(text)
        said = model.generate(torch.tensor([idx]), 40, temperature=0)[0].tolist()
        with torch.no_grad():
            expected = model(torch.tensor([said]))[0][0]
        llama.eval(said)
        logits = torch.tensor(llama.scores[:len(said)])
        error = (logits - expected).square().mean().sqrt() / expected.std()
        assert error < (0.003 if dtype == "float16" else 0.06)  # measured: 0.0015 and 0.042 at most; of a wrong weight, about 1
        if dtype == "float16":
            llama.reset()
            theirs = [token for token, _ in zip(llama.generate(idx, temp=0), range(40))]
            assert theirs == said[len(idx):]
            text = llama.create_completion(PROMPT, max_tokens=40, temperature=0)["choices"][0]["text"]
            said = generate_text(PROMPT, 40, temperature=0, out_dir=str(out), device="cpu")
            assert PROMPT + text == said or "\ufffd" in said  # what is half a character, each shows in its own way


# -----------------------------------------------------------------------------
# What cannot be, and the hub

@pytest.mark.parametrize("args, says", [
    (["--format=onnx"], "format must be int8, hf or gguf"),
    (["--dtype=q8_0"], "dtype must be auto, float32, float16, bfloat16 with --format=hf"),
    (["--format=gguf", "--dtype=int4"], "dtype must be auto, float16, float32, q8_0"),
    (["--push=me"], "push takes USER/NAME"),
    (["--to={there}"], "is there already: --overwrite=True"),
    (["--to={there}", "--format=gguf", "--overwrite=True"], "writes a file, and"),
    (["--to={there}/a.txt", "--overwrite=True"], "writes a folder, and"),
    (["--out_dir={int8}"], "is in int8 already"),
    (["--out_dir={words}", "--format=gguf"], "nothing like the tokenizer 'word'"),
    (["--out_dir={there}"], "there is no checkpoint in"),
])
def test_one_line_says_what_cannot_be(runs, tmp_path, args, says):
    there = tmp_path / "there"
    there.mkdir()
    (there / "a.txt").write_text("mine")
    if "int8" in args[0]:
        export(runs["qwen3-bpe"][0], tmp_path / "int8", "--format=int8")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    names = dict(there=there, int8=tmp_path / "int8", words=runs["gpt2-word"][0])
    args = ["--format=hf", f"--to={tmp_path / 'new'}", *(arg.format(**names) for arg in args)]
    done = run("export.py", f"--out_dir={runs['gpt2-gpt2'][0]}", *args)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        needed("gguf")


def test_an_export_replaces_only_its_own_files(runs, tmp_path):
    export(runs["qwen3-bpe"][0], tmp_path / "hf")
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    old = (tmp_path / "hf" / "model.safetensors").read_bytes()
    export(runs["gpt2-gpt2"][0], tmp_path / "hf", "--overwrite=True", "--dtype=bfloat16")
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine" and not list((tmp_path / "hf").glob(".export*"))
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() != old
    assert transformers_of(tmp_path / "hf")[0].dtype == torch.bfloat16


def test_the_card_has_what_was_measured(runs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(runs["untied-pieces"][0], out)
    summary = {"step": 7, "tokens": 1234, "dataset": "tales", "split": "val", "loss": 1.25, "floor": None}
    for step, shown in ((7, True), (6, False)):
        (out / "metrics_summary.json").write_text(json.dumps(summary | {"step": step}))
        export(out, tmp_path / f"hf{step}")
        card = (tmp_path / f"hf{step}" / "README.md").read_text()
        assert ("| loss | 1.2500 |" in card and "1,234 tokens of tales" in card) == shown and "floor" not in card
    code = card.split("```python\n")[1].split("```")[0]
    assert card.startswith("---\nlibrary_name: transformers\n") and "Trained on tales for 7 steps" in card
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and PROMPT in done.stdout, done.stderr


@pytest.mark.parametrize("format, files", [
    ("hf", {"README.md", "config.json", "generation_config.json", "meta.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json"}),
    ("gguf", {"story.gguf"}),
])
def test_push_uploads_what_was_written(hub, runs, tmp_path, format, files):
    """Up to the request: a stand-in for the hub gets the name of the model and what was written, no other file."""
    to = tmp_path / "there" / ("story.gguf" if format == "gguf" else "")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "private.txt").touch()
    args = ["--overwrite=True", f"--out_dir={runs['untied-pieces'][0]}", f"--format={format}", f"--to={to}", "--push=me/story"]
    done = run("export.py", *args, **hub.env, HF_TOKEN="hf_x")
    assert done.returncode == 0 and done.stdout.rstrip().endswith("/me/story"), done.stderr
    assert hub.created == ["me/story"] and set(hub.uploaded) == files
    assert all(body == ((to / name) if to.is_dir() else to).read_bytes() for name, body in hub.uploaded.items())
    done = run("export.py", *args, **hub.env | {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_TOKEN": "hf_x"})
    assert done.returncode == 2 and "is written, but could not be uploaded" in done.stderr and "Traceback" not in done.stderr


# -----------------------------------------------------------------------------
# What comes in

def make_qwen3(folder: Path) -> None:
    """A Qwen3 as its makers publish them: bfloat16, a byte-level BPE of its own, special tokens behind the end of text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([TEXT] * 50, trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.add_special_tokens([EOT, "<|im_start|>", "<|im_end|>"])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token=EOT).save_pretrained(folder)
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=320, hidden_size=16, intermediate_size=40, num_hidden_layers=2, head_dim=12,
                                 num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, rope_parameters={
                                     "rope_type": "default", "rope_theta": 1e6})).bfloat16().save_pretrained(folder)


def test_a_qwen3_of_others_comes_with_its_tokenizer(tmp_path):
    make_qwen3(tmp_path)
    theirs, tokenizer = transformers_of(tmp_path)
    model, checkpoint = load_model(tmp_path, "cpu")
    ours = get_tokenizer(checkpoint["meta"])
    for text in (TEXT, PROMPT, "I'LL  go 123\r\n\n\u00e9"):
        assert ours.encode(text) == tokenizer(text).input_ids and ours.decode(ours.encode(text)) == text
    assert ours.decode([ours.eot]) == EOT
    idx = torch.tensor([ours.encode(TEXT)[:60]])
    with torch.no_grad():
        assert torch.allclose(model(idx)[0], theirs.float()(idx).logits, atol=1e-5)
    assert generate_text(PROMPT, 5, temperature=0, out_dir=str(tmp_path), device="cpu").startswith(PROMPT)


def test_gpt2s_own_tokenizer_is_known_as_such(tmp_path):
    write_hf_tokenizer(gpt2_tokenizer(), tmp_path, 64)
    assert read_tokenizer_json((tmp_path / "tokenizer.json").read_text()) == {"kind": "gpt2"}


@pytest.mark.parametrize("config, weights, says", [
    ({}, lambda w: w.pop("model.norm.weight"), "lack model.norm.weight"),
    ({}, lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(40, 15)}),
     "model.layers.1.mlp.up_proj.weight has the shape (40, 15), not (40, 16)"),
    ({}, lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(40, 16)}), "up_proj.weight, which has no place"),
    ({"hidden_act": "gelu"}, None, "its hidden_act is 'gelu'; known here is 'silu'"),
    ({"attention_bias": True}, None, "its attention_bias is True"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, None, "its rope_type is 'yarn'"),
    ({"vocab_size": 290}, None, "vocabulary of 290"),
    ({"num_hidden_layers": "2"}, None, "n_layer takes int"),
    ({"model_type": "llama"}, None, "'llama'"),
])
def test_what_a_folder_lacks_is_named(tmp_path, config, weights, says):
    from safetensors.torch import load_file, save_file

    make_qwen3(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if weights:
        w = load_file(tmp_path / "model.safetensors")
        weights(w)
        save_file(w, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(says)):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["{", "[]", "5", '{"meta": 5}', '{"step": "7"}', '{"config": []}',
                                    '{"meta": {"vocab_size": 320}}'])
def test_a_damaged_description_is_named(tmp_path, damage):
    make_qwen3(tmp_path)
    (tmp_path / "meta.json").write_text(damage)
    with pytest.raises(ValueError, match=f"{tmp_path}.* (cannot|can) be read"):
        load_checkpoint(tmp_path)


def test_nanogpts_characters(tmp_path):
    """Its data set of characters trains, and its checkpoint samples, by the meta.pkl that nanoGPT writes beside them."""
    text = "to be, or not to be\n" * 40
    chars = sorted(set(text))
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    for name, part in (("train", text[:700]), ("val", text[700:])):
        np.array([meta["stoi"][c] for c in part], dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    train(tmp_path, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out")["meta"]["tokenizer"] == {"kind": "char", "vocab": chars}
    shape = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, bias=False, vocab_size=len(chars), dropout=0.0)
    torch.save({"model": GPT(GPTConfig(**shape)).state_dict(), "model_args": shape, "optimizer": {}, "iter_num": 7,
                "best_val_loss": 3.5, "config": {"dataset": "bard_char"}}, tmp_path / "ckpt.pt")
    assert set(generate_text("to be", 20, out_dir=str(tmp_path), device="cpu")) <= set(chars)
    export(tmp_path, tmp_path / "hf")
    theirs, tokenizer = transformers_of(tmp_path / "hf")
    said = theirs.generate(**tokenizer("to be", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(said[0]) == generate_text("to be", 8, temperature=0, out_dir=str(tmp_path), device="cpu")
    done = run("export.py", f"--out_dir={tmp_path}", "--format=gguf", f"--to={tmp_path / 'a.gguf'}")
    assert done.returncode == 2 and "llama.cpp needs a token that ends a text" in done.stderr
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(ValueError, match="it asks for os.system"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "meta.pkl").unlink()
    with pytest.raises(ValueError, match="put the meta.pkl of its data beside it"):
        load_checkpoint(tmp_path)
