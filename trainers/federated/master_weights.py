"""Parameters as an optimizer steps them: themselves, or a float32 copy of those in bf16 or fp16.

A step of 1e-4 is lost on a bf16 weight of 1, and a difference of two bf16 numbers is a poor update. So local training
steps a copy in float32, of which the model sees the rounded values.
"""

from collections.abc import Mapping

import torch
from torch import nn


class MasterWeights:
    """Of the parameters that travel; `masters` are by name, in the order of the model."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = dict(parameters)
        self.masters = {
            name: p if p.dtype in (torch.float32, torch.float64) else nn.Parameter(p.detach().float())
            for name, p in parameters.items()
        }
        self._copies = [(p, self.masters[name]) for name, p in parameters.items() if p is not self.masters[name]]

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take these values, copied."""
        torch._foreach_copy_(list(self.masters.values()), [values[name] for name in self.masters])
        self.give_values()

    @torch.no_grad()
    def minus(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """How far the masters are from these values."""
        moved = torch._foreach_sub(list(self.masters.values()), [values[name] for name in self.masters])
        return dict(zip(self.masters, moved))

    def set_data(self, name: str, data: torch.Tensor) -> None:
        """Let parameter and master hold other memory, perhaps of another shape; no gradient may be there."""
        parameter, master = self.parameters[name], self.masters[name]
        if master is not parameter:
            master.data = data.to(master.dtype)
        parameter.data = data.to(parameter.dtype)

    def drop_gradient(self, name: str) -> None:
        """Forget it, on both sides."""
        self.parameters[name].grad = self.masters[name].grad = None

    def take_gradients(self) -> None:
        """From the model to the masters."""
        for parameter, master in self._copies:
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
            parameter.grad = None

    @torch.no_grad()
    def give_values(self) -> None:
        """From the masters to the model."""
        for parameter, master in self._copies:
            parameter.copy_(master)
