"""Measurements: what a trained model is worth, and what it is compared with."""

from .code_completion import Completion, complete_functions, parsing_share
from .concepts import (
    ConceptScores,
    Leakage,
    accuracy_at_nec,
    concept_alignment,
    concept_scores,
    effective_concepts,
    leakage,
    worst_group,
)
from .elastic import ElasticCurve, ElasticPoint, LayerBudget, evaluate_elastic, search_layer_budget
from .impurity import OracleImpurity, niche_impurity, oracle_impurity
from .interventions import InterventionCurve, intervention_curve
from .localisation import Localisation, best_threshold, localisation, saliency_auc, shown_concepts
from .mixture_recovery import Recovery, mixture_recovery
from .neurons import NeuronPoint, evaluate_neuron_ratios, neuron_use, unused_share
from .ngram import NGramModel
from .perplexity import HeldOutLoss, held_out_loss
from .privacy import (
    EntropyBin,
    PrivacyReport,
    attribution_accuracy,
    dp_epsilon,
    gaussian_attribution_bound,
    linkage_auc,
    membership_auc,
    mixture_attribution_bound,
    privacy_report,
    two_user_attribution,
    user_entropy_report,
)
from .privacy_figure import plot_tradeoff
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
from .sparse_head import AccuracyAtNec, SparseHead, accuracy_of_sparse_heads, sparse_heads
from .users import (
    UserCalibration,
    UserValues,
    auc,
    auc_by_user,
    cold_users,
    gauc,
    harm_rate,
    log_loss,
    per_user,
    ranking_metrics,
    user_calibration,
    worst_decile,
)


__all__ = [
    "AccuracyAtNec",
    "Completion",
    "ConceptScores",
    "ElasticCurve",
    "ElasticPoint",
    "EntropyBin",
    "HeldOutLoss",
    "InterventionCurve",
    "LayerBudget",
    "Leakage",
    "Localisation",
    "NGramModel",
    "NeuronPoint",
    "OracleImpurity",
    "PrivacyReport",
    "Recovery",
    "RetrievalCell",
    "SparseHead",
    "UserCalibration",
    "UserValues",
    "accuracy_at_nec",
    "accuracy_of_sparse_heads",
    "attribution_accuracy",
    "auc",
    "auc_by_user",
    "best_threshold",
    "cold_users",
    "complete_functions",
    "concept_alignment",
    "concept_scores",
    "dp_epsilon",
    "effective_concepts",
    "encode_with",
    "encoding_ms",
    "evaluate_elastic",
    "evaluate_grid",
    "evaluate_neuron_ratios",
    "exact_search",
    "gauc",
    "gaussian_attribution_bound",
    "grid_metrics",
    "grid_table",
    "harm_rate",
    "held_out_loss",
    "intervention_curve",
    "leakage",
    "linkage_auc",
    "localisation",
    "log_loss",
    "membership_auc",
    "mixture_attribution_bound",
    "mixture_recovery",
    "neuron_use",
    "niche_impurity",
    "oracle_impurity",
    "pareto",
    "parsing_share",
    "per_user",
    "plot_pareto",
    "plot_tradeoff",
    "privacy_report",
    "ranking_metrics",
    "retrieval_metrics",
    "saliency_auc",
    "search_layer_budget",
    "shown_concepts",
    "sparse_heads",
    "two_user_attribution",
    "unused_share",
    "user_calibration",
    "user_entropy_report",
    "worst_decile",
    "worst_group",
]
