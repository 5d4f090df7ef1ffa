"""Which parameters are a user's own, and how those of many users are kept."""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel


Stacked = dict[str, torch.Tensor]  # (users, ...) each
TRAINABLE = ("all", "head", "bias", "user_embedding", "lora")


def own_parameters(model: nn.Module, trainable: str) -> list[str]:
    """Names of the parameters that each user has for themselves.

    Args:
        trainable: `all`; `head`, what is not in the base model; `bias`, every bias; `user_embedding`, the tables of
            the user's id (of a CTR model; a user's gradient reaches their own row alone); `lora`, adapters that
            [`with_adapters`] has put in; or a regular expression that is searched in the names.

    Raises:
        ValueError: nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    if trainable == "all":
        found = names
    elif trainable == "head":
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        found = [name for name in names if prefix != "." and not name.startswith(prefix)]
    elif trainable == "bias":
        found = [name for name in names if name.rpartition(".")[2] == "bias"]
    elif trainable == "user_embedding":
        found = _tables_of_the_user(model)
    elif trainable == "lora":
        found = [name for name in names if "lora_" in name]
    else:
        found = [name for name in names if re.search(trainable, name)]
    if not found:
        raise ValueError(
            f"trainable={trainable!r}: {type(model).__name__} has no such parameter. Choose from "
            f"{', '.join(TRAINABLE)}, or give a regular expression of parameter names."
        )
    return found


def _tables_of_the_user(model: nn.Module) -> list[str]:
    feature = getattr(getattr(model, "config", None), "user_feature", None)
    if feature is None or not hasattr(model, "touched_rows"):
        return []
    return [touched.parameter for touched in model.touched_rows() if touched.feature == feature]


def with_adapters(model: PreTrainedModel, config: LoraConfig | None, *, seed: int = 0) -> PeftModel:
    """A copy of the model with LoRA adapters, by default of rank 4 on every linear map; they start as `seed` says, and
    the caller's random numbers go on as they were."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if config is None and not linear:
        raise ValueError(f"{type(model).__name__} has no linear map to adapt; choose another `trainable`.")
    config = config or LoraConfig(r=4, lora_alpha=8, target_modules=linear)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(copy.deepcopy(model), copy.deepcopy(config))  # which peft writes the names into


def ids_of_user(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of every feature of users that the model describes, such as the id, the values that these `inputs` have,
    ascending, without padding. Nothing for other models than those of the click-through rate."""
    config = getattr(model, "config", None)
    if not hasattr(model, "touched_rows") or not hasattr(config, "categorical"):
        return {}
    found = {}
    for column, feature in enumerate(config.categorical):
        if feature["role"] == "user":
            shared = [i for i, sequence in enumerate(config.sequences) if sequence.get("shares") == feature["name"]]
            ids = [inputs["categorical_features"][:, column], *(inputs["sequence_features"][:, i] for i in shared)]
            unique = torch.cat([part.flatten() for part in ids]).unique()
            found[feature["name"]] = unique[unique != 0]
    return found


def sent_state(model: nn.Module, ids: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a user's device is sent of the cloud's model.

    Of the tables of users' features only the rows `ids`, see [`ids_of_user`], as `NAME` and `NAME.rows`: nobody gets
    what is known of others. Everything else is whole.
    """
    state = dict(model.state_dict())
    for touched in model.touched_rows() if ids else ():
        if touched.feature in ids:
            rows = ids[touched.feature]
            state[touched.parameter] = state[touched.parameter][rows.to(state[touched.parameter].device)]
            state[f"{touched.parameter}.rows"] = rows
    return state


def save_user(model: nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """One user's model: a PEFT adapter where `model` has adapters, else the whole model with the user's parameters.

    `PeftModel.from_pretrained(base, folder)` loads the one, `AutoModel...from_pretrained(folder)` the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if isinstance(model, PeftModel):
        adapter = get_peft_model_state_dict(model, state_dict=state)
        save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.copy(model.peft_config[model.active_adapter])
        config.inference_mode = True
        config.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict={**model.state_dict(), **state})


def kept_form(stacked: Stacked, rows: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> Stacked:
    """Parameters of U users as tensors to keep.

    Of a table that users have few rows of, `TABLE.own` and its `rows (U, R)`, these rows are kept one user after the
    other, as `TABLE.rows`, `TABLE.values`, and in `TABLE.splits` where each user's begin and end.
    """
    kept = {}
    for name, values in stacked.items():
        table = name.removesuffix(".own")
        if table not in rows:
            kept[name] = values
            continue
        known = rows[table] < len(base[f"{table}.weight"])
        kept[f"{table}.rows"], kept[f"{table}.values"] = rows[table][known], values[known]
        kept[f"{table}.splits"] = torch.cat([torch.zeros(1, dtype=torch.long), known.sum(1).cumsum(0)])
    return kept


def user_state(
    kept: Stacked, tables: Sequence[str], base: Mapping[str, torch.Tensor], place: int
) -> dict[str, torch.Tensor]:
    """The parameters of one user out of what [`kept_form`] keeps."""
    state = {name: value[place].clone() for name, value in kept.items() if name in base}
    for table in tables:
        begin, end = kept[f"{table}.splits"][place : place + 2].tolist()
        weight = base[f"{table}.weight"].detach().clone()
        weight[kept[f"{table}.rows"][begin:end]] = kept[f"{table}.values"][begin:end]
        state[f"{table}.weight"] = weight
    return state
