"""The command line: `python -m trainers.benchmarks NAME [options]`, where NAME is a module of this folder."""

import argparse

from . import decode, encoder, federated, federated_flower, msign, on_device, reliability, step


BENCHMARKS = {
    "decode": decode,
    "encoder": encoder,
    "federated": federated,
    "federated_flower": federated_flower,
    "msign": msign,
    "on_device": on_device,
    "reliability": reliability,
    "step": step,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark that the first argument names."""
    parser = argparse.ArgumentParser(
        prog="python -m trainers.benchmarks", description="Measure the speed of hf-sigma."
    )
    names = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        summary = module.__doc__.split("\n\n")[0]
        module.add_arguments(names.add_parser(name, description=summary, help=summary))
    options = parser.parse_args(arguments)
    BENCHMARKS[options.benchmark].run(options)


if __name__ == "__main__":
    main()
