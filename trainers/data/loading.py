"""One call from a name to documents: `load_text_dataset` for pre-training, `load_chat_dataset` for conversations."""

import os
from functools import partial
from pathlib import Path
from typing import Literal

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetNotFoundError
from transformers.utils import logging

from .documents import canonical_text, deduplicate, document_digest, is_held_out, is_streaming, require_column
from .functions import instruction_dataset
from .libreoffice import read_libreoffice_help
from .standard_library import read_standard_library


logger = logging.get_logger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_text_dataset(
    name: str,
    *,
    held_out_fraction: float = 0.05,
    text_column: str = "text",
    id_column: str | None = None,
    sample_by: Literal["document", "paragraph", "line"] = "document",
    cache_dir: str | os.PathLike | None = None,
    streaming: bool = False,
    max_documents: int | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> DatasetDict | IterableDatasetDict:
    """
    Documents by name, split into "train" and "validation".

    The split is by document and a pure function of it: of its id for the built-in corpora (for LibreOffice the page,
    so that translations stay together) and where `id_column` names one, else of its normalised text. Order, machine
    and seed do not matter, and train and validation never share a text. A dataset that brings a validation split keeps
    it; what train shares with it leaves train. A "test" split is never read.

    In memory, documents equal up to white space count once. Streaming does not deduplicate, since that would need all
    digests in memory; equal texts still fall on one side, except under `id_column`, where the ids decide alone.

    Args:
        name: "python-stdlib"; "libreoffice-help" or "libreoffice-help:de,ja"; a file or folder of .txt, .md, .rst,
            .py, .jsonl, .json or .parquet (a folder with plain text beside .json files is read as plain text); else
            the id of a dataset on the Hub.
        held_out_fraction: expected share of documents in "validation" where the dataset brings no such split.
        text_column: the column to read; called `text` in the result.
        id_column: a column that identifies documents and becomes `source`; a digest of the text if None.
        sample_by: what is a document in a plain text file, as in datasets' text builder.
        cache_dir: for prepared data; datasets' own cache folder if None.
        streaming: return IterableDatasets that never hold the data at once.
        max_documents: read no more than that many, the first ones.
        config_name, revision: passed to `datasets.load_dataset` for a Hub dataset or a local dataset repository.

    Returns:
        Splits "train" and "validation", columns `text` (str) and `source` (str; never an absolute path).

    Raises:
        ValueError: a bad argument, no such column, no documents, or an empty split.
        FileNotFoundError, PermissionError: a path that does not exist or cannot be read.
        ConnectionError: not a built-in name, not a path, and the Hub has no such dataset or cannot be reached.
    """
    _check(name, held_out_fraction, max_documents)
    built_in = _read_built_in(name, cache_dir)
    if built_in is not None:
        splits = {"train": built_in}
    else:
        splits = _read(name, sample_by, cache_dir, streaming, config_name, revision)
        splits = {
            split: _with_identity(dataset, text_column, "text", id_column, "text_column")
            for split, dataset in splits.items()
        }
    return _split(name, splits, "text", held_out_fraction, max_documents, streaming)


def load_chat_dataset(
    name: str,
    *,
    held_out_fraction: float = 0.05,
    messages_column: str = "messages",
    id_column: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    streaming: bool = False,
    max_documents: int | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> DatasetDict | IterableDatasetDict:
    """
    Conversations by name, split as `load_text_dataset` does; a conversation is a document.

    "python-stdlib" gives `instruction_dataset` of the standard library, split by module. Otherwise `name` is a file,
    folder or Hub dataset with a column of messages (dicts with `role` and `content`).

    Returns:
        Splits "train" and "validation", columns `messages` and `source` (str).

    Raises:
        As `load_text_dataset`.
    """
    _check(name, held_out_fraction, max_documents)
    built_in = _read_built_in(name, cache_dir)
    if built_in is not None:
        splits = {"train": instruction_dataset(built_in).map(lambda row: {"group": row["source"].split("::")[0]})}
    else:
        splits = _read(name, "document", cache_dir, streaming, config_name, revision)
        splits = {
            split: _with_identity(dataset, messages_column, "messages", id_column, "messages_column")
            for split, dataset in splits.items()
        }
    return _split(name, splits, "messages", held_out_fraction, max_documents, streaming)


def _check(name: str, held_out_fraction: float, max_documents: int | None) -> None:
    if not name:
        raise ValueError("name='' names no dataset: give python-stdlib, a file, a folder, or a Hub dataset id.")
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction={held_out_fraction} must lie strictly between 0 and 1, e.g. 0.05.")
    if max_documents is not None and max_documents < 2:
        raise ValueError(f"max_documents={max_documents} leaves nothing to split: use 2 or more, or None for all.")


def _read_built_in(name: str, cache_dir: str | os.PathLike | None) -> Dataset | None:
    corpus, _, choice = name.partition(":")
    if name == "python-stdlib":
        return read_standard_library()
    if corpus == "libreoffice-help":
        return read_libreoffice_help(choice.split(",") if choice else ["en-us"], cache_dir=cache_dir)
    return None


def _read(
    name: str,
    sample_by: str,
    cache_dir: str | os.PathLike | None,
    streaming: bool,
    config_name: str | None,
    revision: str | None,
) -> dict[str, Dataset | IterableDataset]:
    """The splits "train" and, where there is one, "validation" of a path or Hub dataset, columns as they come."""
    load = partial(datasets.load_dataset, cache_dir=cache_dir and str(cache_dir), streaming=streaming)
    path = Path(name).expanduser()
    if path.exists():
        splits = _read_path(path, sample_by, load, config_name)
    elif name.startswith((".", "/", "~")) or path.suffix in (*TEXT_SUFFIXES, *TABLE_BUILDERS):
        raise FileNotFoundError(
            f"{name}: no such file or folder. Check the path; it is taken from the working folder."
        )
    else:
        try:
            splits = load(name, config_name, revision=revision)
        except (DatasetNotFoundError, ConnectionError) as error:
            raise ConnectionError(
                f"{name!r} is no built-in corpus (python-stdlib, libreoffice-help[:languages]), no file or folder "
                f"here, and the Hub did not serve it: {error}"
            ) from error
    if "train" not in splits and len(splits) == 1:
        return {"train": next(iter(splits.values()))}
    if "train" not in splits:
        raise ValueError(f"{name}: no split called train, only {', '.join(splits)}. Rename one of them to train.")
    return {split: splits[split] for split in ("train", "validation") if split in splits}


def _read_path(path: Path, sample_by: str, load: partial, config_name: str | None):
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path}: cannot be read. Grant read permission (chmod), or name another path.")
    if path.is_file() and path.suffix in TABLE_BUILDERS:
        return load(TABLE_BUILDERS[path.suffix], data_files=str(path))
    if path.is_file() and path.suffix not in TEXT_SUFFIXES:
        raise ValueError(
            f"{path.name}: unknown kind of file. Use {', '.join((*TEXT_SUFFIXES, *TABLE_BUILDERS))}, or a folder."
        )
    files = [path] if path.is_file() else _visible_files(path)
    suffixes = {file.suffix for file in files}
    texts = [file for file in files if file.suffix in TEXT_SUFFIXES]
    # A dataset repository holds a README.md, a source tree holds a package.json: neither is what the folder is about.
    prose = suffixes.intersection(TEXT_SUFFIXES) - {".md"}
    if suffixes & {".jsonl", ".parquet"} or (".json" in suffixes and not prose):
        return load(str(path), config_name)
    if not texts:
        raise ValueError(f"{path}: no {', '.join((*TEXT_SUFFIXES, *TABLE_BUILDERS))} file in this folder.")
    for file in texts:
        _require_utf8(file)
    return load("text", data_files=[str(file) for file in texts], sample_by=sample_by)


def _visible_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _require_utf8(file: Path) -> None:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error}). Convert it (iconv -t UTF-8), or take it out.") from error


def _with_identity(dataset, column: str, name: str, id_column: str | None, argument: str):
    """Rename the content column and add `source` and `group` (see `_identify`); drop everything else."""
    require_column(dataset, column, argument=argument)
    if id_column is not None:
        require_column(dataset, id_column, argument="id_column")
    names = dataset.column_names or list(next(iter(dataset)))
    return dataset.map(
        partial(_identify, column=column, name=name, id_column=id_column), batched=True, remove_columns=names
    )


def _identify(batch: dict[str, list], *, column: str, name: str, id_column: str | None) -> dict[str, list]:
    contents = [content for content in batch[column] if content]
    expected = str if name == "text" else list
    if contents and not isinstance(contents[0], expected):
        raise ValueError(
            f"column {column!r} holds {type(contents[0]).__name__} values where {expected.__name__} is needed "
            f"({'text' if expected is str else 'messages with role and content'}): name another column."
        )
    if id_column is None:
        keys = [document_digest(content) for content in contents]
        return {name: contents, "source": [f"sha256:{key[:16]}" for key in keys], "group": keys}
    ids = [str(key) for key, content in zip(batch[id_column], batch[column]) if content]
    return {name: contents, "source": ids, "group": ids}


def _split(name, splits: dict, column: str, fraction: float, max_documents: int | None, streaming: bool):
    if is_streaming(splits["train"]):
        result = _split_stream(splits, column, fraction, max_documents)
    else:
        result = _split_in_memory(name, splits, column, fraction, max_documents)
    for split, dataset in result.items():
        if next(iter(dataset), None) is None:
            raise ValueError(
                f"{name}: the {split} split is empty (held_out_fraction={fraction}, max_documents={max_documents}). "
                "Give more documents or another held_out_fraction; a few large text files can be cut into more "
                'documents with sample_by="paragraph".'
            )
    if streaming and isinstance(result, DatasetDict):  # a built-in corpus: small, prepared at once
        return IterableDatasetDict({split: dataset.to_iterable_dataset() for split, dataset in result.items()})
    return result


def _split_in_memory(name, splits: dict[str, Dataset], column: str, fraction: float, max_documents: int | None):
    prepared, n_read = {}, 0
    for split, dataset in splits.items():
        if max_documents is not None:
            dataset = dataset.select(range(min(max_documents, len(dataset))))
        n_read += len(dataset)
        dataset = dataset.filter(_has_text, fn_kwargs={"column": column})
        if len(dataset) == 0:
            raise ValueError(f"{name}: the {split} split is empty. Check the files, or name another dataset.")
        prepared[split] = dataset.map(_add_digest, batched=True, fn_kwargs={"column": column})
    if "validation" in prepared:
        validation = deduplicate(prepared["validation"])
        train = deduplicate(prepared["train"], without=validation["digest"])
    else:
        documents = deduplicate(prepared["train"])
        held_out = [is_held_out(group, fraction) for group in documents["group"]]
        train = documents.select([i for i, held in enumerate(held_out) if not held])
        validation = documents.select([i for i, held in enumerate(held_out) if held])
    dropped = n_read - len(train) - len(validation)
    logger.info(f"{name}: {len(train)} + {len(validation)} documents, {dropped} duplicate or empty ones left out")
    return DatasetDict(
        train=train.select_columns([column, "source"]), validation=validation.select_columns([column, "source"])
    )


def _split_stream(splits: dict[str, IterableDataset], column: str, fraction: float, max_documents: int | None):
    splits = {
        split: (dataset if max_documents is None else dataset.take(max_documents)).filter(
            _has_text, fn_kwargs={"column": column}
        )
        for split, dataset in splits.items()
    }
    if "validation" in splits:
        # One pass over the smaller split buys what the docstring promises without a digest of every training text.
        held = frozenset(document_digest(row[column]) for row in splits["validation"])
        train = splits["train"].filter(lambda row: document_digest(row[column]) not in held)
        validation = splits["validation"]
    else:
        train = splits["train"].filter(lambda row: not is_held_out(row["group"], fraction))
        validation = splits["train"].filter(lambda row: is_held_out(row["group"], fraction))
    return IterableDatasetDict(
        train=train.select_columns([column, "source"]), validation=validation.select_columns([column, "source"])
    )


def _has_text(row: dict, *, column: str) -> bool:
    return bool(canonical_text(row[column]).strip())


def _add_digest(batch: dict[str, list], *, column: str) -> dict[str, list]:
    return {"digest": [document_digest(content) for content in batch[column]]}
