"""
A GPT in one file that needs torch and nothing else: copy it next to your own script and it works.

arch 'gpt2': learned positions, LayerNorm, tanh-GELU, tied head; bit-compatible with OpenAI's weights.
"""
import math
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    arch: str = "gpt2"
    block_size: int = 1024  # longest context in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as GPT-2 has them
    gelu: str = "tanh"  # GPT-2's own approximation; 'none' is the exact one that nanoGPT's checkpoints were trained with

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.arch != "gpt2":
            raise ValueError(f"arch must be 'gpt2', got {self.arch!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
            for part in self.c_attn(x).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, C)  # (B, nh, T, hs) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gelu = config.gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.remat = False  # True: keep only the input of each block and compute the rest again in the backward pass
        self.loss_chunk = 0  # tokens whose logits exist at a time where a loss is asked for; 0: those of the whole batch
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied, https://arxiv.org/abs/1608.05859
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """
        GPT-2's initialisation: N(0, 0.02), projections into the residual stream scaled by its depth, biases zero. 0.02 fits
        a width of 768; the hidden matrices of a narrower model get more, by the square root, or attention is slow to wake.
        """
        std = 0.02 * math.sqrt(768 / self.config.n_embd)
        for name, p in self.named_parameters():
            if name.startswith(("transformer.wte", "transformer.wpe")):
                p.normal_(std=0.02)  # not scaled: it is the head too, and the first guess should be uniform
            elif name.endswith("c_proj.weight"):
                p.normal_(std=std / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                p.normal_(std=std)
            elif name.endswith("bias"):
                p.zero_()
            else:  # LayerNorm gain
                p.fill_(1.0)

    def hidden(self, idx: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to the states (B, T, C) that the head reads."""
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size ({self.config.block_size})")
        pos = torch.arange(T, device=idx.device)  # (T,)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))  # (B, T, C)
        for block in self.transformer.h:
            x = checkpoint(block, x, use_reentrant=False) if self.remat and self.training else block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Token ids (B, T) to logits (B, T, vocab_size), and the mean loss in nats per token where targets (B, T) are
        given. A target of -1 does not count. With loss_chunk set, a call with targets gets None for the logits.
        """
        x = self.hidden(idx)  # (B, T, C)
        if targets is not None and self.loss_chunk:
            return None, ChunkedLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.loss_chunk,
                                           torch.is_grad_enabled())
        logits = self.lm_head(x)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
                 stop_token: int = -1, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        Continue token ids (B, T) by up to max_new_tokens; returns (B, T + new), the prompt included.

        temperature 0 takes the most probable token; top_k 0 keeps all. A row that has produced stop_token is filled
        with it, and generation ends when all rows have. When the context reaches block_size, its newest half is kept.
        """
        if idx.size(1) == 0:
            raise ValueError("the prompt is empty: generate needs at least one token")
        if temperature < 0 or top_k < 0:
            raise ValueError(f"temperature and top_k must not be negative, got {temperature} and {top_k}")
        start = max(0, idx.size(1) - self.config.block_size)  # first token of the context
        ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if idx.size(1) - start > self.config.block_size:
                start = idx.size(1) - max(1, self.config.block_size // 2)
            logits = self.lm_head(self.hidden(idx[:, start:])[:, -1])  # (B, V)
            idx_next = sample_token(logits.float(), temperature, top_k, generator)  # (B, 1)
            if stop_token >= 0:
                idx_next = idx_next.masked_fill(ended, stop_token)
                ended |= idx_next == stop_token
            idx = torch.cat((idx, idx_next), dim=1)
            if stop_token >= 0 and ended.all():
                break
        return idx

    def num_params(self, non_embedding: bool = False) -> int:
        """Parameters, each counted once; non_embedding leaves out the token and position tables (the tied head too)."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n -= self.transformer.wte.weight.numel() + self.transformer.wpe.weight.numel()
        return n

    def flops_per_token(self, T: int | None = None) -> int:
        """
        FLOPs of forward and backward per token at context length T (default block_size): 6 per weight of a matrix
        product, the head included and the tables not, and 12 * n_layer * C * T for attention, as in the appendix of
        PaLM (https://arxiv.org/abs/2204.02311). The causal half of attention that is never used counts as used.
        """
        T = T or self.config.block_size
        matmul = self.num_params(non_embedding=True) + self.lm_head.weight.numel()
        return 6 * matmul + 12 * self.config.n_layer * self.config.n_embd * T

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float],
                             device_type: str) -> torch.optim.Optimizer:
        """AdamW; matrices and tables decay, gains and biases do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))


class ChunkedLoss(torch.autograd.Function):
    """
    Head and cross entropy, a chunk of tokens at a time, so that the logits of a batch never exist at once. The gradient
    is made along with the loss, as the logits are at hand. On a CPU with 50257 words this takes a quarter of the memory
    and a tenth more time; torch's F.linear_cross_entropy needs the same memory and four times as long.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int,
                with_grad: bool) -> torch.Tensor:
        """States (N, C), head (V, C) and targets (N), those of -1 left out, to the mean loss in nats."""
        grad_x, grad_weight = (torch.empty_like(x), torch.zeros_like(weight)) if with_grad else (x, None)
        total, count = x.new_zeros((), dtype=torch.float32), (targets >= 0).sum().clamp(min=1)
        for xs, ys, grad_xs in zip(x.split(chunk), targets.split(chunk), grad_x.split(chunk)):
            counts = (ys >= 0).unsqueeze(1)  # (n, 1)
            ys = ys.clamp(min=0).unsqueeze(1)  # (n, 1)
            p = F.linear(xs, weight).float()  # (n, V), logits
            log_sum = p.logsumexp(dim=1, keepdim=True)  # (n, 1)
            total += ((log_sum - p.gather(1, ys)) * counts).sum()
            if not with_grad:
                continue
            p.sub_(log_sum).exp_().scatter_add_(1, ys, -torch.ones_like(log_sum)).mul_(counts)  # its gradient: p - onehot
            p = p.to(xs.dtype)
            grad_xs.copy_(p @ weight)
            grad_weight += p.t() @ xs
        ctx.save_for_backward(grad_x, grad_weight, count)
        return total / count

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        grad_x, grad_weight, count = ctx.saved_tensors
        return grad_x * (grad / count), grad_weight * (grad / count), None, None, None


def sample_token(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> torch.Tensor:
    """Logits (B, V) to token ids (B, 1), a pure function of its arguments."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)


# -----------------------------------------------------------------------------
# The machine under the model

PEAK_FLOPS = {  # datasheets: dense matrix products in 16 bits with float32 accumulation, FLOP/s
    "T4": 65e12, "V100": 125e12, "A10": 125e12, "L4": 121e12, "A100": 312e12, "H100": 989e12, "H200": 989e12,
    "B200": 2250e12, "MI300X": 1307e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 210e12,
}


def resolve_device(device: str) -> str:
    """'auto' becomes cuda, else mps, else cpu; ValueError for a device that this machine or this torch lacks."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def resolve_dtype(dtype: str, device: str, n_embd: int = 384) -> str:
    """
    'auto' becomes the fastest type that trains safely: on CUDA bfloat16 where the chip has it, else float16; on a CPU
    whichever of float32 and bfloat16 is faster at an MLP of width n_embd, casts included (CPUs differ a hundredfold).
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    if dtype != "auto":
        return dtype
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"
    if device != "cpu":
        return "float32"
    x = torch.randn(128, n_embd)
    w = torch.randn(4 * n_embd, n_embd)

    def bfloat16_linear():
        return F.linear(x.bfloat16(), w.bfloat16()).float()

    # the margin keeps float32 where the difference is noise
    return "bfloat16" if 1.3 * median_seconds(bfloat16_linear) < median_seconds(lambda: F.linear(x, w)) else "float32"


def peak_flops(device: str, dtype: str) -> tuple[float, str]:
    """FLOP/s that the device can reach in dtype, and where the figure is from: a datasheet, or a matrix product timed now."""
    if device.startswith("cuda") and dtype != "float32":
        name = torch.cuda.get_device_name()
        for chip in sorted(PEAK_FLOPS, key=len, reverse=True):  # 'A100' before 'A10'
            if chip in name:
                return PEAK_FLOPS[chip], f"{chip} datasheet"
    n = 4096 if device.startswith("cuda") else 1024
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    b = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    return 2 * n**3 / median_seconds(lambda: a @ b, synchronize=device), f"measured {n} x {n} matrix product"


def median_seconds(f, repeats: int = 5, synchronize: str = "cpu") -> float:
    """Median time of a call, the first one left out."""
    times = []
    for _ in range(repeats + 1):
        if synchronize.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if synchronize.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]
