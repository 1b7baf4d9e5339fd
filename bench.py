"""
Measure the speed of training, of the batches alone or of generation, or the time to a loss.

    python bench.py config/train_fables.py
    python bench.py --against=/path/to/nanoGPT/model.py
    python bench.py --mode=data config/train_fables.py
    python bench.py --mode=loss config/train_fables.py --max_iters=300 --eval_interval=100 --seeds=3
    python bench.py --mode=generate --against=hf
    python bench.py --mode=generate --run=out --against=out-q8_0.gguf --texts=1
    python bench.py --mode=report config/train_gpt2_124m.py

Training is measured on random tokens. `--against` measures another program alternately with this
one: eager and compiled, in nanoGPT's own data type (bfloat16 on CUDA, float32 elsewhere). The
faster of the two is compared. `--mode=report` measures training, its memory and generation, and
prints a table for a GitHub issue. The last line of output is a JSON object; its ratios are ours
over theirs.
"""
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from lib import configurator, machine, optim
from lib.checkpoint import load_model, model_from_weights
from lib.configurator import at_least, configure, one_line, one_of, user_errors
from lib.console import print_table, progress, visible
from lib.corpus import check_once, load_meta
from lib.dataset import TokenStream, TrainBatches, eval_batches, prefetch
from lib.decoding import Sampling
from lib.loss import check_softmax_tokens, evaluate, make_loss
from lib.peers import load_peer
from lib.quantize import prepare_for_inference, quantize_int8
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# what to measure
mode = "train"  # 'train', 'data' (batches alone), 'generate', 'loss', 'report' (train and generate)
against = ""  # a nanoGPT-style model.py; 'hf': transformers' GPT2LMHeadModel; FILE.gguf: llama.cpp
rounds = 5  # timed rounds, of which the median counts; not for loss
steps = 5  # train, data, report: steps per round
# time to a loss
target_loss = 0.0  # nats per token on the whole validation split (0: the other's last loss)
their_config = ""  # config file of the other program (empty: our settings)
seeds = 1  # runs of each program
max_iters = 20000  # steps
eval_interval = 250  # steps between evaluations, whose time is excluded
# generation
run = ""  # the model: a run, a Hugging Face folder or USER/NAME of its hub (empty: a new one)
max_new_tokens = 64  # after a prompt of a quarter of block_size, with top_k 40
texts = "1,8,64"  # numbers of texts at a time
# data
dataset = "tinystories"  # data, loss: a folder in data/, or a path
batching = "windows"  # or 'by_length': one document per row
gradient_accumulation_steps = 2  # loss: micro-batches per step
batch_size = 32  # rows of a micro-batch
block_size = 128  # context in tokens
vocab_size = 0  # train, generate (0: that of the prepared dataset, else GPT-2's 50,257)
# model
arch = "gpt2"  # or 'qwen3', 'llama'
n_layer = 6  # blocks
n_head = 6  # attention heads
n_kv_head = 0  # llama, qwen3: heads of keys and values (0: n_head)
n_embd = 384  # width
dropout = 0.1  # share of activations that are set to zero
bias = True  # gpt2: biases in Linear and LayerNorm
tied = True  # the head shares the weights of the token embedding; gpt2: always
# optimizer
optimizer = "adamw"  # or 'muon'
learning_rate = 1e-3  # highest learning rate
embedding_lr_scale = 0.0  # factor on the token embedding's rate (0: 1; with muon 640 / n_embd)
weight_decay = 0.1  # of matrices and embeddings
beta1 = 0.9  # decay of the mean of the gradients; momentum of Muon
beta2 = 0.99  # decay of the mean of their squares
grad_clip = 1.0  # largest gradient norm (0: off)
schedule = "cosine"  # decay to min_lr; or 'linear', or 'trapezoid'
warmup_iters = 200  # steps of linear warmup
min_lr = 1e-4  # learning rate at the end
# system
device = "auto"  # cuda, else mps, else cpu; or 'cpu', 'cuda:1', ...
dtype = "auto"  # fastest safe type on the device; or 'float32', 'bfloat16', 'float16'
compile = True  # torch.compile, where it works
remat = False  # as in train.py, for this program only
softmax_tokens = 0  # as in train.py, for this program only
loss_chunk = -1  # as in train.py, for this program only
seed = 1337  # for weights, data and dropout
if "--mode=plan" in sys.argv:
    configurator.fail("plans have a script of their own: python plan.py, with the same settings")
config, _ = configure(
    globals(), skip_settings_of="train.py", announce=True,
    mode=one_of("train", "data", "generate", "loss", "report"),
    rounds=at_least(1), steps=at_least(1), target_loss=at_least(0), seeds=at_least(1),
    max_new_tokens=at_least(1), gradient_accumulation_steps=at_least(1), batch_size=at_least(1),
    vocab_size=at_least(0), optimizer=one_of("adamw", "muon"), learning_rate=at_least(0),
    embedding_lr_scale=at_least(0), max_iters=at_least(1), weight_decay=at_least(0),
    beta1=at_least(0, below=1), beta2=at_least(0, below=1), grad_clip=at_least(0),
    schedule=one_of(*optim.SCHEDULES), warmup_iters=at_least(0), min_lr=at_least(0),
    eval_interval=at_least(1), loss_chunk=at_least(-1), seed=at_least(0))


# -----------------------------------------------------------------------------
# The programs that are compared

class Side:
    """A program: its model, its optimizers, and how it trains and generates."""

    def __init__(self, name: str, model, optimizers: list, compute_dtype: str, ours: bool):
        self.name, self.compute_dtype, self.ours = name, compute_dtype, ours
        self.optimizers = optimizers
        self.raw_model = self.model = model  # compile() may replace self.model
        self.form = "eager"
        self.autocast = machine.autocast(device, compute_dtype)
        self.scaler = torch.amp.GradScaler(device_type, enabled=compute_dtype == "float16")
        self.seconds: list[float] = []  # of its rounds

    def compile(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Compile the model on one batch, where that works."""
        self.model, self.form = machine.compile_or_eager(
            self.raw_model, lambda compiled: self.forward_backward(compiled, x, y, 1),
            lambda line: print(f"{self.name}: {line}"))

    def forward_backward(self, model, x: torch.Tensor, y: torch.Tensor, micro_steps: int) -> None:
        with self.autocast:
            _, loss = model(x, y)
        self.scaler.scale(loss / micro_steps).backward()

    def step(self, micro_batches: list[tuple], lr: float, clip: float) -> None:
        optim.set_lr(self.optimizers, lr)
        for x, y in micro_batches:
            self.forward_backward(self.model, x, y, len(micro_batches))
        optim.step(self.raw_model, self.optimizers, self.scaler, clip)

    @torch.no_grad()
    def generate(self, idx: torch.Tensor, n: int) -> None:
        """Continue token ids (B, T) by n tokens with temperature 0.8 and top_k 40."""
        self.raw_model.eval()
        extra = dict(sampler=Sampling(temperature=0.8, top_k=40)) if self.ours else {}
        with self.autocast:
            self.raw_model.generate(idx, n, 0.8, 40, **extra)


def our_config(c: SimpleNamespace) -> GPTConfig:
    return GPTConfig(**{field.name: getattr(c, field.name) for field in fields(GPTConfig)
                        if hasattr(c, field.name)})


def our_side(c: SimpleNamespace, model_seed: int, token_counts: torch.Tensor) -> Side:
    """Set up this program as train.py does, with the training settings c."""
    machine.keep_freed_memory()
    torch.manual_seed(model_seed)
    model = GPT(our_config(c)).to(device)
    chunk = machine.resolve_loss_chunk(c.loss_chunk, device, c.vocab_size)
    model.remat, model.loss_fn = c.remat, make_loss(chunk, c.softmax_tokens, token_counts)
    optimizers = optim.make_optimizers(model, c.optimizer, c.weight_decay, c.learning_rate,
                                       (c.beta1, c.beta2), device_type, c.embedding_lr_scale)
    compute_dtype = machine.resolve_dtype_for(model, c.dtype, device)
    return Side("this model", model.train(), optimizers, compute_dtype, ours=True)


def their_name() -> str:
    """Return the end of --against, such as nanoGPT/model.py."""
    return one_line("/".join(Path(against).parts[-2:]))


def peer_side(peer: ModuleType | SimpleNamespace, c: SimpleNamespace, model_seed: int) -> Side:
    """Set up the other program with the training settings c."""
    machine.keep_freed_memory(False)
    torch.backends.cuda.enable_cudnn_sdp(True)  # set_up_torch() may have switched it off
    torch.manual_seed(model_seed)
    model = peer.GPT(peer.GPTConfig(block_size=c.block_size, vocab_size=c.vocab_size,
                                    n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                                    dropout=c.dropout, bias=c.bias)).to(device)
    optimizers = model.configure_optimizers(c.weight_decay, c.learning_rate, (c.beta1, c.beta2),
                                            device_type)
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    compute_dtype = "bfloat16" if device_type == "cuda" else "float32"
    return Side(their_name(), model.train(), optimizers, compute_dtype, ours=False)


# -----------------------------------------------------------------------------
# Measurements

def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' if n != 1 else ''}"


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if values[1:] else 0.0


def bench_train(c: SimpleNamespace, peer) -> dict:
    """Measure tokens per second and memory of training steps on one batch of random tokens."""
    torch.manual_seed(seed)
    data = torch.randint(c.vocab_size, (batch_size, block_size + 1), device=device)
    batch = data[:, :-1].contiguous(), data[:, 1:].contiguous()

    def warm_up(side: Side, compiled: bool) -> Side:
        if compiled:
            side.compile(*batch)
        for _ in range(2):  # only the second step starts with the optimizer's states in memory
            side.step([batch], 1e-4, grad_clip)
        return side

    mine = warm_up(our_side(c, seed, torch.zeros(c.vocab_size, device=device)), compile)
    peak_memory = machine.peak_memory(device)  # before another program is loaded
    sides = [mine]
    if peer:
        sides += [warm_up(peer_side(peer, c, seed), compiled)
                  for compiled in ([True, False] if compile else [False])]
    for _ in progress(range(rounds), f"measuring {plural(rounds, 'round')}"):
        for side in sides:  # alternately, so that a busy or throttled machine slows all
            machine.keep_freed_memory(side.ours)  # as its own script does
            step = partial(side.step, [batch], 1e-4, grad_clip)
            side.seconds.append(sum(machine.seconds_of(step, device) for _ in range(steps)))
    speeds = [steps * batch_size * block_size / statistics.median(side.seconds) for side in sides]
    peak, peak_source = machine.peak_flops(device, mine.compute_dtype)
    flops = mine.raw_model.flops_per_token(head_tokens=min(softmax_tokens, c.vocab_size))
    peak = max(peak, speeds[0] * flops)  # a measured peak can be too low
    mfu, n_params = speeds[0] * flops / peak, mine.raw_model.num_params()
    spreads = [max(side.seconds) / min(side.seconds) - 1 for side in sides]
    forms = [side.form for side in sides]
    print(f"\n{n_params:,} parameters, {batch_size} x {block_size} tokens per step, {device}, "
          f"torch {torch.__version__}\n"
          f"median of {plural(rounds, 'round')} of {plural(steps, 'step')}\n")
    print_table([["", "tokens/s", "spread"]] + [
        [f"{side.name} ({form}, {side.compute_dtype})", f"{speed:,.0f}", f"{spread:.0%}"]
        for side, form, speed, spread in zip(sides, forms, speeds, spreads)])
    print(f"\nMFU of this model: {mfu:.1%} of {peak / 1e12:.3g} TFLOP/s ({peak_source})")
    result = dict(parameters=n_params, dtype=mine.compute_dtype, compiled=forms[0] == "compiled",
                  tokens_per_second=speeds[0], spread=spreads[0], mfu=mfu, peak_flops=peak,
                  peak_flops_source=peak_source, peak_memory_bytes=peak_memory)
    if peer:
        theirs = max(speeds[1:])
        result |= dict(against=against, their_tokens_per_second=theirs, ratio=speeds[0] / theirs)
        print(f"{result['ratio']:.2f} times as fast as {their_name()}")
    return result


def bench_data(meta: dict, streams: dict[str, TokenStream]) -> dict:
    """Measure tokens per second of the batches alone, and how much of them is padding."""
    batches = TrainBatches(streams["train"], block_size, batch_size, seed, batching, meta["eot"])
    stream = prefetch(map(batches.batch, range(steps * (rounds + 1))), device)
    speeds, padding = [], []
    for _ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        targets = [next(stream)[1] for _ in range(steps)]
        machine.synchronize(device)
        n_tokens = sum(y.numel() for y in targets)
        speeds.append(n_tokens / (time.perf_counter() - start))
        padding.append(sum(int((y < 0).sum()) for y in targets) / n_tokens)
    speed, share = statistics.median(speeds[1:]), statistics.mean(padding)
    spread = max(speeds[1:]) / min(speeds[1:]) - 1
    kind = "windows" if batching == "windows" else "documents"
    print(f"\n{visible(dataset)}: batches of {batch_size} {kind} of up to {block_size} tokens\n"
          f"median of {plural(rounds, 'round')} of {plural(steps, 'step')}\n")
    print_table([["", "tokens/s", "spread", "padding"],
                 ["batches", f"{speed:,.0f}", f"{spread:.0%}", f"{share:.1%}"]])
    return dict(dataset=dataset, batching=batching, tokens_per_second=speed, padding=share)


def train_once(make_side: Callable[[], Side], c: SimpleNamespace, run_seed: int, meta: dict,
               streams: dict[str, TokenStream]) -> list[tuple[float, int, float]]:
    """
    Build a model and train it. Return (seconds, tokens, loss) per evaluation.

    The seconds include building and compiling the model, not evaluation. The loss is over the whole
    validation split.
    """
    batches = TrainBatches(streams["train"], c.block_size, c.batch_size, run_seed, c.batching,
                           meta["eot"])
    accumulation = c.gradient_accumulation_steps
    stream = prefetch(map(batches.batch, range(c.max_iters * accumulation)), device)
    started, paused, n_tokens, points = time.perf_counter(), 0.0, 0, []
    side = make_side()
    if c.compile:
        side.compile(*(t.to(device) for t in batches.batch(0)))
    for step in progress(range(1, c.max_iters + 1), f"training {side.name}, seed {run_seed}"):
        lr = optim.scheduled_lr(step - 1, c.schedule, c.learning_rate, c.min_lr, c.warmup_iters,
                                c.max_iters)
        micro_batches = [next(stream) for _ in range(accumulation)]
        side.step(micro_batches, lr, c.grad_clip)
        n_tokens += sum(y.numel() for _, y in micro_batches)
        if step % c.eval_interval == 0 or step == c.max_iters:
            machine.synchronize(device)
            pause = time.perf_counter()
            nats, count = evaluate(side.raw_model, eval_batches(
                streams["val"], c.block_size, c.batch_size, c.batching, meta["eot"]), side.autocast)
            points.append((pause - started - paused, n_tokens, nats / count))
            paused += time.perf_counter() - pause
    return points


def bench_loss(c: SimpleNamespace, peer, theirs: SimpleNamespace, meta: dict,
               streams: dict[str, TokenStream]) -> dict:
    """Measure seconds and tokens until a loss on the validation split, over several seeds."""
    counts = streams["train"].token_counts(c.vocab_size).to(device)
    run_seeds = range(seed, seed + seeds)
    runs = {"this model": [train_once(partial(our_side, c, s, counts), c, s, meta, streams)
                           for s in run_seeds]}
    if peer:
        runs[their_name()] = [train_once(partial(peer_side, peer, theirs, s), theirs, s, meta,
                                         streams) for s in run_seeds]
    reference = their_name() if peer else "this model"
    target = target_loss or statistics.mean(points[-1][2] for points in runs[reference])
    result, seconds_to_target = dict(dataset=dataset, seeds=seeds, target_loss=target), {}
    table = [["", "loss", "seconds", "tokens", "seeds"]]
    table_of_seeds = [["loss of seed", *map(str, run_seeds)]]
    for name, points_of_runs in runs.items():
        ends = [points[-1] for points in points_of_runs]
        hits = [hit for points in points_of_runs
                if (hit := next((point for point in points if point[2] <= target), None))]
        hits = ends if name == reference and not target_loss else hits  # target: the mean of these
        losses = [loss for _, _, loss in ends]
        row = dict(losses=losses, final_loss=mean_and_deviation(losses),
                   final_seconds=mean_and_deviation([seconds for seconds, _, _ in ends]),
                   reached=len(hits))
        table.append([name, "{:.4f} +- {:.4f}".format(*row["final_loss"]),
                      "{:,.1f} +- {:.1f}".format(*row["final_seconds"]), f"{ends[0][1]:,}",
                      str(seeds)])
        to_target = [f"  to {target:.4f}", "", "not reached", "", "0"]
        if hits:
            row |= dict(seconds=mean_and_deviation([seconds for seconds, _, _ in hits]),
                        tokens=mean_and_deviation([n for _, n, _ in hits]))
            to_target[2:] = ["{:,.1f} +- {:.1f}".format(*row["seconds"]),
                             "{:,.0f} +- {:,.0f}".format(*row["tokens"]), str(len(hits))]
            seconds_to_target[name] = row["seconds"][0]
        if peer or target_loss:
            table.append(to_target)
        table_of_seeds.append([name, *(f"{loss:.4f}" for loss in losses)])
        result["ours" if name == "this model" else "theirs"] = row
    print(f"\nvalidation loss of {visible(dataset)} in nats per token, mean and standard deviation "
          f"of {plural(seeds, 'seed')}\n")
    print_table(table)
    if seeds > 1:
        print()
        print_table(table_of_seeds)
    if len(seconds_to_target) == 2:
        ratio = seconds_to_target["this model"] / seconds_to_target[their_name()]
        result |= dict(against=against, ratio=ratio)
        print(f"\nthis model needs {ratio:.3f} of the time of {their_name()}")
    return result


def inference_sides(model: GPT, peer, c: SimpleNamespace) -> dict[str, Side]:
    """Return the programs that generate, by the prefix of their keys in the result."""
    ours = partial(Side, optimizers=[], compute_dtype="float32", ours=True)
    sides = {"": ours("this model", model)}
    if machine.resolve_dtype("auto", device) == "bfloat16":
        sides["bfloat16_"] = ours("this model, bfloat16", copy.deepcopy(model).bfloat16())
    int8 = model_from_weights(model.config, quantize_int8(model.state_dict()), device)
    sides["int8_"] = ours("this model, int8", int8)
    for side in sides.values():
        prepare_for_inference(side.raw_model)
    if peer:
        sides["their_"] = peer_side(peer, c, seed)
        sides["their_"].autocast = machine.autocast(device, "float32")
    return sides


def bench_generate(c: SimpleNamespace, peer, trained: GPT | None) -> dict:
    """
    Measure tokens per second after random prompts, with weights in float32 and in int8.

    On GPUs that support bfloat16, also with bfloat16 weights. The time to the first token is
    subtracted, so that the rate is that of the later tokens.
    """
    model = trained or GPT(our_config(c)).to(device)
    n_params, prompt = model.num_params(), max(1, c.block_size // 4)
    sides = inference_sides(model, peer, c)
    numbers = torch.randn(64 << 20, device=device)  # 256 MB, more than a cache holds
    bandwidth = 4 * numbers.numel() / machine.median_seconds(numbers.sum, device=device)
    result = dict(parameters=n_params, bandwidth=bandwidth)
    table = [["", "texts", "first token", "tokens/s", "weights read"] + ["speed-up"] * bool(peer)]
    for B in map(int, texts.split(",")):
        idx = torch.randint(c.vocab_size, (B, prompt), device=device)
        first, whole = ({prefix: [] for prefix in sides} for _ in range(2))  # seconds
        # the first round warms up
        for _ in progress(range(rounds + 1), f"generating {plural(B, 'text')}"):
            for prefix, side in sides.items():
                machine.keep_freed_memory(side.ours)  # as its own script does
                for n, seconds in ((1, first), (1 + max_new_tokens, whole)):
                    generate = partial(side.generate, idx, n)
                    seconds[prefix].append(machine.seconds_of(generate, device))
        starts = {prefix: statistics.median(first[prefix][1:]) for prefix in sides}
        speeds = {prefix: B * max_new_tokens / (statistics.median(whole[prefix][1:]) - start)
                  for prefix, start in starts.items()}
        row = result[f"batch_{B}"] = dict(weights_read_per_second=4 * n_params * speeds[""] / B)
        for prefix, side in sides.items():
            speed, start = speeds[prefix], 1000 * starts[prefix]
            row |= {f"{prefix}tokens_per_second": speed, f"{prefix}first_token_ms": start}
            cells = [side.name, str(B), f"{start:,.1f} ms", f"{speed:,.1f}"]
            if side.ours:
                weight_bytes = {"": 4, "bfloat16_": 2, "int8_": 1}[prefix] * n_params  # about
                cells.append(f"{weight_bytes * speed / B / 1e9:.1f} GB/s")
            if side.ours and peer:
                row[f"{prefix}ratio"] = speed / speeds["their_"]
                cells.append(f"{speed / speeds['their_']:.2f}x")
            table.append(cells)
    print(f"\n{n_params:,} parameters, {device}, torch {torch.__version__}; "
          f"memory bandwidth {bandwidth / 1e9:.1f} GB/s\n"
          f"{max_new_tokens} tokens after a prompt of {prompt}; median of "
          f"{plural(rounds, 'round')}\n")
    print_table(table)
    return result


def predicted_memory(c: SimpleNamespace, compute_dtype: str) -> int:
    """
    Return the bytes that plan.py predicts for eager steps of one micro-batch.

    On a GPU: the bytes of all tensors. On a CPU: those of the process, as peak_memory() counts.
    """
    plan = Path(__file__).with_name("plan.py")
    known = {setting.name for setting in configurator.read_settings(plan)}
    values = vars(c) | dict(device=device, dtype=compute_dtype, gradient_accumulation_steps=1)
    args = [f"--{name}={value}" for name, value in values.items() if name in known]
    done = subprocess.run([sys.executable, plan, *args], capture_output=True, encoding="utf-8",
                          errors="replace")
    if done.returncode:
        configurator.fail(f"plan.py: {done.stderr}")
    key = "with_runtime_bytes" if device_type == "cpu" else "memory_bytes"
    return json.loads(done.stdout.splitlines()[-1])[key]


def bench_report(c: SimpleNamespace, peer) -> dict:
    """Measure training, its memory and generation. Print them as a table in Markdown."""
    training = bench_train(c, peer)
    torch.cuda.empty_cache()  # plan.py also uses the GPU
    predicted = predicted_memory(c, training["dtype"])
    generation = bench_generate(c, None, None)
    chip = (torch.cuda.get_device_name() if device_type == "cuda" else
            f"{device} ({platform.processor() or platform.machine()}), "
            f"{plural(torch.get_num_threads(), 'thread')}")
    of = "the process" if device_type == "cpu" else "tensors"
    peak = training["peak_memory_bytes"]
    table = {
        "device": chip, "torch": torch.__version__,
        "model": f"{c.arch}, {plural(c.n_layer, 'layer')}, width {c.n_embd}, "
                 f"{plural(training['parameters'], 'parameter')}",
        "training": f"{'compiled' if training['compiled'] else 'eager'}, {training['dtype']}, "
                    f"{batch_size} x {block_size} tokens",
        "speed": f"{training['tokens_per_second']:,.0f} tokens/s",
        "MFU": f"{training['mfu']:.1%} of {training['peak_flops'] / 1e12:.3g} TFLOP/s"}
    if peer:
        theirs = training["their_tokens_per_second"]
        table |= {f"speed of {their_name()}": f"{theirs:,.0f} tokens/s",
                  "ratio of the speeds": f"{training['ratio']:.2f}"}
    table |= {"peak memory": f"{peak / 1e9:.2f} GB of {of}" if peak else "unknown",
              "predicted by plan.py, eager": f"{predicted / 1e9:.2f} GB of {of}"}
    for prefix, name in (("", "float32"), ("bfloat16_", "bfloat16"), ("int8_", "int8")):
        for B in map(int, texts.split(",")):
            if speed := generation[f"batch_{B}"].get(f"{prefix}tokens_per_second"):
                table[f"generation, {name}, {plural(B, 'text')}"] = f"{speed:,.1f} tokens/s"
    left, right = (max(map(len, column)) for column in (table, table.values()))
    lines = [f"| {name:<{left}} | {value:>{right}} |" for name, value in table.items()]
    lines.insert(1, f"| {'-' * left} | {'-' * (right - 1)}: |")
    print("\n" + "\n".join(lines))
    return dict(chip=chip, training=training, predicted_memory_bytes=predicted,
                generation=generation)


# -----------------------------------------------------------------------------
# Run
machine.explain_out_of_memory(f"{machine.SAVE_MEMORY}; for generation, lower --texts")
with user_errors():
    if not all(number.isdecimal() and int(number) for number in texts.split(",")):
        raise ValueError(f"texts takes numbers with commas between them, got {texts!r}")
    if run and mode != "generate":
        raise ValueError(f"run is for --mode=generate, not {mode}")
    check_softmax_tokens(softmax_tokens, batch_size * block_size)
    device = machine.resolve_device(device)
    device_type = device.split(":")[0]
    machine.resolve_dtype(dtype, device)
    if against.endswith(".gguf") and (mode != "generate" or texts != "1"):
        raise ValueError("--against=FILE.gguf needs --mode=generate and --texts=1, "
                         f"got {mode} and {texts}")
    peer = load_peer(against)
    folder, meta, streams = Path("data") / dataset, None, {}
    if mode in ("data", "loss"):
        meta = load_meta(folder)
        streams = {split: TokenStream(folder, split, meta) for split in ("train", "val")}
        for stream in streams.values():
            check_once(stream, meta)
    elif not vocab_size and (folder / "meta.json").exists():
        meta = load_meta(folder)
    n_vocab = meta["vocab_size"] if meta else vocab_size or 50257
    trained = load_model(run, device)[0] if run else None
    shape = asdict(trained.config) if trained else {}
    settings = SimpleNamespace(**config | dict(vocab_size=n_vocab) | shape)
    T = settings.block_size
    if mode in ("generate", "report") and T // 4 + 1 + max_new_tokens > T:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must fit after a prompt of a quarter "
                         f"of block_size ({T})")
    theirs = configurator.read_config_file(their_config) if their_config else {}
    theirs = SimpleNamespace(**vars(settings) | {
        name: configurator.coerce(name, value, config[name])
        for name, value in theirs.items() if name in config})
    machine.check_memory(machine.weight_bytes(our_config(settings)) * (mode != "data"), device)
machine.set_up_torch(many_shapes=batching == "by_length")
if mode == "train":
    result = bench_train(settings, peer)
elif mode == "data":
    result = bench_data(meta, streams)
elif mode == "loss":
    result = bench_loss(settings, peer, theirs, meta, streams)
elif mode == "generate":
    result = bench_generate(settings, peer, trained)
else:
    result = bench_report(settings, peer)
print()
print(json.dumps({"mode": mode, "device": device, "torch": torch.__version__} | result))
