"""The numbers of a report by hand, their place in `results.json`, and the figure."""

import math

import numpy as np
import pytest

from trainers.device_cloud import DeviceArm, DeviceCloudReport, DeviceCost
from trainers.report import Data, Model, Results, read_results, write_results


CLOUD = {user: 0.5 for user in range(20)}
OURS = {user: 0.5 + (user - 4) / 100 for user in range(20)}  # 4 lose, one stays, 15 gain


def report(*, shift=0.0, cloud_wire=None, **changes):
    ours = DeviceArm(
        quality={user: value + shift for user, value in OURS.items()},
        wire={"up": 200, "down": 4000},
        cost=DeviceCost(parameters=10, bytes=40, peak_bytes=100, flops=7),
        device_seconds=0.25,
    )
    return DeviceCloudReport(arms={"ours": ours, "cloud": DeviceArm(quality=CLOUD, wire=cloud_wire)}, **changes)


def test_numbers_by_hand():
    numbers = report(cold_users=frozenset({0, 1}), quality_name="auc").numbers()
    assert numbers["auc_of_users"]["ours"] == pytest.approx(np.mean(list(OURS.values())))
    assert numbers["auc_worst_decile"]["ours"] == pytest.approx((0.46 + 0.47) / 2)
    assert numbers["auc_cold_users"]["ours"] == pytest.approx(0.465)
    assert numbers["harm_rate"] == {"ours": 4 / 20}
    assert numbers["bytes_up_per_user"] == {"ours": 10}, "nobody has counted the cloud's"
    assert numbers["bytes_down_per_user"]["ours"] == 200
    assert numbers["device_peak_bytes"] == {"ours": 100} and numbers["device_flops"] == {"ours": 7}
    assert numbers["device_seconds_per_user"] == {"ours": 0.25} and "cloud_seconds" not in numbers


def test_users_without_a_value_do_not_count():
    arm = DeviceArm(quality=OURS | {20: math.nan}, wire={"up": 21, "down": 0})
    with_nan = DeviceCloudReport(arms={"ours": arm, "cloud": DeviceArm(quality=CLOUD)})
    numbers, before = with_nan.numbers(), report().numbers()
    assert numbers["accuracy_of_users"] == before["accuracy_of_users"] and numbers["harm_rate"] == before["harm_rate"]
    assert numbers["bytes_up_per_user"]["ours"] == 1, "bytes are of all users, with a value or without"


def test_where_lower_is_better_harm_is_more_of_it():
    numbers = report(higher_is_better=False, quality_name="loss").numbers()
    assert numbers["harm_rate"]["ours"] == 15 / 20
    assert numbers["loss_worst_decile"]["ours"] == pytest.approx((0.65 + 0.64) / 2)


def test_seeds_give_spreads_and_verdicts():
    nothing = {"up": 0, "down": 0}
    metrics = DeviceCloudReport.metrics([report(shift=0.01 * seed, cloud_wire=nothing) for seed in range(3)])
    quality = metrics["accuracy_of_users"]
    assert quality.n == 3 and quality.spread == pytest.approx(0.01) and quality.higher_is_better
    assert quality.baseline["cloud"].verdict == "holds" and metrics["harm_rate"].baseline == {}
    assert metrics["bytes_down_per_user"].baseline["cloud"].verdict == "fails"
    assert metrics["device_bytes"].unit == "bytes" and metrics["device_bytes"].higher_is_better is False
    alone = DeviceCloudReport.metrics([report()])["accuracy_of_users"]
    assert alone.spread is None and alone.baseline["cloud"].verdict == "null"


def test_what_a_seed_lacks_is_left_out():
    partial = report()
    bare = DeviceCloudReport(arms={"ours": DeviceArm(quality=OURS), "cloud": DeviceArm(quality=CLOUD)})
    metrics = DeviceCloudReport.metrics([partial, bare])
    assert "device_seconds_per_user" not in metrics and "accuracy_of_users" in metrics


def test_metrics_fit_results_json(tmp_path):
    results = Results(
        method="device_cloud",
        title="A run",
        preset="demo",
        seeds=[0],
        command="here",
        device="cpu",
        versions={},
        wall_seconds=1.0,
        metrics=DeviceCloudReport.metrics([report()]),
        evidence={},
        data=Data(name="x", fingerprint="0", license="mit", language=["en"]),
        model=Model(parameters_total=1, parameters_active=1, parameters_non_embedding=1),
    )
    write_results(tmp_path, results)
    assert read_results(tmp_path).metrics["harm_rate"].value == 0.2


def test_the_figure_is_the_same_twice(tmp_path):
    first = report().figure(tmp_path / "a" / "one.png").read_bytes()
    assert report().figure(tmp_path / "two.png").read_bytes() == first and first.startswith(b"\x89PNG")
    lone = DeviceCloudReport(arms={"cloud": DeviceArm(quality=CLOUD)})
    assert lone.figure(tmp_path / "three.png").exists()


def test_what_cannot_be_reported_is_said(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        DeviceCloudReport(arms={})
    with pytest.raises(ValueError, match="'ours' has no user"):
        DeviceCloudReport(arms={"ours": DeviceArm(quality={1: math.nan})})
    alone = DeviceCloudReport(arms={"ours": DeviceArm(quality=OURS)})
    assert "harm_rate" not in alone.numbers()
    with pytest.raises(ValueError, match="no arm 'cloud'"):
        alone.figure(tmp_path / "x.png")
