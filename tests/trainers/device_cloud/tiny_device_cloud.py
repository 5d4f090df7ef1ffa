"""A tiny cloud, a tiny device and a plan of a few steps for the tests of DC-CCL."""

import torch
from transformers import AutoConfig, TrainingArguments

from hf_models.dc_ccl import DcCclForImageClassification, split_vertically
from trainers.device_cloud.dc_ccl_data import DcCclData, ImageRows, TokenRows
from trainers.device_cloud.dc_ccl_plan import DcCclPlan, Fit


def tiny_model(kind: str = "resnet", seed: int = 0) -> DcCclForImageClassification:
    torch.manual_seed(seed)
    if kind == "vit":
        sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 16}
        sizes |= {"image_size": 8, "patch_size": 4}
    else:
        sizes = {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "layer_type": "basic"}
    return DcCclForImageClassification(
        split_vertically(AutoConfig.for_model(kind, num_channels=1, num_labels=4, **sizes), 0.25)
    )


def rows(count: int, classes: tuple[int, ...], seed: int = 0) -> ImageRows:
    """Images of 8 x 8 whose bright quarter is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.randint(0, len(classes), (count,), generator=generator)]
    pixels = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        row, column = divmod(label, 2)
        pixels[index, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.5
    return ImageRows(pixels, labels)


def tiny_data() -> DcCclData:
    return DcCclData(
        cloud=rows(48, (0, 1, 2)),
        device=rows(24, (0, 3), seed=1),
        public=rows(8, (0, 1, 2), seed=2),
        tune_device=rows(6, (3,), seed=3),
        test=rows(40, (0, 1, 2, 3), seed=4),
        held_out=rows(16, (0, 1, 2), seed=5),
    )


def sentences(count: int, step: int, seed: int = 0) -> TokenRows:
    """Text of 8 tokens that count up by `step`: the cloud's and the device's languages."""
    start = torch.randint(0, 40, (count, 1), generator=torch.Generator().manual_seed(seed))
    return TokenRows((start + step * torch.arange(8)) % 40)


def tiny_text() -> DcCclData:
    both = [sentences(12, step, seed=4).input_ids for step in (1, 3)]
    return DcCclData(
        cloud=sentences(48, 1),
        device=sentences(24, 3, seed=1),
        public=sentences(8, 1, seed=2),
        test=TokenRows(torch.cat(both)),
        held_out=sentences(16, 1, seed=5),
        device_test=TokenRows(both[1]),
    )


def tiny_plan(**changes) -> DcCclPlan:
    side = Fit(learning_rate=1e-2, max_steps=3, batch_size=16)
    fields = {
        "cloud": Fit(learning_rate=1e-2, max_steps=6, batch_size=16),
        "control": Fit(learning_rate=1e-2, max_steps=6, batch_size=16),
        "co_cloud": side,
        "co_device": side,
        "head": Fit(learning_rate=1e-2, max_steps=2, batch_size=14),
        "rounds": 2,
    }
    return DcCclPlan(**(fields | changes))


def arguments(folder, **options) -> TrainingArguments:
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    return TrainingArguments(str(folder), use_cpu=True, **(quiet | options))
