"""Spikes in series with closed forms, and put into real runs."""

import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.trainers.callbacks.test_installation import make_model, make_rows, train
from tests.trainers.reliability.test_loss_guard import make_trainer, newest
from trainers.callbacks.loss_spike import LossSpikeCallback, SpikeDetector
from trainers.reliability.events import read_events
from trainers.reliability.rollback import train_with_rollback


def verdicts(detector, losses, first=1):
    found = [detector.update(step, loss) for step, loss in enumerate(losses, first)]
    return [verdict for verdict in found if verdict is not None]


# --- the rules on series ---------------------------------------------------------------------------------------------


def alternating(n, low=1.0, high=3.0):
    """Median 2, MAD 1."""
    return [low if i % 2 else high for i in range(n)]


def test_robust_z_in_closed_form():
    detector = SpikeDetector(window=200)
    assert verdicts(detector, alternating(200)) == []
    assert detector.robust_z(2.0 + 8 * 1.4826) == pytest.approx(8.0)
    assert detector.robust_z(2.0) == 0.0


@pytest.mark.parametrize(("excess", "rings"), [(8 * 1.4826 - 1e-3, False), (8 * 1.4826 + 1e-3, True)])
def test_the_threshold_of_z(excess, rings):
    found = verdicts(SpikeDetector(), [*alternating(200), 2.0 + excess])
    assert [v.kind for v in found] == ["spike"] * rings
    if rings:
        assert (found[0].step, found[0].rules, found[0].before) == (201, ("robust_z",), 2.0)
        assert found[0].z == pytest.approx(8.0, abs=1e-2)


@pytest.mark.parametrize(("loss", "rings"), [(30.0, False), (30.001, True)])
def test_megatrons_rule(loss, rings):
    """Over ten times the maximum of the first hundred, whatever has been since."""
    detector = SpikeDetector(threshold=1e9)
    assert verdicts(detector, [*alternating(100), *[1.5] * 300]) == []
    assert [v.rules for v in verdicts(detector, [loss], 401)] == [("megatron",)] * rings


def test_megatrons_rule_waits_for_its_hundred():
    detector = SpikeDetector(threshold=1e9)
    assert verdicts(detector, [*[1.0] * 99, 11.0]) == []  # the hundredth is one of them
    assert verdicts(detector, [110.5], 101)[0].rules == ("megatron",)


def test_only_upwards():
    assert verdicts(SpikeDetector(), [*alternating(200), -100.0, 0.0]) == []


def test_a_falling_loss_is_no_spike():
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(3000, generator=generator)
    losses = [2.0 + 8.0 * math.exp(-t / 300) + noise[t].item() for t in range(3000)]
    assert verdicts(SpikeDetector(), losses) == []


def test_a_constant_loss_has_no_infinite_z():
    detector = SpikeDetector(floor=1e-3)
    verdicts(detector, [2.0] * 50)
    assert detector.robust_z(2.0 + 0.002) == pytest.approx(1.0)
    assert verdicts(detector, [2.001], 51) == []


def test_the_window_forgets():
    detector = SpikeDetector(window=20)
    verdicts(detector, [*alternating(100, 100.0, 102.0), *alternating(20)])
    assert detector.robust_z(3.0) == pytest.approx(1 / 1.4826)


@pytest.mark.parametrize(("level", "kind"), [(2.0, "recovered"), (2.099, "recovered"), (2.101, "irrecoverable")])
def test_recovery_is_the_median_of_the_next_steps(level, kind):
    # Of 11 steps five are still high: the median is one of the others.
    series = [*alternating(200), 50.0, *[40.0] * 5, *[level] * 6, *[level] * 30]
    found = verdicts(SpikeDetector(follow=11, delta=0.1), series)
    assert [(v.kind, v.step) for v in found] == [("spike", 201), (kind, 212)]
    assert (found[1].before, found[1].after, found[1].spike_step) == (2.0, level, 201)


def test_a_new_level_rings_once():
    for level in (20.0, 60.0):  # the second is above ten times the first maximum
        detector = SpikeDetector(follow=10)
        found = verdicts(detector, [*alternating(200), *[level + i % 2 for i in range(300)]])
        assert [v.kind for v in found] == ["spike", "irrecoverable"]
        # Down again, and up once more: that is another one.
        assert verdicts(detector, alternating(250), 501) == []
        assert [v.rules for v in verdicts(detector, [61.0], 751)] == [("megatron", "robust_z")]


def test_nan_is_a_spike():
    found = verdicts(SpikeDetector(follow=3), [*[2.0] * 30, math.nan, 2.0, 2.0, 2.0, 2.0])
    assert [(v.kind, v.rules) for v in found] == [("spike", ("not_finite",)), ("recovered", ("not_finite",))]
    lost = verdicts(SpikeDetector(follow=3), [*[2.0] * 30, *[math.nan] * 4])
    assert [v.kind for v in lost] == ["spike", "irrecoverable"] and lost[1].after == math.inf
    assert [v.kind for v in verdicts(SpikeDetector(follow=2), [math.nan, 2.0, 2.0])] == ["spike", "recovered"]


def test_going_back_forgets():
    detector, straight = SpikeDetector(follow=50), SpikeDetector(follow=50)
    verdicts(detector, [*alternating(210), 90.0, 90.0])
    detector.forget_after(150)
    verdicts(straight, alternating(150))
    for each in (detector, straight):
        assert verdicts(each, alternating(60), 151) == []
    assert list(detector.recent)[-150:] == list(straight.recent)[-150:]
    assert [v.step for v in verdicts(detector, [90.0], 211)] == [211]


@pytest.mark.parametrize(
    ("option", "value"), [("calibration", 0), ("window", 5), ("follow", 0), ("factor", 0.0), ("delta", -1.0)]
)
def test_options_are_checked(option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        LossSpikeCallback(**{option: value})


def test_policies_are_checked():
    with pytest.raises(ValueError, match="policy='stop'.*'report', 'rollback'"):
        LossSpikeCallback("stop")
    with pytest.raises(ValueError, match="margin=-1"):
        LossSpikeCallback(margin=-1)


# --- in a Trainer ----------------------------------------------------------------------------------------------------


class Damage(TrainerCallback):
    """Destroys the head once, before the given step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.step = None
            model.lm_head.weight.data.mul_(300.0)


class Losses(TrainerCallback):
    def __init__(self, watched):
        self.watched, self.seen = watched, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.watched.detector.recent[-1][1])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_loss_is_that_of_the_step(tmp_path, accumulation):
    callback = LossSpikeCallback()
    losses = Losses(callback)
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 6}
    trainer = train(make_model(router_aux_loss_coef=0.0), tmp_path, callback, losses, **options)
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses.seen == pytest.approx(logged, rel=1e-4)
    assert not (tmp_path / "events.jsonl").exists() and not trainer.model._forward_hooks


def test_a_spike_that_stays_is_reported(tmp_path):
    callback = LossSpikeCallback(calibration=20, window=20, follow=4, delta=0.5)
    train(make_model(), tmp_path, Damage(26), callback, max_steps=34, learning_rate=1e-4)
    spike, lost = read_events(tmp_path)
    assert (spike.step, spike.severity, spike.action) == (26, "warning", "none")
    assert spike.evidence["rules"] == ["megatron", "robust_z"] and "jumps to" in spike.message
    assert (lost.step, lost.severity, lost.evidence["kind"]) == (30, "error", "irrecoverable")
    assert lost.evidence["after"] > lost.evidence["before"] + 0.5


def test_rollback_to_before_the_spike(tmp_path):
    callback, steps = LossSpikeCallback("rollback", calibration=20, window=20, follow=4, delta=0.5), []
    losses = Losses(callback)

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    damage = Damage(26)
    trainer = make_trainer(tmp_path, Steps(), damage, callback, losses, max_steps=32, save_steps=5, learning_rate=1e-4)
    trainer.train_dataset = make_rows(512)
    train_with_rollback(trainer, find_checkpoint=newest)
    assert steps == [*range(1, 31), *range(26, 33)]
    assert sorted(p.name for p in tmp_path.glob("abandoned-*")) == []  # checkpoint-30 is written after the step's end
    [spike, lost, back] = [e for e in read_events(tmp_path) if e.component in ("loss_spike", "rollback")]
    assert lost.action == "rollback" and back.evidence["checkpoint"] == 25
    assert back.evidence["skipped_batches"] == 2 * (30 - 25)
    assert losses.seen[-1] < lost.evidence["before"] + 0.5


def test_where_trainer_forms_the_loss_it_says_so_once_and_the_run_goes_on(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            labels = inputs["labels"]
            logits = model(input_ids=inputs["input_ids"]).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    args = TrainingArguments(str(tmp_path), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Own(make_model(), args, train_dataset=make_rows(8), callbacks=[LossSpikeCallback()])
    trainer.train()
    (event,) = read_events(tmp_path)
    assert event.step == 1 and event.severity == "warning" and "spikes are not watched" in event.message
    assert trainer.state.global_step == 3
