"""Quality against cost of a model whose number of active experts can be chosen, and the best use of a budget."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_models.moe.elastic import (
    ActiveExperts,
    active_experts,
    expert_schedule,
    experts_in_force,
    most_experts,
    num_active_parameters,
    parameters_per_expert,
    routers_of,
)

from ..figures import elastic_figure
from .perplexity import held_out_loss, held_out_nats


@dataclass(frozen=True)
class ElasticPoint:
    """One setting of the dial. `expert_flops_share` is what its active routed experts compute, relative to the most
    expensive point of the curve; attention, shared experts and head cost the same everywhere and are not in it."""

    experts_per_token: tuple[int, ...]  # of each layer with experts
    mean_k: float
    nats_per_token: float
    perplexity: float
    bits_per_character: float
    active_parameters: int  # without embeddings and head
    expert_flops_share: float


@dataclass(frozen=True)
class ElasticCurve:
    """What [`evaluate_elastic`] measured, in the order asked for, on `tokens` predicted tokens."""

    points: tuple[ElasticPoint, ...]
    tokens: int

    def rows(self) -> list[dict]:
        """The points as they go into results.json."""
        return [asdict(point) | {"experts_per_token": list(point.experts_per_token)} for point in self.points]

    def table(self) -> str:
        """Markdown, one line a point."""
        head = "| active experts | active parameters | expert FLOPs | nats/token | perplexity | bits/character |\n"
        lines = [
            f"| {_name(point)} | {point.active_parameters:,} | {point.expert_flops_share:.0%} "
            f"| {point.nats_per_token:.4f} | {point.perplexity:.3f} | {point.bits_per_character:.4f} |\n"
            for point in self.points
        ]
        return head + "|---" + "|---:" * 5 + "|\n" + "".join(lines)

    def figure(self, path: str | Path, *, name: str = "this model", **others: "ElasticCurve") -> Path:
        """Perplexity against the mean number of active experts, with other curves beside."""
        curves = {name: self} | others
        return elastic_figure(
            {key: [(point.mean_k, point.perplexity) for point in curve.points] for key, curve in curves.items()}, path
        )


def evaluate_elastic(
    model: PreTrainedModel,
    blocks: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    ks: Sequence[ActiveExperts],
    *,
    batch_size: int = 16,
) -> ElasticCurve:
    """Held-out loss and cost of `model` at each of `ks`, which are anything that `set_active_experts` takes.

    Data and loss are those of [`held_out_loss`]. The model comes back as it was. Raises `ValueError` for no `ks`, or
    one that the model does not have.
    """
    if not len(ks):
        raise ValueError("`ks` is empty: nothing to evaluate.")
    sizes, measured = parameters_per_expert(model), []
    for k in ks:
        with active_experts(model, k):
            in_force = experts_in_force(model)
            loss = held_out_loss(model, blocks, tokenizer, batch_size=batch_size)
            count = getattr(model, "num_active_parameters", None)  # ours knows of neurons, too
            active = count() if count is not None else num_active_parameters(model)
        measured.append((in_force, loss, active, sum(k * size for k, size in zip(in_force, sizes))))
    dearest = max(cost for *_, cost in measured)
    points = tuple(
        ElasticPoint(
            experts_per_token=tuple(in_force),
            mean_k=sum(in_force) / len(in_force),
            nats_per_token=loss.nats_per_token,
            perplexity=math.exp(loss.nats_per_token),
            bits_per_character=loss.bits_per_character,
            active_parameters=active,
            expert_flops_share=cost / dearest,
        )
        for in_force, loss, active, cost in measured
    )
    return ElasticCurve(points, measured[0][1].tokens)


@dataclass(frozen=True)
class LayerBudget:
    """What [`search_layer_budget`] found; losses in nats per token on the calibration data."""

    experts_per_token: list[int]
    nats_per_token: float
    uniform: list[int]
    uniform_nats_per_token: float
    evaluations: int


def search_layer_budget(
    model: PreTrainedModel,
    mean_k: float,
    calibration: Dataset,
    *,
    k_min: int = 1,
    k_max: int | None = None,
    batch_size: int = 16,
) -> LayerBudget:
    """Active experts per layer, `mean_k` on average, that do no worse than the same number everywhere.

    Greedy exchange: from the uniform allocation, the loss with one expert more and with one fewer in each layer
    predicts what moving an expert from one layer to another would bring; the moves are tried in that order, and the
    first that truly lowers the loss is made; when none of the best `layers` moves does, the search ends. The cost is
    exact at every step, nothing is random, and no point is evaluated twice: some `3 * layers` evaluations a move.

    The gain is measured on `calibration` (blocks of `input_ids`): measure it again on other data. The model comes back
    as it was.

    Args:
        mean_k: times the number of layers it must be whole.
        k_min, k_max: bounds in each layer; default 1 and all that a token can use.

    Raises:
        ValueError: a mean that no integers have, or out of bounds; layers whose experts differ in size, where an
            exchange would change the cost; an empty data set.
    """
    if not len(calibration):
        raise ValueError("`calibration` is empty: nothing to search on.")
    routers, sizes = routers_of(model), parameters_per_expert(model)
    if len(set(sizes)) > 1:
        raise ValueError(f"Experts have {sorted(set(sizes))} parameters in different layers: not exchangeable.")
    k_max = min(map(most_experts, routers)) if k_max is None else k_max
    uniform = expert_schedule("uniform", len(routers), mean=mean_k, smallest=k_min, largest=k_max)
    known: dict[tuple[int, ...], float] = {}

    def loss_of(ks: Sequence[int]) -> float:
        if (key := tuple(ks)) not in known:
            with active_experts(model, list(ks)):
                known[key] = held_out_nats(model, calibration, batch_size)[0]
        return known[key]

    best = uniform
    while (move := _better_exchange(best, loss_of, k_min, k_max)) is not None:
        best = move
    return LayerBudget(best, loss_of(best), uniform, loss_of(uniform), len(known))


def _better_exchange(ks: list[int], loss_of, k_min: int, k_max: int) -> list[int] | None:
    """`ks` with one expert moved to another layer and a lower loss, `None` if the most promising moves have none."""
    layers, now = range(len(ks)), loss_of(ks)
    more = {layer: loss_of(_changed(ks, layer, 1)) - now for layer in layers if ks[layer] < k_max}
    fewer = {layer: loss_of(_changed(ks, layer, -1)) - now for layer in layers if ks[layer] > k_min}
    moves = sorted((more[to] + fewer[source], to, source) for to in more for source in fewer if to != source)
    for _, to, source in moves[: len(ks)]:
        moved = _changed(_changed(ks, to, 1), source, -1)
        if loss_of(moved) < now:
            return moved
    return None


def _changed(ks: list[int], layer: int, by: int) -> list[int]:
    return [k + by * (i == layer) for i, k in enumerate(ks)]


def _name(point: ElasticPoint) -> str:
    ks = point.experts_per_token
    return str(ks[0]) if len(set(ks)) == 1 else f"{point.mean_k:g} ({', '.join(map(str, ks))})"


__all__ = ["ElasticCurve", "ElasticPoint", "LayerBudget", "evaluate_elastic", "search_layer_budget"]
