"""Fine-tune a model of the click-through rate on every user's device, with and without label correction.

    python -m trainers.recipes.finetune_on_device --preset demo      # one model, minutes
    python -m trainers.recipes.finetune_on_device --preset evidence  # five models, three seeds, all corrections

A cloud trains on all users' earlier ratings, mixed. Each user then fine-tunes a copy on their own ratings, plainly or
with a correction of the prior (see `trainers.device_cloud.label_correction`), and is measured on their later ratings.
Every arm searches the same learning rates on the first seed, by the GAUC of its users' validation ratings without
roll-back. Some users are new to the cloud, which learns nothing from them. DIN's histories end where training ends. A
repeated command goes on: finished users are kept. After On-Device Model Fine-Tuning with Label Correction
in Recommender Systems (arXiv 2211.01163), of which we know the abstract.
"""

import dataclasses
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..data import CtrData, encode_ctr, user_split
from ..data.ctr import CtrColumns
from ..data.drifted_clicks import COLUMNS as DRIFTED_COLUMNS
from ..data.drifted_clicks import draw_drifted_clicks
from ..data.movielens import MOVIELENS_COLUMNS, read_movielens_100k
from ..device_cloud.label_correction import Correction
from ..device_cloud.on_device import OnDeviceArguments
from ..redaction import command_line
from ..report import Data, Model, Results, collect_versions, device_name, write_results
from .arguments import parse_arguments
from .comparison import print_metrics, wall_seconds_so_far
from .ctr_training import CtrTrainingArguments
from .language_model import require_writable
from .on_device_evidence import Plan, cold_users_of, compare_corrections


ARCHITECTURES = ["lr", "wide_deep", "pnn", "deepfm", "din"]
ALL_ARMS = [
    *("scale_global", "cloud", "plain", "scale_model", "scale_smoothed"),
    *("shift_global", "shift_model", "shift_smoothed"),
    *("offset_global", "offset_model", "offset_smoothed"),
    *("reweight_global", "reweight_model", "reweight_smoothed", "bias"),
]


@dataclasses.dataclass
class CorrectionArguments:
    """What is compared, and on which data."""

    data_name: str = dataclasses.field(default="movielens-100k", metadata={"help": "or drifted-clicks, drawn."})
    architectures: list[str] = dataclasses.field(default_factory=lambda: ["deepfm"])
    arms: list[str] = dataclasses.field(
        default_factory=lambda: ["scale_global", "cloud", "plain", "scale_model", "offset_model"],
        metadata={"help": "cloud, plain, bias, or METHOD_PRIOR; the first is the method, the others its baselines."},
    )
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    device_learning_rates: list[float] = dataclasses.field(default_factory=lambda: [0.01, 0.03, 0.1, 0.3])
    tune_users: int = dataclasses.field(
        default=300, metadata={"help": "Users, of the first seed, that the learning rate is chosen on."}
    )
    strength: float = dataclasses.field(default=10.0, metadata={"help": "Of the prior `smoothed`, in samples."})
    history_length: int = dataclasses.field(
        default=10, metadata={"help": "Earlier positives that DIN attends over; the other models have no history."}
    )
    cold_share: float = dataclasses.field(
        default=0.05, metadata={"help": "Share of the users that the cloud does not learn from."}
    )
    drift: float = 3.0
    save_users: bool = dataclasses.field(default=False, metadata={"help": "Keep every user's parameters."})
    note: str = dataclasses.field(
        default="", metadata={"help": "What was changed after results were seen, for the record."}
    )


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "output_dir": "runs/on_device_demo",
        "save_users": True,
        "max_samples": 80,
        "device_steps": 5,
        "device_learning_rates": [0.03],
    },
    "evidence": {
        "output_dir": "runs/on_device_evidence",
        "architectures": ARCHITECTURES,
        "arms": ["scale_global", "cloud", "plain", "scale_model", "shift_global", "offset_model"],
        "seeds": [0, 1, 2],
        "device_learning_rates": [0.01, 0.03, 0.1, 0.3, 1.0],
        "max_samples": 80,
        "device_steps": 5,
        "tune_users": 150,
        "note": "The grid of device learning rates: 0.1 to 1 at first; 0.01 to 0.3 after the first cell (DeepFM, seed "
        "0: cloud, plain, scale_global), where they were too high; 0.01 to 1 after a run that was broken off, in "
        "which LR had chosen the upper edge; below the lower one a rate comes to the cloud's model. That run was "
        "seen; nine of its arms are left out here to save time. Since then some users are held from the cloud, "
        "histories end where training ends, and values that occur once are unknown.",
    },
}


def correction_of(arm: str, global_ctr: float, strength: float) -> Correction:
    """What an arm does to its labels. `ValueError` for an unknown one."""
    method, _, prior = {"plain": "none"}.get(arm, arm).partition("_")
    try:
        return Correction(method=method, prior=prior or "global", global_ctr=global_ctr, strength=strength)
    except ValueError as error:
        raise ValueError(f"arm {arm!r}: {error}") from error


# the row of unknown values is trained, and histories hold no click that is validated or tested on
ENCODING: dict[str, Any] = {"min_count": 2, "history_until": "train"}


@lru_cache(maxsize=2)
def load_data(name: str, history_length: int, drift: float) -> CtrData:
    """`train`, `validation` and `test` of every user, the earliest rows first. `ValueError` for an unknown name."""
    if name == "drifted-clicks":
        drawn = draw_drifted_clicks(drift=drift)
        rows = drawn.splits["train"]
        rows = rows.add_column("time", list(range(len(rows))))
        splits = user_split(rows, "user", time_column="time")
        return encode_ctr(splits, _timed(DRIFTED_COLUMNS), history_length=history_length, **ENCODING)
    if name != "movielens-100k":
        raise ValueError(f"data_name {name!r} is not known; choose from movielens-100k, drifted-clicks.")
    rows = read_movielens_100k().sort("timestamp")
    splits = user_split(rows, MOVIELENS_COLUMNS.user, time_column=MOVIELENS_COLUMNS.time)
    return encode_ctr(splits, MOVIELENS_COLUMNS, history_length=history_length, **ENCODING)


def _timed(columns: CtrColumns) -> CtrColumns:
    return dataclasses.replace(columns, time="time")


def finetune(
    preset: str, args: CorrectionArguments, device_args: OnDeviceArguments, cloud_args: CtrTrainingArguments
) -> Results:
    """Run what is missing; write the cloud's model, `results.json` and figures into the run folder."""
    start, root = time.perf_counter(), Path(cloud_args.output_dir)
    require_writable(root)
    data = {
        name: load_data(args.data_name, args.history_length if name == "din" else 0, args.drift)
        for name in args.architectures
    }
    seen = {
        name: part.without_users(cold_users_of(part, args.cold_share), ("train", "validation"))
        for name, part in data.items()
    }
    any_data, prior = data[args.architectures[0]], seen[args.architectures[0]].prior
    corrections = {arm: None if arm == "cloud" else correction_of(arm, prior, args.strength) for arm in args.arms}
    plan = Plan(root, args, device_args, cloud_args, data, seen, corrections)
    model, metrics, record, figures = compare_corrections(plan)
    model.save_pretrained(root)
    results = Results(
        method="label_correction",
        title="Fine-tuning on devices with label correction (our reading)",
        preset=preset,
        seeds=args.seeds,
        command=command_line(),
        device=device_name(),
        versions=collect_versions(),
        wall_seconds=wall_seconds_so_far(root, time.perf_counter() - start),
        metrics=metrics,
        evidence=record,
        data=describe(args, any_data),
        model=Model(
            parameters_total=model.num_parameters(),
            parameters_active=model.num_parameters() - _tables(model),
            parameters_non_embedding=model.num_parameters() - _tables(model),
            note=f"the cloud's {args.architectures[0]} of seed {args.seeds[0]}; active: without tables",
        ),
        figures=figures,
    )
    write_results(root, results)
    print_metrics(results)
    return results


def _tables(model: torch.nn.Module) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Embedding))


def describe(args: CorrectionArguments, data: CtrData) -> Data:
    """The data as the card names it."""
    movielens = args.data_name == "movielens-100k"
    rows = {name: len(split) for name, split in data.splits.items()}
    sizes = ", ".join(f"{name} {count:,}" for name, count in rows.items())
    cold = len(cold_users_of(data, args.cold_share))
    return Data(
        name="MovieLens 100k, positive from 4 stars" if movielens else f"drawn clicks, drift {args.drift:g}",
        fingerprint=data.fingerprint,
        license="other" if movielens else "apache-2.0",
        language=["en"],
        note=f"{len(data.user_names)} users, each split 60/20/20 by time; rows: {sizes}. The cloud learns nothing "
        f"from {cold} of the users. Values that occur once in training are unknown. "
        + ("Read from the wheel of recbole 1.2.1; its terms forbid passing it on." if movielens else ""),
    )


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (CorrectionArguments, OnDeviceArguments, CtrTrainingArguments)
    preset, (args, device_args, cloud_args) = parse_arguments(types, PRESETS, argv, default_preset="demo")
    try:
        for arm in args.arms:
            if arm != "cloud":
                correction_of(arm, 0.5, args.strength)
        finetune(preset, args, device_args, cloud_args)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
