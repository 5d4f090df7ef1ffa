"""CUB-200-2011 and TravelingBirds from a local folder, with class-level concepts as Koh et al. made them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from .concept_data import ConceptData


FILES = {
    "images": "images.txt",
    "labels": "image_class_labels.txt",
    "classes": "classes.txt",
    "split": "train_test_split.txt",
    "boxes": "bounding_boxes.txt",
    "attributes": "attributes/image_attribute_labels.txt",
    "parts": "parts/parts.txt",
    "locations": "parts/part_locs.txt",
}
MIN_CLASS_COUNT = 10  # Koh et al.: 112 of the 312 attributes are left
NOT_VISIBLE = 1  # of the four certainties
# Where an attribute group is looked for, in the order of the parts; groups not named are about the whole bird.
PARTS_OF_GROUP = {
    "bill": ("beak",),
    "breast": ("breast",),
    "back": ("back",),
    "upperparts": ("back",),
    "underparts": ("belly",),
    "belly": ("belly",),
    "throat": ("throat",),
    "eye": ("left eye", "right eye"),
    "head": ("crown",),
    "crown": ("crown",),
    "forehead": ("forehead",),
    "nape": ("nape",),
    "wing": ("left wing", "right wing"),
    "tail": ("tail",),
    "upper_tail": ("tail",),
    "under_tail": ("tail",),
    "leg": ("left leg", "right leg"),
}
# What stands for a part with a left and a right side.
MERGED_PARTS = ("eye", "leg", "wing")

Background = Literal["fixed", "black", "random"]

_FEATURES = Features(
    {
        "image": ImageFeature(),
        "label": Value("int64"),
        "concepts": List(Value("int64")),
        "instance_concepts": List(Value("int64")),
        "box": List(Value("float64")),
        "part_locations": List(List(Value("float64"))),
        "source": Value("string"),
    }
)


@dataclass(frozen=True)
class _Tables:
    """The text files of the folder, images in the order of their ids."""

    files: list[str]
    labels: np.ndarray  # (images,)
    is_train: np.ndarray  # (images,)
    boxes: np.ndarray  # (images, 4): x, y, width, height
    present: np.ndarray  # (images, attributes), 0 or 1
    certainty: np.ndarray  # (images, attributes), 1 to 4
    locations: np.ndarray  # (images, parts, 3): x, y, visible
    class_names: list[str]
    attribute_names: list[str]
    part_names: list[str]


def read_cub(
    folder: str | os.PathLike,
    split: Literal["train", "test"],
    *,
    min_class_count: int = MIN_CLASS_COUNT,
    image_folder: str | os.PathLike | None = None,
) -> ConceptData:
    """
    A split of CUB-200-2011 with class-level concepts.

    A class has an attribute if most of its training images that show it say so, ties counting as yes; a "no" that was
    marked "not visible" is no vote. Attributes of fewer than `min_class_count` classes are dropped. With 10, that
    leaves Koh et al.'s 112 concepts (their code votes over a part of the training set; a tie may fall otherwise).

    Args:
        folder: `CUB_200_2011`, as the archive unpacks it; attributes.txt is found in it or beside it.
        split: the official one.
        image_folder: take the pictures from there, `<class>/<name>.jpg`, instead of from `images`.

    Returns:
        Columns `image`, `label`, `concepts` (of the class), `instance_concepts` (as annotated), `box` (x, y, width,
        height of the bird in pixels), `part_locations` (x, y and 1 if visible, for each of the 15 parts in the order
        of parts.txt), `source` ("001.Black_footed_Albatross/..."). `part_names` merges left and right:
        [`located_parts`] gives the points that belong to each.

    Raises:
        FileNotFoundError: files of the layout, or pictures, are missing; the message lists them.
        ValueError: an unknown split, a file that does not fit the others, or no attribute left.
    """
    if split not in ("train", "test"):
        raise ValueError(f"cub: no split {split!r}; the official ones are train and test.")
    folder = Path(folder).expanduser()
    tables = _read_tables(folder)
    matrix = class_attributes(tables.present, tables.certainty, tables.labels, tables.is_train)
    kept = np.flatnonzero(matrix.sum(axis=0) >= min_class_count)
    if not len(kept):
        raise ValueError(
            f"cub: no attribute belongs to {min_class_count} of the {len(tables.class_names)} classes: "
            "lower min_class_count."
        )
    matrix = matrix[:, kept]
    names = [tables.attribute_names[index] for index in kept]
    groups, part_names = _groups(names), located_parts(tables.part_names)
    rows = np.flatnonzero(tables.is_train if split == "train" else ~tables.is_train)
    pictures = Path(image_folder).expanduser() if image_folder is not None else folder / "images"
    return ConceptData(
        dataset=_dataset(tables, rows, kept, matrix, pictures),
        class_names=tables.class_names,
        concept_names=[readable(name) for name in names],
        concept_groups=groups,
        class_concept_matrix=matrix,
        part_names=list(part_names),
        part_of_concept=[_part_of(name, list(part_names)) for name in names],
    )


def _dataset(tables: _Tables, rows: np.ndarray, kept: np.ndarray, matrix: np.ndarray, pictures: Path) -> Dataset:
    """The images `rows` with the attributes `kept`, whose class-level values are `matrix`."""
    files = [tables.files[row] for row in rows]
    _require_pictures(pictures, files)
    return Dataset.from_dict(
        {
            "image": [str(pictures / file) for file in files],
            "label": tables.labels[rows].tolist(),
            "concepts": matrix[tables.labels[rows]].tolist(),
            "instance_concepts": tables.present[rows][:, kept].tolist(),
            "box": tables.boxes[rows].tolist(),
            "part_locations": tables.locations[rows].tolist(),
            "source": files,
        },
        features=_FEATURES,
    )


def read_traveling_birds(
    folder: str | os.PathLike,
    cub_folder: str | os.PathLike,
    split: Literal["train", "test"],
    *,
    background: Background = "fixed",
    min_class_count: int = MIN_CLASS_COUNT,
) -> ConceptData:
    """
    TravelingBirds: CUB's birds before other backgrounds, everything else as [`read_cub`].

    "fixed" ties each class to one kind of place in training and to another class's at test; "black" and "random" are
    the companions.

    Args:
        folder: holds `CUB_fixed`, `CUB_black` or `CUB_random`, each with `train` and `test` and in them a folder a
            class, as they are distributed.
        cub_folder: `CUB_200_2011`, for labels, attributes and parts; its `images` are not read.
    """
    pictures = Path(folder).expanduser() / f"CUB_{background}" / split
    if not pictures.is_dir():
        raise FileNotFoundError(
            f"traveling-birds: no folder {pictures.relative_to(pictures.parents[1])} in {pictures.parents[1]}. Unpack "
            "CUB_fixed (or CUB_black, CUB_random) there; it has train and test with a folder a class in each."
        )
    return read_cub(cub_folder, split, min_class_count=min_class_count, image_folder=pictures)


def class_attributes(present: np.ndarray, certainty: np.ndarray, labels: np.ndarray, voters: np.ndarray) -> np.ndarray:
    """
    The majority vote of Koh et al.: `(classes, attributes)` uint8 from `(images, attributes)` annotations.

    A "no" with certainty 1, "not visible", is no vote; an attribute with as many "yes" as "no", even none, counts.
    """
    num_classes = int(labels.max()) + 1
    yes, no = (np.zeros((num_classes, present.shape[1]), dtype=np.int64) for _ in range(2))
    np.add.at(yes, labels[voters], (present[voters] == 1).astype(np.int64))
    np.add.at(no, labels[voters], ((present[voters] == 0) & (certainty[voters] != NOT_VISIBLE)).astype(np.int64))
    return (yes >= no).astype(np.uint8)


def located_parts(part_names: list[str]) -> dict[str, list[int]]:
    """The parts by name, left and right merged ("wing"), each with its places in `part_locations`."""
    merged: dict[str, list[int]] = {}
    for index, name in enumerate(part_names):
        side, _, rest = name.partition(" ")
        merged.setdefault(rest if side in ("left", "right") and rest in MERGED_PARTS else name, []).append(index)
    return merged


def readable(attribute: str) -> str:
    """ "has_bill_shape::curved_(up_or_down)" as "bill shape: curved (up or down)"."""
    group, _, value = attribute.partition("::")
    return f"{group.removeprefix('has_').replace('_', ' ')}: {value.replace('_', ' ')}"


def _groups(names: list[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name.partition("::")[0].removeprefix("has_").replace("_", " "), []).append(index)
    return groups


def _part_of(attribute: str, part_names: list[str]) -> int:
    group = attribute.partition("::")[0].removeprefix("has_")
    for prefix in sorted(PARTS_OF_GROUP, key=len, reverse=True):
        if group == prefix or group.startswith(f"{prefix}_"):
            part = PARTS_OF_GROUP[prefix][0]
            part = part.partition(" ")[2] or part  # "left wing" -> "wing"
            return part_names.index(part) if part in part_names else -1
    return -1


def _read_tables(folder: Path) -> _Tables:
    missing = [name for name in FILES.values() if not (folder / name).is_file()]
    names = [path for path in (folder / "attributes.txt", folder.parent / "attributes.txt") if path.is_file()]
    if not names:
        missing.append("attributes.txt (here or one folder up)")
    if missing:
        raise FileNotFoundError(
            f"cub: {folder} lacks {', '.join(missing)}. Give the folder CUB_200_2011 of the unpacked archive."
        )
    ids, files = zip(*_named(folder / FILES["images"]))
    position = {image: index for index, image in enumerate(ids)}
    labels, is_train, boxes = (_by_image(folder / FILES[name], position) for name in ("labels", "split", "boxes"))
    attribute_names, part_names = ([name for _, name in _named(path)] for path in (names[0], folder / FILES["parts"]))
    attributes = _by_image_and_item(folder / FILES["attributes"], position, len(attribute_names), 2)
    return _Tables(
        files=list(files),
        labels=labels[:, 0].astype(np.int64) - 1,
        is_train=is_train[:, 0] == 1,
        boxes=boxes,
        present=attributes[..., 0].astype(np.int64),
        certainty=attributes[..., 1].astype(np.int64),
        locations=_by_image_and_item(folder / FILES["locations"], position, len(part_names), 3),
        class_names=[name.partition(".")[2].replace("_", " ") for _, name in _named(folder / FILES["classes"])],
        attribute_names=attribute_names,
        part_names=part_names,
    )


def _named(path: Path) -> list[tuple[int, str]]:
    rows = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return [(int(index), name.strip()) for index, name in rows]


def _by_image(path: Path, position: dict[int, int]) -> np.ndarray:
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    table = np.full((len(position), len(rows[0]) - 1 if rows else 0), np.nan)
    for image, *values in rows:
        if int(image) in position:
            table[position[int(image)]] = [float(value) for value in values]
    return _complete(table, path)


def _by_image_and_item(path: Path, position: dict[int, int], items: int, columns: int) -> np.ndarray:
    table = np.full((len(position), items, columns), np.nan)
    with path.open() as lines:
        for line in lines:
            # Some lines of the archive carry extra columns at the end.
            image, item, *values = line.split()[: 2 + columns] or ("0", "0")
            if int(image) in position and 1 <= int(item) <= items:
                table[position[int(image)], int(item) - 1] = [float(value) for value in values]
    return _complete(table, path)


def _complete(table: np.ndarray, path: Path) -> np.ndarray:
    absent = np.isnan(table).reshape(len(table), -1).any(axis=1)
    if not table.size or absent.any():
        raise ValueError(f"cub: {path.name} says nothing, or not enough, about {int(absent.sum())} images.")
    return table


def _require_pictures(folder: Path, files: list[str]) -> None:
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"cub: {len(missing)} of {len(files)} pictures are missing in {folder}, the first being {missing[0]}."
        )


__all__ = ["class_attributes", "located_parts", "read_cub", "read_traveling_birds", "readable"]
