"""
A GPT in one file. It needs only torch: copy it next to your own script and it works.

arch 'gpt2': learned positions, LayerNorm, GELU, tied head; loads OpenAI's weights unchanged.
arch 'llama': rotary positions, RMSNorm, SwiGLU, no biases; loads the weights of LlamaForCausalLM.
arch 'qwen3': llama with an RMSNorm of queries and keys; loads the weights of Qwen3ForCausalLM.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    arch: str = "gpt2"  # or 'llama', 'qwen3'
    block_size: int = 1024  # longest context in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # gpt2: biases in Linear and LayerNorm, as in OpenAI's weights
    gelu: str = "tanh"  # gpt2: OpenAI's approximation; 'none': the exact GELU, as in nanoGPT
    n_kv_head: int = 0  # llama, qwen3: heads of keys and values (0: n_head)
    head_dim: int = 0  # llama, qwen3: width of a head (0: n_embd / n_head)
    n_inner: int = 0  # llama, qwen3: width of the SwiGLU (0: 8/3 n_embd)
    rope_theta: float = 10000.0  # llama, qwen3: base of the rotary wavelengths
    norm_eps: float = 0.0  # epsilon of the norms (0: 1e-5, in qwen3 1e-6)
    tied: bool = True  # the head shares the weights of the token embedding; gpt2: always

    def __post_init__(self):
        """Replace each 0 by the value that it stands for; raise ValueError for bad fields."""
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{field.name} takes {kind.__name__}, not {value!r}")
            # integers must be positive, except those whose default is 0
            if kind is int and value < (least := min(field.default, 1)):
                raise ValueError(f"{field.name} must be at least {least}, got {value}")
        if self.n_layer > 10_000:  # building it would take minutes
            raise ValueError(f"n_layer must be at most 10,000, got {self.n_layer:,}")
        if self.arch not in ("gpt2", "qwen3", "llama"):
            raise ValueError(f"arch must be gpt2, qwen3 or llama, got {self.arch!r}")
        if self.gelu not in ("tanh", "none"):
            raise ValueError(f"gelu must be tanh or none, got {self.gelu!r}")
        if self.n_embd % self.n_head and not self.head_dim:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.arch == "gpt2":
            resolved = dict(n_kv_head=self.n_head, head_dim=self.n_embd // self.n_head,
                            n_inner=4 * self.n_embd, norm_eps=1e-5)
            for name, value in resolved.items():
                if (given := getattr(self, name)) not in (0, value):
                    raise ValueError(f"{name} must be 0 or {value} with arch gpt2, got {given}")
            if not self.tied:
                raise ValueError("tied must be True with arch gpt2")
        else:
            resolved = dict(n_kv_head=self.n_kv_head or self.n_head, bias=False,
                            head_dim=self.head_dim or self.n_embd // self.n_head,
                            n_inner=self.n_inner or 64 * math.ceil(self.n_embd / 24),
                            norm_eps=self.norm_eps or (1e-6 if self.arch == "qwen3" else 1e-5))
        for name, value in resolved.items():
            setattr(self, name, value)
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head "
                             f"({self.n_kv_head})")
        if self.arch != "gpt2" and self.head_dim % 2:
            raise ValueError(f"head_dim (by default n_embd / n_head) must be even for rotary "
                             f"positions, got {self.head_dim}")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    if config.arch == "gpt2":
        return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(width, eps=config.norm_eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotate the two halves of x (B, n_head, T, hs) by the angles of their positions.

    cos and sin: (T, hs / 2). Source: RoFormer, https://arxiv.org/abs/2104.09864
    """
    a, b = x.chunk(2, dim=-1)  # (B, n_head, T, hs / 2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer  # index in the KVCache
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        # the projections to queries, keys and values of all heads, stacked
        self.qkv_sizes = [self.head_dim * n for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
        self.c_attn = nn.Linear(config.n_embd, sum(self.qkv_sizes), bias=config.bias)
        self.c_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.normalize_qk = config.arch == "qwen3"
        if self.normalize_qk:
            self.q_norm = make_norm(config, self.head_dim)
            self.k_norm = make_norm(config, self.head_dim)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None = None,
                mask: torch.Tensor | None = None, cache: "KVCache | None" = None) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim)  # (B, T, n_head + 2 * n_kv_head, hs)
        q, k, v = qkv.transpose(1, 2).split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if rope is not None:  # float32 even under autocast, like the norms
            q, k = q.float(), k.float()
            if self.normalize_qk:
                q, k = self.q_norm(q), self.k_norm(k)
            q = rotate(q, *rope).type_as(v)  # (B, n_head, T, hs)
            k = rotate(k, *rope).type_as(v)  # (B, n_kv_head, T, hs)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, n_kv_head, cache.length + T, hs)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
            # after cached tokens, a single query attends to all keys; more queries have a mask
            is_causal=mask is None and (cache is None or cache.length == 0),
            enable_gqa=self.n_kv_head < self.n_head)
        y = y.transpose(1, 2).contiguous().view(B, T, -1)  # (B, T, n_head * hs)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gelu = config.gelu
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu)))


class SwiGLU(nn.Module):
    """The gated MLP of https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 2 * config.n_inner, bias=False)  # gate and up, stacked
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.c_fc(x).chunk(2, dim=-1)  # (B, T, n_inner)
        return self.dropout(self.c_proj(F.silu(gate) * up))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config) if config.arch == "gpt2" else SwiGLU(config)

    def forward(self, x: torch.Tensor, *attn_args) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), *attn_args)
        x = x + self.mlp(self.ln_2(x))
        return x


class KVCache:
    """
    Keys and values of past tokens, so that each call processes only the new ones.

    size: capacity in tokens. pad: (B,) number of padding tokens at the left of each
    row; no other token attends to them, and positions count from the first real token.
    """

    def __init__(self, size: int, pad: torch.Tensor | None = None):
        self.size, self.pad = size, pad
        self.length = 0  # tokens that it holds
        self.keys: list[torch.Tensor] = []  # of each layer, (B, n_kv_head, size, hs)
        self.values: list[torch.Tensor] = []

    def update(self, layer: int, k: torch.Tensor,
               v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add k and v of T new tokens, (B, n_kv_head, T, hs); return those of all length + T."""
        if layer == len(self.keys):  # the first call allocates
            B, n_kv_head, _, hs = k.shape
            self.keys.append(k.new_empty(B, n_kv_head, self.size, hs))
            self.values.append(v.new_empty(B, n_kv_head, self.size, hs))
        end = self.length + k.size(2)
        self.keys[layer][:, :, self.length:end] = k
        self.values[layer][:, :, self.length:end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def reorder(self, rows: torch.Tensor) -> None:
        """Replace row i by row rows[i], as beam search does; rows: (B,)."""
        for buffer in self.keys + self.values:
            buffer[:, :, :self.length] = buffer[rows, :, :self.length]


def positions_and_mask(T: int, device: torch.device, cache: KVCache | None) -> tuple[
        torch.Tensor, torch.Tensor | None]:
    """
    Return the positions of T tokens that follow those in the cache and their attention mask.

    Positions: (T,), with padding (B, T). Mask: (T, length + T), with padding (B, 1, T, length + T),
    True where a query may attend to a key; None: causal, or a single query that attends to all.
    """
    start = cache.length if cache is not None else 0
    keys = torch.arange(start + T, device=device)
    queries = keys[start:]
    if cache is not None and cache.pad is not None:
        pad = cache.pad[:, None, None]  # (B, 1, 1)
        mask = (keys >= pad) & (keys <= queries[:, None])  # (B, T, length + T)
        mask = mask | (keys == queries[:, None])  # padding attends to itself, or its softmax is NaN
        return (queries - cache.pad[:, None]).clamp(min=0), mask[:, None]
    if start and T > 1:
        return queries, keys <= queries[:, None]
    return queries, None


class GPT(nn.Module):
    """
    The transformer. Two attributes change how it trains.

    remat: keep only each block's input and recompute the rest in the backward pass: less memory, a
    third more time. loss_fn(states (B, T, C), head (V, C), targets (B, T), training): the mean
    loss, in place of cross entropy.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.remat = False
        self.loss_fn: Callable[..., torch.Tensor] | None = None
        embeddings = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if config.arch == "gpt2":
            embeddings["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer = nn.ModuleDict(dict(
            **embeddings,
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=make_norm(config, config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight  # https://arxiv.org/abs/1608.05859
        if config.arch != "gpt2":
            half = config.head_dim // 2
            # real values on the CPU, even if the model itself is created on 'meta'
            frequencies = config.rope_theta ** (-torch.arange(half, device="cpu") / half)
            angles = torch.arange(config.block_size, device="cpu")[:, None] * frequencies
            self.register_buffer("cos", angles.cos(), persistent=False)  # (block_size, hs / 2)
            self.register_buffer("sin", angles.sin(), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """
        Initialize like GPT-2, adapted to other widths and to llama and qwen3.

        Matrices have std 0.02 * sqrt(768 / n_embd): GPT-2's 0.02 at its own width, larger for
        narrower models, so that attention starts to learn early. In qwen3 and llama the residual
        projections and an untied head start at zero, so that the first prediction is uniform.
        """
        std = 0.02 * math.sqrt(768 / self.config.n_embd)
        for name, p in self.named_parameters():
            if name.startswith(("transformer.wte", "transformer.wpe")):
                # small where it is also the head, so that the first prediction is nearly uniform
                p.normal_(std=0.02 if self.config.tied else 0.5)
            elif self.config.arch != "gpt2" and name.endswith(("c_proj.weight", "lm_head.weight")):
                p.zero_()
            elif name.endswith("c_proj.weight"):
                p.normal_(std=std / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                p.normal_(std=std)
            elif name.endswith("bias"):
                p.zero_()
            else:  # gain of a norm
                p.fill_(1.0)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """
        Return the final hidden states (B, T, C) of token ids (B, T), the input of lm_head.

        With a cache, idx continues the cached tokens. Raises ValueError beyond block_size.
        """
        B, T = idx.shape
        length = T + (cache.length if cache is not None else 0)
        if length > self.config.block_size:
            raise ValueError(f"{length} tokens are more than block_size ({self.config.block_size})")
        positions, mask = positions_and_mask(T, idx.device, cache)

        # embed tokens and positions
        x, rope = self.transformer.wte(idx), None  # (B, T, C)
        if self.config.arch == "gpt2":
            x = x + self.transformer.wpe(positions)
        else:
            rope = self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)
        x = self.transformer.drop(x)

        # run the blocks
        for block in self.transformer.h:
            if self.remat and self.training and cache is None:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length = length
        return self.transformer.ln_f(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                cache: KVCache | None = None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Return logits (B, T, vocab_size) and, with targets (B, T), the mean loss in nats per token.

        Targets of -1 do not count. With loss_fn, a call with targets returns None for the logits.
        """
        x = self.hidden(idx, cache)  # (B, T, C)
        if targets is not None and self.loss_fn is not None:
            return None, self.loss_fn(x, self.lm_head.weight, targets, self.training)
        logits = self.lm_head(x)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, sampler: Callable[..., torch.Tensor],
               stop_token: int = -1, pad: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """
        Continue token ids (B, T), yielding each new column (B,) of at most max_new_tokens.

        sampler: maps logits (B, V), the token ids so far (B, T) and pad to the next ids (B,).
        stop_token: a row that has produced it repeats it; the stream ends once all rows have.
        pad: (B,) number of padding tokens at the left of each row. When the context reaches
        block_size, its newer half is kept. Raises ValueError for an empty prompt or unknown ids.
        """
        B, T = idx.shape
        block_size = self.config.block_size
        self.check_prompt(idx)
        ids = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1)  # (B, T + new)
        start, cache = 0, None  # the context begins at ids[:, start]
        ended = torch.zeros(B, dtype=torch.bool, device=idx.device)
        for n in range(T, T + max_new_tokens):
            if cache is None or cache.length == block_size:
                if n - start > block_size:
                    start = n - (block_size if cache is None else max(1, block_size // 2))
                left = None if pad is None else (pad - start).clamp(min=0)
                left = left if left is not None and left.any() else None
                cache = KVCache(min(block_size, T + max_new_tokens - start), left)
            states = self.hidden(ids[:, start + cache.length:n], cache)  # (B, new, C)
            new = sampler(self.lm_head(states[:, -1]).float(), ids[:, :n], pad)  # (B,)
            if stop_token >= 0:
                new = new.masked_fill(ended, stop_token)
                ended |= new == stop_token
            ids[:, n] = new
            yield new
            if stop_token >= 0 and ended.all():
                break

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, **how) -> torch.Tensor:
        """
        Continue token ids (B, T). Return (B, T + new), the prompt included.

        temperature 0: the most probable token. top_k: sample only from the k most probable ones.
        Arguments of `stream` may follow; a sampler replaces temperature and top_k.
        """
        def sampler(logits, ids, pad):  # (B, V), (B, T), (B,) -> (B,)
            if temperature == 0:
                return logits.argmax(dim=-1)
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < kth, -math.inf)
            return torch.multinomial((logits / temperature).softmax(dim=-1), num_samples=1)[:, 0]

        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        columns = self.stream(idx, max_new_tokens, **dict(sampler=sampler) | how)
        return torch.cat([idx, *(new[:, None] for new in columns)], dim=1)

    def check_prompt(self, idx: torch.Tensor) -> None:
        """Raise ValueError unless token ids (B, T) can be continued."""
        if idx.numel() == 0:
            raise ValueError("the prompt is empty: generation needs at least one token")
        if idx.min() < 0 or idx.max() >= self.config.vocab_size:
            raise ValueError(f"the prompt has token ids from {idx.min()} to {idx.max()}, but the "
                             f"vocabulary has those from 0 to {self.config.vocab_size - 1}")

    @torch.no_grad()
    def crop_block_size(self, block_size: int) -> None:
        """Shorten the longest context, for example to fine-tune with less memory."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size ({block_size}) is more than the model's "
                             f"{self.config.block_size}")
        self.config.block_size = block_size
        if self.config.arch == "gpt2":
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].clone())
            wpe.num_embeddings = block_size
        else:
            self.cos, self.sin = self.cos[:block_size], self.sin[:block_size]

    def configure_optimizers(self, weight_decay: float, learning_rate: float,
                             betas: tuple[float, float], device_type: str) -> torch.optim.AdamW:
        """Return AdamW with weight decay for matrices and embeddings, not for gains and biases."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
                  {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    def num_params(self, non_embedding: bool = False) -> int:
        """Count the parameters; non_embedding leaves out token and position embeddings and head."""
        params = dict(self.named_parameters())
        if self.config.tied:
            params.pop("lm_head.weight", None)  # a quantized head is a copy
        left_out = ("transformer.wte", "transformer.wpe", "lm_head") if non_embedding else ()
        return sum(p.numel() for name, p in params.items() if not name.startswith(left_out))

    def flops_per_token(self, T: int = 0, head_tokens: int = 0) -> int:
        """
        Return the FLOPs of forward and backward pass per token at context length T (0: block_size).

        As in appendix B of PaLM (https://arxiv.org/abs/2204.02311): 6 per weight in a matrix
        product, 4 if it is frozen, and 12 * n_layer * n_head * hs * T for attention, counting its
        masked half. head_tokens: the tokens in the softmax (0: the whole vocabulary).
        """
        c = self.config
        head = (head_tokens or c.vocab_size) * c.n_embd
        matmul = self.num_params(non_embedding=True) + head
        frozen = sum(p.numel() for p in self.transformer.h.parameters() if not p.requires_grad)
        frozen += 0 if self.lm_head.weight.requires_grad else head
        attention = 12 * c.n_layer * c.n_head * c.head_dim * (T or c.block_size)
        return 6 * matmul - 2 * frozen + attention

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float, peak_flops: float = 312e12) -> float:
        """
        Return the share of peak_flops (FLOP/s; default: A100 in bfloat16) that training reaches.

        fwdbwd_per_iter: sequences of block_size tokens in an iteration of dt seconds. For scripts
        written for nanoGPT.
        """
        tokens_per_second = fwdbwd_per_iter * self.config.block_size / dt
        return self.flops_per_token() * tokens_per_second / peak_flops
