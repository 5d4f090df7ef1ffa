"""How the embeddings of a row's features meet: all pairs at once, and attention over a history."""

import torch
from torch import nn
from transformers.activations import ACT2FN


def pairwise_sum(fields: torch.Tensor) -> torch.Tensor:
    """`sum_{i<j} <e_i, e_j>` of `(batch, F, d)`, as `(|sum e|^2 - sum |e|^2) / 2` in O(F d) (Rendle 2010)."""
    return (fields.sum(1).square() - fields.square().sum(1)).sum(-1) / 2


def inner_products(fields: torch.Tensor) -> torch.Tensor:
    """`<e_i, e_j>` of `(batch, F, d)` for all i < j, row by row: `(batch, F (F - 1) / 2)`."""
    count = fields.shape[1]
    pairs = [i * count + j for i in range(count) for j in range(i + 1, count)]
    gram = fields @ fields.transpose(1, 2)
    return gram.flatten(1)[:, pairs]


def mean_of_known(embedded: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Mean of `(batch, S, L, d)` over the entries that `known (batch, S, L)` marks; 0 where there is none."""
    weight = known.to(embedded.dtype)
    return (embedded * weight[..., None]).sum(-2) / weight.sum(-1, keepdim=True).clamp_min(1)


class CtrInterest(nn.Module):
    r"""DIN's activation unit (Zhou et al. 2018, section 4.3): what of a history the candidate wakes.

        v = sum_j a_j e_j,   a_j = MLP([e_j, t, e_j - t, e_j * t])

    t is the candidate's embedding. The weights are not normalised unless `attention_normalization="softmax"`; padding
    weighs nothing, and an empty history gives 0.
    """

    def __init__(self, config):
        super().__init__()
        sizes = [4 * config.embedding_dim, *config.attention_hidden_sizes]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:]))
        self.output = nn.Linear(sizes[-1], 1)
        self.act_fn = ACT2FN[config.attention_act]
        self.softmax = config.attention_normalization == "softmax"

    def forward(
        self, history: torch.Tensor, candidate: torch.Tensor, known: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Interests `(batch, S, d)` and weights `(batch, S, L)` of histories `(batch, S, L, d)` for candidates
        `(batch, S, d)`."""
        target = candidate[:, :, None].expand_as(history)
        hidden = torch.cat([history, target, history - target, history * target], dim=-1)
        for layer in self.layers:
            hidden = self.act_fn(layer(hidden))
        weights = self.output(hidden)[..., 0]  # (batch, S, L)
        if self.softmax:
            # A history without entries has a softmax over equal scores, which the mask then clears.
            weights = weights.masked_fill(~known, torch.finfo(weights.dtype).min).softmax(-1)
        weights = weights * known.to(weights.dtype)
        return (weights[..., None] * history).sum(-2), weights


__all__ = ["CtrInterest", "inner_products", "mean_of_known", "pairwise_sum"]
