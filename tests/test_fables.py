"""The fables: their grammar, their parser, and the entropy in meta.json."""
import math
import random
import re

import pytest

from data.fables import prepare as fables
from helpers import prepare
from lib.checkpoint import load_tokenizer
from lib.corpus import load_meta
from lib.dataset import TokenStream
from lib.tokenizer import EOT, get_tokenizer, is_extension

STORIES = fables.write_stories("test", 2000)
CONVERSATIONS = {split: fables.write_conversations(f"test {split}", 300, split == "val")
                 for split in ("train", "val")}


def random_fable(seed: int) -> tuple[str, list[int], float]:
    """Return a fable, its choices and its -log p."""
    rng, choices, nats = random.Random(seed), [], 0.0

    def choose(text, options):
        nonlocal nats
        choices.append(rng.randrange(len(options)))
        nats -= math.log(1 / len(options))
        return choices[-1]

    return fables.tell(choose)[0], choices, nats


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
        yield fables.tell(choose)[0], list(path)
        while path and path[-1] == sizes[len(path) - 1] - 1:
            path.pop()
        if not path:
            return
        path[-1] += 1


@pytest.fixture
def small_grammar(monkeypatch):
    """A grammar with few options, of which every fable can be written."""
    small = {name: table[:1] for name, table in fables.TABLES.items()}
    small |= {"hero": ("Fern", "Gus"), "treasure": ("kite", "vase"), "tree": ("oak", "elm"),
              "tool": ("saw", "file", "drill")}
    first, second, third = fables.BEGINNING
    monkeypatch.setattr(fables, "TABLES", small)
    monkeypatch.setattr(fables, "BEGINNING", [first[:2], second[:1], third[:2]])
    monkeypatch.setattr(fables, "MEETING", [templates[:1] for templates in fables.MEETING])
    monkeypatch.setattr(fables, "ENDING", [templates[:1] for templates in fables.ENDING])


def test_probabilities_of_a_small_grammar_sum_to_one(small_grammar):
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


# -----------------------------------------------------------------------------
# Requests

def test_every_fable_has_what_its_request_names():
    slots = set()
    for request, fable, _ in sum(CONVERSATIONS.values(), []):
        named, facts = fables.named_facts(request), fables.facts_of(fable)
        assert 4 <= len(named) <= 6 and named.items() <= facts.items()
        assert all(value in request and value in fable for value in named.values())
        # what remains without the values is one of the templates, with an article that agrees
        for slot, value in sorted(named.items(), key=lambda item: -len(item[1])):
            request = re.sub(rf"\b{re.escape(value)}(?!\w)", f"[{slot}]", request)
        assert re.sub(r"\b([Aa])n (?=\[)", r"\1 ", request) in fables.REQUESTS
        slots |= named.keys()
    assert slots == {"hero", "animal", "trait", "place", "hobby", "thing", "friend", "helper",
                     "moral"}
    requests = " ".join(request for request, _, _ in sum(CONVERSATIONS.values(), []))
    assert not re.findall(r"\ba [aeiou]\w+|\ban [^aeiou]\w+", requests)


def test_facts_are_those_of_the_slots():
    text = next(text for text, _ in STORIES if "the wind has my kite" in text)
    facts = fables.facts_of(text)
    assert facts["thing"] == facts["treasure"] == "kite"
    assert facts["moral"] == text.split("\n\n")[-1] and facts["helper"] in fables.TABLES["flyer"]
    assert f"named {facts['friend']}" in text or f"pass but {facts['friend']}" in text
    # a hobby that is mentioned again, at another place, is another choice
    text = next(text for text, _ in STORIES if "But while" in text and "loved" in text)
    assert f"loved {fables.facts_of(text)['hobby']}." in text


def test_requests_for_validation_do_not_occur_in_training():
    named = {split: {tuple(sorted(fables.named_facts(request).items())) for request, _, _ in rows}
             for split, rows in CONVERSATIONS.items()}
    assert not named["train"] & named["val"]
    assert all(fables.is_held_out(dict(facts)) for facts in named["val"])
    assert not any(fables.is_held_out(dict(facts)) for facts in named["train"])


def test_the_probability_of_facts_is_the_total_probability_of_the_fables_that_fit(small_grammar):
    all_fables = [(fables.facts_of(text), fables.parse(text)[1]) for text, _ in every_fable()]
    some = {"hero": "Gus", "thing": "vase", "animal": "rabbit", "trait": "a shy"}
    some |= {"helper": all_fables[0][0]["helper"], "moral": "Jam is for bread.",
             "friend": "Abner", "place": "beside the old windmill", "hobby": "counting clouds"}
    tried = 0
    sets = sorted({tuple(sorted(fables.SLOT.findall(request))) for request in fables.REQUESTS})
    for slots in sets[::2]:
        for moral in ("Jam is for bread.", "A friend is taller than any tree."):
            named = {slot: (some | {"moral": moral})[slot] for slot in slots}
            slow = math.fsum(math.exp(-nats) for facts, nats in all_fables
                             if named.items() <= facts.items())
            assert fables.probability_of(named) == pytest.approx(slow, rel=1e-9)
            tried += 0 < slow < 1
    assert tried > 20


def test_the_probability_of_facts_agrees_with_counts():
    facts = [fables.facts_of(text) for text, _ in STORIES]
    for named in ({"thing": "kite"}, {"helper": "owl"}, {"moral": "Jam is for bread."},
                  {"hobby": "yodeling"}, {"hero": "Fern"}):
        p = fables.probability_of(named)
        count = sum(named.items() <= these.items() for these in facts)
        assert abs(count - p * len(facts)) < 5 * math.sqrt(p * len(facts)) + 1


def test_conversations_extend_the_tokenizer_and_know_their_floor(tmp_path):
    args = ["--train_stories=60", "--val_stories=40", f"--out_dir={tmp_path}/plain"]
    assert prepare("fables", *args).returncode == 0
    done = prepare("fables", *args[:2], f"--out_dir={tmp_path}/chat", "--instruct=True")
    assert done.returncode == 0, done.stderr
    plain, meta = load_meta(tmp_path / "plain"), load_meta(tmp_path / "chat")
    assert is_extension(meta["tokenizer"], plain["tokenizer"])
    assert meta["vocab_size"] > plain["vocab_size"]
    tokenizer = get_tokenizer(meta)
    stream = TokenStream(tmp_path / "chat", "val", meta)
    nats = 0.0
    spans = stream.document_spans(meta["eot"], len(stream))
    assert len(spans) == len(stream.answers) == 40
    for (start, _), (answer, end) in zip(spans, stream.answers):
        request = tokenizer.decode(stream.read(start - 1, answer).tolist())
        fable = tokenizer.decode(stream.read(answer, end).tolist()).removesuffix("<|end|>")
        assert re.fullmatch(r"<\|user\|>.*<\|end\|><\|assistant\|>", request)
        named = fables.named_facts(request)
        assert 4 <= len(named) <= 6 and named.items() <= fables.facts_of(fable).items()
        nats += fables.parse(fable)[1] + math.log(fables.probability_of(named))
    n_targets = sum(end - answer for answer, end in stream.answers)
    assert meta["floor"] == pytest.approx(nats / n_targets)
    assert meta["floor"] < plain["floor"]


def test_the_vocabulary_of_the_conversations_extends_that_of_the_model():
    texts = {text for options in fables.TABLES.values() for text in options}
    base = load_tokenizer("models/fables")[0]
    assert all(f" {word}" in base.ids or word in base.ids for text in texts
               for word in re.findall(r"[\w'-]+", text))
