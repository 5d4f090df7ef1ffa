"""Exported cells against the model, under ONNX Runtime."""

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hf_models.m3bert import M3BertConfig, M3BertForMaskedLM, M3BertForSentenceEmbedding, M3BertModel
from hf_models.m3bert.export import export_onnx


VOCABULARY, POSITIONS = 60, 48


def build(kind=M3BertForSentenceEmbedding, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    grid = {"mrl_layers": [1, 2, 3], "mrl_dims": [8, 16, 32], "max_position_embeddings": POSITIONS}
    return kind(M3BertConfig(vocab_size=VOCABULARY, **sizes, **grid, **changes))


def batches():
    """Single tokens to full length; no padding, padding on either side, and a row of nothing else."""
    generator = torch.Generator().manual_seed(1)
    for rows, tokens in ((1, 1), (1, 7), (2, 2), (3, POSITIONS), (5, 20)):
        ids = torch.randint(4, VOCABULARY, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        if rows > 1:
            mask[0, tokens // 2 :] = 0
        if rows > 2:
            mask[1, : tokens // 3] = 0
        if rows > 3:
            mask[2] = 0
        yield ids, mask


def assert_parity(path, model, layer, dim, output="embeddings"):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [item.name for item in session.get_outputs()] == [output]
    for ids, mask in batches():
        with torch.no_grad():
            wanted = model.eval()(ids, attention_mask=mask, exit_layer=layer, embed_dim=dim)[output]
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        seen = mask.bool().numpy() if output == "last_hidden_state" else np.ones(len(ids), dtype=bool)
        np.testing.assert_allclose(found[seen], wanted.numpy()[seen], atol=1e-5, rtol=1e-4)
        assert np.isfinite(found).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "dim", "changes"),
    [
        (2, 16, {"exit_norm": "none", "pooling": "cls"}),
        (None, None, {"position_embedding_type": "rope", "num_key_value_heads": 2}),
    ],
)
@pytest.mark.compatibility("ONNX", method="m3bert", library="onnxruntime")
def test_a_cell_gives_what_the_model_gives_at_any_length_and_padding(layer, dim, changes, tmp_path):
    model = build(**changes).train()
    path = export_onnx(model, tmp_path / "cell" / "model.onnx", layers=layer, dim=dim)
    assert model.training and len(model.model.layers) == 3
    assert_parity(path, model, layer, dim)


@pytest.mark.slow
@pytest.mark.compatibility("ONNX", method="m3bert", library="onnxruntime")
def test_the_encoder_alone_gives_states_and_only_what_is_left_is_written(tmp_path):
    model = build(M3BertModel)
    path = export_onnx(model, tmp_path / "model.onnx", layers=1, dim=8)
    assert_parity(path, model, 1, 8, "last_hidden_state")
    weights = [tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    written = sum(math.prod(tensor.dims) for tensor in weights)
    assert written == pytest.approx(model.truncate(1, 8).num_parameters(), rel=0.02)


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layer 4 is none of the trained"):
        export_onnx(build(), tmp_path / "x.onnx", layers=4)
    with pytest.raises(TypeError, match="M3BertForMaskedLM has no ONNX form"):
        export_onnx(build(M3BertForMaskedLM), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
