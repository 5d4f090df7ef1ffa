"""The tasks of DC-CCL's recipe: which classes each side has, which model is split, how long each phase is."""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoConfig

from hf_models.dc_ccl import DcCclConfig, split_vertically

from ..data.fashion_scenes import fashion_folder, read_idx
from ..device_cloud.budget import DeviceBudget
from ..device_cloud.dc_ccl_data import DcCclData, ImageRows
from ..device_cloud.dc_ccl_plan import DcCclPlan, Fit


CLOUD_CLASSES = 8  # the first 8 of 10 are the cloud's, the others the device's, as in the replication on CIFAR-10
MIXED = 0.1  # share of the device's images that are of the cloud's classes


@dataclasses.dataclass(frozen=True)
class Images:
    """Images `(N, 1, height, width)`, standardised, with labels; the last `num_test` of them are tested."""

    pixel_values: torch.Tensor
    labels: torch.Tensor
    num_test: int
    name: str
    license: str

    @property
    def fingerprint(self) -> str:
        """Hash of pixels and labels."""
        content = self.pixel_values.numpy().tobytes() + self.labels.numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is run: where images come from, what is built, and for how long. `plan(rate)` of the rounds' learning rate;
    `public` and `tuned` are how many cloud and device images the head is tuned on, `held_out` the share of the
    training images that rates are chosen on; `budget` is what a device can hold at most: by our
    choice, less than the cloud submodel takes."""

    read: Callable[[], Images]
    config: Callable[[], DcCclConfig]
    plan: Callable[[float], DcCclPlan]
    public: int
    tuned: int
    budget: DeviceBudget | None = None
    held_out: float = 0.15


def divide(images: Images, task: Task, seed: int) -> DcCclData:
    """Both sides' data for a seed.

    A tenth of the device's images are replaced by ones of the cloud's classes, which the cloud then does not have.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(images.labels) - images.num_test
    order = torch.randperm(count, generator=generator)
    validation, order = order[: round(task.held_out * count)], order[round(task.held_out * count) :]
    of_cloud = images.labels[order] < CLOUD_CLASSES
    cloud, device = order[of_cloud], order[~of_cloud]
    mixed = round(MIXED * len(device))
    device, cloud = torch.cat([device[mixed:], cloud[:mixed]]), cloud[mixed:]

    def rows(index: torch.Tensor) -> ImageRows:
        return ImageRows(images.pixel_values[index], images.labels[index])

    test = torch.arange(count, len(images.labels))
    tuned = device[torch.randperm(len(device), generator=generator)[: task.tuned]]
    return DcCclData(
        cloud=rows(cloud),
        device=rows(device),
        public=rows(cloud[: task.public]),
        tune_device=rows(tuned),
        test=rows(test),
        held_out=rows(test[images.labels[test] < CLOUD_CLASSES]),
        validation=rows(validation),
        device_test=rows(test[images.labels[test] >= CLOUD_CLASSES]),
    )


# Digits


def read_digits() -> Images:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, 30 % of them tested, stratified."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: `pip install 'hf-sigma[vision]'`.") from error
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=0.3, stratify=digits.target, random_state=0
    )
    order = np.concatenate([train, test])
    return Images(
        pixel_values=_standardised(digits.images[order]),
        labels=torch.from_numpy(digits.target[order]).long(),
        num_test=len(test),
        name="scikit-learn digits, 8 x 8",
        license="CC-BY-4.0",
    )


def digits_config() -> DcCclConfig:
    """A ResNet of two blocks, 7/8 of whose channels are the cloud's."""
    sizes = {"embedding_size": 32, "hidden_sizes": [64, 128], "depths": [1, 1], "layer_type": "basic"}
    return split_vertically(AutoConfig.for_model("resnet", num_channels=1, num_labels=10, **sizes), 0.125)


def digits_plan(rate: float) -> DcCclPlan:
    """Batches of 256, full for the device; 15 steps a side and round, as in the toy run of our notes."""
    side = Fit(learning_rate=rate, max_steps=15, batch_size=256)
    return DcCclPlan(
        cloud=Fit(learning_rate=3e-3, max_steps=150, batch_size=256, weight_decay=1e-4),
        control=Fit(learning_rate=3e-3, max_steps=600, batch_size=256),
        co_cloud=side,
        co_device=side,
        head=Fit(learning_rate=rate, max_steps=30, batch_size=100),
        rounds=10,
    )


# Fashion-MNIST


def read_fashion(*, num_train: int = 9000, num_test: int = 2000) -> Images:
    """Fashion-MNIST out of its Debian package: the first `num_train` and `num_test` of its 60,000 and 10,000.
    RuntimeError where the package cannot be fetched."""
    folder = fashion_folder()
    parts = []
    for split, count in (("train", num_train), ("t10k", num_test)):
        pictures = read_idx(folder / f"{split}-images-idx3-ubyte.gz")[:count]
        parts.append((pictures, read_idx(folder / f"{split}-labels-idx1-ubyte.gz")[:count]))
    pictures, labels = (np.concatenate(columns) for columns in zip(*parts))
    return Images(
        pixel_values=_standardised(pictures),
        labels=torch.from_numpy(labels).long(),
        num_test=num_test,
        name=f"Fashion-MNIST, {num_train:,} images to train and {num_test:,} to test",
        license="MIT",
    )


def fashion_config() -> DcCclConfig:
    """The ViT pair: a small ViT, 7 of whose 8 heads are the cloud's and one the device's."""
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 3, "intermediate_size": 128}
    images = {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}
    return split_vertically(AutoConfig.for_model("vit", **sizes, **images), 0.125)


def fashion_plan(rate: float) -> DcCclPlan:
    """Batches of 128; 20 steps a side and round, 6 rounds."""
    side = Fit(learning_rate=rate, max_steps=20, batch_size=128)
    return DcCclPlan(
        cloud=Fit(learning_rate=1.5e-3, max_steps=400, batch_size=128, weight_decay=1e-2, schedule="cosine"),
        control=Fit(learning_rate=3e-3, max_steps=800, batch_size=128, schedule="cosine"),
        co_cloud=side,
        co_device=side,
        head=Fit(learning_rate=rate, max_steps=20, batch_size=150),
        rounds=6,
    )


# The shapes of the first author's code, as far as transformers has them


def cars_config() -> DcCclConfig:
    """EfficientNet-B7 on the cloud, MobileNetV2 (1.4) twice on the device, 1,000 + 196 classes: the shapes of
    google/efficientnet-b7 and google/mobilenet_v2_1.4_224. The code's EfficientNetV2-L and MobileNetV3-Large have no
    class of their own in transformers. The control model has no dropout: its signal is to be that of F_c."""
    large = {"width_coefficient": 2.0, "depth_coefficient": 3.1, "image_size": 600, "hidden_dim": 2560}
    small = {"model_type": "mobilenet_v2", "depth_multiplier": 1.4, "image_size": 224, "num_labels": 1196}
    return DcCclConfig(
        cloud_config={"model_type": "efficientnet", "dropout_rate": 0.5, "num_labels": 1196, **large},
        co_config=small | {"classifier_dropout_prob": 0.2},
        control_config=small | {"classifier_dropout_prob": 0.0},
        num_labels=1196,
    )


def cars_plan(rate: float) -> DcCclPlan:
    """Rates, batches and epochs of the first author's code. Its control model takes 25 epochs at 1e-3 and 25 at 1e-4:
    one linear schedule here. Weight decay is the Trainer's, which spares biases and norms."""
    momentum = {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 5e-4}
    return DcCclPlan(
        cloud=Fit(learning_rate=0.01, epochs=2, batch_size=100, **momentum),
        control=Fit(learning_rate=1e-3, epochs=50, batch_size=100, schedule="linear"),
        co_cloud=Fit(learning_rate=rate, epochs=1, batch_size=100, **momentum),
        co_device=Fit(learning_rate=rate, epochs=1, batch_size=20, **momentum),
        head=Fit(learning_rate=rate, epochs=1, batch_size=100, **momentum),
        rounds=10,
        late_from=9,
        phase1_loss="all",
        cache=False,
    )


def read_cars() -> Images:
    """Always a ValueError: these images are not to be had without an account."""
    raise ValueError(
        "ImageNet-1K and Stanford Cars are not fetched here. Put yours into a DcCclData and give it, with "
        "dc_ccl_tasks.cars_config() and cars_plan(0.01), to trainers.device_cloud.dc_ccl_rounds.run_dc_ccl."
    )


def _standardised(pictures: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(np.asarray(pictures, dtype=np.float32))[:, None]  # (N, 1, height, width)
    return (pixels - pixels.mean()) / pixels.std()


TASKS = {
    "digits": Task(
        read_digits, digits_config, digits_plan, public=80, tuned=20, budget=DeviceBudget(max_bytes=100_000)
    ),
    "fashion_mnist": Task(
        read_fashion, fashion_config, fashion_plan, public=100, tuned=50, budget=DeviceBudget(max_bytes=50_000)
    ),
    "imagenet_cars": Task(read_cars, cars_config, cars_plan, public=5000, tuned=1000),
}

__all__ = ["TASKS", "Images", "Task", "divide"]
