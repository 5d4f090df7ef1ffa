"""Concept texts through text encoders of every kind, tiny and random."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    SiglipTextConfig,
    SiglipTextModel,
)

from hf_models.dot_cbm import embed_concepts


TEXTS = ["red hat", "a very long red beard", "hat"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"vocab_size": 12, "max_position_embeddings": 16}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<unk>": 1, "red": 2, "hat": 3, "a": 4, "very": 5, "long": 6, "beard": 7, "photo": 8, "of": 9}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<unk>", "model_max_length": 16}
    return PreTrainedTokenizerFast(tokenizer_object=made, **options)


def clip_text(**fields):
    return CLIPTextConfig(**SIZES, projection_dim=8, eos_token_id=1, bos_token_id=1, pad_token_id=0, **fields)


def test_a_mean_pooling_encoder_gives_the_mean_of_the_tokens_that_are_not_padding():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).train()
    found = embed_concepts(TEXTS, model, tokenizer(), batch_size=2)
    assert model.training and found.shape == (3, 16) and found.dtype == torch.float32
    model.eval()
    for text, vector in zip(TEXTS, found, strict=True):
        states = model(**tokenizer()(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(vector, F.normalize(states.mean(0), dim=0), rtol=1e-4, atol=1e-5)
        first = embed_concepts([text], model, tokenizer(), pooling="cls")[0]
        torch.testing.assert_close(first, F.normalize(states[0], dim=0), rtol=1e-4, atol=1e-5)


def test_clip_gives_its_text_features():
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(text_config=clip_text().to_dict(), projection_dim=8)).eval()
    batch = tokenizer()(TEXTS, return_tensors="pt", padding=True)
    pooled = whole.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    torch.testing.assert_close(
        embed_concepts(TEXTS, whole, tokenizer()), F.normalize(whole.text_projection(pooled), dim=-1)
    )
    projected = CLIPTextModelWithProjection(clip_text()).eval()
    assert embed_concepts(TEXTS, projected, tokenizer()).shape == (3, 8)
    plain = CLIPTextModel(clip_text()).eval()
    assert embed_concepts(TEXTS, plain, tokenizer()).shape == (3, 16)
    pooled = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    torch.testing.assert_close(embed_concepts(TEXTS, plain, tokenizer()), F.normalize(pooled, dim=-1))


def test_siglip_s_texts_are_padded_to_their_whole_length():
    torch.manual_seed(0)
    model = SiglipTextModel(SiglipTextConfig(**SIZES, pad_token_id=0, projection_size=8)).eval()
    alone, together = (embed_concepts(texts, model, tokenizer())[0] for texts in (TEXTS[:1], TEXTS))
    torch.testing.assert_close(alone, together)


def test_a_prompt_is_put_around_every_text():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).eval()
    a = embed_concepts(["hat"], model, tokenizer(), prompt="a photo of a {}")
    torch.testing.assert_close(a, embed_concepts(["a photo of a hat"], model, tokenizer()))


def test_what_cannot_be_embedded_is_refused():
    model = BertModel(BertConfig(**SIZES), add_pooling_layer=False)
    with pytest.raises(ValueError, match="no concept texts"):
        embed_concepts([], model, tokenizer())
    with pytest.raises(ValueError, match="'max'"):
        embed_concepts(TEXTS, model, tokenizer(), pooling="max")
    with pytest.raises(ValueError, match="no pooled output"):
        embed_concepts(TEXTS, model, tokenizer(), pooling="pooler")
