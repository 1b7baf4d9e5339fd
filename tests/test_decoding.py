"""Sampling and penalties against transformers, topk against PyTorch."""

import math

import pytest
import torch

from helpers import tiny
from lib.decoding import Sampling, beam_search, topk


def test_sampled_frequencies_are_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]])
    generator = torch.Generator().manual_seed(0)
    sampler, text = (
        Sampling(0.7, top_k=3, generator=generator),
        torch.zeros(1000, 1, dtype=torch.long),
    )
    draws = torch.cat([sampler(logits.expand(1000, -1), text) for _ in range(20)])
    kept = (logits[0, :3] / 0.7).exp()
    expected = torch.cat([kept / kept.sum(), torch.zeros(2)])
    frequencies = torch.bincount(draws, minlength=5) / len(draws)
    assert (frequencies - expected).abs().max() < 0.015


def test_temperature_zero_and_top_k_one_are_argmax():
    logits, text = torch.randn(50, 61), torch.zeros(50, 1, dtype=torch.long)
    best = logits.argmax(-1)
    for how in (
        dict(temperature=0.0),
        dict(temperature=5.0, top_k=1),
        dict(top_p=1e-6),
        dict(min_p=1.0),
    ):
        assert Sampling(**how)(logits, text).equal(best)


@pytest.mark.parametrize(
    "how",
    [
        dict(top_k=5),
        dict(top_p=0.7),
        dict(min_p=0.2),
        dict(top_k=20, top_p=0.8),
        dict(top_p=0.9, min_p=0.05),
        dict(top_k=30, top_p=0.9, min_p=0.02),
        dict(top_k=500),
        dict(top_p=1e-3),
    ],
)
def test_candidates_are_those_of_transformers(how):
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    torch.manual_seed(0)
    logits = 2 * torch.randn(40, 61)
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    for name, warper in (
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        expected = warper(how[name])(None, expected) if name in how else expected
    left, ids = Sampling(temperature=0.7, **how).candidates(logits)
    ours = left if ids is None else torch.full_like(logits, -math.inf).scatter(1, ids, left)
    torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1))


@pytest.mark.parametrize("penalty, ngram", [(1.7, 0), (0.5, 0), (1.0, 1), (1.0, 2), (1.3, 3)])
def test_penalties_are_those_of_transformers(penalty, ngram):
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    logits, text = torch.randn(6, 9), torch.randint(9, (6, 14))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(text, logits.clone())
    expected = NoRepeatNGramLogitsProcessor(ngram)(text, expected) if ngram else expected
    sampling = Sampling(repetition_penalty=penalty, no_repeat_ngram=ngram)
    assert sampling.penalize(logits, text).equal(expected)
    padded = torch.cat((torch.zeros(6, 3, dtype=torch.long), text), dim=1)
    assert sampling.penalize(logits, padded, torch.full((6,), 3)).equal(expected)


@pytest.mark.parametrize("how", [{}, dict(temperature=0.0), dict(top_k=2), dict(top_p=0.5)])
def test_a_row_without_an_allowed_token_ends(how):
    """Row 0 has all four tokens, row 1 has three of them, of which one is padding."""
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    ids, pad = torch.tensor([[3, 0, 1, 2], [3, 2, 0, 0]]), torch.tensor([0, 1])
    sampler = Sampling(no_repeat_ngram=1, stop_token=3, **how)
    assert sampler(logits, ids, pad)[0] == 3 and sampler(logits, ids, pad)[1] in (1, 3)
    sampler = Sampling(no_repeat_ngram=1, **how)
    assert sampler(logits[1:], ids[1:], pad[1:]) in (1, 3)
    with pytest.raises(ValueError, match="no_repeat_ngram=1 excludes every token"):
        sampler(logits, ids, pad)


def test_a_text_without_an_allowed_token_ends():
    """Of five tokens each occurs once: the end of text only at the end, or as the last one left."""
    model, idx = tiny(vocab_size=5), torch.tensor([[4, 1]])
    sampler = Sampling(no_repeat_ngram=1, stop_token=4)
    ids = model.generate(idx, 20, sampler=sampler, stop_token=4)[0].tolist()
    assert ids[:2] == [4, 1] and sorted(ids[2:]) == [0, 2, 3, 4] and ids[-1] == 4
    for beams in (1, 3, 9):
        best = beam_search(model, idx, 20, beams, 1.0, Sampling(no_repeat_ngram=1), stop_token=4)
        assert sorted(best[0, 2:].tolist()) == [0, 2, 3, 4] and best[0, -1] == 4
        with pytest.raises(ValueError, match="no_repeat_ngram=1 excludes every token"):
            beam_search(model, idx, 20, beams, 1.0, Sampling(no_repeat_ngram=1))
        best = beam_search(model, idx, 3, beams, 1.0, Sampling(no_repeat_ngram=1))
        assert sorted(best[0].tolist()) == [0, 1, 2, 3, 4]


def test_beam_search_ends_when_some_beams_have_no_token():
    """After 0 only the unlikely 1 and 2 are left; beams that are not allowed never win."""
    model, idx = tiny(vocab_size=4), torch.tensor([[3, 0]])
    best = beam_search(model, idx, 5, 8, 0.0, Sampling(no_repeat_ngram=1), stop_token=3)[0]
    scores = {}
    with torch.no_grad():
        for path in ([1, 2], [2, 1]):
            ids = torch.tensor([[3, 0, *path]])
            log_p = model(ids)[0][0].log_softmax(-1)
            scores[tuple(path)] = sum(log_p[i + 1, token].item() for i, token in enumerate(path))
    assert tuple(best[2:].tolist()) == (*max(scores, key=scores.get), 3)


@pytest.mark.parametrize("V, k", [(61, 3), (6400, 1), (6401, 5), (10000, 40), (10000, 400)])
def test_topk_is_that_of_torch(V, k):
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(topk(logits, k), logits.topk(k)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("settings", [dict(top_k=2), dict(top_p=0.5), dict(min_p=0.5)])
def test_a_random_generator_that_returns_zero_samples_no_forbidden_token(monkeypatch, settings):
    """On Apple's GPUs exponential_ can be 0, and 0 / 0 would win."""
    monkeypatch.setattr(torch.Tensor, "exponential_",
                        lambda self, generator=None: self.zero_())
    logits = torch.tensor([[0.0, 5.0, 4.9, -math.inf, 1.0]])
    assert Sampling(**settings)(logits, torch.zeros(1, 1, dtype=torch.long)).item() in (1, 2)
