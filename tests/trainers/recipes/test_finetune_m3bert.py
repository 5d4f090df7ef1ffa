"""Fine-tuning on pairs: any encoder, at all cells or at one, with our loss or with the peer's; resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, TrainingArguments

from hf_models.m3bert import M3BertConfig, M3BertForMaskedLM, M3BertForSentenceEmbedding
from tests.trainers.recipes.tiny_encoder import TINY, command_line, write_corpus
from trainers.data import train_encoder_tokenizer
from trainers.recipes import finetune_m3bert as recipe
from trainers.recipes.arguments import parse_arguments
from trainers.recipes.finetune_m3bert import FinetuneArguments, main
from trainers.recipes.m3bert_data import EncoderDataArguments
from trainers.report import read_results


NOT_THESE = ("shape", "dataset_name", "multilingual_datasets", "stage_steps", "stage_batch_sizes")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of a corpus, a masked m3BERT and a BERT, with one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    write_corpus(folder / "corpus")
    texts = (folder / "corpus" / "en.jsonl").read_text().splitlines()
    tokenizer = train_encoder_tokenizer(texts, vocab_size=300, show_progress=False)
    torch.manual_seed(0)
    config = M3BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **TINY)
    M3BertForMaskedLM(config).save_pretrained(folder / "m3bert")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "bert")
    for name in ("m3bert", "bert"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def home(models, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "m3bert", "bert"):
        (tmp_path / name).symlink_to(models / name)
    return tmp_path


def argv(**options) -> list[str]:
    defaults = {"model_name": "m3bert", "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 5e-3}
    return command_line(*NOT_THESE, **defaults | options)


@pytest.mark.parametrize("preset", recipe.PRESETS)
def test_presets_are_options_of_the_recipe(preset):
    types = (FinetuneArguments, EncoderDataArguments, TrainingArguments)
    options = ["--preset", preset, "--model_name", "m3bert", "--bf16", "false"]
    _, (args, data_args, training_args) = parse_arguments(types, recipe.PRESETS, options, default_preset="demo")
    assert args.temperature == 0.05 and training_args.warmup_steps == 0.1
    if preset == "paper":
        assert (data_args.query_length, data_args.document_length) == (16, 64)
        assert (training_args.per_device_train_batch_size, training_args.learning_rate) == (1024, 5e-4)
        assert (training_args.num_train_epochs, training_args.max_grad_norm) == (5, 0.5)


def test_every_cell_before_and_after_and_an_interrupted_run_goes_on_bitwise(home):
    main(argv(save_total_limit=9))
    results = read_results("run")
    assert (results.method, results.evidence["objective"]) == ("m3bert", "grid")
    assert len(results.metrics) == 4
    assert all(list(metric.baseline) == ["before fine-tuning"] for metric in results.metrics.values())
    rows = results.evidence["cells"]
    assert [row["recall@10"] for row in rows["after"]] == [metric.value for metric in results.metrics.values()]
    model = M3BertForSentenceEmbedding.from_pretrained("run")
    assert model.config.mrl_layers == [1, 2]
    start = load_file("m3bert/model.safetensors")
    assert not torch.equal(model.state_dict()["model.embed_tokens.weight"], start["model.embed_tokens.weight"])

    again = home / "again" / "training"
    again.mkdir(parents=True)
    shutil.copytree(home / "run" / "training" / "checkpoint-4", again / "checkpoint-4")
    signature = json.loads((home / "run" / "training" / "fit.json").read_text())["signature"]
    (again / "fit.json").write_text(json.dumps({"signature": signature}))
    main(argv(output_dir="again"))
    resumed = load_file("again/model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in load_file("run/model.safetensors").items())
    with pytest.raises(ValueError, match="other options"):
        main(argv(temperature=0.1))


def test_one_cell_is_cut_first_and_stays_so(home):
    main(argv(objective="cell", layer=1, dim=8))
    model = M3BertForSentenceEmbedding.from_pretrained("run")
    assert (model.config.num_hidden_layers, model.config.width) == (1, 8)
    assert list(read_results("run").metrics) == ["recall_at_10_layer_1_dim_8"]


def test_any_encoder_is_trained_at_its_end(home):
    main(argv(model_name="bert"))
    assert isinstance(BertModel.from_pretrained("run"), BertModel)
    assert list(read_results("run").metrics) == ["recall_at_10_layer_2_dim_16"]
    with pytest.raises(ValueError, match="bert is no m3BERT and cannot be cut"):
        main(argv(model_name="bert", objective="cell", layer=1, output_dir="other"))


def test_optimizer_and_reliability_are_those_of_every_recipe(home):
    main(argv(optimizer="msign", msign_period=2, reliability="on", max_steps=4))
    assert (home / "run" / "training" / "events.jsonl").exists() or any(home.glob("run/training/goodput*"))


@pytest.mark.slow
def test_the_peers_loss_trains_the_same_exits(home):
    pytest.importorskip("sentence_transformers")
    main(argv(objective="matryoshka_2d", save_strategy="no"))
    results = read_results("run")
    assert results.evidence["objective"] == "matryoshka_2d" and len(results.metrics) == 4
    assert results.evidence["train_seconds"] > 0
    trained, start = load_file("run/model.safetensors"), load_file("m3bert/model.safetensors")
    moved = {name for name, tensor in trained.items() if not torch.equal(tensor, start[name])}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= moved
    written = Path("run/training/fit.json").stat().st_mtime_ns
    main(argv(objective="matryoshka_2d", save_strategy="no"))
    assert Path("run/training/fit.json").stat().st_mtime_ns == written
