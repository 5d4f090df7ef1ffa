"""The grid of depths and widths in the configuration: what it refuses, and what it makes of a smaller model."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from hf_models.m3bert import M3BertConfig
from tests.hf_models.m3bert.tiny_m3bert import SHAPE, tiny_config


def test_defaults_are_the_released_shapes():
    config = M3BertConfig()
    assert (config.mrl_layers, config.mrl_dims) == ([4, 8, 12], [32, 64, 128, 768])
    assert (config.num_key_value_heads, config.head_dim, config.embed_dim) == (12, 64, None)
    assert (config.position_embedding_type, config.exit_norm, config.tie_word_embeddings) == (
        "absolute",
        "shared",
        False,
    )
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)
    assert config.cell_weights() == [[1.0] * 4] * 3


def test_a_grid_that_is_not_given_fits_the_model():
    config = M3BertConfig(hidden_size=96, num_hidden_layers=6)
    assert (config.mrl_layers, config.mrl_dims) == ([2, 4, 6], [32, 64, 96])
    assert M3BertConfig(num_hidden_layers=5).mrl_layers == [5]
    assert M3BertConfig(hidden_size=24).mrl_dims == [24]


REFUSED = {
    "layers beyond depth": ({"mrl_layers": [2, 8]}, r"mrl_layers=\[2, 8\] go beyond num_hidden_layers, 6"),
    "dims beyond width": ({"mrl_dims": [8, 64]}, r"mrl_dims=\[8, 64\] go beyond"),
    "an untrained depth": (
        {"mrl_layers": [2, 4]},
        r"mrl_layers=\[2, 4\] do not end with num_hidden_layers.*Add it",
    ),
    "an untrained width": ({"mrl_dims": [8]}, r"mrl_dims=\[8\] do not end with"),
    "descending": ({"mrl_dims": [32, 16, 8]}, "ascend without repetition: sort them"),
    "a dim twice": ({"mrl_dims": [8, 8, 32]}, "ascend without repetition"),
    "a layer twice": ({"mrl_layers": [2, 2, 6]}, "ascend without repetition"),
    "layer 0": ({"mrl_layers": [0, 6]}, "must be positive"),
    "none": ({"mrl_layers": []}, r"mrl_layers=\[\] must be positive"),
    "weights of another grid": ({"mrl_weights": [[1.0] * 4] * 2}, "mrl_weights=.* must be 3 lists .* of 4 weights"),
    "a negative weight": ({"mrl_weights": [[1.0, -1.0, 1.0, 1.0]] * 3}, "must not be negative; 0 leaves a cell out"),
    "embed_dim beyond": ({"embed_dim": 64}, r"embed_dim=64 is not in 1..hidden_size=32"),
    "exit_norm": ({"exit_norm": "last"}, "exit_norm='last' is not known. Choose one of"),
    "pooling": ({"pooling": "max"}, "pooling='max' is not known"),
    "positions": ({"position_embedding_type": "alibi"}, "position_embedding_type='alibi' is not known"),
    "final_norm": ({"final_norm": False}, "final_norm=False fits exit_norm='none' only"),
    "head groups": ({"num_key_value_heads": 3}, "not divisible by num_key_value_heads=3"),
    "an odd head_dim": ({"head_dim": 7, "position_embedding_type": "rope"}, "even for rotary"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_grid_that_cannot_be_is_refused_with_the_remedy(case):
    fields, message = REFUSED[case]
    with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
        tiny_config(**fields)


def test_a_head_dim_that_cannot_be_derived_is_refused():
    with pytest.raises(ValueError, match="hidden_size=32 is not divisible by num_attention_heads=5.*Set head_dim"):
        tiny_config(num_attention_heads=5, num_key_value_heads=None)


def test_a_wrong_type_is_refused():
    with pytest.raises(StrictDataclassError, match="mrl_layers"):
        tiny_config(mrl_layers="2,4,6")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"layers": 3}, r"layer 3 is none of the trained mrl_layers=\[2, 4, 6\].*Choose one"),
        ({"dim": 12}, r"dim 12 is none of the trained mrl_dims=\[4, 8, 16, 32\].*Choose one"),
        ({"layers": 0}, "layer 0 is none"),
        ({"dim": 64}, "dim 64 is none"),
    ],
)
def test_a_cell_that_was_not_trained_is_refused(cell, message):
    with pytest.raises(ValueError, match=message):
        tiny_config().truncated(**cell)


def test_truncated_keeps_what_is_left_of_the_grid_and_everything_else():
    weights = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 12.0]]
    config = tiny_config(mrl_weights=weights, exit_norm="none", attention_dropout=0.25)
    before = config.to_dict()
    smaller = config.truncated(4, 8)
    changed = {"num_hidden_layers": 4, "mrl_layers": [2, 4], "mrl_dims": [4, 8], "embed_dim": 8, "final_norm": False}
    changed["mrl_weights"] = [[1.0, 2.0], [5.0, 6.0]]
    assert smaller.to_dict() == before | changed
    assert config.to_dict() == before
    assert config.truncated() is config and config.truncated(6, 32) is config
    assert config.truncated(dim=8).final_norm and tiny_config().truncated(2).final_norm
    assert config.truncated(layers=2).embed_dim is None


grids = st.builds(
    lambda layers, dims: {
        "mrl_layers": sorted(layers),
        "num_hidden_layers": max(layers),
        "mrl_dims": sorted(dims | {32}),
    },
    st.sets(st.integers(1, 9), min_size=1, max_size=5),
    st.sets(st.integers(1, 31), max_size=5),
)


@given(grids, st.data())
def test_cutting_twice_is_cutting_once(grid, data):
    config = tiny_config(**grid)
    layers = sorted(data.draw(st.lists(st.sampled_from(config.mrl_layers), min_size=2, max_size=2)), reverse=True)
    dims = sorted(data.draw(st.lists(st.sampled_from(config.mrl_dims), min_size=2, max_size=2)), reverse=True)
    twice = config.truncated(layers[0], dims[0]).truncated(layers[1], dims[1])
    assert twice.to_dict() == config.truncated(layers[1], dims[1]).to_dict()
    assert (twice.num_hidden_layers, twice.width) == (layers[1], dims[1])


def test_every_field_comes_back_from_a_file(tmp_path):
    unusual = {
        "mrl_weights": [[0.5] * 4] * 3,
        "exit_norm": "per_exit",
        "pooling": "cls",
        "normalize_embeddings": False,
    }
    unusual |= {"hidden_dropout": 0.3, "embedding_dropout": 0.2, "position_embedding_type": "rope", "head_dim": 6}
    config = tiny_config(**unusual)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is M3BertConfig
    loaded.name_or_path = ""
    assert loaded.to_dict() == config.to_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    assert all(written[name] == value for name, value in (SHAPE | unusual).items() if name != "num_labels")
    assert "use_cache" not in written


def test_overrides_at_load_time_are_checked_like_any_value(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    smaller = AutoConfig.from_pretrained(tmp_path, num_layers=4, embed_dim=8)
    expected = tiny_config().truncated(4, 8)
    expected.name_or_path = smaller.name_or_path
    assert smaller.to_dict() == expected.to_dict()
    with pytest.raises(ValueError, match="layer 5 is none of the trained"):
        AutoConfig.from_pretrained(tmp_path, num_layers=5)
    with pytest.raises(StrictDataclassError, match="num_layers and embed_dim at load time"):
        AutoConfig.from_pretrained(tmp_path, num_hidden_layers=4)
    config, rest = AutoConfig.from_pretrained(tmp_path, num_layers=2, unheard_of=1, return_unused_kwargs=True)
    assert config.num_hidden_layers == 2 and rest == {"unheard_of": 1}
