"""
Measure a trained model over a whole split of its data and write out_dir/metrics_summary.json.

    python eval.py
    python eval.py --out_dir=out-fables
    python eval.py --stride=64 --batching=windows       # sliding window: more context for every token, and more work
    python eval.py --continuations=100                  # ROUGE, BLEU and variety of the texts that the model writes
    python eval.py --compare=out,out-int8               # several runs side by side
"""
import contextlib
import importlib.util
import json
import math
import resource
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lib.checkpoint import OPENAI, load_model, write_atomically
from lib.configurator import configure, user_errors
from lib.dataset import TokenStream, eval_batches, load_meta, prefetch
from lib.machine import (
    keep_freed_memory, measured_dtype, median_seconds, resolve_device, resolve_dtype,
)
from lib.tokenizer import get_tokenizer
from model import GPT, GPTConfig, NoWeights, check_sampling

# -----------------------------------------------------------------------------
out_dir = "out"  # the run to measure: its best.pt, else last.pt
compare = ""  # several runs instead, out,out-int8,...: each is measured, and one table shows all
dataset = ""  # a folder in data/, or the path of one; '': what the model was trained on
split = "val"  # or 'train', or whichever the data set has
batching = ""  # 'windows', or 'by_length': every document from its own beginning; '': as in training
stride = 0  # windows overlap and begin so many tokens apart, only what is new in them counts; 0: side by side
eval_iters = 0  # leading batches; 0: the whole split
batch_size = 32  # rows of a batch
valid_samples = 200  # fables only: stories to sample (temperature 1) and parse
continuations = 0  # texts of the split to continue and to compare with how they really go on; 0: none
prompt_tokens = 32  # of each such text, its beginning, are given
max_new_tokens = 64  # and so many are compared
temperature = 0.8  # of the continuations; 0: always the most probable token
top_k = 0  # of the continuations: draw from the k most probable tokens only; 0: from all
seed = 1337  # of stories and continuations
quantize = ""  # 'int8': measure the model as it is with weights of a quarter of the size
device = "auto"  # cuda, else mps, else cpu; or 'cpu', 'cuda:1', ...
dtype = "auto"  # fastest safe type on the device; or 'float32', 'bfloat16', 'float16'
# -----------------------------------------------------------------------------

OF_CONTINUATIONS = ("continuations", "rouge1", "rouge2", "rougeL", "bleu", "distinct_1", "distinct_2", "repetition")


@torch.no_grad()
def score(model: GPT, batches: Iterable, autocast: contextlib.AbstractContextManager) -> dict[str, float]:
    """Sums over all targets: nats, tokens, and how often the next token was the likeliest one or among five."""
    sums = dict(nats=0.0, tokens=0, top1=0, top5=0)
    for x, y in batches:
        with autocast:
            states = model.hidden(x)[y >= 0]  # (B, T, C) -> (N, C), those that foretell a target
        for h, targets in zip(states.split(2048), y[y >= 0].split(2048)):  # all logits of a batch could be 7 GB
            with autocast:
                logits = model.lm_head(h)
            logits = logits.float()  # (n, V)
            sums["nats"] += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            sums["tokens"] += len(targets)
            hits = logits.topk(min(5, logits.size(-1)), dim=-1).indices == targets[:, None]  # (n, 5)
            sums["top1"] += int(hits[:, 0].sum())
            sums["top5"] += int(hits.sum())
    return sums


def exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def share_of_valid_fables(model: GPT, tokenizer, n: int) -> float:
    """How many of n stories sampled at temperature 1 the grammar could have told."""
    from data.fables.prepare import NotAFable, parse

    torch.manual_seed(seed)
    valid = 0
    for i in tqdm(range(0, n, 50), desc="sampling fables"):
        idx = torch.full((min(50, n - i), 1), tokenizer.eot, device=model.device)
        for row in model.generate(idx, model.config.block_size - 1, stop_token=tokenizer.eot).tolist():
            end = row.index(tokenizer.eot, 1) if tokenizer.eot in row[1:] else len(row)
            with contextlib.suppress(NotAFable):
                parse(tokenizer.decode(row[1:end]))
                valid += 1
    return valid / n


# -----------------------------------------------------------------------------
# Size and speed

def sizes(config: GPTConfig) -> dict[str, int]:
    """Bytes of the weights in three forms, a tied head counted once; int8 is that of quantize_int8."""
    with NoWeights():
        weights = list(GPT(config).parameters())
    n = sum(w.numel() for w in weights)
    int8 = sum(w.numel() + 4 * len(w) if w.dim() > 1 else 4 * w.numel() for w in weights)  # a float32 scale for each row
    return {"size_float32_bytes": 4 * n, "size_bfloat16_bytes": 2 * n, "size_int8_bytes": int8}


def generation_speed(model: GPT) -> float:
    """Tokens per second of one text of 64 tokens, in float32 and with the memory as sample.py has them."""
    n = min(64, model.config.block_size)
    idx = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    keep_freed_memory()
    seconds = median_seconds(lambda: model.generate(idx, n), repeats=3, synchronize=str(model.device))
    keep_freed_memory(False)
    return n / seconds


# -----------------------------------------------------------------------------
# Continuations

def leading_texts(stream: TokenStream, eot: int, length: int, n: int) -> np.ndarray:
    """
    Up to n texts, spread evenly over the split, the same ones every time: the first `length` tokens of documents that are
    longer, behind the end-of-text before them, (n, 1 + length); or of text without documents windows (n, length).
    """
    documents = stream.document_rows(eot, len(stream)) if eot >= 0 else ()
    if len(documents) > 1:
        starts = documents[documents[:, 1] - documents[:, 0] > length, 0]
    else:
        starts = np.arange(0, len(stream) - length + 1, length)
    if not len(starts):
        raise ValueError(f"no text of {stream.name} has prompt_tokens + max_new_tokens = {length} tokens")
    n = min(n, len(starts))
    texts = np.stack([stream.read(start, start + length) for start in starts[np.arange(n) * len(starts) // n]])
    return np.insert(texts, 0, eot, axis=1) if len(documents) > 1 else texts


def continued(model: GPT, tokenizer, texts: np.ndarray) -> list[dict[str, str]]:
    """Prompt, reference and the model's continuation, as far as it has one, of texts of max_new_tokens more than the prompt."""
    generator = torch.Generator(model.device).manual_seed(seed)
    result = []
    for batch in tqdm(torch.from_numpy(texts).split(batch_size), desc="continuing prompts"):
        prompts = batch[:, :-max_new_tokens].to(model.device)  # (B, T)
        new = model.generate(prompts, max_new_tokens, temperature, top_k, stop_token=tokenizer.eot, generator=generator)
        for rows in zip(prompts.tolist(), batch[:, -max_new_tokens:].tolist(), new[:, prompts.size(1):].tolist()):
            decoded = [tokenizer.decode([i for i in row if i != tokenizer.eot]) for row in rows]
            result.append(dict(zip(("prompt", "reference", "continuation"), decoded)))
    return result


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[i:] for i in range(n))))


def distinct(texts: list[str], n: int) -> float | None:
    """Different n-grams of words over all n-grams: 1 where nothing is said twice."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts: list[str]) -> float | None:
    """The share of 4-grams of words that were there before in the same text."""
    grams = [ngrams(text, 4) for text in texts]
    total = sum(map(len, grams))
    return 1 - sum(len(set(some)) for some in grams) / total if total else None


def compare_texts(pairs: list[dict[str, str]]) -> dict[str, float | None]:
    """ROUGE (0 to 1, means of the F-measure) and BLEU (0 to 100) of continuations, and how varied they are in themselves."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    references, texts = [pair["reference"] for pair in pairs], [pair["continuation"] for pair in pairs]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    rouge = [scorer.score(reference, text) for reference, text in zip(references, texts)]
    return {
        "continuations": len(pairs),
        **{name: sum(one[name].fmeasure for one in rouge) / len(rouge) for name in ("rouge1", "rouge2", "rougeL")},
        "bleu": sacrebleu.corpus_bleu(texts, [references], force=True).score,  # force: no warning about its own tokens
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repetition": repetition(texts),
    }


# -----------------------------------------------------------------------------

def measure(path: str) -> dict[str, object]:
    """All metrics of one run; what was not measured, or is no finite number, is None."""
    with user_errors():
        model, checkpoint = load_model(path, device, quantize)
        if not (name := dataset or checkpoint["config"]["dataset"]):
            raise ValueError(f"{path} does not say what it was trained on: give --dataset")
        folder = Path("data") / name
        meta = load_meta(folder)
        tokenizer = get_tokenizer(meta)
        alike = meta["tokenizer"] == checkpoint["meta"]["tokenizer"] or tokenizer.spec == get_tokenizer(checkpoint["meta"]).spec
        if not alike or meta["vocab_size"] > model.config.vocab_size:
            raise ValueError(f"{folder} was made with another tokenizer than the model's: their losses do not compare")
        if split not in (known := list(meta["splits"]) or ["train", "val"]):
            raise ValueError(f"split must be {' or '.join(known)} of {folder}, got {split!r}")
        stream = TokenStream(folder, split, meta)
        stream.check(meta)
        how = batching or checkpoint["config"].get("batching", "windows")
        batches = eval_batches(stream, model.config.block_size, batch_size, how, meta["eot"], eval_iters, stride=stride)
        texts = continuations and leading_texts(stream, tokenizer.eot, prompt_tokens + max_new_tokens, continuations)
        kind = resolve_dtype(dtype, device)
        kind = measured_dtype(model) if kind == "auto" else kind
        autocast = contextlib.nullcontext() if kind == "float32" else torch.autocast(device.split(":")[0], getattr(torch, kind))

        start = time.perf_counter()
        sums = score(model, tqdm(prefetch(batches, device), desc=f"{folder.name} {split}", unit=" batches"), autocast)
        seconds = time.perf_counter() - start
        if not sums["tokens"]:
            raise ValueError(f"{stream.name} has no token with another one before it")
    loss = sums["nats"] / sums["tokens"]
    counts = meta["splits"].get(split, {})
    nats_of_text = loss * counts.get("tokens", 0)  # of the whole split, at the mean loss of what was scored
    whole = counts and tokenizer.spec["kind"] != "word" and not counts.get("unknown")  # was every character foretold?
    summary = {
        "checkpoint": checkpoint["path"],
        "step": checkpoint["step"],
        "dataset": meta["dataset"],
        "split": split,
        "batching": how,
        "stride": stride or None,
        "tokens": sums["tokens"],
        "loss": loss,
        "perplexity": exp(loss),
        "accuracy": sums["top1"] / sums["tokens"],
        "accuracy_top5": sums["top5"] / sums["tokens"],
        "bits_per_byte": nats_of_text / math.log(2) / counts["bytes"] if whole else None,
        "bits_per_char": nats_of_text / math.log(2) / counts["characters"] if whole else None,
        "word_perplexity": exp(nats_of_text / counts["words"]) if counts else None,
        "unknown_share": counts["unknown"] / counts["tokens"] if "unknown" in counts else None,
        "floor": meta.get("floor") if split == "val" and how == "by_length" and not eval_iters else None,
        "valid_share": share_of_valid_fables(model, tokenizer, valid_samples) if "floor" in meta and valid_samples else None,
        "parameters": model.num_params(),
        "parameters_non_embedding": model.num_params(non_embedding=True),
        **sizes(model.config),
        "tokens_per_second": sums["tokens"] / seconds,
        "peak_memory_bytes": (torch.cuda.max_memory_allocated() if device.startswith("cuda")
                              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        "generation_tokens_per_second": generation_speed(model),
        **dict.fromkeys(OF_CONTINUATIONS),
    }
    if compare:
        summary["peak_memory_bytes"] = None  # that of the process is that of the largest run so far
    if continuations:
        pairs = continued(model, tokenizer, texts)
        summary |= compare_texts(pairs)
    summary = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in summary.items()}
    where = Path(checkpoint["path"])  # a file of ours, or a Hugging Face folder
    where = where if where.is_dir() else where.parent
    with user_errors():
        if continuations:
            lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
            write_atomically(where / "continuations.jsonl", "".join(lines))
        write_atomically(where / "metrics_summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def print_summary(summary: dict[str, object]) -> None:
    for key, value in summary.items():
        if value is not None:
            print(f"{key:>28}: {shown(value)}")
    if summary["floor"] and summary["loss"] is not None:
        over = summary["loss"] / summary["floor"] - 1
        print(f"The loss is {over:.1%} above the floor, which is the exact entropy of this text.")


def print_table(runs: dict[str, dict[str, object]]) -> None:
    """Summaries by the path of the run: metrics as rows, those that no run has left out, and runs as columns."""
    rows = [["", *runs]]
    for key in next(iter(runs.values())):
        if key != "checkpoint" and any(summary[key] is not None for summary in runs.values()):
            rows.append([key, *(shown(summary[key]) for summary in runs.values())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        print(f"{name:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])), sep="  ")


if __name__ == "__main__":
    configure(globals(), skip_settings_of="train.py")
    paths = [path for path in compare.split(",") if path] or [out_dir]
    with user_errors():
        for name, least in (("stride", 0), ("eval_iters", 0), ("batch_size", 1), ("valid_samples", 0), ("continuations", 0),
                            ("prompt_tokens", 1), ("max_new_tokens", 1), ("seed", 0)):
            if globals()[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {globals()[name]}")
        check_sampling(temperature, top_k)
        for path in paths:
            if compare and not Path(path).is_dir() and path not in OPENAI:
                raise ValueError(f"there is no run {path} to compare")
        if continuations and not all(map(importlib.util.find_spec, ("rouge_score", "sacrebleu"))):
            raise ValueError("continuations take two more packages: pip install rouge-score sacrebleu")
        device = resolve_device(device)
    runs = {path: measure(path) for path in paths}
    if compare:
        print_table(runs)
        if differ := [key for key in ("dataset", "batching") if len({summary[key] for summary in runs.values()}) > 1]:
            print(f"The runs differ in {' and '.join(differ)}: losses need not compare; bits per byte do, on the same text.")
    else:
        print_summary(runs[out_dir])
