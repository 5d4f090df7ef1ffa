"""Methods of all classes on one task: the same interface, bytes by hand, budgets before anything is sent."""

import gc

import pytest
import torch

from tests.trainers.device_cloud.tiny_collaboration import CUT, tiny_task
from trainers.device_cloud import DeviceBudget, DeviceBudgetError
from trainers.device_cloud.collaboration_arms import KINDS, DcCclMethod
from trainers.device_cloud.collaboration_distillation import UNLABELLED, ConsensusTrainer, PublicDistillation
from trainers.device_cloud.collaboration_entries import CLASSES
from trainers.device_cloud.collaboration_split import SplitInference
from trainers.device_cloud.collaboration_task import (
    CollaborationMethod,
    add_to_meter,
    as_json,
    pixels_of,
    serve_through,
    wire_of,
)
from trainers.device_cloud.dc_ccl_arms import ARMS
from trainers.device_cloud.dc_ccl_data import logits_of
from trainers.device_cloud.dc_ccl_rounds import run_dc_ccl
from trainers.federated.core import WireMeter, pack


METHODS = [
    DcCclMethod(),
    DcCclMethod(arm="fedavg_small"),
    DcCclMethod(arm="cloud_only"),
    DcCclMethod(arm="central"),
    DcCclMethod(arm="device_only"),
    PublicDistillation(exchanges=2),
    PublicDistillation(exchanges=1, public="cloud"),
    SplitInference(cut=CUT),
    SplitInference(cut=CUT, learn=True),
]


@pytest.fixture(autouse=True, scope="module")
def small_collections():
    """Every Trainer run ends in a full collection, of which the libraries would be most."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_serves_every_test_image(method, tmp_path):
    assert isinstance(method, CollaborationMethod) and method.kind in (*CLASSES, None)
    task, meter = tiny_task(tmp_path, rounds=1), WireMeter()
    served = method.train(task, meter, None)
    assert served.logits.shape == (40, 4) and torch.isfinite(served.logits).all()
    found = as_json(served, meter, task)
    assert 0 <= found["served_accuracy"] <= 1
    assert (found["device_accuracy"] is None) == (method.name in ("central", "split_inference", "split_learning"))
    assert (found["device_parameters"] is None) == (method.name == "central")
    totals = meter.totals()
    assert found["bytes_up"] + 40 * found["request_bytes_up"] == pytest.approx(totals["up"])
    assert found["bytes_down"] + 40 * found["request_bytes_down"] == pytest.approx(totals["down"])
    assert (found["cloud_calls_per_request"] == 0) == (method.name in ("fedavg_small", "device_only"))
    share = sum(labels == 3 for labels in task.data.test.labels.tolist()) / 40
    of_both = (1 - share) * found["served_accuracy_cloud_classes"] + share * found["served_accuracy_device_classes"]
    assert found["served_accuracy"] == pytest.approx(of_both)


def test_classes_of_dc_ccl_s_arms_are_all_named():
    assert set(KINDS) == set(ARMS) and {kind for kind in KINDS.values() if kind} == set(CLASSES)
    with pytest.raises(ValueError, match="arm 'fedprox' is not known. Choose one of dc_ccl"):
        DcCclMethod(arm="fedprox")


def test_dc_ccl_is_its_own_run_and_costs_its_package(tmp_path):
    task, meter = tiny_task(tmp_path / "a"), WireMeter()
    served = DcCclMethod().train(task, meter, DeviceBudget(max_parameters=10**6))
    other = tiny_task(tmp_path / "b")
    run = run_dc_ccl(other.model(), other.plan, other.data, other.args, trained=True)
    assert torch.allclose(served.logits, logits_of(run.model, other.data.test, "serve"), atol=1e-5)
    assert served.accuracy(other.data.test.labels, device=True) == run.history[-1]["device"]
    assert served.cost.parameters == task.model().device_package().num_parameters()
    wire = wire_of(meter, 40)
    assert (wire["bytes_up"], wire["bytes_down"]) == (run.history[-1]["bytes_up"], run.history[-1]["bytes_down"])
    image, logits = {"pixel_values": torch.zeros(1, 8, 8)}, {"logits": torch.zeros(4)}
    assert (wire["request_bytes_up"], wire["request_bytes_down"]) == (len(pack(image)), len(pack(logits)))


def test_public_distillation_sends_images_once_and_logits_at_each_exchange(tmp_path):
    task, meter = tiny_task(tmp_path), WireMeter()
    PublicDistillation(exchanges=2).train(task, meter, None)
    sent = meter.by_purpose()
    assert sent["public images"] == {"up": 0, "down": len(pack({"pixel_values": pixels_of(task.unlabelled)}))}
    logits = len(pack({"logits": torch.zeros(20, 4)}))
    assert sent["public logits"] == {"up": 2 * logits, "down": 2 * logits}
    package = task.model().device_package()
    del package.control_model
    assert sent["small model"] == {"up": 0, "down": len(pack(package.state_dict()))}
    assert set(sent) == {"public images", "public logits", "small model", "serving"}
    task = tiny_task(tmp_path)
    object.__setattr__(task, "unlabelled", None)
    with pytest.raises(ValueError, match="no 'unlabelled' images"):
        PublicDistillation().train(task, WireMeter(), None)


def test_a_consensus_loss_by_hand(tmp_path):
    task = tiny_task(tmp_path)
    model = task.model().eval()
    images = pixels_of(task.data.test)[:4]
    labels = torch.tensor([1, UNLABELLED, 2, UNLABELLED])
    teacher = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    trainer = ConsensusTrainer(model, task.args, branch="cloud")
    batch = {"pixel_values": images, "labels": labels, "teacher_logits": teacher}
    loss = trainer.compute_loss(model, batch).detach().double()
    own, wanted = (
        model(images, branch="cloud").logits.detach().double().log_softmax(-1),
        teacher.double().log_softmax(-1),
    )
    entropy = -(own[0, 1] + own[2, 2]) / 2
    divergence = (wanted.exp() * (wanted - own)).sum(-1)[[1, 3]].mean()
    assert float(loss) == pytest.approx(float(entropy + divergence), rel=1e-4)
    alone = trainer.compute_loss(model, batch | {"labels": torch.full((4,), UNLABELLED)}).detach().double()
    assert float(alone) == pytest.approx(float((wanted.exp() * (wanted - own)).sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[5]], ids=lambda method: method.name)
def test_what_does_not_fit_is_refused_before_anything_is_sent(method, tmp_path):
    meter = WireMeter()
    with pytest.raises(DeviceBudgetError):
        method.train(tiny_task(tmp_path), meter, DeviceBudget(max_parameters=10))
    assert meter.totals() == {"up": 0, "down": 0} and not (tmp_path / "rounds").exists()


def test_requests_go_up_and_answers_come_down_one_by_one():
    meter = WireMeter()
    rows = torch.arange(6.0).view(3, 2)
    served = serve_through(meter, rows, lambda x: 2 * x, what="rows", batch_size=2)
    assert torch.equal(served, 2 * rows)
    assert meter.totals() == {"up": 3 * len(pack({"rows": rows[0]})), "down": 3 * len(pack({"logits": rows[0]}))}


def test_meters_add_up():
    one, other = WireMeter(), WireMeter()
    for meter in (one, other, other):
        meter.send({"x": torch.zeros(2)}, direction="up", round=1, what="same")
    other.send({"x": torch.zeros(2)}, direction="down", what="another")
    size = one.totals()["up"]
    add_to_meter(one, other)
    assert one.by_purpose() == {"same": {"up": 3 * size, "down": 0}, "another": {"up": 0, "down": size}}
