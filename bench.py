"""
Measure: training speed, on random tokens; the speed of the batches; the time and the tokens to a loss; or the speed of
generation. Or plan: say beforehand, from formulas, what memory and time a training takes.

    python bench.py config/train_fables.py
    python bench.py --against=/path/to/nanoGPT/model.py
    python bench.py --mode=data config/train_fables.py
    python bench.py --mode=loss config/train_fables.py --max_iters=300 --eval_interval=100 --seeds=3
    python bench.py --mode=generate --against=hf
    python bench.py --mode=generate --run=out --against=out-q8_0.gguf --texts=1
    python bench.py --mode=plan config/train_small.py --device_memory=16GB --gpu=T4

`--against` measures a peer in turns with us, at the faster of its eager and its compiled form and in nanoGPT's own data
type: bfloat16 on CUDA, float32 elsewhere. The last line of output is one JSON object; ratios in it are ours over theirs.
"""
import contextlib
import copy
import importlib.util
import json
import math
import re
import statistics
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from tqdm import tqdm

import model as ours
from lib import machine
from lib.checkpoint import load_model
from lib.configurator import coerce, configure, read_config_file, user_errors
from lib.dataset import TokenStream, TrainBatches, eval_batches, load_meta, prefetch

# -----------------------------------------------------------------------------
mode = "train"  # tokens per second; 'data': of batches alone; 'generate': of texts; 'loss': time to a loss; 'plan': see above
against = ""  # a nanoGPT-style model.py with GPT and GPTConfig; 'hf', the GPT2LMHeadModel of transformers; FILE.gguf: llama.cpp
rounds = 5  # modes train, data and generate: timed rounds; the figures are their medians
steps = 5  # modes train and data: steps of a round
their_config = ""  # mode loss: the config file of the peer's training; '': it gets our settings
target_loss = 0.0  # mode loss: nats per token on the whole validation split; 0: what the peer, or we, end with
seeds = 1  # mode loss: runs of each side
max_new_tokens = 64  # mode generate: after a prompt of a quarter of block_size, with top_k 40
texts = "1,8,64"  # mode generate: texts at a time
run = ""  # mode generate: a run or a Hugging Face folder, or gpt2 ... gpt2-xl, whose model to take; '': a new one
device_memory = ""  # mode plan: what training must fit into: 4GB, 24 GB, 512MB, or bytes; '': unknown
gpu = ""  # mode plan: T4, A100, RTX 3060, ...; '': this machine
mfu = 0.3  # mode plan: share of the GPU's peak that training reaches; mode train measures it
tokens = 0  # mode plan: how many to train on; 0: those of max_iters steps or of max_epochs
# data
dataset = "tinystories"  # modes data and loss
batching = "windows"  # or 'by_length'
gradient_accumulation_steps = 2  # modes loss and plan
batch_size = 32  # rows of a micro-batch
block_size = 128  # context in tokens
vocab_size = 0  # 0: that of the data set, where it is prepared, else GPT-2's 50,257
# model
arch = "gpt2"
n_layer = 6
n_head = 6
n_kv_head = 0
n_embd = 384
dropout = 0.1
bias = True
tied = True
# optimizer
optimizer = "adamw"
learning_rate = 1e-3
max_iters = 20000
max_epochs = 0.0  # mode plan: passes over the data set, instead of max_iters
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0
schedule = "cosine"
warmup_iters = 200
min_lr = 1e-4
eval_interval = 250  # mode loss: steps between evaluations; the clock stands still meanwhile
# system
device = "auto"  # cuda, else mps, else cpu; or 'cpu', 'cuda:1', ...
dtype = "auto"  # fastest safe type on the device; or 'float32', 'bfloat16', 'float16'
compile = True  # torch.compile, where it works
remat = False  # as in train.py; a peer keeps all
softmax_words = 0  # as in train.py; a peer has the whole softmax
loss_chunk = -1  # as in train.py
seed = 1337
config = configure(globals(), skip_settings_of="train.py")
# -----------------------------------------------------------------------------
RUNTIME = 5e8  # bytes that CUDA's context and libraries take on a GPU, Python and torch on a CPU


class Side:
    """One of the two programs: its model, its optimizers, its settings, and training steps with them."""

    def __init__(self, module: ModuleType, name: str, config: dict, seed: int):
        self.name, self.config, self.is_ours = name, SimpleNamespace(**config), module is ours
        self.take_turn()
        self.times: list[float] = []  # seconds of the rounds
        c = self.config
        torch.manual_seed(seed)
        shape = dict(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                     dropout=c.dropout, bias=c.bias)
        betas = (c.beta1, c.beta2)
        if self.is_ours:
            self.raw_model = (trained if run else
                              ours.GPT(ours.GPTConfig(**shape, arch=c.arch, n_kv_head=c.n_kv_head, tied=c.tied)).to(device))
            self.raw_model.sample_softmax(c.softmax_words, word_counts)
            self.raw_model.remat = c.remat
            self.raw_model.loss_chunk = machine.resolve_loss_chunk(c.loss_chunk, device, c.vocab_size)
            self.optimizers = self.raw_model.configure_optimizers(c.weight_decay, c.learning_rate, betas, device_type,
                                                                  c.optimizer)
            self.dtype = machine.resolve_dtype(c.dtype, device)
            self.dtype = machine.measured_dtype(self.raw_model) if self.dtype == "auto" else self.dtype
        else:
            self.raw_model = module.GPT(module.GPTConfig(**shape)).to(device)
            made = self.raw_model.configure_optimizers(c.weight_decay, c.learning_rate, betas, device_type)
            self.optimizers = made if isinstance(made, list) else [made]
            self.dtype = "bfloat16" if device_type == "cuda" else "float32"
        self.raw_model.train()
        self.scaler = torch.amp.GradScaler(device_type, enabled=self.dtype == "float16")
        self.autocast = (contextlib.nullcontext() if self.dtype == "float32" else
                         torch.autocast(device_type, getattr(torch, self.dtype)))
        self.model = torch.compile(self.raw_model) if c.compile else self.raw_model

    def compile_or_not(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Try the compiled model on one batch; where that fails, go on with the model itself and say so."""
        try:
            with self.autocast:
                self.model(x, y)[1].backward()
        except Exception as error:
            if not self.config.compile:
                raise
            print(f"{self.name}: torch.compile does not work here ({type(error).__name__}); measured in eager mode")
            self.model = self.raw_model
        self.raw_model.zero_grad(set_to_none=True)

    def take_turn(self) -> None:
        machine.keep_freed_memory(self.is_ours)  # a setting of the whole process, and of our train.py alone

    def step(self, micro_batches: list[tuple[torch.Tensor, torch.Tensor]], lr: float) -> None:
        for o in self.optimizers:
            for group in o.param_groups:
                group["lr"] = lr
        for x, y in micro_batches:
            with self.autocast:
                _, loss = self.model(x, y)
            self.scaler.scale(loss / len(micro_batches)).backward()
        for o in self.optimizers:
            self.scaler.unscale_(o)
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), self.config.grad_clip)
        for o in self.optimizers:
            self.scaler.step(o)
        self.scaler.update()
        self.raw_model.zero_grad(set_to_none=True)

    def tokens_per_second(self) -> float:
        return steps * batch_size * block_size / statistics.median(self.times)

    @torch.no_grad()
    def evaluate(self, batches) -> float:
        """Mean loss in nats per token."""
        self.raw_model.eval()
        total, count = 0.0, 0
        for x, y in batches:
            with self.autocast:
                loss = self.raw_model(x, y)[1].item()
            total, count = total + loss * int((y >= 0).sum()), count + int((y >= 0).sum())
        self.raw_model.train()
        return total / count


def timed(times: list[float], f) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device_type == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - start)


def spread(times: list[float]) -> float:
    """Slowest over fastest, minus one."""
    return max(times) / min(times) - 1


def load_peer(path: str) -> ModuleType:
    if not Path(path).is_file():
        raise ValueError(f"--against: there is no file {path}")
    spec = importlib.util.spec_from_file_location("peer_model", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        _ = module.GPT, module.GPTConfig
    except Exception as error:
        raise ValueError(f"{path} is not a model.py with GPT and GPTConfig: {type(error).__name__}: {error}") from None
    return module


def hugging_face() -> SimpleNamespace:
    """transformers' GPT-2 with the manners of a nanoGPT-style model.py; it has biases whatever `bias` says."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise ValueError("--against=hf needs a package: pip install transformers") from None

    class GPT(torch.nn.Module):
        def __init__(self, c: SimpleNamespace):
            super().__init__()
            self.hf = GPT2LMHeadModel(GPT2Config(
                vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=None, eos_token_id=None))

        def forward(self, idx: torch.Tensor, targets: torch.Tensor):
            logits = self.hf(idx, use_cache=False).logits
            return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

        def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float, top_k: int):
            return self.hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=max_new_tokens, do_sample=True,
                                    temperature=temperature, top_k=top_k, pad_token_id=0)

        def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str):
            return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay, fused=True)

    return SimpleNamespace(GPT=GPT, GPTConfig=SimpleNamespace)


def llama_cpp(path: str) -> SimpleNamespace:
    """A GGUF file in llama.cpp with the manners of a nanoGPT-style model.py, as far as generating one text goes."""
    try:
        from llama_cpp import Llama
    except ImportError:
        raise ValueError("--against=FILE.gguf needs a package: pip install llama-cpp-python") from None
    if mode != "generate" or texts != "1" or not Path(path).is_file():
        raise ValueError(f"--against=FILE.gguf takes a file that is there, --mode=generate and --texts=1, got {path}, {mode}, "
                         f"{texts}")

    class GPT(torch.nn.Module):
        def __init__(self, c: SimpleNamespace):
            super().__init__()
            threads = torch.get_num_threads()
            self.llama = Llama(path, n_ctx=c.block_size, n_threads=threads, n_threads_batch=threads, verbose=False)

        def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float, top_k: int):
            self.llama.reset()  # or it would remember the prompt
            stream = self.llama.generate(idx[0].tolist(), temp=temperature, top_k=top_k, top_p=1.0, min_p=0.0)
            return list(islice(stream, max_new_tokens))

        def configure_optimizers(self, *args) -> list:
            return []

    return SimpleNamespace(GPT=GPT, GPTConfig=SimpleNamespace)


def bench_train() -> dict:
    torch.manual_seed(seed)
    tokens = torch.randint(vocab_size, (batch_size, block_size + 1), device=device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    sides = [Side(ours, "this model", config, seed)]
    if peer:
        sides += [Side(peer, against, config | {"compile": c}, seed) for c in ((True, False) if compile else (False,))]
    for side in sides:
        side.compile_or_not(*batch)
        side.step([batch], 1e-4)
    for _ in tqdm(range(rounds), desc="rounds"):
        for side in sides:  # in turns, so that a busy or throttled machine slows all
            side.take_turn()
            timed(side.times, lambda: [side.step([batch], 1e-4) for _ in range(steps)])
    mine = sides[0]
    peak, peak_source = machine.peak_flops(device, mine.dtype)
    mfu = mine.tokens_per_second() * mine.raw_model.flops_per_token() / peak
    print(f"{mine.raw_model.num_params():,} parameters, batch {batch_size} x {block_size}, {device}, torch "
          f"{torch.__version__}; medians of {rounds} rounds of {steps} steps")
    for side in sides:
        print(f"{side.tokens_per_second():12,.0f} tok/s (spread {spread(side.times):.0%})  {side.dtype}, "
              f"{'eager' if side.model is side.raw_model else 'compiled'}  {side.name}")
    print(f"{mfu:12.1%} MFU of this model, against {peak / 1e12:.3g} TFLOP/s ({peak_source})")
    result = dict(parameters=mine.raw_model.num_params(), dtype=mine.dtype, compiled=mine.model is not mine.raw_model,
                  tokens_per_second=mine.tokens_per_second(), spread=spread(mine.times), mfu=mfu)
    if peer:
        theirs = max(side.tokens_per_second() for side in sides[1:])
        result |= dict(against=against, their_tokens_per_second=theirs, ratio=mine.tokens_per_second() / theirs)
        print(f"{result['ratio']:12.2f} times as fast")
    return result


def bench_data() -> dict:
    """How fast batches are made, and how much of them is padding."""
    stream = prefetch(map(batches.batch, range(steps * (rounds + 1))), device)
    times, tokens, padding = [], [], []

    def one_round() -> None:
        shapes = [next(stream)[1] for _ in range(steps)]
        tokens.append(sum(y.numel() for y in shapes))
        padding.append(sum(int((y < 0).sum()) for y in shapes) / tokens[-1])

    for _ in range(rounds + 1):
        timed(times, one_round)
    speed = statistics.median(n / t for n, t in zip(tokens[1:], times[1:]))  # the first one warms up
    print(f"{speed:12,.0f} tok/s of batches of {batch_size} {batching} from {dataset}, {statistics.mean(padding):.1%} of them "
          f"padding; spread {spread(times[1:]):.0%}")
    return dict(dataset=dataset, batching=batching, tokens_per_second=speed, padding=statistics.mean(padding))


def train_once(module: ModuleType, name: str, config: dict, seed: int) -> list[tuple[float, int, float]]:
    """One training; (seconds, tokens, loss on the whole validation split) at its evaluations."""
    c = SimpleNamespace(**config)
    batches = TrainBatches(streams["train"], c.block_size, c.batch_size, seed, c.batching, meta["eot"])
    stream = prefetch(map(batches.batch, range(c.max_iters * c.gradient_accumulation_steps)), device)
    started, paused, tokens, points = time.perf_counter(), 0.0, 0, []
    side = Side(module, name, config, seed)
    side.compile_or_not(*(t.to(device) for t in batches.batch(0)))
    for step in tqdm(range(1, c.max_iters + 1), desc=f"{name}, seed {seed}"):
        lr = ours.scheduled_lr(step - 1, c.schedule, c.learning_rate, c.min_lr, c.warmup_iters, c.max_iters)
        micro_batches = [next(stream) for _ in range(c.gradient_accumulation_steps)]
        side.step(micro_batches, lr)
        tokens += sum(y.numel() for _, y in micro_batches)
        if step % c.eval_interval == 0 or step == c.max_iters:
            if device_type == "cuda":
                torch.cuda.synchronize()
            pause = time.perf_counter()
            loss = side.evaluate(eval_batches(streams["val"], c.block_size, c.batch_size, c.batching, meta["eot"]))
            points.append((pause - started - paused, tokens, loss))
            paused += time.perf_counter() - pause
    return points


def bench_loss() -> dict:
    sides = {"this model": (ours, config)} | ({against: (peer, config | their_settings)} if peer else {})
    runs = {name: [train_once(module, name, settings, seed + i) for i in range(seeds)]
            for name, (module, settings) in sides.items()}
    reference = against if peer else "this model"
    target = target_loss or statistics.mean(points[-1][2] for points in runs[reference])
    result, seconds_to_target = dict(dataset=dataset, seeds=seeds, target_loss=target), {}
    for name in sides:
        reached = [next((point for point in points if point[2] <= target), None) for points in runs[name]]
        if name == reference and not target_loss:
            reached = [points[-1] for points in runs[name]]  # the target is the mean of its ends
        hits = [point for point in reached if point]
        row = dict(final_loss=mean_and_deviation([points[-1][2] for points in runs[name]]),
                   final_seconds=mean_and_deviation([points[-1][0] for points in runs[name]]), reached=len(hits))
        print(f"{name}: loss {row['final_loss'][0]:.4f} +- {row['final_loss'][1]:.4f} after {row['final_seconds'][0]:.1f} +- "
              f"{row['final_seconds'][1]:.1f} s, {runs[name][0][-1][1]:,} tokens")
        if hits:
            row |= dict(seconds=mean_and_deviation([point[0] for point in hits]),
                        tokens=mean_and_deviation([point[1] for point in hits]))
            print(f"    {target:.4f} reached by {len(hits)} of {seeds} after {row['seconds'][0]:.1f} +- "
                  f"{row['seconds'][1]:.1f} s, {row['tokens'][0]:,.0f} +- {row['tokens'][1]:,.0f} tokens")
            seconds_to_target[name] = row["seconds"][0]
        result["theirs" if name == against else "ours"] = row
    if len(seconds_to_target) == 2:
        result |= dict(against=against, ratio=seconds_to_target["this model"] / seconds_to_target[against])
        print(f"{result['ratio']:12.3f} of their time")
    return result


def bench_generate() -> dict:
    """
    Texts after random prompts, in float32 as sample.py makes them, and in int8. What the first token takes is subtracted from
    the whole to get the rate of the others.
    """
    settings = config | {"compile": False, "dtype": "float32"}
    mine = Side(ours, "this model", settings, seed)
    in_int8, float_model = copy.copy(mine), mine.raw_model
    in_int8.name = "this model, int8"
    in_int8.raw_model = ours.GPT.from_weights(float_model.config, ours.quantize_int8(float_model.state_dict()), device)
    sides = [mine, in_int8] + ([Side(peer, against, settings, seed)] if peer else [])
    weights = [4 * float_model.num_params(), float_model.num_params()]  # bytes, about
    prompt = max(1, block_size // 4)  # tokens
    numbers = torch.randn(64 << 20, device=device)  # 256 MB, which no cache holds
    bandwidth = 4 * numbers.numel() / machine.median_seconds(numbers.sum, synchronize=device)
    print(f"{float_model.num_params():,} parameters, {prompt} + {max_new_tokens} tokens, {device}, torch {torch.__version__}; "
          f"medians of {rounds} rounds; memory is read at {bandwidth / 1e9:.1f} GB/s")
    result = dict(parameters=float_model.num_params(), bandwidth=bandwidth)
    for B in [int(number) for number in texts.split(",")]:
        idx = torch.randint(vocab_size, (B, prompt), device=device)
        first, whole = ({side.name: [] for side in sides} for _ in range(2))
        for _ in tqdm(range(rounds + 1), desc=f"{B} texts"):  # the first round warms up
            for side in sides:
                side.take_turn()
                side.raw_model.eval()
                with torch.no_grad(), side.autocast:
                    timed(first[side.name], lambda: side.raw_model.generate(idx, 1, 0.8, 40))
                    timed(whole[side.name], lambda: side.raw_model.generate(idx, 1 + max_new_tokens, 0.8, 40))
        to_first = [statistics.median(first[side.name][1:]) for side in sides]
        speeds = [B * max_new_tokens / (statistics.median(whole[side.name][1:]) - t) for side, t in zip(sides, to_first)]
        row = dict(tokens_per_second=speeds[0], first_token_ms=1000 * to_first[0], int8_tokens_per_second=speeds[1],
                   int8_first_token_ms=1000 * to_first[1], weights_read_per_second=weights[0] * speeds[0] / B)
        if peer:
            row |= dict(their_tokens_per_second=speeds[2], their_first_token_ms=1000 * to_first[2],
                        ratio=speeds[0] / speeds[2], int8_ratio=speeds[1] / speeds[2])
        for i, side in enumerate(sides):
            print(f"{B:3} texts: first token after {1000 * to_first[i]:7.1f} ms, then {speeds[i]:9,.1f} tokens/s"
                  + (f", weights read at {weights[i] * speeds[i] / B / 1e9:5.1f} GB/s" if side.is_ours else "")
                  + (f", {speeds[i] / speeds[2]:6.2f} times as fast" if side.is_ours and peer else "") + f"  {side.name}")
        result[f"batch_{B}"] = row
    return result


def bytes_of(text: str) -> float:
    """'4GB', '24 GB', '512MB' or plain bytes; a GB is 10**9 of them, a GiB 2**30."""
    number, unit = re.fullmatch(r"([\d.]*)\s*(.*)", text.strip().upper(), re.DOTALL).groups()
    units = {"": 1, "B": 1, "MB": 1e6, "GB": 1e9, "MIB": 2**20, "GIB": 2**30}
    if not re.fullmatch(r"\d+(\.\d+)?", number) or float(number) == 0 or unit not in units:
        raise ValueError(f"device_memory takes a size such as 4GB, 512MB or plain bytes, got {text!r}")
    return float(number) * units[unit]


def chip_of(gpu: str) -> str:
    """The name in PEAK_FLOPS that is meant; '' for ''."""
    names = {"": ""} | {chip.lower(): chip for chip in machine.PEAK_FLOPS}
    if gpu.lower() not in names:
        raise ValueError(f"gpu must be one of {', '.join(machine.PEAK_FLOPS)}, or '' for this machine; got {gpu!r}")
    return names[gpu.lower()]


def training_memory(model: ours.GPT, B: int, accumulation: int, optimizer: str, dtype: str, kind: str) -> dict[str, int]:
    """
    Bytes that training in eager mode takes with micro-batches of B rows on a device of this kind ('cuda', 'cpu'): each part at
    its largest, and as `memory` all that is alive at the worst moment. That is not their sum: the gradients come as
    the activations go, and some tensors exist only in passing.
    """
    c, attn, mlp = model.config, model.transformer.h[0].attn, model.transformer.h[0].mlp
    N, T, C, V, words = B * c.block_size, c.block_size, c.n_embd, c.vocab_size, model.softmax_words
    q, k, v = attn.rows  # widths of all heads together
    on_cpu, qwen3, dropout, accumulates = kind == "cpu", c.arch == "qwen3", c.dropout > 0, accumulation > 1
    autocast = dtype != "float32"  # products in 16 bits; weights, norms and what the blocks add to stay in float32
    size = 2 if autocast else 4  # bytes of a number that a product reads or makes

    params, table = model.num_params(), 4 * V * C  # table: what a gradient of the embedding or of the head takes
    matrices = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    weights = 6 * params if autocast else 4 * params  # with the copies in 16 bits that autocast keeps
    gradients = 4 * params
    states = 8 * params - (4 * matrices if optimizer == "muon" else 0)  # AdamW has two numbers a weight, Muon one

    # what a block keeps of each token for the backward pass
    normed = 8 if qwen3 and on_cpu else 4  # a norm's input; a CPU's RMSNorm keeps its result before the gains too
    block = 2 * C * (normed + size)  # the two norms, and what they hand to c_attn and c_fc
    if dropout and on_cpu:  # attention there has no kernel with dropout
        block += 3 * 4 * q  # scaled queries, scaled keys, values, in float32 and for each head
        block += 3 * 4 * c.n_head * T  # for each pair of tokens: softmax, dropout's factor, their product
    else:
        block += size * (q + k + v)  # c_attn's output, of which the values are a part, and in gpt2 queries and keys
    if qwen3:
        block += size * (q + k + v if dropout and on_cpu else q + k + q)  # c_attn's output; or rotated q, k, and c_proj's copy
        block += (q + k) * ((4 if autocast else 0) + normed - 4)  # q_norm and k_norm: input, unless a view, and result
    block += size * q  # what attention makes of it
    block += size * (sum(mlp.rows) + mlp.rows[0])  # c_fc's output; what c_proj reads
    block += size * mlp.rows[0] if qwen3 else 0  # SwiGLU: silu of the gate
    block += 2 * C * (size if on_cpu else 1) if dropout else 0  # masks
    block *= N
    passing = N * (2 * size * sum(mlp.rows) + 4 * C)  # gradients inside of a block on the way back
    blocks = c.n_layer * (N * 4 * C if model.remat else block)  # remat: the inputs alone
    ends = N * C * (normed + 4 + 4 + (4 if on_cpu else 1) * dropout)  # ln_f in and out, its gradient; the embedding's mask
    activations = blocks + ends + (block if model.remat else 0)

    held = 0  # what the caller of the model holds until the next call
    if words:  # log-softmax in float32, its gradient and that of the logits; the rows of the head
        logits = 12 * N * words + 4 * words * C
    elif model.loss_chunk:  # the logits of a chunk, logsumexp's copy, and under autocast one in float32
        logits = V * min(model.loss_chunk, N) * (10 if autocast else 8)
    else:  # as with sampled words, and the logits themselves
        logits, held = N * V * (12 + size), N * V * size
    chunked = model.loss_chunk > 0 and not words
    before = gradients if accumulates else 0  # those of the micro-batches before
    moments = [
        before + blocks + ends + logits + (table if chunked else 0),  # the loss; ChunkedLoss makes the head's gradient with it
        before + blocks + ends + 2 * table if chunked else 0,  # ... and scales it on the way back
        before + activations + table + held + passing,  # the last block's way back
        # the way back's end; a tied table's gradients of both ends are there, and their sum
        gradients + held + table * (2 * c.tied + accumulates),
        gradients + held + (3 * 4 * matrices if optimizer == "muon" else 0),  # the step; Muon's updates and their squares
        V * N * (10 if autocast else 8) if words and not model.loss_chunk else 0,  # an evaluation, which has the whole softmax
    ]
    return dict(memory=weights + states + max(moments), weights=weights, gradients=gradients, optimizer=states,
                activations=activations, logits=logits)


def bench_plan() -> dict:
    """Memory, time and the best batch size of a training, from formulas: no weights are made and no data read."""
    kind = "cuda" if chip else device_type
    number = "16 bits" if chip and dtype == "auto" else machine.resolve_dtype(dtype, device)
    number = "float32" if number == "auto" else number  # what a CPU is faster with, only a measurement could say
    with ours.NoWeights():
        model = ours.GPT(ours.GPTConfig(arch, block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias,
                                        n_kv_head=n_kv_head, tied=tied))
    model.remat, model.loss_chunk = remat, machine.resolve_loss_chunk(loss_chunk, kind, vocab_size)
    model.sample_softmax(softmax_words, word_counts)
    rows = batch_size * gradient_accumulation_steps  # of a step
    holes = 0.4 if kind == "cpu" else 0.1  # between tensors: glibc leaves more of them than torch's allocator for GPUs

    def memory(B: int) -> dict[str, int]:
        parts = training_memory(model, B, rows // B, optimizer, number, kind)
        return parts | dict(with_runtime=int(RUNTIME + (1 + holes) * parts["memory"]))

    mine, fits, best = memory(batch_size), None, batch_size
    print(f"{model.num_params():,} parameters, {model.num_params(non_embedding=True):,} without embeddings: {arch}, {n_layer} "
          f"layers of width {n_embd}, vocab_size {vocab_size:,}")
    print(f"{batch_size} rows of {block_size} tokens on {chip or device}, products in {number}, not compiled, take")
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        print(f"{mine[name] / 1e9:12.3f} GB {name}")
    print(f"{mine['memory'] / 1e9:12.3f} GB at the worst moment; not all of these are at their largest then")
    print(f"{mine['with_runtime'] / 1e9:12.3f} GB with the device's runtime ({RUNTIME / 1e9:.1f} GB) and holes between tensors "
          f"({holes:.0%})")
    if memory_limit:
        fits = mine["with_runtime"] <= memory_limit
        most = softmax_words // block_size if softmax_words else rows  # rows that sampled words allow
        best = next((B for B in range(min(rows, most), 0, -1)
                     if rows % B == 0 and memory(B)["with_runtime"] <= memory_limit), 0)
        print(f"that {'fits' if fits else 'does not fit'} into {memory_limit / 1e9:g} GB")
        if best:
            print(f"take --batch_size={best} --gradient_accumulation_steps={rows // best}: the largest micro-batches that fit, "
                  f"{memory(best)['with_runtime'] / 1e9:.3f} GB, with {rows * block_size:,} tokens a step as before")
        else:
            ways = ["--loss_chunk=256"] * (not model.loss_chunk) + ["--remat=True"] * (not remat)
            print(f"nor does one row, with {memory(1)['with_runtime'] / 1e9:.3f} GB: try "
                  f"{', '.join(ways + ['a smaller --block_size'])} or a smaller model")
    if max_epochs and not tokens and not data_tokens:
        print(f"how long {max_epochs:g} epochs take depends on the data set {dataset}, which is not prepared: give --tokens")
    trained = tokens or int(max_epochs * data_tokens) or max_iters * rows * block_size
    flops = trained * model.flops_per_token()
    peak, source = (machine.PEAK_FLOPS[chip], "16-bit datasheet") if chip else machine.peak_flops(device, number)
    seconds = flops / (mfu * peak)
    print(f"{trained:,} tokens, {math.ceil(trained / (rows * block_size)):,} steps: {flops:.3g} FLOPs, "
          + (f"{seconds / 3600:,.1f} hours" if seconds > 7200 else f"{seconds / 60:.1f} minutes")
          + f" at {mfu:.0%} of {peak / 1e12:.3g} TFLOP/s ({source})")
    return dict(device=chip or device, parameters=model.num_params(),
                parameters_non_embedding=model.num_params(non_embedding=True),
                **{f"{name}_bytes": n for name, n in mine.items()}, fits=fits, batch_size=best or None,
                gradient_accumulation_steps=rows // best if best else None, tokens=trained, flops=flops, peak_flops=peak,
                seconds=seconds)


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


with user_errors():
    for name, least in (("rounds", 1), ("steps", 1), ("batch_size", 1), ("gradient_accumulation_steps", 1), ("seeds", 1),
                        ("max_iters", 1), ("max_new_tokens", 1), ("eval_interval", 1), ("warmup_iters", 0),
                        ("learning_rate", 0), ("min_lr", 0), ("weight_decay", 0), ("grad_clip", 0), ("seed", 0),
                        ("target_loss", 0), ("loss_chunk", -1), ("tokens", 0), ("max_epochs", 0), ("vocab_size", 0)):
        if config[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {config[name]}")
    if mode not in ("train", "data", "loss", "generate", "plan"):
        raise ValueError(f"mode must be train, data, loss, generate or plan, got {mode!r}")
    device = machine.resolve_device(device)
    if run:
        if mode != "generate":
            raise ValueError(f"run is for --mode=generate, not {mode}")
        trained = load_model(run, device)[0]
        shape = {name: value for name, value in asdict(trained.config).items() if name in config}
        config |= shape
        globals().update(shape)
    if mode == "generate" and max(1, block_size // 4) + 1 + max_new_tokens > block_size:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must fit behind a prompt of a quarter of block_size "
                         f"({block_size})")
    if not all(number.isdecimal() and int(number) for number in texts.split(",")):
        raise ValueError(f"texts takes numbers with commas between them, got {texts!r}")
    if optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer must be adamw or muon, got {optimizer!r}")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must be above 0 and at most 1, got {mfu}")
    chip, memory_limit = chip_of(gpu), bytes_of(device_memory) if device_memory else 0.0
    ours.schedule_factor(schedule, 0.0)
    ours.check_softmax_words(softmax_words, batch_size * block_size)
    peer = (hugging_face() if against == "hf" else llama_cpp(against) if against.endswith(".gguf") else
            load_peer(against) if against else None)
    their_settings = {name: coerce(name, value, config[name]) for name, value in read_config_file(their_config).items()
                      if name in config} if their_config else {}
    machine.resolve_dtype(dtype, device)
    data_tokens = 0  # of the training split, where it is known
    from_data = mode in ("data", "loss")
    if from_data or (Path("data") / dataset / "meta.json").exists():
        meta = load_meta(Path("data") / dataset)
        data_tokens = meta["splits"].get("train", {}).get("tokens", 0)
        vocab_size = meta["vocab_size"] if from_data else vocab_size or meta["vocab_size"]
    config["vocab_size"] = vocab_size = vocab_size or 50257
    word_counts = torch.zeros(vocab_size, device=device)
    if from_data:
        streams = {split: TokenStream(Path("data") / dataset, split, meta) for split in ("train", "val")}
        for stream in streams.values():
            stream.check(meta)
        batches = TrainBatches(streams["train"], block_size, batch_size, seed, batching, meta["eot"])
        word_counts = streams["train"].word_counts(meta["vocab_size"]).to(device)
    ours.GPTConfig(arch, block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, n_kv_head=n_kv_head,
                   tied=tied)
device_type = device.split(":")[0]
torch.set_float32_matmul_precision("high")
result = {"train": bench_train, "data": bench_data, "loss": bench_loss, "generate": bench_generate,
          "plan": bench_plan}[mode]()
print(json.dumps({"mode": mode, "device": device, "torch": torch.__version__} | result))
