"""Callbacks for transformers' Trainer; each works alone in any Trainer."""

from .expert_balance import ExpertBalanceCallback
from .installation import install_callbacks
from .matryoshka_experts import MatryoshkaExpertsCallback
from .msign import MSignCallback
from .progressive_sparsification import ProgressiveSparsificationCallback, SparsificationStage
from .stable_rank import StableRankCallback
from .throughput import ThroughputCallback


__all__ = [
    "ExpertBalanceCallback",
    "MSignCallback",
    "MatryoshkaExpertsCallback",
    "ProgressiveSparsificationCallback",
    "SparsificationStage",
    "StableRankCallback",
    "ThroughputCallback",
    "install_callbacks",
]
