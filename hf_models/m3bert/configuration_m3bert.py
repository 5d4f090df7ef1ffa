# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Configuration of m3BERT (arXiv 2605.19568): one encoder, trained to be cut at several depths and widths."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.eurobert.configuration_eurobert import EuroBertConfig


POSITION_EMBEDDING_TYPES = ("absolute", "rope")
EXIT_NORMS = ("shared", "none", "per_exit")
POOLINGS = ("mean", "cls")
PUBLISHED_DIMS = (32, 64, 128)


@strict
class M3BertConfig(PreTrainedConfig):
    r"""
    Configuration of a [`M3BertModel`]: a bidirectional pre-norm encoder with SwiGLU, whose states after the layers
    `mrl_layers`, cut to their first `mrl_dims` entries, are all trained (the grid of *cells*). The defaults are the
    shapes of the released code; only `exit_norm` differs, see there.

    Args:
        vocab_size (`int`, defaults to 250002), max_position_embeddings (`int`, defaults to 512):
            Rows of the token table, and of the position table where positions are absolute.
        head_dim (`int`, *optional*), num_key_value_heads (`int`, *optional*):
            `None`: `hidden_size / num_attention_heads`, and as many as there are query heads.
        position_embedding_type (`str`, defaults to `"absolute"`):
            `"absolute"`: learned, added before the norm of the embeddings, as in the released code. `"rope"`: rotary,
            with `rope_parameters` (theta 500000 unless given).
        attention_dropout, embedding_dropout, hidden_dropout (`float`, default to 0.1, 0.1 and 0.0):
            Of attention weights, of the embeddings after their norm, and of what attention and MLP add to the stream.
        mrl_layers (`list[int]`, *optional*):
            Depths that are trained as exits, ascending; the last is `num_hidden_layers`. `None`: every third of the
            depth, `[4, 8, 12]` of 12 layers; the whole depth where it has no thirds.
        mrl_dims (`list[int]`, *optional*):
            Widths that are trained, ascending; the last is the width of the outputs. `None`: 32, 64, 128 and that.
        mrl_weights (`list[list[float]]`, *optional*):
            Weight of each cell in the loss, a list over `mrl_dims` for each of `mrl_layers`. `None`: 1 each.
        exit_norm (`str`, defaults to `"shared"`):
            What normalises a state where it leaves the model. `"shared"`: the final norm, at every exit. `"per_exit"`:
            each exit's own. `"none"`: the final norm after the last layer, nothing before it: the released
            pre-training, where exits are raw states of the residual stream.
        final_norm (`bool`, defaults to `True`):
            False only in a model cut from another one at an exit without norm.
        embed_dim (`int`, *optional*):
            Width of the outputs and of all heads: the first `embed_dim` of `hidden_size` entries. `None`:
            `hidden_size`.
        pooling (`str`, defaults to `"mean"`):
            How a text's tokens become one vector: `"mean"` over those that are not padding, or `"cls"`, the first.
        normalize_embeddings (`bool`, defaults to `True`):
            Sentence embeddings have length 1, brought to it after the cut to their width.

    Raises:
        StrictDataclassFieldValidationError: a value of the wrong type.
        StrictDataclassClassValidationError: values that do not fit together; the message names the field and the
            remedy.
    """

    model_type = "m3bert"
    keys_to_ignore_at_inference = ["grid_losses", "hidden_states", "attentions"]
    default_theta = 500000.0
    # Read by EuroBERT's blocks; no linear map of the encoder has a bias.
    attention_bias = False
    mlp_bias = False
    # The layers have EuroBERT's names; taken from the installed release, whose plan vocabulary moves.
    base_model_tp_plan = dict(EuroBertConfig.base_model_tp_plan)

    vocab_size: int = 250002
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 3072
    hidden_act: str = "silu"
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    position_embedding_type: str = "absolute"
    rope_parameters: dict | None = None
    attention_dropout: float | int = 0.1
    embedding_dropout: float | int = 0.1
    hidden_dropout: float | int = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    mrl_layers: list[int] | None = None
    mrl_dims: list[int] | None = None
    mrl_weights: list[list[float | int]] | None = None
    exit_norm: str = "shared"
    final_norm: bool = True
    embed_dim: int | None = None
    pooling: str = "mean"
    normalize_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not divisible by "
                    f"num_attention_heads={self.num_attention_heads}, so head_dim cannot be derived. Set head_dim, or "
                    "change one of the two."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.mrl_layers is None:
            depth = self.num_hidden_layers
            self.mrl_layers = [depth // 3, 2 * depth // 3, depth] if depth and depth % 3 == 0 else [depth]
        if self.mrl_dims is None:
            self.mrl_dims = [dim for dim in PUBLISHED_DIMS if dim < self.width] + [self.width]
        if auto_map := getattr(type(self), "_family_auto_map", None):
            kwargs["auto_map"] = dict(auto_map)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers; `num_layers` and `embed_dim` give the config of the smaller model, see [`truncated`]."""
        layers, dim = kwargs.pop("num_layers", None), kwargs.pop("embed_dim", None)
        # The parent assigns overrides one by one after validation; merged first, they are checked like any value.
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in M3BertConfig.__annotations__}
        made = super().from_dict({**config_dict, **given}, **kwargs)
        config, rest = made if isinstance(made, tuple) else (made, None)
        config = config.truncated(layers, dim)
        return config if rest is None else (config, rest)

    @property
    def width(self) -> int:
        """Entries of an output vector: `embed_dim`, or `hidden_size`."""
        return self.hidden_size if self.embed_dim is None else self.embed_dim

    def cell(self, layer: int | None = None, dim: int | None = None) -> tuple[int, int]:
        """Depth and width of an exit, `None` being the whole. `ValueError` for one that was not trained."""
        for value, allowed, name in ((layer, self.mrl_layers, "mrl_layers"), (dim, self.mrl_dims, "mrl_dims")):
            if value is not None and value not in allowed:
                what = "layer" if name == "mrl_layers" else "dim"
                raise ValueError(
                    f"{what} {value} is none of the trained {name}={allowed}: its output is noise. Choose one of "
                    f"them, or train with {name} that include it."
                )
        return (self.num_hidden_layers if layer is None else layer), (self.width if dim is None else dim)

    def cell_weights(self) -> list[list[float]]:
        """Weight of each cell in the loss, layers x dims."""
        return self.mrl_weights or [[1.0] * len(self.mrl_dims) for _ in self.mrl_layers]

    def truncated(self, layers: int | None = None, dim: int | None = None) -> "M3BertConfig":
        """The config of the model that ends after `layers` layers and puts out `dim` entries; its grid is what is left
        of this one's. `ValueError` for a depth or width that was not trained."""
        depth, width = self.cell(layers, dim)
        if (depth, width) == (self.num_hidden_layers, self.width):
            return self
        kept_layers = [layer for layer in self.mrl_layers if layer <= depth]
        kept_dims = [size for size in self.mrl_dims if size <= width]
        fields = {
            "num_hidden_layers": depth,
            "mrl_layers": kept_layers,
            "mrl_dims": kept_dims,
            "embed_dim": None if width == self.hidden_size else width,
            "final_norm": self.final_norm and (self.exit_norm != "none" or depth == self.num_hidden_layers),
        }
        if self.mrl_weights is not None:
            fields["mrl_weights"] = [row[: len(kept_dims)] for row in self.mrl_weights[: len(kept_layers)]]
        smaller = type(self)(**{**self.to_dict(), **fields})
        smaller._attn_implementation = self._attn_implementation
        smaller.name_or_path = self.name_or_path
        return smaller

    def validate_attention(self):
        """Query heads share key-value heads in equal groups; rotary needs an even head_dim."""
        if min(self.num_attention_heads, self.num_key_value_heads) < 1:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} and num_key_value_heads={self.num_key_value_heads} "
                "must be >= 1."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}. Choose a divisor."
            )
        _require_known(self, "position_embedding_type", POSITION_EMBEDDING_TYPES)
        if self.head_dim < 1 or (self.position_embedding_type == "rope" and self.head_dim % 2):
            raise ValueError(f"head_dim={self.head_dim} must be positive, and even for rotary embeddings.")

    def validate_grid(self):
        """Depths and widths that ascend to those of the model, and a weight for each cell."""
        if self.embed_dim is not None and not 1 <= self.embed_dim <= self.hidden_size:
            raise ValueError(
                f"embed_dim={self.embed_dim} is not in 1..hidden_size={self.hidden_size}; None is the whole."
            )
        whole = {"mrl_layers": self.num_hidden_layers, "mrl_dims": self.width}
        for field, last in whole.items():
            values = getattr(self, field)
            what = "num_hidden_layers" if field == "mrl_layers" else "the width of the outputs"
            if not values or values != sorted(set(values)) or values[0] < 1:
                raise ValueError(f"{field}={values} must be positive and ascend without repetition: sort them.")
            if values[-1] > last:
                raise ValueError(
                    f"{field}={values} go beyond {what}, {last}. Drop what is larger; a smaller model of a trained "
                    "one comes from `truncated`, or from num_layers and embed_dim at load time."
                )
            if values[-1] < last:
                raise ValueError(
                    f"{field}={values} do not end with {what}, {last}, which would then be untrained. Add it."
                )
        shape = (len(self.mrl_layers), len(self.mrl_dims))
        weights = self.mrl_weights
        if weights is not None and (len(weights) != shape[0] or any(len(row) != shape[1] for row in weights)):
            raise ValueError(
                f"mrl_weights={weights} must be {shape[0]} lists (mrl_layers={self.mrl_layers}) of {shape[1]} weights "
                f"(mrl_dims={self.mrl_dims}), or None."
            )
        if weights is not None and not all(weight >= 0 for row in weights for weight in row):
            raise ValueError(f"mrl_weights={weights} must not be negative; 0 leaves a cell out.")

    def validate_outputs(self):
        """Known ways to normalise and to pool."""
        _require_known(self, "exit_norm", EXIT_NORMS)
        _require_known(self, "pooling", POOLINGS)
        if not self.final_norm and self.exit_norm != "none":
            raise ValueError(
                f"final_norm=False fits exit_norm='none' only, not exit_norm={self.exit_norm!r}. Leave it True."
            )


def _require_known(config: M3BertConfig, field: str, known: tuple[str, ...]) -> None:
    if getattr(config, field) not in known:
        raise ValueError(f"{field}={getattr(config, field)!r} is not known. Choose one of {known}.")


__all__ = ["M3BertConfig"]
