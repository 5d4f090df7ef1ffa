"""Arms, seeds and learning rates: which runs a comparison makes, and what it makes of them. Nothing is trained."""

import json
import math
import statistics
import time
from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from tests.trainers.recipes.tiny_comparison import TINY
from trainers.data import train_tokenizer
from trainers.recipes import comparison as module
from trainers.recipes.arguments import DataArguments
from trainers.recipes.comparison import (
    Comparison,
    ComparisonArguments,
    Job,
    Start,
    against_baselines,
    best_learning_rate,
    compare_arms,
    load_data,
    measured_once,
    plan_of,
    quality_metric,
    run_job,
    run_jobs,
    save_data,
    write_comparison,
)
from trainers.recipes.language_model import Fit, LanguageData
from trainers.report import Model, read_results, summarise


SEEDS = [0, 1, 2]


def make_fit(job: Job, loss: float, bits: float | None = None) -> Fit:
    return Fit(
        name=job.arm,
        seed=job.seed,
        steps=job.steps,
        tokens=100 * job.steps,
        learning_rate=job.learning_rate,
        train_seconds=1.0,
        nats_per_token=loss,
        bits_per_character=loss / 2 if bits is None else bits,
        parameters=1_500_000,
        history=[],
    )


def make_comparison(root, bits: dict[str, list[float]], *, steps=10, rate=1e-3) -> Comparison:
    """A comparison whose runs ended at `bits[arm][seed]`."""
    comparison = Comparison({}, {}, root)
    for arm, values in bits.items():
        jobs = [Job(arm, seed, rate, steps) for seed, _ in enumerate(values)]
        fits = {job: make_fit(job, 2 * value, value) for job, value in zip(jobs, values, strict=True)}
        comparison.add(arm, jobs, fits)
    return comparison


@pytest.fixture
def data():
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 3, vocab_size=270, show_progress=False)
    blocks = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 3, "labels": [[1, 2, 3, 4]] * 3})
    return LanguageData({}, blocks, blocks.select([0]), tokenizer, "sha256:1")


def base_arguments(tmp_path, **options) -> TrainingArguments:
    return TrainingArguments(str(tmp_path / "run"), max_steps=10, use_cpu=True, report_to="none", **options)


# --- which runs ------------------------------------------------------------------------------------------------------


def test_every_run_has_a_folder_of_its_own(tmp_path):
    jobs = [Job(arm, seed, rate, 5) for arm in ("a", "b@3") for seed in SEEDS for rate in (1e-3, 2e-3, 1e-4)]
    assert len({job.folder(tmp_path) for job in jobs}) == len(jobs)
    assert Job("b@3", 1, 1e-4, 5).folder(tmp_path) == tmp_path / "runs" / "b@3" / "lr0.0001-seed1"


def compare(monkeypatch, tmp_path, data, loss_of, arms=("ours", "other"), **options):
    """`compare_arms` on runs that end at `loss_of(job)`; and the runs in their order."""
    ran = []

    def ends(job, base, data, build):
        ran.append(job)
        return make_fit(job, loss_of(job))

    monkeypatch.setattr(module, "run_job", ends)
    args = ComparisonArguments(arms=list(arms), seeds=SEEDS, learning_rates=[1e-3, 2e-3, 4e-3], workers=0)
    return compare_arms(args, base_arguments(tmp_path), data, None, args.arms, **options), ran


def test_each_arm_takes_its_own_best_rate_of_the_same_grid_to_the_other_seeds(monkeypatch, tmp_path, data):
    best = {"ours": 1e-3, "other": 4e-3}
    comparison, ran = compare(monkeypatch, tmp_path, data, lambda job: abs(job.learning_rate - best[job.arm]) + 1)
    grid, rest = ran[:6], ran[6:]
    assert [(job.arm, job.learning_rate) for job in grid] == [
        (arm, rate) for arm in best for rate in (1e-3, 2e-3, 4e-3)
    ]
    assert {job.seed for job in grid} == {0} and {job.steps for job in ran} == {10}
    assert [(job.arm, job.seed, job.learning_rate) for job in rest] == [(a, s, best[a]) for a in best for s in (1, 2)]
    assert comparison.learning_rates == best
    assert [fit.seed for fit in comparison.fits["other"]] == SEEDS
    assert comparison.folders("ours") == [Job("ours", s, 1e-3, 10).folder(tmp_path / "run") for s in SEEDS]


def test_an_arm_may_have_steps_and_data_of_its_own(monkeypatch, tmp_path, data):
    def job_of(arm, seed, rate):
        return Job(arm, seed, rate, {"ours": 3, "other": 7}[arm], seed + 1000)

    comparison, ran = compare(monkeypatch, tmp_path, data, lambda job: 1.0, job_of=job_of)
    assert {(job.arm, job.steps) for job in ran} == {("ours", 3), ("other", 7)}
    assert all(job.data_seed == job.seed + 1000 for job in ran)
    assert [fit.steps for fit in comparison.fits["other"]] == [7] * 3


def test_a_rate_that_diverged_is_not_the_best_and_an_arm_that_always_does_is_named():
    jobs = [Job("a", 0, rate, 1) for rate in (1e-3, 2e-3, 4e-3)]
    trials = dict(zip(jobs, [make_fit(job, loss) for job, loss in zip(jobs, (math.nan, 3.0, math.inf))]))
    trials |= {Job("b", 0, 1e-3, 1): make_fit(jobs[0], 0.1)}
    assert best_learning_rate("a", trials) == 2e-3
    with pytest.raises(ValueError, match=r"a diverged at every learning rate of \[0.001, 0.004\]"):
        best_learning_rate("a", {job: fit for job, fit in trials.items() if job.learning_rate != 2e-3})


def test_a_run_is_told_its_seed_rate_steps_and_order(monkeypatch, tmp_path, data):
    seen = {}

    def fit(name, model, data, args, callbacks, *, optimizer):
        seen.update(name=name, model=model, callbacks=callbacks, args=args, optimizer=optimizer)

    monkeypatch.setattr(module, "fit", fit)
    base = base_arguments(tmp_path, learning_rate=0.5, seed=9, resume_from_checkpoint="of another run")
    run_job(Job("ours", 2, 1e-3, 7, 1002), base, data, lambda job, data: (job.arm, [job.seed]))
    args = seen["args"]
    assert (seen["name"], seen["model"], seen["callbacks"]) == ("ours", "ours", [2])
    assert (args.seed, args.data_seed, args.learning_rate, args.max_steps) == (2, 1002, 1e-3, 7)
    assert args.resume_from_checkpoint is None
    assert args.output_dir == str(tmp_path / "run" / "runs" / "ours" / "lr0.001-seed2")
    assert (base.seed, base.learning_rate, base.max_steps) == (9, 0.5, 10)
    assert seen["optimizer"] is None and args.max_grad_norm == base.max_grad_norm
    own = Start("model", [], (torch.optim.SGD, {"lr": 1.0}), {"max_grad_norm": 0.0})
    run_job(Job("ours", 2, 1e-3, 7), base, data, lambda job, data: own)
    assert seen["optimizer"] == own.optimizer and seen["args"].max_grad_norm == 0.0


def tiny_or_nothing(job, data):
    """At the top level of the module, where a worker finds it."""
    if job.arm == "nothing":
        raise ValueError(f"no model for {job.arm} of {len(data.train)} blocks and {data.fingerprint}")
    torch.manual_seed(job.seed)
    return SigmaMoeForCausalLM(SigmaMoeConfig(**TINY)), []


def test_workers_below_several_ranks_are_refused(monkeypatch, tmp_path, data):
    base = base_arguments(tmp_path)
    monkeypatch.setattr(type(base), "world_size", 2)
    with pytest.raises(ValueError, match="workers=2 with 2 processes: give --workers 0"):
        run_jobs([Job("ours", 0, 1e-3, 1)], 2, base, data, tiny_or_nothing)


@pytest.mark.slow
def test_a_worker_computes_what_this_process_does_and_its_error_comes_back(tmp_path, data):
    jobs = [Job("ours", seed, 1e-3, 2) for seed in (0, 1)]
    here, there = tmp_path / "here", tmp_path / "there"
    options = {"per_device_train_batch_size": 1, "disable_tqdm": True, "save_strategy": "no"}
    ours = run_jobs(jobs, 0, base_arguments(here, **options), data, tiny_or_nothing)
    theirs = run_jobs(jobs, 1, base_arguments(there, **options), data, tiny_or_nothing)
    for job in jobs:
        assert theirs[job].nats_per_token == pytest.approx(ours[job].nats_per_token, rel=1e-5)
        assert (job.folder(there / "run") / "fit.json").exists()
    assert ours[jobs[0]].nats_per_token != ours[jobs[1]].nats_per_token
    with pytest.raises(ValueError, match="no model for nothing of 3 blocks and sha256:1"):
        run_jobs([Job("nothing", 0, 1e-3, 1)], 1, base_arguments(there), data, tiny_or_nothing)


def stop_or_leave_a_mark(job, data, folder):
    (folder / str(job.seed)).touch()
    if job.seed == 0:
        raise SystemExit(0)
    raise ValueError("has begun")


@pytest.mark.slow
def test_after_a_stop_no_further_run_begins(tmp_path, data):
    jobs = [Job("ours", seed, 1e-3, steps=2) for seed in range(20)]
    base = base_arguments(tmp_path)
    with pytest.raises(SystemExit):
        run_jobs(jobs, 1, base, data, partial(stop_or_leave_a_mark, folder=tmp_path))
    assert len(list(tmp_path.glob("[0-9]*"))) <= 3  # one ran, others may have been handed over already


def test_data_come_back_as_they_were(tmp_path, data):
    save_data(data, tmp_path)
    again = load_data(tmp_path, data.fingerprint)
    for split in ("train", "validation"):
        assert getattr(again, split).to_dict() == getattr(data, split).to_dict()
    assert again.tokenizer("def f(x)").input_ids == data.tokenizer("def f(x)").input_ids
    assert again.fingerprint == data.fingerprint


# --- what comes of them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "higher_is_better", "verdict"),
    [
        ([2.0, 2.1, 2.2], False, "holds"),
        ([0.8, 0.9, 1.0], False, "fails"),
        ([0.8, 1.1, 1.4], False, "null"),
        ([0.8, 0.9, 1.0], True, "holds"),
        ([2.0, 2.1, 2.2], True, "fails"),
        ([2.0, 2.1, 2.2], None, None),
    ],
)
def test_a_baseline_has_the_verdict_of_ours_against_it(others, higher_is_better, verdict):
    metrics = {
        name: summarise(v, higher_is_better=higher_is_better) for name, v in (("a", [1.0, 1.1, 1.2]), ("b", others))
    }
    ours = against_baselines(metrics)
    assert ours is metrics["a"] and ours.verdict is None
    assert list(ours.baseline) == ["b"] and ours.baseline["b"].verdict == verdict


def test_two_seeds_resolve_nothing():
    ours, others = (summarise(values, higher_is_better=False) for values in ([1.0, 1.0], [9.0, 9.0]))
    assert against_baselines({"a": ours, "b": others}).baseline["b"].verdict == "null"


def test_quality_is_that_of_the_first_arm_with_the_others_beside(tmp_path):
    bits = {"ours": [1.0, 1.1, 1.3], "better": [0.5, 0.6, 0.8], "worse": [2.0, 2.1, 2.3]}
    metric = quality_metric(make_comparison(tmp_path, bits))
    assert metric.values == bits["ours"] and metric.value == pytest.approx(statistics.fmean(bits["ours"]))
    assert metric.spread == pytest.approx(statistics.stdev(bits["ours"])) and metric.n == 3
    verdicts = {name: baseline.verdict for name, baseline in metric.baseline.items()}
    assert verdicts == {"better": "fails", "worse": "holds"}
    assert metric.note == "1.5M parameters, 1,000 tokens, learning rate 0.001"


def test_the_record_says_what_was_fixed_and_what_was_chosen_at_an_edge(tmp_path):
    comparison = make_comparison(tmp_path, {"ours": [1.0]}, rate=2e-3)
    other = Job("other", 0, 4e-3, 5)
    comparison.add("other", [other], {other: make_fit(other, 1.0)})
    args = ComparisonArguments(learning_rates=[1e-3, 2e-3, 4e-3], note="nothing")
    plan = plan_of(args, base_arguments(tmp_path), comparison)
    assert plan["learning_rate_chosen"] == {"ours": 2e-3, "other": 4e-3}
    assert plan["learning_rate_at_the_edge_of_the_grid"] == ["other"]
    assert (plan["steps"], plan["tokens"]) == (10, 1000)
    assert plan["changed_after_results_were_seen"] == "nothing"
    assert plan["parameters"] == {"ours": 1_500_000, "other": 1_500_000}
    json.dumps(plan)


def test_a_measurement_is_made_once(tmp_path):
    answers = iter([1.25, 9.0])
    assert [measured_once(tmp_path / "ratio.json", lambda: next(answers)) for _ in range(3)] == [1.25] * 3


def test_what_is_written_holds_the_plan_and_all_seconds_and_the_screen_every_number(tmp_path, data, capsys):
    comparison = make_comparison(tmp_path, {"ours": [1.0, 1.1, 1.2], "b": [2.0, 2.1, 2.2]})
    args, base = ComparisonArguments(seeds=SEEDS, learning_rates=[1e-3], note="nothing"), base_arguments(tmp_path)
    for seconds in (2.0, 4.0):  # two invocations of one command
        written = write_comparison(
            comparison,
            args,
            base,
            data,
            DataArguments(dataset_name="stdlib"),
            started=time.perf_counter() - seconds,
            method="mone",
            title="Title",
            preset="demo",
            metrics={"bits": quality_metric(comparison), "single": summarise([3.0])},
            evidence={"steps": 7, "own": 1},
            model=Model(parameters_total=3, parameters_active=2, parameters_non_embedding=1),
        )
    assert read_results(tmp_path) == written
    assert written.wall_seconds == pytest.approx(6.0, abs=1.0)
    assert written.data.fingerprint == data.fingerprint and written.seeds == SEEDS
    assert (written.evidence["steps"], written.evidence["own"]) == (7, 1)
    assert written.evidence["changed_after_results_were_seen"] == "nothing"
    lines = capsys.readouterr().out.splitlines()
    assert lines == 2 * ["bits: 1.1000 +- 0.1000", "    b: 2.1000 +- 0.1000  holds", "single: 3.0000 +- 0.0000"]


def test_one_rate_is_no_choice(tmp_path):
    comparison = make_comparison(tmp_path, {"ours": [1.0]}, rate=2e-3)
    plan = plan_of(ComparisonArguments(learning_rates=[2e-3]), base_arguments(tmp_path), comparison)
    assert plan["learning_rate_chosen"] == {"ours": 2e-3}
    assert not {"learning_rate_chosen_on", "learning_rate_at_the_edge_of_the_grid"} & plan.keys()
