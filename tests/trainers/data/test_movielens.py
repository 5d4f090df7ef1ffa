"""MovieLens-100k out of recbole's wheel, and what label correction has to find in it."""

import subprocess
import zipfile

import numpy as np
import pytest

from trainers.data import MOVIELENS_COLUMNS, encode_ctr, package_index, read_movielens_100k, user_split


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    try:
        return read_movielens_100k(cache_dir=tmp_path_factory.mktemp("cache"))
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_all_ratings_are_there(ratings):
    assert len(ratings) == 100_000
    assert len(ratings.unique("user_id")) == 943 and len(ratings.unique("item_id")) == 1682
    first = ratings[0]
    assert (first["user_id"], first["item_id"], first["rating"], first["timestamp"]) == ("196", "242", 3.0, 881250949)
    assert (first["title"], first["genres"], first["label"]) == ("Kolya", ["Comedy"], 0.0)
    assert (first["age"], first["age_group"], first["gender"], first["occupation"]) == (49, "40s", "M", "writer")


@pytest.mark.slow
def test_rates_of_clicks_drift_from_user_to_user(ratings):
    """label_correction.md, 6.2."""
    labels, users = np.asarray(ratings["label"][:]), np.unique(ratings["user_id"][:], return_inverse=True)[1]
    rates = np.bincount(users, weights=labels) / np.bincount(users)
    away = np.abs(rates - labels.mean())
    assert labels.mean() == pytest.approx(0.554, abs=0.001)
    assert 0.17 < rates.std() < 0.19
    assert ((away > 0.1).mean(), (away > 0.2).mean()) == pytest.approx((0.58, 0.28), abs=0.01)


@pytest.mark.slow
def test_encoded_with_histories(ratings):
    splits = user_split(ratings, "user_id", time_column="timestamp")
    data = encode_ctr(splits, MOVIELENS_COLUMNS, history_length=20)
    assert data.prior == pytest.approx(0.588, abs=0.002)
    assert len(data.user_names) == 943 and data.vocabularies["genres"].values[:2] == ["Action", "Adventure"]
    train = data.rows("train")
    assert train.tensors["sequence_features"].shape == (len(splits["train"]), 2, 20)
    lengths = (data.rows("test").tensors["sequence_features"][:, 1] > 0).sum(1)
    assert lengths.float().mean() > 15 > (train.tensors["sequence_features"][:, 1] > 0).sum(1).float().mean()


def test_an_unreachable_index_names_the_remedy(tmp_path, monkeypatch):
    answer = subprocess.CompletedProcess([], 1, "", "no route")
    monkeypatch.setattr(package_index.subprocess, "run", lambda *args, **kwargs: answer)
    with pytest.raises(RuntimeError, match="failed with no route. Check the network and pip's index"):
        read_movielens_100k(cache_dir=tmp_path)
    assert not list((tmp_path / "movielens-100k").iterdir())


def test_another_wheel_is_refused(tmp_path):
    folder = tmp_path / "movielens-100k"
    folder.mkdir()
    with zipfile.ZipFile(folder / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("recbole/__init__.py", "")
    with pytest.raises(RuntimeError, match="Delete it; it is fetched again"):
        read_movielens_100k(cache_dir=tmp_path)
