"""Measurements: what a trained model is worth, and what it is compared with."""

from .code_completion import Completion, complete_functions, parsing_share
from .ngram import NGramModel
from .perplexity import HeldOutLoss, held_out_loss


__all__ = ["Completion", "HeldOutLoss", "NGramModel", "complete_functions", "held_out_loss", "parsing_share"]
