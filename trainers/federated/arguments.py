"""What `TrainingArguments` mean to clients, and what they cannot mean."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler

from ..optimizers import MSign
from .core import FederatedAlgorithm, FedLaAvg


Named = list[tuple[str, nn.Parameter]]


def check_arguments(args: TrainingArguments, strategy: FederatedAlgorithm, optimizer: type, options: dict) -> None:
    """`ValueError` for what federated training cannot do, with what to do instead."""
    problems = {
        "fp16 needs a loss scale that outlives a client: use bf16": args.fp16,
        "gradient_accumulation_steps: a local step is one batch, so raise per_device_train_batch_size":
            args.gradient_accumulation_steps > 1,
        "FSDP and DeepSpeed shard what clients exchange whole: use neither":
            bool(args.fsdp) or bool(args.deepspeed),
        "load_best_model_at_end: rounds are kept by save_total_limit, the last one is served":
            args.load_best_model_at_end,
        "max_steps: rounds= and local_steps= say how long to train": args.max_steps > 0,
        "torch_compile: compile the model yourself, if at all": args.torch_compile,
        "auto_find_batch_size: clients that took different batches would not be repeatable":
            args.auto_find_batch_size,
        "gradient checkpointing: call model.gradient_checkpointing_enable() yourself":
            getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False),
        "neftune_noise_alpha is not supported": args.neftune_noise_alpha is not None,
        "evaluation in 16 bits would leave the model in them: use bf16":
            args.bf16_full_eval or args.fp16_full_eval,
        "lr_scheduler_type='reduce_lr_on_plateau' needs a metric of every round":
            args.lr_scheduler_type == "reduce_lr_on_plateau",
        "several GPUs in one process: start one process a GPU, by accelerate launch": args.n_gpu > 1,
        "steps are rounds and there are no epochs: use the strategies 'steps' or 'no'":
            "epoch" in (args.eval_strategy, args.logging_strategy, args.save_strategy)
            or args.save_strategy == "best",
    }  # fmt: skip
    for problem, there in problems.items():
        if there:
            raise ValueError(f"FederatedTrainer cannot take these arguments: {problem}.")
    if isinstance(strategy, FedLaAvg) and (optimizer is not torch.optim.SGD or options.get("momentum")):
        raise ValueError(
            f"{type(strategy).__name__} adds up the gradients of plain SGD: give TrainingArguments(optim='sgd'), not "
            f"{args.optim!s}."
        )


def optimizer_maker(
    optimizer: type, options: dict[str, Any], weight_decay: float, decayed: list[str]
) -> Callable[[Named], torch.optim.Optimizer]:
    """What makes the clients' optimizer, with weight decay for the parameters of these names as `Trainer` has it."""
    if not issubclass(optimizer, torch.optim.Optimizer) or issubclass(optimizer, MSign):
        raise ValueError(
            f"{optimizer.__name__}: clients begin each round with a fresh optimizer of bare parameters, so that none "
            "can know the model or come to a period of steps, as MSign does. Give optim=, or an optimizer of torch."
        )
    if strange := {"params", "model", "optimizer_dict"} & options.keys():
        raise ValueError(f"optim: {optimizer.__name__} binds {sorted(strange)} to one run, clients have many.")

    if optimizer is torch.optim.SGD and "fused" not in options:
        options = options | {"fused": True}  # the same numbers; a CPU's default goes through the parameters in Python

    def make(named: Named) -> torch.optim.Optimizer:
        if not weight_decay:
            return optimizer([p for _, p in named], **options)
        groups = [
            {"params": [p for name, p in named if name in decayed], "weight_decay": weight_decay},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]
        return optimizer([group for group in groups if group["params"]], **options)

    return make


def rates(args: TrainingArguments, rounds: int) -> list[float]:
    """The clients' learning rate of each round: the schedule of the arguments, a round being a step of it."""
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(rounds),
        num_training_steps=rounds,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    found = []
    for _ in range(rounds):
        found.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return found


def speed(rounds: int, updates: int, seconds: float) -> dict[str, float]:
    """Of a run."""
    seconds = max(seconds, math.ulp(1.0))
    return {
        "train_runtime": seconds,
        "train_rounds_per_second": rounds / seconds,
        "train_client_updates_per_second": updates / seconds,
    }
