"""The fables: their grammar, their parser, and the entropy in meta.json."""
import math
import random
import re

import pytest

from data.fables import prepare as fables
from helpers import prepare
from lib.corpus import load_meta
from lib.dataset import TokenStream
from lib.tokenizer import EOT, get_tokenizer

STORIES = fables.write_stories("test", 2000)


def random_fable(seed: int) -> tuple[str, list[int], float]:
    """Return a fable, its choices and its -log p."""
    rng, choices, nats = random.Random(seed), [], 0.0

    def choose(text, options):
        nonlocal nats
        choices.append(rng.randrange(len(options)))
        nats -= math.log(1 / len(options))
        return choices[-1]

    return fables.tell(choose), choices, nats


def test_parse_finds_the_choices_and_probability_of_every_fable():
    for seed in range(1000):
        text, choices, nats = random_fable(seed)
        parsed_choices, parsed_nats = fables.parse(text)
        assert parsed_choices == choices and parsed_nats == pytest.approx(nats, abs=1e-9)


def test_options_of_a_table_never_begin_alike():
    for name, table in fables.TABLES.items():
        text = [option + "\n" for option in table]
        for a in table:
            begin_alike = sum(bool(re.match(re.escape(a) + r"(?!\w)", b)) for b in text)
            assert begin_alike == 1, f"{name}: {a}"


def every_fable():
    """Yield the text and the choices of every fable, in the order of an odometer."""
    path, sizes = [], []

    def choose(text, options):
        sizes.append(len(options))
        if len(sizes) > len(path):
            path.append(0)
        return path[len(sizes) - 1]

    while True:
        sizes.clear()
        yield fables.tell(choose), list(path)
        while path and path[-1] == sizes[len(path) - 1] - 1:
            path.pop()
        if not path:
            return
        path[-1] += 1


def test_probabilities_of_a_small_grammar_sum_to_one(monkeypatch):
    small = {name: table[:1] for name, table in fables.TABLES.items()}
    small |= {"hero": ("Fern", "Gus"), "treasure": ("kite", "vase"), "tree": ("oak", "elm"),
              "tool": ("saw", "file", "drill")}
    first, second, third = fables.BEGINNING
    monkeypatch.setattr(fables, "TABLES", small)
    monkeypatch.setattr(fables, "BEGINNING", [first[:2], second[:1], third[:2]])
    monkeypatch.setattr(fables, "MEETING", [templates[:1] for templates in fables.MEETING])
    monkeypatch.setattr(fables, "ENDING", [templates[:1] for templates in fables.ENDING])
    found, total = set(), 0.0
    for text, choices in every_fable():
        parsed, nats = fables.parse(text)
        assert parsed == choices and text not in found
        found.add(text)
        total += math.exp(-nats)
    assert len(found) > 1000 and total == pytest.approx(1.0, abs=1e-9)


def test_the_corpus_is_rich_enough():
    words = {word for text, _ in STORIES
             for word in re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower())}
    assert len(words) >= 1200
    assert all(nats > math.log(1e12) for _, nats in STORIES)  # so there are more than 1e12 fables
    lengths = [len(text.split()) for text, _ in STORIES]
    assert min(lengths) >= 60 and max(lengths) <= 150
    assert 90 < sum(lengths) / len(lengths) < 130


def test_articles_agree_with_their_nouns():
    wrong = re.compile(r"\ba [aeiou]\w+|\ban [^aeiou]\w+")
    assert not [match for text, _ in STORIES for match in wrong.findall(text)]


def inconsistent_versions(text: str) -> list[str]:
    """Return versions of a fable that the grammar cannot produce."""
    half = len(text) // 2
    versions = [text[:half], text + " The end.", text.replace("\n\n", " ", 1), text.upper(), "",
                text + "\n"]
    hero = next(name for name in fables.SHE + fables.HE
                if re.search(rf"\b{name}\b", text.split("\n")[0]))
    other = "Fern" if hero != "Fern" else "Gus"
    if text.count(hero) > 1:  # another name from the second time on
        first = text.index(hero) + len(hero)
        versions.append(text[:first] + text[first:].replace(hero, other))
    if pronoun := re.search(r"\b(She|He)\b", text):
        swapped = {"She": "He", "He": "She"}[pronoun[0]]
        versions.append(text[:pronoun.start()] + swapped + text[pronoun.end():])
    rest, moral = text.rsplit("\n\n", 1)
    morals_of_plots = [morals for _, _, morals in fables.PLOTS.values()]
    own = next(morals for morals in morals_of_plots if moral in morals)
    versions.append(rest + "\n\n" + next(m for morals in morals_of_plots for m in morals
                                         if m not in own))
    return versions


def test_inconsistent_fables_are_rejected():
    rejected = tried = 0
    for text, _ in STORIES[:300]:
        for version in inconsistent_versions(text):
            tried += 1
            with pytest.raises(fables.NotAFable):
                fables.parse(version)
            rejected += 1
    assert rejected == tried > 2000


def test_found_thing_must_be_the_lost_one():
    text = next(text for text, _ in STORIES if "brought down the kite" in text)
    with pytest.raises(fables.NotAFable, match="no fable continues with"):
        fables.parse(text.replace("brought down the kite", "brought down the balloon"))


def test_meta_has_the_entropy_of_the_validation_split(tmp_path):
    args = ["--train_stories=50", "--val_stories=40"]
    done = prepare("fables", f"--out_dir={tmp_path}/f", *args)
    assert done.returncode == 0, done.stderr
    meta = load_meta(tmp_path / "f")
    stream = TokenStream(tmp_path / "f", "val", meta)
    ids = stream.read(0, len(stream)).tolist()
    texts = get_tokenizer(meta).decode(ids).split(EOT)
    assert texts.pop() == "" and len(texts) == 40 == meta["splits"]["val"]["documents"]
    nats = sum(fables.parse(text)[1] for text in texts)
    assert meta["floor"] == pytest.approx(nats / len(ids))
    n_bytes = sum(len(text.encode()) for text in texts)
    assert meta["floor_bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes)
    again = prepare("fables", f"--out_dir={tmp_path}/g", *args)
    assert again.returncode == 0
    assert (tmp_path / "f/val.bin").read_bytes() == (tmp_path / "g/val.bin").read_bytes()
