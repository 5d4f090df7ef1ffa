"""`python -m trainers.federated.engines.flower {simulation,deployment}`, see [`launch`]."""

import argparse
from pathlib import Path

from . import launch


def main(arguments: list[str] | None = None) -> None:
    """Run an app on this machine."""
    parser = argparse.ArgumentParser(
        prog="python -m trainers.federated.engines.flower", description=launch.__doc__.split("\n\n")[0]
    )
    parser.add_argument("way", choices=("simulation", "deployment"))
    parser.add_argument("--app", type=Path, default=launch.EXAMPLE, help="folder of the app; an example with digits")
    parser.add_argument("--folder", type=Path, default=Path("runs/flower"), help="for all that is written")
    parser.add_argument(
        "--clients",
        nargs="+",
        default=["writer-0000", "writer-0001", "writer-0002"],
        help="their names; each is a node, and gets its place in the list as partition-id",
    )
    parser.add_argument("--run-config", nargs="*", default=[], metavar="NAME=VALUE", help="of the app, as TOML has it")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for all")
    options = parser.parse_args(arguments)
    config = dict(assignment.split("=", 1) for assignment in options.run_config)
    run = getattr(launch, options.way)
    output = run(options.app, options.folder, options.clients, run_config=config, timeout=options.timeout)
    print(f"Finished. The app's output is in {output}")


if __name__ == "__main__":
    main()
