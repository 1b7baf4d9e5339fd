"""
Conversations as token ids: chat templates, and where the answers are.

A conversation is a list of {"role": "system", "user" or "assistant", "content": text}. A Jinja chat
template, as in transformers, turns it into text with control tokens around the messages. Only
control tokens of the template become special ids; in a message they stay ordinary text.
"""
import functools
import re

import numpy as np

from lib.tokenizer import add_specials

# for models whose tokenizer has no template; roles are tokens, so it works with any vocabulary
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
PLAIN_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# a Unicode noncharacter, inserted into control tokens in messages so that they stay text
MARK = "\ufdd0"


def check_messages(messages: object) -> None:
    """Raise ValueError unless messages are a conversation."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation must be a list of messages")
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("content"), str)
                and message.get("role") in ("system", "user", "assistant")):
            raise ValueError("each message needs a role (system, user or assistant) and text as "
                             f"its content, got {str(message)[:60]}")


@functools.lru_cache
def compile_template(template: str):
    """Compile a Jinja template in a sandbox."""
    from jinja2 import TemplateError  # torch needs it too, so it is installed
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(reason: str) -> None:
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def render(template: str, messages: list[dict[str, str]], tokenizer,
           add_generation_prompt: bool = False) -> str:
    """
    Return a conversation as text. Control tokens inside of a message contain a MARK.

    add_generation_prompt: end with the control tokens that begin an answer. Raises ValueError for
    bad messages and for a template with an error.
    """
    def marked(text: str) -> str:
        text = text.replace(MARK, "")
        for token in tokenizer.specials:
            text = text.replace(token, token[0] + MARK + token[1:])
        return text

    check_messages(messages)
    messages = [message | {"content": marked(message["content"])} for message in messages]
    try:
        return compile_template(template).render(
            messages=messages, tools=None, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program and can fail in any way
        raise ValueError(f"the chat template cannot write this conversation: {error}") from None


def encode(text: str, tokenizer) -> list[int]:
    """Return the ids of a text from render()."""
    names = sorted(tokenizer.specials, key=len, reverse=True)
    ids = []
    for part in re.split(f"({'|'.join(map(re.escape, names))})", text):
        if part in tokenizer.specials:
            ids.append(tokenizer.specials[part])
        else:
            ids += tokenizer.encode(part.replace(MARK, ""))
    return ids


def answer_marks(template: str, tokenizer) -> dict[str, list[int] | int]:
    """
    Return the ids that mark answers, such as {"answer": [5, 3], "end": 6}.

    answer: the ids right before an answer. end: the token that ends it and is a part of it. Raises
    ValueError if the template marks answers with ordinary text, which a message could contain.
    """
    def ids(messages: list[dict], prompted: bool = False) -> list[int]:
        return encode(render(template, messages, tokenizer, prompted), tokenizer)

    user, assistant = ({"role": role, "content": ""} for role in ("user", "assistant"))
    request, control = ids([user]), set(tokenizer.specials.values())
    answer = ids([user], prompted=True)[len(request):]
    ends = [i for i in ids([user, assistant])[len(request) + len(answer):] if i in control]
    if not control & set(answer) or not ends:
        raise ValueError("the chat template has no control tokens around answers, so they cannot "
                         "be found in the data: tune a model with another template")
    return {"answer": answer, "end": ends[-1]}


def page_frames(template: str, tokenizer) -> dict[str, str | int]:
    """
    Return the text that a template puts before each message, for lib/page.html.

    first: before the first request. answer: before each answer. next: before each later request.
    end: the id that ends an answer. Raises ValueError if the text depends on more than the order
    of the messages.
    """
    def text(n: int) -> str:
        """Return a conversation of the messages [0] to [n - 1] and the prompt for an answer."""
        messages = [{"role": ("user", "assistant")[i % 2], "content": f"[{i}]"} for i in range(n)]
        return render(template, messages, tokenizer, add_generation_prompt=True)

    end = answer_marks(template, tokenizer)["end"]
    first, answer, following, *_ = re.split(r"\[\d\]", text(3))
    if (text(5) != f"{first}[0]{answer}[1]{following}[2]{answer}[3]{following}[4]{answer}"
            or encode(following, tokenizer)[:1] != [end]):
        raise ValueError("the web page supports only chat templates that put fixed text around "
                         "each message: use --format=hf or gguf")
    return {"first": first, "answer": answer, "next": following, "end": end}


def ensure_template(tokenizer, template: str) -> tuple[object, str]:
    """Return the tokenizer and template; if that is empty, PLAIN_TEMPLATE, and add its tokens."""
    if template:
        return tokenizer, template
    return add_specials(tokenizer, PLAIN_TOKENS), PLAIN_TEMPLATE


def chat_meta(template: str, tokenizer) -> dict[str, object]:
    """Return the entries of meta.json for a dataset of conversations."""
    marks = answer_marks(template, tokenizer)
    if tokenizer.eot in (-1, marks["end"]):
        raise ValueError("conversations need an end-of-text token that is not also the end of an "
                         "answer: choose a model whose tokenizer has <|endoftext|>")
    return {"chat_template": template, "chat": marks}


class ChatTokenizer:
    """Encodes the texts that render() returns. Has what the prepare scripts need."""

    def __init__(self, tokenizer):
        self.tokenizer, self.spec = tokenizer, tokenizer.spec
        self.vocab_size, self.eot, self.unk = tokenizer.vocab_size, tokenizer.eot, tokenizer.unk

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(encode(text, self.tokenizer), dtype=np.uint32) for text in texts]
