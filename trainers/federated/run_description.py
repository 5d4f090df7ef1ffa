"""What a federated run must agree in to be gone on with: what was chosen, what it trains on, and on which base."""

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn


if TYPE_CHECKING:
    from .trainer import FederatedTrainer


SAMPLED = 64  # values of a frozen tensor


def description_of(trainer: "FederatedTrainer") -> dict[str, Any]:
    """JSON values, by the names that a user knows them under."""
    local, args, strategy = trainer.local, trainer.args, trainer.strategy
    availability = getattr(trainer.availability, "to_dict", lambda: None)()
    groups = [{key: value for key, value in group.items() if key not in ("params", "lr")}
              for group in local.optimizer.param_groups]  # fmt: skip
    return {
        "strategy": type(strategy).__name__,
        **{f"strategy.{name}": value for name, value in strategy.options().items()},
        "data": trainer.clients.fingerprint(),
        "frozen_parameters": _frozen(trainer.model),
        "availability": None if availability is None else _hash(repr(availability)),
        "submodels": str(trainer.submodels),
        "seed": local.seed,
        "batch_size": local.batch_size,
        "local_steps": local.local_steps,
        "local_epochs": local.local_epochs,
        "optim": str(args.optim.value),
        "optim_options": repr(groups),
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": str(args.lr_scheduler_type.value),
        "lr_scheduler_kwargs": repr(args.lr_scheduler_kwargs),
        "warmup_steps": args.warmup_steps,
        "max_grad_norm": local.max_grad_norm,
        "bf16": args.bf16,
        "parallelism": trainer.parallelism,
    }


def _frozen(model: nn.Module) -> str | None:
    """Hash of some values of each parameter that does not travel; `None` if all do."""
    frozen = [(name, p.detach()) for name, p in model.named_parameters() if not p.requires_grad]
    told = []
    for name, values in frozen:
        chosen = torch.linspace(0, max(values.numel() - 1, 0), min(SAMPLED, values.numel())).long()
        sampled = values.reshape(-1)[chosen.to(values.device)].double().tolist()
        told.append((name, str(values.dtype), tuple(values.shape), sampled))
    return _hash(repr(told)) if told else None


def _hash(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


__all__ = ["description_of"]
