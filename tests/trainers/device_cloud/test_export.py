"""Device packages and CTR models as programs: ONNX Runtime and ExecuTorch give what the model gives."""

import numpy as np
import onnxruntime
import pytest
import torch

from tests.hf_models.ctr import tiny_ctr
from tests.hf_models.dc_ccl import tiny_dc_ccl
from trainers.device_cloud.budget import DeviceBudget, DeviceBudgetError
from trainers.device_cloud.export import export_for_device


def rows(size, seed=1):
    return tiny_ctr.batch(size, seed=seed, labels=False)


def images(size, seed=1):
    return {"pixel_values": torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def model_and_inputs(kind):
    if kind in tiny_ctr.ARCHITECTURES:
        return tiny_ctr.tiny(kind), rows
    return tiny_dc_ccl.tiny(kind).device_package(), images


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "resnet", "din", "lr"])
def test_onnx_runtime_gives_what_the_model_gives_at_any_batch_size(kind, tmp_path):
    model, inputs = model_and_inputs(kind)
    program = export_for_device(model.train(), inputs(3), tmp_path)
    assert model.training and program == tmp_path / "model.onnx"
    session = onnxruntime.InferenceSession(str(program), providers=["CPUExecutionProvider"])
    for size in (1, 3, 7):
        given = inputs(size, seed=size)
        assert {each.name for each in session.get_inputs()} == set(given)
        (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in given.items()})
        with torch.no_grad():
            np.testing.assert_allclose(found, model.eval()(**given).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "resnet", *tiny_ctr.ARCHITECTURES])
@pytest.mark.compatibility("ExecuTorch", method=["ctr", "dc_ccl"], library="executorch")
def test_executorch_gives_what_the_model_gives(kind, tmp_path):
    runtime = pytest.importorskip("executorch.runtime", reason="pip install 'hf-sigma[executorch]'")
    model, inputs = model_and_inputs(kind)
    program = export_for_device(model, inputs(3), tmp_path, format="executorch")
    method = runtime.Runtime.get().load_program(program).load_method("forward")
    for seed in (1, 2):
        given = inputs(3, seed=seed)
        found = method.execute(list(given.values()))
        with torch.no_grad():
            logits = model(**given).logits
        assert any(each.shape == logits.shape and torch.allclose(each, logits, atol=1e-5) for each in found)


def test_what_does_not_fit_is_not_exported(tmp_path):
    model, inputs = model_and_inputs("deepfm")
    with pytest.raises(DeviceBudgetError):
        export_for_device(model, inputs(1), tmp_path / "out", budget=DeviceBudget(max_parameters=10))
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_and_a_missing_package_are_errors_with_the_remedy(tmp_path, monkeypatch):
    model, inputs = model_and_inputs("lr")
    with pytest.raises(ValueError, match="'onnx', 'executorch'"):
        export_for_device(model, inputs(1), tmp_path, format="tflite")
    monkeypatch.setattr("trainers.device_cloud.export.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"hf-sigma\[executorch\]"):
        export_for_device(model, inputs(1), tmp_path, format="executorch")
