"""The recipe of FedSubAvg: whose rows are whose, what is compared, and a shrunken run."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.trainers.recipes.tiny_federation_data import made_ratings
from trainers.recipes import federated_ctr as recipe
from trainers.recipes.arguments import RecipeTrainingArguments, parse_arguments
from trainers.recipes.federated_cells import Cell, Compared
from trainers.report import read_results


SMALL = [
    "--rounds",
    "6",
    "--local_steps",
    "2",
    "--evaluate_every",
    "2",
    "--max_users",
    "0",
    "--clients_per_round",
    "4",
]


@pytest.fixture(autouse=True)
def ratings(monkeypatch):
    monkeypatch.setattr(recipe, "read_movielens_100k", made_ratings)


def parsed(preset, folder, *options):
    types = (recipe.FederatedCtrArguments, RecipeTrainingArguments)
    argv = ["--preset", preset, "--output_dir", str(folder), *options]
    return parse_arguments(types, recipe.PRESETS, argv, default_preset="demo")[1]


def test_users_are_drawn_once_and_later_ratings_are_reported():
    everybody, some = recipe.read_ratings(0, 0), recipe.read_ratings(5, 0)
    assert len(everybody.user_names) == 12 and len(some.user_names) == 5
    assert recipe.fingerprint_of(some) == recipe.fingerprint_of(recipe.read_ratings(5, 0))
    assert recipe.fingerprint_of(some) != recipe.fingerprint_of(everybody)
    for user in range(5):
        times = {name: [r["time"] for r in some.splits[name] if r["user"] == user] for name in some.splits}
        assert len(times["train"]) == 6 and max(times["train"]) < min(times["validation"]) < min(times["test"])
    assert recipe.read_ratings(5, 3).features[-1]["name"] == "history"


def test_heat_counts_users_of_films():
    heat = recipe.heat_of(recipe.read_ratings(0, 0), 4)
    # each user trains on the first six of ten films, of which film 0 is everybody's
    assert heat["users"] == 12 and heat["users_of_a_film_most"] == 12 and heat["films_of_a_user_mean"] == 6
    assert heat["users_over_users_per_round"] == 3 and 0 <= heat["share_of_films_with_one_user"] < 1


def test_every_arm_has_the_same_clients_and_submodels(tmp_path):
    args, base = parsed("evidence", tmp_path, *SMALL)
    data, experiment = recipe.read_ratings(0, 0), recipe.experiments_of(args, 4)[0]
    sent = {}
    for arm in recipe.CTR_ARMS:
        fed = recipe.federation(Cell(experiment, arm, 0, 0.1), data, base)
        fed.begin()
        updates = fed.engine.train(0, fed.select(0))
        sent[arm] = [(u.client, {t: rows.tolist() for t, rows in u.rows.items()}) for u in updates]
        films = [tables["model.first_order.tables.item_id.weight"] for _, tables in sent[arm]]
        assert all(len(rows) == 6 and 0 not in rows for rows in films)
    assert all(found == sent["fed_avg"] for found in sent.values())
    whole = recipe.federation(Cell(experiment, "fed_avg", 0, 0.1), data, base, rounds=1, submodels=False)
    whole.begin()
    assert all(not update.rows for update in whole.engine.train(0, whole.select(0)))


def test_rounds_to_where_fed_avg_ends_are_counted_seed_by_seed():
    def outcome(*values):
        steps = [{"round": 2 * i + 2, "test_auc": v, "test_log_loss": -v} for i, v in enumerate(values)]
        return {"history": steps, "diverged": False}

    compared = Compared(
        outcomes={
            "fed_sub_avg": [outcome(0.5, 0.7, 0.7, 0.7), outcome(0.5, 0.5, 0.6, 0.7), outcome(0.7, 0.7, 0.7, 0.7)],
            "fed_avg": [outcome(0.5, 0.5, 0.5, 0.6), outcome(0.5, 0.5, 0.5, 0.6), outcome(0.5, 0.5, 0.5, 0.9)],
        }
    )
    for key, sign in (("test_auc", 1), ("test_log_loss", -1)):
        metric = recipe._rounds_to_fed_avg(compared, key, sign)
        assert metric.values == [4, 6, 9] and metric.baseline["fed_avg"].values == [8, 8, 8]
        assert "fed_sub_avg 1 of 3" in metric.note and metric.baseline["fed_avg"].verdict == "null"


def test_a_shrunken_demo_and_its_repetition(tmp_path, monkeypatch):
    command = ["--preset", "demo", "--output_dir", str(tmp_path), *SMALL]
    recipe.main(command)
    results = read_results(tmp_path)
    assert results.method == "fed_sub_avg" and set(results.metrics["lr_auc"].baseline) == {"fed_avg"}
    sent = results.metrics["lr_bytes_up_per_update"]
    # so few films are there that numbering rows takes more than leaving some out saves; padding never travels
    assert 0 < sent.value < 2 * sent.baseline["whole_model"].value and sent.baseline["whole_model"].value > 4 * 50
    assert all((tmp_path / figure.path).exists() for figure in results.figures) and len(results.figures) == 3
    assert results.evidence["heat"]["lr"]["users"] == 12
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.architecture == "lr" and model.head.bias.abs() > 0
    values = results.metrics["lr_auc"].values
    monkeypatch.setattr(recipe, "run_cell", lambda *args, **options: pytest.fail("it was run again"))
    recipe.main(command)
    assert read_results(tmp_path).metrics["lr_auc"].values == values
    with pytest.raises(SystemExit, match="run with other local_steps"):
        recipe.main([*command, "--local_steps", "3"])


def test_logits_that_are_no_numbers_are_no_score(tmp_path):
    args, base = parsed("demo", tmp_path, *SMALL)
    data, experiment = recipe.read_ratings(0, 0), recipe.experiments_of(args, 4)[0]
    fed = recipe.federation(Cell(experiment, "fed_avg", 0, 0.1), data, base)
    fed.begin()
    with torch.no_grad():
        fed.strategy._parameters["model.first_order.tables.item_id.weight"].fill_(float("inf"))
    values = recipe.measures(fed, data)(1)
    assert values["test_auc"] != values["test_auc"]
    outcome = {"history": [{"round": 1} | values], "diverged": False}
    assert recipe.score("fed_avg", outcome) != recipe.score("fed_avg", outcome)


def test_presets_are_what_they_say(tmp_path):
    args, training_args = parsed("evidence", tmp_path)
    assert args.arms == recipe.CTR_ARMS and len(args.seeds) == 3
    assert args.max_users / args.clients_per_round == pytest.approx(18.6, rel=0.1)  # the released code's N/K
    args, training_args = parsed("paper", tmp_path)
    assert (args.architectures, args.embedding_dim, args.hidden_sizes) == (["din"], 18, [200, 80])
    assert (training_args.per_device_train_batch_size, args.local_steps, args.clients_per_round) == (4, 10, 100)
    for options, problem in ((["--arms", "mifa"], "'mifa'"), (["--architectures", "fm"], "architectures \\['fm'\\]")):
        with pytest.raises(SystemExit, match=problem):
            recipe.main(["--preset", "demo", "--output_dir", str(tmp_path), *SMALL, *options])


@pytest.mark.slow
def test_a_din_with_histories_takes_part(tmp_path):
    options = ["--preset", "paper", "--output_dir", str(tmp_path), *SMALL, "--use_cpu", "True", "--seeds", "0"]
    recipe.main([*options, "--arms", "fed_sub_avg", "fed_avg", "--history_length", "4"])
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.architecture == "din"
