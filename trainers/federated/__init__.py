"""Learning over many clients: the engine-free core, the engines that run it, and the Trainer around them.

What stands on a Trainer is imported when it is asked for: the core alone is light.
"""

import importlib

from .core import (
    MCPSGD,
    MIFA,
    MMPSGD,
    Alternating,
    Bernoulli,
    BlockSchedule,
    FedAdam,
    FedAvg,
    FedLaAvg,
    FedProx,
    FedSGD,
    FedSubAvg,
    Robust,
    RoundwiseSubmodelAvg,
    SleepWindow,
    Trace,
    WaitForAll,
)


_LAZY = {
    "ClientRows": "partition",
    "ClientStates": "client_states",
    "FederatedTrainer": "trainer",
    "InProcessEngine": "engines",
    "LayoutMeter": "messages",
    "LocalTraining": "local",
}

__all__ = [
    "MCPSGD",
    "MIFA",
    "MMPSGD",
    "Alternating",
    "Bernoulli",
    "BlockSchedule",
    "FedAdam",
    "FedAvg",
    "FedLaAvg",
    "FedProx",
    "FedSGD",
    "FedSubAvg",
    "Robust",
    "RoundwiseSubmodelAvg",
    "SleepWindow",
    "Trace",
    "WaitForAll",
    *_LAZY,
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
