"""The baseline that a small language model has to beat: an interpolated character n-gram model."""

from collections.abc import Iterable

import numpy as np


_CODE_POINTS = 0x110000


class NGramModel:
    r"""
    Character n-gram model with interpolated Witten-Bell smoothing.

    With `h` the last `n - 1` characters, `h'` the same without the first, `C` counts in the training text and
    `T(h)` the number of different characters seen after `h`:

        P_n(c | h) = (C(h c) + T(h) P_{n-1}(c | h')) / (C(h) + T(h)),    P_n(c | h) = P_{n-1}(c | h') if C(h) = 0

    (Witten and Bell, 1991, "The zero-frequency problem", method C; in the interpolated form of Chen and Goodman,
    1999, "An empirical study of smoothing techniques for language modeling", section 2.5.) The recursion ends in the
    uniform distribution over the training alphabet and one class for all characters outside it. Texts are
    independent; the context before a text's first character is a boundary mark, which is never predicted.

    Args:
        order: n, at least 1; a prediction sees `order - 1` characters.
    """

    def __init__(self, order: int = 5):
        if order < 1:
            raise ValueError(f"order={order} must be at least 1 (a unigram model).")
        self.order = order
        self.alphabet: str | None = None

    def fit(self, texts: Iterable[str]) -> "NGramModel":
        """
        Count the n-grams of `texts`; replaces what was counted before. Takes about 150 bytes of memory a character.

        Raises:
            ValueError: the texts hold no character.
        """
        texts = [_code_points(text) for text in texts]
        codes = np.unique(np.concatenate(texts)) if texts else np.empty(0, np.uint32)
        if not codes.size:
            raise ValueError("texts: no characters to count; check the dataset and its text column.")
        self.alphabet = codes.tobytes().decode("utf-32-le", "surrogatepass")
        # Symbols: 0 .. A-1 the alphabet, A anything else, A+1 the boundary.
        self._symbol_of = np.full(_CODE_POINTS, codes.size, dtype=np.int64)
        self._symbol_of[codes] = np.arange(codes.size)
        self._radix = codes.size + 2

        symbols = self._symbols(texts)
        context = np.zeros_like(symbols)  # rank of the last k-1 characters; there is one empty context
        self._levels = []
        for _ in range(self.order):
            grams, rank, counts = np.unique(context * self._radix + symbols, return_inverse=True, return_counts=True)
            counts *= grams % self._radix != self._boundary
            of_context = grams // self._radix
            totals = np.bincount(of_context, weights=counts)  # C(h), by rank of h
            kinds = np.bincount(of_context, weights=counts > 0)  # T(h)
            self._levels.append((grams, counts, totals, kinds))
            # The n-gram that ends at a character is the context of the next one.
            context = np.concatenate([rank[:1], rank[:-1]])
        return self

    def bits_per_character(self, texts: Iterable[str]) -> float:
        """
        Mean of -log2 P over all characters of `texts`.

        A character outside the training alphabet costs its class' bits and those that tell one such code point from
        another (uniformly), so that the figure is a code length for any text whatsoever.

        Raises:
            ValueError: the texts hold no character.
            RuntimeError: the model has not been fitted.
        """
        texts = [_code_points(text) for text in texts]
        if not sum(text.size for text in texts):
            raise ValueError("texts: no characters to measure on; check the held-out split.")
        probabilities, symbols = self._probabilities(texts)
        bits = -np.log2(probabilities).sum()
        bits += (symbols == self._unknown).sum() * np.log2(_CODE_POINTS - len(self.alphabet))
        return float(bits / symbols.size)

    def distribution(self, context: str) -> np.ndarray:
        """
        P(. | context), float64 of shape (len(alphabet) + 1,): the characters of `alphabet` in order, then "any other".

        Raises:
            RuntimeError: the model has not been fitted.
        """
        self._require_fitted()
        outside = next(code for code in range(_CODE_POINTS) if self._symbol_of[code] == self._unknown)
        context = _code_points(context)
        candidates = [*_code_points(self.alphabet), outside]
        texts = [np.append(context, np.uint32(code)) for code in candidates]
        probabilities, _ = self._probabilities(texts)
        return probabilities.reshape(len(candidates), -1)[:, -1]

    @property
    def _unknown(self) -> int:
        return self._radix - 2

    @property
    def _boundary(self) -> int:
        return self._radix - 1

    def _require_fitted(self) -> None:
        if self.alphabet is None:
            raise RuntimeError("the model has not been fitted: call fit(texts) first.")

    def _symbols(self, texts: list[np.ndarray]) -> np.ndarray:
        """All texts in one array of symbols, each after enough boundary marks to fill its first context."""
        boundary = np.full(max(self.order - 1, 1), self._boundary)
        return np.concatenate([part for text in texts for part in (boundary, self._symbol_of[text])])

    def _probabilities(self, texts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """P of every character given those before it, and the characters' symbols; both (characters,)."""
        self._require_fitted()
        symbols = self._symbols(texts)
        probability = np.full(symbols.size, 1 / (self._radix - 1))
        context = np.zeros_like(symbols)  # -1: not seen in training
        for grams, counts, totals, kinds in self._levels:
            wanted = np.where(context >= 0, context * self._radix + symbols, -1)
            rank = np.minimum(np.searchsorted(grams, wanted), grams.size - 1)
            found = grams[rank] == wanted
            # A context may have been seen at the end of texts only, where nothing was counted after it.
            seen = (context >= 0) & (context < totals.size)
            total = np.where(seen, totals[np.where(seen, context, 0)], 0)
            kind = np.where(seen, kinds[np.where(seen, context, 0)], 0)
            count = np.where(found, counts[rank], 0)
            lower = np.where(total > 0, kind, 1) * probability
            probability = (count + lower) / np.where(total > 0, total + kind, 1)
            context = np.concatenate([np.where(found, rank, -1)[:1], np.where(found, rank, -1)[:-1]])
        characters = symbols != self._boundary
        return probability[characters], symbols[characters]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
