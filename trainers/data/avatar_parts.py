"""AvatarParts: drawn people whose attributes are concepts, with exact masks and a background that can mislead."""

import os
from collections.abc import Iterator
from math import cos, radians, sin
from typing import Any

import numpy as np
from PIL import Image

from .avatar_classes import CLASS_NAMES, CONCEPT_NAMES, PART_OF_GROUP, PARTS, class_concept_matrix, concept_groups
from .avatar_drawing import CANVAS, EYEBROWS, EYES, SKIN_COLOURS, draw, map_of_parts, require_drawing
from .concept_data import SPLITS, ConceptData, background_class, distinct_colours, generated, require_split


DEFAULT_EXAMPLES = {"train": 4000, "validation": 400, "test": 800}
BACKGROUND_SEED = 5  # of the colours that the classes own, the same in every set
SCALES, MAX_SHIFT, MAX_DEGREES = (0.7, 1.0), 0.06, 12.0
_VERSION = 1


def read_avatar_parts(
    split: str,
    *,
    correlation: float = 0.8,
    num_examples: int | None = None,
    image_size: int = 64,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
) -> ConceptData:
    """
    Pictures of 40 people. A class is a fixed choice of hair, eyewear, beard, hat, mouth and clothes, which are the 44
    concepts; eyes, eyebrows, skin, scale, place, flip and a small rotation vary and mean nothing.

    Every class owns a background colour, shown with probability `correlation`, else that of a uniformly drawn class:
    0.8 for training and in-distribution tests, 0.3 and 0.0 for tests under shift. Sets that differ in `correlation`
    only show the same figures, so that a drop in accuracy is paired.

    Args:
        split: "train", "validation" or "test"; they are drawn from separate streams.
        num_examples: 4000, 400 and 800 if None; the classes take turns, so any multiple of 40 is balanced.
        image_size: of the square pictures, in pixels; 64 and 96 are meant.
        seed: of everything but the classes and their colours.
        cache_dir: where drawn sets stay; datasets' own cache folder if None.

    Returns:
        All columns of [`ConceptData`]; masks hold what is seen of clothes, mouth, hair, beard, eyewear and hat.

    Raises:
        ValueError: an unknown split, a correlation outside [0, 1], fewer than 1 example or 16 pixels.
        ImportError: the extra `vision` is not installed.
    """
    num_examples = DEFAULT_EXAMPLES.get(split, 1) if num_examples is None else num_examples
    require_split("avatar-parts", split, correlation, num_examples)
    if image_size < 16:
        raise ValueError(f"avatar-parts: image_size={image_size} shows nothing; use 64 or 96.")
    require_drawing()
    arguments = {
        "split": split,
        "correlation": float(correlation),
        "num_examples": num_examples,
        "image_size": image_size,
        "seed": seed,
    }
    groups = concept_groups()
    part_of = {index: PARTS.index(PART_OF_GROUP[group]) for group, members in groups.items() for index in members}
    return ConceptData(
        dataset=generated(
            avatar_rows,
            arguments,
            version=_VERSION,
            packages=("python_avatars", "resvg_py", "pillow"),
            cache_dir=cache_dir,
        ),
        class_names=list(CLASS_NAMES),
        concept_names=list(CONCEPT_NAMES),
        concept_groups=groups,
        class_concept_matrix=class_concept_matrix(),
        part_names=list(PARTS),
        part_of_concept=[part_of[index] for index in range(len(CONCEPT_NAMES))],
    )


def avatar_rows(
    split: str, correlation: float, num_examples: int, image_size: int, seed: int
) -> Iterator[dict[str, Any]]:
    """The rows of a set, one after the other; see [`read_avatar_parts`]."""
    concepts = class_concept_matrix().tolist()
    colours = distinct_colours(len(CLASS_NAMES), BACKGROUND_SEED)
    for index in range(num_examples):
        label = index % len(CLASS_NAMES)
        stream = (seed, SPLITS.index(split), index)
        background = background_class(np.random.default_rng((*stream, 1)), label, len(CLASS_NAMES), correlation)
        picture = _picture(label, tuple(colours[background].tolist()), image_size, np.random.default_rng((*stream, 0)))
        yield {"label": label, "concepts": concepts[label], "background": background} | picture


def _picture(label: int, colour: tuple[int, int, int], size: int, rng: np.random.Generator) -> dict[str, Image.Image]:
    skin, eyes, eyebrows = (str(rng.choice(names)) for names in (SKIN_COLOURS, EYES, EYEBROWS))
    scale, degrees = rng.uniform(*SCALES), rng.uniform(-MAX_DEGREES, MAX_DEGREES)
    room = (1 - scale) / 2 + MAX_SHIFT
    shift, flip = rng.uniform(-room, room, size=2), rng.random() < 0.5

    # Twice as large as asked for, then averaged: resvg has smoothed the edges, the transform would roughen them.
    inverse = _inverse_affine(2 * size, scale, degrees, shift, flip)
    cut_out = draw(label, skin, eyes, eyebrows).transform(
        (2 * size, 2 * size), Image.Transform.AFFINE, inverse, resample=Image.Resampling.BILINEAR
    )
    image = Image.new("RGBA", cut_out.size, (*colour, 255))
    image.alpha_composite(cut_out)
    masks = Image.fromarray(map_of_parts(label)).transform(
        (size, size), Image.Transform.AFFINE, _inverse_affine(size, scale, degrees, shift, flip)
    )
    opacity = cut_out.getchannel("A").reduce(2)
    return {
        "image": image.reduce(2).convert("RGB"),
        "masks": masks,
        "foreground": opacity.point(lambda value: 255 * (value >= 128)),
    }


def _inverse_affine(
    size: int, scale: float, degrees: float, shift: np.ndarray, flip: bool
) -> tuple[float, float, float, float, float, float]:
    """Where a pixel of the `size` x `size` picture comes from on the canvas, as PIL's transform wants it.

    `scale` 1 fills the picture with the canvas; `shift` is in pictures.
    """
    per_pixel = CANVAS / (size * scale)
    turn = radians(degrees)
    mirror = -1 if flip else 1
    a, b = mirror * per_pixel * cos(turn), mirror * per_pixel * sin(turn)
    d, e = -per_pixel * sin(turn), per_pixel * cos(turn)
    x, y = size * (0.5 + shift[0]), size * (0.5 + shift[1])  # where the canvas' centre goes
    return a, b, CANVAS / 2 - a * x - b * y, d, e, CANVAS / 2 - d * x - e * y


__all__ = ["avatar_rows", "read_avatar_parts"]
