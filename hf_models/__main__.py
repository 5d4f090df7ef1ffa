"""What exists here, a line each: `python -m hf_models`.

Every model type with its heads by Auto class, what stands beside them, and the commands.
"""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from . import __all__ as FAMILIES
from .listing import commands, public_names, section, summary


def models(family: str) -> Iterator[tuple[str, str]]:
    """Each model type of a family, followed by its heads."""
    package = importlib.import_module(f"hf_models.{family}")
    for name in package.__all__:
        config = getattr(package, name)
        if isinstance(config, type) and issubclass(config, PreTrainedConfig):
            yield config.model_type, summary(config.__doc__)
            for auto, path in config._family_auto_map.items():
                head = getattr(package, path.split(".")[-1])
                if head is not config:
                    yield f"  {auto}", f"{head.__name__}: {summary(head.__doc__)}"


def beside_models(family: str) -> Iterator[tuple[str, str]]:
    """Public functions and classes of a family that are neither configurations nor models."""
    package = importlib.import_module(f"hf_models.{family}")
    for name, text in public_names(package).items():
        found = getattr(package, name)
        is_model = isinstance(found, type) and issubclass(found, (PreTrainedConfig, PreTrainedModel))
        if not is_model and name != "register":
            yield f"hf_models.{family}.{name}", text


def main(argv: list[str] | None = None) -> None:
    """Print the lists."""
    argparse.ArgumentParser(prog="python -m hf_models", description=summary(__doc__)).parse_args(argv)
    for family in FAMILIES:
        package = importlib.import_module(f"hf_models.{family}")
        print(section(summary(package.__doc__), [*models(family), *beside_models(family)]), end="\n\n")
    here = (row for row in commands(Path(__file__).parent, "hf_models") if row[0] != "hf_models")
    print(section("Commands, each with --help: python -m NAME", here))


if __name__ == "__main__":
    main()
