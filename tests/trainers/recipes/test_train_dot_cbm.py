"""The recipe of DOT-CBM: presets, the counts of the paper, from pictures to a loaded model, on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, Dinov2Config

from hf_models.dot_cbm import DotCbmForImageClassification
from tests.trainers.recipes.tiny_bottleneck import command_line, times_of_runs, tiny_concepts
from trainers.recipes import train_dot_cbm as recipe
from trainers.recipes.arguments import RecipeTrainingArguments, parse_arguments
from trainers.recipes.dot_cbm_backbone import BackboneArguments
from trainers.recipes.dot_cbm_data import ConceptDataArguments
from trainers.recipes.dot_cbm_fit import BottleneckArguments, bottleneck_config
from trainers.recipes.train_dot_cbm import ReportArguments, main
from trainers.report import read_results


ROOT = Path(__file__).parents[3]
TYPES = (ConceptDataArguments, BackboneArguments, BottleneckArguments, ReportArguments, RecipeTrainingArguments)


def arguments_of(*argv):
    return parse_arguments(TYPES, recipe.PRESETS, list(argv), default_preset="demo")


@pytest.fixture
def home(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- presets ---------------------------------------------------------------------------------------------------------


def test_the_demo_is_small_and_compared():
    name, (data_args, backbone_args, args, report_args, training_args) = arguments_of()
    assert (name, data_args.dataset_name, backbone_args.backbone) == ("demo", "avatar_parts", None)
    assert args.projection_dim == 64 and args.saliency == "best" and report_args.explanations == 10
    assert report_args.baselines == ["dot", "vanilla", "linear_probe"] and training_args.save_strategy == "epoch"
    assert (args.lambda_vop, args.lambda_top, args.lambda_concept) == (0.15, 0.2, 0.8)


def test_the_paper_preset_has_the_papers_hyper_parameters():
    _, (data_args, backbone_args, args, _, training_args) = arguments_of("--preset", "paper", "--bf16", "false")
    assert (data_args.dataset_name, backbone_args.backbone) == ("cub", "facebook/dinov2-large")
    assert (backbone_args.backbone_image_size, training_args.per_device_train_batch_size) == (252, 128)
    assert (training_args.learning_rate, training_args.weight_decay, args.concept_epochs) == (1e-4, 1e-5, 200)
    assert (args.halve_every, args.adapter_layers, args.adapter_dropout) == (10, 3, 0.4)
    assert (args.concept_prior, args.saliency, data_args.num_validation) == ("paper", "cls_dot", 0)
    assert (args.lambda_vop, args.lambda_top, args.lambda_concept) == (0.15, 0.2, 0.8)


def test_the_papers_model_on_the_meta_device():
    _, (_, backbone_args, args, _, _) = arguments_of("--preset", "paper", "--bf16", "false")
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518}
    data = tiny_concepts()
    config = bottleneck_config(
        args,
        Dinov2Config(patch_size=14, **large),
        data,
        768,
        image_size=backbone_args.backbone_image_size,
    )
    with torch.device("meta"):
        model = DotCbmForImageClassification(config)
    visual = (1024 * 768 + 768) + 2 * (768 * 768 + 768)
    text = 3 * (768 * 768 + 768)
    body = model.model
    assert body.visual_adapter.layers[0].in_features == 1024 and config.projection_dim == 768
    assert sum(p.numel() for p in body.visual_adapter.parameters()) == visual == 1_968_384
    assert sum(p.numel() for p in body.text_adapter.parameters()) == text == 1_771_776
    assert round(body.backbone.num_parameters() / 1e6, 1) == 304.4
    own = model.num_parameters() - body.backbone.num_parameters()
    assert own == visual + text + 3 + 1 + (3 * 2 + 2), "biases, scale, classifier of 3 concepts and 2 classes"
    assert config.input_size == (252, 252) and config.patch_size == (14, 14)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("model.backbone") or name.startswith("classifier") for name in trained)


def test_cub_without_a_backbone_is_refused(home, monkeypatch):
    from trainers.recipes import dot_cbm_preparation

    monkeypatch.setattr(dot_cbm_preparation, "read_splits", lambda *_: None)
    with pytest.raises(ValueError, match="needs a --backbone, such as facebook/dinov2-large"):
        main(["--dataset_name", "cub", "--output_dir", "run", "--dataset_dir", "nowhere"])


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_from_pictures_to_a_model_that_auto_classes_load(home):
    argv = command_line(class_epochs=2, baselines=["vanilla"], seed=4)
    main(argv)
    results = read_results("run")
    assert (results.method, results.preset, results.seeds) == ("dot_cbm", "demo", [4])
    expected = {"accuracy_id", "accuracy_ood30", "accuracy_ood0", "concept_auc_id", "pointing_id", "energy_in_mask_id"}
    assert expected | {"miou_id", "part_ap_id", "leakage_shuffled", "accuracy_at_nec_5"} <= set(results.metrics)
    assert list(results.metrics["accuracy_id"].baseline) == ["vanilla CBM"]
    assert results.evidence["reloaded_logits_differ_by_at_most"] < 1e-4
    assert results.evidence["concept_encoder"] == "random orthonormal directions, no text encoder"
    assert 0 <= results.evidence["locality"]["part_probe"] <= 1
    assert set(results.evidence["saliency_foreground_auc"]) >= {"cls_dot", "cls_attention", "contrast"}
    assert [run["examples"] for run in results.evidence["stages"].values()] == [240, 240]
    for figure in results.figures:
        assert Path("run", figure.path).read_bytes().startswith(b"\x89PNG")
    assert len(results.figures) == 3 and "wrong; it is" in results.figures[-1].caption
    model, processor = (auto.from_pretrained("run") for auto in (AutoModelForImageClassification, AutoImageProcessor))
    picture = Image.new("RGB", (50, 40), "red")
    records = model.explain(processor(picture, return_tensors="pt")["pixel_values"], image_size=(40, 50))[0]
    assert len(records) == 5 and records[0].heatmap.shape == (40, 50)
    assert AutoConfig.from_pretrained("run").concept_groups["hat"]
    last = DotCbmForImageClassification.from_pretrained("run/stages/class").state_dict()
    assert all(torch.equal(tensor, last[name]) for name, tensor in model.state_dict().items())

    written = times_of_runs(home / "run")
    assert len(written) == 5
    main(argv)
    assert times_of_runs(home / "run") == written and read_results("run").metrics == results.metrics
    assert str(home) not in json.dumps(results.evidence) + results.command


def test_a_given_backbone_is_used_and_options_come_from_a_file(home):
    from tests.trainers.recipes.tiny_bottleneck import tiny_backbone

    tiny_backbone().save_pretrained("backbone")
    Path("options.yaml").write_text("readout: mean\nsaliency: uniform\nbaselines: []\n")
    without = ("backbone_hidden_size", "backbone_layers", "image_size")
    given = {"backbone": "backbone", "image_size": 16, "concept_epochs": 1}
    main(["--config", "options.yaml", *command_line(*without, **given, class_epochs=1, explanations=0)])
    model = AutoModelForImageClassification.from_pretrained("run")
    assert (model.config.readout, model.config.backbone_config.hidden_size) == ("mean", 8)
    assert not Path("run/backbone").exists()
    with pytest.raises(ValueError, match="tokens are not local"):
        main(["--config", "options.yaml", *command_line(*without, **given | {"min_part_probe": 0.99})])


DRIVER = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from trainers.recipes import train_dot_cbm
train_dot_cbm.main(sys.argv[1:])
from accelerate import PartialState
assert PartialState().num_processes == 2
"""


@pytest.mark.slow
def test_two_processes_train_what_one_trains(home):
    """Without dropout; the backbone is one and the same, or its windows would differ. The second rank has no images to
    take statistics of: 120 are one batch."""
    (home / "driver.py").write_text(DRIVER)
    shared = {"adapter_dropout": 0, "class_epochs": 1, "baselines": [], "optim": "sgd", "explanations": 2}
    one = command_line(**shared, output_dir="one", per_device_train_batch_size=20)
    main(one)
    options = shared | {"backbone": "one/backbone", "per_device_train_batch_size": 10}
    two = command_line(**options, output_dir="two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ran = subprocess.run([*launcher, "driver.py", *two], cwd=home, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-5000:]
    results = [read_results(run) for run in ("one", "two")]
    assert [run["examples"] for run in results[1].evidence["stages"].values()] == [240, 120]
    stages = [json.loads(Path(run, "stages/concept/fit.json").read_text())["fit"] for run in ("one", "two")]
    losses = [[row["loss"] for row in stage["history"] if "loss" in row] for stage in stages]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    ours, theirs = (load_file(f"{run}/model.safetensors") for run in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=2e-3)
