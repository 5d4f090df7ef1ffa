"""Split inference and split learning: any image classifier of transformers, cut behind any of its layers.

The device computes everything up to the cut, the cloud everything behind it; only the activations at the cut cross.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.data import ConcatDataset
from transformers import Trainer
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput

from ..federated.core import WireMeter, unpack
from .budget import DeviceBudget, device_cost, evaluating
from .collaboration_entries import CollaborationClass
from .collaboration_task import DEVICE, CollaborationTask, Served, pixels_of, run_trainer, serve_through
from .dc_ccl_arms import FeatureRows
from .dc_ccl_data import columns


class _Reached(Exception):
    """The cut: nothing behind it is computed."""

    def __init__(self, output: Any):
        self.output = output


class SplitClassifier(nn.Module):
    """A classifier in two halves, `lower` for the device and `upper` for the cloud.

    Example:
        >>> model = AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224")
        >>> split = SplitClassifier(model, "vit.layers.3", torch.zeros(1, 3, 224, 224))
        >>> logits = split.upper(split.lower(pixel_values))  # those of model(pixel_values)

    Which modules lie below the cut is seen in one pass over `example`. On the cloud they are passed by: what they
    return is taken from that pass, its row repeated, so that none of their weights is read there.

    Args:
        model: takes `pixel_values` and returns `logits`; both halves share its memory.
        cut (`str`): the name of the module behind which the model is cut; it returns a tensor, or something that
            begins with one.
        example: an image `(1, channels, height, width)` of the size that will come.
        **kwargs: further arguments of the model, such as the `branch` of a DC-CCL model.

    Raises:
        ValueError: no such module, one that a forward never comes to, or more passes by the cut than what the module
            returns, such as a skip connection around it.
    """

    def __init__(self, model: nn.Module, cut: str, example: torch.Tensor, **kwargs: Any):
        super().__init__()
        names = dict(model.named_modules())
        if not cut or cut not in names:
            near = [name for name in names if 0 < name.count(".") <= 3][:8]
            raise ValueError(f"{type(model).__name__} has no module {cut!r}. Some of its modules: {', '.join(near)}.")
        self.model, self.cut, self.kwargs = model, cut, kwargs
        self._example = example[:1].detach().clone()
        self._passed, self._at_cut = self._see_order()
        self._check()

    @torch.no_grad()
    def _see_order(self) -> tuple[dict[str, Any], Any]:
        """What every largest module that is finished before the cut returns for the example, by name; and the cut."""
        finished: dict[str, Any] = {}

        def keep(_module: nn.Module, _args: tuple, output: Any, *, name: str) -> None:
            finished[name] = output

        named = [(name, module) for name, module in self.model.named_modules() if name and name != self.cut]
        handles = [module.register_forward_hook(partial(keep, name=name)) for name, module in named]
        try:
            with evaluating(self.model):
                at_cut = self._until_the_cut(self._example)
        finally:
            for handle in handles:
                handle.remove()
        below = {name for name in finished if not name.startswith(f"{self.cut}.")}
        largest = {name for name in below if not any(name.startswith(f"{other}.") for other in below)}
        return {name: finished[name] for name in largest}, at_cut

    @torch.no_grad()
    def _check(self) -> None:
        generator = torch.Generator().manual_seed(0)
        other = torch.randn(2, *self._example.shape[1:], generator=generator).to(self._example)
        with evaluating(self.model):
            whole = self.model(pixel_values=other, **self.kwargs).logits
            halves = self.upper(self.lower(other))
        if not torch.allclose(whole, halves, rtol=1e-4, atol=1e-5):
            raise ValueError(f"behind {self.cut} the model needs more than what {self.cut} returns: cut elsewhere.")

    def _until_the_cut(self, pixel_values: torch.Tensor) -> Any:
        def stop(_module: nn.Module, _args: tuple, output: Any) -> None:
            raise _Reached(output)

        handle = self.model.get_submodule(self.cut).register_forward_hook(stop)
        try:
            self.model(pixel_values=pixel_values, **self.kwargs)
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        raise ValueError(f"a forward never comes to {self.cut}.")

    def lower(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The activations at the cut: what the device computes and sends."""
        return _first(self._until_the_cut(pixel_values))

    def upper(self, activations: torch.Tensor) -> torch.Tensor:
        """The logits of activations: what the cloud computes."""
        rows = len(activations)
        returned = {name: _repeated(output, rows) for name, output in self._passed.items()}
        returned[self.cut] = _with_first(_repeated(self._at_cut, rows), activations)
        with _returning({self.model.get_submodule(name): output for name, output in returned.items()}):
            return self.model(pixel_values=_repeated(self._example, rows), **self.kwargs).logits

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        """Both halves, as the whole model."""
        return ImageClassifierOutput(logits=self.upper(self.lower(pixel_values)))

    def device_half(self) -> "DeviceHalf":
        """What lies on the device."""
        return DeviceHalf(self)


class DeviceHalf(nn.Module):
    """The modules of a [`SplitClassifier`] up to the cut: images `(batch, channels, height, width)`
    in, activations `(batch, ...)` out, and no other weights."""

    def __init__(self, split: SplitClassifier):
        super().__init__()
        names = [*split._passed, split.cut]
        self.parts = nn.ModuleDict({name.replace(".", "/"): split.model.get_submodule(name) for name in names})
        self._lower = split.lower

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The activations at the cut."""
        return self._lower(pixel_values)


class CloudHalf(nn.Module):
    """The other half, as a Trainer takes it: activations `(batch, ...)` and labels `(batch,)` in, loss and logits
    `(batch, classes)` out."""

    def __init__(self, split: SplitClassifier):
        super().__init__()
        self.split = split

    def forward(self, shared_features: torch.Tensor, labels: torch.Tensor) -> ImageClassifierOutput:
        """Cross-entropy of the upper half."""
        logits = self.split.upper(shared_features)
        return ImageClassifierOutput(loss=F.cross_entropy(logits.float(), labels), logits=logits)


@contextmanager
def _returning(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Modules whose forward is not run, but returns what is given for them."""
    before = {module: vars(module).get("forward") for module in outputs}
    for module, output in outputs.items():
        module.forward = partial(_constant, output)
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _constant(output: Any, *_args: Any, **_kwargs: Any) -> Any:
    return output


def _first(output: Any) -> torch.Tensor:
    first = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(first, torch.Tensor):
        raise ValueError("the module at the cut returns nothing that begins with a tensor: cut elsewhere.")
    return first


def _with_first(output: Any, activations: torch.Tensor) -> Any:
    if isinstance(output, torch.Tensor):
        return activations
    if isinstance(output, ModelOutput):
        first, *_ = output
        return type(output)(**{**output, first: activations})
    return type(output)((activations, *output[1:]))


def _repeated(output: Any, rows: int) -> Any:
    """The single row of each tensor, `rows` times, without memory for it."""
    if isinstance(output, ModelOutput):
        return type(output)(**{name: _repeated(value, rows) for name, value in output.items()})
    return tree_map(lambda t: t.expand(rows, *t.shape[1:]) if _has_one_row(t) else t, output)


def _has_one_row(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == 1


@dataclass(kw_only=True)
class SplitInference:
    """The cloud's classifier, cut: activations go up in the place of images.

    Args:
        cut (`str`): where, see [`SplitClassifier`]; a module of the task's model.
        learn (`bool`): before, send the activations and labels of the device's training images up once, and train the
            upper half on them and on the cloud's own. The lower half stays as it is, so that they remain right.
        branch (`str`): of the DC-CCL model, what is cut.
    """

    cut: str
    learn: bool = False
    branch: str = "cloud"
    kind: CollaborationClass = "feature"

    @property
    def name(self) -> str:
        """As it is called in a comparison."""
        return "split_learning" if self.learn else "split_inference"

    def train(self, task: CollaborationTask, meter: WireMeter, budget: DeviceBudget | None = None) -> Served:
        """See [`CollaborationMethod`]."""
        model = task.model()
        split = SplitClassifier(model, self.cut, task.example["pixel_values"], branch=self.branch)
        half = split.device_half()
        cost = budget.check(half, task.example) if budget else device_cost(half, task.example)
        meter.send(half.state_dict(), direction="down", user=DEVICE, what="lower half")
        if self.learn:
            self._learn(task, split, meter)
        model.eval()
        with torch.no_grad():
            requests = torch.cat([split.lower(rows) for rows in pixels_of(task.data.test).split(256)])
        logits = serve_through(meter, requests, split.upper, what="activations")
        return Served(logits=logits, cost=cost, cloud_calls=len(logits))

    @torch.no_grad()
    def _activations(self, split: SplitClassifier, dataset: Any) -> dict[str, torch.Tensor]:
        found = columns(dataset)
        split.model.eval()
        rows = [split.lower(images) for images in found["pixel_values"].split(256)]
        return {"shared_features": torch.cat(rows), "labels": found["labels"]}

    def _learn(self, task: CollaborationTask, split: SplitClassifier, meter: WireMeter) -> None:
        own = self._activations(split, task.data.device)
        sent = unpack(meter.send(own, direction="up", user=DEVICE, what="activations and labels"))[0]
        sides = [FeatureRows(**_as_rows(side)) for side in (self._activations(split, task.data.cloud), sent)]
        split.model.set_phase("teach")
        for parameter in split.device_half().parameters():
            parameter.requires_grad_(False)
        plan = task.plan
        args = task.all_rounds(plan.both()).arguments(task.args, seed=plan.seed_of("split", 0))
        run_trainer(Trainer(CloudHalf(split), args, train_dataset=ConcatDataset(sides)))


def _as_rows(side: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"features": side["shared_features"], "labels": side["labels"]}


__all__ = ["CloudHalf", "DeviceHalf", "SplitClassifier", "SplitInference"]
