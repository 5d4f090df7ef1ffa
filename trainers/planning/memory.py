"""Bytes of one rank at the fullest moment of a training step, under DDP, FSDP2 or FSDP2 with expert parallelism.

    peak = parameters + optimizer states + max over moments ( gradients + kept + working + buffers )

A moment is the forward or the backward of one segment of a [`StepTrace`]. Layouts are those of the libraries as
installed: Accelerate's FSDP2 (a unit for each layer, one for the embedding, one for final norm and head), torch's
`fully_shard` (dimension 0 in equal, padded parts: 96 experts on 64 ranks are 2 on 48 of them and none on 16; while a
unit is gathered, its copy and the buffer it came in; while one is computed in the backward, the buffer of the next and
the gradients of the one before in transit), DDP (a second copy of the gradients in its buckets), transformers'
expert parallelism (experts split over ranks that have batches of their own, tokens exchanged).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Size

from .shapes import PlanError, PlannedModel
from .step_trace import StepTrace


MASTER = 4  # bytes of a parameter and of its gradient where the optimizer sees them: fp32
ADAMW = 8  # both moments in fp32
EXCHANGED = 4  # copies of the routed tokens in an exchange: sorted, received, computed, returned


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a model lies on GPUs.

    Args:
        kind: `"ddp"` or `"fsdp2"`.
        replicas: groups of ranks that each hold the whole model (HSDP); 1: all ranks share one.
        ep: ranks that own different experts and exchange tokens.
        sync_each_batch: reduce gradients after every micro-batch. Without it (Trainer's default) FSDP2 keeps whole
            gradients on every rank while it accumulates.
    """

    kind: str = "fsdp2"
    gpus: int = 8
    replicas: int = 1
    ep: int = 1
    sync_each_batch: bool = False

    @property
    def ranks(self) -> int:
        """Ranks that share one copy of the parameters."""
        return self.gpus // self.replicas if self.kind == "fsdp2" else 1

    def check(self, model: PlannedModel) -> None:
        """[`PlanError`] for what does not divide or does not go together."""
        experts = model.num_experts
        for field in ("gpus", "replicas", "ep"):
            if getattr(self, field) < 1:
                raise PlanError(f"{field}: {getattr(self, field)} is not a number of devices; give 1 or more.")
        if self.kind not in ("ddp", "fsdp2"):
            raise PlanError(f"sharding: {self.kind!r} is not known. Choose ddp or fsdp2.")
        if self.kind == "ddp" and (self.ep > 1 or self.replicas > 1):
            raise PlanError("sharding: ddp holds the whole model on every rank; --ep and --replicas need fsdp2.")
        if self.gpus % self.replicas:
            raise PlanError(f"replicas: {self.replicas} does not divide gpus={self.gpus}. Choose a divisor.")
        if self.ep > 1 and not experts:
            raise PlanError(f"ep: {self.ep} ranks share experts, but {model.name} has none. Leave --ep out.")
        if self.ep > 1 and (self.ranks % self.ep or experts % self.ep):
            raise PlanError(
                f"ep: {self.ep} must divide the {self.ranks} ranks of a replica and the {experts} experts. Choose one "
                f"of {', '.join(str(n) for n in range(2, experts + 1) if not self.ranks % n and not experts % n)}."
            )

    def shard(self, shape: Size, is_expert: bool) -> int:
        """Numbers of a parameter on the fullest rank."""
        rows, ranks = self._split(shape, is_expert)
        return -(-rows // ranks) * (shape.numel() // shape[0]) if shape else 1

    def gathered(self, shape: Size, is_expert: bool) -> int:
        """Numbers of a parameter while a rank computes with it, padding included."""
        return self.shard(shape, is_expert) * self._split(shape, is_expert)[1]

    def rows_of_experts(self, model: PlannedModel) -> tuple[int, int]:
        """Experts of a layer that are divided, and among how many ranks; `(0, 1)` in a dense model."""
        if not model.num_experts:
            return 0, 1
        return self._split(next(iter(model.expert_shapes.values())), True)

    def whole(self, shape: Size, is_expert: bool) -> int:
        """Numbers of its gradient before that is reduced: those of `gathered` without padding."""
        return self._split(shape, is_expert)[0] * (shape.numel() // shape[0]) if shape else 1

    def _split(self, shape: Size, is_expert: bool) -> tuple[int, int]:
        """Rows that are divided, and among how many ranks."""
        rows = shape[0] if shape else 1
        if is_expert and self.ep > 1:
            return rows // self.ep, self.ranks // self.ep
        return rows, self.ranks


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the fullest rank when it is fullest.

    Args:
        gradients: those that are there at that moment; DDP's buckets among them.
        kept: activations that wait for their backward.
        working: what the segment at hand needs: its intermediate results, logits, its gradients before they are
            reduced.
        buffers: gathered parameters and what is in transit between ranks.
        moment: what is computed then.
    """

    parameters: int
    optimizer: int
    gradients: int
    kept: int
    working: int
    buffers: int
    moment: str

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.kept + self.working + self.buffers


def memory_of(
    model: PlannedModel,
    trace: StepTrace,
    sharding: Sharding,
    *,
    bf16: bool,
    accumulation: int = 1,
    optimizer_bytes: float = ADAMW,
    exchanged: int = 0,
) -> Memory:
    """The fullest moment of a step in steady state: optimizer states are there.

    Args:
        trace: of fp32 parameters under autocast for DDP, of bf16 ones for FSDP2 in bf16, see [`trace_options`].
        optimizer_bytes: of states, per parameter.
        exchanged: numbers in the routed tokens of a layer, `tokens * k * hidden`: with `sharding.ep`.
    """
    sharding.check(model)
    layout = _Layout(model, sharding, bf16)
    names = list(model.shapes)
    own = layout.shards(names)
    fixed = {"parameters": MASTER * own, "optimizer": round(optimizer_bytes * own)}
    if sharding.ep > 1:
        extra = EXCHANGED * layout.compute_bytes * exchanged
        trace = replace(trace, layers=[_with_exchange(segment, extra) for segment in trace.layers])
    moments = _ddp_moments if sharding.kind == "ddp" else _fsdp_moments
    fullest = max(moments(trace, layout, accumulation), key=lambda moment: sum(moment[1:]))
    moment, gradients, kept, working, buffers = fullest
    return Memory(**fixed, gradients=gradients, kept=kept, working=working, buffers=buffers, moment=moment)


def trace_options(sharding: Sharding, *, bf16: bool, accumulation: int) -> dict[str, bool]:
    """How `trace_step` has to run: whether parameters are bf16 themselves, under autocast, and whether whole gradients
    are there already."""
    whole = accumulation > 1 and (sharding.kind == "ddp" or not sharding.sync_each_batch)
    return {"half_parameters": bf16 and sharding.kind == "fsdp2", "autocast": bf16, "accumulated": whole}


class _Layout:
    """Sizes of groups of parameters on a rank."""

    def __init__(self, model: PlannedModel, sharding: Sharding, bf16: bool):
        self.model, self.sharding = model, sharding
        self.compute_bytes = 2 if bf16 and sharding.kind == "fsdp2" else 4

    def shards(self, names: list[str]) -> int:
        return sum(self.sharding.shard(*self._of(name)) for name in names)

    def gathered(self, names: list[str]) -> int:
        """Bytes in the dtype of the computation."""
        return self.compute_bytes * sum(self.sharding.gathered(*self._of(name)) for name in names)

    def whole(self, names: list[str]) -> int:
        """Bytes of gradients in that dtype."""
        return self.compute_bytes * sum(self.sharding.whole(*self._of(name)) for name in names)

    def _of(self, name: str) -> tuple[Size, bool]:
        return self.model.shapes[name], name in self.model.expert_shapes


Moment = tuple[str, int, int, int, int]  # what, gradients, kept, working, buffers


def _walk(trace: StepTrace) -> Iterator[tuple[str, str, int, int, list[str]]]:
    """`(phase, name, kept, working, parameters)` of every segment in the order of a step."""
    kept = 0
    yield "forward", "embedding", kept, trace.embedding.forward_peak, trace.embedding.parameters
    kept += trace.embedding.grown
    for i, layer in enumerate(trace.layers):
        yield "forward", f"layer {i}", kept, layer.forward_peak, layer.parameters
        kept += layer.grown
    yield "loss", "logits and loss", kept, trace.head.forward_peak, trace.head.parameters
    kept = trace.base + sum(layer.kept for layer in trace.layers)
    for i, layer in reversed(list(enumerate(trace.layers))):
        yield "backward", f"layer {i}", kept, layer.backward_peak, layer.parameters
        kept -= layer.kept
    yield "backward", "embedding", kept, trace.embedding.backward_peak, trace.embedding.parameters


def _ddp_moments(trace: StepTrace, layout: _Layout, accumulation: int) -> Iterator[Moment]:
    whole = MASTER * layout.shards(list(layout.model.shapes))
    buckets = whole if layout.sharding.gpus > 1 else 0
    done = whole if accumulation > 1 else 0
    for phase, name, kept, working, parameters in _walk(trace):
        yield f"{phase}, {name}", done + buckets, kept, working, 0
        if phase != "forward" and accumulation == 1:
            done += MASTER * layout.shards(parameters)


def _fsdp_moments(trace: StepTrace, layout: _Layout, accumulation: int) -> Iterator[Moment]:
    names = list(layout.model.shapes)
    done = 0
    if accumulation > 1:
        done = MASTER * layout.shards(names) if layout.sharding.sync_each_batch else layout.whole(names)
    steps = list(_walk(trace))
    in_transit = 0
    for here, (phase, name, kept, working, parameters) in enumerate(steps):
        unit = layout.gathered(parameters)
        if phase == "forward":
            yield f"forward, {name}", done, kept, working, 2 * unit
            continue
        following = layout.gathered(steps[here + 1][4]) if here + 1 < len(steps) else 0
        arriving = max(following, unit if phase == "loss" else 0)
        yield f"{phase}, {name}", done, kept, working, unit + arriving + in_transit
        # Its gradients are whole, and copied into one buffer in order to be reduced.
        left = kept - trace.layers[int(name.split()[1])].kept if name.startswith("layer") else kept
        yield f"reduction, {name}", done, left, layout.whole(parameters), 2 * unit + following
        in_transit = unit
        if accumulation == 1:
            done += MASTER * layout.shards(parameters)


def _with_exchange(segment, extra: int):
    """Tokens that travel between ranks stay for the backward, unless the layer is computed again there, and every copy
    has a gradient."""
    recomputed = segment.grown < segment.forward_peak // 2
    kept = 0 if recomputed else extra
    return replace(
        segment,
        grown=segment.grown + kept,
        kept=segment.kept + kept,
        forward_peak=segment.forward_peak + extra,
        backward_peak=segment.backward_peak + extra * (1 + recomputed),
    )
