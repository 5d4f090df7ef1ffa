"""What users of image classifiers do with them: attention back-ends, precision, adapters, pipelines, compilers."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from hf_models.dot_cbm import DotCbmPipeline, image_processor_for
from tests.ecosystem.families import IMAGE_CLASSIFIERS
from tests.hf_models.dot_cbm.test_compile_and_export import Logits, same_as_eager
from tests.hf_models.dot_cbm.test_trainer import trained
from tests.hf_models.dot_cbm.tiny_dot_cbm import images


CONCEPTS = {"concept_names": list("abcd"), "concept_groups": None, "num_labels": 2}
LEARNING = {"steps": 8, "batch": 16, "lr": 3e-3}
LORA = {"r": 4, "modules_to_save": ["visual_adapter", "text_adapter", "classifier"]}


@pytest.fixture(params=IMAGE_CLASSIFIERS, ids=lambda family: family.method)
def family(request):
    return request.param


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fit(model, **options):
    return losses(trained(model, **(LEARNING | options)))


@torch.no_grad()
def outputs(model, **options):
    out = model.eval()(images(), **options)
    return out.logits, out.concept_logits


@pytest.mark.compatibility("Attention of the backbone: eager and SDPA", library="transformers")
def test_attention_back_ends_agree(family, tmp_path):
    family.model().save_pretrained(tmp_path)
    found = {}
    for name in ("eager", "sdpa"):
        model = AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation=name)
        assert model.model.backbone.config._attn_implementation == name
        found[name] = outputs(model)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(outputs(model), found[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["sdpa"], found["eager"], rtol=1e-4, atol=1e-4)


@pytest.mark.compatibility("bf16 inference", library="transformers", note="the transport stays in fp32")
def test_loaded_in_bf16_it_says_nearly_the_same(family, tmp_path):
    family.model().save_pretrained(tmp_path)
    half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        found = half(images().bfloat16(), output_transport_plan=True)
        expected = family.model()(images())
    assert found.transport_plan.dtype == torch.float32
    torch.testing.assert_close(found.concept_probs, expected.concept_probs, rtol=0.1, atol=0.1)


@pytest.mark.slow
@pytest.mark.compatibility("bf16 training", library="transformers")
def test_training_in_bf16_learns_what_fp32_learns(family):
    fields = CONCEPTS | {"freeze_backbone": False, "training_stage": "joint", "adapter_dropout": 0.0}
    half, whole = fit(family.model(**fields), bf16=True), fit(family.model(**fields))
    assert half[-1] < half[0]
    torch.testing.assert_close(torch.tensor(half), torch.tensor(whole), rtol=0.1, atol=0.05)


@pytest.mark.slow
@pytest.mark.compatibility("Gradient checkpointing", library="transformers")
def test_gradient_checkpointing_changes_nothing(family):
    fields = CONCEPTS | {"freeze_backbone": False, "training_stage": "joint", "adapter_dropout": 0.0}
    saved, plain = fit(family.model(**fields), gradient_checkpointing=True), fit(family.model(**fields))
    torch.testing.assert_close(torch.tensor(saved), torch.tensor(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.compatibility("LoRA in the backbone", library="peft")
def test_lora_learns_leaves_the_base_alone_and_comes_back(family, tmp_path):
    fields = CONCEPTS | {"training_stage": "joint", "adapter_dropout": 0.0}
    wrapped = get_peft_model(family.model(**fields), LoraConfig(**LORA, target_modules=family.attention))
    before = {name: p.clone() for name, p in wrapped.named_parameters() if not p.requires_grad}
    history = fit(wrapped, steps=20)
    assert sum(history[-2:]) < sum(history[:2])  # two batches are an epoch
    assert all(torch.equal(p, before[name]) for name, p in wrapped.named_parameters() if name in before)
    assert all(p.any() for name, p in wrapped.named_parameters() if "lora_B" in name)
    wrapped.save_pretrained(tmp_path)
    expected = outputs(wrapped)
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(family.model(**fields), tmp_path)), expected)
    merged = wrapped.merge_and_unload()
    assert merged.state_dict().keys() == family.model(**fields).state_dict().keys()
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.compatibility('pipeline("image-classification")', library="transformers")
def test_pipelines_classify_and_explain(family):
    model, picture = family.model(), Image.new("RGB", (40, 24), "red")
    processor = image_processor_for(model.config)
    plain = pipeline("image-classification", model=model, image_processor=processor)
    explaining = DotCbmPipeline(model=model, image_processor=processor)
    found, explained = plain([picture] * 3, batch_size=2), explaining(picture, top_k_concepts=2)
    assert len(found) == 3 and sum(each["score"] for each in found[0]) == pytest.approx(1.0)
    assert [each["label"] for each in explained["predictions"]] == [each["label"] for each in found[0]]
    assert [record.heatmap.shape for record in explained["explanation"]] == [(24, 40)] * 2


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler: install g++")
@pytest.mark.compatibility("torch.compile without graph breaks", library="torch")
def test_compiled_it_computes_the_same(family):
    same_as_eager(family.model(), "inductor")


@pytest.mark.slow
@pytest.mark.compatibility("torch.export", library="torch", note="the transport as a loop in torch")
def test_an_exported_program_takes_any_batch(family):
    model = Logits(family.model()).eval()
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (images(2),), dynamic_shapes=batch)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.compatibility("ONNX", library="onnxruntime", note="written by torch.onnx, fixed size of batch and image")
def test_as_onnx_it_computes_the_same(family, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, which is not installed")
    pytest.importorskip("onnxscript", reason="needs onnxscript, which is not installed")
    model, path = Logits(family.model()).eval(), tmp_path / "model.onnx"
    torch.onnx.export(model, (images(),), path, dynamo=True, input_names=["pixel_values"], verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"pixel_values": images().numpy()})
    with torch.no_grad():
        expected = model(images())
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-3, atol=1e-4)
