"""export.py: what transformers and llama.cpp read, int8, errors, and uploads."""
import json
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from export import DTYPES, needed, resolve_path, write_hf_tokenizer
from helpers import (
    HERE,
    PROMPT,
    TEXT,
    expected_gguf_tensors,
    export,
    gguf_tensors,
    make_run,
    one_line_error,
    run,
    start,
    tokenizer_of,
    transformers_of,
)
from lib.checkpoint import load_model
from lib.tokenizer import EOT, UNK
from model import GPT
from sample import generate_text

TYPED = [EOT, UNK, f"a{EOT}{UNK} a", f"{UNK} {EOT}\n"]  # special tokens that are ordinary text
# shape, tokenizer, unused ids at the end of the vocabulary
PAIRS = [("gpt2", "gpt2", 47), ("nanogpt", "char", 0), ("qwen3", "bpe", 0), ("untied", "pieces", 3),
         ("llama", "bpe", 0), ("gpt2", "word", 0), ("gpt2", "char", 0)]


def greedy_text(out_dir: Path) -> str:
    """Return PROMPT and 40 tokens that follow it at temperature 0."""
    return generate_text(PROMPT, 40, temperature=0, out_dir=str(out_dir), device="cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, GPT]]:
    """Return the folder and the model of a run for each of PAIRS."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for shape, kind, padding in PAIRS:
        path = folder / f"{shape}-{kind}"
        made[f"{shape}-{kind}"] = path, make_run(path, shape, kind, padding)
    return made


# -----------------------------------------------------------------------------
# Hugging Face

@pytest.mark.parametrize("pair", [f"{shape}-{kind}" for shape, kind, _ in PAIRS[:-1]])
def test_transformers_computes_the_same(runs, tmp_path, pair):
    """The logits, greedy ids and text are the same, and we can read the folder ourselves."""
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
    text = greedy_text(out)
    expected = (text.lower() if kind == "word" else text).replace(UNK, "")
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == expected
    again, checkpoint = load_model(tmp_path / "hf", "cpu")
    assert torch.allclose(again(idx)[0], model(idx)[0], atol=1e-5)
    assert checkpoint["meta"]["tokenizer"] == ours.spec and checkpoint["step"] == 7
    assert checkpoint["config"] == {"dataset": "tales", "batching": "by_length"}
    assert greedy_text(tmp_path / "hf") == text


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char", "pieces", "word"])
def test_tokenizers_are_the_same(tmp_path, kind):
    """Any text of the vocabulary has the same ids, after end-of-text, and they the same text."""
    from transformers import AutoTokenizer

    ours = tokenizer_of(kind)
    write_hf_tokenizer(ours, tmp_path, 64)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=kind == "word")
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eot, ours.eot)
    assert len(theirs) == ours.vocab_size
    texts = [TEXT, PROMPT, "", " ", "a  a", "a\n \n\n a", " \n", "\t"]
    texts += TYPED
    if kind in ("gpt2", "bpe"):
        rng = random.Random(0)
        codes, weights = [*range(1, 0xd7ff), *range(0x20, 0x7f)], [1] * 0xd7fe + [900] * 0x5f
        texts += ["".join(map(chr, rng.choices(codes, weights, k=50))) for _ in range(300)]
    for text in texts:
        if kind in ("pieces", "char") and text not in (TEXT, PROMPT, *TYPED):
            continue
        if kind == "word" and not text.strip():
            continue
        ids = ours.encode(text)
        assert theirs(text).input_ids == [ours.eot] + ids, repr(text)
        assert theirs.decode(ids) == ours.decode(ids), repr(text)
    if kind == "char":
        assert theirs("Zz").input_ids == [ours.eot] + ours.encode("Zz")
        assert ours.unk in theirs("Zz").input_ids


# -----------------------------------------------------------------------------
# llama.cpp

@pytest.mark.parametrize("dtype", ["float32", "float16", "q8_0"])
@pytest.mark.parametrize("pair", ["gpt2-gpt2", "qwen3-bpe", "untied-pieces", "nanogpt-char",
                                  "llama-bpe"])
def test_gguf_holds_the_model(runs, tmp_path, pair, dtype):
    """Every weight within the rounding of its type, every token, and the fields of the shape."""
    (out, model), (shape, kind) = runs[pair], pair.split("-")
    done = run("export.py", f"--out_dir={out}", f"--to={tmp_path / 'm.gguf'}", "--format=gguf",
               f"--dtype={dtype}")
    assert done.returncode == 0 and ("GELU" in done.stderr) == (shape == "nanogpt")
    assert len(done.stderr.splitlines()) < 2
    assert f"parse_special, {EOT} in a prompt is read as the special" in done.stdout
    tensors, fields = gguf_tensors(tmp_path / "m.gguf")
    expected = expected_gguf_tensors(model)
    assert tensors.keys() == expected.keys()
    for name, w in expected.items():
        exact = dtype == "float32" or w.dim() == 1 or name.startswith("position")
        is_float16 = dtype == "float16" or w.size(-1) % 32
        step = 2**-11 * w.abs() if is_float16 else w.abs().max() / 127
        assert tensors[name].shape == w.shape
        error = (torch.tensor(tensors[name]) - w).abs()
        assert (error <= (0 if exact else step + 1e-7)).all(), name
    c, ours = model.config, tokenizer_of(kind)
    assert fields["general.architecture"] == c.arch
    assert fields[f"{c.arch}.context_length"] == 64
    assert fields[f"{c.arch}.attention.head_count"] == c.n_head
    if c.arch != "gpt2":
        keys = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")
        expected = [c.n_kv_head, c.head_dim, c.rope_theta]
        assert [fields[f"{c.arch}.{key}"] for key in keys] == expected
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == c.vocab_size
    assert tokens[ours.eot] == EOT == tokens[fields["tokenizer.ggml.eos_token_id"]]
    space = "\u0120" if kind in ("gpt2", "bpe") else "\u2581"  # how each writes a space
    assert tokens[ours.encode(" a")[0]][0] == space


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["gpt2-gpt2", "qwen3-bpe", "untied-pieces", "llama-bpe",
                                  "gpt2-char"])
def test_llama_cpp_computes_the_same(runs, tmp_path, pair):
    """The ids of a prompt and the greedy ids after it, in float16; similar logits in q8_0."""
    from llama_cpp import Llama

    (out, model), kind = runs[pair], pair.split("-")[1]
    ours = tokenizer_of(kind)
    for dtype in ("float16", "q8_0"):
        path = tmp_path / f"{dtype}.gguf"
        export(out, path, "--format=gguf", f"--dtype={dtype}")
        # type_k, type_v 0: keys and values in float32
        llama = Llama(str(path), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0)
        idx = [ours.eot] + ours.encode(PROMPT)
        for text in (PROMPT, TEXT):
            theirs = llama.tokenize(text.encode(), add_bos=True, special=False)
            assert theirs == [ours.eot] + ours.encode(text)
        ids = model.generate(torch.tensor([idx]), 40, temperature=0)[0].tolist()
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0][0]
        llama.eval(ids)
        logits = torch.tensor(llama.scores[:len(ids)])
        error = (logits - expected).square().mean().sqrt() / expected.std()
        # measured: 0.0015 and 0.042 at most; with one wrong weight matrix about 1
        assert error < (0.003 if dtype == "float16" else 0.06)
        if dtype == "float16":
            llama.reset()
            theirs = [token for token, _ in zip(llama.generate(idx, temp=0), range(40))]
            assert theirs == ids[len(idx):]
            done = llama.create_completion(PROMPT, max_tokens=40, temperature=0)
            text = greedy_text(out)
            # incomplete characters are shown in different ways
            assert PROMPT + done["choices"][0]["text"] == text or "\ufffd" in text


# -----------------------------------------------------------------------------
# Errors, files and uploads

@pytest.mark.parametrize("args, says", [
    (["--format=onnx"], "format must be int8, hf, gguf or html"),
    (["--dtype=q8_0"], "dtype must be auto, float32, float16, bfloat16 with --format=hf"),
    (["--format=gguf", "--dtype=int4"], "dtype must be auto, float16, float32, q8_0"),
    (["--push=me"], "push takes USER/NAME"),
    (["--to={there}"], "exists already: --overwrite=True"),
    (["--to={there}", "--format=gguf", "--overwrite=True"], "writes a file, and"),
    (["--to={there}/a.txt", "--overwrite=True"], "writes a folder, and"),
    (["--out_dir={int8}"], "is in int8 already"),
    (["--out_dir={words}", "--format=gguf"], "nothing like the tokenizer 'word'"),
    (["--out_dir={there}"], "there is no checkpoint in"),
])
def test_errors_are_one_line_and_change_nothing(runs, tmp_path, args, says):
    there = tmp_path / "there"
    there.mkdir()
    (there / "a.txt").write_text("mine")
    if "int8" in args[0]:
        export(runs["qwen3-bpe"][0], tmp_path / "int8", "--format=int8")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    names = dict(there=there, int8=tmp_path / "int8", words=runs["gpt2-word"][0])
    args = ["--format=hf", f"--to={tmp_path / 'new'}", *(arg.format(**names) for arg in args)]
    done = run("export.py", f"--out_dir={runs['gpt2-gpt2'][0]}", *args)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_an_export_does_not_replace_its_own_model(runs, tmp_path):
    """int8 to the run, float16 to the folder or file with the float32 weights."""
    run_dir, hf, gguf = (tmp_path / name for name in ("run", "hf", "m.gguf"))
    shutil.copytree(runs["qwen3-bpe"][0], run_dir)
    export(run_dir, hf)
    export(run_dir, gguf, "--format=gguf", "--dtype=float32")
    (tmp_path / "link").symlink_to(run_dir)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/best.pt").symlink_to(run_dir / "best.pt")
    for source, to, *args in ((run_dir, run_dir, "--format=int8"),
                              (tmp_path / "linked", run_dir, "--format=int8"),
                              (run_dir, tmp_path / "link", "--format=int8"),
                              (run_dir / "best.pt", run_dir, "--format=int8"),
                              (hf, hf, "--format=hf", "--dtype=float16"),
                              (gguf, gguf, "--format=gguf")):
        done = run("export.py", f"--out_dir={source}", f"--to={to}", "--overwrite=True", *args)
        assert done.returncode == 2 and "has the model that is exported" in done.stderr, args
    assert (run_dir / "best.pt").read_bytes() == (runs["qwen3-bpe"][0] / "best.pt").read_bytes()
    # a folder that export.py chose must not lead elsewhere
    (tmp_path / "run-hf").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    done = run("export.py", f"--out_dir={run_dir}", "--format=hf", "--overwrite=True")
    assert done.returncode == 2 and "is a link to another folder" in done.stderr
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("size", [1_000, 60_000])
def test_a_full_disk_is_one_line(runs, tmp_path, size):
    """No file can be larger than `size`: neither tokenizer nor weights, or not the weights."""
    process = start("export.py", f"--out_dir={runs['qwen3-bpe'][0]}", f"--to={tmp_path}/hf",
                    "--format=hf")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    lines = process.communicate()[0].strip().splitlines()
    assert process.returncode == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and "too large" in lines[0]
    assert not any((tmp_path / "hf").iterdir())


def test_git_ignores_what_is_written_by_default(monkeypatch, tmp_path):
    shutil.copy(HERE / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for format, dtypes in DTYPES.items():
        monkeypatch.setattr("export.format", format)
        monkeypatch.setattr("export.out_dir", "gpt2")
        for path in map(resolve_path, dtypes):
            file = path if format in ("gguf", "html") else path / "config.json"
            done = subprocess.run(["git", "check-ignore", "-q", file], cwd=tmp_path)
            assert done.returncode == 0, file
    for file, status in (("a/model.safetensors", 0), ("a/config.json", 1)):
        assert subprocess.run(["git", "check-ignore", file], cwd=tmp_path).returncode == status


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        needed("gguf")


def test_an_export_replaces_only_its_own_files(runs, tmp_path):
    export(runs["qwen3-bpe"][0], tmp_path / "hf")
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    old = (tmp_path / "hf" / "model.safetensors").read_bytes()
    export(runs["gpt2-gpt2"][0], tmp_path / "hf", "--overwrite=True", "--dtype=bfloat16")
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"
    assert not list((tmp_path / "hf").glob(".export*"))
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() != old
    assert transformers_of(tmp_path / "hf")[0].dtype == torch.bfloat16


def test_model_card_has_the_metrics_of_its_step(runs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(runs["untied-pieces"][0], out)
    summary = {"step": 7, "tokens": 1234, "dataset": "tales", "split": "val", "loss": 1.25,
               "floor": None}
    of_other_weights, of_a_part = {"quantize": "int8"}, {"eval_iters": 2}
    for i, (changes, is_shown) in enumerate([
            ({}, True), ({"step": 6}, False), (of_other_weights, False), (of_a_part, False)]):
        (out / "metrics_summary.json").write_text(json.dumps(summary | changes))
        export(out, tmp_path / f"hf{i}")
        card = (tmp_path / f"hf{i}" / "README.md").read_text()
        assert "in a prompt is read as text" in card
        assert ("| loss | 1.2500 |" in card and "1,234 tokens of tales" in card) == is_shown
        assert "floor" not in card
    code = card.split("```python\n")[1].split("```")[0]
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "Trained on tales for 7 steps" in card
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and PROMPT in done.stdout, done.stderr


@pytest.mark.parametrize("format, files", [
    ("hf", {"README.md", "config.json", "generation_config.json", "meta.json", "model.safetensors",
            "tokenizer.json", "tokenizer_config.json"}),
    ("gguf", {"story.gguf"}),
])
def test_push_uploads_the_written_files(hub, runs, tmp_path, format, files):
    """A stand-in for the hub receives the name of the model and the written files, no others."""
    to = tmp_path / "there" / ("story.gguf" if format == "gguf" else "")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "private.txt").touch()
    args = ["--overwrite=True", f"--out_dir={runs['untied-pieces'][0]}", f"--format={format}",
            f"--to={to}", "--push=me/story"]
    done = run("export.py", *args, **hub.env, HF_TOKEN="hf_x")
    assert done.returncode == 0 and done.stdout.rstrip().endswith("/me/story"), done.stderr
    assert done.stderr.startswith("uploading ") and done.stderr.count("\n") == 1, done.stderr
    assert hub.created == ["me/story"] and set(hub.uploaded) == files
    assert all(body == ((to / name) if to.is_dir() else to).read_bytes()
               for name, body in hub.uploaded.items())
    unreachable = hub.env | {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_TOKEN": "hf_x"}
    done = run("export.py", *args, **unreachable)
    assert done.returncode == 2 and "is written, but could not be uploaded" in done.stderr
    assert "Traceback" not in done.stderr


# -----------------------------------------------------------------------------
# Checkpoint files

def test_a_checkpoint_file_is_exported_beside_it(tmp_path, trained):
    """The model card has the results of this file, not those of the run."""
    shutil.copytree(trained, tmp_path / "out")
    shutil.copy(trained / "last.pt", tmp_path / "out/step_000006.pt")
    args = [f"--out_dir={tmp_path}/out/step_000006.pt"]
    assert run("eval.py", *args, "--valid_samples=0").returncode == 0
    file = tmp_path / "out/step_000006_metrics_summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"loss": 1.2345}))
    assert run("eval.py", f"--out_dir={tmp_path}/out", "--valid_samples=0").returncode == 0
    for format in ("int8", "hf", "gguf"):
        done = run("export.py", *args, f"--format={format}")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/step_000006-int8/best.pt").is_file()
    assert (tmp_path / "out/step_000006-float16.gguf").is_file()
    assert "| loss | 1.2345 |" in (tmp_path / "out/step_000006-hf/README.md").read_text()


# -----------------------------------------------------------------------------
# int8

def test_int8(tmp_path, trained):
    out, int8 = tmp_path / "out", tmp_path / "out-int8"
    shutil.copytree(trained, out)
    done = run("export.py", f"--out_dir={out}")
    assert done.returncode == 0, done.stderr
    wrote, following = done.stdout.splitlines()
    assert wrote.startswith(f"wrote {int8} (int8, ") and f" from {out}/best.pt, step 6" in wrote
    assert following == f"next: python sample.py --out_dir={int8}"
    weights = [torch.load(folder / "best.pt", weights_only=True)["model"] for folder in (out, int8)]
    sizes = [sum({w.data_ptr(): w.nbytes for w in state.values()}.values()) for state in weights]
    assert sizes[1] < 0.5 * sizes[0]  # with rows of 16 weights; with 384 it is 0.253
    variants = ([f"--out_dir={out}"], [f"--out_dir={out}", "--quantize=int8"],
                [f"--out_dir={int8}"], [f"--out_dir={int8}", "--quantize=int8"])
    samples = [run("sample.py", "--start=Once upon", *args).stdout for args in variants[1:]]
    assert samples[0].startswith("Once upon") and samples[0] == samples[1] == samples[2]
    summaries = []
    for folder, args in zip((out, out, int8), variants):
        done = run("eval.py", *args, "--valid_samples=0")
        assert done.returncode == 0, done.stderr
        summaries.append(json.loads((folder / "metrics_summary.json").read_text()))
    assert summaries[0]["parameters"] == summaries[2]["parameters"]
    assert {(summary["size_float32_bytes"], summary["size_int8_bytes"])
            for summary in summaries} == {tuple(sizes)}
    assert summaries[1]["loss"] == summaries[2]["loss"]
    assert abs(summaries[1]["loss"] - summaries[0]["loss"]) < 0.01
    before = (int8 / "best.pt").read_bytes()

    def error(*args: str) -> str:
        return one_line_error(run("export.py", f"--out_dir={out}", *args))

    assert "--overwrite=True" in error()
    assert "format must be" in error("--format=int4")
    assert "no checkpoint" in error(f"--out_dir={tmp_path}/none")
    assert "no checkpoint" in error("--to=x", f"--out_dir={tmp_path}")
    assert before == (int8 / "best.pt").read_bytes() and not (HERE / "x").exists()
