"""StampBirds: pictures from a folder of the package's layout, textures from the wheel, and the package itself."""

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("skimage")

from trainers.data import read_stamp_birds  # noqa: E402
from trainers.data.stamp_birds import CLASSES, photographs, stamp_rows, textures  # noqa: E402


SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty discs of the class's colour in each of the folders, and a drawing that must be left out."""
    root = tmp_path_factory.mktemp("stamps")
    y, x = np.mgrid[:60, :40]
    for label, (subfolder, _) in enumerate(CLASSES.values()):
        (root / subfolder / "cartoon").mkdir(parents=True)
        stamp = np.zeros((60, 40, 4), dtype=np.uint8)
        stamp[(x - 20) ** 2 + (y - 30) ** 2 < 15**2] = (250, 0, 60 * label, 255)
        for number in range(40):
            Image.fromarray(stamp).save(root / subfolder / f"{number}.png")
        Image.fromarray(stamp).save(root / subfolder / "cartoon" / "drawn.png")
    return root


def test_photographs_fall_into_one_split(folder):
    by_split = [photographs(folder, split) for split in SPLITS]
    for label in range(len(CLASSES)):
        names = [{path.name for path in found[label]} for found in by_split]
        assert len(set.union(*names)) == sum(map(len, names)) == 40 and "drawn.png" not in set.union(*names)


def test_a_class_without_photographs(tmp_path):
    with pytest.raises(ValueError, match="no photograph of a bird for train below animals/birds"):
        photographs(tmp_path, "train")


def test_rows(folder):
    rows = list(stamp_rows(str(folder), "train", 1.0, 8, 48, 0))
    again = list(stamp_rows(str(folder), "train", 0.0, 8, 48, 0))
    for row, other in zip(rows, again):
        assert row["background"] == row["label"] and row["image"].size == (48, 48)
        seen, red = np.asarray(row["foreground"]) > 0, np.asarray(row["image"])[..., 0] > 235
        assert 0.02 < seen.mean() < 0.8 and red[seen].mean() > 0.8, "the mask is on the disc"
        assert row["foreground"].tobytes() == other["foreground"].tobytes()
        assert (np.asarray(row["masks"]) == seen).all()


def test_textures_need_no_network():
    means = {name: texture.reshape(-1, 3).mean(axis=0) for name, texture in textures().items()}
    assert len(means) == len(CLASSES)
    assert means["green grass"].argmax() == 1 and means["red brick"].argmax() == 0


@pytest.mark.slow
def test_real_stamps(tmp_path):
    try:
        data = read_stamp_birds("test", num_examples=40, cache_dir=tmp_path)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert len(data.dataset) == 40 and data.class_names[0] == "bird"
    (folder,) = (tmp_path / "debian").glob("tuxpaint*")
    assert sum(len(found) for split in SPLITS for found in photographs(folder, split)) > 140
