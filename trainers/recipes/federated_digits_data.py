"""Images of ten classes as clients hold them: one class each and away in turns, or some of each block of classes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..data.fashion_scenes import fashion_folder, read_idx
from ..federated import Alternating


NAMES = ("digits", "fashion_mnist")


@dataclass(frozen=True)
class Images:
    """Pixels `(N, 1, size, size)` from 0 to 1, labels `(N,)`. A batch is what indexing with many gives."""

    pixel_values: torch.Tensor
    labels: torch.Tensor

    fixed_rows = True  # clients may keep them

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        chosen = torch.as_tensor(indices)
        return {"pixel_values": self.pixel_values[chosen], "labels": self.labels[chosen]}

    def select(self, indices: np.ndarray) -> "Images":
        """Some of them."""
        chosen = torch.as_tensor(indices)
        return Images(self.pixel_values[chosen], self.labels[chosen])


@dataclass(frozen=True)
class ImageTask:
    """What is trained on, chosen by, and reported on."""

    train: Images
    validation: Images
    test: Images
    name: str
    license: str

    @property
    def fingerprint(self) -> str:
        """Hash of all pixels and labels, by split."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            digest.update(part.pixel_values.numpy().tobytes() + part.labels.numpy().tobytes())
        return f"sha256:{digest.hexdigest()[:16]}"

    @property
    def num_labels(self) -> int:
        """Classes."""
        return int(self.train.labels.max()) + 1


def read_images(name: str) -> ImageTask:
    """`"digits"`, scikit-learn's 1,797 digits of 8 x 8 pixels, or `"fashion_mnist"`, of the shape of MNIST. A tenth of
    all digits, or of the training images, validates; 30 % of the digits are tested. `ValueError` for another name."""
    if name == "digits":
        return _digits()
    if name != "fashion_mnist":
        raise ValueError(f"data_name {name!r} is not known; choose from {', '.join(NAMES)}.")
    folder = fashion_folder()
    parts = [_fashion(folder, split) for split in ("train", "t10k")]
    order = np.random.default_rng(0).permutation(len(parts[0]))
    held = len(order) // 10
    return ImageTask(
        parts[0].select(np.sort(order[held:])),
        parts[0].select(np.sort(order[:held])),
        parts[1],
        "Fashion-MNIST",
        "MIT",
    )


def _digits() -> ImageTask:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: `pip install 'hf-sigma[vision]'`.") from error
    digits = load_digits()
    images = Images(
        torch.from_numpy(digits.images.astype(np.float32))[:, None] / 16, torch.from_numpy(digits.target).long()
    )
    everybody = np.arange(len(images))
    rest, test = train_test_split(everybody, test_size=0.3, stratify=digits.target, random_state=0)
    train, validation = train_test_split(rest, test_size=1 / 7, stratify=digits.target[rest], random_state=0)
    parts = (images.select(np.sort(part)) for part in (train, validation, test))
    return ImageTask(*parts, "scikit-learn digits, 8 x 8 pixels", "CC-BY-4.0")


def _fashion(folder, split: str) -> Images:
    pictures = read_idx(folder / f"{split}-images-idx3-ubyte.gz").astype(np.float32)
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz").astype(np.int64)
    return Images(torch.from_numpy(pictures)[:, None] / 255, torch.from_numpy(labels))


# Who has what


def one_class_each(labels: torch.Tensor, clients: int, *, seed: int) -> np.ndarray:
    """The client of each image: client i has images of class i mod 10 alone.

    As in the MNIST runs of FedLaAvg (arXiv 2002.07399, by its released code): as many clients a class, whose shares
    of the class are proportional to clamp(5 + N(0, 1), 3, 7).

    Raises:
        ValueError: clients that are no multiple of the classes, or more of them than a class has images.
    """
    classes = int(labels.max()) + 1
    if clients < classes or clients % classes:
        raise ValueError(f"clients={clients} must be a multiple of the {classes} classes.")
    generator, owner = np.random.default_rng(seed), np.empty(len(labels), dtype=np.int64)
    for label in range(classes):
        own = generator.permutation(np.flatnonzero(labels.numpy() == label))
        shares = np.clip(5 + generator.standard_normal(clients // classes), 3, 7)
        owner[own] = label + classes * _assigned(len(own), shares)
    return owner


def _assigned(count: int, shares: np.ndarray) -> np.ndarray:
    """Which of some shares each of `count` things falls to, at least one thing each."""
    if count < len(shares):
        raise ValueError(f"{count} images cannot be given to {len(shares)} clients.")
    whole = 1 + np.floor((count - len(shares)) * shares / shares.sum()).astype(np.int64)
    whole[np.argsort(-shares)[: count - whole.sum()]] += 1
    return np.repeat(np.arange(len(shares)), whole)


def alternating(clients: int, first_classes: int, absence: int, *, classes: int = 10) -> Alternating | None:
    """Clients of the first classes for `absence` rounds, then those of the others, and so on; with 0 first classes
    everybody is always there. `owner` and names are those of [`one_class_each`]."""
    if not first_classes:
        return None
    groups = [[], []]
    for client in range(clients):
        groups[client % classes >= first_classes].append(str(client))
    return Alternating(groups, absence)


def shards_by_block(
    labels: torch.Tensor, clients: int, blocks: int, *, concentration: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The client and the block of each image.

    Block m has the classes from m C/M on, one of M equal stretches. In it, each class is divided over all clients by
    shares drawn from a Dirichlet distribution: the smaller its concentration, the fewer clients have a class. Then
    clients without an image in a block get one of the client with the most there.
    """
    classes = int(labels.max()) + 1
    if classes % blocks:
        raise ValueError(f"blocks={blocks} must divide the {classes} classes.")
    generator, values = np.random.default_rng(seed), labels.numpy()
    block, owner = values // (classes // blocks), np.empty(len(values), dtype=np.int64)
    for label in range(classes):
        own = generator.permutation(np.flatnonzero(values == label))
        shares = generator.dirichlet(np.full(clients, concentration))
        owner[own] = np.searchsorted(np.cumsum(shares), (np.arange(len(own)) + 0.5) / len(own)).clip(max=clients - 1)
    for m in range(blocks):
        inside = np.flatnonzero(block == m)
        if len(inside) < clients:
            raise ValueError(f"block {m} has {len(inside)} images for {clients} clients.")
        for client in range(clients):
            counts = np.bincount(owner[inside], minlength=clients)
            if not counts[client]:
                richest = inside[owner[inside] == counts.argmax()]
                owner[richest[0]] = client
    return owner, block


__all__ = ["ImageTask", "Images", "alternating", "one_class_each", "read_images", "shards_by_block"]
