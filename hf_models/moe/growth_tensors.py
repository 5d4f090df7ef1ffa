# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
r"""Tensors under growth (arXiv 2510.08008), one at a time: from a state dict, or from file to file.

    W_{e,c} = W_e + 1[c > 0] eps,   eps ~ N(0, (alpha * std(W_e))^2)      copy c of expert e, per projection
    r_{e,c} = r_e + 1[c > 0] eps,   eps ~ N(0, (alpha * std(r))^2)        its router row; one std for the whole router

The noise is drawn in fp32 by a generator that is seeded with what it is for (layer, expert, copy, projection), so that
it depends neither on the order of files nor on whether experts are one tensor or many. The balancing bias
`e_score_correction_bias` gets none: it is the state of a controller, not a weight. It is copied exactly, or, where it
is added to softmax scores, divided by the number of copies as they are.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .checkpoint_files import checkpoint_file, write_json
from .configuration_mone import number_of_experts
from .growth_config import selection_bias_scale
from .growth_plan import GrowthPlan, layer_order


# Standard deviation of random router rows, as in the paper's baseline.
_RANDOM_ROUTER_STD = 0.02

_LAYER = re.compile(r"(?P<head>(?:.*?\.)?layers\.)(?P<layer>\d+)\.(?P<rest>.+)")
_BLOCK = r"(?P<block>mlp|block_sparse_moe)"  # the second is Mixtral's, in files
_EXPERT = re.compile(_BLOCK + r"\.experts\.(?P<expert>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_FUSED = re.compile(_BLOCK + r"\.experts\.(?P<leaf>gate_up_proj|down_proj)")
_ROUTER = re.compile(_BLOCK + r"\.gate\.weight")
_ROUTER_BIAS = re.compile(_BLOCK + r"\.gate\.e_score_correction_bias")
_DENSE = re.compile(r"mlp\.(?P<leaf>gate_proj|up_proj|down_proj)\.weight")
_RESIDUAL = re.compile(r"(self_attn\.o_proj|mlp\.(shared_experts?\.)?down_proj)\.(weight|bias)")
_PROJECTIONS = {
    "gate_up_proj": ("gate", "up"),
    **{"gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",)},
    **{"w1": ("gate",), "w3": ("up",), "w2": ("down",)},  # Mixtral's names
}


@dataclass(frozen=True)
class LayerTensor:
    """What the name of a layer's tensor says: `kind` is `"expert"` (one matrix), `"fused"` (all experts'), `"router"`,
    `"router_bias"`, `"dense"` (a matrix of an MLP without experts) or `"other"`."""

    head: str
    layer: int
    rest: str
    kind: str
    projections: tuple[str, ...] = ()
    expert: int | None = None

    @property
    def writes_residual(self) -> bool:
        """Whether the layer adds nothing to the residual stream when this and its like are zero."""
        return self.projections == ("down",) or _RESIDUAL.fullmatch(self.rest) is not None

    def name(self, layer: int, expert: int | None = None) -> str:
        """The name of the same tensor of another layer, and expert if it is one."""
        rest = self.rest if expert is None else self.rest.replace(f".{self.expert}.", f".{expert}.", 1)
        return f"{self.head}{layer}.{rest}"


def layer_tensor(name: str) -> LayerTensor | None:
    """The parts of a tensor's name; None outside the layers. `ValueError` for experts in an unknown layout."""
    if (match := _LAYER.fullmatch(name)) is None:
        return None
    head, layer, rest = match["head"], int(match["layer"]), match["rest"]
    for kind, pattern in (
        ("expert", _EXPERT),
        ("fused", _FUSED),
        ("router", _ROUTER),
        ("router_bias", _ROUTER_BIAS),
        ("dense", _DENSE),
    ):
        if found := pattern.fullmatch(rest):
            parts = found.groupdict()
            expert = int(parts["expert"]) if "expert" in parts else None
            return LayerTensor(head, layer, rest, kind, _PROJECTIONS.get(parts.get("leaf"), ()), expert)
    if ".experts." in rest:
        raise ValueError(
            f"{name} is in no layout that growth knows: experts.gate_up_proj and experts.down_proj for all experts, "
            "experts.N.gate_proj|up_proj|down_proj.weight or experts.N.w1|w2|w3.weight for each."
        )
    return LayerTensor(head, layer, rest, "other")


class TensorGrowth:
    """The map from tensors of a source to those of the grown model, for one configuration of the *source*."""

    def __init__(self, config: PreTrainedConfig, plan: GrowthPlan):
        self.plan = plan
        self.num_layers = config.num_hidden_layers
        self.num_experts = number_of_experts(config)
        self.bias_scale = selection_bias_scale(config, plan)
        self.order = layer_order(self.num_layers, plan)
        experts, copies = range(self.num_experts), range(plan.width_factor)
        # (expert, copy) at each index of the grown experts
        if plan.expert_order == "append":
            self.members = [(e, c) for c in copies for e in experts]
        else:
            self.members = [(e, c) for e in experts for c in copies]
        self.places: list[list[tuple[int, int]]] = [[] for _ in experts]  # of an expert: (index, copy)
        for index, (expert, copy) in enumerate(self.members):
            self.places[expert].append((index, copy))

    def target_layers(self, source: int) -> list[int]:
        """Where a layer goes, the original first. Layers behind the last predict further tokens and stay behind it."""
        if source >= self.num_layers:
            return [len(self.order) + source - self.num_layers]
        return [target for target, layer in enumerate(self.order) if layer == source]

    def grow(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """`(name, tensor)` of everything that comes of one tensor; what stays as it is, is `tensor` itself.

        Works on meta tensors when the plan has no noise and copies the router.
        """
        source = layer_tensor(name)
        if source is None:
            yield name, tensor
            return
        if source.rest.endswith("rotary_emb.inv_freq"):
            return  # in files of old versions; models derive it from the config
        for occurrence, layer in enumerate(self.target_layers(source.layer)):
            zero = occurrence > 0 and self.plan.depth_copy_init == "zero_output" and source.writes_residual
            for grown_name, grown in self._widen(source, tensor, layer):
                if zero:
                    grown = torch.zeros_like(grown)
                elif occurrence > 0 and grown is tensor:
                    grown = tensor.clone()
                yield grown_name, grown
                del grown  # or it stays in memory while the next is made

    def _widen(self, source: LayerTensor, tensor: torch.Tensor, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
        if self.plan.width_factor == 1 or source.kind in ("dense", "other"):
            yield source.name(layer), tensor
        elif source.kind == "expert":
            if source.expert >= self.num_experts:
                raise ValueError(
                    f"{source.name(source.layer)} is beyond the {self.num_experts} experts of the config."
                )
            for index, copy in self.places[source.expert]:
                grown = self._noisy_expert(tensor, source, layer, source.expert, copy) if copy else tensor
                yield source.name(layer, index), grown
        elif tensor.shape[:1] != (self.num_experts,):
            raise ValueError(
                f"{source.name(source.layer)} has shape {tuple(tensor.shape)}; the first dimension must be the "
                f"{self.num_experts} experts."
            )
        else:
            yield source.name(layer), self._widen_stacked(source, tensor, layer)

    def _widen_stacked(self, source: LayerTensor, tensor: torch.Tensor, layer: int) -> torch.Tensor:
        grown = tensor[[expert for expert, _ in self.members]]  # (experts * width_factor, ...)
        if source.kind == "router_bias":
            grown *= self.bias_scale
            if self.plan.router_init == "random":
                grown[[copy > 0 for _, copy in self.members]] = 0
        elif source.kind == "router":
            self._change_router_copies(tensor, grown, layer)
        elif self._noise_on("experts"):
            for index, (expert, copy) in enumerate(self.members):
                if copy:
                    grown[index] = self._noisy_expert(tensor[expert], source, layer, expert, copy)
        return grown

    def _noisy_expert(
        self, matrices: torch.Tensor, source: LayerTensor, layer: int, expert: int, copy: int
    ) -> torch.Tensor:
        """A copy of one expert's matrix, or of its stacked gate and up, with noise for each of them."""
        if not self._noise_on("experts"):
            return matrices.clone()
        parts = []
        for projection, matrix in zip(source.projections, matrices.chunk(len(source.projections))):
            noise = self._normal(matrix.shape, f"layers.{layer}.experts.{expert}.copies.{copy}.{projection}")
            parts.append(_add(matrix, noise * (self.plan.noise_alpha * _std(matrix))))
        return torch.cat(parts)

    def _change_router_copies(self, router: torch.Tensor, grown: torch.Tensor, layer: int) -> None:
        """Add noise to the copies' rows of `grown (experts * width_factor, hidden)`, or draw them anew, in place."""
        random = self.plan.router_init == "random"
        if not random and not self._noise_on("router"):
            return
        # (copies, experts, hidden): independent of the order of experts
        noise = self._normal((self.plan.width_factor - 1, *router.shape), f"layers.{layer}.router")
        scale = _RANDOM_ROUTER_STD if random else self.plan.noise_alpha * _std(router)
        for index, (expert, copy) in enumerate(self.members):
            if copy:
                row = torch.zeros_like(router[expert]) if random else router[expert]
                grown[index] = _add(row, noise[copy - 1, expert] * scale)

    def _noise_on(self, target: str) -> bool:
        return self.plan.noise_alpha > 0 and target in self.plan.noise_targets

    def _normal(self, shape: tuple[int, ...], key: str) -> torch.Tensor:
        """Standard normal fp32 on the CPU, a function of the plan's seed, `key` and `shape` alone."""
        digest = hashlib.sha256(f"{self.plan.seed}:{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(shape, generator=generator)


def _std(tensor: torch.Tensor) -> float:
    return tensor.double().std(correction=0).item()


def _add(tensor: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The sum in fp32, rounded once to the tensor's dtype."""
    return (tensor.float() + noise.to(tensor.device)).to(tensor.dtype)


def grow_state_dict(state_dict: dict[str, torch.Tensor], growth: TensorGrowth) -> dict[str, torch.Tensor]:
    """The grown state dict; no tensor shares memory with another, or with the source."""
    return {
        name: grown.clone() if grown is tensor else grown
        for source, tensor in state_dict.items()
        for name, grown in growth.grow(source, tensor)
    }


class _ShardWriter:
    """Collects tensors and writes a file whenever the next might not fit."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self.waiting: dict[str, torch.Tensor] = {}
        self.files: list[list[str]] = []
        self.waiting_bytes = self.total_bytes = self.parameters = 0

    def make_room(self, num_bytes: int) -> None:
        if self.waiting_bytes + num_bytes > self.max_bytes:
            self.flush()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.waiting[name] = tensor
        self.waiting_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        self.parameters += tensor.numel()

    def flush(self) -> None:
        if self.waiting:
            save_file(self.waiting, self._path(len(self.files)), metadata={"format": "pt"})
            self.files.append(list(self.waiting))
        self.waiting, self.waiting_bytes = {}, 0

    def close(self) -> None:
        """Name the files as their number demands; an index only if there are several."""
        self.flush()
        if len(self.files) == 1:
            self._path(0).rename(self.folder / SAFE_WEIGHTS_NAME)
            return
        weight_map = {}
        for i, names in enumerate(self.files):
            file = f"model-{i + 1:05d}-of-{len(self.files):05d}.safetensors"
            self._path(i).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        metadata = {"total_size": self.total_bytes, "total_parameters": self.parameters}
        write_json(self.folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})

    def _path(self, index: int) -> Path:
        return self.folder / f"part-{index}.safetensors"


def write_grown_shards(
    folder: Path, shards: dict[str, dict[str, torch.Tensor]], partial: Path, growth: TensorGrowth, max_bytes: int
) -> None:
    """Grow the tensors of `shards` (`{file: {name: ...}}`) from `folder` into files of at most `max_bytes` in
    `partial`; a tensor that is larger gets a file of its own.

    In memory are at most the pages of one source shard and one file to be written.
    """
    writer = _ShardWriter(partial, max_bytes)
    for file, names in logging.tqdm(shards.items(), desc="Growing shards"):
        with safe_open(checkpoint_file(folder, file), "pt") as shard:
            for name in names:
                tensor = shard.get_tensor(name)
                largest = tensor.nbytes * growth.plan.width_factor  # of what comes of it
                writer.make_room(largest)
                for grown_name, grown in growth.grow(name, tensor):
                    writer.add(grown_name, grown)
                    del grown  # or it stays in memory while the next is made
                    writer.make_room(largest)
        writer.flush()  # what waits may be views of the shard, which would keep all of it in memory
    writer.close()


__all__ = ["LayerTensor", "TensorGrowth", "grow_state_dict", "layer_tensor", "write_grown_shards"]
