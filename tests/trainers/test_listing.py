"""`python -m trainers`: recipes, parts and commands in the words of the docstrings, which everything public has."""

import importlib
from pathlib import Path

import pytest

import trainers
from hf_models.listing import commands, public_names, summary
from trainers.__main__ import PACKAGES, TITLES, main
from trainers.benchmarks.__main__ import BENCHMARKS


FOLDER = Path(trainers.__file__).parent
COMMANDS = dict(commands(FOLDER, "trainers"))
# Each imports what it runs: some suffice, and none that needs an extra.
SAMPLE = [name for name in COMMANDS if name.startswith(("trainers.reliability", "trainers.device_cloud"))]


@pytest.mark.parametrize("package", [*PACKAGES.values(), "trainers.federated.core"])
def test_everything_public_has_a_summary(package):
    package = importlib.import_module(package)
    assert summary(package.__doc__)
    names = public_names(package)
    assert [name for name, text in names.items() if not text] == []
    assert all(name.isupper() for name in set(package.__all__) - set(names)), "neither documented nor a constant"


def test_the_whole_list_has_every_name_once_with_its_sentence(capsys):
    main([])
    printed = capsys.readouterr().out
    for name, text in COMMANDS.items():
        assert text, f"{name} has no docstring"
        assert name == "trainers" or f"  {text}\n" in printed
    lines = [line.split()[0] for line in printed.splitlines() if line.startswith("  ")]
    recipes = [
        f"trainers.recipes.{path.stem}"
        for path in (FOLDER / "recipes").glob("*.py")
        if "def main(" in path.read_text()
    ]
    for name in (*recipes, *BENCHMARKS, "FedLaAvg", "MSign", "MatryoshkaGridLoss", "ExpertBalanceCallback"):
        assert name in lines, name


def test_one_section_alone_and_an_unknown_one(capsys):
    main(["losses"])
    assert capsys.readouterr().out.startswith(TITLES["losses"] + "\n  MatryoshkaDistillationLoss")
    with pytest.raises(SystemExit):
        main(["models"])
    assert "no section 'models': choose from recipes, callbacks" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["trainers", "trainers.benchmarks", "trainers.recipes.prune_neurons", *SAMPLE])
def test_a_command_explains_itself(name, capsys):
    module = importlib.import_module(f"{name}.__main__" if name in ("trainers", "trainers.benchmarks") else name)
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    assert "usage:" in capsys.readouterr().out
