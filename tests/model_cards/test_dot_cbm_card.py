"""The card of DOT-CBM: what it says, its figures, and that every line a user would copy runs."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from hf_models.dot_cbm import DotCbmForImageClassification, image_processor_for
from model_cards import build
from model_cards.build import build_card
from model_cards.markdown import split_fences
from model_cards.metadata import check_card
from tests.model_cards.test_build import make_run
from tests.trainers.recipes.tiny_bottleneck import tiny_bottleneck
from trainers.recipes.dot_cbm_explanations import arms_figure, intervention_figure
from trainers.recipes.dot_cbm_verdicts import evidence_metrics, measured_on, without_shortcut_metrics
from trainers.report import read_results, write_results


@pytest.fixture(autouse=True)
def no_committed_evidence(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(build, "PACKAGE", tmp_path_factory.mktemp("package"))


def seeds(accuracy: float, pointing: float) -> list[dict]:
    return [
        {
            "accuracy_id": accuracy + 0.1 + seed / 100,
            "accuracy_ood0": accuracy + seed / 100,
            "leakage": {"hard": accuracy - 0.1 + seed / 100, "shuffled": 0.1, "true": 1.0},
            "nec": 2.5,
            "accuracy_at_nec_5": 0.25,
            "accuracy_of_sparse_head_5": 0.75,
            "impurity_niche": 0.88,
            "localised_id": {
                "pointing": pointing + seed / 100,
                "energy_in_mask": pointing + seed / 100,
                "chance": 0.1,
            },
            "curves": {"id": {policy: [0.5, 0.7, 0.9] for policy in ("random", "uncertainty")}},
        }
        for seed in range(3)
    ]


def save(model: DotCbmForImageClassification, folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder)
    image_processor_for(model.config).save_pretrained(folder)


@pytest.fixture
def run(tmp_path):
    """A run folder with a tiny model, and results and figures of the kind that the evidence writes."""
    folder = tmp_path / "run"
    make_run(folder)
    save(tiny_bottleneck(), folder)
    measured = {
        "conditional_both": seeds(0.7, 0.5),
        "conditional": seeds(0.3, 0.2),
        "conditional_prior": seeds(0.6, 0.4),
        "dot": seeds(0.5, 0.4),
    }
    results = read_results(folder)
    results.method, results.preset = "dot_cbm", "evidence"
    results.metrics = evidence_metrics(measured)
    results.metrics |= without_shortcut_metrics({"conditional": seeds(0.9, 0.6), "dot": seeds(0.9, 0.3)})
    results.evidence = {"measured_on": measured_on(results.metrics), "learning_rate_grid": [1e-3, 3e-3]}
    groups = {arm: [seed["accuracy_ood0"] for seed in own] for arm, own in measured.items()}
    results.figures = [
        arms_figure(groups, folder, "accuracy_ood0", y_label="accuracy", caption="Accuracy under shift."),
        intervention_figure({"random": [0.5, 0.7, 0.9]}, folder),
    ]
    write_results(folder, results)
    return folder


def test_the_card_passes_the_check_and_says_whose_it_is(run):
    text = build_card(run, repo_id="org/x")
    assert check_card(text, read_results(run), run) == [] and str(ModelCard(text)) == text
    card = ModelCard(text)
    assert card.data.pipeline_tag == "image-classification" and "dot_cbm" in card.data.tags
    assert card.data.eval_results[0].dataset_type == "imagefolder"
    assert "https://arxiv.org/abs/2505.07209" in text and "not** the authors' model" in text
    for words in (
        "0.731 for whatever it is shown",
        "Equation 18",
        "appendix",
        "one vector for each of 3 concepts",
    ):
        assert words in text
    assert "![Accuracy under shift.](figures/accuracy_ood0.png)" in text and "figures/interventions.png" in text


def test_the_first_claim_is_said_with_the_shortcut_and_without(run):
    text = build_card(run)
    assert "trained **with the shortcut**, it is ahead of *a uniform heatmap*; is behind *max cosine, no OT*." in text
    assert "Trained **without the shortcut**, it is ahead of *max cosine, no OT*, *a uniform heatmap*." in text
    results = read_results(run)
    results.metrics = {name: metric for name, metric in results.metrics.items() if not name.startswith("claim")}
    write_results(run, results)
    assert "the shortcut**" not in build_card(run)


def test_leakage_is_named_by_what_the_rows_say(run):
    text = build_card(run)
    assert "accuracy goes from 0.810 to 0.610 when they are rounded: the probabilities tell" in text
    assert "**they leak**" in text and "A class rests on 2.5 of the 3 concepts" in text
    assert "cut to five a class accuracy is 0.250, with a classifier that was trained to use five 0.750." in text
    assert "with an AUC of 0.88 (`impurity niche`" in text
    assert "none is corrected for their number" in text and "each at their own learning rate" in text
    results = read_results(run)
    results.metrics["leakage_hard"] = results.metrics["accuracy_id"]
    write_results(run, results)
    assert "**they leak**" not in build_card(run)


def test_the_claims_are_said_of_their_own_arms(run):
    text = build_card(run)
    rows = [line for line in text.splitlines() if line.startswith("| Claim ")]
    assert any("Claim 1 pointing" in row and "**OT**" in row for row in rows)
    assert any("Claim 2 prior accuracy ood0" in row and "OT + prior, best saliency" in row for row in rows)
    listed = {entry.metric_type for entry in ModelCard(text).data.eval_results}
    assert "accuracy_ood0" in listed and not any(name.startswith("claim") for name in listed)


@pytest.mark.parametrize("grouped", [True, False])
def test_its_examples_run(run, monkeypatch, capsys, grouped):
    if not grouped:
        model = DotCbmForImageClassification.from_pretrained(run)
        model.config.concept_groups = None
        save(model, run)
    monkeypatch.chdir(run.parent)
    blocks = [code for name, code in split_fences(build_card(run.relative_to(run.parent)))[1] if name == "python"]
    load, explain, intervene, remote = blocks
    names = {}
    for code in (load, explain, intervene):
        exec(compile(code, "card", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] in ("Ada", "Ben") and printed[-1] in ("Ada", "Ben") and "adds" in printed[1]
    assert len([line for line in load.splitlines() if line.strip()]) <= 8
    assert Path("explanation.png").read_bytes().startswith(b"\x89PNG")
    given = ~torch.isnan(names["given"][0])
    assert given.tolist() == ([False, False, True] if grouped else [True, False, False]), "beard is the first group"
    assert '"trust_remote_code": True' in remote and '"revision": "COMMIT"' in remote


def test_a_linear_probe_promises_no_explanation(run):
    save(tiny_bottleneck(readout="linear_probe"), run)
    text = build_card(run)
    assert "plot_explanation" not in text and "interventions=" not in text


def test_what_is_said_of_small_runs_is_said_of_small_runs_only(run):
    small = build_card(run)
    results = read_results(run)
    results.preset = "paper"
    write_results(run, results)
    large = build_card(run)
    for words in (", and was not trained", "Drawn people", "No weights of DINOv2"):
        assert words in small and words not in large


def test_measurements_without_weights_promise_none(run):
    (run / "model.safetensors").unlink()
    text = build_card(run)
    assert "no weights come with them" in text and "AutoImageProcessor" not in text
