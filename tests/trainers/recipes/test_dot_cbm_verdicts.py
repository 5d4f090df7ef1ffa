"""What the evidence says of given measures, by hand."""

import pytest

from trainers.recipes.dot_cbm_verdicts import (
    TABLE,
    evidence_metrics,
    largest_fall,
    measured_on,
    values_of,
    without_shortcut_metrics,
)


def seeds(accuracy, pointing, **more):
    """Three seeds around these."""
    return [
        {
            "accuracy_id": accuracy + s / 100,
            "accuracy_ood30": accuracy + s / 100,
            "accuracy_ood0": accuracy + s / 100,
            "localised_id": {"pointing": pointing + s / 100, "energy_in_mask": 0.2 + s / 100, "chance": 0.1},
            "concept_f1_id": 0.5 + s / 100,
            "leakage": {
                "hard": accuracy - 0.2 + s / 100,
                "shuffled": 0.02,
                "true": 1.0,
                "predicted": 0.9,
                "chance": 0.1,
            },
            "nec": 40.0 + s,
            "accuracy_at_nec_5": 0.1 + s / 100,
            "accuracy_of_sparse_head_5": 0.9 + s / 100,
            "impurity_niche": accuracy + s / 100,
            "curves": {"id": {"random": [0.5, 0.7 + s / 100, 0.9], "uncertainty": [0.5, 0.8 + s / 100, 0.75]}},
        }
        | more
        for s in range(3)
    ]


def measured():
    grad_cam = {"grad_cam_id": {"pointing": 0.5, "energy_in_mask": 0.2}}
    return {
        "conditional": seeds(0.3, 0.2),
        "conditional_prior": seeds(0.6, 0.4),
        "conditional_both": seeds(0.7, 0.5),
        "dot": seeds(0.5, 0.4),
        "vanilla": [seed | grad_cam for seed in seeds(0.6, 0.1)],
        "linear_probe": [{"accuracy_id": 0.9, "accuracy_ood30": 0.8, "accuracy_ood0": 0.7}] * 3,
    }


def test_the_two_claims_are_tested_apart():
    found = evidence_metrics(measured())
    first = found["claim_1_pointing"]
    assert first.value == pytest.approx(0.21)
    said = {name: baseline.verdict for name, baseline in first.baseline.items()}
    assert said == {
        "max cosine, no OT": "fails",
        "vanilla CBM": "holds",
        "vanilla CBM, Grad-CAM": "fails",
        "a uniform heatmap": "holds",
    }
    assert "trained with the shortcut" in first.note and "edge" not in first.note
    second = found["claim_2_prior_accuracy_ood0"]
    assert (second.value, second.baseline["OT"].value) == (pytest.approx(0.61), pytest.approx(0.31))
    assert second.baseline["OT"].verdict == "holds"
    assert "each at its own learning rate" in second.note and "else equal" not in second.note
    assert "claim_2_mask_prior_accuracy_ood0" not in found and "claim_1_miou" not in found


def test_every_quantity_of_every_arm_against_the_method():
    metrics = evidence_metrics(measured())
    accuracy = metrics["accuracy_ood0"]
    assert accuracy.value == pytest.approx(0.71) and len(accuracy.baseline) == 5
    assert accuracy.baseline["linear probe, no concepts"].verdict == "null"
    assert metrics["pointing_id"].baseline["a uniform heatmap"].value == pytest.approx(0.1)
    assert "linear probe, no concepts" not in metrics["pointing_id"].baseline
    about = measured_on(metrics)
    assert about["claim_1_pointing"] == "OT" and about["claim_2_prior_accuracy_ood0"].startswith("OT + prior")
    assert set(about) == {name for name in metrics if name.startswith("claim_")}


def test_what_was_measured_against_the_method_is_in_the_table():
    wanted = {"leakage_hard", "leakage_shuffled", "leakage_true", "nec", "accuracy_at_nec_5", "concept_f1_id"}
    wanted |= {"accuracy_of_sparse_head_5", "impurity_niche"}
    metrics = evidence_metrics(measured())
    assert wanted <= set(TABLE) and wanted <= set(metrics)
    assert all(metrics[name].note for name in wanted)
    hard = metrics["leakage_hard"]
    assert hard.value == pytest.approx(0.51) and hard.baseline["OT"].verdict == "holds"
    assert metrics["impurity_niche"].higher_is_better is False
    assert metrics["impurity_niche"].baseline["OT"].verdict == "fails"
    for name in ("nec", "leakage_shuffled"):
        assert metrics[name].higher_is_better is None and metrics[name].baseline["OT"].verdict is None


def test_transport_is_tested_without_the_shortcut_by_itself():
    found = without_shortcut_metrics({"conditional": seeds(0.9, 0.6), "dot": seeds(0.9, 0.4)}, edges=["conditional"])
    assert set(found) == {"claim_1_pointing_without_shortcut", "claim_1_energy_in_mask_without_shortcut"}
    pointing = found["claim_1_pointing_without_shortcut"]
    assert pointing.baseline["max cosine, no OT"].verdict == "holds"
    assert "without the shortcut" in pointing.note and pointing.note.endswith("rate at the edge of the grid: OT")
    assert measured_on(found)["claim_1_pointing_without_shortcut"] == "OT" and without_shortcut_metrics({}) == {}


def test_notes_name_the_arms_whose_rate_is_at_the_edge_of_the_grid():
    metrics = evidence_metrics(measured(), edges=["conditional", "vanilla", "linear_probe"])
    assert metrics["claim_1_pointing"].note.endswith("rate at the edge of the grid: OT, vanilla CBM")
    assert metrics["claim_2_prior_accuracy_ood0"].note.endswith("rate at the edge of the grid: OT")


def test_interventions_rise_or_are_said_to_fall():
    metrics = evidence_metrics(measured())
    half = metrics["interventions_random_half"]
    assert half.value == pytest.approx(0.71) and half.baseline["no group set"].verdict == "holds"
    assert metrics["interventions_uncertainty_all"].value == pytest.approx(0.75)
    gain = metrics["interventions_random_gain"]
    assert gain.value == pytest.approx(0.4) and gain.baseline["OT"].value == pytest.approx(0.4)
    fall = metrics["interventions_uncertainty_largest_fall"]
    assert fall.value == pytest.approx(0.06) and metrics["interventions_random_largest_fall"].value == 0
    assert "linear probe, no concepts" not in fall.baseline
    assert largest_fall([0.5, 0.4, 0.9, 0.6]) == pytest.approx(0.3) and largest_fall([1.0]) == 0.0


def test_a_quantity_that_a_seed_lacks_is_left_out():
    assert values_of([{"a": 1.0}, {}], "a") == [] and values_of([{"a": 1.0}, {"a": 2.0}], "a") == [1.0, 2.0]
