"""eval.py against plain computations, Hugging Face's perplexity, rouge-score and sacrebleu."""
import contextlib
import copy
import importlib.util
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
from eval import (
    compare_texts,
    distinct,
    last_word_metrics,
    leading_texts,
    repetition,
    score,
    sizes,
    token_metrics,
)
from helpers import export, one_line_error, run, train
from lib.checkpoint import load_model, model_from_weights
from lib.convert import from_hf
from lib.corpus import load_meta
from lib.dataset import TokenStream, eval_batches
from lib.quantize import quantize_int8
from lib.tokenizer import EOT, UNK, get_tokenizer
from model import GPT, GPTConfig


def printed_metrics(stdout: str) -> dict[str, str]:
    """Return what eval.py prints as `name  value`, without the names of groups."""
    return dict(re.findall(r"^ *(\S+(?: \S+)*)  +(\S.*)$", stdout, re.MULTILINE))


def read_summary(folder: Path) -> dict:
    return json.loads((folder / "metrics_summary.json").read_text())


@pytest.mark.parametrize("batching", ["windows", "by_length"])
def test_metrics_equal_a_plain_computation(trained, fables_data, tmp_path, batching):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    args = [f"--batching={batching}", "--valid_samples=5", "--dtype=float32", "--batch_size=3"]
    done = run("eval.py", f"--out_dir={out}", *args)
    assert done.returncode == 0, done.stderr
    summary = read_summary(out)

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
            context = [target]  # nothing predicts the first token
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
    total = loss * len(ids)
    expected = dict(tokens=n, loss=loss, perplexity=math.exp(loss), accuracy=top1 / n,
                    accuracy_top5=top5 / n, bits_per_byte=total / math.log(2) / counts["bytes"],
                    bits_per_char=total / math.log(2) / counts["characters"],
                    word_perplexity=math.exp(total / counts["words"]))
    for key, value in expected.items():
        assert summary[key] == pytest.approx(value, rel=1e-4), key
    assert summary["floor"] == (meta["floor"] if batching == "by_length" else None)
    assert summary["valid_share"] == 0.0
    printed = printed_metrics(done.stdout)
    assert ("above the floor" in printed) == ("floor" in printed) == (batching == "by_length")
    assert printed["loss"] == f"{loss:.4f} nats per token"
    assert printed["perplexity"] == f"{math.exp(loss):.2f}"
    assert printed["top-5 accuracy"] == f"{top5 / n:.1%}"
    assert printed["valid fables"] == "0.0% of the samples"
    assert printed["in int8"] == f"{summary['size_int8_bytes'] / 1e6:.2f} MB"
    if batching == "by_length":
        assert summary["above_floor"] == pytest.approx(loss / meta["floor"] - 1, rel=1e-4)
        assert printed["above the floor"] == f"{summary['above_floor']:.1%}"
    how = {"windows": "windows", "by_length": "one document per row"}[batching]
    assert printed["model"] == f"{out}/best.pt, step 6"
    assert printed["data"] == f"fables, val split, {n:,} tokens, {how}"
    assert printed["results"] == f"{out}/metrics_summary.json"
    assert not {"ROUGE-1", "unknown tokens", "continuations"} & set(printed)
    assert summary["parameters"] == model.num_params() and summary["peak_memory_bytes"] > 1e7
    assert summary["step"] == checkpoint["step"] and summary["dataset"] == "fables"
    assert summary["generation_tokens_per_second"] > 1
    assert summary["rouge1"] is summary["stride"] is None
    settings = f"settings: out_dir={out}, batching={batching}, batch_size=3, valid_samples=5, "
    assert " ".join(done.stdout.split()).startswith(settings + f"dtype=float32 measuring {out}")


def test_a_model_that_knows_its_fable_is_valid(tmp_path):
    """A model of one story has no loss, and every sample is that story."""
    done = run("data/fables/prepare.py", f"--out_dir={tmp_path}/one", "--train_stories=1",
               "--val_stories=1")
    assert done.returncode == 0, done.stderr
    shutil.copy(tmp_path / "one/train.bin", tmp_path / "one/val.bin")  # validate on the story
    meta = json.loads((tmp_path / "one/meta.json").read_text())
    meta["splits"]["val"] = meta["splits"]["train"]
    (tmp_path / "one/meta.json").write_text(json.dumps(meta))
    train(tmp_path / "one", tmp_path / "out", "--batching=by_length", "--block_size=160",
          "--n_embd=64", "--dropout=0", "--batch_size=1", "--gradient_accumulation_steps=1",
          "--max_iters=300", "--eval_interval=300", "--learning_rate=0.01", "--min_lr=0.01",
          "--beta2=0.95", "--weight_decay=0")
    done = run("eval.py", f"--out_dir={tmp_path}/out", "--valid_samples=20")
    assert done.returncode == 0, done.stderr
    summary = read_summary(tmp_path / "out")
    assert summary["loss"] < 0.001 and summary["accuracy"] == 1.0 and summary["valid_share"] >= 0.9
    stream = TokenStream(tmp_path / "one", "train", meta)
    story = get_tokenizer(meta).decode(stream.read(0, len(stream) - 1).tolist())
    done = run("sample.py", f"--out_dir={tmp_path}/out", "--num_samples=1", "--temperature=0")
    assert done.stdout.startswith(story + "\n---")


def test_obeyed_are_the_fables_that_have_all_that_a_request_names(tmp_path, monkeypatch):
    """A stand-in answers with its own texts: of 6, 5 are fables and 3 have what was named."""
    from data.fables import prepare as fables

    args = ["--train_stories=20", "--val_stories=6", "--instruct=True"]
    done = run("data/fables/prepare.py", f"--out_dir={tmp_path}/chat", *args, "--tokenizer=char")
    assert done.returncode == 0, done.stderr
    meta = load_meta(tmp_path / "chat")
    stream, tokenizer = TokenStream(tmp_path / "chat", "val", meta), get_tokenizer(meta)
    prompts = evaluation.fable_prompts(stream, meta, 100)
    user = tokenizer.specials["<|user|>"]
    assert len(prompts) == 6 and {prompt[0] for prompt in prompts} == {user}
    named = [fables.named_facts(tokenizer.decode(prompt)) for prompt in prompts]
    answers = [tokenizer.decode(stream.read(*span).tolist()).removesuffix("<|end|>")
               for span in stream.answers]
    assert len(tokenizer.decode(prompts[0])) < len(max(map(tokenizer.decode, prompts), key=len))
    answers[3] = answers[4]  # a fable, for another request
    assert not named[3].items() <= fables.facts_of(answers[3]).items()
    slot, value = next(item for item in named[4].items() if item[0] in ("friend", "hero", "hobby"))
    answers[4] = next(text for text, _ in fables.write_stories("other", 9)
                      if fables.facts_of(text)[slot] != value)
    answers[5] += " The end."  # no fable

    def generate(idx, n, sampler, stop_token, pad):
        assert stop_token == meta["chat"]["end"] and sampler.temperature == 1
        assert [row[skip:] for row, skip in zip(idx.tolist(), pad.tolist())] == prompts
        rows = [[*tokenizer.encode(answer), stop_token] for answer in answers]
        length = max(map(len, rows))  # rows that have ended repeat the stop token
        rows = [row + [stop_token] * (length - len(row)) for row in rows]
        return torch.cat([idx, torch.tensor(rows)], dim=1)

    model = GPT(GPTConfig(block_size=2000, vocab_size=meta["vocab_size"], n_layer=1, n_head=1,
                          n_embd=8))
    monkeypatch.setattr(model, "generate", generate)
    shares = evaluation.fable_shares(model, tokenizer, prompts, meta["chat"]["end"])
    assert shares == {"valid_share": 5 / 6, "obeyed_share": 3 / 6}


def test_a_tuned_model_is_measured_on_answers(trained, tmp_path):
    done = run("data/fables/prepare.py", f"--out_dir={tmp_path}/chat", "--instruct=True",
               "--train_stories=60", "--val_stories=8", f"--tokenizer={trained}")
    assert done.returncode == 0, done.stderr
    train(tmp_path / "chat", tmp_path / "out", f"--init_from={trained}", "--batching=by_length",
          "--max_iters=2")
    done = run("eval.py", f"--out_dir={tmp_path}/out", "--valid_samples=3", "--dtype=float32")
    assert done.returncode == 0, done.stderr
    summary, meta = read_summary(tmp_path / "out"), load_meta(tmp_path / "chat")
    stream = TokenStream(tmp_path / "chat", "val", meta)
    assert summary["tokens"] <= sum(end - start for start, end in stream.answers)
    assert summary["floor"] == meta["floor"] < summary["loss"]
    assert summary["valid_share"] == summary["obeyed_share"] == 0
    assert summary["bits_per_byte"] is None  # the loss is not that of the whole text
    assert printed_metrics(done.stdout)["obeyed requests"] == "0.0% of the samples"


def test_another_tokenizer_is_an_error(trained, tmp_path):
    (tmp_path / "input.txt").write_text("abc " * 100)
    done = run("data/shakespeare_char/prepare.py", f"--source={tmp_path}/input.txt",
               f"--out_dir={tmp_path}/chars")
    assert done.returncode == 0, done.stderr
    done = run("eval.py", f"--out_dir={trained}", f"--dataset={tmp_path}/chars")
    assert "another tokenizer" in one_line_error(done)


@pytest.mark.parametrize("changes", [
    {}, dict(arch="qwen3", n_kv_head=1), dict(arch="qwen3", tied=False)])
def test_sizes_are_those_of_the_weights(changes):
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=8, **changes))
    states = [model.state_dict(), copy.deepcopy(model).bfloat16().state_dict(),
              quantize_int8(model.state_dict())]
    expected = [sum({w.data_ptr(): w.nbytes for w in state.values()}.values()) for state in states]
    assert list(sizes(model.config).values()) == expected


def hugging_face_model(block_size: int, vocab_size: int):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=vocab_size, n_positions=block_size, n_embd=8, n_layer=2,
                        n_head=2, initializer_range=0.5, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).eval()


def random_ids(n: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def sliding_perplexity(hf, ids: torch.Tensor, stride: int) -> tuple[float, int]:
    """Return nats and tokens, as on https://huggingface.co/docs/transformers/perplexity."""
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
    hf, ids = hugging_face_model(16, 50), random_ids(n, 50)
    ids.numpy().astype("<u2").tofile(tmp_path / "val.bin")
    config = GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=8)
    model = model_from_weights(config, from_hf(hf.state_dict(), config)).eval()
    batches = eval_batches(TokenStream(tmp_path, "val", {"splits": {}}), 16, 4, stride=stride)
    ours = score(model, batches, contextlib.nullcontext())
    nats, tokens = sliding_perplexity(hf, ids, stride)
    assert ours["tokens"] == tokens == n - 1
    assert ours["nats"] == pytest.approx(nats, rel=1e-5)


def test_a_hugging_face_folder_is_measured(tmp_path):
    hf, ids = hugging_face_model(16, 50257), random_ids(99, 50257)
    hf.save_pretrained(tmp_path / "hf")
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):  # as nanoGPT has them, without meta.json
        ids.numpy().astype("<u2").tofile(tmp_path / f"data/{name}.bin")
    args = [f"--out_dir={tmp_path}/hf", "--stride=6", "--dtype=float32"]
    error = one_line_error(run("eval.py", *args))
    assert "does not say what it was trained on: give --dataset" in error
    done = run("eval.py", *args, f"--dataset={tmp_path}/data")
    assert done.returncode == 0, done.stderr
    summary = read_summary(tmp_path / "hf")
    nats, tokens = sliding_perplexity(hf, ids, 6)
    assert (summary["tokens"], summary["stride"], summary["step"]) == (tokens, 6, 0)
    assert summary["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert summary["bits_per_byte"] is None


def test_metrics_without_a_value_are_none(trained, fables_data, tmp_path):
    """Huge losses, splits with other names, and vocabularies that do not have every word."""
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
    error = one_line_error(run("eval.py", *args, "--split=tset"))
    assert "split must be train or val or test of" in error
    done = run("eval.py", *args, "--split=test")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out/metrics_summary.json").read_text()
    summary = json.loads(text)
    assert summary["loss"] > 1000 and "Infinity" not in text
    assert summary["perplexity"] is summary["word_perplexity"] is None
    assert summary["bits_per_byte"] is summary["bits_per_char"] is None
    assert summary["split"] == "test"
    assert summary["unknown_share"] == 7 / meta["splits"]["val"]["tokens"]

    spec = {"kind": "word", "vocab": ["<UNK>", *meta["tokenizer"]["vocab"][1:]]}  # lower case only
    (tmp_path / "data/meta.json").write_text(json.dumps(meta | {"tokenizer": spec}))
    checkpoint["meta"] |= {"tokenizer": spec}
    torch.save(checkpoint, tmp_path / "out/best.pt")
    done = run("eval.py", *args)
    assert done.returncode == 0, done.stderr
    assert read_summary(tmp_path / "out")["bits_per_byte"] is None


def test_unknown_words_have_no_perplexity():
    sums = dict(nats=20.0, tokens=10, top1=1, top5=2)
    counts = dict(tokens=11, words=10, bytes=40, characters=40)
    for kind, unknown, measured in (("word", 0, True), ("word", 1, False), ("pieces", 0, True),
                                    ("pieces", 1, False)):
        metrics = token_metrics(sums, counts | {"unknown": unknown}, kind)
        assert metrics["word_perplexity"] == (pytest.approx(math.exp(2.2)) if measured else None)
        assert (metrics["bits_per_byte"] is None) == (kind == "word" or not measured)


def test_the_note_of_a_dataset_ends_the_summary(trained, fables_data, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    shutil.copytree(fables_data, tmp_path / "data")
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    (tmp_path / "data/meta.json").write_text(json.dumps(meta | {"note": "Words are counted so."}))
    args = [f"--out_dir={tmp_path}/out", "--valid_samples=0", "--eval_iters=1"]
    done = run("eval.py", *args, f"--dataset={tmp_path}/data")
    *summary, note = done.stdout.splitlines()  # the last line
    assert note == "Words are counted so." and note not in "".join(summary), done.stderr
    assert read_summary(tmp_path / "out")["note"] == note
    assert "None" not in run("eval.py", *args).stdout


def test_texts_to_continue(tmp_path):
    def leading(eot, length, n):
        stream = TokenStream(tmp_path, "val", {"splits": {}})
        return leading_texts(stream, eot, length, n).tolist()

    ids = np.arange(1, 104, dtype="<u2")
    ids.tofile(tmp_path / "val.bin")
    windows = [list(range(i, i + 10)) for i in (1, 21, 41, 61, 81)]
    assert leading(-1, 10, 5) == leading(0, 10, 5) == windows
    assert len(leading(-1, 10, 99)) == 10
    ids[[3, 16, 27, 38, 50]] = 0  # documents of 3, 12, 10, 10, 11 and, without an end, 52 tokens
    ids.tofile(tmp_path / "val.bin")
    starts = [4, 17, 28, 39, 51]
    assert leading(0, 10, 9) == [[0, *range(i + 1, i + 11)] for i in starts]
    assert [row[1] - 1 for row in leading(0, 10, 2)] == [4, 28]
    assert [row[1] - 1 for row in leading(0, 11, 9)] == [4, 39, 51]
    says = "no text of .* has prompt_tokens . max_new_tokens = 60 tokens"
    with pytest.raises(ValueError, match=says):
        leading(0, 60, 1)


def test_diversity_of_texts():
    assert distinct(["a b a b", "a c"], 1) == 3 / 6
    assert distinct(["a b a b", "a c"], 2) == 3 / 4  # ab ba ab ac
    texts = ["a b c d a b c d", "a b c d", "x"]  # abcd bcda cdab dabc abcd; abcd
    assert repetition(texts) == pytest.approx(1 / 6)
    assert distinct(["", "a"], 2) is repetition(["a b c"]) is None


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_last_words_are_those_of_greedy_decoding(tmp_path, tokenizer):
    if tokenizer == "bpe":
        pytest.importorskip("rustbpe")
    lines = [f"{name} had {n} pets.\n\n{name} liked the {animal}!\n"
             for name in ("Ann", "Bob", "Cy") for n in range(1, 9)
             for animal in ("cat", "dog")]  # at most half can be predicted
    (tmp_path / "train.txt").write_text(EOT.join(lines * 5))
    (tmp_path / "val.txt").write_text(EOT.join([*lines, "word", "Ann had 1 pets.\n\n" * 20]))
    done = run("data/text/prepare.py", f"--source={tmp_path}", f"--tokenizer={tokenizer}",
               f"--out_dir={tmp_path}/data", "--vocab_size=300")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    train(tmp_path / "data", out, "--batching=by_length", "--block_size=64", "--max_iters=80",
          "--eval_interval=80", "--learning_rate=0.02", "--min_lr=0.02")
    args = ["--batch_size=5", "--dtype=float32"]
    done = run("eval.py", f"--out_dir={out}", "--last_words=99", *args)
    assert done.returncode == 0, done.stderr
    summary, printed = read_summary(out), printed_metrics(done.stdout)

    model, tokenizer = load_model(out, "cpu")[0], get_tokenizer(load_meta(tmp_path / "data"))
    right = 0
    for line in lines:  # one at a time
        before, word = line.strip().rsplit(" ", 1)
        idx = torch.tensor([[tokenizer.eot, *tokenizer.encode(before)]])
        n = len(tokenizer.encode(f"{before} {word}")) - idx.size(1) + 1
        new = model.generate(idx, n, temperature=0)[0, idx.size(1):].tolist()
        right += tokenizer.decode(new) == f" {word}"
    assert 0 < right <= len(lines) / 2
    assert summary["last_words"] == len(lines)
    assert summary["last_word_accuracy"] == pytest.approx(right / len(lines))
    assert printed["last words"] == f"{len(lines)}"
    assert printed["last-word accuracy"] == f"{right / len(lines):.1%}"
    done = run("eval.py", f"--compare={out}", "--last_words=10", *args)  # measured again
    assert printed_metrics(done.stdout)["last words"] == "10", done.stderr


def test_last_words_of_a_model_with_known_answers(tmp_path, monkeypatch):
    """The model writes "ab ab ab ...", whatever came before."""
    tokenizer = get_tokenizer({"tokenizer": {"kind": "char", "vocab": [EOT, "a", "b", " ", UNK]}})
    following = torch.tensor([0, 2, 3, 1, 0])
    model = SimpleNamespace(config=SimpleNamespace(block_size=8), lm_head=torch.nn.Identity(),
                            hidden=lambda idx: torch.eye(5)[following[idx]])
    monkeypatch.setattr(evaluation, "device", "cpu")

    def measured(*texts: str, end: str = EOT) -> tuple[int, float]:
        ids = [i for text in texts for i in (*tokenizer.encode(text), 0)]
        np.array(ids if end else ids[:-1], dtype="<u2").tofile(tmp_path / "val.bin")
        stream = TokenStream(tmp_path, "val", {"splits": {}})
        metrics = last_word_metrics(model, stream, tokenizer, 9, contextlib.nullcontext())
        return metrics["last_words"], metrics["last_word_accuracy"]

    right, wrong = ("ab ab", "b ab", "bb a", " ab ab "), ("ba ab", "ab b", "ab abab", "b  ab")
    for text in right + wrong:
        assert measured(text) == (1, text in right), text
    assert measured(*right, *wrong) == (8, 0.5)
    # no two words, 9 tokens with its end, or an unknown letter
    skipped = "", " ", "ab", " ab ", "ab ab ab", "x ab"
    assert measured(*skipped, "b ab", "ba ab") == (2, 0.5)
    assert measured("b ab", "ba ab", end="") == (1, 1)  # the last document may be cut off
    with pytest.raises(ValueError, match="no document of .*val has two words and at most 8 tokens"):
        measured(*skipped)
    monkeypatch.setattr(tokenizer, "eot", -1)
    with pytest.raises(ValueError, match="has no end-of-text tokens"):
        measured("b ab")


def test_continuations(trained, fables_data, tmp_path):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    sacrebleu = pytest.importorskip("sacrebleu")
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    done = run("eval.py", f"--out_dir={out}", "--continuations=5", "--prompt_tokens=8",
               "--max_new_tokens=40", "--temperature=0", "--batch_size=2", "--valid_samples=0",
               "--eval_iters=1")
    assert done.returncode == 0, done.stderr
    summary = read_summary(out)
    pairs = [json.loads(line) for line in open(out / "continuations.jsonl", encoding="utf-8")]
    assert len(pairs) == summary["continuations"] == 5

    model, meta = load_model(out, "cpu")[0], load_meta(fables_data)
    tokenizer, stream = get_tokenizer(meta), TokenStream(fables_data, "val", meta)
    stories = tokenizer.decode(stream.read(0, len(stream)).tolist()).split("<|endoftext|>")
    for pair in pairs:  # one at a time
        assert any(story.startswith(pair["prompt"] + pair["reference"]) for story in stories)
        prompt = [tokenizer.eot, *tokenizer.encode(pair["prompt"])]
        assert (len(prompt), len(tokenizer.encode(pair["reference"]))) == (9, 40)
        idx = torch.tensor([prompt])
        ids = model.generate(idx, 40, temperature=0, stop_token=tokenizer.eot)[0, 9:].tolist()
        assert tokenizer.decode([i for i in ids if i != tokenizer.eot]) == pair["continuation"]

    texts = [pair["continuation"] for pair in pairs]
    references = [pair["reference"] for pair in pairs]
    for key in ("rouge1", "rouge2", "rougeL"):
        scorer = rouge_scorer.RougeScorer([key])
        scores = [scorer.score(target=target, prediction=text)[key].fmeasure
                  for target, text in zip(references, texts)]
        assert summary[key] == pytest.approx(sum(scores) / 5), key
    bleu = sacrebleu.BLEU().corpus_score(texts, [references]).score
    assert summary["bleu"] == pytest.approx(bleu)
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
    table = printed_metrics(done.stdout)
    assert re.search("^ +out +out-int8$", done.stdout, re.MULTILINE)
    assert done.stderr == ""
    speeds = dict.fromkeys(["tokens_per_second", "generation_tokens_per_second"])
    assert not {"peak memory (MB)", "floor (nats per token)"} & set(table)
    for i, path in enumerate(paths):
        compared = read_summary(Path(path))
        loss = float(table["loss (nats per token)"].split()[i])
        assert loss == pytest.approx(compared["loss"], abs=6e-5)
        size = table["in int8 (MB)"].split()[i]
        assert size == f"{compared['size_int8_bytes'] / 1e6:.2f}"
        assert run("eval.py", f"--out_dir={path}", *args).returncode == 0
        alone = read_summary(Path(path))
        assert alone.pop("peak_memory_bytes") > 1e7 and compared.pop("peak_memory_bytes") is None
        assert alone | speeds == compared | speeds


def test_compare_reuses_a_summary_that_is_up_to_date(trained, fables_data, tmp_path, monkeypatch):
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(trained, out)
    shutil.copytree(fables_data, data)
    settings = dict(compare=f"{out}", dataset=str(data), device="cpu", eval_iters=1,
                    valid_samples=2)
    for name, value in settings.items():
        monkeypatch.setattr(evaluation, name, value)
    evaluation.measure(out)
    path, measured = out / "metrics_summary.json", read_summary(out)

    def is_reused(**changes) -> bool:
        """Return whether a summary with changes and with a loss of 99 is the result."""
        path.write_text(json.dumps(measured | {"loss": 99.0} | changes))
        return evaluation.measure(out)["loss"] == 99

    assert is_reused() and is_reused(continuations=5, tokens_per_second=1.0)
    for key, value in dict(step=5, dataset="tales", folder="data/x", split="train",
                           batching="by_length", stride=8, quantize="int8", eval_iters=None,
                           valid_share=None, tokens=10**400, perplexity="x").items():
        assert not is_reused(**{key: value}), key
    monkeypatch.setattr(evaluation, "valid_samples", 0)
    assert is_reused(valid_share=None)
    for key in ("quantize", "eval_iters"):  # a summary that an older version wrote
        path.write_text(json.dumps({k: v for k, v in measured.items() if k != key} | {"loss": 99}))
        assert evaluation.measure(out)["loss"] != 99
    old = {key: value for key, value in measured.items() if key != "above_floor"}
    path.write_text(json.dumps(old | {"loss": 3.0, "floor": 2.0}))
    assert evaluation.measure(out)["above_floor"] == 0.5
    for damaged in ("{", "[]", "5"):
        path.write_text(damaged)
        assert evaluation.measure(out)["loss"] == measured["loss"]
    for newer in (out / "best.pt", data / "meta.json"):
        time = newer.stat().st_mtime_ns
        os.utime(newer, ns=(2 * time, 2 * time))
        assert not is_reused(), newer
        os.utime(newer, ns=(time, time))
        assert is_reused()
    monkeypatch.setattr(evaluation, "continuations", 3)
    monkeypatch.setattr(evaluation, "compare_texts", lambda pairs: {"continuations": len(pairs)})
    monkeypatch.setattr(evaluation, "prompt_tokens", 4)
    monkeypatch.setattr(evaluation, "max_new_tokens", 4)
    assert not is_reused(continuations=3) and not is_reused()
    monkeypatch.setattr(evaluation, "compare", "")
    assert not is_reused(continuations=3)


def test_compare_says_what_it_reuses(trained, tmp_path):
    """The first of two runs is measured, the other one, a Hugging Face folder, is reused."""
    shutil.copytree(trained, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "hf")
    args = ["--valid_samples=0", "--eval_iters=1"]
    assert run("eval.py", f"--out_dir={tmp_path}/hf", *args).returncode == 0
    summary = read_summary(tmp_path / "hf")
    (tmp_path / "hf/metrics_summary.json").write_text(json.dumps(summary | {"loss": 98.7654}))
    done = run("eval.py", f"--compare={tmp_path}/out,{tmp_path}/hf", *args)
    assert done.returncode == 0, done.stderr
    assert f"using {tmp_path}/hf/metrics_summary.json of step 6\n" in done.stdout
    losses = printed_metrics(done.stdout)["loss (nats per token)"].split()
    assert losses[1] == "98.7654" != losses[0]


def test_a_comparison_of_three_runs_fits_a_terminal(trained, tmp_path, capsys, monkeypatch):
    for name, value in dict(device="cpu", valid_samples=0, eval_iters=1).items():
        monkeypatch.setattr(evaluation, name, value)
    shutil.copytree(trained, tmp_path / "out")
    summary = evaluation.measure(str(tmp_path / "out"))
    large = {key: 124_337_664 if key.startswith(("param", "size")) else value
             for key, value in summary.items()}
    capsys.readouterr()
    paths = ["runs/out-shakespeare-char-qwen3", "out-small-qwen3", "out-small-qwen3-int8"]
    evaluation.print_comparison(dict(zip(paths, [large, summary | {"dataset": "tales"}, large])))
    said = capsys.readouterr().out
    table, differ = said.split("\n\nThe runs differ in dataset: ")
    assert "may not be comparable" in differ
    head, *_ = table.split("\n\n")
    words = "".join(head.split())
    assert all(part in words for path in paths for part in path.split("/")[-1].split("-"))
    assert max(map(len, table.splitlines())) <= 80
    assert re.search(r"^  parameters +124,337,664 +[\d,]+ +124,337,664$", table, re.MULTILINE)
    assert re.search(r"^  in float32 \(MB\) +124\.34 +0\.\d+ +124\.34$", table, re.MULTILINE)
    evaluation.print_comparison({"a/out": summary, "b/out": summary})  # the same last part
    assert re.search("^ +a/out +b/out$", capsys.readouterr().out, re.MULTILINE)


def test_a_checkpoint_file_has_its_own_results(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    shutil.copy(tmp_path / "out/last.pt", tmp_path / "out/step_000006.pt")
    checkpoint = f"{tmp_path}/out/step_000006.pt"
    args = ["--valid_samples=0", "--eval_iters=1"]
    done = run("eval.py", f"--out_dir={checkpoint}", *args)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "out/step_000006_metrics_summary.json"
    printed = printed_metrics(done.stdout)
    assert (printed["model"], printed["results"]) == (f"{checkpoint}, step 6", str(file))
    assert json.loads(file.read_text())["checkpoint"] == checkpoint
    assert not (tmp_path / "out/metrics_summary.json").exists()
    done = run("eval.py", f"--compare={tmp_path}/out,{checkpoint}", *args)
    assert done.returncode == 0, done.stderr
    assert f"using {file} of step 6" in done.stdout
    assert (tmp_path / "out/metrics_summary.json").exists()


@pytest.mark.parametrize("args, says", [
    (["--split=test"], "split must be train or val of"),
    (["--split="], "split must be train or val of"),
    (["--batching=random"], "batching must be windows, by_length or empty, got 'random'"),
    (["--stride=-1"], "stride must be at least 0"),
    (["--stride=32"], "stride must be at least 1 and below block_size (32), got 32"),
    (["--stride=8", "--batching=by_length"], "stride needs batching='windows'"),
    (["--last_words=-1"], "last_words must be at least 0"),
    (["--last_words=5"], "/val has two words and at most 32 tokens"),
    (["--continuations=-1"], "continuations must be at least 0"),
    (["--prompt_tokens=0"], "prompt_tokens must be at least 1"),
    (["--max_new_tokens=0"], "max_new_tokens must be at least 1"),
    (["--temperature=-1"], "temperature must be at least 0"),
    (["--compare=out-of-nowhere"], "there is no run out-of-nowhere"),
])
def test_errors_are_one_line(trained, args, says):
    assert says in one_line_error(run("eval.py", f"--out_dir={trained}", *args))


def test_missing_packages_are_named(trained, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['rouge_score'] = None\n")
    done = run("eval.py", f"--out_dir={trained}", "--continuations=2", PYTHONPATH=str(tmp_path))
    assert "pip install rouge-score sacrebleu" in one_line_error(done)
