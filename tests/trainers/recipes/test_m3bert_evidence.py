"""The evidence on m3BERT: which runs its arms are, what is equal between them, and what its metrics say."""

import json

import pytest
import torch
from transformers import TrainingArguments

from hf_models.m3bert import M3BertForSentenceEmbedding
from tests.trainers.recipes.tiny_encoder import add_tiny_shape, command_line, times_of_fits, write_corpus
from trainers.evaluation.retrieval import RetrievalCell
from trainers.recipes import m3bert_evidence as recipe
from trainers.recipes.arguments import parse_arguments
from trainers.recipes.comparison import ComparisonArguments
from trainers.recipes.m3bert_data import EncoderDataArguments
from trainers.recipes.m3bert_evidence import ARMS, EvidenceArguments, arm_of, evidence_metrics, main
from trainers.report import read_results


def cell(layer: int, dim: int, recall: float) -> RetrievalCell:
    measures = {10: recall}
    return RetrievalCell(layer, dim, measures, measures, measures, ms_per_query=1.0, index_bytes=4 * dim)


def test_the_evidence_has_every_arm_three_seeds_and_one_grid():
    types = (ComparisonArguments, EvidenceArguments, EncoderDataArguments, TrainingArguments)
    options = ["--preset", "evidence"]
    _, (comparison, args, data_args, training_args) = parse_arguments(
        types, recipe.PRESETS, options, default_preset="evidence"
    )
    assert comparison.arms == list(ARMS) and len(comparison.seeds) >= 3
    assert len(comparison.learning_rates) >= 2 and len(args.pretrain_learning_rates) >= 2
    shape = recipe.SHAPES[args.shape]
    assert (len(shape["mrl_layers"]), len(shape["mrl_dims"])) == (6, 4)
    assert 0 < data_args.test_fraction < data_args.held_out_fraction and training_args.save_strategy == "no"
    assert args.corners == ["1x16", "2x32"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grid", ("mlm_grid", "grid", None, None)),
        ("plain_st2d", ("mlm_plain", "matryoshka_2d", None, None)),
        ("plain_cell_2x32", ("mlm_plain", "cell", 2, 32)),
    ],
)
def test_arms_are_what_their_names_say(name, expected):
    assert arm_of(name) == expected


@pytest.mark.parametrize("name", ["dense", "grid_cell_", "grid_cell_1", "st2d_cell_1x16"])
def test_unknown_arms_are_named(name):
    with pytest.raises(ValueError, match=f"arm '{name}' is not known. Choose from grid, plain"):
        arm_of(name)


def test_metrics_by_hand():
    def seeds(small, large):
        return [[cell(1, 16, small + s / 100), cell(6, 128, large + s / 100)] for s in range(3)]

    cells = {
        "grid": seeds(0.5, 0.5),
        "plain": seeds(0.4, 0.8),
        "grid_cell_1x16": [[cell(1, 16, 0.6 + s / 100)] for s in range(3)],
        "plain_cell_1x16": [[cell(1, 16, 0.6 + s / 100)] for s in range(3)],
    }
    metrics = evidence_metrics(cells, EvidenceArguments(corners=["1x16"]))
    corner, everywhere = metrics["recall_at_10_small_corner"], metrics["recall_at_10_all_cells"]
    assert corner.value == pytest.approx(0.51) and corner.baseline["plain"].verdict == "holds"
    assert everywhere.value == pytest.approx(0.51) and everywhere.baseline["plain"].verdict == "fails"
    alone = metrics["recall_at_10_alone_layer_1_dim_16"]
    assert alone.value == pytest.approx(0.61) and alone.baseline["plain"].verdict == "null"
    assert metrics["recall_at_10_layer_6_dim_128"].baseline["plain"].verdict == "fails"
    assert set(corner.baseline) == {"plain"}, "arms of one cell have no grid"


@pytest.mark.slow
def test_every_arm_on_three_seeds_and_a_repetition_trains_nothing(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    add_tiny_shape(monkeypatch)
    write_corpus(tmp_path / "corpus")
    argv = command_line(
        *("dataset_name", "stage_steps", "stage_batch_sizes", "save_steps"),
        **{"pretrain_steps": 3, "pretrain_learning_rates": [1e-3, 2e-3], "pretrain_batch_size": 4, "workers": 0},
        **{"max_steps": 3, "learning_rates": [1e-3], "per_device_train_batch_size": 8, "corners": ["1x8"]},
        small_layers=1,
        small_dims=8,
    )
    main(argv)
    results = read_results("run")
    assert (results.method, results.preset, results.seeds) == ("m3bert", "evidence", [0, 1, 2])
    corner = results.metrics["recall_at_10_small_corner"]
    assert corner.n == 3 and list(corner.baseline) == list(ARMS)[1:]
    assert all(b.n == 3 and b.verdict in ("holds", "null", "fails") for b in corner.baseline.values())
    assert corner.values == results.metrics["recall_at_10_layer_1_dim_8"].values
    assert list(results.metrics["recall_at_10_alone_layer_1_dim_8"].baseline) == ["plain"]
    runs = results.evidence["pretraining"]
    ratio = json.loads((tmp_path / "run" / "relative_step_time.json").read_text())
    assert runs["mlm_plain_equal_seconds"]["steps"] == round(3 * ratio)
    assert runs["mlm_grid"]["parameters"] == runs["mlm_plain"]["parameters"]
    tuned = results.evidence["fine_tuning"]
    assert {run["examples"] for run in tuned.values()} == {24}
    assert M3BertForSentenceEmbedding.from_pretrained("run").config.mrl_layers == [1, 2]
    assert str(tmp_path) not in json.dumps(results.evidence) + results.command

    written = times_of_fits(tmp_path / "run")
    assert len(written) == (2 * 4 + 3) + 6 * 3
    main(argv)
    assert times_of_fits(tmp_path / "run") == written and read_results("run").metrics == results.metrics
