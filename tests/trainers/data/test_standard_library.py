import pytest

from trainers.data.standard_library import read_standard_library


def test_what_is_left_out(tmp_path):
    kept = ["ast.py", "json/decoder.py"]
    left_out = ["test/a.py", "json/tests/a.py", "encodings/cp1250.py", "site-packages/x/a.py", "_sysconfigdata_x.py"]
    for name in kept + left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    dataset = read_standard_library(tmp_path)
    assert dataset["source"][:] == dataset["group"][:] == kept


def test_without_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="installed without its sources"):
        read_standard_library(tmp_path)
