"""Speed, measured as design.md section 10 says: `python -m trainers.benchmarks step`. Committed results lie in
`results/`."""
