"""One place that makes a family of models known to transformers' Auto classes and to the Hub repositories that carry
its code."""

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto


# transformers looks class names up in these tables (label smoothing of a causal LM, its own common tests);
# registration with the Auto classes does not feed them.
_NAME_TABLES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTextEncoding": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}


def register_family(config_class: type[PreTrainedConfig], models: dict[str, type[PreTrainedModel]]) -> None:
    """Register `config_class` and its `models` (`{"AutoModelForCausalLM": SigmaMoeForCausalLM, ...}`) with the Auto
    classes.

    Each saved repository carries the family's code and an `auto_map` of *all* heads, so that it loads under every Auto
    class in an environment that has only transformers. Safe to call twice.
    """
    model_type = config_class.model_type
    AutoConfig.register(model_type, config_class, exist_ok=True)
    config_class.register_for_auto_class()
    auto_map = {"AutoConfig": _path_in_repository(config_class)}
    for auto_name, model_class in models.items():
        getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_name)
        _keep_name_when_saved(model_class)
        getattr(modeling_auto, _NAME_TABLES[auto_name])[model_type] = model_class.__name__
        auto_map[auto_name] = _path_in_repository(model_class)
    config_class._family_auto_map = auto_map


def _keep_name_when_saved(model_class: type[PreTrainedModel]) -> None:
    """FSDP2 makes a model an instance of a subclass that it derives. Saving takes that for the model's code: it would
    name the subclass in `auto_map` and copy torch's own files in the place of ours."""

    def save_pretrained(self, *args, **kwargs):
        cls = type(self)
        names = cls.__module__, cls.__name__
        cls.__module__, cls.__name__ = model_class.__module__, model_class.__name__
        try:
            return model_class.save_pretrained(self, *args, **kwargs)
        finally:
            cls.__module__, cls.__name__ = names

    def __init_subclass__(cls, **kwargs):
        super(model_class, cls).__init_subclass__(**kwargs)
        if any(base.__module__.startswith("torch.distributed.fsdp") for base in cls.__bases__):
            cls.save_pretrained = save_pretrained

    model_class.__init_subclass__ = classmethod(__init_subclass__)


def _path_in_repository(cls: type) -> str:
    return f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"
