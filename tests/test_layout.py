"""What lives where, and who may import whom.

Every rule is a function from a tree to the list of its violations, so that it can be shown a tree that breaks it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).parents[1]

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "Makefile", "LICENSE", "constraints.txt", ".ci", ".gitignore"),
    *("triton_kernels", "hf_models", "trainers", "model_cards", "tests"),
}
FLOORS = {"sigma_kernels": 0, "triton_kernels": 0, "hf_models": 1, "trainers": 2, "model_cards": 3}
# Units of one row may import each other, unless SEPARATE says otherwise.
TRAINER_FLOORS = {
    unit: floor
    for floor, row in enumerate(
        (
            ("data", "redaction", "report", "figures", "evaluation"),
            ("losses", "optimizers", "callbacks", "reliability"),
            ("device_cloud", "federated"),
            ("recipes", "benchmarks", "planning", "plan", "__main__"),
        )
    )
    for unit in row
}
SEPARATE = {("device_cloud", "federated"), ("federated", "device_cloud")}
MEETING_PLACE = "trainers.federated.core"
# What an environment with torch and transformers is sure to have; huggingface_hub brings the strict dataclasses that
# configurations are made of.
REMOTE_CODE_ROOTS = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
# How transformers finds the files to copy beside the weights: by text, so also inside docstrings.
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\S+)\s+import", flags=re.MULTILINE)
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
MAX_BYTES = 1_000_000
# Spelt in pieces, or this file would be its own violation.
MACHINE_PATH = re.compile(r"(?<![\w./])/(?:" + "|".join(("root", "work", r"home/\w+", r"Users/\w+")) + ")/")
# Tests that belong to no package.
FREE_TEST_FOLDERS = {("tests",), ("tests", "ecosystem"), ("tests", "hub"), ("tests", "transformers_suite")}


class Import(NamedTuple):
    path: Path
    line: int
    module: str  # absolute, with relative imports resolved
    level: int  # number of leading dots
    guarded: bool  # inside `try`

    def __str__(self):
        return f"{self.path}:{self.line}: imports {self.module}"


def tracked_files(root: Path) -> list[Path]:
    """What git tracks or would track, relative to `root`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return sorted(Path(name) for name in names.split("\0") if name and (root / name).is_file())


def python_files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    return [path for path in tracked_files(root) if path.suffix == ".py" and path.parts[0] in folders]


def imports(root: Path, path: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands; `from a import b` counts as `a.b`, since b may be a module."""
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    guarded = {child for node in ast.walk(tree) if isinstance(node, ast.Try) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, 0, node in guarded)
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[: -node.level] if node.level else ()
            base = ".".join((*package, *(node.module.split(".") if node.module else ())))
            for alias in node.names:
                yield Import(path, node.lineno, f"{base}.{alias.name}", node.level, node in guarded)


def strangers_at_the_top(root: Path) -> list[str]:
    return sorted({path.parts[0] for path in tracked_files(root)} - TOP_LEVEL)


def upward_imports(root: Path) -> list[str]:
    """Between the four packages, arrows go down; tests are imported by nobody."""
    found = []
    for path in python_files(root, ("triton_kernels", "hf_models", "trainers", "model_cards")):
        for item in imports(root, path):
            target = item.module.split(".")[0]
            by_folder_name = target == "triton_kernels" and item.level == 0  # OpenAI's package, or ours twice
            above = FLOORS.get(target, 0) > FLOORS[path.parts[0]]
            if above or by_folder_name or target == "tests":
                found.append(str(item))
    return found


def wrong_order_in_trainers(root: Path) -> list[str]:
    found = []
    for path in python_files(root, ("trainers",)):
        if len(path.parts) == 2 and path.stem == "__init__":
            unit, floor = None, -1  # trainers/__init__.py: importing a recipe must not import all the others
        else:
            unit = path.parts[1].removesuffix(".py")
            if unit not in TRAINER_FLOORS:
                found.append(f"{path}: {unit} has no place in the order of trainers")
                continue
            floor = TRAINER_FLOORS[unit]
        for item in imports(root, path):
            package, _, rest = item.module.partition(".")
            other = rest.split(".")[0]
            if package != "trainers" or other not in TRAINER_FLOORS or other == unit:
                continue
            apart = (unit, other) in SEPARATE and not f"{item.module}.".startswith(f"{MEETING_PLACE}.")
            if TRAINER_FLOORS[other] > floor or apart:
                found.append(str(item))
    return found


def code_that_cannot_travel(root: Path) -> list[str]:
    """Modelling code, and the siblings it pulls along, is copied beside the weights and run without our package."""
    found = []
    for family in sorted({path.parent for path in python_files(root, ("hf_models",)) if len(path.parts) == 3}):
        queue = sorted((root / family).glob("configuration_*.py")) + sorted((root / family).glob("modeling_*.py"))
        seen = set()
        while queue:
            path = queue.pop().relative_to(root)
            if path in seen:
                continue
            seen.add(path)
            siblings = set()
            for item in imports(root, path):
                if item.level == 1 and len(item.module.split(".")) == 4:  # hf_models.<family>.<sibling>.<name>
                    siblings.add(item.module.split(".")[2])
                    queue.append(root / family / f"{item.module.split('.')[2]}.py")
                    continue
                kernels = item.module.split(".")[0] == "sigma_kernels" and item.guarded
                if item.level or not (kernels or item.module.split(".")[0] in REMOTE_CODE_ROOTS):
                    found.append(
                        f"{item}: modelling code needs `from .sibling import name`, torch and transformers only"
                    )
            written = set(RELATIVE_IMPORT.findall((root / path).read_text(encoding="utf-8")))
            for name in sorted(name for name in written - siblings if name and not name.startswith(".")):
                found.append(f"{path}: `from .{name} import` in a docstring is an import to transformers")
    return found


def configurations_without_a_year(root: Path) -> list[str]:
    """transformers' common tests read the year there and skip checks for models older than 2023."""
    return [
        str(path)
        for path in python_files(root, ("hf_models",))
        if path.name.startswith("configuration_") and not (root / path).read_text().startswith("# Copyright 2026")
    ]


def names_that_say_nothing(root: Path) -> list[str]:
    return [str(path) for path in tracked_files(root) if VAGUE_NAMES & {part.split(".")[0] for part in path.parts}]


def large_files(root: Path) -> list[str]:
    return [str(path) for path in tracked_files(root) if (root / path).stat().st_size > MAX_BYTES]


def machine_paths(root: Path) -> list[str]:
    found = []
    for path in tracked_files(root):
        text = (root / path).read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path}:{n}" for n, line in enumerate(text.splitlines(), 1) if MACHINE_PATH.search(line)]
    return found


def unmirrored_tests(root: Path) -> list[str]:
    """`tests/a/b/test_x.py` tests the package `a/b`, and no folder of tests is a package itself.

    With an `__init__.py` in it, pytest would import tests/hf_models/test_x.py as `hf_models.test_x`.
    """
    found = []
    for path in python_files(root, ("tests",)):
        if path.name.startswith("test_") and path.parent.parts not in FREE_TEST_FOLDERS:
            if not (root / Path(*path.parent.parts[1:])).is_dir():
                found.append(f"{path}: there is no {Path(*path.parent.parts[1:])}")
        if path.name == "__init__.py":
            found.append(f"{path}: folders of tests are no packages")
    return found


RULES_AND_BREACHES = {
    strangers_at_the_top: [
        {"setup.py": ""},
        {"docs/index.md": ""},
    ],
    upward_imports: [
        {"hf_models/moe/growth.py": "def f():\n    from trainers.data import g\n"},
        {"trainers/plan.py": "import model_cards.build\n"},
        {"triton_kernels/polar.py": "import hf_models\n"},
        {"hf_models/moe/experts.py": "try:\n    import triton_kernels\nexcept ImportError:\n    pass\n"},
        {"model_cards/build.py": "from tests.conftest import seeded\n"},
    ],
    wrong_order_in_trainers: [
        {"trainers/data/text.py": "from trainers.losses import grid\n"},
        {"trainers/callbacks/balance.py": "from ..recipes.pretrain_sigma_moe import main\n"},
        {"trainers/callbacks/balance.py": "from .. import federated\n"},
        {"trainers/device_cloud/label_correction/a.py": "from trainers.federated.trainer import t\n"},
        {"trainers/federated/core/a.py": "import trainers.device_cloud.dc_ccl\n"},
        {"trainers/__init__.py": "from .data import text\n"},
        {"trainers/extras.py": ""},
    ],
    code_that_cannot_travel: [
        {"hf_models/moe/modeling_x.py": "import numpy\n"},
        {"hf_models/moe/modeling_x.py": "from hf_models.moe.balance import f\n"},
        {"hf_models/moe/modeling_x.py": "from . import balance\n"},
        {"hf_models/moe/modeling_x.py": "from ..registration import f\n"},
        {"hf_models/moe/modeling_x.py": "from sigma_kernels import f\n"},
        {"hf_models/moe/modeling_x.py": "from .balance import f\n", "hf_models/moe/balance.py": "import scipy\n"},
        {"hf_models/moe/configuration_x.py": '"""\nfrom .modeling_x import X\n"""\n'},
    ],
    configurations_without_a_year: [
        {"hf_models/moe/configuration_x.py": '"""Config."""\n'},
    ],
    names_that_say_nothing: [
        {"trainers/utils.py": ""},
        {"hf_models/common/rope.py": ""},
        {"tests/helpers.py": ""},
    ],
    large_files: [
        {"model_cards/x/figure.png": "x" * (MAX_BYTES + 1)},
    ],
    machine_paths: [
        {"README.md": "see /" + "home/someone/runs\n"},
        {"Makefile": "PYTHON := /" + "root/bin/python\n"},
    ],
    unmirrored_tests: [
        {"tests/hf_models/nowhere/test_x.py": ""},
        {"tests/hf_models/__init__.py": ""},
    ],
}
SOUND = {
    "triton_kernels/polar.py": "import torch\nfrom .reference import polar\n",
    "triton_kernels/reference.py": "",
    "hf_models/moe/configuration_x.py": "# Copyright 2026\nfrom transformers import PreTrainedConfig\n",
    "hf_models/moe/modeling_x.py": "import math\nimport torch.nn as nn\nfrom .configuration_x import XConfig\n"
    "try:\n    from sigma_kernels import f\nexcept ImportError:\n    f = None\n",
    "hf_models/moe/growth.py": "import numpy\nfrom .configuration_x import XConfig\nimport sigma_kernels\n",
    "trainers/device_cloud/dc_ccl/a.py": "from trainers.federated.core import average\n",
    "trainers/federated/core/__init__.py": "from trainers.losses.grid import g\n",
    "trainers/losses/grid.py": "from hf_models.moe.growth import g\nfrom trainers.data.text import t\n",
    "trainers/data/text.py": "from datasets import Dataset\n",
    "trainers/recipes/pretrain.py": "from ..federated.trainer import t\nfrom . import arguments\n",
    "trainers/federated/trainer.py": "",
    "trainers/recipes/arguments.py": "",
    "model_cards/build.py": "from trainers.report import read\n",
    "tests/hf_models/moe/test_modeling_x.py": "",
    "README.md": "https://example.com/home/someone/ and ./work/x and ~/runs\n",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES_AND_BREACHES, ids=lambda rule: rule.__name__)
def test_this_tree_keeps(rule):
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule", RULES_AND_BREACHES, ids=lambda rule: rule.__name__)
def test_a_sound_tree_passes(rule, tmp_path):
    assert rule(plant(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    ("rule", "breach"),
    [(rule, breach) for rule, breaches in RULES_AND_BREACHES.items() for breach in breaches],
    ids=lambda value: value.__name__ if callable(value) else next(iter(value)),
)
def test_a_breach_is_seen(rule, breach, tmp_path):
    found = rule(plant(tmp_path, SOUND | breach))
    *_, offender = breach
    assert len(found) == 1
    assert found[0].startswith(Path(offender).parts[0])


def test_git_ignored_files_do_not_count(tmp_path):
    plant(tmp_path, {".gitignore": "runs/\n", "runs/log.txt": "", "README.md": ""})
    assert strangers_at_the_top(tmp_path) == []
