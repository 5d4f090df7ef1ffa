"""Text behind the interface of the comparison: what a cloud and a device write together, by the same columns.

Quality is that of the next token on text that was held out: of what is served, and of what the device could do alone.
Assisted generation serves the cloud's own greedy tokens, so its quality is the cloud's; what differs is what crosses
the wire, and how often the cloud is asked.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ..federated.core import WireMeter
from .budget import DeviceBudget, DeviceCost, device_cost
from .collaboration_drafting import draft_and_verify, drafter_of_fewer_experts, drafter_of_fewer_layers
from .collaboration_entries import CollaborationClass
from .collaboration_task import DEVICE, SERVING, wire_of


Drafter = Literal["experts", "layers"]


@dataclass(frozen=True, kw_only=True)
class GenerationTask:
    """What is to be written.

    Args:
        model: the cloud's trained causal LM, a copy for each method.
        texts (`torch.Tensor`): token ids that were held out, `(requests, length)`.
        prompt (`int`): how many tokens of each are the prompt; the next ones are what predictions are compared with.
        max_new_tokens (`int`): of each request.
    """

    model: Callable[[], PreTrainedModel]
    texts: torch.Tensor
    prompt: int = 16
    max_new_tokens: int = 24

    @cached_property
    def fingerprint(self) -> str:
        """Of the texts and of the cloud's model."""
        digest = hashlib.sha256(f"{self.prompt} {self.max_new_tokens}".encode())
        for tensor in (self.texts, *self.model().state_dict().values()):
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return f"sha256:{digest.hexdigest()[:16]}"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What users get: the sequences as served `(requests, prompt + new)`, the shares of held-out tokens that what is
    served and the device alone predict, what lies on the device, and the forwards of the cloud's model."""

    sequences: torch.Tensor
    accuracy: float
    device_accuracy: float | None
    cost: DeviceCost | None
    cloud_calls: int


@dataclass(kw_only=True)
class AssistedGeneration:
    """The device drafts with a part of the cloud's model, the cloud checks.

    Args:
        drafter (`str`): `"experts"`, with one active expert; `"layers"`, the first half of the layers.
        num_assistant_tokens (`int`): drafted for a call.
    """

    drafter: Drafter = "experts"
    num_assistant_tokens: int = 5
    kind: CollaborationClass | None = "feature"

    @property
    def name(self) -> str:
        """As it is called in a comparison."""
        return f"assisted_generation_fewer_{self.drafter}"

    def train(self, task: GenerationTask, meter: WireMeter, budget: DeviceBudget | None = None) -> Written:
        """Send the drafter, then serve every request; nothing is learned."""
        target = task.model().eval()
        drafter = _drafter(target, self.drafter)
        cost = _cost(drafter, task, budget)
        meter.send(drafter.state_dict(), direction="down", user=DEVICE, what="drafter")
        options = {"max_new_tokens": task.max_new_tokens, "eos_token_id": None}
        options |= {"num_assistant_tokens": self.num_assistant_tokens}
        found = [draft_and_verify(target, drafter, text[None, : task.prompt], meter, **options) for text in task.texts]
        return Written(
            sequences=torch.cat([one.sequences for one in found]),
            accuracy=next_token_accuracy(target, task),
            device_accuracy=next_token_accuracy(drafter, task),
            cost=cost,
            cloud_calls=sum(one.cloud_calls for one in found),
        )


@dataclass(kw_only=True)
class CloudGeneration:
    """The baseline: prompts go up, and what the cloud writes comes down."""

    kind: CollaborationClass | None = None
    name: str = "cloud_generation"

    def train(self, task: GenerationTask, meter: WireMeter, budget: DeviceBudget | None = None) -> Written:
        """Serve every request."""
        target = task.model().eval()
        sequences = _greedy(target, task)
        for sequence in sequences.int():
            meter.send({"tokens": sequence[: task.prompt]}, direction="up", user=DEVICE, what=SERVING)
            meter.send({"tokens": sequence[task.prompt :]}, direction="down", user=DEVICE, what=SERVING)
        return Written(
            sequences=sequences,
            accuracy=next_token_accuracy(target, task),
            device_accuracy=None,
            cost=None,
            cloud_calls=len(sequences) * task.max_new_tokens,
        )


@dataclass(kw_only=True)
class DeviceGeneration:
    """The baseline: the drafter alone, on the device."""

    drafter: Drafter = "experts"
    kind: CollaborationClass | None = None

    @property
    def name(self) -> str:
        """As it is called in a comparison."""
        return f"device_generation_fewer_{self.drafter}"

    def train(self, task: GenerationTask, meter: WireMeter, budget: DeviceBudget | None = None) -> Written:
        """Send the small model, then serve every request without the cloud."""
        drafter = _drafter(task.model().eval(), self.drafter)
        cost = _cost(drafter, task, budget)
        meter.send(drafter.state_dict(), direction="down", user=DEVICE, what="drafter")
        accuracy = next_token_accuracy(drafter, task)
        return Written(
            sequences=_greedy(drafter, task), accuracy=accuracy, device_accuracy=accuracy, cost=cost, cloud_calls=0
        )


@torch.no_grad()
def next_token_accuracy(model: PreTrainedModel, task: GenerationTask) -> float:
    """Share of the held-out tokens behind the prompts that are the model's most likely next one."""
    logits = model(input_ids=task.texts).logits[:, task.prompt - 1 : -1]
    return float((logits.argmax(-1) == task.texts[:, task.prompt :]).float().mean())


def written_as_json(written: Written, meter: WireMeter, task: GenerationTask) -> dict[str, Any]:
    """The columns that all classes are compared by; see [`as_json`] of the task of images."""
    cost = vars(written.cost) if written.cost else {}
    requests = len(task.texts)
    return {
        "served_accuracy": written.accuracy,
        "device_accuracy": written.device_accuracy,
        **wire_of(meter, requests),
        "cloud_calls_per_request": written.cloud_calls / requests,
        **{f"device_{name}": cost.get(name) for name in ("parameters", "bytes", "peak_bytes", "flops")},
    }


def _drafter(target: PreTrainedModel, kind: Drafter) -> PreTrainedModel:
    if kind == "experts":
        return drafter_of_fewer_experts(target, 1)
    return drafter_of_fewer_layers(target, max(1, target.config.get_text_config().num_hidden_layers // 2))


def _cost(drafter: PreTrainedModel, task: GenerationTask, budget: DeviceBudget | None) -> DeviceCost:
    example = {"input_ids": task.texts[:1, : task.prompt]}
    return budget.check(drafter, example) if budget else device_cost(drafter, example)


def _greedy(model: PreTrainedModel, task: GenerationTask) -> torch.Tensor:
    prompts = task.texts[:, : task.prompt]
    options = {"max_new_tokens": task.max_new_tokens, "do_sample": False, "eos_token_id": None}
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)


__all__ = [
    "AssistedGeneration",
    "CloudGeneration",
    "DeviceGeneration",
    "GenerationTask",
    "Written",
    "next_token_accuracy",
    "written_as_json",
]
