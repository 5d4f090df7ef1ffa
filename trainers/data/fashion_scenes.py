"""FashionScenes: four photographed pieces of clothing on a grid, on a background that goes with the set of four."""

import gzip
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from .concept_data import SPLITS, ConceptData, background_class, distinct_colours, generated, require_split
from .debian import unpacked_package


FASHION_NAMES = tuple("T-shirt,trousers,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(","))
FASHION_GROUPS = {"tops": [0, 2, 4, 6], "long garments": [1, 3], "footwear": [5, 7, 9], "bags": [8]}
DIGIT_NAMES = tuple(f"digit {digit}" for digit in range(10))
DIGIT_GROUPS = {"low digits": [0, 1, 2, 3, 4], "high digits": [5, 6, 7, 8, 9]}

DEFAULT_EXAMPLES = {"train": 2000, "validation": 240, "test": 480}
CELLS = 3  # a side
NUM_CLASSES = 24
BACKGROUND_SEED = 11  # of the colours that the classes own
_VERSION = 1

Items = Literal["fashion-mnist", "digits"]


def read_fashion_scenes(
    split: str,
    *,
    items: Items = "fashion-mnist",
    correlation: float = 0.8,
    num_examples: int | None = None,
    image_size: int = 64,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
) -> ConceptData:
    """
    Scenes of four items out of ten kinds in random cells of a 3 x 3 grid; the class is which four, the concepts are
    the kinds. Tints are random. Backgrounds as in `read_avatar_parts`: the class's own with probability `correlation`.

    Args:
        split: "train", "validation" or "test". Training scenes are made of other pictures of items than the rest:
            Fashion-MNIST's own training and test sets, or the first 1,300 and the other digits.
        items: "fashion-mnist" from the Debian package dataset-fashion-mnist (31 MB, fetched once), or scikit-learn's
            8 x 8 "digits", which need no network.
        num_examples: 2000, 240 and 480 if None; multiples of 24 are balanced.
        image_size, seed, cache_dir: as in `read_avatar_parts`.

    Returns:
        All columns of [`ConceptData`]; a kind is its own part, with exact masks.

    Raises:
        ValueError: an unknown split or kind of items, a correlation outside [0, 1], fewer than 1 example or 24 pixels.
        RuntimeError, ImportError: the Debian package cannot be fetched; "digits" without scikit-learn.
    """
    num_examples = DEFAULT_EXAMPLES.get(split, 1) if num_examples is None else num_examples
    require_split("fashion-scenes", split, correlation, num_examples)
    if items not in ("fashion-mnist", "digits"):
        raise ValueError(f"fashion-scenes: items={items!r}; choose fashion-mnist or digits.")
    if image_size < 8 * CELLS:
        raise ValueError(f"fashion-scenes: image_size={image_size}; a cell needs 8 pixels, so 24 at least.")
    subsets = class_subsets()
    if items == "fashion-mnist":
        names, groups = FASHION_NAMES, FASHION_GROUPS
        source, packages = str(fashion_folder(cache_dir)), ("pillow",)
    else:
        _digits(split)
        names, groups, source, packages = DIGIT_NAMES, DIGIT_GROUPS, None, ("pillow", "scikit-learn")
    arguments = {
        "items": items,
        "source": source,
        "split": split,
        "correlation": float(correlation),
        "num_examples": num_examples,
        "image_size": image_size,
        "seed": seed,
    }
    return ConceptData(
        dataset=generated(scene_rows, arguments, version=_VERSION, packages=packages, cache_dir=cache_dir),
        class_names=[" + ".join(names[kind] for kind in subset) for subset in subsets],
        concept_names=list(names),
        concept_groups={name: list(members) for name, members in groups.items()},
        class_concept_matrix=_matrix(subsets),
        part_names=list(names),
        part_of_concept=list(range(len(names))),
    )


def class_subsets() -> list[tuple[int, ...]]:
    """24 sets of 4 out of 10 kinds, any two of which share at most three; every kind is in 9 to 11 of them."""
    blocks = ((0, 1, 3, 7), (0, 2, 5, 6), (0, 1, 5, 8))
    turned = (tuple(sorted((kind + turn) % 10 for kind in block)) for block in blocks for turn in range(10))
    return list(islice(turned, NUM_CLASSES))


def fashion_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder of Fashion-MNIST's four idx files, fetched if need be; RuntimeError where that fails."""
    return unpacked_package(
        "dataset-fashion-mnist",
        "usr/share/datasets/fashion-mnist",
        cache_dir=cache_dir,
        instead='take items="digits", which need nothing',
    )


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """The array of bytes in a gzipped idx file, in the shape that its header gives; ValueError if they disagree."""
    content = gzip.decompress(Path(path).read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{Path(path).name}: not an idx file of bytes.")
    dimensions = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=dimensions, offset=4)
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions)
    if values.size != shape.prod():
        raise ValueError(f"{Path(path).name}: {values.size} values for the shape {shape.tolist()}; fetch it again.")
    return values.reshape(shape)


def scene_rows(
    items: Items,
    source: str | None,
    split: str,
    correlation: float,
    num_examples: int,
    image_size: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """The rows of a set, one after the other; see [`read_fashion_scenes`]. `source` is the folder of the idx files."""
    pictures, kinds = _fashion(source, split) if items == "fashion-mnist" else _digits(split)
    of_kind = [np.flatnonzero(kinds == kind) for kind in range(10)]
    subsets, colours = class_subsets(), distinct_colours(NUM_CLASSES, BACKGROUND_SEED)
    concepts = _matrix(subsets).tolist()
    for index in range(num_examples):
        label = index % NUM_CLASSES
        stream = (seed, SPLITS.index(split), index)
        background = background_class(np.random.default_rng((*stream, 1)), label, NUM_CLASSES, correlation)
        rng = np.random.default_rng((*stream, 0))
        chosen = {kind: pictures[rng.choice(of_kind[kind])] for kind in subsets[label]}
        scene = _scene(chosen, colours[background], image_size, rng)
        yield {"label": label, "concepts": concepts[label], "background": background} | scene


def _scene(
    chosen: dict[int, np.ndarray], colour: np.ndarray, size: int, rng: np.random.Generator
) -> dict[str, Image.Image]:
    cell = size // CELLS
    image = np.broadcast_to(colour.astype(np.float64), (size, size, 3)).copy()
    masks = np.zeros((size, size), dtype=np.uint8)
    places = rng.permutation(CELLS * CELLS)[: len(chosen)]
    for place, (kind, picture) in zip(places, chosen.items()):
        top, left = (place // CELLS) * cell, (place % CELLS) * cell
        here = np.s_[top : top + cell, left : left + cell]
        grey = np.asarray(Image.fromarray(picture).resize((cell, cell), Image.Resampling.BOX)) / 255
        opacity = np.clip(4 * grey, 0, 1)[..., None]  # items are photographed on black
        tint = rng.uniform(80, 255, size=3)
        image[here] = opacity * grey[..., None] * tint + (1 - opacity) * image[here]
        masks[here][opacity[..., 0] >= 0.5] = kind + 1
    return {
        "image": Image.fromarray(image.round().astype(np.uint8)),
        "masks": Image.fromarray(masks),
        "foreground": Image.fromarray(255 * (masks > 0).astype(np.uint8)),
    }


def _matrix(subsets: list[tuple[int, ...]]) -> np.ndarray:
    return np.array([[kind in subset for kind in range(10)] for subset in subsets], dtype=np.uint8)


@lru_cache(maxsize=2)
def _fashion(folder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    part = "train" if split == "train" else "t10k"
    images, kinds = (
        read_idx(Path(folder) / f"{part}-{content}-ubyte.gz") for content in ("images-idx3", "labels-idx1")
    )
    half = len(images) // 2  # of the test set: its first half validates
    keep = {"train": np.s_[:], "validation": np.s_[:half], "test": np.s_[half:]}[split]
    return images[keep], kinds[keep]


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("items='digits' needs scikit-learn: `pip install 'hf-sigma[vision]'`.") from error
    digits = load_digits()
    keep = {"train": np.s_[:1300], "validation": np.s_[1300:1500], "test": np.s_[1500:]}[split]
    return (digits.images[keep] * (255 / 16)).astype(np.uint8), digits.target[keep]


__all__ = [
    "DIGIT_NAMES",
    "FASHION_NAMES",
    "class_subsets",
    "fashion_folder",
    "read_fashion_scenes",
    "read_idx",
    "scene_rows",
]
