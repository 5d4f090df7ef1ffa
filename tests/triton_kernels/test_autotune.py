import json
from dataclasses import asdict

import pytest
import torch

from sigma_kernels import autotune
from sigma_kernels.autotune import (
    KERNELS,
    NEURON_KERNELS,
    Shape,
    Tile,
    bucket,
    forced_tile,
    read_tuned,
    tiles_for,
    tuned_file,
)


CPU = torch.device("cpu")


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """`tuned({(kernel, shape): tile})` writes the file of this device."""
    monkeypatch.setattr(autotune, "TUNED", tmp_path)
    autotune._tiles_for.cache_clear()

    def write(tiles):
        entries = [
            {"kernel": kernel, "shape": asdict(shape), "tile": asdict(tile)} for (kernel, shape), tile in tiles.items()
        ]
        tuned_file("cpu").write_text(json.dumps({"tiles": entries}))

    yield write
    autotune._tiles_for.cache_clear()


def test_a_bucket_is_the_nearest_power_of_two():
    assert [bucket(pairs, 4) for pairs in (0, 1, 4, 6, 22, 40, 4096)] == [1, 1, 1, 2, 4, 8, 1024]


def test_the_nearest_tuned_load_of_the_same_shape_wins(tuned):
    near, far, other = Tile(16, 32, 32), Tile(64, 64, 64), Tile(128, 128, 32)
    tuned(
        {
            ("up", Shape(4, 64, 32, "bf16", 8)): near,
            ("up", Shape(4, 64, 32, "bf16", 512)): far,
            ("up", Shape(4, 64, 16, "bf16", 16)): other,
        }
    )
    for pairs, expected in ((4 * 16, near), (4 * 128, far), (4 * 4096, far), (4, near)):
        assert tiles_for(4, 64, 32, torch.bfloat16, pairs, CPU)["up"] == expected
    assert tiles_for(4, 64, 32, torch.float32, 64, CPU)["up"] not in (near, far, other)


def test_every_kernel_has_a_tile_for_every_load():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 16, 32, 64, 256, 4096):
            assert tiles_for(8, 64, 32, dtype, 8 * rows, CPU).keys() == set(KERNELS + NEURON_KERNELS)


def test_a_forced_tile_ends_with_its_block():
    tile = Tile(16, 16, 16)
    before = tiles_for(4, 64, 32, torch.float32, 8, CPU)
    with forced_tile(tile):
        assert set(tiles_for(4, 64, 32, torch.float32, 8, CPU).values()) == {tile}
    assert tiles_for(4, 64, 32, torch.float32, 8, CPU) == before


@pytest.mark.parametrize(
    "content", ["", "{}", '{"tiles": [{"kernel": "up"}]}', '{"tiles": [{"kernel": "up", "shape": 1}]}']
)
def test_a_malformed_file_is_named_with_the_remedy(tuned, content):
    tuned_file("cpu").write_text(content)
    with pytest.raises(ValueError, match=r"cpu\.json is not a file of tuned tiles.*tune again, or delete it"):
        read_tuned("cpu")
