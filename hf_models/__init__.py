"""transformers models of the Sigma papers. Importing this package registers them with the Auto classes."""

from . import m3bert, moe


m3bert.register()
moe.register()

__all__ = ["m3bert", "moe"]
