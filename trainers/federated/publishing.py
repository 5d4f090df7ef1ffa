"""A federated model on a disk and on the Hub: what is served, a card, and nothing that says who the clients were."""

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi

from ..callbacks.background_upload import HUB_FILES


if TYPE_CHECKING:
    from .trainer import FederatedTrainer


CARD = "README.md"


def save_served(trainer: "FederatedTrainer", folder: str | os.PathLike) -> None:
    """The served model for `from_pretrained`, its tokenizer or processor, and in `block_<m>` the predictor of each
    block, where the algorithm has one; from the main process."""
    schedule = getattr(trainer.strategy, "schedule", None)
    for block in range(schedule.num_blocks if schedule else 0):
        trainer.serve(block)
        _save(trainer, Path(folder) / f"block_{block}")
    trainer.serve()
    _save(trainer, Path(folder))
    if trainer.args.should_save and trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()


def _save(trainer: "FederatedTrainer", folder: Path) -> None:
    if not trainer.args.should_save:
        return
    if not hasattr(trainer.model, "save_pretrained"):
        raise TypeError(f"{type(trainer.model).__name__} has no save_pretrained; use save_model.")
    trainer.model.save_pretrained(folder)


def push_model(
    trainer: "FederatedTrainer",
    *,
    commit_message: str,
    blocking: bool,
    token: str | None,
    revision: str | None,
    private: bool | None,
    card: dict[str, Any],
) -> CommitInfo | Any:
    """Upload the served model and a card, by a list of what may leave: rounds, logs with the names of clients, their
    memories and `training_args.bin`, which holds the token, stay."""
    token = token if token is not None else trainer.args.hub_token
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    with tempfile.TemporaryDirectory() as scratch:
        save_served(trainer, scratch)
        _require_no_paths(Path(scratch))
        if not trainer.is_world_process_zero():
            return None
        trainer.create_model_card(**card)
        text = (Path(trainer.args.output_dir) / CARD).read_text(encoding="utf-8")
        (Path(scratch) / CARD).write_text(text.rstrip() + "\n\n" + card_section(trainer), encoding="utf-8")
        uploaded = HfApi().upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=scratch,
            commit_message=commit_message,
            token=token,
            revision=revision if revision is not None else trainer.args.hub_revision,
            allow_patterns=[CARD, *HUB_FILES, *(f"block_*/{pattern}" for pattern in HUB_FILES)],
            run_as_future=not blocking,
        )
        return uploaded if blocking else uploaded.result() and uploaded


def _require_no_paths(folder: Path) -> None:
    """`ValueError` for an adapter on a model that lies in a folder here: nobody else could load it, and its path is
    nobody's business."""
    for file in folder.rglob("adapter_config.json"):
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if base and (os.path.isabs(base) or Path(base).exists()):
            raise ValueError(
                f"The adapter is on {Path(base).name!r}, a folder of this machine. Push that model first, and put its "
                "Hub id into model.peft_config['default'].base_model_name_or_path."
            )


def card_section(trainer: "FederatedTrainer") -> str:
    """How it was trained, for the card: counts alone."""
    history, totals = trainer.history, trainer.meter.totals()
    steps = trainer.local.local_steps or f"{trainer.local.local_epochs} epoch(s)"
    lines = [
        "## Federated training",
        "",
        f"Trained over {len(trainer.clients.names)} clients by `{type(trainer.strategy).__name__}` in {len(history)} "
        f"rounds, {steps} local steps of {trainer.local.batch_size} examples each.",
        "",
        "| | |",
        "|---|---|",
        f"| updates that counted | {sum(len(record['accepted']) for record in history)} |",
        f"| updates that were refused | {sum(len(record['rejected']) for record in history)} |",
        f"| bytes down | {totals['down']:,} |",
        f"| bytes up | {totals['up']:,} |",
        "",
    ]
    return "\n".join(lines)
