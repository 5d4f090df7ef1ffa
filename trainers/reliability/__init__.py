"""Runs that do not die of numbers or machines: the reliability layer of the SIGMA stack (arXiv 2512.13488) for any
Trainer. `reliability(trainer)` installs the recommended set."""

from .checkpoints import CheckpointError, find_last_valid_checkpoint, validate_checkpoint
from .events import Event, EventLog, read_events
from .loss_guard import LocalLossGuardCallback, NonFiniteLossError
from .rollback import RollbackRequested, train_with_rollback
from .suite import recommended, reliability


__all__ = [
    "CheckpointError",
    "Event",
    "EventLog",
    "LocalLossGuardCallback",
    "NonFiniteLossError",
    "RollbackRequested",
    "find_last_valid_checkpoint",
    "read_events",
    "recommended",
    "reliability",
    "train_with_rollback",
    "validate_checkpoint",
]
