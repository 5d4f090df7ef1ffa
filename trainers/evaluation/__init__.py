"""Measurements: what a trained model is worth, and what it is compared with."""

from .code_completion import Completion, complete_functions, parsing_share
from .elastic import ElasticCurve, ElasticPoint, LayerBudget, evaluate_elastic, search_layer_budget
from .neurons import NeuronPoint, evaluate_neuron_ratios, neuron_use, unused_share
from .ngram import NGramModel
from .perplexity import HeldOutLoss, held_out_loss


__all__ = [
    "Completion",
    "ElasticCurve",
    "ElasticPoint",
    "HeldOutLoss",
    "LayerBudget",
    "NGramModel",
    "NeuronPoint",
    "complete_functions",
    "evaluate_elastic",
    "evaluate_neuron_ratios",
    "held_out_loss",
    "neuron_use",
    "parsing_share",
    "search_layer_budget",
    "unused_share",
]
