"""What a federated algorithm is to whoever runs it: a state machine without transport, clock or training loop.

    algorithm.start(parameters, clients)
    for round in range(...):
        for client in algorithm.select(round, available):
            payload = algorithm.payload(round, client)             # goes down
            ...                                                    # the client trains and sends a ClientUpdate
        log = algorithm.aggregate(round, updates)                  # whatever came, in any order
        if candidates := algorithm.candidates():                   # only where `requires` has "client_loss"
            algorithm.compare(round, {client: {name: loss, ...}})

All state is in the algorithm, `state_dict` has all of it, and equal seeds give equal models: sums run over clients in
the order of their names, so that neither the order of arrival nor the number of processes matters.
"""

import hashlib
import inspect
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from reprlib import repr as shortened
from typing import Any

import torch

from .exchange import (
    MIXED,
    NEVER,
    AggregationLog,
    CheckedUpdate,
    ClientUpdate,
    Involvement,
    Payload,
    Tensors,
    joint_norm,
)
from .uploads import Upload, UploadError, check_form, checked_norms, norm_of_tensor, strided_problem


FORMAT = 1


class FederatedAlgorithm(ABC):
    """The surface of all algorithms, see the module.

    Args:
        clients_per_round: K; fewer if fewer are available. `None`: all that are available.
        max_update_norm: refuse an upload whose Euclidean norm is larger, as it came or once it is amplified, see
            [`FedSubAvg`][trainers.federated.core.FedSubAvg].
        seed: of the selection.
    """

    requires: frozenset[str] = frozenset()  # of "submodel", "client_memory", "two_chains", "client_loss"
    chains: tuple[str, ...] = (MIXED,)
    takes_rows = False

    def __new__(cls, *args: Any, **options: Any):
        self = super().__new__(cls)
        # bind_partial: copies are made without arguments, and get their attributes afterwards
        given = inspect.signature(cls.__init__).bind_partial(self, *args, **options).arguments
        self._given = {name: value for name, value in given.items() if name not in ("self", "options")}
        self._given |= given.get("options", {})
        return self

    def __init__(self, *, clients_per_round: int | None = None, max_update_norm: float | None = None, seed: int = 0):
        if clients_per_round is not None and clients_per_round < 1:
            raise ValueError(f"clients_per_round={clients_per_round} must be at least 1; None takes all available.")
        if max_update_norm is not None and not max_update_norm > 0:
            raise ValueError(f"max_update_norm={max_update_norm} must be positive; None sets no limit.")
        self.clients_per_round, self.max_update_norm, self.seed = clients_per_round, max_update_norm, seed
        self._parameters: Tensors | None = None

    def options(self) -> dict[str, Any]:
        """The arguments that it was made with, those by default too, as JSON has them: of tensors a hash, of functions
        nothing but that they are some."""
        known: dict[str, Any] = {}
        for kind in reversed(type(self).__mro__):
            parameters = inspect.signature(kind.__init__).parameters.values() if "__init__" in vars(kind) else ()
            known |= {p.name: p.default for p in parameters if p.default is not p.empty}
        return {name: _as_json(value) for name, value in sorted((known | self._given).items())}

    # --- the state

    def start(
        self,
        parameters: Mapping[str, torch.Tensor],
        clients: Sequence[str],
        *,
        involvement: Involvement | None = None,
        num_examples: Mapping[str, int] | None = None,
    ) -> None:
        """Begin with these parameters and this population; what was before is forgotten.

        Args:
            parameters: floating-point tensors, copied; fp16 and bf16 become fp32.
            clients: stable names of all N clients, whoever is available. An engine's node ids are none.
            involvement: `{client: {table: rows}}`, S(i) of each client for the tables of which it takes and sends
                rows only. A row in nobody's S(i), such as that of padding, never moves.
            num_examples: of each client; where it is given, what updates say of it has no weight.

        Raises:
            ValueError: a parameter that is not floating-point, a client twice, rows that are out of a table or not
                of a known client, or involvement where the algorithm works on whole models.
        """
        order = list(clients)
        if not order or len(set(order)) < len(order):
            raise ValueError("clients must be names, at least one, each once.")
        for name, tensor in parameters.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{name!r} is {tensor.dtype}: only floating-point parameters can be averaged.")
        if num_examples is not None:
            for client in order:
                if not num_examples.get(client, 0) > 0:
                    raise ValueError(f"num_examples has no positive number for {client!r}.")
        self._clients = {client: index for index, client in enumerate(order)}
        self._parameters = {
            name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            for name, tensor in parameters.items()
        }
        self._num_examples = None if num_examples is None else {c: int(num_examples[c]) for c in order}
        self._involvement = None if involvement is None else self._checked_involvement(involvement)
        self._selected: list[str] | None = None
        self._selected_round, self._last_round = NEVER, NEVER
        self._begin()

    def _begin(self) -> None:  # noqa: B027 - none beyond the parameters is fine
        """State beyond the parameters, at the start."""

    def _checked_involvement(self, involvement: Involvement) -> dict[str, Tensors]:
        if not self.takes_rows:
            raise ValueError(f"{type(self).__name__} works on whole models; give involvement to FedSubAvg or FedAvg.")
        if set(involvement) != set(self._clients):
            odd = sorted(set(involvement) ^ set(self._clients), key=str)[:3]
            raise ValueError(f"involvement and clients differ, at {odd}.")
        tables = sorted({table for rows in involvement.values() for table in rows})
        checked = {}
        for client, rows in involvement.items():
            checked[client] = {}
            for table in tables:
                if table not in self._parameters:
                    raise ValueError(f"involvement names the table {table!r}, which is no parameter.")
                own = torch.as_tensor(rows.get(table, ()), dtype=torch.int64).reshape(-1).unique()
                if problem := _row_problem(own, self._parameters[table]):
                    raise ValueError(f"involvement of {client!r} in {table!r}: {problem}.")
                checked[client][table] = own
        return checked

    @property
    def parameters(self) -> Tensors:
        """What is served, by name; not to be written to."""
        self._require_start()
        return dict(self._parameters)

    def predictor(self, block: int | None = None) -> Tensors:
        """What is served in a block: `parameters`, unless the algorithm has a model of its own for it."""
        return self.parameters

    def state_dict(self) -> dict[str, Any]:
        """`{"tensors": {name: {key: tensor}}, "record": JSON values}`, as `RoundStore.commit` takes them. With it a
        run goes on bit for bit as if it had not been interrupted. Tensors are those of the state, not copies; no
        later round writes to them."""
        self._require_start()
        record = {
            "format": FORMAT,
            "algorithm": type(self).__name__,
            "population": self._population(),
            "last_round": self._last_round,
            "selected_round": self._selected_round,
            "selected": self._selected,
        }
        tensors = {"parameters": dict(self._parameters)}
        self._save(tensors, record)
        return {"tensors": tensors, "record": record}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Call [`start`] first with what it was given the first time.

        Raises:
            ValueError: the state of another algorithm, population or model; nothing is changed.
        """
        self._require_start()
        tensors, record = state["tensors"], state["record"]
        mine = {"format": FORMAT, "algorithm": type(self).__name__, "population": self._population()}
        for key, value in mine.items():
            if record.get(key) != value:
                raise ValueError(f"This state does not fit: its {key} is {record.get(key)!r}, not {value!r}.")
        self._check_like_parameters(tensors["parameters"])
        self._load(tensors, record)
        self._parameters = self._placed(tensors["parameters"])
        self._last_round, self._selected_round = record["last_round"], record["selected_round"]
        self._selected = record["selected"]

    def _save(self, tensors: dict[str, Tensors], record: dict[str, Any]) -> None:  # noqa: B027
        """Add to the state what a subclass has."""

    def _load(self, tensors: Mapping[str, Tensors], record: Mapping[str, Any]) -> None:  # noqa: B027
        """The counterpart of `_save`."""

    def _placed(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Of the parameters' devices, in their order."""
        return {name: tensors[name].to(own.device) for name, own in self._parameters.items()}

    def _check_like_parameters(self, tensors: Mapping[str, torch.Tensor]) -> None:
        kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        mine = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._parameters.items()}
        if kinds != mine:
            odd = sorted(name for name in kinds.keys() | mine if kinds.get(name) != mine.get(name))[:3]
            raise ValueError(f"This state is of another model: {odd} differ in presence, shape or dtype.")

    def _population(self) -> str:
        known = [list(self._clients), self._num_examples]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def _require_start(self) -> None:
        if self._parameters is None:
            raise RuntimeError(f"{type(self).__name__} has no parameters yet: call start first.")

    # --- a round

    def select(self, round: int, available: Iterable[str]) -> list[str]:
        """The clients of a round, out of those that are available now; the same whenever it is asked again.

        Raises:
            ValueError: an unknown client, or a round that is over.
        """
        self._check_round(round)
        present = set(available)
        if unknown := sorted(present - self._clients.keys(), key=str):
            raise ValueError(f"{unknown[:3]} are not among the {len(self._clients)} clients that start was given.")
        chosen = self._choose(round, sorted(present, key=self._clients.__getitem__))
        self._selected, self._selected_round = chosen, round
        return list(chosen)

    def _choose(self, round: int, present: list[str]) -> list[str]:
        """Uniform, without replacement."""
        if self.clients_per_round is None or len(present) <= self.clients_per_round:
            return present
        drawn = random.Random(f"{self.seed}/{round}").sample(present, self.clients_per_round)
        return sorted(drawn, key=self._clients.__getitem__)

    def payload(self, round: int, client: str) -> Payload:
        """What `client` gets in `round`. Its tensors are not to be written to. `ValueError` for a client or a round
        that cannot be."""
        self._check_round(round)
        if client not in self._clients:
            raise ValueError(f"{client!r} is not among the {len(self._clients)} clients that start was given.")
        tensors, rows = dict(self._parameters), {}
        if self._involvement is not None:
            rows = dict(self._involvement[client])
            tensors |= {table: tensors[table][own.to(tensors[table].device)] for table, own in rows.items()}
        return Payload(round, tensors, rows, self._config(round, client))

    def _config(self, round: int, client: str) -> dict[str, str | int | float | bool]:
        return {}

    @abstractmethod
    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> AggregationLog:
        """Close a round with what has come. A bad update is refused by name and changes nothing; of several of one
        client the first good one counts.

        Raises:
            ValueError: a round that is over.
            FloatingPointError: finite updates whose sum is not, with the client whose update was the largest; the
                state is as before.
        """

    def candidates(self) -> dict[str, Tensors]:
        """Models that clients are asked to score before the next round; none, mostly."""
        return {}

    def compare(self, round: int, losses: Mapping[str, Mapping[str, float]]) -> Any:
        """Take the clients' losses of the [`candidates`]. `ValueError` where there are none."""
        raise ValueError(f"{type(self).__name__} compares no candidates.")

    def _check_round(self, round: int) -> None:
        self._require_start()
        if isinstance(round, bool) or not isinstance(round, int) or round <= self._last_round:
            raise ValueError(f"round={round!r}: the last round that was aggregated is {self._last_round}.")

    def _asked(self, round: int) -> list[str] | None:
        """Who was selected; `None` if nobody was asked through [`select`], and everybody may answer."""
        return self._selected if self._selected_round == round else None

    def _sifted(
        self, round: int, updates: Iterable[ClientUpdate]
    ) -> tuple[dict[str, list[ClientUpdate]], AggregationLog]:
        """The updates that count, of each chain by client, and a log that names the others."""
        self._check_round(round)
        log, asked = AggregationLog(round), self._asked(round)
        good: dict[str, dict[str, CheckedUpdate]] = {chain: {} for chain in self.chains}
        heard = set()
        for update in updates:
            heard.add(update.client)
            try:
                check_form(update)
                norms = self._check(update, round, asked, good.get(update.chain))
            except UploadError as error:
                log._reject(update.client, error.reason if error.key is None else f"{error.key}: {error.reason}")
                continue
            good[update.chain][update.client] = self._in_place(update, norms)
        chains = {chain: [found[client] for client in sorted(found)] for chain, found in good.items()}
        log.accepted = sorted({update.client for found in chains.values() for update in found})
        log.missing = [] if asked is None else sorted(set(asked) - heard)
        for chain, found in chains.items():
            for update in found:
                log.norms[update.client if chain == MIXED else f"{update.client}/{chain}"] = update.norm
        for update in chains[MIXED]:
            log.metrics[update.client] = dict(update.metrics)
            log.num_examples[update.client] = self._examples(update)
        return chains, log

    def _check(
        self,
        update: ClientUpdate,
        round: int,
        asked: list[str] | None,
        seen: Mapping[str, ClientUpdate] | None,
    ) -> dict[str, float]:
        """The norm of each tensor of an update that may be used; `UploadError` of another."""
        client = update.client
        if client not in self._clients:
            raise UploadError(client, "nobody of that name was registered at the start")
        if update.round == round and asked is not None and client not in asked:
            raise UploadError(client, f"it was not asked in round {round}")
        if seen is None:
            raise UploadError(client, f"there is no chain {shortened(update.chain)}")
        expected = self._parameters
        if update.rows:
            expected = dict(expected)
            for table, rows in update.rows.items():
                self._check_rows(client, table, rows)
                shape = (len(rows), *self._parameters[table].shape[1:])
                expected[table] = torch.empty(shape, dtype=self._parameters[table].dtype, device="meta")
        upload = Upload(round=update.round, sender=client, tensors=update.tensors, num_samples=update.num_examples)
        return checked_norms(upload, expected=expected, round=round, max_norm=self.max_update_norm, seen=seen)

    def _check_rows(self, client: str, table: str, rows: torch.Tensor) -> None:
        if not self.takes_rows:
            raise UploadError(client, "whole tensors are expected, not rows", key=table)
        if table not in self._parameters:
            raise UploadError(client, "nobody asked for it", key=table)
        if problem := _row_problem(rows, self._parameters[table]):
            raise UploadError(client, problem, key=table)
        if self._involvement is not None:
            own = self._involvement[client].get(table)
            if own is None or torch.equal(rows.cpu(), own):
                return
            if strange := int((~torch.isin(rows.cpu(), own)).sum()):
                raise UploadError(client, f"{strange} of its rows are not in its submodel", key=table)

    def _in_place(self, update: ClientUpdate, norms: dict[str, float]) -> CheckedUpdate:
        """On the parameters' device; of a table that was sent whole, only the client's own rows: whatever weight
        decay did to the others does not count."""
        device = next(iter(self._parameters.values())).device
        tensors = {name: update.tensors[name].detach().to(device) for name in self._parameters}
        rows = {table: own.to(device) for table, own in update.rows.items()}
        if self._involvement is not None:
            for table, own in self._involvement[update.client].items():
                if table not in rows:
                    rows[table] = own.to(device)
                    tensors[table] = tensors[table][rows[table]]
                    norms[table] = norm_of_tensor(tensors[table])
        return CheckedUpdate(
            client=update.client,
            round=update.round,
            tensors=tensors,
            rows=rows,
            num_examples=update.num_examples,
            metrics=update.metrics,
            chain=update.chain,
            tensor_norms=norms,
        )

    def _examples(self, update: ClientUpdate) -> int:
        """Of the client, as `start` was told; else what the update says."""
        return update.num_examples if self._num_examples is None else self._num_examples[update.client]

    def _weight(self, update: ClientUpdate, weighting: str) -> float:
        """Of an update in an average: 1, or the examples of its client."""
        return 1.0 if weighting == "clients" else float(self._examples(update))

    def _close(self, round: int, parameters: Tensors, log: AggregationLog) -> None:
        """The last act of `aggregate`: the served parameters change, or nothing does."""
        require_finite(parameters, f"Round {round}: the new parameters", log)
        log.step_norm = norm_of({name: parameters[name] - own for name, own in self._parameters.items()})
        self._parameters, self._last_round = parameters, round


def _as_json(value: Any) -> Any:
    if is_dataclass(value):
        return {part.name: _as_json(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    return value if value is None or isinstance(value, str | int | float) else type(value).__name__


def norm_of(tensors: Mapping[str, torch.Tensor]) -> float:
    """The Euclidean norm over all tensors together."""
    return joint_norm([norm_of_tensor(tensor) for tensor in tensors.values()])


def require_finite(tensors: Mapping[str, torch.Tensor], what: str, log: AggregationLog) -> None:
    """`FloatingPointError` that names the first tensor which is not, and whose update of the round is the largest."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            largest = max(log.norms, key=log.norms.__getitem__, default=None)
            whose = "" if largest is None else f" (largest update: {largest!r}, norm {log.norms[largest]:.4g})"
            raise FloatingPointError(
                f"{what} are not finite in {name!r}{whose}: set max_update_norm or a smaller rate."
            )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """`ValueError` unless the option `name` has one of its values."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known. Choose one of {', '.join(map(repr, choices))}.")


def _row_problem(rows: object, table: torch.Tensor) -> str:
    """What keeps `rows` from being rows of `table`, increasing and each once."""
    if not isinstance(rows, torch.Tensor) or rows.dtype != torch.int64 or strided_problem(rows) or rows.dim() != 1:
        return "its rows are no vector of int64"
    if not table.dim():
        return "a scalar has no rows"
    if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(table)):
        return f"its rows reach from {int(rows.min())} to {int(rows.max())}, the table has {len(table)}"
    if bool((rows[1:] <= rows[:-1]).any()):
        return "its rows are not increasing"
    return ""
