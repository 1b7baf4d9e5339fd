"""The fables: their grammar, their parser and the entropy that meta.json gives."""
import math
import random
import re

import pytest

from data.fables import prepare as fables
from lib.dataset import TokenStream, load_meta
from lib.tokenizer import EOT, get_tokenizer
from helpers import prepare

STORIES = fables.write_stories("test", 2000)


def test_every_fable_is_parsed_to_its_own_draws_and_probability():
    for seed in range(1000):
        drawn, nats = [], 0.0
        rng = random.Random(seed)

        def choose(told, options):
            nonlocal nats
            drawn.append(rng.randrange(len(options)))
            nats -= math.log(1 / len(options))
            return drawn[-1]

        text = fables.tell(choose)
        choices, parsed_nats = fables.parse(text)
        assert choices == drawn and parsed_nats == pytest.approx(nats, abs=1e-9)


def test_options_of_a_table_never_begin_alike():
    for name, table in fables.TABLES.items():
        text = [option + "\n" for option in table]
        for a in table:
            assert sum(bool(re.match(re.escape(a) + r"(?!\w)", b)) for b in text) == 1, f"{name}: {a}"


def test_probabilities_of_a_small_grammar_sum_to_one(monkeypatch):
    small = {name: table[:1] for name, table in fables.TABLES.items()}
    small |= {"hero": ("Fern", "Gus"), "treasure": ("kite", "vase"), "tree": ("oak", "elm"), "tool": ("saw", "file", "drill")}
    monkeypatch.setattr(fables, "TABLES", small)
    monkeypatch.setattr(fables, "BEGINNING", [fables.BEGINNING[0][:2], fables.BEGINNING[1][:1], fables.BEGINNING[2][:2]])
    monkeypatch.setattr(fables, "MEETING", [templates[:1] for templates in fables.MEETING])
    monkeypatch.setattr(fables, "ENDING", [templates[:1] for templates in fables.ENDING])
    found, total, path = set(), 0.0, []
    while True:  # every sequence of draws, in the order of an odometer
        sizes = []

        def choose(told, options):
            sizes.append(len(options))
            if len(sizes) > len(path):
                path.append(0)
            return path[len(sizes) - 1]

        text = fables.tell(choose)
        choices, nats = fables.parse(text)
        assert choices == path and text not in found
        found.add(text)
        total += math.exp(-nats)
        while path and path[-1] == sizes[len(path) - 1] - 1:
            path.pop()
        if not path:
            break
        path[-1] += 1
    assert len(found) > 1000 and total == pytest.approx(1.0, abs=1e-9)


def test_the_corpus_is_rich_enough():
    words = {word for text, _ in STORIES for word in re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower())}
    assert len(words) >= 1200
    assert all(nats > math.log(1e12) for _, nats in STORIES)  # each is rarer than 1e-12, so there are more than 1e12
    lengths = [len(text.split()) for text, _ in STORIES]
    assert min(lengths) >= 60 and max(lengths) <= 150 and 90 < sum(lengths) / len(lengths) < 130


def test_articles_agree_with_their_nouns():
    assert not [wrong for text, _ in STORIES for wrong in re.findall(r"\ba [aeiou]\w+|\ban [^aeiou]\w+", text)]


def test_inconsistent_fables_are_refused():
    refused = tried = 0
    for text, _ in STORIES[:300]:
        hero = next(name for name in fables.SHE + fables.HE if re.search(rf"\b{name}\b", text.split("\n")[0]))
        other = "Fern" if hero != "Fern" else "Gus"
        changed = [text[:len(text) // 2], text + " The end.", text.replace("\n\n", " ", 1), text.upper(), "", text + "\n"]
        if text.count(hero) > 1:  # another name from the second time on
            first = text.index(hero) + len(hero)
            changed.append(text[:first] + text[first:].replace(hero, other))
        pronoun = re.search(r"\b(She|He)\b", text)
        if pronoun:
            changed.append(text[:pronoun.start()] + {"She": "He", "He": "She"}[pronoun[0]] + text[pronoun.end():])
        moral = next(m for _, _, morals in fables.PLOTS.values() for m in morals if m not in
                     next(ms for _, _, ms in fables.PLOTS.values() if text.rsplit("\n\n", 1)[1] in ms))
        changed.append(text.rsplit("\n\n", 1)[0] + "\n\n" + moral)  # the moral of another plot
        for bad in changed:
            tried += 1
            with pytest.raises(fables.NotAFable):
                fables.parse(bad)
            refused += 1
    assert refused == tried > 2000


def test_found_thing_must_be_the_lost_one():
    text = next(text for text, _ in STORIES if "brought down the kite" in text)
    with pytest.raises(fables.NotAFable, match="would not go on"):
        fables.parse(text.replace("brought down the kite", "brought down the balloon"))


def test_prepared_fables_know_their_floor(tmp_path):
    done = prepare("fables", f"--out_dir={tmp_path}/f", "--train_stories=50", "--val_stories=40")
    assert done.returncode == 0, done.stderr
    meta = load_meta(tmp_path / "f")
    tokenizer = get_tokenizer(meta)
    stream = TokenStream(tmp_path / "f", "val", meta)
    ids = stream.read(0, len(stream)).tolist()
    texts = tokenizer.decode(ids).split(EOT)
    assert texts.pop() == "" and len(texts) == 40 == meta["splits"]["val"]["documents"]
    nats = sum(fables.parse(text)[1] for text in texts)
    assert meta["floor"] == pytest.approx(nats / len(ids))
    assert meta["floor_bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts))
    again = prepare("fables", f"--out_dir={tmp_path}/g", "--train_stories=50", "--val_stories=40")
    assert again.returncode == 0 and (tmp_path / "f/val.bin").read_bytes() == (tmp_path / "g/val.bin").read_bytes()
