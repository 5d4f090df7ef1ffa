"""What exists here, a line each: `python -m trainers [SECTION ...]`."""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path

from hf_models.listing import commands, public_names, section, summary


# Packages whose public names are listed, by section.
PACKAGES = {
    "callbacks": "trainers.callbacks",
    "optimizers": "trainers.optimizers",
    "losses": "trainers.losses",
    "strategies": "trainers.federated",
    "reliability": "trainers.reliability",
    "device_cloud": "trainers.device_cloud",
    "evaluation": "trainers.evaluation",
    "data": "trainers.data",
}
TITLES = {
    "recipes": "Recipes, each with --help: accelerate launch -m NAME",
    **{
        name: f"{name.capitalize().replace('_', ' and ')}: from {package} import NAME"
        for name, package in PACKAGES.items()
    },
    "benchmarks": "Benchmarks: python -m trainers.benchmarks NAME",
    "commands": "Other commands, each with --help: python -m NAME",
}


def rows_of(name: str) -> Iterator[tuple[str, str]]:
    """The names of a section and their summaries."""
    if name in PACKAGES:
        yield from public_names(importlib.import_module(PACKAGES[name])).items()
    elif name == "benchmarks":
        from .benchmarks.__main__ import BENCHMARKS

        yield from ((benchmark, summary(module.__doc__)) for benchmark, module in BENCHMARKS.items())
    else:
        for command, text in commands(Path(__file__).parent, "trainers"):
            is_recipe = command.startswith("trainers.recipes.")
            if command != "trainers" and is_recipe == (name == "recipes"):
                yield command, text


def main(argv: list[str] | None = None) -> None:
    """Print the sections that are asked for, or all."""
    parser = argparse.ArgumentParser(prog="python -m trainers", description=summary(__doc__))
    parser.add_argument("section", nargs="*", metavar="SECTION", help=f"of {', '.join(TITLES)}; by default all")
    asked = parser.parse_args(argv).section
    if unknown := sorted(set(asked) - TITLES.keys()):
        parser.error(f"no section {unknown[0]!r}: choose from {', '.join(TITLES)}")
    print("\n\n".join(section(TITLES[name], rows_of(name)) for name in asked or TITLES))


if __name__ == "__main__":
    main()
