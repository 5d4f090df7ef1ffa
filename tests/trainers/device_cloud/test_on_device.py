"""Many users at once are the same numbers as one after the other; roll-back, budgets, files, kills; and the drift that
correction must repair."""

import os
import signal

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertForSequenceClassification

from tests.trainers.device_cloud.tiny_clicks import TinyUserClicks, one_by_one, tiny_model, tiny_rows
from trainers.data.drifted_clicks import draw_drifted_clicks
from trainers.device_cloud import DeviceBudget, DeviceBudgetError
from trainers.device_cloud import on_device as module
from trainers.device_cloud import on_device_training as training
from trainers.device_cloud.label_correction import METHODS, Correction, LabelCorrectionError
from trainers.device_cloud.on_device import OnDeviceArguments, OnDeviceFineTuner
from trainers.evaluation.users import auc_by_user
from trainers.federated.core import WireMeter, unpack


COUNTS = [4, 9, 1, 0, 6, 9, 3]
RATE, STEPS = 0.7, 5
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def tuner_of(model=None, *, correction=None, lora=None, budget=None, meter=None, sample_loss=None, **options):
    options = {"device_learning_rate": RATE, "device_steps": STEPS, "min_samples": 3, "roll_back": False} | options
    extras = {"correction": correction, "lora": lora, "budget": budget, "meter": meter, "sample_loss": sample_loss}
    return OnDeviceFineTuner(tiny_model() if model is None else model, OnDeviceArguments(**options), **extras)


@pytest.mark.parametrize("trainable", ["all", "head", "bias", r"body\.user", "lora"])
def test_the_same_as_one_after_the_other(tmp_path, trainable):
    rows = tiny_rows(COUNTS)
    tuner = tuner_of(trainable=trainable, max_chunk_bytes=6000)
    before = {name: value.clone() for name, value in tuner.cloud_model.state_dict().items()}
    results = tuner.fit(rows, predict={"again": rows}, store=tmp_path)
    assert results.users.tolist() == [0, 1, 2, 4, 5, 6]
    assert results.best_step.tolist() == [STEPS, STEPS, -1, STEPS, STEPS, STEPS]
    for user, count in enumerate(COUNTS):
        found = tuner.user_state(tmp_path, user)
        expected = one_by_one(tuner.model, tuner.names, rows, user, rate=RATE, steps=STEPS if count >= 3 else 0)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    assert all(torch.equal(value, before[name]) for name, value in tuner.cloud_model.state_dict().items())
    assert len(list(tmp_path.glob("round-*"))) > 1  # several chunks


def test_logits_are_those_of_each_users_model(tmp_path):
    rows, test = tiny_rows(COUNTS), tiny_rows([2, 3, 1, 2, 0, 1, 2, 2], seed=5)
    tuner = tuner_of()
    results = tuner.fit(rows, predict={"test": test}, store=tmp_path)
    for user in range(8):
        mine = test.users == user
        if mine.any():
            tuner.save_user(tmp_path, user, tmp_path / f"user-{user}")
            own = TinyUserClicks.from_pretrained(tmp_path / f"user-{user}").eval()
            with torch.no_grad():
                logits = own(test.tensors["user"][mine], test.tensors["item"][mine]).logits[:, 0]
            torch.testing.assert_close(results.logits["test"][mine], logits, **EXACT)


def test_an_adapter_loads_with_peft(tmp_path):
    rows = tiny_rows(COUNTS)
    model = tiny_model()
    tuner = tuner_of(model, trainable="lora")
    assert all("lora_" in name for name in tuner.names)
    results = tuner.fit(rows, predict={"again": rows}, store=tmp_path / "store")
    tuner.save_user(tmp_path / "store", 1, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    mine = rows.users == 1
    with torch.no_grad():
        logits = loaded(user=rows.tensors["user"][mine], item=rows.tensors["item"][mine]).logits[:, 0]
    torch.testing.assert_close(results.logits["again"][mine], logits, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(logits, tuner.predict_cloud(rows)[mine])


@pytest.mark.parametrize("method", METHODS)
def test_corrections_reach_the_loss(tmp_path, method):
    rows = tiny_rows(COUNTS)
    correction = Correction(method=method, prior="model" if method == "scale" else "global", global_ctr=0.3)
    tuner = tuner_of(trainable="head", correction=correction)
    tuner.fit(rows, store=tmp_path)
    targets = correction.targets(rows.tensors["labels"], rows.users, tuner.predict_cloud(rows))
    if method == "bias":
        return assert_bias_is_dropped(tuner, rows, tmp_path)
    expected = one_by_one(tuner.model, tuner.names, rows, 4, rate=RATE, steps=STEPS, targets=targets)
    found = tuner.user_state(tmp_path, 4)
    assert all(torch.allclose(found[name], value, rtol=1e-10) for name, value in expected.items())


def assert_bias_is_dropped(tuner, rows, store):
    """As if the output had a second bias, which is not served."""
    found = tuner.user_state(store, 4)
    assert found.keys() == set(tuner.names)
    weight, bias = (tuner.model.output.weight[0].detach().clone(), tuner.model.output.bias[0].detach().clone())
    mine, free = rows.users == 4, torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        states = tuner.model.body(rows.tensors["user"][mine], rows.tensors["item"][mine])
    for _ in range(STEPS):
        error = torch.sigmoid(states @ weight + bias + free) - rows.tensors["labels"][mine]
        weight, bias, free = (weight - RATE * (error @ states) / len(states), bias - RATE * error.mean(),
                              free - RATE * error.mean())  # fmt: skip
    torch.testing.assert_close(found["output.weight"][0], weight, **EXACT)
    torch.testing.assert_close(found["output.bias"][0], bias, **EXACT)


@pytest.mark.parametrize(
    "options", [{"device_optimizer": "adam", "device_learning_rate": 0.05}, {"device_batch_size": 4}]
)
def test_chunks_and_vmap_change_nothing(options):
    rows = tiny_rows(COUNTS)
    runs = [
        tuner_of(**options, **how).fit(rows, predict={"again": rows}).logits["again"]
        for how in ({}, {"max_chunk_bytes": 1}, {"vectorized": False})
    ]
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], **EXACT)


def test_adam_is_torchs(tmp_path):
    rows = tiny_rows(COUNTS)
    tuner = tuner_of(trainable="head", device_optimizer="adam", device_learning_rate=0.05)
    tuner.fit(rows, store=tmp_path)
    expected = one_by_one(tuner.model, tuner.names, rows, 1, rate=0.05, steps=STEPS, optimizer=torch.optim.Adam)
    for name, value in tuner.user_state(tmp_path, 1).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9)


def test_the_last_samples_count(tmp_path):
    rows = tiny_rows(COUNTS)
    last = (rows.users == 1).nonzero()[-4:, 0]
    cut = type(rows)(tensors={n: v[last] for n, v in rows.tensors.items()}, users=rows.users[last])
    tuner = tuner_of(max_samples=4, correction=Correction(method="scale", global_ctr=0.3))
    results = tuner.fit(rows, store=tmp_path / "a")
    assert results.num_samples.tolist() == [4, 4, 1, 4, 4, 3]
    assert results.p_local[1] == cut.tensors["labels"].mean()
    tuner.fit(cut, store=tmp_path / "b")
    for name, value in tuner.user_state(tmp_path / "a", 1).items():
        torch.testing.assert_close(value, tuner.user_state(tmp_path / "b", 1)[name], **EXACT)


def test_several_classes(tmp_path):
    rows = tiny_rows(COUNTS, classes=3)
    tuner = tuner_of(tiny_model(classes=3), roll_back=True)
    results = tuner.fit(rows, validation=rows, predict={"again": rows}, store=tmp_path)
    assert results.logits["again"].shape == (len(rows.users), 3) and results.p_local.isnan().all()
    expected = one_by_one(tuner.model, tuner.names, rows, 1, rate=RATE, steps=STEPS)
    found = tuner.user_state(tmp_path, 1)
    assert all(torch.allclose(found[name], value, rtol=1e-10) for name, value in expected.items())
    loss = torch.nn.functional.cross_entropy(
        results.logits["again"][rows.users == 1], rows.tensors["labels"][rows.users == 1]
    )
    assert results.validation_after[1].item() == pytest.approx(-loss.item())
    with pytest.raises(ValueError, match="cannot be corrected"):
        tuner_of(tiny_model(classes=3), correction=Correction(global_ctr=0.3)).fit(rows)


@pytest.mark.parametrize("masked", [False, True])
def test_a_classifier_of_transformers(masked, monkeypatch):
    """Attention masks are looked into, which vmap refuses: users go one after the other, and that is said."""
    warned = []
    monkeypatch.setattr(training.logger, "warning_once", warned.append)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    model = BertForSequenceClassification(config)
    users = torch.arange(12) % 3
    tensors = {"input_ids": torch.randint(1, 20, (12, 5)), "labels": torch.randint(0, 2, (12,))}
    if masked:
        tensors["attention_mask"] = torch.arange(5).expand(12, 5) < torch.arange(12)[:, None] % 3 + 3
    rows = type(tiny_rows([1]))(tensors=tensors, users=users)
    for trainable in ("head", "lora"):
        logits = []
        for vectorized in (True, False):
            tuner = tuner_of(model, trainable=trainable, vectorized=vectorized)
            logits.append(tuner.fit(rows, predict={"again": rows}).logits["again"])
        torch.testing.assert_close(*logits)
        assert not torch.allclose(logits[0], tuner.predict_cloud(rows))
    assert bool(warned) is masked and all("one after the other" in text for text in warned)


# Roll-back


def opposite(rows):
    """The same samples, whose labels say the contrary: what is learned is wrong on them."""
    return type(rows)(tensors=rows.tensors | {"labels": 1 - rows.tensors["labels"]}, users=rows.users)


def test_who_gets_worse_keeps_the_clouds_model():
    rows = tiny_rows(COUNTS)
    wrong = opposite(rows)
    cloud = tuner_of().predict_cloud(rows)
    for roll_back in (True, False):
        results = tuner_of(roll_back=roll_back, device_steps=20).fit(rows, validation=wrong, predict={"again": rows})
        worse = results.validation_after < results.validation_before
        assert worse.any() and torch.equal(~results.accepted[worse], torch.full((int(worse.sum()),), roll_back))
        for user in results.users[worse].tolist():
            mine = rows.users == user
            same = torch.allclose(results.logits["again"][mine], cloud[mine], **EXACT)
            assert same is roll_back
        kept = results.best_step[worse]
        assert (kept == (0 if roll_back else 20)).all()


def test_who_diverges_keeps_the_clouds_model():
    rows = tiny_rows(COUNTS)
    tuner = tuner_of(sample_loss=lambda logits, labels: logits.square().exp() - labels, device_learning_rate=1e6)
    results = tuner.fit(rows, predict={"again": rows})
    assert (results.best_step[results.num_samples >= 3] == 0).all() and not results.accepted.any()
    torch.testing.assert_close(results.logits["again"], tuner.predict_cloud(rows))


def test_the_best_step_is_served():
    rows, validation = tiny_rows(COUNTS), tiny_rows(COUNTS, seed=3)
    options = {"device_steps": 6, "validate_every": 2, "roll_back": True}
    results = tuner_of(**options).fit(rows, validation=validation, predict={"validation": validation})
    scores = {0: tuner_of().predict_cloud(validation)}
    for steps in (2, 4, 6):
        scores[steps] = tuner_of(device_steps=steps).fit(rows, predict={"v": validation}).logits["v"]
    labels, users = validation.tensors["labels"].numpy(), validation.users.numpy()
    by_step = {step: auc_by_user(logits.numpy(), labels, users) for step, logits in scores.items()}
    for place, user in enumerate(results.users.tolist()):
        at = by_step[0].users.tolist().index(user)
        if COUNTS[user] < 3:
            continue
        values = {step: found.values[at] for step, found in by_step.items()}
        best = 6 if np.isnan(values[6]) else max((2, 4, 6), key=lambda step, values=values: (values[step], -step))
        if not np.isnan(values[0]):
            assert results.validation_before[place] == pytest.approx(values[0])
            assert results.validation_after[place] == pytest.approx(values[best])
            best = best if values[best] >= values[0] else 0
        assert results.best_step[place] == best
        mine = validation.users == user
        torch.testing.assert_close(results.logits["validation"][mine], scores[best][mine], **EXACT)


# Files


def test_a_run_goes_on_where_it_was_killed(tmp_path):
    rows = tiny_rows(COUNTS)
    whole = tuner_of(max_chunk_bytes=1).fit(rows, predict={"again": rows}, store=tmp_path / "whole")
    child = os.fork()
    if child == 0:
        train, calls = module.train_users, []

        def dying(*args, **kwargs):
            calls.append(0)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return train(*args, **kwargs)

        module.train_users = dying
        try:
            tuner_of(max_chunk_bytes=1).fit(rows, predict={"again": rows}, store=tmp_path / "part")
        finally:
            os._exit(3)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "part").glob("round-*/*")}
    assert len({path.parent for path in kept}) == 2
    again = tuner_of(max_chunk_bytes=1).fit(rows, predict={"again": rows}, store=tmp_path / "part")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert torch.equal(again.logits["again"], whole.logits["again"])
    assert torch.equal(again.best_step, whole.best_step)


def test_a_damaged_chunk_is_made_again(tmp_path):
    rows = tiny_rows(COUNTS)
    first = tuner_of(max_chunk_bytes=1).fit(rows, predict={"again": rows}, store=tmp_path)
    (tmp_path / "round-00000001" / "logits.safetensors").write_bytes(b"gone")
    second = tuner_of(max_chunk_bytes=1).fit(rows, predict={"again": rows}, store=tmp_path)
    assert torch.equal(first.logits["again"], second.logits["again"])


def test_another_run_is_refused(tmp_path):
    rows = tiny_rows(COUNTS)
    tuner_of().fit(rows, store=tmp_path)
    for other in (tuner_of(device_steps=6), tuner_of(correction=Correction(global_ctr=0.3))):
        with pytest.raises(ValueError, match="other data, another model or other arguments"):
            other.fit(rows, store=tmp_path)
    with pytest.raises(ValueError, match="other data"):
        tuner_of().fit(tiny_rows(COUNTS, seed=1), store=tmp_path)


def test_parameters_may_stay_out_of_the_store(tmp_path):
    rows = tiny_rows(COUNTS)
    tuner = tuner_of()
    tuner.fit(rows, store=tmp_path, keep_parameters=False)
    with pytest.raises(ValueError, match="keep_parameters=False"):
        tuner.user_state(tmp_path, 1)
    assert tuner.user_state(tmp_path, 3).keys() == set(tuner.names)  # who never tuned has the cloud's


def test_a_tables_rows_are_kept_alone(tmp_path):
    tuner = tuner_of(trainable=r"body\.user")
    tuner.fit(tiny_rows(COUNTS), store=tmp_path)
    _, record = module.RoundStore(tmp_path).load(0)
    tensors, _ = unpack((tmp_path / "round-00000000" / "parameters.safetensors").read_bytes())
    assert tensors["body.user.values"].shape == (len(record["users"]), 3)
    assert tensors["body.user.rows"].tolist() == record["users"]


# Limits and bytes


def test_what_goes_down_is_counted():
    meter, rows = WireMeter(), tiny_rows(COUNTS)
    tuner = tuner_of(meter=meter, correction=Correction(method="offset", global_ctr=0.3))
    tuner.fit(rows)
    model = len(WireMeter().send(tuner.cloud_model.state_dict()))
    users = len(set(rows.users.tolist()))
    purposes = meter.by_purpose()
    assert purposes["model"] == {"up": 0, "down": users * model} and 0 < purposes["prior"]["down"] < users * 150
    assert set(meter.by_user()) == set(rows.users.tolist()) and meter.totals()["up"] == 0
    without = WireMeter()
    tuner_of(meter=without, correction=Correction(method="scale", prior="model")).fit(rows)
    assert set(without.by_purpose()) == {"model"}


def test_a_budget_is_of_the_largest_user():
    rows = tiny_rows(COUNTS)
    cost = tuner_of().fit(rows).cost
    assert cost.parameters == sum(p.numel() for p in tiny_model().parameters()) and cost.peak_bytes > cost.bytes
    tuner_of(budget=DeviceBudget(max_peak_bytes=cost.peak_bytes)).fit(rows)
    with pytest.raises(DeviceBudgetError, match="peak bytes"):
        tuner_of(budget=DeviceBudget(max_peak_bytes=cost.peak_bytes - 1)).fit(rows)
    assert tuner_of(trainable="head").fit(rows).cost.peak_bytes < cost.peak_bytes


def test_nobody_has_enough():
    rows = tiny_rows([2, 1])
    results = tuner_of().fit(rows, predict={"again": rows})
    assert results.best_step.tolist() == [-1, -1] and results.users_per_second == 0 and results.cost is None
    torch.testing.assert_close(results.logits["again"], tuner_of().predict_cloud(rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": "nowhere"}, "'nowhere'"),
        ({"trainable": "user_embedding"}, "'user_embedding'"),
        ({"device_steps": 0}, "positive"),
        ({"device_optimizer": "lbfgs"}, "'lbfgs'"),
    ],
)
def test_what_cannot_be_trained_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        tuner_of(**options).fit(tiny_rows(COUNTS))


def test_labels_that_were_corrected_are_refused():
    rows = tiny_rows(COUNTS)
    rows.tensors["labels"] = rows.tensors["labels"] * 0.5
    with pytest.raises(LabelCorrectionError, match="corrected before"):
        tuner_of().fit(rows)


def test_the_modes_of_the_model_come_back():
    model = tiny_model().train()
    model.dropout.eval()
    tuner_of(model).fit(tiny_rows(COUNTS))
    assert model.training and model.body.training and not model.dropout.training
    assert type(model.body.user) is torch.nn.Embedding


# The claim, on drawn data


def test_drift_harms_and_correction_repairs():
    """Row "drift 3, n = 100" of the digest: plain fine-tuning falls below the cloud's model, corrected rises above."""
    means = {"cloud": [], "plain": [], "scale_global": [], "offset_global": []}
    for seed in (0, 1):
        drawn = draw_drifted_clicks(drift=3.0, num_local=100, seed=seed)
        data = drawn.data()
        train, test = data.rows("train"), data.rows("test")

        def user_auc(logits, test=test):
            return auc_by_user(logits.numpy(), test.tensors["labels"].numpy(), test.users.numpy()).mean()

        for method in ("none", "scale", "offset"):
            correction = Correction(method=method, global_ctr=float(train.tensors["labels"].mean()))
            args = OnDeviceArguments(
                trainable="user_embedding", device_learning_rate=0.5, device_steps=60, roll_back=False
            )
            tuner = OnDeviceFineTuner(drawn.model(data), args, correction=correction)
            results = tuner.fit(train, predict={"test": test})
            means[correction.name].append(user_auc(results.logits["test"]))
        means["cloud"].append(user_auc(tuner.predict_cloud(test)))
    mean = {name: np.mean(values) for name, values in means.items()}
    assert mean["plain"] < mean["cloud"] - 0.02
    assert mean["scale_global"] > mean["cloud"] + 0.005
    assert mean["offset_global"] > mean["cloud"] + 0.01
    assert mean["scale_global"] > mean["plain"] + 0.03
