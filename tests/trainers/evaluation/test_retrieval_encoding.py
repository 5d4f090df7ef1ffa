"""Embeddings of all exits in one pass against the models themselves, one text at a time."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from hf_models.m3bert import M3BertConfig, M3BertForMaskedLM, M3BertForSentenceEmbedding, M3BertModel
from trainers.data import train_encoder_tokenizer
from trainers.evaluation import encode_with, encoding_ms


TEXTS = ["a fox", "the quick brown fox jumps over the lazy dog", "", "dogs sleep", "a b c d e f g h i j k l m n o p"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(scope="module")
def tokenizer():
    return train_encoder_tokenizer(TEXTS * 4, vocab_size=290, show_progress=False)


def build_m3bert(kind, tokenizer, **changes):
    grid = {"mrl_layers": [1, 2, 3], "mrl_dims": [8, 32], "max_position_embeddings": 64}
    return kind(M3BertConfig(vocab_size=len(tokenizer), **SIZES, **grid, **changes))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", [M3BertForSentenceEmbedding, M3BertForMaskedLM, M3BertModel])
def test_every_head_of_m3bert_gives_the_exits_of_its_encoder(kind, pooling, tokenizer):
    model = build_m3bert(kind, tokenizer, pooling=pooling).train()
    found = encode_with(model, tokenizer, TEXTS, layers=(1, 3), batch_size=2)
    assert model.training and list(found) == [1, 3]
    embedder = M3BertForSentenceEmbedding(model.config).eval()
    embedder.model.load_state_dict(model.base_model.state_dict())
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            inputs = tokenizer(text, return_tensors="pt")
            exits = embedder(**inputs, output_exit_embeddings=True).exit_embeddings
        for layer in (1, 3):
            torch.testing.assert_close(found[layer][row], exits[layer - 1][0], atol=1e-5, rtol=1e-4)


def build_peer(name, tokenizer):
    size = {"vocab_size": len(tokenizer), "pad_token_id": 1, **SIZES}
    if name == "bert":
        return BertModel(BertConfig(**size))
    if name == "xlm-roberta":
        return XLMRobertaModel(XLMRobertaConfig(**size, max_position_embeddings=80))
    special = {"cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
    return ModernBertForMaskedLM(ModernBertConfig(**size, **special, max_position_embeddings=80))


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "modernbert"])
def test_a_peer_gives_the_mean_of_its_hidden_states(name, tokenizer):
    model = build_peer(name, tokenizer)
    found = encode_with(model, tokenizer, TEXTS, layers=(0, 2, 3), batch_size=3)
    model.eval()
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        for layer in (0, 2, 3):
            torch.testing.assert_close(found[layer][row], states[layer][0].mean(dim=0), atol=1e-5, rtol=1e-4)


def test_prompts_and_long_texts(tokenizer):
    model = build_m3bert(M3BertForSentenceEmbedding, tokenizer)
    prompted = encode_with(model, tokenizer, TEXTS, layers=[2], prompt="the ")
    written = encode_with(model, tokenizer, ["the " + text for text in TEXTS], layers=[2])
    torch.testing.assert_close(prompted[2], written[2])
    short = encode_with(model, tokenizer, [TEXTS[1], TEXTS[1] + " again and again" * 30], layers=[3], max_length=6)
    torch.testing.assert_close(short[3][0], short[3][1])


def test_half_precision_empty_texts_and_nothing_at_all(tokenizer):
    model = build_m3bert(M3BertForSentenceEmbedding, tokenizer).to(torch.bfloat16)
    found = encode_with(model, tokenizer, ["", "a fox"], layers=[3])
    assert found[3].dtype == torch.float32 and found[3].isfinite().all()
    bare = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    bare.backend_tokenizer.post_processor = None
    assert encode_with(model, bare, ["", ""], layers=[3])[3].isfinite().all()
    assert encode_with(model, tokenizer, [], layers=[1, 3])[3].shape == (0, 32)


def test_layers_that_there_are_not(tokenizer):
    model = build_m3bert(M3BertForSentenceEmbedding, tokenizer)
    for layers in ([4], [0], []):
        with pytest.raises(ValueError, match=r"M3BertForSentenceEmbedding gives \[1, 2, 3\]"):
            encode_with(model, tokenizer, TEXTS, layers=layers)
    with pytest.raises(ValueError, match=r"BertModel gives \[0, 1, 2, 3\]"):
        encode_with(build_peer("bert", tokenizer), tokenizer, TEXTS, layers=[4])


def test_times_of_the_exits(tokenizer):
    deep = {"num_hidden_layers": 12, "mrl_layers": [1, 12]}
    config = M3BertConfig(**SIZES | deep, vocab_size=len(tokenizer), mrl_dims=[32], max_position_embeddings=64)
    model = M3BertForSentenceEmbedding(config)
    times = encoding_ms(model, tokenizer, TEXTS, layers=(1, 12), repeats=5)
    assert 0 < times[1] < times[12] and model.training
    with pytest.raises(ValueError, match="cannot stop at a layer"):
        encoding_ms(build_peer("bert", tokenizer), tokenizer, TEXTS, layers=[1])
    with pytest.raises(ValueError, match="nothing to time"):
        encoding_ms(model, tokenizer, [], layers=[1])
