"""The concepts of a model: their names, text embeddings, prior and frequencies, set together."""

from collections.abc import Sequence

import torch
from torch import nn

from .marginals import concept_marginal


class ConceptBankMixin:
    """`set_concepts`, for the model with and without its classifier."""

    @torch.no_grad()
    def set_concepts(
        self,
        names: Sequence[str],
        embeddings: torch.Tensor,
        class_concept_matrix: torch.Tensor | None = None,
        *,
        groups: dict[str, list[int]] | None = None,
        frequencies: torch.Tensor | None = None,
        encoder: str | None = None,
    ) -> None:
        """Make the model speak of these concepts.

        The text embeddings and the concept prior are stored with the weights. What has one entry a concept (biases,
        statistics, the classifier) is made anew where their number or names change; adapters are kept.

        Args:
            names: M of them, unique.
            embeddings: `(M, text_embedding_dim)`; the config takes over their width if it is another one.
            class_concept_matrix: `(K, M)`, which class has which concept: what the concept prior is made of. `None`:
                the prior is uniform.
            groups: concepts that are intervened on together.
            frequencies: `(M,)`, share of the training images that have the concept; its log-odds are where the
                concept's bias starts. `None`: the mean over the classes of the matrix.
            encoder: name of the text encoder.
        """
        body = getattr(self, "model", self)
        config, count = self.config, len(names)
        if embeddings.ndim != 2 or embeddings.shape[0] != count:
            raise ValueError(f"embeddings have shape {tuple(embeddings.shape)} for {count} names: one row for each.")
        if not embeddings.isfinite().all():
            raise ValueError("embeddings hold NaN or infinity.")
        gamma = concept_marginal(
            class_concept_matrix,
            count,
            prior=config.concept_prior,
            temperature=config.concept_prior_temperature,
            floor=config.marginal_floor,
        )
        changed, wider = list(names) != config.concept_names, embeddings.shape[1] != config.text_embedding_dim
        _describe(config, list(names), groups, embeddings.shape[1], encoder)
        body.text_embeddings, body.gamma = embeddings.detach().to(body.text_embeddings), gamma.to(body.gamma)
        if wider and config.uses_adapters:
            first = body.text_adapter.layers[0]
            body.text_adapter.layers[0] = _new_linear(self, embeddings.shape[1], first)
        if changed:
            self._renew_concept_parameters(body, count)
        if frequencies is None and class_concept_matrix is not None:
            frequencies = class_concept_matrix.float().mean(0)
        if frequencies is not None:
            odds = torch.logit(frequencies.double().clamp(1e-3, 1 - 1e-3))
            bias = concept_bias_of(body)
            if bias is not None:
                bias.copy_(odds)
        self.apply_stage()

    def _renew_concept_parameters(self, body: nn.Module, count: int) -> None:
        """New biases, projections, statistics and classifier for `count` concepts."""
        config = self.config
        if config.uses_adapters and config.readout != "literal":
            body.concept_bias = nn.Parameter(body.concept_bias.new_zeros(count))
        elif config.readout == "vanilla":
            body.concept_projection = _new_linear(self, config.hidden_size, body.concept_projection, rows=count)
        elif config.readout == "cem":
            rows = count * 2 * config.cem_dim
            body.concept_embeddings.num_concepts = count
            body.concept_embeddings.context = _new_linear(
                self, config.hidden_size, body.concept_embeddings.context, rows=rows
            )
        if body is not self:
            if config.readout != "linear_probe":
                self.classifier = _new_linear(self, self.head_width, self.classifier)
            for name, value in (("mean", 0.0), ("std", 1.0), ("low", 0.0), ("high", 1.0)):
                setattr(self, f"activation_{name}", self.activation_mean.new_full((count,), value))


def concept_bias_of(body: nn.Module) -> torch.Tensor | None:
    """The parameter `(M,)` that a concept's log-odds start from; `None` for read-outs without one."""
    if body.config.readout == "vanilla":
        return body.concept_projection.bias
    return getattr(body, "concept_bias", None)


def _describe(config, names: list[str], groups: dict | None, width: int, encoder: str | None) -> None:
    """Put the bank into the config, all of it or nothing."""
    kept = {name: getattr(config, name) for name in ("concept_names", "num_concepts", "concept_groups")}
    config.concept_names, config.num_concepts = names, len(names)
    config.concept_groups = None if groups is None else {key: list(value) for key, value in groups.items()}
    try:
        config.validate_concepts()
    except ValueError:
        for name, value in kept.items():
            setattr(config, name, value)
        raise
    config.text_embedding_dim, config.concept_encoder = width, encoder


def _new_linear(model: nn.Module, columns: int, old: nn.Linear, *, rows: int | None = None) -> nn.Linear:
    """A fresh layer in the place of `old`, initialised as the model initialises its own."""
    new = type(old)(columns, old.out_features if rows is None else rows)
    new = new.to(device=old.weight.device, dtype=old.weight.dtype)
    model._init_weights(new)
    return new


__all__ = ["ConceptBankMixin", "concept_bias_of"]
