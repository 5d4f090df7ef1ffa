"""m3BERT in MTEB: every cell of the grid is a model of its own there. Needs the extra `mteb`; import it by name."""

from collections.abc import Sequence
from pathlib import Path

from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from transformers import AutoConfig

import hf_models  # noqa: F401  registers m3BERT with the Auto classes
from hf_models.m3bert.sentence_transformer import M3BertSentenceTransformer


def mteb_model_meta(
    folder: str | Path,
    *,
    name: str,
    revision: str = "local",
    languages: Sequence[str] | None = None,
    license: str | None = None,
) -> ModelMeta:
    """The `ModelMeta` of an m3BERT; its `load_model` takes the cell:

        meta = mteb_model_meta("runs/m3bert", name="me/m3bert")
        mteb.evaluate(meta.load_model(exit_layer=4, embed_dim=64), tasks)

    MTEB has an axis of widths but none of depths, so the layer is one of its experiment's arguments: results are kept
    apart as `me/m3bert (embed_dim=64, exit_layer=4)`. Without a cell it is the whole model.

    Args:
        folder: written by [`save_for_sentence_transformers`] or `save_pretrained`.
        name: `"organisation/model"`, under which MTEB files the results.
        revision: of the weights; MTEB files results by it, so another training run wants another one.
        languages: such as `"eng-Latn"`.

    Raises:
        OSError: `folder` holds no model.
        ValueError: a name without an organisation; from `load_model`, a layer or dim that was not trained.
    """
    config = AutoConfig.from_pretrained(folder)
    return ModelMeta.create_empty().model_validate(
        ModelMeta.create_empty().model_dump()
        | {
            "loader": load_cell,
            "loader_kwargs": {"folder": str(folder)},
            "name": name,
            "revision": revision,
            "languages": None if languages is None else list(languages),
            "license": license,
            "max_tokens": config.max_position_embeddings,
            "embed_dim": list(config.mrl_dims),
            "similarity_fn_name": "cosine",
            "framework": ["Sentence Transformers", "PyTorch"],
            "open_weights": True,
            "use_instructions": False,
        }
    )


def load_cell(
    name: str,
    *,
    revision: str | None = None,
    folder: str,
    exit_layer: int | None = None,
    embed_dim: int | None = None,
    device: str | None = None,
) -> SentenceTransformerEncoderWrapper:
    """What `ModelMeta.load_model` calls: the Sentence Transformer at that cell in MTEB's own wrapper."""
    model = M3BertSentenceTransformer(folder, exit_layer=exit_layer, truncate_dim=embed_dim, device=device)
    return SentenceTransformerEncoderWrapper(model)


__all__ = ["load_cell", "mteb_model_meta"]
