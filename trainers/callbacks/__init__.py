"""Callbacks for transformers' Trainer; each works alone in any Trainer."""

from .expert_balance import ExpertBalanceCallback
from .installation import install_callbacks
from .progressive_sparsification import ProgressiveSparsificationCallback, SparsificationStage
from .throughput import ThroughputCallback


__all__ = [
    "ExpertBalanceCallback",
    "ProgressiveSparsificationCallback",
    "SparsificationStage",
    "ThroughputCallback",
    "install_callbacks",
]
