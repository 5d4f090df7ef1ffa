"""The whole loop: averages by hand, kills, corrupt uploads, budgets, bytes, and every baseline."""

import copy
import dataclasses
import gc

import pytest
import torch

from hf_models.dc_ccl import DcCclForImageClassification
from tests.hf_models.dc_ccl.tiny_dc_ccl import tiny_lm
from tests.trainers.device_cloud.tiny_device_cloud import (
    arguments,
    rows,
    tiny_data,
    tiny_model,
    tiny_plan,
    tiny_text,
)
from trainers.device_cloud import DeviceBudget, DeviceBudgetError, DeviceCloudReport
from trainers.device_cloud import dc_ccl_arms as arms_module
from trainers.device_cloud.dc_ccl_arms import ARMS, Setting
from trainers.device_cloud.dc_ccl_data import DcCclData, average_states, fingerprint_of, logits_of
from trainers.device_cloud.dc_ccl_plan import DcCclPlan, Fit
from trainers.device_cloud.dc_ccl_rounds import run_dc_ccl, train_cloud
from trainers.federated.core import RoundStore, UploadError, pack, unpack


@pytest.fixture(autouse=True, scope="module")
def small_collections():
    """Every Trainer run ends in a full collection, of which the libraries would be most."""
    gc.freeze()
    yield
    gc.unfreeze()


def without_seconds(history):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


def setting_of(folder, device):
    data = dataclasses.replace(tiny_data(), device=device)
    return Setting(model=tiny_model(), plan=tiny_plan(), data=data, args=arguments(folder))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the average


def test_an_average_takes_statistics_and_leaves_counters():
    one = {"w": torch.tensor([1.0, 2.0]), "running_var": torch.tensor([4.0]), "num_batches_tracked": torch.tensor(7)}
    other = {"w": torch.tensor([3.0, 6.0]), "running_var": torch.tensor([8.0]), "num_batches_tracked": torch.tensor(9)}
    mean = average_states([one, other], (0.25, 0.75))
    assert mean["w"].tolist() == [2.5, 5.0] and mean["running_var"].tolist() == [7.0]
    assert mean["num_batches_tracked"].item() == 7
    with pytest.raises(ValueError, match="add up to 1"):
        average_states([one, other], (0.5, 0.6))
    with pytest.raises(ValueError, match="different keys"):
        average_states([one, {"w": one["w"]}], (0.5, 0.5))


@pytest.mark.parametrize("arm", ["dc_ccl", "distr_true", "fedavg_small"])
def test_a_round_is_the_weighted_mean_of_two_trainings(arm, tmp_path, monkeypatch):
    plan = tiny_plan(head=None, weights=(0.3, 0.7))
    setting = Setting(model=tiny_model(), plan=plan, data=tiny_data(), args=arguments(tmp_path))
    side = ARMS[arm](setting)
    side.attach()
    trained, fit = [], Setting.fit

    def spy(self, model, phase, *args, **options):
        fit(self, model, phase, *args, **options)
        assert phase == "co"
        trained.append((model, model.co_state()))

    monkeypatch.setattr(Setting, "fit", spy)
    start = setting.model.co_state()
    side.round(1)
    (device, theirs), (cloud, ours) = trained
    assert device is not cloud and cloud is setting.model
    assert not equal(theirs, start) and not equal(ours, start) and not equal(ours, theirs)
    for name, tensor in setting.model.co_state().items():
        assert torch.equal(tensor, 0.3 * ours[name] + 0.7 * theirs[name])
    assert equal(side.device.co_state(), setting.model.co_state())


def test_the_head_is_tuned_on_the_device_with_public_and_own_images(tmp_path, monkeypatch):
    data = tiny_data()
    setting = Setting(model=tiny_model(), plan=tiny_plan(), data=data, args=arguments(tmp_path))
    side = ARMS["dc_ccl"](setting)
    side.attach()
    calls, fit = [], Setting.fit

    def spy(self, model, phase, how, dataset, **options):
        calls.append((phase, model is setting.model, len(dataset)))
        fit(self, model, phase, how, dataset, **options)

    monkeypatch.setattr(Setting, "fit", spy)
    side.round(1)
    assert calls == [("co", False, 24), ("co", True, 48), ("head", False, 8 + 6)]
    assert set(setting.meter.by_purpose()) == {"co-submodel", "head"}
    assert equal(side.device.co_state(), setting.model.co_state())


def test_only_the_co_submodel_moves(tmp_path):
    model = tiny_model()
    run_dc_ccl(model, tiny_plan(rounds=1), tiny_data(), arguments(tmp_path / "a"))
    frozen = copy.deepcopy(model.state_dict())
    run_dc_ccl(model, tiny_plan(rounds=1), tiny_data(), arguments(tmp_path / "b"), trained=True)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, frozen[name])}
    assert moved and all(name.startswith("co_submodel.") for name in moved)


# --- kills


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "arm", ["dc_ccl", *(pytest.param(arm, marks=pytest.mark.slow) for arm in ARMS if arm != "dc_ccl")]
)
def test_a_run_killed_between_rounds_ends_where_it_would_have(arm, tmp_path, monkeypatch):
    plan, data = tiny_plan(), tiny_data()
    whole = run_dc_ccl(tiny_model(), plan, data, arguments(tmp_path / "whole"), arm=arm)
    commit = RoundStore.commit

    def killed(self, round, *args, **options):
        if round == 2:
            raise Killed
        return commit(self, round, *args, **options)

    if ARMS[arm].changes:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(RoundStore, "commit", killed)
            run_dc_ccl(tiny_model(), plan, data, arguments(tmp_path / "cut"), arm=arm)
    else:
        run_dc_ccl(tiny_model(), plan, data, arguments(tmp_path / "cut"), arm=arm)
    torch.manual_seed(99)  # another process draws other numbers
    again = run_dc_ccl(tiny_model(seed=5), plan, data, arguments(tmp_path / "cut"), arm=arm)
    assert equal(again.model.state_dict(), whole.model.state_dict())
    assert without_seconds(again.history) == without_seconds(whole.history)
    assert again.meter.by_round() == whole.meter.by_round()
    branch = ARMS[arm].served
    assert torch.equal(logits_of(again.model, data.test, branch), logits_of(whole.model, data.test, branch))


def test_a_finished_run_is_only_read_and_another_plan_is_refused(tmp_path, monkeypatch):
    plan = tiny_plan()
    first = run_dc_ccl(tiny_model(), plan, tiny_data(), arguments(tmp_path))
    monkeypatch.setattr(Setting, "fit", None)
    again = run_dc_ccl(tiny_model(), plan, tiny_data(), arguments(tmp_path))
    assert again.history == first.history and len(first.history) == 3
    with pytest.raises(ValueError, match="rounds of another plan. Give"):
        run_dc_ccl(tiny_model(), dataclasses.replace(plan, seed=1), tiny_data(), arguments(tmp_path))
    with pytest.raises(ValueError, match="rounds of another arm. Give"):
        run_dc_ccl(tiny_model(), plan, tiny_data(), arguments(tmp_path), arm="fedavg_small")


def test_a_model_that_was_trained_and_one_that_was_loaded_are_the_same(tmp_path):
    plan, data = tiny_plan(rounds=0), tiny_data()
    trained = train_cloud(tiny_model(), plan, data, arguments(tmp_path / "cloud"))
    first = run_dc_ccl(trained, plan, data, arguments(tmp_path / "run"), trained=True)
    again = run_dc_ccl(tiny_model(), plan, data, arguments(tmp_path / "run"), trained=True)
    assert again.history == first.history
    trained.save_pretrained(tmp_path / "saved")
    loaded = DcCclForImageClassification.from_pretrained(tmp_path / "saved")
    assert run_dc_ccl(loaded, plan, data, arguments(tmp_path / "run"), trained=True).history == first.history


def test_other_data_another_model_and_another_budget_are_refused(tmp_path):
    plan = tiny_plan(rounds=0)
    run_dc_ccl(tiny_model(), plan, tiny_data(), arguments(tmp_path), trained=True)
    for name in ("cloud", "device", "test"):
        other = dataclasses.replace(tiny_data(), **{name: rows(24, (0, 3), seed=7)})
        with pytest.raises(ValueError, match="rounds of another data. Give"):
            run_dc_ccl(tiny_model(), plan, other, arguments(tmp_path))
    with pytest.raises(ValueError, match="rounds of another model. Give"):
        run_dc_ccl(tiny_model("vit"), plan, tiny_data(), arguments(tmp_path))
    with pytest.raises(ValueError, match="rounds of another budget. Give"):
        run_dc_ccl(tiny_model(), plan, tiny_data(), arguments(tmp_path), budget=DeviceBudget(max_parameters=10**6))


def test_data_sets_are_told_apart_by_their_labels_where_they_say_no_more():
    data = rows(12, (0, 1))
    listed = [data[index] for index in range(12)]
    noisy = [row | {"pixel_values": torch.rand(1, 8, 8)} for row in listed]
    assert fingerprint_of(listed) == fingerprint_of(noisy) != fingerprint_of(listed[1:])
    assert fingerprint_of(data) != fingerprint_of(rows(12, (0, 1), seed=1)) and fingerprint_of(None) is None
    assert fingerprint_of(data) == fingerprint_of(rows(12, (0, 1)))
    assert set(tiny_data().fingerprints()) == {field.name for field in dataclasses.fields(DcCclData)}


# --- corrupt uploads


def nan(tensors, metadata):
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def shape(tensors, metadata):
    key = next(iter(tensors))
    tensors[key] = tensors[key][:1]


def wrong_round(tensors, metadata):
    metadata["round"] = "1"


def missing(tensors, metadata):
    tensors.pop(next(iter(tensors)))


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [(nan, "NaN"), (shape, "shape"), (wrong_round, "round 1"), (missing, "missing"), (None, "device")],
)
@pytest.mark.parametrize("which", ["co-submodel", "head"])
def test_a_corrupt_upload_is_refused_and_the_cloud_s_model_is_as_before(corrupt, message, which, tmp_path):
    model, sent = tiny_model(), []

    def transport(payload):
        tensors, metadata = unpack(payload)
        sent.append((metadata["round"], len(tensors)))
        is_head = len(tensors) == 2
        if metadata["round"] != "2" or is_head != (which == "head"):
            return payload
        if corrupt is None:
            return payload[: len(payload) // 2]
        corrupt(tensors, metadata)
        return pack(tensors, metadata)

    good = run_dc_ccl(tiny_model(), tiny_plan(rounds=1), tiny_data(), arguments(tmp_path / "good"))
    plan = tiny_plan(rounds=2)
    with pytest.raises(UploadError, match=message):
        run_dc_ccl(model, plan, tiny_data(), arguments(tmp_path / "bad"), transport=transport)
    assert equal(model.state_dict(), good.model.state_dict()), "the state after round 1"
    assert RoundStore(tmp_path / "bad" / "rounds").latest() == 1
    whole = run_dc_ccl(tiny_model(), plan, tiny_data(), arguments(tmp_path / "whole"))
    healed = run_dc_ccl(tiny_model(), plan, tiny_data(), arguments(tmp_path / "bad"))
    assert equal(healed.model.state_dict(), whole.model.state_dict())


# --- budgets, bytes, gaps


def test_a_package_that_does_not_fit_is_refused_before_anything_is_sent(tmp_path):
    model = tiny_model()
    small = DeviceBudget(max_parameters=10)
    with pytest.raises(DeviceBudgetError):
        run_dc_ccl(model, tiny_plan(), tiny_data(), arguments(tmp_path), budget=small)
    assert RoundStore(tmp_path / "rounds").latest() is None
    package = sum(p.numel() for p in model.device_package().parameters())
    fits = DeviceBudget(max_parameters=package)
    run = run_dc_ccl(tiny_model(), tiny_plan(rounds=0), tiny_data(), arguments(tmp_path / "fits"), budget=fits)
    assert run.cost.parameters == package < model.num_parameters()


def test_bytes_are_those_of_what_is_sent(tmp_path):
    model, data = tiny_model(), tiny_data()
    run = run_dc_ccl(model, tiny_plan(), data, arguments(tmp_path))
    by_what = run.meter.by_purpose()
    co, head = model.co_state(), model.head_state()
    assert by_what["package"] == {"up": 0, "down": len(pack(model.device_package().state_dict()))}
    assert by_what["co-submodel"]["down"] == 2 * len(pack(co))
    label = {"round": "1", "num_samples": "24"}
    assert by_what["co-submodel"]["up"] == 2 * len(pack(co, label))
    assert by_what["head"] == {"up": 2 * len(pack(head, label)), "down": 0}
    assert by_what["public rows"]["down"] > 8 * 64 * 4
    assert run.history[-1]["bytes_up"] == run.meter.totals()["up"]
    cloud = sum(tensor.numel() * tensor.element_size() for tensor in model.cloud_submodel.state_dict().values())
    assert run.meter.by_round()[1]["down"] < cloud


def test_the_control_gap_is_in_the_record(tmp_path):
    run = run_dc_ccl(tiny_model(), tiny_plan(rounds=1), tiny_data(), arguments(tmp_path))
    assert set(run.history[0]["control_gap"]) == {"held_out", "device"} and run.history[1]["control_gap"] == {}
    assert all(gap > 0 for gap in run.history[0]["control_gap"].values())


# --- baselines


def test_baselines_send_what_their_names_say(tmp_path):
    data = tiny_data()
    wires = {}
    for arm in ARMS:
        model = tiny_model()
        run = run_dc_ccl(model, tiny_plan(rounds=1), data, arguments(tmp_path / arm), arm=arm)
        wires[arm] = run.meter.by_purpose()
        assert 0 <= run.history[-1]["served"] <= 1
        assert (run.history[-1]["device"] is None) == (arm in ("central", "split_learning"))
    assert wires["device_only"] == {}
    assert set(wires["central"]) == {"raw data"} and wires["central"]["raw data"]["up"] > 24 * 64 * 4
    assert set(wires["cloud_only"]) == {"package"}
    assert wires["fedavg_small"]["package"]["down"] < wires["dc_ccl"]["package"]["down"]
    assert wires["distr_true"]["package"]["down"] > 1.5 * wires["dc_ccl"]["package"]["down"]
    assert set(wires["kd_uplink"]) == {"package", "public rows", "co-submodel"}
    assert wires["kd_uplink"]["co-submodel"]["down"] == 0 < wires["kd_uplink"]["public rows"]["down"]
    assert set(wires["split_learning"]) == {"package", "features"} and wires["split_learning"]["features"]["up"] > 0
    assert all("raw data" not in wires[arm] for arm in ARMS if arm != "central")


@pytest.mark.parametrize("workers", [0, 1])
def test_split_learning_counts_the_rows_of_steps_and_no_others(workers, tmp_path):
    side = Fit(learning_rate=1e-2, max_steps=1, batch_size=36)
    plan = tiny_plan(rounds=1, co_cloud=side, co_device=dataclasses.replace(side, max_steps=0))
    args = arguments(tmp_path, dataloader_num_workers=workers)
    run = run_dc_ccl(tiny_model(), plan, tiny_data(), args, arm="split_learning", trained=True)
    row = 8 * 2 * 2 * 4 + 8  # the stem's map and a label
    sent = run.meter.by_purpose()["features"]["up"]
    assert 4 * row < sent < 20 * row, "one step of 36 rows out of 72, a third of which are the device's"
    assert run.meter.by_round()[1]["up"] == sent


def test_the_teacher_of_kd_uplink_learns_from_public_and_own_rows(tmp_path, monkeypatch):
    calls, fit = [], Setting.fit

    def spy(self, model, phase, how, dataset, **options):
        calls.append((phase, model is self.model, len(dataset), options.get("phase1_loss")))
        fit(self, model, phase, how, dataset, **options)

    monkeypatch.setattr(Setting, "fit", spy)
    plan = tiny_plan(rounds=1, phase1_loss="all")
    run_dc_ccl(tiny_model(), plan, tiny_data(), arguments(tmp_path), arm="kd_uplink", trained=True)
    assert calls == [("co", False, 8 + 24, None), ("head", False, 8 + 6, None), ("teach", True, 48, "all")]


def test_frozen_logits_are_kept_over_rounds_and_change_nothing(tmp_path):
    calls, runs = [], []
    for cache in (True, False):
        model = tiny_model()
        model.cloud_submodel.register_forward_hook(lambda *_: calls.append(1))
        plan = tiny_plan(cache=cache)
        runs.append(run_dc_ccl(model, plan, tiny_data(), arguments(tmp_path / str(cache)), trained=True))
        calls.append("next")
    assert calls.index("next") == 3, "the gap on two sets, and the test set once"
    for name, tensor in runs[0].model.state_dict().items():
        torch.testing.assert_close(tensor, runs[1].model.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)
    for one, other in zip(*(run.history for run in runs)):
        assert one["served"] == other["served"] and one["device"] == other["device"]


def test_a_run_is_an_arm_of_the_report_of_device_and_cloud(tmp_path):
    data = dataclasses.replace(tiny_data(), device_test=rows(20, (3,), seed=4))
    runs = {
        arm: run_dc_ccl(tiny_model(), tiny_plan(rounds=1), data, arguments(tmp_path / arm), arm=arm)
        for arm in ("dc_ccl", "fedavg_small", "cloud_only", "distr_true", "central")
    }
    report = DeviceCloudReport(arms={arm: run.for_report() for arm, run in runs.items()}, reference="cloud_only")
    numbers = report.numbers()
    assert numbers["accuracy_of_users"]["dc_ccl"] == runs["dc_ccl"].history[-1]["user"]
    assert numbers["bytes_up_per_user"]["central"] == runs["central"].meter.totals()["up"]
    sizes = numbers["device_parameters"]
    assert sizes["fedavg_small"] == sizes["cloud_only"] < sizes["dc_ccl"] < sizes["distr_true"]
    assert "central" not in sizes and set(numbers["device_seconds_per_user"]) == {
        "dc_ccl",
        "fedavg_small",
        "distr_true",
    }
    assert numbers["device_peak_bytes"]["dc_ccl"] > numbers["device_bytes"]["dc_ccl"]
    one, many = (ARMS["dc_ccl"](setting_of(tmp_path, rows(count, (0, 3)))).cost() for count in (1, 500))
    assert one == many == runs["dc_ccl"].cost, "of one row, whatever lies beside it in memory"
    again = run_dc_ccl(tiny_model(), tiny_plan(rounds=1), data, arguments(tmp_path / "dc_ccl"))
    assert again.for_report() == runs["dc_ccl"].for_report()


def test_after_a_run_everything_trains_again(tmp_path):
    for arm in ("dc_ccl", "device_only"):
        run = run_dc_ccl(tiny_model(), tiny_plan(rounds=1), tiny_data(), arguments(tmp_path / arm), arm=arm)
        run.model.train()
        assert all(module.training for module in run.model.modules())
        assert all(parameter.requires_grad for parameter in run.model.parameters())
    assert train_cloud(tiny_model(), tiny_plan(), tiny_data(), arguments(tmp_path)).train().co_submodel.training


# --- language models


def test_language_models_go_through_rounds_and_a_killed_run_ends_where_it_would_have(tmp_path, monkeypatch):
    data, plan = tiny_text(), tiny_plan(rounds=2)
    whole = run_dc_ccl(tiny_lm(), plan, data, arguments(tmp_path / "whole"))
    co, head = whole.model.co_state(), whole.model.head_state()
    wire, label = whole.meter.by_purpose(), {"round": "1", "num_samples": "24"}
    assert wire["co-submodel"] == {"up": 2 * len(pack(co, label)), "down": 2 * len(pack(co))}
    assert wire["head"] == {"up": 2 * len(pack(head, label)), "down": 0}
    ties = {"co_submodel.lm_head.weight", "control_model.lm_head.weight"}
    package = {n: t for n, t in whole.model.device_package().state_dict().items() if n not in ties}
    assert wire["package"] == {"up": 0, "down": len(pack(package))}
    assert whole.cost.parameters == whole.model.device_package().num_parameters()
    assert set(whole.history[0]["control_gap"]) == {"held_out", "device"}
    commit = RoundStore.commit

    def killed(self, round, *args, **options):
        if round == 2:
            raise Killed
        return commit(self, round, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RoundStore, "commit", killed)
        run_dc_ccl(tiny_lm(), plan, data, arguments(tmp_path / "cut"))
    again = run_dc_ccl(tiny_lm(), plan, data, arguments(tmp_path / "cut"))
    assert equal(again.model.state_dict(), whole.model.state_dict())
    assert without_seconds(again.history) == without_seconds(whole.history)


def test_a_language_model_learns_a_device_s_text_that_it_is_not_sent(tmp_path):
    side = Fit(learning_rate=1e-2, max_steps=20, batch_size=24)
    plan = tiny_plan(cloud=side, control=side, co_cloud=side, co_device=side, head=side, rounds=2)
    served = {}
    for arm in ("dc_ccl", "cloud_only", "kd_uplink", "central", "device_only"):
        run = run_dc_ccl(tiny_lm(), plan, tiny_text(), arguments(tmp_path / arm), arm=arm)
        served[arm] = run.history[-1]["user"]
        assert ("raw data" in run.meter.by_purpose()) == (arm == "central")
    assert served["dc_ccl"] > served["cloud_only"] + 0.1
    with pytest.raises(ValueError, match="behind its shared encoder"):
        run_dc_ccl(tiny_lm(), plan, tiny_text(), arguments(tmp_path / "split"), arm="split_learning")


def test_split_learning_needs_an_encoder_and_unknown_arms_are_named(tmp_path):
    from hf_models.dc_ccl import DcCclConfig, DcCclForImageClassification

    small = tiny_model().config.base_config.to_dict()
    whole = DcCclForImageClassification(DcCclConfig(cloud_config=small, co_config=small, control_config=small))
    setting = Setting(model=whole, plan=tiny_plan(), data=tiny_data(), args=arguments(tmp_path))
    with pytest.raises(ValueError, match="behind its shared encoder"):
        ARMS["split_learning"](setting)
    with pytest.raises(ValueError, match="arm 'fedprox' is not known. Choose one of dc_ccl"):
        run_dc_ccl(tiny_model(), tiny_plan(), tiny_data(), arguments(tmp_path), arm="fedprox")
    assert arms_module.ARMS is ARMS


# --- plans


def test_a_plan_halves_late_rates_and_seeds_each_run_differently(tmp_path):
    plan = tiny_plan(late_from=9, late_factor=0.5)
    assert [plan.rate_factor(turn) for turn in (1, 8, 9, 10)] == [1.0, 1.0, 0.5, 0.5]
    seeds = {plan.seed_of(phase, turn) for phase in ("co", "head") for turn in range(20)}
    assert len(seeds) == 40 and plan.seed_of("co", 3) == tiny_plan().seed_of("co", 3)
    args = Fit(learning_rate=0.1, max_steps=7, optim="sgd", optim_args="momentum=0.9").arguments(
        arguments(tmp_path), seed=3, rate_factor=0.5
    )
    assert (args.learning_rate, args.max_steps, args.seed, args.optim_args) == (0.05, 7, 3, "momentum=0.9")
    assert plan.both().max_steps == 6 and isinstance(plan, DcCclPlan)
