"""AvatarParts and a bottleneck so small that a recipe takes seconds, for the tests of this folder."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import ViTConfig, ViTModel

from hf_models.dot_cbm import DotCbmForImageClassification
from trainers.data import ConceptData
from trainers.recipes.dot_cbm_features import Features
from trainers.recipes.dot_cbm_fit import BottleneckArguments, build_bottleneck


OPTIONS = {
    "output_dir": "run",
    "dataset_cache_dir": "cache",
    "image_size": 32,
    "concept_encoder": "orthonormal",
    "num_train": 120,
    "num_validation": 40,
    "num_test": 40,
    "backbone_images": 80,
    "backbone_hidden_size": 32,
    "backbone_layers": 1,
    "backbone_epochs": 2,
    "min_part_probe": 0,
    "projection_dim": 16,
    "concept_epochs": 2,
    "max_localised": 20,
    "explanations": 2,
    "per_device_train_batch_size": 20,
    "logging_steps": 1,
    "disable_tqdm": True,
}
GRID, WIDTH = (2, 2), 8
NAMES = ["red hat", "blue hat", "beard"]
MATRIX = np.array([[1, 0, 1], [0, 1, 0]], dtype=np.uint8)


def command_line(*without: str, **options) -> list[str]:
    """The options of a recipe: `OPTIONS` with changes, less those named."""
    argv = []
    for name, value in (OPTIONS | options).items():
        if name not in without:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name}", *map(str, values)]
    return argv


def times_of_runs(root: Path) -> dict[Path, int]:
    """When each run below `root` wrote its result."""
    return {
        file: file.stat().st_mtime_ns for name in ("fit", "arm", "measured") for file in root.rglob(f"{name}.json")
    }


def tiny_concepts() -> ConceptData:
    """Two classes and three concepts, without pictures."""
    return ConceptData(
        dataset=Dataset.from_dict({"label": [0, 1], "concepts": MATRIX.tolist()}),
        class_names=["Ada", "Ben"],
        concept_names=NAMES,
        concept_groups={"hat": [0, 1], "beard": [2]},
        class_concept_matrix=MATRIX,
        part_names=["hat", "beard"],
        part_of_concept=[0, 0, 1],
    )


def tiny_backbone() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
        initializer_range=0.3,
    )
    return ViTModel(config, add_pooling_layer=False).eval()


def tiny_bottleneck(**fields) -> DotCbmForImageClassification:
    """On a random ViT with a grid of 2 x 2."""
    args = BottleneckArguments(projection_dim=8, adapter_layers=2, saliency="uniform", sinkhorn_iterations=5)
    texts = (torch.eye(len(NAMES), 4), "by hand")
    return build_bottleneck(args, tiny_backbone(), tiny_concepts(), texts, 0, **fields)


def tiny_features(count: int = 12, seed: int = 0) -> Features:
    """Random tokens whose first entry is the class, so that it can be learned."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    token, patches = rng.normal(size=(count, WIDTH)), rng.normal(size=(count, 4, WIDTH))
    token[:, 0] = 3.0 * (2 * labels - 1)
    patches[:, 1, 0] = 3.0 * (2 * labels - 1)
    foreground = np.tile(np.array([0.0, 1.0, 0.2, 0.0], dtype=np.float32), (count, 1))
    tokens = (token.astype(np.float32), patches.astype(np.float32))
    return Features(tokens, torch.tensor(labels), torch.tensor(MATRIX[labels]).long(), foreground, GRID)
