"""`python -m hf_models`: every model with its heads, in the words of the docstrings, which everything public has."""

import importlib
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import hf_models
from hf_models.__main__ import main
from hf_models.listing import commands, public_names, section, summary


FAMILIES = {name: importlib.import_module(f"hf_models.{name}") for name in hf_models.__all__}


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One line.", "One line."),
        ("\n    Two\n    lines. And more.\n\n    Args: x.", "Two lines."),
        ("After Gu et al. (2021) and others, 2.5 times. Then", "After Gu et al. (2021) and others, 2.5 times."),
        ("Of a [`Model`]: `f(x)`. `x` is more.", "Of a `Model`: `f(x)`."),
        ("\n    Args:\n        x: y.", ""),
        ("x (`int`): y.", ""),
        (None, ""),
    ],
)
def test_a_summary_is_the_first_sentence(docstring, expected):
    assert summary(docstring) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_public_has_a_summary(family):
    package = FAMILIES[family]
    assert summary(package.__doc__)
    names = public_names(package)
    assert [name for name, text in names.items() if not text] == []
    assert all(name.isupper() for name in set(package.__all__) - set(names)), "neither documented nor a constant"


def test_the_list_has_every_head_of_every_model(capsys):
    main([])
    printed = capsys.readouterr().out
    for package in FAMILIES.values():
        for name in package.__all__:
            found = getattr(package, name)
            if isinstance(found, type) and issubclass(found, PreTrainedModel) and found._auto_class:
                assert f"{name}: {summary(found.__doc__)}" in printed
                assert f"\n  {found.config_class.model_type} " in printed
    assert "hf_models.moe.wrap_moe" in printed and "hf_models.moe.growth" in printed


def test_commands_are_what_runs_by_its_name_and_are_not_imported(tmp_path):
    guard = 'if __name__ == "__main__":\n    pass\n'
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.py").write_text(f'"""Does. More."""\nraise SystemExit\n{guard}')
    (tmp_path / "b.py").write_text('"""Is a module."""\n')
    (tmp_path / "deep" / "__main__.py").write_text(f'"""Goes deep."""\n{guard}')
    assert dict(commands(tmp_path, "p")) == {"p.a": "Does.", "p.deep": "Goes deep."}
    assert section("T", [("a", "x"), ("bcd", "y")]) == "T\n  a    x\n  bcd  y"


@pytest.mark.parametrize("name", [name for name, _ in commands(Path(hf_models.__file__).parent, "hf_models")])
def test_every_command_explains_itself(name, capsys):
    module = importlib.import_module(f"{name}.__main__" if name == "hf_models" else name)
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    assert "usage:" in capsys.readouterr().out
