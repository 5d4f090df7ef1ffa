"""Kept tokens: what a backbone gives, computed once, anew where backbone or data are others."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from hf_models.dot_cbm import DotCbmConfig, DotCbmModel, image_processor_for
from tests.trainers.recipes.tiny_bottleneck import tiny_backbone, tiny_concepts, tiny_features
from trainers.recipes.dot_cbm_features import FeatureCollator, cached_features, saliency_aucs, weights_key


def pictured(count=3):
    """`tiny_concepts` with pictures of 16 x 16 whose upper right quarter is foreground."""
    rng, data = np.random.default_rng(0), tiny_concepts()
    images = [Image.fromarray(rng.integers(0, 255, size=(16, 16, 3), dtype=np.uint8)) for _ in range(count)]
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:8, 8:] = 1
    masks = [Image.fromarray(mask)] * count
    rows = {"image": images, "masks": masks, "foreground": [Image.fromarray(255 * mask)] * count}
    labels = [index % 2 for index in range(count)]
    concepts = [data.class_concept_matrix[label].tolist() for label in labels]
    dataset = Dataset.from_dict(rows | {"label": labels, "concepts": concepts})
    from datasets import Image as Feature

    for column in rows:
        dataset = dataset.cast_column(column, Feature())
    return type(data)(**{**data.__dict__, "dataset": dataset})


@pytest.fixture
def kept(tmp_path):
    backbone = tiny_backbone()
    config = DotCbmConfig(backbone_config=backbone.config, saliency="cls_attention")
    model = DotCbmModel.from_backbone(backbone, config).eval()
    options = {"batch_size": 2, "folder": tmp_path / "tokens"}
    return model, pictured(), image_processor_for(config), options


def test_tokens_are_those_of_the_backbone(kept):
    model, data, processor, options = kept
    features = cached_features(model, data, processor, key="a", **options)
    pixels = processor(images=list(data.dataset["image"]), return_tensors="pt")["pixel_values"]
    for part, expected in zip(features.tokens, model.extract_features(pixels), strict=True):
        np.testing.assert_allclose(part, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert features.grid == (2, 2) and features.foreground.tolist() == [[0, 1, 0, 0]] * 3
    assert features.labels.tolist() == [0, 1, 0] and len(features) == 3
    inputs = features.inputs([2, 0], with_mask=True)
    np.testing.assert_array_equal(inputs["patch_features"][1].numpy(), features.tokens[1][[2, 0]])
    assert inputs["foreground_mask"].shape == (2, 4)
    assert [len(batch["patch_features"][0]) for batch in features.batches(2)] == [2, 1]
    assert [len(batch["patch_features"][0]) for batch in features.batches(2, limit=2)] == [2]


def test_a_set_may_be_empty(kept):
    model, data, processor, options = kept
    empty = type(data)(**{**data.__dict__, "dataset": data.dataset.remove_columns(["masks", "foreground"]).select([])})
    assert len(cached_features(model, empty, processor, key="a", **options)) == 0


def test_they_are_computed_once_for_a_key(kept):
    model, data, processor, options = kept
    cached_features(model, data, processor, key="a", **options)
    file = options["folder"] / "patches.npy"
    written = file.stat().st_mtime_ns
    cached_features(model, data, processor, key="a", **options)
    assert file.stat().st_mtime_ns == written
    half = cached_features(model, data, processor, key="b", dtype="float16", **options)
    assert file.stat().st_mtime_ns != written and half.tokens[1].dtype == np.float16
    assert json.loads((options["folder"] / "tokens.json").read_text())["key"] == "b"


def test_a_batch_has_tokens_and_both_labels():
    features = tiny_features()
    batch = FeatureCollator(features)([features[3], features[0]])
    assert set(batch) == {"patch_features", "labels", "concept_labels"}
    assert batch["labels"].tolist() == [1, 0] and batch["concept_labels"].tolist() == [[0, 1, 0], [1, 0, 1]]
    assert FeatureCollator(features, with_mask=True)([0])["foreground_mask"].shape == (1, 4)
    features.foreground = None
    with pytest.raises(ValueError, match="does not have"):
        FeatureCollator(features, with_mask=True)([0])


def test_each_form_of_saliency_is_held_against_the_foreground():
    features = tiny_features()
    token, patches = (part.copy() for part in features.tokens)
    patches[:, 1] = 10 * token  # the foreground, and what CLS points to
    features.tokens = (token, patches)
    aucs = saliency_aucs(features)
    assert set(aucs) == {"cls_dot", "cls_cosine", "contrast", "pca"}
    assert aucs["cls_dot"] == aucs["cls_cosine"] == aucs["contrast"] == 1.0
    features.tokens = (-token, patches)
    assert saliency_aucs(features)["cls_dot"] == 0.0
    features.foreground = None
    assert saliency_aucs(features) == {}


def test_other_weights_have_another_key():
    backbone = tiny_backbone()
    before = weights_key(backbone)
    assert weights_key(tiny_backbone()) == before
    with torch.no_grad():
        backbone.layernorm.bias[0] += 1e-3
    assert weights_key(backbone) != before
