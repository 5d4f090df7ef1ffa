"""What the families without experts of their own lack elsewhere: a row each, as short as it can be."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, pipeline

from hf_models.m3bert import M3BertConfig, M3BertForMaskedLM
from tests.ecosystem.families import LEARNERS, TEXT_WRITERS, personal_writer
from tests.ecosystem.test_compilation import needs_compiler
from tests.ecosystem.test_sft import CHATS, OPTIONS
from tests.hf_models.dc_ccl import tiny_dc_ccl
from tests.hf_models.dot_cbm import tiny_dot_cbm
from tests.hf_models.personal_lm.tiny_personal_lm import base_config, classifier, draws, language_model, texts
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


def assert_one_graph(model, inputs):
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
    assert_one_graph(language_model("llama"), texts("left") | {"user_embeds": draws(2, 2), "use_cache": False})
    assert_one_graph(classifier("llama"), texts("left") | {"user_embeds": draws()})


@pytest.mark.slow
@pytest.mark.compatibility(
    "torch.compile without graph breaks", library="torch", method="dc_ccl", note="traced, not turned into code"
)
def test_a_divided_model_is_one_graph():
    assert_one_graph(tiny_dc_ccl.tiny("vit"), {"pixel_values": tiny_dc_ccl.images()})
    assert_one_graph(tiny_dc_ccl.tiny_lm(), {"input_ids": tiny_dc_ccl.tokens(), "use_cache": False})


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


IN_BF16 = [family for family in LEARNERS if family.method in ("dc_ccl", "personal_lm")]


@pytest.mark.parametrize("family", IN_BF16, ids=lambda family: family.method)
@pytest.mark.compatibility("bf16 training", library="transformers")
def test_training_in_bf16_learns_what_fp32_learns(family, tmp_path):
    found = []
    for half in (True, False):
        args = TrainingArguments(
            str(tmp_path), max_steps=6, logging_steps=1, learning_rate=1e-2, save_strategy="no", use_cpu=True,
            report_to="none", disable_tqdm=True, bf16=half,
        )  # fmt: skip
        trainer = Trainer(family.model(), args, train_dataset=family.rows())
        trainer.train()
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.model.parameters())
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0] != found[1] and found[0][-1] < found[0][0]
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=0.02, atol=0.01)


def assert_flex_attention_agrees(model, inputs):
    found = []
    with torch.no_grad():  # it has no backward on a CPU
        for backend in ("sdpa", "flex_attention"):
            model.set_attn_implementation(backend)
            found.append(model(**inputs).logits)
    real = inputs["attention_mask"].bool() if found[0].ndim == 3 else slice(None)
    torch.testing.assert_close(found[1][real], found[0][real], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs_compiler
@pytest.mark.compatibility(
    "Attention: FlexAttention", method="personal_lm", note="of a base that has it; on a CPU forward only"
)
def test_flex_attention_of_the_base_gives_what_sdpa_gives():
    assert_flex_attention_agrees(language_model("llama"), texts("left") | {"user_embeds": draws(2, 2)})
    assert_flex_attention_agrees(classifier("llama"), texts("right") | {"user_embeds": draws()})


@pytest.mark.slow
@needs_compiler
@pytest.mark.compatibility(
    "Attention: FlexAttention", method="dc_ccl", note="where every submodel has it; on a CPU forward only"
)
def test_flex_attention_of_the_submodels_gives_what_sdpa_gives():
    assert_flex_attention_agrees(tiny_dc_ccl.tiny("vit"), {"pixel_values": tiny_dc_ccl.images()})


@pytest.mark.slow
@needs_compiler
@pytest.mark.compatibility(
    "Attention: FlexAttention", method="dot_cbm", note="of a backbone that has it; on a CPU forward only"
)
def test_flex_attention_of_the_backbone_gives_what_sdpa_gives():
    assert_flex_attention_agrees(tiny_dot_cbm.tiny("dinov2"), {"pixel_values": tiny_dot_cbm.images()})


@pytest.mark.compatibility(
    'pipeline("text-generation") and pipeline("text-classification")',
    method="personal_lm",
    note="of nobody in particular: a pipeline has no place for draws",
)
def test_pipelines_write_and_classify_for_a_user_who_is_not_known(tokenizer, text_fields):
    writer = personal_writer(**text_fields)
    prompt = tokenizer("def add", return_tensors="pt")
    out = writer.generate(**prompt, max_new_tokens=6, do_sample=False)
    writes = pipeline("text-generation", model=writer, tokenizer=tokenizer, device="cpu")
    (written,) = writes("def add", max_new_tokens=6, do_sample=False)
    assert written["generated_text"] == tokenizer.decode(out[0], skip_special_tokens=True)
    judge = classifier("llama", base_config=base_config("llama") | text_fields)
    with torch.no_grad():
        best = judge(**prompt).logits[0].softmax(-1).max(-1)
    (label,) = pipeline("text-classification", model=judge, tokenizer=tokenizer, device="cpu")("def add")
    assert label["label"] == judge.config.id2label[best.indices.item()]
    assert label["score"] == pytest.approx(best.values.item(), rel=1e-5)
