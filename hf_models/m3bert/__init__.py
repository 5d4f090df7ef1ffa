"""m3BERT: one encoder, every depth and width."""

from ..registration import register_family
from .configuration_m3bert import M3BertConfig
from .modeling_m3bert import (
    M3BertForMaskedLM,
    M3BertForSentenceEmbedding,
    M3BertForSequenceClassification,
    M3BertForTokenClassification,
    M3BertModel,
    M3BertPreTrainedModel,
)


def register() -> None:
    """Register the family with transformers' Auto classes."""
    register_family(
        M3BertConfig,
        {
            "AutoModel": M3BertModel,
            "AutoModelForMaskedLM": M3BertForMaskedLM,
            "AutoModelForSequenceClassification": M3BertForSequenceClassification,
            "AutoModelForTextEncoding": M3BertForSentenceEmbedding,
            "AutoModelForTokenClassification": M3BertForTokenClassification,
        },
    )


__all__ = [
    "M3BertConfig",
    "M3BertForMaskedLM",
    "M3BertForSentenceEmbedding",
    "M3BertForSequenceClassification",
    "M3BertForTokenClassification",
    "M3BertModel",
    "M3BertPreTrainedModel",
    "register",
]
