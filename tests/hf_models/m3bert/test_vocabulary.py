"""A trimmed vocabulary: the same tokens under other numbers, and the same outputs from them."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast, XLMRobertaTokenizer

from hf_models.m3bert import M3BertForMaskedLM, M3BertForSentenceEmbedding
from hf_models.m3bert.vocabulary import kept_token_ids, trim_vocabulary
from tests.hf_models.m3bert.tiny_m3bert import tiny


TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "der schnelle braune Fuchs springt über den faulen Hund",
    "le renard brun saute par-dessus le chien paresseux",
    "el veloz zorro marrón salta sobre el perro perezoso",
    "быстрая коричневая лиса прыгает через ленивую собаку",
    "敏捷的棕色狐狸跳过懒狗",
] * 3
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
NAMES |= {"cls_token": "<s>", "sep_token": "</s>"}


def as_fast(tokenizer, post_processor=None):
    tokenizer.post_processor = post_processor or processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, **NAMES)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=260, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, max_piece_length=6
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def xlm_roberta():
    vocabulary = json.loads(unigram().to_str())["model"]["vocab"]
    return XLMRobertaTokenizer(vocab=[tuple(piece) for piece in vocabulary if piece[0] != "<mask>"])


def byte_level_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return as_fast(tokenizer, processors.RobertaProcessing(("</s>", 2), ("<s>", 0)))


def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=260, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return as_fast(tokenizer)


TOKENIZERS = {
    "unigram": lambda: as_fast(unigram()),
    "xlm-roberta": xlm_roberta,
    "byte-level bpe": byte_level_bpe,
    "wordpiece": word_pieces,
}
BUILT = {name: build() for name, build in TOKENIZERS.items()}


def model_for(tokenizer, model_class=M3BertForMaskedLM, **fields):
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 96, "initializer_range": 0.2}
    return tiny(model_class, **shape | fields)


@pytest.mark.parametrize("characters", [True, False])
@pytest.mark.parametrize("name", BUILT)
def test_kept_tokens_give_the_same_bits(name, characters, tmp_path):
    tokenizer, kept_texts = BUILT[name], [TEXTS[0], TEXTS[4]]
    for fields in ({}, {"tie_word_embeddings": True}):
        model = model_for(tokenizer, **fields)
        before = model.state_dict()["model.embed_tokens.weight"].clone()
        smaller, trimmed = trim_vocabulary(model, tokenizer, kept_texts, keep_characters=characters)
        assert torch.equal(model.model.embed_tokens.weight, before) and len(tokenizer) == model.config.vocab_size
        assert len(trimmed) == smaller.config.vocab_size < model.config.vocab_size
        smaller.save_pretrained(tmp_path)
        trimmed.save_pretrained(tmp_path)
        smaller, trimmed = M3BertForMaskedLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        old = tokenizer.convert_tokens_to_ids(trimmed.convert_ids_to_tokens(range(len(trimmed))))
        assert old == sorted(old) == kept_token_ids(tokenizer, kept_texts, keep_characters=characters)
        for texts in (kept_texts, [kept_texts[1]], ["lazy fox", "собаку"]):
            a, b = (each(texts, return_tensors="pt", padding=True) for each in (tokenizer, trimmed))
            assert torch.equal(torch.tensor(old)[b["input_ids"]], a["input_ids"])
            assert tokenizer.batch_decode(a["input_ids"]) == trimmed.batch_decode(b["input_ids"])
            with torch.no_grad():
                ours, theirs = model(**a, output_hidden_states=True), smaller(**b, output_hidden_states=True)
            assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))
            assert torch.equal(ours.logits[..., old], theirs.logits)


@pytest.mark.parametrize("name", BUILT)
def test_special_tokens_stay_special(name):
    tokenizer = BUILT[name]
    smaller, trimmed = trim_vocabulary(model_for(tokenizer), tokenizer, ["fox"])
    assert trimmed.special_tokens_map == tokenizer.special_tokens_map
    assert set(trimmed.all_special_tokens) == set(tokenizer.all_special_tokens)
    assert trimmed.convert_ids_to_tokens(trimmed("fox")["input_ids"])[0] == "<s>"
    assert trimmed("fox <mask>")["input_ids"].count(trimmed.mask_token_id) == 1
    config = smaller.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (
        trimmed.pad_token_id,
        trimmed.bos_token_id,
        trimmed.eos_token_id,
    )
    assert smaller.model.embed_tokens.padding_idx == trimmed.pad_token_id
    assert trimmed.model_max_length == tokenizer.model_max_length


def test_ids_may_be_given_and_order_does_not_matter():
    tokenizer = BUILT["unigram"]
    ids = tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]
    assert kept_token_ids(tokenizer, ids[::-1]) == kept_token_ids(tokenizer, [TEXTS[1]])
    assert kept_token_ids(tokenizer, iter([*ids[:3], TEXTS[1]])) == kept_token_ids(tokenizer, [TEXTS[1]])


def test_characters_keep_other_texts_readable():
    for name, tokenizer in BUILT.items():
        for keep in (True, False):
            _, trimmed = trim_vocabulary(model_for(tokenizer), tokenizer, ["fox"], keep_characters=keep)
            unknown = trimmed.unk_token_id in trimmed(TEXTS[2])["input_ids"]
            assert unknown == (not keep and name != "byte-level bpe"), (name, keep)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(BUILT)), st.lists(st.text("foxdaklезсоб 狐狸", min_size=1, max_size=12), min_size=1))
def test_every_text_that_was_kept_is_cut_as_before(name, texts):
    tokenizer = BUILT[name]
    _, trimmed = trim_vocabulary(MODELS[name], tokenizer, texts, keep_characters=False)
    for text in texts:
        expected = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert trimmed.convert_ids_to_tokens(trimmed(text)["input_ids"]) == expected


def test_other_heads_and_cells():
    tokenizer = BUILT["xlm-roberta"]
    model = model_for(tokenizer, M3BertForSentenceEmbedding)
    smaller, trimmed = trim_vocabulary(model, tokenizer, TEXTS[:1])
    a, b = (each(TEXTS[:1], return_tensors="pt") for each in (tokenizer, trimmed))
    for cell in ({}, {"exit_layer": 2, "embed_dim": 8}):
        assert torch.equal(model(**a, **cell).embeddings, smaller(**b, **cell).embeddings)
    assert torch.equal(smaller.truncate(2, 8)(**b).embeddings, model(**a, exit_layer=2, embed_dim=8).embeddings)


def test_what_cannot_be_done_is_refused():
    tokenizer, model = BUILT["unigram"], MODELS["unigram"]
    shape = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    with pytest.raises(ValueError, match="BertModel is not an m3BERT"):
        trim_vocabulary(BertModel(BertConfig(**shape)), tokenizer, TEXTS)
    with pytest.raises(ValueError, match=r"no tokens \[9999\]"):
        trim_vocabulary(model, tokenizer, [9999])
    with pytest.raises(ValueError, match="do not fit together"):
        trim_vocabulary(tiny(M3BertForMaskedLM), tokenizer, TEXTS)
    with pytest.raises(ValueError, match="object is no tokenizer"):
        trim_vocabulary(model, object(), TEXTS)
    suffixed = Tokenizer(models.BPE(vocab={"a": 0, "b</w>": 1}, merges=[], end_of_word_suffix="</w>"))
    with pytest.raises(ValueError, match="end of words"):
        trim_vocabulary(model, PreTrainedTokenizerFast(tokenizer_object=suffixed), TEXTS)


MODELS = {name: model_for(tokenizer) for name, tokenizer in BUILT.items()}
