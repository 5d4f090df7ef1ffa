"""Splitting within each user: everybody trains, and everybody is measured on what came later."""

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict


SPLITS = {2: ("train", "test"), 3: ("train", "validation", "test")}


def user_split(
    dataset: Dataset,
    user_column: str,
    *,
    time_column: str | None = None,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
) -> DatasetDict:
    """Every user's rows in `train`, `validation` and `test`, or with two fractions in `train` and `test`.

    Of a user's n rows the first round(n f_1), halves up, are for training, those up to round(n (f_1 + f_2)) validate,
    and so on: each row is in one split, and users with few rows have some splits empty. "First" is by `time_column`,
    ties in the order of the dataset, or without one in an order drawn from `seed`. Rows keep the dataset's order
    within a split.

    Raises:
        ValueError: fractions that are not two or three positive numbers of sum 1, a column that is not there, users
            or times that are missing.
    """
    names, shares = SPLITS.get(len(fractions)), np.asarray(fractions, dtype=float)
    if names is None or (shares <= 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"fractions={tuple(fractions)} must be two or three positive numbers of sum 1.")
    for column in filter(None, (user_column, time_column)):
        if column not in dataset.column_names:
            raise ValueError(f"There is no column {column!r}; the dataset has {', '.join(dataset.column_names)}.")
    _, users = np.unique(_present(dataset, user_column), return_inverse=True)
    order = np.lexsort((_priority(dataset, time_column, seed), users))  # rows of a user are neighbours, first to last
    counts = np.bincount(users)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place = np.empty(len(users), dtype=np.int64)
    place[order] = np.arange(len(users)) - starts[users[order]]
    # the slack keeps .6 * 5 = 3.0000000000000004 and its like where they belong
    bounds = np.floor(counts[users][:, None] * np.cumsum(shares)[None, :-1] + 0.5 + 1e-9)  # (rows, splits - 1)
    split_of = (place[:, None] >= bounds).sum(axis=1)
    return DatasetDict({name: dataset.select(np.flatnonzero(split_of == i)) for i, name in enumerate(names)})


def _priority(dataset: Dataset, time_column: str | None, seed: int) -> np.ndarray:
    if time_column is None:
        return np.random.default_rng(seed).permutation(len(dataset))
    return np.unique(_present(dataset, time_column), return_inverse=True)[1]


def _present(dataset: Dataset, column: str) -> np.ndarray:
    table = dataset.select_columns([column]).with_format("arrow")[:]
    if missing := pc.sum(pc.is_null(table[column], nan_is_null=True)).as_py():
        raise ValueError(f"Column {column!r} has {missing} missing values; drop those rows.")
    return np.asarray(dataset[column][:])


__all__ = ["user_split"]
