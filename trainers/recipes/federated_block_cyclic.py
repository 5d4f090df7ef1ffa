"""MM-PSGD and MC-PSGD among what one model comes to on block-cyclic data: the experiments, and their outcomes.

Two arms are read off the runs of others. `fed_avg` is the chain that runs through all blocks in a run of MM-PSGD:
federated averaging with everybody, and with one local step parallel SGD. `separate` is the last of the chains that a
run of MC-PSGD trains on one block each.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..federated import MCPSGD, MMPSGD, BlockSchedule, FederatedTrainer
from ..federated.core import FederatedAlgorithm
from ..report import FigureFile, Metric
from .federated_cells import Cell, Compared, Experiment, Outcome
from .federated_digits_data import ImageTask
from .federated_results import arms_metric, curves_figure, present, rounds_metric


BLOCK_ARMS = ["mc_psgd", "mm_psgd", "fed_avg", "separate"]
RUN_OF = {"fed_avg": "mm_psgd", "separate": "mc_psgd"}
SERVED = {"mc_psgd": "predictor", "mm_psgd": "predictor", "fed_avg": "mixed", "separate": "separate"}
BLOCKS = "blocks"


@dataclasses.dataclass(frozen=True)
class BlockSetting:
    """All that decides a run, besides arm, rate and seed; see the recipe's arguments."""

    method: str
    data_name: str
    model: str
    clients: int
    rounds: int
    local_steps: int
    batch_size: int
    blocks: int
    block_rounds: int
    concentration: float
    evaluate_every: int


def block_experiments(args: Any, batch_size: int) -> list[Experiment]:
    """Two blocks with every arm; then, at the rates found there, shorter and longer blocks, one and more local steps,
    five blocks, and other numbers of clients. What is measured falls on the ends of blocks."""

    def setting(**changes: Any) -> BlockSetting:
        names = [f.name for f in dataclasses.fields(BlockSetting) if f.name not in ("batch_size", "evaluate_every")]
        values = {name: getattr(args, name) for name in names} | changes
        length = values["block_rounds"]
        every = length // 2 if length % 2 == 0 else length
        return BlockSetting(batch_size=batch_size, evaluate_every=every, **values)

    def other(name: str, **changes: Any) -> Experiment:
        return Experiment(name, setting(**changes), args.arms, rates_of=BLOCKS)

    half, five = max(1, args.block_rounds // 2), max(1, args.rounds // 10)
    return [
        Experiment(BLOCKS, setting(), args.arms),
        other("short_blocks", block_rounds=half),
        other("long_blocks", block_rounds=2 * args.block_rounds),
        other("one_local_step", local_steps=1),
        other("more_local_steps", local_steps=2 * args.local_steps),
        other("five_blocks", blocks=5, block_rounds=five),
        *(other(f"clients_{n}", clients=n) for n in (max(1, args.clients // 2), 2 * args.clients)),
    ]


def block_strategy(cell: Cell) -> FederatedAlgorithm:
    """Of a cell. `ValueError` for a run that is not known."""
    setting, kinds = cell.experiment.setting, {"mm_psgd": MMPSGD, "mc_psgd": MCPSGD}
    if cell.run not in kinds:
        raise ValueError(f"run {cell.run!r} is not known; choose from {', '.join(kinds)}.")
    return kinds[cell.run](BlockSchedule.by_rounds([setting.block_rounds] * setting.blocks), seed=cell.seed)


def block_measures(
    trainer: FederatedTrainer, task: ImageTask, setting: BlockSetting
) -> Callable[[int], dict[str, Any]]:
    """Of each kind of what could be served in a block: its accuracy on each block's images, and the mean."""
    parts = {"validation": task.validation, "test": task.test}
    width = task.num_labels // setting.blocks
    blocks = {name: part.labels // width for name, part in parts.items()}

    def accuracies(parameters: dict[str, torch.Tensor], name: str) -> list[float]:
        trainer.local.load(parameters)
        logits = trainer.model(parts[name].pixel_values.to(trainer.args.device)).logits
        right = (logits.argmax(-1).cpu() == parts[name].labels).double()
        return [float(right[blocks[name] == m].mean()) for m in range(setting.blocks)]

    @torch.no_grad()
    def measure(done: int) -> dict[str, Any]:
        trainer.model.eval()
        strategy, found = trainer.strategy, {}
        of_block = {"predictor": strategy.predictor}
        if isinstance(strategy, MCPSGD):
            of_block["separate"] = strategy.separate_chain
            found["picks"] = strategy.picks
        for name in parts:
            values = {"mixed": accuracies(strategy.parameters, name)}
            for kind, model in of_block.items():
                values[kind] = [accuracies(model(m), name)[m] for m in range(setting.blocks)]
            for kind, by_block in values.items():
                found[f"{name}_{kind}"] = float(np.mean(by_block))
                found[f"{name}_{kind}_by_block"] = by_block
        return found

    return measure


def last_cycle(outcome: Outcome, key: str) -> list[Any]:
    """What was measured at the ends of the blocks of the last cycle; nothing of a run that diverged."""
    if outcome["diverged"]:
        return []
    return [entry[key] for entry in outcome["history"] if entry["last_cycle"]]


def _marked(outcome: Outcome, setting: BlockSetting) -> Outcome:
    cycle = setting.blocks * setting.block_rounds
    history = [
        entry | {"last_cycle": entry["round"] % setting.block_rounds == 0 and entry["round"] > setting.rounds - cycle}
        for entry in outcome["history"]
    ]
    return outcome | {"history": history}


def block_score(arm: str, outcome: Outcome) -> float:
    """The mean validation accuracy over blocks, in the second half of the run."""
    history = outcome["history"]
    if outcome["diverged"] or not history:
        return float("nan")
    half = history[-1]["round"] / 2
    values = [entry[f"validation_{SERVED[arm]}"] for entry in history if entry["round"] > half]
    return float(np.mean(values))


def report(
    args: Any, experiments: list[Experiment], found: dict[str, Compared], root: Path
) -> tuple[dict[str, Metric], list[FigureFile], dict[str, Any]]:
    """Metrics, figures, and how often each chain was the better one."""
    metrics: dict[str, Metric | None] = {}
    figures, picks = [], {}

    def accuracy(arm: str, outcome: Outcome) -> float:
        return float(np.mean(last_cycle(outcome, f"test_{SERVED[arm]}") or [np.nan]))

    def gap(arm: str, outcome: Outcome) -> float:
        values = last_cycle(outcome, f"test_{SERVED[arm]}_by_block")
        return float(np.mean([max(v) - min(v) for v in values])) if values else np.nan

    for experiment in experiments:
        name, setting = experiment.name, experiment.setting
        compared = dataclasses.replace(found[name])
        compared.outcomes = {
            arm: [_marked(outcome, setting) for outcome in outcomes] for arm, outcomes in found[name].outcomes.items()
        }
        metrics[f"{name}_accuracy"] = arms_metric(
            compared, accuracy, higher_is_better=True, note="test accuracy, mean over blocks and the last cycle's ends"
        )
        if "mm_psgd" in experiment.arms[1:]:
            rest = ["mm_psgd", *(arm for arm in experiment.arms if arm not in ("mm_psgd", "mc_psgd"))]
            metrics[f"{name}_accuracy_of_mm_psgd"] = arms_metric(
                compared, accuracy, rest, higher_is_better=True, note="the same numbers, of MM-PSGD"
            )
        metrics[f"{name}_gap_between_blocks"] = arms_metric(
            compared, gap, higher_is_better=False, note="of the best and the worst served block, last cycle"
        )
        if name == BLOCKS:
            metrics[f"{name}_rounds_to_target"] = rounds_metric(
                compared, lambda arm: f"test_{SERVED[arm]}", args.target, setting.rounds
            )
            metrics[f"{name}_bytes"] = arms_metric(
                compared, lambda arm, o: o["bytes_up"] + o["bytes_down"], higher_is_better=False, unit="bytes"
            )
        if "mc_psgd" in compared.outcomes:
            runs = [outcome["history"][-1]["picks"] for outcome in compared.outcomes["mc_psgd"] if outcome["history"]]
            picks[name] = [{k: sum(block[k] for block in run) for k in ("mixed", "separate")} for run in runs]
        caption = f"{name}: test accuracy, mean over blocks of what is served in each, mean of the seeds."
        path = root / "figures" / f"{name}_rounds.png"
        figures.append(
            curves_figure(compared, lambda arm: f"test_{SERVED[arm]}", path, caption=caption, y_label="test accuracy")
        )
    return present(metrics), figures, {"candidates_chosen_by_seed": picks}


__all__ = ["BLOCK_ARMS", "BlockSetting", "block_experiments", "block_measures", "block_score", "block_strategy"]
