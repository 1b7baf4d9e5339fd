"""
Continue a text with a trained model.

    python sample.py
    python sample.py --out_dir=out-fables --start="Once upon a time" --num_samples=5
    python sample.py --out_dir=out/step_001000.pt
    python sample.py --interactive=True
    python sample.py --start="Once upon a" --next_token=5
    python sample.py --out_dir=out-chat --chat=True

In a program:

    from sample import generate_text
    print(generate_text("Once upon a time", max_length=100, temperature=0.8, top_k=50, top_p=0.95,
                        out_dir="models/tinystories"))

On the command line, models/tinystories is used if there is no folder `out`.
"""
import functools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from lib.chat import answer_marks, encode, render
from lib.checkpoint import load_model
from lib.configurator import at_least, configure, did_you_mean, one_line, one_of, user_errors
from lib.console import for_output
from lib.decoding import Sampling, beam_search, start_token
from lib.files import read_text
from lib.machine import explain_out_of_memory, keep_freed_memory, resolve_device
from lib.tokenizer import BytePairTokenizer, get_tokenizer
from model import GPT

SHIPPED = "models/tinystories"  # the trained model in this repository

# -----------------------------------------------------------------------------
# model
out_dir = "out"  # a run, a .pt or .gguf file, a Hugging Face folder, gpt2, USER/NAME@REVISION
quantize = ""  # 'int8': a quarter of the size, about twice as fast on a CPU
device = "auto"  # cuda, else mps, else cpu; or 'cpu', 'cuda:1', ...
# prompt
start = ""  # the prompt; FILE:path: read a text file; '-': standard input; '': a new document
interactive = False  # read one prompt after another from the terminal
chat = False  # chat with a model that was tuned for it; start is the system message
next_token = 0  # only print this many of the most probable next tokens (0: generate)
# length
num_samples = 3  # in interactive mode the default is 1
max_new_tokens = 300  # of a sample; it ends earlier at the end of its document
stop = ""  # a text that ends a sample and is not printed; several: first||second
# sampling
temperature = 0.8  # 1: the model's own distribution; below: safer; 0: the most probable token
top_k = 0  # sample from the k most probable tokens only (0: all)
top_p = 1.0  # sample from the fewest tokens that together have this probability
min_p = 0.0  # sample from tokens with at least this share of the highest probability
repetition_penalty = 1.0  # above 1: tokens that are already in the text become less probable
no_repeat_ngram = 0  # no sequence of this many tokens appears twice (0: off)
seed = 1337  # another seed gives other samples
# beam search
num_beams = 0  # search for the most probable text with this many beams (0: sample)
length_penalty = 1.0  # above 0 favors long texts, below 0 short ones
if __name__ == "__main__":
    _, given = configure(
        globals(), skip_settings_of="train.py", num_samples=at_least(1), next_token=at_least(0),
        max_new_tokens=at_least(1), num_beams=at_least(0), seed=at_least(0),
        quantize=one_of("int8", ""))
    if interactive and "num_samples" not in given:
        num_samples = 1
    if "out_dir" not in given and not Path(out_dir).exists() and Path(SHIPPED).exists():
        runs = sorted(str(path.parent) for path in Path().glob("*/best.pt"))
        others = f"; --out_dir can be {', '.join(runs)}" if runs else ""
        print(one_line(f"note: there is no folder {out_dir}; using {SHIPPED}{others}"),
              file=sys.stderr)
        out_dir = SHIPPED
# -----------------------------------------------------------------------------


class Continuation(NamedTuple):
    text: str  # what follows the prompt
    ended: bool
    tokens: list[int]  # of the prompt and what follows it, without a final end token


@functools.lru_cache(maxsize=1)
def load(out_dir: str, device: str, quantize: str = "") -> tuple[GPT, object, dict]:
    """Return the model and the tokenizer of a run, and the rest of its checkpoint."""
    model, checkpoint = load_model(out_dir, resolve_device(device), quantize)
    keep_freed_memory()  # only now, so that the memory of loading is returned
    return model, get_tokenizer(checkpoint["meta"]), checkpoint


def generate_text(prompt: str = "", max_length: int = 100, temperature: float = 0.8,
                  top_k: int = 0, top_p: float = 1.0, out_dir: str = "out", device: str = "auto",
                  quantize: str = "", seed: int | None = None, stop: str = "",
                  min_p: float = 0.0, repetition_penalty: float = 1.0, no_repeat_ngram: int = 0,
                  **unknown) -> str:
    """
    Return the prompt and up to max_length tokens that follow it.

    The model stays in memory for the next call. seed: None draws a new one. Raises ValueError
    for bad input.
    """
    if unknown:
        name = next(iter(unknown))
        names = [key for key in generate_text.__annotations__ if key != "return"]
        hint = did_you_mean(name, names) or f"; it has {', '.join(names)}"
        raise TypeError(f"generate_text has no argument {name!r}{hint}")
    model, tokenizer, _ = load(out_dir, device, quantize)
    warn_of_unknown(model, tokenizer, prompt)
    generator = torch.Generator(model.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    sampler = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram,
                       generator=generator)
    text = ""
    for [sample] in stream_text(model, tokenizer, [prompt], max_length, sampler, stop):
        text = sample.text
    return prompt + text


# -----------------------------------------------------------------------------
# Text in, text out

def encode_prompts(prompts: list[str], tokenizer, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (B, T), padded at the left, and the number of padding tokens (B,)."""
    if tokenizer.eot >= 0:  # in training it comes before every document
        rows = [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in prompts]
    else:
        rows = [tokenizer.encode(prompt) or [start_token(tokenizer)] for prompt in prompts]
    T = max(map(len, rows))
    idx = torch.tensor([[0] * (T - len(row)) + row for row in rows], device=device)
    return idx, torch.tensor([T - len(row) for row in rows], device=device)


def example_prompt(model: GPT, tokenizer) -> str:
    """Return the longest encodable start of the most probable text, or ''."""
    longest = ""
    for [row] in stream_text(model, tokenizer, [""], 10, Sampling(temperature=0)):
        for text in (row.text, row.text.strip()):
            if text and not tokenizer.unknown(tokenizer.split(text)):
                longest = text
    return longest


def check_prompt(model: GPT, tokenizer, prompt: str) -> str:
    """
    Return a warning that names the words of the prompt that become <UNK>, or ''.

    Raises ValueError, with an example of a valid prompt, if the vocabulary has no <UNK>.
    """
    if isinstance(tokenizer, BytePairTokenizer):
        return ""
    unknown = tokenizer.unknown(tokenizer.split(prompt))
    problem = f"the vocabulary does not have {unknown} of the prompt"
    if not unknown or tokenizer.unk >= 0:
        return unknown and f"{problem}: they become <UNK>"
    example = json.dumps(example_prompt(model, tokenizer), ensure_ascii=False)
    raise ValueError(f"{problem}; a prompt that works: {example}")


def warn_of_unknown(model: GPT, tokenizer, prompt: str) -> None:
    if unknown := check_prompt(model, tokenizer, prompt):
        print(f"warning: {one_line(unknown)}", file=sys.stderr)


def text_after(tokenizer, before: list[int], ids: list[int]) -> str:
    """Return the text of ids; the ids before them decide whether it starts with a space."""
    before = [i for i in before if i != tokenizer.eot]
    return tokenizer.decode(before + ids)[len(tokenizer.decode(before)):]


def split_stop(stop: str) -> list[str]:
    """Return the texts of the setting `stop`."""
    return [text for text in stop.split("||") if text]


def cut_at_stop(text: str, stops: list[str]) -> str:
    """Return the text up to the first of the stop texts."""
    return text[:min((text.index(s) for s in stops if s in text), default=len(text))]


def stream_text(model: GPT, tokenizer, prompts: list[str], max_new_tokens: int, sampler: Sampling,
                stop: str = "") -> Iterator[list[Continuation]]:
    """
    Yield the continuations of all prompts after each token.

    Their text only grows: an incomplete character or a possible start of a stop text is held back.
    """
    idx, pad = encode_prompts(prompts, tokenizer, model.device)
    yield from stream_ids(model, tokenizer, idx, pad, max_new_tokens, sampler, stop, tokenizer.eot)


def stream_ids(model: GPT, tokenizer, idx: torch.Tensor, pad: torch.Tensor, max_new_tokens: int,
               sampler: Sampling, stop: str, end: int) -> Iterator[list[Continuation]]:
    """
    Yield the continuations of token ids (B, T) after each token, like stream_text().

    pad: (B,) number of padding tokens at the left. end: the token that ends a continuation, besides
    the end of text.
    """
    stops = split_stop(stop)
    sampler = replace(sampler, stop_token=end)
    starts_of_stops = {s[:i] for s in stops for i in range(1, len(s))}
    rows = [Continuation("", False, row[p:]) for row, p in zip(idx.tolist(), pad.tolist())]
    prompt_lengths = [len(row.tokens) for row in rows]
    columns = model.stream(idx, max_new_tokens, sampler, stop_token=end, pad=pad)
    for n, column in enumerate(columns, 1):
        for i, token in enumerate(column.tolist()):
            _, ended, tokens = rows[i]
            if ended:
                continue
            is_end = token in (end, tokenizer.eot)
            ended = is_end or n == max_new_tokens
            if not is_end:
                tokens.append(token)
            length = prompt_lengths[i]  # a few tokens before it are enough to join the two
            text = text_after(tokenizer, tokens[max(0, length - 8):length], tokens[length:])
            if (cut := cut_at_stop(text, stops)) != text:
                text, ended = cut, True
            elif not ended:
                text = text.rstrip("\ufffd")
                held = max((len(s) for s in starts_of_stops if text.endswith(s)), default=0)
                text = text[:len(text) - held]
            rows[i] = Continuation(text, ended, tokens)
        yield list(rows)
        if all(row.ended for row in rows):
            return


@torch.no_grad()
def next_tokens(model: GPT, ids: list[int], n: int) -> list[tuple[int, float]]:
    """Return the n most probable tokens after ids with their probabilities, in their order."""
    idx = torch.tensor([ids[-model.config.block_size:]], device=model.device)
    model.check_prompt(idx)
    x = model.hidden(idx)[:, -1]  # (1, C)
    top = model.lm_head(x)[0].float().softmax(dim=-1).topk(min(n, model.config.vocab_size))
    return list(zip(top.indices.tolist(), top.values.tolist()))


# -----------------------------------------------------------------------------
# Command line

def read_prompt(start: str) -> str:
    """Return the prompt that `start` describes. A start of only \\n's is that many newlines."""
    try:
        if start == "-":
            sys.stdin.reconfigure(encoding="utf-8-sig")  # Windows may add a byte order mark
            return sys.stdin.read()
        if start.startswith("FILE:"):
            return read_text(Path(start[5:]), encoding="utf-8-sig")
        only_newlines = not start.replace("\\n", "")
        return start.replace("\\n", "\n") if only_newlines else start
    except FileNotFoundError:
        raise ValueError(f"there is no file {start[5:]} with a prompt") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text: {error}") from None


def describe(name: str, model: GPT, checkpoint: dict) -> str:
    """
    Return a line with the file, step, size, dataset and, where known, loss of a model.

    name: shown instead of the path of a Hugging Face folder.
    """
    path, step = Path(checkpoint["path"]), checkpoint["step"]
    dataset = Path(checkpoint["config"]["dataset"]).name
    in_int8 = model.lm_head.weight.dtype == torch.int8
    loss = checkpoint.get("best_val_loss", math.inf)
    has_loss = path.name == "best.pt" and not in_int8 and math.isfinite(loss)
    parts = [str(path) if path.is_file() else name, f"step {step:,}" if step else "",
             f"{model.num_params():,} parameters{' in int8' if in_int8 else ''}",
             f"trained on {dataset}" if dataset else "",
             f"validation loss {loss:.4f}" if has_loss else ""]
    return one_line("model: " + ", ".join(filter(None, parts)))


def print_samples(model: GPT, tokenizer, prompt: str, sampler: Sampling) -> None:
    """Generate all samples at once; print each as it grows once those before it have ended."""
    began, tokens, running = time.time(), 0, num_samples
    row, printed = 0, 0  # the sample that is being printed, and its characters printed so far
    prompts = [prompt] * num_samples
    try:
        for samples in stream_text(model, tokenizer, prompts, max_new_tokens, sampler, stop):
            tokens += running
            running = sum(not sample.ended for sample in samples)
            while row < num_samples:
                text = prompt + samples[row].text
                print(for_output(text[printed:]), end="", flush=True)
                printed = len(text)
                if not samples[row].ended:
                    break
                row, printed = row + 1, 0
                print("" if interactive and row == num_samples else "\n" + "-" * 80)
    except ValueError:  # no_repeat_ngram leaves no token
        print()
        raise
    if not interactive:
        speed = tokens / (time.time() - began)
        print(f"{tokens:,} tokens, {speed:,.0f} tokens/s", file=sys.stderr)


def print_beam_search(model: GPT, tokenizer, prompt: str, sampler: Sampling) -> None:
    """Print the most probable text that beam search finds."""
    idx, _ = encode_prompts([prompt], tokenizer, model.device)
    room = min(max_new_tokens, max(1, model.config.block_size - idx.size(1)))
    new = beam_search(model, idx, room, num_beams, length_penalty, sampler, tokenizer.eot)
    ids = [token for token in new[0, idx.size(1):].tolist() if token != tokenizer.eot]
    text = text_after(tokenizer, idx[0, -8:].tolist(), ids)
    print(for_output(prompt + cut_at_stop(text, split_stop(stop))))


def print_next_tokens(model: GPT, tokenizer, prompt: str) -> None:
    """Print the most probable next tokens and their probabilities."""
    idx, _ = encode_prompts([prompt], tokenizer, model.device)
    for token, p in next_tokens(model, idx[0].tolist(), next_token):
        note = "  (end of text)" if token == tokenizer.eot else ""
        print(f"{p:7.2%}  {tokenizer.decode([token])!r}{note}")


def respond(model: GPT, tokenizer, prompt: str, sampler: Sampling) -> None:
    """Print what the settings ask for. Raise ValueError for a bad prompt."""
    warn_of_unknown(model, tokenizer, prompt)
    if next_token:
        print_next_tokens(model, tokenizer, prompt)
    elif num_beams:
        print_beam_search(model, tokenizer, prompt, sampler)
    else:
        print_samples(model, tokenizer, prompt, sampler)


def typed_lines(what: str, answer: str, label: str) -> Iterator[str]:
    """Yield typed lines until standard input ends or Ctrl-C is pressed at the label."""
    sys.stdin.reconfigure(errors="replace")
    print(f"Type a {what} and press Enter. Ctrl-C stops {answer}.\n"
          "To leave, press Ctrl-C at the prompt, or Ctrl-D (on Windows Ctrl-Z and Enter).")
    while True:
        try:
            line = input(label)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


def respond_to_all(model: GPT, tokenizer, sampler: Sampling) -> None:
    """Answer prompts from the terminal. Ctrl-C stops a sample."""
    for prompt in typed_lines("prompt", "a sample", "prompt> "):
        try:
            respond(model, tokenizer, prompt, sampler)
        except ValueError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
        except KeyboardInterrupt:
            print()


def fit_context(model: GPT, tokenizer, messages: list[dict[str, str]],
                template: str) -> tuple[list[dict[str, str]], list[int]]:
    """
    Return the messages that leave room for an answer, and their token ids.

    The oldest request and its answer are dropped first; the system message is kept.
    """
    block_size = model.config.block_size
    while True:
        ids = encode(render(template, messages, tokenizer, add_generation_prompt=True), tokenizer)
        if block_size - len(ids) >= min(max_new_tokens, block_size // 4):
            return messages, ids
        n_system = int(messages[0]["role"] == "system")
        if len(messages) - n_system < 3:
            raise ValueError(f"the message takes {len(ids):,} of the {block_size:,} tokens of the "
                             "context, which leaves no room for an answer: shorten it")
        messages = messages[:n_system] + messages[n_system + 2:]


def print_answer(model: GPT, tokenizer, ids: list[int], end: int, sampler: Sampling) -> str:
    """Print the answer to a conversation as it grows, and return it. end: its last token."""
    idx, printed = torch.tensor([ids], device=model.device), ""
    room = model.config.block_size - len(ids)
    try:
        for [answer] in stream_ids(model, tokenizer, idx, torch.zeros_like(idx[:, 0]),
                                  min(max_new_tokens, room), sampler, stop, end):
            print(for_output(answer.text[len(printed):]), end="", flush=True)
            printed = answer.text
    except KeyboardInterrupt:
        pass
    finally:
        print()
    return printed


def hold_conversation(model: GPT, tokenizer, template: str, sampler: Sampling, system: str) -> None:
    """Chat in the terminal. Ctrl-C stops an answer."""
    end = answer_marks(template, tokenizer)["end"]
    messages = [{"role": "system", "content": system}] if system else []
    for message in typed_lines("message", "an answer", "you> "):
        if not message.strip():
            continue
        try:
            asked = [*messages, {"role": "user", "content": message}]
            asked, ids = fit_context(model, tokenizer, asked, template)
            answer = print_answer(model, tokenizer, ids, end, sampler)
            messages = [*asked, {"role": "assistant", "content": answer}]
        except ValueError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)


if __name__ == "__main__":
    explain_out_of_memory("use fewer --num_samples or --max_new_tokens, or --quantize=int8")
    with user_errors():
        sampler = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram)
        prompt = read_prompt(start)
        model, tokenizer, checkpoint = load(out_dir, device, quantize)
        template = checkpoint["meta"].get("chat_template", "")
        if chat and not template:
            raise ValueError(f"{out_dir} has no chat template: tune it with data/chat/prepare.py "
                             "and config/finetune.py, see docs/finetuning.md")
    print(describe(out_dir, model, checkpoint), file=sys.stderr, flush=True)
    sampler.generator = torch.Generator(model.device).manual_seed(seed)
    if chat:
        with user_errors():
            hold_conversation(model, tokenizer, template, sampler, prompt)
    elif interactive:
        respond_to_all(model, tokenizer, sampler)
    else:
        try:
            with user_errors():
                respond(model, tokenizer, prompt, sampler)
        except KeyboardInterrupt:
            print()
