"""The second stage on stored activations: a few seconds of full-batch optimisation, for comparisons of many arms."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from hf_models.dot_cbm import DotCbmForImageClassification

from .dot_cbm_features import Features
from .dot_cbm_fit import moved


@torch.no_grad()
def stored_inputs(model: DotCbmForImageClassification, features: Features, *, batch_size: int = 200) -> torch.Tensor:
    """What the classifier reads of every image, `(images, head_width)`."""
    model.eval()
    found = []
    for batch in features.batches(batch_size, with_mask=model.config.saliency == "mask"):
        output = model.model(**{name: moved(value, model.device) for name, value in batch.items()})
        found.append(model.head_inputs_of(output)[1].float())
    return torch.cat(found)


def fit_classifier(
    model: DotCbmForImageClassification,
    train: Features,
    validation: Features,
    rates: Sequence[float],
    *,
    steps: int,
    weight_decay: float,
    seed: int,
) -> tuple[float, float]:
    """
    Train the classifier by AdamW on all of `train` at once, the rate falling to zero along a cosine, once for each of
    `rates`, and keep the one with the lowest cross-entropy on `validation`. Returns that rate and that cross-entropy.
    """
    model.set_stage("class")
    inputs, held_out = (stored_inputs(model, features) for features in (train, validation))
    trials = []
    for rate in rates:
        classifier = trained_classifier(
            inputs,
            train.labels,
            model.config.num_labels,
            rate=rate,
            steps=steps,
            weight_decay=weight_decay,
            seed=seed,
        )
        with torch.no_grad():
            loss = F.cross_entropy(classifier(held_out), validation.labels).item()
        trials.append((loss, rate, classifier))
    loss, rate, classifier = min(trials, key=lambda trial: trial[0])
    model.classifier.load_state_dict(classifier.state_dict())
    model.eval()
    return rate, loss


@torch.no_grad()
def held_out_loss(model: DotCbmForImageClassification, features: Features) -> float:
    """Cross-entropy of the classes by the classifier as it is."""
    logits = model.classifier(stored_inputs(model, features))
    return F.cross_entropy(logits, features.labels).item()


def trained_classifier(
    inputs: torch.Tensor,
    labels: torch.Tensor,
    num_labels: int,
    *,
    rate: float,
    steps: int,
    weight_decay: float,
    seed: int,
) -> nn.Linear:
    """A linear layer on `inputs (images, features)`, full batch, from small random weights that `seed` decides."""
    classifier = nn.Linear(inputs.shape[1], num_labels)
    with torch.no_grad():
        classifier.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
        classifier.bias.zero_()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(classifier(inputs), labels).backward()
        optimizer.step()
        schedule.step()
    return classifier


__all__ = ["fit_classifier", "held_out_loss", "stored_inputs", "trained_classifier"]
