"""What others do with a model: many users at once, half precision, checkpointing, compilation, export, adapters."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.func import functional_call, grad, stack_module_state, vmap

from hf_models.ctr import CtrForCtrPrediction
from tests.hf_models.ctr.tiny_ctr import ARCHITECTURES, batch, tiny


USERS = 3


def models_of_users(architecture):
    models = [tiny(architecture) for _ in range(USERS)]
    with torch.no_grad():
        for model in models[1:]:
            for name, parameter in model.named_parameters():
                parameter += 0.1 * torch.randn_like(parameter)
                if ".tables." in name:
                    parameter[0] = 0.0
    return models


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_many_users_at_once_are_those_of_a_loop(architecture):
    models = models_of_users(architecture)
    batches = [batch(5, seed=seed) | {"sample_weight": torch.tensor([1.0, 1, 0.5, 1, 0])} for seed in range(USERS)]
    stacked, buffers = stack_module_state(models)
    assert not buffers
    skeleton = copy.deepcopy(models[0]).to("meta")

    def loss(parameters, inputs):
        return functional_call(skeleton, parameters, (), inputs).loss

    together = {name: torch.stack([inputs[name] for inputs in batches]) for name in batches[0]}
    gradients = vmap(grad(loss))(stacked, together)
    for index, (model, inputs) in enumerate(zip(models, batches)):
        model(**inputs).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][index], parameter.grad, msg=lambda text, n=name: f"{n}: {text}")


def test_only_some_parameters_need_a_copy_for_each_user():
    model, inputs = tiny("din"), [batch(4, seed=seed) for seed in range(USERS)]
    shared = {name: p.detach() for name, p in model.named_parameters()}
    own = {"model.embeddings.tables.user_id.weight": torch.randn(USERS, 9, 4)}

    def logits(mine, rows):
        return functional_call(model, shared | mine, (), rows).logits

    together = vmap(logits)(own, {name: torch.stack([rows[name] for rows in inputs]) for name in inputs[0]})
    for index, rows in enumerate(inputs):
        mine = {name: tensor[index] for name, tensor in own.items()}
        torch.testing.assert_close(together[index], functional_call(model, shared | mine, (), rows).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.compatibility("bf16 inference", method="ctr")
@pytest.mark.compatibility("bf16 training", method="ctr")
def test_bfloat16(architecture, tmp_path):
    model, inputs = tiny(architecture), batch()
    model.save_pretrained(tmp_path)
    half = CtrForCtrPrediction.from_pretrained(tmp_path, dtype=torch.bfloat16)
    out = half(**inputs)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    torch.testing.assert_close(out.logits.float(), model(**inputs).logits, rtol=0.05, atol=0.05)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.parametrize("architecture", ["pnn", "din"])
@pytest.mark.compatibility("Gradient checkpointing", method="ctr")
def test_gradient_checkpointing_changes_nothing(architecture):
    model, inputs = tiny(architecture).train(), batch()
    model(**inputs).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.compatibility(
    "torch.compile without graph breaks", method="ctr", library="torch", note="traced, not turned into code"
)
def test_one_graph_without_breaks(architecture):
    model, inputs = tiny(architecture).train(), batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(**inputs)
    torch.testing.assert_close(out.loss, model(**inputs).loss)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.compatibility("torch.export", method="ctr", library="torch")
def test_export_at_any_batch_size_and_length(architecture):
    model, inputs = tiny(architecture), batch(labels=False)
    rows, length = torch.export.Dim("rows", min=1), torch.export.Dim("length", min=1)
    shapes = {name: {0: rows} for name in inputs} | {"sequence_features": {0: rows, 2: length}}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    for count in (2, 9):
        other = batch(count, seed=count, labels=False)
        other["sequence_features"] = torch.cat([other["sequence_features"]] * count, dim=2)
        torch.testing.assert_close(program(**other)["logits"], model(**other).logits)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.compatibility("ONNX", method="ctr", library="onnxruntime")
def test_onnx_runtime_gives_the_same_logits(architecture, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny(architecture)

        def forward(self, categorical_features, numeric_features, sequence_features):
            return self.inner(categorical_features, numeric_features, sequence_features).logits

    model, inputs, path = Logits().eval(), batch(labels=False), tmp_path / "model.onnx"
    rows = {name: {0: torch.export.Dim.DYNAMIC} for name in inputs}
    torch.onnx.export(
        model, (), path, kwargs=inputs, dynamo=True, dynamic_shapes=rows, output_names=["logits"], verbose=False
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = [item.name for item in session.get_inputs()]
    assert set(wanted) == set(inputs)
    for count in (1, 6, 11):
        other = batch(count, seed=count, labels=False)
        (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in other.items()})
        np.testing.assert_allclose(found, model(**other).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("parts", [{"": "cpu"}, {"model": "cpu", "head": "disk"}, {"model": "disk", "head": "cpu"}])
def test_device_maps(parts, tmp_path):
    model, inputs = tiny("din"), batch()
    model.save_pretrained(tmp_path / "saved")
    placed = CtrForCtrPrediction.from_pretrained(
        tmp_path / "saved", device_map=parts, offload_folder=str(tmp_path / "offload")
    )
    torch.testing.assert_close(placed(**inputs).logits, model(**inputs).logits)


@pytest.mark.compatibility("LoRA on linear layers, trainable rows of embeddings", method="ctr", library="peft")
def test_adapters_on_the_layers_and_on_the_users_row(tmp_path):
    model, inputs = tiny("deepfm"), batch()
    expected = model(**inputs).logits
    config = LoraConfig(
        r=2,
        target_modules=["linear"],
        trainable_token_indices={"user_id": [3, 4]},
        modules_to_save=["head"],
    )
    adapted = get_peft_model(model, config)
    torch.testing.assert_close(adapted(**inputs).logits, expected)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("lora_A" in name for name in trained) and any("trainable_tokens" in name for name in trained)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.5)
    adapted.train()(**inputs).loss.backward()
    optimizer.step()
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("deepfm"), tmp_path)
    torch.testing.assert_close(again.eval()(**inputs).logits, adapted.eval()(**inputs).logits)
    assert (adapted(**inputs).logits != expected).any()
