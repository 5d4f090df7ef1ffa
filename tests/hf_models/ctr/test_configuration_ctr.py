"""Features are described in the config, and what does not fit is refused before a model is built."""

import copy

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_models.ctr import CtrConfig
from tests.hf_models.ctr.tiny_ctr import FEATURES, tiny_config


def changed(which, **fields):
    features = copy.deepcopy(FEATURES)
    (feature,) = (f for f in features if f["name"] == which)
    feature.update(fields)
    return {"features": features}


def test_features_are_sorted_into_columns():
    config = tiny_config()
    assert [f["name"] for f in config.categorical] == ["user_id", "item_id", "hour"]
    assert [f["name"] for f in config.numeric] == ["age", "price"]
    assert [f["name"] for f in config.sequences] == ["genres", "history"]
    assert config.tables == {"user_id": 9, "item_id": 12, "hour": 5, "genres": 7}
    assert (config.user_feature, config.item_feature) == ("user_id", "item_id")
    assert config.categorical[2]["role"] == "context" and config.num_labels == 1


def test_every_field_survives_saving(tmp_path):
    fields = {
        "architecture": "din",
        "embedding_dim": 3,
        "hidden_sizes": [5],
        "hidden_act": "gelu",
        "dropout": 0.1,
        "attention_hidden_sizes": [7, 2],
        "attention_act": "relu",
        "attention_normalization": "softmax",
        "user_bias": True,
        "item_bias": False,
        "prior": 0.2,
        "initializer_range": 0.3,
    }
    config = CtrConfig(features=FEATURES, **fields)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in fields} == fields
    assert again.features == config.features
    assert set(fields) | {"features"} == set(CtrConfig.__annotations__)


def test_a_config_without_features_has_a_user_and_an_item():
    assert CtrConfig().tables == {"user": 2, "item": 2}
    assert CtrConfig().hidden_sizes == [64, 32]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (changed("hour", name="item_id"), r"repeats \['item_id'\]"),
        (changed("hour", name="an hour"), "'an hour' cannot name a parameter"),
        (changed("hour", name="items"), "'items' cannot name a parameter"),
        (changed("hour", name="training"), "'training' cannot name a parameter"),
        (changed("hour", name=None), "None cannot name a parameter"),
        (changed("hour", kind="text"), "kind='text' is not known"),
        (changed("hour", role="place"), "role='place' is not known"),
        (changed("hour", size=3), r"'hour' has \['size'\]"),
        (changed("hour", vocab_size=1), "vocab_size=1 must be an integer of at least 2"),
        (changed("hour", vocab_size=2.5), "vocab_size=2.5 must be an integer"),
        (changed("genres", vocab_size=True), "vocab_size=True must be an integer"),
        (changed("age", vocab_size=4), "'age' is numeric and has no vocab_size"),
        (changed("history", shares="no_such"), "'history' shares 'no_such': only a sequence can share"),
        (changed("history", shares="user_id"), "only the table of a categorical feature of role 'item'"),
        (changed("history", shares="genres"), "only the table of a categorical feature"),
        (changed("hour", shares="item_id"), "'hour' shares 'item_id': only a sequence can share"),
        (changed("history", vocab_size=12), "leave its vocab_size out"),
        ({"features": []}, "no categorical feature"),
        ({"features": FEATURES[:3], "architecture": "din"}, "attends over a sequence that shares"),
        ({"architecture": "dcn"}, "architecture='dcn' is not known"),
        ({"attention_normalization": "sum"}, "attention_normalization='sum' is not known"),
        ({"architecture": "pnn", "hidden_sizes": []}, "'pnn' needs hidden_sizes"),
        ({"embedding_dim": 0}, "must be positive"),
        ({"dropout": 1.0}, "dropout=1.0 must be"),
        ({"prior": 0.0}, "prior=0.0 must lie between"),
        ({"embedding_dim": "a"}, "embedding_dim"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(fields, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        CtrConfig(**{"features": FEATURES, **fields})


def test_who_has_first_order_weights():
    user, item, context = tiny_config().categorical
    for architecture, published in {"lr": True, "wide_deep": True, "deepfm": True, "pnn": False, "din": False}.items():
        config = tiny_config(architecture)
        assert {config.has_first_order(f) for f in (user, item, context)} == {published}
    config = tiny_config("deepfm", user_bias=False)
    assert [config.has_first_order(f) for f in (user, item, context)] == [False, True, True]
    config = tiny_config("din", user_bias=True, item_bias=True)
    assert [config.has_first_order(f) for f in (user, item, context)] == [True, True, False]


def test_the_name_of_a_label_is_kept(tmp_path):
    tiny_config(id2label={0: "click"}).save_pretrained(tmp_path)
    assert CtrConfig.from_pretrained(tmp_path).id2label == {0: "click"}
    assert tiny_config().id2label == {0: "LABEL_0"}
