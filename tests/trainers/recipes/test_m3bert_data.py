"""What the m3BERT recipes read: masks, blocks, pairs, and what workers find again."""

import pytest
import torch
from transformers import TrainingArguments

from tests.trainers.recipes.tiny_encoder import write_corpus
from trainers.data import train_encoder_tokenizer
from trainers.recipes.m3bert_data import EncoderData, EncoderDataArguments, ResumableMasking, prepare_encoder_data


STAGES = ("monolingual", "multilingual", "contrastive")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "corpus"
    write_corpus(folder)
    return folder


def make_data(corpus, *, stages=STAGES, **options) -> EncoderData:
    args = EncoderDataArguments(
        **{
            "dataset_name": str(corpus / "en.jsonl"),
            "multilingual_datasets": [f"{name}={corpus / name}.jsonl" for name in ("en", "de")],
            "pairs_name": str(corpus / "pairs.jsonl"),
            "tokenizer_vocab_size": 300,
            "sequence_length": 16,
            "query_length": 8,
            "document_length": 12,
            **options,
        }
    )
    return prepare_encoder_data(args, TrainingArguments(use_cpu=True, report_to="none"), stages=stages)


@pytest.fixture(scope="module")
def data(corpus):
    return make_data(corpus)


def test_blocks_begin_with_bos_and_are_full(data):
    for stage in STAGES[:2]:
        for split in (data.train, data.validation):
            assert all(len(row) == 16 and row[0] == data.tokenizer.bos_token_id for row in split[stage]["input_ids"])
            assert split[stage].column_names == ["input_ids"]
    assert len(data.train["multilingual"]) > len(data.train["monolingual"])


def test_pairs_are_cut_to_their_lengths(data):
    pairs = data.train["contrastive"]
    assert max(map(len, pairs["input_ids"])) == 8 and max(map(len, pairs["document_ids"])) == 12
    assert all(ids[0] == 0 and ids[-1] == 2 for ids in pairs["document_ids"])
    assert set(data.queries) == {"validation", "test"}


def test_data_come_back_as_they_were(data, tmp_path):
    data.save(tmp_path)
    again = EncoderData.load(tmp_path)
    for split in ("train", "validation"):
        ours, theirs = getattr(data, split), getattr(again, split)
        assert {name: rows.to_dict() for name, rows in ours.items()} == {n: r.to_dict() for n, r in theirs.items()}
    assert (again.queries, again.fingerprint) == (data.queries, data.fingerprint)
    assert again.tokenizer("table", "cell").input_ids == data.tokenizer("table", "cell").input_ids


def test_the_fingerprint_knows_text_and_pairs(corpus, data):
    assert make_data(corpus).fingerprint == data.fingerprint
    assert make_data(corpus, document_length=10).fingerprint != data.fingerprint
    assert make_data(corpus, stages=STAGES[:2]).fingerprint != data.fingerprint


def test_queries_are_thinned_and_the_pool_is_not(corpus, data):
    few = make_data(corpus, max_eval_queries=5).queries["test"]
    whole = data.queries["test"]
    assert len(few.queries) == len(few.relevant) == len(few.languages) == 5
    assert few.documents == whole.documents
    for query, answers in zip(few.queries, few.relevant):
        assert whole.relevant[whole.queries.index(query)] == answers


def test_streams(corpus):
    data = make_data(corpus, streaming=True, language_sizes=[3, 1], max_eval_blocks=4, stages=STAGES[:2])
    assert len(data.validation["multilingual"]) == 4
    assert len(next(iter(data.train["multilingual"]))["input_ids"]) == 16


@pytest.mark.parametrize(
    ("options", "stages", "message"),
    [
        ({"multilingual_datasets": []}, STAGES, "needs --multilingual_datasets"),
        ({"multilingual_datasets": ["de"]}, STAGES, "'de' is no LANGUAGE=NAME"),
        ({"language_sizes": [1.0]}, STAGES, "1 values for 2 languages"),
        ({"test_fraction": 0.25}, STAGES, "must be positive"),
        ({}, ("contrastive",), "give --tokenizer_name"),
    ],
)
def test_what_is_refused(corpus, options, stages, message):
    with pytest.raises(ValueError, match=message):
        make_data(corpus, stages=stages, **options)


# --- masking ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_encoder_tokenizer(["some text to mask"] * 3, vocab_size=290, show_progress=False)


def test_masks_depend_on_the_batch_alone(tokenizer):
    rows = [{"input_ids": [0, *range(20, 120), 2]} for _ in range(4)]
    torch.manual_seed(1)
    first = ResumableMasking(tokenizer, mlm_probability=0.3)(rows)
    torch.manual_seed(2)
    masking = ResumableMasking(tokenizer, mlm_probability=0.3)
    other = masking([{"input_ids": list(range(20, 122))}] * 4)
    again = masking(rows)
    assert torch.equal(first["input_ids"], again["input_ids"]) and torch.equal(first["labels"], again["labels"])
    assert not torch.equal(first["labels"] == -100, other["labels"] == -100)
    share = (first["labels"] != -100).float().mean()
    assert 0.2 < share < 0.4 and (first["labels"][:, 0] == -100).all(), "special tokens are not predicted"
    assert not torch.equal(first["labels"][0], first["labels"][1]), "equal rows are not masked alike"
