"""A small m3BERT for the tests of this folder, with weights large enough that every layer matters."""

import torch

from hf_models.m3bert import (
    M3BertConfig,
    M3BertForMaskedLM,
    M3BertForSentenceEmbedding,
    M3BertForSequenceClassification,
    M3BertForTokenClassification,
    M3BertModel,
)


SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
    "mrl_layers": [2, 4, 6],
    "mrl_dims": [4, 8, 16, 32],
    "num_labels": 3,
}
KINDS = {
    "ours": {},
    "faithful": {"exit_norm": "none"},
    "per exit": {"exit_norm": "per_exit"},
    "rope": {"position_embedding_type": "rope"},
    "tied": {"tie_word_embeddings": True},
}
HEADS = (
    M3BertModel,
    M3BertForMaskedLM,
    M3BertForSequenceClassification,
    M3BertForTokenClassification,
    M3BertForSentenceEmbedding,
)
# Lengths 9, 5 and 1, padded on the right; pad is 1.
IDS = torch.tensor(
    [
        [0, 5, 9, 13, 7, 21, 40, 3, 2],
        [0, 17, 33, 8, 2, 1, 1, 1, 1],
        [60, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
)
MASK = (IDS != 1).long()


def tiny_config(**fields) -> M3BertConfig:
    return M3BertConfig(**(SHAPE | fields))


def tiny(model_class=M3BertModel, **fields):
    """A model in eval mode; norms and biases are not what they begin with, or cutting them wrongly would not show."""
    torch.manual_seed(0)
    model = model_class(tiny_config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model
