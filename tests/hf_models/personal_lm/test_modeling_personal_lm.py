"""Personal models on every kind of base: where the user's tokens stand, what reads them, padding, caches, saving."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from hf_models.personal_lm import PersonalLmConfig, PersonalLmForCausalLM, PersonalLmForSequenceClassification
from tests.hf_models.personal_lm.tiny_personal_lm import (
    BASES,
    DECODERS,
    VOCABULARY,
    WIDTH,
    base_config,
    classifier,
    draws,
    language_model,
    texts,
    tiny_config,
)


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4, "pad_token_id": 0}


# --- classification


@pytest.mark.parametrize("position", ["prefix", "suffix"])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.compatibility("Padding", method="personal_lm")
def test_left_and_right_padding_and_none_give_the_same_logits(kind, position):
    model = classifier(kind, user_token_position=position, num_user_tokens=2)
    right, left = (model(**texts(side), user_embeds=draws(tokens=2)).logits for side in ("right", "left"))
    torch.testing.assert_close(left, right, **CLOSE)
    alone = model(**texts(None), user_embeds=draws(tokens=2)[:1]).logits
    torch.testing.assert_close(alone, right[:1], **CLOSE)


@pytest.mark.parametrize("kind", DECODERS)
def test_by_hand_the_suffix_reads_the_user_token_and_the_prefix_the_text(kind):
    for position in ("suffix", "prefix"):
        model = classifier(kind, user_token_position=position)
        batch, drawn = texts(None), draws(1)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        whole = [embeds, drawn] if position == "suffix" else [drawn, embeds]
        states = model.model(inputs_embeds=torch.cat(whole, dim=1)).last_hidden_state
        expected = states[:, -1] @ model.classifier.weight.T
        torch.testing.assert_close(model(**batch, user_embeds=drawn).logits, expected, **CLOSE)


def test_an_encoder_decoder_reads_the_last_state_of_its_decoder():
    model, batch, drawn = classifier("t5"), texts(None), draws(1)
    embeds = torch.cat([model.get_input_embeddings()(batch["input_ids"]), drawn], dim=1)
    start = torch.zeros(1, 1, dtype=torch.long)
    states = model.model(inputs_embeds=embeds, decoder_input_ids=start).last_hidden_state
    torch.testing.assert_close(
        model(**batch, user_embeds=drawn).logits, states[:, -1] @ model.classifier.weight.T, **CLOSE
    )


@pytest.mark.parametrize("kind", BASES)
def test_without_a_draw_it_is_the_base_model_and_zeros_are_an_option(kind):
    model, batch = classifier(kind), texts("right")
    plain = model(**batch).logits
    torch.testing.assert_close(model(**texts("left")).logits, plain, **CLOSE)
    model.config.missing_user = "zero"
    zero = model(**batch).logits
    torch.testing.assert_close(zero, model(**batch, user_embeds=torch.zeros(2, 1, WIDTH)).logits)
    assert not torch.allclose(zero, plain, atol=1e-3)


@pytest.mark.parametrize("kind", BASES)
def test_a_draw_matters_gets_a_gradient_and_every_parameter_of_a_decoder_is_used(kind):
    model, drawn = classifier(kind), draws().requires_grad_()
    out = model(**texts("left"), user_embeds=drawn, labels=torch.tensor([0, 2]))
    out.loss.backward()
    assert out.loss.isfinite() and drawn.grad.abs().sum() > 0
    assert not torch.allclose(out.logits, model(**texts("left"), user_embeds=draws(seed=9)).logits, atol=1e-3)


def test_regression_and_several_labels_have_their_losses():
    model = classifier(num_labels=3, problem_type="multi_label_classification")
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    out = model(**texts(), user_embeds=draws(), labels=labels)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, labels)
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"user_embeds": draws(tokens=2)}, r"\(2, 2, 16\), the model reads \(2, 1, 16\)"),
        ({"user_embeds": draws(1)}, "one draw for each text"),
        ({"inputs_embeds": torch.zeros(2, 6, WIDTH)}, "either input_ids or inputs_embeds"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        classifier()(**texts(), **fields)


# --- causal language models


@pytest.mark.parametrize("kind", DECODERS)
def test_logits_and_loss_by_hand(kind):
    model, batch, drawn = language_model(kind), texts(None), draws(1, 2)
    embeds = torch.cat([drawn, model.get_input_embeddings()(batch["input_ids"])], dim=1)
    expected = model.model(inputs_embeds=embeds).logits  # (1, 2 + 6, vocabulary)
    out = model(**batch, user_embeds=drawn, labels=batch["input_ids"])
    torch.testing.assert_close(out.logits, expected[:, 2:], **CLOSE)
    by_hand = torch.nn.functional.cross_entropy(expected[0, 1:-1], batch["input_ids"][0])
    torch.testing.assert_close(out.loss, by_hand, **CLOSE)


@pytest.mark.parametrize("kind", DECODERS)
def test_padding_moves_no_logit_and_the_loss_ignores_the_user_s_places(kind):
    model, drawn = language_model(kind), draws(2, 2)
    found = {}
    for side in ("right", "left"):
        batch = texts(side)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        out = model(**batch, user_embeds=drawn, labels=labels)
        found[side] = out.loss, out.logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(found["left"], found["right"], **CLOSE)


def test_without_a_draw_logits_are_the_base_model_s():
    model, batch = language_model(), texts("right")
    torch.testing.assert_close(model(**batch).logits, model.model(**batch).logits, **CLOSE)
    assert model(**batch, labels=batch["input_ids"]).loss == model.model(**batch, labels=batch["input_ids"]).loss


def greedy(model, batch, drawn, steps):
    """Token by token, without a cache."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(steps):
        following = model(ids, mask, user_embeds=drawn).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
        mask = torch.cat([mask, torch.ones_like(following)], dim=1)
    return ids


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.compatibility("Greedy generation", method="personal_lm")
@pytest.mark.compatibility("Cache: dynamic", method="personal_lm")
def test_generation_with_a_cache_is_generation_without_one(kind):
    model, batch, drawn = language_model(kind), texts("left"), draws(2, 2)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = greedy(model, batch, drawn, 6)
    for use_cache in (True, False):
        out = model.generate(**batch, user_embeds=drawn, use_cache=use_cache, **options)
        assert torch.equal(out, expected)
    other = model.generate(**batch, user_embeds=draws(2, 2, seed=5), **options)
    assert not torch.equal(other, expected)


def test_left_and_right_padded_prompts_and_single_ones_continue_alike():
    model, drawn = language_model("llama"), draws(2, 2)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    left, right = (model.generate(**texts(side), user_embeds=drawn, **options)[:, -5:] for side in ("left", "right"))
    assert torch.equal(left, right)
    alone = model.generate(**texts(None), user_embeds=drawn[:1], **options)[:, -5:]
    assert torch.equal(alone[0], left[0])


@pytest.mark.compatibility("Beam search", method="personal_lm")
def test_beams_and_returned_sequences_share_their_request_s_draw():
    model, batch, drawn = language_model(), texts("left"), draws(2, 2)
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    out = model.generate(**batch, user_embeds=drawn, return_dict_in_generate=True, output_scores=True, **options)
    assert out.sequences.shape[0] == 4 and torch.equal(out.sequences[::2, :6], batch["input_ids"])
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        alone = model.generate(**one, user_embeds=drawn[row : row + 1], **options)
        assert torch.equal(alone[:, 6:], out.sequences[2 * row : 2 * row + 2, 6 : alone.shape[1]])


def test_lengths_count_the_prompt_and_a_configuration_is_used():
    model, batch, drawn = language_model(), texts("left"), draws(2, 2)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(**batch, user_embeds=drawn, max_length=9, **options).shape == (2, 9)
    given = GenerationConfig(max_length=9, **options)
    assert model.generate(**batch, user_embeds=drawn, generation_config=given).shape == (2, 9)
    assert given.max_length == 9, "the caller's configuration is left alone"
    assert model.generate(**batch, user_embeds=drawn, generation_config=given, max_length=8).shape == (2, 8)
    ends = list(range(5, VOCABULARY))
    least = GenerationConfig(max_length=12, min_length=12, do_sample=False, eos_token_id=ends, pad_token_id=0)
    assert model.generate(**batch, user_embeds=drawn, generation_config=least).shape == (2, 12)
    model.generation_config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert model.generate(**batch, user_embeds=drawn).shape == (2, 8)
    with pytest.raises(ValueError, match="position_ids with generate"):
        model.generate(**batch, user_embeds=drawn, position_ids=torch.arange(6)[None])


def test_a_filled_cache_continues_and_takes_no_second_draw():
    model, batch, drawn = language_model("llama"), texts(None), draws(1, 2)
    first = model(**batch, user_embeds=drawn, use_cache=True)
    following = first.logits[:, -1:].argmax(-1)
    mask = torch.ones(1, 2 + 6 + 1, dtype=torch.long)
    cached = model(following, mask, past_key_values=first.past_key_values, use_cache=True).logits[:, -1]
    longer = torch.cat([batch["input_ids"], following], dim=1)
    torch.testing.assert_close(cached, model(longer, user_embeds=drawn).logits[:, -1], **CLOSE)
    with pytest.raises(ValueError, match="filled cache"):
        model(following, mask, user_embeds=drawn, past_key_values=first.past_key_values)
    with pytest.raises(ValueError, match="covers 7 places, the cache and the new tokens have"):
        model(following, mask[:, :7], past_key_values=first.past_key_values)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_continues_on_its_own_cache(kind, side):
    """With the mask that anybody would give: ones for the user's tokens, the text's mask, ones for what is new."""
    model, batch, drawn, ones = language_model(kind), texts(side), draws(2, 2), torch.ones(2, 1, dtype=torch.long)
    first = model(**batch, user_embeds=drawn, use_cache=True)
    new = torch.tensor([[7], [9]])
    mask = torch.cat([ones, ones, batch["attention_mask"], ones], dim=1)
    positions = (mask.cumsum(1) - 1)[:, -1:]
    ids = torch.cat([batch["input_ids"], new], dim=1)
    expected = model(ids, torch.cat([batch["attention_mask"], ones], dim=1), user_embeds=drawn, use_cache=False).logits
    for given in ({}, {"position_ids": positions}):
        cache = copy.deepcopy(first.past_key_values)
        found = model(new, mask, past_key_values=cache, **given).logits
        torch.testing.assert_close(found[:, -1], expected[:, -1], **CLOSE)
    fresh = model(**batch, user_embeds=drawn, use_cache=False).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(first.logits[real], fresh[real], **CLOSE)


def test_a_base_without_positions_refuses_a_cache_of_texts_padded_on_the_left():
    model = PersonalLmForCausalLM(
        tiny_config(task="causal_lm", num_user_tokens=2, base_config={"model_type": "bloom", **BLOOM})
    ).eval()
    assert not model.base_takes("position_ids")
    assert model(**texts("left"), user_embeds=draws(2, 2)).past_key_values is None
    assert model(**texts("right"), user_embeds=draws(2, 2)).past_key_values is not None
    with pytest.raises(ValueError, match="cannot be told positions"):
        model(**texts("left"), user_embeds=draws(2, 2), use_cache=True)
    with pytest.raises(ValueError, match="use_cache=True with labels"):
        model(**texts(), user_embeds=draws(2, 2), labels=texts()["input_ids"], use_cache=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_to_keep_counts_the_text(side):
    model, batch, drawn = language_model("llama"), texts(side), draws(2, 2)
    for use_cache in (True, False):
        whole = model(**batch, user_embeds=drawn, use_cache=use_cache).logits
        for kept in (0, 1, 4):
            found = model(**batch, user_embeds=drawn, use_cache=use_cache, logits_to_keep=kept).logits
            assert torch.equal(found, whole[:, -kept:])
        places = torch.tensor([1, 3])
        found = model(**batch, user_embeds=drawn, use_cache=use_cache, logits_to_keep=places).logits
        assert torch.equal(found, whole[:, places])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_positions_of_the_text_make_room_for_the_user(kind):
    batch, positions = texts("right"), torch.arange(6)[None]
    speaking = language_model(kind)
    for use_cache in (True, False):
        plain, told = (
            speaking(**batch, user_embeds=draws(2, 2), use_cache=use_cache, **given).logits
            for given in ({}, {"position_ids": positions})
        )
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(told[real], plain[real], **CLOSE)
    model = classifier(kind)
    plain, told = (model(**batch, user_embeds=draws(), **given).logits for given in ({}, {"position_ids": positions}))
    torch.testing.assert_close(told, plain, **CLOSE)
    moved = model(**batch, user_embeds=draws(), position_ids=2 * positions).logits
    assert not torch.allclose(moved, plain, atol=1e-3)
    left = (texts("left")["attention_mask"].cumsum(1) - 1).clamp_min(0)
    torch.testing.assert_close(model(**texts("left"), user_embeds=draws(), position_ids=left).logits, plain, **CLOSE)


def test_token_types_are_passed_on_and_what_is_not_known_is_refused():
    model, batch = classifier("roberta", base_config=base_config("roberta") | {"type_vocab_size": 2}), texts("left")
    types = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    plain, zeros, typed = (
        model(**batch, user_embeds=draws(), **given).logits
        for given in ({}, {"token_type_ids": torch.zeros_like(types)}, {"token_type_ids": types})
    )
    torch.testing.assert_close(zeros, plain, **CLOSE)
    assert not torch.allclose(typed, plain, atol=1e-3)
    whole = torch.cat([model.get_input_embeddings()(batch["input_ids"][:1]), draws()[:1]], dim=1)
    by_hand = model.model(inputs_embeds=whole, token_type_ids=torch.tensor([[0, 0, 0, 1, 1, 1, 0]]))
    expected = by_hand.last_hidden_state[:, -1] @ model.classifier.weight.T
    torch.testing.assert_close(typed[:1], expected, **CLOSE)
    with pytest.raises(ValueError, match="llama takes no token_type_ids"):
        classifier("llama")(**texts(), user_embeds=draws(), token_type_ids=types)
    with pytest.raises(ValueError, match="t5 takes no position_ids"):
        classifier("t5")(**texts(), user_embeds=draws(), position_ids=types)
    with pytest.raises(TypeError, match="unexpected keyword argument 'user_embedding'"):
        classifier()(**texts(), user_embedding=draws())


# --- configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "causal_lm", "user_token_position": "suffix"}, "Choose 'prefix'"),
        ({"task": "causal_lm", "base_config": base_config("t5")}, "needs a decoder"),
        ({"task": "rank"}, "not known"),
        ({"num_user_tokens": 0}, "at least 1"),
        ({"user_token_position": "middle"}, "not known"),
        ({"base_config": {"n_embd": 8}}, "model_type"),
        ({"num_user_tokens": "two"}, "num_user_tokens"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_config(**fields)


def test_the_defaults_are_those_of_the_authors_code():
    first, second = PersonalLmConfig(), PersonalLmConfig(task="causal_lm")
    assert (first.num_user_tokens, first.user_token_position) == (1, "suffix")
    assert (second.num_user_tokens, second.user_token_position) == (5, "prefix")
    assert first.base_config.model_type == "gpt2" and first.hidden_size == 768


def test_a_classification_config_makes_no_language_model():
    with pytest.raises(ValueError, match="task='causal_lm'"):
        PersonalLmForCausalLM(tiny_config())


# --- saving, precision, and what else a transformers user relies on


@pytest.mark.parametrize("kind", ["gpt2", "t5", "qwen3"])
@pytest.mark.compatibility("Auto classes", method="personal_lm")
def test_save_and_load_through_the_auto_class(kind, tmp_path):
    model, batch, drawn = classifier(kind), texts(), draws()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is PersonalLmForSequenceClassification
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded(**batch, user_embeds=drawn).logits, model(**batch, user_embeds=drawn).logits)
    assert loaded.config.to_diff_dict()["base_config"]["vocab_size"] == VOCABULARY
    assert loaded.config.base_config.model_type == kind and loaded.config.num_labels == 3


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.compatibility("Auto classes", method="personal_lm")
def test_save_and_load_a_language_model(kind, tmp_path):
    model, batch, drawn = language_model(kind), texts(), draws(2, 2)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded(**batch, user_embeds=drawn).logits, model(**batch, user_embeds=drawn).logits)
    if loaded.model.config.tie_word_embeddings:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_a_resized_vocabulary_survives_saving(tmp_path):
    model = language_model()
    model.resize_token_embeddings(VOCABULARY + 7)
    model.save_pretrained(tmp_path)
    assert PersonalLmForCausalLM.from_pretrained(tmp_path).get_input_embeddings().num_embeddings == VOCABULARY + 7


@pytest.mark.parametrize("kind", ["gpt2", "t5", "llama"])
@pytest.mark.compatibility("bf16 inference", method="personal_lm")
def test_bf16(kind):
    model = classifier(kind).to(torch.bfloat16)
    out = model(**texts("left"), user_embeds=draws(), labels=torch.tensor([0, 1]))
    assert out.logits.dtype == torch.bfloat16 and out.loss.isfinite()
    if kind != "t5":
        assert (
            language_model(kind)
            .to(torch.bfloat16)
            .generate(**texts("left"), user_embeds=draws(2, 2), max_new_tokens=3, pad_token_id=0)
            .shape[1]
            > 6
        )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
@pytest.mark.compatibility("Gradient checkpointing", method="personal_lm")
def test_gradient_checkpointing_changes_no_gradient(kind):
    found = []
    for checkpointing in (False, True):
        model = classifier(kind).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if kind == "t5":
            model.eval()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**texts(), user_embeds=draws(), labels=torch.tensor([0, 1])).loss.backward()
        found.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_from_base_uses_a_loaded_model_and_saves_whole(tmp_path):
    torch.manual_seed(0)
    bases = {
        "cls": AutoModel.from_config(tiny_config("qwen3").base_config),
        "lm": AutoModelForCausalLM.from_config(tiny_config("qwen3").base_config),
    }
    wrapped = PersonalLmForSequenceClassification.from_base(bases["cls"], num_labels=4).eval()
    assert wrapped.model is bases["cls"] and wrapped.classifier.weight.abs().sum() > 0
    wrapped.save_pretrained(tmp_path / "cls")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cls")
    expected = wrapped(**texts(), user_embeds=draws()).logits
    assert expected.shape == (2, 4)
    torch.testing.assert_close(again(**texts(), user_embeds=draws()).logits, expected)
    speaking = PersonalLmForCausalLM.from_base(bases["lm"].to(torch.bfloat16), num_user_tokens=3)
    assert speaking(**texts(), user_embeds=draws(2, 3)).logits.dtype == torch.bfloat16


@pytest.mark.compatibility("LoRA inside the base and around the whole", method="personal_lm", library="peft")
def test_lora_inside_the_base_and_around_the_whole(tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    base = get_peft_model(AutoModel.from_config(tiny_config("llama").base_config), lora)
    inside = PersonalLmForSequenceClassification.from_base(base, num_labels=3)
    inside(**texts(), user_embeds=draws(), labels=torch.tensor([0, 1])).loss.backward()
    trained = {name for name, p in inside.named_parameters() if p.requires_grad}
    assert "classifier.weight" in trained and all("lora_" in name or "classifier" in name for name in trained)
    expected = inside.eval()(**texts(), user_embeds=draws()).logits
    inside.model = inside.model.merge_and_unload()
    inside.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**texts(), user_embeds=draws()).logits, expected, **CLOSE)
    around = get_peft_model(language_model("llama"), lora)
    around(**texts(), user_embeds=draws(2, 2), labels=texts()["input_ids"]).loss.backward()
    assert around.generate(**texts("left"), user_embeds=draws(2, 2), max_new_tokens=2, pad_token_id=0).shape == (2, 8)


def test_hidden_states_and_attentions_are_those_of_the_base():
    model = classifier("gpt2", base_config=base_config("gpt2") | {"attn_implementation": "eager"})
    model.model.set_attn_implementation("eager")
    out = model(**texts(), user_embeds=draws(), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and out.hidden_states[0].shape == (2, 7, WIDTH)
    assert out.attentions[0].shape == (2, 4, 7, 7)
