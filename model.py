"""
A GPT in one file that needs torch and nothing else: copy it next to your own script and it works.

arch 'gpt2': learned positions, LayerNorm, tanh-GELU, tied head; bit-compatible with OpenAI's weights.
arch 'qwen3': rotary positions, RMSNorm (of queries and keys too), SwiGLU, no biases; compatible with Qwen3ForCausalLM.
"""
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    arch: str = "gpt2"  # or 'qwen3'
    block_size: int = 1024  # longest context in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as GPT-2 has them; qwen3 has none
    gelu: str = "tanh"  # GPT-2's own approximation; 'none' is the exact one that nanoGPT's checkpoints were trained with
    # qwen3 only
    n_kv_head: int = 0  # heads of keys and values, each shared by n_head / n_kv_head queries; 0: n_head
    head_dim: int = 0  # 0: n_embd / n_head
    n_inner: int = 0  # width of the SwiGLU; 0: 8/3 n_embd, with which it has as many weights as GPT-2's MLP
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    tied: bool = True  # whether the head is the token table, as it always is in gpt2

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{field.name} takes {kind.__name__}, not {value!r}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.arch not in ("gpt2", "qwen3"):
            raise ValueError(f"arch must be gpt2 or qwen3, got {self.arch!r}")
        for name in ("n_kv_head", "head_dim", "n_inner"):
            if getattr(self, name) < 0 or self.arch == "gpt2" and getattr(self, name):
                raise ValueError(f"{name} must be {'0 with arch gpt2' if self.arch == 'gpt2' else 'at least 0'}, "
                                 f"got {getattr(self, name)}")
        if self.arch == "gpt2" and not self.tied:
            raise ValueError("tied must be True with arch gpt2")
        if self.n_embd % self.n_head and not self.head_dim:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.n_head % (self.n_kv_head or self.n_head):
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        if self.arch == "qwen3" and (self.head_dim or self.n_embd // self.n_head) % 2:
            raise ValueError(f"n_embd / n_head must be even for rotary positions, got {self.n_embd} / {self.n_head}")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be above 0, got {self.rope_theta}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    return nn.LayerNorm(width, bias=config.bias) if config.arch == "gpt2" else nn.RMSNorm(width, eps=1e-6)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn (B, nh, T, hs), as pairs of its halves, by the angles of their positions; cos and sin are (T, hs / 2)."""
    a, b = x.chunk(2, dim=-1)  # (B, nh, T, hs / 2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Linear(nn.Linear):
    """
    nn.Linear, which on a CPU reads the weights twice as fast where rows are few, as they are in generation: MKL works at
    half the speed of the memory unless the product is (N, C) by (C, rows), and for one row also unless it is a batch.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, bias = self.weight, self.bias
        (N, C), rows = w.shape, x.numel() // x.size(-1)
        if (torch.is_grad_enabled() or torch.compiler.is_compiling() or rows > 128 or w.device.type != "cpu"
                or not x.dtype == w.dtype == torch.float32 or not torch.backends.mkl.is_available()):
            return F.linear(x, w, bias)
        if rows > 1:
            columns = x.reshape(rows, C).t()
            y = torch.cat([torch.mm(part, columns).t() for part in w.split(2048)], dim=1)  # (rows, N), turned while in cache
        else:
            n = torch.get_num_threads()
            end = N - N % n
            y = torch.bmm((w if end == N else w[:end]).view(n, -1, C), x.expand(n, 1, C).mT)  # (n, N / n, 1)
            if end < N:
                y = torch.cat((y.view(end), torch.mv(w[end:], x.reshape(C))))
        y = y.view(*x.shape[:-1], N)
        return y if bias is None else y.add_(bias)


class Int8Linear(nn.Module):
    """
    A Linear with int8 weights and one scale for each output. Activations stay float, but where torch has fbgemm, as on any
    x86, they become integers of 7 bits on the fly: of all int8 products of torch the fastest there from 2 rows on.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight", torch.empty(linear.weight.shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(len(linear.weight)))
        self.bias = linear.bias
        self.packed = None  # the weights in fbgemm's order

    def pack(self) -> None:
        """Hand the weights to fbgemm, where there is one."""
        if self.weight.device.type != "cpu" or torch.backends.quantized.engine not in ("x86", "fbgemm"):
            return
        with warnings.catch_warnings():  # what is deprecated are quantized tensors; they exist for this one line
            warnings.simplefilter("ignore")
            zeros = torch.zeros(len(self.weight), dtype=torch.long)
            w = torch._make_per_channel_quantized_tensor(self.weight, self.weight_scale.double(), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(w, self.bias)
        self.weight = self.weight.to("meta")  # its shape only

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None:  # a slice at a time: a wide head is never float as a whole
            y = torch.cat([F.linear(x, w.to(x.dtype)) for w in self.weight.split(8192)], dim=-1) * self.weight_scale
            return y if self.bias is None else y + self.bias
        if x.numel() == x.size(-1):
            return torch.ops.quantized.linear_dynamic(x.float(), self.packed, True)  # True: 7 bits, for 8 may overflow
        # rows of like size, or the largest of a batch would decide how the others are rounded
        size = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
        y = torch.ops.quantized.linear_dynamic(x / size, self.packed, True)
        return y.mul_(size) if self.bias is None else torch.addcmul(self.bias, y.sub_(self.bias), size)


class Int8Embedding(nn.Module):
    """A table of int8 rows, each with its scale."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.register_buffer("weight", torch.empty(embedding.weight.shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(len(embedding.weight)))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.weight[idx] * self.weight_scale[idx][..., None]


def quantize_int8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A state dict with its matrices and tables in int8: a row w becomes round(w / scale) with scale = max |w| / 127, which
    stands beside it as NAME_scale. GPT.from_weights makes a model of it.
    """
    result, done = {}, {}
    for name, w in weights.items():
        if w.dim() < 2 or w.dtype == torch.int8:
            result[name] = w
            continue
        if w.data_ptr() not in done:  # a tied head is the token table
            scale = w.float().abs().amax(dim=1).clamp(min=1e-12) / 127
            done[w.data_ptr()] = (w / scale[:, None]).round().to(torch.int8), scale
        result[name], result[f"{name}_scale"] = done[w.data_ptr()]
    return result


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        bias = config.bias and config.arch == "gpt2"
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_dim = config.head_dim or config.n_embd // config.n_head
        self.dropout = config.dropout
        self.rows = [self.head_dim * n for n in (self.n_head, self.n_kv_head, self.n_kv_head)]  # of query, key, value
        self.c_attn = Linear(config.n_embd, sum(self.rows), bias=bias)
        self.c_proj = Linear(self.rows[0], config.n_embd, bias=bias)
        if config.arch == "qwen3":
            self.q_norm = make_norm(config, self.head_dim)
            self.k_norm = make_norm(config, self.head_dim)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None, mask: torch.Tensor | None = None,
                past: tuple[torch.Tensor, torch.Tensor, int] | None = None) -> torch.Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, T, nh * hs) -> (B, nh, T, hs), of all three
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if rope is not None:
            # in float32, like the gains, also where autocast made q and k shorter
            q = rotate(self.q_norm(q.float()), *rope).type_as(v)
            k = rotate(self.k_norm(k.float()), *rope).type_as(v)
        if past is not None:
            keys, values, begin = past  # (B, nh, size, hs), of which the first `begin` positions are filled
            keys[:, :, begin:begin + T], values[:, :, begin:begin + T] = k, v
            k, v = keys[:, :, :begin + T], values[:, :, :begin + T]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
                                           is_causal=mask is None and k.size(2) == T,  # a single query sees all keys
                                           enable_gqa=self.n_kv_head < self.n_head)
        y = y.transpose(1, 2).contiguous().view(B, T, -1)  # (B, nh, T, hs) -> (B, T, nh * hs)
        y = self.c_proj(y)
        return self.resid_dropout(y) if self.training else y  # a call that does nothing costs a small model 1 % of a step


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gelu = config.gelu if config.arch == "gpt2" else ""  # '': SwiGLU, https://arxiv.org/abs/2002.05202
        bias = config.bias and config.arch == "gpt2"
        n_inner = 4 * config.n_embd if self.gelu else config.n_inner or math.ceil(config.n_embd / 24) * 64
        self.rows = [n_inner] if self.gelu else [n_inner, n_inner]  # of gate, up
        self.c_fc = Linear(config.n_embd, sum(self.rows), bias=bias)
        self.c_proj = Linear(n_inner, config.n_embd, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_fc(x)
        if self.gelu:
            x = F.gelu(x, approximate=self.gelu)
        else:
            gate, up = x.chunk(2, dim=-1)  # (B, T, n_inner)
            x = F.silu(gate) * up
        x = self.c_proj(x)
        return self.dropout(x) if self.training else x


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, *attn_args) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), *attn_args)
        x = x + self.mlp(self.ln_2(x))
        return x


class KVCache:
    """
    Keys and values of the positions that a model has seen, so that a call computes those of new ones only. The buffers are
    allocated once, for B rows of `size` positions (0: block_size), and written in place. Where prompts differ in length,
    `pad` (B) says how many columns at the left of each row are padding: no other token sees them, and positions count from
    behind them.
    """

    def __init__(self, model: "GPT", B: int, pad: torch.Tensor | None = None, size: int = 0):
        weight, attn = model.transformer.ln_f.weight, model.transformer.h[0].attn
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        shape = B, attn.n_kv_head, size or model.config.block_size, attn.head_dim
        self.layers = [tuple(torch.empty(shape, device=weight.device, dtype=dtype) for _ in "kv") for _ in model.transformer.h]
        self.length = 0  # positions filled
        self.pad = pad


class NoWeights(TorchFunctionMode):
    """Within it, modules are made without memory for their weights and without random numbers in them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs | ({"device": "meta"} if func is torch.empty else {}))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.remat = False  # True: keep only the input of each block and compute the rest again in the backward pass
        self.loss_chunk = 0  # tokens whose logits exist at a time where a loss is asked for; 0: those of the whole batch
        self.softmax_words = 0  # words in the softmax of a training step; 0: all, else sample_softmax set it
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **(dict(wpe=nn.Embedding(config.block_size, config.n_embd)) if config.arch == "gpt2" else {}),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=make_norm(config, config.n_embd),
        ))
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight  # https://arxiv.org/abs/1608.05859
        if config.arch == "qwen3":  # https://arxiv.org/abs/2104.09864
            half = self.transformer.h[0].attn.head_dim // 2
            angles = torch.arange(config.block_size)[:, None] * config.rope_theta ** (-torch.arange(half) / half)
            self.register_buffer("cos", angles.cos(), persistent=False)  # (block_size, hs / 2)
            self.register_buffer("sin", angles.sin(), persistent=False)
        self.init_weights()

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: dict[str, torch.Tensor], device: str = "cpu") -> "GPT":
        """
        A model with the weights of a state dict, which may be one of quantize_int8, on the device where it is to work. No
        other weights are made first. RuntimeError where they do not fit.
        """
        with NoWeights():
            model = cls(config)
            for name, module in list(model.named_modules()):
                if f"{name}.weight_scale" in weights and isinstance(module, (nn.Linear, nn.Embedding)):
                    parent, _, child = name.rpartition(".")
                    int8 = Int8Linear if isinstance(module, nn.Linear) else Int8Embedding
                    setattr(model.get_submodule(parent), child, int8(module))
        floats = {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}
        model.load_state_dict(floats, assign=True)
        if config.tied:
            model.lm_head.weight = model.transformer.wte.weight
        model.to(device)
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.pack()
        return model

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    @torch.no_grad()
    def init_weights(self) -> None:
        """
        GPT-2's initialisation: N(0, 0.02), projections into the residual stream scaled by its depth, biases zero. 0.02 fits
        a width of 768; the hidden matrices of a narrower model get more, by the square root, or attention is slow to wake.
        In qwen3 the projections into the residual stream and an untied head begin at zero: the first guess is uniform,
        and no block disturbs the stream before it has learned something.
        """
        std = 0.02 * math.sqrt(768 / self.config.n_embd)
        for name, p in self.named_parameters():
            if name.startswith(("transformer.wte", "transformer.wpe")):
                # small where it is the head too: the first guess should be uniform
                p.normal_(std=0.02 if self.config.tied else 0.5)
            elif self.config.arch == "qwen3" and name.endswith(("c_proj.weight", "lm_head.weight")):
                p.zero_()
            elif name.endswith("c_proj.weight"):
                p.normal_(std=std / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                p.normal_(std=std)
            elif name.endswith("bias"):
                p.zero_()
            else:  # gain of a norm
                p.fill_(1.0)

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Token ids (B, T), which follow what the cache holds, to the states (B, T, C) that the head reads."""
        B, T = idx.shape
        begin = cache.length if cache else 0
        end = begin + T
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size ({self.config.block_size})")
        keys = torch.arange(end, device=idx.device)
        positions = keys[begin:]
        mask = None
        if cache and cache.pad is not None:
            queries, pad = positions[:, None], cache.pad[:, None, None]  # (T, 1), (B, 1, 1)
            mask = (((keys >= pad) & (keys <= queries)) | (keys == queries))[:, None]  # (B, 1, T, end); padding sees itself
            positions = (positions - cache.pad[:, None]).clamp(min=0)  # (B, T)
        elif 1 < T < end:
            mask = keys <= positions[:, None]  # (T, end)
        x, rope = self.transformer.wte(idx), None  # (B, T, C)
        if self.config.arch == "gpt2":
            x = x + self.transformer.wpe(positions)
        else:
            rope = tuple(table[positions].unsqueeze(-3) for table in (self.cos, self.sin))  # ([B,] 1, T, hs / 2)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            if self.remat and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, mask, (*cache.layers[i], begin) if cache else None)
        if cache:
            cache.length = end
        return self.transformer.ln_f(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                cache: KVCache | None = None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Token ids (B, T) to logits (B, T, vocab_size), and the mean loss in nats per token where targets (B, T) are
        given. A target of -1 does not count. With loss_chunk or softmax_words set, a call with targets gets None for
        the logits. With a cache, idx follows the tokens that are in it: a prompt in one or several pieces, or the newest.
        """
        x = self.hidden(idx, cache)  # (B, T, C)
        if targets is not None and self.training and self.softmax_words:
            return None, sampled_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.word_weights,
                                      self.softmax_words)
        if targets is not None and self.loss_chunk:
            # traced, its chunks would only make a long graph: the products rule
            apply = torch.compiler.disable(ChunkedLoss.apply) if torch.compiler.is_compiling() else ChunkedLoss.apply
            return None, apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.loss_chunk,
                               torch.is_grad_enabled())
        logits = self.lm_head(x)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
               min_p: float = 0.0, repetition_penalty: float = 1.0, no_repeat_ngram: int = 0, stop_token: int = -1,
               generator: torch.Generator | None = None, pad: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """
        Continue token ids (B, T) and yield each new column (B) as soon as it is known, at most max_new_tokens of them.

        The settings mean what they mean in transformers, and apply in this order: repetition_penalty (1: off) makes the
        words of the row so far less probable, no_repeat_ngram (0: off) forbids to end a sequence of so many words that was
        there before; temperature (0: the most probable word); then what is drawn from: the top_k most probable (0: all),
        the fewest that together have top_p, those with at least min_p of the probability of the first.
        A row that has produced stop_token goes on with it, and all ends when all rows have. `pad` (B) says how many columns
        at the left of each row are padding. When the context reaches block_size, its newest half is kept.
        """
        B, T = idx.shape
        self.check_prompt(idx)
        check_sampling(temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram)
        text = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1)  # (B, T + new), written as it goes
        start, cache = 0, None  # first token of the context, and what is known of it
        ended = torch.zeros(B, dtype=torch.bool, device=idx.device)
        for n in range(T, T + max_new_tokens):
            if cache is None or cache.length == self.config.block_size:
                if n - start > self.config.block_size:
                    start = n - (self.config.block_size if cache is None else max(1, self.config.block_size // 2))
                shorter = None if pad is None else (pad - start).clamp(min=0)
                cache = KVCache(self, B, shorter if shorter is not None and shorter.any() else None,
                                min(self.config.block_size, T + max_new_tokens - start))
            logits = self.lm_head(self.hidden(text[:, start + cache.length:n], cache)[:, -1]).float()  # (B, V)
            if repetition_penalty != 1 or no_repeat_ngram:
                logits = penalize(logits, text[:, :n], pad, repetition_penalty, no_repeat_ngram)
            new = sample_token(logits, temperature, top_k, top_p, min_p, generator)  # (B)
            if stop_token >= 0:
                new = new.masked_fill(ended, stop_token)
                ended |= new == stop_token
            text[:, n] = new
            yield new
            if stop_token >= 0 and ended.all():
                break

    def check_prompt(self, idx: torch.Tensor) -> None:
        """ValueError for token ids (B, T) that nothing can follow."""
        if idx.numel() == 0:
            raise ValueError("the prompt is empty: generation needs at least one token")
        if idx.min() < 0 or idx.max() >= self.config.vocab_size:
            raise ValueError(f"the prompt has token ids from {idx.min()} to {idx.max()}, the vocabulary those from 0 to "
                             f"{self.config.vocab_size - 1}")

    def generate(self, idx: torch.Tensor, max_new_tokens: int, *args, **kwargs) -> torch.Tensor:
        """As `stream`, but all at once: token ids (B, T) to (B, T + new), the prompt included."""
        return torch.cat([idx, *(new[:, None] for new in self.stream(idx, max_new_tokens, *args, **kwargs))], dim=1)

    @torch.no_grad()
    def beam_search(self, idx: torch.Tensor, max_new_tokens: int, num_beams: int, length_penalty: float = 1.0,
                    repetition_penalty: float = 1.0, no_repeat_ngram: int = 0, stop_token: int = -1) -> torch.Tensor:
        """
        The most probable continuation of one prompt (1, T) that a search with num_beams beams finds: (1, T + new). Texts
        that have ended compare by their log-probability over length ** length_penalty, so above 0 favours long ones. As
        transformers' with early_stopping=False. The whole must fit into block_size.
        """
        T, V = idx.size(1), self.config.vocab_size
        self.check_prompt(idx)
        if T + max_new_tokens > self.config.block_size:
            raise ValueError(f"beam search needs room for the prompt and max_new_tokens in block_size "
                             f"({self.config.block_size}), got {T} and {max_new_tokens} tokens")
        if num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {num_beams}")
        check_sampling(repetition_penalty=repetition_penalty, no_repeat_ngram=no_repeat_ngram)
        text, cache = idx.expand(num_beams, T), KVCache(self, num_beams)
        scores = torch.zeros(num_beams, device=idx.device)  # log-probabilities of the beams
        scores[1:] = -1e9  # they are all the same as yet
        ended: list[tuple[float, torch.Tensor]] = []  # the num_beams best of them
        for n in range(1, max_new_tokens + 1):
            log_p = self.lm_head(self.hidden(text[:, cache.length:], cache)[:, -1]).float().log_softmax(dim=-1)  # (beams, V)
            log_p = penalize(log_p, text, None, repetition_penalty, no_repeat_ngram)
            # at most half of these end now, for each beam can end in one way only
            best = (scores[:, None] + log_p).flatten().topk(min(2 * num_beams, num_beams * V))
            parents, words = best.indices // V, best.indices % V
            ends = (words == stop_token) | (n == max_new_tokens)
            for i in ends[:num_beams].nonzero()[:, 0].tolist():
                ended.append((best.values[i].item() / n**length_penalty, torch.cat((text[parents[i]], words[i:i + 1]))))
            ended = sorted(ended, key=lambda pair: -pair[0])[:num_beams]
            go_on = (~ends).nonzero()[:num_beams, 0]
            if len(go_on) == 0:
                break
            scores, parents = best.values[go_on], parents[go_on]
            if len(ended) == num_beams and scores[0].item() / n**length_penalty <= ended[-1][0]:
                break
            text = torch.cat((text[parents], words[go_on, None]), dim=1)
            for buffer in (buffer for pair in cache.layers for buffer in pair):
                buffer[:, :, :cache.length] = buffer[parents, :, :cache.length]
        return ended[0][1][None] if ended else idx

    def sample_softmax(self, words: int, counts: torch.Tensor) -> None:
        """
        Train with a softmax over so many words, those of the micro-batch and others by lot, as sampled_loss says; 0: over
        all. counts (V) says how often each occurs in the text. A micro-batch must have no more tokens than `words`.
        """
        self.softmax_words = words if words < self.config.vocab_size else 0
        self.word_weights = (counts + 0.2).sqrt()  # near the best: a lot is drawn for words that matter to the sum

    def num_params(self, non_embedding: bool = False) -> int:
        """Parameters, each counted once; non_embedding leaves out the token and position tables and the head."""
        tables = ("transformer.wte", "transformer.wpe", "lm_head")
        weights = dict(self.named_parameters()) | {name: w for name, w in self.named_buffers() if w.dtype == torch.int8}
        if self.config.tied:
            weights.pop("lm_head.weight", None)
        return sum(w.numel() for name, w in weights.items() if not (non_embedding and name.startswith(tables)))

    def flops_per_token(self, T: int | None = None) -> int:
        """
        FLOPs of forward and backward per token at context length T (default block_size): 6 per weight of a matrix
        product, of the head those that training uses, of the tables none, and 12 * n_layer * n_head * hs * T for attention,
        as in the appendix of PaLM (https://arxiv.org/abs/2204.02311). The causal half of attention, never used, counts too.
        """
        T = T or self.config.block_size
        matmul = self.num_params(non_embedding=True) + (self.softmax_words or self.config.vocab_size) * self.config.n_embd
        return 6 * matmul + 12 * self.config.n_layer * self.transformer.h[0].attn.rows[0] * T

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float],
                             device_type: str, optimizer: str = "adamw") -> list[torch.optim.Optimizer]:
        """
        'adamw': one AdamW, in which matrices and tables decay, gains and biases do not. 'muon': Muon for the matrices of
        the blocks, AdamW for the rest: tables, head, gains and biases.
        """
        if optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, got {optimizer!r}")
        blocks = self.transformer.h if optimizer == "muon" else []
        hidden = [
            {"params": [block.attn.c_attn.weight for block in blocks], "rows": self.transformer.h[0].attn.rows},
            {"params": [block.attn.c_proj.weight for block in blocks]},
            {"params": [block.mlp.c_fc.weight for block in blocks], "rows": self.transformer.h[0].mlp.rows},
            {"params": [block.mlp.c_proj.weight for block in blocks]},
        ]
        taken = {p for group in hidden for p in group["params"]}
        rest = [p for p in self.parameters() if p.requires_grad and p not in taken]
        groups = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
        return [adamw] + ([Muon(hidden, learning_rate, weight_decay, momentum=betas[0])] if blocks else [])


class Muon(torch.optim.Optimizer):
    """
    Momentum whose update is made orthogonal, so that it moves every direction of a matrix equally far
    (https://kellerjordan.github.io/posts/muon/). All matrices of one shape are orthogonalised in one batch. The update of
    an (r, c) matrix has the spectral norm 4 * lr * sqrt(max(1, r / c)): with the 4, one learning rate serves AdamW beside
    it, and with the rest, models of any width (https://arxiv.org/abs/2310.17813).
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.9):
        """A group's `rows` names the heights of the matrices that its parameters are stacked from."""
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, rows=None))

    @torch.no_grad()
    def step(self) -> None:
        """As in torch's fused optimizers, nothing changes where the tensor self.found_inf is 1."""
        go = 1 - getattr(self, "found_inf", torch.zeros((), device=self.param_groups[0]["params"][0].device))
        updates = {}  # shape -> [(update, matrix, group)]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                grad, momentum = p.grad.where(go > 0, 0.0), self.state[p]["momentum"]
                momentum.lerp_(grad, (1 - group["momentum"]) * go)
                update = grad.lerp(momentum, group["momentum"])  # Nesterov
                rows = group["rows"] or [p.size(0)]
                for u, matrix in zip(update.split(rows), p.split(rows)):
                    updates.setdefault(u.shape, []).append((u, matrix, group))
        for (r, c), items in updates.items():
            us = orthogonalize(torch.stack([u for u, _, _ in items]))  # (n, r, c)
            for u, (_, matrix, group) in zip(us, items):
                matrix.mul_(1 - group["lr"] * group["weight_decay"] * go)
                matrix.sub_(u * (4 * group["lr"] * math.sqrt(max(1, r / c)) * go))


def orthogonalize(g: torch.Tensor) -> torch.Tensor:
    """
    Matrices (n, r, c) to about U V^T of their singular value decompositions, with singular values between 0.7 and 1.2, by
    five Newton-Schulz steps: as quick as matrix products are.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g  # few CPUs are fast in bfloat16
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        square = x @ x.mT  # (n, r, r)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g.dtype)


def scheduled_lr(step: int, schedule: str, learning_rate: float, min_lr: float, warmup_iters: int, end: int,
                 by_time: float = 0.0) -> float:
    """
    Learning rate of a step: linear warm-up to learning_rate, then down the schedule to min_lr, reached at the step `end`, or
    sooner where by_time, the share of the time that is over, is further on.
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / warmup_iters
    progress = min(1.0, max(by_time, (step - warmup_iters) / max(1, end - warmup_iters)))
    return min_lr + (learning_rate - min_lr) * schedule_factor(schedule, progress)


def schedule_factor(schedule: str, progress: float) -> float:
    """What is left of the learning rate at a progress from 0 to 1: 1 at first, 0 at the end."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if schedule == "linear":
        return 1 - progress
    if schedule == "trapezoid":  # constant, and linear in the last 40 %
        return min(1.0, (1 - progress) / 0.4)
    raise ValueError(f"schedule must be cosine, linear or trapezoid, got {schedule!r}")


class ChunkedLoss(torch.autograd.Function):
    """
    Head and cross entropy, a chunk of tokens at a time, so that the logits of a batch never exist at once. The gradient
    is made along with the loss, as the logits are at hand. Logits are (V, n) and not (n, V): a CPU multiplies half as fast
    again that way round, and no row of odd length V slows a GPU.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int,
                with_grad: bool) -> torch.Tensor:
        """States (N, C), head (V, C) and targets (N), those of -1 left out, to the mean loss in nats."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        w = weight.to(dtype)
        grad_x, grad_weight = (torch.empty_like(x), torch.zeros_like(weight)) if with_grad else (x, None)
        total, count = x.new_zeros((), dtype=torch.float32), (targets >= 0).sum().clamp(min=1)
        buffer = w.new_empty(len(w), min(chunk, len(x)))  # fresh pages for every chunk would cost a quarter of the time
        for xs, ys, grad_xs in zip(x.to(dtype).split(chunk), targets.split(chunk), grad_x.split(chunk)):
            counts = ys >= 0  # (n)
            ys = ys.clamp(min=0)[None]  # (1, n)
            p = torch.mm(w, xs.t(), out=buffer if len(xs) == buffer.size(1) else None).float()  # (V, n), logits
            log_sum = p.logsumexp(dim=0)  # (n)
            total += ((log_sum - p.gather(0, ys)[0]) * counts).sum()
            if not with_grad:
                continue
            p.sub_(log_sum).exp_()
            p.scatter_add_(0, ys, -torch.ones_like(log_sum)[None]).mul_(counts)  # the gradient: p - onehot
            p = p.to(dtype)
            grad_xs.copy_(p.t() @ w)
            grad_weight.addmm_(p, xs) if dtype == grad_weight.dtype else grad_weight.add_(p @ xs)
        ctx.save_for_backward(grad_x, grad_weight, count)
        return total / count

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        grad_x, grad_weight, count = ctx.saved_tensors
        return grad_x * (grad / count), grad_weight * (grad / count), None, None, None


def sampled_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, word_weights: torch.Tensor,
                 words: int) -> torch.Tensor:
    """
    Cross entropy of states (N, C), head (V, C) and targets (N), -1 for none, with a softmax over fewer words than V: all
    that are a target here, and others by priority sampling (https://arxiv.org/abs/cs/0509026) with word_weights (V). Each
    of these counts as the 1/p words that it stands for, which leaves the expected sum over the vocabulary what it is.
    """
    priority = (word_weights / torch.rand_like(word_weights)).index_fill(0, targets.clamp(min=0), math.inf)  # (V)
    top = priority.topk(words + 1)
    chosen, first_out = top.indices[:-1], top.values[-1]  # (words)
    p = torch.where(top.values[:-1].isinf(), 1.0, (word_weights[chosen] / first_out).clamp(max=1))
    place = torch.empty_like(priority, dtype=torch.long).scatter(0, chosen, torch.arange(words, device=x.device))  # (V)
    logits = x @ F.embedding(chosen, weight).t() - p.log()  # (N, words)
    return F.cross_entropy(logits, torch.where(targets < 0, -1, place[targets]), ignore_index=-1)


def check_softmax_words(words: int, tokens: int) -> None:
    """ValueError where a sampled softmax of so many words may lack one of the targets of a micro-batch of so many tokens."""
    if words and words < tokens:
        raise ValueError(f"softmax_words ({words}) must not be less than the tokens of a micro-batch ({tokens}), which may be "
                         "as many words")


def check_sampling(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
                   repetition_penalty: float = 1.0, no_repeat_ngram: int = 0) -> None:
    """ValueError for settings of stream that have no meaning."""
    for name, value in (("temperature", temperature), ("top_k", top_k), ("no_repeat_ngram", no_repeat_ngram)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must not be negative, got {value}")
    if not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError(f"top_p must be above 0 and min_p at least 0, both at most 1, got {top_p} and {min_p}")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty must be above 0, got {repetition_penalty}")


def penalize(logits: torch.Tensor, text: torch.Tensor, pad: torch.Tensor | None, repetition_penalty: float,
             no_repeat_ngram: int) -> torch.Tensor:
    """Logits (B, V) after the words text (B, T), its left padding aside, as stream's settings say."""
    T = text.size(1)
    real = torch.arange(T, device=text.device) >= (0 if pad is None else pad[:, None])  # (T) or (B, T)
    real = real.expand_as(text)

    def marked(words: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Which of the vocabulary (B, V) are among the words (B, n), where (B, n) holds."""
        return torch.zeros_like(logits).scatter_reduce(1, words, where.to(logits), "amax") > 0

    if repetition_penalty != 1:
        seen = marked(text, real)
        logits = torch.where(seen, torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty), logits)
    if 0 < no_repeat_ngram <= T:
        grams = text.unfold(1, no_repeat_ngram, 1)  # (B, T - n + 1, n)
        again = (grams[..., :-1] == text[:, None, T - no_repeat_ngram + 1:]).all(dim=-1) & real[:, :grams.size(1)]
        logits = logits.masked_fill(marked(grams[..., -1], again), -math.inf)
    return logits


def sample_token(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
                 generator: torch.Generator | None = None) -> torch.Tensor:
    """Logits (B, V) to token ids (B), a pure function of its arguments; they mean what stream says."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, words = candidates(logits, temperature, top_k, top_p, min_p)
    p = logits.softmax(dim=-1)
    drawn = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(dim=-1, keepdim=True)  # (B, 1)
    return (drawn if words is None else words.gather(1, drawn))[:, 0]


def candidates(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
               min_p: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The logits over temperature of the words to draw from and their ids, both (B, k), the most probable first, -inf for those
    that top_p or min_p leaves out; ids None: all words, in their own order. Sorting k words, not all, makes top_k the
    cheapest filter.
    """
    words = None
    if 0 < top_k < logits.size(-1):
        logits, words = largest(logits, top_k)
    elif top_p < 1:
        logits, words = logits.sort(dim=-1, descending=True)
    logits = logits / temperature
    if top_p < 1:
        p = logits.softmax(dim=-1)
        logits = logits.masked_fill(p.cumsum(dim=-1) - p >= top_p, -math.inf)  # the first one always stays
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), -math.inf)
    return logits, words


def largest(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    logits.topk(k) of (B, V) in half the time where B and V are large: the k largest are among the 64 k words of those blocks
    of 64 whose maxima are the k largest.
    """
    B, V = logits.shape
    n = V // 64
    if B == 1 or k >= n:
        return logits.topk(k)
    blocks = logits[:, :64 * n].unflatten(1, (n, 64)).amax(dim=2).topk(k).indices  # (B, k)
    place = torch.arange(64, device=logits.device)
    words = (64 * blocks[..., None] + place).flatten(1)  # (B, 64 k)
    words = torch.cat((words, torch.arange(64 * n, V, device=logits.device).expand(B, -1)), dim=1)
    values, chosen = logits.gather(1, words).topk(k)
    return values, words.gather(1, chosen)
