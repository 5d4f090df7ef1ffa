r"""Heat: n_m, the number of clients whose data involve row m of a table (FedSubAvg, arXiv 2109.07704, section 1 of our
digest).

Exact, where involvement may be known; estimated from randomised answers, where it may not; or counted as clients come.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...reliability.checkpoints import sync_folder
from .exchange import Involvement
from .randomness import random_source
from .rounds import write_synced
from .wire import pack, unpack


_RECORD = "record"


def exact_heat(
    involvement: Involvement, sizes: Mapping[str, int], *, weights: Mapping[str, float] | None = None
) -> dict[str, torch.Tensor]:
    """n_m of every row of every table, float64; with `weights`, the sum of the weights of the clients that have it.

    Args:
        involvement: `{client: {table: rows}}`.
        sizes: number of rows of each table.
    """
    tables = {table for rows in involvement.values() for table in rows}
    heat = {table: torch.zeros(sizes[table], dtype=torch.float64) for table in sorted(tables)}
    for client in sorted(involvement):
        weight = 1.0 if weights is None else float(weights[client])
        for table, rows in involvement[client].items():
            heat[table][rows.cpu()] += weight
    return heat


class RandomisedResponse:
    """One client's answer to "which rows do you have?", each bit flipped at random, once and for all.

    A bit is 1 with probability `p_in` if the client has the row and `p_out` if not. Each table is answered **once**:
    asked again, the client says the same, whatever its data have become, since answers that are drawn anew average the
    noise away. That holds as long as the client keeps its answers: give it a `file`, or keep [`state_dict`] yourself.
    Nothing asks clients by itself: whoever collects heat sends the answers, adds them up, and gives FedSubAvg what
    [`estimate_heat`] makes of them. These are the permanent answers of the double randomised response of the
    authors' earlier system (secure federated submodel learning, MobiCom 2020); its second stage, which protects
    repeated requests for rows, is not here.

    Each row costs [`epsilon_per_row`]; a client pays it for every row in which two possible users differ, and nothing
    is claimed beyond that.

    Args:
        p_in, p_out: 15/16 and 1/16, 7/8 and 1/8, 3/4 and 1/4 are presets of that system; 1 and 0 hide nothing.
        file: safetensors, on the client: answers that it has stand, and a new one is on the disk before it is given,
            so that a client that begins anew says the same.
        simulation, seed: answers from a seed and the client's name; both or neither. Without, from the operating
            system.

    Raises:
        ValueError: the file has answers of another client, of other probabilities or of a simulation; see
            [`load_state_dict`].
        WireError: it is damaged. To answer anew costs epsilon again: count it, and remove the file.
    """

    def __init__(
        self,
        client: str,
        *,
        p_in: float = 7 / 8,
        p_out: float = 1 / 8,
        file: str | os.PathLike | None = None,
        simulation: bool = False,
        seed: int | None = None,
    ):
        _check_probabilities(p_in, p_out)
        self.client, self.p_in, self.p_out = client, p_in, p_out
        self._source = random_source(simulation=simulation, seed=seed)
        self._answers: dict[str, torch.Tensor] = {}
        self._file = None if file is None else Path(file)
        if self._file is not None and self._file.exists():
            tensors, metadata = unpack(self._file.read_bytes())
            self._answers = self._fitting({"tensors": tensors, "record": json.loads(metadata.get(_RECORD, "{}"))})

    def answer(self, table: str, rows: torch.Tensor, size: int) -> torch.Tensor:
        """`(size,)` of bool: the answer for a table of `size` rows, of which the client has `rows`.

        Raises:
            ValueError: the table had another size when it was answered. New rows would need an answer of their own;
                collect heat anew, and count what it costs.
        """
        if table not in self._answers:
            chance = torch.full((size,), self.p_out, dtype=torch.float64)
            chance[rows] = self.p_in
            drawn = self._source.uniform((size,), self.client, table) < chance
            self._keep(self._answers | {table: drawn})
        if len(self._answers[table]) != size:
            raise ValueError(f"{table!r} was answered with {len(self._answers[table])} rows, not {size}.")
        return self._answers[table].clone()

    def state_dict(self) -> dict[str, Any]:
        """`{"tensors": the answers given, by table, "record": what they are answers of, as JSON has it}`."""
        return {"tensors": {table: answer.clone() for table, answer in self._answers.items()}, "record": self._record}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand by the answers of `state_dict`.

        Raises:
            ValueError: they are of another client, were made with other probabilities, so that [`estimate_heat`] and
                [`epsilon_per_row`] would say something else of them, or in a simulation though this is none, or the
                other way round; nothing is changed.
        """
        self._keep(self._fitting(state))

    def _fitting(self, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        record = state["record"]
        for name, mine in self._record.items():
            if record.get(name) != mine:
                raise ValueError(f"These answers do not fit: their {name} is {record.get(name)!r}, not {mine!r}.")
        return {table: answer.bool().clone() for table, answer in state["tensors"].items()}

    @property
    def _record(self) -> dict[str, Any]:
        return {
            "client": self.client,
            "p_in": float(self.p_in),
            "p_out": float(self.p_out),
            "simulation": self._source.simulation,
        }

    def _keep(self, answers: dict[str, torch.Tensor]) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            scratch = self._file.with_name(f"{self._file.name}.unfinished")
            write_synced(scratch, pack(answers, {_RECORD: json.dumps(self._record)}))
            os.replace(scratch, self._file)
            sync_folder(self._file.parent)
        self._answers = answers


def epsilon_per_row(p_in: float, p_out: float) -> float:
    """max(ln(p_in / p_out), ln((1 - p_out) / (1 - p_in))): the local privacy loss of one bit of the answer."""
    _check_probabilities(p_in, p_out)
    if p_out == 0 or p_in == 1:
        return math.inf
    return max(math.log(p_in / p_out), math.log((1 - p_out) / (1 - p_in)))


def estimate_heat(
    ones: torch.Tensor, answers: int, *, p_in: float, p_out: float, floor: float, population: int | None = None
) -> torch.Tensor:
    r"""n_m from the sum of randomised answers (the standard estimator; ours, not the paper's):

        n_hat = (ones - answers p_out) / (p_in - p_out) * N / answers,   kept within [floor, N]

    Without `floor` and N the estimate is unbiased. Of a cold row it says next to nothing ([`heat_variance`]), and
    FedSubAvg divides by it: choose `floor`, of the order of the standard deviation, or a `max_correction`.

    Args:
        ones: how many of the clients answered 1, of each row.
        answers: how many answered. They stand for all.
        population: N; `None` if all answered.
    """
    _check_probabilities(p_in, p_out)
    total = answers if population is None else population
    if answers < 1 or total < answers or not 0 <= floor <= total:
        raise ValueError(f"answers={answers}, population={total} and floor={floor} do not fit together.")
    raw = (ones.double() - answers * p_out) / (p_in - p_out) * (total / answers)
    return raw.clamp(floor, total)


def heat_variance(heat: torch.Tensor | float, answers: int, *, p_in: float, p_out: float) -> torch.Tensor:
    """Of the estimate before floor and cap, if all N have answered:
    [n p_in (1 - p_in) + (N - n) p_out (1 - p_out)] / (p_in - p_out)^2."""
    _check_probabilities(p_in, p_out)
    n = torch.as_tensor(heat, dtype=torch.float64)
    return (n * p_in * (1 - p_in) + (answers - n) * p_out * (1 - p_out)) / (p_in - p_out) ** 2


class StreamingHeat:
    """Heat counted over the distinct clients that have come so far: n_m is estimated by N (seen with m) / (seen).

    Ours. It assumes that those who came are like those who did not. The counts are exact, nothing hides who has a row:
    neither they nor what is computed of them is covered by the noise of [`Robust`][trainers.federated.core.Robust].
    """

    def __init__(self, sizes: Mapping[str, int]):
        self._counts = {table: torch.zeros(size, dtype=torch.float64) for table, size in sizes.items()}
        self._seen: dict[str, None] = {}

    def with_clients(self, rows: Mapping[str, Mapping[str, torch.Tensor]]) -> "StreamingHeat":
        """A count that has seen these too, `{client: {table: rows}}`; of one seen before, the first time counts."""
        other = StreamingHeat({})
        other._counts = {table: count.clone() for table, count in self._counts.items()}
        other._seen = dict(self._seen)
        for client in sorted(rows.keys() - self._seen.keys()):
            other._seen[client] = None
            for table, own in rows[client].items():
                if table in other._counts:
                    other._counts[table][own.cpu()] += 1
        return other

    def estimate(self, population: int) -> dict[str, torch.Tensor]:
        """n_m of every row, float64; 0 where nobody had it."""
        return {table: count * (population / max(len(self._seen), 1)) for table, count in self._counts.items()}

    def state_dict(self) -> tuple[dict[str, torch.Tensor], list[str]]:
        """The counts, and who was seen."""
        return dict(self._counts), list(self._seen)

    def load_state_dict(self, counts: Mapping[str, torch.Tensor], seen: list[Any]) -> None:
        """Go on from `state_dict`."""
        self._counts, self._seen = {table: count.cpu() for table, count in counts.items()}, dict.fromkeys(seen)


def _check_probabilities(p_in: float, p_out: float) -> None:
    if not 0 <= p_out < p_in <= 1:
        raise ValueError(f"p_in={p_in} and p_out={p_out}: 0 <= p_out < p_in <= 1, or answers say nothing.")
