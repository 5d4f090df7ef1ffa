"""The peer: Sentence Transformers' Matryoshka2dLoss under its own trainer, on the same pairs in the same order."""

import random
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import Matryoshka2dLoss, MultipleNegativesRankingLoss
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from hf_models.m3bert import M3BertForSentenceEmbedding
from hf_models.m3bert.sentence_transformer import M3BertSentenceTransformer, save_for_sentence_transformers

from ..callbacks import install_callbacks
from ..callbacks.installation import add_to_log


# What both trainers know by the same name and must agree on.
SHARED = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "weight_decay"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "seed", "dataloader_drop_last"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "logging_steps", "disable_tqdm", "use_cpu", "bf16"),
)


class StepClock(TrainerCallback):
    """Log `throughput/step_seconds` as ThroughputCallback does, which cannot count the tokens of this library."""

    def __init__(self, warmup_steps: int = 5):
        self.warmup_steps, self.seconds, self.steps = warmup_steps, 0.0, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > self.warmup_steps:
            self.seconds, self.steps = self.seconds + time.perf_counter() - self.start, self.steps + 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}) and self.steps:
            add_to_log(state, logs, {"throughput/step_seconds": round(self.seconds / self.steps, 5)})
            self.seconds, self.steps = 0.0, 0


def in_order(dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    """Batches of the rows as they come; the library's own sampler shuffles."""
    return BatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


def train_matryoshka_2d(
    model: M3BertForSentenceEmbedding,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    args: TrainingArguments,
    *,
    dims: list[int],
    temperature: float,
    document_length: int,
) -> list[dict[str, Any]]:
    """Train `model` in place; the log history is returned.

    Every layer and every dim takes part in every step, as in the grid loss; the library's default draws one of each.
    Weights, distances between layers (KL) and the rest are its defaults. Layers are the trained exits, see
    `M3BertTransformer`.

    Args:
        pairs: `input_ids` of queries and `document_ids`, in the order of training; the library gets their text.
        args: `output_dir` and what `SHARED` names.
    """
    folder = Path(args.output_dir) / "sentence_transformer"
    save_for_sentence_transformers(model, tokenizer, folder)
    library_model = M3BertSentenceTransformer(str(folder), device=str(model.device))
    library_model.max_seq_length = document_length
    texts = {
        name: tokenizer.batch_decode(list(pairs[column]), skip_special_tokens=True)
        for name, column in (("anchor", "input_ids"), ("positive", "document_ids"))
    }
    loss = Matryoshka2dLoss(
        library_model,
        MultipleNegativesRankingLoss(library_model, scale=1 / temperature),
        list(reversed(dims)),
        n_layers_per_step=-1,
        n_dims_per_step=-1,
    )
    trainer = SentenceTransformerTrainer(
        model=library_model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(folder / "training"),
            save_strategy="no",
            report_to="none",
            batch_sampler=in_order,
            **{name: getattr(args, name) for name in SHARED},
        ),
        train_dataset=Dataset.from_dict(texts),
        loss=loss,
    )
    install_callbacks(trainer, StepClock())
    if args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    random.seed(args.seed)
    trainer.train()
    trained = library_model[0].model
    with torch.no_grad():
        model.base_model.load_state_dict(trained.base_model.state_dict())
    return trainer.state.log_history
