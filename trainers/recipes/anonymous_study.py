"""What the arms of anonymous personalisation share: their names, the study they belong to, and records that are kept
for the settings they were made with and for no others."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, TrainingArguments, set_seed

from hf_models.personal_lm import PersonalLmConfig, PersonalLmForCausalLM, PersonalLmForSequenceClassification

from ..report import write_text_atomically
from .anonymous_data import PersonalData


# Of TrainingArguments: what a run prints, saves and is started with, not what it computes; and what the study says.
_NOT_COMPUTED = re.compile(
    r"(output_dir|log|disable_tqdm|report_to|run_name|project|trackio|eval_|do_|save|enable_jit|push_to_hub|hub_|"
    r"resume|restore|ignore_data_skip|load_best|metric_for|greater_is|debug|skip_memory|ddp_timeout|local_rank|"
    r"seed$|learning_rate$|max_steps$)"
)


@dataclasses.dataclass
class DesignArguments:
    """What the designs share."""

    std: float = dataclasses.field(default=0.2, metadata={"help": "sigma; the authors'."})
    initial_mean: float = dataclasses.field(
        default=0.0, metadata={"help": "Of a Gaussian, and its public centre; the authors have .1 for T5."}
    )
    device_steps: int = dataclasses.field(default=150, metadata={"help": "Steps of stage 2, of a Gaussian."})
    device_learning_rate: float = 0.02
    device_batch_size: int = 8
    device_warmup_steps: int = dataclasses.field(default=0, metadata={"help": "Of stage 2; the authors' 100."})
    beta_learning_rate: float = 0.02
    alone_steps: int = dataclasses.field(default=40, metadata={"help": "Of `on_device`, each user."})
    alone_learning_rates: list[float] = dataclasses.field(default_factory=lambda: [1e-4, 5e-4, 2e-3])
    volunteers: float = dataclasses.field(
        default=0.5, metadata={"help": "Share of the users whose static embeddings make the mixtures' components."}
    )
    alternations: int = dataclasses.field(
        default=3, metadata={"help": "How often stages 2 and 3 follow each other where components are random."}
    )


class Study(NamedTuple):
    """One data set and the size of its model and runs."""

    name: str
    root: Path
    data: PersonalData
    base: dict[str, Any]
    designs: DesignArguments
    training_args: TrainingArguments
    stage1_steps: int
    stage1_learning_rate: float
    steps: int

    @property
    def volunteers(self) -> int:
        """The first so many users are asked to volunteer, in the arms that need it."""
        return max(1, min(self.data.num_users - 1, round(self.designs.volunteers * self.data.num_users)))


@dataclasses.dataclass
class ArmFit:
    """What is kept of a run. `accuracy` is on the test split, that of all users, of those who volunteer (in the arms
    that ask) and of the others; `validation` picks learning rates, `hits` is right or wrong for each test text (in a
    language model, the share of its characters)."""

    arm: str
    seed: int
    learning_rate: float
    accuracy: float
    validation: float
    accuracy_worst_decile: float
    accuracy_volunteers: float
    accuracy_others: float
    seconds: float
    membership_auc: float
    bytes_per_text: float
    privacy: dict[str, Any]
    hits: list[float]
    user_predictions: list[list[int]] | None = None
    recovery: dict[str, float] | None = None


class Parsed(NamedTuple):
    """Kind of an arm, its radius, steps or components, and whether volunteers' embeddings are needed for it."""

    kind: str
    value: float | None = None
    volunteers: bool = False


def parse_arm(arm: str) -> Parsed:
    """`ValueError` for an unknown arm."""
    if arm in ("central", "on_device", "static"):
        return Parsed(arm)
    if arm.removesuffix("_reader") == "gaussian_free":
        return Parsed("gaussian", volunteers=arm.endswith("_reader"))
    for pattern, kind in (
        (r"gaussian_r(\d+(?:\.\d+)?)(_reader)?", "gaussian"),
        (r"beta_(\d+)(_reader)?", "beta"),
        (r"mixture_k(\d+)()", "mixture"),
        (r"mixture_k(\d+)_random()", "mixture_random"),
    ):
        if (found := re.fullmatch(pattern, arm)) and float(found[1]) > 0:
            return Parsed(kind, float(found[1]), kind == "mixture" or bool(found[2]))
    raise ValueError(
        f"arm {arm!r} is not known. Choose from central, on_device, static, gaussian_free, gaussian_r2, beta_80, "
        "gaussian_r2_reader, beta_80_reader, mixture_k5, mixture_k5_random, with other numbers in them."
    )


def build_model(data: PersonalData, base: dict[str, Any], seed: int) -> PreTrainedModel:
    """A fresh model of `seed`; without a user it reads an embedding of zeros."""
    set_seed(seed)
    shared = {"base_config": base, "missing_user": "zero"}
    if data.is_language_model:
        return PersonalLmForCausalLM(PersonalLmConfig(task="causal_lm", num_user_tokens=1, **shared))
    config = PersonalLmConfig(num_labels=data.num_labels, **shared)
    return PersonalLmForSequenceClassification(config)


# --- records


class OtherSettingsError(ValueError):
    """A folder holds what other settings or other data made."""


def stage1_settings(study: Study, seed: int) -> dict[str, Any]:
    """All that stage 1 depends on: what is written beside its result."""
    training = {name: value for name, value in study.training_args.to_dict().items() if not _NOT_COMPUTED.match(name)}
    settings = {
        "data": study.data.fingerprint,
        "base_model": study.base,
        "seed": seed,
        "stage1_steps": study.stage1_steps,
        "stage1_learning_rate": study.stage1_learning_rate,
        "training": training,
    }
    return _plain(settings)


def volunteer_settings(study: Study, seed: int, learning_rate: float) -> dict[str, Any]:
    """All that the volunteers' run depends on."""
    more = {"learning_rate": learning_rate, "max_steps": study.steps, "volunteers": study.volunteers}
    return stage1_settings(study, seed) | more


def arm_settings(study: Study, arm: str, seed: int, learning_rate: float) -> dict[str, Any]:
    """All that an arm depends on."""
    more = {"arm": arm, "designs": dataclasses.asdict(study.designs)}
    return _plain(volunteer_settings(study, seed, learning_rate) | more)


def read_kept(path: Path, settings: dict[str, Any]) -> Any:
    """What [`keep`] wrote there; `None` if nothing.

    Raises:
        OtherSettingsError: it was made with other settings or data; the message names them.
    """
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    made_with = record.get("settings") if isinstance(record, dict) else None
    if made_with == settings:
        return record["kept"]
    differing = "no settings are written beside it"
    if isinstance(made_with, dict):
        old, new = _flat(made_with), _flat(settings)
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        differing = "; ".join(f"{name}: {old.get(name)} there, {new.get(name)} now" for name in names)
    raise OtherSettingsError(
        f"{path.parent.name} of this folder was made with other settings ({differing}). Give another --output_dir, or "
        "repeat the command as it was."
    )


def keep(path: Path, settings: dict[str, Any], kept: Any) -> Any:
    """Write a record with the settings that made it, whole or not at all; returns it as it will be read."""
    text = json.dumps({"settings": settings, "kept": kept})
    write_text_atomically(path, text)
    return json.loads(text)["kept"]


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


__all__ = [
    "ArmFit",
    "DesignArguments",
    "OtherSettingsError",
    "Parsed",
    "Study",
    "arm_settings",
    "build_model",
    "keep",
    "parse_arm",
    "read_kept",
    "stage1_settings",
    "volunteer_settings",
]
