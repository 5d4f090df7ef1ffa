"""CUB-200-2011's and TravelingBirds' layouts, as tiny folders of the same files."""

import numpy as np
import pytest
from PIL import Image

from trainers.data import read_cub, read_traveling_birds
from trainers.data.cub import class_attributes, located_parts


ATTRIBUTES = (
    "has_bill_shape::curved_(up_or_down)",
    "has_bill_shape::dagger",
    "has_wing_color::blue",
    "has_size::small_(5_-_9_in)",
)
PARTS = ("back", "beak", "left wing", "right wing", "tail")
CLASSES = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
NUM_IMAGES = 8  # four a class: the first three to train on


def present(image, attribute):
    """Class 0 has the first attribute, class 1 the second, both the third; nobody the last."""
    return int(attribute == image % 2 or attribute == 2)


@pytest.fixture
def cub(tmp_path):
    folder = tmp_path / "CUB_200_2011"
    (folder / "attributes").mkdir(parents=True)
    (folder / "parts").mkdir()
    files = [f"{CLASSES[i % 2]}/bird_{i}.jpg" for i in range(NUM_IMAGES)]
    lines = {
        "images.txt": [f"{i + 1} {file}" for i, file in enumerate(files)],
        "image_class_labels.txt": [f"{i + 1} {i % 2 + 1}" for i in range(NUM_IMAGES)],
        "classes.txt": [f"{k + 1} {name}" for k, name in enumerate(CLASSES)],
        "train_test_split.txt": [f"{i + 1} {int(i < 6)}" for i in range(NUM_IMAGES)],
        "bounding_boxes.txt": [f"{i + 1} {i}.0 2.0 30.0 20.0" for i in range(NUM_IMAGES)],
        "parts/parts.txt": [f"{p + 1} {name}" for p, name in enumerate(PARTS)],
        "parts/part_locs.txt": [
            f"{i + 1} {p + 1} {10.0 * p} {5.0 + i} {int(p != 4)}" for i in range(NUM_IMAGES) for p in range(len(PARTS))
        ],
        "attributes/image_attribute_labels.txt": [
            # the archive has lines with stray columns
            f"{i + 1} {a + 1} {present(i, a)} 4 2.5" + (" 0 0" if (i, a) == (3, 1) else "")
            for i in range(NUM_IMAGES)
            for a in range(len(ATTRIBUTES))
        ],
    }
    for name, content in lines.items():
        (folder / name).write_text("\n".join(content) + "\n")
    (tmp_path / "attributes.txt").write_text("".join(f"{a + 1} {name}\n" for a, name in enumerate(ATTRIBUTES)))
    put_pictures(folder / "images", files, 0)
    return folder


def put_pictures(folder, files, grey):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 30), grey).save(folder / file)


def test_a_split(cub):
    train, test = (read_cub(cub, split, min_class_count=1) for split in ("train", "test"))
    assert len(train.dataset) == 6 and len(test.dataset) == 2
    assert train.class_names == ["Black footed Albatross", "Laysan Albatross"]
    # the last attribute belongs to no class and is dropped
    assert train.concept_names == ["bill shape: curved (up or down)", "bill shape: dagger", "wing color: blue"]
    assert train.class_concept_matrix.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert train.concept_groups == {"bill shape": [0, 1], "wing color": [2]}
    assert train.part_names == ["back", "beak", "wing", "tail"] and train.part_of_concept == [1, 1, 2]
    row = test.dataset[1]
    assert (row["label"], row["concepts"], row["instance_concepts"]) == (1, [0, 1, 1], [0, 1, 1])
    assert row["box"] == [7.0, 2.0, 30.0, 20.0] and row["part_locations"][1] == [10.0, 12.0, 1.0]
    assert row["part_locations"][4][2] == 0.0 and row["image"].size == (40, 30)
    assert row["source"] == "002.Laysan_Albatross/bird_7.jpg"


def test_attributes_of_few_classes_are_dropped(cub):
    assert read_cub(cub, "train", min_class_count=2).concept_names == ["wing color: blue"]
    with pytest.raises(ValueError, match="no attribute belongs to 10 of the 2 classes: lower min_class_count"):
        read_cub(cub, "train")


def test_the_vote():
    labels, voters = np.zeros(4, dtype=int), np.array([True, True, True, False])
    annotated = np.array([[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
    certainty = np.array([[4, 1, 4, 4], [4, 1, 1, 4], [1, 1, 4, 4], [4, 4, 4, 4]])
    # a tie once a "no" is not visible; no votes at all; a tie; two to one; the fourth image has no vote
    assert class_attributes(annotated, certainty, labels, voters).tolist() == [[1, 1, 1, 1]]
    certainty[2, 0] = 4
    assert class_attributes(annotated, certainty, labels, voters).tolist() == [[0, 1, 1, 1]]


def test_left_and_right_are_one_part():
    assert located_parts(list(PARTS)) == {"back": [0], "beak": [1], "wing": [2, 3], "tail": [4]}


def test_what_is_missing_is_named(cub):
    with pytest.raises(ValueError, match="no split 'val'"):
        read_cub(cub, "val")
    (cub / "images" / CLASSES[0] / "bird_6.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 pictures are missing.*the first being 001.*bird_6.jpg"):
        read_cub(cub, "test", min_class_count=1)
    lines = (cub / "bounding_boxes.txt").read_text().splitlines()
    (cub / "bounding_boxes.txt").write_text("\n".join(lines[:5]))
    with pytest.raises(ValueError, match="bounding_boxes.txt says nothing, or not enough, about 3 images"):
        read_cub(cub, "train", min_class_count=1)
    (cub / "parts" / "part_locs.txt").unlink()
    (cub.parent / "attributes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks parts/part_locs.txt, attributes.txt \(here or one"):
        read_cub(cub, "train", min_class_count=1)


def test_traveling_birds(cub, tmp_path):
    folder = tmp_path / "TravelingBirds"
    put_pictures(folder / "CUB_fixed" / "test", [f"{CLASSES[i % 2]}/bird_{i}.jpg" for i in (6, 7)], 200)
    data = read_traveling_birds(folder, cub, "test", min_class_count=1)
    assert data.dataset["label"][:] == [0, 1]
    assert np.asarray(data.dataset[0]["image"]).mean() == pytest.approx(200, abs=2)
    with pytest.raises(FileNotFoundError, match="no folder CUB_black/test in .*Unpack CUB_fixed"):
        read_traveling_birds(folder, cub, "test", background="black", min_class_count=1)
