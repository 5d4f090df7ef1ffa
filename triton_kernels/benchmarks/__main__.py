"""The command line: `python -m sigma_kernels.benchmarks NAME [options]`, where NAME is a module of this folder."""

import argparse
import sys

from . import experts, linear_cross_entropy, neurons, saved, sinkhorn


BENCHMARKS = {
    "experts": experts,
    "linear_cross_entropy": linear_cross_entropy,
    "neurons": neurons,
    "saved": saved,
    "sinkhorn": sinkhorn,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark that the first argument names; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sigma_kernels.benchmarks", description="Measure the kernels of hf-sigma."
    )
    names = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        summary = module.__doc__.split("\n\n")[0]
        module.add_arguments(names.add_parser(name, description=summary, help=summary))
    options = parser.parse_args(arguments)
    return BENCHMARKS[options.benchmark].run(options)


if __name__ == "__main__":
    sys.exit(main())
