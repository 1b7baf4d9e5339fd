"""
Train a GPT, from the first step or from where it stopped.

    python train.py config/train_fables.py
    python train.py config/train_small.py --batch_size=16
    torchrun --nproc_per_node=2 train.py
"""
import atexit
import contextlib
import json
import math
import os
import resource
import signal
import statistics
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lib.checkpoint import (
    OPENAI, find_resumable, load_checkpoint, lock_run, save_checkpoint, write_atomically,
)
from lib.configurator import configure, fail, user_errors
from lib.dataset import TokenStream, TrainBatches, eval_batches, load_meta, prefetch
from lib.machine import (
    keep_freed_memory, measured_dtype, peak_flops, resolve_device, resolve_dtype, resolve_loss_chunk,
)
from model import GPT, GPTConfig, check_softmax_words, schedule_factor, scheduled_lr

# -----------------------------------------------------------------------------
# The defaults: the model of config/train_small.py, 30M parameters on TinyStories, in steps that one machine takes.
out_dir = "out"  # checkpoints, log.jsonl and loss.png
eval_interval = 250  # steps between evaluations; each one also saves a checkpoint
log_interval = 10  # steps between log lines
eval_iters = 20  # leading batches of each split to evaluate on, always the same; 0: the whole split
eval_only = False  # evaluate once, write nothing, leave
patience = 0  # stop after so many evaluations in a row without a lower validation loss; 0: never
always_save_checkpoint = True  # save last.pt at every evaluation; False: only when the validation loss is the lowest yet
init_from = "scratch"  # 'scratch', 'resume', or 'auto': resume if there is one; or a model: a run's folder, 'gpt2', ...
overwrite = False  # let 'scratch' replace a run that out_dir holds
max_bad_steps = 10  # steps in a row with a non-finite gradient, after which training goes back to its last checkpoint
logger = ""  # beside log.jsonl also to 'wandb', 'tensorboard' or 'trackio'
log_x = False  # loss.png over the logarithm of the step
seed = 1337  # of the weights, the order of the data and dropout
# data
dataset = "tinystories"  # a folder in data/, or the path of one
batching = "windows"  # 'windows' of block_size tokens, or 'by_length': documents, one a row
gradient_accumulation_steps = 2  # micro-batches a step, shared out among the ranks: must be a multiple of their number
batch_size = 32  # rows of a micro-batch
block_size = 128  # longest context in tokens
# model
arch = "gpt2"  # or 'qwen3', which learns faster
n_layer = 6
n_head = 6
n_kv_head = 0  # qwen3: heads of keys and values, shared by the queries; 0: n_head
n_embd = 384
dropout = 0.1  # 0 is good when no token is seen twice
bias = True  # in Linear and LayerNorm, as GPT-2 has them; qwen3 has none
tied = True  # the head is the token table, as in GPT-2; False, with qwen3: it has its own weights
# optimizer
optimizer = "adamw"  # or 'muon': Muon for the matrices of the blocks, AdamW for the rest
learning_rate = 1e-3  # highest learning rate
max_iters = 20000  # steps
max_epochs = 0.0  # passes over the training data, instead of max_iters; 0: max_iters counts
max_minutes = 0.0  # of training, if that is less: the schedule ends with them; 0: only max_iters counts
weight_decay = 0.1  # of matrices and embeddings
beta1 = 0.9
beta2 = 0.99  # longer memory than GPT-2's 0.95, for small batches
grad_clip = 1.0  # largest gradient norm; 0: off
decay_lr = True  # False: constant after the warm-up
schedule = "cosine"  # of the decay to min_lr; or 'linear', or 'trapezoid': constant, and linear in the last 40 %
warmup_iters = 200  # steps of linear warm-up
lr_decay_iters = 0  # steps until min_lr is reached; 0: max_iters
min_lr = 1e-4  # a tenth of learning_rate is a good choice
# system
backend = "auto"  # of torch.distributed: nccl on CUDA, gloo elsewhere
device = "auto"  # cuda, else mps, else cpu; or 'cpu', 'cuda:1', ...
dtype = "auto"  # fastest safe type on the device; or 'float32', 'bfloat16', 'float16' (with loss scaling)
compile = True  # torch.compile, where it works; eager elsewhere
remat = False  # recompute activations in the backward pass: less memory, about a third more time
softmax_words = 0  # of a training step: those of its text and others by lot, cheaper where there are 50,257; 0: all
loss_chunk = -1  # tokens whose logits exist at a time: less memory; 0: all of a micro-batch; -1: 256 where that is faster
config = configure(globals())
# -----------------------------------------------------------------------------


def check_settings() -> None:
    for name in ("eval_interval", "log_interval", "gradient_accumulation_steps", "batch_size", "max_bad_steps"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    for name in ("eval_iters", "max_iters", "warmup_iters", "lr_decay_iters", "learning_rate", "min_lr", "grad_clip",
                 "weight_decay", "seed", "patience", "max_minutes", "max_epochs"):
        if config[name] < 0:
            raise ValueError(f"{name} must not be negative, got {config[name]}")
    if loss_chunk < -1:
        raise ValueError(f"loss_chunk must be at least -1, got {loss_chunk}")
    check_softmax_words(softmax_words, batch_size * block_size)
    for name in ("beta1", "beta2"):
        if not 0 <= config[name] < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {config[name]}")
    schedule_factor(schedule, 0.0)
    if init_from not in ("scratch", "resume", "auto", *OPENAI) and not Path(init_from).is_dir():
        raise ValueError(f"init_from must be scratch, resume, auto, the folder of a model, or {', '.join(OPENAI)}; got "
                         f"{init_from!r}")
    if optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer must be adamw or muon, got {optimizer!r}")
    if logger not in ("", "wandb", "tensorboard", "trackio"):
        raise ValueError(f"logger must be wandb, tensorboard or trackio, got {logger!r}")
    if gradient_accumulation_steps % world_size:
        raise ValueError(f"gradient_accumulation_steps ({gradient_accumulation_steps}) must be a multiple of the number "
                         f"of ranks ({world_size})")


def model_to_tune(base: dict) -> GPT:
    """The model of a checkpoint with the dropout and the context of the settings, which take over the rest from it."""
    weights, shape = base["model"], asdict(GPTConfig(**base["model_args"]))
    if base["meta"]["tokenizer"] != meta["tokenizer"]:
        raise ValueError(f"{init_from} has another tokenizer than the data set {dataset}: prepare that with its tokenizer")
    if any(w.dtype == torch.int8 for w in weights.values()):
        raise ValueError(f"{init_from} is in int8, which cannot be trained: start from the run that it was made of")
    if block_size > shape["block_size"]:
        raise ValueError(f"block_size ({block_size}) is more than the {shape['block_size']} of {init_from}")
    if "transformer.wpe.weight" in weights:
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size].clone()
    model = GPT.from_weights(GPTConfig(**shape | dict(block_size=block_size, dropout=dropout)), weights)
    config.update({name: value for name, value in asdict(model.config).items() if name in config})
    return model


stop_signal = 0


def ask_to_stop(number: int, frame: object) -> None:
    """The first SIGINT or SIGTERM lets the step finish and saves; a second SIGINT leaves at once."""
    global stop_signal
    if stop_signal and number == signal.SIGINT and not distributed:  # torchrun passes the terminal's own one on again
        os._exit(130)
    if not stop_signal and master:
        # not print, which the signal may have interrupted
        os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once, without saving\n")
    stop_signal = number


@contextlib.contextmanager
def errors_of_any_rank():
    """user_errors for many: what is wrong for one rank ends all of them, and the first one says it."""
    errors = [""]
    try:
        yield
    except (ValueError, OSError) as error:
        errors = [str(error) or type(error).__name__]
    if distributed:
        mine, errors = errors[0], [""] * world_size
        dist.all_gather_object(errors, mine)
    for number, error in enumerate(errors):
        if error:
            fail(f"rank {number}: {error}" if number else error)


def same_on_all_ranks(what: str, value: object) -> None:
    if distributed:
        values = [None] * world_size
        dist.all_gather_object(values, value)
        for number, other in enumerate(values):
            if other != values[0]:
                fail(f"rank {number} has {what} {other}, but rank 0 {values[0]}: give all machines the same")


# ranks: torchrun sets these variables; without it there is one
rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
distributed = "RANK" in os.environ
master = rank == 0
say = tqdm.write if master else lambda text: None
sys.stdout.reconfigure(line_buffering=True)  # a redirected log is readable while it grows
with user_errors():
    check_settings()
    device = resolve_device(device)
    device_type = device.split(":")[0]
    dtype = resolve_dtype(dtype, device)
if device == "cuda":
    device = f"cuda:{local_rank}"
    torch.cuda.set_device(device)
if distributed:
    try:
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # one machine, whose ranks have all been restarted equally often
            # torchrun keeps the store from one attempt to the next, and a rank that reads a dead one's address hangs
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend if backend != "auto" else "nccl" if device_type == "cuda" else "gloo", store=store,
                                rank=rank, world_size=world_size, timeout=timedelta(minutes=10))
    except (RuntimeError, ValueError) as error:
        fail(f"backend {backend!r} does not work here: {error}")
signal.signal(signal.SIGINT, ask_to_stop)
signal.signal(signal.SIGTERM, ask_to_stop)

# data
with errors_of_any_rank():
    folder = Path("data") / dataset
    meta = load_meta(folder)
    streams = {split: TokenStream(folder, split, meta) for split in ("train", "val")}
    batches = TrainBatches(streams["train"], block_size, batch_size, seed, batching, meta["eot"])
    for stream in streams.values() if local_rank == 0 else ():
        stream.check(meta)
    if max_epochs:
        max_iters = math.ceil(max_epochs * batches.rows_per_epoch / (batch_size * gradient_accumulation_steps))
same_on_all_ranks("the data", [meta["splits"].get(split, {}).get("sha256", len(streams[split])) for split in streams])

# the model to begin with, if there is one, or the shape of the new one
with errors_of_any_rank():
    tuned = None if init_from in ("scratch", "resume", "auto") else model_to_tune(load_checkpoint(init_from))
    shape = tuned.config if tuned else GPTConfig(
        arch=arch, block_size=block_size, vocab_size=meta["vocab_size"], n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head,
        n_embd=n_embd, dropout=dropout, bias=bias, tied=tied)

# the run: a new one, or the one to go on with
with errors_of_any_rank():
    saved_before = any(Path(out_dir).glob("*.pt"))
    if init_from == "resume" and not saved_before:
        raise ValueError(f"there is nothing to resume in {out_dir}: start with --init_from=scratch")
    if init_from not in ("resume", "auto") and saved_before and not overwrite and not eval_only:
        raise ValueError(f"{out_dir} already holds a run: go on with --init_from=resume, choose another --out_dir, "
                         "or replace it with --overwrite=True")
    lock = lock_run(out_dir) if master and not eval_only else None
with errors_of_any_rank():
    checkpoint = find_resumable(out_dir) if init_from in ("resume", "auto") else None
    if checkpoint:
        theirs = asdict(GPTConfig()) | checkpoint["model_args"]
        differs = {name: theirs[name] for name, mine in asdict(shape).items() if name != "dropout" and theirs[name] != mine}
        shape = replace(shape, **{name: value for name, value in differs.items() if name not in config})  # it began as another
        if wrong := [f"{name}={value}" for name, value in differs.items() if name in config]:
            raise ValueError(f"the run in {out_dir} has {', '.join(wrong)}: give the same settings to resume it")
        if checkpoint["meta"].get("tokenizer") != meta["tokenizer"]:
            raise ValueError(f"the run in {out_dir} was made with another tokenizer than {dataset}: give its own --dataset")

# model
keep_freed_memory()
torch.manual_seed(seed)
torch.set_float32_matmul_precision("high")  # TF32 on CUDA
with errors_of_any_rank():
    raw_model = tuned or GPT(shape)
    raw_model.remat, raw_model.loss_chunk = remat, resolve_loss_chunk(loss_chunk, device, shape.vocab_size)
    raw_model.to(device)
    if softmax_words:
        raw_model.sample_softmax(softmax_words, streams["train"].word_counts(shape.vocab_size).to(device))
    optimizers = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, optimizer)
    if dtype == "auto" and checkpoint and checkpoint["config"].get("device") == device_type:
        dtype = resolve_dtype(checkpoint["config"].get("dtype"), device)  # as measured then: another would not resume exactly
    choices = [measured_dtype(raw_model) if dtype == "auto" else dtype]
same_on_all_ranks(f"in {out_dir} the step", checkpoint["step"] if checkpoint else 0)
if distributed:
    dist.broadcast_object_list(choices)  # ranks that share a CPU would measure differently
dtype = choices[0]
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
autocast = contextlib.nullcontext() if dtype == "float32" else torch.autocast(device_type, getattr(torch, dtype))
step, best_val_loss, stale, seconds, lr_scale = 0, math.inf, 0, 0.0, 1.0  # stale: evaluations since the best one
watch = torch.zeros(3, device=device)  # bad steps in a row, bad steps in all, largest gradient norm since the last log line


def read_log() -> list[dict]:
    """The records of log.jsonl; a line that a kill cut off is none."""
    records, path = [], Path(out_dir) / "log.jsonl"
    for line in open(path, errors="replace") if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError):
            record = json.loads(line)
            if "step" in record:
                records.append(record)
    return records


def restore(checkpoint: dict) -> None:
    """Take up a run where a checkpoint left it; the log forgets what came after, which is about to be made again."""
    global step, best_val_loss, stale, seconds, lr_scale
    try:
        raw_model.load_state_dict(checkpoint["model"])
        for mine, theirs in zip(optimizers, checkpoint["optimizer"], strict=True):
            mine.load_state_dict(theirs)
        scaler.load_state_dict(checkpoint["scaler"])
        watch.copy_(checkpoint["watch"])
        step, best_val_loss, stale = checkpoint["step"], checkpoint["best_val_loss"], checkpoint["stale"]
        seconds, lr_scale = checkpoint["seconds"], checkpoint["lr_scale"]
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint in {out_dir} is not one to go on from ({type(error).__name__}: {error})") from None
    if master and not eval_only:
        kept = [json.dumps(record) + "\n" for record in read_log() if record["step"] <= step]
        write_atomically(Path(out_dir) / "log.jsonl", "".join(kept))


if checkpoint:
    with errors_of_any_rank():
        restore(checkpoint)
    saved = checkpoint["config"]
    changed = [f"{k} {saved[k]!r} -> {v!r}" for k, v in config.items()
               if k in saved and saved[k] != v and v != "auto" and k not in ("init_from", "overwrite")]
    say(f"resuming {out_dir} at step {step}" + (f", with changed settings: {', '.join(changed)}" if changed else ""))
resumed_at = step if checkpoint else -1  # where the evaluation is already made
config.update(device=device_type, dtype=dtype)


def compiled_or_eager() -> torch.nn.Module:
    """The compiled model, tried on one batch; where that fails, the model itself and one line that says why."""
    if not compile:
        return raw_model
    try:
        candidate = torch.compile(raw_model)
        x, y = (t.to(device) for t in batches.batch(0))
        with autocast:
            _, loss = candidate(x, y)
        scaler.scale(loss).backward()
        return candidate
    except Exception as error:  # no C compiler, an old GPU, an operation that inductor does not know
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        say(f"torch.compile does not work here ({type(error).__name__}: {reason[:80]}); training in eager mode")
        return raw_model
    finally:
        raw_model.zero_grad(set_to_none=True)


def train_batches(step: int):
    """This rank's micro-batches from `step` on, with their global numbers."""
    first = step * gradient_accumulation_steps
    while True:
        for i in range(first + rank, first + gradient_accumulation_steps, world_size):
            yield batches.batch(i)
        first += gradient_accumulation_steps


def get_lr(step: int) -> float:
    by_time = seconds / (60 * max_minutes) if max_minutes else 0.0
    return lr_scale * scheduled_lr(step, schedule, learning_rate, min_lr if decay_lr else learning_rate, warmup_iters,
                                   lr_decay_iters or max_iters, by_time)


@torch.no_grad()
def evaluate(split: str) -> float:
    """Mean loss in nats per token over the leading eval_iters batches of a split, or all of it; the ranks share the work."""
    raw_model.eval()  # uncompiled: batches of other shapes would compile anew
    total, count = 0.0, 0
    for x, y in prefetch(eval_batches(streams[split], block_size, batch_size, batching, meta["eot"], eval_iters,
                                      rank, world_size), device):
        with autocast:
            _, loss = raw_model(x, y)
        tokens = int((y >= 0).sum())
        total, count = total + loss.item() * tokens, count + tokens
    raw_model.train()
    sums = torch.tensor([total, count], dtype=torch.float64)
    if distributed:
        sums = sums.to(torch.float32 if device_type == "mps" else torch.float64).to(device)
        dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def open_logger():
    """A function of a step and its metrics that sends them to the service that --logger names."""
    try:
        if logger == "wandb":
            import wandb
            run = wandb.init(project="fablegpt", name=Path(out_dir).name, dir=out_dir, config=config)
            return lambda step, metrics: run.log(metrics, step=step)
        if logger == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(out_dir, purge_step=step)
            atexit.register(writer.close)
            return lambda step, metrics: [writer.add_scalar(k, v, step) for k, v in metrics.items() if v is not None]
        if logger == "trackio":
            import trackio
            trackio.init(project="fablegpt", name=Path(out_dir).name, config=config, resume="allow")
            atexit.register(trackio.finish)
            return lambda step, metrics: trackio.log(metrics, step=step)
    except ImportError as error:
        raise ValueError(f"--logger={logger} lacks a package: pip install {error.name or logger}") from None
    return lambda step, metrics: None


def log(step: int, **metrics) -> None:
    if master and not eval_only:
        metrics = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no nan
        with open(Path(out_dir) / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        send(step, metrics)


def draw_losses(path: Path) -> None:
    """loss.png from log.jsonl: training and validation loss by step, and the floor where it is known."""
    from matplotlib import ticker
    from matplotlib.figure import Figure  # not pyplot, which is slow to load and would look for a display

    records = read_log()
    fig = Figure(figsize=(7, 4), layout="constrained")
    ax = fig.subplots()
    for key, label, style in (("loss", "training batch", "-"), ("val_loss", "validation", "o-")):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None] or [(math.nan, math.nan)]
        ax.plot(*zip(*points), style, label=label, **(dict(color="0.7", lw=1) if key == "loss" else dict(color="C0", ms=4)))
    if "floor" in meta and batching == "by_length":
        ax.axhline(meta["floor"], color="C3", ls="--", label=f"floor: {meta['floor']:.3f}, the entropy of the text")
    ax.set(xlabel="step", ylabel="loss (nats per token)", yscale="log", xscale="symlog" if log_x else "linear",
           title=f"{dataset}: {raw_model.num_params():,} parameters")
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
    ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.legend()
    ax.grid(alpha=0.3)
    fig.savefig(path.with_name("loss.png.tmp"), format="png", dpi=120)
    os.replace(path.with_name("loss.png.tmp"), path)


def save(name: str) -> None:
    if not all(p.isfinite().all() for p in raw_model.parameters()):
        say(f"step {step}: the model is not finite and was not saved")
        return
    state = {"model": raw_model.state_dict(), "model_args": asdict(raw_model.config), "step": step,
             "best_val_loss": best_val_loss, "config": config, "meta": meta}
    if name == "last.pt":
        state |= {"optimizer": [o.state_dict() for o in optimizers], "scaler": scaler.state_dict(), "watch": watch.cpu(),
                  "stale": stale, "seconds": seconds, "lr_scale": lr_scale}
    with user_errors():
        save_checkpoint(out_dir, name, state)


def recent_losses() -> list[float]:
    """The last 20 training losses in the log, so that a spike looks the same after a resume."""
    return [record["loss"] for record in read_log() if record.get("loss") is not None][-20:]


def is_spike(loss: float, recent: list[float]) -> bool:
    """Whether a loss is more than four standard deviations above those before it."""
    return len(recent) >= 10 and not loss <= statistics.mean(recent) + 4 * statistics.stdev(recent)


def out_of_time() -> bool:
    return max_minutes > 0 and seconds >= 60 * max_minutes


def peak_memory() -> float:
    """In GB: of the GPU, else of this process."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


model = compiled_or_eager()
how = "eager" if model is raw_model else "compiled"
if distributed:
    model = DistributedDataParallel(model, device_ids=[local_rank] if device_type == "cuda" else None)
peak, peak_source = peak_flops(device, dtype)
tokens_per_step = gradient_accumulation_steps * batch_size * block_size
say(f"{raw_model.num_params():,} parameters ({raw_model.num_params(non_embedding=True):,} without embeddings), "
    f"{gradient_accumulation_steps} x {batch_size} x {block_size} = {tokens_per_step:,} tokens a step on {world_size} rank(s)")
if batching == "by_length":
    say(f"padding: {batches.padding():.1%} of a batch; {batches.padding(sort=False):.1%} if documents were in random order")
say(f"{dataset}: {len(streams['train']):,} training and {len(streams['val']):,} validation tokens; {device}, {dtype}, "
    f"{how}; MFU against {peak / 1e12:.3g} TFLOP/s ({peak_source})")
with errors_of_any_rank():
    if master and not eval_only:
        if not checkpoint:  # an older run that is being replaced must not be resumed by mistake
            for name in ("last.pt", "prev.pt", "best.pt"):
                (Path(out_dir) / name).unlink(missing_ok=True)
            write_atomically(Path(out_dir) / "log.jsonl", "")
        send = open_logger()

# -----------------------------------------------------------------------------
raw_model.train()
stream = prefetch(train_batches(step), device)
bar = tqdm(total=max_iters, initial=step, disable=not (master and sys.stderr.isatty()), smoothing=0)
started, timed_from, timed_tokens = time.time() - seconds, time.time(), 0
recent, stopping = recent_losses(), False
while True:
    due = step % eval_interval == 0 or step >= max_iters or out_of_time() or eval_only
    if due and step != resumed_at:
        pause = time.time()
        losses = {split: evaluate(split) for split in ("train", "val")}
        say(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        improved = losses["val"] < best_val_loss
        best_val_loss, stale = (losses["val"], 0) if improved else (best_val_loss, stale + 1)
        log(step=step, train_loss=losses["train"], val_loss=losses["val"])
        if master and not eval_only:
            if improved:
                save("best.pt")
            if improved or always_save_checkpoint or step == 0:
                save("last.pt")
            draw_losses(Path(out_dir) / "loss.png")
        timed_from += time.time() - pause  # the clock stands still around an evaluation
    if step >= max_iters or out_of_time() or (patience and stale >= patience) or eval_only:
        break
    if stopping:
        if master:
            save("last.pt")
        break

    # one step
    lr = get_lr(step)
    for group in (group for o in optimizers for group in o.param_groups):
        group["lr"] = lr
    loss_sum = torch.zeros((), device=device)
    micro_steps = gradient_accumulation_steps // world_size
    for micro_step in range(micro_steps):
        x, y = next(stream)
        # dropout as a function of the micro-batch: exact resume without saved state, and the same on any number of ranks
        torch.manual_seed(seed * 1_000_003 + (step * micro_steps + micro_step) * world_size + rank)
        synchronize = not distributed or micro_step == micro_steps - 1
        with contextlib.nullcontext() if synchronize else model.no_sync(), autocast:
            _, loss = model(x, y)
            scaler.scale(loss / micro_steps).backward()
        loss_sum += loss.detach() / micro_steps
        timed_tokens += x.numel()
    for o in optimizers:
        scaler.unscale_(o)
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    bad = ~grad_norm.isfinite()
    for o in optimizers:
        o.grad_scale, o.found_inf = None, bad.float()  # a bad step changes nothing: decided on the device, without waiting
        o.step()
    scaler.update()
    raw_model.zero_grad(set_to_none=True)
    watch = torch.stack([(watch[0] + 1) * bad, watch[1] + bad, torch.fmax(watch[2], grad_norm)])
    step += 1
    bar.update()
    stopping = stop_signal > 0 and not distributed  # ranks agree on it below

    if step % log_interval == 0:
        seconds, loss = time.time() - started, loss_sum.item()
        if distributed:  # on the mean loss, the first one's clock, and whether any was asked to stop
            news = torch.tensor([loss, seconds * master, stop_signal], dtype=torch.float64, device=device)
            dist.all_reduce(news)
            loss, seconds, stopping = news[0].item() / world_size, news[1].item(), news[2].item() > 0
        record = dict(step=step, loss=loss, lr=lr, grad_norm=grad_norm.item(), grad_norm_max=watch[2].item(),
                      bad_steps=int(watch[1]), spike=is_spike(loss, recent))
        recent = (recent + [loss] * math.isfinite(loss))[-20:]
        interval = time.time() - timed_from
        speed = timed_tokens * world_size / interval
        record |= dict(ms=interval / log_interval * 1000, tokens_per_second=speed,
                       mfu=speed * raw_model.flops_per_token() / (peak * world_size))
        say("step {step}: loss {loss:.4f}, lr {lr:.2e}, norm {grad_norm:.2f}, {ms:.0f} ms, "
            "{tokens_per_second:,.0f} tok/s, mfu {mfu:.1%}".format(**record) + ", spike" * record["spike"])
        log(**record)
        bad_in_a_row = int(watch[0])
        watch[2] = 0
        timed_from, timed_tokens = time.time(), 0
        if max_minutes:
            bar.total = min(max_iters, max(step, int(step * 60 * max_minutes / seconds)))

        if bad_in_a_row >= max_bad_steps:
            lower = lr_scale / 2
            with errors_of_any_rank():
                if lower < 0.01:
                    raise ValueError(f"step {step}: the gradient is still not finite with a hundredth of the learning rate: "
                                     "look at the data and the model, or try --dtype=float32")
                restore(find_resumable(out_dir))
            lr_scale, resumed_at, recent = lower, step, recent_losses()
            stream = prefetch(train_batches(step), device)
            bar.n = step
            say(f"{bad_in_a_row} steps in a row had a non-finite gradient: back to step {step}, from now on with "
                f"{lr_scale:g} of the learning rate")
bar.close()
if stopping and step < max_iters:
    say(f"stopped at step {step}, saved in {out_dir}/last.pt; go on with the same command and --init_from=resume")
elif not eval_only:
    why = "" if step >= max_iters else ", the time is over" if out_of_time() else f", no better for {patience} evaluations"
    say(f"done: step {step}{why}, {(time.time() - started) / 60:.1f} minutes, {peak_memory():.1f} GB at most; best "
        f"validation loss {best_val_loss:.4f} in {out_dir}/best.pt, curve in {out_dir}/loss.png; next: "
        f"python sample.py --out_dir={out_dir}")
if distributed:
    dist.destroy_process_group()
