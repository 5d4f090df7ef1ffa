"""From documents to blocks of equal length, without padding and without losing a token but the last partial block."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .documents import is_streaming, require_column


logger = logging.get_logger(__name__)

# What transformers' losses skip.
IGNORE_INDEX = -100


def pack_documents(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    num_proc: int | None = None,
    text_column: str = "text",
    respect_documents: bool = False,
) -> Dataset | IterableDataset:
    """
    Tokenize documents, join them with an end-of-sequence token after each, and cut blocks of `sequence_length` tokens.

    A document longer than the rest of its block goes on in the next one. Only the tokens after the last full block are
    dropped; for a Dataset their number is logged. Special tokens spelt out in a document are encoded as plain text, so
    that an end-of-sequence id always is the end of a document.

    A stream is packed on the fly, in the order of its documents, and drops the tail of each of its passes.

    Args:
        sequence_length: at least 2; with 1 there would be nothing to predict.
        num_proc: processes for tokenizing (Dataset only).
        respect_documents: keep attention inside documents. Adds `position_ids` that restart at 0 with every document
            and every block, by which transformers recognises packed sequences where no `attention_mask` is given and
            no cache is used: call the model with `use_cache=False`. The first label of each document is -100, as in
            `DataCollatorWithFlattening`: nothing that it may attend to announces it.

    Returns:
        Columns `input_ids` and `labels`, with `respect_documents` also `position_ids`; int64 lists of length
        `sequence_length`. Labels equal the ids (models shift them) but for the exception above.

    Raises:
        ValueError: `sequence_length` below 2, no such column, a tokenizer without eos, or (for a Dataset) no text or
            too little to fill one block.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length} must be at least 2: a token and the one to predict.")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos_token to put between documents: set one, or use train_tokenizer.")
    require_column(dataset, text_column, argument="text_column")

    tokenize = partial(_tokenize, tokenizer=tokenizer, text_column=text_column)
    finish = partial(_finish, eos_token_id=tokenizer.eos_token_id, respect_documents=respect_documents)
    columns = ["input_ids", "labels"] + ["position_ids"] * respect_documents
    finished = {"function": finish, "batched": True, "features": Features({c: List(Value("int64")) for c in columns})}

    if is_streaming(dataset):
        names = dataset.column_names or list(next(iter(dataset)))
        documents = dataset.map(tokenize, batched=True, batch_size=64, remove_columns=names)
        cut = {"documents": documents, "sequence_length": sequence_length}
        return IterableDataset.from_generator(_cut, gen_kwargs=cut).map(**finished, batch_size=64)
    tokens = _joined(dataset, tokenize, num_proc, sequence_length)
    blocks = tokens.batch(sequence_length, drop_last_batch=True)
    logger.info(
        f"{len(blocks)} blocks of {sequence_length} tokens from {len(dataset)} documents; "
        f"{len(tokens) % sequence_length} of {len(tokens)} tokens dropped at the end"
    )
    return blocks.map(**finished, desc="Labelling")


def _joined(
    dataset: Dataset,
    tokenize: Callable[[dict[str, list]], dict[str, list]],
    num_proc: int | None,
    sequence_length: int,
) -> Dataset:
    """One row a token: a view on the Arrow buffer, which datasets itself then cuts into blocks."""
    if len(dataset) == 0:
        raise ValueError("dataset has no documents: there is nothing to pack.")
    documents = dataset.map(
        tokenize, batched=True, num_proc=num_proc, remove_columns=dataset.column_names, desc="Tokenizing"
    )
    tokens = documents.map(_flatten, batched=True, remove_columns=["input_ids"], desc="Joining")
    if len(tokens) < sequence_length:
        raise ValueError(
            f"dataset has {len(tokens)} tokens in {len(dataset)} documents, too few for one block of "
            f"sequence_length={sequence_length}: give more text, or a smaller sequence_length."
        )
    return tokens


def _tokenize(batch: dict[str, list], *, tokenizer: PreTrainedTokenizerBase, text_column: str) -> dict[str, list]:
    encoded = tokenizer(
        batch[text_column],
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a document may well be longer than the context
    )
    return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]}


def _flatten(batch: dict[str, list]) -> dict[str, np.ndarray]:
    return {"input_ids": np.concatenate([np.asarray(ids, dtype=np.int64) for ids in batch["input_ids"]])}


def _cut(documents: IterableDataset, sequence_length: int) -> Iterator[dict[str, list]]:
    pending = []
    for document in documents:
        pending += document["input_ids"]
        full = len(pending) - len(pending) % sequence_length
        for start in range(0, full, sequence_length):
            yield {"input_ids": pending[start : start + sequence_length]}
        del pending[:full]


def _finish(batch: dict[str, list], *, eos_token_id: int, respect_documents: bool) -> dict[str, list]:
    if not respect_documents:
        return {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    ids = np.asarray(batch["input_ids"])  # (blocks, sequence_length)
    starts = np.ones_like(ids, dtype=bool)
    starts[:, 1:] = ids[:, :-1] == eos_token_id
    index = np.arange(ids.shape[1])
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    labels = np.where(starts, IGNORE_INDEX, ids)
    # Lists: a stream would hand arrays on as they are, a Dataset would not.
    return {"input_ids": batch["input_ids"], "labels": labels.tolist(), "position_ids": positions.tolist()}
