# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
r"""Five models of the click-through rate as one family. A row has features f with embeddings e_f of one width.

    lr          z = b + sum_f w_f                                             Richardson et al. 2007
    wide_deep   z = b + sum_f w_f + MLP([e_1, .., e_F])                       Cheng et al. 2016, arXiv 1606.07792
    pnn         z = b + MLP([e_1, .., e_F, <e_i, e_j> for i < j])             Qu et al. 2016, arXiv 1611.00144 (IPNN)
    deepfm      z = b + sum_f w_f + sum_{i<j} <e_i, e_j> + MLP([e_1, .., e_F])  Guo et al. 2017, arXiv 1703.04247
    din         z = b + MLP([e_1, .., e_F]), e_f = sum_j a(e_j, t) e_j for f a history   Zhou et al. 2018, 1706.06978

A numeric feature's embedding is a vector times its value; a sequence's is the mean over its entries, and in DIN, where
it shares the table of an item feature, its attention under the candidate t. Crosses of Wide & Deep are features like
others: made when the data are encoded. DIN's Dice is left out, which needs statistics of a batch.

The forward pass has neither buffers nor control flow that depends on data: it runs under `torch.func.functional_call`
and `vmap` over the stacked parameters of many users, and exports.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_ctr import CtrConfig
from .fields import CtrFields, CtrFirstOrder, CtrNumericFields, TouchedRows, touched_rows
from .interactions import CtrInterest, inner_products, mean_of_known, pairwise_sum
from .outputs import CtrModelOutput, CtrOutput


class CtrLayer(GradientCheckpointingLayer):
    """A linear map, its activation, dropout."""

    def __init__(self, config: CtrConfig, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, inputs)` to `(batch, outputs)`."""
        return self.dropout(self.act_fn(self.linear(hidden_states)))


class CtrHead(nn.Module):
    """The intercept, and what the MLP adds to it."""

    def __init__(self, config: CtrConfig):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        if config.architecture != "lr" and config.hidden_sizes:
            self.output = nn.Linear(config.hidden_sizes[-1], 1, bias=False)

    def forward(self, shallow_logits: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """`(batch,)`."""
        logits = shallow_logits + self.bias
        return logits if hidden is None else logits + self.output(hidden)[:, 0]


class CtrPreTrainedModel(PreTrainedModel):
    """Initialisation, and the tables."""

    config: CtrConfig
    config_class = CtrConfig
    base_model_prefix = "model"
    main_input_name = "categorical_features"
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    _no_split_modules = []
    # The loss is a mean over rows: the Trainer is to divide it by its accumulation steps.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        if isinstance(module, CtrNumericFields):
            init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, CtrFirstOrder):
            for table in (*module.tables.values(), getattr(module, "numeric", None)):
                if table is not None:
                    init.zeros_(table.weight)
        if isinstance(module, CtrHead):
            prior = self.config.prior
            init.constant_(module.bias, 0.0 if prior is None else math.log(prior / (1 - prior)))

    def get_input_embeddings(self) -> nn.Embedding | None:
        """The table of the item, of all tables the one that grows while a model is in use; of the first feature where
        there is no item. All tables: [`~CtrModel.touched_rows`]."""
        return next(iter(self.base_model.tables_of(self._first_feature())), None)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another table in the place of the one that `get_input_embeddings` gives."""
        body, name = self.base_model, self._first_feature()
        (body.embeddings if hasattr(body, "embeddings") else body.first_order).tables[name] = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """[`resize_feature`] of the item. New rows start as the unknown row, whatever `mean_resizing` says."""
        count = self.get_input_embeddings().num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            count = -(-count // pad_to_multiple_of) * pad_to_multiple_of
        self.resize_feature(self._first_feature(), count)
        return self.get_input_embeddings()

    def resize_feature(self, name: str, vocab_size: int) -> None:
        """Give a feature's tables `vocab_size` rows: for values that appeared after training, whose rows start as the
        unknown row (id 1), or to drop the last ones. `ValueError` for a feature without a table."""
        if name not in self.config.tables:
            raise ValueError(f"{name!r} has no table of its own; {sorted(self.config.tables)} have.")
        features = [f | {"vocab_size": vocab_size} if f["name"] == name else f for f in self.config.features]
        type(self.config)(features=features)  # validates the size before anything is changed
        for table in self.base_model.tables_of(name):
            old, kept = table.weight, min(table.num_embeddings, vocab_size)
            with torch.no_grad():
                added = old[1:2].expand(vocab_size - kept, -1)
                table.weight = nn.Parameter(torch.cat([old[:kept], added]), requires_grad=old.requires_grad)
            table.num_embeddings = vocab_size
        self.config.features = features

    def _first_feature(self) -> str:
        return self.config.item_feature or self.config.categorical[0]["name"]


class CtrModel(CtrPreTrainedModel):
    """Features to what a head makes a logit of: the MLP's state, and what goes past it."""

    def __init__(self, config: CtrConfig):
        super().__init__(config)
        features, width = len(config.features), config.embedding_dim
        if any(config.has_first_order(feature) for feature in config.features):
            self.first_order = CtrFirstOrder(config)
        if config.architecture != "lr":
            self.embeddings = CtrFields(config)
            pairs = features * (features - 1) // 2 if config.architecture == "pnn" else 0
            sizes = [features * width + pairs, *config.hidden_sizes]
            self.layers = nn.ModuleList(CtrLayer(config, *pair) for pair in zip(sizes[:-1], sizes[1:]))
        if config.architecture == "din":
            self.interest = CtrInterest(config)
        self.post_init()

    def tables_of(self, name: str) -> list[nn.Embedding]:
        """Every table with a row for each value of a feature, embeddings first; a history that shares them has its
        first-order weights here, too."""
        found = []
        if hasattr(self, "embeddings"):
            found.append(self.embeddings.tables[name])
        if hasattr(self, "first_order"):
            names = [name, *(f["name"] for f in self.config.sequences if f.get("shares") == name)]
            found += [self.first_order.tables[n] for n in names if n in self.first_order.tables]
        return found

    def touched_rows(
        self, categorical_features: torch.Tensor | None = None, sequence_features: torch.Tensor | None = None
    ) -> list[TouchedRows]:
        """The rows of every table that a batch reads: what a device needs of the tables, and all that it can change.

        Args:
            categorical_features: `(batch, columns)`; sequence_features: `(batch, sequences, length)`. Either may be
                left out, as a model without sequences does.

        Returns:
            One entry for each table, the same order for every batch; without padding.
        """
        parts = {name: getattr(self, name) for name in ("embeddings", "first_order") if hasattr(self, name)}
        batch = (categorical_features, sequence_features)
        return [found for name, part in parts.items() for found in touched_rows(part, name, self.config, *batch)]

    @can_return_tuple
    def forward(
        self,
        categorical_features: torch.LongTensor,
        numeric_features: torch.FloatTensor | None = None,
        sequence_features: torch.LongTensor | None = None,
        **kwargs,
    ) -> CtrModelOutput:
        """A batch of rows.

        Args:
            categorical_features: `(batch, categorical features)`, ids; 0 where a value is absent, 1 where unknown.
            numeric_features: `(batch, numeric features)`.
            sequence_features: `(batch, sequences, length)`, ids, filled up with 0 on any side.

        Raises:
            ValueError: features of a kind that the config describes were not given.
        """
        given = {"numeric": numeric_features, "sequence": sequence_features}
        for kind, described in (("numeric", self.config.numeric), ("sequence", self.config.sequences)):
            if described and given[kind] is None:
                names = [feature["name"] for feature in described]
                raise ValueError(f"{kind}_features must be given: the config describes {names}.")
        row = (categorical_features, numeric_features, sequence_features)
        first_order = self.first_order(*row) if hasattr(self, "first_order") else None
        if self.config.architecture == "lr":
            if first_order is None:
                first_order = self._zeros(categorical_features)
            return CtrModelOutput(shallow_logits=first_order)
        fields, entries = self.embeddings(*row)
        weights = None
        if entries is not None:
            pooled, weights = self._pooled(entries, sequence_features != 0, fields)
            fields = torch.cat([fields, pooled], dim=1)
        shallow = self._zeros(categorical_features).to(fields.dtype) if first_order is None else first_order
        if self.config.architecture == "deepfm":
            shallow = shallow + pairwise_sum(fields)
        hidden = fields.flatten(1)
        if self.config.architecture == "pnn":
            hidden = torch.cat([hidden, inner_products(fields)], dim=1)
        for layer in self.layers:
            hidden = layer(hidden)
        return CtrModelOutput(
            last_hidden_state=hidden if len(self.layers) else None,
            shallow_logits=shallow,
            field_embeddings=fields,
            interest_weights=weights,
        )

    def _pooled(
        self, entries: torch.Tensor, known: torch.Tensor, fields: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One vector for each sequence, `(batch, S, d)`, and the weights of those that DIN attends over."""
        pooled = mean_of_known(entries, known)
        if self.config.architecture != "din":
            return pooled, None
        column = {feature["name"]: i for i, feature in enumerate(self.config.categorical)}
        shared = [feature.get("shares") for feature in self.config.sequences]
        histories = [i for i, name in enumerate(shared) if name]
        candidates = fields[:, [column[shared[i]] for i in histories]]
        interests, weights = self.interest(entries[:, histories], candidates, known[:, histories])
        bags = [i for i, name in enumerate(shared) if not name]
        order = [(histories + bags).index(i) for i in range(len(shared))]
        return torch.cat([interests, pooled[:, bags]], dim=1)[:, order], weights

    @staticmethod
    def _zeros(categorical_features: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(categorical_features[:, 0], dtype=torch.float32)


class CtrForCtrPrediction(CtrPreTrainedModel):
    """The logit of a click."""

    def __init__(self, config: CtrConfig):
        super().__init__(config)
        self.model = CtrModel(config)
        self.head = CtrHead(config)
        self.post_init()

    def touched_rows(
        self, categorical_features: torch.Tensor | None = None, sequence_features: torch.Tensor | None = None
    ) -> list[TouchedRows]:
        """As in [`CtrModel`], with the names that parameters have here."""
        found = self.model.touched_rows(categorical_features, sequence_features)
        return [touched._replace(parameter=f"model.{touched.parameter}") for touched in found]

    @can_return_tuple
    def forward(
        self,
        categorical_features: torch.LongTensor,
        numeric_features: torch.FloatTensor | None = None,
        sequence_features: torch.LongTensor | None = None,
        labels: torch.FloatTensor | None = None,
        sample_weight: torch.FloatTensor | None = None,
        logit_offset: torch.FloatTensor | None = None,
        **kwargs,
    ) -> CtrOutput:
        """Logits of a batch of rows; the features are those of [`CtrModel`].

        Args:
            labels: `(batch,)`, 0 or 1 or, after a correction, anything between or beyond.
            sample_weight: `(batch,)`, not negative: the loss is the mean weighted by it, so that a row of weight 0 is
                one that is not there.
            logit_offset: `(batch,)` or a single number, added to the logits in the loss alone.
        """
        found = self.model(categorical_features, numeric_features, sequence_features)
        logits = self.head(found.shallow_logits, found.last_hidden_state)
        loss = None
        if labels is not None:
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if logit_offset is not None:
                scores = scores + logit_offset
            loss = F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")
            if sample_weight is None:
                loss = loss.mean()
            else:
                weight = sample_weight.to(loss.dtype)
                loss = (loss * weight).sum() / weight.sum().clamp_min(torch.finfo(loss.dtype).tiny)
        return CtrOutput(loss=loss, logits=logits, interest_weights=found.interest_weights)


__all__ = ["CtrForCtrPrediction", "CtrModel", "CtrPreTrainedModel"]
