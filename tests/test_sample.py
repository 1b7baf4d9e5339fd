"""sample.py: streamed text, stop texts, prompts and errors."""
import ast
import json
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import one_line_error, run, tiny, train
from lib.checkpoint import load_model
from lib.decoding import Sampling
from lib.tokenizer import EOT, ListTokenizer, gpt2_tokenizer
from sample import check_prompt, generate_text, stream_text


def error_of(done) -> str:
    """Return the error line of a run, before which the line about the model may stand."""
    done.stderr = re.sub(r"\Amodel: .*\n", "", done.stderr)
    return one_line_error(done)


def reciter(tokenizer, texts: list[str]):
    """Return a stand-in for a model that continues row i with texts[i], whatever the prompt."""
    rows = [tokenizer.encode(text) + [tokenizer.eot] for text in texts]

    def stream(idx, max_new_tokens, sampler, **how):
        for n in range(min(max_new_tokens, max(map(len, rows)))):
            yield torch.tensor([(row + [tokenizer.eot] * max_new_tokens)[n] for row in rows])

    return SimpleNamespace(device="cpu", stream=stream)


def steps_of(tokenizer, texts: list[str], prompts: list[str], n: int, stop: str = "") -> list:
    """Return all steps of stream_text with a model that recites texts."""
    model = reciter(tokenizer, texts)
    return list(stream_text(model, tokenizer, prompts, n, Sampling(), stop))


def test_streamed_text_grows_by_whole_characters():
    tokenizer = gpt2_tokenizer()
    texts = ["h\u00e9llo \U0001f642 w\u00f6rld \u4f60\u597d", "short"]
    steps = steps_of(tokenizer, texts, ["a", "b c d"], 100)
    assert [row.text for row in steps[-1]] == texts and all(row.ended for row in steps[-1])
    for (before, *_), (after, *_) in zip(steps, steps[1:]):
        assert after.text.startswith(before.text)
        assert "\ufffd" not in before.text and not before.ended
    for row, prompt, text in zip(steps[-1], ["a", "b c d"], texts):
        ids = [tokenizer.eot, *tokenizer.encode(prompt), *tokenizer.encode(text)]
        assert row.tokens == ids
    cut = steps_of(tokenizer, texts, ["a", "b"], 3)[-1]
    assert cut[0].ended and cut[1][:2] == ("short", True)


@pytest.mark.parametrize("stop, left", [
    ("lo w", "hel"), ("o", "hell"), ("xyz", "hello worlds"), ("hello", ""), ("lds", "hello wor"),
    ("lo v||wo", "hello "), ("wo||o", "hell"), ("||", "hello worlds"),
])
def test_stop_texts_are_not_shown(stop, left):
    tokenizer = ListTokenizer("char", [EOT, *"abcdefghijklmnopqrstuvwxyz "])
    steps = [row.text for row, in steps_of(tokenizer, ["hello worlds"], ["a"], 100, stop)]
    assert steps[-1] == left and all(left.startswith(text) for text in steps)


def test_a_text_in_which_no_token_is_allowed_ends():
    tokenizer = ListTokenizer("char", [EOT, *"abcd"])
    sampler = Sampling(no_repeat_ngram=1)
    steps = stream_text(tiny(vocab_size=5), tokenizer, ["a", "bc"], 99, sampler)
    texts = [(sorted(row.text), row.ended) for row in list(steps)[-1]]
    assert texts == [(["b", "c", "d"], True), (["a", "d"], True)]


# -----------------------------------------------------------------------------
# Vocabularies without end-of-text or <UNK>

def nanogpt_run(folder: Path, vocab: str):
    """Write a random nanoGPT checkpoint for characters and return its model."""
    model = tiny(vocab_size=len(vocab), gelu="none")
    args = dict(n_layer=2, n_head=4, n_embd=32, block_size=32, bias=True, dropout=0.0,
                vocab_size=len(vocab))
    torch.save({"model": model.state_dict(), "model_args": args, "iter_num": 7,
                "config": {"dataset": "bard"}}, folder / "ckpt.pt")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(vocab))}))
    return model


@pytest.mark.parametrize("vocab, start", [("ab \n", 3), ("ab c", 2), ("abcd", 0)])
def test_an_empty_prompt_starts_from_a_newline_without_end_of_text(tmp_path, vocab, start):
    ids = nanogpt_run(tmp_path, vocab).generate(torch.tensor([[start]]), 9, temperature=0)
    text = "".join(vocab[i] for i in ids[0, 1:])
    assert generate_text("", 9, temperature=0, out_dir=str(tmp_path), device="cpu") == text
    args = [f"--out_dir={tmp_path}", "--temperature=0", "--max_new_tokens=9"]
    done = run("sample.py", *args, "--num_samples=1")
    assert done.returncode == 0 and done.stdout == f"{text}\n{'-' * 80}\n", done.stderr
    assert run("sample.py", *args, "--num_beams=1").stdout == text + "\n"


def test_a_start_of_newlines_can_be_typed(tmp_path):
    nanogpt_run(tmp_path, "ab \n\\")
    args = [f"--out_dir={tmp_path}", "--temperature=0", "--max_new_tokens=9", "--num_samples=1"]
    for start, prompt in ((r"\n", "\n"), (r"\n\n", "\n\n"), (r"\a", r"\a")):
        text = generate_text(prompt, 9, temperature=0, out_dir=str(tmp_path), device="cpu")
        done = run("sample.py", *args, f"--start={start}")
        assert done.stdout == f"{text}\n{'-' * 80}\n" and text.startswith(prompt), done.stderr


def test_an_error_after_some_text_begins_a_line(tmp_path):
    nanogpt_run(tmp_path, "abcd")
    args = [f"--out_dir={tmp_path}", "--num_samples=1", "--start=a", "--no_repeat_ngram=1"]
    done = run("sample.py", *args)
    assert "no_repeat_ngram=1 excludes every token" in error_of(done)
    assert sorted(done.stdout) == sorted("abcd\n") and done.stdout.endswith("\n")


def test_an_error_about_unknown_words_shows_a_prompt_that_works(trained):
    def shown(message: str) -> str:
        says, _, works = message.partition("; a prompt that works: ")
        assert says.endswith("the vocabulary does not have the words ' Qwertyuiop' of the prompt")
        return json.loads(works)

    out = f"--out_dir={trained}"
    works = shown(error_of(run("sample.py", out, "--start=Once Qwertyuiop")))
    with pytest.raises(ValueError) as error:
        generate_text("Once Qwertyuiop", out_dir=str(trained), device="cpu")
    assert works and shown(str(error.value)) == works
    args = [out, f"--start={works}", "--num_samples=1", "--max_new_tokens=1"]
    assert run("sample.py", *args).stdout.startswith(works)


@pytest.mark.parametrize("ids, works", [
    ([1, 2, 3], "the fox"), ([3, 1], "the"), ([2, 3], r" fox\n"), ([2, 1], " fox"), ([3, 3], r"\n"),
    ([], ""),
])
def test_a_prompt_that_works_has_only_known_words(ids, works):
    """The pieces "fox", " foxthe" and two line ends are unknown."""
    tokenizer = ListTokenizer("pieces", [EOT, "the", " fox", "\n"])
    columns = torch.tensor([*ids, 0])[:, None]
    model = SimpleNamespace(device="cpu", stream=lambda *args, **how: columns)
    with pytest.raises(ValueError) as error:
        check_prompt(model, tokenizer, "zebra")
    assert str(error.value).endswith(f'the prompt; a prompt that works: "{works}"')


@pytest.mark.parametrize("name, says", [
    ("max_tokens", "did you mean max_length?"), ("max_new_tokens", "did you mean max_length?"),
    ("topk", "did you mean top_k?"), ("num_samples", "it has prompt, max_length, temperature"),
])
def test_unknown_arguments_of_generate_text_are_named(name, says):
    with pytest.raises(TypeError) as error:  # before a model is loaded
        generate_text("Once", out_dir="nowhere", **{name: 5})
    assert str(error.value).startswith(f"generate_text has no argument {name!r}; {says}")


# -----------------------------------------------------------------------------
# The command line

@pytest.mark.parametrize("args, says", [
    (["--start=Qwertyuiop"], "does not have the words 'Qwertyuiop'"),
    (["--start=FILE:nowhere.txt"], "nowhere.txt"),
    (["--temperature=-1"], "temperature must be at least 0"),
    (["--num_samples=0"], "num_samples must be at least 1"),
    (["--top_k=-1"], "top_k must be at least 0"),
    (["--top_p=0"], "top_p must be above 0"),
    (["--min_p=2"], "min_p must be from 0 to 1"),
    (["--repetition_penalty=0"], "repetition_penalty must be above 0"),
    (["--no_repeat_ngram=-2"], "no_repeat_ngram must be at least 0"),
    (["--num_beams=-1"], "num_beams must be at least 0"),
    (["--num_beams=3", "--start=Once" + " upon a time" * 40], "room for the prompt"),
    (["--quantize=int4"], "quantize must be int8"),
    (["--temperature=nan"], "temperature takes float"),
    (["--top_p=1.5"], "top_p must be above 0"),
    (["--max_new_tokens=0"], "max_new_tokens must be at least 1"),
    (["--next_token=-1"], "next_token must be at least 0"),
])
def test_bad_input_is_one_line(trained, args, says):
    assert says in error_of(run("sample.py", f"--out_dir={trained}", *args))


def test_a_prompt_that_is_not_text(tmp_path, trained):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe\x00")
    done = run("sample.py", f"--out_dir={trained}", f"--start=FILE:{tmp_path}/prompt")
    assert "not UTF-8" in error_of(done)


def test_a_prompt_longer_than_the_context_is_read_from_its_end(tmp_path, trained):
    story = "Once upon a time" + " upon a time" * 900_000  # 10 MB
    (tmp_path / "prompt.txt").write_text(story)
    args = [f"--out_dir={trained}", "--temperature=0"]
    start, short = f"--start=FILE:{tmp_path}/prompt.txt", ["--num_samples=1", "--max_new_tokens=1"]
    done = run("sample.py", *args, start, *short)
    assert done.returncode == 0 and done.stdout.startswith(story), done.stderr[-500:]
    rows = run("sample.py", *args, start, "--next_token=1").stdout
    assert done.stdout[len(story):].startswith(ast.literal_eval(rows.split("%", 1)[1].strip()))
    for empty in ([], ["--start="], ["--start=-"]):
        done = run("sample.py", *args, *empty, "--num_samples=1", "--max_new_tokens=3")
        assert done.returncode == 0


def test_samples_begin_with_the_prompt_and_repeat(trained, tmp_path):
    prompt = "Once upon a time"
    (tmp_path / "prompt.txt").write_text(prompt)
    # longer than the context of 32
    args = [f"--out_dir={trained}", "--num_samples=2", "--max_new_tokens=40"]
    first = run("sample.py", *args, f"--start={prompt}")
    assert first.returncode == 0, first.stderr
    samples = first.stdout.split("-" * 80 + "\n")
    assert len(samples) == 3 and samples[0] != samples[1]
    assert all(sample.startswith(prompt) for sample in samples[:2])
    assert run("sample.py", *args, f"--start=FILE:{tmp_path}/prompt.txt").stdout == first.stdout
    assert run("sample.py", *args, f"--start={prompt}", "--seed=2").stdout != first.stdout


def test_words_are_joined_by_spaces_and_unknown_ones_are_named(tmp_path):
    story = "the fox saw a hare. it said, \"hello!\" and ran"
    (tmp_path / "story.txt").write_text("\n<|endoftext|>\n".join([story] * 40))
    done = run("data/text/prepare.py", f"--source={tmp_path}/story.txt", "--tokenizer=word",
               f"--out_dir={tmp_path}/data")
    assert done.returncode == 0, done.stderr
    train(tmp_path / "data", tmp_path / "out", "--batching=by_length", "--max_iters=60",
          "--learning_rate=0.02", "--min_lr=0.02", "--dropout=0", "--n_embd=32")
    out = f"--out_dir={tmp_path}/out"
    done = run("sample.py", out, "--temperature=0", "--num_samples=1", "--start=The fox saw")
    assert done.stdout.startswith("The fox saw" + story[11:] + "\n---")
    assert "does not have" not in done.stderr
    done = run("sample.py", out, "--num_beams=2", "--start=The fox ate", "--max_new_tokens=12")
    assert done.stdout.startswith("The fox ate ")
    assert "warning: the vocabulary does not have the words 'ate' of the prompt" in done.stderr
    done = run("eval.py", out)
    summary = json.loads((tmp_path / "out/metrics_summary.json").read_text())
    assert summary["bits_per_byte"] is None and summary["unknown_share"] == 0
    assert summary["loss"] < 0.2


def test_prompts_typed_in_or_piped_and_next_tokens(trained):
    args = [f"--out_dir={trained}", "--num_samples=1", "--max_new_tokens=4", "--temperature=0"]
    sample = run("sample.py", *args, "--start=Once upon").stdout
    assert run("sample.py", *args, "--start=-", stdin="Once upon").stdout == sample
    unix, windows = (run("sample.py", *args, "--start=-", stdin=stdin)
                     for stdin in ("Once upon\n\n", "\ufeffOnce upon\r\n\r\n"))
    assert unix.returncode == 0 and unix.stdout == windows.stdout
    stdin = "Once upon\nQwertyuiop\nOnce upon\n"
    typed = run("sample.py", *args[:1], *args[2:], "--interactive=True", stdin=stdin)
    text, line = sample.splitlines()
    how, *answers, end = typed.stdout.split("prompt> ")
    assert "Ctrl-C" in how and "Ctrl-D (on Windows Ctrl-Z and Enter)" in how
    assert answers == [f"{text}\n", "", f"{text}\n"] and end == "\n"
    model, error = typed.stderr.splitlines()  # the model is named once
    assert model.startswith(f"model: {trained}/best.pt, step 6, ")
    assert "does not have the words 'Qwertyuiop'" in error
    typed = run("sample.py", *args[:1], *args[2:], "--interactive=True", "--num_samples=2",
                stdin="Once upon\n")
    assert typed.stdout.split("prompt> ")[1] == f"{text}\n{line}\n{text}\n"
    best = run("sample.py", *args, "--start=Once upon", "--num_beams=1").stdout
    assert best == sample.splitlines(keepends=True)[0]
    rows = run("sample.py", *args, "--start=Once upon", "--next_token=5000").stdout.splitlines()
    shares = [float(row.split("%")[0]) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.01 * len(rows))
    assert sample.startswith("Once upon" + ast.literal_eval(rows[0].split("%", 1)[1].strip()))


def test_the_model_is_named_on_standard_error(trained, tmp_path):
    args = ["--num_samples=1", "--max_new_tokens=2"]

    def model_line(out_dir: Path, *more: str) -> str:
        done = run("sample.py", f"--out_dir={out_dir}", *args, *more)
        assert done.returncode == 0 and "model: " not in done.stdout, done.stderr
        model, speed = done.stderr.splitlines()
        assert re.fullmatch(r"\d tokens?, [\d,]+ tokens/s", speed)
        return model

    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    n = load_model(trained, "cpu")[0].num_params()
    loss = checkpoint["best_val_loss"]
    fables = f"step 6, {n:,} parameters, trained on fables"
    line = f"model: {trained}/best.pt, {fables}, validation loss {loss:.4f}"
    assert model_line(trained) == line
    # the loss is that of the float32 weights of best.pt
    int8 = fables.replace(" parameters", " parameters in int8")
    assert model_line(trained, "--quantize=int8") == f"model: {trained}/best.pt, {int8}"
    shutil.copy(trained / "last.pt", tmp_path / "step_000006.pt")
    assert model_line(tmp_path / "step_000006.pt") == f"model: {tmp_path}/step_000006.pt, {fables}"
    nanogpt_run(tmp_path, "ab c")
    n = tiny(vocab_size=4).num_params()
    expected = f"model: {tmp_path}/ckpt.pt, step 7, {n:,} parameters, trained on bard"
    assert model_line(tmp_path) == expected


def test_generate_text_prints_nothing(trained, capfd):
    generate_text("Once upon", 2, out_dir=str(trained), device="cpu")
    assert capfd.readouterr() == ("", "")
