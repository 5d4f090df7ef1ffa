"""Clicks whose rate drifts from user to user, drawn: what aligning the prior must repair, and nothing else."""

import dataclasses

import numpy as np
import torch
from datasets import Dataset, DatasetDict

from hf_models.ctr import CtrForCtrPrediction

from .ctr import CtrColumns, CtrData, encode_ctr


NOISE, TASTE = 0.6, 0.5  # sd of items around their mean vector, and of users around the cloud's, per dimension
CLOUD_LENGTH, CLOUD_LEVEL = 1.8, -0.8  # length of the cloud's vector, and its entry along the mean item
COLUMNS = CtrColumns(user="user", item="item", label="label")


@dataclasses.dataclass(frozen=True)
class DriftedClicks:
    """
    A draw.

    Args:
        items (`np.ndarray`): `(num_items, dim)`, what items are.
        cloud_vector (`np.ndarray`): `(dim,)`, what the cloud takes every user for.
        splits (`DatasetDict`): `train`, the local rows of all users, and `test`; columns `user`, `item`, `label`.
        drift (`np.ndarray`): `(num_users,)`, what is added to all logits of a user.
    """

    items: np.ndarray
    cloud_vector: np.ndarray
    splits: DatasetDict
    drift: np.ndarray

    def data(self) -> CtrData:
        """Encoded for a model."""
        return encode_ctr(self.splits, COLUMNS)

    def model(self, data: CtrData | None = None) -> CtrForCtrPrediction:
        """The cloud's model, `z = <e_u, e_i>` without intercept: a factorisation machine in which every user has the
        cloud's vector. A device fine-tunes its row of `model.embeddings.tables.user.weight`."""
        data = data or self.data()
        shape = {"embedding_dim": self.items.shape[1], "hidden_sizes": [], "user_bias": False, "item_bias": False}
        model = CtrForCtrPrediction(data.config("deepfm", **shape, prior=None))
        users, items = (model.model.embeddings.tables[name].weight for name in ("user", "item"))
        order = [int(value) for value in data.vocabularies["item"].values]
        with torch.no_grad():
            users[1:] = torch.from_numpy(self.cloud_vector)
            items[1] = torch.from_numpy(self.items.mean(0))
            items[2:] = torch.from_numpy(self.items[order])
        return model


def draw_drifted_clicks(
    *,
    drift: float = 3.0,
    num_local: int = 100,
    num_users: int = 600,
    num_items: int = 600,
    num_test: int = 60,
    dim: int = 8,
    seed: int = 0,
) -> DriftedClicks:
    r"""
    Users who click by `sigmoid(<e_0 + d_u, e_i> + b_u)`.

    Items have the mean (1, 0, .., 0) and noise of sd 0.6, tastes d_u have sd 0.5 a dimension, e_0 is fixed. The level
    b_u has sd `drift` and says nothing of what a user prefers. A model without an intercept for each user can follow
    the level only along the mean item, and thereby forgets the preference: with `drift=3` and 100 rows a user, 60
    full-batch steps of 0.5 on e_u leave the ranking worse than the cloud's.

    Args:
        drift: sd of b_u in logits; 0 for none.
        num_local, num_test: rows of each user in `train` and `test`, all on different items.
        seed: of everything but e_0.

    Raises:
        ValueError: more rows than items, or a size below 1.
    """
    if min(num_local, num_users, num_test) < 1 or dim < 2 or drift < 0:
        raise ValueError("drifted-clicks: sizes must be at least 1, dim at least 2, and drift not negative.")
    if num_local + num_test > num_items:
        raise ValueError(f"drifted-clicks: {num_local} + {num_test} rows need as many items; there are {num_items}.")
    rng = np.random.default_rng(seed)
    cloud = _cloud_vector(dim)
    items = NOISE * rng.standard_normal((num_items, dim))
    items[:, 0] += 1
    users = cloud + TASTE * rng.standard_normal((num_users, dim))
    level = drift * rng.standard_normal(num_users)
    shown = rng.random((num_users, num_items)).argsort(axis=1)[:, : num_local + num_test]
    logits = np.einsum("ud,ukd->uk", users, items[shown]) + level[:, None]
    clicks = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    parts = {"train": slice(None, num_local), "test": slice(num_local, None)}
    splits = {name: _rows(shown[:, part], clicks[:, part]) for name, part in parts.items()}
    return DriftedClicks(items.astype(np.float32), cloud.astype(np.float32), DatasetDict(splits), level)


def _cloud_vector(dim: int) -> np.ndarray:
    """Partly against the mean item, so that most items are not clicked, the rest across it."""
    vector = np.random.default_rng(0).standard_normal(dim)
    vector[0] = 0.0
    vector *= np.sqrt(CLOUD_LENGTH**2 - CLOUD_LEVEL**2) / np.linalg.norm(vector)
    vector[0] = CLOUD_LEVEL
    return vector


def _rows(items: np.ndarray, clicks: np.ndarray) -> Dataset:
    users = np.repeat(np.arange(len(items)), items.shape[1])
    return Dataset.from_dict({"user": users, "item": items.ravel(), "label": clicks.ravel()})


__all__ = ["DriftedClicks", "draw_drifted_clicks"]
