"""What a training run needs, computed before it is started: bytes of a rank, FLOPs of a step, days. `trainers.plan` is
its command."""

from .memory import Memory, Sharding, memory_of
from .shapes import PRESETS, PlanError, PlannedModel, planned_model
from .step_trace import StepTrace, trace_step
from .throughput import GPUS, Gpu, Throughput, Utilisation, throughput_of


__all__ = [
    "GPUS",
    "Gpu",
    "Memory",
    "PRESETS",
    "PlanError",
    "PlannedModel",
    "Sharding",
    "StepTrace",
    "Throughput",
    "Utilisation",
    "memory_of",
    "planned_model",
    "throughput_of",
    "trace_step",
]
