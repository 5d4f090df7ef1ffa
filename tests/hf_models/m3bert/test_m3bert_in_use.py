"""What users do with the classes beyond calling them: Trainer's accumulation, adapters, freezing, odd inputs."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_models.m3bert import (
    M3BertForMaskedLM,
    M3BertForSentenceEmbedding,
    M3BertForSequenceClassification,
    M3BertForTokenClassification,
    M3BertModel,
)
from tests.hf_models.m3bert.tiny_m3bert import IDS, tiny


@pytest.mark.parametrize(
    ("kind", "shape"), [(M3BertForSequenceClassification, ()), (M3BertForTokenClassification, IDS.shape[1:])]
)
def test_the_loss_of_a_step_does_not_depend_on_accumulation(kind, shape, tmp_path):
    rows = [{"input_ids": IDS[0], "labels": torch.full(shape, number % 2)} for number in range(4)]
    losses = []
    for batch, accumulation in ((4, 1), (1, 4)):
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(tiny(kind, attention_dropout=0.0, embedding_dropout=0.0), args, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        [row] = [row for row in trainer.state.log_history if "loss" in row]
        losses.append((row["loss"], row["grad_norm"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("target", ["dense", "decoder"])
@pytest.mark.compatibility(
    "LoRA on attention", method="m3bert", library="peft", note="none on the head, which is trained whole or not at all"
)
def test_an_adapter_on_the_head_is_refused_and_the_whole_head_can_be_trained(target):
    labels = {"input_ids": IDS, "labels": IDS}
    model = get_peft_model(tiny(M3BertForMaskedLM), LoraConfig(r=2, target_modules=["q_proj", target]))
    with pytest.raises(ValueError, match=r"modules_to_save=\['head'\]"):
        model(**labels)
    model = get_peft_model(
        tiny(M3BertForMaskedLM), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"])
    )
    model.train()(**labels).loss.backward()
    trained = {name: p.grad is not None for name, p in model.named_parameters() if p.requires_grad}
    assert (
        all(trained.values())
        and any("decoder" in name for name in trained)
        and any("lora" in name for name in trained)
    )


def test_what_was_cut_is_a_model_of_its_own():
    model = tiny(M3BertForSentenceEmbedding)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.set_attn_implementation("eager")
    for options in ({}, {"layers": model.config.mrl_layers[0]}):
        cut = model.truncate(**options)
        assert cut.config is not model.config and cut.config._attn_implementation == "eager"
        cut.set_attn_implementation("sdpa")
        assert model.config._attn_implementation == "eager"
        frozen = [name for name, parameter in cut.named_parameters() if not parameter.requires_grad]
        assert frozen == ["model.embed_tokens.weight"]


def test_adapters_have_to_be_merged_before_a_cut():
    model = tiny(M3BertForMaskedLM)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.truncate(layers=model.config.mrl_layers[0])


@pytest.mark.parametrize("options", [{"num_layers": 0}, {"embed_dim": 0}])
def test_nothing_is_no_cell_to_load(tmp_path, options):
    tiny(M3BertModel).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="none of the trained"):
        M3BertModel.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_inputs_without_tokens_are_refused(shape):
    ids = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match="hold no tokens"):
        tiny(M3BertModel)(ids, attention_mask=torch.ones_like(ids))


def test_evaluation_collects_logits_alone(tmp_path):
    rows = [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(5)]
    args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to="none", use_cpu=True)
    model = tiny(M3BertForMaskedLM)
    predictions = Trainer(model, args).predict(rows).predictions
    assert predictions.shape == (5, IDS.shape[1], model.config.vocab_size)
