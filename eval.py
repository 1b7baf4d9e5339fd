"""
Measure a trained model over a whole split and write out_dir/metrics_summary.json.

    python eval.py
    python eval.py --out_dir=out-fables
    python eval.py --out_dir=out/step_001000.pt     # writes step_001000_metrics_summary.json
    python eval.py --stride=64                      # sliding window, for a model trained on windows
    python eval.py --last_words=1000                # how often it predicts the last word of a text
    python eval.py --continuations=100              # ROUGE, BLEU and diversity of generated texts
    python eval.py --compare=out,out-int8           # side by side; reuses up-to-date results
"""
import contextlib
import importlib.util
import json
import math
import textwrap
import time
from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch

from lib import machine
from lib.checkpoint import load_model
from lib.configurator import at_least, configure, one_line, one_of, user_errors
from lib.console import named_lines, print_table, progress, visible
from lib.convert import is_hub_name
from lib.corpus import check_once, load_meta
from lib.dataset import TokenStream, collate, eval_batches, prefetch
from lib.decoding import Sampling
from lib.files import is_number, load_json, results_file, write_atomically
from lib.tokenizer import get_tokenizer
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# model and data
out_dir = "out"  # a run, a .pt or .gguf file, a Hugging Face folder, gpt2, USER/NAME@REVISION
compare = ""  # measure several runs, out,out-int8,..., and print one table
quantize = ""  # 'int8': quantize the weights first
dataset = ""  # a folder in data/, or a path; '': the one that the model was trained on
split = "val"  # or 'train', or any other split of the dataset
# loss
batching = ""  # 'windows', or 'by_length': one document per row; '': as in training
stride = 0  # tokens from one window to the next; each token counts once (0: no overlap)
eval_iters = 0  # leading batches to measure (0: the whole split)
batch_size = 32  # rows of a batch
# last words
last_words = 0  # documents whose last word is predicted, as in LAMBADA (0: none)
# samples
valid_samples = 200  # fables only: stories, or answers, to sample at temperature 1 and to parse
continuations = 0  # texts of the split to continue and to compare with the originals (0: none)
prompt_tokens = 32  # continuations: tokens of a text that the model is given
max_new_tokens = 64  # continuations: tokens after these that are compared
temperature = 0.8  # continuations: 0 is always the most probable token
top_k = 0  # continuations: sample from the k most probable tokens only (0: all)
seed = 1337  # of fables and continuations
# system
device = "auto"  # cuda, else mps, else cpu; or 'cpu', 'cuda:1', ...
dtype = "auto"  # fastest safe type on the device; or 'float32', 'bfloat16', 'float16'
if __name__ == "__main__":
    configure(globals(), skip_settings_of="train.py", announce=True, stride=at_least(0),
              batching=one_of("windows", "by_length", ""), eval_iters=at_least(0),
              batch_size=at_least(1), last_words=at_least(0), valid_samples=at_least(0),
              continuations=at_least(0), prompt_tokens=at_least(1), max_new_tokens=at_least(1),
              seed=at_least(0), quantize=one_of("int8", ""))


# name, format and unit of each metric, by group
METRICS = {
    "quality": {
        "loss": ("loss", "{:.4f}", "nats per token"),
        "floor": ("floor", "{:.4f}", "nats per token"),
        "above_floor": ("above the floor", "{:.1%}", ""),
        "bits_per_byte": ("bits per byte", "{:.4f}", ""),
        "perplexity": ("perplexity", "{:,.2f}", ""),
        "word_perplexity": ("perplexity per word", "{:,.2f}", ""),
        "accuracy": ("accuracy", "{:.1%}", ""),
        "accuracy_top5": ("top-5 accuracy", "{:.1%}", ""),
        "unknown_share": ("unknown tokens", "{:.2%}", ""),
        "last_words": ("last words", "{:,}", ""),
        "last_word_accuracy": ("last-word accuracy", "{:.1%}", ""),
        "valid_share": ("valid fables", "{:.1%}", "of the samples"),
        "obeyed_share": ("obeyed requests", "{:.1%}", "of the samples"),
    },
    "continuations": {
        "continuations": ("texts", "{:,}", ""),
        "rouge1": ("ROUGE-1", "{:.4f}", ""),
        "rouge2": ("ROUGE-2", "{:.4f}", ""),
        "rougeL": ("ROUGE-L", "{:.4f}", ""),
        "bleu": ("BLEU", "{:.2f}", "of 100"),
        "distinct_1": ("distinct words", "{:.1%}", ""),
        "distinct_2": ("distinct word pairs", "{:.1%}", ""),
        "repetition": ("repeated 4-grams", "{:.1%}", ""),
    },
    "size": {
        "parameters": ("parameters", "{:,}", ""),
        "size_float32_bytes": ("in float32", "{:,.2f}", "MB"),
        "size_bfloat16_bytes": ("in bfloat16", "{:,.2f}", "MB"),
        "size_int8_bytes": ("in int8", "{:,.2f}", "MB"),
    },
    "speed and memory": {
        "tokens_per_second": ("evaluation", "{:,.0f}", "tokens/s"),
        "generation_tokens_per_second": ("generation", "{:,.1f}", "tokens/s"),
        "peak_memory_bytes": ("peak memory", "{:,.0f}", "MB"),
    },
}


# -----------------------------------------------------------------------------
# Quality

@torch.no_grad()
def score(model: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
          autocast: contextlib.AbstractContextManager) -> dict[str, float]:
    """
    Return sums over all targets: nats, tokens, and how many are the top 1 and in the top 5.

    rows: the number of rows in which every target is the top 1.
    """
    sums = dict(nats=0.0, tokens=0, top1=0, top5=0, rows=0)
    for idx, targets in batches:
        has_target, top1 = targets >= 0, []  # (B, T)
        with autocast:
            states = model.hidden(idx)[has_target]  # (N, C) of the N tokens that have a target
        # in parts: the logits of a whole batch can take 7 GB
        for x, y in zip(states.split(2048), targets[has_target].split(2048)):
            with autocast:
                logits = model.lm_head(x)
            logits = logits.float()  # (n, V)
            sums["nats"] += torch.nn.functional.cross_entropy(logits, y, reduction="sum").item()
            sums["tokens"] += len(y)
            hits = logits.topk(min(5, logits.size(-1)), dim=-1).indices == y[:, None]  # (n, 5)
            top1.append(hits[:, 0])
            sums["top1"] += int(hits[:, 0].sum())
            sums["top5"] += int(hits.sum())
        missed = torch.zeros_like(has_target)  # (B, T)
        missed[has_target] = ~torch.cat(top1)
        sums["rows"] += int((~missed.any(dim=1)).sum())
    return sums


def exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def token_metrics(sums: dict[str, float], counts: dict[str, int], kind: str) -> dict[str, object]:
    """
    Return the metrics that follow from score().

    counts: the split's entry of meta.json, which may be empty. kind: of the tokenizer.
    """
    loss = sums["nats"] / sums["tokens"]
    total = loss * counts.get("tokens", 0)  # nats of the whole split, at the mean loss
    known = counts and not counts.get("unknown")  # <UNK> is easier to predict than a word
    # bits per byte make sense only where the tokens stand for every character of the text
    lossless = known and kind != "word"
    return {
        "tokens": sums["tokens"],
        "loss": loss,
        "perplexity": exp(loss),
        "accuracy": sums["top1"] / sums["tokens"],
        "accuracy_top5": sums["top5"] / sums["tokens"],
        "bits_per_byte": total / math.log(2) / counts["bytes"] if lossless else None,
        "bits_per_char": total / math.log(2) / counts["characters"] if lossless else None,
        "word_perplexity": exp(total / counts["words"]) if known else None,
        "unknown_share": counts["unknown"] / counts["tokens"] if "unknown" in counts else None,
    }


def evenly_spaced(items: np.ndarray, n: int) -> np.ndarray:
    """Return up to n of the items, always the same, evenly spaced."""
    n = min(n, len(items))
    return items[np.arange(n) * len(items) // max(n, 1)]


def last_word_metrics(model: GPT, stream: TokenStream, tokenizer, n: int,
                      autocast: contextlib.AbstractContextManager) -> dict[str, object]:
    """
    Return the share of documents whose last word greedy decoding would produce, of up to n.

    The model reads a document up to its last white space and predicts the rest, as in LAMBADA
    (https://arxiv.org/abs/1606.06031). Skips documents with one word, with more than block_size
    tokens, or that do not encode to the same tokens again. Raises ValueError if none is left.
    """
    if stream.answers is not None:
        raise ValueError(f"{stream.name} holds conversations, which last_words does not measure")
    documents, spans = stream.document_spans(tokenizer.eot, len(stream)), []
    T = model.config.block_size
    for start, stop in evenly_spaced(documents[documents[:, 1] - documents[:, 0] <= T], n):
        *ids, end = stream.read(start, stop).tolist()
        text = tokenizer.decode(ids).rstrip()
        before, *word = text.rsplit(maxsplit=1) or [""]
        before, whole = tokenizer.encode(before), tokenizer.encode(text)
        same = ids[:len(whole)] == whole and ids[:len(before)] == before
        if same and word and end == tokenizer.eot:
            spans.append((start, start + len(whole), start + len(before)))  # targets: the word
    if not spans:
        raise ValueError(f"no document of {stream.name} has two words and at most {T} tokens")
    parts = np.split(np.array(spans), range(batch_size, len(spans), batch_size))
    rows = (collate(stream, part, tokenizer.eot)
            for part in progress(parts, "predicting last words", unit=" batches"))
    right = score(model, prefetch(rows, device), autocast)["rows"]
    return {"last_words": len(spans), "last_word_accuracy": right / len(spans)}


def fable_prompts(stream: TokenStream, meta: dict, n: int) -> list[list[int]]:
    """Return up to n prompts: end of text for plain fables, else the first requests."""
    if stream.answers is None:
        return [[meta["eot"]]] * n
    documents = stream.document_spans(meta["eot"], len(stream))  # each has one answer
    return [stream.read(start - 1, answer).tolist()
            for (start, _), (answer, _) in zip(documents[:n], stream.answers[:n])]


def fable_shares(model: GPT, tokenizer, prompts: list[list[int]], stop: int) -> dict[str, float]:
    """
    Sample an answer to each prompt at temperature 1. Return the valid_share and obeyed_share.

    Valid answers can be produced by the grammar. Obeyed are requests whose answer is valid and has
    every fact that they name. stop: the token that ends an answer.
    """
    from data.fables.prepare import NotAFable, facts_of, named_facts

    torch.manual_seed(seed)
    valid = obeyed = 0
    for i in progress(range(0, len(prompts), 50), f"sampling {len(prompts)} fables"):
        batch = prompts[i:i + 50]
        T = max(map(len, batch))
        room = max(0, model.config.block_size - T)
        pad = [T - len(prompt) for prompt in batch]
        idx = torch.tensor([[stop] * n + prompt for n, prompt in zip(pad, batch)])  # (B, T)
        rows = model.generate(idx.to(model.device), room, sampler=Sampling(),
                              stop_token=stop, pad=torch.tensor(pad, device=model.device))
        for prompt, row in zip(batch, rows[:, T:].tolist()):
            answer = tokenizer.decode(row[:row.index(stop)] if stop in row else row)
            with contextlib.suppress(NotAFable):
                facts = facts_of(answer)
                valid += 1
                named = named_facts(tokenizer.decode(prompt))
                obeyed += bool(named) and named.items() <= facts.items()
    return {"valid_share": valid / len(prompts), "obeyed_share": obeyed / len(prompts)}


# -----------------------------------------------------------------------------
# Size and speed

def sizes(config: GPTConfig) -> dict[str, int]:
    """Return the bytes of the weights in float32, in bfloat16 and from quantize_int8()."""
    with torch.device("meta"):
        weights = list(GPT(config).parameters())
    n = sum(w.numel() for w in weights)
    # a matrix has one float32 scale per row; vectors stay in float32
    int8 = sum(w.numel() + 4 * len(w) if w.dim() > 1 else 4 * w.numel() for w in weights)
    return {"size_float32_bytes": 4 * n, "size_bfloat16_bytes": 2 * n, "size_int8_bytes": int8}


def generation_speed(model: GPT) -> float:
    """Return tokens per second of one sample of 64 tokens, under the conditions of sample.py."""
    n = min(64, model.config.block_size)
    idx = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    machine.keep_freed_memory()
    seconds = machine.median_seconds(lambda: model.generate(idx, n, sampler=Sampling()), repeats=3,
                                     device=str(model.device))
    machine.keep_freed_memory(False)
    return n / seconds


# -----------------------------------------------------------------------------
# Continuations

def leading_texts(stream: TokenStream, eot: int, length: int, n: int) -> np.ndarray:
    """
    Return up to n texts of `length` tokens, spread evenly over the split, always the same.

    They are the beginnings of documents, after an end-of-text token, (n, 1 + length); or, in a
    split without documents, windows (n, length).
    """
    documents = stream.document_spans(eot, len(stream)) if eot >= 0 else ()
    if len(documents) > 1:
        starts = documents[documents[:, 1] - documents[:, 0] > length, 0]
    else:
        starts = np.arange(0, len(stream) - length + 1, length)
    if not len(starts):
        raise ValueError(f"no text of {stream.name} has prompt_tokens + max_new_tokens = {length} "
                         "tokens")
    texts = np.stack([stream.read(start, start + length) for start in evenly_spaced(starts, n)])
    return np.insert(texts, 0, eot, axis=1) if len(documents) > 1 else texts


def continue_texts(model: GPT, tokenizer, texts: np.ndarray) -> list[dict[str, str]]:
    """
    Return the prompt, the reference and the model's continuation of each text.

    The reference is the last max_new_tokens tokens of a text, the prompt what comes before.
    """
    def decode(ids: list[int]) -> str:
        return tokenizer.decode([i for i in ids if i != tokenizer.eot])

    generator = torch.Generator(model.device).manual_seed(seed)
    sampler = Sampling(temperature, top_k, generator=generator)
    pairs = []
    for batch in progress(torch.from_numpy(texts).split(batch_size), "continuing texts"):
        prompts = batch[:, :-max_new_tokens].to(model.device)  # (B, T)
        new = model.generate(prompts, max_new_tokens, sampler=sampler, stop_token=tokenizer.eot)
        parts = prompts, batch[:, -max_new_tokens:], new[:, prompts.size(1):]
        for prompt, reference, continuation in zip(*(part.tolist() for part in parts)):
            pairs.append({"prompt": decode(prompt), "reference": decode(reference),
                          "continuation": decode(continuation)})
    return pairs


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[i:] for i in range(n))))


def distinct(texts: list[str], n: int) -> float | None:
    """Return the share of different n-grams of words: 1 if nothing is repeated."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts: list[str]) -> float | None:
    """Return the share of 4-grams of words that occurred before in the same text."""
    grams = [ngrams(text, 4) for text in texts]
    total = sum(map(len, grams))
    return 1 - sum(len(set(of_text)) for of_text in grams) / total if total else None


def compare_texts(pairs: list[dict[str, str]]) -> dict[str, float | None]:
    """Return mean ROUGE F-measures (0 to 1) and BLEU (0 to 100) of continuations, and diversity."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    texts = [pair["continuation"] for pair in pairs]
    references = [pair["reference"] for pair in pairs]
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds)
    rouge = [scorer.score(reference, text) for reference, text in zip(references, texts)]
    return {
        "continuations": len(pairs),
        **{kind: sum(scores[kind].fmeasure for scores in rouge) / len(rouge) for kind in kinds},
        # force: no warning that the text looks tokenized
        "bleu": sacrebleu.corpus_bleu(texts, [references], force=True).score,
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repetition": repetition(texts),
    }


# -----------------------------------------------------------------------------
# Runs

def open_dataset(path: str, model: GPT, checkpoint: dict) -> tuple[Path, dict, TokenStream]:
    """
    Return the folder, meta.json and tokens of the split to measure.

    Raises ValueError where they do not fit the settings or the model.
    """
    name = dataset or checkpoint["config"]["dataset"]
    if not name:
        raise ValueError(f"{path} does not say what it was trained on: give --dataset")
    folder = Path("data") / name
    meta = load_meta(folder)
    same = (meta["tokenizer"] == checkpoint["meta"]["tokenizer"]
            or get_tokenizer(meta).spec == get_tokenizer(checkpoint["meta"]).spec)
    if not same or meta["vocab_size"] > model.config.vocab_size:
        raise ValueError(f"{folder} was prepared with another tokenizer than the model's")
    splits = list(meta["splits"]) or ["train", "val"]
    if split not in splits:
        raise ValueError(f"split must be {' or '.join(splits)} of {folder}, got {split!r}")
    stream = TokenStream(folder, split, meta)
    check_once(stream, meta)
    return folder, meta, stream


def reusable(path: Path, sources: list[Path],
             conditions: dict[str, object]) -> dict[str, object] | None:
    """Return the summary in path if it is newer than its sources and has these conditions."""
    with contextlib.suppress(OSError, ValueError):
        summary = load_json(path)
        is_newer = path.stat().st_mtime_ns > max(file.stat().st_mtime_ns for file in sources)
        numbers = ["step", "tokens", "floor", *chain.from_iterable(METRICS.values())]
        if (is_newer and isinstance(summary, dict) and conditions.items() <= summary.items()
                and all(summary.get(key) is None or is_number(summary[key]) for key in numbers)):
            # summaries of older versions do not have above_floor
            return {"above_floor": above_floor(summary.get("loss"), summary.get("floor"))} | summary
    return None


def above_floor(loss: float | None, floor: float | None) -> float | None:
    """Return by which share the loss is above the floor, where both are known."""
    return loss / floor - 1 if floor and loss is not None else None


def measure(path: str) -> dict[str, object]:
    """
    Measure a model, write its metrics_summary.json and return it.

    With `compare`, an existing summary that is up to date is returned instead. A metric that was
    not measured or is not finite is None. Raises ValueError for bad input.
    """
    model, checkpoint = load_model(path, device, quantize)
    folder, meta, stream = open_dataset(path, model, checkpoint)
    tokenizer = get_tokenizer(meta)
    how = batching or checkpoint["config"].get("batching", "windows")
    batches = eval_batches(stream, model.config.block_size, batch_size, how, meta["eot"],
                           eval_iters, stride=stride)
    if continuations:  # before the long work, as it can fail
        length = prompt_tokens + max_new_tokens
        texts = leading_texts(stream, tokenizer.eot, length, continuations)
    is_fables = "floor" in meta and valid_samples > 0
    conditions = dict(step=checkpoint["step"], dataset=meta["dataset"], folder=str(folder),
                      split=split, batching=how, stride=stride or None, quantize=quantize or None,
                      eval_iters=eval_iters or None)
    where = Path(checkpoint["path"])  # a checkpoint file or a Hugging Face folder
    file = results_file(path, where, "metrics_summary.json")
    sources = ([*where.glob("*.safetensors")] or [where]) + [*folder.glob("meta.*")]
    # a summary does not say how texts were continued, or of how many the last word was asked for
    if compare and not continuations and not last_words:
        old = reusable(file, sources, conditions)
        if old and not (is_fables and old.get("valid_share") is None):
            print(one_line(f"using {file} of step {old['step']}"))
            return old
    autocast = machine.autocast(device, machine.resolve_dtype_for(model, dtype, device))
    # first, as it can fail
    words = last_word_metrics(model, stream, tokenizer, last_words, autocast) if last_words else {}

    start = time.perf_counter()
    batches = progress(prefetch(batches, device), f"measuring {path}", unit=" batches")
    sums = score(model, batches, autocast)
    seconds = time.perf_counter() - start

    if not sums["tokens"]:
        raise ValueError(f"{stream.name} has only one token: there is nothing to predict")

    # meta.json counts whole conversations, but the loss covers only the answers
    counts = {} if "chat" in meta else meta["splits"].get(split, {})
    metrics = token_metrics(sums, counts, tokenizer.spec["kind"])
    comparable = split == "val" and how == "by_length" and not eval_iters  # with the floor
    floor = meta.get("floor") if comparable else None
    summary = {
        "checkpoint": checkpoint["path"],
        **conditions,
        **metrics,
        **(dict.fromkeys(("last_words", "last_word_accuracy")) | words),
        "floor": floor,
        "above_floor": above_floor(metrics["loss"], floor),
        "valid_share": None,
        "obeyed_share": None,
        "parameters": model.num_params(),
        "parameters_non_embedding": model.num_params(non_embedding=True),
        **sizes(model.config),
        "tokens_per_second": sums["tokens"] / seconds,
        # of the process: of several runs it would be that of the largest so far
        "peak_memory_bytes": None if compare else machine.peak_memory(device) or None,
        "generation_tokens_per_second": generation_speed(model),
        **dict.fromkeys(METRICS["continuations"]),
        "note": meta.get("note"),
    }
    if is_fables:
        prompts = fable_prompts(stream, meta, valid_samples)
        stop = meta["chat"]["end"] if "chat" in meta else meta["eot"]
        shares = fable_shares(model, tokenizer, prompts, stop)
        summary |= shares if "chat" in meta else {"valid_share": shares["valid_share"]}
    pairs = continue_texts(model, tokenizer, texts) if continuations else []
    summary |= compare_texts(pairs) if pairs else {}
    summary = {key: None if isinstance(value, float) and not math.isfinite(value) else value
               for key, value in summary.items()}
    if pairs:
        lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        write_atomically(results_file(path, where, "continuations.jsonl"), "".join(lines))
    write_atomically(file, json.dumps(summary, indent=1) + "\n")
    return summary


def format_metric(summary: dict[str, object], key: str, form: str) -> str:
    """Return a metric as it is printed, bytes as MB; '' if it was not measured."""
    value = summary.get(key)
    if value is None:
        return ""
    return form.format(value / 1e6 if key.endswith("_bytes") else value)


def print_summary(path: str, summary: dict[str, object]) -> None:
    """Print the summary of a model: what was measured, and the metrics in groups."""
    windows = f"windows every {summary['stride']} tokens" if summary["stride"] else "windows"
    how = windows if summary["batching"] == "windows" else "one document per row"
    tokens = f"{summary['tokens']:,} tokens"
    tokens += f" of the first {summary['eval_iters']} batches" if summary["eval_iters"] else ""
    int8 = ", in int8" if summary["quantize"] else ""
    file = results_file(path, Path(summary["checkpoint"]), "metrics_summary.json")
    print("\n" + named_lines(
        model=f"{summary['checkpoint']}, step {summary['step']:,}{int8}",
        data=f"{summary['dataset']}, {summary['split']} split, {tokens}, {how}",
        results=str(file)))
    for group, metrics in METRICS.items():
        found = [(name, text, unit) for key, (name, form, unit) in metrics.items()
                 if (text := format_metric(summary, key, form))]
        if found:
            print(f"\n{group}")
        for name, text, unit in found:
            print(f"  {name:<19}  {text} {unit}".rstrip())
    if summary["floor"]:
        print("\nThe floor is the exact entropy of this text: no model can have a lower loss.")
    if summary["note"]:
        print(visible(summary["note"]))


def print_comparison(runs: dict[str, dict[str, object]]) -> None:
    """Print the summaries of several runs: a row for each metric, a column for each run."""
    names = [Path(path).name for path in runs]
    names = names if len(set(names)) == len(names) else list(runs)
    heads = zip_longest(*(textwrap.wrap(name, 16) for name in names), fillvalue="")
    rows = [["", *head] for head in heads]
    basics = {key: (key, "{:,}" if key in ("step", "tokens") else "{}", "")
              for key in ("step", "dataset", "batching", "tokens")}
    for group, metrics in {"measured": basics, **METRICS}.items():
        found = []
        for key, (name, form, unit) in metrics.items():
            cells = [format_metric(summary, key, form) for summary in runs.values()]
            if any(cells):
                name = f"  {name} ({unit})" if unit else f"  {name}"
                found.append([name, *(cell or "-" for cell in cells)])
        rows += [[""], [group], *found] if found else []
    print()
    print_table(rows)
    keys = [key for key in ("dataset", "batching")
            if len({summary[key] for summary in runs.values()}) > 1]
    if keys:
        print(f"\nThe runs differ in {' and '.join(keys)}: their losses may not be comparable, but "
              "bits per byte of the same text are.")


if __name__ == "__main__":
    paths = [path for path in compare.split(",") if path] or [out_dir]
    with user_errors():
        Sampling(temperature, top_k)  # checks them
        for path in paths:
            if compare and not Path(path).exists() and not is_hub_name(path):
                raise ValueError(f"there is no run {path} to compare")
        if continuations and not all(map(importlib.util.find_spec, ("rouge_score", "sacrebleu"))):
            raise ValueError("continuations need two more packages: pip install rouge-score "
                             "sacrebleu")
        device = machine.resolve_device(device)
        runs = {path: measure(path) for path in paths}
    if compare:
        print_comparison(runs)
    else:
        print_summary(out_dir, runs[out_dir])
