"""The phases of DC-CCL as Trainer runs: what each learns, and that keeping frozen logits changes nothing."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer

from tests.hf_models.dc_ccl.tiny_dc_ccl import tiny_lm, tokens
from tests.trainers.device_cloud.tiny_device_cloud import arguments, rows, tiny_model
from trainers.device_cloud.dc_ccl import DcCclTrainer
from trainers.device_cloud.dc_ccl_data import TokenRows, accuracy, labels_of, logits_of, measured_gap


def run(model, folder, phase, dataset, *, steps=4, rate=1e-2, trainer=None, **options):
    args = arguments(folder, max_steps=steps, learning_rate=rate, per_device_train_batch_size=16, **(trainer or {}))
    made = DcCclTrainer(model, args, phase=phase, train_dataset=dataset, **options)
    made.train()
    return made


def changed(before, model):
    return {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("phase", "parts"),
    [
        ("cloud", {"shared_encoder", "cloud_submodel"}),
        ("control", {"control_model"}),
        ("co", {"co_submodel"}),
        ("head", {"co_submodel"}),
    ],
)
def test_a_phase_changes_its_parts_and_no_statistic_of_others(phase, parts, tmp_path):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    run(model, tmp_path, phase, rows(32, (0, 1, 2)))
    assert changed(before, model) == parts
    if phase == "head":
        same = [n for n, t in model.co_submodel.state_dict().items() if torch.equal(t, before[f"co_submodel.{n}"])]
        assert set(model.co_submodel.state_dict()) - set(same) == set(model.head_state())


@pytest.mark.parametrize(
    ("phase", "branch"), [("control", "device"), ("co", "device"), ("co", "serve"), ("head", "device")]
)
def test_kept_logits_give_what_computed_ones_give(phase, branch, tmp_path):
    states = []
    for cache in (False, True):
        model = tiny_model()
        run(model, tmp_path / str(cache), phase, rows(32, (0, 1, 2)), cache=cache, branch=branch)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_kept_logits_spare_the_frozen_submodel(tmp_path):
    model, calls = tiny_model(), []
    model.control_model.register_forward_hook(lambda *_: calls.append(1))
    run(model, tmp_path, "co", rows(32, (0, 1, 2)), cache=True)
    assert len(calls) == 1  # 32 rows are one batch of what is kept


def test_seen_classes_leave_the_others_where_they_were(tmp_path):
    data = rows(48, (0, 1, 2))
    outcomes = {}
    for loss in ("seen_classes", "all"):
        model = tiny_model()
        trainer = run(model, tmp_path / loss, "cloud", data, steps=40, phase1_loss=loss)
        assert (trainer.unseen is None) == (loss == "all")
        logits = logits_of(model, data, "cloud")
        outcomes[loss] = (logits[:, 3] - logits[:, :3].mean(-1)).mean()
    assert outcomes["all"] < outcomes["seen_classes"] - 1.0
    assert DcCclTrainer(tiny_model(), arguments(tmp_path), phase="cloud", train_dataset=data).unseen.tolist() == [
        *[False] * 3,
        True,
    ]


def test_the_loss_over_seen_classes_is_theirs(tmp_path):
    model, data = tiny_model(), rows(16, (0, 2))
    trainer = DcCclTrainer(model, arguments(tmp_path), phase="cloud", train_dataset=data)
    model.train()
    batch = {"pixel_values": data.pixel_values, "labels": data.labels}
    logits = model(data.pixel_values, branch="cloud").logits[:, [0, 2]]
    torch.testing.assert_close(trainer.compute_loss(model, batch), F.cross_entropy(logits, data.labels // 2))


def test_rows_without_a_label_mark_no_class_and_count_for_nothing(tmp_path):
    model, data = tiny_model("vit"), rows(16, (0, 2))
    data.labels[3] = -100
    trainer = DcCclTrainer(model, arguments(tmp_path), phase="cloud", train_dataset=data)
    assert trainer.unseen.tolist() == [False, True, False, True]
    loss = trainer.compute_loss(model.train(), {"pixel_values": data.pixel_values, "labels": data.labels})
    kept = data.labels != -100
    logits = model(data.pixel_values[kept], branch="cloud").logits[:, [0, 2]]
    torch.testing.assert_close(loss, F.cross_entropy(logits, data.labels[kept] // 2))
    nothing = {"pixel_values": data.pixel_values, "labels": torch.full_like(data.labels, -100)}
    assert trainer.compute_loss(model, nothing) == 0.0
    run(model, tmp_path / "train", "cloud", data)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_evaluation_of_phase_1_is_over_all_classes(tmp_path):
    model, every = tiny_model(), rows(24, (0, 1, 2, 3), seed=4)
    trainer = DcCclTrainer(model, arguments(tmp_path), phase="cloud", train_dataset=rows(16, (0, 1)))
    found = trainer.evaluate(every)["eval_loss"]
    expected = F.cross_entropy(logits_of(model, every, "cloud"), every.labels)
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_a_teacher_s_labels_leave_unseen_classes_alone(tmp_path):
    data, outcomes = rows(48, (0, 1, 2)), []
    for loss in ("seen_classes", "all"):
        model = tiny_model()
        model.co_submodel.classifier[-1].bias.data[3] = 4.0  # the teacher believes in class 3
        run(model, tmp_path / loss, "teach", data, steps=40, phase1_loss=loss)
        logits = logits_of(model, data, "cloud")
        outcomes.append((logits[:, 3] - logits[:, :3].mean(-1)).mean())
    assert outcomes[1] < outcomes[0] - 0.5


@pytest.mark.parametrize("kind", ["mse", "centered_mse", "kl"])
def test_the_control_gap_decreases_over_phase_2_and_is_logged(kind, tmp_path):
    model, data, held_out = tiny_model(), rows(64, (0, 1, 2)), rows(32, (0, 1, 2), seed=9)
    model.config.control_loss = kind
    run(model, tmp_path / "cloud", "cloud", data, steps=20)
    gaps = [measured_gap(model, held_out)]
    settings = {"logging_strategy": "steps", "logging_steps": 10, "lr_scheduler_type": "constant"}
    trainer = run(model, tmp_path / "control", "control", data, steps=60, trainer=settings)
    gaps.append(measured_gap(model, held_out))
    logged = [row["control_gap"] for row in trainer.state.log_history if "control_gap" in row]
    assert len(logged) == 6
    if kind == "mse":
        assert gaps[1] < 0.6 * gaps[0] and logged[-1] < 0.6 * logged[0]
    assert trainer.state.log_history[-2]["loss"] < trainer.state.log_history[0]["loss"]


def test_a_device_package_trains_as_the_whole_does(tmp_path):
    model = tiny_model()
    package = model.device_package()
    for index, one in enumerate((model, package)):
        run(one, tmp_path / str(index), "co", rows(32, (0, 3)))
    for name, tensor in model.co_state().items():
        assert torch.equal(package.co_state()[name], tensor)


def test_it_is_a_trainer_that_evaluates_and_refuses_what_it_does_not_know(tmp_path):
    model, data = tiny_model(), rows(16, (0, 1))
    trainer = DcCclTrainer(model, arguments(tmp_path), phase="co", train_dataset=data, eval_dataset=data)
    assert isinstance(trainer, Trainer) and trainer.evaluate()["eval_loss"] > 0
    predicted = trainer.predict(data).predictions
    torch.testing.assert_close(torch.from_numpy(predicted), logits_of(model, data, "device"))
    with pytest.raises(ValueError, match="phase1_loss='some'"):
        DcCclTrainer(model, arguments(tmp_path), phase="cloud", phase1_loss="some", train_dataset=data)
    with pytest.raises(ValueError, match="phase 'device' is not known"):
        DcCclTrainer(model, arguments(tmp_path), phase="device", train_dataset=data)


def test_accumulation_changes_nothing(tmp_path):
    states = []
    for batch, accumulation in ((16, 1), (8, 2)):
        model = tiny_model("vit")
        args = arguments(
            tmp_path / str(batch),
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
        )
        DcCclTrainer(model, args, phase="co", train_dataset=rows(32, (0, 1))).train()
        states.append(model.co_state())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("phase", ["control", "teach", "co"])
def test_accumulation_changes_nothing_for_language_models(phase, tmp_path):
    ids, steps = tokens(16, 8), []
    data = [{"input_ids": row, "labels": row} for row in ids]
    for batch, accumulation in ((8, 1), (2, 4)):
        model = tiny_lm()
        before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        settings |= {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        args = arguments(tmp_path / str(batch), max_steps=1, learning_rate=1e-2, **settings)
        DcCclTrainer(model, args, phase=phase, train_dataset=data).train()
        steps.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) - before)
    assert steps[0].norm() > 1e-4
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-2, atol=1e-5)


def test_tokens_are_distilled_where_they_predict_a_label_that_counts(tmp_path):
    model, ids = tiny_lm(), tokens(2, 6)
    labels = ids.clone()
    labels[:, :3] = -100  # a prompt: its last token predicts the first that counts
    trainer = DcCclTrainer(model, arguments(tmp_path), phase="control", train_dataset=[{"input_ids": ids[0]}])
    with torch.no_grad():
        loss = trainer.compute_loss(model, {"input_ids": ids, "labels": labels})
        control, cloud = (model(ids, branch=branch).logits[:, 2:5] for branch in ("control", "cloud"))
        torch.testing.assert_close(loss, F.mse_loss(control, cloud))
        nothing = trainer.compute_loss(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)})
        assert nothing == 0.0 and trainer.compute_loss(model, {"input_ids": ids}).isfinite()


def test_language_models_have_the_same_phases(tmp_path):
    ids = tokens(16, 8)
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    parts = {"cloud": "cloud_submodel", "control": "control_model", "co": "co_submodel", "teach": "cloud_submodel"}
    model = tiny_lm()
    for phase, part in parts.items():
        before = copy.deepcopy(model.state_dict())
        trainer = run(model, tmp_path / phase, phase, data, steps=8)
        assert changed(before, model) == {part}
        assert trainer.state.log_history[-1]["train_loss"] > 0


def test_labels_are_found_in_any_map_style_set():
    data = rows(6, (1, 2))
    assert torch.equal(labels_of([data[index] for index in range(6)]), data.labels)
    text = TokenRows(tokens(3, 5))
    assert torch.equal(labels_of([text[index] for index in range(3)]), text.input_ids)
    with pytest.raises(ValueError, match="labels"):
        TokenRows(tokens(3, 5), tokens(3, 4))


def test_quality_is_of_labels_that_count():
    model, data = tiny_model(), rows(20, (0, 1))
    right = logits_of(model, data, "serve").argmax(-1) == data.labels
    data.labels[:5] = -100
    assert accuracy(model, data, "serve", batch_size=3) == pytest.approx(float(right[5:].float().mean()))
    text, lm = TokenRows(tokens(4, 6)), tiny_lm()
    with torch.no_grad():
        predicted = lm(text.input_ids, branch="serve").logits[:, :-1].argmax(-1)
        gap = (lm(text.input_ids, branch="cloud").logits - lm(text.input_ids, branch="control").logits)[:, :-1]
    found = accuracy(lm, text, "serve", batch_size=3)
    assert found == pytest.approx(float((predicted == text.input_ids[:, 1:]).float().mean()))
    assert measured_gap(lm, text, batch_size=3) == pytest.approx(float(gap.norm(dim=-1).mean()), rel=1e-5)
