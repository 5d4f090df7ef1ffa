"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import ModelOutput


@dataclass
class CtrModelOutput(ModelOutput):
    r"""
    What a [`CtrModel`] makes of its features.

    last_hidden_state (`torch.FloatTensor` of shape `(batch, hidden_sizes[-1])`):
        Of the MLP; `None` where there is none.
    shallow_logits (`torch.FloatTensor` of shape `(batch,)`):
        What goes to the logit past the MLP: first-order weights, and DeepFM's pairs.
    field_embeddings (`torch.FloatTensor` of shape `(batch, features, embedding_dim)`):
        One vector for each feature: categorical ones, numeric ones, sequences; `None` for `"lr"`.
    interest_weights (`torch.FloatTensor` of shape `(batch, histories, length)`):
        DIN's weight of each entry of each history, 0 at padding.
    """

    last_hidden_state: torch.FloatTensor | None = None
    shallow_logits: torch.FloatTensor | None = None
    field_embeddings: torch.FloatTensor | None = None
    interest_weights: torch.FloatTensor | None = None


@dataclass
class CtrOutput(ModelOutput):
    r"""
    A prediction: logits of a click, and the loss of known ones.

    loss (`torch.FloatTensor`):
        Weighted mean of the binary cross-entropy with the labels.
    logits (`torch.FloatTensor` of shape `(batch,)`):
        Of a click, without `logit_offset`.
    interest_weights:
        As in [`CtrModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    interest_weights: torch.FloatTensor | None = None


__all__ = ["CtrModelOutput", "CtrOutput"]
