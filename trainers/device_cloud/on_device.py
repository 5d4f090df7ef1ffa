r"""Fine-tuning on thousands of devices, simulated at once: every user has parameters of their own, and one batched
computation trains many users.

A device of user u receives the cloud's model and, where the correction needs it, the global share of positives; it
corrects its labels, takes `steps` steps on its own samples, and keeps what it has learned if its own validation does
not get worse. Nothing goes up. Here the parameters of many users are stacked, samples are padded with weight 0, and
`torch.func` takes gradients of each user's loss by their own parameters: the same numbers as user after user, without
a model or a Trainer for each. The model is in evaluation mode throughout: no dropout.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..federated.core import RoundStore, WireMeter
from .budget import DeviceBudget, DeviceCost, evaluating
from .label_correction import Correction, Targets, require_binary_labels
from .on_device_parameters import (
    Stacked,
    ids_of_user,
    kept_form,
    own_parameters,
    save_user,
    sent_state,
    user_state,
    with_adapters,
)
from .on_device_rows import NOT_INPUTS, PaddedRows, RowsByUser, UserRows, auc_of_users, batch_positions, chunks_of
from .on_device_store import finished, open_store, run_identity
from .on_device_tables import own_rows, read_rows, rows_of_users, tables_among
from .on_device_training import (
    INTERCEPT,
    BatchedUsers,
    OneUser,
    SampleLoss,
    Update,
    UserBatch,
    all_finite,
    flat_logits,
    per_sample_loss,
    train_users,
)


logger = logging.get_logger(__name__)


@dataclass
class OnDeviceArguments:
    """How a device fine-tunes.

    Plain gradient descent by default: on the few samples of a user, Adam moves every coordinate by about the learning
    rate a step, however small its gradient is.
    """

    trainable: str = field(
        default="all", metadata={"help": "all, head, bias, user_embedding, lora, or a regular expression of names."}
    )
    device_learning_rate: float = 0.1
    device_steps: int = 10
    device_batch_size: int | None = field(default=None, metadata={"help": "Samples a step; None: all of the user's."})
    device_optimizer: Literal["sgd", "adam"] = "sgd"
    min_samples: int = field(default=10, metadata={"help": "Users with fewer keep the cloud's model."})
    max_samples: int | None = field(default=None, metadata={"help": "Only so many of a user's last samples count."})
    roll_back: bool = field(
        default=True, metadata={"help": "Keep the cloud's model where the user's own validation gets worse."}
    )
    validate_every: int | None = field(
        default=None, metadata={"help": "Validate so often, and keep the best step; None: after the last step alone."}
    )
    max_chunk_bytes: int = field(default=2**28, metadata={"help": "Memory for the users that are trained at once."})
    vectorized: bool = field(default=True, metadata={"help": "False: one after the other, for models vmap refuses."})
    device_seed: int = 0


@dataclass
class OnDeviceResults:
    """What came of it, by user in the order of `users`.

    Args:
        users (`torch.Tensor`): all users with samples.
        num_samples: how many they trained on.
        p_local: their share of positives; NaN for labels of several classes.
        accepted: whether they serve parameters of their own; the others serve the cloud's.
        best_step: the step that is served, 0 for the cloud's; -1 for too few samples.
        validation_before, validation_after: AUC on their validation, for labels of several classes minus the loss;
            NaN without one.
        logits: by name of what was predicted, a row for each of its rows; the cloud's where a user's own is not
            finite.
        seconds, cpu_seconds: of the fine-tuning itself, of all users, without prediction and files; by the clock, and
            by the time of this process.
        cost: of the largest user's training on one device.
    """

    users: torch.Tensor
    num_samples: torch.Tensor
    p_local: torch.Tensor
    accepted: torch.Tensor
    best_step: torch.Tensor
    validation_before: torch.Tensor
    validation_after: torch.Tensor
    logits: dict[str, torch.Tensor]
    seconds: float
    cpu_seconds: float
    cost: DeviceCost | None = None

    @property
    def users_per_second(self) -> float:
        """Users with enough samples, over the seconds of fine-tuning."""
        return int((self.best_step >= 0).sum()) / max(self.seconds, 1e-9)


class OnDeviceFineTuner:
    """Fine-tune a copy of the cloud's model for every user.

    Example:
        >>> correction = Correction(method="scale", prior="model")
        >>> tuner = OnDeviceFineTuner(model, OnDeviceArguments(trainable="head"), correction=correction)
        >>> results = tuner.fit(train, validation=validation, predict={"test": test}, store="runs/mine/users")
        >>> tuner.save_user("runs/mine/users", user=17, folder="runs/mine/user-17")

    Args:
        model: any whose output has `logits`; it stays as it is.
        correction: of the labels; by default none.
        lora: adapters for `trainable="lora"`; by default of rank 4 on every linear map. They start the same for all
            users, as `device_seed` says.
        sample_loss: of logits `(N, ...)` and labels `(N,)`, one a sample; by default binary cross-entropy of float
            labels, cross-entropy of integer ones.
        budget: of a device; the training of the user with the most samples is checked against it, with the moments of
            the optimizer and the copies to return to.
        meter: counts what goes down to each user: the model, of tables of users' features their own rows alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: OnDeviceArguments,
        *,
        correction: Correction | None = None,
        lora: LoraConfig | None = None,
        sample_loss: SampleLoss | None = None,
        budget: DeviceBudget | None = None,
        meter: WireMeter | None = None,
    ):
        if args.device_steps < 1 or args.device_learning_rate <= 0 or args.min_samples < 1:
            raise ValueError("device_steps, device_learning_rate and min_samples must be positive.")
        self.cloud_model = model
        self.model = with_adapters(model, lora, seed=args.device_seed) if args.trainable == "lora" else model
        self.args, self.correction = args, correction or Correction(method="none")
        self.sample_loss, self.budget, self.meter = sample_loss or per_sample_loss, budget, meter
        self.names = own_parameters(self.model, args.trainable)
        self._base = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        self._device = next(iter(self._base.values())).device

    def fit(
        self,
        rows: UserRows,
        *,
        validation: UserRows | None = None,
        predict: Mapping[str, UserRows] | None = None,
        store: str | Path | None = None,
        keep_parameters: bool = True,
        progress: bool = False,
    ) -> OnDeviceResults:
        """Fine-tune all users of `rows`, each on their own.

        Args:
            validation: what each user's roll-back looks at, never corrected.
            predict: rows whose logits are wanted, each from its user's model; users without samples have the cloud's.
            store: folder of the users' parameters, a file for many of them; a call that was killed goes on there.
            keep_parameters: False: the store keeps what is needed to go on, and no parameters.

        Raises:
            DeviceBudgetError: the model does not fit a device.
            ValueError: the store is of other data, another model or other arguments; rows to train, to validate or to
                predict are empty.
        """
        predict = dict(predict or {})
        for name, part in {"rows": rows, "validation": validation, **predict}.items():
            if part is not None and not len(part.users):
                raise ValueError(f"{name!r} has no rows: leave it out.")
        with evaluating(self.model):
            job = _Job(self, rows, validation, predict)
            rounds = None if store is None else self._open(Path(store), job, keep_parameters)
            found, logits = job.before(), {name: self.predict_cloud(part) for name, part in predict.items()}
            seconds = {"seconds": 0.0, "cpu_seconds": 0.0}
            with own_rows(self.model, job.tables):
                for number, users in enumerate(tqdm(job.chunks, desc="users", unit="chunk", disable=not progress)):
                    tensors, record = finished(rounds, number)
                    if record is None:
                        tensors, record = job.tune(users)
                        if rounds is not None:
                            rounds.commit(number, tensors if keep_parameters else tensors | {"parameters": {}}, record)
                    place = torch.searchsorted(job.by_user.users, users)
                    for name, values in tensors["users"].items():
                        found[name][place] = values
                    for name, values in tensors["logits"].items():
                        logits[name][tensors["logit_rows"][name]] = values
                    seconds = {name: total + record[name] for name, total in seconds.items()}
        self._send(job)
        return OnDeviceResults(users=job.by_user.users, logits=logits, cost=job.cost, **seconds, **found)

    @torch.no_grad()
    def predict_cloud(self, rows: UserRows) -> torch.Tensor:
        """Logits of the cloud's model."""
        with evaluating(self.model):
            return torch.cat([logits.cpu() for logits in self._batches(rows)])

    def _batches(self, rows: UserRows, batch_size: int = 8192):
        inputs = {name: tensor for name, tensor in rows.tensors.items() if name not in NOT_INPUTS}
        for at in range(0, len(rows.users), batch_size):
            batch = {name: tensor[at : at + batch_size].to(self._device) for name, tensor in inputs.items()}
            yield flat_logits(self.model(**batch).logits)

    def _open(self, folder: Path, job: "_Job", keep_parameters: bool) -> RoundStore:
        predicted = {f"predict {name}": part for name, part in job.predict.items()}
        identity = run_identity(
            model=self.cloud_model,
            data={"rows": job.rows, "validation": job.validation, **predicted},
            chunks=job.chunks,
            arguments=self.args,
            correction=self.correction,
            lora=self.model.peft_config[self.model.active_adapter] if self.args.trainable == "lora" else None,
            sample_loss=self.sample_loss,
            keep_parameters=keep_parameters,
        )
        return open_store(folder, identity)

    def _send(self, job: "_Job") -> None:
        if self.meter is None:
            return
        correction = self.correction
        needs_prior = correction.method not in ("none", "bias") and correction.prior != "model"
        prior = {"p_ref": torch.tensor(correction.global_ctr)} if needs_prior else None
        sizes: dict[tuple[int, ...], int] = {}  # equal shapes are equally many bytes: serialised once each
        for user in job.by_user.users.tolist():
            ids = ids_of_user(self.cloud_model, job.inputs_of(user))
            shape = tuple(map(len, ids.values()))
            to = {"direction": "down", "user": user, "what": "model"}
            if shape in sizes:
                self.meter.count(sizes[shape], **to)
            else:
                sizes[shape] = len(self.meter.send(sent_state(self.cloud_model, ids), **to))
            if prior:
                self.meter.send(prior, direction="down", user=user, what="prior")

    def user_state(self, store: str | Path, user: int) -> dict[str, torch.Tensor]:
        """The parameters of a user's own out of the store; the cloud's for one who did not fine-tune."""
        rounds = RoundStore(store)
        for number in rounds.rounds():
            tensors, record = rounds.load(number)
            if user in record["users"]:
                if not tensors["parameters"]:
                    raise ValueError(f"{Path(store).name} was written with keep_parameters=False.")
                return user_state(tensors["parameters"], record["tables"], self._base, record["users"].index(user))
        return {name: self._base[name].clone() for name in self.names}

    def save_user(self, store: str | Path, user: int, folder: str | Path) -> None:
        """Write a user's model, or with `trainable="lora"` their adapter for `PeftModel.from_pretrained`. Ids stay
        what they are, so tables are whole: other users' rows, which no device is sent, are in the folder."""
        save_user(self.model, self.user_state(store, user), Path(folder))


class _Job:
    """The users of one call of `fit`, in chunks, and what it takes to tune a chunk."""

    def __init__(self, tuner: OnDeviceFineTuner, rows: UserRows, validation: UserRows | None, predict: dict):
        self.tuner, self.args, self.model = tuner, tuner.args, tuner.model
        self.rows, self.validation, self.predict = rows, validation, predict
        labels = rows.tensors["labels"]
        if labels.dim() != 1:
            raise ValueError(f"Labels of shape {tuple(labels.shape)}: one for each row is expected.")
        self.by_user = RowsByUser(rows.users, last=self.args.max_samples)
        enough = self.by_user.counts >= self.args.min_samples
        users, counts = self.by_user.users[enough], self.by_user.counts[enough]
        self.targets, self.read, self.chunks, self.cost = self._targets(labels), {}, [], None
        self.tables: dict[str, nn.Embedding] = {}
        if len(users):
            self.cost = self._cost(users[counts.argmax()])
            self._find_tables()
            sizes = {"bytes_of": self._bytes_of(int(counts.max())), "max_bytes": self.args.max_chunk_bytes}
            self.chunks = list(chunks_of(users, counts, **sizes))

    def inputs_of(self, user: int) -> dict[str, torch.Tensor]:
        """What the model takes of a user's samples, `(N, ...)`."""
        padded = self.by_user.padded(torch.tensor([user]))
        return {name: value[0] for name, value in padded.inputs(self.rows).items()}

    def before(self) -> Stacked:
        """What is known of each user before anybody has tuned."""
        users, labels = len(self.by_user.users), self.rows.tensors["labels"]
        unknown = torch.full((users,), torch.nan, dtype=torch.float64)
        share = unknown.clone()
        if labels.dtype.is_floating_point:
            padded = self.by_user.padded(self.by_user.users)
            share = (padded.take(labels.double()) * padded.mask).sum(1) / padded.mask.sum(1)
        return {
            "num_samples": self.by_user.counts.clone(),
            "p_local": share,
            "accepted": torch.zeros(users, dtype=torch.bool),
            "best_step": torch.full((users,), -1),
            "validation_before": unknown.clone(),
            "validation_after": unknown.clone(),
        }

    def tune(self, users: torch.Tensor) -> tuple[dict[str, Stacked], dict[str, Any]]:
        """A chunk of users: what to keep of them, as tensors and as a record."""
        begin = time.perf_counter(), time.process_time()
        padded, args = self.by_user.padded(users), self.args
        rows = {
            name: rows_of_users(read, padded, self.tables[name].num_embeddings).to(self.tuner._device)
            for name, read in self.read.items()
        }
        batched = BatchedUsers(
            self.model, self._shared(), rows, sample_loss=self.tuner.sample_loss, vectorized=args.vectorized
        )
        positions = None
        if args.device_batch_size is not None:
            sizes = {"steps": args.device_steps, "batch_size": args.device_batch_size, "seed": args.device_seed}
            positions = batch_positions(padded.mask, users, **sizes).to(self.tuner._device)
        served, known = train_users(
            batched,
            self._start(len(users), rows),
            self._batch(padded),
            update=Update(args.device_learning_rate, args.device_optimizer),
            steps=args.device_steps,
            positions=positions,
            judge=self._judge_of(batched, users),
            judge_every=args.validate_every,
            roll_back=args.roll_back,
        )
        served.pop(INTERCEPT, None)
        seconds = {"seconds": time.perf_counter() - begin[0], "cpu_seconds": time.process_time() - begin[1]}
        tensors = {"users": _on_cpu(known), "logits": {}, "logit_rows": {}}
        for name, part in self.predict.items():
            wanted = RowsByUser(part.users).padded(users)
            if bool(wanted.mask.any()):
                logits = batched.logits(served, self._on_device(wanted.inputs(part))).cpu()
                mask = self._servable(logits, wanted.mask, name)
                tensors["logits"][name], tensors["logit_rows"][name] = logits[mask], wanted.index[mask]
        tensors["parameters"] = _on_cpu(kept_form(served, rows, self.tuner._base))
        return tensors, {"users": users.tolist(), "tables": list(rows), **seconds}

    @staticmethod
    def _servable(logits: torch.Tensor, mask: torch.Tensor, name: str) -> torch.Tensor:
        """The rows whose logits are finite; the others keep the cloud's."""
        finite = torch.isfinite(logits).flatten(2).all(2) if logits.dim() > 2 else torch.isfinite(logits)
        if lost := int((mask & ~finite).sum()):
            logger.warning(f"{lost} logits of {name!r} are not finite: the cloud's are served.")
        return mask & finite

    def _targets(self, labels: torch.Tensor) -> Targets:
        """On exactly the samples that are trained on, after any cut."""
        correction = self.tuner.correction
        if not labels.dtype.is_floating_point:
            if correction.method != "none":
                raise ValueError(f"Labels of dtype {labels.dtype} cannot be corrected; floats 0 and 1 are needed.")
            ones = torch.ones(labels.shape)
            return Targets(labels, ones, torch.zeros_like(ones))
        kept = self.by_user.kept()
        require_binary_labels(labels[kept], "The labels of the rows")
        logits = self.tuner.predict_cloud(self.rows)[kept] if correction.prior == "model" else None
        own = correction.targets(labels[kept], self.rows.users[kept], logits)
        return Targets(*(values.new_zeros(len(labels)).index_copy(0, kept, values) for values in own))

    def _cost(self, user: torch.Tensor) -> DeviceCost:
        """Of the user with the most samples, whom the budget must admit."""
        labels = self.by_user.padded(user[None]).take(self.rows.tensors["labels"])[0].to(self.tuner._device)
        batch = slice(self.args.device_batch_size)  # `None`: all
        example = {name: value[batch] for name, value in self._on_device(self.inputs_of(int(user))).items()}
        one = OneUser(self.model, self.tuner.sample_loss, labels[batch])
        wanted = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        try:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self.tuner.names)
            extra = self._copies() * sum(self._size(self.tuner._base[name]) for name in self.tuner.names)
            return (self.tuner.budget or DeviceBudget()).check(one, example, training=True, extra_bytes=extra)
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(wanted[name])

    def _copies(self) -> int:
        """Of the trained parameters, that lie on a device beside them and their gradient: the start to return to, two
        moments of Adam, the best step."""
        best = self.validation is not None and self.args.validate_every is not None
        return 1 + best + (2 if self.args.device_optimizer == "adam" else 0)

    @torch.no_grad()
    def _find_tables(self) -> None:
        """Tables of which a user has few rows, and which rows each sample reads."""
        tables = tables_among(self.model, self.tuner.names)
        self.read = read_rows(tables, lambda: [len(logits) for logits in self.tuner._batches(self.rows)])
        self.tables = {name: tables[name] for name in self.read}

    def _bytes_of(self, most: int):
        """What a user with so many samples needs in a chunk."""
        base, size = self.tuner._base, self._size
        own = sum(size(base[name]) for name in self.tuner.names)
        whole = sum(size(base[name]) for name in self._whole())
        row_bytes = sum(read.shape[1] * size(base[f"{name}.weight"][:1]) for name, read in self.read.items())
        in_step = most if self.args.device_batch_size is None else min(most, self.args.device_batch_size)
        activations = max(0, self.cost.peak_bytes - self.cost.bytes - (1 + self._copies()) * own) / in_step
        copies = 6 if self.args.device_optimizer == "adam" else 4  # start, current, best, gradient, two moments
        return lambda count: copies * (whole + row_bytes * count) + activations * count

    @staticmethod
    def _size(tensor: torch.Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    def _whole(self) -> list[str]:
        """Parameters that each user has whole."""
        tables = {f"{name}.weight" for name in self.tables}
        return [name for name in self.tuner.names if name not in tables]

    def _shared(self) -> Stacked:
        own = set(self._whole())
        return {name: value for name, value in self.tuner._base.items() if name not in own}

    def _start(self, count: int, rows: Stacked) -> Stacked:
        base = self.tuner._base
        start = {name: base[name].expand(count, *base[name].shape).clone() for name in self._whole()}
        for name, index in rows.items():
            weight = base[f"{name}.weight"]
            start[f"{name}.own"] = weight[index.clamp_max(len(weight) - 1)]  # (U, R, d)
        if self.tuner.correction.free_intercept:
            start[INTERCEPT] = torch.zeros(count, dtype=next(iter(base.values())).dtype, device=self.tuner._device)
        return start

    def _batch(self, padded: PaddedRows) -> UserBatch:
        labels, weights, offsets = (padded.take(values) for values in self.targets)
        parts = {"labels": labels, "weights": weights * padded.mask, "offsets": offsets}
        return UserBatch(self._on_device(padded.inputs(self.rows)), **self._on_device(parts))

    def _judge_of(self, batched: BatchedUsers, users: torch.Tensor):
        if self.validation is None:
            return None
        padded = RowsByUser(self.validation.users).padded(users)
        labels = padded.take(self.validation.tensors["labels"]).to(self.tuner._device)
        mask, inputs = padded.mask.to(labels.device), self._on_device(padded.inputs(self.validation))
        return partial(self._judge, batched, labels, mask, inputs)

    def _judge(self, batched: BatchedUsers, labels, mask, inputs, own: Stacked) -> torch.Tensor:
        """AUC of float labels, minus the loss of others; NaN where there is none, minus infinity where a logit is not
        finite."""
        logits = batched.logits(own, inputs)
        if labels.dtype.is_floating_point:
            scores = auc_of_users(logits, labels, mask)
        else:
            losses = self.tuner.sample_loss(logits.flatten(0, 1), labels.flatten()).view(labels.shape)
            scores = -losses.masked_fill(~mask, 0).sum(1) / mask.sum(1)
        return torch.where(all_finite(logits, mask), scores, -torch.inf)

    def _on_device(self, tensors: Mapping[str, torch.Tensor]) -> Stacked:
        return {name: value.to(self.tuner._device) for name, value in tensors.items()}


def _on_cpu(tensors: Stacked) -> Stacked:
    return {name: value.cpu() for name, value in tensors.items()}


__all__ = ["OnDeviceArguments", "OnDeviceFineTuner", "OnDeviceResults", "per_sample_loss"]
