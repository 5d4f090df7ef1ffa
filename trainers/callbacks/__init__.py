"""Callbacks for transformers' Trainer; each works alone in any Trainer."""

from .background_upload import BackgroundUploadCallback, FolderTarget, HubTarget
from .expert_balance import ExpertBalanceCallback
from .goodput import GoodputCallback
from .graceful_stop import GracefulStopCallback
from .hang_watchdog import HangWatchdogCallback
from .installation import install_callbacks
from .loss_spike import LossSpikeCallback
from .manual_gc import ManualGCCallback
from .matryoshka_experts import MatryoshkaExpertsCallback
from .msign import MSignCallback
from .norm_profile import NormProfileCallback
from .progressive_sparsification import ProgressiveSparsificationCallback, SparsificationStage
from .resume_guard import ResumeGuardCallback
from .stable_rank import StableRankCallback
from .stragglers import StragglerCallback
from .throughput import ThroughputCallback
from .validated_checkpoint import ValidatedCheckpointCallback


__all__ = [
    "BackgroundUploadCallback",
    "ExpertBalanceCallback",
    "FolderTarget",
    "GoodputCallback",
    "GracefulStopCallback",
    "HangWatchdogCallback",
    "HubTarget",
    "LossSpikeCallback",
    "MSignCallback",
    "ManualGCCallback",
    "MatryoshkaExpertsCallback",
    "NormProfileCallback",
    "ProgressiveSparsificationCallback",
    "ResumeGuardCallback",
    "SparsificationStage",
    "StableRankCallback",
    "StragglerCallback",
    "ThroughputCallback",
    "ValidatedCheckpointCallback",
    "install_callbacks",
]
