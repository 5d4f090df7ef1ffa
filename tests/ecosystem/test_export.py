"""Programs without Python: torch.export, ONNX and ExecuTorch by transformers' exporters, on sizes they did not see."""

import pytest
import torch

from tests.hf_models.dot_cbm import tiny_dot_cbm
from tests.hf_models.m3bert import tiny_m3bert
from tests.hf_models.personal_lm.tiny_personal_lm import classifier, draws, language_model, texts


exporters = pytest.importorskip("transformers.exporters", reason="this transformers has no exporters")
pytestmark = pytest.mark.slow


def tokens(rows, length, padded=0):
    ids = torch.randint(1, 30, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0  # on the left
    return {"input_ids": ids, "attention_mask": mask}


SIZES = [(1, 5, 0), (2, 8, 3), (3, 13, 4)]
EXAMPLE = tokens(2, 8)


@torch.no_grad()
def assert_parity(program, model, batches, output="logits"):
    """Of what is not padding, for every batch."""
    for inputs in batches:
        found, wanted = torch.as_tensor(program(**inputs)[output]), getattr(model(**inputs), output)
        real = inputs["attention_mask"].bool() if wanted.ndim == 3 else slice(None)
        torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)


def exported(model, example):
    return exporters.DynamoExporter().export(model, dict(example), config=exporters.DynamoConfig(dynamic=True))


def as_onnx(model, example, folder):
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'hf-sigma[onnx]'")
    graph = exporters.OnnxExporter().export(model, dict(example), config=exporters.OnnxConfig(dynamic=True))
    graph.save_pretrained(folder)
    session = runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])

    def program(**inputs):
        (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
        return {"logits": logits}

    return program


def for_executorch(model, example):
    """A program for the example's sizes."""
    pytest.importorskip("executorch", reason="pip install 'hf-sigma[executorch]'")
    return exporters.ExecutorchExporter().export(model, dict(example), config=exporters.ExecutorchConfig())


NO_CACHE = {"use_cache": False}  # else the program gives the cache as well


@pytest.mark.compatibility("torch.export", library="torch")
def test_an_exported_program_gives_the_logits(family):
    model = family.model(**NO_CACHE)
    assert_parity(exported(model, EXAMPLE), model, [tokens(*size) for size in SIZES])


@pytest.mark.compatibility("ONNX", library="onnxruntime")
def test_onnx_runtime_gives_the_logits(family, tmp_path):
    model = family.model(**NO_CACHE)
    assert_parity(as_onnx(model, EXAMPLE, tmp_path), model, [tokens(*size) for size in SIZES])


@pytest.mark.compatibility("ExecuTorch", library="executorch")
def test_executorch_gives_the_logits(family):
    model = family.model(**NO_CACHE)
    assert_parity(for_executorch(model, EXAMPLE), model, [EXAMPLE])


@pytest.mark.compatibility("torch.export", library="torch", method="m3bert")
def test_an_exported_encoder_gives_the_embeddings():
    model = tiny_m3bert.tiny(tiny_m3bert.M3BertForSentenceEmbedding)
    assert_parity(exported(model, EXAMPLE), model, [tokens(*size) for size in SIZES], output="embeddings")


@pytest.mark.compatibility("ExecuTorch", library="executorch", method="m3bert")
def test_executorch_gives_the_embeddings():
    model = tiny_m3bert.tiny(tiny_m3bert.M3BertForSentenceEmbedding)
    assert_parity(for_executorch(model, EXAMPLE), model, [EXAMPLE], output="embeddings")


def personal(kind):
    """A personal model and batches for it, with a draw of each user."""
    build, drawn = {"classifier": (classifier, 1), "writer": (language_model, 2)}[kind]
    batches = [texts(side, lengths) for side, lengths in (("right", (6, 4)), ("left", (3, 9, 5)))]
    return build("llama"), [batch | {"user_embeds": draws(len(batch["input_ids"]), drawn)} for batch in batches]


@pytest.mark.parametrize("kind", ["classifier", "writer"])
@pytest.mark.compatibility("torch.export", library="torch", method="personal_lm")
def test_an_exported_personal_model_gives_the_logits(kind):
    model, batches = personal(kind)
    assert_parity(exported(model, batches[0]), model, batches)


@pytest.mark.parametrize("kind", ["classifier", "writer"])
@pytest.mark.compatibility("ONNX", library="onnxruntime", method="personal_lm")
def test_onnx_runtime_gives_the_logits_of_a_personal_model(kind, tmp_path):
    model, batches = personal(kind)
    assert_parity(as_onnx(model, batches[0], tmp_path), model, batches)


@pytest.mark.parametrize("kind", ["classifier", "writer"])
@pytest.mark.compatibility("ExecuTorch", library="executorch", method="personal_lm")
def test_executorch_gives_the_logits_of_a_personal_model(kind):
    model, (example, _) = personal(kind)
    assert_parity(for_executorch(model, example), model, [example])


@torch.no_grad()
@pytest.mark.compatibility("ExecuTorch", library="executorch", method="dot_cbm")
def test_executorch_gives_the_classes_of_images():
    model, example = tiny_dot_cbm.tiny(), {"pixel_values": tiny_dot_cbm.images(2)}
    found = for_executorch(model, example)(**example)
    for output in ("logits", "concept_probs"):
        torch.testing.assert_close(torch.as_tensor(found[output]), model(**example)[output], rtol=1e-4, atol=1e-4)
