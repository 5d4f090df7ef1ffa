import errno
import json
import math
import os
import statistics

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from trainers import figures, report
from trainers.report import (
    Data,
    FigureFile,
    Metric,
    Model,
    Results,
    ResultsError,
    Sample,
    collect_versions,
    device_name,
    read_results,
    summarise,
    verdict,
    write_results,
)


def make_results(**changes) -> Results:
    ours = summarise([1.81, 1.83, 1.80], unit="bits/character", higher_is_better=False)
    dense = summarise([1.95, 1.99, 1.93], unit="bits/character", higher_is_better=False)
    dense.verdict = verdict(ours.values, dense.values, False)
    ours.baseline["dense"] = dense
    fields = {
        "method": "sigma_moe",
        "title": "Sigma-MoE demo",
        "preset": "demo",
        "seeds": [0, 1, 2],
        "command": "python -m trainers.recipes.pretrain_sigma_moe",
        "device": "a CPU, 2 threads",
        "versions": collect_versions(),
        "wall_seconds": 600.5,
        "metrics": {"bits_per_character": ours, "starved_experts": Metric(value=0)},
        "evidence": {"tokens": 1000, "learning_rates": [1e-3, 3e-3], "nested": {"a": None, "b": [True, "x"]}},
        "data": Data(name="text", fingerprint="sha256:0", license="PSF-2.0", language=["en"]),
        "model": Model(parameters_total=10, parameters_active=2, parameters_non_embedding=8),
        "figures": [FigureFile(path="figures/a.png", caption="a")],
        "samples": [Sample(prompt="def", completion=" f():\n\tpass\u2028")],
    }
    return Results(**(fields | changes))


# -- statistics -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=10))
def test_summarise(values):
    metric = summarise(values, unit="s", higher_is_better=False)
    assert metric.value == pytest.approx(statistics.fmean(values))
    assert metric.n == len(values) and metric.values == values
    assert metric.spread is None if len(values) == 1 else metric.spread == pytest.approx(statistics.stdev(values))


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_summarise_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="`values`"):
        summarise(values)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 29, 100])
def test_t_quantile_is_that_of_scipy(freedom):
    assert report._t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=3, max_size=8),
    st.booleans(),
)
def test_verdict_is_the_paired_t_test(pairs, higher_is_better):
    ours, baseline = zip(*pairs)
    gains = [(a - b) * (1 if higher_is_better else -1) for a, b in pairs]
    assume(statistics.stdev(gains) > 1e-6)
    p = stats.ttest_1samp(gains, 0).pvalue
    assume(abs(p - 0.05) > 1e-9)
    expected = "null" if p > 0.05 else "holds" if statistics.fmean(gains) > 0 else "fails"
    assert verdict(ours, baseline, higher_is_better) == expected


def test_verdict_by_hand():
    assert verdict([1, 2, 3], [2, 3, 4], higher_is_better=False) == "holds"
    assert verdict([1, 2, 3], [2, 3, 4], higher_is_better=True) == "fails"
    assert verdict([1, 2, 3], [1, 2, 3], higher_is_better=True) == "null"
    assert verdict([1, 9, 3], [2, 3, 4], higher_is_better=True) == "null"
    assert verdict([100, 100], [0, 0], higher_is_better=True) == "null"  # two pairs carry nothing


@pytest.mark.parametrize("ours, baseline", [([], []), ([1], [1, 2]), ([1, 2, math.nan], [1, 2, 3])])
def test_verdict_refuses_what_is_not_paired(ours, baseline):
    with pytest.raises(ValueError):
        verdict(ours, baseline, True)


# -- where and how it ran ---------------------------------------------------------------------------------------------


def test_versions_and_device(monkeypatch):
    versions = collect_versions()
    assert versions["python"] and versions["torch"] and versions["transformers"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    name = device_name()
    assert name
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert device_name() == f"8 x {name}"


# -- the file ---------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    results = make_results()
    path = write_results(tmp_path, results)
    assert read_results(tmp_path) == results
    before = path.read_bytes()
    write_results(tmp_path, read_results(tmp_path))
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]


def test_a_token_in_any_text_is_redacted(tmp_path):
    token = "hf_" + "A1b2" * 9
    path = write_results(tmp_path, make_results(title=f"x {token}", evidence={token: [token]}))
    assert token not in path.read_text()
    assert read_results(tmp_path).title == "x REDACTED"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_word_for_is_refused(tmp_path, bad):
    write_results(tmp_path, make_results())
    before = (tmp_path / "results.json").read_bytes()
    for changes in (
        {"wall_seconds": bad},
        {"metrics": {"loss": Metric(value=bad)}},
        {"evidence": {"grid": [{"rate": bad}]}},
    ):
        with pytest.raises(ResultsError, match=r"wall_seconds|metrics\.loss\.value|evidence\.grid\[0\]\.rate"):
            write_results(tmp_path, make_results(**changes))
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, code):
    path = write_results(tmp_path, make_results())
    before = path.read_bytes()

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(report.os, "fsync", fail)
    with pytest.raises(OSError, match="earlier version is untouched") as error:
        write_results(tmp_path, make_results(title="new"))
    assert error.value.errno == code and str(path) in str(error.value)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="Cannot write results.json"):
        write_results(tmp_path / "nowhere", make_results())


def set_field(payload, where, value):
    *parents, last = where
    for key in parents:
        payload = payload[key]
    if value is KeyError:
        del payload[last]
    else:
        payload[last] = value


@pytest.mark.parametrize(
    "where, value, message",
    [
        (["method"], KeyError, "missing field `method`"),
        (["data", "license"], KeyError, "missing field `data.license`"),
        (["extra"], 1, "unknown field `extra`"),
        (["metrics", "bits_per_character", "mean"], 1, "unknown field `metrics.bits_per_character.mean`"),
        (["metrics", "bits_per_character", "value"], "1.8", "`metrics.bits_per_character.value` must be float"),
        (["metrics", "starved_experts", "n"], 0, "`metrics.starved_experts.n` must be at least 1"),
        (["metrics", "starved_experts", "spread"], -1.0, "must not be negative"),
        (["metrics", "starved_experts", "verdict"], "wins", "must be one of"),
        (["metrics", "starved_experts", "verdict"], "holds", "carry no verdict"),
        (["metrics", "bits_per_character", "value"], 1.0, "does not match"),
        (["metrics", "bits_per_character", "baseline", "dense", "baseline"], {"x": {"value": 1}}, "must be empty"),
        (["seeds"], ["0"], r"`seeds\[0\]` must be int, got str"),
        (["seeds"], [], "`seeds` is empty"),
        (["seeds"], [True], r"`seeds\[0\]` must be int, got bool"),
        (["method"], "../x", "`method` must be a lower-case module name"),
        (["figures", 0, "path"], "/tmp/a.png", "relative to the run folder"),
        (["figures", 0, "path"], "../a.png", "relative to the run folder"),
        (["model"], [], "`model` must be an object"),
        (["metrics"], [], "`metrics` must be dict"),
    ],
)
def test_a_defect_is_named_with_field_and_file(tmp_path, where, value, message):
    path = write_results(tmp_path, make_results())
    payload = json.loads(path.read_text())
    set_field(payload, where, value)
    path.write_text(json.dumps(payload))
    with pytest.raises(ResultsError, match=message) as error:
        read_results(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"wall_seconds": NaN}', "\x00"])
def test_a_malformed_file_is_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ResultsError, match="results.json"):
        read_results(tmp_path)


def test_an_absent_file_names_the_remedy(tmp_path):
    with pytest.raises(ResultsError, match="does not exist.*run the recipe again"):
        read_results(tmp_path)


def test_fields_with_defaults_may_be_absent(tmp_path):
    path = write_results(tmp_path, make_results(figures=[], samples=[]))
    payload = json.loads(path.read_text())
    del payload["figures"], payload["samples"], payload["data"]["hub_id"]
    path.write_text(json.dumps(payload))
    assert read_results(tmp_path) == make_results(figures=[], samples=[])


# -- figures ----------------------------------------------------------------------------------------------------------


def balance_rows(layers=3, steps=20, top=0.5):
    return [
        {"step": step, "layer": layer, "max_deviation": top / (layer + 1), "min_deviation": -0.5, "entropy": 1.0}
        for step in range(steps)
        for layer in range(layers)
    ]


FIGURES = {
    "balance": lambda path: figures.balance_figure(balance_rows(), path),
    "balance_beside": lambda path: figures.balance_figure(balance_rows(), path, baseline=balance_rows(top=30)),
    "one_step_one_layer": lambda path: figures.balance_figure(balance_rows(1, 1), path),
    "loss": lambda path: figures.loss_figure({"ours": ([0, 10], [3.0, 2.0]), "dense": ([0, 10], [3.0, 2.5])}, path),
    "load": lambda path: figures.expert_load_figure([[0.5, 0.5, 0.0, 0.0], [0.25] * 4], path),
    "comparison": lambda path: figures.comparison_figure(
        {"ours": [1.0, 1.1, 0.9], "5-gram": [2.0]}, path, y_label="bits", higher_is_better=False
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_written_and_reproducible(tmp_path, name):
    path = FIGURES[name](tmp_path / "figures" / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert b"Matplotlib" not in path.read_bytes()
    assert FIGURES[name](tmp_path / "b.png").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: figures.balance_figure([], path),
        lambda path: figures.loss_figure({}, path),
        lambda path: figures.loss_figure({"a": ([1], [1, 2])}, path),
        lambda path: figures.expert_load_figure([], path),
        lambda path: figures.expert_load_figure([[1.0], [0.5, 0.5]], path),
        lambda path: figures.comparison_figure({"a": []}, path, y_label="x", higher_is_better=True),
    ],
)
def test_figures_refuse_what_cannot_be_drawn(tmp_path, draw):
    with pytest.raises(ValueError):
        draw(tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_step_repeated_after_resume_counts_once():
    rows = balance_rows(1, 5)
    again = [{**row, "max_deviation": 9.0} for row in rows[3:]]
    curve = figures._by_layer(rows + again)[0]
    assert curve["step"].tolist() == [0, 1, 2, 3, 4]
    assert curve["max_deviation"].tolist() == [0.5, 0.5, 0.5, 9.0, 9.0]


def test_smoothing_keeps_constants_and_length():
    smooth = figures._smooth(figures.np.full(300, 2.0))
    assert smooth.shape == (300,) and figures.np.allclose(smooth, 2.0)


def test_figures_leave_the_style_of_the_user_alone(tmp_path):
    before = dict(figures.matplotlib.rcParams)
    FIGURES["loss"](tmp_path / "a.png")
    assert dict(figures.matplotlib.rcParams) == before
