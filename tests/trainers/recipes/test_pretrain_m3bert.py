"""The three stages of m3BERT: presets, the paper's counts, the recipe in small, resumed, and on two processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainingArguments

from hf_models.m3bert import M3BertForMaskedLM, M3BertForSentenceEmbedding
from tests.trainers.recipes.tiny_encoder import add_tiny_shape, command_line, write_corpus
from trainers.recipes import pretrain_m3bert as recipe
from trainers.recipes.arguments import parse_arguments
from trainers.recipes.m3bert_data import EncoderDataArguments
from trainers.recipes.pretrain_m3bert import M3BertArguments, build_config, main, sentence_encoder
from trainers.report import read_results


ROOT = Path(__file__).parents[3]


def arguments_of(*argv):
    types = (M3BertArguments, EncoderDataArguments, TrainingArguments)
    return parse_arguments(types, recipe.PRESETS, list(argv), default_preset="demo")


@pytest.fixture
def home(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    add_tiny_shape(monkeypatch)
    write_corpus(tmp_path / "corpus")
    return tmp_path


# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", recipe.PRESETS)
def test_presets_are_options_of_the_recipe(preset):
    # bf16 is asked of a GPU, which is not here
    name, (args, data_args, training_args) = arguments_of("--preset", preset, "--bf16", "false")
    assert name == preset
    recipe._require_stages(args)
    assert 0 < data_args.test_fraction < data_args.held_out_fraction < 0.5
    assert build_config(args, None).mrl_layers and training_args.warmup_steps == 0.1


def test_the_paper_preset_has_the_released_shape():
    _, (args, data_args, _) = arguments_of("--preset", "paper", "--bf16", "false")
    config = build_config(args, None)
    with torch.device("meta"):
        model = M3BertForMaskedLM(config)
    assert (config.mrl_layers, config.mrl_dims) == ([4, 8, 12], [32, 64, 128, 768])
    assert (config.vocab_size, config.exit_norm, data_args.tokenizer_name) == (
        250_002,
        "none",
        "FacebookAI/xlm-roberta-base",
    )
    layer, table = 9_438_720, 250_002 * 768
    encoder = table + 512 * 768 + 12 * layer + 2 * 768
    head = 768 * 768 + 768 + 768 + table + 250_002
    assert model.model.num_parameters() == encoder and model.num_parameters() == encoder + head
    assert round(encoder / 1e6, 1) == 305.7 and round(model.num_parameters() / 1e6, 1) == 498.5


def test_plain_is_the_last_cell_from_the_same_weights():
    grid, plain = (build_config(M3BertArguments(objective=name), None) for name in ("grid", "plain"))
    assert (plain.mrl_layers, plain.mrl_dims) == ([6], [128])
    assert (grid.mrl_layers, grid.mrl_dims) == ([1, 2, 3, 4, 5, 6], [16, 32, 64, 128])
    weights = []
    for config in (grid, plain):
        torch.manual_seed(0)
        weights.append(M3BertForMaskedLM(config.__class__(**config.to_dict() | {"vocab_size": 64})).state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_plain_body_becomes_an_encoder_with_a_grid():
    config = build_config(M3BertArguments(objective="plain"), None)
    model = M3BertForMaskedLM(config.__class__(**config.to_dict() | {"vocab_size": 64})).eval()
    encoder = sentence_encoder(model, mrl_layers=[2, 6], mrl_dims=[16, 128]).eval()
    ids = torch.arange(5, 15)[None]
    exits = encoder(ids, output_exit_embeddings=True).exit_embeddings
    torch.testing.assert_close(exits[1][0], model.model(ids).last_hidden_state[0].mean(dim=0))
    assert len(exits) == 2


@pytest.mark.parametrize(
    "options",
    [["--stages", "contrastive", "monolingual"], ["--stage_steps", "1"], ["--stages", "pretraining"]],
)
def test_stages_that_do_not_fit_are_refused_before_anything_is_read(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="stage"):
        main(options)
    assert list(tmp_path.iterdir()) == []


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_three_stages_give_a_sentence_encoder(home):
    main(command_line())
    results = read_results("run")
    assert (results.method, results.preset) == ("m3bert", "demo")
    cells = {f"recall_at_10_layer_{layer}_dim_{dim}" for layer in (1, 2) for dim in (8, 16)}
    assert set(results.metrics) == cells | {"held_out_monolingual", "held_out_multilingual"}
    assert [stage["steps"] for stage in results.evidence["stages"].values()] == [4, 4, 4]
    model = M3BertForSentenceEmbedding.from_pretrained("run")
    last = load_file("run/stages/contrastive/model.safetensors")
    assert all(torch.equal(tensor, last[name]) for name, tensor in model.state_dict().items())
    before = load_file("run/stages/multilingual/model.safetensors")
    assert not torch.equal(before["model.embed_tokens.weight"], last["model.embed_tokens.weight"])
    assert len(AutoTokenizer.from_pretrained("run")) == model.config.vocab_size
    assert Path("run/figures/pareto.png").read_bytes().startswith(b"\x89PNG")
    written = {path: path.stat().st_mtime_ns for path in Path("run").rglob("fit.json")}
    main(command_line())
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("fit.json")} == written
    assert read_results("run").metrics == results.metrics


def test_a_stage_that_was_interrupted_goes_on_bitwise(home):
    main(command_line(save_total_limit=9))
    for stage in ("monolingual", "contrastive"):
        folder, again = Path("run/stages", stage), Path("again/stages", stage)
        again.mkdir(parents=True)
        shutil.copytree(folder / "checkpoint-2", again / "checkpoint-2") if (
            folder / "checkpoint-2"
        ).exists() else None
        signature = json.loads((folder / "fit.json").read_text())["signature"]
        (again / "fit.json").write_text(json.dumps({"signature": signature}))
    main(command_line(output_dir="again"))
    for stage in ("monolingual", "multilingual", "contrastive"):
        ours, theirs = (load_file(f"{run}/stages/{stage}/model.safetensors") for run in ("run", "again"))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), stage


def test_a_text_stage_alone_gives_a_masked_language_model(home):
    options = {"stages": "monolingual", "stage_steps": 2, "stage_batch_sizes": 4, "stage_learning_rates": 1e-3}
    main(command_line(**options, objective="plain"))
    model = M3BertForMaskedLM.from_pretrained("run")
    assert model.config.mrl_layers == [2] and list(read_results("run").metrics) == ["held_out_monolingual"]
    with pytest.raises(ValueError, match="other options"):
        main(command_line(**options, objective="grid"))


DRIVER = f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.trainers.recipes.tiny_encoder import TINY
from trainers.recipes import pretrain_m3bert
pretrain_m3bert.SHAPES["tiny"] = TINY
pretrain_m3bert.main(sys.argv[1:])
from accelerate import PartialState
assert PartialState().num_processes == 2
"""


@pytest.mark.slow
def test_two_processes_are_one_where_negatives_come_from_both(home):
    """The contrastive stage: two ranks of eight pairs against one of sixteen. Masks are of each rank's batch."""
    (home / "driver.py").write_text(DRIVER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    options = {"stages": ["monolingual", "contrastive"], "stage_steps": [2, 4], "stage_learning_rates": [0.0, 1e-3]}
    two = command_line(**options, output_dir="two", stage_batch_sizes=[4, 8])
    ran = subprocess.run([*launcher, "driver.py", *two], cwd=home, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-5000:]
    main(command_line(**options, output_dir="one", stage_batch_sizes=[8, 16]))
    fits = [json.loads(Path(run, "stages/contrastive/fit.json").read_text())["fit"] for run in ("two", "one")]
    assert fits[0]["examples"] == fits[1]["examples"] == 4 * 16
    losses = [[row["loss"] for row in fit["history"] if "loss" in row] for fit in fits]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[1][-1] != losses[1][0]
    ours, theirs = (load_file(f"{run}/model.safetensors") for run in ("two", "one"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-3)
