"""Both stages on kept tokens: schedule, what is trained when, resuming, and what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import TrainingArguments

from tests.trainers.recipes.tiny_bottleneck import tiny_backbone, tiny_bottleneck, tiny_features
from trainers.recipes.dot_cbm_arms import ARMS, LABELS, fields_of
from trainers.recipes.dot_cbm_classifier import fit_classifier, held_out_loss, stored_inputs, trained_classifier
from trainers.recipes.dot_cbm_fit import BottleneckArguments, best_saliency, fit_bottleneck
from trainers.recipes.dot_cbm_runs import stepwise_optimizer


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def arguments(folder, **options):
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="epoch",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


ARGS = BottleneckArguments(concept_epochs=3, class_epochs=3, class_learning_rate=0.1, halve_every=1)


def fitted(folder, args=ARGS, key="k", **fields):
    model = tiny_bottleneck(**fields)
    return model, fit_bottleneck("ours", model, tiny_features(), args, arguments(folder), folder, key=key)


def test_the_rate_is_halved_every_so_many_epochs(tmp_path):
    _, runs = fitted(tmp_path)
    rates = [row["learning_rate"] for row in runs["concept"].history if "learning_rate" in row]
    assert rates == pytest.approx([1e-2] * 3 + [5e-3] * 3 + [2.5e-3] * 3)
    assert (runs["concept"].steps, runs["concept"].examples) == (9, 36)
    model = tiny_bottleneck()
    _, schedule = stepwise_optimizer(model, arguments(tmp_path, gradient_accumulation_steps=2), 12, 10)
    assert schedule.step_size == 20 and schedule.gamma == 0.5


def test_stages_train_what_is_theirs(tmp_path):
    model, runs = fitted(tmp_path, dataclasses.replace(ARGS, concept_epochs=15, class_epochs=15, halve_every=15))
    start = tiny_bottleneck()
    backbone, adapters = model.model.backbone.state_dict(), model.model.visual_adapter.state_dict()
    assert all(torch.equal(tensor, start.model.backbone.state_dict()[name]) for name, tensor in backbone.items())
    assert not all(torch.equal(t, start.model.visual_adapter.state_dict()[name]) for name, t in adapters.items())
    assert not torch.equal(model.classifier.weight, start.classifier.weight)
    assert runs["class"].parameters == model.classifier.weight.numel() + model.classifier.bias.numel()
    assert not torch.equal(model.activation_mean, start.activation_mean) and not model.training
    losses = {stage: [row["loss"] for row in run.history if "loss" in row] for stage, run in runs.items()}
    assert all(sum(values[-6:]) < sum(values[:6]) for values in losses.values())
    found = model(**tiny_features().inputs(range(12)))
    torch.testing.assert_close(found.concept_probs.mean(0), model.activation_mean, rtol=1e-4, atol=1e-5)


def test_again_it_only_loads_and_an_interrupted_one_goes_on_bitwise(tmp_path):
    whole, _ = fitted(tmp_path / "whole")
    written = (tmp_path / "whole" / "class" / "fit.json").stat().st_mtime_ns
    again, runs = fitted(tmp_path / "whole")
    assert (tmp_path / "whole" / "class" / "fit.json").stat().st_mtime_ns == written and runs["class"].steps == 9
    shutil.copytree(tmp_path / "whole" / "concept", tmp_path / "cut" / "concept")
    file = tmp_path / "cut" / "concept" / "fit.json"
    file.write_text(json.dumps({"signature": json.loads(file.read_text())["signature"]}))
    for name in ("checkpoint-6", "checkpoint-9", "model.safetensors"):
        path = tmp_path / "cut" / "concept" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    cut, _ = fitted(tmp_path / "cut")
    for model in (again, cut):
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("change", [{"key": "other"}, {"readout": "mean"}, {"saliency": "contrast"}])
def test_a_folder_with_another_run_is_refused(tmp_path, change):
    fitted(tmp_path)
    with pytest.raises(ValueError, match="holds a run with other options"):
        fitted(tmp_path, **change)


def test_a_linear_probe_has_one_stage(tmp_path):
    model, runs = fitted(tmp_path, readout="linear_probe")
    assert list(runs) == ["class"] and not (tmp_path / "concept").exists()
    assert model.config.training_stage == "class"


def test_a_joint_model_has_one_stage_that_trains_concepts_and_classes(tmp_path):
    model, runs = fitted(tmp_path, readout="cem", training_stage="joint")
    start = tiny_bottleneck(readout="cem", training_stage="joint")
    assert list(runs) == ["joint"] and [path.name for path in tmp_path.iterdir()] == ["joint"]
    assert model.config.training_stage == "joint" and not model.training
    for part in ("classifier.weight", "model.concept_embeddings.context.weight"):
        assert not torch.equal(model.state_dict()[part], start.state_dict()[part]), part
    features = tiny_features()
    loss = torch.nn.functional.cross_entropy(model(**features.inputs(range(12))).logits, features.labels).item()
    assert held_out_loss(model, features) == pytest.approx(loss, rel=1e-4)


def test_the_oracle_is_given_the_mask(tmp_path):
    model, _ = fitted(tmp_path, saliency="mask")
    features = tiny_features()
    with pytest.raises(ValueError, match="foreground_mask"):
        model(**features.inputs([0]))
    assert model(**features.inputs([0], with_mask=True)).theta[0].argmax() == 1


def test_the_best_saliency():
    assert best_saliency({"cls_dot": 0.4, "contrast": 0.9}) == "contrast"
    assert best_saliency({"cls_dot": 0.4, "pca": 0.45}) == "uniform"
    assert best_saliency({}) == "cls_cosine"


def test_arms_differ_in_what_their_names_say():
    args = BottleneckArguments()
    fields = {arm: fields_of(arm, args, {"contrast": 0.9, "cls_dot": 0.5}) for arm in ARMS}
    assert set(LABELS) <= set(ARMS)
    plain = fields["conditional"]
    assert plain == {
        "readout": "conditional",
        "saliency": "uniform",
        "concept_prior": "uniform",
        "lambda_vop": 0.0,
        "lambda_top": 0.0,
    }
    assert fields["conditional_prior"] == plain | {"saliency": "contrast"}
    assert fields["conditional_prior_cls"] == plain | {"saliency": "cls_dot"}
    assert fields["conditional_orthogonal"] == plain | {"lambda_vop": 0.15, "lambda_top": 0.2}
    both = fields["conditional_both"]
    assert (both["saliency"], both["concept_prior"], both["lambda_vop"]) == ("contrast", "cooccurrence", 0.15)
    assert fields["dot"] == plain | {"readout": "dot"}
    assert fields["cem"] == plain | {"readout": "cem", "training_stage": "joint"} and "jointly" in LABELS["cem"]
    other = BottleneckArguments(readout="mean", saliency="pca", concept_prior="paper", lambda_vop=0.5, lambda_top=0.5)
    assert all(fields_of(arm, other, {"contrast": 0.9, "cls_dot": 0.5}) == fields[arm] for arm in ARMS)
    with pytest.raises(ValueError, match="arm 'cosine' is not known. Choose from conditional, "):
        fields_of("cosine", args, {})


def test_a_classifier_on_stored_activations():
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]])
    labels = torch.tensor([0, 1, 0, 1])
    options = {"rate": 0.1, "steps": 200, "weight_decay": 0.0, "seed": 0}
    one = trained_classifier(inputs, labels, 2, **options)
    assert (one(inputs).argmax(1) == labels).all()
    assert torch.equal(one.weight, trained_classifier(inputs, labels, 2, **options).weight)


def test_the_rate_of_the_classifier_is_chosen_on_validating_images():
    model, features = tiny_bottleneck(readout="linear_probe"), tiny_features()
    options = {"steps": 60, "weight_decay": 0.0, "seed": 0}
    rate, loss = fit_classifier(model, features, features, [1e-6, 0.1], **options)
    assert rate == 0.1
    logits = model(**features.inputs(range(12))).logits
    assert torch.nn.functional.cross_entropy(logits, features.labels).item() == pytest.approx(loss, rel=1e-4)
    assert stored_inputs(model, features, batch_size=5).shape == (12, model.config.hidden_size)
    assert tiny_backbone().config.hidden_size == model.config.hidden_size
