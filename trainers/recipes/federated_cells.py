"""Cells of a federated comparison: experiments, arms, rates and seeds, each one run, kept once it is finished.

An experiment is a setting with its arms. Where it searches rates, every arm runs at every rate of the grid on the
first seed, and at the one of its best validation on the others; where it takes the rates of another experiment, its
arms run at these. Each kept cell has beside it what it was run with: a repeated command goes on, and one with other
settings or data is refused.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from ..federated import FederatedTrainer
from ..report import write_text_atomically


logger = logging.get_logger(__name__)

MEASURED = "measured_round"
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A setting and what is run in it.

    Args:
        name: of the experiment.
        setting: a dataclass of JSON values: all that decides what a run computes, besides arm, rate and seed.
        arms: the first is the method.
        rates_of: the experiment whose rates are taken; `None`: they are searched.
    """

    name: str
    setting: Any
    arms: Sequence[str]
    rates_of: str | None = None


@dataclass(frozen=True)
class Cell:
    """One run."""

    experiment: Experiment
    run: str
    seed: int
    learning_rate: float

    def folder(self, root: Path) -> Path:
        """Where it is kept."""
        return root / "cells" / self.experiment.name / f"{self.run}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclass
class Compared:
    """What an experiment came to: of each arm the rate, and one outcome a seed."""

    rates: dict[str, float] = field(default_factory=dict)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    validation: dict[str, dict[str, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """How cells are run and judged.

    Args:
        root: the run folder.
        seeds, grid: the first seed searches the rates.
        run: trains a cell in a folder; its outcome is JSON, finite but for what `score` reads.
        score: `(arm, outcome) -> validation`, higher is better; a NaN never wins.
        data: fingerprint of what is trained on.
        run_of: of an arm that is read off another's run, which one.
    """

    root: Path
    seeds: Sequence[int]
    grid: Sequence[float]
    run: Callable[[Cell, Path], Outcome]
    score: Callable[[str, Outcome], float]
    data: str
    run_of: Mapping[str, str] = field(default_factory=dict)

    def compare(self, experiments: Sequence[Experiment]) -> dict[str, Compared]:
        """Every experiment, in order; those whose rates others take come first."""
        found: dict[str, Compared] = {}
        for experiment in experiments:
            rates = None if experiment.rates_of is None else found[experiment.rates_of].rates
            found[experiment.name] = self._compare(experiment, rates)
        return found

    def _compare(self, experiment: Experiment, rates: Mapping[str, float] | None) -> Compared:
        compared = Compared()
        for arm in tqdm(experiment.arms, desc=experiment.name):
            if rates is None:
                scores = {
                    rate: self._score(arm, self.cell(experiment, arm, self.seeds[0], rate)) for rate in self.grid
                }
                compared.validation[arm] = {
                    f"{rate:g}": score if math.isfinite(score) else None for rate, score in scores.items()
                }
                if not any(map(math.isfinite, scores.values())):
                    raise ValueError(f"{experiment.name}: {arm} diverged at every rate. Lower --learning_rates.")
                compared.rates[arm] = max(scores, key=scores.get)
            else:
                compared.rates[arm] = rates[arm]
            compared.outcomes[arm] = [self.cell(experiment, arm, s, compared.rates[arm]) for s in self.seeds]
        return compared

    def _score(self, arm: str, outcome: Outcome) -> float:
        score = self.score(arm, outcome)
        return score if math.isfinite(score) else -math.inf

    def cell(self, experiment: Experiment, arm: str, seed: int, rate: float) -> Outcome:
        """A finished run's outcome; what is not there yet is run.

        Raises:
            ValueError: the cell that is there was run with other settings or data.
        """
        cell = Cell(experiment, self.run_of.get(arm, arm), seed, rate)
        folder = cell.folder(self.root)
        file, identity = folder / "outcome.json", self.identity(cell)
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            outcome = self.run(cell, folder)
            write_text_atomically(file, json.dumps({"identity": identity, "outcome": outcome}))
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["identity"] != identity:
            odd = sorted(k for k in kept["identity"].keys() | identity if kept["identity"].get(k) != identity.get(k))
            raise ValueError(
                f"{file.parent.name} of {experiment.name} was run with other {', '.join(odd)}: "
                f"{ {k: kept['identity'].get(k) for k in odd} } there, { {k: identity.get(k) for k in odd} } now. "
                "Choose another --output_dir, or repeat the command that wrote it."
            )
        return kept["outcome"]

    def identity(self, cell: Cell) -> dict[str, Any]:
        """All that decides what a cell computes, as JSON has it."""
        own = {"run": cell.run, "seed": cell.seed, "learning_rate": cell.learning_rate, "data": self.data}
        return json.loads(json.dumps(asdict(cell.experiment.setting) | own))

    def record(self, experiments: Sequence[Experiment], found: Mapping[str, Compared]) -> dict[str, Any]:
        """For results.json: settings, grid, what it chose, and where that lies at its edge."""
        searched = {e.name: found[e.name] for e in experiments if e.rates_of is None and e.name in found}
        ends = (min(self.grid), max(self.grid))
        edge = [f"{n} {arm}" for n, c in searched.items() for arm, rate in c.rates.items() if rate in ends]
        first = asdict(experiments[0].setting)
        settings = {experiments[0].name: first}
        for e in experiments[1:]:
            changes = {name: value for name, value in asdict(e.setting).items() if value != first[name]}
            settings[e.name] = changes | ({} if e.rates_of is None else {"learning_rates_of": e.rates_of})
        return {
            "experiments": settings,  # the first one whole, of the others what is different
            "learning_rate_grid": list(self.grid),
            "learning_rate_chosen": {name: compared.rates for name, compared in searched.items()},
            "learning_rate_at_the_edge_of_the_grid": edge if len(self.grid) > 1 else [],
            "validation_by_learning_rate": {name: compared.validation for name, compared in searched.items()},
        }


class RoundMeasures(TrainerCallback):
    """Measures what is served every few rounds and at the end, into the trainer's log, with which a run goes on.

    Args:
        trainer: whose strategy is measured.
        measure: `(round) -> values`, rounds done so far; JSON. `None` skips a round.
        every: rounds.
    """

    def __init__(self, trainer: FederatedTrainer, measure: Callable[[int], dict[str, Any] | None], *, every: int):
        self.trainer, self.measure, self.every = trainer, measure, every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A round is over."""
        done = state.global_step
        if done % self.every == 0 or done == self.trainer.rounds:
            if (values := self.measure(done)) is not None:
                self.trainer.log({MEASURED: done} | values)


def run_rounds(trainer: FederatedTrainer, measure: Callable[[int], dict[str, Any] | None], *, every: int) -> Outcome:
    """Train to the end, or go on; the outcome of the cell: the measures, and bytes and updates of all rounds.

    A run whose parameters leave the numbers ends there; what it measured before is kept, and `"diverged"` says so.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RoundMeasures(trainer, measure, every=every))
    saves, diverged = trainer.args.save_strategy != "no", False
    try:
        trainer.train(resume_from_checkpoint=True if saves else None)
    except FloatingPointError as error:
        diverged = True
        logger.warning(f"{error}; the run ends here.")
    history = [
        {"round": entry[MEASURED]} | {key: entry[key] for key in entry if key not in (MEASURED, "epoch", "step")}
        for entry in trainer.state.log_history
        if MEASURED in entry
    ]
    totals = trainer.meter.totals()
    return {
        "history": history,
        "diverged": diverged,
        "bytes_up": totals["up"],
        "bytes_down": totals["down"],
        "client_updates": sum(len(record["accepted"]) for record in trainer.history),
    }


def held_from(history: Sequence[Mapping[str, Any]], key: str, target: float) -> int | None:
    """The first round from which a value is at the target whenever it is measured, to the end; `None`: there is
    none."""
    first = None
    for entry in history:
        if entry[key] >= target:
            first = entry["round"] if first is None else first
        else:
            first = None
    return first


__all__ = ["Cell", "Compared", "Comparison", "Experiment", "RoundMeasures", "held_from", "run_rounds"]
