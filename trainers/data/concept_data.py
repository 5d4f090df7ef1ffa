"""What every concept data set carries beside its rows: names, groups, the class-concept matrix, what lies where."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image


SPLITS = ("train", "validation", "test")
NO_PART = 0  # in a map of parts: part i of `part_names` is i + 1

CONCEPT_FEATURES = Features(
    {
        "image": ImageFeature(),
        "label": Value("int64"),
        "concepts": List(Value("int64")),
        "masks": ImageFeature(),
        "foreground": ImageFeature(),
        "background": Value("int64"),
    }
)


@dataclass(frozen=True)
class ConceptData:
    """
    A data set with binary concepts, and what is needed to train, to intervene and to say where a concept is.

    Args:
        dataset (`Dataset`): columns `image`, `label`, `concepts` (M times 0 or 1) and, for generated data, `masks` (a
            map of parts, see [`part_masks`]), `foreground` (255 on the object) and `background` (the class whose
            background is shown).
        class_names, concept_names (`list[str]`): K and M of them.
        concept_groups (`dict[str, list[int]]`): concepts that one look settles together, for interventions; every
            concept is in exactly one.
        class_concept_matrix (`np.ndarray`): `(K, M)` uint8, the concepts of each class.
        part_names (`list[str]`): what masks, boxes or locations exist for.
        part_of_concept (`list[int]`): for each concept the index in `part_names`, -1 for the whole object.
    """

    dataset: Dataset
    class_names: list[str]
    concept_names: list[str]
    concept_groups: dict[str, list[int]]
    class_concept_matrix: np.ndarray
    part_names: list[str]
    part_of_concept: list[int]

    def __post_init__(self):
        classes, concepts = self.class_concept_matrix.shape
        grouped = sorted(index for group in self.concept_groups.values() for index in group)
        if (classes, concepts) != (len(self.class_names), len(self.concept_names)):
            raise ValueError(
                f"class_concept_matrix is {classes} x {concepts} for {len(self.class_names)} classes and "
                f"{len(self.concept_names)} concepts."
            )
        if grouped != list(range(concepts)) or len(self.part_of_concept) != concepts:
            raise ValueError("Every concept needs exactly one group and one entry of part_of_concept.")


def part_masks(map_of_parts: Image.Image | np.ndarray, num_parts: int) -> np.ndarray:
    """A row's `masks` taken apart: `(num_parts, H, W)` of bool. Parts do not overlap; what is hidden is in none."""
    return np.asarray(map_of_parts)[None] == np.arange(1, num_parts + 1)[:, None, None]


def background_class(rng: np.random.Generator, label: int, num_classes: int, correlation: float) -> int:
    """
    Whose background to show: the own class's with probability `correlation`, else that of a uniformly drawn class,
    which may be the own one again, as in Coop-CBM's generator.

    Takes the same draws whatever the correlation, so that sets that differ in it differ in nothing else.
    """
    is_own, other = rng.random() < correlation, int(rng.integers(num_classes))
    return label if is_own else other


def distinct_colours(count: int, seed: int) -> np.ndarray:
    """`(count, 3)` uint8: random colours, none within 40 of another, so that a class can own one."""
    rng, colours = np.random.default_rng(seed), []
    while len(colours) < count:
        colour = rng.integers(0, 256, size=3)
        if all(np.abs(colour - other).max() >= 40 for other in colours):
            colours.append(colour)
    return np.array(colours, dtype=np.uint8)


def require_split(name: str, split: str, correlation: float, num_examples: int) -> None:
    """Raise ValueError for a split, a probability or a size that no generated data set has."""
    if split not in SPLITS:
        raise ValueError(f"{name}: no split {split!r}; choose from {', '.join(SPLITS)}.")
    if not 0 <= correlation <= 1:
        raise ValueError(f"{name}: correlation={correlation} is a probability, between 0 and 1.")
    if num_examples < 1:
        raise ValueError(f"{name}: num_examples={num_examples} must be at least 1.")


def generated(
    rows: Callable[..., Iterator[dict[str, Any]]],
    arguments: Mapping[str, Any],
    *,
    version: int,
    packages: tuple[str, ...],
    cache_dir: str | os.PathLike | None,
) -> Dataset:
    """
    The rows of a generator, drawn once and then read from the cache of `datasets`.

    Args:
        rows: gives the rows from `arguments`, of which `source` (what is drawn from, not JSON) is not fingerprinted.
        version: of the drawing code; a change of it draws anew.
        packages: distributions whose version changes the pictures.
    """
    key = {name: value for name, value in arguments.items() if name != "source"}
    key |= {"rows": rows.__name__, "version": version, "packages": {name: metadata.version(name) for name in packages}}
    return Dataset.from_generator(
        rows,
        features=CONCEPT_FEATURES,
        cache_dir=cache_dir and str(cache_dir),
        gen_kwargs=dict(arguments),
        fingerprint=hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32],
    )


__all__ = [
    "CONCEPT_FEATURES",
    "NO_PART",
    "SPLITS",
    "ConceptData",
    "background_class",
    "distinct_colours",
    "generated",
    "part_masks",
    "require_split",
]
