r"""Norms of weights, gradients and updates by layer and family, and the valley in depth that precedes a collapse.

The SIGMA stack (arXiv 2512.13488) reports that in healthy MoE runs the norm of the parameters grows with depth, and
that runs which later collapse show a valley in the middle layers long before the loss moves. Its statistic was not
seen; ours, a proposal:

    n_l = ||W_l||_F of one family;  m = mean of three neighbours of n;  P_l = max_{j < l} m_j
    valley = max_{l in the middle 80 %} (P_l - m_l) / P_l,   slope = Spearman(n_l, l)

A warning where the valley is above 0.1 in three measurements in a row, or the slope below 0.3 after it was above 0.6.
Norms of random matrices of n elements scatter by 1 / sqrt(2 n), of themselves: four times that is added to the first
bound, and a profile that spreads by no more has slope 0. It matters for toys; a matrix of 10^6 scatters by 0.07 %.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import TrainerCallback

from ..reliability.events import EventLog


COMPONENT = "norm_profile"
FAMILIES = ("q", "k", "v", "o", "gate", "up", "down", "router")
KINDS = ("weight", "gradient", "update")
LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")
# With fewer layers there is no middle.
MIN_LAYERS = 5
# Relative spread over depth below which ranks are noise: at initialisation all layers are nearly equal.
FLAT = 0.02
SIGMAS = 4


@dataclass(frozen=True)
class Part:
    """Rows `rows` of dimension -2 (all: `None`) of a parameter: one family of one layer. `experts`: the leading
    dimension of a 3-D parameter, 0 for a matrix."""

    name: str
    layer: int
    family: str
    rows: tuple[int, int] | None = None
    experts: int = 0


def parts_of(model: nn.Module) -> list[Part]:
    """The matrices of attention, feed-forward, experts and routers of a decoder, by layer, in order.

    Families go by the names of transformers: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`,
    `down_proj`, routers `gate` or `router`, and 3-D experts, whose `gate_up_proj (E, 2I, H)` is parted. Experts that
    are interleaved or transposed stay whole, as family `gate_up`. Adapters are passed over.
    """
    modules, parts = dict(model.named_modules()), []
    for name, parameter in model.named_parameters():
        layer, words = LAYER.search(name), name.split(".")
        if layer is None or parameter.dim() < 2 or any(word.startswith("lora_") for word in words):
            continue
        index, last = int(layer.group(1)), words[-1]
        experts = parameter.shape[0] if parameter.dim() == 3 else 0
        if experts and last == "gate_up_proj":
            owner = modules[".".join(words[:-1])]
            half = parameter.shape[-2] // 2
            if getattr(owner, "is_transposed", False) or not getattr(owner, "is_concatenated", True):
                parts.append(Part(name, index, "gate_up", None, experts))
            else:
                parts.append(Part(name, index, "gate", (0, half), experts))
                parts.append(Part(name, index, "up", (half, 2 * half), experts))
        elif (family := _family(words)) is not None:
            parts.append(Part(name, index, family, None, experts))
    return sorted(parts, key=lambda part: part.layer)


def _family(words: list[str]) -> str | None:
    projections = {word.removesuffix("_proj") for word in words if word.endswith("_proj")}
    for family in FAMILIES[:-1]:
        if family in projections:
            return family
    return "router" if {"gate", "router"} & set(words) else None


def squared_norms(parts: Sequence[Part], tensors: dict[str, torch.Tensor | None]) -> list[torch.Tensor]:
    """Sum of squares of each part, `(E,)` for 3-D experts, `()` otherwise, fp64 on the CPU, of all ranks.

    A collective if a tensor is sharded: each rank adds the squares of its shard, copies count once. A tensor that is
    missing on a rank counts 0 there.
    """
    sums = [torch.zeros(max(part.experts, 1), dtype=torch.float64) for part in parts]
    sharded = [tensor for tensor in tensors.values() if isinstance(tensor, DTensor)]
    adds_copies = not sharded or dist.get_rank() == 0
    local = [(i, *_own_share(part, tensors.get(part.name), adds_copies)) for i, part in enumerate(parts)]
    values = [value for _, _, value in local if value is not None]
    if values:
        # One transfer for all parts: a read for each would wait for the device hundreds of times.
        flat = torch.cat([value.reshape(-1).to(values[0].device) for value in values]).cpu().double()
        offset = 0
        for i, first, value in local:
            if value is not None:
                sums[i][first : first + value.numel()] += flat[offset : offset + value.numel()]
                offset += value.numel()
    if sharded and dist.get_world_size() > 1:
        total = torch.cat(sums).to(sharded[0].to_local().device)
        dist.all_reduce(total)
        sums = list(total.cpu().split([len(part) for part in sums]))
    return [total if part.experts else total.squeeze(0) for part, total in zip(parts, sums)]


@torch.no_grad()
def _own_share(part: Part, tensor: torch.Tensor | None, adds_copies: bool) -> tuple[int, torch.Tensor | None]:
    """First expert and sums of squares of what this rank has to add; `None`: nothing."""
    first, row = 0, 0
    if isinstance(tensor, DTensor):
        mesh, placements = tensor.device_mesh, tensor.placements
        copies = [i for i, placement in enumerate(placements) if isinstance(placement, Replicate)]
        coordinate = mesh.get_coordinate()
        if coordinate is None or any(coordinate[i] for i in copies):
            return 0, None
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        if part.experts and any(isinstance(placement, Shard) and placement.dim == 0 for placement in placements):
            first = offsets[0]
        row, tensor = offsets[-2], tensor.to_local()
    elif not adds_copies:  # beside shards a plain tensor is the same on every rank
        return 0, None
    if tensor is None or not tensor.numel():
        return 0, None
    if part.rows is not None:
        start, stop = (min(max(bound - row, 0), tensor.shape[-2]) for bound in part.rows)
        tensor = tensor[..., start:stop, :]
    # By the norm, which accumulates in fp32 for bf16 without a copy; its square cannot overflow fp64.
    dims = (-2, -1) if part.experts else None
    return first, torch.linalg.vector_norm(tensor, dim=dims, dtype=torch.float32).double().square()


# --- the profile over depth ------------------------------------------------------------------------------------------


def valley_depth(norms: Sequence[float]) -> float:
    """Depth of the deepest valley of a profile over layers, a share of the height before it; 0 if it only grows, or
    has fewer than 5 layers."""
    layers = len(norms)
    if layers < MIN_LAYERS:
        return 0.0
    values = np.asarray(norms, dtype=float)
    smooth = np.array([values[max(l - 1, 0) : l + 2].mean() for l in range(layers)])
    before = np.maximum.accumulate(smooth)[:-1]  # of layers below l, for l = 1 .. L - 1
    middle = range(max(math.ceil(0.1 * layers), 1), math.floor(0.9 * layers))
    return max(
        (max(float((before[l - 1] - smooth[l]) / before[l - 1]), 0.0) for l in middle if before[l - 1] > 0),
        default=0.0,
    )


def depth_slope(norms: Sequence[float], *, flat: float = FLAT) -> float:
    """Spearman's correlation of the norms with the layer's number; 0 for a profile whose range is at most `flat` of
    its mean."""
    values = np.asarray(norms, dtype=float)
    if len(values) < 2 or np.ptp(values) <= flat * values.mean():
        return 0.0
    ordered = np.sort(values)
    ranks = (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2  # ties: mean
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])


class ValleyWatch:
    """The rule of the warning, for one family: [`update`] returns why to warn, once per occurrence, or `None`."""

    def __init__(self, *, depth: float = 0.1, times: int = 3, risen: float = 0.6, fallen: float = 0.3):
        self.depth, self.times, self.risen, self.fallen = depth, times, risen, fallen
        self._deep, self._rose = 0, False

    def update(self, valley: float, slope: float) -> str | None:
        """Take one measurement."""
        self._deep = self._deep + 1 if valley > self.depth else 0
        if self._deep == self.times:
            return f"a valley of {valley:.0%} in {self.times} measurements in a row"
        if self._rose and slope < self.fallen:
            self._rose = False
            return f"norms no longer grow with depth (Spearman {slope:.2f}, before above {self.risen})"
        self._rose = self._rose or slope > self.risen
        return None


class NormProfileCallback(TrainerCallback):
    """Measure norms every `every` optimizer steps and write one event of severity `info`, by rank 0.

    Evidence: `weight`, `gradient`, `update` -> family -> one number per layer (3-D experts: of all experts of the
    layer together), `valley` and `slope` -> family, and `experts` -> kind -> family -> `[smallest, largest]` per
    layer, or with `per_expert=True` every expert's (for 96 experts in 56 layers 0.4 MB an event). Gradients are what
    the optimizer gets: reduced and clipped. The update is ||w_t - w_(t-1)|| with decay and everything.

    Right under DDP (ranks hold the same numbers; rank 0 measures) and FSDP2 (sums of squares over the shards, one
    all-reduce a kind). Experts that an expert-parallel plan has spread as plain tensors show rank 0's only. FSDP1's
    flat parameters have no families: nothing is measured.

    Args:
        every: steps between measurements.
        updates: measure them; costs a copy of the trained parts during that one step.
        per_expert: see above.
        warmup_steps: no warnings before; default: those of the learning rate.
        valley, times, risen, fallen: the rule of the warning, see [`ValleyWatch`]. Calibrate them for your model: they
            are proposals, and rest on the paper's few models.

    Raises:
        ValueError: `every` below 1.
    """

    def __init__(
        self,
        every: int = 100,
        *,
        updates: bool = True,
        per_expert: bool = False,
        warmup_steps: int | None = None,
        valley: float = 0.1,
        times: int = 3,
        risen: float = 0.6,
        fallen: float = 0.3,
    ):
        if every < 1:
            raise ValueError(f"every={every} is not a number of steps: give 1 or more.")
        self.every, self.updates, self.per_expert, self.warmup_steps = every, updates, per_expert, warmup_steps
        self._rule = {"depth": valley, "times": times, "risen": risen, "fallen": fallen}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._log = EventLog(args.output_dir, rank=args.process_index)
        self.parts = parts_of(model)
        self._parameters = {part.name: model.get_parameter(part.name) for part in self.parts}
        sharded = any(isinstance(parameter, DTensor) for parameter in self._parameters.values())
        self._measures = bool(self.parts) and (sharded or args.process_index == 0)
        self._scatter = {family: SIGMAS / math.sqrt(2 * n) for family, n in self._elements().items()}
        self._watches = {
            family: ValleyWatch(**self._rule | {"depth": self._rule["depth"] + scatter})
            for family, scatter in self._scatter.items()
        }
        self._warmup = args.get_warmup_steps(state.max_steps) if self.warmup_steps is None else self.warmup_steps
        self._measured: dict[str, list[torch.Tensor]] = {}
        self._before: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self._measures or (state.global_step + 1) % self.every:
            return
        gradients = {name: parameter.grad for name, parameter in self._parameters.items()}
        self._measured = {"gradient": squared_norms(self.parts, gradients)}
        if self.updates:
            trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
            self._before = {name: parameter.detach().clone() for name, parameter in trained.items()}

    def on_optimizer_step(self, args, state, control, **kwargs):
        if "gradient" not in self._measured:
            return
        if self.updates:
            with torch.no_grad():
                for name, before in self._before.items():
                    before.neg_().add_(self._parameters[name])
            self._measured["update"] = squared_norms(self.parts, self._before)
            self._before = {}
        weights = {name: parameter.detach() for name, parameter in self._parameters.items()}
        self._measured["weight"] = squared_norms(self.parts, weights)

    def on_step_end(self, args, state, control, **kwargs):
        measured, self._measured = self._measured, {}
        if "weight" not in measured or not state.is_world_process_zero:
            return
        evidence = {kind: self._profiles(measured[kind]) for kind in KINDS if kind in measured}
        evidence["valley"] = {family: valley_depth(norms) for family, norms in evidence["weight"].items()}
        evidence["slope"] = {
            family: depth_slope(norms, flat=max(FLAT, self._scatter[family]))
            for family, norms in evidence["weight"].items()
        }
        experts = {kind: self._by_expert(measured[kind]) for kind in KINDS if kind in measured}
        if experts["weight"]:
            evidence["experts"] = experts
        self._log.record(COMPONENT, step=state.global_step, evidence=_rounded(evidence))
        if state.global_step > self._warmup:
            self._warn(state, evidence)

    def _elements(self) -> dict[str, int]:
        """Elements of the smallest matrix of each family, experts of a layer together."""
        found: dict[str, int] = {}
        for part in self.parts:
            shape = self._parameters[part.name].shape
            number = shape.numel() if part.rows is None else shape.numel() // shape[-2] * (part.rows[1] - part.rows[0])
            found[part.family] = min(number, found.get(part.family, number))
        return found

    def _profiles(self, sums: list[torch.Tensor]) -> dict[str, list[float]]:
        profiles: dict[str, dict[int, float]] = {}
        for part, squares in zip(self.parts, sums):
            layers = profiles.setdefault(part.family, {})
            # A shared or an unfused expert of the same layer belongs to the same family.
            layers[part.layer] = layers.get(part.layer, 0.0) + squares.sum().item()
        return {family: [math.sqrt(value) for value in layers.values()] for family, layers in profiles.items()}

    def _by_expert(self, sums: list[torch.Tensor]) -> dict[str, list[list[float]]]:
        found: dict[str, list[list[float]]] = {}
        for part, squares in zip(self.parts, sums):
            if part.experts:
                norms = squares.sqrt()
                row = norms.tolist() if self.per_expert else [norms.min().item(), norms.max().item()]
                found.setdefault(part.family, []).append(row)
        return found

    def _warn(self, state, evidence: dict) -> None:
        for family, watch in self._watches.items():
            if len(evidence["weight"][family]) < MIN_LAYERS:
                continue
            reason = watch.update(evidence["valley"][family], evidence["slope"][family])
            if reason is not None:
                self._log.record(
                    COMPONENT,
                    "warning",
                    step=state.global_step,
                    message=f"{family}: {reason}. Runs that collapse have been seen to begin so; look at this "
                    "family's norms by layer before going on.",
                    evidence=_rounded(
                        {
                            "family": family,
                            "weight": evidence["weight"][family],
                            "valley": evidence["valley"][family],
                            "slope": evidence["slope"][family],
                        }
                    ),
                    confidence=0.5,
                )


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


__all__ = ["NormProfileCallback", "Part", "ValleyWatch", "depth_slope", "parts_of", "squared_norms", "valley_depth"]
