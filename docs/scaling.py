"""
Train the grid of models behind lib/scaling.py, and fit its law to their losses.

    python docs/scaling.py --datasets=data/tinystories,data/tinystories_bpe,data/novels
    python docs/scaling.py  # only fit

Each run is one line of docs/scaling.jsonl. Runs that are already there are skipped, so an
interrupted grid continues. Budgets are in FLOPs, not in seconds, so runs can share the machine.
"""
import json
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import numpy as np

from lib import scaling
from lib.configurator import at_least, configure, user_errors
from lib.console import print_table
from lib.corpus import load_meta
from lib.dataset import TokenStream
from lib.scaling import LAW, MIN_STEPS, Law

# -----------------------------------------------------------------------------
datasets = ""  # prepared folders, with commas (empty: only fit)
jobs = 2  # runs at a time, each with one thread
max_flops = 4e13  # leave out budgets above this
# -----------------------------------------------------------------------------

RESULTS = ROOT / "docs/scaling.jsonl"
LEARNING_RATE = 8e-3
CONTEXT = 128
SMALL, MEDIUM, LARGE = 4e12, 1.2e13, 4e13  # about 1, 3 and 10 minutes on two cores
KEYS = ("text", "vocab_size", "n_layer", "n_embd", "block_size", "learning_rate", "flops")


def run_of(n_layer: int, n_embd: int, flops: float, block_size: int = CONTEXT,
           learning_rate: float = LEARNING_RATE) -> dict:
    return dict(n_layer=n_layer, n_embd=n_embd, flops=flops, block_size=block_size,
                learning_rate=learning_rate)


def check_grid() -> list[dict]:
    """Return the few runs that check the law on another text or vocabulary."""
    shapes = {SMALL: [(2, 64), (2, 128), (4, 128)], MEDIUM: [(2, 96)], LARGE: [(2, 128)]}
    return [run_of(L, C, flops) for flops, pairs in shapes.items() for L, C in pairs]


def full_grid() -> list[dict]:
    """Return the runs to which the law is fitted, and those that vary context and rate."""
    shapes = {
        SMALL: [(2, 48), (2, 64), (4, 64), (2, 96), (2, 128), (3, 128), (4, 128), (6, 128),
                (3, 192), (4, 256)],
        MEDIUM: [(2, 64), (2, 96), (2, 128), (4, 128), (3, 192), (4, 256), (6, 256)],
        LARGE: [(2, 128), (3, 128), (4, 128), (3, 192)]}
    runs = [run_of(L, C, flops) for flops, pairs in shapes.items() for L, C in pairs]
    for T in (64, 256):  # contexts
        runs += [run_of(2, 128, SMALL, T), run_of(4, 128, SMALL, T)]
    for lr in (4e-3, 1.6e-2):  # learning rates
        runs += [run_of(L, C, SMALL, learning_rate=lr) for L, C in ((2, 64), (4, 256))]
    return runs


def read_results() -> list[dict]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def train(folder: Path, meta: dict, run: dict) -> dict:
    """Train and evaluate one model in a temporary folder; return the run with its results."""
    T, V = run["block_size"], meta["vocab_size"]
    tokens_per_step = scaling.TOKENS_PER_STEP
    model = scaling.meta_model(run["n_layer"], run["n_embd"], T, V)
    config = model.config
    steps = round(run["flops"] / (tokens_per_step * scaling.flops_per_token(model)))
    metrics = scaling.train_and_evaluate(dict(
        dataset=folder, n_layer=config.n_layer, n_head=config.n_head, n_kv_head=config.n_kv_head,
        n_embd=config.n_embd, block_size=T, batch_size=tokens_per_step // T, max_iters=steps,
        learning_rate=run["learning_rate"], eval_interval=steps, eval_iters=1,
        softmax_tokens=scaling.SOFTMAX_TOKENS, log_interval=max(1, steps // 10), compile=False,
        dtype="float32", device="cpu"), OMP_NUM_THREADS="1")
    return run | dict(
        steps=steps, tokens=steps * tokens_per_step,
        distinct_tokens=len(TokenStream(folder, "train", meta)),
        parameters=metrics["parameters"],
        parameters_non_embedding=metrics["parameters_non_embedding"], loss=metrics["loss"],
        bits_per_byte=metrics["bits_per_byte"])


def train_grid() -> None:
    """Train the runs that have no result yet, small budgets first, and append their results."""
    done = {tuple(run[key] for key in KEYS) for run in read_results()}
    todo = []
    for i, name in enumerate(datasets.split(",")):
        folder = Path(name).resolve()
        meta = load_meta(folder)
        text = folder.name.removesuffix("_bpe")  # the same text with another tokenizer
        runs = [dict(text=text, vocab_size=meta["vocab_size"]) | run
                for run in (check_grid() if i else full_grid())]
        todo += [(folder, meta, run) for run in runs
                 if tuple(run[key] for key in KEYS) not in done and run["flops"] <= max_flops]
    todo.sort(key=lambda job: job[2]["flops"])
    print(f"{len(todo)} runs to train", flush=True)
    with ThreadPoolExecutor(jobs) as pool, open(RESULTS, "a") as file:
        for future in as_completed([pool.submit(train, *job) for job in todo]):
            result = future.result()
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(*(f"{key}={result[key]}" for key in (*KEYS, "bits_per_byte")), flush=True)


def fit(runs: list[dict], iterations: int = 2000) -> Law:
    """Fit the law by least squares of log bits per byte (Levenberg-Marquardt)."""
    N, D, distinct, bits = (np.array([run[key] for run in runs], dtype=float) for key in
                            ("parameters_non_embedding", "tokens", "distinct_tokens",
                             "bits_per_byte"))

    def errors(logs: np.ndarray) -> np.ndarray:
        return np.log(Law(*np.exp(logs)).bits_per_byte(N, D, distinct) / bits)

    logs, damping = np.log(LAW), 1.0
    for _ in range(iterations):
        e = errors(logs)
        J = np.stack([(errors(logs + h) - e) / 1e-6 for h in 1e-6 * np.eye(len(logs))], axis=1)
        new = logs - np.linalg.solve(J.T @ J + damping * np.eye(len(logs)) * 1e-3, J.T @ e)
        better = (errors(new) ** 2).sum() < (e ** 2).sum()
        logs, damping = (new, damping / 2) if better else (logs, min(1e6, damping * 3))
    return Law(*np.exp(logs))


def comparable_runs() -> dict[tuple[str, int], list[dict]]:
    """
    Return the runs by text and size of the vocabulary.

    Left out are other contexts and learning rates, and runs of fewer than MIN_STEPS steps.
    """
    groups = {}
    for run in sorted(read_results(), key=lambda run: (run["flops"], run["n_embd"])):
        if (run["learning_rate"] == LEARNING_RATE and run["block_size"] == CONTEXT
                and run["steps"] >= MIN_STEPS):
            groups.setdefault((run["text"], run["vocab_size"]), []).append(run)
    return groups


def report_fit() -> None:
    """
    Fit the law to the runs on TinyStories; print its constants and a table of all losses.

    For other texts and vocabularies an offset is added to the law: the mean of measured minus
    predicted.
    """
    groups = comparable_runs()
    law = fit(groups["tinystories", 50257])
    print(Law(*(float(f"{x:.4g}") for x in law)))
    for (text, V), runs in groups.items():
        predicted = np.array([law.bits_per_byte(run["parameters_non_embedding"], run["tokens"],
                                                run["distinct_tokens"]) for run in runs])
        measured = np.array([run["bits_per_byte"] for run in runs])
        offset = (measured - predicted).mean()
        errors = (predicted + offset) / measured - 1
        print(f"\n{text}, vocabulary {V:,}: law + {offset:.3f}; mean error "
              f"{np.abs(errors).mean():.1%}, largest {np.abs(errors).max():.1%}")
        print_table([["layers x width", "FLOPs", "steps", "tokens", "bits per byte", "law"]] + [
            [f"{run['n_layer']} x {run['n_embd']}", f"{run['flops']:.2g}", f"{run['steps']:,}",
             f"{run['tokens'] / 1e6:.2f}M", f"{run['bits_per_byte']:.3f}", f"{x + offset:.3f}"]
            for run, x in zip(runs, predicted)])


if __name__ == "__main__":
    configure(globals(), jobs=at_least(1), max_flops=at_least(0))
    with user_errors():
        if datasets:
            train_grid()
        report_fit()
