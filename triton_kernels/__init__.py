"""Fused kernels of hf-sigma, installed and imported as ``sigma_kernels``.

Floor 0 of the tree: needs torch and Triton only and imports nothing of hf-sigma. Models reach it through guarded
imports and run on transformers' own backends where it, or Triton, is missing.
"""
