"""StampBirds: photographic cut-outs of birds, mammals, flowers and fruit on textures that go with the kind."""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .concept_data import SPLITS, ConceptData, background_class, generated, require_split
from .debian import unpacked_package
from .documents import is_held_out


# Class -> folder in the package, and its concepts. Fish and insects have too few photographs to hold any out.
CLASSES = {
    "bird": ("animals/birds", ("feathers", "beak", "wings", "eyes")),
    "mammal": ("animals/mammals", ("fur or bare skin", "ears", "four limbs", "eyes")),
    "flower": ("plants/flowers", ("petals", "stamens", "part of a plant")),
    "fruit": ("food/fruit", ("peel", "edible flesh", "part of a plant")),
}
CONCEPT_GROUPS = {
    "surface": ("feathers", "fur or bare skin", "petals", "peel"),
    "head": ("beak", "ears", "eyes"),
    "limbs": ("wings", "four limbs"),
    "plant": ("stamens", "edible flesh", "part of a plant"),
}
# The background of each class: a texture of scikit-image, which is grey, and its colour.
TEXTURES = {
    "green grass": ("grass", (90, 160, 70)),
    "grey gravel": ("gravel", (150, 150, 160)),
    "red brick": ("brick", (190, 90, 70)),
    "straw": ("grass", (215, 190, 110)),
}
NOT_PHOTOGRAPHS = ("cartoon", "toys", "plastic")  # folders that are left out
DEFAULT_EXAMPLES = {"train": 1600, "validation": 200, "test": 400}
SCALES, MAX_DEGREES = (0.55, 0.95), 15.0
_VERSION = 1


def read_stamp_birds(
    split: str,
    *,
    correlation: float = 0.95,
    num_examples: int | None = None,
    image_size: int = 64,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
) -> ConceptData:
    """
    About 150 photographs of four kinds of things, cut out, on grass, gravel, brick and straw.

    Every class owns a texture, shown with probability `correlation`, else that of a uniformly drawn class; with 0.95
    in training and 0 at test, accuracy by (class, background) is worst-group accuracy in the manner of Waterbirds. A
    photograph falls by its name into one split, and its pictures differ in scale, place, flip and rotation. Few
    photographs are behind a test set, so intervals over pictures are too narrow.

    The concepts are those of a class, whether or not a photograph shows them, and lie somewhere on the object.

    Args:
        split: "train" (60 % of the photographs), "validation" (10 %) or "test" (30 %).
        num_examples: 1600, 200 and 400 if None; the classes take turns.
        image_size, seed, cache_dir: as in `read_avatar_parts`.

    Returns:
        All columns of [`ConceptData`], the single part being "object", its mask the cut-out's.

    Raises:
        ValueError: an unknown split, a correlation outside [0, 1], fewer than 1 example or 16 pixels.
        RuntimeError: the Debian package tuxpaint-stamps-default (161 MB, GPL-2) cannot be fetched.
        ImportError: scikit-image is not installed.
    """
    num_examples = DEFAULT_EXAMPLES.get(split, 1) if num_examples is None else num_examples
    require_split("stamp-birds", split, correlation, num_examples)
    if image_size < 16:
        raise ValueError(f"stamp-birds: image_size={image_size} shows nothing; use 64 or 96.")
    textures()  # an ImportError is the caller's, not the generator's
    arguments = {
        "source": str(stamps_folder(cache_dir)),
        "split": split,
        "correlation": float(correlation),
        "num_examples": num_examples,
        "image_size": image_size,
        "seed": seed,
    }
    names = [concept for group in CONCEPT_GROUPS.values() for concept in group]
    return ConceptData(
        dataset=generated(
            stamp_rows, arguments, version=_VERSION, packages=("pillow", "scikit-image"), cache_dir=cache_dir
        ),
        class_names=list(CLASSES),
        concept_names=names,
        concept_groups={group: [names.index(name) for name in members] for group, members in CONCEPT_GROUPS.items()},
        class_concept_matrix=_matrix(),
        part_names=["object"],
        part_of_concept=[0] * len(names),
    )


def stamps_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder of Tux Paint's stamps, fetched if need be; RuntimeError where that fails."""
    return unpacked_package(
        "tuxpaint-stamps-default",
        "usr/share/tuxpaint/stamps",
        cache_dir=cache_dir,
        instead="take avatar-parts, which needs no package of the system",
    )


def photographs(folder: str | os.PathLike, split: str) -> list[list[Path]]:
    """
    The photographs of each class in a split; a pure function of their names.

    Raises:
        ValueError: a class has none.
    """
    found = []
    for name, (subfolder, _) in CLASSES.items():
        paths = sorted(
            path
            for path in (Path(folder) / subfolder).rglob("*.png")
            if not set(path.relative_to(folder).parts) & set(NOT_PHOTOGRAPHS)
        )
        own = [path for path in paths if _split_of(path) == split]
        if not own:
            raise ValueError(f"stamp-birds: no photograph of a {name} for {split} below {subfolder}.")
        found.append(own)
    return found


@lru_cache(maxsize=1)
def textures() -> dict[str, np.ndarray]:
    """The backgrounds by name, `(512, 512, 3)` uint8, from the wheel of scikit-image; nothing is fetched."""
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError("stamp-birds needs scikit-image: `pip install 'hf-sigma[vision]'`.") from error
    drawn = {}
    for name, (texture, colour) in TEXTURES.items():
        grey = getattr(data, texture)().astype(np.float64)
        shaded = grey[..., None] / grey.mean() * np.array(colour)
        drawn[name] = np.clip(shaded, 0, 255).astype(np.uint8)
    return drawn


def stamp_rows(
    source: str, split: str, correlation: float, num_examples: int, image_size: int, seed: int
) -> Iterator[dict[str, Any]]:
    """The rows of a set, one after the other; see [`read_stamp_birds`]. `source` is the folder of the stamps."""
    of_class, concepts, backgrounds = photographs(source, split), _matrix().tolist(), list(textures().values())
    for index in range(num_examples):
        label = index % len(CLASSES)
        stream = (seed, SPLITS.index(split), index)
        shown = background_class(np.random.default_rng((*stream, 1)), label, len(CLASSES), correlation)
        rng = np.random.default_rng((*stream, 0))
        path = of_class[label][int(rng.integers(len(of_class[label])))]
        picture = _picture(_cut_out(str(path)), _window(backgrounds[shown], image_size, rng), rng)
        yield {"label": label, "concepts": concepts[label], "background": shown} | picture


def _window(texture: np.ndarray, size: int, rng: np.random.Generator) -> Image.Image:
    side = min(4 * size, *texture.shape[:2])
    top, left = rng.integers(0, min(texture.shape[:2]) - side + 1, size=2)
    return Image.fromarray(texture[top : top + side, left : left + side]).resize((size, size))


def _picture(cut_out: Image.Image, background: Image.Image, rng: np.random.Generator) -> dict[str, Image.Image]:
    size = background.width
    if rng.random() < 0.5:
        cut_out = cut_out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cut_out = cut_out.rotate(rng.uniform(-MAX_DEGREES, MAX_DEGREES), Image.Resampling.BICUBIC, expand=True)
    cut_out = cut_out.crop(cut_out.getchannel("A").getbbox())
    longest = size * rng.uniform(*SCALES)
    ratio = longest / max(cut_out.size)
    cut_out = cut_out.resize([max(1, round(side * ratio)) for side in cut_out.size], Image.Resampling.BOX)
    place = tuple(int(rng.integers(0, size - side + 1)) for side in cut_out.size)
    layer = Image.new("RGBA", (size, size))
    layer.paste(cut_out, place)
    image = background.convert("RGBA")
    image.alpha_composite(layer)
    seen = layer.getchannel("A").point(lambda value: value >= 128)
    return {
        "image": image.convert("RGB"),
        "masks": seen,
        "foreground": seen.point(lambda value: 255 * value),
    }


@lru_cache(maxsize=512)
def _cut_out(path: str) -> Image.Image:
    """A stamp as RGBA, no larger than 256 pixels: half of the package are larger than any picture made of them."""
    stamp = Image.open(path).convert("RGBA")
    stamp = stamp.crop(stamp.getchannel("A").getbbox())
    stamp.thumbnail((256, 256), Image.Resampling.BOX)
    return stamp


def _split_of(path: Path) -> str:
    # A larger fraction holds out a superset, so what is held out and not tested validates.
    if not is_held_out(path.name, 0.4):
        return "train"
    return "test" if is_held_out(path.name, 0.3) else "validation"


def _matrix() -> np.ndarray:
    names = [concept for group in CONCEPT_GROUPS.values() for concept in group]
    return np.array([[name in concepts for name in names] for _, concepts in CLASSES.values()], dtype=np.uint8)


__all__ = ["CLASSES", "TEXTURES", "photographs", "read_stamp_birds", "stamp_rows", "stamps_folder", "textures"]
