"""
Decoding: a sampler for GPT.stream and beam search.

    sampler = Sampling(temperature=0.8, top_k=50)
    idx = model.generate(idx, 100, sampler=sampler)
"""
import math
from dataclasses import dataclass, replace

import torch

from model import GPT, KVCache


@dataclass
class Sampling:
    """
    A sampler. Its settings apply in this order:

    repetition_penalty: lower the probability of tokens that already occur (1: off)
    no_repeat_ngram: never produce the same n-gram twice (0: off)
    temperature: divide the logits (0: always the most probable token)
    top_k: keep the k most probable tokens (0: all)
    top_p: keep the fewest tokens whose total probability reaches top_p (1: all)
    min_p: keep tokens with at least min_p of the highest probability (0: all)

    They mean the same as in transformers, except for ties. top_k keeps exactly k tokens;
    transformers keeps all that tie with the k-th. top_p may keep other tokens of a tie.
    stop_token: the token to return where no other is allowed (-1: raise ValueError).
    """
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    generator: torch.Generator | None = None
    stop_token: int = -1

    def __post_init__(self):
        for name in ("temperature", "top_k", "no_repeat_ngram"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    def __call__(self, logits: torch.Tensor, ids: torch.Tensor,
                 pad: torch.Tensor | None = None) -> torch.Tensor:
        """Return the next tokens (B,) for logits (B, V) after ids (B, T), padded at the left."""
        logits = self.penalize(logits, ids, pad)
        if self.no_repeat_ngram:
            self.end_stuck_rows(logits)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits, candidates = self.candidates(logits)
        p = logits.softmax(dim=-1)
        # Apple's GPUs can return 0, and 0 / 0 would win; probabilities stay above this bound
        noise = torch.empty_like(p).exponential_(generator=self.generator).clamp(min=2**-24)
        sampled = (p / noise).argmax(dim=-1, keepdim=True)  # (B, 1), distributed as p
        return (sampled if candidates is None else candidates.gather(1, sampled))[:, 0]

    def penalize(self, logits: torch.Tensor, ids: torch.Tensor,
                 pad: torch.Tensor | None = None) -> torch.Tensor:
        """Apply repetition_penalty and no_repeat_ngram to logits (B, V) after ids (B, T)."""
        penalty, n, T = self.repetition_penalty, self.no_repeat_ngram, ids.size(1)
        if penalty == 1 and n == 0:
            return logits
        real = torch.arange(T, device=ids.device) >= (0 if pad is None else pad[:, None])
        real = real.expand_as(ids)  # (B, T), False for padding

        def mark(tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
            """Return (B, V), True for those of tokens (B, n) for which where (B, n) is True."""
            marks = torch.zeros_like(logits)
            return marks.scatter_reduce(1, tokens, where.to(logits), "amax") > 0

        if penalty != 1:
            less = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(mark(ids, real), less, logits)
        if 0 < n <= T:
            grams = ids.unfold(1, n, 1)  # (B, T - n + 1, n)
            same = (grams[..., :-1] == ids[:, None, T - n + 1:]).all(dim=-1)
            repeated = mark(grams[..., -1], same & real[:, :grams.size(1)])
            logits = logits.masked_fill(repeated, -math.inf)
        return logits

    def end_stuck_rows(self, logits: torch.Tensor) -> None:
        """Allow stop_token, in place, in rows of penalized logits (B, V) with no allowed token."""
        stuck = logits.amax(dim=-1) == -math.inf  # (B,)
        if self.stop_token < 0 and stuck.any():
            raise ValueError(f"no_repeat_ngram={self.no_repeat_ngram} excludes every token: "
                             "increase it, or generate fewer tokens")
        logits[stuck, self.stop_token] = 0.0

    def candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Return the logits over temperature of the tokens to sample from, and their ids.

        Both are (B, k), the most probable first, with -inf for what top_p or min_p removes. ids
        None: all tokens in their own order.
        """
        tokens = None
        if 0 < self.top_k < logits.size(-1):  # first, as it saves the others a sort of all tokens
            logits, tokens = topk(logits, self.top_k)
        elif self.top_p < 1:
            logits, tokens = logits.sort(dim=-1, descending=True)
        logits = logits / self.temperature
        if self.top_p < 1:
            p = logits.softmax(dim=-1)
            before = p.cumsum(dim=-1) - p  # 0 for the first, which always stays
            logits = logits.masked_fill(before >= self.top_p, -math.inf)
        if self.min_p > 0:
            least = logits.amax(dim=-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < least, -math.inf)
        return logits, tokens


def topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return logits.topk(k) of (B, V), in half the time where B and V are large.

    The k largest logits are in those k blocks of 64 whose maxima are the largest.
    """
    B, V = logits.shape
    n_blocks = V // 64
    if B == 1 or k >= n_blocks:
        return logits.topk(k)
    device = logits.device
    maxima = logits[:, :64 * n_blocks].unflatten(1, (n_blocks, 64)).amax(dim=2)
    blocks = maxima.topk(k).indices  # (B, k)
    tokens = (64 * blocks[..., None] + torch.arange(64, device=device)).flatten(1)  # (B, 64 * k)
    rest = torch.arange(64 * n_blocks, V, device=device).expand(B, -1)
    tokens = torch.cat((tokens, rest), dim=1)
    values, chosen = logits.gather(1, tokens).topk(k)
    return values, tokens.gather(1, chosen)


@torch.no_grad()
def beam_search(model: GPT, idx: torch.Tensor, max_new_tokens: int, num_beams: int,
                length_penalty: float = 1.0, sampling: Sampling | None = None,
                stop_token: int = -1) -> torch.Tensor:
    """
    Return the prompt (1, T) with the most probable continuation that num_beams beams find.

    Finished continuations are ranked by log-probability / length ** length_penalty, as in
    transformers with early_stopping=False: above 0 favors long ones. Of `sampling`, only the
    penalties apply. They change log-probabilities; transformers with one beam penalizes logits.
    Raises ValueError if prompt and continuation exceed block_size.
    """
    T, V, block_size = idx.size(1), model.config.vocab_size, model.config.block_size
    sampling = replace(sampling or Sampling(), stop_token=stop_token)
    model.check_prompt(idx)
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}")
    if T + max_new_tokens > block_size:
        raise ValueError(f"beam search needs room for the prompt ({T} tokens) and max_new_tokens "
                         f"({max_new_tokens}) in block_size ({block_size})")
    ids, cache = idx.expand(num_beams, T), KVCache(block_size)
    log_probs = torch.zeros(num_beams, device=idx.device)
    log_probs[1:] = -1e9  # all beams are equal at first: continue only one of them
    ended: list[tuple[float, torch.Tensor]] = []  # the best finished ones, with their scores
    for n in range(1, max_new_tokens + 1):
        states = model.hidden(ids[:, cache.length:], cache)
        log_p = model.lm_head(states[:, -1]).float().log_softmax(dim=-1)  # (num_beams, V)
        log_p = sampling.penalize(log_p, ids)
        sampling.end_stuck_rows(log_p)
        # each beam has only one ending, so at least num_beams candidates continue
        best = (log_probs[:, None] + log_p).flatten().topk(min(2 * num_beams, num_beams * V))
        parents, tokens = best.indices // V, best.indices % V
        ends = (tokens == stop_token) | (n == max_new_tokens)
        for i in ends[:num_beams].nonzero()[:, 0].tolist():
            score = best.values[i].item() / n**length_penalty
            ended.append((score, torch.cat((ids[parents[i]], tokens[i:i + 1]))))
        ended = sorted(ended, key=lambda pair: -pair[0])[:num_beams]
        going = (~ends).nonzero()[:num_beams, 0]
        if len(going) == 0:
            break
        log_probs, parents = best.values[going], parents[going]
        if len(ended) == num_beams and log_probs[0].item() / n**length_penalty <= ended[-1][0]:
            break
        ids = torch.cat((ids[parents], tokens[going, None]), dim=1)
        cache.reorder(parents)
    return ended[0][1][None] if ended else idx


def start_token(tokenizer) -> int:
    """Return the token before an empty prompt: end of text, else a newline, a space or token 0."""
    if tokenizer.eot >= 0:  # in training it comes before every document
        return tokenizer.eot
    return tokenizer.ids.get("\n", tokenizer.ids.get(" ", 0))


def short_sample(model: GPT, tokenizer, seed: int, characters: int = 200) -> str:
    """Return the beginning of a sample, without changing the random state or mode of training."""
    sampler = Sampling(0.8, generator=torch.Generator(model.device).manual_seed(seed))
    idx = torch.tensor([[start_token(tokenizer)]], device=model.device)
    training, ids, text = model.training, [], ""
    model.eval()
    try:
        for new in model.stream(idx, characters, sampler, stop_token=tokenizer.eot):
            ids.append(new.item())
            text = tokenizer.decode([i for i in ids if i != tokenizer.eot])
            if len(text) >= characters:
                break
    except (IndexError, KeyError):
        text += f" (token {ids[-1]} is not in the vocabulary)"
    model.train(training)
    return text
