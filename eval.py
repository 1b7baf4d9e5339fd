"""
Measure a trained model over the whole validation split and write out_dir/metrics_summary.json.

    python eval.py
    python eval.py --out_dir=out-fables
"""
import contextlib
import json
import math
import resource
import time
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import load_model, write_atomically
from configurator import configure, user_errors
from dataset import TokenStream, eval_batches, load_meta, prefetch
from model import GPT, measured_dtype, resolve_device, resolve_dtype
from tokenizer import get_tokenizer

# -----------------------------------------------------------------------------
out_dir = "out"  # the run to measure: its best.pt, else last.pt
dataset = ""  # a folder in data/, or the path of one; '': what the model was trained on
split = "val"  # or 'train'
batching = ""  # 'windows', or 'by_length': every document from its own beginning; '': as in training
eval_iters = 0  # leading batches; 0: the whole split
batch_size = 32  # rows of a batch
valid_samples = 200  # fables only: stories to sample (temperature 1) and parse
seed = 1337  # of those samples
quantize = ""  # 'int8': measure the model as it is with weights of a quarter of the size
device = "auto"  # cuda, else mps, else cpu; or 'cpu', 'cuda:1', ...
dtype = "auto"  # fastest safe type on the device; or 'float32', 'bfloat16', 'float16'
configure(globals(), skip_settings_of="train.py")
# -----------------------------------------------------------------------------


@torch.no_grad()
def score(model: GPT, batches) -> dict[str, float]:
    """Sums over all targets: nats, tokens, and how often the next token was the likeliest one or among five."""
    sums = dict(nats=0.0, tokens=0, top1=0, top5=0)
    for x, y in batches:
        with autocast:
            logits, _ = model(x)
        logits, y = logits.float().view(-1, logits.size(-1)), y.reshape(-1)  # (B, T, V) -> (B * T, V)
        sums["nats"] += torch.nn.functional.cross_entropy(logits, y, ignore_index=-1, reduction="sum").item()
        sums["tokens"] += int((y >= 0).sum())
        hits = logits.topk(min(5, logits.size(-1)), dim=-1).indices == y[:, None]  # (B * T, 5)
        sums["top1"] += int(hits[:, 0].sum())
        sums["top5"] += int(hits.sum())
    return sums


def share_of_valid_fables(model: GPT, tokenizer, n: int) -> float:
    """How many of n stories sampled at temperature 1 the grammar could have told."""
    from data.fables.prepare import NotAFable, parse

    torch.manual_seed(seed)
    valid = 0
    for i in tqdm(range(0, n, 50), desc="sampling fables"):
        idx = torch.full((min(50, n - i), 1), tokenizer.eot, device=device)
        for row in model.generate(idx, model.config.block_size - 1, stop_token=tokenizer.eot).tolist():
            end = row.index(tokenizer.eot, 1) if tokenizer.eot in row[1:] else len(row)
            with contextlib.suppress(NotAFable):
                parse(tokenizer.decode(row[1:end]))
                valid += 1
    return valid / n


with user_errors():
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, got {split!r}")
    if eval_iters < 0 or batch_size < 1 or valid_samples < 0 or seed < 0:
        raise ValueError("eval_iters, valid_samples and seed must not be negative, and batch_size at least 1")
    device = resolve_device(device)
    model, checkpoint = load_model(out_dir, device, quantize)
    dtype = resolve_dtype(dtype, device)
    dtype = measured_dtype(model) if dtype == "auto" else dtype
    folder = Path("data") / (dataset or checkpoint["config"]["dataset"])
    meta = load_meta(folder)
    if meta["tokenizer"] != checkpoint["meta"]["tokenizer"]:
        raise ValueError(f"{folder} was made with another tokenizer than the model's: their losses do not compare")
    tokenizer = get_tokenizer(meta)
    stream = TokenStream(folder, split, meta)
    stream.check(meta)
    batching = batching or checkpoint["config"].get("batching", "windows")
    batches = prefetch(eval_batches(stream, model.config.block_size, batch_size, batching, meta["eot"], eval_iters), device)
autocast = contextlib.nullcontext() if dtype == "float32" else torch.autocast(device.split(":")[0], getattr(torch, dtype))

start = time.perf_counter()
with user_errors():
    sums = score(model, tqdm(batches, desc=f"{folder.name} {split}", unit=" batches"))
seconds = time.perf_counter() - start
loss = sums["nats"] / sums["tokens"]
counts = meta["splits"].get(split, {})
nats_of_text = loss * counts.get("tokens", 0)  # of the whole split, at the mean loss of what was scored
summary = {
    "checkpoint": checkpoint["path"],
    "step": checkpoint["step"],
    "dataset": meta["dataset"],
    "split": split,
    "batching": batching,
    "tokens": sums["tokens"],
    "loss": loss,
    "perplexity": math.exp(loss),
    "accuracy": sums["top1"] / sums["tokens"],
    "accuracy_top5": sums["top5"] / sums["tokens"],
    "bits_per_byte": nats_of_text / math.log(2) / counts["bytes"] if counts else None,
    "bits_per_char": nats_of_text / math.log(2) / counts["characters"] if counts else None,
    "word_perplexity": math.exp(nats_of_text / counts["words"]) if counts else None,
    "floor": meta.get("floor") if split == "val" and batching == "by_length" and not eval_iters else None,
    "valid_share": share_of_valid_fables(model, tokenizer, valid_samples) if "floor" in meta and valid_samples else None,
    "parameters": model.num_params(),
    "parameters_non_embedding": model.num_params(non_embedding=True),
    "tokens_per_second": sums["tokens"] / seconds,
    "peak_memory_bytes": (torch.cuda.max_memory_allocated() if device.startswith("cuda")
                          else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
}
for key, value in summary.items():
    if value is not None:
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        print(f"{key:>26}: {shown}")
if summary["floor"]:
    print(f"The loss is {loss / summary['floor'] - 1:.1%} above the floor, which is the exact entropy of this text.")
with user_errors():
    write_atomically(Path(out_dir) / "metrics_summary.json", json.dumps(summary, indent=1) + "\n")
