"""What the families without experts of their own lack elsewhere: a row each, as short as it can be."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, pipeline

from hf_models.m3bert import M3BertConfig, M3BertForMaskedLM
from tests.ecosystem.families import LEARNERS, TEXT_WRITERS
from tests.ecosystem.test_sft import CHATS, OPTIONS
from tests.hf_models.dc_ccl import tiny_dc_ccl
from tests.hf_models.personal_lm.tiny_personal_lm import classifier, draws, language_model, texts
from trainers.data import train_encoder_tokenizer


SENTENCES = ["the quick brown fox", "a lazy dog sleeps", "the fox sleeps"]


@pytest.mark.parametrize("family", LEARNERS, ids=lambda family: family.method)
@pytest.mark.compatibility("TensorBoard", library="tensorboard")
def test_tensorboard_shows_the_loss_of_every_step(family, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard, which is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = TrainingArguments(
        str(tmp_path), max_steps=3, logging_steps=1, learning_rate=1e-2, save_strategy="no", use_cpu=True,
        report_to="tensorboard", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(family.model(), args, train_dataset=family.rows())
    trainer.train()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    shown = {s.step: s.value for s in EventAccumulator(str(events)).Reload().Scalars("train/loss")}
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert shown == pytest.approx(logged, rel=1e-6) and len(logged) == 3


@pytest.mark.parametrize("family", TEXT_WRITERS, ids=lambda family: family.method)
@pytest.mark.compatibility(
    "SFTTrainer with the model's own loss",
    library="trl",
    note="in a subclass with `compute_loss = transformers.Trainer.compute_loss`; TRL's own loss wants a plain body "
    "and head, which these models have not; without draws of users",
)
def test_a_subclass_with_the_loss_of_transformers_learns_the_answers(family, tokenizer, text_fields, tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl, which is not installed")

    class OwnLoss(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    args = trl.SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, **OPTIONS)
    options = {"train_dataset": Dataset.from_dict({"messages": CHATS}), "processing_class": tokenizer}
    trainer = OwnLoss(family.model(**text_fields), args, **options)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(late < early for early, late in zip(history[:2], history[-2:], strict=True))
    with pytest.raises(AttributeError, match="last_hidden_state"):
        trl.SFTTrainer(family.model(**text_fields), args, **options).train()


@pytest.mark.compatibility('pipeline("fill-mask") and pipeline("feature-extraction")', method="m3bert")
def test_pipelines_fill_masks_and_extract_features():
    tokenizer = train_encoder_tokenizer(SENTENCES * 4, vocab_size=300, show_progress=False)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = M3BertConfig(vocab_size=len(tokenizer), mrl_layers=[1, 2], mrl_dims=[8, 16], **shape)
    model = M3BertForMaskedLM(config).eval()
    text = f"the {tokenizer.mask_token} fox"
    found = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")(text, top_k=2)
    features = pipeline("feature-extraction", model=model.model, tokenizer=tokenizer, device="cpu")(SENTENCES[0])
    with torch.no_grad():
        batch = tokenizer(text, return_tensors="pt")
        masked = batch["input_ids"][0] == tokenizer.mask_token_id
        best = model(batch["input_ids"]).logits[0, masked].softmax(-1)[0].topk(2)
        states = model.model(tokenizer(SENTENCES[0], return_tensors="pt")["input_ids"])[0]
    assert [each["token"] for each in found] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor(features), states)


@torch.no_grad()
@pytest.mark.compatibility("Attention: eager and SDPA", method="personal_lm", note="of the base model")
def test_attention_backends_of_the_base_agree():
    model, batch, found = language_model("llama"), texts("left"), []
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        assert model.model.config._attn_implementation == backend
        found.append(model(**batch, user_embeds=draws(2, 2)).logits[batch["attention_mask"].bool()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def compiled_as_one_graph(model, inputs):
    """Without C++: whether it is one graph at all, and the same."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.compatibility(
    "torch.compile without graph breaks", library="torch", method="personal_lm", note="traced, not turned into code"
)
def test_a_personal_model_is_one_graph():
    compiled_as_one_graph(language_model("llama"), texts("left") | {"user_embeds": draws(2, 2), "use_cache": False})
    compiled_as_one_graph(classifier("llama"), texts("left") | {"user_embeds": draws()})


@pytest.mark.slow
@pytest.mark.compatibility(
    "torch.compile without graph breaks", library="torch", method="dc_ccl", note="traced, not turned into code"
)
def test_a_divided_model_is_one_graph():
    compiled_as_one_graph(tiny_dc_ccl.tiny("vit"), {"pixel_values": tiny_dc_ccl.images()})
    compiled_as_one_graph(tiny_dc_ccl.tiny_lm(), {"input_ids": tiny_dc_ccl.tokens(), "use_cache": False})


@pytest.mark.compatibility("LoRA in every submodel", library="peft", method="dc_ccl")
def test_adapters_learn_in_every_submodel_and_come_back(tmp_path):
    inputs, names = {"pixel_values": tiny_dc_ccl.images()}, ["q_proj", "v_proj"]
    adapted = get_peft_model(tiny_dc_ccl.tiny("vit"), LoraConfig(r=2, target_modules=names))
    before = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        loss = adapted.train()(**inputs, labels=tiny_dc_ccl.LABELS).loss
        loss.backward()
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters() if name in before)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_dc_ccl.tiny("vit"), tmp_path).eval()
    with torch.no_grad():
        found = again(**inputs, labels=tiny_dc_ccl.LABELS)
        torch.testing.assert_close(found.logits, adapted.eval()(**inputs).logits)
    assert found.loss < tiny_dc_ccl.tiny("vit")(**inputs, labels=tiny_dc_ccl.LABELS).loss
