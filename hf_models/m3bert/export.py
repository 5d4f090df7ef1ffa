# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""A cell of an m3BERT as an ONNX graph, for runtimes without torch."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from .modeling_m3bert import M3BertForSentenceEmbedding, M3BertModel


class _Graph(nn.Module):
    """`(input_ids, attention_mask)` -> one tensor: what a graph can have as inputs and outputs."""

    def __init__(self, model: M3BertModel | M3BertForSentenceEmbedding, output: str):
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[self.output]


def export_onnx(
    model: M3BertModel | M3BertForSentenceEmbedding,
    path: str | Path,
    *,
    layers: int | None = None,
    dim: int | None = None,
    opset_version: int | None = None,
) -> Path:
    """Write `model`, cut to `layers` and `dim`, as an fp32 graph of any batch size and length; returns `path`.

    The graph takes `input_ids` and `attention_mask`, int64 `(batch, tokens)`, padded on either side, and gives
    `embeddings (batch, dim)`: pooled, cut and of length 1 as the model does it; of an [`M3BertModel`] it gives
    `last_hidden_state (batch, tokens, dim)`. Weights beyond protobuf's 2 GB go into a second file beside it. The
    model itself stays as it is.

    Args:
        opset_version: of the standard operators; `None` is what the installed torch prefers.

    Raises:
        ValueError: a layer or dim that was not trained.
        TypeError: another class of model.
        ImportError: without onnx and onnxscript.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(f"{' and '.join(missing)} not installed: `pip install 'hf-sigma[onnx]'`.")
    if not isinstance(model, M3BertModel | M3BertForSentenceEmbedding):
        raise TypeError(f"{type(model).__name__} has no ONNX form here; export its encoder, `model.model`.")
    output = "last_hidden_state" if isinstance(model, M3BertModel) else "embeddings"
    smaller = model.truncate(layers, dim).float().cpu().eval()
    smaller.set_attn_implementation("sdpa")
    # Two of each: a size of one would be taken for a constant.
    ids = torch.zeros(2, 2, dtype=torch.long)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", max=smaller.config.max_position_embeddings)
    with torch.no_grad():
        program = torch.onnx.export(
            _Graph(smaller, output).eval(),
            (ids, torch.ones_like(ids)),
            input_names=["input_ids", "attention_mask"],
            output_names=[output],
            dynamic_shapes={name: {0: batch, 1: tokens} for name in ("input_ids", "attention_mask")},
            opset_version=opset_version,
            dynamo=True,
            verbose=False,
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path))
    return path


__all__ = ["export_onnx"]
