"""
Predict the memory, the time and the best batch size of a training run, from formulas.

    python plan.py config/train_small.py
    python plan.py config/train_small.py --device_memory=16GB --gpu=T4
    python plan.py config/train_large.py --gpu="RTX 4090" --mfu=0.4 --tokens=1e9
    python plan.py --minutes=10 --dataset=tinystories --to=config/train_best10.py

No weights are allocated, and of the dataset only meta.json is read. With --minutes, it instead
chooses the best model to train in that time. It trains three sizes briefly, up to 20 seconds in
all, to measure this machine, and predicts the loss of a list of sizes from a scaling law
(docs/scaling.md). The last line of output is a JSON object.
"""
import json
import math
import re
import shlex
from pathlib import Path

import torch

from lib import machine, scaling
from lib.configurator import at_least, configure, one_line, one_of, user_errors
from lib.console import duration, named_lines, print_table, progress, visible
from lib.corpus import load_meta
from lib.dataset import TokenStream
from lib.files import read_text, write_atomically
from lib.loss import check_softmax_tokens
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# what to plan
device_memory = ""  # what training must fit into: 4GB, 24 GB, or bytes (empty: this GPU's memory)
gpu = ""  # T4, A100, RTX 3060, ... (empty: this machine)
mfu = 0.3  # share of the GPU's peak that training reaches; `python bench.py` measures it
tokens = 0  # tokens to train on (0: those of max_iters steps or max_epochs)
# the best model for a time
minutes = 0.0  # choose the model that is best after so many minutes of training (0: off)
to = ""  # write a config file for the chosen model, such as config/train_best10.py
pilot = False  # first train for a minute, to measure how hard the text is
# data
dataset = "tinystories"  # where it is prepared, it gives vocab_size and the size of an epoch
gradient_accumulation_steps = 2  # micro-batches per step
batch_size = 32  # rows of a micro-batch
block_size = 128  # context in tokens
vocab_size = 0  # 0: that of the dataset, where it is prepared, else GPT-2's 50,257
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
max_iters = 20000  # steps; the default does not apply if max_epochs is set
max_epochs = 0.0  # passes over the training data (0: no limit)
# system
device = "auto"  # cuda, else mps, else cpu; or 'cpu', 'cuda:1', ...
dtype = "auto"  # fastest safe type on the device; or 'float32', 'bfloat16', 'float16'
remat = False  # recompute activations in the backward pass
softmax_tokens = 0  # tokens in the training softmax (0: all)
loss_chunk = -1  # compute the logits of this many tokens at a time (0: all; -1: 256 if faster)
config, given = configure(
    globals(), skip_settings_of="train.py", announce=True, mfu=at_least(0, at_most=1),
    tokens=at_least(0), minutes=at_least(0),
    gradient_accumulation_steps=at_least(1), batch_size=at_least(1), vocab_size=at_least(0),
    optimizer=one_of("adamw", "muon"), max_iters=at_least(1), max_epochs=at_least(0),
    loss_chunk=at_least(-1))

# -----------------------------------------------------------------------------
LARGEST = 100e12  # bytes of weights that can be planned
RUNTIME = 5e8  # bytes of CUDA's context and libraries on a GPU, of Python and torch on a CPU
# share of memory lost between tensors: glibc leaves more gaps than torch's allocator for GPUs
GAPS = {"cpu": 0.4, "cuda": 0.1, "mps": 0.1}


def bytes_of(text: str) -> float:
    """Return the bytes of '4GB', '24 GB', '512MB' or '1000000'; a GB is 10**9, a GiB 2**30."""
    amount, unit = re.fullmatch(r"([\d.]*)\s*(.*)", text.strip().upper(), re.DOTALL).groups()
    units = {"": 1, "B": 1, "MB": 1e6, "GB": 1e9, "MIB": 2**20, "GIB": 2**30}
    if (not re.fullmatch(r"\d+(\.\d+)?", amount) or unit not in units
            or float(amount) * units[unit] < 1e6):
        raise ValueError(f"device_memory takes a size such as 4GB, 512MB or bytes, at least 1MB, "
                         f"got {text!r}")
    return float(amount) * units[unit]


def chip_of(name: str) -> str:
    """Return the name of a chip as PEAK_FLOPS has it, or '' for ''."""
    names = {"": ""} | {chip.lower().replace(" ", ""): chip for chip in machine.PEAK_FLOPS}
    key = re.sub("[ _-]", "", name.lower())
    if key not in names:
        raise ValueError(f"gpu must be one of {', '.join(machine.PEAK_FLOPS)}, or empty for this "
                         f"machine; got {name!r}")
    return names[key]


def block_activations(c: GPTConfig, n: int, size: int, on_cpu: bool) -> int:
    """
    Return the bytes that a block keeps of n tokens for the backward pass.

    size: bytes of a number that a matrix product reads or writes.
    """
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim  # widths of all heads together
    gpt2, autocast, dropout = c.arch == "gpt2", size == 2, c.dropout > 0
    # the input of a norm; a CPU's RMSNorm also keeps its result before the gains
    norm = 8 if on_cpu and not gpt2 else 4
    fc_out = c.n_inner * (1 if gpt2 else 2)
    kept = 2 * c.n_embd * (norm + size)  # two norms, and what they pass to c_attn and c_fc
    if dropout and on_cpu:  # the CPU has no attention kernel with dropout
        kept += 3 * 4 * q  # scaled queries and keys, values, in float32 and for every head
        kept += 3 * 4 * c.n_head * c.block_size  # softmax, mask and product of each pair of tokens
    else:
        kept += size * (q + 2 * kv)  # the output of c_attn; its values and, in gpt2, queries, keys
    if not gpt2:
        # the output of c_attn, or the rotated queries and keys and c_proj's copy
        kept += size * (q + 2 * kv if dropout and on_cpu else q + kv + q)
    if c.arch == "qwen3":  # q_norm and k_norm: their input, unless it is a view, and their result
        kept += (q + kv) * ((4 if autocast else 0) + norm - 4)
    kept += size * q  # the output of attention
    kept += size * (fc_out + c.n_inner)  # the output of c_fc, the input of c_proj
    kept += 0 if gpt2 else size * c.n_inner  # SwiGLU: silu of the gate
    kept += 2 * c.n_embd * (size if on_cpu else 1) if dropout else 0  # dropout masks
    return n * kept


def training_memory(model: GPT, B: int, accumulation: int, compute_dtype: str, kind: str,
                    optimizer: str, softmax_tokens: int) -> dict[str, int]:
    """
    Return the bytes that eager training takes with micro-batches of B rows.

    Each part is given at its largest; `memory` is all that is alive at the worst moment. That is
    less than their sum: gradients are allocated while activations are freed. compute_dtype: of the
    matrix products. kind: 'cuda' or 'cpu'.
    """
    c = model.config
    n, C, V, on_cpu = B * c.block_size, c.n_embd, c.vocab_size, kind == "cpu"
    autocast = compute_dtype != "float32"  # weights, norms and the residual stream stay in float32
    size = 2 if autocast else 4
    chunk = machine.resolve_loss_chunk(loss_chunk, kind, V)
    sampled = softmax_tokens if softmax_tokens < V else 0

    params, table = model.num_params(), 4 * V * C  # table: a gradient of the embedding or the head
    matrices = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    weights = 6 * params if autocast else 4 * params  # with the 16-bit copies that autocast keeps
    gradients = 4 * params
    # AdamW has two numbers per weight, Muon one
    states = 8 * params - (4 * matrices if optimizer == "muon" else 0)

    block = block_activations(c, n, size, on_cpu)
    fc_out = c.n_inner * (1 if c.arch == "gpt2" else 2)
    backward = n * (2 * size * fc_out + 4 * C)  # gradients inside a block in the backward pass
    blocks = c.n_layer * (n * 4 * C if remat else block)  # remat: only the inputs
    norm = 8 if on_cpu and c.arch != "gpt2" else 4
    mask = (4 if on_cpu else 1) * (c.dropout > 0)
    ends = n * C * (norm + 4 + 4 + mask)  # ln_f in and out, its gradient; the embedding's mask
    activations = blocks + ends + (block if remat else 0)

    held = 0  # what the caller of the model holds until the next call
    if sampled:  # log-softmax in float32, its gradient and that of the logits; rows of the head
        logits = 12 * n * sampled + 4 * sampled * C
    elif chunk:  # the logits of a chunk, a copy of logsumexp, under autocast another in float32
        logits = V * min(chunk, n) * (10 if autocast else 8)
    else:  # as with a sampled softmax, and the logits themselves
        logits, held = n * V * (12 + size), n * V * size
    chunked = chunk > 0 and not sampled
    before = gradients if accumulation > 1 else 0  # of the micro-batches before
    moments = [
        # the loss; a chunked one computes the gradient of the head, which is then scaled
        before + blocks + ends + logits + (table if chunked else 0),
        before + blocks + ends + 2 * table if chunked else 0,
        # the start of the backward pass
        before + activations + table + held + backward,
        # its end: a tied embedding has two gradients and their sum
        gradients + held + table * (2 * c.tied + (accumulation > 1)),
        # the update; Muon has updates and their squares
        gradients + held + (3 * 4 * matrices if optimizer == "muon" else 0),
        # an evaluation, which uses the whole softmax
        V * n * (10 if autocast else 8) if sampled and not chunk else 0,
    ]
    return dict(memory=weights + states + max(moments), weights=weights, gradients=gradients,
                optimizer=states, activations=activations, logits=logits)


def memory_with_runtime(model: GPT, B: int, accumulation: int, compute_dtype: str, kind: str,
                        optimizer: str, softmax_tokens: int) -> dict[str, int]:
    """Return training_memory() and, as with_runtime, all that the device needs."""
    parts = training_memory(model, B, accumulation, compute_dtype, kind, optimizer, softmax_tokens)
    return parts | dict(with_runtime=int(RUNTIME + (1 + GAPS[kind]) * parts["memory"]))


def plan_batch(model: GPT, compute_dtype: str, kind: str,
               limit: float) -> tuple[int, dict[str, int]]:
    """
    Return the most rows per micro-batch that fit into limit bytes, and the memory they take.

    The rows of a step stay the same. 0 where not even one row fits, with the memory of that one.
    """
    rows = batch_size * gradient_accumulation_steps
    most = softmax_tokens // block_size if softmax_tokens else rows  # each target is sampled
    for B in range(min(rows, most), 0, -1):
        if rows % B == 0:
            memory = memory_with_runtime(model, B, rows // B, compute_dtype, kind, optimizer,
                                         softmax_tokens)
            if memory["with_runtime"] <= limit:
                return B, memory
    return 0, memory_with_runtime(model, 1, rows, compute_dtype, kind, optimizer, softmax_tokens)


def print_memory(memory: dict[str, int], kind: str) -> None:
    """Print the result of memory_with_runtime()."""
    print(f"memory with micro-batches of {batch_size} rows")
    names = {name: name for name in ("weights", "gradients", "optimizer", "activations", "logits")}
    names |= {"peak": "memory", "with runtime and gaps": "with_runtime"}
    print_table([[f"  {name}", f"{memory[key] / 1e9:.3f} GB"] for name, key in names.items()])
    print(f"  (runtime of the device: {RUNTIME / 1e9:.1f} GB, gaps between tensors: "
          f"{GAPS[kind]:.0%} of the peak)")


def print_gpu_sizes(model: GPT, compute_dtype: str) -> None:
    """Print the largest micro-batch for common sizes of GPU memory."""
    rows = batch_size * gradient_accumulation_steps
    table = [["largest micro-batch", "--batch_size", "--gradient_accumulation_steps", "memory"]]
    for gigabytes in (16, 24, 40, 80):
        best, memory = plan_batch(model, compute_dtype, "cuda", gigabytes * 1e9)
        cells = [str(best), str(rows // best)] if best else ["none fits", ""]
        table.append([f"  on {gigabytes} GB", *cells, f"{memory['with_runtime'] / 1e9:.3f} GB"])
    print()
    print_table(table)


def print_fit(model: GPT, memory: dict[str, int], compute_dtype: str, kind: str,
              limit: float) -> tuple[bool, int]:
    """
    Print whether training fits into limit bytes, and the largest micro-batch that does.

    Return both; the rows are 0 if not even one fits.
    """
    rows = batch_size * gradient_accumulation_steps
    fits = memory["with_runtime"] <= limit
    best, memory_of_best = plan_batch(model, compute_dtype, kind, limit)
    print(f"\n{'fits' if fits else 'does not fit'} into {limit / 1e9:.3g} GB")
    if best:
        print(f"  largest micro-batch that fits: --batch_size={best} "
              f"--gradient_accumulation_steps={rows // best}, "
              f"{memory_of_best['with_runtime'] / 1e9:.3f} GB")
    else:
        chunk = machine.resolve_loss_chunk(loss_chunk, kind, model.config.vocab_size)
        ways = ["--loss_chunk=256"] * (not chunk) + ["--remat=True"] * (not remat)
        print(f"  a single row takes {memory_of_best['with_runtime'] / 1e9:.3f} GB\n"
              f"  try {', '.join([*ways, 'a smaller --block_size'])} or a smaller model")
    return fits, best


# -----------------------------------------------------------------------------
# The best model for a time

def measured_speeds(token_counts: torch.Tensor, V: int, here: str,
                    compute_dtype: str) -> list[tuple[float, float]]:
    """Return (FLOPs per token, tokens per second) of three sizes on this machine."""
    models = [scaling.meta_model(L, C, block_size, V) for L, C in scaling.MEASURED]
    return [(scaling.flops_per_token(model),
             scaling.measure_speed(model.config, token_counts, here, compute_dtype))
            for model in progress(models, "measuring the speed of three sizes")]


def predict_ladder(measured: list[tuple[float, float]], V: int, distinct: int, seconds: float,
                   compute_dtype: str, kind: str) -> list[dict]:
    """Return size, tokens, memory and bits per byte of each model of the ladder."""
    ladder = []
    for L, C in scaling.LADDER:
        model = scaling.meta_model(L, C, block_size, V)
        speed = scaling.interpolate_speed(scaling.flops_per_token(model), measured)
        n_seen, n_params = seconds * speed, model.num_params(non_embedding=True)
        memory = memory_with_runtime(model, scaling.TOKENS_PER_STEP // block_size, 1, compute_dtype,
                                     kind, "muon", scaling.SOFTMAX_TOKENS)
        ladder.append(dict(
            n_layer=L, n_head=model.config.n_head, n_embd=C, parameters=model.num_params(),
            parameters_non_embedding=n_params, tokens=int(n_seen), tokens_per_second=speed,
            memory_bytes=memory["with_runtime"],
            bits_per_byte=scaling.LAW.bits_per_byte(n_params, n_seen, distinct)))
    return ladder


def print_ladder(ladder: list[dict], best: dict, distinct: int) -> None:
    table = [["layers x width", "parameters", "tokens/s", "tokens", "epochs", "memory",
              "bits per byte"]]
    for size in ladder:
        table.append([f"{size['n_layer']} x {size['n_embd']}", f"{size['parameters'] / 1e6:.1f}M",
                      f"{size['tokens_per_second']:,.0f}", f"{size['tokens'] / 1e6:.2f}M",
                      f"{size['tokens'] / distinct:.1f}", f"{size['memory_bytes'] / 1e9:.1f} GB",
                      f"{size['bits_per_byte']:.3f}"] + ["<- best"] * (size is best))
    print_table(table)


def print_notes(ladder: list[dict], best: dict, distinct: int, chip: str) -> None:
    """Print why the predictions may be wrong."""
    steps, epochs = best["tokens"] // scaling.TOKENS_PER_STEP, best["tokens"] / distinct
    if steps < scaling.MIN_STEPS:
        print(f"note: the predictions need at least {scaling.MIN_STEPS} steps, this has {steps}")
    if best is ladder[-1]:
        print("note: the best is the largest of these sizes; a larger one may be better")
    if epochs > 4:
        print(f"note: {visible(dataset)} is read {epochs:.0f} times; more text would lower the "
              "loss")
    if chip:
        print(f"note: all sizes are assumed to reach {mfu:.0%} of the GPU's peak; small ones will "
              "not")


def check_replaceable(path: Path) -> None:
    """Raise ValueError if the file exists and is not one that plan.py wrote."""
    if path.exists() and not read_text(path).startswith("# The best model for"):
        raise ValueError(f"{path} exists and is not from plan.py: choose another name")


def recipe(size: dict, max_minutes: float, kind: str, compute_dtype: str) -> dict[str, object]:
    """Return the settings that train a size of the ladder, in addition to config/tuned.py."""
    steps = size["tokens"] // scaling.TOKENS_PER_STEP
    return dict(
        dataset=dataset, batch_size=scaling.TOKENS_PER_STEP // block_size, block_size=block_size,
        n_layer=size["n_layer"], n_head=size["n_head"], n_embd=size["n_embd"],
        max_minutes=max_minutes, eval_interval=max(10, steps // 4), eval_iters=2,
        softmax_tokens=scaling.SOFTMAX_TOKENS, dtype=compute_dtype, compile=kind != "cpu")


def write_config(path: Path, size: dict, settings: dict[str, object], where: str,
                 distinct: int) -> None:
    """Write a config file that states the prediction."""
    options = {"minutes": f"{minutes:g}", "dataset": dataset} | {
        name: config[name] for name in sorted(given - {"minutes", "dataset", "to"})}
    # one_line: a line break in a name would end the comment
    command = one_line(" ".join(["python plan.py", *(f"--{name}={shlex.quote(str(value))}"
                                                     for name, value in options.items())]))
    shown = one_line(path)
    millions, in_blocks = size["parameters"] / 1e6, size["parameters_non_embedding"] / 1e6
    text = f"""\
# The best model for {minutes:g} minute{'s' if minutes != 1 else ''} on {where}, chosen by
#     {command} --to={shown}
# {millions:.2f}M parameters, {in_blocks:.2f}M of them in the blocks; \
{size["memory_bytes"] / 1e9:.1f} GB of memory.
# Predicted: {size["bits_per_byte"]:.3f} bits per byte after {size["tokens"] / 1e6:.1f}M tokens \
({size["tokens"] / distinct:.1f} epochs). Train it with
#     python train.py {shown}
exec(open("config/tuned.py").read())

"""
    settings = {"out_dir": f"out-{path.stem.removeprefix('train_')}"} | settings
    text += "".join(f"{name} = {json.dumps(value) if isinstance(value, str) else value}\n"
                    for name, value in settings.items())
    write_atomically(path, text)


def train_pilot(size: dict, kind: str, compute_dtype: str, distinct: int) -> float:
    """Train for a minute; return by how many bits per byte the loss is above the law."""
    print("pilot: training for a minute ...", flush=True)
    settings = recipe(size, 1.0, kind, compute_dtype)
    settings["eval_interval"] = 10**6  # only at the end
    summary = scaling.train_and_evaluate(settings)
    predicted = scaling.LAW.bits_per_byte(size["parameters_non_embedding"],
                                          summary["step"] * scaling.TOKENS_PER_STEP, distinct)
    return summary["bits_per_byte"] - predicted


def plan_minutes(chip: str, here: str, compute_dtype: str, limit: float) -> None:
    """Choose the model that is best after `minutes`; print the ladder and the JSON object."""
    if block_size > scaling.TOKENS_PER_STEP:
        raise ValueError(f"block_size must be at most {scaling.TOKENS_PER_STEP:,} with minutes, "
                         f"got {block_size}")
    if to:
        check_replaceable(Path(to))
    folder, kind = Path("data") / dataset, here.split(":")[0]
    meta = load_meta(folder)
    stream, V = TokenStream(folder, "train", meta), meta["vocab_size"]
    distinct = len(stream)
    if chip:  # one point is enough: every size is assumed to reach the same FLOP/s
        measured = [(1.0, mfu * machine.PEAK_FLOPS[chip])]
    else:
        measured = measured_speeds(stream.token_counts(V), V, here, compute_dtype)
    ladder = predict_ladder(measured, V, distinct, 60 * minutes, compute_dtype, kind)
    fitting = [size for size in ladder if not limit or size["memory_bytes"] <= limit]
    if not fitting:
        raise ValueError(f"no model of the ladder fits into {limit / 1e9:.3g} GB")
    best = min(fitting, key=lambda size: size["bits_per_byte"])
    offset = train_pilot(best, kind, compute_dtype, distinct) if pilot else 0.0
    for size in ladder:
        size["bits_per_byte"] += offset
    print()
    print_ladder(ladder, best, distinct)
    print_notes(ladder, best, distinct, chip)
    if to:
        where = chip or (f"{torch.get_num_threads()} CPU threads" if kind == "cpu" else
                         torch.cuda.get_device_name(here) if kind == "cuda" else kind)
        settings = recipe(best, minutes, kind, dtype if chip else compute_dtype)
        write_config(Path(to), best, settings, where, distinct)
        print(f"\nwrote {to}; train it with `python train.py {to}`")
    print()
    print(json.dumps(dict(mode="minutes", minutes=minutes, device=chip or here, dataset=dataset,
                          block_size=block_size, offset=offset, **best, ladder=ladder)))


def main() -> None:
    with user_errors():
        if not mfu:
            raise ValueError(f"mfu must be above 0 and at most 1, got {mfu}")
        chip = chip_of(gpu)
        here = "cuda" if chip else machine.resolve_device(device)  # that chip need not be here
        limit = (bytes_of(device_memory) if device_memory else
                 0 if chip else machine.gpu_memory(here))
        check_softmax_tokens(softmax_tokens, batch_size * block_size)
        kind = here.split(":")[0]
        compute_dtype = ("16 bits" if chip and dtype == "auto" else
                         machine.resolve_dtype(dtype, here))
        if compute_dtype == "auto":
            compute_dtype = "float32"  # on a CPU only a measurement could tell
        if (to or pilot) and not minutes:
            raise ValueError("--to and --pilot also need --minutes=N, the time to train")
        if pilot and chip:
            raise ValueError("--pilot trains on this machine: leave out --gpu")
        if minutes:
            return plan_minutes(chip, here, compute_dtype, limit)
        folder = Path("data") / dataset
        meta = load_meta(folder) if (folder / "meta.json").exists() else None
        V = vocab_size or (meta["vocab_size"] if meta else 50257)
        model_config = GPTConfig(
            arch=arch, block_size=block_size, vocab_size=V, n_layer=n_layer, n_head=n_head,
            n_kv_head=n_kv_head, n_embd=n_embd, dropout=dropout, bias=bias, tied=tied)
        if machine.weight_bytes(model_config) > LARGEST:
            raise ValueError("the weights of the model have more than 100 TB: choose a smaller one")
        machine.check_memory(8 * block_size * model_config.head_dim)  # positions are computed
        with torch.device("meta"):
            model = GPT(model_config)
    model.remat = remat
    n_params, n_params_in_blocks = model.num_params(), model.num_params(non_embedding=True)
    rows = batch_size * gradient_accumulation_steps
    memory = memory_with_runtime(model, batch_size, gradient_accumulation_steps, compute_dtype,
                                 kind, optimizer, softmax_tokens)
    print(named_lines(
        model=f"{n_params:,} parameters ({n_params_in_blocks:,} without embeddings)\n"
              f"{arch}, {n_layer} layers, width {n_embd}, vocabulary of {V:,}",
        batch=f"{gradient_accumulation_steps} x {batch_size} x {block_size} = "
              f"{rows * block_size:,} tokens per step",
        device=f"{chip or here}, matrix products in {compute_dtype}, not compiled") + "\n")
    print_memory(memory, kind)

    fits, best = None, batch_size
    if limit:
        fits, best = print_fit(model, memory, compute_dtype, kind, limit)
    elif kind == "cuda":
        print_gpu_sizes(model, compute_dtype)

    epoch = meta["splits"].get("train", {}).get("tokens", 0) if meta else 0
    if max_epochs and not tokens and not epoch:
        print(f"\nnote: {visible(dataset)} is not prepared, so the size of an epoch is unknown; "
              f"the time is that\nof {max_iters:,} steps unless you give --tokens")
    trained = tokens
    if not trained:  # the nearest of the limits that are set
        limits = [max_iters * rows * block_size] * ("max_iters" in given or not max_epochs * epoch)
        trained = min(limits + [int(max_epochs * epoch)] * bool(max_epochs * epoch))
    flops = trained * model.flops_per_token(head_tokens=min(softmax_tokens, V))
    peak, source = machine.PEAK_FLOPS.get(chip), "16-bit datasheet"
    if not chip:
        peak, source = machine.peak_flops(here, compute_dtype)
    seconds = flops / (mfu * peak)
    print(f"\ntime: {duration(seconds)}\n"
          f"  {math.ceil(trained / (rows * block_size)):,} steps, {trained:,} tokens, {flops:.3g} "
          f"FLOPs\n  at {mfu:.0%} of {peak / 1e12:.3g} TFLOP/s ({source})\n")
    print(json.dumps(dict(
        mode="plan", device=chip or here, torch=torch.__version__, parameters=n_params,
        parameters_non_embedding=n_params_in_blocks,
        **{f"{name}_bytes": n for name, n in memory.items()}, fits=fits, batch_size=best or None,
        gradient_accumulation_steps=rows // best if best else None, tokens=trained, flops=flops,
        peak_flops=peak, seconds=seconds)))


if __name__ == "__main__":
    main()
