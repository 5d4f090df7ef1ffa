"""transformers models of the Sigma papers. Importing this package registers them with the Auto classes."""

from . import ctr, dc_ccl, dot_cbm, m3bert, moe, personal_lm


ctr.register()
dc_ccl.register()
dot_cbm.register()
m3bert.register()
moe.register()
personal_lm.register()

__all__ = ["ctr", "dc_ccl", "dot_cbm", "m3bert", "moe", "personal_lm"]
