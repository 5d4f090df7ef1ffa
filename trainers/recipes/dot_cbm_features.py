"""Frozen tokens, computed once: what both stages of DOT-CBM train on, memory-mapped from the run folder."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from hf_models.dot_cbm import DotCbmModel

from ..data import ConceptData
from ..evaluation.localisation import saliency_auc
from ..report import write_text_atomically
from .dot_cbm_data import foreground_of, has_masks, labels_of


TOKEN_NAMES = ("global", "patches", "cls_attention")
META = "tokens.json"
COMPUTED_SALIENCIES = ("cls_dot", "cls_cosine", "cls_attention", "contrast", "pca")


@dataclasses.dataclass
class Features(Dataset):
    """
    The tokens of a set and its labels. Rows are indices: [`collate`] fetches a batch at a time.

    Args:
        tokens: `(images, D)`, `(images, N, D)` and, where the backbone has a CLS token, its attention `(images, N)`.
        labels, concepts: `(images,)` and `(images, M)`.
        foreground: share of each patch that is foreground, `(images, N)`; None where it is not known.
        grid: rows and columns of patches.
    """

    tokens: tuple[np.ndarray, ...]
    labels: torch.Tensor
    concepts: torch.Tensor
    foreground: np.ndarray | None
    grid: tuple[int, int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> int:
        return int(index)

    def inputs(self, rows: Sequence[int], *, with_mask: bool = False) -> dict[str, Any]:
        """What a model takes beside labels; `with_mask`: with the foreground, for `saliency="mask"`."""
        rows = np.asarray(rows)
        tokens = tuple(torch.from_numpy(np.array(part[rows])) for part in self.tokens)
        inputs: dict[str, Any] = {"patch_features": tokens, "grid": self.grid}
        if with_mask:
            if self.foreground is None:
                raise ValueError("saliency='mask' needs foreground masks, which this data set does not have.")
            inputs["foreground_mask"] = torch.from_numpy(self.foreground[rows])
        return inputs

    def batches(self, batch_size: int, *, with_mask: bool = False, limit: int | None = None) -> Iterator[dict]:
        """The rows in their order, without labels."""
        for start in range(0, min(limit or len(self), len(self)), batch_size):
            stop = min(start + batch_size, limit or len(self), len(self))
            yield self.inputs(range(start, stop), with_mask=with_mask)


@dataclasses.dataclass
class FeatureCollator:
    """A batch of rows of `features`, with both kinds of labels."""

    features: Features
    with_mask: bool = False

    def __call__(self, rows: list[int]) -> dict[str, Any]:
        inputs = self.features.inputs(rows, with_mask=self.with_mask)
        del inputs["grid"]  # Trainer would gather it; the model finds a square one, or that of its config
        return inputs | {"labels": self.features.labels[rows], "concept_labels": self.features.concepts[rows]}


def cached_features(
    model: DotCbmModel,
    data: ConceptData,
    processor: BaseImageProcessor,
    folder: Path,
    *,
    key: str,
    batch_size: int = 64,
    dtype: str = "float32",
) -> Features:
    """
    The tokens of `data` under the backbone of `model`, from `folder` if they are there. One process computes them.

    Args:
        key: what backbone and data are; other tokens in the folder are computed anew.
        dtype: as stored; `float16` halves the disk.
    """
    state, meta = PartialState(), {"key": key, "dtype": dtype, "images": len(data.dataset)}
    if state.is_main_process and not _is_there(folder, meta):
        _extract(model, data, processor, folder, batch_size, dtype)
        write_text_atomically(folder / META, json.dumps(meta))
    state.wait_for_everyone()
    files = [folder / f"{name}.npy" for name in TOKEN_NAMES]
    tokens = tuple(np.load(file, mmap_mode="r") for file in files if file.exists())
    grid = tuple(int(side) for side in np.load(folder / "grid.npy"))
    labels, concepts = labels_of(data)
    foreground = foreground_of(data, grid) if has_masks(data) and _fits(model, data) else None
    return Features(tokens, labels, concepts, foreground, grid)


def _is_there(folder: Path, meta: Mapping[str, Any]) -> bool:
    return (folder / META).exists() and json.loads((folder / META).read_text()) == meta


def _fits(model: DotCbmModel, data: ConceptData) -> bool:
    """Whether masks have the size of the model's input, or a multiple of its grid."""
    width, height = data.dataset[0]["foreground"].size
    rows, columns = (
        side // patch for side, patch in zip(model.config.input_size, model.config.patch_size, strict=True)
    )
    return height % rows == 0 and width % columns == 0


@torch.no_grad()
def _extract(
    model: DotCbmModel, data: ConceptData, processor: BaseImageProcessor, folder: Path, batch_size: int, dtype: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META).unlink(missing_ok=True)
    for name in TOKEN_NAMES:
        (folder / f"{name}.npy").unlink(missing_ok=True)
    rows, written = data.dataset, {}
    for start in tqdm(range(0, len(rows), batch_size), desc=f"tokens of {folder.name}", leave=False):
        images = rows[start : start + batch_size]["image"]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device)
        for name, part in zip(TOKEN_NAMES, model.extract_features(pixels)):
            if name not in written:
                shape = (len(rows), *part.shape[1:])
                written[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.dtype(dtype), shape)
            written[name][start : start + len(part)] = part.float().cpu().numpy()
    size, patch = model.config.input_size, model.config.patch_size
    np.save(folder / "grid.npy", np.array([size[0] // patch[0], size[1] // patch[1]]))
    for array in written.values():
        array.flush()


@torch.no_grad()
def saliency_aucs(features: Features, *, limit: int = 400, batch_size: int = 100) -> dict[str, float]:
    """How well each form of saliency tells foreground from background, by ROC-AUC within an image; empty where no
    foreground is known. A patch is foreground if at least half of it is."""
    from hf_models.dot_cbm.saliency import patch_saliency

    if features.foreground is None:
        return {}
    foreground, found = features.foreground[:limit] >= 0.5, {}
    for kind in COMPUTED_SALIENCIES:
        if kind == "cls_attention" and len(features.tokens) < 3:
            continue
        values = []
        for batch in features.batches(batch_size, limit=limit):
            token, patches, *attention = (part.float() for part in batch["patch_features"])
            options = {"grid": features.grid, "cls_attention": attention[0] if attention else None}
            values.append(patch_saliency(kind, patches, token, **options))
        found[kind] = saliency_auc(torch.cat(values).numpy(), foreground)
    return found


def weights_key(model: PreTrainedModel) -> str:
    """A few numbers of every tensor of a model, as a word."""
    sums = [
        float(tensor.double().sum()) for _, tensor in sorted(model.state_dict().items()) if tensor.is_floating_point()
    ]
    return f"{model.config.model_type}-{sum(sums):.10g}-{sum(value * value for value in sums):.10g}"


__all__ = ["COMPUTED_SALIENCIES", "FeatureCollator", "Features", "cached_features", "saliency_aucs", "weights_key"]
