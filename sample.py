"""
Continue a text with a trained model.

    python sample.py --start="Once upon a time"
    python sample.py --out_dir=out-fables --num_samples=5
    python sample.py --interactive=True
    python sample.py --start="Once upon a" --next_token=5

In a program:

    from sample import generate_text
    print(generate_text("Once upon a time", max_length=100, temperature=0.8, top_k=50, top_p=0.95))
"""
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lib.checkpoint import load_model
from lib.configurator import configure, fail, user_errors
from lib.machine import keep_freed_memory, resolve_device
from lib.tokenizer import get_tokenizer
from model import GPT, check_sampling

# -----------------------------------------------------------------------------
out_dir = "out"  # the run to sample from: its best.pt, else last.pt
start = ""  # the prompt; FILE:path of a text file that holds it; '-': standard input; '': begin a new document
interactive = False  # ask for one prompt after the other
next_token = 0  # only print the so many most probable next tokens after the prompt
num_samples = 3
max_new_tokens = 300  # of each sample, which ends before at the end of its document
stop = ""  # a text that ends a sample where it appears, and is not printed; several: first||second
temperature = 0.8  # 1: the model's own distribution; below: safer; 0: always the most probable token
top_k = 0  # draw from the k most probable tokens only; 0: from all
top_p = 1.0  # draw from the fewest tokens that together have this probability
min_p = 0.0  # draw from tokens with at least this share of the probability of the first
repetition_penalty = 1.0  # above 1: tokens that are already in the text become less probable
no_repeat_ngram = 0  # no sequence of so many tokens appears twice; 0: off
num_beams = 0  # search for the most probable text with so many beams, as far as the context reaches; 0: draw
length_penalty = 1.0  # of the beam search: above 0 favours long texts, below short ones
seed = 1337
quantize = ""  # 'int8': weights of a quarter of the size, about twice as fast on a CPU
device = "auto"  # cuda, else mps, else cpu; or 'cpu', 'cuda:1', ...
# -----------------------------------------------------------------------------


def encode_prompts(prompts: list[str], tokenizer, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts to token ids (B, T), padded at the left, and the lengths (B) of the padding."""
    # where it can, a prompt begins as in training, where every document follows the end of another
    rows = [[tokenizer.eot] * (tokenizer.eot >= 0) + tokenizer.encode(prompt) for prompt in prompts]
    if not all(rows):
        raise ValueError("this model has no end-of-text token to begin from: give it a prompt")
    T = max(map(len, rows))
    idx = torch.tensor([[0] * (T - len(row)) + row for row in rows], device=device)
    return idx, torch.tensor([T - len(row) for row in rows], device=device)


def lacking_words(tokenizer, prompt: str) -> str:
    """What to say of a prompt with words that the vocabulary lacks, which the model reads as <UNK>; '' where it has all."""
    lacking = tokenizer.lacking(tokenizer.split(prompt)) if tokenizer.unk >= 0 else ""
    return lacking and f"the vocabulary lacks {lacking} of the prompt: the model reads <UNK> there"


def warn_of_lacking_words(tokenizer, prompt: str) -> None:
    if lacking := lacking_words(tokenizer, prompt):
        print(f"warning: {lacking}", file=sys.stderr)


def text_after(tokenizer, before: list[int], ids: list[int]) -> str:
    """The text of ids behind the tokens before them, which decide whether a space is between."""
    before = [i for i in before if i != tokenizer.eot]
    return tokenizer.decode(before + ids)[len(tokenizer.decode(before)):]


def before_stop(text: str, stop: str) -> str:
    """The text up to the first of the stop texts, which are joined with ||."""
    return text[:min((text.index(s) for s in stop.split("||") if s and s in text), default=len(text))]


def stream_text(model: GPT, tokenizer, prompts: list[str], max_new_tokens: int, stop: str = "",
                tokens: list[list[int]] | None = None, **sampling) -> Iterator[list[tuple[str, bool]]]:
    """
    After every token, for each prompt, its continuation so far and whether that has ended. What is in it stays: half a
    character, or what may become a stop text, is held back. `tokens`, an empty list, becomes the ids of prompts and
    continuations. `sampling` is that of GPT.stream.
    """
    half_stops = {s[:i] for s in stop.split("||") for i in range(len(s))}
    idx, pad = encode_prompts(prompts, tokenizer, model.device)
    tokens = [] if tokens is None else tokens
    tokens += [row[p:] for row, p in zip(idx.tolist(), pad.tolist())]
    begins = [len(row) for row in tokens]  # of the continuations
    ended, texts = [False] * len(prompts), [""] * len(prompts)
    for n, new in enumerate(model.stream(idx, max_new_tokens, stop_token=tokenizer.eot, pad=pad, **sampling), 1):
        for row, token in enumerate(new.tolist()):
            if ended[row]:
                continue
            ended[row] = token == tokenizer.eot or n == max_new_tokens
            tokens[row] += [token] * (token != tokenizer.eot)
            begin = begins[row]
            text = text_after(tokenizer, tokens[row][max(0, begin - 8):begin], tokens[row][begin:])
            if (cut := before_stop(text, stop)) != text:
                text, ended[row] = cut, True
            elif not ended[row]:
                text = text.rstrip("\ufffd")
                text = text[:len(text) - max((len(s) for s in half_stops if text.endswith(s)), default=0)]
            texts[row] = text
        yield list(zip(texts, ended))
        if all(ended):
            return


@functools.lru_cache(maxsize=1)
def load(out_dir: str, device: str, quantize: str = "") -> tuple[GPT, object]:
    """The model and the tokenizer of a run."""
    model, checkpoint = load_model(out_dir, resolve_device(device), quantize)
    keep_freed_memory()  # from here on: what loading took is given back
    return model, get_tokenizer(checkpoint["meta"])


def generate_text(prompt: str = "", max_length: int = 100, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0,
                  out_dir: str = "out", device: str = "auto", quantize: str = "", seed: int | None = None, **sampling) -> str:
    """The prompt with up to max_length tokens after it; ValueError for bad input. The model is loaded once."""
    model, tokenizer = load(out_dir, device, quantize)
    warn_of_lacking_words(tokenizer, prompt)
    generator = torch.Generator(model.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    text = ""
    for (text, _), in stream_text(model, tokenizer, [prompt], max_length, temperature=temperature, top_k=top_k, top_p=top_p,
                                  generator=generator, **sampling):
        pass
    return prompt + text


def print_samples(model: GPT, tokenizer, prompt: str, generator: torch.Generator) -> None:
    """All samples at once, each streamed when those before it have ended."""
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
                    no_repeat_ngram=no_repeat_ngram, generator=generator)
    began, tokens, running, row, shown = time.time(), 0, num_samples, 0, 0
    for texts in stream_text(model, tokenizer, [prompt] * num_samples, max_new_tokens, stop, **sampling):
        tokens += running
        running = sum(not ended for _, ended in texts)
        while row < num_samples:
            text, ended = prompt + texts[row][0], texts[row][1]
            print(text[shown:], end="", flush=True)
            shown = len(text)
            if not ended:
                break
            row, shown = row + 1, 0
            print("\n" + "-" * 80)
    seconds = time.time() - began
    print(f"{tokens / seconds:,.0f} tokens/s", file=sys.stderr)


def print_best(model: GPT, tokenizer, prompt: str) -> None:
    idx, _ = encode_prompts([prompt], tokenizer, model.device)
    room = min(max_new_tokens, max(1, model.config.block_size - idx.size(1)))
    new = model.beam_search(idx, room, num_beams, length_penalty, repetition_penalty, no_repeat_ngram, tokenizer.eot)
    ids = [token for token in new[0, idx.size(1):].tolist() if token != tokenizer.eot]
    text = text_after(tokenizer, idx[0, -8:].tolist(), ids)
    print(prompt + before_stop(text, stop))


@torch.no_grad()
def next_tokens(model: GPT, ids: list[int], n: int) -> list[tuple[int, float]]:
    """The n most probable tokens after those given, with their probabilities, the most probable first."""
    idx = torch.tensor([ids[-model.config.block_size:]], device=model.device)
    x = model.hidden(idx)[:, -1]  # (1, C): the head is for the last token only
    top = model.lm_head(x)[0].float().softmax(dim=-1).topk(min(n, model.config.vocab_size))
    return list(zip(top.indices.tolist(), top.values.tolist()))


def print_next_tokens(model: GPT, tokenizer, prompt: str) -> None:
    idx, _ = encode_prompts([prompt], tokenizer, model.device)
    for token, p in next_tokens(model, idx[0].tolist(), next_token):
        print(f"{p:7.2%}  {tokenizer.decode([token])!r}" + "  (end of text)" * (token == tokenizer.eot))


def read_prompt() -> str:
    try:
        if start == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return Path(start[5:]).read_text(encoding="utf-8") if start.startswith("FILE:") else start
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text: {error}") from None


if __name__ == "__main__":
    configure(globals(), skip_settings_of="train.py")
    with user_errors():
        for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("next_token", 0), ("num_beams", 0), ("seed", 0)):
            if globals()[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {globals()[name]}")
        check_sampling(temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram)
        prompt = read_prompt()
        model, tokenizer = load(out_dir, device, quantize)
    generator = torch.Generator(model.device).manual_seed(seed)
    if interactive:
        sys.stdin.reconfigure(errors="replace")
    while True:
        if interactive:
            try:
                prompt = input("prompt> ")
            except (EOFError, KeyboardInterrupt):
                print()
                break
        try:
            warn_of_lacking_words(tokenizer, prompt)
            if next_token:
                print_next_tokens(model, tokenizer, prompt)
            elif num_beams:
                print_best(model, tokenizer, prompt)
            else:
                print_samples(model, tokenizer, prompt, generator)
        except ValueError as error:  # a prompt with what the tokenizer lacks, or too long for the beams
            if not interactive:
                fail(error)
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # enough of this text
            print()
        if not interactive:
            break
