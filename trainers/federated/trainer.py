"""A Trainer whose examples stay with their owners: `FederatedTrainer`."""

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from .arguments import check_arguments, optimizer_maker, rates, speed
from .client_evaluation import evaluate_clients, summary
from .client_states import ClientStates
from .commits import Commits, agree_on
from .core import AggregationLog, Availability, ClientUpdate, FederatedAlgorithm, RoundStore
from .engines import Engine, InProcessEngine
from .local import ClientData, LocalTraining, Shard
from .messages import LayoutMeter
from .partition import ClientRows
from .publishing import push_model, save_served
from .round_log import RoundLog
from .run_description import description_of
from .submodel_tables import rows_reader


logger = logging.get_logger(__name__)

Tensors = dict[str, torch.Tensor]
Score = Callable[[int, Sequence[str], Mapping[str, Tensors]], dict[str, dict[str, float]]]
ROUNDS, CLIENTS, LOG = "rounds", "clients", "federated_log.jsonl"
DRAWS_TRIED = 4  # clients whose submodel is read twice, to see whether it is always the same


class FederatedTrainer(Trainer):
    """Train a model over the clients of a dataset, by a federated algorithm.

    Example:
        >>> fed = FederatedTrainer(
        ...     model, args, train_dataset=ds, partition_by="user", strategy=FedSubAvg(), rounds=100, local_steps=10
        ... )
        >>> fed.train()
        >>> fed.evaluate(test_ds, per_client=True)
        >>> fed.push_to_hub()

    A round is what a step is to a Trainer: `logging_steps`, `eval_steps`, `warmup_steps` and the schedule of the
    learning rate count rounds, and callbacks hear of each. Batch size, optimizer and clipping are those of a client's
    local steps; a client begins each round with a fresh optimizer. The trainable parameters travel, so those of a
    PEFT adapter alone. Updates are differences in float32, for models in bf16 too.

    Unless `save_strategy="no"`, each round is committed to `output_dir`, and `train(resume_from_checkpoint=True)` goes
    on after a kill bit for bit as if there had been none; `save_total_limit` says how many rounds are kept (3).

    Args:
        strategy: the algorithm, see [`trainers.federated.core`]. Who takes part is drawn by its own `seed`, batches by
            that of `args`.
        rounds: how many, in all.
        train_dataset, partition_by: a dataset and its column with the client of each row; any map-style dataset and an
            array with the client of each row; or `{client: dataset}` alone, or
            [`ClientRows`][trainers.federated.partition.ClientRows] that were made before.
        local_steps: of a client in a round; or `local_epochs`, passes over its examples (1 if neither is given).
        availability: who is there in which round, see [`Availability`][trainers.federated.core.availability]; all.
        block_by: for algorithms with blocks of data, the column (or array) with the number of each row's block:
            clients train on the current block's rows, and those without any are not there.
        submodels: whether clients get only those rows of the embeddings that their examples read, found by
            [`rows_reader`][trainers.federated.submodel_tables.rows_reader]; `"auto"`: if the strategy requires it.
        involvement: `{client: {table: rows}}`, where it cannot be found.
        commit_every: rounds from one commit to the next.
        parallelism: what several processes share, the `"clients"` of a round (the same bits for any number of
            processes) or the `"data"` of each client (`per_device_train_batch_size` in each).
        arrivals: see [`InProcessEngine`][trainers.federated.engines.InProcessEngine].
        engine: `(trainer) -> Engine`, instead of these processes.
        options: those of `Trainer`: collator, evaluation data, metrics, callbacks and the like.

    Raises:
        ValueError: arguments that cannot be, before anything is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        strategy: FederatedAlgorithm,
        rounds: int,
        train_dataset: Any,
        partition_by: str | Sequence[Any] | None = None,
        local_steps: int | None = None,
        local_epochs: int | None = None,
        availability: Availability | None = None,
        block_by: str | Sequence[int] | None = None,
        submodels: bool | str = "auto",
        involvement: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
        commit_every: int = 1,
        parallelism: str = "clients",
        arrivals: Callable[[ClientUpdate], Iterable[ClientUpdate]] | None = None,
        engine: Callable[["FederatedTrainer"], Engine] | None = None,
        **options: Any,
    ):
        for name in ("model_init", "optimizers"):
            if options.get(name) is not None:
                raise ValueError(f"{name}= belongs to one run of one model; clients have many: use optim=.")
        if rounds < 1 or commit_every < 1:
            raise ValueError(f"rounds={rounds}, commit_every={commit_every}: at least 1 each.")
        if parallelism not in ("clients", "data"):
            raise ValueError(f"parallelism={parallelism!r} is not known. Choose one of 'clients', 'data'.")
        super().__init__(model, args, train_dataset=train_dataset, **options)
        self.strategy, self.rounds, self.availability = strategy, rounds, availability
        self.submodels, self.parallelism = submodels, parallelism
        self.partition_by, self.block_by = partition_by, block_by
        self.local = self._local_training(local_steps, local_epochs)
        self.clients = self._client_rows(self.train_dataset, partition_by, block_by)
        self.meter, self.learning_rates = LayoutMeter(), rates(self.args, rounds)
        self._given_involvement, self._rows_of = involvement, None
        saves, folder, main = self.args.save_strategy != "no", Path(self.args.output_dir), self.is_world_process_zero()
        kept = max(2, self.args.save_total_limit or 3)
        # back to the oldest round that is kept, should the newer ones be damaged
        self._states = ClientStates(folder / CLIENTS if saves else None, keep=commit_every * kept + 1)
        self.round_log = RoundLog(folder / LOG if saves and main else None)
        store = RoundStore(folder / ROUNDS, keep=kept) if saves else None
        self._commits = Commits(store, self.round_log, description_of(self), writes=main, every=commit_every)
        self._started = False
        self.engine = self._in_process(arrivals) if engine is None else engine(self)

    # --- what it is made of

    def _local_training(self, local_steps: int | None, local_epochs: int | None) -> LocalTraining:
        args = self.args
        kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(args, self.model)
        check_arguments(args, self.strategy, kind, options)
        return LocalTraining(
            self.model,
            optimizer=optimizer_maker(kind, options, args.weight_decay, self.get_decay_parameter_names(self.model)),
            learning_rate=self.learning_rate,
            batch_size=args.per_device_train_batch_size,
            local_steps=local_steps,
            local_epochs=1 if local_steps is None and local_epochs is None else local_epochs,
            loss=self._loss,
            seed=args.seed,
            max_grad_norm=args.max_grad_norm or 0.0,
            shard=self._shard(),
        )

    def _shard(self) -> Shard | None:
        if self.parallelism == "clients" or self.accelerator.num_processes == 1:
            return None

        def add_up(tensors: Sequence[torch.Tensor]) -> None:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

        return Shard(self.accelerator.process_index, self.accelerator.num_processes, add_up)

    def _client_rows(self, dataset: Any, partition_by: Any, block_by: Any = None) -> ClientRows:
        if isinstance(dataset, ClientRows):
            return dataset

        def read(part: Any) -> Any:
            return self._remove_unused_columns(part) if isinstance(part, datasets.Dataset) else part

        first = next(iter(dataset.values())) if isinstance(dataset, Mapping) else dataset
        collate = self.data_collator
        if not isinstance(first, datasets.Dataset):
            collate = self._get_collator_with_removed_columns(collate)
        return ClientRows(
            dataset,
            partition_by,
            collate=collate,
            block_by=block_by,
            read=read,
            rowwise=self.data_collator is default_data_collator,
            device=self.args.device,
        )

    def _in_process(self, arrivals: Callable[[ClientUpdate], Iterable[ClientUpdate]] | None) -> InProcessEngine:
        remembers = "client_memory" in self.strategy.requires
        return InProcessEngine(
            self.local,
            data=self.clients.data,
            scoring=self.scoring_data,
            payload=self.strategy.payload,
            states=self._states,
            meter=self.meter,
            order=self.clients.names if remembers else (),
            own_rows=self.own_rows,
            rank=self.accelerator.process_index,
            size=self.accelerator.num_processes,
            parallelism=self.parallelism,
            arrivals=arrivals,
        )

    def _loss(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        # rows that were kept are there already, which is quicker found out than done again
        if not all(isinstance(value, torch.Tensor) and value.device == self.args.device for value in batch.values()):
            batch = self._prepare_inputs(batch)
        if not self.args.bf16:
            return self.compute_loss(model, batch)
        with torch.autocast(self.args.device.type, torch.bfloat16):
            return self.compute_loss(model, batch)

    @property
    def history(self) -> list[dict[str, Any]]:
        """A record of each round: who counted, who was refused and why, who was missing, norms, bytes."""
        return self.round_log.history

    def learning_rate(self, round: int) -> float:
        """Of the clients in a round, by the schedule; where the strategy has a rate of its own, that comes first."""
        return self.learning_rates[min(round, self.rounds - 1)]

    def own_rows(self, client: str) -> Tensors:
        """Of tables that the strategy sends whole though it requires submodels, the rows that a client sends."""
        return {} if self._rows_of is None else self._rows_of[client]

    def start_strategy(self) -> None:
        """Begin the strategy with the model as it is and all clients; what it knew before is forgotten."""
        involvement, self._rows_of = self._involvement(), None
        if involvement is not None and self.learns_heat:
            involvement, self._rows_of = None, involvement
        self.strategy.start(
            self.local.parameters,
            self.clients.names,
            involvement=involvement,
            num_examples=self.clients.num_examples,
        )
        self._started = True

    @property
    def learns_heat(self) -> bool:
        """Whether the strategy is to find out by itself how many have a row, and is not told who has which."""
        return getattr(self.strategy, "heat", "exact") != "exact"

    def submodel(self, client: str) -> Tensors | None:
        """Of each table, the rows that a client's examples read; `None` if clients take whole models."""
        if not self._takes_submodels:
            return None
        if self._given_involvement is not None:
            return self._given_involvement[client]
        read = self._read_rows(self.clients.data(client).batch(None))
        return {table: rows.cpu() for table, rows in read.items()}

    @functools.cached_property
    def _read_rows(self) -> Callable[[Mapping[str, Any]], Tensors]:
        return rows_reader(self.model)

    @property
    def _takes_submodels(self) -> bool:
        return "submodel" in self.strategy.requires if self.submodels == "auto" else bool(self.submodels)

    def _involvement(self) -> Mapping[str, Tensors] | None:
        if not self._takes_submodels or self._given_involvement is not None:
            return self._given_involvement if self._takes_submodels else None
        for client in self.clients.names[:DRAWS_TRIED]:
            first, again = self.submodel(client), self.submodel(client)
            if any(not torch.equal(rows, again[table]) for table, rows in first.items()):
                raise ValueError(
                    f"{type(self.data_collator).__name__} draws which rows of the embeddings a client reads, as "
                    "random masking of tokens does: give involvement= with all rows it may draw, or submodels=False."
                )
        return {client: self.submodel(client) for client in self.clients.names}

    def serve(self, block: int | None = None) -> None:
        """Put what is served into the model; with `block`, the predictor of that block."""
        if self._started:
            self.local.load(self.strategy.predictor(block))

    # --- a run

    def train(self, resume_from_checkpoint: bool | str | None = None, **unused: Any) -> TrainOutput:
        """Train to the last round; the model then holds what is served.

        Args:
            resume_from_checkpoint: `True`, or `output_dir`: go on behind its last whole round, or begin if it has
                none.

        Raises:
            ValueError: rounds of another run are there, or rounds are there and this is to be a new run.
        """
        next_round = self.begin(resume_from_checkpoint)
        for round in range(next_round, self.rounds):
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            updates = self.engine.train(round, self.select(round))
            self.close_round(round, updates, score=self.engine.score)
            if self.control.should_training_stop:
                break
        return self.finish()

    def begin(self, resume_from_checkpoint: bool | str | None = None) -> int:
        """Start the strategy, or take it up again; the round to go on with."""
        self._began, last, where = time.perf_counter(), self._commits.latest(), resume_from_checkpoint
        if last is not None and not where:
            raise ValueError(
                f"{self.args.output_dir} has rounds up to {last}: train(resume_from_checkpoint=True) goes on, another "
                "output_dir begins anew."
            )
        if isinstance(where, str | os.PathLike) and Path(where).resolve() != Path(self.args.output_dir).resolve():
            raise ValueError(f"{where} is not output_dir: a run goes on where its rounds are.")
        self.start_strategy()
        self.is_in_train = True
        self.state.compute_steps(self.args, self.rounds)
        self.state.max_steps, self.state.num_train_epochs = self.rounds, 1
        self.meter.load_state_dict({"bytes": []})
        if last is None:
            self.round_log.begin()
        else:
            self._commits.take_up(self.strategy, last)
            for record in self.history:
                for direction in ("up", "down"):
                    self.meter.add(record[f"bytes_{direction}"], direction=direction, round=record["round"])
        self._first_round = self.state.global_step = 0 if last is None else last + 1
        self.state.epoch = self._first_round / self.rounds
        self.state.log_history = list(self.round_log.logs)
        self.engine.begin(fresh=last is None)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        return self._first_round

    def select(self, round: int, present: Iterable[str] | None = None) -> list[str]:
        """The clients of a round, of those that are there and have examples of its block."""
        if present is None:
            there = self.clients.names if self.availability is None else self.availability.available(round)
        else:
            there = list(present)
        block = self._block(round)
        return self.strategy.select(round, [c for c in there if c not in self.clients or self.clients.count(c, block)])

    def _block(self, round: int) -> int | None:
        schedule = getattr(self.strategy, "schedule", None)
        return None if schedule is None or self.clients.num_blocks is None else schedule.block(round)

    def scoring_data(self, client: str, round: int) -> ClientData:
        """What a client scores candidates of a round on."""
        return self.clients.data(client, self._block(round))

    def close_round(
        self, round: int, updates: Iterable[ClientUpdate], *, score: Score | None = None
    ) -> AggregationLog:
        """Aggregate what came, log it, evaluate where it is time to, and commit."""
        log = self.strategy.aggregate(round, updates)
        agree_on(self.strategy)
        if score is not None and (candidates := self.strategy.candidates()):
            self.strategy.compare(round, score(round, log.accepted, candidates))
        self.round_log.add("round", self._record(log))
        self.state.global_step, self.state.epoch = round + 1, (round + 1) / self.rounds
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        if self.control.should_log:
            self.log(_scalars(self.history[-1]))
        if self.control.should_evaluate:
            self.serve()
            self._determine_best_metric(self.evaluate(), trial=None)
        last = round + 1 == self.rounds or self.control.should_training_stop
        if self._commits.commit(self.strategy, round, last=last):
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        return log

    def finish(self) -> TrainOutput:
        """Serve, tell callbacks, and sum up."""
        self.serve()
        done = self.history[self._first_round :]
        updates = sum(len(record["accepted"]) for record in done)
        metrics = speed(len(done), updates, time.perf_counter() - self._began)
        losses = [record["loss"] for record in done if record["loss"] is not None]
        metrics["train_loss"] = sum(losses) / len(losses) if losses else float("nan")
        self.log(dict(metrics))
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer.log`; kept with the rounds, too."""
        super().log(logs, start_time)
        if self.is_in_train:
            self.round_log.add("log", self.state.log_history[-1])

    def _record(self, log: AggregationLog) -> dict[str, Any]:
        """What is kept of a round, as JSON has it."""
        losses = [(said.get("loss", math.nan), log.num_examples[client]) for client, said in log.metrics.items()]
        losses = [(loss, weight) for loss, weight in losses if math.isfinite(loss)]
        own = getattr(self.strategy, "rate", None)
        sent = self.meter.of_latest(log.round)
        return log.to_dict() | {
            "loss": sum(loss * n for loss, n in losses) / sum(n for _, n in losses) if losses else None,
            "learning_rate": own(log.round) if own else self.learning_rate(log.round),
            "bytes_up": sent["up"],
            "bytes_down": sent["down"],
        }

    # --- what comes of it

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        *,
        per_client: bool = False,
        block: int | None = None,
    ) -> dict[str, Any]:
        """As `Trainer.evaluate`, of what is served.

        Args:
            per_client: evaluate each client on its own rows, which are found as those of the training data are. The
                answer then has, of each metric, means over examples and over clients, the extremes, and the mean loss
                of the worst tenth; under `"<prefix>_by_client"` each client's own. Logs get no names.
            block: for algorithms with blocks, evaluate the predictor of this one.
        """
        self.serve(block)
        try:
            if not per_client:
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            dataset = self.eval_dataset if eval_dataset is None else eval_dataset
            if dataset is None:
                raise ValueError("Evaluation needs an eval_dataset.")
            if not isinstance(self.partition_by, str | None):
                raise ValueError("per_client=True finds clients by a column; give {client: dataset} instead.")
            of_clients = None if isinstance(dataset, Mapping) else self.partition_by
            found = evaluate_clients(self, self._client_rows(dataset, of_clients), ignore_keys=ignore_keys)
            metrics = summary(found, metric_key_prefix)
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics | {f"{metric_key_prefix}_by_client": found}
        finally:
            if block is not None:
                self.serve()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save the served model with what belongs to it for `from_pretrained`, and in `block_<m>` the predictor of
        each block, where the algorithm has some."""
        save_served(self, folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Push the served model, its tokenizer and a card to `args.hub_model_id`. Unlike `Trainer.push_to_hub`,
        nothing else that lies in `output_dir` leaves: neither rounds and logs nor `training_args.bin`."""
        return push_model(
            self,
            commit_message=commit_message or "End of training",
            blocking=blocking,
            token=token,
            revision=revision,
            private=private,
            card=card,
        )


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Of a round's record, for callbacks."""
    names = ("learning_rate", "step_norm", "elementwise_gradient_norm", "bytes_up", "bytes_down")
    counts = {"clients": record["accepted"], "rejected": record["rejected"], "missing": record["missing"]}
    loss = {} if record["loss"] is None else {"loss": record["loss"]}
    return loss | {name: record[name] for name in names} | {name: len(found) for name, found in counts.items()}


__all__ = ["FederatedTrainer"]
