"""What `finetune_on_device` compares: clouds, arms and seeds, measured by user; finished cells are kept."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hf_models.ctr import CtrForCtrPrediction

from ..data import CtrData, CtrRows
from ..data.drifted_clicks import draw_drifted_clicks
from ..device_cloud import DeviceArm, DeviceCloudReport, DeviceCost
from ..device_cloud.label_correction import Correction, ctr_statistics
from ..device_cloud.on_device import OnDeviceArguments, OnDeviceFineTuner
from ..evaluation.users import auc_by_user, gauc, harm_rate, ranking_metrics
from ..federated.core import WireMeter
from ..figures import comparison_figure
from ..report import FigureFile, Metric, summarise
from .comparison import against_baselines
from .ctr_training import train_ctr
from .kept_results import deciding_settings, kept


CLOUD = "cloud"
MOST_DRAWN = 7
QUANTITIES = {  # name in a cell: (unit, whether higher is better)
    "gauc": ("", True),
    "auc": ("", True),
    "log_loss": ("nats", False),
    "worst_decile": ("", True),
    "calibration": ("", False),
    "harm_rate": ("", False),
    "users_per_second": ("users/s", True),
    "bytes_down_per_user": ("bytes", False),
}
OF_DEVICES = (  # of the report by user and device, besides
    *("auc_cold_users", "device_seconds_per_user", "device_parameters", "device_bytes", "device_peak_bytes"),
    "device_flops",
)


def cold_users_of(data: CtrData, share: float) -> frozenset[int]:
    """Users, evenly over all, whose rows no cloud learns from; their devices fine-tune like all others."""
    users = len(data.user_names)
    return frozenset(np.linspace(0, users - 1, round(share * users)).round().astype(int).tolist())


@dataclasses.dataclass(frozen=True)
class Plan:
    """A comparison: `data` by architecture and, in `seen`, what of it the cloud learns from; `corrections` by arm,
    None for the cloud's model as it is."""

    root: Path
    args: Any
    device_args: OnDeviceArguments
    cloud_args: Any
    data: Mapping[str, CtrData]
    seen: Mapping[str, CtrData]
    corrections: Mapping[str, Correction | None]

    def folder(self, architecture: str, seed: int) -> Path:
        """Of one cloud and what was made of it."""
        return self.root / "cells" / f"{architecture}-seed{seed}"

    def training(self, architecture: str, seed: int) -> Any:
        """Arguments of the cloud's training."""
        own = {"architecture": architecture, "seed": seed, "resume_from_checkpoint": None}
        folder = self.folder(architecture, seed) / "cloud"
        return dataclasses.replace(self.cloud_args, output_dir=str(folder), **own)

    def made_of(self, architecture: str, seed: int, arm: str = CLOUD, **more: Any) -> dict[str, Any]:
        """What decides the numbers of a cell, as far as the plan knows it."""
        correction = self.corrections[arm] if arm in self.corrections else None
        return {
            "cloud": deciding_settings(self.training(architecture, seed)),
            "cloud_data": self.seen[architecture].fingerprint,
            "data": self.data[architecture].fingerprint,
            "correction": correction and dataclasses.asdict(correction),
            **more,
        }


def compare_corrections(plan: Plan) -> tuple[CtrForCtrPrediction, dict[str, Metric], dict[str, Any], list[FigureFile]]:
    """The first cloud's model, all metrics, what is for the record, and the figures."""
    cells, clouds, rates, models = {}, {}, {}, []
    first_seed = plan.args.seeds[0]
    bar = tqdm(total=len(plan.args.architectures) * len(plan.args.seeds) * len(plan.corrections), desc="arms")
    for architecture in plan.args.architectures:
        for seed in plan.args.seeds:
            model, clouds[architecture, seed] = cloud_model(plan, architecture, seed)
            models = models or [model]
            for arm, correction in plan.corrections.items():
                if seed == first_seed and correction is not None:
                    rates[architecture, arm] = best_rate(plan, architecture, arm, model)
                rate = rates.get((architecture, arm))
                cells[architecture, seed, arm] = measured_arm(plan, architecture, seed, arm, model, rate)
                bar.update()
    bar.close()
    metrics = evidence_metrics(plan, cells)
    return models[0], metrics, _record(plan, clouds, rates), _figures(plan, cells, metrics)


def cloud_model(plan: Plan, architecture: str, seed: int) -> tuple[CtrForCtrPrediction, dict[str, Any]]:
    """Trained on everybody, or read back."""
    folder = plan.folder(architecture, seed) / "cloud"

    def fit() -> dict[str, Any]:
        model, measured = train_ctr(plan.training(architecture, seed), plan.seen[architecture])
        model.save_pretrained(folder / "model")
        return measured

    fitted = kept(folder / "fit.json", plan.made_of(architecture, seed), fit)
    return CtrForCtrPrediction.from_pretrained(folder / "model").eval(), fitted


def best_rate(plan: Plan, architecture: str, arm: str, model: CtrForCtrPrediction) -> float:
    """The learning rate of the best validation GAUC of some users, none of whom rolls back; none at which a user
    diverges. `ValueError` if there is no such rate."""
    grid, seed = plan.args.device_learning_rates, plan.args.seeds[0]
    if len(grid) == 1:
        return grid[0]

    def search() -> dict[str, float | None]:
        data = plan.data[architecture]
        rows, validation = _some_users(data.rows("train"), data.rows("validation"), plan.args.tune_users)
        found = {}
        for rate in grid:
            args = dataclasses.replace(plan.device_args, device_learning_rate=rate, roll_back=False)
            tuner = OnDeviceFineTuner(model, args, correction=plan.corrections[arm])
            results = tuner.fit(rows, predict={"validation": validation})
            logits, labels = results.logits["validation"].numpy(), validation.tensors["labels"].numpy()
            diverged = bool((results.best_step == 0).any())  # who did serves the cloud's model, which must not count
            score = math.nan if diverged else gauc(logits, labels, validation.users.numpy())
            found[f"{rate:g}"] = score if math.isfinite(score) else None
        return found

    device = dataclasses.asdict(plan.device_args) | {"device_learning_rate": grid, "roll_back": False}
    made_of = plan.made_of(architecture, seed, arm, device=device, tune_users=plan.args.tune_users)
    scores = kept(plan.folder(architecture, seed) / "rates" / f"{arm}.json", made_of, search)
    usable = {rate: scores[f"{rate:g}"] for rate in grid if scores[f"{rate:g}"] is not None}
    if not usable:
        raise ValueError(f"{architecture} {arm}: users diverge at every learning rate of {grid}. Give smaller ones.")
    return max(usable, key=usable.get)


_USED = ("train", "validation", "test")


def _some_users(train: CtrRows, validation: CtrRows, count: int) -> tuple[CtrRows, CtrRows]:
    """Both parts' rows of the same users, evenly over all who train."""
    users = train.users.unique()
    chosen = users[np.linspace(0, len(users) - 1, min(count, len(users))).round().astype(int)].numpy()
    return tuple(part.select(np.isin(part.users.numpy(), chosen)) for part in (train, validation))


def measured_arm(
    plan: Plan, architecture: str, seed: int, arm: str, model: CtrForCtrPrediction, rate: float | None
) -> dict[str, Any]:
    """One cell: every user fine-tuned, measured on their last rows."""
    folder = plan.folder(architecture, seed) / arm
    if arm == CLOUD:
        args, made_of = plan.device_args, plan.made_of(architecture, seed)
    else:
        args = dataclasses.replace(plan.device_args, device_learning_rate=rate)
        device = dataclasses.asdict(args) | {"save_users": plan.args.save_users}
        made_of = plan.made_of(architecture, seed, arm, device=device)
    done = folder / ("untuned.json" if arm == CLOUD else "measured.json")
    return kept(done, made_of, lambda: _measure(plan, architecture, arm, model, args, folder))


def _measure(plan: Plan, architecture: str, arm: str, model, args: OnDeviceArguments, folder: Path) -> dict[str, Any]:
    train, validation, test = (plan.data[architecture].rows(split) for split in _USED)
    meter = WireMeter()
    tuner = OnDeviceFineTuner(model, args, correction=plan.corrections[arm], meter=meter)
    known: dict[str, Any] = {}
    if arm == CLOUD:
        logits = tuner.predict_cloud(test)
    else:
        results = tuner.fit(
            train,
            validation=validation,
            predict={"test": test},
            store=folder / "users",
            keep_parameters=plan.args.save_users,
        )
        logits = results.logits["test"]
        tuned = results.best_step >= 0
        known = {
            "users_per_second": int(tuned.sum()) / max(results.cpu_seconds, 1e-9),
            "device_seconds": results.cpu_seconds / max(1, int(tuned.sum())),
            "wire": meter.totals(),
            "bytes_down_per_user": meter.totals()["down"] / len(results.users),
            "cost": dataclasses.asdict(results.cost),
            "tuned": int(tuned.sum()),
            "accepted": int(results.accepted.sum()),
            "seconds": results.seconds,
            "cpu_seconds": results.cpu_seconds,
            "learning_rate": args.device_learning_rate,
        }
    labels, users = test.tensors["labels"].numpy(), test.users.numpy()
    by_user = auc_by_user(logits.numpy(), labels, users)
    quality = [None if np.isnan(value) else value for value in by_user.values.tolist()]
    return (
        known | ranking_metrics(logits.numpy(), labels, users) | {"users": by_user.users.tolist(), "quality": quality}
    )


Cells = Mapping[tuple[str, int, str], dict[str, Any]]


def evidence_metrics(plan: Plan, cells: Cells) -> dict[str, Metric]:
    """Each quantity of the first arm, with the others as its baselines: over all models, then of each."""
    metrics = {}
    groups = {"": plan.args.architectures} | {f"_{name}": [name] for name in plan.args.architectures}
    if len(plan.args.architectures) == 1:
        del groups[""]
    for suffix, architectures in groups.items():
        for quantity, (unit, higher) in QUANTITIES.items():
            arms = {}
            for arm in plan.corrections:
                values = [
                    np.mean([_value(cells, architecture, seed, arm, quantity) for architecture in architectures])
                    for seed in plan.args.seeds
                ]
                if np.isfinite(values).all():
                    arms[arm] = summarise(values, unit=unit, higher_is_better=higher)
            if next(iter(plan.corrections)) in arms:
                metrics[f"{quantity}{suffix}"] = against_baselines(arms)
    for architecture in plan.args.architectures:
        metrics |= _device_metrics(plan, cells, architecture)
    for name, metric in metrics.items():
        if name.startswith("users_per_second"):
            metric.note = "fine-tuned users over CPU seconds of one process"
    return metrics


def _device_metrics(plan: Plan, cells: Cells, architecture: str) -> dict[str, Metric]:
    """What a device needs, and how users fare whom the cloud has never seen."""
    seeds = plan.args.seeds
    found = DeviceCloudReport.metrics([report_of(plan, cells, architecture, seed) for seed in seeds])
    metrics = {f"{name}_{architecture}": found[name] for name in OF_DEVICES if name in found}
    for name, metric in metrics.items():
        metric.note = f"{len(cold_users_of(plan.data[architecture], plan.args.cold_share))} users" * ("cold" in name)
        costs = name.startswith(("device_parameters", "device_bytes", "device_peak", "device_flops"))
        if costs and all(baseline.values == metric.values for baseline in metric.baseline.values()):
            metric.baseline, metric.note = {}, "the same for all that fine-tune"
    return metrics


def _value(cells: Cells, architecture: str, seed: int, arm: str, quantity: str) -> float:
    """NaN for what the arm has not."""
    cell = cells[architecture, seed, arm]
    if quantity == "harm_rate":
        if arm == CLOUD or (architecture, seed, CLOUD) not in cells:
            return float("nan")
        ours, cloud = (np.array(part["quality"], dtype=float) for part in (cell, cells[architecture, seed, CLOUD]))
        return harm_rate(ours, cloud)
    return float(cell.get(quantity, float("nan")))


def drawn_arms(arms: Sequence[str]) -> list[str]:
    """The first arms, as many as there are colours; the cloud, over which gains are drawn, is among them."""
    named = [arm for arm in arms if not arm.endswith("_smoothed") and arm != CLOUD][: MOST_DRAWN - 1]
    return [arm for arm in arms if arm in named or arm == CLOUD]


def report_of(
    plan: Plan, cells: Cells, architecture: str, seed: int, named: Sequence[str] | None = None
) -> DeviceCloudReport:
    """The users of one cloud under all arms, or those that are `named`."""
    arms: dict[str, DeviceArm] = {}
    for arm in plan.corrections if named is None else named:
        cell = cells[architecture, seed, arm]
        quality = {user: math.nan if value is None else value for user, value in zip(cell["users"], cell["quality"])}
        extra = {}
        if "wire" in cell:
            extra = {
                "wire": cell["wire"],
                "cost": DeviceCost(**cell["cost"]),
                "device_seconds": cell["device_seconds"],
            }
        arms[arm] = DeviceArm(quality=quality, **extra)
    cold = cold_users_of(plan.data[architecture], plan.args.cold_share)
    return DeviceCloudReport(arms=arms, quality_name="auc", reference=CLOUD, cold_users=cold)


def _record(plan: Plan, clouds: Mapping, rates: Mapping) -> dict[str, Any]:
    any_data = plan.data[plan.args.architectures[0]]
    train = any_data.rows("train")
    drift = ctr_statistics(train.tensors["labels"], train.users)
    drawn = draw_drifted_clicks(drift=plan.args.drift).splits["train"]
    grid = plan.args.device_learning_rates
    edge = [f"{a} {arm}" for (a, arm), rate in rates.items() if len(grid) > 1 and rate in (min(grid), max(grid))]
    return {
        "architectures": plan.args.architectures,
        "device": dataclasses.asdict(plan.device_args),
        "learning_rate_grid": grid,
        "learning_rate_chosen": {f"{architecture} {arm}": rate for (architecture, arm), rate in rates.items()},
        "learning_rate_at_the_edge_of_the_grid": edge,
        "learning_rate_chosen_on": f"validation GAUC of {plan.args.tune_users} users of the first seed, no roll-back",
        "smoothing_strength": plan.args.strength,
        "history_length": plan.args.history_length,
        "histories": "end where training ends: no click of validation or test is in them",
        "users_that_no_cloud_has_seen": len(cold_users_of(any_data, plan.args.cold_share)),
        "drift_of_the_training_rows": {
            "global_ctr": drift.global_ctr,
            "sd_of_local_ctr": drift.drift_sd,
            **{f"share_of_users_off_by_more_than_{limit}": share for limit, share in drift.deviating.items()},
            "sd_of_local_ctr_of_drawn_clicks": ctr_statistics(np.array(drawn["label"][:]), drawn["user"][:]).drift_sd,
        },
        "cloud": {
            f"{architecture} seed {seed}": {
                name: fit[name] for name in ("best_epoch", "epochs", "seconds", "parameters")
            }
            for (architecture, seed), fit in clouds.items()
        },
        "changed_after_results_were_seen": plan.args.note,
    }


def _figures(plan: Plan, cells: Cells, metrics: Mapping[str, Metric]) -> list[FigureFile]:
    folder, seed = plan.root / "figures", plan.args.seeds[0]
    figures = []
    if CLOUD in plan.corrections:
        for architecture in plan.args.architectures:
            report = report_of(plan, cells, architecture, seed, drawn_arms(list(plan.corrections)))
            report.figure(folder / f"users_{architecture}.png")
            caption = f"AUC that users gain over the cloud's {architecture}, seed {seed}, and bytes down."
            figures.append(FigureFile(path=f"figures/users_{architecture}.png", caption=caption))
    suffix = "" if len(plan.args.architectures) > 1 else f"_{plan.args.architectures[0]}"
    draw = partial(_bars, metrics, folder, next(iter(plan.corrections)))
    figures.append(draw(f"log_loss{suffix}", "log loss on later ratings (nats)", higher_is_better=False))
    figures.append(draw(f"gauc{suffix}", "GAUC on later ratings", higher_is_better=True))
    return figures


def _bars(
    metrics: Mapping[str, Metric], folder: Path, first: str, name: str, label: str, *, higher_is_better: bool
) -> FigureFile:
    metric = metrics[name]
    groups = {first: metric.values} | {arm: other.values for arm, other in metric.baseline.items()}
    comparison_figure(groups, folder / f"{name}.png", y_label=label, higher_is_better=higher_is_better)
    return FigureFile(path=f"figures/{name}.png", caption=f"{label}, mean over models where there are several.")


__all__ = ["Plan", "cloud_model", "cold_users_of", "compare_corrections", "evidence_metrics", "report_of"]
