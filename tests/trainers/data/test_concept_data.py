"""What concept data sets share: colours, backgrounds, maps of parts, and the check of what they carry."""

import numpy as np
import pytest
from datasets import Dataset

from trainers.data import ConceptData, part_masks
from trainers.data.concept_data import background_class, distinct_colours


def make(**changed):
    fields = {
        "dataset": Dataset.from_dict({"label": [0]}),
        "class_names": ["a", "b"],
        "concept_names": ["x", "y", "z"],
        "concept_groups": {"first": [0, 2], "second": [1]},
        "class_concept_matrix": np.zeros((2, 3), dtype=np.uint8),
        "part_names": ["p"],
        "part_of_concept": [0, 0, -1],
    }
    return ConceptData(**fields | changed)


def test_names_must_fit():
    make()
    with pytest.raises(ValueError, match="2 x 3 for 1 classes and 3 concepts"):
        make(class_names=["a"])
    with pytest.raises(ValueError, match="exactly one group"):
        make(concept_groups={"first": [0, 1], "second": [1, 2]})
    with pytest.raises(ValueError, match="one entry of part_of_concept"):
        make(part_of_concept=[0])


def test_part_masks():
    masks = part_masks(np.array([[0, 1], [3, 1]]), 3)
    assert masks.dtype == bool and masks.shape == (3, 2, 2)
    assert masks[0].tolist() == [[False, True], [False, True]] and not masks[1].any() and masks[2].sum() == 1


def test_colours_are_apart_and_the_same_every_time():
    colours = distinct_colours(40, 5).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).max(axis=-1) + 1000 * np.eye(40)
    assert apart.min() >= 40 and (colours == distinct_colours(40, 5)).all()


def test_backgrounds_come_as_often_as_said():
    def drawn(correlation):
        return [background_class(np.random.default_rng((0, i)), 3, 10, correlation) for i in range(1500)]

    always, often, never = drawn(1.0), drawn(0.8), drawn(0.0)
    assert set(always) == {3}
    assert np.mean(np.equal(often, 3)) == pytest.approx(0.8 + 0.2 / 10, abs=0.04)
    assert np.bincount(never, minlength=10) / 1500 == pytest.approx(np.full(10, 0.1), abs=0.04)
    assert all(a == 3 or a == b for a, b in zip(often, never)), "the same draws whatever the correlation"
