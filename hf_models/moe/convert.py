# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints to `sigma_moe` and back: Sigma-V2 (`"sigma"`), Qwen3-MoE (`"qwen3_moe"`), and from Megatron's names.

    python -m hf_models.moe.convert SOURCE DESTINATION                  to sigma_moe, from what config.json says it is
    python -m hf_models.moe.convert SOURCE DESTINATION --to qwen3_moe   from sigma_moe

All three file layouts keep one tensor per expert matrix, so a conversion renames tensors shard by shard, in the
dtype that they have, and rewrites config.json; at most one shard is in memory. Whatever can be refused is refused
before the first byte is written: a field without a counterpart, by its name; a missing, unexpected or misshaped
tensor, from the files' headers. The destination appears in one piece, with the code that loads it, or not at all.
"""

import argparse
import dataclasses
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import PreTrainedModel, Qwen3MoeConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .checkpoint_files import (
    SIDE_FILES,
    checkpoint_file,
    commit_of,
    copy_side_files,
    fetch_checkpoint,
    in_one_piece,
    per_expert_tensors,
    read_headers,
    read_json,
    vacant_destination,
    write_json,
    write_renamed_shards,
)
from .configuration_sigma_moe import SigmaMoeConfig
from .modeling_sigma_moe import (
    SigmaMoeForCausalLM,
    SigmaMoeForSequenceClassification,
    SigmaMoeForTokenClassification,
    SigmaMoeModel,
)


logger = logging.get_logger(__name__)

_MODEL_CLASSES = {
    cls.__name__.removeprefix("SigmaMoe"): cls
    for cls in (SigmaMoeModel, SigmaMoeForCausalLM, SigmaMoeForSequenceClassification, SigmaMoeForTokenClassification)
}

_OUR_FIELDS = {field.name for field in dataclasses.fields(SigmaMoeConfig)} - {"architectures", "transformers_version"}
# The blocks are Qwen3-MoE's: a field of the same name means the same, but for the weight of the balance loss.
_SHARED_FIELDS = _OUR_FIELDS & {field.name for field in dataclasses.fields(Qwen3MoeConfig)} - {"router_aux_loss_coef"}
_SHARED_FIELDS |= {"head_dim"}  # read by Qwen3-MoE's attention, though no field of its config

# The only value of each field that SigmaMoe computes; an absent field or null means that value too.
_SIGMA_ONLY = {
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "qk_layernorm": True,
    "use_sliding_window": False,
    "rope_scaling": None,
    "quantization_config": None,
}
_QWEN3_MOE_ONLY = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "quantization_config": None,
}

# A Sigma-V2 file without one of these would get the default of another model.
_SIGMA_REQUIRED = """
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads moe_intermediate_size
    n_routed_experts num_experts_per_tok norm_topk_prob scoring_func rms_norm_eps
""".split()
# Keys of Sigma-V2 files that no computation reads (no use of the window was ever seen), or that are read apart.
_SIGMA_KNOWN = """
    model_type architectures auto_map transformers_version torch_dtype topk_method n_routed_experts rope_theta
    layer_types intermediate_size sliding_window seq_aux
""".split()


def convert_checkpoint(
    source: str | Path, destination: str | Path, *, revision: str | None = None, overwrite: bool = False
) -> Path:
    """Convert a Sigma-V2 or Qwen3-MoE checkpoint (folder or Hub id) to a `sigma_moe` folder; returns `destination`.

    The function is kept: the logits of a converted Qwen3-MoE equal transformers' own bitwise in fp32. In bf16 and
    fp16 they differ by rounding, because the router here stays in fp32. What training adds to the loss is translated
    as closely as it can be:

    - Qwen3-MoE's `router_aux_loss_coef` c weighs one loss over the router logits of all layers together, which is
      `num_experts_per_tok` at balance; ours weighs a sum over layers of losses that are 1 at balance. Hence
      `c * num_experts_per_tok / num_hidden_layers` of type `"switch"`: equal for one layer, and for more to the extent
      that their routing is alike. Here, training includes it whatever `output_router_logits` says.
    - Sigma-V2 files name no balance loss that can be relied on: the default is kept unless they have our field names.

    `sliding_window` without `use_sliding_window` has no effect in either source; with it, Sigma-V2 is refused.

    Raises:
        ValueError: something in the source has no counterpart here, or the files contradict config.json or each other.
        FileNotFoundError: config.json, the index or a shard is missing.
        FileExistsError: `destination` is not empty and `overwrite` is False.
    """
    destination = vacant_destination(destination, source, overwrite)
    folder = fetch_checkpoint(source, revision, ["*.json"])
    raw = read_json(folder, "config.json")
    if raw.get("model_type") == "sigma":
        config, rename = _config_from_sigma(raw), _our_name
        without_bias = (raw.get("topk_method") or "noaux_tc") != "noaux_tc"
    elif raw.get("model_type") == "qwen3_moe":
        config, rename, without_bias = _config_from_qwen3_moe(raw), str, True
    elif raw.get("model_type") == "sigma_moe":
        raise ValueError(
            f"{source} is a sigma_moe checkpoint already: load it with from_pretrained, or name a format to export "
            "it to (export_checkpoint, --to on the command line)."
        )
    else:
        raise ValueError(
            f"model_type={raw.get('model_type')!r} in {source} is not known. "
            "Convertible are 'sigma' (Sigma-V2) and 'qwen3_moe'."
        )
    model = _meta_model(config, _head(raw))
    config.architectures = [type(model).__name__]

    folder = fetch_checkpoint(source, commit_of(folder, source, revision), ["*.safetensors", *SIDE_FILES])
    shards = read_headers(folder)
    _check_tensors(shards, model, rename, without_bias=without_bias)
    with in_one_piece(destination) as partial:
        write_renamed_shards(folder, shards, partial, rename)
        custom_object_save(model, partial, config=config)
        config.save_pretrained(partial)
        copy_side_files(folder, partial)
    return destination


def export_checkpoint(
    source: PreTrainedModel | str | Path,
    destination: str | Path,
    format: str,
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a `sigma_moe` model, folder or Hub id as `"qwen3_moe"` or `"sigma"` (Sigma-V2); returns `destination`.

    Both formats have one number of experts per token and use all neurons; Qwen3-MoE also has only softmax scores,
    `routed_scaling_factor` 1 and no expert bias (zeros are dropped). Everything else is refused. With one expert per
    token `norm_topk_prob` is written as false, unless `norm_top1_prob` is set: readers that take it literally replace
    every expert weight by 1. Losses that the format cannot express are left out with a warning: they do not
    change the function.

    Raises: as [`convert_checkpoint`].
    """
    if format not in ("qwen3_moe", "sigma"):
        raise ValueError(f"format={format!r} is not known. Choose 'qwen3_moe' or 'sigma'.")
    if isinstance(source, PreTrainedModel):
        destination = vacant_destination(destination, None, overwrite)
        with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as saved:
            source.save_pretrained(saved)
            return export_checkpoint(saved, destination, format, overwrite=overwrite)

    destination = vacant_destination(destination, source, overwrite)
    folder = fetch_checkpoint(source, revision, ["*.json"])
    raw = read_json(folder, "config.json")
    if raw.get("model_type") != "sigma_moe":
        raise ValueError(f"model_type={raw.get('model_type')!r} in {source}: only sigma_moe checkpoints are exported.")
    config = SigmaMoeConfig.from_dict(raw)
    head = _head(raw)
    _refuse_beyond_both(config, format)
    if format == "qwen3_moe":
        _refuse_beyond_qwen3_moe(config)
    model = _meta_model(config, head)

    folder = fetch_checkpoint(source, commit_of(folder, source, revision), ["*.safetensors", *SIDE_FILES])
    shards = read_headers(folder)
    _check_tensors(shards, model, str)
    biases = [(file, name) for file, tensors in shards.items() for name in tensors if _is_bias(name)]
    if format == "qwen3_moe":
        _refuse_bias_in_use(folder, biases)
        exported, rename = _config_to_qwen3_moe(config), _name_without_bias
        exported.architectures = [f"Qwen3Moe{head}"]
    else:
        exported, rename = _config_to_sigma(config, has_bias=bool(biases)), _sigma_name
        exported["architectures"] = [f"SigmaV2{head}"]

    with in_one_piece(destination) as partial:
        write_renamed_shards(folder, shards, partial, rename)
        if isinstance(exported, Qwen3MoeConfig):
            exported.save_pretrained(partial)
        else:
            write_json(partial / "config.json", exported)
        copy_side_files(folder, partial)
    return destination


def from_megatron_state_dict(state_dict: dict[str, torch.Tensor], config: SigmaMoeConfig) -> dict[str, torch.Tensor]:
    """State dict of [`SigmaMoeForCausalLM`] from one of Megatron-LM's GPT model with legacy grouped GEMM experts.

    For tensors that are whole: gathered over tensor, pipeline and expert parallel ranks, named without a prefix
    (`decoder.layers.0.self_attention.linear_qkv.weight`, ...).

    - `linear_qkv.weight` has its rows interleaved per key-value group: query heads, key head, value head. That is
      known of Megatron-LM; it was **not** checked against a checkpoint of the family.
    - `experts.weight1 (hidden, experts * 2 * ffn)` and `weight2 (experts * ffn, hidden)` are in memory
      `(experts, hidden, 2 * ffn)` and `(experts, ffn, hidden)`, gate before up.
    - `router.expert_bias` may be missing (zeros), `output_layer.weight` too if embeddings are tied; `_extra_state`
      is ignored.

    Raises `ValueError` naming what is missing, unexpected, or of another shape than `config` asks for.
    """
    if config.attention_bias:
        raise ValueError("attention_bias=True: the family's Megatron checkpoints have no attention biases to convert.")
    left = {name: tensor for name, tensor in state_dict.items() if not name.endswith("_extra_state")}

    def take(name: str, *shape: int, optional: bool = False) -> torch.Tensor:
        if name not in left:
            if optional:
                return torch.zeros(shape)
            raise ValueError(f"{name} is missing from the Megatron state dict; expected shape {shape}.")
        tensor = left.pop(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the config asks for {shape}.")
        return tensor

    vocab, hidden = config.vocab_size, config.hidden_size
    ours = {"model.embed_tokens.weight": take("embedding.word_embeddings.weight", vocab, hidden)}
    for layer in range(config.num_hidden_layers):
        tensors = _megatron_layer(take, f"decoder.layers.{layer}", config)
        ours |= {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
    ours["model.norm.weight"] = take("decoder.final_layernorm.weight", hidden)
    if config.tie_word_embeddings and "output_layer.weight" not in left:
        ours["lm_head.weight"] = ours["model.embed_tokens.weight"]
    else:
        ours["lm_head.weight"] = take("output_layer.weight", vocab, hidden)
    if left:
        raise ValueError(
            f"{len(left)} tensors of the Megatron state dict have no place in {config.model_type}: {sorted(left)[:5]}."
        )
    return ours


def _megatron_layer(take: Callable[..., torch.Tensor], layer: str, config: SigmaMoeConfig) -> dict[str, torch.Tensor]:
    """The tensors of one of our layers, from what `take` finds under Megatron's prefix `layer`."""
    hidden, dim = config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    experts, ffn = config.num_experts, config.moe_intermediate_size
    attention, mlp = f"{layer}.self_attention", f"{layer}.mlp"
    ours = {}
    qkv = take(f"{attention}.linear_qkv.weight", (heads + 2 * groups) * dim, hidden)
    parts = qkv.view(groups, heads // groups + 2, dim, hidden).split((heads // groups, 1, 1), dim=1)
    for letter, part in zip("qkv", parts):
        ours[f"self_attn.{letter}_proj.weight"] = part.reshape(-1, hidden)
    ours["self_attn.o_proj.weight"] = take(f"{attention}.linear_proj.weight", hidden, heads * dim)
    for letter in "qk":
        ours[f"self_attn.{letter}_norm.weight"] = take(f"{attention}.{letter}_layernorm.weight", dim)
    ours["input_layernorm.weight"] = take(f"{attention}.linear_qkv.layer_norm_weight", hidden)
    ours["post_attention_layernorm.weight"] = take(f"{layer}.pre_mlp_layernorm.weight", hidden)
    ours["mlp.gate.weight"] = take(f"{mlp}.router.weight", experts, hidden)
    ours["mlp.gate.e_score_correction_bias"] = take(f"{mlp}.router.expert_bias", experts, optional=True)
    weight1 = take(f"{mlp}.experts.weight1", hidden, experts * 2 * ffn).reshape(experts, hidden, 2 * ffn)
    weight2 = take(f"{mlp}.experts.weight2", experts * ffn, hidden).reshape(experts, ffn, hidden)
    ours["mlp.experts.gate_up_proj"] = weight1.transpose(1, 2).contiguous()
    ours["mlp.experts.down_proj"] = weight2.transpose(1, 2).contiguous()
    return ours


# --- configurations


def _refuse_other_values(values: dict, only: dict, model_type: str) -> None:
    for field, value in only.items():
        if values.get(field) not in (None, value):
            raise ValueError(
                f"{field}={values[field]!r} of this {model_type!r} checkpoint has no counterpart in sigma_moe; "
                f"only {field}={value!r} is converted. It cannot be converted without changing the model."
            )


def _config_from_sigma(raw: dict) -> SigmaMoeConfig:
    _refuse_other_values(raw, _SIGMA_ONLY, "sigma")
    if sliding := set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(
            f"layer_types of this 'sigma' checkpoint has {sorted(sliding)}; sigma_moe has one kind of layer."
        )
    rope = raw.get("rope_parameters") or {"rope_type": "default", "rope_theta": raw.get("rope_theta")}
    missing = [field for field in _SIGMA_REQUIRED if raw.get(field) is None]
    missing += ["rope_theta"] if rope.get("rope_theta") is None else []
    if missing:
        raise ValueError(f"config.json of this 'sigma' checkpoint lacks {missing}. Add them: none can be guessed.")
    if unknown := sorted(raw.keys() - _OUR_FIELDS - _SIGMA_ONLY.keys() - set(_SIGMA_KNOWN)):
        logger.warning(
            f"Left out, for want of a counterpart in sigma_moe: {unknown}. Check that none changes the model."
        )
    fields = {field: raw[field] for field in _OUR_FIELDS & raw.keys()}
    fields.setdefault("dtype", raw.get("torch_dtype"))
    return SigmaMoeConfig(**{**fields, "num_experts": raw["n_routed_experts"], "rope_parameters": rope})


def _config_from_qwen3_moe(raw: dict) -> SigmaMoeConfig:
    host = Qwen3MoeConfig.from_dict(raw)
    values = {field: getattr(host, field, None) for field in _QWEN3_MOE_ONLY}
    _refuse_other_values(values, _QWEN3_MOE_ONLY, "qwen3_moe")
    fields = {field: getattr(host, field, None) for field in _SHARED_FIELDS}
    return SigmaMoeConfig(
        **{field: value for field, value in fields.items() if value is not None},
        scoring_func="softmax",
        aux_scoring_func="softmax",
        norm_top1_prob=True,  # as its router: one weight divided by itself
        router_aux_loss_type="switch",
        router_aux_loss_coef=host.router_aux_loss_coef * host.num_experts_per_tok / host.num_hidden_layers,
    )


def _refuse_beyond_both(config: SigmaMoeConfig, format: str) -> None:
    if len(set(config.top_k_per_layer)) > 1:
        raise ValueError(
            f"num_experts_per_tok_per_layer={config.num_experts_per_tok_per_layer} cannot be written as {format!r}, "
            "which has one number for all layers."
        )
    for field in ("neuron_top_k", "neuron_ratio"):
        if getattr(config, field) is not None:
            value = getattr(config, field)
            raise ValueError(f"{field}={value} cannot be written as {format!r}, whose experts use all neurons.")


def _refuse_beyond_qwen3_moe(config: SigmaMoeConfig) -> None:
    for field, value in (("scoring_func", "softmax"), ("routed_scaling_factor", 1)):
        if getattr(config, field) != value:
            raise ValueError(
                f"{field}={getattr(config, field)!r} cannot be written as 'qwen3_moe', which has only {value!r}."
            )


def _normalizes(config: SigmaMoeConfig) -> bool:
    return config.norm_topk_prob and (config.num_experts_per_tok > 1 or config.norm_top1_prob)


def _config_to_qwen3_moe(config: SigmaMoeConfig) -> Qwen3MoeConfig:
    coef = config.router_aux_loss_coef * config.num_hidden_layers / config.num_experts_per_tok
    left_out = [field for field in ("router_z_loss_coef", "expert_bias_update_rate") if getattr(config, field)]
    if config.router_aux_loss_type not in ("switch", "global_batch") or config.aux_scoring_func != "softmax":
        left_out += ["router_aux_loss_coef"] if coef and config.router_aux_loss_type != "none" else []
        coef = 0.0
    if left_out:
        logger.warning(f"Qwen3-MoE cannot express {left_out} of this model: further training there would go without.")
    fields = {field: getattr(config, field) for field in _SHARED_FIELDS}
    return Qwen3MoeConfig(**{**fields, "norm_topk_prob": _normalizes(config), "router_aux_loss_coef": float(coef)})


def _config_to_sigma(config: SigmaMoeConfig, *, has_bias: bool) -> dict:
    if config.use_sliding_window:
        raise ValueError("use_sliding_window=True cannot be written as 'sigma', which attends to the whole context.")
    rope = dict(config.rope_parameters)
    if rope.pop("rope_type", "default") != "default" or set(rope) != {"rope_theta"}:
        raise ValueError(
            f"rope_parameters={config.rope_parameters} cannot be written as 'sigma', which has only rope_theta."
        )
    fields = {field: value for field, value in config.to_dict().items() if field in _OUR_FIELDS}
    fields["torch_dtype"] = fields.pop("dtype", None)  # the key that the transformers of those files reads
    for renamed_or_idle in ("num_experts", "rope_parameters", "num_experts_per_tok_per_layer", "sliding_window"):
        fields.pop(renamed_or_idle)
    return {
        **fields,
        "model_type": "sigma",
        "norm_topk_prob": _normalizes(config),
        "n_routed_experts": config.num_experts,
        "n_shared_experts": 0,
        "first_k_dense_replace": 0,
        "qk_layernorm": True,
        "topk_method": "noaux_tc" if has_bias else "greedy",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
    }


def _head(raw: dict) -> str:
    architecture = (raw.get("architectures") or ["ForCausalLM"])[0]
    head = re.search(r"(For[A-Z]\w*|Model|)$", architecture).group()
    if head not in _MODEL_CLASSES:
        raise ValueError(
            f"architectures=[{architecture!r}] has no counterpart here; known heads are {sorted(_MODEL_CLASSES)}."
        )
    return head


def _meta_model(config: SigmaMoeConfig, head: str) -> PreTrainedModel:
    with torch.device("meta"):
        return _MODEL_CLASSES[head](config)


# --- names and shapes of tensors


def _our_name(name: str) -> str:
    return re.sub(r"\.self_attn\.([qk])_layernorm\.", r".self_attn.\1_norm.", name)


def _sigma_name(name: str) -> str:
    return re.sub(r"\.self_attn\.([qk])_norm\.", r".self_attn.\1_layernorm.", name)


def _is_bias(name: str) -> bool:
    return name.endswith(".mlp.gate.e_score_correction_bias")


def _name_without_bias(name: str) -> str | None:
    return None if _is_bias(name) else name


def _check_tensors(
    shards: dict[str, dict[str, torch.Tensor]],
    model: PreTrainedModel,
    rename: Callable[[str], str],
    *,
    without_bias: bool = False,
) -> None:
    """Compare what the files announce with what the model has; errors use the names of the source."""
    expected = dict(item for pair in model.state_dict().items() for item in per_expert_tensors(*pair))
    if without_bias:
        expected = {name: tensor for name, tensor in expected.items() if not _is_bias(name)}
    found, source_names, problems = {}, {}, []
    for tensors in shards.values():
        for source_name, fused in tensors.items():
            for name, tensor in per_expert_tensors(rename(source_name), fused):
                if name in found:
                    problems.append(f"{source_names[name]} and {source_name} are the same tensor of the model")
                found[name], source_names[name] = tensor, source_name
    # Biases may be absent, but all of them: a layer without one among layers with one is a damaged file.
    optional = set() if any(map(_is_bias, found)) else set(filter(_is_bias, expected))
    if model.config.tie_word_embeddings:
        optional.add("lm_head.weight")

    spelling = str if rename is str else _sigma_name
    problems += [
        f"{spelling(name)} is missing, expected shape {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name not in found and name not in optional
    ]
    problems += [f"{source_names[name]} is unexpected" for name in found if name not in expected]
    problems += [
        f"{spelling(name)} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(
            "The weights do not fit config.json: " + "; ".join(problems[:5]) + more + ". Nothing was written."
        )


def _refuse_bias_in_use(folder: Path, biases: Iterable[tuple[str, str]]) -> None:
    for file, name in biases:
        with safe_open(checkpoint_file(folder, file), "pt") as shard:
            if shard.get_tensor(name).any():
                raise ValueError(
                    f"{name} is not zero: it takes part in selecting experts, and 'qwen3_moe' has no such bias."
                )


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_models.moe.convert", description=convert_checkpoint.__doc__.split("\n")[0]
    )
    parser.add_argument("source", help="checkpoint folder or Hub id")
    parser.add_argument("destination", help="folder to write")
    parser.add_argument(
        "--to", default="sigma_moe", choices=("sigma_moe", "qwen3_moe", "sigma"), help="format to write"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    args = parser.parse_args(arguments)
    options = {"revision": args.revision, "overwrite": args.overwrite}
    try:
        if args.to == "sigma_moe":
            written = convert_checkpoint(args.source, args.destination, **options)
        else:
            written = export_checkpoint(args.source, args.destination, args.to, **options)
    except (ValueError, OSError, StrictDataclassError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"Wrote {written}", file=sys.stderr)


__all__ = ["convert_checkpoint", "export_checkpoint", "from_megatron_state_dict"]

if __name__ == "__main__":
    main()
