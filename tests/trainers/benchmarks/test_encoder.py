"""The benchmark of encoding: equal shapes, equal lengths, every exit, and sentences a second that fit the seconds."""

import json

import pytest
import torch
from transformers import ModernBertModel

from hf_models.m3bert import M3BertConfig, M3BertForSentenceEmbedding
from trainers.benchmarks.__main__ import main
from trainers.benchmarks.alternating_blocks import MIN_BLOCKS
from trainers.benchmarks.encoder import _batches, _mean_pooled, markdown_table, measure, modernbert_like


TINY = M3BertConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
    mrl_dims=[8, 16],
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_both_models_have_one_shape():
    with torch.device("meta"):
        ours = M3BertForSentenceEmbedding(TINY)
        other = ModernBertModel(modernbert_like(TINY))
    positions = TINY.max_position_embeddings * TINY.hidden_size
    norms = 2 * TINY.num_hidden_layers * TINY.hidden_size
    assert abs(ours.num_parameters() - positions - other.num_parameters()) <= norms
    assert len(other.layers) == 3 and other.config.vocab_size == 64


def test_batches_are_of_the_lengths_that_are_claimed():
    for batch in _batches(TINY, 12, 5, "cpu"):
        lengths = batch["attention_mask"].sum(dim=1)
        assert batch["input_ids"].shape == (5, 12) and 6 <= lengths.min() and lengths.max() <= 12
        assert (batch["input_ids"][batch["attention_mask"] == 0] == TINY.pad_token_id).all()
        assert batch["input_ids"].max() < TINY.vocab_size


def test_padding_does_not_reach_the_mean():
    model = ModernBertModel(modernbert_like(TINY)).eval()
    ids = torch.randint(3, 64, (2, 6))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padding = torch.full((2, 4), TINY.pad_token_id)
    long = {
        "input_ids": torch.cat([ids, padding], dim=1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(padding)], dim=1),
    }
    torch.testing.assert_close(_mean_pooled(model, long), _mean_pooled(model, short))


def test_the_report_has_every_exit_at_every_length():
    report = measure(TINY, lengths=[4, 12], batch_size=2, blocks=MIN_BLOCKS, steps_per_block=1)
    assert [(item.length, item.layer) for item in report.comparisons] == [(n, e) for n in (4, 12) for e in (1, 2, 3)]
    for item in report.comparisons:
        assert item.ours_sentences_per_second == pytest.approx(2 / item.wall.ours_seconds)
        assert len(item.process.ratios) == len(item.wall.ratios) == MIN_BLOCKS
    assert (report.clock, report.dtype) == ("process", "float32")
    rows = [line for line in markdown_table(report).splitlines() if line.startswith(("| 4", "| 12"))]
    assert len(rows) == 6 and all(item.verdict in row for item, row in zip(report.comparisons, rows))


def test_the_command_writes_json(tmp_path, capsys):
    shape = ["--hidden-size", "16", "--num-layers", "3", "--num-heads", "2", "--intermediate-size", "24"]
    options = ["--vocab-size", "64", "--lengths", "8", "--batch-size", "2", "--steps-per-block", "1"]
    main(["encoder", *shape, *options, "--output", str(tmp_path)])
    (path,) = tmp_path.glob("encoder-*.json")
    written = json.loads(path.read_text())
    assert written["benchmark"] == "encoder" and len(written["comparisons"]) == 3
    assert str(path) in capsys.readouterr().out
