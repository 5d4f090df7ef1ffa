"""Optimizers that the Trainer takes as they are."""

from .msign import MSign, MSignAdamW, MSignFactory, parameter_groups
from .muon import MuonAdamW
from .probes import JacobianAlignment, align, jacobian_alignment, layer_functions
from .ranks import MatrixReport
from .restoration import msign_, stable_rank
from .targets import MatrixTarget, select_targets


__all__ = [
    "JacobianAlignment",
    "MSign",
    "MSignAdamW",
    "MSignFactory",
    "MatrixReport",
    "MatrixTarget",
    "MuonAdamW",
    "align",
    "jacobian_alignment",
    "layer_functions",
    "msign_",
    "parameter_groups",
    "select_targets",
    "stable_rank",
]
