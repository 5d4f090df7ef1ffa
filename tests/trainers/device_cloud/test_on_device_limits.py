"""Who diverges serves the model of the cloud, also where parameters look sound; what a device needs and is sent."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_models.ctr import CtrConfig, CtrForCtrPrediction
from tests.trainers.device_cloud.tiny_clicks import tiny_model, tiny_rows
from trainers.data import CtrRows
from trainers.device_cloud import on_device as module
from trainers.device_cloud.label_correction import Correction
from trainers.device_cloud.on_device import OnDeviceArguments, OnDeviceFineTuner
from trainers.federated.core import WireMeter, unpack


COUNTS = [4, 9, 1, 6]


def tuner_of(model=None, *, correction=None, meter=None, **options):
    options = {"device_learning_rate": 0.7, "device_steps": 3, "min_samples": 3} | options
    args = OnDeviceArguments(**options)
    return OnDeviceFineTuner(tiny_model() if model is None else model, args, correction=correction, meter=meter)


class Product(nn.Module):
    """Logits `a b x`: finite factors of 1e30 have no finite product."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return SimpleNamespace(logits=self.a * self.b * x)


def rows_of(x, labels):
    return SimpleNamespace(
        tensors={"x": torch.tensor(x), "labels": torch.tensor(labels)}, users=torch.zeros(len(x), dtype=torch.long)
    )


ONE_USER = rows_of([1.0, -1.0, 0.0, 2.0], [1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("validation", [None, ONE_USER])
@pytest.mark.parametrize("roll_back", [True, False])
def test_finite_parameters_whose_logits_are_not_are_never_served(validation, roll_back):
    tuner = tuner_of(Product(), device_learning_rate=1e30, device_steps=1, roll_back=roll_back)
    results = tuner.fit(ONE_USER, validation=validation, predict={"again": ONE_USER})
    assert results.best_step.tolist() == [0] and not results.accepted.any()
    assert torch.equal(results.logits["again"], tuner.predict_cloud(ONE_USER))


def test_a_judge_that_sees_no_number_does_not_see_a_coin():
    """NaN has no sign: as scores its AUC would be one half, and better than that of a bad model."""
    bad = rows_of([1.0, -1.0, 0.0, 2.0], [0.0, 1.0, 1.0, 0.0])
    results = tuner_of(Product(), device_learning_rate=1e30, device_steps=2, validate_every=1).fit(
        ONE_USER, validation=bad, predict={"again": bad}
    )
    assert results.validation_before[0] < 0.5 and results.validation_after[0] == results.validation_before[0]
    assert results.best_step.tolist() == [0]


def test_logits_that_are_not_finite_on_later_rows_are_the_clouds(monkeypatch):
    warned = []
    monkeypatch.setattr(module.logger, "warning", warned.append)
    later = rows_of([1.0, 3e38], [1.0, 0.0])
    tuner = tuner_of(Product(), device_learning_rate=60.0, device_steps=1)
    results = tuner.fit(ONE_USER, predict={"later": later})
    assert results.accepted.all() and torch.isfinite(results.logits["later"]).all()
    cloud = tuner.predict_cloud(later)
    assert results.logits["later"][1] == cloud[1] and results.logits["later"][0] != cloud[0]
    assert warned == ["1 logits of 'later' are not finite: the cloud's are served."]


# What a device needs


def test_memory_counts_moments_copies_and_the_batch():
    rows = tiny_rows(COUNTS)
    plain = tuner_of().fit(rows).cost
    trained = plain.bytes
    assert tuner_of(device_optimizer="adam").fit(rows).cost.peak_bytes == plain.peak_bytes + 2 * trained
    assert tuner_of(validate_every=1).fit(rows, validation=rows).cost.peak_bytes == plain.peak_bytes + trained
    few = tuner_of(device_batch_size=1).fit(rows).cost
    assert few.peak_bytes < plain.peak_bytes and few.flops * 9 == plain.flops
    assert plain.peak_bytes > 3 * trained, "weights, gradients, and the start"
    assert tuner_of(trainable="head", device_optimizer="adam").fit(rows).cost.peak_bytes < plain.peak_bytes


class Listening(WireMeter):
    """Keeps what it sends."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def send(self, tensors, **options):
        payload = super().send(tensors, **options)
        self.sent.append((options["user"], options["what"], payload))
        return payload


def test_nobody_is_sent_the_rows_of_other_users():
    features = [
        {"name": "user", "role": "user", "vocab_size": 7},
        {"name": "age", "role": "user", "vocab_size": 4},
        {"name": "item", "role": "item", "vocab_size": 9},
    ]
    torch.manual_seed(0)
    model = CtrForCtrPrediction(CtrConfig(features=features, embedding_dim=4, hidden_sizes=[3]))
    users = torch.arange(5).repeat_interleave(4)
    ids = torch.stack([users + 2, users % 2 + 2, torch.randint(1, 9, (20,))], dim=1)
    ids[0, 1] = 0  # absent
    rows = CtrRows({"categorical_features": ids, "labels": (users % 2).float()}, users)
    meter = Listening()
    tuner_of(model, meter=meter, correction=Correction(global_ctr=0.3)).fit(rows)
    whole = sum(tensor.numel() for tensor in model.state_dict().values())
    models = [(user, unpack(payload)[0]) for user, what, payload in meter.sent if what == "model"]
    assert models and all(what in ("model", "prior") for _, what, _ in meter.sent)
    for user, state in models:
        tables = [name.removesuffix(".rows") for name in state if name.endswith(".rows")]
        assert {name.split(".")[-2] for name in tables} == {"user", "age"} and len(tables) == 4
        for name in tables:
            wanted = user + 2 if ".user." in name else user % 2 + 2
            assert state[f"{name}.rows"].tolist() == [wanted]
            assert torch.equal(state[name], model.state_dict()[name][[wanted]])
        numbers = sum(tensor.numel() for name, tensor in state.items() if not name.endswith(".rows"))
        assert numbers == whole - (6 + 3) * (4 + 1), "of either table one row: an embedding and a first-order weight"
    per_user = meter.by_user()
    assert set(per_user) == set(range(5)) and len({bytes["down"] for bytes in per_user.values()}) == 1


# Bayes


class Line(nn.Module):
    """`w x + b`."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor(weight)), nn.Parameter(torch.tensor(bias))

    def forward(self, x):
        return SimpleNamespace(logits=self.weight * x + self.bias)


def test_the_offset_leaves_the_bayes_logit_of_the_reference_where_it_is():
    """Clicks whose prior alone differs: x given y is N(y, 1) or N(-y, 1), so that the logit is `2 x + logit(p)`. A
    device that has other priors moves `b` with plain fine-tuning, and stays with the offset, up to sampling noise."""
    generator = torch.Generator().manual_seed(0)
    p_ref, p_local, count = 0.3, 0.8, 20_000
    labels = (torch.rand(2 * count, generator=generator) < p_local).double()
    x = torch.randn(2 * count, generator=generator).double() + 2 * labels - 1
    users = torch.arange(2).repeat_interleave(count)
    rows = SimpleNamespace(tensors={"x": x, "labels": labels}, users=users)
    reference = torch.logit(torch.tensor(p_ref)).item()
    shift = torch.logit(torch.tensor(p_local)).item() - reference
    probe = SimpleNamespace(tensors={"x": torch.zeros(1).double(), "labels": torch.ones(1)}, users=users[:1])
    found = {}
    for method in ("none", "offset"):
        model = Line(2.0, reference).double()
        tuner = tuner_of(model, correction=Correction(method=method, global_ctr=p_ref), device_steps=300)
        found[method] = tuner.fit(rows, predict={"probe": probe}).logits["probe"].item()
    assert found["offset"] == pytest.approx(reference, abs=0.06)
    assert found["none"] == pytest.approx(reference + shift, abs=0.06) and shift > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_labels_in_half_precision_keep_their_mean(dtype):
    """Corrected labels are single precision, and the loss does not round them to that of the logits."""
    from trainers.device_cloud.on_device_training import per_sample_loss

    labels = Correction(method="scale", global_ctr=0.3).targets(
        torch.tensor([1, 1, 0], dtype=dtype), torch.zeros(3, dtype=torch.long)
    )[0]
    assert labels.dtype == torch.float32 and labels.mean().item() == pytest.approx(0.3, abs=1e-7)
    logits = torch.tensor([0.5, -1.0, 2.0], dtype=dtype)
    expected = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
    torch.testing.assert_close(per_sample_loss(logits, labels), expected)
