import json

import datasets
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.data import corpus_fingerprint, is_held_out, load_chat_dataset, load_text_dataset


TEXTS = [f"document number {i}, which says {i * i}" for i in range(60)]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts_of(splits):
    return {split: {row["text"] for row in dataset} for split, dataset in splits.items()}


def load_rows(tmp_path, rows, **kwargs):
    return load_text_dataset(write_jsonl(tmp_path / "data.jsonl", rows), cache_dir=tmp_path / "cache", **kwargs)


def test_python_stdlib_is_there_clean_and_reproducible():
    first, second = load_text_dataset("python-stdlib"), load_text_dataset("python-stdlib")
    sources = first["train"]["source"][:] + first["validation"]["source"][:]
    assert "json/decoder.py" in sources and len(sources) == len(set(sources)) > 300
    assert not [
        s for s in sources if s.startswith("/") or "/test/" in s or s.startswith(("encodings/", "pydoc_data/"))
    ]
    assert 10 <= len(first["validation"]) <= 60
    assert first["validation"]["source"][:] == second["validation"]["source"][:]
    assert all(is_held_out(source, 0.05) for source in first["validation"]["source"])
    assert corpus_fingerprint(first) == corpus_fingerprint(second)


def test_built_in_corpus_streams_the_same_documents():
    in_memory, stream = (
        load_text_dataset("python-stdlib", streaming=streaming, max_documents=40, held_out_fraction=0.3)
        for streaming in (False, True)
    )
    assert texts_of(in_memory) == texts_of(stream) and isinstance(stream["train"], datasets.IterableDataset)


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_are_disjoint_up_to_white_space(tmp_path, streaming):
    rows = [{"text": text} for text in TEXTS] + [{"text": text.replace(" ", "  ")} for text in TEXTS]
    splits = load_rows(tmp_path, rows, held_out_fraction=0.3, streaming=streaming)
    found = texts_of(splits)
    normal = {split: {" ".join(text.split()) for text in texts} for split, texts in found.items()}
    assert normal["train"] | normal["validation"] == set(TEXTS) and not normal["train"] & normal["validation"]
    # Memory counts a text once, a stream hands on what comes.
    assert sum(map(len, found.values())) == (120 if streaming else 60)


def test_streaming_and_memory_split_alike(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    in_memory = load_rows(tmp_path, rows, held_out_fraction=0.3)
    stream = load_rows(tmp_path, rows, held_out_fraction=0.3, streaming=True)
    assert texts_of(in_memory) == texts_of(stream)
    assert next(iter(stream["train"])).keys() == {"text", "source"}


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(20)), id_column=st.sampled_from([None, "id"]))
def test_split_does_not_depend_on_order(tmp_path_factory, order, id_column):
    rows = [{"text": f"text {i % 15}", "id": f"id-{i}"} for i in range(20)]
    results = [
        load_rows(
            tmp_path_factory.mktemp("data"), [rows[i] for i in arrangement], held_out_fraction=0.4, id_column=id_column
        )
        for arrangement in (range(20), order)
    ]
    for split in ("train", "validation"):
        a, b = ({(row["text"], row["source"]) for row in result[split]} for result in results)
        assert a == b and len(a) == len(results[0][split])
    assert corpus_fingerprint(results[0]) == corpus_fingerprint(results[1])


@given(key=st.text(), small=st.floats(0, 1), large=st.floats(0, 1))
def test_a_larger_fraction_holds_out_a_superset(key, small, large):
    small, large = sorted((small, large))
    assert is_held_out(key, large) or not is_held_out(key, small)


def test_fingerprint_sees_content_not_order_nor_split():
    dataset = Dataset.from_dict({"text": TEXTS})
    assert corpus_fingerprint(dataset) == corpus_fingerprint(dataset.shuffle(seed=0))
    assert corpus_fingerprint(dataset) == corpus_fingerprint(DatasetDict(dataset.train_test_split(0.5, seed=0)))
    assert corpus_fingerprint(dataset) != corpus_fingerprint(Dataset.from_dict({"text": [*TEXTS[1:], "other"]}))
    with pytest.raises(ValueError, match="no documents"):
        corpus_fingerprint(Dataset.from_dict({"text": []}))


def test_folder_of_text_files(tmp_path, cache):
    (tmp_path / "docs" / ".git").mkdir(parents=True)
    (tmp_path / "docs" / ".git" / "hidden.txt").write_text("hidden")
    (tmp_path / "docs" / "package.json").write_text("{}")
    for i, text in enumerate(TEXTS):
        (tmp_path / "docs" / f"{i}.{'py' if i % 2 else 'txt'}").write_text(text)
    splits = load_text_dataset(str(tmp_path / "docs"), held_out_fraction=0.3, cache_dir=cache)
    found = texts_of(splits)
    assert found["train"] | found["validation"] == set(TEXTS)
    assert not any(source.startswith("/") for source in splits["train"]["source"])


def test_one_text_file_is_one_document_unless_cut(tmp_path, cache):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(TEXTS))
    with pytest.raises(ValueError, match='split is empty.*sample_by="paragraph"'):
        load_text_dataset(str(path), cache_dir=cache)
    found = texts_of(load_text_dataset(str(path), sample_by="paragraph", held_out_fraction=0.3, cache_dir=cache))
    assert found["train"] | found["validation"] == set(TEXTS)


def test_parquet(tmp_path, cache):
    Dataset.from_dict({"content": TEXTS}).to_parquet(tmp_path / "data.parquet")
    found = texts_of(load_text_dataset(str(tmp_path / "data.parquet"), text_column="content", cache_dir=cache))
    assert found["train"] | found["validation"] == set(TEXTS)


@pytest.mark.parametrize("streaming", [False, True])
def test_own_validation_split_is_kept_and_leaves_train(tmp_path, cache, streaming):
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in TEXTS])
    write_jsonl(tmp_path / "validation.jsonl", [{"text": text} for text in TEXTS[:7]])
    (tmp_path / "README.md").write_text("# a dataset repository\n")
    found = texts_of(load_text_dataset(str(tmp_path), streaming=streaming, cache_dir=cache))
    assert found == {"train": set(TEXTS[7:]), "validation": set(TEXTS[:7])}


def test_hub_id_goes_to_load_dataset(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return DatasetDict(test=Dataset.from_dict({"text": TEXTS}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = load_text_dataset("someone/corpus", config_name="en", revision="abc", held_out_fraction=0.3)
    assert calls == [(("someone/corpus", "en"), {"cache_dir": None, "streaming": False, "revision": "abc"})]
    assert sum(map(len, splits.values())) == len(TEXTS)


def test_unreachable_hub_names_the_choices():
    with pytest.raises(ConnectionError, match="no built-in corpus .python-stdlib.*no file or folder"):
        load_text_dataset("someone/corpus")


def test_max_documents_takes_the_first(tmp_path):
    found = texts_of(load_rows(tmp_path, [{"text": t} for t in TEXTS], max_documents=30, held_out_fraction=0.3))
    assert found["train"] | found["validation"] == set(TEXTS[:30])


def test_chat_dataset(tmp_path, cache):
    rows = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "yes"}]} for t in TEXTS]
    splits = load_chat_dataset(write_jsonl(tmp_path / "c.jsonl", rows + rows), held_out_fraction=0.3, cache_dir=cache)
    assert sum(map(len, splits.values())) == len(TEXTS)
    assert splits["train"][0]["messages"][1] == {"role": "assistant", "content": "yes"}


def test_default_chat_dataset_is_split_by_module():
    splits = load_chat_dataset("python-stdlib", max_documents=200, held_out_fraction=0.3)
    modules = [{source.split("::")[0] for source in splits[split]["source"]} for split in ("train", "validation")]
    assert modules[0] and modules[1] and not modules[0] & modules[1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"held_out_fraction": 0.0}, "held_out_fraction=0.0 must lie strictly between 0 and 1"),
        ({"held_out_fraction": 1.5}, "held_out_fraction=1.5"),
        ({"max_documents": 1}, "max_documents=1 leaves nothing to split"),
        ({"text_column": "body"}, r"text_column='body'.*\['text', 'n'\]"),
        ({"text_column": "n"}, "holds int values where str is needed"),
        ({"id_column": "key"}, "id_column='key'"),
    ],
)
def test_bad_arguments(tmp_path, kwargs, message):
    rows = [{"text": text, "n": i + 1} for i, text in enumerate(TEXTS)]
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path, rows, **kwargs)


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_data_is_refused(tmp_path, streaming):
    with pytest.raises(ValueError, match="is empty"):
        load_rows(tmp_path, [{"text": " \n"}, {"text": ""}], streaming=streaming)


def test_bad_paths(tmp_path, cache, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_text_dataset(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match="no .txt"):
        load_text_dataset(str(tmp_path))
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(ValueError, match="unknown kind of file"):
        load_text_dataset(str(tmp_path / "image.png"))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt: not UTF-8.*iconv"):
        load_text_dataset(str(tmp_path), cache_dir=cache)
    with pytest.raises(ValueError, match="names no dataset"):
        load_text_dataset("")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="cannot be read"):
        load_text_dataset(str(tmp_path))
