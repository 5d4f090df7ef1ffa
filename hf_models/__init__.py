"""transformers models of the Sigma papers. Importing this package registers them with the Auto classes."""

from . import moe


moe.register()

__all__ = ["moe"]
