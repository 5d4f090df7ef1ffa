"""Small models on devices and a large one on a cloud, learning together under a limit on what crosses the wire."""

from .budget import DeviceBudget, DeviceBudgetError, DeviceCost
from .dc_ccl import DcCclTrainer
from .dc_ccl_data import DcCclData
from .dc_ccl_plan import DcCclPlan, Fit
from .dc_ccl_rounds import DcCclRun, run_dc_ccl, train_cloud
from .export import export_for_device
from .label_correction import Correction, correct_labels, ctr_statistics
from .label_correction_training import LabelCorrectionCallback, LabelCorrectionCollator
from .on_device import OnDeviceArguments, OnDeviceFineTuner, OnDeviceResults
from .report import DeviceArm, DeviceCloudReport
from .user_embeddings import AnonymousUserCollator, FitArguments, fit_user_distribution


__all__ = [
    "AnonymousUserCollator",
    "Correction",
    "DcCclData",
    "DcCclPlan",
    "DcCclRun",
    "DcCclTrainer",
    "DeviceArm",
    "DeviceBudget",
    "DeviceBudgetError",
    "DeviceCloudReport",
    "DeviceCost",
    "Fit",
    "FitArguments",
    "LabelCorrectionCallback",
    "LabelCorrectionCollator",
    "OnDeviceArguments",
    "OnDeviceFineTuner",
    "OnDeviceResults",
    "correct_labels",
    "ctr_statistics",
    "export_for_device",
    "fit_user_distribution",
    "run_dc_ccl",
    "train_cloud",
]
