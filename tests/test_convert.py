"""lib/convert.py: models of Hugging Face and nanoGPT compared with the originals."""
import json
import pickle
import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import export as exporting
from export import write_hf_tokenizer
from helpers import PROMPT, TEXT, export, run, tiny, train, transformers_of
from lib import checkpoint
from lib.checkpoint import load_checkpoint, load_model, read_checkpoint
from lib.convert import EXPORTED, config_to_hf, from_hf, is_hub_name, to_hf
from lib.tokenizer import EOT, get_tokenizer, gpt2_tokenizer, read_tokenizer_json
from model import GPT, GPTConfig
from sample import generate_text


def test_missing_weights_are_named():
    weights = to_hf(tiny(arch="qwen3"))
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"missing: model.norm.weight and 1 more"):
        from_hf(weights, tiny(arch="qwen3").config)


def test_a_field_that_transformers_does_not_have_is_named():
    @dataclass
    class WithWindow(GPTConfig):
        window: int = 0

    for arch in ("gpt2", "qwen3", "llama"):
        plain = config_to_hf(GPTConfig(arch), 0, "float32")
        assert config_to_hf(WithWindow(arch), 0, "float32") == plain
        with pytest.raises(ValueError, match="do not have window=8 of this model"):
            config_to_hf(WithWindow(arch, window=8), 0, "float32")


def test_every_field_of_the_model_is_exported():
    assert EXPORTED == {field.name for field in fields(GPTConfig)}


def test_hugging_face_folders_load(openai_folder, tmp_path):
    from transformers import GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    qwen3 = Qwen3Config(vocab_size=50257, hidden_size=16, intermediate_size=40, head_dim=12,
                        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                        max_position_embeddings=64, tie_word_embeddings=False)
    Qwen3ForCausalLM(qwen3).save_pretrained(tmp_path / "qwen3")
    idx = torch.randint(50257, (2, 64))
    for folder, kind in ((openai_folder, GPT2LMHeadModel), (tmp_path / "qwen3", Qwen3ForCausalLM)):
        model, checkpoint = load_model(folder, "cpu")
        assert checkpoint["meta"]["tokenizer"] == {"kind": "gpt2"} and checkpoint["step"] == 0
        with torch.no_grad():
            expected = kind.from_pretrained(folder)(idx).logits
            assert torch.allclose(model(idx)[0], expected, atol=1e-5)
    config = json.loads((openai_folder / "config.json").read_text())
    for change, says in (({"model_type": "mamba"}, "'mamba'"),
                         ({"vocab_size": 99}, "vocabulary of 99"),
                         ({"n_layer": 3}, "those of 2 layers"), ({"n_embd": "x"}, "n_embd")):
        (tmp_path / "bad").mkdir(exist_ok=True)
        shutil.copy(openai_folder / "model.safetensors", tmp_path / "bad")
        (tmp_path / "bad/config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=says):
            load_model(tmp_path / "bad", "cpu")


def test_nanogpt_checkpoints_load(tmp_path):
    shape = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, bias=False, vocab_size=50304,
                 dropout=0.0)
    theirs = GPT(GPTConfig(**shape, gelu="none")).eval()
    weights = {f"_orig_mod.{name}": w for name, w in theirs.state_dict().items()}
    torch.save({"model": weights, "model_args": shape, "optimizer": {}, "iter_num": 7,
                "best_val_loss": torch.tensor(3.5), "config": {"dataset": "openwebtext"}},
               tmp_path / "ckpt.pt")
    model, checkpoint = load_model(tmp_path, "cpu")
    idx = torch.randint(50257, (1, 9))
    assert model(idx)[0].equal(theirs(idx)[0])
    assert (checkpoint["step"], checkpoint["best_val_loss"]) == (7, 3.5)


def make_qwen3(folder: Path) -> None:
    """Write a Qwen3 like the published ones: bfloat16, its own BPE and special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    rust = Tokenizer(models.BPE())
    rust.normalizer = normalizers.NFC()
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    rust.pre_tokenizer = Sequence([Split(Regex(pattern), "isolated"),
                                   ByteLevel(add_prefix_space=False, use_regex=False)])
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                  initial_alphabet=ByteLevel.alphabet())
    rust.train_from_iterator([TEXT] * 50, trainer)
    rust.add_special_tokens([EOT, "<|im_start|>", "<|im_end|>"])
    PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|im_end|>",
                            pad_token=EOT).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=320, hidden_size=16, intermediate_size=40, head_dim=12,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         max_position_embeddings=64,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)


def test_qwen3_is_loaded_with_its_tokenizer(tmp_path):
    make_qwen3(tmp_path)
    theirs, tokenizer = transformers_of(tmp_path)
    model, checkpoint = load_model(tmp_path, "cpu")
    ours = get_tokenizer(checkpoint["meta"])
    for text in (TEXT, PROMPT, "I'LL  go 123\r\n\n\u00e9"):
        assert ours.encode(text) == tokenizer(text).input_ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.decode([ours.eot]) == EOT
    idx = torch.tensor([ours.encode(TEXT)[:60]])
    with torch.no_grad():
        assert torch.allclose(model(idx)[0], theirs.float()(idx).logits, atol=1e-5)
    text = generate_text(PROMPT, 5, temperature=0, out_dir=str(tmp_path), device="cpu")
    assert text.startswith(PROMPT)


def test_the_tokenizer_of_gpt2_is_recognized(tmp_path):
    write_hf_tokenizer(gpt2_tokenizer(), tmp_path, 64)
    assert read_tokenizer_json((tmp_path / "tokenizer.json").read_text()) == {"kind": "gpt2"}


@pytest.mark.parametrize("config, weights, says", [
    ({}, lambda w: w.pop("model.norm.weight"), "missing: model.norm.weight"),
    ({}, lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(40, 15)}),
     "model.layers.1.mlp.up_proj.weight has the shape (40, 15), not (40, 16)"),
    ({}, lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(40, 16)}),
     "up_proj.weight, which a qwen3 model does not have"),
    ({"hidden_act": "gelu"}, None, "its hidden_act is 'gelu'; only 'silu' is supported"),
    ({"attention_bias": True}, None, "its attention_bias is True"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, None,
     "its rope_type is 'yarn'"),
    ({"vocab_size": 290}, None, "vocabulary of 290"),
    ({"num_hidden_layers": "2"}, None, "n_layer takes int"),
    ({"model_type": "mamba"}, None, "its model_type is 'mamba', not 'gpt2' or 'qwen3' or 'llama'"),
    ({"model_type": "llama"}, None, "k_norm.weight, which a llama model does not have"),
])
def test_what_does_not_fit_is_named(tmp_path, config, weights, says):
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


@pytest.mark.parametrize("damage", [
    "{", "[]", "5", '{"meta": 5}', '{"step": "7"}', '{"config": []}',
    '{"meta": {"vocab_size": 320}}'])
def test_a_damaged_meta_json_is_named(tmp_path, damage):
    make_qwen3(tmp_path)
    (tmp_path / "meta.json").write_text(damage)
    with pytest.raises(ValueError, match=f"{tmp_path}.* (can be|cannot) read"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("args", [{}, {"vocab_size": "x"}, {"vocab_size": None}, 7])
def test_a_nanogpt_checkpoint_without_a_vocabulary_is_one_line(tmp_path, args):
    torch.save({"model": {}, "model_args": args, "config": {}, "iter_num": 1}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="ckpt.pt is not a checkpoint that nanoGPT wrote"):
        load_checkpoint(tmp_path)


def test_nanogpt_characters(tmp_path):
    """The meta.pkl of nanoGPT is enough to train on its characters and to sample."""
    text = "to be, or not to be\n" * 40
    chars = sorted(set(text))
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)),
            "stoi": {c: i for i, c in enumerate(chars)}}
    for name, part in (("train", text[:700]), ("val", text[700:])):
        np.array([meta["stoi"][c] for c in part], dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    train(tmp_path, tmp_path / "out")
    tokenizer = load_checkpoint(tmp_path / "out")["meta"]["tokenizer"]
    assert tokenizer == {"kind": "char", "vocab": chars}
    shape = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, bias=False, vocab_size=len(chars),
                 dropout=0.0)
    torch.save({"model": GPT(GPTConfig(**shape)).state_dict(), "model_args": shape, "optimizer": {},
                "iter_num": 7, "best_val_loss": 3.5, "config": {"dataset": "bard_char"}},
               tmp_path / "ckpt.pt")
    assert set(generate_text("to be", 20, out_dir=str(tmp_path), device="cpu")) <= set(chars)
    export(tmp_path, tmp_path / "hf")
    theirs, tokenizer = transformers_of(tmp_path / "hf")
    inputs = tokenizer("to be", return_tensors="pt")
    ids = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)
    text = generate_text("to be", 8, temperature=0, out_dir=str(tmp_path), device="cpu")
    assert tokenizer.decode(ids[0]) == text
    done = run("export.py", f"--out_dir={tmp_path}", "--format=gguf", f"--to={tmp_path / 'a.gguf'}")
    assert done.returncode == 2 and "llama.cpp needs a token that ends a text" in done.stderr
    command = b"touch " + str(tmp_path / "ran").encode()
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'" + command + b"'\ntR.")
    with pytest.raises(ValueError, match="it asks for os.system"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "meta.pkl").unlink()
    with pytest.raises(ValueError, match="put the meta.pkl of its dataset beside it"):
        load_checkpoint(tmp_path)


# -----------------------------------------------------------------------------
# The Hugging Face hub

@pytest.mark.parametrize("name, is_one", [
    ("gpt2", True), ("gpt2-xl@main", True), ("some/one", True), ("some/one.1-x@refs/pr/1", True),
    ("gpt3", False), ("out", False), ("out/best.pt", False), ("some/one.gguf", False),
    ("./some/one", False), ("../one", False), ("~/one", False), ("/some/one", False),
    ("some/one/", False), ("some/other/one", False), ("some\\one", False), ("C:/one", False),
    (Path("some/one"), False), ("tests/data", False)])
def test_names_of_the_hub(name, is_one):
    assert is_hub_name(name) == is_one


def test_a_local_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/one").mkdir(parents=True)
    assert not is_hub_name("some/one") and is_hub_name("some/two")


@pytest.fixture
def some_one(tmp_path, openai_folder) -> Path:
    """A model of the hub stand-in, with code that must not run; its v1 has other weights."""
    repo = tmp_path / "hub/some/one"
    shutil.copytree(openai_folder, repo)
    shutil.copytree(openai_folder, tmp_path / "hub/some/one@v1")
    weights = load_file(repo / "model.safetensors")
    save_file({name: -w for name, w in weights.items()},
              tmp_path / "hub/some/one@v1/model.safetensors", {"format": "pt"})
    config = json.loads((repo / "config.json").read_text())
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "trap.Model")
    (repo / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    (repo / "trap.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')")
    (repo / "onnx").mkdir()
    for name in ("pytorch_model.bin", "best.pt", "onnx/model.safetensors"):
        (repo / name).write_bytes(b"not a model")
    return repo


def test_a_model_of_the_hub(some_one, openai_folder, tmp_path, hub):
    """It samples like its folder; only weights and JSON are downloaded, and no code runs."""
    args = ["--start=Once", "--max_new_tokens=8", "--num_samples=1", "--device=cpu"]
    expected = run("sample.py", f"--out_dir={openai_folder}", *args).stdout
    done = run("sample.py", "--out_dir=some/one", *args, **hub.env)
    assert done.returncode == 0 and done.stdout == expected, done.stderr
    assert done.stderr.splitlines()[:2] == ["asking the Hugging Face hub for some/one ...",
                                            f"using some/one@{hub.commits['main']}"]
    assert done.stderr.count(hub.commits["main"]) == 1 and "model: some/one, " in done.stderr
    got = {path.name for path in (tmp_path / "hf").glob("hub/*/snapshots/*/*")}
    assert got == {"config.json", "generation_config.json", "model.safetensors"}
    assert not any(path.endswith((".bin", ".py", ".pt")) or "onnx" in path for path in hub.sent)
    other = run("sample.py", "--out_dir=some/one@v1", *args, **hub.env)
    assert other.returncode == 0 and other.stdout != expected, other.stderr
    for revision in "", f"@{hub.commits['v1']}":  # both are in the cache
        done = run("sample.py", f"--out_dir=some/one{revision}", *args,
                   **hub.env | {"HF_HUB_OFFLINE": "1"})
        assert done.stdout == (other.stdout if revision else expected), done.stderr
    (some_one / "best.pt").unlink()
    load_model(some_one, "cpu")
    assert not (tmp_path / "trapped").exists()
    exec((some_one / "trap.py").read_text())
    assert (tmp_path / "trapped").exists()  # so it would have been seen


def test_checkpoints_name_the_model_of_the_hub(some_one, openai_folder, gpt2_data, tmp_path, hub):
    """Also after a resume, in a run that starts from the run, and in exports."""
    first, second, name = tmp_path / "first", tmp_path / "second", f"some/one@{hub.commits['v1']}"
    done = train(gpt2_data, first, "--init_from=some/one@v1", "--max_iters=0", **hub.env)
    assert done.stderr.count(f"using {name}\n") == 1
    start = read_checkpoint(first / "last.pt")
    assert start["meta"]["base_model"] == name
    assert start["config"]["init_from"] == "some/one@v1"
    weights = load_model(openai_folder, "cpu")[0].state_dict()
    assert start["model"]["transformer.wte.weight"].equal(-weights["transformer.wte.weight"])
    train(gpt2_data, first, "--init_from=resume", "--max_iters=2", "--lr_decay_iters=2")
    train(gpt2_data, second, f"--init_from={first}", "--max_iters=1", "--lr_decay_iters=1")
    export(second, tmp_path / "hf-folder")
    for where in first, second, tmp_path / "hf-folder":
        assert load_checkpoint(where)["meta"]["base_model"] == name
    done = run("eval.py", "--out_dir=some/one", f"--dataset={gpt2_data}", "--eval_iters=1",
               "--valid_samples=0", "--device=cpu", **hub.env)
    assert done.returncode == 0 and f"snapshots/{hub.commits['main']}, step 0" in done.stdout
    done = run("export.py", "--out_dir=some/one", f"--to={tmp_path}/int8", "--format=int8",
               **hub.env)
    assert done.returncode == 0, done.stderr
    main = f"some/one@{hub.commits['main']}"
    assert load_checkpoint(tmp_path / "int8")["meta"]["base_model"] == main


def test_an_export_of_a_hub_model_is_named_after_it(monkeypatch):
    for name, path in ("some/one@v1", "one-hf"), ("gpt2", "gpt2-hf"), ("out/x.pt", "out/x-hf"):
        monkeypatch.setattr(exporting, "out_dir", name)
        monkeypatch.setattr(exporting, "format", "hf")
        assert exporting.resolve_path("float32") == Path(path)


def test_a_pushed_model_comes_back(trained, tmp_path, hub):
    """What export.py wrote for the hub loads from there, with a tokenizer of ours."""
    export(trained, tmp_path / "hub/me/story")
    done = run("sample.py", "--out_dir=me/story", "--max_new_tokens=5", "--num_samples=1",
               "--device=cpu", **hub.env)
    local = run("sample.py", f"--out_dir={trained}", "--max_new_tokens=5", "--num_samples=1",
                "--device=cpu")
    assert done.returncode == 0 and done.stdout == local.stdout, done.stderr


@pytest.mark.parametrize("name, says", [
    ("no/body", "there is no folder no/body, and no model no/body on the Hugging Face hub"),
    ("some/one@v9", "model some/one has no revision v9 on the Hugging Face hub"),
    ("closed/one", "is gated: accept its terms at https://huggingface.co/closed/one"),
    ("old/one", "model old/one on the Hugging Face hub has no safetensors weights"),
    ("odd/one", "model odd/one on the Hugging Face hub has no config.json"),
    ("a--b/one", "there is no folder a--b/one, and the Hugging Face hub"),
    ("tests/out", "no folder tests/out, and no model tests/out on the Hugging Face hub"),
    ("gpt2", "there is no folder gpt2, and no model openai-community/gpt2 on the Hugging Face"),
])
def test_what_the_hub_does_not_have_is_one_line(some_one, tmp_path, hub, name, says):
    for other, left_out in ("closed", "-"), ("old", "model.safetensors"), ("odd", "config.json"):
        shutil.copytree(some_one, tmp_path / f"hub/{other}/one",
                        ignore=shutil.ignore_patterns(left_out, "onnx"))
    hub.gated.append("closed/one")
    done = run("sample.py", f"--out_dir={name}", "--device=cpu", **hub.env)
    asked, error = done.stderr.splitlines()
    assert done.returncode == 2 and says in error and error.startswith("error: "), done.stderr
    assert asked == f"asking the Hugging Face hub for {name} ..."


def test_without_a_network_a_model_is_one_line():
    for env in {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:1"}:
        done = run("sample.py", "--out_dir=runs/out1", "--device=cpu", **env)
        _, error = done.stderr.splitlines()
        assert done.returncode == 2, done.stderr
        assert "error: there is no folder runs/out1, and the Hugging Face hub cannot be" in error
        assert "LocalEntryNotFoundError" in error, error


def test_a_mistyped_path_lists_the_runs_beside_it(tmp_path, monkeypatch):
    def download(name: str):
        raise ValueError("no model")

    monkeypatch.setattr(checkpoint, "download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/out2").mkdir(parents=True)
    (tmp_path / "runs/out2/best.pt").touch()
    with pytest.raises(ValueError, match="^no model; there are runs in runs/out2$"):
        load_checkpoint("runs/out1")
    with pytest.raises(ValueError, match="^no model$"):
        load_checkpoint("gpt2")
