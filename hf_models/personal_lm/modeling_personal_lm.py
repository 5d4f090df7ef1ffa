# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
r"""A text model that is told who asks without being told who it is (arXiv 2501.06062).

    e ~ D_u                                   drawn afresh on the user's device, for every text that leaves it
    h = base([embed(x), e])  or  base([e, embed(x)])
    class = W h[e]   (suffix)                 next token = head(h)   (prefix)

The model has no weight of any user: a batch brings `user_embeds (batch, tokens, width)`. Padding is moved to the right
of text and user tokens, so that every base model counts positions as it was trained to; where keys and values are to
be continued it stays where it is, and positions are counted by the mask.
"""

import copy
import inspect

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_personal_lm import PersonalLmConfig
from .user_tokens import Placed, check_user_embeds, place_user_tokens


class PersonalLmPreTrainedModel(PreTrainedModel):
    """What both heads share: the base model's embeddings, and the places of the user's tokens."""

    config: PersonalLmConfig
    config_class = PersonalLmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _base_auto_class = AutoModel
    _task = "sequence_classification"

    @classmethod
    def from_base(cls, base: PreTrainedModel | nn.Module, **fields):
        """
        A model around a base that is loaded already, which is used as it is and not copied.

        Args:
            base: what the head's Auto class gives, or a peft model around it. A peft model trains and predicts; merge
                it (`model.model = model.model.merge_and_unload()`) before `save_pretrained`.
            fields: of [`PersonalLmConfig`].
        """
        fields = {"task": cls._task} | fields
        with torch.device("meta"):
            model = cls(cls.config_class(base_config=base.config.to_dict(), **fields))
        model.model = None
        model.to_empty(device=base.device).to(base.dtype)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=model.config.initializer_range)
        model.model = base
        model.config.base_config = base.config
        return model

    @property
    def vocab_size(self) -> int:
        """Of the base model."""
        return self.config.vocab_size

    def get_input_embeddings(self) -> nn.Module:
        """The base model's."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the base model's."""
        self.model.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers, of the base model; both configurations know the new size."""
        resized = self.model.resize_token_embeddings(*args, **kwargs)
        self.config.base_config.vocab_size = self.model.config.vocab_size
        return resized

    def base_takes(self, name: str) -> bool:
        """Whether the base model's `forward` has an argument of this name."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return name in inspect.signature(base.forward).parameters

    def _placed_inputs(self, placed: Placed, given: dict) -> dict[str, torch.Tensor]:
        """Positions and token types of a text, with the user's tokens among them (whose type is 0).

        Raises:
            ValueError: the base model takes none.
        """
        found = {}
        for name in ("position_ids", "token_type_ids"):
            values = given.pop(name, None)
            if values is None:
                continue
            if not self.base_takes(name) or self.config.is_encoder_decoder:
                raise ValueError(f"{self.config.base_config.model_type} takes no {name}. Leave them out.")
            if name == "position_ids":
                found[name] = placed.positions(values, position=self.config.user_token_position)
            else:
                found[name] = placed.extend(values, 0)
        return found

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)

    def personalised(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        user_embeds: torch.Tensor | None,
        *,
        padding: str = "right",
    ) -> Placed:
        """The inputs of the base model.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or draws of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds.")
        if input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.get_input_embeddings()(input_ids)
        batch, length, width = inputs_embeds.shape
        if attention_mask is None:
            attention_mask = torch.ones(batch, length, dtype=torch.long, device=inputs_embeds.device)
        tokens = self.config.num_user_tokens
        if user_embeds is None and self.config.missing_user == "zero":
            user_embeds = inputs_embeds.new_zeros(batch, tokens, width)
        if user_embeds is not None:
            check_user_embeds(user_embeds, batch, tokens, width)
        position = self.config.user_token_position
        return place_user_tokens(inputs_embeds, attention_mask, user_embeds, position=position, padding=padding)


class PersonalLmForSequenceClassification(PersonalLmPreTrainedModel):
    """The class of a text, as its user means it.

    The state of the last token is read: the user's behind the text, the text's own otherwise. An encoder with a
    decoder has the user's tokens in the encoder; the decoder gets one start token, whose state is read.
    """

    accepts_loss_kwargs = False  # the loss is a mean over texts, which the Trainer is to average over its steps

    def __init__(self, config: PersonalLmConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = AutoModel.from_config(config.base_config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        user_embeds: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        r"""
        user_embeds (`torch.FloatTensor` of shape `(batch, num_user_tokens, hidden_size)`, *optional*):
            One draw for each text. `None`: as `config.missing_user` says.
        labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
            Classes; for `problem_type` "regression" and "multi_label_classification" as in transformers.
        kwargs:
            `position_ids` and `token_type_ids` of the text, `output_hidden_states`, `output_attentions`; nothing else.
        """
        placed = self.personalised(input_ids, attention_mask, inputs_embeds, user_embeds)
        options = {name: kwargs.pop(name) for name in ("output_hidden_states", "output_attentions") if name in kwargs}
        options |= self._placed_inputs(placed, kwargs)
        if unknown := [name for name, value in kwargs.items() if value is not None]:
            raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}.")
        if self.config.is_encoder_decoder:
            options["decoder_input_ids"] = self._start_token(placed.mask)
        elif hasattr(self.config.base_config, "use_cache"):
            options["use_cache"] = False
        output = self.model(inputs_embeds=placed.embeds, attention_mask=placed.mask, return_dict=True, **options)
        if self.config.is_encoder_decoder:
            pooled = output.last_hidden_state[:, -1]
        else:
            last = placed.mask.sum(dim=1).long() - 1  # (batch,)
            last = last.clamp_min(0)[:, None, None].expand(-1, 1, placed.embeds.shape[2])
            pooled = output.last_hidden_state.gather(1, last)[:, 0]  # (batch, width)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    def _start_token(self, mask: torch.Tensor) -> torch.Tensor:
        base = self.config.base_config
        start = getattr(base, "decoder_start_token_id", None)
        start = base.pad_token_id if start is None else start
        return mask.new_full((mask.shape[0], 1), 0 if start is None else start, dtype=torch.long)


class PersonalLmForCausalLM(PersonalLmPreTrainedModel, GenerationMixin):
    """A text continued as its user would: the user's tokens stand before it.

    `logits` are those of the text's own tokens, in their places; in the loss the last user token predicts the first
    token of the text. `generate` takes `user_embeds`, one draw for a request, which every step then sees through the
    base model's cache.
    """

    _base_auto_class = AutoModelForCausalLM
    _task = "causal_lm"

    def __init__(self, config: PersonalLmConfig):
        super().__init__(config)
        if config.task != "causal_lm":
            raise ValueError(f"the config is for task={config.task!r}. Give it task='causal_lm'.")
        self.model = AutoModelForCausalLM.from_config(config.base_config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The base model's head."""
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the base model's head."""
        self.model.set_output_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        user_embeds: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        past_key_values=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        user_embeds (`torch.FloatTensor` of shape `(batch, num_user_tokens, hidden_size)`, *optional*):
            One draw for each text. `None`: as `config.missing_user` says.
        labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
            Of the text's tokens, as in any causal language model; -100 is ignored, as are the user's places.
        past_key_values (`Cache`, *optional*):
            Of the base model, with the user's tokens in it already: no `user_embeds` then. `attention_mask` and
            `position_ids` now count these tokens too: ones for them, the text's own mask, ones for what is new.
        kwargs:
            Of the base model. `position_ids` and `token_type_ids` are the text's. `logits_to_keep` counts the text's
            tokens. `use_cache` goes without labels: a cache keeps padding in its place, a loss needs it moved.

        Raises:
            ValueError: user_embeds with a filled cache, a mask that does not cover it, labels with `use_cache=True`,
                or left padding with `use_cache=True` and a base that cannot be told positions.
        """
        options = {"return_dict": True, **kwargs}
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            if user_embeds is not None:
                raise ValueError("user_embeds with a filled cache: the draw of a request goes in with its first text.")
            tokens = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
            return self._continued(tokens, attention_mask, past_key_values, labels=labels, **options)
        asked, kept = options.pop("use_cache", None), options.pop("logits_to_keep", 0)
        if asked and labels is not None:
            raise ValueError("use_cache=True with labels: give one of them.")
        caching = labels is None and (self.config.use_cache and not self.training if asked is None else asked)
        if caching and not self.base_takes("position_ids") and _left_padded(attention_mask):
            if asked:
                raise ValueError(
                    f"{self.config.base_config.model_type} cannot be told positions, so a cache of texts that are "
                    "padded on the left would not be continued rightly. Pad on the right, or use generate."
                )
            caching = False
        padding = "kept" if caching else "right"
        placed = self.personalised(input_ids, attention_mask, inputs_embeds, user_embeds, padding=padding)
        options |= self._placed_inputs(placed, options)
        if caching and self.base_takes("position_ids"):
            options.setdefault("position_ids", placed.counted())
        if past_key_values is not None:
            options["past_key_values"] = past_key_values
        output = self.model(
            inputs_embeds=placed.embeds,
            attention_mask=placed.mask,
            labels=None if labels is None else placed.labels(labels),
            use_cache=caching,
            **options,
        )
        logits = placed.of_text(output.logits, (input_ids if inputs_embeds is None else inputs_embeds).shape[1])
        output.logits = logits[:, slice(-kept, None) if isinstance(kept, int) else kept]
        return output

    def _continued(self, tokens: dict, attention_mask: torch.Tensor | None, past_key_values, **options):
        new, past = next(iter(tokens.values())).shape[1], past_key_values.get_seq_length()
        if attention_mask is not None and attention_mask.ndim == 2:
            if attention_mask.shape[1] != past + new:
                raise ValueError(
                    f"attention_mask covers {attention_mask.shape[1]} places, the cache and the new tokens have "
                    f"{past + new}: ones for the user's tokens, the mask of the text, ones for what is new."
                )
            if options.get("position_ids") is None and self.base_takes("position_ids"):
                options["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, -new:]
        return self.model(**tokens, attention_mask=attention_mask, past_key_values=past_key_values, **options)

    @torch.no_grad()
    def generate(self, inputs=None, *, user_embeds: torch.Tensor | None = None, attention_mask=None, **kwargs):
        """
        As `generate` in transformers, for one draw a request: `user_embeds (batch, num_user_tokens, hidden_size)`.

        Every beam and every returned sequence of a request sees the same draw. What comes back begins with the prompt.
        Lengths (`max_length`, `min_length`, of the call or of its `generation_config`) count the prompt and not the
        user's tokens; processors that look at past tokens, such as a repetition penalty, see those that are
        generated, not the prompt's.

        Raises:
            ValueError: no prompt, draws of another shape, or position_ids, which are counted here.
        """
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        if prompt is None:
            raise ValueError("generate needs a prompt: give input_ids, the beginning-of-text token alone if need be.")
        placed = self.personalised(prompt, attention_mask, None, user_embeds, padding="left")
        added = placed.embeds.shape[1] - prompt.shape[1]
        config = copy.deepcopy(kwargs.pop("generation_config", None) or self.generation_config)
        for name in ("max_length", "min_length"):
            value = kwargs.pop(name, None)
            value = getattr(config, name, None) if value is None else value
            if value:
                setattr(config, name, value + added)
        if kwargs.get("position_ids") is not None:
            raise ValueError("position_ids with generate: positions are counted by the mask. Leave them out.")
        kwargs |= self._placed_inputs(placed, kwargs)
        output = self.model.generate(
            inputs_embeds=placed.embeds, attention_mask=placed.mask, generation_config=config, **kwargs
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        repeated = prompt.repeat_interleave(sequences.shape[0] // prompt.shape[0], dim=0)
        sequences = torch.cat([repeated, sequences], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output


def _left_padded(mask: torch.Tensor | None) -> bool:
    """Whether padding stands before a token of its text."""
    return mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any())


__all__ = [
    "PersonalLmForCausalLM",
    "PersonalLmForSequenceClassification",
    "PersonalLmPreTrainedModel",
]
