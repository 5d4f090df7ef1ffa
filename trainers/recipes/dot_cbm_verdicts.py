"""What the evidence on DOT-CBM says: its two claims, interventions, every quantity for every arm, and the figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..report import FigureFile, Metric, summarise, verdict
from .comparison import against_baselines
from .dot_cbm_arms import LABELS
from .dot_cbm_data import ID
from .dot_cbm_explanations import arms_figure, intervention_figure
from .train_dot_cbm import NOTES, direction, flat


Measured = Mapping[str, list[dict[str, Any]]]  # arm -> seed -> what was measured

TABLE = {
    "accuracy_id": "classes; the background is the class's own 80 % of the time, as in training",
    "accuracy_ood30": "the same figures, 30 % of the time",
    "accuracy_ood0": "the same figures, each on the background of a uniformly drawn class",
    "concept_auc_id": "mean over the concepts",
    "concept_auc_ood0": "mean over the concepts",
    "pointing_id": "the heatmap's peak lies in the part's mask",
    "energy_in_mask_id": "share of the heatmap's sum inside the part's mask, free of a threshold",
    "miou_id": "box around what is above 0.6 of the maximum, as in the paper, against the mask's box",
    "miou_best_threshold_id": "the same at the threshold that is best on validating images, for each arm",
    "part_ap_id": "AP of the parts at an IoU of 0.5, at the paper's threshold",
    "concept_f1_id": "mean over the concepts, at a probability of one half",
    **{name: NOTES[name] for name in ("leakage_hard", "leakage_shuffled", "leakage_true", "nec", "accuracy_at_nec_5")},
    "accuracy_of_sparse_head_5": "accuracy of a classifier that was trained to use five concepts a class",
    "impurity_niche": "NIS: AUC of a concept from the probabilities of those that do not correlate with it; lower is "
    "purer",
}
OURS = "conditional_both"
LOCALISATION = ("pointing", "energy_in_mask", "miou", "miou_best_threshold")
WITHOUT_TRANSPORT = ("dot", "mean", "vanilla", "cem")
WITH_SHORTCUT = "trained with the shortcut, the class's own background 80 % of the time"
WITHOUT_SHORTCUT = "trained and tested without the shortcut, on backgrounds of uniformly drawn classes"
PRIORS = ("conditional_prior", "conditional_prior_cls", "conditional_mask_prior")


def evidence_metrics(measured: Measured, edges: Sequence[str] = ()) -> dict[str, Metric]:
    """The two claims, each by itself; every quantity for every arm; whether interventions help. `edges`: arms whose
    rate is at the edge of the grid, which notes say."""
    numbers = numbers_of(measured)
    metrics = first_claim(numbers, edges, WITH_SHORTCUT) | second_claim(numbers, edges)
    ours = first_arm(numbers)
    for name, note in TABLE.items():
        groups = {arm: values_of(numbers[arm], name) for arm in dict.fromkeys((ours, *numbers))}
        if groups[ours]:
            metrics[name] = compared(groups, note, direction(name))
    chance = values_of(numbers[ours], f"chance_{ID}")
    for name in (f"pointing_{ID}", f"energy_in_mask_{ID}"):
        if chance and name in metrics:
            uniform = summarise(chance, higher_is_better=True)
            uniform.verdict = verdict(metrics[name].values, chance, higher_is_better=True)
            metrics[name].baseline["a uniform heatmap"] = uniform
    return metrics | intervention_metrics(measured, ours)


def first_arm(arms: Mapping[str, Any]) -> str:
    """The method, or the first arm of a comparison without it."""
    return OURS if OURS in arms else next(iter(arms))


def compared(groups: Mapping[str, Sequence[float]], note: str, higher_is_better: bool | None = True) -> Metric:
    """A metric of the first of `groups`, the seeds of an arm each, against the others; empty ones are left out."""
    options = {"higher_is_better": higher_is_better}
    metric = against_baselines(
        {LABELS.get(arm, arm): summarise(values, **options) for arm, values in groups.items() if values}
    )
    metric.note = note
    return metric


def numbers_of(measured: Measured) -> dict[str, list[dict[str, float]]]:
    """Arm -> seed -> name -> number."""
    return {arm: [flat_with_grad_cam(seed) for seed in seeds] for arm, seeds in measured.items()}


def first_claim(
    numbers: Mapping[str, list[dict[str, float]]], edges: Sequence[str], setting: str
) -> dict[str, Metric]:
    """Claim 1: transport, by itself, looks at the right place more than what has no transport, and than a uniform
    heatmap. `setting`: what the arms were trained on, for the notes."""
    metrics = {}
    for name in LOCALISATION:
        arms = [arm for arm in ("conditional", *WITHOUT_TRANSPORT) if arm in numbers]
        groups = {arm: values_of(numbers[arm], f"{name}_{ID}") for arm in arms}
        for arm in ("vanilla", "cem"):
            found = values_of(numbers.get(arm, []), f"grad_cam_{name}_{ID}")
            groups |= {f"{LABELS[arm]}, Grad-CAM": found} if found else {}
        if name in ("pointing", "energy_in_mask"):
            groups["a uniform heatmap"] = values_of(numbers.get("conditional", []), f"chance_{ID}")
        if groups.get("conditional") and any(groups[arm] for arm in groups if arm != "conditional"):
            note = f"transport with uniform marginals and no orthogonality, {setting}{at_edges(groups, edges)}"
            metrics[f"claim_1_{name}"] = compared(groups, note)
    return metrics


def second_claim(numbers: Mapping[str, list[dict[str, float]]], edges: Sequence[str]) -> dict[str, Metric]:
    """Claim 2: the saliency prior, by itself, helps under shift; for the best saliency, the paper's, and the true
    mask."""
    metrics = {}
    for arm in PRIORS:
        for name in ("accuracy_ood30", "accuracy_ood0"):
            groups = {which: values_of(numbers.get(which, []), name) for which in (arm, "conditional")}
            if all(groups.values()):
                note = "with the saliency prior against without it, each at its own learning rate"
                note += at_edges(groups, edges)
                metrics[f"claim_2_{arm.removeprefix('conditional_')}_{name}"] = compared(groups, note)
    return metrics


def without_shortcut_metrics(measured: Measured, edges: Sequence[str] = ()) -> dict[str, Metric]:
    """Claim 1 once more, of arms that were trained where backgrounds say nothing of classes."""
    found = first_claim(numbers_of(measured), edges, WITHOUT_SHORTCUT)
    return {f"{name}_without_shortcut": metric for name, metric in found.items()}


def at_edges(groups: Mapping[str, Any], edges: Sequence[str]) -> str:
    """Which of `groups` have a rate at the edge of the grid, where a better one may lie beyond it."""
    labels = [LABELS[arm] for arm in groups if arm in edges]
    return f"; rate at the edge of the grid: {', '.join(labels)}" if labels else ""


def measured_on(metrics: Mapping[str, Metric]) -> dict[str, str]:
    """Which arm a claim is about, for the metrics that are not the method's own."""
    found = {name: LABELS["conditional"] for name in metrics if name.startswith("claim_1_")}
    for arm in PRIORS:
        start = f"claim_2_{arm.removeprefix('conditional_')}_accuracy"
        found |= {name: LABELS[arm] for name in metrics if name.startswith(start)}
    return found


def intervention_metrics(measured: Measured, ours: str) -> dict[str, Metric]:
    """Accuracy with half and with all of the groups set to the truth against that of the untouched model; gain and
    largest fall from one step of a curve to the next, for ours and every arm with concepts."""
    metrics = {}
    for policy in ("random", "uncertainty"):
        curves = {
            arm: [seed["curves"][ID][policy] for seed in seeds]
            for arm, seeds in measured.items()
            if all("curves" in seed for seed in seeds)
        }
        if ours not in curves:
            continue
        for share in ("half", "all"):
            groups = {
                "set": [curve[len(curve) // 2 if share == "half" else -1] for curve in curves[ours]],
                "no group set": [curve[0] for curve in curves[ours]],
            }
            note = f"accuracy with {share} of the groups of concepts set to the truth"
            metrics[f"interventions_{policy}_{share}"] = compared(groups, note)
        gains = {LABELS.get(arm, arm): summarise([curve[-1] - curve[0] for curve in curves[arm]]) for arm in curves}
        falls = {LABELS.get(arm, arm): summarise([largest_fall(curve) for curve in curves[arm]]) for arm in curves}
        gain, fall = (values.pop(LABELS.get(ours, ours)) for values in (gains, falls))
        gain.baseline, gain.note = gains, "accuracy with all groups set to the truth, less that of the untouched model"
        metrics[f"interventions_{policy}_gain"] = gain
        fall.baseline = falls
        fall.note = "largest fall of accuracy from one step to the next; 0 if the curve only rises"
        metrics[f"interventions_{policy}_largest_fall"] = fall
    return metrics


def largest_fall(curve: Sequence[float]) -> float:
    """The largest decrease between neighbours; 0 for a curve that never falls."""
    return float(max(0.0, -np.diff(curve).min())) if len(curve) > 1 else 0.0


def flat_with_grad_cam(measured: dict[str, Any]) -> dict[str, float]:
    """[`flat`], and what was measured with Grad-CAM as `grad_cam_pointing_id`."""
    maps = {name: value for name, value in measured.items() if name.startswith("grad_cam_")}
    numbers = flat({name: value for name, value in measured.items() if name not in maps})
    for name, values in maps.items():
        numbers |= {f"grad_cam_{kind}_{name.removeprefix('grad_cam_')}": value for kind, value in values.items()}
    return numbers


def values_of(seeds: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """One value a seed; empty where any seed lacks it."""
    values = [seed[name] for seed in seeds if name in seed]
    return values if len(values) == len(seeds) else []


def evidence_figures(measured: Measured, root: Path) -> list[FigureFile]:
    """Accuracy under shift, localisation, and intervention curves."""
    numbers = numbers_of(measured)
    ours = first_arm(numbers)
    figures = []
    for name, label, caption in (
        ("accuracy_ood0", "accuracy, background of a random class", "Accuracy under the strongest shift."),
        ("accuracy_id", "accuracy in distribution", "Accuracy in distribution."),
        (f"energy_in_mask_{ID}", "energy of heatmaps inside the part", "Localisation, free of a threshold."),
        (f"pointing_{ID}", "peaks of heatmaps inside the part", "The pointing game."),
    ):
        groups = {arm: values_of(numbers[arm], name) for arm in dict.fromkeys((ours, *numbers))}
        groups = {arm: values for arm, values in groups.items() if values}
        if groups:
            caption += " Bars are means, dots are seeds, whiskers standard deviations."
            figures.append(arms_figure(groups, root, name, y_label=label, caption=caption))
    curves = {}
    for arm in dict.fromkeys((ours, "vanilla")):
        for policy in ("random", "uncertainty"):
            own = [seed["curves"][ID][policy] for seed in measured.get(arm, []) if "curves" in seed]
            if own:
                curves[f"{LABELS.get(arm, arm)}; {policy}"] = np.mean(own, axis=0).tolist()
    return figures + ([intervention_figure(curves, root)] if curves else [])


__all__ = [
    "OURS",
    "compared",
    "evidence_figures",
    "evidence_metrics",
    "first_claim",
    "flat_with_grad_cam",
    "intervention_metrics",
    "largest_fall",
    "measured_on",
    "second_claim",
    "values_of",
    "without_shortcut_metrics",
]
