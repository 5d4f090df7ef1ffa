"""Speed, by ratios of arms that take turns in one process: `python -m trainers.benchmarks step`."""
