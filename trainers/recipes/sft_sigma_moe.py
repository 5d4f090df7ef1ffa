"""Post-train Sigma-MoE on conversations, with a longer context if wanted (Sigma-MoE-Tiny, arXiv 2512.16248).

    accelerate launch -m trainers.recipes.sft_sigma_moe --model_name_or_path runs/demo --output_dir runs/demo-chat

The loss covers the assistant's turns, rendered by the tokenizer's chat template (the family's, if the tokenizer was
trained here). Without `--dataset_name`, conversations are made out of the standard library's documented functions. A
context-extension stage is the same command with a longer `--sequence_length` and a larger `--rope_theta`; the report
extends the context in stages, but neither their lengths nor their bases were seen: the preset's values are ours.
"""

import dataclasses
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from hf_models.moe import SigmaMoeConfig

from ..callbacks import ExpertBalanceCallback
from ..data import chat_examples, load_chat_dataset, load_tokenizer
from ..data.tokenizer import END_OF_TURN
from ..redaction import command_line
from ..reliability.checkpoints import find_last_valid_checkpoint
from ..report import Metric, Results, Sample, collect_versions, device_name, write_results
from .arguments import DataArguments, RecipeTrainingArguments, parse_arguments
from .description import describe_data, describe_model
from .language_model import fingerprint_of, require_writable, train_and_save
from .moe_family import OPTIMIZER
from .training import build_trainer


@dataclasses.dataclass
class SftArguments:
    """The model, and what to do with long conversations."""

    model_name_or_path: str = dataclasses.field(metadata={"help": "Folder or Hub id of a Sigma-MoE model."})
    rope_theta: float | None = dataclasses.field(
        default=None, metadata={"help": "Base of the rotary embedding for a longer context; default: the model's."}
    )
    on_too_long: str = dataclasses.field(default="drop", metadata={"help": "error, truncate or drop."})
    messages_column: str = "messages"


PRESETS = {
    "demo": OPTIMIZER
    | {
        "model_name_or_path": "runs/demo",
        "output_dir": "runs/demo-chat",
        "sequence_length": 512,
        "rope_theta": 40_000.0,
        "dataset_license": "PSF-2.0",
        "dataset_language": "code",
        "per_device_train_batch_size": 4,
        "max_steps": 300,
        "learning_rate": 1e-3,
        "warmup_steps": 20,
        "lr_scheduler_kwargs": {"num_decay_steps": 200, "min_lr_ratio": 0.05},
        "logging_steps": 10,
        "save_steps": 100,
        "save_total_limit": 2,
        "report_to": ["tensorboard"],
    },
    "paper": OPTIMIZER
    | {
        "model_name_or_path": "runs/sigma-moe-tiny",
        "output_dir": "runs/sigma-moe-tiny-chat",
        "sequence_length": 16_384,
        "rope_theta": 1_000_000.0,
        "streaming": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "gradient_checkpointing": True,
        "bf16": True,
        "max_steps": 4000,
        "learning_rate": 2e-5,
        "warmup_steps": 100,
        "lr_scheduler_kwargs": {"num_decay_steps": 1000, "min_lr_ratio": 0.1},
        "logging_steps": 10,
        "save_steps": 200,
        "save_total_limit": 3,
        "report_to": ["tensorboard"],
    },
}


def load_for_context(path: str, sequence_length: int, rope_theta: float | None) -> PreTrainedModel:
    """The model with room for `sequence_length` tokens. `ValueError` if it has no room and no `rope_theta`."""
    config = AutoConfig.from_pretrained(path)
    if not isinstance(config, SigmaMoeConfig):
        raise ValueError(f"{path} is a {config.model_type!r} model; this recipe trains 'sigma_moe' models.")
    known = config.max_position_embeddings
    if sequence_length > known and rope_theta is None:
        raise ValueError(
            f"sequence_length={sequence_length} is longer than the model's max_position_embeddings={known}. Give "
            f"--rope_theta (now {config.rope_parameters['rope_theta']:g}; a larger base stretches the context), or a "
            "shorter --sequence_length."
        )
    config.max_position_embeddings = max(known, sequence_length)
    if rope_theta is not None:
        config.rope_parameters = {**config.rope_parameters, "rope_theta": rope_theta}
    return AutoModelForCausalLM.from_pretrained(path, config=config)


def prepare_chat_data(
    args: SftArguments, data_args: DataArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[DatasetDict | IterableDatasetDict, dict[str, Dataset | IterableDataset]]:
    """Conversations by name, split, and the examples made of each split."""
    with training_args.main_process_first(desc="preparing the data"):
        conversations = load_chat_dataset(
            data_args.dataset_name,
            held_out_fraction=data_args.held_out_fraction,
            messages_column=args.messages_column,
            cache_dir=data_args.dataset_cache_dir,
            streaming=data_args.streaming,
            max_documents=data_args.max_documents,
            config_name=data_args.dataset_config_name,
            revision=data_args.dataset_revision,
        )
        examples = {
            split: chat_examples(
                conversations[split],
                tokenizer,
                sequence_length=data_args.sequence_length,
                on_too_long=args.on_too_long,
            )
            for split in ("train", "validation")
        }
    return conversations, examples


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A chat model stops at the end of its turn, not only at the end of the document."""
    ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)}
    return sorted(ids - {None, tokenizer.unk_token_id})


def post_train(preset: str, args: SftArguments, data_args: DataArguments, training_args: TrainingArguments) -> Path:
    """Train, measure before and after, and write model, tokenizer and `results.json`; the run folder is returned."""
    start, folder = time.perf_counter(), Path(training_args.output_dir)
    require_writable(folder)
    tokenizer = load_tokenizer(data_args.tokenizer_name or args.model_name_or_path)
    tokenizer.model_max_length = data_args.sequence_length
    model = load_for_context(args.model_name_or_path, data_args.sequence_length, args.rope_theta)
    conversations, examples = prepare_chat_data(args, data_args, training_args, tokenizer)
    model.generation_config.eos_token_id = stop_tokens(tokenizer)
    trainer = build_trainer(
        model,
        training_args,
        [ExpertBalanceCallback()],
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=None, label_pad_token_id=-100, pad_to_multiple_of=8),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    checkpoint = training_args.resume_from_checkpoint or find_last_valid_checkpoint(folder)
    train_and_save(trainer, Path(checkpoint) if checkpoint else None)
    after = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        base = _hub_id(args.model_name_or_path)
        results = Results(
            method="sigma_moe",
            title="Sigma-MoE, post-trained",
            preset=preset,
            seeds=[training_args.seed],
            command=command_line(),
            device=device_name(),
            versions=collect_versions(),
            wall_seconds=time.perf_counter() - start,
            metrics={
                "held_out_assistant_loss": Metric(
                    value=after,
                    unit="nats/token",
                    higher_is_better=False,
                    note="tokens of the assistant's turns in held-out conversations, mean over batches",
                    baseline={"before_post_training": Metric(value=before, unit="nats/token")},
                )
            },
            evidence={
                "steps": trainer.state.global_step,
                "sequence_length": data_args.sequence_length,
                "rope_theta": model.config.rope_parameters["rope_theta"],
                "learning_rate": training_args.learning_rate,
                "continued_from": base or Path(args.model_name_or_path).resolve().name,
            },
            data=describe_data(
                data_args,
                fingerprint_of(conversations, data_args, column="messages"),
                "conversations; loss on the assistant's turns only",
            ),
            model=dataclasses.replace(describe_model(model), base=base),
            samples=_samples(model, tokenizer, conversations["validation"]),
        )
        write_results(folder, results)
        print(f"\nassistant loss {before:.3f} -> {after:.3f} nats/token; model, tokenizer and results in {folder}/")
    return folder


def _hub_id(path: str) -> str | None:
    return None if Path(path).exists() else path


@torch.no_grad()
def _samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations, number: int = 3
) -> list[Sample]:
    samples = []
    model.eval()
    for row in conversations.take(number):
        asked = [message for message in row["messages"] if message["role"] != "assistant"]
        inputs = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs = inputs.to(model.device)
        out = model.generate(**inputs, max_new_tokens=96, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        samples.append(Sample(prompt=asked[-1]["content"], completion=tokenizer.decode(out, skip_special_tokens=True)))
    return samples


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (SftArguments, DataArguments, RecipeTrainingArguments)
    preset, (args, data_args, training_args) = parse_arguments(types, PRESETS, argv, default_preset="demo")
    try:
        post_train(preset, args, data_args, training_args)
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command goes on from the last checkpoint in {training_args.output_dir}.")
        sys.exit(130)


if __name__ == "__main__":
    main()
