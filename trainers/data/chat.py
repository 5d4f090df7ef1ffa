"""From conversations to training examples whose loss covers the assistant's turns only."""

from functools import partial
from typing import Literal

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .documents import is_streaming, require_column
from .packing import IGNORE_INDEX


logger = logging.get_logger(__name__)

_FEATURES = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"))})


def chat_examples(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    on_too_long: Literal["error", "truncate", "drop"] = "error",
    num_proc: int | None = None,
    messages_column: str = "messages",
) -> Dataset | IterableDataset:
    """
    Render conversations with the tokenizer's chat template and mask everything but the assistant's turns.

    Args:
        dataset: a column of messages (dicts with `role` and `content`); `source`, if there, names them in errors.
        sequence_length: the longest example, in tokens; at least 2.
        on_too_long: "error" refuses a longer conversation, "truncate" cuts its end off, "drop" leaves it out.
        num_proc: processes (Dataset only).

    Returns:
        Columns `input_ids` and `labels` (-100 outside the assistant's turns): int64 lists, at most `sequence_length`
        long, unpadded (`DataCollatorForSeq2Seq` pads both). Conversations in which nothing is left to learn after
        truncation are left out; for a Dataset the number of those left out is logged.

    Raises:
        ValueError: `sequence_length` below 2, an unknown `on_too_long`, no such column, a chat template that is
            missing or does not mark the assistant's turns, a conversation that is too long or has no assistant turn,
            or (for a Dataset) no example left.
    """
    _check_arguments(tokenizer, sequence_length, on_too_long)
    require_column(dataset, messages_column, argument="messages_column")

    encode = partial(
        _encode,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        on_too_long=on_too_long,
        messages_column=messages_column,
    )
    if is_streaming(dataset):
        names = dataset.column_names or list(next(iter(dataset)))
        return dataset.map(
            encode, batched=True, batch_size=64, with_indices=True, remove_columns=names, features=_FEATURES
        )
    examples = dataset.map(
        encode,
        batched=True,
        with_indices=True,
        num_proc=num_proc,
        remove_columns=dataset.column_names,
        features=_FEATURES,
        desc="Applying the chat template",
    )
    if len(examples) == 0:
        raise ValueError(
            f"none of {len(dataset)} conversations fits sequence_length={sequence_length} with something to learn: "
            "give more data, or a larger sequence_length."
        )
    logger.info(f"{len(examples)} examples, {len(dataset) - len(examples)} conversations left out ({on_too_long})")
    return examples


def _check_arguments(tokenizer: PreTrainedTokenizerBase, sequence_length: int, on_too_long: str) -> None:
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length} must be at least 2: a token and the one to predict.")
    if on_too_long not in ("error", "truncate", "drop"):
        raise ValueError(f'on_too_long={on_too_long!r} must be "error", "truncate" or "drop".')
    template = tokenizer.chat_template
    if not template or "generation" not in str(template).replace("add_generation_prompt", ""):
        raise ValueError(
            "tokenizer.chat_template is missing or marks no assistant turns: put {% generation %} ... "
            "{% endgeneration %} around what the assistant says, or use train_tokenizer's template."
        )


def _encode(
    batch: dict[str, list],
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    on_too_long: str,
    messages_column: str,
) -> dict[str, list]:
    result = {"input_ids": [], "labels": []}
    names = batch.get("source") or [f"row {index}" for index in indices]
    for name, messages in zip(names, batch[messages_column]):
        encoded = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        if not any(mask):
            raise ValueError(
                f"{name}: no assistant turn to learn from; leave this conversation out, or correct its roles."
            )
        if len(ids) > sequence_length:
            if on_too_long == "error":
                raise ValueError(
                    f"{name}: {len(ids)} tokens are more than sequence_length={sequence_length}. Raise "
                    'sequence_length, or pass on_too_long="truncate" or "drop".'
                )
            if on_too_long == "drop":
                continue
            ids, mask = ids[:sequence_length], mask[:sequence_length]
            if not any(mask):
                continue
        result["input_ids"].append(ids)
        result["labels"].append([token if spoken else IGNORE_INDEX for token, spoken in zip(ids, mask)])
    return result
