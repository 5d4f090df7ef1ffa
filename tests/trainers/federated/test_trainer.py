"""FederatedTrainer in one process: closed forms, equal algorithms, memories, logs, submodels, evaluation."""

import json

import pytest
import torch
from transformers import TrainerCallback

from hf_models.ctr import CtrForCtrPrediction
from tests.trainers.federated.tiny_federation import (
    Quadratic,
    assert_same,
    clicks,
    federation,
    quadratic_clients,
    recommender,
)
from trainers.data import CtrCollator
from trainers.data.drifted_clicks import draw_drifted_clicks
from trainers.federated import (
    MIFA,
    Alternating,
    FedAdam,
    FedAvg,
    FedLaAvg,
    FedProx,
    FedSGD,
    FedSubAvg,
    RoundwiseSubmodelAvg,
    WaitForAll,
)


def test_fedavg_on_parabolas_is_the_equal_loop(tmp_path):
    targets = {"a": 0.0, "b": 1.0, "c": 10.0, "d": 11.0}
    present = Alternating([["a", "b"], ["c", "d"]], [2, 3])
    fed = federation(
        tmp_path, Quadratic(), quadratic_clients(targets), FedAvg(), rounds=11, availability=present, local_steps=3
    )
    output = fed.train()
    x = 0.0
    for round in range(11):
        moved = []
        for client in present.available(round):
            y = x
            for _ in range(3):
                y -= 0.1 * 2 * (y - targets[client])
            moved.append(y - x)
        x += sum(moved) / len(moved)
    assert float(fed.strategy.parameters["x"]) == pytest.approx(x, rel=1e-13)
    assert fed.model.x.item() == float(fed.strategy.parameters["x"])
    assert output.global_step == 11 and output.metrics["train_loss"] > 0


def test_latest_averaging_is_the_equal_loop(tmp_path):
    """Two clients by turns: x <- x - gamma (u_a + u_b) / 2, with the last gradient of the one that is away."""
    targets, present = {"a": 0.0, "b": 10.0}, Alternating([["a"], ["b"]], [2, 3])
    fed = federation(
        tmp_path,
        Quadratic(3.0),
        quadratic_clients(targets),
        FedLaAvg(learning_rate=0.05),
        rounds=23,
        availability=present,
        local_steps=2,
    )
    fed.train()
    x, latest = 3.0, {"a": 0.0, "b": 0.0}
    for round in range(23):
        for client in present.available(round):
            y = x
            for _ in range(2):
                y -= 0.05 * 2 * (y - targets[client])
            latest[client] = (x - y) / 0.05
        x -= 0.05 * sum(latest.values()) / 2
    assert float(fed.strategy.parameters["x"]) == pytest.approx(x, rel=1e-12)
    assert fed.history[-1]["learning_rate"] == 0.05


def test_submodels_of_all_rows_are_the_whole_model(tmp_path):
    """FedSubAvg is FedAvg where everybody has every row."""
    dataset = clicks(clients=5)
    everything = {f"u{index}": {"table.weight": torch.arange(40)} for index in range(5)}
    served = []
    for name, strategy, options in (
        ("avg", FedAvg(weighting="clients", clients_per_round=3), {}),
        ("sub", FedSubAvg(clients_per_round=3), {"involvement": everything}),
    ):
        fed = federation(tmp_path / name, recommender(), dataset, strategy, rounds=4, **options)
        fed.train()
        served.append(fed.strategy.parameters)
    assert_same(*served)


def test_rows_travel_alone_and_change_nothing_else(tmp_path):
    """With submodels or without, FedAvg is the same; only fewer bytes go."""
    feds = []
    for name, submodels in (("whole", False), ("rows", True)):
        strategy = FedAvg(weighting="clients", clients_per_round=4)
        fed = federation(tmp_path / name, recommender(), clicks(), strategy, rounds=3, submodels=submodels)
        fed.train()
        feds.append(fed)
    whole, rows = feds
    assert_same(whole.strategy.parameters, rows.strategy.parameters)
    assert rows.meter.totals()["down"] < whole.meter.totals()["down"]
    read = set(rows.train_dataset.filter(lambda row: row["user"] == "u3")["items"][0]) - {0}
    assert read <= set(rows.strategy.payload(3, "u3").rows["table.weight"].tolist())


@pytest.mark.parametrize(
    "strategy",
    [
        FedProx(proximal=0.5),
        FedAdam(),
        FedSGD(),
        WaitForAll(),
        RoundwiseSubmodelAvg(clients_per_round=4),
        FedSubAvg(clients_per_round=4, heat="streaming"),
        FedSubAvg(clients_per_round=4, weighting="examples", max_correction=3.0),
        MIFA(learning_rate=0.1, clients_per_round=4),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_every_algorithm_learns_and_repeats(tmp_path, strategy):
    served = []
    for attempt in range(2):
        fed = federation(tmp_path / str(attempt), recommender(), clicks(), strategy, rounds=4)
        fed.train()
        served.append(fed.strategy.parameters)
    assert_same(*served)
    assert any(not torch.equal(served[0][name], p) for name, p in recommender().named_parameters())
    if type(strategy) is FedSubAvg:
        assert all("table.weight" in update.rows for update in fed.engine.train(4, fed.select(4)))


def test_memory_at_the_clients_is_memory_at_the_server(tmp_path):
    """The same x, to the last bits that differences round."""
    served = []
    for memory in ("client", "server"):
        fed = federation(
            tmp_path / memory,
            Quadratic(),
            quadratic_clients({"a": 0.0, "b": 4.0, "c": 8.0}),
            FedLaAvg(learning_rate=0.25, memory=memory, clients_per_round=1),
            rounds=12,
            local_steps=2,
            args={"save_strategy": "steps"},
        )
        fed.train()
        served.append(fed.strategy.parameters)
    assert_same(*served)
    assert (tmp_path / "client" / "clients").is_dir() and not (tmp_path / "server" / "clients").exists()


def test_each_round_is_logged(tmp_path):
    heard = []

    class Listener(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            heard.append(state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append(logs)

    dataset, evaluated = clicks(), clicks(seed=1)
    fed = federation(
        tmp_path,
        recommender(),
        dataset,
        FedSubAvg(clients_per_round=4),
        rounds=4,
        eval_dataset=evaluated.remove_columns("user"),
        args={"eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "linear", "save_strategy": "steps"},
        callbacks=[Listener()],
    )
    fed.train()
    assert [entry for entry in heard if isinstance(entry, int)] == [1, 2, 3, 4]
    rounds = [entry for entry in fed.state.log_history if "elementwise_gradient_norm" in entry]
    assert [entry["step"] for entry in rounds] == [1, 2, 3, 4]
    assert [entry["learning_rate"] for entry in rounds] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert all(entry["elementwise_gradient_norm"] > 0 and entry["clients"] == 4 for entry in rounds)
    assert sum("eval_loss" in entry for entry in fed.state.log_history) == 2
    assert [record["round"] for record in fed.history] == [0, 1, 2, 3]
    assert all(len(record["accepted"]) == 4 and not record["rejected"] for record in fed.history)
    lines = [json.loads(line) for line in (tmp_path / "federated_log.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if line["kind"] == "round"] == [0, 1, 2, 3]
    assert sum(record["bytes_up"] for record in fed.history) == fed.meter.totals()["up"] > 0


def test_a_bf16_model_is_served_in_float32_and_left_in_bf16(tmp_path):
    model = recommender().to(torch.bfloat16)
    fed = federation(tmp_path, model, clicks(), FedAvg(), rounds=3, args={"learning_rate": 1e-4})
    fed.train()
    start = {name: p.detach().float() for name, p in recommender().to(torch.bfloat16).named_parameters()}
    for name, tensor in fed.strategy.parameters.items():
        assert tensor.dtype == torch.float32
        assert dict(model.named_parameters())[name].dtype == torch.bfloat16
    # steps below bf16's resolution are not lost
    moved = fed.strategy.parameters["hidden.weight"] - start["hidden.weight"]
    assert 0 < float(moved.abs().max()) < 1e-3


def test_autocast_trains_in_bf16_on_float32_parameters(tmp_path):
    seen = []

    class Watched(type(recommender())):
        def forward(self, items, labels=None):
            found = super().forward(items, labels)
            seen.append(self.hidden(self.table(items).sum(1)).dtype)
            return found

    model = Watched()
    fed = federation(tmp_path, model, clicks(), FedAvg(), rounds=1, args={"bf16": True})
    fed.train()
    assert set(seen) == {torch.bfloat16} and model.hidden.weight.dtype == torch.float32


def test_each_client_is_evaluated_on_its_own_rows(tmp_path):
    def accuracy(prediction):
        return {"accuracy": float(((prediction.predictions > 0) == prediction.label_ids).mean())}

    fed = federation(tmp_path, recommender(), clicks(), FedAvg(), rounds=2, compute_metrics=accuracy)
    fed.train()
    dataset = clicks(seed=1)
    found = fed.evaluate(dataset, per_client=True)
    of_clients = found["eval_by_client"]
    assert sorted(of_clients) == [f"u{index}" for index in range(9)]
    with torch.no_grad():
        for client, metrics in of_clients.items():
            own = dataset.filter(lambda row, client=client: row["user"] == client)
            items, labels = torch.tensor(own["items"][:]), torch.tensor(own["labels"][:])
            outputs = fed.model.eval()(items, labels)
            assert metrics["num_examples"] == len(own)
            assert metrics["loss"] == pytest.approx(float(outputs["loss"]), rel=1e-5)
            assert metrics["accuracy"] == pytest.approx(
                float(((outputs["logits"] > 0) == labels.bool()).float().mean())
            )
    assert found["eval_loss"] == pytest.approx(fed.evaluate(dataset)["eval_loss"], rel=1e-5)
    losses = [metrics["loss"] for metrics in of_clients.values()]
    assert found["eval_loss_worst_decile"] == max(losses) == found["eval_loss_client_max"]
    assert not any("by_client" in name for entry in fed.state.log_history for name in entry)


def test_a_model_of_the_click_through_rate_sends_rows_of_all_its_tables(tmp_path):
    """Its own `touched_rows` says which, and its rows come as whole batches."""
    data = draw_drifted_clicks(num_users=6, num_local=8, num_items=12, num_test=1).data()
    config = data.config("deepfm", embedding_dim=4, hidden_sizes=[4])
    rows = data.rows("train")
    fed = federation(
        tmp_path,
        CtrForCtrPrediction(config),
        rows,
        FedSubAvg(),
        rounds=2,
        partition_by=rows.users,
        data_collator=CtrCollator(),
        args={"remove_unused_columns": False},
    )
    fed.train()
    tables = {name for name in fed.strategy.parameters if ".tables." in name}
    payload = fed.strategy.payload(2, fed.clients.names[0])
    assert set(payload.rows) == tables
    assert len(payload.rows["model.embeddings.tables.user.weight"]) == 1
    assert not any((own == 0).any() for own in payload.rows.values())


def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path):
    def made(strategy=None, **options):
        return federation(tmp_path, recommender(), clicks(clients=2), strategy or FedAvg(), rounds=1, **options)

    for args, message in (
        ({"fp16": True}, "bf16"),
        ({"gradient_accumulation_steps": 2}, "raise per_device_train_batch_size"),
        ({"max_steps": 5}, "rounds="),
        ({"logging_strategy": "epoch"}, "steps are rounds"),
        ({"optim": "galore_adamw", "optim_target_modules": ["hidden"]}, "galore|clients have many"),
    ):
        with pytest.raises((ValueError, ImportError), match=message):
            made(args=args)
    with pytest.raises(ValueError, match="optim='sgd'"):
        made(FedLaAvg(learning_rate=0.1), args={"optim": "adamw_torch"})
    with pytest.raises(ValueError, match="no column 'person'"):
        made(partition_by="person")
    with pytest.raises(ValueError, match="partition_by="):
        made(partition_by=None)
    with pytest.raises(ValueError, match="one of them, at least 1"):
        made(local_epochs=1)
    with pytest.raises(ValueError, match="parallelism='both'"):
        made(parallelism="both")
    with pytest.raises(ValueError, match="optimizers= belongs to one run"):
        made(optimizers=(object(), None))
    fed = federation(tmp_path, Quadratic(), quadratic_clients({"a": 1.0}), FedSubAvg(), rounds=1)
    with pytest.raises(ValueError, match="no trainable input embeddings"):
        fed.train()
