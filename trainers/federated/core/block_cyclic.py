r"""MM-PSGD and MC-PSGD: a predictor of its own for every block of data that come in cycles.

    all clients, I local steps:   x^i <- x^i - gamma g^i(x^i),    y_m^i <- y_m^i - eta g^i(y_m^i)     on block m
    then                          x <- mean x^i,                  y_m <- mean y_m^i
    candidate                     MM: u = x                       MC: u = the better of x and y_m by the clients' loss
    predictor of block m          running mean of its candidates

Ding et al., arXiv 2002.07454. Of the paper only the abstract and the introduction were readable to us, and a public
catalogue's restatement of the equations: the chain x runs through all blocks ("block-mixed"), y is trained on one
block only ("block-separate"). That each block's y goes on where it was a cycle ago, and when losses are compared, are
our reading; so are all averages but the plain one.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch

from .averaging import WEIGHTINGS
from .exchange import MIXED, NEVER, SEPARATE, AggregationLog, ClientUpdate, Payload, Tensors
from .protocol import FederatedAlgorithm, check_choice, require_finite


@dataclass(frozen=True)
class BlockSchedule:
    """Which block a round, or a time of day, belongs to. Made by [`by_rounds`], [`explicit`] or [`by_clock`].

    Args:
        blocks: the block of each round; after the last it begins again.
        starts: hours of the day at which blocks 0, 1, ... begin, for serving by the clock; in the time zone of the
            times that are asked about.
    """

    blocks: tuple[int, ...]
    starts: tuple[float, ...] = ()

    def __post_init__(self):
        if not self.blocks or sorted(set(self.blocks)) != list(range(max(self.blocks) + 1)):
            raise ValueError(f"blocks must be numbered 0, 1, ... without a gap, got {sorted(set(self.blocks))}.")
        if self.starts and (len(self.starts) != self.num_blocks or list(self.starts) != sorted(set(self.starts))):
            raise ValueError(f"starts={self.starts} must increase, one hour for each of {self.num_blocks} blocks.")
        if any(not 0 <= hour < 24 for hour in self.starts):
            raise ValueError(f"starts={self.starts} are hours of a day, from 0 on and below 24.")

    @classmethod
    def by_rounds(cls, lengths: Sequence[int]) -> "BlockSchedule":
        """Block m for `lengths[m]` rounds, one after the other, in a cycle."""
        return cls(tuple(block for block, length in enumerate(lengths) for _ in range(length)))

    @classmethod
    def explicit(cls, blocks: Sequence[int]) -> "BlockSchedule":
        """The block of every round, as it was or will be."""
        return cls(tuple(int(block) for block in blocks))

    @classmethod
    def by_clock(cls, starts: Sequence[float], *, rounds_per_day: int, first_hour: float = 0.0) -> "BlockSchedule":
        """Blocks that begin at hours of the day, the last one until the first begins again; round 0 is at
        `first_hour`."""
        schedule = cls(tuple(range(len(starts))), tuple(float(hour) for hour in starts))
        hours = [first_hour + 24 * round / rounds_per_day for round in range(rounds_per_day)]
        return cls(tuple(schedule.block_at(hour) for hour in hours), schedule.starts)

    @property
    def num_blocks(self) -> int:
        """M."""
        return max(self.blocks) + 1

    def block(self, round: int) -> int:
        """The block of a round."""
        return self.blocks[round % len(self.blocks)]

    def visit(self, round: int) -> int:
        """The first round of the stretch of its block that `round` lies in; of one block alone, of the cycle."""
        if self.num_blocks == 1:
            return round - round % len(self.blocks)
        while round > 0 and self.block(round - 1) == self.block(round):
            round -= 1
        return round

    def block_at(self, time: datetime | float) -> int:
        """The block of a time of day, a `datetime` or an hour. `ValueError` of a schedule without hours."""
        if not self.starts:
            raise ValueError("This schedule goes by rounds; only by_clock knows hours.")
        hour = time if isinstance(time, int | float) else time.hour + time.minute / 60 + time.second / 3600
        return (sum(start <= hour % 24 for start in self.starts) - 1) % len(self.starts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"blocks": list(self.blocks), "starts": list(self.starts)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BlockSchedule":
        """From `to_dict`."""
        return cls(tuple(values["blocks"]), tuple(values["starts"]))


@dataclass
class Comparison:
    """What clients thought of the candidates: mean `losses`, the `winner`, and of whom no loss counts, why."""

    round: int
    winner: str
    losses: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


class MMPSGD(FederatedAlgorithm):
    """Multi-model parallel SGD (arXiv 2002.07454): one chain through all blocks, averaged over cycles for each block.

    With one block it is FedAvg whose iterates are averaged.

    Args:
        schedule: the blocks; `config["block"]` says which one clients are to train on.
        weighting: `"examples"`, or `"clients"`: all alike.
        average: `"mean"`, of all candidates of the block; `"tail"`, of its last `tail_visits` visits; `"exponential"`,
            u weighs 1 - `decay`. The plain mean keeps bad early candidates for ever (the other two are ours).
        clients_per_round, max_update_norm, seed: see [`FederatedAlgorithm`]. In the paper everybody takes part.
    """

    def __init__(
        self,
        schedule: BlockSchedule,
        *,
        weighting: str = "examples",
        average: str = "mean",
        tail_visits: int = 1,
        decay: float = 0.9,
        **options: Any,
    ):
        super().__init__(**options)
        check_choice("weighting", weighting, WEIGHTINGS)
        check_choice("average", average, ("mean", "tail", "exponential"))
        if tail_visits < 1 or not 0 <= decay < 1:
            raise ValueError(f"tail_visits={tail_visits} must be at least 1, decay={decay} in [0, 1).")
        self.schedule, self.weighting, self.average = schedule, weighting, average
        self.tail_visits, self.decay = tail_visits, decay

    def _begin(self) -> None:
        self._averages = {name: self._empty_averages() for name in self._averaged()}

    def _averaged(self) -> tuple[str, ...]:
        """What has a running mean in each block."""
        return ("candidate",)

    def _empty_averages(self) -> list["_Average"]:
        options = {"kind": self.average, "visits": self.tail_visits, "decay": self.decay}
        return [_Average(**options) for _ in range(self.schedule.num_blocks)]

    def _config(self, round: int, client: str) -> dict[str, Any]:
        return {"block": self.schedule.block(round)}

    def predictor(self, block: int | None = None) -> Tensors:
        """The predictor of a block; of an unknown one, `None`, or one that was never visited, the mixed model."""
        self._require_start()
        if block is None or not 0 <= block < self.schedule.num_blocks:
            return self.parameters
        return self._averages["candidate"][block].value() or self.parameters

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> AggregationLog:
        """Close a round, see [`FederatedAlgorithm.aggregate`]."""
        chains, log = self._sifted(round, updates)
        parameters = self._stepped(self._parameters, chains[MIXED])
        if not chains[MIXED]:
            log.events.append("no update counts: the parameters stay, and are no candidate")
        self._note_step(parameters, log)
        self._close(round, parameters, log)
        if chains[MIXED]:
            self._average_in("candidate", round, parameters)
        return log

    def _stepped(self, base: Tensors, accepted: list[ClientUpdate]) -> Tensors:
        """The weighted mean of the clients' models."""
        if not accepted:
            return base
        weights = [self._weight(update, self.weighting) for update in accepted]
        stepped = {}
        for name, own in base.items():
            total = torch.zeros(own.shape, dtype=torch.float64, device=own.device)
            for update, weight in zip(accepted, weights):
                total.add_(update.tensors[name], alpha=weight)
            stepped[name] = (own.double() + total / sum(weights)).to(own.dtype)
        return stepped

    def _note_step(self, parameters: Tensors, log: AggregationLog) -> None:
        squares = [(parameters[name] - own).double().square().sum() for name, own in self._parameters.items()]
        log.elementwise_gradient_norm = float(sum(squares))

    def _average_in(self, name: str, round: int, model: Tensors) -> None:
        self._averages[name][self.schedule.block(round)].add(self.schedule.visit(round), model)

    def _save(self, tensors: dict[str, Tensors], record: dict[str, Any]) -> None:
        record["schedule"], record["averages"] = self.schedule.to_dict(), {}
        for name, blocks in self._averages.items():
            record["averages"][name] = []
            for block, average in enumerate(blocks):
                record["averages"][name].append([[visit, count] for visit, count, _ in average.parts])
                for index, (_, _, mean) in enumerate(average.parts):
                    tensors[f"{name}_{block}_{index}"] = dict(mean)

    def _load(self, tensors: Mapping[str, Tensors], record: Mapping[str, Any]) -> None:
        if record["schedule"] != self.schedule.to_dict():
            raise ValueError("This state does not fit: its schedule of blocks is another.")
        averages = {name: self._empty_averages() for name in self._averaged()}
        for name, blocks in averages.items():
            for block, average in enumerate(blocks):
                for index, (visit, count) in enumerate(record["averages"][name][block]):
                    average.parts.append((visit, count, self._placed(tensors[f"{name}_{block}_{index}"])))
        self._averages = averages


class MCPSGD(MMPSGD):
    """Multi-chain parallel SGD (arXiv 2002.07454): besides the mixed chain a separate one for each block, and of each
    pair of candidates the better one.

    Clients get both chains and send an update of each. After a round, [`candidates`] are scored by clients on data of
    the block, best on such as neither chain was trained on, and [`compare`] takes the losses; without an answer
    the mixed model is the candidate.

    Args:
        compare: `"round"`, the better one of each round's averages goes into the predictor; `"final"`, each chain has
            a running mean, and the predictor is the one whose loss was smaller when it was last compared (ours).
        separate: `"resume"`, y_m goes on where it was a cycle ago; `"restart_from_mixed"`, it begins each visit at x
            (ours).
        separate_learning_rate: eta, for clients; `None`: as the mixed chain.
        schedule, options: see [`MMPSGD`].
    """

    requires = frozenset({"two_chains", "client_loss"})
    chains = (MIXED, SEPARATE)

    def __init__(
        self,
        schedule: BlockSchedule,
        *,
        compare: str = "round",
        separate: str = "resume",
        separate_learning_rate: float | None = None,
        **options: Any,
    ):
        super().__init__(schedule, **options)
        check_choice("compare", compare, ("round", "final"))
        check_choice("separate", separate, ("resume", "restart_from_mixed"))
        self.compare_by, self.separate, self.separate_learning_rate = compare, separate, separate_learning_rate

    def _averaged(self) -> tuple[str, ...]:
        return ("candidate",) if self.compare_by == "round" else (MIXED, SEPARATE)

    def _begin(self) -> None:
        super()._begin()
        blocks = self.schedule.num_blocks
        self._separate = [self._parameters] * blocks
        self._separate_visit = [NEVER] * blocks
        self._better = [MIXED] * blocks  # by the last comparison
        self._picks = [{MIXED: 0, SEPARATE: 0} for _ in range(blocks)]
        self._open: int | None = None  # the round whose candidates wait for losses
        self._weights_of_round: dict[str, float] = {}

    def separate_chain(self, block: int) -> Tensors:
        """y of a block."""
        self._require_start()
        return dict(self._separate[block])

    @property
    def picks(self) -> list[dict[str, int]]:
        """How often each candidate won, by block."""
        return [dict(counts) for counts in self._picks]

    def predictor(self, block: int | None = None) -> Tensors:
        """See [`MMPSGD.predictor`]; a comparison that is still open does not count yet."""
        if self.compare_by == "round" or block is None or not 0 <= block < self.schedule.num_blocks:
            return super().predictor(block)
        self._require_start()
        return self._averages[self._better[block]][block].value() or self.parameters

    def _separate_for(self, round: int) -> Tensors:
        block = self.schedule.block(round)
        if self.separate == "restart_from_mixed" and self._separate_visit[block] != self.schedule.visit(round):
            return self._parameters
        return self._separate[block]

    def _config(self, round: int, client: str) -> dict[str, Any]:
        rate = self.separate_learning_rate
        return super()._config(round, client) | ({} if rate is None else {"separate_learning_rate": rate})

    def payload(self, round: int, client: str) -> Payload:
        """Both chains, see [`FederatedAlgorithm.payload`]."""
        payload = super().payload(round, client)
        return Payload(round, payload.tensors, payload.rows, payload.config, dict(self._separate_for(round)))

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> AggregationLog:
        """Close a round, see [`FederatedAlgorithm.aggregate`]; an open comparison of the round before is closed first,
        for the mixed model."""
        chains, log = self._sifted(round, updates)
        parameters = self._stepped(self._parameters, chains[MIXED])
        separate = self._stepped(self._separate_for(round), chains[SEPARATE])
        require_finite(parameters, f"Round {round}: the new parameters", log)
        require_finite(separate, f"Round {round}: the new separate chain", log)
        if self._open is not None:
            log.events.append(f"no losses came for round {self._open}: its candidate is the mixed model")
            self._settle(MIXED)
        block = self.schedule.block(round)
        self._note_step(parameters, log)
        self._close(round, parameters, log)
        self._separate = [separate if index == block else y for index, y in enumerate(self._separate)]
        self._separate_visit[block] = self.schedule.visit(round)
        if not log.accepted:
            log.events.append("no update counts: both chains stay, and are no candidates")
            return log
        if self.compare_by == "final":
            self._average_in(MIXED, round, parameters)
            self._average_in(SEPARATE, round, separate)
        counted = {
            update.client: self._weight(update, self.weighting) for found in chains.values() for update in found
        }
        self._open, self._weights_of_round = round, counted
        return log

    def candidates(self) -> dict[str, Tensors]:
        """The two models to score on data of the last round's block; none if that is done."""
        self._require_start()
        if self._open is None:
            return {}
        block = self.schedule.block(self._open)
        if self.compare_by == "final":
            return {name: self._averages[name][block].value() for name in (MIXED, SEPARATE)}
        return {MIXED: self.parameters, SEPARATE: dict(self._separate[block])}

    def compare(self, round: int, losses: Mapping[str, Mapping[str, float]]) -> Comparison:
        """Choose between the candidates by `{client: {"mixed": loss, "separate": loss}}`.

        The losses of clients whose update counted are averaged with the weights of their updates; a client without
        one, or with a loss that is not a number, is named and does not count. With nobody's losses, and where both
        are equal, the mixed model wins. `ValueError` of a round whose candidates are not open.
        """
        if self._open is None or round != self._open:
            raise ValueError(f"round={round}: the candidates that wait for losses are those of round {self._open}.")
        result, totals, weight = Comparison(round, MIXED), {MIXED: 0.0, SEPARATE: 0.0}, 0.0
        for client in sorted(losses):
            if client not in self._weights_of_round:
                result.rejected[client] = "no update of it counted in this round"
            elif not all(math.isfinite(losses[client].get(name, math.nan)) for name in totals):
                result.rejected[client] = f"a finite loss of each candidate is expected, not {dict(losses[client])}"
            else:
                weight += self._weights_of_round[client]
                for name in totals:
                    totals[name] += self._weights_of_round[client] * losses[client][name]
        if weight:
            result.losses = {name: total / weight for name, total in totals.items()}
            result.winner = SEPARATE if totals[SEPARATE] < totals[MIXED] else MIXED
        self._settle(result.winner)
        return result

    def _settle(self, winner: str) -> None:
        block = self.schedule.block(self._open)
        if self.compare_by == "round":
            self._average_in("candidate", self._open, self._parameters if winner == MIXED else self._separate[block])
        self._better[block] = winner
        self._picks[block][winner] += 1
        self._open, self._weights_of_round = None, {}

    def _save(self, tensors: dict[str, Tensors], record: dict[str, Any]) -> None:
        super()._save(tensors, record)
        for block, y in enumerate(self._separate):
            tensors[f"separate_{block}"] = dict(y)
        record["separate_visit"], record["better"] = list(self._separate_visit), list(self._better)
        record["picks"], record["open"], record["weights_of_round"] = self.picks, self._open, self._weights_of_round

    def _load(self, tensors: Mapping[str, Tensors], record: Mapping[str, Any]) -> None:
        super()._load(tensors, record)
        self._separate = [self._placed(tensors[f"separate_{m}"]) for m in range(self.schedule.num_blocks)]
        self._separate_visit, self._better = list(record["separate_visit"]), list(record["better"])
        self._picks = [dict(counts) for counts in record["picks"]]
        self._open, self._weights_of_round = record["open"], dict(record["weights_of_round"])


@dataclass
class _Average:
    """A running mean of models, as parts (visit, how many, their mean): one part, or one for each visit of a tail."""

    kind: str
    visits: int
    decay: float
    parts: deque[tuple[int, int, Tensors]] = field(default_factory=deque)

    def add(self, visit: int, model: Tensors) -> None:
        if not self.parts or (self.kind == "tail" and self.parts[-1][0] != visit):
            self.parts.append((visit, 1, model))
            if len(self.parts) > self.visits:
                self.parts.popleft()
            return
        _, count, mean = self.parts.pop()
        share = 1 - self.decay if self.kind == "exponential" else 1 / (count + 1)
        moved = {
            name: (m.double() + share * (model[name].double() - m.double())).to(m.dtype) for name, m in mean.items()
        }
        self.parts.append((visit, count + 1, moved))

    def value(self) -> Tensors:
        """Empty before the first model."""
        if len(self.parts) < 2:
            return dict(self.parts[0][2]) if self.parts else {}
        total = sum(count for _, count, _ in self.parts)
        return {
            name: (sum(count * mean[name].double() for _, count, mean in self.parts) / total).to(own.dtype)
            for name, own in self.parts[0][2].items()
        }
