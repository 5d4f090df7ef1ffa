# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the CTR models: LR, Wide & Deep, PNN, DeepFM and DIN over features that the config describes."""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


ARCHITECTURES = ("lr", "wide_deep", "pnn", "deepfm", "din")
KINDS = ("categorical", "numeric", "sequence")
ROLES = ("user", "item", "context")
KEYS = {"name", "kind", "vocab_size", "role", "shares"}
ATTENTION_NORMALIZATIONS = ("none", "softmax")


@strict
class CtrConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CtrModel`].

    Args:
        features (`list[dict]`, *optional*):
            What a row consists of; the order among features of one kind is the order of the columns. Each has

            - `name`: a Python identifier, unique; parameters are called after it.
            - `kind`: `"categorical"` (one id), `"numeric"` (one number) or `"sequence"` (ids, filled up with 0).
            - `role`: `"user"`, `"item"` or `"context"` (the default).
            - `vocab_size`: rows of the table of a categorical feature, or of a sequence with a table of its own, such
              as the genres of a film. Id 0 is padding or absence: its row is 0 and is not trained. Id 1 is for unknown
              values. Not given: 2, for these two alone.
            - `shares`: of a sequence such as a history of clicks, the categorical item feature whose table it reads.

            `None`: a user and an item with no known value.
        architecture (`str`, defaults to `"deepfm"`):
            `"lr"`, `"wide_deep"`, `"pnn"`, `"deepfm"` or `"din"`.
        embedding_dim (`int`, defaults to 16):
            Width of every feature's embedding.
        hidden_sizes (`list[int]`, *optional*, defaults to `[64, 32]`):
            Widths of the MLP. `[]` only in a `"deepfm"`, which is then the factorisation machine alone.
        hidden_act (`str`, defaults to `"relu"`), dropout (`float`, defaults to 0.0):
            Of the MLP. There is no batch norm: its statistics would mix the rows of one user with those of others.
        attention_hidden_sizes (`list[int]`, *optional*, defaults to `[36]`), attention_act (`str`, defaults to
        `"sigmoid"`):
            Of DIN's activation unit.
        attention_normalization (`str`, defaults to `"none"`):
            Whether the weights of a history are normalised by `"softmax"`; DIN leaves them as they are, so that their
            sum says how strong the interest is.
        user_bias, item_bias (`bool`, *optional*):
            Whether features of that role have first-order weights, which are added to the logit. `None`: they have in
            `"lr"`, `"wide_deep"` and `"deepfm"`, and have not in `"pnn"` and `"din"`, as published. Context features
            follow the architecture.
        prior (`float`, *optional*):
            Share of positives in the data that the model is trained on. The intercept begins at its logit, at 0 if
            `None`; label correction aligns devices to it.

    Raises:
        StrictDataclassFieldValidationError: a value of the wrong type.
        StrictDataclassClassValidationError: values that do not fit together; the message names the feature and the
            remedy.
    """

    model_type = "ctr"
    keys_to_ignore_at_inference = ["interest_weights"]

    features: list[dict] | None = None
    architecture: str = "deepfm"
    embedding_dim: int = 16
    hidden_sizes: list[int] | None = None
    hidden_act: str = "relu"
    dropout: float | int = 0.0
    attention_hidden_sizes: list[int] | None = None
    attention_act: str = "sigmoid"
    attention_normalization: str = "none"
    user_bias: bool | None = None
    item_bias: bool | None = None
    prior: float | None = None
    initializer_range: float = 0.01

    def __post_init__(self, **kwargs):
        if self.features is None:
            self.features = [{"name": role, "kind": "categorical", "role": role} for role in ("user", "item")]
        self.features = [_completed(feature) for feature in self.features]
        if self.hidden_sizes is None:
            self.hidden_sizes = [64, 32]
        if self.attention_hidden_sizes is None:
            self.attention_hidden_sizes = [36]
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1)
        if auto_map := getattr(type(self), "_family_auto_map", None):
            kwargs["auto_map"] = dict(auto_map)
        super().__post_init__(**kwargs)

    @property
    def categorical(self) -> list[dict[str, Any]]:
        """Features that are columns of `categorical_features`, in order."""
        return self._of_kind("categorical")

    @property
    def numeric(self) -> list[dict[str, Any]]:
        """Features that are columns of `numeric_features`, in order."""
        return self._of_kind("numeric")

    @property
    def sequences(self) -> list[dict[str, Any]]:
        """Features that are rows of `sequence_features`, in order."""
        return self._of_kind("sequence")

    @property
    def tables(self) -> dict[str, int]:
        """Rows of every table, by the name of its feature."""
        return {f["name"]: f["vocab_size"] for f in self.features if f["kind"] != "numeric" and "shares" not in f}

    @property
    def user_feature(self) -> str | None:
        """Name of the first categorical feature of the user, by convention who they are."""
        return next((f["name"] for f in self.categorical if f["role"] == "user"), None)

    @property
    def item_feature(self) -> str | None:
        """Name of the first categorical feature of the item, by convention which one it is."""
        return next((f["name"] for f in self.categorical if f["role"] == "item"), None)

    def has_first_order(self, feature: dict[str, Any]) -> bool:
        """Whether a feature has weights that go straight to the logit."""
        own = {"user": self.user_bias, "item": self.item_bias}.get(feature["role"])
        return self.architecture in ("lr", "wide_deep", "deepfm") if own is None else own

    def validate_features(self):
        """Unique names, known kinds and roles, tables with rows, and sequences whose table exists."""
        names = [feature["name"] for feature in self.features]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"features repeats {twice}: parameters are called after features. Make names unique.")
        for feature in self.features:
            name = feature["name"]
            if unknown := sorted(set(feature) - KEYS):
                raise ValueError(f"feature {name!r} has {unknown}; what a feature may have is {sorted(KEYS)}.")
            if not isinstance(name, str) or not name.isidentifier() or hasattr(torch.nn.ModuleDict(), name):
                raise ValueError(
                    f"feature {name!r} cannot name a parameter. Choose an identifier that is no attribute of "
                    "torch.nn.ModuleDict, such as 'item_type' for 'type'."
                )
            for key, known in (("kind", KINDS), ("role", ROLES)):
                if feature[key] not in known:
                    raise ValueError(f"feature {name!r}: {key}={feature[key]!r} is not known. Choose one of {known}.")
            self._require_table(feature)
        if not self.categorical:
            raise ValueError("features holds no categorical feature: at least a user or an item is needed.")

    def validate_choices(self):
        """Known words, and parts that the architecture can be made of."""
        _require_known(self, "architecture", ARCHITECTURES)
        _require_known(self, "attention_normalization", ATTENTION_NORMALIZATIONS)
        if self.architecture == "din" and not any("shares" in feature for feature in self.sequences):
            raise ValueError("architecture='din' attends over a sequence that shares an item feature; there is none.")
        if not self.hidden_sizes and self.architecture not in ("lr", "deepfm"):
            raise ValueError(f"architecture={self.architecture!r} needs hidden_sizes; only 'deepfm' can be without.")

    def validate_numbers(self):
        """Positive sizes, shares between 0 and 1."""
        sizes = [self.embedding_dim, *self.hidden_sizes, *self.attention_hidden_sizes]
        if min(sizes) < 1:
            raise ValueError(
                f"embedding_dim={self.embedding_dim}, hidden_sizes={self.hidden_sizes} and "
                f"attention_hidden_sizes={self.attention_hidden_sizes} must be positive."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and less than 1.")
        if self.prior is not None and not 0 < self.prior < 1:
            raise ValueError(f"prior={self.prior} must lie between 0 and 1, both excluded: its logit is needed.")

    def _of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [feature for feature in self.features if feature["kind"] == kind]

    def _require_table(self, feature: dict[str, Any]) -> None:
        name, size, shared = feature["name"], feature.get("vocab_size"), feature.get("shares")
        if feature["kind"] == "numeric" and size is not None:
            raise ValueError(f"feature {name!r} is numeric and has no vocab_size. Leave it out.")
        if shared is not None:
            own = next((f for f in self.categorical if f["name"] == shared), None)
            if feature["kind"] != "sequence" or own is None or own["role"] != "item":
                raise ValueError(
                    f"feature {name!r} shares {shared!r}: only a sequence can share, and only the table of a "
                    "categorical feature of role 'item'."
                )
            if size is not None:
                raise ValueError(f"feature {name!r} shares the table of {shared!r}; leave its vocab_size out.")
        elif feature["kind"] != "numeric" and (isinstance(size, bool) or not isinstance(size, int) or size < 2):
            raise ValueError(
                f"feature {name!r}: vocab_size={size!r} must be an integer of at least 2, for padding (0) and unknown "
                "values (1)."
            )


def _completed(feature: dict[str, Any]) -> dict[str, Any]:
    """A feature with its role and size; whatever has no name is left for validation to refuse."""
    full = {"name": None, "kind": "categorical", "role": "context"} | feature
    if full["kind"] in ("categorical", "sequence") and "vocab_size" not in full and full.get("shares") is None:
        full["vocab_size"] = 2
    return {key: value for key, value in full.items() if value is not None or key == "name"}


def _require_known(config: CtrConfig, field: str, known: tuple[str, ...]) -> None:
    if getattr(config, field) not in known:
        raise ValueError(f"{field}={getattr(config, field)!r} is not known. Choose one of {known}.")


__all__ = ["CtrConfig"]
