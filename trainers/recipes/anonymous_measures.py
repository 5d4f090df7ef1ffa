"""What is measured of an arm of anonymous personalisation: accuracy by user, what the uploads betray, bytes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_models.personal_lm import SimulatedNoise, UserDistribution

from ..device_cloud.static_user_embeddings import fine_tune_alone
from ..device_cloud.user_embedding_wire import send_requests
from ..device_cloud.user_embeddings import frozen, sample_losses, without
from ..evaluation.mixture_recovery import mixture_recovery
from ..evaluation.privacy import membership_auc, privacy_report
from ..federated.core.wire import WireMeter
from .anonymous_data import PersonalData, Row
from .anonymous_study import ArmFit, Study


class Trained(NamedTuple):
    """What an arm trained.

    Args:
        collator: makes its batches, as they were uploaded.
        tables: the distributions that uploads were drawn from, the last being in force; none without draws.
        uploaded: the rows whose uploads the last steps were made on; `None`: all.
        volunteers: users who were identified on the way.
    """

    model: nn.Module
    collator: Callable[[list[Row]], dict[str, Any]]
    tables: Sequence[UserDistribution] = ()
    uploaded: list[Row] | None = None
    volunteers: int = 0


@torch.no_grad()
def evaluate(model, rows: list[Row], collator, *, batch_size: int = 256) -> tuple[list[float], list[int], list[float]]:
    """Of each text: the share that was predicted right, how much there was to predict, and its loss."""
    hits, counts, losses = [], [], []
    model.eval()
    for start in range(0, len(rows), batch_size):
        batch = collator(rows[start : start + batch_size])
        labels = batch["labels"]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        if labels.ndim == 1:
            right, counted = (logits.argmax(-1) == labels)[:, None], torch.ones_like(labels)[:, None]
        else:
            right, counted = logits[:, :-1].argmax(-1) == labels[:, 1:], labels[:, 1:] != -100
        counts += counted.sum(1).tolist()
        hits += ((right & counted.bool()).sum(1) / counted.sum(1).clamp_min(1)).tolist()
        losses += sample_losses(model, batch).tolist()
    return hits, counts, losses


def _mean(hits: Sequence[float], counts: Sequence[int]) -> float:
    return sum(hit * count for hit, count in zip(hits, counts)) / sum(counts)


def worst_decile(hits: list[float], counts: list[int], rows: list[Row], users: int) -> float:
    """Mean accuracy of the tenth of the users with the lowest."""
    right, total = [0.0] * users, [0] * users
    for hit, count, row in zip(hits, counts, rows):
        right[row["user"]] += hit * count
        total[row["user"]] += count
    own = sorted(r / t for r, t in zip(right, total))
    own = own[: max(1, users // 10)]
    return sum(own) / len(own)


def accuracies(study: Study, hits: list[float], counts: list[int]) -> dict[str, float]:
    """Of the test texts: of all users, of the tenth with the lowest, of volunteers and of the others."""
    rows, found = study.data.test, {"accuracy": _mean(hits, counts)}
    found["accuracy_worst_decile"] = worst_decile(hits, counts, rows, study.data.num_users)
    for name, asked in (("accuracy_volunteers", True), ("accuracy_others", False)):
        own = [(h, c) for h, c, row in zip(hits, counts, rows) if (row["user"] < study.volunteers) == asked]
        found[name] = _mean(*zip(*own))
    return found


def uploads_privacy(trained: Trained, study: Study, arm: str, seed: int) -> dict[str, Any]:
    """
    What the training uploads betray: of the table that betrays most, if there were several.

    Volunteers sent their numbers with the same texts: an attacker names all of them, and seeks the others among the
    others alone. So `attribution`, `bound` and `chance` are those of the others, `attribution_volunteers` is 1, and
    `attribution_all_users` the mean over everybody.
    """
    count = study.data.num_users
    if not trained.tables:
        known = 1.0 if arm == "static" else 1 / count
        return {"attribution": known, "chance": 1 / count, "users": count}
    others, reports = range(trained.volunteers, count), []
    for table in trained.tables:
        report = privacy_report(table.rows(others), noise=SimulatedNoise(seed))
        reports.append(dataclasses.asdict(report))
    worst = max(reports, key=lambda report: report["attribution"])
    if worst["bound"] is not None:
        worst["bound"] = max(report["bound"] for report in reports)
    if trained.volunteers:
        worst["attribution_volunteers"] = 1.0
        worst["attribution_all_users"] = (trained.volunteers + len(others) * worst["attribution"]) / count
    return worst


def measured(study: Study, arm: str, seed: int, learning_rate: float, trained: Trained) -> ArmFit:
    """Everything that is kept of a run on the cloud."""
    data, model, collator = study.data, trained.model, trained.collator
    hits, counts, losses = evaluate(model, data.test, collator)
    seen, seen_counts, _ = evaluate(model, data.validation, collator)
    uploaded = data.train if trained.uploaded is None else trained.uploaded
    *_, members = evaluate(model, uploaded[:: max(1, len(uploaded) // len(data.test))], collator)
    meter, batch = WireMeter(), collator(data.train[:64])
    send_requests(meter, batch, users=[row["user"] for row in data.train[:64]], what="training")
    table = trained.tables[-1] if trained.tables else None
    recovered = table is not None and table.config.design != "mixture" and data.num_users <= 64
    recovery = dataclasses.asdict(mixture_recovery(table, noise=SimulatedNoise(seed))) if recovered else None
    return ArmFit(
        arm=arm,
        seed=seed,
        learning_rate=learning_rate,
        **accuracies(study, hits, counts),
        validation=_mean(seen, seen_counts),
        seconds=0.0,
        membership_auc=membership_auc(members, losses),
        bytes_per_text=meter.totals()["up"] / len(batch["input_ids"]),
        privacy=uploads_privacy(trained, study, arm, seed),
        hits=hits,
        user_predictions=None if table is None or data.is_language_model else _as_others(model, data, table, seed),
        recovery=recovery,
    )


@torch.no_grad()
def _as_others(model, data: PersonalData, table: UserDistribution, seed: int, *, users: int = 8) -> list[list[int]]:
    """The class of every test text with the draws of some random users, `(texts, users)`."""
    noise, collator, found = SimulatedNoise(seed), data.collator(), []
    chosen = (noise.uniform((users,)) * data.num_users).long()
    with frozen(model):
        for start in range(0, len(data.test), 256):
            rows = [without(without(row, "user"), "labels") for row in data.test[start : start + 256]]
            batch = collator(rows)
            columns = [
                model(**batch, user_embeds=table.sample(user.repeat(len(rows)), noise=noise)).logits.argmax(-1)
                for user in chosen
            ]
            found += torch.stack(columns, dim=1).tolist()
    return found


def on_device(study: Study, cloud, seed: int, learning_rate: float) -> ArmFit:
    """Every user's own copy of the cloud's model, fine-tuned and measured on its own texts."""
    data, collator, noise = study.data, study.data.collator(), SimulatedNoise(seed)
    parts = {name: ([], []) for name in ("validation", "members", "others")}
    hits, all_counts = [0.0] * len(data.test), [0] * len(data.test)
    for user in range(data.num_users):
        own = {
            name: [(i, without(row, "user")) for i, row in enumerate(getattr(data, name)) if row["user"] == user]
            for name in ("train", "validation", "test")
        }
        model = fine_tune_alone(
            cloud,
            [row for _, row in own["train"]],
            collator,
            learning_rate=learning_rate,
            steps=study.designs.alone_steps,
            batch_size=study.designs.device_batch_size,
            noise=noise,
        )
        right, counts, _ = evaluate(model, [row for _, row in own["validation"]], collator)
        parts["validation"][0].extend(right)
        parts["validation"][1].extend(counts)
        right, counts, losses = evaluate(model, [row for _, row in own["test"]], collator)
        for (index, _), hit, count in zip(own["test"], right, counts):
            hits[index], all_counts[index] = hit, count
        parts["others"][0].extend(losses)
        parts["members"][0].extend(evaluate(model, [row for _, row in own["train"]], collator)[2])
    return ArmFit(
        arm="on_device",
        seed=seed,
        learning_rate=learning_rate,
        **accuracies(study, hits, all_counts),
        validation=_mean(*parts["validation"]),
        seconds=0.0,
        membership_auc=membership_auc(parts["members"][0], parts["others"][0]),
        bytes_per_text=0.0,
        privacy={"attribution": 1 / data.num_users, "chance": 1 / data.num_users, "users": data.num_users},
        hits=hits,
    )


__all__ = [
    "Trained",
    "accuracies",
    "evaluate",
    "measured",
    "on_device",
    "uploads_privacy",
    "worst_decile",
]
