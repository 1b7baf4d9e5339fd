"""sample.py: prompts, samples, errors, and text that is streamed."""
import ast
import json
from types import SimpleNamespace

import pytest
import torch

from helpers import one_line_error, run, train
from sample import stream_text
from lib.tokenizer import EOT, ListTokenizer, gpt2_tokenizer


def say_by_heart(tokenizer, texts: list[str]):
    """A stand-in for a model that continues row by row with these texts, whatever it is asked, and ends each."""
    rows = [tokenizer.encode(text) + [tokenizer.eot] for text in texts]

    def stream(idx, max_new_tokens, **how):
        for n in range(min(max_new_tokens, max(map(len, rows)))):
            yield torch.tensor([(row + [tokenizer.eot] * max_new_tokens)[n] for row in rows])

    return SimpleNamespace(device="cpu", stream=stream)


def test_streamed_text_grows_by_whole_characters():
    tokenizer = gpt2_tokenizer()
    texts = ["h\u00e9llo \U0001f642 w\u00f6rld \u4f60\u597d", "short"]
    steps = list(stream_text(say_by_heart(tokenizer, texts), tokenizer, ["a", "b c d"], 100))
    assert [text for text, _ in steps[-1]] == texts and all(ended for _, ended in steps[-1])
    for (before, ended), (after, _) in zip((step[0] for step in steps), (step[0] for step in steps[1:])):
        assert after.startswith(before) and "\ufffd" not in before and not ended
    cut = list(stream_text(say_by_heart(tokenizer, texts), tokenizer, ["a", "b"], 3))[-1]
    assert cut[0][1] and cut[1] == ("short", True)


@pytest.mark.parametrize("stop, left", [
    ("lo w", "hel"), ("o", "hell"), ("xyz", "hello worlds"), ("hello", ""), ("lds", "hello wor"),
    ("lo v||wo", "hello "), ("wo||o", "hell"), ("||", "hello worlds"),
])
def test_stop_texts_are_not_shown(stop, left):
    tokenizer = ListTokenizer("char", [EOT, *"abcdefghijklmnopqrstuvwxyz "])
    steps = [step[0][0] for step in stream_text(say_by_heart(tokenizer, ["hello worlds"]), tokenizer, ["a"], 100, stop)]
    assert steps[-1] == left and all(left.startswith(text) for text in steps)


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
