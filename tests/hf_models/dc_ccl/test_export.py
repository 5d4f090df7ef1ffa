"""Device packages through transformers' exporters: torch.export, ONNX under ONNX Runtime, ExecuTorch."""

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.hf_models.dc_ccl.tiny_dc_ccl import images, tiny


exporters = pytest.importorskip("transformers.exporters", reason="this transformers has no exporters")


def assert_parity(exported, package, batches=(1, 3, 5)):
    for batch in batches:
        with torch.no_grad():
            wanted = package(images(batch)).logits
        found = torch.as_tensor(exported(pixel_values=images(batch))["logits"])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "resnet", "whole"])
@pytest.mark.compatibility("torch.export", method="dc_ccl", library="torch", note="of device packages")
def test_torch_export_gives_what_the_package_gives(kind):
    package = tiny(kind).device_package()
    exported = exporters.DynamoExporter().export(
        package, {"pixel_values": images()}, config=exporters.DynamoConfig(dynamic=True)
    )
    assert_parity(exported, package)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "resnet", "whole"])
@pytest.mark.compatibility("ONNX", method="dc_ccl", library="onnxruntime", note="of device packages")
def test_onnx_runtime_gives_what_the_package_gives(kind, tmp_path):
    package = tiny(kind).device_package()
    exported = exporters.OnnxExporter().export(
        package, {"pixel_values": images()}, config=exporters.OnnxConfig(dynamic=True)
    )
    exported.save_pretrained(tmp_path)
    floats = [t for t in onnx.load(tmp_path / "model.onnx").graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    wanted = sum(tensor.numel() for tensor in package.state_dict().values() if tensor.is_floating_point())
    assert 0.7 * wanted < sum(math.prod(tensor.dims) for tensor in floats) < 1.1 * wanted  # batch norms are folded
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 3, 5):
        with torch.no_grad():
            logits = package(images(batch)).logits.numpy()
        (found,) = session.run(["logits"], {"pixel_values": images(batch).numpy()})
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.compatibility("ExecuTorch", method="dc_ccl", library="executorch", note="of device packages")
def test_executorch_gives_what_the_package_gives():
    pytest.importorskip("executorch", reason="pip install executorch")
    package = tiny("vit").device_package()
    exported = exporters.ExecutorchExporter().export(
        package, {"pixel_values": images()}, config=exporters.ExecutorchConfig()
    )
    assert_parity(exported, package, batches=(3,))
