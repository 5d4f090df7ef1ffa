"""Reviews with a planted bias: what knowing the user is worth, and what a text betrays."""

import numpy
import pytest

from trainers.data.biased_reviews import GRADES, OWN_WORDS, biased_reviews


def shares(splits, users):
    """Accuracy of the best threshold rules on the graded words: one for all, and one for each user."""
    grade = {word: place for place, words in enumerate(GRADES) for word in words}

    def columns(part):
        known = [[grade[w] for w in text.split() if w in grade] for text in part["text"]]
        heard = numpy.array([numpy.mean(g) if g else 3.5 for g in known])
        return heard, numpy.array(part["label"]), numpy.array(part["user"])

    train, test = columns(splits["train"]), columns(splits["test"])

    def fitted(mask):
        cuts = numpy.linspace(-0.5, 7.5, 33)
        best = max(
            ((numpy.digitize(train[0][mask], [a, b]) == train[1][mask]).mean(), a, b)
            for a in cuts for b in cuts if a <= b
        )  # fmt: skip
        return best[1:]

    everybody = numpy.ones(len(train[1]), bool)
    together = (numpy.digitize(test[0], fitted(everybody)) == test[1]).mean()
    own = [
        (numpy.digitize(test[0][test[2] == u], fitted(train[2] == u)) == test[1][test[2] == u]).mean()
        for u in range(users)
    ]
    return together, numpy.mean(own)


def test_knowing_the_user_is_worth_much():
    together, own = shares(biased_reviews(12, samples=(60, 1, 60)), 12)
    assert 0.4 < together < 0.65 and own > together + 0.1


def test_without_a_bias_it_is_worth_nothing():
    together, own = shares(biased_reviews(12, samples=(60, 1, 60), bias=0.0), 12)
    assert own <= together + 0.02


def test_own_words_appear_where_they_are_asked_for_and_are_the_user_s():
    plain, own = (biased_reviews(6, own_word_share=share)["train"] for share in (0.0, 0.9))
    assert not any(word in OWN_WORDS for text in plain["text"] for word in text.split())
    said = {user: set() for user in range(6)}
    for text, user in zip(own["text"], own["user"]):
        said[user] |= {word for word in text.split() if word in OWN_WORDS}
    assert all(1 <= len(words) <= 3 for words in said.values()) and len(set().union(*said.values())) > 3


def test_splits_sizes_and_repetition():
    splits = biased_reviews(4, samples=(5, 2, 3), seed=3)
    assert {name: len(part) for name, part in splits.items()} == {"train": 20, "validation": 8, "test": 12}
    again, other = biased_reviews(4, samples=(5, 2, 3), seed=3), biased_reviews(4, samples=(5, 2, 3), seed=4)
    assert again["test"]["text"][:] == splits["test"]["text"][:] != other["test"]["text"][:]
    assert set(splits["train"]["label"]) <= {0, 1, 2}
    for wrong in ({"num_users": 0}, {"own_word_share": 2.0}, {"samples": (0, 1, 1)}):
        with pytest.raises(ValueError, match="num_users="):
            biased_reviews(**({"num_users": 4} | wrong))
