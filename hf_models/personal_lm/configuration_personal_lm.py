# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a model that reads, beside a text, an embedding that its user has drawn (arXiv 2501.06062)."""

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


POSITIONS = ("prefix", "suffix")
TASKS = ("sequence_classification", "causal_lm")
MISSING_USERS = ("no_token", "zero")
# The authors' code: one token after the text to classify, five before the text to continue.
DEFAULTS = {"sequence_classification": (1, "suffix"), "causal_lm": (5, "prefix")}


@strict
class PersonalLmConfig(PreTrainedConfig):
    r"""
    Configuration of [`PersonalLmForSequenceClassification`] and [`PersonalLmForCausalLM`].

    It describes what is shared. What a user has of their own, a distribution over embeddings, is not in here and in no
    checkpoint of the model: see `hf_models.personal_lm.UserDistribution`.

    Args:
        base_config (`dict` or `PreTrainedConfig`, *optional*):
            Any text model: of `AutoModel` to classify, of `AutoModelForCausalLM` to continue. `None`: GPT-2.
        task (`str`, defaults to `"sequence_classification"`):
            Or `"causal_lm"`; says what the next two are by default.
        num_user_tokens (`int`, *optional*, defaults to 1 or 5):
            Positions that a user's embedding takes.
        user_token_position (`str`, *optional*, defaults to `"suffix"` or `"prefix"`):
            After the text, whose class is then read from the last user token, or before it.
        missing_user (`str`, defaults to `"no_token"`):
            What `user_embeds=None` means: no token is added, or (`"zero"`) an embedding of zeros is.
        classifier_dropout (`float`, defaults to 0.0):
            Before the classifier.
        use_cache (`bool`, defaults to `True`):
            Whether a language model outside of training returns its keys and values.

    Raises:
        StrictDataclassFieldValidationError: a value of the wrong type.
        StrictDataclassClassValidationError: values that do not fit together; the message names the remedy.
    """

    model_type = "personal_lm"
    sub_configs = {"base_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "hidden_states", "attentions"]

    base_config: dict | PreTrainedConfig | None = None
    task: str = "sequence_classification"
    num_user_tokens: int | None = None
    user_token_position: str | None = None
    missing_user: str = "no_token"
    classifier_dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        if self.base_config is None:
            self.base_config = CONFIG_MAPPING["gpt2"]()
        elif isinstance(self.base_config, dict):
            if "model_type" not in self.base_config:
                raise ValueError("base_config names no model_type, such as 'gpt2'. Add it.")
            fields = dict(self.base_config)
            self.base_config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
        tokens, position = DEFAULTS.get(self.task, (None, None))
        self.num_user_tokens = tokens if self.num_user_tokens is None else self.num_user_tokens
        self.user_token_position = position if self.user_token_position is None else self.user_token_position
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.base_config, name, None)
        self.is_encoder_decoder = bool(self.base_config.is_encoder_decoder)
        if auto_map := getattr(type(self), "_family_auto_map", None):
            kwargs["auto_map"] = dict(auto_map)
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of an embedding."""
        return self.base_config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Of the base model."""
        return self.base_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.base_config.vocab_size = value

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; a configuration of another type is that of a base, so that a model's checkpoint can be
        loaded as the base of a personal one."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            config_dict = {"base_config": config_dict}
        return super().from_dict(config_dict, **kwargs)

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The base model's: where transformers reads and writes the vocabulary and whether embeddings are tied."""
        return self.base_config.get_text_config(*args, **kwargs)

    def validate_choices(self):
        """Known words, and at least one token."""
        for field, known in (
            ("task", TASKS),
            ("user_token_position", POSITIONS),
            ("missing_user", MISSING_USERS),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} is not known. Choose one of {known}.")
        if self.num_user_tokens < 1:
            raise ValueError(f"num_user_tokens={self.num_user_tokens} must be at least 1.")
        if not 0 <= self.classifier_dropout < 1:
            raise ValueError(f"classifier_dropout={self.classifier_dropout} must lie in [0, 1).")

    def validate_causal_lm(self):
        """In a text that is continued, only what stands before a token can be seen by it."""
        if self.task != "causal_lm":
            return
        if self.user_token_position == "suffix":
            raise ValueError(
                "user_token_position='suffix' with task='causal_lm': no token of the text would see the user's. "
                "Choose 'prefix'."
            )
        if self.is_encoder_decoder:
            raise ValueError(
                f"task='causal_lm' needs a decoder, and {self.base_config.model_type} is an encoder with one. Choose "
                "a base of AutoModelForCausalLM, or task='sequence_classification'."
            )


__all__ = ["PersonalLmConfig"]
