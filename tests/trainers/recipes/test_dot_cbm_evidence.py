"""The evidence on DOT-CBM in small: its arms, what they share, and that a repetition trains nothing."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageClassification

from tests.trainers.recipes.tiny_bottleneck import command_line, times_of_runs
from trainers.recipes import dot_cbm_evidence as recipe
from trainers.recipes.arguments import RecipeTrainingArguments, parse_arguments
from trainers.recipes.comparison import ComparisonArguments
from trainers.recipes.dot_cbm_arms import LABELS
from trainers.recipes.dot_cbm_backbone import BackboneArguments
from trainers.recipes.dot_cbm_data import ConceptDataArguments
from trainers.recipes.dot_cbm_evidence import EvidenceArguments, main
from trainers.recipes.dot_cbm_fit import BottleneckArguments
from trainers.report import read_results


def test_the_evidence_has_every_arm_three_seeds_and_one_grid():
    types = (ComparisonArguments, ConceptDataArguments, BackboneArguments, BottleneckArguments, EvidenceArguments)
    preset, (comparison, data_args, _, args, evidence, training) = parse_arguments(
        (*types, RecipeTrainingArguments), recipe.PRESETS, [], default_preset="evidence"
    )
    assert preset == "evidence" and comparison.arms == list(LABELS) and len(comparison.seeds) >= 3
    assert len(comparison.learning_rates) >= 2 and len(evidence.class_learning_rates) >= 2
    assert (data_args.correlation, data_args.shifted_correlations) == (0.8, [0.3, 0.0])
    assert evidence.published_arm in comparison.arms and training.save_strategy == "no"
    assert data_args.num_validation and args.saliency == "best"
    assert (
        evidence.control_arms == ["conditional", "dot", "mean", "vanilla"] and max(comparison.learning_rates) == 3e-2
    )


@pytest.mark.parametrize(
    "option",
    [
        {"class_epochs": 3},
        {"class_learning_rate": 0.1},
        {"lambda_vop": 0.3},
        {"lambda_top": 0.3},
        {"saliency": "pca"},
        {"concept_prior": "paper"},
        {"readout": "mean"},
    ],
)
def test_options_that_would_change_nothing_are_refused(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"--{next(iter(option))}: not used here. .* Leave them out, or train one"):
        main(command_line(arms=["conditional"], **option))
    assert not Path("cache").exists()


def a_plan(tmp_path, **options):
    """Of `options` of a command line, with a stand-in for what is prepared."""
    types = (ComparisonArguments, ConceptDataArguments, BackboneArguments, BottleneckArguments, EvidenceArguments)
    argv = command_line(**{"output_dir": str(tmp_path)} | options)
    _, (_, *shared) = parse_arguments(
        (*types, RecipeTrainingArguments), recipe.PRESETS, argv, default_preset="evidence"
    )
    data, backbone, args, evidence, training = shared
    return recipe.Plan(tmp_path, data, backbone, args, evidence, training, tmp_path / "seeds")


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 10},
        {"max_grad_norm": 0.5},
        {"class_steps": 7},
        {"max_localised": 10},
        {"thorough": False},
    ],
)
def test_what_is_kept_is_kept_for_its_options(tmp_path, change):
    prepared = SimpleNamespace(key="key", aucs={})
    job = recipe.Job("conditional", 0, 1e-3, steps=0)
    plans = a_plan(tmp_path), a_plan(tmp_path, **change), a_plan(tmp_path, output_dir=str(tmp_path / "elsewhere"))
    fitted = [recipe._key(job, plan, prepared) for plan in plans]
    measured = [recipe._measured_key(job, plan, prepared) for plan in plans]
    assert fitted[0] == fitted[2] and measured[0] == measured[2] and measured[0] not in (fitted[0], measured[1])
    only_measured = {"max_localised", "thorough"} & set(change)
    assert (fitted[0] == fitted[1]) == bool(only_measured)


def test_arms_are_built_for_the_size_of_the_images(tmp_path, monkeypatch):
    from tests.trainers.recipes.tiny_bottleneck import tiny_backbone, tiny_concepts

    prepared = SimpleNamespace(
        backbone=tiny_backbone(),
        splits=SimpleNamespace(train=tiny_concepts()),
        embeddings=(torch.eye(3, 4), "by hand"),
        aucs={},
        image_size=32,
    )
    monkeypatch.setattr(recipe, "prepared_of", lambda *_: prepared)
    model = recipe.arm_model(recipe.Job("conditional", 0, 1e-3, steps=0), a_plan(tmp_path))
    assert model.config.input_size == (32, 32)


def test_without_the_shortcut_the_backbones_are_the_same(tmp_path):
    plan = a_plan(tmp_path)
    control = recipe.without_shortcut(plan)
    assert (control.data_args.correlation, control.data_args.shifted_correlations) == (0.0, [])
    assert control.seeds == plan.seeds and control.root != plan.root and not control.evidence_args.thorough


ARMS = [
    "conditional",
    "conditional_prior",
    "conditional_mask_prior",
    "conditional_both",
    "vanilla",
    "cem",
    "linear_probe",
]


@pytest.mark.slow
def test_arms_on_two_seeds_and_a_repetition_trains_nothing(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    grid = {"seeds": [0, 1], "learning_rates": [1e-3, 3e-3], "class_steps": 5, "concept_epochs": 1}
    argv = command_line(arms=ARMS, control_arms=["conditional", "vanilla"], thorough=False, **grid)
    main(argv)
    results = read_results("run")
    assert (results.method, results.preset, results.seeds) == ("dot_cbm", "evidence", [0, 1])
    accuracy = results.metrics["accuracy_ood0"]
    assert accuracy.n == 2 and list(accuracy.baseline) == [LABELS[arm] for arm in ARMS if arm != "conditional_both"]
    assert {"claim_1_pointing", "claim_2_prior_accuracy_ood0", "claim_2_mask_prior_accuracy_ood0"} <= set(
        results.metrics
    )
    assert "vanilla CBM, Grad-CAM" in results.metrics["claim_1_energy_in_mask"].baseline
    alone = results.metrics["claim_1_energy_in_mask_without_shortcut"]
    assert list(alone.baseline) == ["vanilla CBM", "vanilla CBM, Grad-CAM", "a uniform heatmap"] and alone.n == 2
    said = results.evidence
    assert set(said["without_shortcut"]["learning_rate_chosen"]) == {"conditional", "vanilla"}
    assert "linear_probe" not in said["learning_rate_at_the_edge_of_the_grid"]
    assert {path.name for path in Path("run/seeds/0").iterdir()} == {"backbone", "features"}
    assert {path.name for path in Path("run/without_shortcut/seeds/0").iterdir()} == {"features"}
    assert list(Path("run/runs/cem").glob("*/joint/fit.json")) and not list(Path("run/runs/cem").glob("*/concept"))
    assert set(said["learning_rate_chosen"].values()) <= {1e-3, 3e-3}
    assert said["saliency"]["conditional_mask_prior"] == ["mask", "mask"]
    assert said["steps"] | {"linear_probe": 6} == dict.fromkeys(ARMS, 6) and said["steps"]["linear_probe"] == 0
    assert set(said["locality"]) == set(said["saliency_foreground_auc"]) == {"0", "1"}
    assert said["measured_on"]["claim_1_pointing"] == "OT"
    everything = json.loads(Path("run/arms.json").read_text())
    assert len(everything["vanilla"]) == 2 and len(everything["vanilla"][1]["curves"]["id"]["random"]) == 9
    kept = json.loads(next(Path("run/runs/conditional").rglob("measured.json")).read_text())["kept"]
    assert "grad_cam_id" not in kept and "localised_ood0" in kept
    for figure in results.figures:
        assert Path("run", figure.path).read_bytes().startswith(b"\x89PNG")
    assert {Path(figure.path).stem for figure in results.figures} >= {
        "accuracy_ood0",
        "interventions",
        "explanation_01",
    }
    model = AutoModelForImageClassification.from_pretrained("run")
    assert (model.config.readout, model.config.concept_prior) == ("conditional", "cooccurrence")
    assert str(tmp_path) not in json.dumps(results.evidence) + results.command

    written = times_of_runs(tmp_path / "run")
    recipe.prepared_of.cache_clear()
    main(argv)
    assert times_of_runs(tmp_path / "run") == written and read_results("run").metrics == results.metrics
    with pytest.raises(ValueError, match="holds a run with other options"):
        main([*argv, "--class_steps", "6"])


def test_an_unknown_arm_is_named_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="arm 'cosine' is not known"):
        main(command_line(arms=["cosine"]))
    assert not Path("cache").exists()
