"""
Train a GPT from scratch, resume a run, or fine-tune a model.

    python train.py config/train_fables.py
    python train.py config/train_small.py --batch_size=16
    torchrun --nproc_per_node=2 train.py
"""
import contextlib
import functools
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # fewer gaps on a GPU
import torch

from lib import checkpoint as ckpt
from lib import lora, machine, optim, runlog
from lib.configurator import at_least, configure, one_of, user_errors
from lib.console import duration, named_lines, visible
from lib.corpus import check_once, load_meta
from lib.dataset import TokenStream, TrainBatches, eval_batches, eval_spans, prefetch
from lib.decoding import short_sample
from lib.distributed import Ranks, StopSignal
from lib.files import lock_run, write_atomically
from lib.loss import check_softmax_tokens, evaluate_splits, make_loss
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# Settings. The defaults train the model of config/train_small.py with smaller batches.

# run
out_dir = "out"  # checkpoints, log.jsonl and loss.png
eval_interval = 250  # steps between evaluations; each also saves a checkpoint
log_interval = 10  # steps between log lines
eval_iters = 20  # batches to evaluate per split (0: the whole val split, as many of train)
eval_only = False  # evaluate once, write nothing, exit
patience = 0  # stop after this many evaluations without a lower validation loss (0: never)
sample_every_eval = True  # print a short sample of the model after each evaluation
always_save_checkpoint = True  # save last.pt at every evaluation, not only at the best one
keep_every = 0  # steps between checkpoints to keep, such as step_001000.pt, weights only (0: off)
init_from = "scratch"  # or resume, auto (resume if possible), a run, a file, gpt2, USER/NAME
overwrite = False  # let 'scratch' replace the run in out_dir
max_bad_steps = 10  # return to the last evaluation after this many bad gradients in a row
logger = ""  # also log to 'wandb', 'tensorboard' or 'trackio'
log_x = False  # loss.png with a logarithmic axis of steps
seed = 1337  # for weights, data order and dropout
# data
dataset = "tinystories"  # a folder in data/, or a path
batching = "windows"  # 'windows' of block_size tokens, or 'by_length': one document per row
gradient_accumulation_steps = 2  # micro-batches per step, a multiple of the number of ranks
batch_size = 32  # rows of a micro-batch
block_size = 128  # longest context in tokens
# model
arch = "gpt2"  # or 'qwen3', which learns faster, or 'llama'
n_layer = 6  # blocks
n_head = 6  # attention heads
n_kv_head = 0  # llama, qwen3: heads of keys and values (0: n_head)
n_embd = 384  # width
dropout = 0.1  # 0 is good when no token is seen twice
bias = True  # gpt2: biases in Linear and LayerNorm
tied = True  # the head shares the weights of the token embedding; gpt2: always
pad_vocab = False  # pad GPT-2's 50,257 tokens to 50,304, a multiple of 64, as nanoGPT does
lora_rank = 0  # fine-tune only adapters of this rank, with less memory (0: all weights)
# optimizer
optimizer = "adamw"  # or 'muon': Muon for the matrices of the blocks, AdamW for the rest
learning_rate = 1e-3  # highest learning rate
embedding_lr_scale = 0.0  # factor on the token embedding's rate (0: 1; with muon 640 / n_embd)
max_iters = 20000  # steps; the default does not apply if another limit below is set
max_epochs = 0.0  # passes over the training data (0: no limit)
max_minutes = 0.0  # time for training and evaluation, excluding start-up (0: no limit)
weight_decay = 0.1  # of matrices and embeddings
beta1 = 0.9  # decay of the mean of the gradients; momentum of Muon
beta2 = 0.99  # longer memory than GPT-2's 0.95, for small batches
grad_clip = 1.0  # largest gradient norm (0: off)
decay_lr = True  # False: a constant rate after the warmup
schedule = "cosine"  # decay to min_lr; or 'linear', or 'trapezoid': only in the last 40%
warmup_iters = 200  # steps of linear warmup
lr_decay_iters = 0  # steps until min_lr is reached (0: the end of the run)
min_lr = 1e-4  # a tenth of learning_rate is a good choice
# system
backend = "auto"  # of torch.distributed: nccl on CUDA, gloo elsewhere
device = "auto"  # cuda, else mps, else cpu; or 'cpu', 'cuda:1', ...
dtype = "auto"  # fastest safe type on the device; or 'float32', 'bfloat16', 'float16'
compile = True  # torch.compile, where it works
deterministic = False  # use only deterministic kernels; slower on a GPU
remat = False  # recompute activations in the backward pass: less memory, a third more time
softmax_tokens = 0  # tokens in the training softmax (0: all); logs slightly low training losses
loss_chunk = -1  # compute the logits of this many tokens at a time (0: all; -1: 256 if faster)
config, given = configure(
    globals(), announce=True, eval_interval=at_least(1), log_interval=at_least(1),
    eval_iters=at_least(0), patience=at_least(0), keep_every=at_least(0), max_bad_steps=at_least(1),
    seed=at_least(0), logger=one_of("", "wandb", "tensorboard", "trackio"),
    batching=one_of("windows", "by_length"), gradient_accumulation_steps=at_least(1),
    batch_size=at_least(1), lora_rank=at_least(0), optimizer=one_of("adamw", "muon"),
    max_iters=at_least(0), max_epochs=at_least(0), max_minutes=at_least(0),
    learning_rate=at_least(0), embedding_lr_scale=at_least(0), min_lr=at_least(0),
    weight_decay=at_least(0), beta1=at_least(0, below=1), beta2=at_least(0, below=1),
    grad_clip=at_least(0), schedule=one_of(*optim.SCHEDULES), warmup_iters=at_least(0),
    lr_decay_iters=at_least(0), loss_chunk=at_least(-1))


# -----------------------------------------------------------------------------
# Functions
def make_batches(stream: TokenStream, block_size: int, eot: int) -> TrainBatches:
    """Return the training batches. Raise ValueError if block_size does not fit."""
    check_softmax_tokens(softmax_tokens, batch_size * block_size)
    return TrainBatches(stream, block_size, batch_size, seed, batching, eot,
                        gradient_accumulation_steps)


def micro_batches(batches: TrainBatches, step: int, ranks: Ranks) -> Iterator:
    """Yield this rank's micro-batches from `step` on: inputs, targets and weight."""
    while True:
        first = step * gradient_accumulation_steps
        for i in range(first + ranks.rank, first + gradient_accumulation_steps, ranks.world_size):
            yield *batches.batch(i), torch.tensor(batches.weight(i))
        step += 1


def forward_backward(model, x, y, weight, autocast, scaler, micro_steps: int) -> torch.Tensor:
    """Add the gradient of a micro-batch, one of micro_steps; return its share of the loss."""
    with autocast:
        loss = model(x, y)[1] * weight / micro_steps
        scaler.scale(loss).backward()
    return loss.detach()


@functools.cache  # counting the parameters in every step would be slow
def flops_per_token(model: GPT, T: int) -> int:
    return model.flops_per_token(T, head_tokens=min(softmax_tokens, model.config.vocab_size))


def current_lr(state: ckpt.RunState, last_step: float) -> float:
    """Return the learning rate of the next step."""
    time_share = state.seconds / (60 * max_minutes) if max_minutes else 0.0
    return state.lr_scale * optim.scheduled_lr(
        state.step, schedule, learning_rate, min_lr if decay_lr else learning_rate, warmup_iters,
        lr_decay_iters or last_step, time_share)


def save(name: str, model: GPT, state: ckpt.RunState, meta: dict, optimizers: list = (),
         scaler=None) -> None:
    """Save a checkpoint. With optimizers and scaler, a run can be resumed from it."""
    if not all(p.isfinite().all() for p in model.parameters()):
        say(f"step {state.step}: the model is not finite and was not saved")
        return
    weights = model.state_dict() if optimizers else lora.merge_adapters(model.state_dict())
    checkpoint = {"model": weights, "model_args": asdict(model.config),
                  "config": config, "meta": meta, "step": state.step,
                  "best_val_loss": state.best_val_loss}
    if optimizers:
        checkpoint |= {"optimizer": [o.state_dict() for o in optimizers],
                       "scaler": scaler.state_dict(), **state.to_dict()}
    with user_errors():
        ckpt.save_checkpoint(out_dir, name, checkpoint)


# -----------------------------------------------------------------------------
# Ranks
ranks = Ranks.from_environment()
sys.stdout.reconfigure(line_buffering=True)  # a redirected log can be read while it grows
say = (lambda text: print(visible(text))) if ranks.master else lambda text: None
with user_errors():
    device = machine.resolve_device(device)
    dtype = machine.resolve_dtype(dtype, device)
ranks.start(device, backend)
machine.explain_out_of_memory()
device_type = device.split(":")[0]
ranks.check_same({name: value for name, value in config.items() if name != "device"})
with ranks.user_errors():
    if gradient_accumulation_steps % ranks.world_size:
        raise ValueError(f"gradient_accumulation_steps ({gradient_accumulation_steps}) must be a "
                         f"multiple of the number of ranks ({ranks.world_size})")
stop = StopSignal(ranks)

# -----------------------------------------------------------------------------
# Data
with ranks.user_errors():
    folder = Path("data") / dataset
    meta = load_meta(folder)
    streams = {split: TokenStream(folder, split, meta) for split in ("train", "val")}
    checksums = [meta["splits"].get(s, {}).get("sha256", len(streams[s])) for s in streams]
    if ranks.local_rank == 0:
        for split, stream in streams.items():  # nanoGPT's data has no checksums: add them
            meta["splits"].setdefault(split, {})["sha256"] = check_once(stream, meta)
ranks.check_same({"the data": checksums})

# -----------------------------------------------------------------------------
# Model
machine.set_up_torch(many_shapes=batching == "by_length", deterministic=deterministic)
with ranks.user_errors():
    resuming = ckpt.should_resume(out_dir, init_from, overwrite or eval_only)
    finetuned, checkpoint = None, None
    saved_config, base_model = {}, ""
    if init_from not in ("scratch", "resume", "auto"):
        asked = {name: config[name] for name in ("block_size", "dropout") if name in given}
        base = ckpt.load_checkpoint(init_from)
        finetuned = ckpt.model_to_finetune(base, init_from, meta["tokenizer"], **asked)
        saved_config, base_model = asdict(finetuned.config), base["meta"].get("base_model", "")
        if lora_rank and meta["vocab_size"] > base["meta"]["vocab_size"]:
            raise ValueError(f"{dataset} has tokens that {init_from} does not have, and lora_rank "
                             "does not train embeddings: leave it out")
        base = None  # free its memory
    if lora_rank and not (finetuned or resuming):
        raise ValueError("lora_rank needs a trained model: set --init_from to a run, a file or "
                         "USER/NAME")
    padded_vocab = 50304 if pad_vocab and meta["vocab_size"] == 50257 else meta["vocab_size"]
    model_config = finetuned.config if finetuned else GPTConfig(
        arch=arch, block_size=block_size, vocab_size=padded_vocab, n_layer=n_layer, n_head=n_head,
        n_kv_head=n_kv_head, n_embd=n_embd, dropout=dropout, bias=bias, tied=tied)
    if not resuming:  # before the lock, which creates out_dir
        batches = make_batches(streams["train"], model_config.block_size, meta["eot"])
    # held until this process exits; a checkpoint is read after this, when no other run changes it
    lock = lock_run(out_dir) if ranks.master and not eval_only else None
with ranks.user_errors():
    if resuming:
        checkpoint = ckpt.find_resumable(out_dir)
        model_config = ckpt.config_to_resume(checkpoint, model_config, config, given, meta)
        batches = make_batches(streams["train"], model_config.block_size, meta["eot"])
        saved_config, base_model = checkpoint["config"], checkpoint["meta"].get("base_model", "")
        lora_rank = config["lora_rank"] = lora.rank_of(checkpoint["model"])
    meta |= {"base_model": base_model} if base_model else {}  # the model of the hub it started from
    # an existing model keeps its own architecture
    kept = asdict(model_config).keys() & config.keys() & saved_config.keys()
    config.update({name: saved_config[name] for name in kept})
    block_size, config["dropout"] = model_config.block_size, model_config.dropout
    # evaluate at most as many batches of the training split as the validation split has
    val_rows = len(eval_spans(streams["val"], block_size, batching, meta["eot"]))
    max_batches = min(eval_iters or math.inf, math.ceil(val_rows / batch_size))
    if not val_rows:
        raise ValueError(f"{streams['val'].name} has only one token: there is nothing to predict")
ranks.check_same({f"the checkpoint step in {out_dir}": checkpoint["step"] if checkpoint else 0,
                  "the model to start from": base_model})
last_step = max_iters if "max_iters" in given or not (max_epochs or max_minutes) else math.inf
if max_epochs:
    last_step = min(last_step, batches.steps_in(max_epochs))
torch.manual_seed(seed)
with ranks.user_errors():
    # weights and, if all are trained, gradients and what the optimizer remembers
    machine.check_memory(machine.weight_bytes(model_config) * (1 if lora_rank else 3), device)
    raw_model = (finetuned or GPT(model_config)).to(device)
    if lora_rank:
        lora.add_adapters(raw_model, lora_rank)
    vocab_size = raw_model.config.vocab_size
    raw_model.remat = remat
    raw_model.loss_fn = make_loss(
        machine.resolve_loss_chunk(loss_chunk, device, vocab_size), softmax_tokens,
        streams["train"].token_counts(vocab_size).to(device) if softmax_tokens else None)
    saved_dtype = str(saved_config.get("dtype", "")) if saved_config.get("device") == "cpu" else ""
    dtype = machine.resolve_dtype_for(raw_model, dtype, device, saved_dtype)
dtype = ranks.gather(dtype)[0]  # ranks that share a CPU would measure differently
autocast = machine.autocast(device, dtype)
config.update(device=device_type, dtype=dtype)

# -----------------------------------------------------------------------------
# Optimizer
optimizers = optim.make_optimizers(raw_model, optimizer, weight_decay, learning_rate,
                                   (beta1, beta2), device_type, embedding_lr_scale)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")

# -----------------------------------------------------------------------------
# Resume
log = runlog.RunLog(out_dir, write=ranks.master and not eval_only)
state = ckpt.RunState.start(device)
if checkpoint:
    with ranks.user_errors():
        state = ckpt.restore(checkpoint, raw_model, optimizers, scaler, device)
        log.keep_until(state.step)
    say(ckpt.describe_resume(checkpoint, config, current_lr(state, last_step)))
    checkpoint = None  # free its memory
n_params, n_in_blocks = raw_model.num_params(), raw_model.num_params(non_embedding=True)
n_trained = sum(p.numel() for p in raw_model.parameters() if p.requires_grad)
say(named_lines(
    model=f"{n_params:,} parameters ({n_in_blocks:,} without embeddings)",
    lora=f"rank {lora_rank}, {n_trained:,} trained parameters" if lora_rank else "",
    data=f"{dataset}: {len(streams['train']):,} training tokens, {len(streams['val']):,} "
         "validation tokens",
    batch=f"{gradient_accumulation_steps} x {batch_size} x {block_size} = "
          f"{batches.rows_per_step * block_size:,} tokens per step",
    padding=f"{batches.padding():.1%} of a batch ({batches.padding(sort=False):.1%} if documents "
            "were in random order)" if batching == "by_length" else ""))

# -----------------------------------------------------------------------------
# Compile
micro_steps = gradient_accumulation_steps // ranks.world_size
if compile:
    first = [t.to(device) for t in next(micro_batches(batches, 0, ranks))]
    model, form = machine.compile_or_eager(
        raw_model, lambda compiled: forward_backward(compiled, *first, autocast, scaler, 1), say,
        ranks.wrap)
else:
    model, form = ranks.wrap(raw_model), "eager"
peak, peak_source = machine.peak_flops(device, dtype)
ranks_note = f", {ranks.world_size} ranks" if ranks.distributed else ""
say(named_lines(device=f"{device}, {dtype}, {form}{ranks_note}",
                peak=f"{peak / 1e12:.3g} TFLOP/s for the MFU ({peak_source})"))

# -----------------------------------------------------------------------------
# Start. Only now, when all of the set-up has worked, an earlier run is replaced.
tokenizer = runlog.tokenizer_or_none(meta, say) if sample_every_eval and ranks.master else None
with ranks.user_errors():
    if log.write:
        if not resuming:  # the run that this one replaces must not be resumed by mistake
            ckpt.remove_run(out_dir)
            write_atomically(log.path, "")
        log.send = runlog.open_logger(logger, out_dir, config, state.step)
    recent = log.recent_losses()

# -----------------------------------------------------------------------------
# Loop
raw_model.train()
prefetched = prefetch(micro_batches(batches, state.step, ranks), device)
timer = runlog.StepTimer(state.step, state.seconds, device)
stopping, first_step = False, state.step
while True:
    out_of_time = max_minutes > 0 and state.seconds >= 60 * max_minutes
    at_end = state.step >= last_step or out_of_time or eval_only
    if stopping:  # last.pt stays, as bad steps return to the last evaluation
        if log.write:
            save("stop.pt", raw_model, state, meta, optimizers, scaler)
        break

    # evaluate and save
    due = state.step % eval_interval == 0 or at_end
    if due and (state.step != state.evaluated_at or eval_only):
        with timer.evaluation():
            # on the uncompiled model: batches of other shapes would be compiled again
            my_batches = {split: prefetch(eval_batches(
                stream, block_size, batch_size, batching, meta["eot"], max_batches, ranks.rank,
                ranks.world_size), device) for split, stream in streams.items()}
            losses = evaluate_splits(raw_model, my_batches, autocast, ranks, stop)
            if not losses:  # a resume repeats this evaluation
                stopping = True
                continue
            improved = state.count_evaluation(losses["val"])
            best = "new best" if improved else f"best {state.best_val_loss:.4f}"
            say(runlog.eval_line(state.step, last_step, losses, "" if eval_only else best))
            log.add(state.step, train_loss=losses["train"], val_loss=losses["val"])
            if log.write:
                if improved:
                    save("best.pt", raw_model, state, meta)
                keep = improved or always_save_checkpoint or state.step == 0
                if keep and math.isfinite(losses["val"]):
                    save("last.pt", raw_model, state, meta, optimizers, scaler)
                runlog.draw_losses(log, f"{dataset}: {n_params:,} parameters",
                                   meta.get("floor") if batching == "by_length" else None, log_x)
            if tokenizer:
                text = short_sample(raw_model, tokenizer, seed + state.step)
                say(runlog.sample_lines(state.step, last_step, text))
    if log.write and keep_every and state.step and state.step % keep_every == 0:
        save(ckpt.step_file(state.step), raw_model, state, meta)
    if at_end or (patience and state.stale >= patience):
        break

    # set the learning rate
    lr = current_lr(state, last_step)
    optim.set_lr(optimizers, lr)

    # accumulate the gradient and update the parameters
    loss = torch.zeros((), device=device)
    for i in range(micro_steps):
        x, y, weight = next(prefetched)
        # seeded by the micro-batch, dropout is the same after a resume and on any number of ranks
        micro_batch = (state.step * micro_steps + i) * ranks.world_size + ranks.rank
        torch.manual_seed(seed * 1_000_003 + micro_batch)
        wait = ranks.distributed and i < micro_steps - 1  # ranks exchange gradients at the end
        with model.no_sync() if wait else contextlib.nullcontext():
            loss += forward_backward(model, x, y, weight, autocast, scaler, micro_steps)
        timer.count(x.numel(), x.numel() * flops_per_token(raw_model, x.size(1)))
    grad_norm, bad = optim.step(raw_model, optimizers, scaler, grad_clip)
    state.count_step(grad_norm, bad)
    if not ranks.distributed:  # ranks agree on both at the next log line
        stopping, state.seconds = stop.requested, timer.seconds
    if state.step % log_interval > 0:
        continue

    # log: the only place where the loop waits for the device
    loss, grad_norm, grad_norm_max, bad_in_a_row, bad_steps = torch.stack(
        [loss, grad_norm, state.grad_norm_max, state.bad_in_a_row, state.bad_steps]).tolist()
    if ranks.distributed:  # the mean loss, the first rank's clock, and whether any was told to stop
        loss, state.seconds, stopping = ranks.sum(
            [loss / ranks.world_size, timer.seconds * ranks.master, stop.requested], device)
    spike = runlog.is_spike(loss, recent)
    recent = (recent + [loss] * math.isfinite(loss))[-20:]
    ms, speed, flops = timer.end_lap(state.step)
    speed *= ranks.world_size
    peak = max(peak, flops)  # a measured peak can be too low
    mfu = flops / peak
    left = timer.seconds_left(state.step, last_step, eval_interval, 60 * max_minutes)
    say(runlog.step_line(state.step, last_step, loss, lr, grad_norm, speed, mfu, left, spike))
    log.add(state.step, loss=loss, lr=lr, grad_norm=grad_norm, grad_norm_max=grad_norm_max,
            bad_steps=int(bad_steps), spike=spike, ms=ms, tokens_per_second=speed, mfu=mfu)
    state.grad_norm_max = torch.zeros((), device=device)

    # after many bad steps in a row, go back to the last checkpoint and halve the learning rate
    if bad_in_a_row >= max_bad_steps:
        failed_at, lr_scale = state.step, state.lr_scale / 2
        with ranks.user_errors():
            if lr_scale < 0.01:
                raise ValueError(f"step {failed_at}: the gradient is still not finite with a "
                                 "hundredth of the learning rate; try --dtype=float32")
            state = ckpt.return_to_last(out_dir, raw_model, optimizers, scaler, device)
            log.keep_until(state.step)
            if log.write:
                ckpt.remove_after(out_dir, state.step)  # those steps are undone
        state.lr_scale, recent = lr_scale, log.recent_losses()
        prefetched = prefetch(micro_batches(batches, state.step, ranks), device)
        say(f"{bad_in_a_row:.0f} steps in a row had a non-finite gradient: returned to step "
            f"{state.step}, continuing with {lr_scale:g} times the learning rate")
    timer.start_lap(state.step)

why = runlog.why_stopped(state.step, last_step, out_of_time, patience)
if stopping and not eval_only:
    saved = Path(out_dir) / "stop.pt"
    say(f"stopped at step {state.step}{f', saved in {saved}' if saved.exists() else ''}; continue "
        "with the same command and --init_from=resume")
elif resuming and state.step == first_step and not eval_only:
    say(f"nothing to train: the run in {out_dir} is at step {state.step}{why}; to continue it, "
        "increase the limit, for example --max_iters")
elif not eval_only:
    say(named_lines(
        done=f"step {state.step}{why}, {duration(timer.seconds)}"
             f"{machine.describe_peak_memory(device)}",
        best=f"validation loss {state.best_val_loss:.4f}, {out_dir}/best.pt",
        curve=f"{out_dir}/loss.png",
        next=f"python eval.py --out_dir={out_dir}\npython sample.py --out_dir={out_dir}"))
ranks.stop()
