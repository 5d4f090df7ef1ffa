"""Callbacks for transformers' Trainer; each works alone in any Trainer."""

from .expert_balance import ExpertBalanceCallback
from .installation import install_callbacks
from .matryoshka_experts import MatryoshkaExpertsCallback
from .progressive_sparsification import ProgressiveSparsificationCallback, SparsificationStage
from .throughput import ThroughputCallback


__all__ = [
    "ExpertBalanceCallback",
    "MatryoshkaExpertsCallback",
    "ProgressiveSparsificationCallback",
    "SparsificationStage",
    "ThroughputCallback",
    "install_callbacks",
]
