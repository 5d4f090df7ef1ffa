"""The pictures of a run: what the model saw in ten test images, right ones and wrong ones, what corrections do."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

from hf_models.dot_cbm import DotCbmForImageClassification, plot_explanation

from ..figures import comparison_figure, loss_figure
from ..report import FigureFile
from .dot_cbm_arms import LABELS
from .dot_cbm_data import ID, ConceptSplits
from .dot_cbm_features import Features
from .dot_cbm_measures import predict


SHOWN_PIXELS = 256  # a small picture is enlarged to that, or its heatmaps would be blocks


def explanation_figures(
    model: DotCbmForImageClassification,
    processor: BaseImageProcessor,
    splits: ConceptSplits,
    features: Mapping[str, Features],
    root: Path,
    *,
    count: int = 10,
    wrong: int = 3,
    top_k: int = 6,
) -> list[FigureFile]:
    """`figures/explanation_NN.png` of test images: `wrong` of them misclassified, where there are as many in `id` and
    then under shift, the others classified rightly, each of another class."""
    model.eval()
    labels = {name: features[name].labels.numpy() for name in splits.tests}
    predicted = {name: predict(model, features[name]).scores.argmax(axis=1) for name in splits.tests}
    chosen = choose(predicted, labels, count=count, wrong=wrong)
    (root / "figures").mkdir(parents=True, exist_ok=True)
    drawn = []
    for number, (name, row) in enumerate(chosen, start=1):
        data = splits.tests[name]
        image = data.dataset[row]["image"].convert("RGB")
        shown = enlarged(image)
        truth, guess = data.class_names[labels[name][row]], data.class_names[predicted[name][row]]
        title = f"{guess}, right" if truth == guess else f"{guess}, wrong: {truth}"
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        options = {"foreground_mask": _mask(features[name], row)} if model.config.saliency == "mask" else {}
        # Of the class in the title, even where kept tokens and pixels disagree by a rounding.
        label = torch.tensor([int(predicted[name][row])])
        records = model.explain(pixels, top_k, labels=label, image_size=shown.size[::-1], **options)[0]
        path = root / "figures" / f"explanation_{number:02d}.png"
        figure = plot_explanation(shown, records, title=title, max_concepts=top_k)
        figure.savefig(path, dpi=80, metadata={"Software": None})
        caption = f"Test image {row} of {_words(name)}: predicted {guess}, which is "
        caption += "right." if truth == guess else f"wrong; it is {truth}."
        drawn.append(FigureFile(path=f"figures/{path.name}", caption=caption))
    return drawn


def choose(
    predicted: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], *, count: int, wrong: int
) -> list[tuple[str, int]]:
    """Sets and rows: first the right ones of `id`, evenly over the set and no class twice if it can be helped, then
    the first wrong ones of `id`, and of the other sets where these are too few."""
    errors = [(name, int(row)) for name in predicted for row in np.flatnonzero(predicted[name] != labels[name])]
    errors = errors[: min(wrong, count)]
    right = np.flatnonzero(predicted[ID] == labels[ID])
    picked: list[int] = []
    seen: set[int] = set()
    wanted = min(count - len(errors), len(right))
    ordered = right[np.argsort(np.arange(len(right)) * 7 % max(len(right), 1), kind="stable")]
    for row in [*[r for r in ordered if not (labels[ID][r] in seen or seen.add(labels[ID][r]))], *ordered]:
        if len(picked) < wanted and int(row) not in picked:
            picked.append(int(row))
    return [(ID, row) for row in picked] + errors


def enlarged(image: Image.Image) -> Image.Image:
    """Images with a shorter side below `SHOWN_PIXELS`, brought to it or a little above by a whole factor."""
    factor = -(-SHOWN_PIXELS // min(image.size))
    return image if factor <= 1 else image.resize([side * factor for side in image.size], Image.Resampling.BICUBIC)


def _mask(features: Features, row: int) -> torch.Tensor:
    return torch.from_numpy(features.foreground[row : row + 1])


def _words(name: str) -> str:
    shift = re.fullmatch(r"ood(\d+)", name)
    return f"the set with the class's own background {shift[1]} % of the time" if shift else "the test set `id`"


def intervention_figure(
    curves: Mapping[str, Sequence[float]], root: Path, *, name: str = "interventions"
) -> FigureFile:
    """Accuracy over the number of groups of concepts that were set to the truth, a line for each of `curves`."""
    lines = {label: (list(range(len(values))), list(values)) for label, values in curves.items()}
    loss_figure(
        lines,
        root / "figures" / f"{name}.png",
        x_label="groups of concepts set to the truth",
        y_label="test accuracy",
        higher_is_better=True,
    )
    return FigureFile(
        path=f"figures/{name}.png",
        caption="Test accuracy while groups of concepts are set to those of the class, in random order or the most "
        "uncertain first.",
    )


def arms_figure(
    groups: Mapping[str, Sequence[float]], root: Path, name: str, *, y_label: str, caption: str
) -> FigureFile:
    """A bar an arm with its seeds as dots; the first is ours."""
    shown = {LABELS.get(arm, arm): values for arm, values in groups.items()}
    comparison_figure(shown, root / "figures" / f"{name}.png", y_label=y_label, higher_is_better=True)
    return FigureFile(path=f"figures/{name}.png", caption=caption)


__all__ = ["arms_figure", "choose", "enlarged", "explanation_figures", "intervention_figure"]
