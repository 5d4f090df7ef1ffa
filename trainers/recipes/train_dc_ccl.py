"""DC-CCL (arXiv 2303.10361): a cloud's large model learns classes that only a device has, and which never leave it.

    accelerate launch -m trainers.recipes.train_dc_ccl --preset demo
    python -m trainers.recipes.train_dc_ccl --preset evidence

The cloud has classes 0 to 7, the device 8 and 9 with a tenth of its images from the others; `digits` splits a ResNet,
`fashion_mnist` a ViT. Phases 1 and 2 (cloud submodel, control model) are trained once for each task and seed and are
the same for every arm; then each arm has its rounds (see `trainers.device_cloud.dc_ccl_arms`). Every arm searches the
same learning rates of its rounds on the first seed, by served accuracy on images that are not reported. A repeated
command goes on; with other data, models or plans it is refused.
"""

import copy
import dataclasses
import gc
import time
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from hf_models.dc_ccl import DcCclForImageClassification

from ..device_cloud.budget import DeviceBudget
from ..device_cloud.dc_ccl_arms import ARMS
from ..device_cloud.dc_ccl_data import DcCclData
from ..device_cloud.dc_ccl_figure import plot_bytes, plot_rounds
from ..device_cloud.dc_ccl_plan import DcCclPlan
from ..device_cloud.dc_ccl_rounds import DcCclRun, cloud_record, run_dc_ccl, train_cloud
from ..device_cloud.report import DeviceArm, DeviceCloudReport
from ..federated.core import RoundStore
from ..redaction import command_line
from ..report import (
    Data,
    FigureFile,
    Metric,
    Model,
    Results,
    collect_versions,
    device_name,
    summarise,
    write_results,
)
from .arguments import QUIET, RecipeTrainingArguments, parse_arguments, refuse_options, training_arguments_of
from .comparison import against_baselines, print_metrics, wall_seconds_so_far
from .dc_ccl_tasks import TASKS, Images, Task, divide
from .language_model import require_writable


logger = logging.get_logger(__name__)


@dataclasses.dataclass
class DcCclArguments:
    """What is compared. Lengths and rates of the phases are the task's."""

    tasks: list[str] = dataclasses.field(
        default_factory=lambda: ["digits"], metadata={"help": f"Of {', '.join(TASKS)}; the first is saved."}
    )
    arms: list[str] = dataclasses.field(
        default_factory=lambda: list(ARMS), metadata={"help": f"Of {', '.join(ARMS)}; the first is the method."}
    )
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    round_learning_rates: list[float] = dataclasses.field(
        default_factory=lambda: [3e-3, 1e-2], metadata={"help": "Of the rounds, searched by every arm."}
    )
    rounds: int = dataclasses.field(default=0, metadata={"help": "0: as many as the task has."})
    note: str = dataclasses.field(
        default="", metadata={"help": "What was changed after results were seen, for the record."}
    )


PRESETS = {
    "demo": QUIET
    | {
        "tasks": ["digits"],
        "arms": ["dc_ccl", "cloud_only", "fedavg_small", "distr_true"],
        "seeds": [0],
        "round_learning_rates": [1e-2],
        "output_dir": "runs/dc_ccl",
    },
    # Fixed before any result was seen; what was changed since is in the `note` of the committed results.
    "evidence": QUIET | {"tasks": ["digits", "fashion_mnist"], "output_dir": "runs/dc_ccl_evidence"},
    # Shapes and rates of the first author's code, as near as transformers has them; see `dc_ccl_tasks.cars_config`.
    "paper": {
        "tasks": ["imagenet_cars"],
        "arms": ["dc_ccl"],
        "seeds": [0],
        "round_learning_rates": [0.01],
        "report_to": ["tensorboard"],
        "output_dir": "runs/dc_ccl-paper",
    },
}

History = list[dict[str, Any]]


@dataclasses.dataclass
class TaskRuns:
    """A task's runs: of each arm the rate that was chosen, and a seed each its history and its part of the report."""

    images: Images
    rates: dict[str, float]
    histories: dict[str, list[History]]
    reported: dict[str, list[DeviceArm]]
    model: DcCclForImageClassification


def plan_of(task: Task, rate: float, seed: int, rounds: int) -> DcCclPlan:
    """The task's plan at a rate, for a seed."""
    plan = task.plan(rate)
    return dataclasses.replace(plan, seed=seed, rounds=rounds or plan.rounds)


def cloud_model(
    task: Task, plan: DcCclPlan, data: DcCclData, args: TrainingArguments, folder: Path
) -> DcCclForImageClassification:
    """The model after phases 1 and 2, trained once for a task and a seed. `ValueError` where `folder` has that of
    other data, another model or other phases."""
    set_seed(plan.seed)
    model = DcCclForImageClassification(task.config())
    store, described = RoundStore(folder / "cloud"), cloud_record(model, plan, data)
    if store.latest() is None:
        train_cloud(model, plan, data, training_arguments_of(args, output_dir=str(folder)))
        store.commit(0, {"model": model.state_dict()}, described)
    tensors, record = store.load(0)
    if other := [name for name in described if record.get(name) != described[name]]:
        raise ValueError(f"{store.folder} is of another {' and '.join(other)}. Give another output_dir.")
    model.load_state_dict(tensors["model"])
    return model


def run_arm(
    arm: str,
    model: DcCclForImageClassification,
    plan: DcCclPlan,
    data: DcCclData,
    args: TrainingArguments,
    budget: DeviceBudget | None,
) -> tuple[DcCclRun, DcCclForImageClassification]:
    """One run into the folder of `args`, on a copy of `model`; a finished one is only read."""
    own = copy.deepcopy(model)
    return run_dc_ccl(own, plan, data, args, arm=arm, trained=True, budget=budget), own


def run_task(name: str, args: DcCclArguments, training_args: TrainingArguments) -> TaskRuns:
    """All arms of a task: rates on the first seed, then every seed."""
    task, root = TASKS[name], Path(training_args.output_dir) / "runs" / name
    images = task.read()
    rates: dict[str, float] = {}
    histories: dict[str, list[History]] = {arm: [] for arm in args.arms}
    reported: dict[str, list[DeviceArm]] = {arm: [] for arm in args.arms}
    kept = None
    for seed in args.seeds:
        data = divide(images, task, seed)
        plan = partial(plan_of, task, seed=seed, rounds=args.rounds)
        model = cloud_model(task, plan(args.round_learning_rates[0]), data, training_args, root / f"seed{seed}")
        for arm in args.arms:
            folder = root / f"seed{seed}" / arm
            grid = args.round_learning_rates if ARMS[arm].changes else args.round_learning_rates[:1]
            tried = grid if seed == args.seeds[0] else [rates[arm]]
            outcomes = {}
            for rate in tried:
                own = training_arguments_of(training_args, output_dir=str(folder / f"lr{rate:g}"))
                outcomes[rate] = run_arm(arm, model, plan(rate), data, own, task.budget)
            scores = {rate: run.history[-1]["validation"] for rate, (run, _) in outcomes.items()}
            rates[arm] = max(scores, key=scores.get)
            run, trained = outcomes[rates[arm]]
            histories[arm].append(run.history)
            reported[arm].append(run.for_report())
            logger.warning(f"{name} seed {seed} {arm} lr {rates[arm]:g}: served {run.history[-1]['served']:.3f}")
            kept = trained if kept is None and arm == args.arms[0] else kept
    return TaskRuns(images, rates, histories, reported, kept)


def task_metrics(name: str, runs: TaskRuns) -> dict[str, Metric]:
    """Accuracies after the last round, the report of device and cloud, and how far the control model is off."""
    metrics: dict[str, Metric] = {}
    last = {arm: [history[-1] for history in seeds] for arm, seeds in runs.histories.items()}
    notes = {
        "served": "F_c + F_s after the last round, on test images of all ten classes",
        "device": "without the cloud: G + F_s, or what the arm leaves on the device",
    }
    for key, note in notes.items():
        of_arm = {
            arm: summarise([record[key] for record in records], higher_is_better=True)
            for arm, records in last.items()
            if records[0][key] is not None
        }
        metrics[f"{name}_{key}_accuracy"] = against_baselines(of_arm)
        metrics[f"{name}_{key}_accuracy"].note = note
    metrics |= {f"{name}_{key}": metric for key, metric in _device_cloud(runs.reported).items()}
    ours = next(iter(runs.histories.values()))
    for where in ("held_out", "device"):
        gaps = [history[0]["control_gap"][where] for history in ours]
        metric = summarise(gaps, higher_is_better=False, note="mean |F_c - G|; half of it bounds the gradient's error")
        metrics[f"{name}_control_gap_{where}"] = metric
    return metrics


def _device_cloud(reported: dict[str, list[DeviceArm]]) -> dict[str, Metric]:
    """The report of device and cloud, of one user: what is by user alone is left out."""
    seeds = range(len(next(iter(reported.values()))))
    reports = [
        DeviceCloudReport(
            arms={arm: runs[index] for arm, runs in reported.items()},
            quality_name="accuracy_on_device_classes",
            reference="cloud_only",
        )
        for index in seeds
    ]
    found = DeviceCloudReport.metrics(reports)
    metrics = {key: metric for key, metric in found.items() if key != "harm_rate" and "worst" not in key}
    notes = {
        "accuracy_on_device_classes_of_users": "served, on test images of the two classes that only the device has",
        "device_bytes": "what the device computes with; checked against its budget but for distr_true",
        "device_peak_bytes": "the most at a time, for one image: training where the device trains, else answering",
        "device_flops": "for one image: training where the device trains, else answering",
        "device_seconds_per_user": "of training in all rounds, by the clock of a machine that all sides share",
        "cloud_seconds": "of training in all rounds, by the clock of a machine that all sides share",
    }
    for key, note in notes.items():
        if key in metrics:
            metrics[key].note = note
    return metrics


def train(preset: str, args: DcCclArguments, training_args: TrainingArguments) -> Results:
    """Run what is missing; write the first task's model of the first seed with its device package, `results.json` and
    figures into the run folder."""
    start, root = time.perf_counter(), Path(training_args.output_dir)
    unknown = sorted(set(args.tasks) - set(TASKS)) + sorted(set(args.arms) - set(ARMS))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} not known. Tasks: {', '.join(TASKS)}. Arms: {', '.join(ARMS)}.")
    require_writable(root)
    gc.collect()
    gc.freeze()  # every Trainer run ends in a full collection, of which the libraries would be most
    runs = {name: run_task(name, args, training_args) for name in args.tasks}
    first = next(iter(runs.values()))
    model = first.model.eval()
    model.save_pretrained(root)
    model.device_package().save_pretrained(root / "device")
    results = Results(
        method="dc_ccl",
        title="DC-CCL, a cloud model that learns from a device's data without seeing it",
        preset=preset,
        seeds=args.seeds,
        command=command_line(),
        device=device_name(),
        versions=collect_versions(),
        wall_seconds=wall_seconds_so_far(root, time.perf_counter() - start),
        metrics={key: metric for name, run in runs.items() for key, metric in task_metrics(name, run).items()},
        evidence=_record(args, runs),
        data=_describe_data(runs),
        model=_describe_model(model),
        figures=[figure for name, run in runs.items() for figure in _figures(root, name, run)],
    )
    write_results(root, results)
    print_metrics(results)
    return results


def _record(args: DcCclArguments, runs: dict[str, TaskRuns]) -> dict[str, Any]:
    def part_sizes(model: DcCclForImageClassification) -> dict[str, int]:
        names = ("shared_encoder", "cloud_submodel", "control_model", "co_submodel")
        parts = {name: getattr(model, name) for name in names}
        return {n: sum(p.numel() for p in part.parameters()) for n, part in parts.items() if part is not None}

    return {
        "round_learning_rate_grid": args.round_learning_rates,
        "learning_rate_chosen_on": "the first seed; served accuracy on images held out, which are not reported",
        "tasks": {
            name: {
                "plan": plan_of(TASKS[name], args.round_learning_rates[0], args.seeds[0], args.rounds).to_json(),
                "family": run.model.config.cloud_config.model_type,
                "parameters": part_sizes(run.model),
                "device_budget": dataclasses.asdict(TASKS[name].budget) if TASKS[name].budget else None,
                "learning_rate_chosen": run.rates,
            }
            for name, run in runs.items()
        },
        "changed_after_results_were_seen": args.note,
    }


def _describe_data(runs: dict[str, TaskRuns]) -> Data:
    images = [run.images for run in runs.values()]
    return Data(
        name="; ".join(one.name for one in images),
        fingerprint=" ".join(one.fingerprint for one in images),
        license="; ".join(dict.fromkeys(one.license for one in images)),
        language=["en"],
        note="cloud: classes 0-7; device: classes 8 and 9, a tenth of its images replaced by ones of the others",
    )


def _describe_model(model: DcCclForImageClassification) -> Model:
    served = sum(parameter.numel() for name, parameter in model.named_parameters() if "control_model" not in name)
    package = sum(parameter.numel() for parameter in model.device_package().parameters())
    return Model(
        parameters_total=sum(parameter.numel() for parameter in model.parameters()),
        parameters_active=served,
        parameters_non_embedding=served,
        note=f"active: what is served, without the control model; a device holds {package:,} parameters",
    )


def _figures(root: Path, name: str, runs: TaskRuns) -> list[FigureFile]:
    label = name.replace("_", " ")
    seeds = len(next(iter(runs.histories.values())))
    rounds = plot_rounds(runs.histories, root / "figures" / f"{name}_rounds.png", title=f"{label}: accuracy by round")
    wire = plot_bytes(runs.histories, root / "figures" / f"{name}_bytes.png", title=f"{label}: accuracy by bytes")
    over = "one seed" if seeds == 1 else f"means of {seeds} seeds, shaded from the lowest to the highest"
    return [
        FigureFile(path=f"figures/{rounds.name}", caption=f"{label}: test accuracy by round and arm; {over}."),
        FigureFile(path=f"figures/{wire.name}", caption=f"{label}: bytes on the wire against served accuracy."),
    ]


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (DcCclArguments, RecipeTrainingArguments)
    preset, (args, training_args) = parse_arguments(types, PRESETS, argv, default_preset="demo")
    refuse_options(
        training_args,
        "optimizer",
        "reliability",
        because="both sides train in short runs of their own, with the optimizer that --optim names, and rounds are "
        "kept by the recipe. Leave it out.",
    )
    train(preset, args, training_args)


if __name__ == "__main__":
    main()
