"""What neurons are worth: held-out loss when only a share of them is used, and how evenly they are used."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_models.moe import MoneForCausalLM
from hf_models.moe.neurons import NeuronStatistics, active_expert_share, collected_neuron_sums, neuron_networks

from .perplexity import HeldOutLoss, held_out_loss


@dataclass(frozen=True)
class NeuronPoint:
    """One point of the curve: `ratio` of the neurons, the share of an expert's parameters that this is, the loss."""

    ratio: float
    active_expert_share: float
    loss: HeldOutLoss


def evaluate_neuron_ratios(
    model: MoneForCausalLM,
    blocks: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    ratios: Sequence[float],
    *,
    batch_size: int = 16,
) -> list[NeuronPoint]:
    """Held-out loss of `model` at each share of its neurons, the same in all layers; the model is left as it was.

    For a model that was trained with all neurons this is the training-free sparsification study of arXiv 2510.05781:
    `MoneForCausalLM.from_moe(model)` first.
    """
    points = []
    for ratio in ratios:
        with model.active_neurons(ratio=ratio):
            loss = held_out_loss(model, blocks, tokenizer, batch_size=batch_size)
            width = model.config.moe_intermediate_size
            points.append(NeuronPoint(ratio, active_expert_share(model.config.neurons_of(0, width), width), loss))
    return points


@torch.no_grad()
def neuron_use(model: MoneForCausalLM, blocks: Dataset, *, batch_size: int = 16) -> list[torch.Tensor]:
    """How often each neuron is kept by the tokens of its expert, `(experts, d)` in fp32 for each layer that leaves
    neurons out; 0 for experts without a token. Counted by `grouped_mm`, whatever the model's backend."""
    networks = [network for network in neuron_networks(model) if network.selects_neurons]
    before = [network.neuron_statistics for network in networks]
    backend, was_training = model.config._experts_implementation, model.training
    model.set_experts_implementation("grouped_mm")
    model.eval()
    for network in networks:
        network.neuron_statistics = NeuronStatistics("normalized")
        network.train()  # networks count while training; nothing else shall, dropout is noise
    try:
        counts, tokens = [0.0] * len(networks), [0.0] * len(networks)
        for start in range(0, len(blocks), batch_size):
            ids = torch.tensor(blocks[start : start + batch_size]["input_ids"], device=model.device)
            with collected_neuron_sums(model, None):
                model.model(input_ids=ids, use_cache=False)
                sums = [network.neuron_statistics.total() for network in networks]
            counts = [c + s.counts for c, s in zip(counts, sums, strict=True)]
            tokens = [t + s.tokens for t, s in zip(tokens, sums, strict=True)]
    finally:
        for network, statistics in zip(networks, before, strict=True):
            network.neuron_statistics = statistics
        model.set_experts_implementation(backend)
        model.train(was_training)
    return [c / t.clamp_min(1.0) for c, t in zip(counts, tokens, strict=True)]


def unused_share(use: Sequence[torch.Tensor], *, threshold: float = 0.01) -> float:
    """Of `use`, `(experts, neurons)` for each layer: share of the neurons that fewer than `threshold` of their
    expert's tokens keep, in the layers that leave any out; experts without a token do not count. 0 where no layer
    does."""
    seen = torch.cat([layer[layer.sum(dim=-1) > 0].flatten() for layer in use] or [torch.empty(0)])
    return (seen < threshold).float().mean().item() if len(seen) else 0.0


__all__ = ["NeuronPoint", "evaluate_neuron_ratios", "neuron_use", "unused_share"]
