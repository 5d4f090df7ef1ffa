"""The m3BERT recipes in a form that a test can afford: two tiny languages, their pairs, a shape of nothing. Not for
numbers."""

import json
import random
from pathlib import Path

from trainers.recipes import pretrain_m3bert


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "mrl_layers": [1, 2],
    "mrl_dims": [8, 16],
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
}
WORDS = {
    "en": "table cell chart border format insert delete row column page style print file open save".split(),
    "de": "Tabelle Zelle Diagramm Rahmen Format einfügen löschen Zeile Spalte Seite Vorlage drucken Datei".split(),
}
OPTIONS = {
    "shape": "tiny",
    "dataset_name": "corpus/en.jsonl",
    "multilingual_datasets": ["en=corpus/en.jsonl", "de=corpus/de.jsonl"],
    "pairs_name": "corpus/pairs.jsonl",
    "output_dir": "run",
    "tokenizer_vocab_size": 300,
    "sequence_length": 32,
    "query_length": 12,
    "document_length": 24,
    "max_eval_blocks": 8,
    "logging_steps": 1,
    "stage_steps": [4, 4, 4],
    "stage_batch_sizes": [4, 4, 8],
    "save_steps": 2,
}


def add_tiny_shape(monkeypatch) -> None:
    monkeypatch.setitem(pretrain_m3bert.SHAPES, "tiny", TINY)


def write_corpus(folder: Path) -> None:
    """Text of two languages, and pairs whose documents repeat the words of their query."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    rows = []
    for language, words in WORDS.items():
        texts = [{"text": " ".join(rng.choices(words, k=60))} for _ in range(60)]
        _write(folder / f"{language}.jsonl", texts)
        for page in range(80):
            asked = rng.sample(words, 3)
            document = " ".join(rng.choices(asked, k=12) + rng.choices(words, k=6))
            rows.append({"query": " ".join(asked), "document": document, "language": language, "group": f"p{page}"})
    _write(folder / "pairs.jsonl", rows)


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def command_line(*without: str, **options) -> list[str]:
    """The options of a recipe: `OPTIONS` with changes, less those named."""
    argv = []
    for name, value in (OPTIONS | options).items():
        if name not in without:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name}", *map(str, values)]
    return argv


def times_of_fits(root: Path) -> dict[Path, int]:
    """When each training run below `root` wrote its result."""
    return {file: file.stat().st_mtime_ns for file in sorted(root.rglob("fit.json"))}
