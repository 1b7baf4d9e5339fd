"""What a user types and what comes back: settings, errors, sampling, evaluation, benchmark."""
import ast
import contextlib
import copy
import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import load_model
from configurator import coerce, from_text, settings_of
from conftest import HERE, TINY, run, train
from dataset import TokenStream, eval_batches, load_meta
from eval import compare_texts, distinct, leading_texts, repetition, score, sizes
from model import GPT, GPTConfig, from_hf, quantize_int8
from tokenizer import get_tokenizer

SCRIPTS = ["train.py", "sample.py", "eval.py", "bench.py", "export.py", "app.py",
           *sorted(f"data/{path.parent.name}/prepare.py" for path in HERE.glob("data/*/prepare.py"))]


def one_line_error(done) -> str:
    """The error line of a run that failed as runs must fail."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


# -----------------------------------------------------------------------------
# Settings

@pytest.mark.parametrize("default, text, value", [
    (1, "7", 7), (1, "1e4", 10000), (1, "-3", -3), (1, "1_000", 1000), (1, "12345678901234567891", 12345678901234567891),
    (0.5, "1", 1.0), (0.5, "6e-4", 6e-4), (0.5, "-0.1", -0.1),
    (True, "False", False), (False, "true", True),
    ("a", "x=y=z", "x=y=z"), ("a", "", ""), ("a", "1", "1"), ("a", " two words ", " two words "), ("a", "True", "True"),
])
def test_values_from_the_command_line(default, text, value):
    got = from_text("key", text, default)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("default, text", [
    (1, "1.5"), (1, "True"), (1, "one"), (1, ""), (1, "inf"), (1, "nan"), (0.5, "x"), (0.5, "nan"),
    (0.5, "inf"), (0.5, "False"),
    (0.5, "9007199254740993"), (True, "1"), (True, "yes"), (True, ""), (True, "None"),
])
def test_values_that_would_lose_something_are_refused(default, text):
    with pytest.raises(ValueError, match="key takes " + type(default).__name__):
        from_text("key", text, default)


@pytest.mark.parametrize("default, value", [
    (1, True), (0.5, True), (True, 1), ("a", 1), (1, "1"), (1, None), (0.5, [1.0]), (1, 1.5),
])
def test_wrong_types_in_config_files_are_refused(default, value):
    with pytest.raises(ValueError, match="key takes"):
        coerce("key", value, default)


def test_later_settings_win_and_nanogpt_configs_work(tmp_path, fables_data):
    config = tmp_path / "like_nanogpt.py"
    config.write_text("import time\nwandb_log = False\nwandb_run_name = 'x' + str(time.time())\n_private = 3\n"
                      "batch_size = 2 * 2\nmax_iters = 1e1 # a comment\nlearning_rate = 1\n")
    done = run("train.py", *TINY, f"--dataset={fables_data}", f"--out_dir={tmp_path}/out", str(config), "--max_iters=1")
    assert done.returncode == 0, done.stderr
    settings = torch.load(tmp_path / "out/last.pt", weights_only=True)["config"]
    assert (settings["batch_size"], settings["max_iters"], settings["learning_rate"]) == (4, 1, 1.0)
    assert settings["n_embd"] == 16 and type(settings["learning_rate"]) is float


@pytest.mark.parametrize("args, says", [
    (["--learning_rat=1"], "did you mean learning_rate?"),
    (["--xyzzy=1"], "--help lists them"),
    (["--n_layer=two"], "n_layer takes int (default 6), not 'two'"),
    (["--compile=1"], "compile takes bool"),
    (["--compile"], "write --compile=VALUE"),
    (["config/nothing.py"], "no such config file"),
    (["n_layer=2"], "no such config file"),
    (["--"], "lacks a value"),
    (["config"], "no such config file"),
    (["--device=toaster"], "toaster"),
    (["--dtype=float64"], "dtype must be"),
    (["--optimizer=sgd"], "optimizer must be"),
    (["--softmax_words=7"], "softmax_words (7) must not be less"),
    (["--init_from=nowhere"], "init_from must be"),
    (["--batch_size=0"], "batch_size must be at least 1"),
    (["--learning_rate=-1"], "learning_rate must not be negative"),
    (["--beta2=1"], "beta2 must be"),
    (["--dataset=nothing"], "there is no data set nothing"),
    (["--n_head=5"], "must be a multiple of n_head"),
    (["--dropout=1.5"], "dropout must be"),
    (["--batching=random"], "batching must be"),
    (["--block_size=100000"], "fewer than a window"),
    (["--arch=bert"], "arch must be"),
])
def test_bad_settings_are_one_line(args, says, fables_data, tmp_path):
    data = [] if "dataset" in args[0] else [f"--dataset={fables_data}"]
    assert says in one_line_error(run("train.py", f"--out_dir={tmp_path}/out", *data, *args))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, says", [
    ("n_layers = 2", "did you mean n_layer?"), ("n_layer = '2'", "n_layer takes int"), ("n_layer = = 2", "line 1: SyntaxError"),
    ("x_ = 1\n\n1 / 0", "line 3: ZeroDivisionError"), ("import sys\nsys.exit(0)", "line 2: SystemExit"),
    ("open('nowhere')", "line 1: FileNotFound"),
    ("n_layer = None", "n_layer takes int"), ("from math import pi", "there is no setting 'pi'"),
])
def test_bad_config_files_are_one_line(tmp_path, text, says):
    path = tmp_path / "bad.py"
    path.write_text(text)
    error = one_line_error(run("train.py", str(path)))
    assert says in error and str(path) in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_setting_with_its_reason(script):
    done = run(script, "--help")
    assert done.returncode == 0 and not done.stderr
    for name, comment in settings_of(HERE / script).items():
        assert f"--{name}=" in done.stdout and comment in done.stdout
    assert f"usage: python {Path(script).name}" in done.stdout
    assert len(settings_of(HERE / script)) >= 2


def test_configs_fit_every_script():
    trainers = settings_of(HERE / "train.py")
    for path in (HERE / "config").glob("*.py"):
        namespace = {}
        exec(path.read_text(), namespace)
        assert {name for name in namespace if not name.startswith("_")} <= set(trainers), path


def test_defaults_have_the_size_of_train_small():
    def assignments(path):
        nodes = [node for node in ast.parse((HERE / path).read_text()).body if isinstance(node, ast.Assign)]
        return {node.targets[0].id: node.value.value for node in nodes if isinstance(node.value, ast.Constant)}

    config, defaults, bench = (assignments(path) for path in ("config/train_small.py", "train.py", "bench.py"))
    for name in ("dataset", "n_layer", "n_head", "n_embd", "block_size", "batch_size", "dropout", "bias"):
        assert config[name] == defaults[name] == bench[name]


# -----------------------------------------------------------------------------
# Missing things name the command that makes them

def test_missing_things_name_the_command_that_makes_them(tmp_path, trained):
    assert "train.py --out_dir=" in one_line_error(run("sample.py", f"--out_dir={tmp_path}"))
    assert "train.py --out_dir=" in one_line_error(run("eval.py", f"--out_dir={tmp_path}"))
    shutil.copytree(HERE / "data/tinystories", tmp_path / "tinystories", ignore=shutil.ignore_patterns("*.bin", "*.json"))
    error = one_line_error(run("train.py", f"--dataset={tmp_path}/tinystories", f"--out_dir={tmp_path}/out"))
    assert f"run `python {tmp_path}/tinystories/prepare.py`" in error
    assert "not prepared" in one_line_error(run("eval.py", f"--out_dir={trained}", f"--dataset={tmp_path}/tinystories"))


@pytest.mark.parametrize("args, says", [
    (["--start=Qwertyuiop"], "lacks the words 'Qwertyuiop'"),
    (["--start=FILE:nowhere.txt"], "nowhere.txt"),
    (["--temperature=-1"], "temperature must not be negative"),
    (["--num_samples=0"], "num_samples must be at least 1"),
    (["--top_k=-1"], "top_k must not be negative"),
    (["--top_p=0"], "top_p must be above 0"),
    (["--min_p=2"], "min_p at least 0"),
    (["--repetition_penalty=0"], "repetition_penalty must be above 0"),
    (["--no_repeat_ngram=-2"], "no_repeat_ngram must not be negative"),
    (["--num_beams=-1"], "num_beams must be at least 0"),
    (["--num_beams=3", "--start=Once" + " upon a time" * 40], "room for the prompt"),
    (["--quantize=int4"], "quantize must be int8"),
    (["--temperature=nan"], "temperature takes float"),
    (["--top_p=1.5"], "top_p must be above 0"),
    (["--max_new_tokens=0"], "max_new_tokens must be at least 1"),
    (["--next_token=-1"], "next_token must be at least 0"),
])
def test_bad_prompts_are_one_line(trained, args, says):
    assert says in one_line_error(run("sample.py", f"--out_dir={trained}", *args))


def test_prompt_that_is_not_text(tmp_path, trained):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in one_line_error(run("sample.py", f"--out_dir={trained}", f"--start=FILE:{tmp_path}/prompt"))


def test_of_a_prompt_longer_than_the_context_the_end_counts(tmp_path, trained):
    story, sample = "Once upon a time" + " upon a time" * 900_000, [f"--out_dir={trained}", "--temperature=0"]
    (tmp_path / "prompt.txt").write_text(story)  # 10 MB
    told = run("sample.py", *sample, f"--start=FILE:{tmp_path}/prompt.txt", "--num_samples=1", "--max_new_tokens=1")
    assert told.returncode == 0 and told.stdout.startswith(story), told.stderr[-500:]
    rows = run("sample.py", *sample, f"--start=FILE:{tmp_path}/prompt.txt", "--next_token=1").stdout
    assert told.stdout[len(story):].startswith(ast.literal_eval(rows.split("%", 1)[1].strip()))
    for empty in ([], ["--start="], ["--start=-"]):
        assert run("sample.py", *sample, *empty, "--num_samples=1", "--max_new_tokens=3").returncode == 0


def test_int8(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "out")
    done = run("export.py", f"--out_dir={tmp_path}/out")
    assert done.returncode == 0 and f"{tmp_path}/out-int8/best.pt" in done.stdout, done.stderr
    weights = [torch.load(tmp_path / name / "best.pt", weights_only=True)["model"] for name in ("out", "out-int8")]
    sizes = [sum({w.data_ptr(): w.nbytes for w in state.values()}.values()) for state in weights]
    assert sizes[1] < 0.5 * sizes[0]  # rows of 16 weights; of 384, it is 0.253
    told = [run("sample.py", "--start=Once upon", *args).stdout for args in (
        [f"--out_dir={tmp_path}/out", "--quantize=int8"], [f"--out_dir={tmp_path}/out-int8"],
        [f"--out_dir={tmp_path}/out-int8", "--quantize=int8"])]
    assert told[0].startswith("Once upon") and told[0] == told[1] == told[2]
    losses = []
    for args in ([f"--out_dir={tmp_path}/out"], [f"--out_dir={tmp_path}/out", "--quantize=int8"],
                 [f"--out_dir={tmp_path}/out-int8"]):
        done = run("eval.py", *args, "--valid_samples=0")
        assert done.returncode == 0, done.stderr
        losses.append(json.loads(Path(args[0].removeprefix("--out_dir="), "metrics_summary.json").read_text()))
    assert losses[0]["parameters"] == losses[2]["parameters"]
    assert {(one["size_float32_bytes"], one["size_int8_bytes"]) for one in losses} == {tuple(sizes)}
    assert losses[1]["loss"] == losses[2]["loss"] and abs(losses[1]["loss"] - losses[0]["loss"]) < 0.01
    before = (tmp_path / "out-int8/best.pt").read_bytes()
    assert "--overwrite=True" in one_line_error(run("export.py", f"--out_dir={tmp_path}/out"))
    assert "format must be" in one_line_error(run("export.py", f"--out_dir={tmp_path}/out", "--format=int4"))
    assert "no checkpoint" in one_line_error(run("export.py", f"--out_dir={tmp_path}/none"))
    assert "no checkpoint" in one_line_error(run("export.py", f"--out_dir={tmp_path}/out", "--to=x", f"--out_dir={tmp_path}"))
    assert before == (tmp_path / "out-int8/best.pt").read_bytes() and not (HERE / "x").exists()


# -----------------------------------------------------------------------------
# Sampling and evaluation

def test_samples_begin_with_the_prompt_and_repeat(trained, tmp_path):
    prompt = "Once upon a time"
    (tmp_path / "prompt.txt").write_text(prompt)
    args = [f"--out_dir={trained}", "--num_samples=2", "--max_new_tokens=40"]  # longer than the context of 32
    first = run("sample.py", *args, f"--start={prompt}")
    assert first.returncode == 0, first.stderr
    samples = first.stdout.split("-" * 80 + "\n")
    assert len(samples) == 3 and all(sample.startswith(prompt) for sample in samples[:2]) and samples[0] != samples[1]
    assert run("sample.py", *args, f"--start=FILE:{tmp_path}/prompt.txt").stdout == first.stdout
    assert run("sample.py", *args, f"--start={prompt}", "--seed=2").stdout != first.stdout


def test_words_are_told_with_spaces_and_unknown_ones_are_named(tmp_path):
    story = "the fox saw a hare. it said, \"hello!\" and ran"
    (tmp_path / "story.txt").write_text("\n<|endoftext|>\n".join([story] * 40))
    done = run("data/text/prepare.py", f"--source={tmp_path}/story.txt", "--tokenizer=word", f"--out_dir={tmp_path}/data")
    assert done.returncode == 0, done.stderr
    train(tmp_path / "data", tmp_path / "out", "--batching=by_length", "--max_iters=60", "--learning_rate=0.02",
          "--min_lr=0.02", "--dropout=0", "--n_embd=32")
    told = run("sample.py", f"--out_dir={tmp_path}/out", "--temperature=0", "--num_samples=1", "--start=The fox saw")
    assert told.stdout.startswith("The fox saw" + story[11:] + "\n---") and "lacks" not in told.stderr
    told = run("sample.py", f"--out_dir={tmp_path}/out", "--num_beams=2", "--start=The fox ate", "--max_new_tokens=12")
    assert told.stdout.startswith("The fox ate ") and "warning: the vocabulary lacks the words 'ate'" in told.stderr
    done = run("eval.py", f"--out_dir={tmp_path}/out")
    summary = json.loads((tmp_path / "out/metrics_summary.json").read_text())
    assert summary["bits_per_byte"] is None and summary["unknown_share"] == 0 and summary["loss"] < 0.2


def test_prompts_typed_in_or_piped_and_next_tokens(trained):
    sample = [f"--out_dir={trained}", "--num_samples=1", "--max_new_tokens=4", "--temperature=0"]
    told = run("sample.py", *sample, "--start=Once upon").stdout
    assert run("sample.py", *sample, "--start=-", stdin="Once upon").stdout == told
    asked = run("sample.py", *sample, "--interactive=True", stdin="Once upon\nQwertyuiop\nOnce upon\n")
    assert asked.stdout.replace("prompt> ", "") == told + told + "\n" and "lacks the words 'Qwertyuiop'" in asked.stderr
    best = run("sample.py", *sample, "--start=Once upon", "--num_beams=1").stdout
    assert best == told.splitlines(keepends=True)[0]
    rows = run("sample.py", *sample, "--start=Once upon", "--next_token=5000").stdout.splitlines()
    shares = [float(row.split("%")[0]) for row in rows]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.01 * len(rows))
    assert told.startswith("Once upon" + ast.literal_eval(rows[0].split("%", 1)[1].strip()))


@pytest.mark.parametrize("batching", ["windows", "by_length"])
def test_metrics_equal_a_plain_computation(trained, fables_data, tmp_path, batching):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    done = run("eval.py", f"--out_dir={out}", f"--batching={batching}", "--valid_samples=5", "--dtype=float32",
               "--batch_size=3")
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "metrics_summary.json").read_text())

    model, checkpoint = load_model(out, "cpu")
    meta = load_meta(fables_data)
    stream = TokenStream(fables_data, "val", meta)
    ids = stream.read(0, len(stream)).tolist()
    nats, top1, top5, n, context = 0.0, 0, 0, 0, [0]
    for position, target in enumerate(ids):  # one token at a time
        if batching == "windows" and position % 32 == 0 and position:
            context = [ids[position - 1]] if (position - 1) % 32 == 0 else context
        if batching == "by_length" and (ids[position - 1] == 0 or len(context) > 32):
            context = [ids[position - 1]]
        if batching == "windows" and position == 0:
            context = [target]  # nothing foretells the first token
            continue
        if len(context) > 32:
            context = [ids[position - 1]]
        logits = model(torch.tensor([context]))[0][0, -1]
        nats -= logits.log_softmax(-1)[target].item()
        top1 += int(logits.argmax() == target)
        top5 += int(target in logits.topk(5).indices)
        n += 1
        context.append(target)
    counts = meta["splits"]["val"]
    loss = nats / n
    expected = dict(tokens=n, loss=loss, perplexity=math.exp(loss), accuracy=top1 / n, accuracy_top5=top5 / n,
                    bits_per_byte=loss * len(ids) / math.log(2) / counts["bytes"],
                    bits_per_char=loss * len(ids) / math.log(2) / counts["characters"],
                    word_perplexity=math.exp(loss * len(ids) / counts["words"]))
    for key, value in expected.items():
        assert summary[key] == pytest.approx(value, rel=1e-4), key
    assert summary["floor"] == (meta["floor"] if batching == "by_length" else None) and summary["valid_share"] == 0.0
    assert ("above the floor" in done.stdout) == (batching == "by_length")
    assert summary["parameters"] == model.num_params() and summary["peak_memory_bytes"] > 1e7
    assert summary["step"] == checkpoint["step"] and summary["dataset"] == "fables"
    assert summary["generation_tokens_per_second"] > 1 and summary["rouge1"] is summary["stride"] is None


def test_a_model_that_knows_its_fable_is_valid(tmp_path):
    """One story only, learned by heart: no loss left, and every sample is that story."""
    done = run("data/fables/prepare.py", f"--out_dir={tmp_path}/one", "--train_stories=1", "--val_stories=1")
    assert done.returncode == 0, done.stderr
    shutil.copy(tmp_path / "one/train.bin", tmp_path / "one/val.bin")  # validate on the story itself
    meta = json.loads((tmp_path / "one/meta.json").read_text())
    meta["splits"]["val"] = meta["splits"]["train"]
    (tmp_path / "one/meta.json").write_text(json.dumps(meta))
    train(tmp_path / "one", tmp_path / "out", "--batching=by_length", "--block_size=160", "--n_embd=64", "--dropout=0",
          "--batch_size=1", "--gradient_accumulation_steps=1", "--max_iters=300", "--eval_interval=300",
          "--learning_rate=0.01", "--min_lr=0.01", "--beta2=0.95", "--weight_decay=0")
    done = run("eval.py", f"--out_dir={tmp_path}/out", "--valid_samples=20")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out/metrics_summary.json").read_text())
    assert summary["loss"] < 0.001 and summary["accuracy"] == 1.0 and summary["valid_share"] >= 0.9
    stream = TokenStream(tmp_path / "one", "train", meta)
    story = get_tokenizer(meta).decode(stream.read(0, len(stream) - 1).tolist())
    told = run("sample.py", f"--out_dir={tmp_path}/out", "--num_samples=1", "--temperature=0").stdout
    assert told.startswith(story + "\n---")


def test_eval_refuses_another_tokenizer(trained, tmp_path):
    (tmp_path / "input.txt").write_text("abc " * 100)
    done = run("data/shakespeare_char/prepare.py", f"--source={tmp_path}/input.txt", f"--out_dir={tmp_path}/chars")
    assert done.returncode == 0, done.stderr
    assert "another tokenizer" in one_line_error(run("eval.py", f"--out_dir={trained}", f"--dataset={tmp_path}/chars"))


@pytest.mark.parametrize("changes", [{}, dict(arch="qwen3", n_kv_head=1), dict(arch="qwen3", tied=False)])
def test_sizes_are_those_of_the_weights(changes):
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=8, **changes))
    states = [model.state_dict(), copy.deepcopy(model).bfloat16().state_dict(), quantize_int8(model.state_dict())]
    assert list(sizes(model.config).values()) == [sum({w.data_ptr(): w.nbytes for w in state.values()}.values())
                                                  for state in states]


def hugging_face_model(block_size: int, vocab_size: int):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=block_size, n_embd=8, n_layer=2, n_head=2,
                                      initializer_range=0.5, bos_token_id=None, eos_token_id=None)).eval()


@torch.no_grad()
def sliding_perplexity(hf, ids: torch.Tensor, stride: int) -> tuple[float, int]:
    """Nats and tokens, as on https://huggingface.co/docs/transformers/perplexity."""
    nats, tokens, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + hf.config.n_positions, len(ids))
        x = ids[None, begin:end]
        y = x.clone()
        y[:, :-(end - previous_end)] = -100
        if n := int((y[:, 1:] != -100).sum()):  # the model shifts them
            nats, tokens = nats + hf(x, labels=y).loss.item() * n, tokens + n
        previous_end = end
        if end == len(ids):
            break
    return nats, tokens


@pytest.mark.parametrize("stride", [1, 5, 15])
@pytest.mark.parametrize("n", [1, 2, 16, 17, 100])
def test_sliding_window_is_that_of_hugging_face(tmp_path, stride, n):
    hf, ids = hugging_face_model(16, 50), torch.randint(50, (n,), generator=torch.Generator().manual_seed(2))
    ids.numpy().astype("<u2").tofile(tmp_path / "val.bin")
    config = GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=8)
    model = GPT.from_weights(config, from_hf(hf.state_dict(), config)).eval()
    batches = eval_batches(TokenStream(tmp_path, "val", {"splits": {}}), 16, 4, stride=stride)
    ours = score(model, batches, contextlib.nullcontext())
    nats, tokens = sliding_perplexity(hf, ids, stride)
    assert ours["tokens"] == tokens == n - 1 and ours["nats"] == pytest.approx(nats, rel=1e-5)


def test_a_hugging_face_folder_is_measured(tmp_path):
    hf, ids = hugging_face_model(16, 50257), torch.randint(50257, (99,), generator=torch.Generator().manual_seed(2))
    hf.save_pretrained(tmp_path / "hf")
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):  # as nanoGPT has them, without meta.json
        ids.numpy().astype("<u2").tofile(tmp_path / f"data/{name}.bin")
    args = [f"--out_dir={tmp_path}/hf", "--stride=6", "--dtype=float32"]
    assert "does not say what it was trained on: give --dataset" in one_line_error(run("eval.py", *args))
    done = run("eval.py", *args, f"--dataset={tmp_path}/data")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "hf/metrics_summary.json").read_text())
    nats, tokens = sliding_perplexity(hf, ids, 6)
    assert (summary["tokens"], summary["stride"], summary["step"]) == (tokens, 6, 0)
    assert summary["loss"] == pytest.approx(nats / tokens, rel=1e-5) and summary["bits_per_byte"] is None


def test_what_cannot_be_said_is_none(trained, fables_data, tmp_path):
    """Losses without end, splits of other names, and vocabularies that do not have every word."""
    shutil.copytree(fables_data, tmp_path / "data")
    shutil.copytree(trained, tmp_path / "out")
    shutil.copy(tmp_path / "data/val.bin", tmp_path / "data/test.bin")
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    meta["splits"]["test"] = meta["splits"]["val"] | {"unknown": 7}
    (tmp_path / "data/meta.json").write_text(json.dumps(meta))
    checkpoint = torch.load(tmp_path / "out/best.pt", weights_only=True)
    checkpoint["model"]["transformer.ln_f.weight"] *= 1e6
    torch.save(checkpoint, tmp_path / "out/best.pt")
    args = [f"--out_dir={tmp_path}/out", f"--dataset={tmp_path}/data", "--valid_samples=0"]
    assert "split must be train or val or test of" in one_line_error(run("eval.py", *args, "--split=tset"))
    done = run("eval.py", *args, "--split=test")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out/metrics_summary.json").read_text()
    summary = json.loads(text)
    assert summary["loss"] > 1000 and summary["perplexity"] is summary["word_perplexity"] is None and "Infinity" not in text
    assert summary["bits_per_byte"] is summary["bits_per_char"] is None and summary["split"] == "test"
    assert summary["unknown_share"] == 7 / meta["splits"]["val"]["tokens"]

    spec = {"kind": "word", "vocab": ["<UNK>", *meta["tokenizer"]["vocab"][1:]]}  # small letters only
    (tmp_path / "data/meta.json").write_text(json.dumps(meta | {"tokenizer": spec}))
    torch.save(checkpoint | {"meta": checkpoint["meta"] | {"tokenizer": spec}}, tmp_path / "out/best.pt")
    done = run("eval.py", *args)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/metrics_summary.json").read_text())["bits_per_byte"] is None


def test_texts_to_continue(tmp_path):
    def leading(eot, length, n):
        return leading_texts(TokenStream(tmp_path, "val", {"splits": {}}), eot, length, n).tolist()

    ids = np.arange(1, 104, dtype="<u2")
    ids.tofile(tmp_path / "val.bin")
    assert leading(-1, 10, 5) == leading(0, 10, 5) == [list(range(i, i + 10)) for i in (1, 21, 41, 61, 81)]
    assert len(leading(-1, 10, 99)) == 10
    ids[[3, 16, 27, 38, 50]] = 0  # documents of 3, 12, 10, 10, 11 and, never ended, 52 tokens
    ids.tofile(tmp_path / "val.bin")
    starts = [4, 17, 28, 39, 51]
    assert leading(0, 10, 9) == [[0, *range(i + 1, i + 11)] for i in starts]
    assert [row[1] - 1 for row in leading(0, 10, 2)] == [4, 28] and [row[1] - 1 for row in leading(0, 11, 9)] == [4, 39, 51]
    with pytest.raises(ValueError, match="no text of .* has prompt_tokens . max_new_tokens = 60 tokens"):
        leading(0, 60, 1)


def test_variety_of_texts():
    assert distinct(["a b a b", "a c"], 1) == 3 / 6 and distinct(["a b a b", "a c"], 2) == 3 / 4  # ab ba ab ac
    assert repetition(["a b c d a b c d", "a b c d", "x"]) == pytest.approx(1 / 6)  # abcd bcda cdab dabc abcd; abcd
    assert distinct(["", "a"], 2) is repetition(["a b c"]) is None


def test_continuations(trained, fables_data, tmp_path):
    rouge_scorer, sacrebleu = pytest.importorskip("rouge_score.rouge_scorer"), pytest.importorskip("sacrebleu")
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    done = run("eval.py", f"--out_dir={out}", "--continuations=5", "--prompt_tokens=8", "--max_new_tokens=40",
               "--temperature=0", "--batch_size=2", "--valid_samples=0", "--eval_iters=1")
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "metrics_summary.json").read_text())
    pairs = [json.loads(line) for line in open(out / "continuations.jsonl", encoding="utf-8")]
    assert len(pairs) == summary["continuations"] == 5

    model, meta = load_model(out, "cpu")[0], load_meta(fables_data)
    tokenizer, stream = get_tokenizer(meta), TokenStream(fables_data, "val", meta)
    stories = tokenizer.decode(stream.read(0, len(stream)).tolist()).split("<|endoftext|>")
    for pair in pairs:  # one at a time
        assert any(story.startswith(pair["prompt"] + pair["reference"]) for story in stories)
        prompt = [tokenizer.eot, *tokenizer.encode(pair["prompt"])]
        assert (len(prompt), len(tokenizer.encode(pair["reference"]))) == (9, 40)
        ids = model.generate(torch.tensor([prompt]), 40, temperature=0, stop_token=tokenizer.eot)[0, 9:].tolist()
        assert tokenizer.decode([i for i in ids if i != tokenizer.eot]) == pair["continuation"]

    texts, references = [pair["continuation"] for pair in pairs], [pair["reference"] for pair in pairs]
    for key in ("rouge1", "rouge2", "rougeL"):
        scorer = rouge_scorer.RougeScorer([key])
        scores = [scorer.score(target=target, prediction=text)[key].fmeasure for target, text in zip(references, texts)]
        assert summary[key] == pytest.approx(sum(scores) / 5), key
    assert summary["bleu"] == pytest.approx(sacrebleu.BLEU().corpus_score(texts, [references]).score)
    assert (summary["distinct_1"], summary["repetition"]) == (distinct(texts, 1), repetition(texts))
    same = compare_texts([pair | {"continuation": pair["reference"]} for pair in pairs])
    assert same["rouge1"] == same["rougeL"] == 1 and same["bleu"] == pytest.approx(100)
    too_long = run("eval.py", f"--out_dir={out}", "--continuations=5", "--max_new_tokens=1000")
    assert "has prompt_tokens + max_new_tokens = 1032 tokens" in one_line_error(too_long)


def test_compare_is_one_run_beside_the_other(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    assert run("export.py", f"--out_dir={tmp_path}/out").returncode == 0
    paths = [f"{tmp_path}/out", f"{tmp_path}/out-int8"]
    args = ["--valid_samples=3", "--eval_iters=2", "--dtype=float32"]
    args += ["--continuations=3"] if importlib.util.find_spec("rouge_score") else []
    done = run("eval.py", f"--compare={','.join(paths)}", *args)
    assert done.returncode == 0, done.stderr
    header, *rows = (line.split() for line in done.stdout.splitlines())
    assert header == paths
    table, speeds = {name: cells for name, *cells in rows}, {"tokens_per_second", "generation_tokens_per_second"}
    assert "peak_memory_bytes" not in table and "stride" not in table
    for i, path in enumerate(paths):
        compared = json.loads(Path(path, "metrics_summary.json").read_text())
        assert float(table["loss"][i]) == pytest.approx(compared["loss"], abs=6e-5)
        assert table["size_int8_bytes"][i] == f"{compared['size_int8_bytes']:,}"
        assert run("eval.py", f"--out_dir={path}", *args).returncode == 0
        alone = json.loads(Path(path, "metrics_summary.json").read_text())
        assert alone.pop("peak_memory_bytes") > 1e7 and compared.pop("peak_memory_bytes") is None
        assert alone | dict.fromkeys(speeds) == compared | dict.fromkeys(speeds)


@pytest.mark.parametrize("args, says", [
    (["--split=test"], "split must be train or val of"),
    (["--split="], "split must be train or val of"),
    (["--batching=random"], "batching must be 'windows' or 'by_length'"),
    (["--stride=-1"], "stride must be at least 0"),
    (["--stride=32"], "stride must be at least 1 and below block_size (32), got 32"),
    (["--stride=8", "--batching=by_length"], "stride needs batching='windows'"),
    (["--continuations=-1"], "continuations must be at least 0"),
    (["--prompt_tokens=0"], "prompt_tokens must be at least 1"),
    (["--max_new_tokens=0"], "max_new_tokens must be at least 1"),
    (["--temperature=-1"], "temperature must not be negative"),
    (["--compare=out-of-nowhere"], "there is no run out-of-nowhere"),
])
def test_eval_errors_are_one_line(trained, args, says):
    assert says in one_line_error(run("eval.py", f"--out_dir={trained}", *args))


def test_continuations_name_the_packages_that_they_take(trained, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['rouge_score'] = None\n")  # as if it were not there
    done = run("eval.py", f"--out_dir={trained}", "--continuations=2", PYTHONPATH=str(tmp_path))
    assert "pip install rouge-score sacrebleu" in one_line_error(done)


# -----------------------------------------------------------------------------
# Benchmark

BENCH = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2", "--vocab_size=50", "--rounds=3",
         "--steps=2", "--compile=False", "--device=cpu", "--dtype=float32"]


def test_bench_beside_another_model(tmp_path):
    (tmp_path / "model.py").write_text((HERE / "model.py").read_text())
    done = run("bench.py", *BENCH, f"--against={tmp_path}/model.py")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["ratio"] == pytest.approx(result["tokens_per_second"] / result["their_tokens_per_second"])
    assert result["tokens_per_second"] > 0 and result["mfu"] > 0 and not result["compiled"]
    assert result["parameters"] == 16 * (50 + 16) + 12 * 16 * 16 + 13 * 16 + 2 * 16
    assert "ratio" not in json.loads(run("bench.py", *BENCH).stdout.strip().splitlines()[-1])


def test_bench_beside_transformers():
    done = run("bench.py", *BENCH, "--against=hf")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["their_tokens_per_second"] > 0


def test_bench_of_batches(fables_data):
    for batching, some in (("windows", False), ("by_length", True)):
        done = run("bench.py", *BENCH, "--block_size=192", "--mode=data", f"--dataset={fables_data}",
                   f"--batching={batching}")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.strip().splitlines()[-1])
        assert result["tokens_per_second"] > 0 and (0 < result["padding"] < 0.5) == some


def test_bench_of_the_way_to_a_loss(tmp_path, fables_data):
    """The peer is our own model with a rate of zero: it stays where it began, and we reach that at the first evaluation."""
    (tmp_path / "model.py").write_text((HERE / "model.py").read_text())
    (tmp_path / "theirs.py").write_text("learning_rate = min_lr = 0.0\nmax_iters = 6\n")
    done = run("bench.py", *BENCH, "--mode=loss", f"--dataset={fables_data}", f"--against={tmp_path}/model.py", "--seeds=2",
               f"--their_config={tmp_path}/theirs.py", "--max_iters=4", "--eval_interval=2", "--arch=qwen3", "--tied=False",
               "--optimizer=muon", "--learning_rate=0.01", "--warmup_iters=0", "--gradient_accumulation_steps=1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    ours, theirs = result["ours"], result["theirs"]
    assert theirs["final_loss"][0] == result["target_loss"] == pytest.approx(
        math.log(load_meta(fables_data)["vocab_size"]), abs=0.1)
    assert ours["reached"] == theirs["reached"] == 2 and ours["final_loss"][0] < theirs["final_loss"][0]
    assert ours["tokens"][0] == 2 * 2 * 16 and theirs["tokens"] == [6 * 2 * 16, 0]
    assert result["ratio"] == pytest.approx(ours["seconds"][0] / theirs["seconds"][0])


def test_bench_of_generation(tmp_path):
    (tmp_path / "model.py").write_text((HERE / "model.py").read_text())
    for against in (f"{tmp_path}/model.py", "hf"):
        done = run("bench.py", *BENCH, "--mode=generate", f"--against={against}", "--rounds=1", "--max_new_tokens=11",
                   "--texts=1,3")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.strip().splitlines()[-1])
        for texts in (1, 3):
            row = result[f"batch_{texts}"]
            assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["their_tokens_per_second"])
            assert row["int8_ratio"] == pytest.approx(row["int8_tokens_per_second"] / row["their_tokens_per_second"])
            assert row["weights_read_per_second"] == pytest.approx(4 * result["parameters"] * row["tokens_per_second"] / texts)


def test_bench_of_a_trained_models_generation(trained):
    """Its shape decides about everything: the peer's, the prompt, the parameters."""
    done = run("bench.py", *BENCH, "--mode=generate", f"--run={trained}", "--against=hf", "--rounds=1", "--max_new_tokens=11",
               "--texts=1")
    assert done.returncode == 0 and "8 + 11 tokens" in done.stdout, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["parameters"] == load_model(trained, "cpu")[0].num_params()


def test_bench_takes_training_configs(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("dataset = 'fables'\nlearning_rate = 1e-3\nn_embd = 8\nmax_iters = 5\n")
    done = run("bench.py", *BENCH, str(config))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["parameters"] == 8 * (50 + 16) + 12 * 8 * 8 + 13 * 8 + 2 * 8


def plan(*args: str) -> dict:
    done = run("bench.py", "--mode=plan", "--device=cpu", "--dtype=float32", "--loss_chunk=0", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"text": done.stdout}


@pytest.mark.parametrize("shape, training", [
    (dict(n_embd=96, vocab_size=300), dict()),
    (dict(n_embd=96, vocab_size=300, dropout=0.1, bias=False), dict(gradient_accumulation_steps=2)),
    (dict(n_embd=96, vocab_size=9000), dict(loss_chunk=256, optimizer="muon")),
    (dict(n_embd=96, vocab_size=65, n_layer=8), dict(remat=True)),
    (dict(n_embd=192, vocab_size=20), dict(batch_size=1, block_size=32, optimizer="muon")),
    (dict(arch="qwen3", n_embd=96, vocab_size=300, n_kv_head=1, dropout=0.1), dict()),
    (dict(arch="qwen3", n_embd=96, vocab_size=2000), dict(softmax_words=600, optimizer="muon")),
    (dict(arch="qwen3", n_embd=96, vocab_size=9000, tied=False), dict(batch_size=1, gradient_accumulation_steps=2)),
], ids=["gpt2", "dropout", "loss_chunk", "remat", "muon", "qwen3", "softmax_words", "untied"])
def test_plan_of_memory_beside_what_torch_allocates(shape, training):
    """The largest sum of allocations less what is freed, over a second step, as torch's allocator itself records them."""
    shape = dict(arch="gpt2", n_layer=3, n_head=3, n_kv_head=0, dropout=0.0, bias=True, tied=True, block_size=64) | shape
    training = dict(batch_size=8, gradient_accumulation_steps=1, loss_chunk=0, softmax_words=0, remat=False,
                    optimizer="adamw") | training
    shape["block_size"] = training.pop("block_size", shape["block_size"])
    B, accumulation = training["batch_size"], training["gradient_accumulation_steps"]
    model = GPT(GPTConfig(**shape)).train()
    model.remat, model.loss_chunk = training["remat"], training["loss_chunk"]
    model.sample_softmax(training["softmax_words"], torch.zeros(shape["vocab_size"]))
    optimizers = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu", training["optimizer"])
    x = torch.randint(shape["vocab_size"], (B, shape["block_size"]))

    def step() -> None:
        for _ in range(accumulation):
            _, loss = model(x, x)
            loss.backward()
        for o in optimizers:
            o.step()
        model.zero_grad(set_to_none=True)

    step()
    states = [t for o in optimizers for state in o.state.values() for t in state.values()]
    alive = peak = sum(4 * t.numel() for t in [*model.parameters(), *states])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        alive += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, alive)
    planned = plan(*(f"--{k}={v}" for k, v in (shape | training).items()))
    assert planned["memory_bytes"] == pytest.approx(peak, rel=0.15)
    assert planned["weights_bytes"] == planned["gradients_bytes"] == 4 * model.num_params()
    assert planned["optimizer_bytes"] == pytest.approx(sum(4 * t.numel() for t in states), rel=0.01)


def test_plan_of_time_and_batches():
    shape = dict(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=500)
    args = [*(f"--{k}={v}" for k, v in shape.items()), "--batch_size=8", "--gradient_accumulation_steps=3"]
    model = GPT(GPTConfig(**shape))
    planned = plan(*args, "--gpu=rtx 3060", "--mfu=0.5", "--max_iters=7")
    assert planned["parameters"] == model.num_params() and planned["tokens"] == 7 * 24 * 64
    assert planned["parameters_non_embedding"] == model.num_params(non_embedding=True)
    assert planned["flops"] == 7 * 24 * 64 * model.flops_per_token() and planned["fits"] is None
    assert planned["seconds"] == pytest.approx(planned["flops"] / (0.5 * 25e12))
    assert plan(*args, "--tokens=1e6")["flops"] == 1e6 * model.flops_per_token()

    limit = plan(*args, "--batch_size=6", "--gradient_accumulation_steps=4")["with_runtime_bytes"]
    planned = plan(*args, f"--device_memory={limit}")
    assert not planned["fits"] and (planned["batch_size"], planned["gradient_accumulation_steps"]) == (6, 4)
    for B, fits in ((6, True), (8, False)):
        again = plan(*args, f"--batch_size={B}", f"--gradient_accumulation_steps={24 // B}", f"--device_memory={limit} b")
        assert again["fits"] == fits and again["batch_size"] == 6 and again["with_runtime_bytes"] > again["memory_bytes"]
    assert plan(*args, "--device_memory=1 GB")["batch_size"] == 24
    assert plan(*args, "--device_memory=1GiB", "--softmax_words=512")["batch_size"] == 8  # a target is one of those words
    nothing = plan(*args, "--device_memory=100MB")
    assert nothing["batch_size"] is None and "try --loss_chunk=256, --remat=True, a smaller --block_size" in nothing["text"]


@pytest.mark.parametrize("args, says", [
    (["--against=nowhere.py"], "no file nowhere.py"), (["--against=tokenizer.py"], "not a model.py with GPT"),
    (["--steps=0"], "steps must"), (["--mode=speed"], "mode must"), (["--optimizer=sgd"], "optimizer must"),
    (["--schedule=step"], "schedule must"), (["--dtype=int8"], "dtype must"), (["--mode=data", "--dataset=none"], "none"),
    (["--n_head=3"], "multiple of n_head"), (["--patience=1"], "no setting 'patience'"),
    (["--their_config=none.py"], "no such config file"), (["--mode=generate", "--max_new_tokens=12"], "must fit behind"),
    (["--run=out"], "run is for --mode=generate"), (["--mode=generate", "--run=none"], "no checkpoint in none"),
    (["--texts=1;8"], "texts takes numbers"), (["--texts=0"], "texts takes numbers"),
    (["--mode=plan", "--device_memory=4XB"], "such as 4GB"), (["--mode=plan", "--device_memory=0"], "such as 4GB"),
    (["--mode=plan", "--device_memory=-1GB"], "such as 4GB"), (["--mode=plan", "--gpu=T5"], "one of T4, V100"),
    (["--mode=plan", "--mfu=1.1"], "mfu must"), (["--mode=plan", "--tokens=-1"], "tokens must"),
])
def test_bench_errors_are_one_line(args, says):
    assert says in one_line_error(run("bench.py", *BENCH, *args))
