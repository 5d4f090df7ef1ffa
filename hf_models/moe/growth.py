# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Orthogonal growth (arXiv 2510.08008): a trained mixture of experts becomes a deeper or wider one, to train on.

    python -m hf_models.moe.growth SOURCE DESTINATION --depth-factor 2 --width-factor 2

Depth repeats layers next to themselves; width repeats experts with their router rows, with a percent of noise on the
copies, and as many more experts per token. Our own families and transformers' Qwen2-MoE, Qwen3-MoE, OLMoE, Mixtral,
DeepSeek-V2 and DeepSeek-V3 grow, from either layout of expert tensors. Files are grown shard by shard. Whatever can
be refused is refused before the first byte is written; the destination appears in one piece, with `growth.json`,
which says what was done and how far the function moved, or not at all.

Optimizer state is dropped by the paper ("weights only"); `grow_optimizer_state` offers more.
"""

import argparse
import copy
import dataclasses
import hashlib
import re
import sys
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    __version__,
)
from transformers import initialization as init
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

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
)
from .configuration_mone import number_of_experts
from .configuration_sigma_moe import SigmaMoeConfig
from .elastic import PER_LAYER, experts_in_force
from .elastic_hosts import WrappedMoe
from .growth_config import OUR_MODEL_TYPES, grow_config, read_config, what_changes_the_function
from .growth_drift import available_memory, logit_drift
from .growth_plan import CHOICES, NOISE_TARGETS, GrowthPlan, layer_order
from .growth_tensors import TensorGrowth, grow_state_dict, layer_tensor, write_grown_shards


logger = logging.get_logger(__name__)

MANIFEST_NAME = "growth.json"
_AUTO_CLASSES = (
    AutoModelForCausalLM,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
_ADAPTERS = (
    "{what}: growth would leave adapters without the layers and experts that they were trained on. Merge them first "
    "(merge_and_unload), or unload them."
)
# Files smaller than this are not split, whatever the source's largest shard is.
_SMALLEST_SHARD_LIMIT = 32 * 2**20
# The power of 1 / width_factor by which AdamW's statistics of a duplicated tensor shrink with its gradient.
_GRADIENT_POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def grow_pretrained(
    src: str | Path,
    dst: str | Path,
    plan: GrowthPlan,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    measure_drift: bool | None = None,
    max_shard_bytes: int | None = None,
) -> Path:
    """Grow the checkpoint `src` (folder or Hub id) into the folder `dst`, by `plan`; returns the absolute `dst`.

    Tensors keep their dtype and layout. Tokenizer and generation config are carried along, and so is the code of our
    own families. At most one source shard and one file to be written are in memory.

    Args:
        revision: branch, tag or commit of a Hub id.
        overwrite: replace a destination that is not empty.
        measure_drift: compare the logits of both models, loaded in fp32 one after the other, and write the difference
            to `growth.json`. None: if the grown model fits into half of the free memory.
        max_shard_bytes: limit of a written file; by default the size of the source's largest.

    Raises:
        ValueError: something in the source or in the plan cannot be grown, or the files contradict config.json.
        FileNotFoundError: config.json, the index or a shard is missing.
        FileExistsError: `dst` is not empty and `overwrite` is False.
    """
    _refuse_no_growth(plan)
    destination = vacant_destination(dst, src, overwrite)
    folder = fetch_checkpoint(src, revision, ["*.json"])
    if checkpoint_file(folder, "adapter_config.json").exists():
        raise ValueError(_ADAPTERS.format(what=f"{src} holds adapter_config.json"))
    config = read_config(read_json(folder, "config.json"))
    grown_config = grow_config(config, plan)
    model_class = _head_class(config)

    commit = commit_of(folder, src, revision)
    folder = fetch_checkpoint(src, commit, ["*.safetensors", *SIDE_FILES])
    shards = read_headers(folder)
    before = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    model = _meta_model(model_class, grown_config)
    after = _check_tensors(before, _meta_model(model_class, config), model, plan)
    largest = max(checkpoint_file(folder, file).stat().st_size for file in shards)
    changed = what_changes_the_function(config, plan)
    _warn(changed)

    with in_one_piece(destination) as partial:
        limit = max_shard_bytes or max(largest, _SMALLEST_SHARD_LIMIT)
        write_grown_shards(folder, shards, partial, TensorGrowth(config, plan), limit)
        _write_config_and_code(grown_config, model, partial)
        copy_side_files(folder, partial)
        drift = _drift_record(measure_drift, after, model_class, folder, partial, config)
        manifest = {
            "method": "orthogonal growth, arXiv 2510.08008",
            **{"plan": dataclasses.asdict(plan), "layer_order": layer_order(config.num_hidden_layers, plan)},
            **{"source": _source_record(folder, src, commit), "before": _size(before), "after": _size(after)},
            **{"function_changed_by": changed, "logit_drift": drift, "transformers_version": __version__},
        }
        write_json(partial / MANIFEST_NAME, manifest)
    return destination


def grow_model(model: PreTrainedModel, plan: GrowthPlan) -> PreTrainedModel:
    """A new, grown model on the same device; `model` is left as it is and shares no memory with it.

    The new model is built from its configuration, so that whatever is read at construction (`layer_idx`, which
    indexes the cache, `top_k`) is right. It is in evaluation or training mode as `model` is.

    Raises `ValueError` for active adapters, for a model on several devices, and as [`grow_config`].
    """
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise ValueError(_ADAPTERS.format(what=f"{type(model).__name__} has adapters"))
    devices = {tensor.device for tensor in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(f"The model is on {sorted(map(str, devices))}. Load it on one device, or grow its files.")
    if isinstance(model, WrappedMoe):
        raise ValueError(f"{type(model).__name__} is wrapped by wrap_moe. Grow the model first, then wrap the result.")
    if _has_dial(model):
        raise ValueError(
            f"The layers of {type(model).__name__} use {experts_in_force(model)} experts, which its own config cannot "
            "say. Call set_active_experts(model, k) with one number, grow, and set them again."
        )
    grown_config = grow_config(model.config, plan)
    _warn(what_changes_the_function(model.config, plan))
    state_dict = grow_state_dict(model.state_dict(), TensorGrowth(model.config, plan))
    with init.no_init_weights():
        grown = type(model)(grown_config)
    grown.to(devices.pop())  # before the weights, for buffers that are not among them
    grown.load_state_dict(state_dict, assign=True)  # dtypes and requires_grad as they were built or grown
    grown.tie_weights()
    if model.can_generate():
        grown.generation_config = copy.deepcopy(model.generation_config)
    return grown.train(model.training)


def _has_dial(model: PreTrainedModel) -> bool:
    """Whether a model of transformers was given numbers of experts per layer, which it does not read when built."""
    return not isinstance(model.config, SigmaMoeConfig) and hasattr(model.config, PER_LAYER)


def grow_optimizer_state(
    state: dict[str, dict], plan: GrowthPlan, *, config: PreTrainedConfig, policy: str = "reset"
) -> dict[str, dict]:
    """AdamW's state for the grown model, from that of the source: `{parameter name: {"step", "exp_avg", ...}}`, as
    `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` has it under `"state"`.

    `config` is the source's. Parameters that are missing from the result start afresh, as those that AdamW has not
    seen do.

    - `"reset"` (the paper's): an empty state.
    - `"copy"`: copies of layers, experts and router rows get the state of their originals.
    - `"scale"`: and for duplicated experts and router rows `exp_avg` is divided by `width_factor`, `exp_avg_sq` by its
      square. Each copy then gets that share of the gradient (our derivation; exact for width without noise).

    Copies of layers with zeroed output start afresh under every policy: their gradients are not their originals'.

    Raises `ValueError` for an unknown policy or statistic, or `"scale"` where gradients are not shared equally.
    """
    if policy not in ("reset", "copy", "scale"):
        raise ValueError(f"policy={policy!r} is not known. Choose 'reset', 'copy' or 'scale'.")
    if policy == "reset":
        return {}
    if policy == "scale" and (plan.topk_policy == "keep" or plan.router_init == "random"):
        raise ValueError(
            f"policy='scale' with topk_policy={plan.topk_policy!r} and router_init={plan.router_init!r}: copies do "
            "not get equal shares of the gradient. Use 'reset' or 'copy'."
        )
    growth = TensorGrowth(config, _shapes_only(plan))
    afresh = set()
    if plan.depth_copy_init == "zero_output":
        afresh = {target for source in set(growth.order) for target in growth.target_layers(source)[1:]}
    grown: dict[str, dict] = {}
    for name, statistics in state.items():
        if unknown := sorted(statistics.keys() - _GRADIENT_POWERS.keys() - {"step"}):
            raise ValueError(f"{name} has {unknown}; known are 'step' and {sorted(_GRADIENT_POWERS)}, AdamW's.")
        source = layer_tensor(name)
        shared = policy == "scale" and source is not None and source.kind in ("expert", "fused", "router")
        for statistic, power in _GRADIENT_POWERS.items():
            if statistic not in statistics:
                continue
            share = plan.width_factor**-power if shared else 1
            for grown_name, tensor in growth.grow(name, statistics[statistic]):
                if (target := layer_tensor(grown_name)) is None or target.layer not in afresh:
                    entry = grown.setdefault(grown_name, {"step": copy.deepcopy(statistics["step"])})
                    entry[statistic] = tensor * share
    return grown


def _write_config_and_code(config: PreTrainedConfig, model: PreTrainedModel, partial: Path) -> None:
    if config.model_type in OUR_MODEL_TYPES:
        custom_object_save(model, partial, config=config)
    elif hasattr(config, "auto_map"):
        del config.auto_map  # code that does not come along; transformers has its own
    config.save_pretrained(partial)


def _refuse_no_growth(plan: GrowthPlan) -> None:
    if plan.depth_factor == plan.width_factor == 1:
        raise ValueError("depth_factor=1 and width_factor=1 grow nothing. Set one of them to 2.")


def _warn(changed: list[str]) -> None:
    """Warn of what the recipe itself does not bring with it."""
    expected = ("depth_copy_init", "noise_alpha")
    for reason in changed:
        if not reason.startswith(expected):
            logger.warning(f"Growth changes the function by {reason}.")


def _shapes_only(plan: GrowthPlan) -> GrowthPlan:
    """A plan with the same names and shapes that computes nothing from values."""
    return dataclasses.replace(plan, noise_alpha=0.0, router_init="copy", depth_copy_init="copy")


def _head_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `architectures` names; without one, the language model."""
    known = {}
    for auto_class in _AUTO_CLASSES:
        if (model_class := auto_class._model_mapping.get(type(config), None)) is not None:
            known[model_class.__name__] = model_class
    architecture = (config.architectures or list(known))[0]
    if architecture not in known:
        raise ValueError(f"architectures=[{architecture!r}] is not known for {config.model_type!r}: {sorted(known)}.")
    return known[architecture]


def _meta_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


# --- names and shapes of tensors


def _check_tensors(
    before: dict[str, torch.Tensor], source: PreTrainedModel, grown: PreTrainedModel, plan: GrowthPlan
) -> dict[str, torch.Tensor]:
    """Compare what the files announce with what the source has, and what will come of it with what the grown model
    has; returns the latter as meta tensors by name."""
    _compare(before, source)
    growth = TensorGrowth(source.config, _shapes_only(plan))
    after = dict(item for pair in before.items() for item in growth.grow(*pair))
    _compare(after, grown)
    return after


def _compare(found: dict[str, torch.Tensor], model: PreTrainedModel) -> None:
    """`ValueError` if the tensors are not the model's, in any mixture of layouts."""
    config = model.config
    expected = {
        name: tensor.shape for pair in model.state_dict().items() for name, tensor in per_expert_tensors(*pair)
    }
    optional = [*(model._keys_to_ignore_on_load_missing or ())]
    if config.tie_word_embeddings:
        optional.append(r"^lm_head\.weight$")
    shapes, names = {}, {}
    for name, tensor in found.items():
        for common_name, part in per_expert_tensors(_common_name(name), tensor):
            shapes[common_name], names[common_name] = part.shape, name
    problems = [
        f"{name} is missing, expected shape {tuple(shape)}"
        for name, shape in expected.items()
        if name not in shapes and not any(re.search(pattern, name) for pattern in optional)
    ]
    problems += [
        f"{names[name]} is unexpected" for name in shapes if name not in expected and not _may_be_extra(name, config)
    ]
    problems += [
        f"{names[name]} has shape {tuple(shape)}, expected {tuple(expected[name])}"
        for name, shape in shapes.items()
        if name in expected and shape != expected[name]
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(
            f"The weights do not fit the configuration of {config.num_hidden_layers} layers with "
            f"{number_of_experts(config)} experts: " + "; ".join(problems[:5]) + more + ". Nothing was written."
        )


def _common_name(name: str) -> str:
    """Mixtral's names in files, as everyone else's."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    return re.sub(
        r"(\.experts\.\d+)\.w([123])\.weight$",
        lambda m: f"{m[1]}.{('gate', 'down', 'up')[int(m[2]) - 1]}_proj.weight",
        name,
    )


def _may_be_extra(name: str, config: PreTrainedConfig) -> bool:
    """Tensors that transformers passes over: rotary tables of old versions, layers that predict further tokens."""
    source = layer_tensor(name)
    if source is None:
        return False
    behind = source.layer - config.num_hidden_layers
    return source.rest.endswith("rotary_emb.inv_freq") or 0 <= behind < (
        getattr(config, "num_nextn_predict_layers", 0) or 0
    )


# --- the manifest


def _size(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {"tensors": len(tensors), "parameters": sum(tensor.numel() for tensor in tensors.values())}


def _source_record(folder: Path, src: str | Path, commit: str | None) -> dict:
    """What was grown: a Hub id and commit, or a folder's name (no path), with a hash and its own growth, if any."""
    local = Path(src).is_dir()
    file = SAFE_WEIGHTS_INDEX_NAME if (folder / SAFE_WEIGHTS_INDEX_NAME).exists() else SAFE_WEIGHTS_NAME
    with open(checkpoint_file(folder, file), "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    record = {"name": folder.name if local else str(src), "revision": commit, "file": file, "sha256": digest}
    if (folder / MANIFEST_NAME).exists():
        record["growth"] = read_json(folder, MANIFEST_NAME)
    return record


def _drift_record(
    wanted: bool | None,
    after: dict[str, torch.Tensor],
    model_class: type[PreTrainedModel],
    folder: Path,
    partial: Path,
    config: PreTrainedConfig,
) -> dict:
    if wanted is None:
        needed = 4 * sum(tensor.numel() for tensor in after.values())
        if needed > (free := available_memory()) // 2:
            return {"skipped": f"{needed} bytes in fp32 are more than half of the {free} that are free"}
    elif not wanted:
        return {"skipped": "on request"}
    return logit_drift(model_class, folder, partial, vocab_size=config.vocab_size)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_models.moe.growth", description=grow_pretrained.__doc__.split("\n")[0]
    )
    parser.add_argument("source", help="checkpoint folder or Hub id")
    parser.add_argument("destination", help="folder to write")
    for field in dataclasses.fields(GrowthPlan):
        option = "--" + field.name.replace("_", "-")
        if field.name == "noise_targets":
            parser.add_argument(option, nargs="*", default=field.default, choices=NOISE_TARGETS)
        else:
            parser.add_argument(
                option, type=type(field.default), default=field.default, choices=CHOICES.get(field.name)
            )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    parser.add_argument(
        "--measure-drift",
        action=argparse.BooleanOptionalAction,
        help="compare the logits of both models; by default if they fit into half of the free memory",
    )
    args = parser.parse_args(arguments)
    try:
        plan = GrowthPlan(**{field.name: getattr(args, field.name) for field in dataclasses.fields(GrowthPlan)})
        written = grow_pretrained(
            args.source,
            args.destination,
            plan,
            revision=args.revision,
            overwrite=args.overwrite,
            measure_drift=args.measure_drift,
        )
    except (ValueError, OSError, StrictDataclassError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"Wrote {written}", file=sys.stderr)


__all__ = ["GrowthPlan", "grow_config", "grow_model", "grow_optimizer_state", "grow_pretrained", "layer_order"]

if __name__ == "__main__":
    main()
