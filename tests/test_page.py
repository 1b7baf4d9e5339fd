"""lib/page.html: the exported page computes what model.py computes, and shows only text."""
import json
import random
import re
import subprocess
from pathlib import Path

import pytest
import torch

import sample
from export import export_html
from helpers import PROMPT, TEXT, make_run, one_line_error, run, tokenizer_of
from lib.chat import PLAIN_TEMPLATE, PLAIN_TOKENS
from lib.checkpoint import build_model, load_checkpoint, load_model, save_checkpoint
from lib.quantize import quantize_int8
from lib.tokenizer import add_specials, get_tokenizer
from model import GPT, GPTConfig

RUNS = ["gpt2-gpt2", "nanogpt-char", "qwen3-bpe", "untied-pieces"]
PROMPTS = [PROMPT, "", " ", "  two  spaces ", "the cat's owner", "Don't!", "12 dogs", " 3.14159",
           "Then 12 dogs -- well-fed --", "\n\n", "a\tb", "Fin\u00e9", "\u4e2d", "\U0001f600",
           "\U0001f600 \U0001f600 ...", "THE OWNER SAID", "Once upon a time, the cat",
           "<|endoftext|>", "a" * 70, TEXT]
SMALL = dict(n_layer=1, n_head=1, n_embd=8, block_size=16)
# called with the function `call` of a page: the greedy ids after each prompt and the ids of texts
DRIVE = """async (call, {prompts, texts, n}) => {
  const ids = [], encoded = [];
  for (const prompt of prompts) {
    await call("begin", {prompt, seed: 0});
    ids.push([]);
    for (let i = 0; i < n; i++) {
      while ((await call("read")).left);
      ids.at(-1).push((await call("sample", {temperature: 0, topK: 0})).id);
    }
  }
  for (const text of texts) encoded.push((await call("encode", {text})).ids);
  return {ids, encoded};
}"""
# runs the engine of a page in the Node.js that Playwright brings
NODE = """
const page = require("fs").readFileSync(process.argv[1], "utf8");
const part = id => page.match(new RegExp(`<script id="${id}"[^>]*>([^]*?)</script>`))[1];
let answer;
globalThis.onmessage = null;
globalThis.postMessage = data => answer(data);
(0, eval)(part("engine"));  // an indirect eval: it sets the global onmessage
const call = (name, args = {}) => new Promise((resolve, reject) => {
  answer = data => data.error ? reject(Error(data.error)) : resolve(data);
  onmessage({data: {name, args}});
});
const questions = JSON.parse(require("fs").readFileSync(0, "utf8"));
call("load", {model: JSON.parse(part("model")), weights: part("weights")})
  .then(() => (DRIVE)(call, questions)).then(found => console.log(JSON.stringify(found)));
"""


@pytest.fixture(scope="module", params=RUNS)
def exported(request, tmp_path_factory) -> tuple[GPT, object, Path]:
    """Return a model with int8 weights as floats, its tokenizer and its page."""
    folder = tmp_path_factory.mktemp("page")
    shape, kind = request.param.split("-")
    make_run(folder / "run", shape, kind, padding=3 if kind in ("gpt2", "pieces") else 0)
    page, = export_html(load_checkpoint(folder / "run"), folder / "page.html", "int8")
    checkpoint = load_checkpoint(folder / "run")
    weights = quantize_int8(checkpoint["model"])
    rounded = {name: w * weights[f"{name}_scale"][:, None] if w.dtype == torch.int8 else w
               for name, w in weights.items() if not name.endswith("_scale")}
    model = build_model(checkpoint | {"model": rounded}, "run").eval()
    return model, get_tokenizer(checkpoint["meta"]), page


def save_run(folder: Path, spec: dict, vocab_size: int, eot: int, dataset: str = "tales",
             **shape) -> None:
    """Write a run with random weights and the tokenizer of this spec."""
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape))
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder, "best.pt", {
        "model": model.state_dict(), "model_args": vars(model.config), "step": 7,
        "best_val_loss": 1.0, "config": {"dataset": dataset}, "meta": {
            "dataset": dataset, "tokenizer": spec, "eot": eot, "vocab_size": vocab_size,
            "splits": {}}})


def run_in_node(page: Path, questions: dict, drive: str = DRIVE):
    playwright = pytest.importorskip("playwright")
    driver = Path(playwright.__file__).with_name("driver")
    node = next(path for path in (driver / "node", driver / "node.exe") if path.exists())
    done = subprocess.run([node, "-e", NODE.replace("DRIVE", drive), page], text=True,
                          input=json.dumps(questions), capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def odd_texts() -> list[str]:
    """Return 200 texts of ASCII and of characters from the whole basic plane of Unicode."""
    rng = random.Random(0)
    codes = [*range(1, 0xd7ff), *range(0x20, 0x7f), 0x20, 0x0a, 0x85, 0x1c, 0xa0, 0x2028, 0x1f600]
    weights = [1] * 0xd7fe + [900] * 0x5f + [9000] * 2 + [900] * 5
    return ["".join(map(chr, rng.choices(codes, weights, k=50))) for _ in range(200)]


def assert_greedy(model: GPT, prompt: list[int], found: list[int]) -> None:
    """The ids are the most probable ones; where two logits tie within 1e-4, either is right."""
    ids = torch.tensor([prompt])
    expected = model.generate(ids, len(found), temperature=0)[0, len(prompt):].tolist()
    if found == expected:
        return
    n = next(i for i, (a, b) in enumerate(zip(found, expected)) if a != b)
    logits = []

    def sampler(row, ids, pad):
        logits.append(row[0])
        return row.argmax(dim=-1)

    list(model.stream(ids, n + 1, sampler))
    gap = (logits[n][expected[n]] - logits[n][found[n]]).item()
    assert gap < 1e-4, f"token {n} is {found[n]} instead of {expected[n]}, {gap} less probable"


def assert_matches(model: GPT, tokenizer, questions: dict, found: dict) -> None:
    """The ids of the texts and the greedy ids after the prompts are those of Python."""
    for text, ids in zip(questions["texts"], found["encoded"], strict=True):
        assert ids == tokenizer.encode(text), repr(text)
    for prompt, ids in zip(questions["prompts"], found["ids"], strict=True):
        assert_greedy(model, [tokenizer.eot, *tokenizer.encode(prompt)], ids)


QUESTIONS = {"prompts": PROMPTS, "texts": odd_texts(), "n": 60}  # also beyond block_size


def test_engine_matches_model_in_node(exported):
    model, tokenizer, page = exported
    assert_matches(model, tokenizer, QUESTIONS, run_in_node(page, QUESTIONS))


# -----------------------------------------------------------------------------
# In a browser

@pytest.fixture
def open_page(chromium):
    """Return a function that opens a page from a file. At the end no page may have an error."""
    pages, errors = [], []

    def load(path: Path, ready: bool = True, **options):
        page = chromium.new_page(**options)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.on("request", lambda request: errors.append(request.url) if
                request.url.startswith("http") else None)
        page.goto(path.as_uri())
        if ready:
            page.locator("#status", has_text="Ready").wait_for()
        pages.append(page)
        return page

    yield load
    for page in pages:
        page.close()
    assert errors == []


def test_engine_matches_model_in_chromium(exported, open_page):
    model, tokenizer, path = exported
    found = open_page(path).evaluate(f"questions => ({DRIVE})(call, questions)", QUESTIONS)
    assert_matches(model, tokenizer, QUESTIONS, found)


@pytest.fixture(scope="module")
def fables_page(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fables") / "fables.html"
    done = run("export.py", f"--out_dir={trained}", "--format=html", f"--to={path}")
    assert done.returncode == 0 and f"open {path} in a browser" in done.stdout, done.stderr
    return path


def fill(page, **values: object) -> None:
    page.locator("#sampling").evaluate("details => { details.open = true; }")
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))


def generate(page) -> tuple[str, str]:
    """Click, wait for the end, and return the status and the text."""
    page.get_by_role("button", name="Generate").click()
    page.locator("#go:enabled").wait_for()
    return page.locator("#status").inner_text(), page.locator("#text").inner_text()


def test_a_reader_generates(fables_page, open_page):
    """A seed repeats a text, another one does not, and the settings apply."""
    page = open_page(fables_page)
    assert page.locator("#prompt").input_value() == PROMPT
    fill(page, seed=5, tokens=30)
    status, text = generate(page)
    assert text.startswith(PROMPT) and "30 tokens, " in status and "seed 5" in status
    assert generate(page)[1] == text
    fill(page, seed=6)
    assert generate(page)[1] != text
    fill(page, seed="", temperature=0)
    greedy = generate(page)[1]
    fill(page, temperature=2, top_k=1)
    assert generate(page)[1] == greedy
    shares = [float(p.rstrip("%")) for p in page.locator("#bars span").all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.5
    assert "fables" in page.locator("#card").inner_text()
    assert "--n_layer=2" in page.locator("#training").text_content()


def test_bars_follow_the_prompt(exported, open_page):
    """They are the model's own probabilities of what follows the prompt that is typed."""
    model, tokenizer, path = exported
    page = open_page(path)
    page.locator("#prompt").fill("Then 12 dogs")
    idx = torch.tensor([[tokenizer.eot, *tokenizer.encode("Then 12 dogs")]])
    p = model(idx)[0][0, -1].softmax(-1).max().item()
    page.locator("#bars span", has_text=f"{p:.1%}").first.wait_for()
    assert page.locator("#bars span").first.inner_text() == f"{p:.1%}"


def test_the_status_says_why_a_text_ends(fables_page, open_page):
    page = open_page(fables_page)
    fill(page, tokens=3, temperature=0)
    assert "The maximum length." in generate(page)[0]
    fill(page, tokens=10000, temperature=5)  # each token is about as probable as the end
    assert "The model ended the text." in generate(page)[0]
    page.locator("#prompt").fill("Once upon" + " a" * 400)
    fill(page, tokens=1)
    status, text = generate(page)
    assert "only the last 32 tokens" in status and text.startswith("... ") and len(text) < 700


def test_a_conversation_goes_on_until_a_new_one(tmp_path, open_page):
    tokenizer = add_specials(tokenizer_of("bpe"), PLAIN_TOKENS)
    save_run(tmp_path, tokenizer.spec, tokenizer.vocab_size, tokenizer.eot,
             **SMALL | dict(block_size=64))
    checkpoint = load_checkpoint(tmp_path)
    checkpoint["meta"]["chat_template"] = PLAIN_TEMPLATE
    path, = export_html(checkpoint, tmp_path / "page.html", "int8")
    page = open_page(path)
    fill(page, tokens=3, seed=1)

    def send(message: str) -> str:
        page.locator("#prompt").fill(message)
        page.get_by_role("button", name="Send").click()
        page.locator("#go:enabled").wait_for()
        assert page.locator("#prompt").input_value() == ""
        return page.locator("#text").inner_text()

    first = send("the dogs")
    assert first.startswith("the dogs\n") and len(first) > len("the dogs\n")
    assert send("12 cats").startswith(first)
    page.get_by_role("button", name="Start over").click()
    page.locator("#text:empty").wait_for(state="attached")
    assert send("the dogs") == first  # with the same seed, and without the earlier messages


def test_a_long_conversation_forgets_its_oldest_messages(tmp_path, monkeypatch):
    """The page and sample.py give the model the same ids."""
    torch.manual_seed(1)
    tokenizer = add_specials(tokenizer_of("char"), PLAIN_TOKENS)
    save_run(tmp_path, tokenizer.spec, tokenizer.vocab_size, tokenizer.eot,
             **SMALL | dict(block_size=64))
    checkpoint = load_checkpoint(tmp_path)
    checkpoint["meta"]["chat_template"] = PLAIN_TEMPLATE
    never = [*tokenizer.specials.values(), tokenizer.eot, tokenizer.unk]
    checkpoint["model"]["transformer.wte.weight"][never] = 0  # other tokens are more probable
    path, = export_html(checkpoint, tmp_path / "page.html", "int8")
    messages = ["the dogs", "12 cats", "a" * 30, "", "the owner", "the cat's owner said"]
    drive = """async (call, {messages, most}) => {
      const turns = [];
      for (const prompt of messages) {
        const {ids} = await call("begin", {prompt, seed: 0, maxTokens: most});
        const answer = [];
        for (let i = 0; i < 5; i++) {
          while ((await call("read")).left);
          answer.push((await call("sample", {temperature: 0, topK: 0})).id);
        }
        turns.push({ids, answer});
      }
      return turns;
    }"""
    model = build_model(checkpoint, "run")
    for most in (5, 500):
        monkeypatch.setattr(sample, "max_new_tokens", most)
        history = []
        turns = run_in_node(path, {"messages": messages, "most": most}, drive)
        for message, turn in zip(messages, turns, strict=True):
            history.append({"role": "user", "content": message})
            history, ids = sample.fit_context(model, tokenizer, history, PLAIN_TEMPLATE)
            assert turn["ids"] == ids
            answer = tokenizer.decode(turn["answer"])
            history.append({"role": "assistant", "content": answer})
        assert len(history) < 2 * len(messages)


def test_stop_ends_generation(tmp_path, open_page):
    save_run(tmp_path, {"kind": "char", "vocab": ["a", "b"]}, 2, -1, **SMALL)
    path, = export_html(load_checkpoint(tmp_path), tmp_path / "page.html", "int8")
    page = open_page(path)
    fill(page, tokens=10000)  # without an end of text, it would be as long
    page.get_by_role("button", name="Generate").click()
    page.locator("#status", has_text="tokens/s").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("#go:enabled").wait_for()
    assert "Stopped." in page.locator("#status").inner_text()
    assert 0 < len(page.locator("#text").inner_text()) < 10000


@pytest.mark.parametrize("values, message", [
    (dict(temperature=-1), "Temperature: "), (dict(temperature=""), "Temperature: "),
    (dict(top_k=1.5), "Top k: "), (dict(tokens=0), "Tokens: "), (dict(seed=-3), "Seed: "),
])
def test_a_bad_setting_is_an_error_in_words(fables_page, open_page, values, message):
    page = open_page(fables_page)
    fill(page, **values)
    status, text = generate(page)
    assert status.startswith(message) and len(status) > len(message) + 5 and text == ""
    fill(page, temperature=1, top_k=0, tokens=5, seed=1)
    assert "5 tokens" in generate(page)[0]


def test_unknown_words_are_named(fables_page, open_page):
    page = open_page(fables_page)
    fill(page, tokens=5)
    page.locator("#prompt").fill("Once upon a xylophone")
    assert '" xylophone"' in generate(page)[0]


def test_a_damaged_file_says_so(fables_page, tmp_path, open_page):
    path = tmp_path / "damaged.html"
    text = fables_page.read_text(encoding="utf-8")
    at = text.index('text/plain">') + 3000
    path.write_text(text[:at] + text[at + 400:], encoding="utf-8")
    page = open_page(path, ready=False)
    page.locator("#status", has_text="The model could not be loaded").wait_for()
    assert page.locator("#go").is_disabled()


def test_text_of_a_model_is_never_html(tmp_path, open_page):
    """A model from a stranger may have tags as its name, as tokens and as its dataset."""
    evil = "</script><img src=x onerror=document.title='broken'>{{weights}}<!--<script>"
    vocab = ["<|endoftext|>", "<b>", "</script>", " <img src=x onerror=alert(1)>", "&lt;", "a"]
    save_run(tmp_path, {"kind": "pieces", "vocab": vocab}, 6, 0, evil, **SMALL)
    path, = export_html(load_checkpoint(tmp_path), tmp_path / "page.html", "int8")
    page = open_page(path)
    assert page.locator("img, #text b *").count() == 0 and page.title() != "broken"
    assert evil in page.locator("#card").inner_text()
    assert page.locator("header").inner_text().count(evil) == 1
    page.locator("#prompt").fill("a<b>")
    fill(page, temperature=0, tokens=3)
    generate(page)
    assert page.locator("img, #text b *, #bars b").count() == 0


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(fables_page, open_page, width, scheme):
    page = open_page(fables_page, viewport={"width": width, "height": 800}, color_scheme=scheme)
    fill(page, tokens=50)
    generate(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    colors = page.evaluate("[getComputedStyle(document.body).color, "
                           "getComputedStyle(document.querySelector('.box')).backgroundColor]")
    ink, paper = (int(re.search(r"\d+", color)[0]) for color in colors)  # the red of an rgb()
    assert (ink < paper) == (scheme == "light")


# -----------------------------------------------------------------------------
# Export

def test_the_word_tokenizer_is_rejected(tmp_path):
    vocab = ["<PAD>", "<UNK>", "<|endoftext|>", "a"]
    save_run(tmp_path / "run", {"kind": "word", "vocab": vocab}, 4, 2, **SMALL)
    done = run("export.py", f"--out_dir={tmp_path / 'run'}", "--format=html")
    assert "NLTK" in one_line_error(done) and not (tmp_path / "run.html").exists()


def test_a_page_is_small(tmp_path):
    """At most 1.4 times the int8 weights and 60 KB, also with GPT-2's 50,257 tokens."""
    save_run(tmp_path, {"kind": "gpt2"}, 50257, 50256, **SMALL | {"n_embd": 64})
    page, = export_html(load_checkpoint(tmp_path), tmp_path / "page.html", "int8")
    model, _ = load_model(tmp_path, "cpu")
    weights = model.num_params() + 4 * sum(len(p) for p in model.parameters() if p.dim() == 2)
    assert page.stat().st_size <= 1.4 * weights + 60_000


def test_an_int8_run_gives_the_same_page(exported, tmp_path):
    _, _, path = exported
    run_folder = path.with_name("run")
    done = run("export.py", f"--out_dir={run_folder}", "--format=int8", f"--to={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    again, = export_html(load_checkpoint(tmp_path / "run"), tmp_path / "page.html", "int8")
    assert again.read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
