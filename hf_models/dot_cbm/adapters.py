"""The trained maps between the backbone's tokens, the concepts and the classes."""

import torch
from torch import nn


class DotCbmAdapterLinear(nn.Linear):
    """A layer of an adapter, a class of its own because it is initialised otherwise: with the 0.02 of transformers,
    three narrow layers take all but their biases away, and every patch and concept points in one direction."""


class DotCbmAdapter(nn.Module):
    """An MLP with ReLU and dropout between its layers: `(..., in)` -> `(..., out)`."""

    def __init__(self, in_features: int, out_features: int, *, num_layers: int, dropout: float):
        super().__init__()
        widths = [in_features] + [out_features] * num_layers
        self.layers = nn.ModuleList([DotCbmAdapterLinear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            hidden_states = self.dropout(layer(hidden_states).relu())
        return self.layers[-1](hidden_states)


class DotCbmConceptEmbeddings(nn.Module):
    """The concept embeddings of CEM (arXiv 2209.09056): each concept has a vector for present and one for absent, made
    of the global token, and its logit is read from both."""

    def __init__(self, in_features: int, num_concepts: int, width: int):
        super().__init__()
        self.num_concepts, self.width = num_concepts, width
        self.context = nn.Linear(in_features, num_concepts * 2 * width)
        self.score = nn.Linear(2 * width, 1)

    def forward(self, global_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(batch, M)`, and the pairs of vectors `(batch, M, 2, width)`."""
        context = nn.functional.leaky_relu(self.context(global_token))
        pairs = context.view(-1, self.num_concepts, 2, self.width)
        return self.score(pairs.flatten(2)).squeeze(-1), pairs

    def slopes(self, pairs: torch.Tensor) -> torch.Tensor:
        """Gradient of the logits with respect to the global token, `(batch, M, D)`."""
        gain = torch.where(pairs.flatten(2) > 0, 1.0, 0.01).to(pairs.dtype) * self.score.weight  # (batch, M, 2 width)
        weight = self.context.weight.view(self.num_concepts, 2 * self.width, -1)
        return torch.einsum("bmk,mkd->bmd", gain, weight)


def mixed_embeddings(pairs: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """`p c+ + (1 - p) c-`, `(batch, M, width)`, of pairs `(batch, M, 2, width)` and p `(batch, M)`."""
    p = probabilities.unsqueeze(-1).to(pairs.dtype)
    return p * pairs[:, :, 0] + (1 - p) * pairs[:, :, 1]


__all__ = ["DotCbmAdapter", "DotCbmAdapterLinear", "DotCbmConceptEmbeddings", "mixed_embeddings"]
