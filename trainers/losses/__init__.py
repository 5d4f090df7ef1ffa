"""Losses over pairs of embeddings: in-batch negatives, and all exits and widths of a Matryoshka encoder at once."""

from .in_batch_negatives import in_batch_negatives
from .matryoshka_distillation import MatryoshkaDistillationLoss, similarity_kl
from .matryoshka_grid import MatryoshkaGridLoss


__all__ = ["MatryoshkaDistillationLoss", "MatryoshkaGridLoss", "in_batch_negatives", "similarity_kl"]
