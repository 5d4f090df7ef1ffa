"""One resumable Trainer run of the DOT-CBM recipes, with the paper's halving of the rate."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from ..reliability.checkpoints import find_last_valid_checkpoint
from ..report import write_text_atomically
from .language_model import require_writable, restore_weights, steady_seconds, train_and_save
from .training import build_trainer


logger = logging.get_logger(__name__)
RUN_NAME = "fit.json"
# What saving and Trainer note in a configuration: a repeated command meets that of the first.
_NOTED = ("transformers_version", "dtype", "use_cache")
# What says where a run is written and how it is watched, not what comes out.
_IGNORED = (
    *("dir", "log", "save", "report", "hub", "push", "resume", "eval", "disable_tqdm", "run_name", "trackio"),
    *("reliability", "dataloader_num_workers"),
)


@dataclasses.dataclass
class Run:
    """What a run came to. `parameters` are the trained ones; `train_seconds` those of optimizer steps in steady state,
    scaled to all steps."""

    name: str
    seed: int
    steps: int
    examples: int
    learning_rate: float
    train_seconds: float
    parameters: int
    history: list[dict]


def run_once(
    name: str,
    model: PreTrainedModel,
    rows: Callable[[], Dataset],
    args: TrainingArguments,
    *,
    key: str,
    collator: Callable | None = None,
    halve_every: float | None = None,
) -> Run:
    """
    Train what of `model` has `requires_grad` on `rows()` into `args.output_dir`, and leave it trained.

    Called again in the same folder with the same options it goes on from the last complete checkpoint, or, if the run
    was finished, only loads.

    Args:
        key: what decides the outcome beyond model and training arguments, the rows above all.
        halve_every: epochs after which the rate is halved, each time; None: what the arguments say.

    Raises:
        ValueError: the folder holds a run with other options.
    """
    folder = Path(args.output_dir)
    require_writable(folder)
    signature = _signature(model, args, f"{key} halved every {halve_every}")
    known = _finished(folder, signature)
    if known is not None:
        logger.info(f"{name}: finished before, loaded from {folder}")
        restore_weights(model, folder)
        return known
    data = rows()
    options = {} if halve_every is None else {"optimizers": stepwise_optimizer(model, args, len(data), halve_every)}
    args = dataclasses.replace(args, remove_unused_columns=False)
    trainer = build_trainer(model, args, train_dataset=data, data_collator=collator, **options)
    if trainer.is_world_process_zero():
        write_text_atomically(folder / RUN_NAME, json.dumps({"signature": signature}))
    checkpoint = args.resume_from_checkpoint or find_last_valid_checkpoint(folder)
    train_and_save(trainer, Path(checkpoint) if checkpoint else None)
    steps = trainer.state.global_step
    result = Run(
        name=name,
        seed=args.seed,
        steps=steps,
        examples=steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        learning_rate=args.learning_rate,
        train_seconds=steady_seconds(trainer.state.log_history, steps),
        parameters=model.num_parameters(only_trainable=True),
        history=trainer.state.log_history,
    )
    if trainer.is_world_process_zero():
        content = {"signature": signature, "fit": dataclasses.asdict(result)}
        write_text_atomically(folder / RUN_NAME, json.dumps(content, indent=1))
    trainer.accelerator.wait_for_everyone()
    return result


def stepwise_optimizer(
    model: PreTrainedModel, args: TrainingArguments, examples: int, halve_every: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW and StepLR(halve_every epochs, 0.5), as Trainer's `optimizers`: it steps schedules by optimizer step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps = max(1, round(halve_every * max(1, -(-examples // batch))))
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, steps, gamma=0.5)


def deciding_options(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that decide what comes out, less those that say where it goes and how it is watched."""
    return {k: v for k, v in args.to_sanitized_dict().items() if not any(word in k for word in _IGNORED)}


def _signature(model: PreTrainedModel, args: TrainingArguments, key: str) -> str:
    digest = hashlib.sha256(key.encode())
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOTED}
    if "architectures" in config:  # saving has noted them
        config["architectures"] = None
    digest.update(json.dumps([config, deciding_options(args)], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        digest.update(name.encode())
        digest.update(torch.cat((flat[:64], flat[-64:])).double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _finished(folder: Path, signature: str) -> Run | None:
    file = folder / RUN_NAME
    if not file.exists():
        if find_last_valid_checkpoint(folder) is not None:
            raise ValueError(f"{folder} holds checkpoints of another run. Choose another --output_dir, or delete it.")
        return None
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if content["signature"] != signature:
        raise ValueError(
            f"{folder} holds a run with other options (model, data or training arguments). To go on with that run "
            "give its options; to start anew choose another --output_dir, or delete the folder."
        )
    return Run(**content["fit"]) if "fit" in content else None


__all__ = ["Run", "deciding_options", "run_once", "stepwise_optimizer"]
