import pytest
from datasets import Dataset

from trainers.data import chat_examples, train_tokenizer


SHORT = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]
LONG = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "1 2 3 " * 40}]
LONG_QUESTION = [{"role": "user", "content": "1 2 3 " * 40}, {"role": "assistant", "content": "no"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two count 1 2 3"], vocab_size=261, show_progress=False)


@pytest.fixture
def dataset():
    return Dataset.from_dict({"messages": [SHORT, LONG, LONG_QUESTION], "source": ["short", "long", "question"]})


def spoken(tokenizer, example):
    return tokenizer.decode([token for token in example["labels"] if token != -100])


def test_labels_cover_the_assistant_only(tokenizer, dataset):
    (example,) = chat_examples(dataset.select([0]), tokenizer, sequence_length=128)
    assert spoken(tokenizer, example) == "1<|end|>2<|end|><|endoftext|>"
    assert tokenizer.decode(example["input_ids"]) == tokenizer.apply_chat_template(SHORT, tokenize=False)
    assert all(label in (-100, token) for token, label in zip(example["input_ids"], example["labels"]))


@pytest.mark.parametrize("streaming", [False, True])
def test_too_long(tokenizer, dataset, streaming):
    data = dataset.to_iterable_dataset() if streaming else dataset
    with pytest.raises(
        ValueError, match='long: 25[0-9] tokens are more than sequence_length=64.*"truncate" or "drop"'
    ):
        list(chat_examples(data, tokenizer, sequence_length=64))
    assert len(list(chat_examples(data, tokenizer, sequence_length=64, on_too_long="drop"))) == 1
    short, cut = chat_examples(data, tokenizer, sequence_length=64, on_too_long="truncate")
    assert len(cut["input_ids"]) == len(cut["labels"]) == 64
    assert spoken(tokenizer, short).startswith("1") and spoken(tokenizer, cut).startswith("1 2 3")


def test_rows_without_source_are_numbered(tokenizer, dataset):
    with pytest.raises(ValueError, match="row 1: "):
        chat_examples(dataset.select_columns("messages"), tokenizer, sequence_length=64)


def test_bad_input(tokenizer, dataset):
    with pytest.raises(ValueError, match="sequence_length=1"):
        chat_examples(dataset, tokenizer, sequence_length=1)
    with pytest.raises(ValueError, match="on_too_long='split'"):
        chat_examples(dataset, tokenizer, sequence_length=64, on_too_long="split")
    with pytest.raises(ValueError, match=r"messages_column='chat'.*\['messages', 'source'\]"):
        chat_examples(dataset, tokenizer, sequence_length=64, messages_column="chat")
    with pytest.raises(ValueError, match="none of 2 conversations fits sequence_length=64"):
        chat_examples(dataset.select([1, 2]), tokenizer, sequence_length=64, on_too_long="drop")
    with pytest.raises(ValueError, match="no assistant turn"):
        chat_examples(Dataset.from_dict({"messages": [SHORT[:1]]}), tokenizer, sequence_length=64)
    unmarked = train_tokenizer(["text"], vocab_size=261, show_progress=False)
    for template in (
        None,
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{% endif %}",
    ):
        unmarked.chat_template = template
        with pytest.raises(ValueError, match="marks no assistant turns"):
            chat_examples(dataset, unmarked, sequence_length=64)
