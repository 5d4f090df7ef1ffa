import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from trainers.data import pack_documents, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n"] * 4, vocab_size=270, show_progress=False)


def joined(tokenizer, texts):
    return [
        token
        for text in texts
        for token in [*tokenizer(text, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]
    ]


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(max_size=40), min_size=1, max_size=8),
    sequence_length=st.integers(2, 24),
    streaming=st.booleans(),
    respect_documents=st.booleans(),
)
def test_nothing_is_lost_but_the_tail(tokenizer, texts, sequence_length, streaming, respect_documents):
    stream = joined(tokenizer, texts)
    full = len(stream) // sequence_length
    dataset = Dataset.from_dict({"text": texts, "other": texts})
    if full == 0 and not streaming:
        with pytest.raises(ValueError, match=f"{len(stream)} tokens.*sequence_length={sequence_length}"):
            pack_documents(dataset, tokenizer, sequence_length=sequence_length)
        return
    blocks = list(
        pack_documents(
            dataset.to_iterable_dataset() if streaming else dataset,
            tokenizer,
            sequence_length=sequence_length,
            respect_documents=respect_documents,
        )
    )
    assert all(len(block["input_ids"]) == sequence_length for block in blocks)
    assert [token for block in blocks for token in block["input_ids"]] == stream[: full * sequence_length]
    if not respect_documents:
        assert all(set(block) == {"input_ids", "labels"} for block in blocks)
        assert all(block["labels"] == block["input_ids"] for block in blocks)


def test_position_ids_are_what_transformers_takes_for_packed_sequences(tokenizer):
    dataset = Dataset.from_dict({"text": ["ab", "", "a longer document than one block", "c"]})
    blocks = pack_documents(dataset, tokenizer, sequence_length=8, respect_documents=True).with_format("torch")
    ids, positions, labels = (blocks[:][name] for name in ("input_ids", "position_ids", "labels"))
    assert positions.dtype == ids.dtype == labels.dtype == torch.int64
    document = torch.zeros_like(ids)
    document[:, 1:] = (ids[:, :-1] == tokenizer.eos_token_id).cumsum(-1)
    assert torch.equal(find_packed_sequence_indices(positions), document)
    assert positions.max() < 8
    assert torch.equal(labels == -100, positions == 0)
    assert torch.equal(labels[positions > 0], ids[positions > 0])


def test_stream_and_dataset_give_the_same_blocks(tokenizer):
    dataset = Dataset.from_dict({"text": [f"text {i}\n" * i for i in range(30)]})
    for respect_documents in (False, True):
        kwargs = {"sequence_length": 16, "respect_documents": respect_documents}
        stream = pack_documents(dataset.to_iterable_dataset(), tokenizer, **kwargs)
        blocks = list(pack_documents(dataset, tokenizer, **kwargs))
        assert list(stream) == blocks == list(stream), "a second pass starts afresh"


def test_special_tokens_spelt_out_stay_text(tokenizer):
    dataset = Dataset.from_dict({"text": ["a<|endoftext|>b" * 4]})
    blocks = pack_documents(dataset, tokenizer, sequence_length=4)
    assert not any(tokenizer.eos_token_id in block["input_ids"] for block in blocks)


def test_workers_change_nothing(tokenizer):
    dataset = Dataset.from_dict({"text": [f"text {i}" for i in range(12)]})
    one, two = (pack_documents(dataset, tokenizer, sequence_length=8, num_proc=n) for n in (None, 2))
    assert one[:] == two[:]


def test_bad_input(tokenizer):
    dataset = Dataset.from_dict({"text": ["a"]})
    with pytest.raises(ValueError, match="sequence_length=1 must be at least 2"):
        pack_documents(dataset, tokenizer, sequence_length=1)
    with pytest.raises(ValueError, match=r"text_column='body'.*\['text'\]"):
        pack_documents(dataset, tokenizer, sequence_length=4, text_column="body")
    with pytest.raises(ValueError, match="no documents"):
        pack_documents(Dataset.from_dict({"text": []}), tokenizer, sequence_length=4)
