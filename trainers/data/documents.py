"""Identity of documents: hashing, deduplication, and a split that depends on nothing but the documents themselves."""

import hashlib
import json
import unicodedata
from collections.abc import Iterable

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict


# A conversation is a list of messages; everything else that this package reads is a string.
Content = str | list[dict]


def canonical_text(content: Content) -> str:
    """The string that stands for a document: itself, or the JSON of a conversation's messages."""
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True, ensure_ascii=False)


def document_digest(content: Content) -> str:
    """
    sha256 (hex) of a document up to Unicode composition and the amount of white space.

    Two documents with one digest count as one for deduplication and for the split.
    """
    normalised = " ".join(unicodedata.normalize("NFC", canonical_text(content)).split())
    return _sha256(normalised)


def is_held_out(key: str, fraction: float) -> bool:
    """
    Whether the document with this key belongs to the validation split.

    A pure function of the key: neither order, nor seed, nor machine matters, and a larger `fraction` holds out a
    superset of what a smaller one does.
    """
    return int(_sha256(key)[:16], 16) < fraction * 2**64


def deduplicate(dataset: Dataset, *, without: Iterable[str] = ()) -> Dataset:
    """
    Keep one document per digest, and none whose digest is in `without`.

    Args:
        dataset: has the columns `digest` and `source` (both str). Of documents with one digest the one with the
            smallest `source` stays, whatever the order of the rows.
        without: digests to leave out altogether.
    """
    excluded, chosen = set(without), {}
    for index, (digest, source) in enumerate(zip(dataset["digest"], dataset["source"])):
        if digest not in excluded and (digest not in chosen or source < chosen[digest][0]):
            chosen[digest] = (source, index)
    return dataset.select(sorted(index for _, index in chosen.values()))


def corpus_fingerprint(
    dataset: Dataset | IterableDataset | DatasetDict | IterableDatasetDict, *, column: str = "text"
) -> str:
    """
    sha256 (hex) over the sorted sha256 of all documents, byte for byte; a dict counts as the union of its splits.

    Neither the order of the documents nor the way they are split changes it. A streaming dataset is read to its end.

    Raises:
        ValueError: there is no such column, or there are no documents.
    """
    splits = dataset.values() if isinstance(dataset, dict) else [dataset]
    hashes = []
    for split in splits:
        require_column(split, column, argument="column")
        hashes += [_sha256(canonical_text(row[column])) for row in split.select_columns(column)]
    if not hashes:
        raise ValueError("dataset has no documents: there is nothing to fingerprint")
    return _sha256("\n".join(sorted(hashes)))


def require_column(dataset: Dataset | IterableDataset, column: str, *, argument: str) -> None:
    """Raise a ValueError that names the columns that do exist and the argument that chooses one."""
    names = dataset.column_names
    if names is None:  # a stream does not know its columns before its first row
        names = list(next(iter(dataset), {}))
    if column not in names:
        raise ValueError(
            f"{argument}={column!r}: no such column; the dataset has {names or 'no rows'}. "
            f"Name the right one with `{argument}`."
        )


def is_streaming(dataset: Dataset | IterableDataset) -> bool:
    """Whether rows can only be read in order."""
    return isinstance(dataset, datasets.IterableDataset)


def _sha256(text: str) -> str:
    # JSON can carry lone surrogates, which plain UTF-8 refuses
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
