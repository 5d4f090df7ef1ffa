"""Small personal models on small random bases for the tests of this folder."""

import torch

from hf_models.personal_lm import PersonalLmConfig, PersonalLmForCausalLM, PersonalLmForSequenceClassification


WIDTH, VOCABULARY = 16, 40
LLAMA = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
BASES = {
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    "llama": LLAMA,
    "qwen3": LLAMA | {"head_dim": 4},
    "opt": {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"ffn_dim": 32, "max_position_embeddings": 64},
    "t5": {"d_model": WIDTH, "num_layers": 2, "num_heads": 4, "d_ff": 32, "d_kv": 4, "decoder_start_token_id": 0},
    "bart": {"d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
    | {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64},
    "roberta": {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    | {"max_position_embeddings": 66},
}
DECODERS = ("gpt2", "llama", "qwen3", "opt")


def base_config(kind: str) -> dict:
    return {"model_type": kind, "vocab_size": VOCABULARY, "pad_token_id": 0} | BASES[kind]


def tiny_config(kind: str = "gpt2", **fields) -> PersonalLmConfig:
    return PersonalLmConfig(**({"base_config": base_config(kind), "num_labels": 3} | fields))


def _loud(model):
    """Weights large enough for what is left out of a sum to show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def classifier(kind: str = "gpt2", **fields) -> PersonalLmForSequenceClassification:
    torch.manual_seed(0)
    return _loud(PersonalLmForSequenceClassification(tiny_config(kind, **fields)))


def language_model(kind: str = "gpt2", **fields) -> PersonalLmForCausalLM:
    torch.manual_seed(0)
    return _loud(PersonalLmForCausalLM(tiny_config(kind, **({"task": "causal_lm", "num_user_tokens": 2} | fields))))


def draws(batch: int = 2, tokens: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def texts(side: str | None = "right", lengths=(6, 4)) -> dict[str, torch.Tensor]:
    """A batch of texts, padded on a side, or (None) the longest alone."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in lengths]
    if side is None:
        return {"input_ids": rows[0][None], "attention_mask": torch.ones(1, lengths[0], dtype=torch.long)}
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(rows):
        place = slice(0, len(text)) if side == "right" else slice(max(lengths) - len(text), None)
        ids[row, place], mask[row, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}
