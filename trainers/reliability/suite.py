"""The recommended set, in one line: `reliability(trainer)`."""

from transformers import Trainer, TrainerCallback

# The module, not its names: callbacks import parts of this package, and may be what is being imported.
from .. import callbacks
from .loss_guard import LocalLossGuardCallback


def recommended(policy: str = "skip") -> list[TrainerCallback]:
    """The callbacks of [`reliability`], in the order in which they have to run."""
    return [
        callbacks.GoodputCallback(),  # first: what the others do at the start is start-up
        callbacks.ResumeGuardCallback(),
        LocalLossGuardCallback(policy),
        callbacks.LossSpikeCallback("rollback" if policy == "rollback" else "report"),
        callbacks.StragglerCallback(),
        callbacks.NormProfileCallback(),
        callbacks.ThroughputCallback(),
        callbacks.ManualGCCallback(),
        callbacks.GracefulStopCallback(),
        callbacks.ValidatedCheckpointCallback(),
        callbacks.HangWatchdogCallback(),  # last: a save is over when all others are done with it
    ]


def reliability(trainer: Trainer, *, policy: str = "skip") -> list[TrainerCallback]:
    """Install what every long run should have; call it once, before `trainer.train()`.

    Of the SIGMA stack (arXiv 2512.13488), the parts that cost next to nothing and change no result of a healthy run:
    a local guard against NaN with attribution, loss spikes, norms over depth, stragglers, a hang watchdog, manual
    garbage collection, a graceful stop, validated checkpoints, a resume guard, throughput and a goodput ledger. Left
    to choose by name: background upload, which needs a target, and what is diagnosed by running twice. Everything
    writes to `events.jsonl` of the run folder; `python -m trainers.reliability.report RUN` shows it.

    A component that the trainer has already is left as it is. The watchdog exits the process when a run hangs, and
    resumed runs refuse other data, batch or model than their checkpoint's: both say what to do.

    Args:
        policy: of the loss guard when a loss or gradient is not finite: `"skip"` the step on all ranks, `"raise"`, or
            `"rollback"`, which loss spikes then ask for, too. Rollbacks need `train_with_rollback(trainer)` in the
            place of `trainer.train()`.

    Returns the callbacks that were added.

    Raises:
        ValueError: a `FederatedTrainer`, which does all of this in its own way.
    """
    instead = (
        "It commits whole rounds, goes on behind them, and refuses bad updates by the names of their clients: "
        "save_strategy='steps' is all that is needed. Callbacks that hear of rounds are installed by name, such as "
        "ExpertBalanceCallback."
    )
    callbacks.installation.require_steps(trainer, "reliability()", instead)
    present = {type(callback) for callback in trainer.callback_handler.callbacks}
    added = [callback for callback in recommended(policy) if type(callback) not in present]
    if callbacks.ExpertBalanceCallback not in present and _routes(trainer.model):
        added.append(callbacks.ExpertBalanceCallback())
    callbacks.install_callbacks(trainer, *added)
    return added


def _routes(model) -> bool:
    # By what it can do, not by its class: the same class loaded from a Hub repository is another object.
    return any(hasattr(module, "set_experts_per_token") for module in model.modules())


__all__ = ["recommended", "reliability"]
