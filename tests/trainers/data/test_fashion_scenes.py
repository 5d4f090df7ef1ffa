"""FashionScenes: classes, exact masks, splits; from scikit-learn's digits, and from the package where it is there."""

import gzip
import shutil

import numpy as np
import pytest

from trainers.data import part_masks, read_fashion_scenes, read_stamp_birds
from trainers.data.fashion_scenes import class_subsets, read_idx


pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return read_fashion_scenes(
        "train", items="digits", num_examples=48, cache_dir=tmp_path_factory.mktemp("digits"), correlation=1.0
    )


def test_classes_are_distinct_sets_of_four():
    subsets = class_subsets()
    assert len(set(subsets)) == 24 and {len(set(subset)) for subset in subsets} == {4}
    counts = np.bincount(np.concatenate(subsets), minlength=10)
    assert counts.min() >= 9 and counts.max() <= 11
    assert max(len(set(a) & set(b)) for a in subsets for b in subsets if a != b) <= 3


def test_scenes_show_their_concepts(scenes):
    for row in scenes.dataset:
        present = part_masks(row["masks"], 10).any(axis=(1, 2))
        assert present.astype(int).tolist() == row["concepts"] == scenes.class_concept_matrix[row["label"]].tolist()
        assert ((np.asarray(row["foreground"]) > 0) == (np.asarray(row["masks"]) > 0)).all()


def test_a_class_has_one_background(scenes):
    colours = {}
    for row in scenes.dataset:
        assert row["background"] == row["label"]
        colours.setdefault(row["label"], set()).add(np.asarray(row["image"])[-1, -1].tobytes())  # beyond the grid
    assert {len(seen) for seen in colours.values()} == {1} and len(set.union(*colours.values())) == 24


def test_bad_arguments():
    with pytest.raises(ValueError, match="items='letters'"):
        read_fashion_scenes("train", items="letters")
    with pytest.raises(ValueError, match="24 at least"):
        read_fashion_scenes("train", items="digits", image_size=16)


def test_idx_files(tmp_path):
    content = b"\0\0\x08\x02" + (2).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes(range(6))
    (tmp_path / "good.gz").write_bytes(gzip.compress(content))
    assert read_idx(tmp_path / "good.gz").tolist() == [[0, 1, 2], [3, 4, 5]]
    (tmp_path / "short.gz").write_bytes(gzip.compress(content[:-1]))
    with pytest.raises(ValueError, match="short.gz: 5 values for the shape"):
        read_idx(tmp_path / "short.gz")
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"PNG" + content))
    with pytest.raises(ValueError, match="not an idx file"):
        read_idx(tmp_path / "other.gz")


@pytest.mark.parametrize("read", [read_fashion_scenes, read_stamp_birds])
def test_missing_tools_name_the_remedy(read, tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(RuntimeError, match="is a Debian package, but apt-get and dpkg cannot be found.*or take"):
        read("train", cache_dir=tmp_path)


def test_an_unreachable_index_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for tool in ("apt-get", "dpkg"):
        (tmp_path / "bin" / tool).write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}", prepend=":")
    with pytest.raises(RuntimeError, match='Unable to locate package.*apt-get update.*items="digits"'):
        read_fashion_scenes("train", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "debian").iterdir())


@pytest.mark.slow
def test_real_fashion(tmp_path):
    try:
        data = read_fashion_scenes("test", num_examples=24, cache_dir=tmp_path)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert len(data.dataset) == 24 and "ankle boot" in data.concept_names
    assert all(part_masks(row["masks"], 10).any(axis=(1, 2)).sum() == 4 for row in data.dataset)
