"""The recipe of FedLaAvg and block-cyclic SGD: who has what, what is compared, and shrunken runs."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from tests.trainers.recipes.tiny_federation_data import bright_quarters
from trainers.federated import FedAvg, FederatedTrainer
from trainers.recipes import federated_digits as recipe
from trainers.recipes.arguments import RecipeTrainingArguments, parse_arguments, training_arguments_of
from trainers.recipes.federated_arms import ARMS, Shared, require_arms, strategy_of
from trainers.recipes.federated_block_cyclic import BLOCK_ARMS, block_experiments
from trainers.recipes.federated_cells import Cell, Compared, Comparison, Experiment, held_from, run_rounds
from trainers.recipes.federated_digits_data import alternating, one_class_each, read_images, shards_by_block
from trainers.recipes.federated_latest import LATEST_ARMS, latest_experiments, latest_measures
from trainers.recipes.federated_pixel_mlp import PixelMlpConfig, PixelMlpForImageClassification
from trainers.recipes.federated_results import arms_metric, last, reached, rounds_metric
from trainers.report import read_results


TYPES = (recipe.FederatedDigitsArguments, RecipeTrainingArguments)
SMALL = ["--rounds", "8", "--local_steps", "2", "--absence", "2", "--evaluate_every", "2", "--clients", "10"]


@pytest.fixture
def quarters(monkeypatch):
    task = bright_quarters()
    monkeypatch.setattr(recipe, "read_images", lambda name: task)
    return task


def parsed(preset, folder, *options):
    _, (args, training_args) = parse_arguments(
        TYPES, recipe.PRESETS, ["--preset", preset, "--output_dir", str(folder), *options], default_preset="demo"
    )
    args.arms = args.arms or list(LATEST_ARMS if args.method == "fed_la_avg" else BLOCK_ARMS)
    return args, training_args


# Who has what


def test_every_client_has_one_class_and_shares_are_unequal_but_bounded():
    labels = torch.arange(1000) % 10
    owner = one_class_each(labels, 50, seed=1)
    sizes = np.bincount(owner, minlength=50)
    assert all(set(labels[owner == client].tolist()) == {client % 10} for client in range(50))
    assert len(set(sizes.tolist())) > 3 and sizes.max() / sizes.min() < 7 / 3 + 0.5
    assert np.array_equal(owner, one_class_each(labels, 50, seed=1))
    assert not np.array_equal(owner, one_class_each(labels, 50, seed=2))
    assert np.bincount(one_class_each(torch.arange(40) % 10, 40, seed=0)).tolist() == [1] * 40
    for clients, problem in ((15, "multiple of the 10"), (5, "multiple of the 10"), (200, "cannot be given to 20")):
        with pytest.raises(ValueError, match=problem):
            one_class_each(labels[:50], clients, seed=0)


def test_groups_come_in_turns_and_without_a_first_group_all_are_there():
    who = alternating(20, 2, 3)
    assert who.available(0) == who.available(2) == ["0", "1", "10", "11"] and who.available(0) == who.available(6)
    assert sorted(who.available(3) + who.available(0)) == sorted(str(client) for client in range(20))
    assert alternating(20, 0, 3) is None


def test_blocks_share_no_class_and_everybody_has_something_in_each():
    labels = torch.arange(600) % 10
    owner, block = shards_by_block(labels, 20, 5, concentration=0.1, seed=0)
    assert np.array_equal(block, labels.numpy() // 2)
    counts = np.zeros((20, 5), dtype=int)
    np.add.at(counts, (owner, block), 1)
    assert counts.min() >= 1 and counts.max() > 3 * counts.mean()
    for kind, problem in (({"blocks": 3}, "must divide"), ({"clients": 200, "blocks": 5}, "has 120 images for 200")):
        with pytest.raises(ValueError, match=problem):
            shards_by_block(labels, **({"clients": 20, "concentration": 1.0, "seed": 0} | kind))


def test_the_digits_are_split_without_overlap():
    pytest.importorskip("sklearn")
    task = read_images("digits")
    assert [len(part) for part in (task.train, task.validation, task.test)] == [1077, 180, 540]
    assert task.train.pixel_values.shape[1:] == (1, 8, 8) and float(task.train.pixel_values.max()) == 1
    assert task.num_labels == 10 and task.fingerprint == read_images("digits").fingerprint
    with pytest.raises(ValueError, match="mnist' is not known; choose from digits"):
        read_images("mnist")


# The model


def test_softmax_regression_is_linear_in_the_pixels_and_loads_with_the_auto_class(tmp_path):
    model = PixelMlpForImageClassification(PixelMlpConfig(image_size=4, num_labels=10))
    images, labels = torch.rand(6, 1, 4, 4), torch.arange(6)
    assert model(images, labels=labels).loss.item() == pytest.approx(np.log(10), abs=1e-6)
    torch.nn.init.normal_(model.classifier.weight)
    expected = images.flatten(1) @ model.classifier.weight.T + model.classifier.bias
    assert torch.allclose(model(images).logits, expected, atol=1e-6)
    assert [name for name, _ in model.named_parameters()] == ["classifier.weight", "classifier.bias"]
    hidden = PixelMlpForImageClassification(PixelMlpConfig(image_size=4, num_labels=10, hidden_sizes=[8]))
    hidden.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(images).logits, hidden(images).logits) and (tmp_path / "federated_pixel_mlp.py").exists()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForImageClassification"]


# Arms and cells


def test_arms_draw_the_same_clients_and_have_what_they_were_given():
    clients = [str(i) for i in range(30)]
    chosen = {}
    for arm in ("fed_avg", "fed_prox", "fed_adam", "fed_sgd", "mifa"):
        strategy = strategy_of(arm, Shared(0.1, 4, seed=3))
        strategy.start({"x": torch.zeros(1)}, clients, num_examples=dict.fromkeys(clients, 1))
        chosen[arm] = strategy.select(0, clients)
    assert len({tuple(found) for found in chosen.values()}) == 1
    assert strategy_of("fed_prox", Shared(0.1, 4, seed=0, proximal=0.5)).proximal == 0.5
    assert strategy_of("fed_la_avg", Shared(0.1, 4, seed=0)).weighting == "loss"
    assert strategy_of("fed_la_avg", Shared(0.1, 4, seed=0, weighting="clients")).weighting == "none"
    assert strategy_of("fed_sub_avg", Shared(0.1, 4, seed=0, weighting="clients")).max_correction is None
    with pytest.raises(ValueError, match="fedavg.*choose from fed_la_avg"):
        strategy_of("fedavg", Shared(0.1, 4, seed=0))
    with pytest.raises(ValueError, match="are not known"):
        require_arms([])
    assert set(LATEST_ARMS) < set(ARMS)


def comparison_of(tmp_path, run, *, grid=(0.1, 1.0), seeds=(0, 1), **options):
    return Comparison(
        root=tmp_path, seeds=seeds, grid=grid, run=run, score=lambda arm, o: o["score"][arm], data="hash", **options
    )


def experiment(name="one", arms=("a", "b"), rates_of=None, **changes):
    args, training_args = parsed("evidence", "unused", *(f"--{k}={v}" for k, v in changes.items()))
    return Experiment(name, latest_experiments(args, 5)[0].setting, arms, rates_of)


def test_rates_are_searched_on_the_first_seed_and_taken_over(tmp_path):
    ran = []

    def run(cell, folder):
        ran.append((cell.experiment.name, cell.run, cell.seed, cell.learning_rate))
        best = {"a": 0.1, "b": 1.0, "c": None}[cell.run]
        value = float("nan") if best is None and cell.learning_rate == 0.1 else float(cell.learning_rate == best)
        return {"score": {cell.run: value, "read off a": -cell.learning_rate}}

    comparison = comparison_of(tmp_path, run, run_of={"read off a": "a"})
    experiments = [experiment(arms=("a", "b", "c", "read off a")), experiment("two", ("b",), rates_of="one")]
    found = comparison.compare(experiments)
    # a diverged rate never wins, and a grid of two has nothing but edges
    assert found["one"].rates == {"a": 0.1, "b": 1.0, "c": 1.0, "read off a": 0.1}
    assert found["one"].validation["c"] == {"0.1": None, "1": 0.0}
    assert sorted(ran) == sorted(
        [("one", arm, 0, rate) for arm in "abc" for rate in (0.1, 1.0)]
        + [("one", "a", 1, 0.1), ("one", "b", 1, 1.0), ("one", "c", 1, 1.0)]
        + [("two", "b", 0, 1.0), ("two", "b", 1, 1.0)]
    )
    assert len(found["one"].outcomes["read off a"]) == 2
    record = comparison.record(experiments, found)
    assert "one a" in record["learning_rate_at_the_edge_of_the_grid"]
    assert record["experiments"]["two"] == {"learning_rates_of": "one"}
    ran.clear()
    comparison.compare(experiments)
    assert not ran


def test_cells_of_other_settings_or_data_are_refused(tmp_path):
    def run(cell, folder):
        return {"score": {"a": 1.0}}

    comparison_of(tmp_path, run).compare([experiment(arms=("a",))])
    with pytest.raises(ValueError, match="run with other rounds"):
        comparison_of(tmp_path, run).compare([experiment(arms=("a",), rounds=7)])
    other = comparison_of(tmp_path, run)
    object.__setattr__(other, "data", "changed")
    with pytest.raises(ValueError, match="run with other data.*Choose another --output_dir"):
        other.compare([experiment(arms=("a",))])
    with pytest.raises(ValueError, match="diverged at every rate"):
        comparison_of(tmp_path / "new", lambda cell, folder: {"score": {"a": float("nan")}}).compare(
            [experiment(arms=("a",))]
        )


def test_a_run_that_was_killed_goes_on_and_comes_to_the_same(tmp_path, quarters):
    args, base = parsed("demo", tmp_path, *SMALL, "--save_strategy", "steps")
    cell = Cell(latest_experiments(args, 5)[0], "fed_la_avg", 0, 0.1)

    def run(folder, kill_at=None):
        own = training_arguments_of(base, output_dir=str(folder), learning_rate=0.1, seed=0)
        trainer = recipe.federation(cell, quarters, own)
        measure = latest_measures(trainer, quarters, cell.experiment.setting)

        def or_die(done):
            if done == kill_at:
                raise KeyboardInterrupt
            return measure(done)

        return run_rounds(trainer, or_die, every=2)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", kill_at=6)
    assert run(tmp_path / "killed") == whole
    assert [entry["round"] for entry in whole["history"]] == [2, 4, 6, 8] and whole["client_updates"] == 8


# Numbers


def history(*values):
    return [{"round": 2 * index + 2, "test": value} for index, value in enumerate(values)]


def test_rounds_to_a_target_are_those_after_which_it_is_held():
    assert held_from(history(0.5, 0.9, 0.8, 0.91, 0.95), "test", 0.9) == 8
    assert held_from(history(0.5, 0.9, 0.8), "test", 0.9) is None and held_from([], "test", 0.9) is None
    assert reached(history(0.5, 0.9, 0.8), "test", 0.9) == 4 and reached(history(0.5), "test", 0.9) is None
    outcomes = {
        "ours": [{"history": history(0.5, 0.9), "diverged": False}] * 3,
        "other": [{"history": history(0.5, 0.6), "diverged": False}] * 2 + [{"history": [], "diverged": True}],
    }
    metric = rounds_metric(Compared(outcomes=outcomes), lambda arm: "test", 0.9, 4)
    assert metric.values == [4, 4, 4] and metric.baseline["other"].values == [5, 5, 5]
    assert metric.baseline["other"].verdict == "holds" and "other 3 of 3" in metric.note


def test_the_end_of_a_run_is_its_last_quarter_and_diverged_arms_are_named():
    run = {"history": history(*np.arange(8) / 10), "diverged": False}
    assert last(run, "test").tolist() == [0.6, 0.7]
    compared = Compared(outcomes={"ours": [run], "lost": [run | {"diverged": True}]})
    metric = arms_metric(compared, lambda arm, o: last(o, "test").mean(), higher_is_better=True)
    assert metric.value == pytest.approx(0.65) and not metric.baseline and "diverged: lost" in metric.note
    other = Compared(outcomes={"lost": [run | {"diverged": True}], "ours": [run]})
    assert arms_metric(other, lambda arm, o: last(o, "test").mean(), higher_is_better=True) is None


# Runs


def test_a_shrunken_demo_of_fed_la_avg_and_its_repetition(tmp_path, quarters, monkeypatch):
    command = ["--preset", "demo", "--output_dir", str(tmp_path), *SMALL, "--seeds", "0", "1"]
    recipe.main(command)
    results = read_results(tmp_path)
    assert results.method == "fed_la_avg" and results.metrics["convex_accuracy"].n == 2
    assert set(results.metrics["convex_accuracy"].baseline) == {"fed_avg"}
    assert all((tmp_path / figure.path).exists() for figure in results.figures) and len(results.figures) == 2
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.hidden_sizes == []
    assert results.evidence["experiments"]["convex"]["absence"] == 2
    values = results.metrics["convex_accuracy"].values
    monkeypatch.setattr(FederatedTrainer, "train", None)
    recipe.main(command)
    assert read_results(tmp_path).metrics["convex_accuracy"].values == values
    with pytest.raises(SystemExit, match="run with other rounds"):
        recipe.main([*command, "--rounds", "10"])


def test_a_shrunken_demo_of_block_cyclic_sgd(tmp_path, quarters):
    options = ["--output_dir", str(tmp_path), *SMALL, "--block_rounds", "2", "--learning_rates", "0.3"]
    recipe.main(["--preset", "block_cyclic_demo", *options])
    results = read_results(tmp_path)
    accuracy = results.metrics["blocks_accuracy"]
    assert results.method == "block_cyclic" and set(accuracy.baseline) == {"mm_psgd", "fed_avg", "separate"}
    assert set(results.metrics["blocks_accuracy_of_mm_psgd"].baseline) == {"fed_avg", "separate"}
    sent = results.metrics["blocks_bytes"]
    assert sent.value > 2 * sent.baseline["mm_psgd"].value
    chosen = results.evidence["candidates_chosen_by_seed"]["blocks"]
    assert chosen[0]["mixed"] + chosen[0]["separate"] == 8
    for folder in (tmp_path, tmp_path / "block_0", tmp_path / "block_1"):
        assert AutoModelForImageClassification.from_pretrained(folder).config.hidden_sizes == [32]


def test_the_chain_inside_mm_psgd_is_federated_averaging(tmp_path, quarters):
    options = ["--blocks", "1", "--block_rounds", "2", *SMALL]
    args, base = parsed("block_cyclic_demo", tmp_path, *options)
    cell = Cell(block_experiments(args, 5)[0], "mm_psgd", 0, 0.1)
    own = training_arguments_of(base, learning_rate=0.1, seed=0)
    trainers = [recipe.federation(cell, quarters, own) for _ in range(2)]
    trainers[1].strategy = FedAvg()
    trainers[1].engine = trainers[1]._in_process(None)
    for trainer in trainers:
        trainer.train()
    mixed, averaged = (trainer.strategy.parameters for trainer in trainers)
    assert all(torch.allclose(mixed[name], averaged[name], atol=1e-7) for name in mixed)


def test_presets_compare_what_they_say(tmp_path):
    args, training_args = parsed("evidence", tmp_path)
    experiments = {e.name: e for e in latest_experiments(args, training_args.per_device_train_batch_size)}
    assert len(args.seeds) == 3 and experiments["convex"].arms == LATEST_ARMS
    assert experiments["always_there"].setting.first_digits == 0 and experiments["always_there"].rates_of == "convex"
    assert {e.setting.clients for e in experiments.values()} == {10, 30, 50, 100}
    assert experiments["nonconvex"].rates_of is None and experiments["nonconvex"].setting.model == "mlp"
    # the last quarter of the rounds has whole periods in every experiment
    for e in experiments.values():
        assert e.setting.rounds // 4 % (2 * e.setting.absence) == 0
    args, _ = parsed("block_cyclic_evidence", tmp_path)
    blocks = {e.name: e.setting for e in block_experiments(args, 5)}
    assert {s.clients for s in blocks.values()} == {5, 10, 20} and blocks["five_blocks"].blocks == 5
    for s in blocks.values():
        assert s.rounds % (s.blocks * s.block_rounds) == 0 and s.block_rounds % s.evaluate_every == 0
    args, training_args = parsed("paper", tmp_path)
    assert (args.clients, args.absence, args.local_steps, training_args.per_device_train_batch_size) == (
        1000,
        100,
        10,
        5,
    )
    model = recipe.model_of("softmax", bright_quarters(), seed=0)
    assert sum(p.numel() for p in model.parameters()) == 16 * 10 + 10


def test_what_is_not_known_is_named(tmp_path, quarters):
    for options, problem in (
        (["--experiments", "convexx"], "convexx.*choose from convex"),
        (["--arms", "sgd"], "'sgd'.*choose from fed_la_avg"),
        (["--model", "cnn"], "model 'cnn' is not known"),
    ):
        with pytest.raises(SystemExit, match=problem):
            recipe.main(["--preset", "demo", "--output_dir", str(tmp_path), *SMALL, *options])


@pytest.mark.slow
def test_fed_la_avg_swings_less_than_fed_avg_on_the_digits(tmp_path):
    pytest.importorskip("sklearn")
    recipe.main(["--preset", "demo", "--output_dir", str(tmp_path), "--learning_rates", "0.03"])
    swing = read_results(tmp_path).metrics["convex_accuracy_range"]
    assert swing.value < swing.baseline["fed_avg"].value


@pytest.mark.slow
def test_a_tiny_vit_takes_part(tmp_path):
    pytest.importorskip("sklearn")
    options = ["--rounds", "4", "--absence", "1", "--model", "vit", "--learning_rates", "0.1", "--clients", "10"]
    recipe.main(["--preset", "demo", "--output_dir", str(tmp_path), *options])
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.model_type == "vit"
