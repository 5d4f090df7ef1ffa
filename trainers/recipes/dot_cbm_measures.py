"""What is measured of a trained bottleneck: classes, concepts, where it looks, interventions, leakage."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hf_models.dot_cbm import DotCbmForImageClassification, DotCbmModelOutput

from ..data import ConceptData
from ..evaluation.concepts import accuracy_at_nec, concept_scores, effective_concepts, leakage, top1
from ..evaluation.impurity import niche_impurity
from ..evaluation.interventions import InterventionCurve, intervention_curve
from ..evaluation.localisation import (
    best_threshold,
    box_iou,
    boxes_above,
    localisation,
    mask_boxes,
    mean_average_precision,
    shown_concepts,
)
from ..evaluation.sparse_head import accuracy_of_sparse_heads, sparse_heads
from .dot_cbm_data import ID, ConceptSplits, has_masks, parts_of
from .dot_cbm_features import Features
from .dot_cbm_fit import moved


POLICIES = ("random", "uncertainty")
NEC = 5


@dataclasses.dataclass
class Found:
    """What a model says of a set: class scores `(n, K)`, and of bottlenecks concept probabilities `(n, M)` and what
    interventions need."""

    scores: np.ndarray
    probabilities: np.ndarray | None
    bottleneck: DotCbmModelOutput


@dataclasses.dataclass
class Shown:
    """Heatmaps `(pairs, H, W)` of the concepts that images have and show, the masks of their parts, how probable the
    model finds them, and which part it is."""

    heatmaps: np.ndarray
    masks: np.ndarray
    probabilities: np.ndarray
    parts: np.ndarray


@torch.no_grad()
def predict(model: DotCbmForImageClassification, features: Features, *, batch_size: int = 200) -> Found:
    """The model on all of `features`, in eval mode."""
    model.eval()
    with_mask = model.config.saliency == "mask"
    scores, probabilities, logits, pairs, tokens = [], [], [], [], []
    for batch in features.batches(batch_size, with_mask=with_mask):
        found = model.model(**{name: moved(value, model.device) for name, value in batch.items()})
        chance, inputs = model.head_inputs_of(found)
        scores.append(model.classifier(inputs.to(model.classifier.weight.dtype)).float().cpu())
        tokens.append(found.global_token.cpu())
        if chance is not None:
            probabilities.append(chance.float().cpu())
            logits.append(found.concept_logits.float().cpu())
        if found.concept_pairs is not None:
            pairs.append(found.concept_pairs.cpu())
    bottleneck = DotCbmModelOutput(
        concept_logits=torch.cat(logits) if logits else None,
        concept_pairs=torch.cat(pairs) if pairs else None,
        global_token=torch.cat(tokens),
    )
    chances = torch.cat(probabilities).numpy() if probabilities else None
    return Found(torch.cat(scores).numpy(), chances, bottleneck)


@dataclasses.dataclass
class Pairs:
    """Images and their concepts that show, `(pairs,)` indices each, with masks `(pairs, H, W)` and numbers of parts;
    `size` is H and W."""

    images: np.ndarray
    concepts: np.ndarray
    masks: np.ndarray
    parts: np.ndarray
    size: tuple[int, int]


def shown_pairs(features: Features, data: ConceptData, *, limit: int) -> Pairs:
    """What there is to find in the first `limit` images: concepts that they have and whose part shows in 8 pixels."""
    parts, part_of = parts_of(data, limit), np.asarray(data.part_of_concept)
    images, concepts = shown_concepts(parts, part_of, features.concepts[: len(parts)].numpy(), min_pixels=8)
    which = part_of[concepts]
    return Pairs(images, concepts, parts[images, which], which, parts.shape[2:])


@torch.no_grad()
def shown_heatmaps(
    model: DotCbmForImageClassification,
    features: Features,
    data: ConceptData,
    *,
    limit: int,
    batch_size: int = 50,
    maps_of: Callable[[int, int], torch.Tensor] | None = None,
) -> Shown:
    """Heatmaps of what the first `limit` images show, without the probabilities multiplied in. `maps_of(start, stop)`:
    other maps `(images, N, M)` of these rows than the model's own."""
    pairs, heatmaps, chances = shown_pairs(features, data, limit=limit), [], []
    model.eval()
    with_mask, limit = model.config.saliency == "mask", min(limit, len(features))
    starts = range(0, limit, batch_size)
    for start, batch in zip(starts, features.batches(batch_size, with_mask=with_mask, limit=limit), strict=True):
        inputs = {name: moved(value, model.device) for name, value in batch.items()}
        output = model(**inputs, output_transport_plan=True)
        stop = start + len(output.logits)
        maps = output.concept_maps if maps_of is None else maps_of(start, stop)
        pixels = model.heatmaps(maps, pairs.size, grid=output.grid)
        here = (pairs.images >= start) & (pairs.images < stop)
        rows, columns = pairs.images[here] - start, pairs.concepts[here]
        heatmaps.append(pixels[rows, columns].cpu().numpy())
        chances.append(output.concept_probs[rows, columns].float().cpu().numpy())
    return Shown(np.concatenate(heatmaps), pairs.masks, np.concatenate(chances), pairs.parts)


def localised(test: Shown, validation: Shown | None = None) -> dict[str, float]:
    """Pointing, energy in the mask, mIoU and share of boxes at an IoU of 0.5 at the paper's threshold, part AP; with
    `validation` the mIoU at the threshold that is best there. `chance` is what a uniform heatmap gets of energy."""
    found = localisation(test.heatmaps, test.masks, test.probabilities)
    ious = box_iou(boxes_above(test.heatmaps), mask_boxes(test.masks))
    measured = {
        "pointing": found.pointing,
        "energy_in_mask": found.energy,
        "miou": found.mean_iou,
        "boxes_at_half": found.share_at_half,
        "part_ap": mean_average_precision(ious, test.probabilities, test.parts),
        "chance": float(test.masks.mean()),
    }
    if validation is not None:
        threshold = best_threshold(validation.heatmaps, validation.masks)
        measured["miou_best_threshold"] = localisation(test.heatmaps, test.masks, threshold=threshold).mean_iou
    return measured


def intervention_curves(
    model: DotCbmForImageClassification, found: Found, features: Features, groups: dict[str, list[int]], seed: int
) -> dict[str, InterventionCurve]:
    """Curves by group with class-level truth, for each of `POLICIES`."""

    @torch.no_grad()
    def scores(probabilities: np.ndarray, interventions: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(interventions).float()
        inputs = model.head_inputs_of(found.bottleneck, given)[1]
        return model.classifier(inputs.to(model.classifier.weight.dtype)).float().numpy()

    labels, truth = features.labels.numpy(), features.concepts.numpy()
    return {
        policy: intervention_curve(scores, found.probabilities, truth, labels, groups, policy=policy, seed=seed)
        for policy in POLICIES
    }


def measure(
    model: DotCbmForImageClassification,
    splits: ConceptSplits,
    features: dict[str, Features],
    *,
    seed: int,
    max_localised: int = 400,
    thorough: bool = False,
) -> dict[str, Any]:
    """
    Everything, as JSON: `accuracy_<set>` for every test set; of bottlenecks `concept_<measure>_<set>`, `curves` on
    `id` and on the set of the strongest shift; of those with maps `localised_<set>`; of heads that read one number a
    concept `leakage` and `nec`.

    Args:
        features: by name of the test, `train` and `validation`.
        thorough: also, of bottlenecks, `impurity_niche`, and, of heads that read one number a concept, the accuracy
            of one that is trained to be sparse, `accuracy_of_sparse_head_<NEC>`; half a minute.
    """
    model = model.cpu()
    strongest = splits.strongest
    measured: dict[str, Any] = {}
    for name in splits.tests:
        found = predict(model, features[name])
        labels = features[name].labels.numpy()
        measured[f"accuracy_{name}"] = top1(found.scores, labels)
        if found.probabilities is None:
            continue
        scores = concept_scores(found.probabilities, features[name].concepts.numpy())
        measured |= {f"concept_{kind}_{name}": getattr(scores, kind) for kind in ("accuracy", "auc", "f1")}
        if name in (ID, strongest):
            groups = splits.train.concept_groups
            curves = intervention_curves(model, found, features[name], groups, seed)
            measured.setdefault("curves", {})[name] = {policy: curve.accuracy for policy, curve in curves.items()}
            measured |= {f"intervention_area_{policy}_{name}": curve.area() for policy, curve in curves.items()}
        if name == ID and model.config.readout not in ("cem", "linear_probe"):
            measured |= _head(model, found, features[name])
            if thorough:
                measured |= _sparse_head(model, found, features, seed)
        if name == ID and thorough:
            measured["impurity_niche"] = niche_impurity(
                found.probabilities, features[name].concepts.numpy(), seed=seed
            )
    if has_masks(splits.train) and model.config.readout != "linear_probe":
        shown = {
            name: shown_heatmaps(model, features[name], data, limit=max_localised)
            for name, data in {"validation": splits.validation, **splits.tests}.items()
            if name in ("validation", ID, strongest)
        }
        for name in dict.fromkeys((ID, strongest)):
            measured[f"localised_{name}"] = localised(shown[name], shown["validation"])
    return measured


def _head(model: DotCbmForImageClassification, found: Found, features: Features) -> dict[str, Any]:
    """Leakage and numbers of effective concepts of a linear head on one number a concept."""
    weight, bias = (p.detach().numpy() for p in (model.classifier.weight, model.classifier.bias))
    mean, deviation = model.activation_mean.numpy(), model.activation_std.numpy()

    def head(probabilities: np.ndarray) -> np.ndarray:
        return (probabilities - mean) / deviation @ weight.T + bias

    labels, truth = features.labels.numpy(), features.concepts.numpy()
    standardised = (found.probabilities - mean) / deviation
    return {
        "leakage": dataclasses.asdict(leakage(head, found.probabilities, labels, truth=truth)),
        "nec": effective_concepts(weight, threshold=0.05),
        f"accuracy_at_nec_{NEC}": accuracy_at_nec(standardised, labels, weight, bias, (NEC,))[NEC],
    }


def _sparse_head(
    model: DotCbmForImageClassification, found: Found, features: dict[str, Features], seed: int
) -> dict[str, float]:
    """Accuracy on `id` of a head that was trained, on the training images, to use `NEC` concepts a class."""
    mean, deviation = model.activation_mean.numpy(), model.activation_std.numpy()
    train = predict(model, features["train"]).probabilities
    heads = sparse_heads((train - mean) / deviation, features["train"].labels.numpy(), (NEC,), seed=seed)
    test = (found.probabilities - mean) / deviation
    return {f"accuracy_of_sparse_head_{NEC}": accuracy_of_sparse_heads(heads, test, features[ID].labels.numpy()).mean}


__all__ = [
    "Found",
    "Pairs",
    "Shown",
    "intervention_curves",
    "localised",
    "measure",
    "predict",
    "shown_heatmaps",
    "shown_pairs",
]
