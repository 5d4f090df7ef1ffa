r"""Is it the machine or the numbers? Run the suspicious micro-batch again, in place, and compare.

    same input, same random state, same weights:   another result -> `"transient"`: the machine erred once
                                                   the same       -> `"reproducible"`: the numbers, or a machine that
                                                                     errs every time

Only another machine tells the last two apart. After the rerun state machine of Megatron, which the SIGMA stack runs
(arXiv 2512.13488, section 4 of our digest): exit with code 16, start again elsewhere; passes there -> the first
machine errs persistently; the same there -> a correct result of a wrong program or wrong data, code 17.
"""

import json
import math
import socket
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_models.moe.elastic import experts_in_force, put_active_experts, routers_of

from ..report import write_text_atomically
from .signs import EXIT_FAILED_VALIDATION, EXIT_SUSPECT


SUSPICION_NAME = "rerun.json"
Label = Literal["transient", "reproducible"]


@dataclass(frozen=True)
class RandomState:
    """Generators of the CPU and of every device that is in use; 5 kB, and no synchronisation to read it."""

    cpu: torch.Tensor
    devices: dict[int, torch.Tensor]

    @classmethod
    def now(cls) -> "RandomState":
        """The present state."""
        used = torch.cuda.is_available() and torch.cuda.is_initialized()
        devices = {torch.cuda.current_device(): torch.cuda.get_rng_state()} if used else {}
        return cls(torch.get_rng_state(), devices)

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.cpu)
        for index, state in self.devices.items():
            torch.cuda.set_rng_state(state, index)


@dataclass(frozen=True)
class Snapshot:
    """What a forward depends on beside the weights: its arguments (by reference), the random state, the experts per
    token in force and the running counts of a balance loss. Take it right before the forward."""

    args: tuple
    kwargs: dict[str, Any]
    random: RandomState
    experts: list[int] | None
    counts: list[dict[str, Any]]

    @classmethod
    def of(cls, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> "Snapshot":
        """Of the forward `module(*args, **kwargs)` that is about to run."""
        # The original dictionary of a window is not changed in place, only what its names stand for.
        counts = [dict(vars(window)) for window in _routing_windows(module)]
        return cls(args, dict(kwargs), RandomState.now(), _experts(module), counts)

    def put(self, module: nn.Module) -> None:
        """Set random state, experts and counts as they were."""
        self.random.restore()
        if self.experts is not None:
            put_active_experts(routers_of(module), self.experts)
        for window, values in zip(_routing_windows(module), self.counts, strict=True):
            vars(window).update(values)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """`label`; `first` and `second`: the loss of both runs; `gradients`: whether those of the second are finite,
    `None` where they were not computed."""

    label: Label
    first: float
    second: float
    gradients: bool | None


def diagnose(
    module: nn.Module,
    snapshot: Snapshot,
    first: float,
    *,
    gradients_were_finite: bool = True,
    tolerance: float = 1e-3,
    backward: bool = True,
) -> Diagnosis:
    """Repeat forward and backward of a micro-batch once.

    A collective if the model's forward is one (FSDP, balance losses over ranks): then every rank repeats its own
    micro-batch of the same number. `.grad`, buffers, counts and random state are afterwards what they were; gradients
    are formed beside them, which takes the memory of one more set while it lasts. Sharded parameters (DTensor) have
    forward only: FSDP's backward would write into the gradients.

    Args:
        first: the loss (any number that the model returned) of the first run.
        gradients_were_finite: `False` if the gradients of the first run are what is suspicious.
        tolerance: relative difference of two finite losses up to which they are the same; atomics on GPUs do not add
            in the same order twice. Two losses that are not finite are the same.
    """
    second, finite = _repeat(module, snapshot, backward=backward)
    if not math.isfinite(first) or not math.isfinite(second):
        same = math.isfinite(first) == math.isfinite(second)
    else:
        same = abs(first - second) <= tolerance * max(abs(first), abs(second))
    if same and math.isfinite(second) and finite is not None:
        same = finite == gradients_were_finite
    return Diagnosis(label="reproducible" if same else "transient", first=first, second=second, gradients=finite)


def _repeat(module: nn.Module, snapshot: Snapshot, *, backward: bool) -> tuple[float, bool | None]:
    present = Snapshot.of(module, (), {})
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    backward = backward and not sharded
    # FSDP gathers in a hook of the module; otherwise the hooks that count and watch must not see this forward.
    forward = module if sharded else module.forward
    try:
        snapshot.put(module)
        with nullcontext() if backward else torch.no_grad():
            loss = loss_of(forward(*snapshot.args, **snapshot.kwargs))
        if loss is None:
            return math.nan, None
        if not (backward and loss.requires_grad):
            return loss.item(), None
        # Not loss.backward(): DDP's hooks would wait for the other ranks, and .grad would count the batch twice.
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
        return loss.item(), finite
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        present.put(module)


def loss_of(output: Any) -> torch.Tensor | None:
    """The scalar loss in what a model returned; `None` if it returned none (a `compute_loss_func` forms it later)."""
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, (tuple, list)) and output:
        loss = output[0]
    elif loss is None and isinstance(output, dict):
        loss = output.get("loss")
    return loss if isinstance(loss, torch.Tensor) and loss.dim() == 0 else None


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """A reproducible fault, kept in `rerun.json` of the run folder until the same step ran on another machine."""

    step: int
    rank: int
    micro_batch: int
    batch: str
    host: str = ""

    def file(self, folder: str | Path) -> None:
        """Write it; the host is this one unless it says another."""
        values = asdict(self) | {"host": self.host or socket.gethostname()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text_atomically(Path(folder) / SUSPICION_NAME, json.dumps(values, indent=1) + "\n")


def read_suspicion(folder: str | Path) -> Suspicion | None:
    """What is on file; `None` if nothing is, or nothing that can be read."""
    try:
        return Suspicion(**json.loads((Path(folder) / SUSPICION_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def clear_suspicion(folder: str | Path) -> None:
    """Close the file."""
    (Path(folder) / SUSPICION_NAME).unlink(missing_ok=True)


def exit_code(known: Suspicion | None, now: Suspicion, *, host: str | None = None) -> int:
    """16: start again elsewhere; 17: another machine found the same (step, micro-batch and batch), so that no machine
    will help. `known`: what was on file before, `now`: the fault that was just reproduced on `host` (this one)."""
    same = known is not None and (known.step, known.micro_batch, known.batch) == (now.step, now.micro_batch, now.batch)
    elsewhere = known is not None and known.host != (host or socket.gethostname())
    return EXIT_FAILED_VALIDATION if same and elsewhere else EXIT_SUSPECT


def _routing_windows(module: nn.Module) -> list[Any]:
    windows = (getattr(each, "routing_window", None) for each in module.modules())
    return list({id(window): window for window in windows if window is not None}.values())


def _experts(module: nn.Module) -> list[int] | None:
    try:
        return experts_in_force(module)
    except TypeError:  # no routers
        return None


__all__ = [
    "SUSPICION_NAME",
    "Diagnosis",
    "RandomState",
    "Snapshot",
    "Suspicion",
    "clear_suspicion",
    "diagnose",
    "exit_code",
    "loss_of",
    "read_suspicion",
]
