"""AvatarParts: the classes, drawing in layers against whole renderings, masks that follow the picture, backgrounds."""

import socket
from itertools import combinations

import numpy as np
import pytest


pytest.importorskip("python_avatars")
pytest.importorskip("resvg_py")

from trainers.data import part_masks, read_avatar_parts  # noqa: E402
from trainers.data.avatar_classes import (  # noqa: E402
    CLASS_NAMES,
    CONCEPT_NAMES,
    CONCEPTS,
    PARTS,
    class_concept_matrix,
    concept_groups,
    worn_by,
)
from trainers.data.avatar_drawing import _rasterised, avatar_svg, draw, map_of_parts  # noqa: E402
from trainers.data.avatar_parts import avatar_rows  # noqa: E402


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("AvatarParts must not need a network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def rows():
    return list(avatar_rows("train", 0.8, 40, 64, 0))


def whole_avatar(label, *, skin="#EDB98A", **changed):
    """One rendering of everything that a person without a hat wears, not ours in layers."""
    worn = worn_by(label)
    chosen = {
        "top": worn["hair kind"],
        "hair_color": worn["hair colour"],
        "facial_hair": worn.get("beard", ""),
        "facial_hair_color": "#5A4A42",
        "accessory": worn.get("eyewear", ""),
        "mouth": worn["mouth"],
        "clothing": worn["clothing kind"],
        "clothing_color": worn["clothing colour"],
        "shirt_graphic": "DIAMOND",
        "skin_color": skin,
        "eyes": "DEFAULT",
        "eyebrows": "DEFAULT",
        "nose": "DEFAULT",
    }
    return np.asarray(_rasterised(avatar_svg(chosen | changed))).astype(int)


def iou(mask, other):
    return (mask & other).sum() / (mask | other).sum()


# --- classes ---------------------------------------------------------------------------------------------------------


def test_classes_and_concepts():
    matrix, groups = class_concept_matrix(), concept_groups()
    assert matrix.shape == (40, 44) and len(set(CONCEPT_NAMES)) == 44 and len(set(CLASS_NAMES)) == 40
    for name, members in groups.items():
        at_least = 0 if name in ("eyewear", "beard", "hat") else 1
        assert set(matrix[:, members].sum(axis=1)) <= {at_least, 1}, name
    assert matrix.sum(axis=0).min() >= 4, "a concept of few classes is hardly learnt"
    assert min((matrix[a] != matrix[b]).sum() for a, b in combinations(range(40), 2)) >= 6
    # every word of the table of classes is a concept
    assert matrix.sum() == sum(len(worn_by(label)) for label in range(40))


def test_hair_is_seen_under_every_hat():
    for label in range(40):
        seen = {part: (map_of_parts(label) == index + 1).mean() for index, part in enumerate(PARTS)}
        worn = {"hair", "mouth", "clothes"} | {part for part in ("eyewear", "beard", "hat") if part in worn_by(label)}
        assert {part for part, share in seen.items() if share} == worn, CLASS_NAMES[label]
        assert min(seen[part] for part in worn) > 0.003, (CLASS_NAMES[label], seen)


# --- drawing ---------------------------------------------------------------------------------------------------------

BARE_HEADED = [CLASS_NAMES.index(name) for name in ("Ada", "Mia", "Kira")]


@pytest.mark.parametrize("label", BARE_HEADED)
def test_layers_make_the_whole(label):
    ours = np.asarray(draw(label, "#EDB98A", "DEFAULT", "DEFAULT")).astype(int)
    difference = np.abs(ours - whole_avatar(label))
    # Thin lines only: layers smooth an edge twice, and some hair holds beard and glasses a unit further to one side.
    assert difference.mean() < 1 and (difference.max(axis=-1) > 32).mean() < 0.03


@pytest.mark.parametrize("label", BARE_HEADED)
def test_masks_are_where_a_change_of_the_part_shows(label):
    black, white = (whole_avatar(label, hair_color=colour) for colour in ("#000000", "#FFFFFF"))
    hair = np.abs(black - white)[..., :3].max(axis=-1) >= 128
    assert iou(map_of_parts(label) == PARTS.index("hair") + 1, hair) > 0.95
    bearded, shaved = (whole_avatar(label, facial_hair=kind) for kind in (worn_by(label)["beard"], ""))
    beard = np.abs(bearded - shaved)[..., :3].max(axis=-1) >= 40  # of what lies below, half the contrast or more
    assert iou(map_of_parts(label) == PARTS.index("beard") + 1, beard) > 0.85


def test_lenses_are_eyewear():
    label = CLASS_NAMES.index("Kira")
    eyewear = map_of_parts(label) == PARTS.index("eyewear") + 1
    columns = np.flatnonzero(eyewear.any(axis=0))
    middle = int(np.flatnonzero(eyewear.any(axis=1)).mean())
    left_lens = columns[0] + len(columns) // 4
    assert eyewear[middle, left_lens], "one looks through the glass, it is the glasses all the same"


# --- rows ------------------------------------------------------------------------------------------------------------


def test_masks_follow_the_picture(rows):
    """The clothes' colour is where the mask of the clothes is, after scale, shift, flip and rotation."""
    clothes, shares = PARTS.index("clothes") + 1, []
    for row in rows:
        worn = worn_by(row["label"])
        if worn["clothing kind"] in ("SHIRT_V_NECK", "COLLAR_SWEATER"):
            colour = np.array([int(worn["clothing colour"][i : i + 2], 16) for i in (1, 3, 5)])
            pixels = np.asarray(row["image"])[np.asarray(row["masks"]) == clothes].astype(int)
            shares.append((np.abs(pixels - colour).max(axis=1) < 24).mean())
    # Smoothed edges are of two colours, and dreadlocks are all edge.
    assert len(shares) >= 8 and np.mean(shares) > 0.85 and min(shares) > 0.6, shares


def test_what_a_row_holds(rows):
    assert [row["label"] for row in rows] == list(range(40))
    for row in rows:
        foreground, parts = np.asarray(row["foreground"]), np.asarray(row["masks"])
        assert foreground.shape == parts.shape == (64, 64) and row["image"].size == (64, 64)
        assert set(np.unique(foreground)) == {0, 255} and 0.15 < (foreground > 0).mean() < 0.9
        assert (foreground[parts > 0] > 0).mean() > 0.97, "parts belong to the figure"
        assert row["concepts"] == class_concept_matrix()[row["label"]].tolist()
        assert (part_masks(row["masks"], len(PARTS)).sum(axis=0) == (parts > 0)).all(), "parts do not overlap"


def test_backgrounds_alone_depend_on_the_correlation(rows):
    shifted = list(avatar_rows("train", 0.0, 40, 64, 0))
    for row, other in zip(rows, shifted):
        assert row["masks"].tobytes() == other["masks"].tobytes()
        inside = np.asarray(row["foreground"]) > 0
        inside &= np.asarray(row["masks"]) > 0
        if row["background"] == other["background"]:
            assert row["image"].tobytes() == other["image"].tobytes()
    own = [np.mean([row["background"] == row["label"] for row in some]) for some in (rows, shifted)]
    assert own[0] > 0.6 and own[1] < 0.15


def test_a_set_is_its_seed(rows, tmp_path):
    data = read_avatar_parts("train", num_examples=40, cache_dir=tmp_path)
    assert [image.tobytes() for image in data.dataset["image"]] == [row["image"].tobytes() for row in rows]
    again = read_avatar_parts("train", num_examples=40, cache_dir=tmp_path)
    assert again.dataset.cache_files == data.dataset.cache_files, "drawn once"
    other = read_avatar_parts("test", num_examples=1, cache_dir=tmp_path).dataset[0]
    assert other["label"] == 0 and other["image"].tobytes() != rows[0]["image"].tobytes()
    assert data.concept_groups.keys() == CONCEPTS.keys() and max(data.part_of_concept) == len(PARTS) - 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "dev"}, "no split 'dev'; choose from train"),
        ({"correlation": 1.5}, "correlation=1.5 is a probability"),
        ({"num_examples": 0}, "must be at least 1"),
        ({"image_size": 8}, "image_size=8"),
    ],
)
def test_bad_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        read_avatar_parts(**{"split": "train"} | changed)
