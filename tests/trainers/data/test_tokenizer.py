import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trainers.data import load_tokenizer, train_encoder_tokenizer, train_tokenizer


TEXTS = [
    f"def function_{i}(value):\n    '''Return {i} times the value.'''\n    return {i} * value\n" for i in range(50)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300, model_max_length=64, show_progress=False)


@settings(deadline=None)
@given(text=st.text())
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["\tif x:\n\t\t  y  \r\n\n", " lead", "trail ", "👩‍👩‍👧 é é 日本", "<|end|> in text", "a . b , c ' s"]
)
def test_round_trip_of_what_others_clean_up(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_family_conventions(tokenizer):
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    names = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 64
    batch = tokenizer(["a", "def function"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"} and batch["attention_mask"][0][0] == 0


def test_deterministic_and_survives_saving(tokenizer, tmp_path):
    again = train_tokenizer(iter(TEXTS), vocab_size=300, show_progress=False)
    assert again.backend_tokenizer.to_str() == train_tokenizer(TEXTS, vocab_size=300).backend_tokenizer.to_str()
    assert again.get_vocab() == tokenizer.get_vocab() and len(tokenizer) == 300
    tokenizer.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.chat_template == tokenizer.chat_template
        assert (loaded.padding_side, loaded.model_max_length) == ("left", 64)
        assert loaded(TEXTS[0]) == tokenizer(TEXTS[0])


def test_chat_template_renders_the_family_format(tokenizer):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": " U\n"},
        {"role": "assistant", "content": "A"},
    ]
    head = "<|endoftext|><|system|>S<|end|><|user|> U\n<|end|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == head + "<|assistant|>A<|end|><|endoftext|>"
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == head + "<|assistant|>"
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False) == head + "<|endoftext|>"
    with pytest.raises(Exception, match="unknown role 'tool'"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_small_corpus_gives_fewer_tokens_and_says_so(caplog, monkeypatch):
    warnings = []
    monkeypatch.setattr("trainers.data.tokenizer.logger.warning", warnings.append)
    assert len(train_tokenizer(["abc"], vocab_size=3000, show_progress=False)) == 261
    assert "only 261 tokens" in warnings[0]


def test_bad_input(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="vocab_size=260 is below 261.*use 261 or more"):
        train_tokenizer(TEXTS, vocab_size=260)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(["", ""], vocab_size=300)
    with pytest.raises(OSError, match="--tokenizer_name"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    with pytest.raises(ValueError, match="files are missing.*--tokenizer_name"):
        load_tokenizer(tmp_path)
    without_eos = train_tokenizer(TEXTS, vocab_size=300, show_progress=False)
    without_eos.eos_token = None
    without_eos.save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path / "no_eos")


# --- encoders --------------------------------------------------------------------------------------------------------


def test_an_encoder_has_xlm_rs_special_ids_and_a_mask():
    tokenizer = train_encoder_tokenizer(["ein Text", "a text"] * 4, vocab_size=300, show_progress=False)
    ids = [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert ids == [0, 1, 2, 3] and tokenizer.mask_token_id == 4
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id) == (0, 2)
    one, two = tokenizer("a text").input_ids, tokenizer("a text", "ein").input_ids
    assert one[0] == 0 and one[-1] == 2 and two[: len(one)] == one and two[len(one)] == 2 and two[-1] == 2
    assert tokenizer.decode(one, skip_special_tokens=True) == "a text"
    batch = tokenizer(["a", "a longer text"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"} and batch["input_ids"][0][-1] == 1
    with pytest.raises(ValueError, match="below 261, which the 256 bytes and 5 special tokens take"):
        train_encoder_tokenizer(["a"], vocab_size=260)
