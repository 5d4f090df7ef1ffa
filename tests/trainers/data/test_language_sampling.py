"""Smoothed sampling: shares by hand, what a mixed dataset holds, and what is refused."""

from collections import Counter

import pytest
from datasets import Dataset

from trainers.data import sample_languages, smoothed_shares


def corpus(language: str, rows: int) -> Dataset:
    return Dataset.from_dict({"text": [f"{language}{i}" for i in range(rows)], "language": [language] * rows})


def test_shares_by_hand():
    assert smoothed_shares({"en": 16, "de": 1}, 0.5) == {"en": 0.8, "de": 0.2}
    assert smoothed_shares({"en": 16, "de": 1}, 0) == {"en": 0.5, "de": 0.5}
    assert smoothed_shares({"en": 3, "de": 1}, 1) == {"en": 0.75, "de": 0.25}
    assert sum(smoothed_shares({"a": 5, "b": 7, "c": 1}, 0.3).values()) == pytest.approx(1)


@pytest.mark.parametrize("exponent", [-0.1, 1.1])
def test_exponents_outside_are_refused(exponent):
    with pytest.raises(ValueError, match=f"exponent={exponent}"):
        smoothed_shares({"en": 1}, exponent)


@pytest.mark.parametrize("sizes", [{}, {"en": 0}])
def test_a_language_needs_text(sizes):
    with pytest.raises(ValueError, match="every language needs some text"):
        smoothed_shares(sizes, 0.3)


def test_the_small_language_is_seen_more_often_and_the_large_one_to_its_end():
    corpora = {"en": corpus("en", 1000), "de": corpus("de", 50)}
    mixed = sample_languages(corpora, exponent=0.3, seed=0)
    seen, share = Counter(mixed["language"]), smoothed_shares({"en": 1000, "de": 50}, 0.3)["de"]
    assert len(set(mixed["text"])) == 1050, "everything is read once at least"
    assert seen["de"] / len(mixed) == pytest.approx(share, abs=0.04) and share > 0.25
    again = sample_languages(corpora, exponent=0.3, seed=0)
    assert again["text"] == mixed["text"]
    assert sample_languages(corpora, exponent=0.3, seed=1)["text"] != mixed["text"]


def test_one_language_comes_back_as_it_is():
    only = corpus("en", 3)
    assert sample_languages({"en": only}, exponent=0.3, seed=0) is only


def test_streams_want_sizes():
    streams = {name: corpus(name, 40).to_iterable_dataset() for name in ("en", "de")}
    with pytest.raises(ValueError, match="give the sizes of en, de"):
        sample_languages(streams, exponent=0.3, seed=0)
    mixed = sample_languages(streams, exponent=1.0, seed=0, sizes={"en": 3, "de": 1})
    assert Counter(row["language"] for row in mixed.take(40))["en"] > 20
