"""The recipe that compares classes of collaboration: a shrunken run, its resumption, and what it refuses."""

import dataclasses
import json

import pytest
import torch

from hf_models.dc_ccl import DcCclForImageClassification
from trainers.device_cloud import DeviceBudget, DeviceBudgetError
from trainers.device_cloud.collaboration_distillation import UNLABELLED
from trainers.device_cloud.collaboration_entries import CLASSES
from trainers.device_cloud.collaboration_figure import plot_collaboration
from trainers.device_cloud.collaboration_split import SplitClassifier
from trainers.device_cloud.dc_ccl_data import ImageRows
from trainers.device_cloud.dc_ccl_plan import DcCclPlan, Fit
from trainers.federated.core import RoundStore
from trainers.recipes import collaboration_text as text
from trainers.recipes import compare_collaboration as recipe
from trainers.recipes.arguments import RecipeTrainingArguments, parse_arguments
from trainers.recipes.dc_ccl_tasks import TASKS, Images, divide
from trainers.report import read_results


def quadrants() -> Images:
    """Images of 8 x 8 whose brightness, by quarters, is the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 10
    pixels = 0.3 * torch.randn(200, 1, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        row, column = divmod(label % 4, 2)
        pixels[index, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0 + label // 4
    return Images(pixels, labels, num_test=40, name="quadrants", license="CC0-1.0")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "demo", recipe.PRESETS["demo"] | {"writing_steps": 0})
    side = Fit(learning_rate=1e-2, max_steps=2, batch_size=32)

    def plan(rate):
        one = dataclasses.replace(side, learning_rate=rate)
        return DcCclPlan(cloud=side, control=side, co_cloud=one, co_device=one, head=None, rounds=1)

    task = dataclasses.replace(TASKS["digits"], read=quadrants, plan=plan, public=8, tuned=4)
    monkeypatch.setitem(TASKS, "digits", task)


def test_a_run_of_all_classes_and_a_repetition_that_trains_nothing(tiny, tmp_path, monkeypatch, capsys):
    methods = ["dc_ccl", "public_distillation", "split_inference", "cloud_only"]
    options = ["--preset", "demo", "--output_dir", str(tmp_path), "--exchanges", "1", "--methods", *methods]
    recipe.main(options)
    results = read_results(tmp_path)
    table = capsys.readouterr().out
    assert all(name.replace("_", " ") in table for name in methods)
    assert set(results.evidence["classes"].values()) == {*CLASSES, "none"}
    served = results.metrics["served_accuracy"]
    assert set(served.baseline) == set(methods[1:]) and 0 <= served.value <= 1
    assert set(results.metrics["device_accuracy"].baseline) == {"public_distillation", "cloud_only"}
    up = results.metrics["request_bytes_up"]
    assert up.baseline["cloud_only"].value == up.value != up.baseline["split_inference"].value
    assert served.baseline["split_inference"].value == served.baseline["cloud_only"].value, "nothing was learned"
    assert (tmp_path / results.figures[0].path).read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr("trainers.device_cloud.dc_ccl_arms.Setting.fit", None)
    monkeypatch.setattr("trainers.device_cloud.collaboration_distillation.run_trainer", None)
    recipe.main(options)
    again = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert again["served_accuracy"]["values"] == served.values
    with pytest.raises(ValueError, match=r"public_distillation holds a run of other settings \(method\)"):
        recipe.main([*options, "--exchanges", "2"])
    with pytest.raises(ValueError, match=r"cloud.json is of other settings \(training.weight_decay"):
        recipe.main([*options, "--weight_decay", "0.5"])
    with pytest.raises(DeviceBudgetError, match="dc_ccl does not fit the device"):
        recipe.main([*options, "--max_device_parameters", "10"])


def task_in(root):
    """A method and its task as the recipe has it."""
    types = (recipe.CollaborationArguments, RecipeTrainingArguments)
    argv = ["--preset", "demo", "--output_dir", str(root)]
    _, (args, training_args) = parse_arguments(types, recipe.PRESETS, argv, default_preset="demo")
    folder = root / "runs" / "digits" / "seed0"
    task = recipe.task_of(TASKS["digits"].read(), args, training_args, 0, folder)
    return recipe.methods_of(args)["cloud_only"], recipe.planned(task, task.plan, folder / "cloud_only")


def test_every_method_that_learns_searches_the_same_rates_on_images_of_their_own(tiny, tmp_path):
    rates = ["--round_learning_rates", "0.0001", "0.05", "--methods", "device_only", "cloud_only"]
    recipe.main(["--preset", "demo", "--output_dir", str(tmp_path), *rates])
    folder, record = tmp_path / "runs" / "digits" / "seed0", read_results(tmp_path).evidence
    searched = sorted(path.relative_to(folder / "rates").as_posix() for path in (folder / "rates").glob("*/*"))
    assert searched == ["device_only/rate0.0001", "device_only/rate0.05"]
    scores = {}
    for rate in (0.0001, 0.05):
        _, found = RoundStore(folder / "rates" / "device_only" / f"rate{rate:g}" / "outcome").load(0)
        scores[rate] = found["outcome"]["served_accuracy"]
    assert record["learning_rate_chosen"] == {"device_only": max(scores, key=scores.get), "cloud_only": 0.0001}
    data = divide(TASKS["digits"].read(), TASKS["digits"], 0)
    ours, public = recipe.held_out_in_two(data)
    assert len(ours.validation) + len(public) == len(data.validation) and (public.labels == UNLABELLED).all()
    both = torch.cat([ours.validation.pixel_values, public.pixel_values])
    assert torch.equal(both, data.validation.pixel_values)


def test_another_run_in_the_same_folder_is_refused(tiny, tmp_path):
    method, task = task_in(tmp_path)
    first = recipe.run_method(method, task, DeviceBudget())
    test = task.data.test
    blank = dataclasses.replace(task.data, test=ImageRows(test.pixel_values * 0, test.labels))
    with pytest.raises(ValueError, match=r"other settings \(data: "):
        recipe.run_method(method, dataclasses.replace(task, data=blank), DeviceBudget())
    with pytest.raises(ValueError, match=r"other settings \(budget.max_bytes"):
        recipe.run_method(method, task, DeviceBudget(max_bytes=10**9))
    with pytest.raises(DeviceBudgetError, match="cloud_only does not fit the device"):
        recipe.run_method(method, task, DeviceBudget(max_parameters=10))
    other = dataclasses.replace(task, args=dataclasses.replace(task.args, weight_decay=0.5))
    with pytest.raises(ValueError, match=r"other settings \(training.weight_decay: 0.0, now 0.5"):
        recipe.run_method(method, other, DeviceBudget())
    assert recipe.run_method(method, task, DeviceBudget()) == first


def test_presets_name_every_class_and_the_evidence_has_three_seeds():
    types = (recipe.CollaborationArguments, RecipeTrainingArguments)
    for name, seeds in (("demo", 1), ("evidence", 3)):
        _, (args, _) = parse_arguments(types, recipe.PRESETS, ["--preset", name], default_preset="demo")
        methods = recipe.methods_of(args)
        assert len(args.seeds) == seeds and list(methods) == list(recipe.METHODS)
        assert all(method.name == key for key, method in methods.items())
        assert {method.kind for method in methods.values()} == {*CLASSES, None}


def test_what_is_not_known_or_does_not_fit_is_refused(tiny, tmp_path):
    options = ["--preset", "demo", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="method fedprox is not known. Choose of dc_ccl"):
        recipe.main([*options, "--methods", "fedprox"])
    with pytest.raises(ValueError, match="task 'mnist' is not known"):
        recipe.main([*options, "--task", "mnist"])
    with pytest.raises(DeviceBudgetError):
        recipe.main([*options, "--methods", "dc_ccl", "--max_device_parameters", "10"])
    assert not (tmp_path / "results.json").exists()


def test_the_figure_is_the_same_bytes_each_time(tmp_path):
    outcome = {"served_accuracy": 0.5, "bytes_up": 10, "bytes_down": 1e6, "request_bytes_up": 9}
    outcome |= {"request_bytes_down": 4}
    outcomes, kinds = {"a": [outcome] * 2, "b": [outcome]}, {"a": "data", "b": "feature"}
    first = plot_collaboration(outcomes, kinds, tmp_path / "x.png", title="t").read_bytes()
    assert first == plot_collaboration(outcomes, kinds, tmp_path / "y.png", title="t").read_bytes()
    with pytest.raises(ValueError, match="needs a method, and every method a seed"):
        plot_collaboration({"a": []}, kinds, tmp_path / "z.png")


@pytest.mark.parametrize("name", recipe.CUTS)
def test_the_cuts_of_all_tasks_can_be_made(name):
    config = TASKS[name].config()
    model = DcCclForImageClassification(config)
    size = config.base_config.image_size if name == "fashion_mnist" else 8
    split = SplitClassifier(model, recipe.CUTS[name], torch.zeros(1, 1, size, size), branch="cloud")
    assert sum(p.numel() for p in split.device_half().parameters()) < model.num_parameters() / 2


# Text


def test_ways_of_writing_are_in_the_same_report(tiny, tmp_path, monkeypatch, capsys):
    blocks = text.read_blocks(40_000)
    monkeypatch.setattr(text, "read_blocks", lambda: blocks)
    monkeypatch.setattr(text, "REQUESTS", 3)
    options = ["--preset", "demo", "--output_dir", str(tmp_path), "--methods", "cloud_only", "--writing_steps", "3"]
    recipe.main(options)
    results, table = read_results(tmp_path), capsys.readouterr().out
    assert "| feature | assisted generation fewer experts |" in table and "| none | cloud only |" in table
    served, calls = (results.metrics[f"text_{name}"] for name in ("served_accuracy", "cloud_calls_per_request"))
    assert served.value == served.baseline["cloud_generation"].value, "assisted generation writes what the cloud would"
    assert calls.baseline["cloud_generation"].value == 24 >= calls.value > 0
    assert calls.baseline["device_generation_fewer_layers"].value == 0
    parameters = results.metrics["text_device_parameters"]
    assert parameters.baseline["assisted_generation_fewer_layers"].value < parameters.value
    assert results.evidence["text"]["classes"]["assisted_generation_fewer_layers"] == "feature"
    monkeypatch.setattr(text, "build_trainer", None)
    recipe.main(options)
    assert read_results(tmp_path).metrics == results.metrics
    with pytest.raises(ValueError, match=r"writer.json is of other settings \(training.max_steps: 3, now 4\)"):
        recipe.main([*options[:-1], "4"])
