"""Data-based, feature-based and parameter-based collaboration of a cloud and a device on one task, in one report.

    python -m trainers.recipes.compare_collaboration --preset demo          # scikit-learn's digits, one seed
    python -m trainers.recipes.compare_collaboration --preset evidence      # three seeds

The cloud has classes 0 to 7, the device 8 and 9 (see `trainers.recipes.train_dc_ccl`). Every method starts from the
same trained cloud model, takes the same number of steps a side (DC-CCL and the small model's FedAvg tune a head after
each round besides), and serves the same test images through a metered wire. Every method that learns searches the same
learning rates on the first seed, by what it serves on images that are neither trained nor tested on; others of these
are the public images of distillation, whose labels nobody reads. Assisted generation has a task of its own, text, and
the same columns (see `trainers.recipes.collaboration_text`). The classes are those of
the survey of arXiv 2504.15300; which method is in which is our reading (see `trainers.device_cloud.collaboration`).
There is no paper to reproduce here, so no paper preset. A repeated command goes on.
"""

import copy
import dataclasses
import gc
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from ..device_cloud.budget import DeviceBudget, DeviceCost
from ..device_cloud.collaboration_arms import DcCclMethod
from ..device_cloud.collaboration_distillation import UNLABELLED, PublicDistillation
from ..device_cloud.collaboration_figure import plot_collaboration
from ..device_cloud.collaboration_split import SplitInference
from ..device_cloud.collaboration_task import CollaborationMethod, CollaborationTask, as_json
from ..device_cloud.dc_ccl_arms import ARMS
from ..device_cloud.dc_ccl_data import DcCclData, ImageRows, columns
from ..device_cloud.dc_ccl_plan import DcCclPlan
from ..federated.core import RoundStore, WireMeter
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
from .collaboration_text import REQUESTS, WRITERS, compare_writers
from .comparison import against_baselines, wall_seconds_so_far
from .dc_ccl_tasks import TASKS, Images, divide
from .kept_results import deciding_settings, differences, kept
from .language_model import require_writable
from .train_dc_ccl import cloud_model, plan_of


logger = logging.get_logger(__name__)

CUTS = {"digits": "cloud_submodel.resnet.encoder.stages.0", "fashion_mnist": "cloud_submodel.vit.layers.0"}
METHODS = (
    "dc_ccl",
    "fedavg_small",
    "public_distillation",
    "public_distillation_cloud_images",
    "split_inference",
    "split_learning",
    "cloud_only",
    "device_only",
    "central",
)
QUANTITIES = {  # name: (unit, whether higher is better, what a reader must know)
    "served_accuracy": ("", True, "all test images, as users get them"),
    "served_accuracy_cloud_classes": ("", True, "test images of the cloud's classes"),
    "served_accuracy_device_classes": ("", True, "test images of the classes that only the device has"),
    "device_accuracy": ("", True, "all test images, answered without the cloud"),
    "bytes_up": ("bytes", False, "while learning, what the device sends"),
    "bytes_down": ("bytes", False, "while learning, what the cloud sends, models included"),
    "request_bytes_up": ("bytes", False, "of one request"),
    "request_bytes_down": ("bytes", False, "of one answer"),
    "cloud_calls_per_request": ("", False, ""),
    "device_parameters": ("", False, "of what answers or computes on the device"),
    "device_bytes": ("bytes", False, "resident, parameters and buffers"),
    "device_peak_bytes": ("bytes", False, "of tensors, one image at a time, inference"),
    "device_flops": ("FLOPs", False, "of one image, inference"),
}


@dataclasses.dataclass
class CollaborationArguments:
    """What is compared."""

    task: str = dataclasses.field(default="digits", metadata={"help": f"Of {', '.join(CUTS)}."})
    methods: list[str] = dataclasses.field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Of {', '.join(METHODS)}; the first is reported on."}
    )
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    round_learning_rates: list[float] = dataclasses.field(
        default_factory=lambda: [3e-3, 1e-2], metadata={"help": "Of the device's part, searched by every method."}
    )
    rounds: int = dataclasses.field(default=0, metadata={"help": "0: as many as the task has."})
    exchanges: int = dataclasses.field(default=3, metadata={"help": "Of logits, in public-set distillation."})
    writing_steps: int = dataclasses.field(
        default=200, metadata={"help": "Of training the model that writes text for assisted generation; 0: no text."}
    )
    cut: str = dataclasses.field(default="", metadata={"help": "Module behind which the model is split."})
    max_device_parameters: int = dataclasses.field(default=0, metadata={"help": "Refuse what is larger; 0: no limit."})


PRESETS = {
    "demo": QUIET | {"seeds": [0], "round_learning_rates": [1e-2], "output_dir": "runs/collaboration"},
    # Fixed before any result was seen.
    "evidence": QUIET | {"seeds": [0, 1, 2], "output_dir": "runs/collaboration_evidence"},
}
Outcomes = dict[str, list[dict[str, Any]]]


def methods_of(args: CollaborationArguments) -> dict[str, CollaborationMethod]:
    """The methods asked for, by name. `ValueError` for one that is not known."""
    cut = args.cut or CUTS[args.task]
    known: dict[str, CollaborationMethod] = {
        "public_distillation": PublicDistillation(exchanges=args.exchanges),
        "public_distillation_cloud_images": PublicDistillation(exchanges=args.exchanges, public="cloud"),
        "split_inference": SplitInference(cut=cut),
        "split_learning": SplitInference(cut=cut, learn=True),
    }
    arms = ("dc_ccl", "fedavg_small", "cloud_only", "device_only", "central")
    known |= {arm: DcCclMethod(arm=arm) for arm in arms}
    unknown = [name for name in args.methods if name not in known]
    if unknown or not args.methods:
        raise ValueError(f"method {', '.join(unknown) or '(none)'} is not known. Choose of {', '.join(METHODS)}.")
    return {name: known[name] for name in args.methods}


def task_of(
    images: Images, args: CollaborationArguments, training_args: TrainingArguments, seed: int, folder: Path
) -> CollaborationTask:
    """The task of one seed, its cloud model trained or read. Of the images that are held out, one half is to choose
    rates on; the other is public, its labels gone.

    Raises:
        ValueError: the folder holds a cloud model of other settings.
    """
    task = TASKS[args.task]
    data, public = held_out_in_two(divide(images, task, seed))
    plan = plan_of(task, args.round_learning_rates[0], seed, args.rounds)
    made_of = {
        "images": images.fingerprint,
        "plan": {name: value for name, value in plan.to_json().items() if name in ("cloud", "control", "seed")},
        "training": deciding_settings(training_args),
    }
    if (folder / "cloud").exists() and not (folder / "cloud.json").exists():
        raise ValueError(f"{folder.name}/cloud does not say what it was made of. Give another --output_dir.")
    kept(folder / "cloud.json", made_of, lambda: None)
    model = cloud_model(task, plan, data, training_args, folder)
    return CollaborationTask(
        data=data, model=lambda: copy.deepcopy(model), plan=plan, args=training_args, unlabelled=public
    )


def held_out_in_two(data: DcCclData) -> tuple[DcCclData, ImageRows]:
    """The data with the first half of its validation images, and the second half without labels."""
    found = columns(data.validation)
    pixels, labels = found["pixel_values"], found["labels"]
    half = len(labels) // 2
    hidden = torch.full_like(labels[half:], UNLABELLED)
    return dataclasses.replace(data, validation=ImageRows(pixels[:half], labels[:half])), ImageRows(
        pixels[half:], hidden
    )


def planned(task: CollaborationTask, plan: DcCclPlan, folder: Path) -> CollaborationTask:
    """The task with the rates of `plan`, in a folder of its own."""
    return dataclasses.replace(task, plan=plan, args=training_arguments_of(task.args, output_dir=str(folder)))


def best_rate(
    method: CollaborationMethod, task: CollaborationTask, plans: Mapping[float, DcCclPlan], folder: Path
) -> float:
    """The rate whose plan makes the method serve the validation images best; the first if it learns nothing."""
    first = next(iter(plans))
    learns = method.learn if isinstance(method, SplitInference) else True
    if isinstance(method, DcCclMethod):
        learns = bool(ARMS[method.arm].changes)
    if len(plans) == 1 or not learns:
        return first
    asked = dataclasses.replace(task, data=dataclasses.replace(task.data, test=task.data.validation))
    scores = {}
    for rate, plan in plans.items():
        scores[rate] = run_method(method, planned(asked, plan, folder / f"rate{rate:g}"), None)["served_accuracy"]
    return max(scores, key=scores.get)


def run_method(method: CollaborationMethod, task: CollaborationTask, budget: DeviceBudget | None) -> dict[str, Any]:
    """What a method comes to, from its folder where it has finished.

    Raises:
        ValueError: the folder holds the outcome of other settings; the message names them.
        DeviceBudgetError: it does not fit the device.
    """
    store = RoundStore(task.folder / "outcome")
    described = {
        "method": repr(method),
        "plan": task.plan.to_json(),
        "data": task.fingerprint,
        "training": deciding_settings(task.args),
        "budget": budget and dataclasses.asdict(budget),
    }
    if store.latest() is None:
        start, meter = time.perf_counter(), WireMeter()
        set_seed(task.plan.seed)
        served = method.train(task, meter, budget)
        outcome = as_json(served, meter, task) | {"seconds": time.perf_counter() - start}
        record = {"run": described, "outcome": outcome, "wire": meter.state_dict()}
        store.commit(0, {"served": {"logits": served.logits}}, record)
    _, record = store.load(0)
    if budget is not None and record["outcome"]["device_parameters"] is not None:
        sizes = {name: record["outcome"][f"device_{name}"] for name in ("parameters", "bytes", "peak_bytes", "flops")}
        budget.admit(DeviceCost(**sizes), method.name)
    if differ := differences(record["run"], json.loads(json.dumps(described))):
        raise ValueError(
            f"{task.folder.name} holds a run of other settings ({', '.join(differ[:5])}). Give another --output_dir."
        )
    return record["outcome"]


def metrics_of(outcomes: Outcomes) -> dict[str, Metric]:
    """Every quantity that the first method has, the others beside it; what a method lacks is left out."""
    metrics: dict[str, Metric] = {}
    ours = next(iter(outcomes))
    for quantity, (unit, better, note) in QUANTITIES.items():
        of_method = {
            name: summarise([seed[quantity] for seed in seeds], unit=unit, higher_is_better=better)
            for name, seeds in outcomes.items()
            if all(seed.get(quantity) is not None for seed in seeds)
        }
        if ours in of_method:
            metrics[quantity] = against_baselines(of_method)
            metrics[quantity].note = note
    return metrics


def side_by_side(outcomes: Outcomes, kinds: dict[str, str]) -> str:
    """Means over seeds as a Markdown table, a row a method, sorted by class."""
    shown = [name for name in QUANTITIES if any(name in seed for seeds in outcomes.values() for seed in seeds)]
    shown.remove("device_bytes")
    lines = [["class", "method", *(name.replace("_", " ") for name in shown)], ["---"] * (len(shown) + 2)]
    for name in sorted(outcomes, key=lambda one: kinds[one]):
        cells = []
        for quantity in shown:
            values = [seed.get(quantity) for seed in outcomes[name]]
            mean = None if None in values else sum(values) / len(values)
            cells.append("–" if mean is None else f"{mean:.3f}" if "accuracy" in quantity else f"{mean:,.0f}")
        lines.append([kinds[name], name.replace("_", " "), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def train(preset: str, args: CollaborationArguments, training_args: TrainingArguments) -> Results:
    """Run what is missing; write `results.json` and the figure into the run folder, and print the table."""
    start, root = time.perf_counter(), Path(training_args.output_dir)
    if args.task not in CUTS:
        raise ValueError(f"task {args.task!r} is not known. Choose one of {', '.join(CUTS)}.")
    methods = methods_of(args)
    require_writable(root)
    gc.collect()
    gc.freeze()  # every Trainer run ends in a full collection, of which the libraries would be most
    images = TASKS[args.task].read()
    budget = DeviceBudget(max_parameters=args.max_device_parameters) if args.max_device_parameters else None
    outcomes: Outcomes = {name: [] for name in methods}
    rates: dict[str, float] = {}
    for seed in args.seeds:
        folder = root / "runs" / args.task / f"seed{seed}"
        task = task_of(images, args, training_args, seed, folder)
        plans = {rate: plan_of(TASKS[args.task], rate, seed, args.rounds) for rate in args.round_learning_rates}
        for name, method in methods.items():
            if name not in rates:
                rates[name] = best_rate(method, task, plans, folder / "rates" / name)
            outcome = run_method(method, planned(task, plans[rates[name]], folder / name), budget)
            outcomes[name].append(outcome)
            logger.warning(f"seed {seed} {name}: served {outcome['served_accuracy']:.3f}, {outcome['seconds']:.0f} s")
    kinds = {name: method.kind or "none" for name, method in methods.items()}
    results = _results(preset, args, root, images, task, outcomes, kinds, rates)
    if args.writing_steps:
        writers = compare_writers(training_args, args.writing_steps, args.seeds, root, budget)
        add_writers(results, writers, args.writing_steps)
        kinds |= {writer.name: writer.kind or "none" for writer in WRITERS}
        print(side_by_side(writers, kinds) + "\n")
    results.wall_seconds = wall_seconds_so_far(root, time.perf_counter() - start)
    write_results(root, results)
    print(side_by_side(outcomes, kinds))
    return results


def add_writers(results: Results, writers: Outcomes, steps: int) -> None:
    """The task of text beside that of images: its metrics are called `text_...`."""
    for name, metric in metrics_of(writers).items():
        notes = {"served_accuracy": "of the next held-out character", "device_accuracy": "the same, without the cloud"}
        notes |= {"cloud_calls_per_request": "forwards of the cloud's model", "device_flops": "of one prompt"}
        metric.note = notes.get(name, metric.note.replace("one image at a time", "one prompt at a time"))
        results.metrics[f"text_{name}"] = metric
    classes = {writer.name: writer.kind or "none" for writer in WRITERS}
    results.evidence["text"] = {"model": "an M-MoE of four layers, trained on the standard library", "steps": steps}
    results.evidence["text"] |= {"requests": REQUESTS, "classes": classes}


def _results(
    preset: str,
    args: CollaborationArguments,
    root: Path,
    images: Images,
    task: CollaborationTask,
    outcomes: Outcomes,
    kinds: dict[str, str],
    rates: dict[str, float],
) -> Results:
    figure = plot_collaboration(
        outcomes, kinds, root / "figures" / "collaboration.png", title=f"{args.task.replace('_', ' ')}: three classes"
    )
    model = task.model()
    total = sum(parameter.numel() for parameter in model.parameters())
    evidence = {
        "round_learning_rate_grid": args.round_learning_rates,
        "learning_rate_chosen": rates,
        "learning_rate_chosen_on": "the first seed; served accuracy on half of the images held out, not reported",
        "plan": task.plan.to_json(),
        "exchanges": args.exchanges,
        "cut": args.cut or CUTS[args.task],
        "classes": dict(kinds),
        "class_assignment": "ours, not the survey's",
        "seconds": {name: [seed["seconds"] for seed in seeds] for name, seeds in outcomes.items()},
    }
    return Results(
        method="compare_collaboration",
        title="Data, feature and parameter-based collaboration on one task",
        preset=preset,
        seeds=args.seeds,
        command=command_line(),
        device=device_name(),
        versions=collect_versions(),
        wall_seconds=0.0,
        metrics=metrics_of(outcomes),
        evidence=evidence,
        data=Data(
            name=images.name,
            fingerprint=images.fingerprint,
            license=images.license,
            language=["en"],
            note="cloud: classes 0-7; device: classes 8 and 9. Of the images held out, of all classes, one half "
            "chooses rates, the other is public, its labels not read",
        ),
        model=Model(
            parameters_total=total,
            parameters_active=total - sum(parameter.numel() for parameter in model.control_model.parameters()),
            parameters_non_embedding=total,
            note="of the cloud's model with its control model; active: without it",
        ),
        figures=[
            FigureFile(
                path=f"figures/{figure.name}",
                caption="Served accuracy over bytes while learning and per request; shapes are classes of methods.",
            )
        ],
    )


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (CollaborationArguments, RecipeTrainingArguments)
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
