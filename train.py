"""
Train a GPT, from the first step or from where it stopped.

    python train.py config/train_fables.py
    python train.py config/train_small.py --batch_size=16
    torchrun --nproc_per_node=2 train.py
"""
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import find_resumable, save_checkpoint
from configurator import configure, user_errors
from dataset import TokenStream, TrainBatches, eval_batches, load_meta, prefetch
from model import GPT, GPTConfig, peak_flops, resolve_device, resolve_dtype

# -----------------------------------------------------------------------------
# The defaults are those of config/train_small.py: 30M parameters on TinyStories.
out_dir = "out"  # checkpoints, log.jsonl and loss.png
eval_interval = 250  # steps between evaluations; each one also saves a checkpoint
log_interval = 10  # steps between log lines
eval_iters = 20  # leading batches of each split to evaluate on, always the same; 0: the whole split
eval_only = False  # evaluate once, write nothing, leave
always_save_checkpoint = True  # save last.pt at every evaluation; False: only when the validation loss is the lowest yet
init_from = "scratch"  # 'scratch', 'resume', or 'auto': resume if there is something to resume
overwrite = False  # let 'scratch' replace a run that out_dir holds
seed = 1337  # of the weights, the order of the data and dropout
# data
dataset = "tinystories"  # a folder in data/, or the path of one
batching = "windows"  # 'windows' of block_size tokens, or 'by_length': documents, one a row
gradient_accumulation_steps = 2  # micro-batches a step, shared out among the ranks: must be a multiple of their number
batch_size = 32  # rows of a micro-batch
block_size = 128  # longest context in tokens
# model
arch = "gpt2"  # 'gpt2'
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.1  # 0 is good when no token is seen twice
bias = True  # in Linear and LayerNorm, as GPT-2 has them
# optimizer
learning_rate = 1e-3  # highest learning rate
max_iters = 20000  # steps
weight_decay = 0.1  # of matrices and embeddings
beta1 = 0.9
beta2 = 0.99  # longer memory than GPT-2's 0.95, for small batches
grad_clip = 1.0  # largest gradient norm; 0: off
decay_lr = True  # False: constant after the warm-up
warmup_iters = 200  # steps of linear warm-up
lr_decay_iters = 0  # steps until the cosine reaches min_lr; 0: max_iters
min_lr = 1e-4  # a tenth of learning_rate is a good choice
# system
backend = "auto"  # of torch.distributed: nccl on CUDA, gloo elsewhere
device = "auto"  # cuda, else mps, else cpu; or 'cpu', 'cuda:1', ...
dtype = "auto"  # fastest safe type on the device; or 'float32', 'bfloat16', 'float16' (with loss scaling)
compile = True  # torch.compile, where it works; eager elsewhere
config = configure(globals())
# -----------------------------------------------------------------------------


def check_settings() -> None:
    for name in ("eval_interval", "log_interval", "gradient_accumulation_steps", "batch_size"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    for name in ("eval_iters", "max_iters", "warmup_iters", "lr_decay_iters", "learning_rate", "min_lr", "grad_clip",
                 "weight_decay", "seed"):
        if config[name] < 0:
            raise ValueError(f"{name} must not be negative, got {config[name]}")
    for name in ("beta1", "beta2"):
        if not 0 <= config[name] < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {config[name]}")
    if init_from not in ("scratch", "resume", "auto"):
        raise ValueError(f"init_from must be scratch, resume or auto, got {init_from!r}")
    if gradient_accumulation_steps % world_size:
        raise ValueError(f"gradient_accumulation_steps ({gradient_accumulation_steps}) must be a multiple of the number "
                         f"of ranks ({world_size})")


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
if device == "cuda":
    device = f"cuda:{local_rank}"
    torch.cuda.set_device(device)
if distributed:
    dist.init_process_group(backend if backend != "auto" else "nccl" if device_type == "cuda" else "gloo")

# data and, where there is one, the checkpoint to continue from
with user_errors():
    folder = Path("data") / dataset
    meta = load_meta(folder)
    streams = {split: TokenStream(folder, split, meta) for split in ("train", "val")}
    batches = TrainBatches(streams["train"], block_size, batch_size, seed, batching, meta["eot"])
    checkpoint = find_resumable(out_dir) if init_from in ("resume", "auto") else None
    if init_from == "resume" and checkpoint is None:
        raise ValueError(f"there is nothing to resume in {out_dir}: start with --init_from=scratch")
    if init_from == "scratch" and not overwrite and not eval_only and any(Path(out_dir).glob("*.pt")):
        raise ValueError(f"{out_dir} already holds a run: go on with --init_from=resume, choose another --out_dir, "
                         "or replace it with --overwrite=True")

# model
torch.manual_seed(seed)
torch.set_float32_matmul_precision("high")  # TF32 on CUDA
with user_errors():
    model_args = dict(arch=arch, block_size=block_size, vocab_size=meta["vocab_size"], n_layer=n_layer, n_head=n_head,
                      n_embd=n_embd, dropout=dropout, bias=bias)
    raw_model = GPT(GPTConfig(**model_args))
    if checkpoint:
        theirs = checkpoint["model_args"]
        if wrong := [f"{k}={theirs[k]}" for k in theirs if k != "dropout" and theirs[k] != getattr(raw_model.config, k)]:
            raise ValueError(f"the run in {out_dir} has {', '.join(wrong)}: give the same settings to resume it")
        raw_model.load_state_dict(checkpoint["model"])
    if checkpoint and dtype == "auto" and checkpoint["config"]["device"] == device_type:
        dtype = checkpoint["config"]["dtype"]  # what was measured then: another type would not resume exactly
    choices = [resolve_dtype(dtype, device, n_embd)]
if distributed:
    dist.broadcast_object_list(choices)  # ranks that share a CPU would measure differently
dtype = choices[0]
raw_model.to(device)
optimizer = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
autocast = contextlib.nullcontext() if dtype == "float32" else torch.autocast(device_type, getattr(torch, dtype))
step, best_val_loss = 0, math.inf
if checkpoint:
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    step, best_val_loss = checkpoint["step"], checkpoint["best_val_loss"]
    saved = checkpoint["config"]
    changed = [f"{k} {saved[k]!r} -> {v!r}" for k, v in config.items()
               if k in saved and saved[k] != v and v != "auto" and k not in ("init_from", "overwrite")]
    say(f"resuming {out_dir} at step {step}" + (f", with changed settings: {', '.join(changed)}" if changed else ""))
resumed_at = step if checkpoint else -1
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
    """Linear warm-up, then a cosine to min_lr."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / warmup_iters
    end = lr_decay_iters or max_iters
    if not decay_lr:
        return learning_rate
    progress = min(1.0, (step - warmup_iters) / max(1, end - warmup_iters))
    return min_lr + (learning_rate - min_lr) * (1 + math.cos(math.pi * progress)) / 2


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


def log(**record) -> None:
    if master and not eval_only:
        with open(Path(out_dir) / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def draw_losses(path: Path) -> None:
    """loss.png from log.jsonl: training and validation loss by step, and the floor where it is known."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    records = [json.loads(line) for line in open(path.with_name("log.jsonl"))]
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training batch", "-"), ("val_loss", "validation", "o-")):
        ax.plot(*zip(*[(r["step"], r[key]) for r in records if key in r] or [(math.nan, math.nan)]), style, label=label,
                **(dict(color="0.7", lw=1) if key == "loss" else dict(color="C0", ms=4)))
    if "floor" in meta and batching == "by_length":
        ax.axhline(meta["floor"], color="C3", ls="--", label=f"floor: {meta['floor']:.3f}, the entropy of the text")
    ax.set(xlabel="step", ylabel="loss (nats per token)", yscale="log",
           title=f"{dataset}: {raw_model.num_params():,} parameters")
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
    ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.legend()
    ax.grid(alpha=0.3)
    fig.savefig(path.with_name("loss.png.tmp"), format="png", dpi=120)
    plt.close(fig)
    os.replace(path.with_name("loss.png.tmp"), path)


def save(name: str) -> None:
    state = {"model": raw_model.state_dict(), "model_args": model_args, "step": step, "best_val_loss": best_val_loss,
             "config": config, "meta": meta}
    if name == "last.pt":
        state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    with user_errors():
        save_checkpoint(out_dir, name, state)


model = compiled_or_eager()
how = "eager" if model is raw_model else "compiled"
if distributed:
    model = DistributedDataParallel(model, device_ids=[local_rank] if device_type == "cuda" else None)
peak, peak_source = peak_flops(device, dtype)
tokens_per_step = gradient_accumulation_steps * batch_size * block_size
say(f"{raw_model.num_params():,} parameters ({raw_model.num_params(non_embedding=True):,} without embeddings), "
    f"{gradient_accumulation_steps} x {batch_size} x {block_size} = {tokens_per_step:,} tokens a step on {world_size} rank(s)")
say(f"{dataset}: {len(streams['train']):,} training and {len(streams['val']):,} validation tokens; {device}, {dtype}, "
    f"{how}; MFU against {peak / 1e12:.3g} TFLOP/s ({peak_source})")
if master and not eval_only:
    with user_errors():
        os.makedirs(out_dir, exist_ok=True)
        if not checkpoint:  # an older run that is being replaced must not be resumed by mistake
            for name in ("last.pt", "prev.pt", "best.pt"):
                (Path(out_dir) / name).unlink(missing_ok=True)
        lines = [line for line in open(Path(out_dir) / "log.jsonl")] if checkpoint else []
        with open(Path(out_dir) / "log.jsonl", "w") as file:  # steps after the checkpoint are about to be made again
            file.writelines(line for line in lines if json.loads(line)["step"] <= step)

# -----------------------------------------------------------------------------
raw_model.train()
stream = prefetch(train_batches(step), device)
bar = tqdm(total=max_iters, initial=step, disable=not (master and sys.stderr.isatty()), smoothing=0.05)
started, timed_from, timed_tokens = time.time(), time.time(), 0
while True:
    last = step >= max_iters
    if (step % eval_interval == 0 or last or eval_only) and step != resumed_at:
        pause = time.time()
        losses = {split: evaluate(split) for split in ("train", "val")}
        say(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        improved = losses["val"] < best_val_loss
        best_val_loss = min(best_val_loss, losses["val"])
        log(step=step, train_loss=losses["train"], val_loss=losses["val"])
        if master and step > 0 and not eval_only:
            if improved:
                save("best.pt")
            if improved or always_save_checkpoint:
                save("last.pt")
            draw_losses(Path(out_dir) / "loss.png")
        timed_from += time.time() - pause  # the clock stands still around an evaluation
    if last or eval_only:
        break

    # one step
    lr = get_lr(step)
    for group in optimizer.param_groups:
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
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    step += 1
    bar.update()

    if step % log_interval == 0:
        if distributed:
            dist.all_reduce(loss_sum)
        record = dict(step=step, loss=loss_sum.item() / world_size, lr=lr, grad_norm=grad_norm.item())
        seconds = time.time() - timed_from
        speed = timed_tokens * world_size / seconds
        record |= dict(ms=seconds / log_interval * 1000, tokens_per_second=speed,
                       mfu=speed * raw_model.flops_per_token() / (peak * world_size))
        say("step {step}: loss {loss:.4f}, lr {lr:.2e}, norm {grad_norm:.2f}, {ms:.0f} ms, "
            "{tokens_per_second:,.0f} tok/s, mfu {mfu:.1%}".format(**record))
        log(**record)
        timed_from, timed_tokens = time.time(), 0
bar.close()
if not eval_only:
    say(f"done: step {step} in {(time.time() - started) / 60:.1f} minutes, best validation loss {best_val_loss:.4f} in "
        f"{out_dir}/best.pt, curve in {out_dir}/loss.png; next: python sample.py --out_dir={out_dir}")
if distributed:
    dist.destroy_process_group()
