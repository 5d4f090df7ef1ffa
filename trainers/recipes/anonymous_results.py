"""What the comparison of anonymous personalisation says: every accuracy with its privacy beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluation.privacy import user_entropy_report
from ..evaluation.privacy_figure import plot_tradeoff
from ..report import FigureFile, Metric, summarise, verdict
from .anonymous_study import ArmFit, parse_arm
from .comparison import against_baselines


Fits = Mapping[str, Sequence[ArmFit]]  # arm -> seeds, the first arm being the method


def study_metrics(fits: Fits, prefix: str = "") -> dict[str, Metric]:
    """Accuracy (of all users, of the worst decile, of volunteers and of the others), attribution, linkage and
    membership: of the first arm, with the others as its baselines."""
    metrics = {}
    for name, higher, value in (
        ("accuracy", True, lambda fit: fit.accuracy),
        ("accuracy_worst_decile_of_users", True, lambda fit: fit.accuracy_worst_decile),
        ("accuracy_of_who_may_volunteer", True, lambda fit: fit.accuracy_volunteers),
        ("accuracy_of_who_never_volunteers", True, lambda fit: fit.accuracy_others),
        ("attribution", False, lambda fit: fit.privacy["attribution"]),
        ("membership_auc", False, lambda fit: fit.membership_auc),
    ):
        groups = {arm: summarise([value(f) for f in seeds], higher_is_better=higher) for arm, seeds in fits.items()}
        if name.startswith("accuracy"):
            for arm, metric in groups.items():
                metric.note = privacy_note(fits[arm])
        metrics[prefix + name] = against_baselines(groups)
    drawn = {arm: seeds for arm, seeds in fits.items() if "linkage_auc" in seeds[0].privacy}
    if next(iter(fits)) in drawn:
        for name, value in (
            ("attribution_of_4_linked_uploads", lambda fit: fit.privacy["attribution_linked"]["4"]),
            ("linkage_auc", lambda fit: fit.privacy["linkage_auc"]),
        ):
            metrics[prefix + name] = against_baselines(
                {arm: summarise([value(f) for f in seeds], higher_is_better=False) for arm, seeds in drawn.items()}
            )
    asked = {arm: seeds for arm, seeds in fits.items() if "attribution_volunteers" in seeds[0].privacy}
    if next(iter(fits)) in asked:
        for name in ("attribution_volunteers", "attribution_all_users"):
            groups = {
                arm: summarise([fit.privacy[name] for fit in seeds], higher_is_better=False)
                for arm, seeds in asked.items()
            }
            metrics[prefix + name] = against_baselines(groups)
    return metrics


def privacy_note(fits: Sequence[ArmFit]) -> str:
    """In words, for beside a number."""
    first = fits[0].privacy
    if fits[0].arm == "on_device":
        return "uploads nothing; each device keeps a model of its own"
    mean = sum(fit.privacy["attribution"] for fit in fits) / len(fits)
    parts = [f"attribution {mean:.3f} (guessing {first['chance']:.3f})"]
    if "attribution_volunteers" in first:
        parts[0] += " of who did not volunteer, 1 of the volunteers"
    if fits[0].arm == "static":
        parts = ["attribution 1: the embedding is an identifier"]
    if first.get("bound") is not None:
        parts.append(f"proved to be at most {max(fit.privacy['bound'] for fit in fits):.3f}")
    if first.get("epsilon") is not None:
        parts.append(f"epsilon {first['epsilon']:.1f} at delta {first['delta']:g} for one upload's embedding")
    if first.get("radius_over_std_mean") is not None:
        parts.append(f"mean r/sigma {first['radius_over_std_mean']:.2f}")
    return "; ".join(parts)


def study_record(fits: Fits) -> dict[str, Any]:
    """Means of every privacy number, learning rates, bytes and seconds, for `evidence`."""
    record: dict[str, Any] = {}
    for arm, seeds in fits.items():
        record[arm] = {
            "learning_rate": seeds[0].learning_rate,
            "bytes_up_per_text": round(seeds[0].bytes_per_text, 1),
            "seconds": [round(fit.seconds, 1) for fit in seeds],
            "privacy": _means([fit.privacy for fit in seeds]),
        }
        if seeds[0].recovery is not None:
            record[arm]["mixture_recovery"] = _means([fit.recovery for fit in seeds])
    return record


def against_on_device(fits: Fits) -> dict[str, dict[str, Any]]:
    """By anonymous arm: by how much its accuracy lies above (or below) that of fine-tuning on the device, which
    uploads nothing, and whether that holds over the seeds. Empty without such an arm."""
    alone, found = fits.get("on_device"), {}
    for arm, seeds in fits.items() if alone else ():
        if parse_arm(arm).kind in ("on_device", "central", "static"):
            continue
        ours, theirs = [fit.accuracy for fit in seeds], [fit.accuracy for fit in alone]
        found[arm] = {
            "difference": round((sum(ours) - sum(theirs)) / len(ours), 4),
            "verdict": verdict(ours, theirs, True),
            "attribution": round(sum(fit.privacy["attribution"] for fit in seeds) / len(seeds), 4),
        }
    return found


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each number's mean over the seeds; what is not there is left out."""
    first = rows[0]
    found: dict[str, Any] = {}
    for name, value in first.items():
        if isinstance(value, Mapping):
            found[name] = _means([row[name] for row in rows])
        elif value is not None:
            found[name] = round(sum(row[name] for row in rows) / len(rows), 4)
    return found


def entropy_record(fits: Fits, num_classes: int) -> list[dict[str, Any]]:
    """Accuracy of every arm by how much the first arm's prediction depends on the user; first seed."""
    first = next(iter(fits.values()))[0]
    if first.user_predictions is None:
        return []
    correct = {arm: torch.tensor(seeds[0].hits) > 0.5 for arm, seeds in fits.items()}
    bins = user_entropy_report(torch.tensor(first.user_predictions), correct, num_classes)
    return [{"entropy": [round(b.low, 3), round(b.high, 3)], "texts": b.count, "accuracy": b.accuracy} for b in bins]


def tradeoff_figure(fits: Fits, root: Path, name: str, what: str) -> FigureFile:
    """Accuracy over attribution, all arms."""
    points = {arm: [(fit.privacy["attribution"], fit.accuracy) for fit in seeds] for arm, seeds in fits.items()}
    chance = min(seeds[0].privacy["chance"] for seeds in fits.values())  # among all users
    plot_tradeoff(points, root / "figures" / name, chance=chance, y_label=what)
    count = len(next(iter(fits.values())))
    dots = "small dots are seeds" if count > 1 else "one seed"
    return FigureFile(
        path=f"figures/{name}",
        caption=f"{what.capitalize()} of each design over the worst-case attribution of one upload, in the designs "
        f"with volunteers that of the others among themselves; {dots}.",
    )


__all__ = ["against_on_device", "entropy_record", "privacy_note", "study_metrics", "study_record", "tradeoff_figure"]
