"""Speed of the kernels, `python -m sigma_kernels.benchmarks NAME`; `results/` has what was measured."""
