from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.evaluation import NGramModel


def naive(texts, order, context, character):
    """The recursion of the docstring, read off literally, with "^" for the boundary."""
    alphabet = set("".join(texts))
    probability = 1 / (len(alphabet) + 1)
    context = ("^" * order + context)[-(order - 1) :] if order > 1 else ""
    for n in range(1, order + 1):
        history = context[len(context) - n + 1 :]
        after = Counter()
        for text in texts:
            padded = "^" * (order - 1) + text
            after.update(padded[i] for i in range(order - 1, len(padded)) if padded[i - n + 1 : i] == history)
        if after.total():
            probability = (after[character] + len(after) * probability) / (after.total() + len(after))
    return probability


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text("abc", max_size=12), min_size=1, max_size=4).filter(any),
    order=st.integers(1, 5),
    context=st.text("abcd", max_size=6),
)
def test_against_the_definition(texts, order, context):
    model = NGramModel(order).fit(texts)
    found = model.distribution(context)
    assert found.shape == (len(model.alphabet) + 1,)
    assert found.sum() == pytest.approx(1, abs=1e-12) and (found > 0).all()
    np.testing.assert_allclose(found, [naive(texts, order, context, c) for c in model.alphabet + "?"], rtol=1e-12)


def test_bits_are_those_of_the_distribution():
    model = NGramModel(3).fit(["the cat sat on the mat", "a hat"])
    text, bits = "that cat", 0.0
    for i, character in enumerate(text):
        bits -= np.log2(model.distribution(text[:i])[model.alphabet.index(character)])
    assert model.bits_per_character([text]) == pytest.approx(bits / len(text))
    # Texts do not see each other.
    assert model.bits_per_character([text, text]) == pytest.approx(bits / len(text))


def test_unknown_characters_cost_their_code_point():
    model = NGramModel(2).fit(["ab"])
    expected = -np.log2(model.distribution("")[-1]) + np.log2(0x110000 - 2)
    assert model.bits_per_character(["日"]) == pytest.approx(expected)


def test_more_context_helps_on_regular_text():
    text = ["for i in range(10):\n    print(i)\n" * 20]
    bits = [NGramModel(order).fit(text).bits_per_character(text) for order in (1, 2, 5)]
    assert bits[0] > bits[1] > bits[2] and bits[2] < 0.5


def test_bad_input():
    with pytest.raises(ValueError, match="order=0"):
        NGramModel(0)
    for texts in ([], ["", ""]):
        with pytest.raises(ValueError, match="no characters to count"):
            NGramModel().fit(texts)
    with pytest.raises(RuntimeError, match="call fit"):
        NGramModel().bits_per_character(["a"])
    with pytest.raises(ValueError, match="no characters to measure"):
        NGramModel(2).fit(["a"]).bits_per_character([""])
