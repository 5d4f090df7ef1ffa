"""Expert parallelism in a recipe: the ranks own experts and exchange tokens; everything else is sharded by FSDP2."""

import os
import shutil
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState
from transformers import PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig


# What needs the model in one piece -> its value where it is not wanted.
_OF_WHOLE_MODELS = {"optimizer": "base", "reliability": "off", "load_best_model_at_end": False, "torch_compile": False}


def require_expert_parallel(size: int, num_experts: int, args: TrainingArguments) -> None:
    """Raise `ValueError`, with field and remedy, unless `num_experts` can be divided over `size` of the ranks and the
    run over them can be carried out."""
    ranks = PartialState().num_processes
    if size < 1 or ranks % size or num_experts % size:
        raise ValueError(
            f"expert_parallel_size={size} divides {num_experts} experts among {ranks} processes. Choose a number that "
            "divides both."
        )
    if "ep_size" not in DistributedConfig.__dataclass_fields__:
        raise ValueError(
            f"expert_parallel_size={size}: this transformers exchanges no tokens between ranks. Install a newer one."
        )
    if args.save_strategy != "no" and not args.save_only_model:
        raise ValueError(
            f"expert_parallel_size={size}: transformers' Trainer keeps no optimizer state of such a model, so the run "
            "cannot be resumed. Give --save_only_model true (or --save_strategy no) if that will do."
        )
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            f"expert_parallel_size={size} shards the model itself: leave --fsdp out, and launch without a config that "
            "has it."
        )
    for name, plain in _OF_WHOLE_MODELS.items():
        if (value := getattr(args, name, plain)) != plain:
            raise ValueError(
                f"expert_parallel_size={size}: --{name} {value} does not work with a model in parts. Leave it out."
            )


def divide_experts(model: PreTrainedModel, size: int, folder: Path) -> PreTrainedModel:
    """`model` with its experts divided among `size` ranks and everything else among all ranks; `model` itself is
    emptied (on the meta device).

    The weights pass through `folder`, which has to be on a disk that all nodes share and is removed again; each rank
    reads what is its own.
    """
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    model.to("meta")
    dist.barrier()
    sharding = DistributedConfig(fsdp_size=dist.get_world_size(), ep_size=size)
    divided = type(model).from_pretrained(
        folder,
        distributed_config=sharding,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        experts_implementation=model.config._experts_implementation,
    )
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return divided
