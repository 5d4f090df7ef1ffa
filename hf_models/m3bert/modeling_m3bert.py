# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
r"""m3BERT (arXiv 2605.19568): an encoder whose states are trained at several depths and, of each, at several widths.

    h_0 = Dropout(n_e(E[token] + P[position]))                 learned positions, or none and RoPE in the attention
    h_l = a + MLP(n2(a)),   a = h_{l-1} + Attn(n1(h_{l-1}))    attention in both directions, SwiGLU, no biases
    H_l = n(h_l)            for l in mrl_layers                how an exit is normalised: `exit_norm`
    out = H_l[:, :d]        for d in mrl_dims

`model(..., exit_layer=8, embed_dim=64)` ends at a cell of that grid; `model.truncate(layers=8, dim=64)` is the model
that has nothing else. The layers are EuroBERT's, what is here is the grid.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GenericForTokenClassification
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    ModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.eurobert.modeling_eurobert import (
    EuroBertAttention,
    EuroBertDecoderLayer,
    EuroBertMLP,
    EuroBertRMSNorm,
    EuroBertRotaryEmbedding,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_m3bert import M3BertConfig
from .grid_loss import grid_losses
from .prefixes import M3BertPrefixLinear, M3BertPrefixRMSNorm, M3BertPrefixSquareLinear
from .truncation import TruncationMixin


@dataclass
class M3BertModelOutput(BaseModelOutput):
    r"""
    exit_hidden_states (`tuple` of `torch.FloatTensor` of shape `(batch, tokens, hidden_size)`):
        With `output_exit_states=True`: the state of each of `config.mrl_layers` up to the exit, at full width,
        normalised as `config.exit_norm` says.
    """

    exit_hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class M3BertMaskedLMOutput(MaskedLMOutput):
    r"""
    grid_losses (`torch.FloatTensor` of shape `(layers, dims)`):
        Cross-entropy of each cell, without weights and gradient; `None` where the loss is that of one cell.
    """

    grid_losses: torch.FloatTensor | None = None


@dataclass
class M3BertSentenceEmbeddingOutput(ModelOutput):
    r"""
    embeddings (`torch.FloatTensor` of shape `(batch, dim)`):
        A vector for each text: pooled, cut to `dim`, then, with `config.normalize_embeddings`, of length 1.
    exit_embeddings (`tuple` of `torch.FloatTensor` of shape `(batch, hidden_size)`):
        With `output_exit_embeddings=True`: of each of `config.mrl_layers` up to the exit, pooled, neither cut nor
        normalised.
    """

    embeddings: torch.FloatTensor | None = None
    exit_embeddings: tuple[torch.FloatTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class M3BertAttention(EuroBertAttention):
    """Attention in both directions; dropout on its output."""

    def __init__(self, config: M3BertConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.hidden_dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = super().forward(hidden_states, **kwargs)
        return F.dropout(output, self.hidden_dropout, self.training), weights


class M3BertMLP(EuroBertMLP):
    """SwiGLU; dropout on its output."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(hidden_states), self.config.hidden_dropout, self.training)


class M3BertLayer(EuroBertDecoderLayer):
    """One block: `(batch, tokens, hidden)` -> the same."""

    def __init__(self, config: M3BertConfig, layer_idx: int):
        nn.Module.__init__(self)  # the parent would build its own attention first
        self.hidden_size = config.hidden_size
        self.self_attn = M3BertAttention(config, layer_idx)
        self.mlp = M3BertMLP(config)
        self.input_layernorm = EuroBertRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = EuroBertRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class M3BertPreTrainedModel(TruncationMixin, PreTrainedModel):
    """Initialisation, plans, and cutting to a cell of the grid, in memory and at load time."""

    config: M3BertConfig
    config_class = M3BertConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["M3BertLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": M3BertLayer, "attentions": M3BertAttention}


class M3BertModel(M3BertPreTrainedModel):
    """The encoder without a head: token ids -> states, of the whole depth and width or of a cell."""

    def __init__(self, config: M3BertConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.position_embedding_type == "absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = EuroBertRotaryEmbedding(config=config)
        self.embed_norm = EuroBertRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList([M3BertLayer(config, i) for i in range(config.num_hidden_layers)])
        if config.exit_norm == "per_exit":
            self.exit_norms = nn.ModuleDict(
                {
                    str(layer): EuroBertRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
                    for layer in config.mrl_layers
                }
            )
        elif config.final_norm:
            self.norm = EuroBertRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def exit_state(self, hidden_states: torch.Tensor, layer: int) -> torch.Tensor:
        """What leaves the model after `layer` layers, `(batch, tokens, hidden_size)`."""
        if self.config.exit_norm == "per_exit":
            return self.exit_norms[str(layer)](hidden_states)
        raw = self.config.exit_norm == "none" and (layer < len(self.layers) or not self.config.final_norm)
        return hidden_states if raw else self.norm(hidden_states)

    def embed(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The stream's first state `(batch, tokens, hidden)`, and cosine and sine of the rotary embeddings `(batch,
        tokens, head_dim)`; 1 and 0 where there are none."""
        if self.config.position_embedding_type == "absolute":
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)
            one = inputs_embeds.new_ones(1, 1, self.config.head_dim)
            rotation = (one, torch.zeros_like(one))
        else:
            rotation = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        return F.dropout(self.embed_norm(inputs_embeds), self.config.embedding_dropout, self.training), rotation

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        exit_layer: int | None = None,
        embed_dim: int | None = None,
        output_exit_states: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> M3BertModelOutput:
        """Computes `exit_layer` layers (`None`: all) and returns the first `embed_dim` entries (`None`:
        `config.embed_dim` or all) of their state: `(batch, tokens)` ids, mask and positions, or `(batch, tokens,
        hidden)` embeddings, to `last_hidden_state (batch, tokens, embed_dim)`.

        Where `position_ids` are not given, a text begins at position 0 on whichever side it is padded. A row without
        any token is computed as if it had no padding: what it gives is defined, and meaningless. `ValueError` for a
        layer or dim that was not trained, and for more tokens than there are learned positions.
        """
        depth, dim = self.config.cell(exit_layer, embed_dim)
        depth = len(self.layers) if exit_layer is None else depth
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if 0 in inputs_embeds.shape[:2]:
            raise ValueError(f"Inputs {tuple(inputs_embeds.shape[:2])} hold no tokens: leave empty batches out.")
        self._check_length(inputs_embeds.shape[1])
        if position_ids is None:
            position_ids = positions_from_mask(inputs_embeds, attention_mask)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=without_empty_rows(attention_mask)
        )
        hidden_states, rotation = self.embed(inputs_embeds, position_ids)
        exits = []
        for number, layer in enumerate(self.layers[:depth], 1):
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=rotation,
                position_ids=position_ids,
                **kwargs,
            )
            if output_exit_states and number < depth and number in self.config.mrl_layers:
                exits.append(self.exit_state(hidden_states, number))
        hidden_states = self.exit_state(hidden_states, depth)
        return M3BertModelOutput(
            last_hidden_state=hidden_states[..., :dim],
            exit_hidden_states=(*exits, hidden_states) if output_exit_states else None,
        )

    def _check_length(self, tokens: int) -> None:
        positions = self.config.max_position_embeddings
        if self.config.position_embedding_type == "absolute" and tokens > positions:
            raise ValueError(
                f"{tokens} tokens are more than max_position_embeddings={positions} learned positions: truncate the "
                "texts (tokenizer(..., truncation=True, max_length=...))."
            )


def positions_from_mask(inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """`(1 or batch, tokens)`: counted from the first token that is not padding; padding before it is at 0."""
    positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
    if attention_mask is None or attention_mask.ndim != 2:
        return positions
    first = (attention_mask != 0).int().argmax(dim=-1, keepdim=True).to(positions.device)  # (batch, 1)
    return (positions - first).clamp_min(0)


def without_empty_rows(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask with rows of nothing but padding turned into rows without any: a softmax over nothing is NaN."""
    if attention_mask is None or attention_mask.ndim != 2:
        return attention_mask
    seen = attention_mask != 0
    return seen | ~seen.any(dim=-1, keepdim=True)


def pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """One vector `(batch, hidden)` for each text of `hidden_states (batch, tokens, hidden)`: the mean of the tokens
    that are not padding, summed in fp32, or the first of them. Zeros for a row without any."""
    if attention_mask is None:
        seen = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    else:
        seen = (attention_mask != 0).to(hidden_states.device)
    if pooling == "cls":
        seen = seen & (seen.cumsum(dim=-1) == 1)
    kept = hidden_states.masked_fill(~seen.unsqueeze(-1), 0.0)
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    count = seen.sum(dim=-1, keepdim=True).clamp_min(1)
    return (kept.sum(dim=1, dtype=dtype) / count).to(hidden_states.dtype)


class M3BertPredictionHead(nn.Module):
    """States `(..., d)` -> logits `(..., vocab_size)` for any d up to the width: one head, of which each d uses the
    first entries."""

    def __init__(self, config: M3BertConfig):
        super().__init__()
        self.dense = M3BertPrefixSquareLinear(config.width, config.width)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = M3BertPrefixRMSNorm(config.width, eps=config.rms_norm_eps)
        # Tied, it stays the whole table, of which the prefix is used.
        self.decoder = nn.Linear(config.hidden_size if config.tie_word_embeddings else config.width, config.vocab_size)

    def features(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the decoder projects onto the vocabulary, `(..., d)`."""
        if any(hasattr(layer, "base_layer") for layer in (self.dense, self.decoder)):
            raise ValueError(
                "An adapter on head.dense or head.decoder knows no prefixes, and the decoder is read past it: "
                "leave them out of target_modules, or train them whole by modules_to_save=['head']."
            )
        return self.norm(self.activation(self.dense(hidden_states)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.decoder.weight[:, : hidden_states.shape[-1]]
        return F.linear(self.features(hidden_states), weight.contiguous(), self.decoder.bias)


class M3BertForMaskedLM(M3BertPreTrainedModel):
    """Masked language model; its loss is the sum over the grid of exits."""

    _tied_weights_keys = {"head.decoder.weight": "model.embed_tokens.weight"}

    def __init__(self, config: M3BertConfig):
        super().__init__(config)
        self.model = M3BertModel(config)
        self.head = M3BertPredictionHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        exit_layer: int | None = None,
        embed_dim: int | None = None,
        return_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> M3BertMaskedLMOutput:
        """With `labels (batch, tokens)` (-100: nothing to predict), the loss is the weighted sum over the grid, or
        that of one cell where `exit_layer` or `embed_dim` is given; each term is a mean over the labels, or their sum
        over `num_items_in_batch`. Logits `(batch, tokens, vocabulary)` are those of the exit; `return_logits=None`
        leaves them out in training, when the labels are there."""
        one_cell = exit_layer is not None or embed_dim is not None
        grid = labels is not None and not one_cell
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            exit_layer=exit_layer,
            embed_dim=embed_dim,
            output_exit_states=grid,
            **kwargs,
        )
        loss = losses = logits = None
        if labels is not None:
            states = outputs.exit_hidden_states if grid else (outputs.last_hidden_state,)
            dims = self.config.mrl_dims if grid else [outputs.last_hidden_state.shape[-1]]
            cells = grid_losses(
                self.head.features, self.head.decoder, states, labels, dims, num_items_in_batch=num_items_in_batch
            )
            losses = cells.detach() if grid else None
            loss = (cells * cells.new_tensor(self.config.cell_weights()) if grid else cells).sum()
        if return_logits or (return_logits is None and (labels is None or not self.training)):
            logits = self.head(outputs.last_hidden_state)
        return M3BertMaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            grid_losses=losses,
        )


class M3BertForSequenceClassification(M3BertPreTrainedModel):
    """A linear classifier on the pooled text."""

    accepts_loss_kwargs = False  # the loss is a mean of the micro-batch: Trainer has to divide it

    def __init__(self, config: M3BertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = M3BertModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = M3BertPrefixLinear(config.width, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """`logits (batch, num_labels)` of the pooled states; `labels (batch,)`, or `(batch, num_labels)` for several
        classes at once, give the loss of `config.problem_type`, as in transformers."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.score(self.dropout(pool(outputs.last_hidden_state, attention_mask, self.config.pooling)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class M3BertForTokenClassification(GenericForTokenClassification, M3BertPreTrainedModel):
    """A linear classifier on every token."""

    accepts_loss_kwargs = False  # the loss is a mean of the micro-batch: Trainer has to divide it

    def __init__(self, config: M3BertConfig):
        # The generic head asks AutoModel for the body, and AutoModel knows no class that came with a Hub repository.
        AutoModel.register(type(config), M3BertModel, exist_ok=True)
        super().__init__(config)
        self.score = M3BertPrefixLinear(config.width, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """`logits (batch, tokens, num_labels)`; `labels (batch, tokens)` (-100: none) give their cross-entropy."""
        # The parent's without a cache among the arguments.
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )


class M3BertForSentenceEmbedding(M3BertPreTrainedModel):
    """One vector for each text."""

    def __init__(self, config: M3BertConfig):
        super().__init__(config)
        self.model = M3BertModel(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        exit_layer: int | None = None,
        embed_dim: int | None = None,
        output_exit_embeddings: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> M3BertSentenceEmbeddingOutput:
        """Embeddings `(batch, embed_dim)` at a cell of the grid: pooled over the tokens that are not padding, then
        cut, then brought to length 1. A row of nothing but padding gives zeros."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            exit_layer=exit_layer,
            embed_dim=embed_dim,
            output_exit_states=output_exit_embeddings,
            **kwargs,
        )
        embeddings = pool(outputs.last_hidden_state, attention_mask, self.config.pooling)
        if self.config.normalize_embeddings:
            embeddings = F.normalize(embeddings.float(), dim=-1).to(embeddings.dtype)
        exits = None
        if output_exit_embeddings:
            exits = tuple(pool(state, attention_mask, self.config.pooling) for state in outputs.exit_hidden_states)
        return M3BertSentenceEmbeddingOutput(
            embeddings=embeddings,
            exit_embeddings=exits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "M3BertForMaskedLM",
    "M3BertForSentenceEmbedding",
    "M3BertForSequenceClassification",
    "M3BertForTokenClassification",
    "M3BertModel",
    "M3BertPreTrainedModel",
]
