"""What is measured of a bottleneck, against the model's own forward and by hand."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_models.dot_cbm import grad_cam, image_processor_for, plot_explanation
from tests.trainers.recipes.test_dot_cbm_features import pictured
from tests.trainers.recipes.tiny_bottleneck import tiny_bottleneck, tiny_features
from trainers.recipes import dot_cbm_explanations, dot_cbm_measures
from trainers.recipes.dot_cbm_data import ConceptSplits
from trainers.recipes.dot_cbm_explanations import choose, enlarged, explanation_figures
from trainers.recipes.dot_cbm_measures import (
    Shown,
    intervention_curves,
    localised,
    measure,
    predict,
    shown_heatmaps,
    shown_pairs,
)
from trainers.recipes.train_dot_cbm import direction, flat, metrics_of


@pytest.mark.parametrize("readout", ["conditional", "vanilla", "cem", "linear_probe"])
def test_predictions_are_the_models(readout):
    model, features = tiny_bottleneck(readout=readout), tiny_features()
    found, expected = predict(model, features, batch_size=5), model(**features.inputs(range(12)))
    np.testing.assert_allclose(found.scores, expected.logits.detach(), rtol=1e-4, atol=1e-5)
    if readout == "linear_probe":
        assert found.probabilities is None
    else:
        np.testing.assert_allclose(found.probabilities, expected.concept_probs.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("readout", ["conditional", "cem"])
def test_interventions_go_through_the_model(readout, monkeypatch):
    model, features = tiny_bottleneck(readout=readout), tiny_features()
    seen = {}

    def curve(scores, probabilities, truth, labels, groups, *, policy, seed):
        given = np.full(truth.shape, np.nan)
        given[:, 0] = truth[:, 0]
        seen[policy] = (scores(probabilities, given), given)
        return policy

    monkeypatch.setattr(dot_cbm_measures, "intervention_curve", curve)
    assert list(intervention_curves(model, predict(model, features), features, {"hat": [0]}, 0)) == [
        "random",
        "uncertainty",
    ]
    scores, given = seen["random"]
    expected = model(**features.inputs(range(12)), interventions=torch.from_numpy(given).float()).logits
    np.testing.assert_allclose(scores, expected.detach(), rtol=1e-4, atol=1e-5)


def test_localisation_by_hand():
    masks = np.zeros((2, 4, 4), dtype=bool)
    masks[:, :2, :2] = True
    right, wrong = masks[0].astype(float), (~masks[0]).astype(float)
    shown = Shown(np.stack([right, wrong]), masks, np.array([0.9, 0.1]), np.array([0, 1]))
    found = localised(shown, shown)
    assert (found["pointing"], found["energy_in_mask"], found["boxes_at_half"]) == (0.5, 0.5, 0.5)
    assert found["miou"] == pytest.approx((1 + 4 / 16) / 2) and found["chance"] == 0.25
    assert found["part_ap"] == 0.5, "mean of 1 and 0 over the parts"
    assert found["miou_best_threshold"] == found["miou"]


def test_heatmaps_are_those_of_the_concepts_that_show():
    model, data, features = tiny_bottleneck(), pictured(), tiny_features(3)
    pairs = shown_pairs(features, data, limit=2)
    # the map of parts says "hat" in a quarter; image 0 has a red hat, image 1 a blue one, nobody's beard shows
    assert list(zip(pairs.images, pairs.concepts, strict=True)) == [(0, 0), (1, 1)] and pairs.size == (16, 16)
    shown = shown_heatmaps(model, features, data, limit=2, batch_size=1)
    assert shown.heatmaps.shape == shown.masks.shape == (2, 16, 16) and shown.masks.sum() == 2 * 64
    output = model(**features.inputs([1]), output_transport_plan=True)
    expected = model.heatmaps(output.concept_maps, (16, 16), grid=(2, 2))[0, 1]
    np.testing.assert_allclose(shown.heatmaps[1], expected, rtol=1e-4, atol=1e-5)
    assert shown.probabilities[1] == pytest.approx(output.concept_probs[0, 1].item(), abs=1e-5)


def splits():
    data = pictured(12)
    return ConceptSplits(data, data, {"id": data, "ood0": data}, "0")


@pytest.mark.parametrize("readout", ["conditional", "cem", "linear_probe"])
def test_everything_that_a_kind_of_model_has_is_measured(readout):
    sets, features = splits(), tiny_features()
    model = tiny_bottleneck(readout=readout)
    names = {"validation": features, "id": features, "ood0": features}
    found = measure(model, sets, names, seed=0, max_localised=6)
    assert {"accuracy_id", "accuracy_ood0"} <= set(found)
    assert ("curves" in found) == (readout != "linear_probe") and ("leakage" in found) == (readout == "conditional")
    if readout == "linear_probe":
        assert len(found) == 2
        return
    assert len(found["curves"]["id"]["random"]) == 3 and set(found["localised_id"]) >= {"pointing", "chance"}
    numbers = flat(found)
    assert {"pointing_id", "energy_in_mask_ood0", "concept_auc_id", "intervention_area_random_id"} <= set(numbers)
    assert all(isinstance(value, float) for value in numbers.values())
    metrics = metrics_of(found, {"dot": {"accuracy_id": 0.5}})
    assert metrics["accuracy_id"].baseline["max cosine, no OT"].value == 0.5
    assert metrics["pointing_id"].baseline["a uniform heatmap"].value == numbers["chance_id"]
    assert not any(name.startswith("chance") for name in metrics)


def test_directions():
    assert direction("accuracy_id") is True and direction("leakage_hard") is True
    assert direction("leakage_shuffled") is None and direction("nec") is None
    assert direction("impurity_niche") is False


@pytest.mark.parametrize("readout", ["conditional", "cem", "linear_probe"])
def test_sparse_heads_and_impurity_where_they_are_asked_for(readout):
    """Of tokens whose first entry is the class: a head that is trained is better than the random one."""
    model, features = tiny_bottleneck(readout=readout), tiny_features(60)
    if readout != "linear_probe":
        model.fit_activation_statistics(features.batches(20))
    data = pictured(60)
    data = dataclasses.replace(data, dataset=data.dataset.remove_columns(["masks", "foreground"]))
    sets = ConceptSplits(data, data, {"id": data}, "0")
    names = {"train": features, "validation": features, "id": features}
    found = measure(model, sets, names, seed=0, thorough=True)
    assert ("impurity_niche" in found) == (readout != "linear_probe")
    assert ("accuracy_of_sparse_head_5" in found) == (readout == "conditional")
    if readout == "conditional":
        assert 1.0 >= found["accuracy_of_sparse_head_5"] > found["accuracy_id"] + 0.1
    plain = measure(model, sets, names, seed=0)
    assert not {"impurity_niche", "accuracy_of_sparse_head_5"} & set(plain)


def test_the_strongest_shift_is_measured_wherever_it_stands():
    data, features = pictured(12), tiny_features()
    sets = ConceptSplits(data, data, {"id": data, "ood0": data, "ood30": data}, "0")
    found = measure(tiny_bottleneck(), sets, dict.fromkeys(("validation", *sets.tests), features), seed=0)
    assert set(found["curves"]) == {"id", "ood0"} and "localised_ood0" in found and "localised_ood30" not in found


def test_figures_explain_the_prediction_in_their_title_and_process_the_picture_once(tmp_path, monkeypatch):
    """Kept tokens that call everyone Ben, pixels that call everyone Ada: records are of Ben, as the titles."""
    model, features, plotted, given = tiny_bottleneck(), tiny_features(), [], []
    processor, explain = image_processor_for(model.config), type(model).explain
    ben = SimpleNamespace(scores=np.tile([0.0, 1.0], (12, 1)))
    with torch.no_grad():
        model.classifier.bias[0] = 100.0

    def spied(self, pixels, *args, **options):
        given.append(pixels)
        return explain(self, pixels, *args, **options)

    def drawn(image, records, *, title, **options):
        plotted.append((image.size, title, {record.label for record in records}))
        return plot_explanation(image, records, title=title, **options)

    monkeypatch.setattr(type(model), "explain", spied)
    monkeypatch.setattr(dot_cbm_explanations, "plot_explanation", drawn)
    monkeypatch.setattr(dot_cbm_explanations, "predict", lambda *_: ben)
    found = explanation_figures(
        model, processor, splits(), {"id": features, "ood0": features}, tmp_path, count=2, wrong=1
    )
    assert plotted == [((256, 256), "Ben, right", {"Ben"}), ((256, 256), "Ben, wrong: Ada", {"Ben"})]
    assert [figure.path for figure in found] == ["figures/explanation_01.png", "figures/explanation_02.png"]
    wrong = processor(images=pictured(12).dataset[0]["image"], return_tensors="pt")["pixel_values"]
    assert torch.equal(given[1], wrong), "the picture was enlarged before the processor saw it"


def test_other_maps_can_take_the_place_of_the_models():
    model, data, features = tiny_bottleneck(readout="vanilla"), pictured(), tiny_features(3)
    pixels, asked = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), []

    def maps_of(start, stop):
        asked.append((start, stop))
        return grad_cam(model, pixels[start:stop])

    shown = shown_heatmaps(model, features, data, limit=3, batch_size=2, maps_of=maps_of)
    assert asked == [(0, 2), (2, 3)] and len(shown.heatmaps) == 3
    expected = model.heatmaps(grad_cam(model, pixels), (16, 16), grid=(2, 2))
    np.testing.assert_allclose(shown.heatmaps, expected[[0, 1, 2], [0, 1, 0]], rtol=1e-4, atol=1e-5)


def test_right_images_of_many_classes_and_wrong_ones_are_shown():
    labels = np.array([0, 0, 1, 1, 2, 2, 0, 1])
    predicted = labels.copy()
    predicted[3] = 0
    shifted = np.zeros(8, dtype=int)
    chosen = choose({"id": predicted, "ood0": shifted}, {"id": labels, "ood0": labels}, count=6, wrong=3)
    assert chosen[3:] == [("id", 3), ("ood0", 2), ("ood0", 3)] and len(chosen) == 6
    right = [row for name, row in chosen[:3] if name == "id"]
    assert sorted(labels[right]) == [0, 1, 2] and 3 not in right
    assert len(choose({"id": predicted}, {"id": labels}, count=20, wrong=3)) == 8


def test_small_pictures_are_enlarged_by_a_whole_factor():
    from PIL import Image

    assert enlarged(Image.new("RGB", (64, 64))).size == (256, 256)
    assert enlarged(Image.new("RGB", (100, 120))).size == (300, 360)
    assert enlarged(Image.new("RGB", (300, 256))).size == (300, 256)
