"""Smoothed sampling of languages, so that the rare ones are seen more often than their share of the text."""

from collections.abc import Mapping

from datasets import Dataset, IterableDataset, interleave_datasets


def smoothed_shares(sizes: Mapping[str, float], exponent: float) -> dict[str, float]:
    r"""
    Sampling probabilities \\(p_l = n_l^a / \sum_k n_k^a\\) of languages of `sizes` n and an `exponent` a.

    At 1 each language is seen as often as there is text of it, at 0 all equally often. m3BERT's exponent is not
    known; XLM-R's (arXiv 1911.02116) is 0.3.

    Raises:
        ValueError: no language, a size that is not positive, or an exponent outside [0, 1].
    """
    if not sizes or min(sizes.values()) <= 0:
        raise ValueError(f"sizes={dict(sizes)}: every language needs some text; leave out those that have none.")
    if not 0 <= exponent <= 1:
        raise ValueError(f"exponent={exponent} must lie in [0, 1]: 1 keeps the shares, 0 makes them equal.")
    weights = {language: size**exponent for language, size in sizes.items()}
    return {language: weight / sum(weights.values()) for language, weight in weights.items()}


def sample_languages(
    corpora: Mapping[str, Dataset | IterableDataset],
    *,
    exponent: float,
    seed: int,
    sizes: Mapping[str, float] | None = None,
) -> Dataset | IterableDataset:
    """
    One dataset in which languages alternate at random by `smoothed_shares`; it ends when each was read to its end.

    Small languages begin anew in the meantime. One language comes back as it is.

    Args:
        sizes: of the languages; their numbers of rows if None, which streams do not know.

    Raises:
        ValueError: as `smoothed_shares`, or streams without `sizes`.
    """
    if len(corpora) == 1:
        return next(iter(corpora.values()))
    if sizes is None:
        if streamed := [language for language, corpus in corpora.items() if isinstance(corpus, IterableDataset)]:
            raise ValueError(f"sizes: streams do not know theirs; give the sizes of {', '.join(streamed)}.")
        sizes = {language: len(corpus) for language, corpus in corpora.items()}
    shares = smoothed_shares({language: sizes[language] for language in corpora}, exponent)
    return interleave_datasets(
        list(corpora.values()),
        probabilities=list(shares.values()),
        seed=seed,
        stopping_strategy="all_exhausted",
    )
