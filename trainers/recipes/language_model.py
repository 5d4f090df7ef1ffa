"""What recipes that train a language model share: text to blocks, a resumable run with Trainer, and what came out of
it."""

import dataclasses
import errno
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging

from ..callbacks import ProgressiveSparsificationCallback
from ..data import corpus_fingerprint, load_text_dataset, load_tokenizer, pack_documents, train_tokenizer
from ..evaluation import held_out_loss
from ..reliability.checkpoints import checkpoint_folders, find_last_valid_checkpoint
from ..report import write_text_atomically
from .arguments import DataArguments
from .expert_parallel import divide_experts
from .training import build_trainer, train


logger = logging.get_logger(__name__)
FIT_NAME = "fit.json"


@dataclasses.dataclass
class LanguageData:
    """Documents and blocks of a corpus, split by document. `train` blocks may be streamed."""

    documents: dict[str, Dataset | IterableDataset]
    train: Dataset | IterableDataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str


@dataclasses.dataclass
class Fit:
    """What one training run came to. Losses are held-out; `train_seconds` are those of optimizer steps in steady
    state, scaled to all steps, so that evaluation, saving, start-up and interruptions count for nobody."""

    name: str
    seed: int
    steps: int
    tokens: int
    learning_rate: float
    train_seconds: float
    nats_per_token: float
    bits_per_character: float
    parameters: int
    history: list[dict]

    def curve(self) -> tuple[list[int], list[float]]:
        """Tokens and held-out loss at each evaluation."""
        rows = [(row["step"], row["eval_loss"]) for row in self.history if "eval_loss" in row]
        return [step * self.tokens // self.steps for step, _ in rows], [loss for _, loss in rows]


def prepare_language_data(args: DataArguments, training_args: TrainingArguments) -> LanguageData:
    """Load the corpus by name, load or train its tokenizer, cut it into blocks. One process prepares, the others
    wait."""
    with training_args.main_process_first(desc="preparing the data"):
        documents = load_text_dataset(
            args.dataset_name,
            held_out_fraction=args.held_out_fraction,
            text_column=args.text_column,
            cache_dir=args.dataset_cache_dir,
            streaming=args.streaming,
            max_documents=args.max_documents,
            config_name=args.dataset_config_name,
            revision=args.dataset_revision,
        )
        if args.tokenizer_name is not None:
            tokenizer = load_tokenizer(args.tokenizer_name)
        else:
            tokenizer = train_tokenizer(
                (row["text"] for row in islice(documents["train"], args.tokenizer_max_documents)),
                vocab_size=args.tokenizer_vocab_size,
                model_max_length=args.sequence_length,
                show_progress=False,
            )
        blocks = {
            split: pack_documents(documents[split], tokenizer, sequence_length=args.sequence_length)
            for split in ("train", "validation")
        }
    validation = blocks["validation"]
    if isinstance(validation, IterableDataset):
        if args.max_eval_blocks is not None:
            validation = validation.take(args.max_eval_blocks)  # a stream may be far longer than what is wanted
        validation = Dataset.from_generator(lambda: iter(validation))
    if args.max_eval_blocks is not None and args.max_eval_blocks < len(validation):
        stride = len(validation) / args.max_eval_blocks
        validation = validation.select([int(i * stride) for i in range(args.max_eval_blocks)])
    return LanguageData(dict(documents), blocks["train"], validation, tokenizer, fingerprint_of(documents, args))


def fingerprint_of(documents: DatasetDict | IterableDatasetDict, args: DataArguments, *, column: str = "text") -> str:
    """The hash of the corpus; of a stream its name and revision, since reading it all would cost an epoch."""
    if args.streaming:
        return f"stream:{args.dataset_name}@{args.dataset_revision or 'unpinned'}"
    return corpus_fingerprint(documents, column=column)


def fit(
    name: str,
    model: PreTrainedModel,
    data: LanguageData,
    args: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    optimizer: tuple[type, dict] | None = None,
    expert_parallel_size: int = 1,
) -> Fit:
    """Train `model` into `args.output_dir` and leave it in its trained state; what came out is kept in `fit.json`.
    `optimizer`: Trainer's `optimizer_cls_and_kwargs`; by default what the arguments say. With `expert_parallel_size`
    above 1 a divided copy is trained, see `expert_parallel.py`, and `model` itself is emptied.

    Called again in the same folder with the same configuration it goes on from the last complete checkpoint, or, if
    the run was finished, only loads. Raises `ValueError` if the folder holds a run with another configuration.
    """
    folder = Path(args.output_dir)
    require_writable(folder)
    signature = signature_of(model, data, args, callbacks)
    known = _read_fit(folder, signature)
    if known is not None:
        logger.info(f"{name}: finished before, loaded from {folder}")
        restore_weights(model, folder)
        return known

    if divides := expert_parallel_size > 1:
        if begun := [args.resume_from_checkpoint or "", *checkpoint_folders(folder)][-1]:
            raise ValueError(
                f"{begun} cannot be gone on from with expert_parallel_size={expert_parallel_size}: transformers' "
                "Trainer keeps no optimizer state of such a model. Choose an empty --output_dir."
            )
    trainer = build_trainer(
        divide_experts(model, expert_parallel_size, folder / "start") if divides else model,
        args,
        callbacks,
        optimizer=optimizer,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=default_data_collator,
        processing_class=data.tokenizer,
    )
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / FIT_NAME, json.dumps({"signature": signature}))
    checkpoint = args.resume_from_checkpoint or _resumable(find_last_valid_checkpoint(folder))
    start = time.perf_counter()
    train_and_save(trainer, Path(checkpoint) if checkpoint else None)
    logger.info(f"{name}: {time.perf_counter() - start:.0f} s with evaluation and saving")

    result = _measured(name, trainer, data)
    if trainer.is_world_process_zero():
        write_text_atomically(
            folder / FIT_NAME, json.dumps({"signature": signature, "fit": dataclasses.asdict(result)}, indent=1)
        )
    return result


def _resumable(checkpoint: Path | None) -> Path | None:
    """`checkpoint`, if it has an optimizer's state: without one Trainer would go on as if it had just begun."""
    if checkpoint is not None and not any(checkpoint.glob("optimizer*")) and not any(checkpoint.glob("global_step*")):
        raise ValueError(
            f"{checkpoint} holds no optimizer state (--save_only_model), so the run cannot be gone on from it. Choose "
            "an empty --output_dir; or start from these weights on purpose: --resume_from_checkpoint."
        )
    return checkpoint


def _measured(name: str, trainer: Trainer, data: LanguageData) -> Fit:
    """What a run came to, with its held-out loss."""
    args = trainer.args
    held_out = held_out_loss(
        trainer.model, data.validation, data.tokenizer, batch_size=args.per_device_eval_batch_size
    )
    sequence_length = len(data.validation[0]["input_ids"])
    tokens = trainer.state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens *= sequence_length
    return Fit(
        name=name,
        seed=args.seed,
        steps=trainer.state.global_step,
        tokens=tokens,
        learning_rate=args.learning_rate,
        train_seconds=steady_seconds(trainer.state.log_history, trainer.state.global_step),
        nats_per_token=held_out.nats_per_token,
        bits_per_character=held_out.bits_per_character,
        parameters=trainer.model.num_parameters(),
        history=trainer.state.log_history,
    )


def train_and_save(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train from `checkpoint` on. `OSError` with the remedy where the disk is the reason that it ends early."""
    over = False
    if checkpoint is not None and any(checkpoint.glob("*.safetensors")):
        # Trainer passes over tensors whose names the model does not have. Qwen3-MoE's files hold one tensor per expert
        # matrix, the model one for all experts, which would go back to their initialisation.
        restore_weights(trainer.model, checkpoint)
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        over = state.global_step >= state.max_steps > 0
    try:
        if over:
            # Killed between the last checkpoint and the end of the run: Trainer would make one more step.
            trainer.state = state
        else:
            train(trainer, checkpoint)
        trainer.save_model()
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_about_the_disk(error):
            raise
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"Saving after step {trainer.state.global_step} failed ({error}); earlier checkpoints are untouched. Free "
            "space on the disk, then the same command goes on from the last complete one",
            trainer.args.output_dir,
        ) from error


def require_writable(folder: Path) -> None:
    """Fail before the work where its results could not be saved. `OSError` that names the remedy."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"Cannot write there ({reason}); choose an --output_dir that you may write to", str(folder)
        ) from error


def _is_about_the_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
    # torch.save has no error of its own: a failed write, then an archive of the wrong length when it is closed.
    told_by_torch = "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
    return isinstance(error, SafetensorError) or told_by_torch


def steady_seconds(history: list[dict], steps: int) -> float:
    """Seconds of all optimizer steps at the logged steady rate; the log survives a resume, a stopwatch does not."""
    seconds = covered = previous = 0
    for row in history:
        if "loss" in row:
            if "throughput/step_seconds" in row:
                seconds += row["throughput/step_seconds"] * (row["step"] - previous)
                covered += row["step"] - previous
            previous = row["step"]
    return seconds / covered * steps if covered else 0.0


def restore_weights(model: PreTrainedModel, folder: Path) -> None:
    """Give `model` the weights that are saved in `folder`, and the numbers of active experts that were in force."""
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    if hasattr(model, "set_experts_per_token"):
        model.set_experts_per_token(saved.config.num_experts_per_tok_per_layer or saved.config.num_experts_per_tok)


def signature_of(
    model: PreTrainedModel, data: LanguageData, args: TrainingArguments, callbacks: Sequence[TrainerCallback]
) -> str:
    """Hash of what decides the outcome of a run: model and the weights that it starts from, schedule, data,
    optimisation. Where it is written and how often it logs does not."""
    ignored = (
        "dir",
        "log",
        "save",
        "report",
        "hub",
        "push",
        "resume",
        "eval_s",
        "disable_tqdm",
        "run_name",
        "trackio",
        "reliability",
    )
    options = {k: v for k, v in args.to_sanitized_dict().items() if not any(word in k for word in ignored)}
    schedules = [(c.unit, c.stages) for c in callbacks if isinstance(c, ProgressiveSparsificationCallback)]
    # The fingerprint knows neither the split nor the tokenizer nor the cut; the first blocks know all three.
    blocks = [next(iter(split))["input_ids"] for split in (data.train, data.validation)]
    blocks.append([len(data.validation)] + ([] if isinstance(data.train, IterableDataset) else [len(data.train)]))
    parts = {
        "model": {k: v for k, v in model.config.to_dict().items() if k != "transformers_version"},
        "start": _start_of(model),
        "schedules": schedules,
        "data": [data.fingerprint, blocks],
        "args": options,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _start_of(model: PreTrainedModel) -> str:
    """Hash of both ends of every tensor: a config does not say what a model was grown from, or with how much noise."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        digest.update(name.encode())
        digest.update(torch.cat((flat[:64], flat[-64:])).double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _read_fit(folder: Path, signature: str) -> Fit | None:
    file = folder / FIT_NAME
    if not file.exists():
        if find_last_valid_checkpoint(folder) is not None:
            raise ValueError(f"{folder} holds checkpoints of another run. Choose another --output_dir, or delete it.")
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["signature"] != signature:
        raise ValueError(
            f"{folder} holds a run with other options (model, data or training arguments). To go on with that run "
            "give its "
            "options; to start anew choose another --output_dir, or delete the folder."
        )
    return Fit(**content["fit"]) if "fit" in content else None
