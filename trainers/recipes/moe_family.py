"""What the recipes of the mixture-of-experts family share: optimizer, size of a small run, shape of the model."""

from typing import Protocol

from hf_models.moe import SigmaMoeConfig

from .language_model import LanguageData


# House recipe of the group's runs on the same code base; we have not seen the one of Sigma-MoE-Tiny.
OPTIMIZER = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 5e-10,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "warmup_stable_decay",
}

# For two CPU cores, on the demo's corpus.
SMALL_RUN = OPTIMIZER | {
    "sequence_length": 256,
    "max_eval_blocks": 128,
    "tokenizer_vocab_size": 2048,
    "dataset_license": "PSF-2.0",
    "dataset_language": "code",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


class ModelArguments(Protocol):
    """What the arguments of each recipe of the family have."""

    model_preset: str
    router_aux_loss_coef: float | None


def model_config(args: ModelArguments, data: LanguageData, sequence_length: int) -> SigmaMoeConfig:
    """The preset's shape with the vocabulary and special tokens of the data's tokenizer."""
    tokenizer = data.tokenizer
    overrides = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": sequence_length,
    }
    if args.router_aux_loss_coef is not None:
        overrides["router_aux_loss_coef"] = args.router_aux_loss_coef
    return SigmaMoeConfig.from_preset(args.model_preset, **overrides)
