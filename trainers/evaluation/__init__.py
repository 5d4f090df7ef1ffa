"""Measurements: what a trained model is worth, and what it is compared with."""

from .code_completion import Completion, complete_functions, parsing_share
from .elastic import ElasticCurve, ElasticPoint, LayerBudget, evaluate_elastic, search_layer_budget
from .neurons import NeuronPoint, evaluate_neuron_ratios, neuron_use, unused_share
from .ngram import NGramModel
from .perplexity import HeldOutLoss, held_out_loss
from .retrieval import (
    RetrievalCell,
    evaluate_grid,
    exact_search,
    grid_metrics,
    grid_table,
    pareto,
    retrieval_metrics,
)
from .retrieval_encoding import encode_with, encoding_ms
from .retrieval_figure import plot_pareto


__all__ = [
    "Completion",
    "ElasticCurve",
    "ElasticPoint",
    "HeldOutLoss",
    "LayerBudget",
    "NGramModel",
    "NeuronPoint",
    "RetrievalCell",
    "complete_functions",
    "encode_with",
    "encoding_ms",
    "evaluate_elastic",
    "evaluate_grid",
    "evaluate_neuron_ratios",
    "exact_search",
    "grid_metrics",
    "grid_table",
    "held_out_loss",
    "neuron_use",
    "pareto",
    "parsing_share",
    "plot_pareto",
    "retrieval_metrics",
    "search_layer_budget",
    "unused_share",
]
