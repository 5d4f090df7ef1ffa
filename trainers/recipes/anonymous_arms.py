"""The arms of the comparison of anonymous personalisation: what each trains.

| arm | what the cloud gets beside a text |
|---|---|
| `central` | nothing |
| `on_device` | nothing, and no text; each device fine-tunes the cloud's model on its own texts |
| `static` | the user's number: an identifier |
| `gaussian_r2`, `gaussian_free` | a draw from N(mu, sigma^2), mu within 2 sigma of a centre, or anywhere |
| `beta_80` | a draw from Beta(alpha, beta), fitted in 80 steps |
| `gaussian_r2_reader`, `beta_80_reader` | the same, fitted on a model that has learned to read users |
| `mixture_k5` | a draw from one of 5 shared components, chosen on that same model |
| `mixture_k5_random` | a draw from one of 5 random components, stages 2 and 3 alternating |

All start from one stage-1 model of their seed and train as many steps on the same texts; one text is one upload. That
reader is made by users who volunteer: their numbers are sent along with their texts, and they are identified. Designs
with it are to be compared with each other, those without it, which are fitted on the stage-1 model, with each other.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_models.personal_lm import SimulatedNoise, UserDistribution, UserDistributionConfig

from ..device_cloud.static_user_embeddings import NumberedUserCollator, StaticUserModel
from ..device_cloud.user_embedding_mixture import (
    assign_components,
    clustered_components,
    random_components,
    upload_parts,
)
from ..device_cloud.user_embeddings import AnonymousUserCollator, FitArguments, fit_user_distribution, without
from .anonymous_data import Row
from .anonymous_measures import Trained, measured, on_device
from .anonymous_study import (
    ArmFit,
    Parsed,
    Study,
    arm_settings,
    build_model,
    keep,
    parse_arm,
    read_kept,
    stage1_settings,
    volunteer_settings,
)
from .arguments import training_arguments_of
from .training import build_trainer, train


USER_FILE = "users.safetensors"  # private, and never at the top of a run folder, where it would be taken for weights


def run_arm(study: Study, arm: str, seed: int, learning_rate: float) -> ArmFit:
    """One run, or what is kept of it: a repeated command goes on after the last that was finished.

    Raises:
        OtherSettingsError: the folder holds a run with other settings or other data.
    """
    folder = arm_folder(study.root, study.name, arm, seed, learning_rate)
    settings = arm_settings(study, arm, seed, learning_rate)
    kept = read_kept(folder / "fit.json", settings)
    if kept is None:
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        fit = _run(study, arm, seed, learning_rate, folder)
        fit = dataclasses.replace(fit, seconds=time.perf_counter() - start)
        kept = keep(folder / "fit.json", settings, dataclasses.asdict(fit))
    return ArmFit(**kept)


def arm_folder(root: Path, study: str, arm: str, seed: int, learning_rate: float) -> Path:
    """Where a run is kept."""
    return root / "runs" / study / arm / f"lr{learning_rate:g}-seed{seed}"


def _run(study: Study, arm: str, seed: int, learning_rate: float, folder: Path) -> ArmFit:
    parsed = parse_arm(arm)
    if parsed.kind == "on_device":
        return on_device(study, stage1_model(study, seed), seed, learning_rate)
    if parsed.kind == "static":
        model, collator = _static(study, seed, learning_rate, folder)
        trained = Trained(model, collator)
    elif parsed.kind == "central":
        trained = Trained(stage1_model(study, seed), UserlessCollator(study.data.collator()))
        _train(study, trained.model, trained.collator, study.steps, learning_rate, seed, folder)
    elif parsed.kind == "mixture_random":
        trained = _alternating(study, parsed, seed, learning_rate, folder)
    else:
        trained = _anonymous(study, parsed, seed, learning_rate, folder)
    if trained.tables:
        trained.tables[-1].save(folder / USER_FILE)
        trained.tables[-1].save_design(folder)
    fit = measured(study, arm, seed, learning_rate, trained)
    (trained.model.model if isinstance(trained.model, StaticUserModel) else trained.model).save_pretrained(folder)
    return fit


class UserlessCollator:
    """Batches that know of no user."""

    def __init__(self, collator: Callable, user_column: str = "user"):
        self.collator, self.user_column = collator, user_column

    def __call__(self, features: list[Row]) -> dict[str, Any]:
        """A batch without `user_column`."""
        return dict(self.collator([without(row, self.user_column) for row in features]))


def stage1_model(study: Study, seed: int) -> PreTrainedModel:
    """The cloud's model before anybody is personalised; trained once for all arms of a seed.

    Raises:
        OtherSettingsError: the folder holds one of other settings or data.
    """
    folder, settings = study.root / "runs" / study.name / "stage1" / f"seed{seed}", stage1_settings(study, seed)
    model = build_model(study.data, study.base, seed)
    if read_kept(folder / "done.json", settings) is None:
        collator = UserlessCollator(study.data.collator())
        _train(study, model, collator, study.stage1_steps, study.stage1_learning_rate, seed, folder)
        model.save_pretrained(folder)
        keep(folder / "done.json", settings, True)
    return type(model).from_pretrained(folder)


def _train(study, model, collator, steps, learning_rate, seed, folder: Path, *, rows=None) -> None:
    """An ordinary run of the Trainer; the seed decides the order of the texts, the same for all arms."""
    args = training_arguments_of(
        study.training_args,
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        remove_unused_columns=False,
        resume_from_checkpoint=None,
        save_strategy="no",
        eval_strategy="no",
    )
    rows = study.data.train if rows is None else rows
    train(build_trainer(model, args, train_dataset=rows, data_collator=collator), None)


def _static(study: Study, seed: int, learning_rate: float, folder: Path, *, only: int | None = None):
    """With the table of everybody's embeddings, or that of the first `only` users."""
    model = StaticUserModel(stage1_model(study, seed), study.data.num_users if only is None else only)
    collator = NumberedUserCollator(study.data.collator())
    if only is not None:
        collator = _Volunteers(collator, only)
    _train(study, model, collator, study.steps, learning_rate, seed, folder)
    return model, collator


class _Volunteers:
    """Hides the number of who did not volunteer."""

    def __init__(self, collator: NumberedUserCollator, count: int):
        self.collator, self.count = collator, count

    def __call__(self, features: list[Row]) -> dict[str, Any]:
        batch = self.collator(features)
        batch["user"] = torch.where(batch["user"] < self.count, batch["user"], -1)
        return batch


def _anonymous(study: Study, parsed: Parsed, seed: int, learning_rate: float, folder: Path) -> Trained:
    """Stages 2 and 3: each text is uploaded once, with one draw."""
    model, data = stage1_model(study, seed), study.data
    reader, embeddings = _volunteers(study, seed, learning_rate) if parsed.volunteers else (model, None)
    table = _fitted(study, parsed, reader, embeddings, seed)
    collator = AnonymousUserCollator(data.collator(), table, simulation=True, seed=seed)
    _train(study, model, collator, study.steps, learning_rate, seed, folder)
    return Trained(model, collator, [table], volunteers=study.volunteers if parsed.volunteers else 0)


def _shape(study: Study, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "hidden_size": model.config.hidden_size,
        "num_tokens": model.config.num_user_tokens,
        "std": study.designs.std,
    }


def _fitted(study: Study, parsed: Parsed, reader, embeddings: torch.Tensor | None, seed: int) -> UserDistribution:
    """Stage 2, on `reader` as it is."""
    designs, data, shape = study.designs, study.data, _shape(study, reader)
    options = {"simulation": True, "seed": seed}
    if parsed.kind == "mixture":
        config = UserDistributionConfig(**shape, design="mixture", num_components=int(parsed.value))
        components = clustered_components(embeddings, config.num_components, seed=seed)
        table = UserDistribution(config, data.num_users, components=components)
        assign_components(reader, table, data.train, data.collator(), **options)
        return table
    if parsed.kind == "gaussian":
        radius = None if parsed.value is None else parsed.value * designs.std
        config = UserDistributionConfig(**shape, initial_mean=designs.initial_mean, max_radius=radius)
        steps, rate = designs.device_steps, designs.device_learning_rate
    else:
        config = UserDistributionConfig(**shape, design="beta")
        steps, rate = int(parsed.value), designs.beta_learning_rate
    table = UserDistribution(config, data.num_users)
    fitting = FitArguments(
        learning_rate=rate,
        steps=steps,
        batch_size=designs.device_batch_size,
        warmup_steps=designs.device_warmup_steps,
    )
    fit_user_distribution(reader, table, data.train, data.validation, data.collator(), fitting, **options)
    return table


def _alternating(study: Study, parsed: Parsed, seed: int, learning_rate: float, folder: Path) -> Trained:
    """Stages 2 and 3 in turn, from a random assignment to random components; every text is uploaded in one turn."""
    model, data, tables = stage1_model(study, seed), study.data, []
    config = UserDistributionConfig(**_shape(study, model), design="mixture", num_components=int(parsed.value))
    count, options = config.num_components, {"simulation": True, "seed": seed}
    components = random_components(count, config.shape, 10 * study.designs.std, seed=seed)
    parts = upload_parts(data.train, study.designs.alternations)
    for part, indices in enumerate(parts):
        table = UserDistribution(config, data.num_users, components=components)
        if part == 0:
            drawn = (SimulatedNoise(seed).uniform((data.num_users,)) * count).long()
            table.set_weights(torch.nn.functional.one_hot(drawn, count).float())
        else:
            assign_components(model, table, data.train, data.collator(), **options)
        rows = [data.train[index] for index in indices]
        collator = AnonymousUserCollator(data.collator(), table, **options)
        steps = study.steps // len(parts) + (part < study.steps % len(parts))
        _train(study, model, collator, steps, learning_rate, seed, folder, rows=rows)
        tables.append(table)
    return Trained(model, collator, tables, uploaded=rows)


def _volunteers(study: Study, seed: int, learning_rate: float) -> tuple[PreTrainedModel, torch.Tensor]:
    """A model that reads static embeddings of volunteers, and these."""
    folder = study.root / "runs" / study.name / "volunteers" / f"lr{learning_rate:g}-seed{seed}"
    settings, file = volunteer_settings(study, seed, learning_rate), folder / "volunteers.safetensors"
    if read_kept(folder / "done.json", settings) is None:
        model, _ = _static(study, seed, learning_rate, folder, only=study.volunteers)
        model.model.save_pretrained(folder)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        save_file({"embeddings": model.table.detach()}, temporary)
        os.replace(temporary, file)
        keep(folder / "done.json", settings, True)
    reader = type(build_model(study.data, study.base, seed)).from_pretrained(folder)
    return reader, load_file(file)["embeddings"]


__all__ = ["USER_FILE", "UserlessCollator", "arm_folder", "run_arm", "stage1_model"]
