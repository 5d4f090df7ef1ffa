"""One training step of a model on fake tensors, cut into segments: embeddings, each layer, head with loss.

Nothing is computed and nothing is allocated. The operators are those of the CPU (flash attention, `grouped_mm`), whose
saved tensors are also those of the GPU kernels; kernels that keep other tensors (flex attention, compiled graphs) are
not covered. A deep model runs one layer of each kind instead of all of them.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, masking_utils

from .live_bytes import LiveBytes


FULL_DEPTH = 12  # models of up to so many layers are run whole


@dataclass
class Segment:
    """A part of a step, in bytes relative to where it begins.

    Args:
        grown: what its forward leaves behind.
        forward_peak: the most while its forward runs.
        kept: what of `grown` is still there when its backward begins (an autocast cache is not).
        backward_peak: the most while its backward runs, with the gradients of its parameters as they are made.
        parameters: names of its parameters.
    """

    grown: int = 0
    forward_peak: int = 0
    kept: int = 0
    backward_peak: int = 0
    parameters: list[str] = field(default_factory=list)


@dataclass
class StepTrace:
    """A micro-batch through the whole model.

    Args:
        embedding, layers: segments; `head` is everything between the last layer's forward and its backward, whose
            `forward_peak` covers loss and logits in both directions.
        base: bytes alive when the backward of the embedding begins.
        forward_flops, step_flops: by kind, see [`LiveBytes`]; `step_flops` with what checkpointing computes again. In
            `forward_flops` the product with the vocabulary is `"head"`.
    """

    embedding: Segment
    layers: list[Segment]
    head: Segment
    base: int
    forward_flops: Counter
    step_flops: Counter


def layers_of(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the list of layers, and the list's name. `ValueError` if there is none."""
    found = [
        (len(child), module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and type(child[0]).__name__ in (model._no_split_modules or ())
    ]
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} names no layers in `_no_split_modules`, so its step cannot be cut into "
            "parts. Plan a decoder or encoder of transformers."
        )
    _, module, name = max(found, key=lambda item: item[0])
    return module, name


def kinds_of(layers: nn.ModuleList, config) -> list[int]:
    """For each layer the first one that has its shapes, its number of active experts and its kind of attention."""
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    seen: dict[tuple, int] = {}
    kinds = []
    for index, layer in enumerate(layers):
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        top_k = tuple(module.top_k for module in layer.modules() if isinstance(getattr(module, "top_k", None), int))
        kinds.append(seen.setdefault((type(layer), shapes, top_k, types[index]), index))
    return kinds


def trace_step(
    build: Callable[[], PreTrainedModel],
    *,
    batch_size: int,
    sequence_length: int,
    autocast: bool = False,
    checkpointing: bool = False,
    accumulated: bool = False,
    kept_fraction: float = 1.0,
) -> StepTrace:
    """Forward and backward of `(batch_size, sequence_length)` tokens with labels, in the dtype of the parameters.

    Args:
        build: makes the model; called under fake tensors.
        autocast: bf16 autocast as `Accelerator` has it, with outputs brought back to fp32.
        checkpointing: non-reentrant gradient checkpointing of every layer.
        accumulated: gradients of an earlier micro-batch are there already.
        kept_fraction: share of the tokens that a masked language model predicts.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), _masks_may_be_left_out():
        model = build().train()
        if checkpointing:
            checkpoint_layers(model)
        ids = torch.zeros(batch_size, sequence_length, dtype=torch.int64)
        holder, name = layers_of(model)
        layers = getattr(holder, name)
        kinds = kinds_of(layers, model.config)
        run = _Run(ids, autocast, accumulated, kept_fraction)
        if len(layers) <= FULL_DEPTH:
            return run.trace(model, list(layers))
        common = Counter(kinds).most_common(1)[0][0]
        repeated = [i for i, kind in enumerate(kinds) if kind == common][1:3]
        few = sorted({*kinds, *repeated[:1]})
        traces = []
        for indices in (few, sorted({*few, *repeated})):
            setattr(holder, name, nn.ModuleList(layers[i] for i in indices))
            traces.append(run.trace(model, [layers[i] for i in indices]))
        setattr(holder, name, layers)
        names = {id(p): n for n, p in model.named_parameters()}
        parameters = [[names[id(p)] for p in layer.parameters()] for layer in layers]
        return _extrapolated(traces, sorted({*few, *repeated}), kinds, parameters)


def _extrapolated(
    traces: list[StepTrace], traced: list[int], kinds: list[int], parameters: list[list[str]]
) -> StepTrace:
    """All layers, from a trace of the layers `traced` and one of these without one of them.

    Those of a kind are alike, but for the first and the last layer of all; and what the loss does for each layer
    (balance losses) grows with their number.
    """
    short, long = traces
    by_index = dict(zip(traced, long.layers))
    last = len(kinds) - 1
    if kinds[traced[-1]] == kinds[last]:
        by_index[last] = by_index[traced[-1]]
    # Of the kind that was traced several times, one in the middle.
    of_kind = {kind: [i for i in traced if kinds[i] == kind][:2][-1] for kind in kinds}
    sources = [i if i in (0, last) and i in by_index else of_kind[kind] for i, kind in enumerate(kinds)]
    layers = [replace(by_index[source], parameters=names) for source, names in zip(sources, parameters)]
    extra = len(kinds) - len(traced)
    flops = {}
    for which in ("forward_flops", "step_flops"):
        flops[which] = Counter(getattr(long, which))
        for layer in long.layers:
            flops[which].subtract(getattr(layer, which))
        for layer in layers:
            flops[which].update(getattr(layer, which))
    head = replace(
        long.head,
        forward_peak=long.head.forward_peak + extra * (long.head.forward_peak - short.head.forward_peak),
    )
    return replace(long, layers=layers, head=head, base=long.base + extra * (long.base - short.base), **flops)


@dataclass
class _LayerSegment(Segment):
    forward_flops: Counter = field(default_factory=Counter)
    step_flops: Counter = field(default_factory=Counter)


class _Run:
    """One pass with marks at the borders of the segments."""

    def __init__(self, ids: torch.Tensor, autocast: bool, accumulated: bool, kept_fraction: float):
        self.ids, self.autocast, self.accumulated, self.kept_fraction = ids, autocast, accumulated, kept_fraction

    def trace(self, model: PreTrainedModel, layers: list[nn.Module]) -> StepTrace:
        self.live = live = LiveBytes(kept_fraction=self.kept_fraction)
        self.marks: list[tuple[int, int, int, Counter]] = []  # alive, gradients among it, peak before, FLOPs
        self.backward = False
        for tensor in (*model.parameters(), *model.buffers(), self.ids):
            live.ignore(tensor)
        hooks = [p.register_post_accumulate_grad_hook(self._gradient) for p in model.parameters()]
        hooks += [layer.register_forward_pre_hook(self._before, with_kwargs=True) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(self._after))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if self.accumulated else None
            if self.accumulated:
                live.ignore(parameter.grad)
        try:
            with live:
                self._mark()
                loss = self._forward(model)
                self.backward = True
                self.forward_flops = Counter(live.flops)
                loss.backward()
                self._mark()
        finally:
            for hook in hooks:
                hook.remove()
            model.zero_grad(set_to_none=True)
        return self._segments(model, layers)

    def _forward(self, model: PreTrainedModel) -> torch.Tensor:
        context = torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with context:
            outputs = model(input_ids=self.ids, labels=self.ids, use_cache=False)
        if self.autocast:  # accelerate's `convert_outputs_to_fp32`: the forward of a prepared model ends with it
            outputs = {name: _in_fp32(value) for name, value in outputs.items()}
        return outputs["loss"]

    def _mark(self) -> None:
        live = self.live
        self.marks.append((live.now, live.gradients, live.peak, Counter(live.flops)))
        live.start_window()

    def _gradient(self, parameter: nn.Parameter) -> None:
        if not self.accumulated:
            self.live.gradient(parameter.grad)

    def _before(self, module, args, kwargs) -> None:
        if not self.backward:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._mark_in_backward(hidden)
            self._mark()

    def _after(self, module, args, output) -> None:
        if not self.backward:
            self._mark_in_backward(output[0] if isinstance(output, tuple) else output)
            self._mark()

    def _mark_in_backward(self, tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: self._mark())

    def _segments(self, model: PreTrainedModel, layers: list[nn.Module]) -> StepTrace:
        # start, before each layer, after the last one | its backward, that of each before, of the embedding, end
        marks, depth = self.marks, len(layers)
        if len(marks) != 2 * depth + 4:
            raise ValueError(f"model: {type(model).__name__} does not pass its hidden states from layer to layer.")
        names = {id(p): name for name, p in model.named_parameters()}
        seen: set[int] = set()
        segments = []
        for i, layer in enumerate(layers):
            begin, end = marks[1 + i], marks[2 + i]
            back, done = marks[2 + depth + (depth - 1 - i)], marks[3 + depth + (depth - 1 - i)]
            activations = back[0] - back[1]
            segments.append(
                _LayerSegment(
                    grown=end[0] - begin[0],
                    forward_peak=end[2] - begin[0],
                    kept=activations - (done[0] - done[1]),
                    backward_peak=done[2] - back[0],
                    parameters=[names[id(p)] for p in layer.parameters()],
                    forward_flops=end[3] - begin[3],
                    step_flops=(end[3] - begin[3]) + (done[3] - back[3]),
                )
            )
            seen.update(id(p) for p in layer.parameters())
        forward_flops = self.forward_flops
        of_head = forward_flops["projections"] - marks[1 + depth][3]["projections"]
        forward_flops.update({"projections": -of_head, "head": of_head})
        table = model.get_input_embeddings().weight
        embedding, before_end = marks[1], marks[-2]
        return StepTrace(
            embedding=Segment(
                grown=embedding[0] - marks[0][0],
                forward_peak=embedding[2] - marks[0][0],
                backward_peak=marks[-1][2] - before_end[0],
                parameters=[names[id(table)]],
            ),
            layers=segments,
            head=Segment(
                forward_peak=marks[2 + depth][2] - marks[1 + depth][0],
                parameters=[name for key, name in names.items() if key not in seen and key != id(table)],
            ),
            base=before_end[0] - before_end[1],
            forward_flops=forward_flops,
            step_flops=Counter(self.live.flops),
        )


@contextlib.contextmanager
def _masks_may_be_left_out():
    # transformers asks the numbers whether a mask hides anything, and takes fake tensors for a graph that must hold
    # for any. `LiveBytes` answers as tokens without padding do.
    known = getattr(masking_utils, "is_tracing", None)
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        if known is None:
            del masking_utils.is_tracing
        else:
            masking_utils.is_tracing = known


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Non-reentrant gradient checkpointing of every layer, by the name that the installed transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _in_fp32(value):
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value
