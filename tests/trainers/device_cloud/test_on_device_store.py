"""A store of users is gone on with by the same run, adapters included, and refused to any other."""

import copy

import pytest
import torch
from peft import LoraConfig

from tests.trainers.device_cloud.tiny_clicks import tiny_model, tiny_rows
from trainers.device_cloud import on_device as module
from trainers.device_cloud.on_device import OnDeviceArguments, OnDeviceFineTuner


COUNTS = [4, 9, 1, 6]


def tuner_of(model=None, *, sample_loss=None, lora=None, **options):
    options = {"device_learning_rate": 0.7, "device_steps": 3, "min_samples": 3} | options
    args = OnDeviceArguments(**options)
    return OnDeviceFineTuner(tiny_model() if model is None else model, args, sample_loss=sample_loss, lora=lora)


def test_a_run_with_adapters_goes_on_in_another_process(tmp_path, monkeypatch):
    """Their start depends on the seed of the arguments, and not on who drew random numbers before."""
    rows = tiny_rows(COUNTS)
    first = tuner_of(trainable="lora", max_chunk_bytes=1)
    whole = first.fit(rows, predict={"again": rows}, store=tmp_path)
    (tmp_path / "round-00000001" / "logits.safetensors").unlink()
    torch.manual_seed(5)
    model = tiny_model()
    torch.rand(7)
    before = torch.get_rng_state()
    second = tuner_of(model, trainable="lora", max_chunk_bytes=1)
    assert torch.equal(torch.get_rng_state(), before)
    tuned, train = [], module.train_users

    def counted(*args, **kwargs):
        tuned.append(0)
        return train(*args, **kwargs)

    monkeypatch.setattr(module, "train_users", counted)
    again = second.fit(rows, predict={"again": rows}, store=tmp_path)
    assert len(tuned) == 1, "the damaged chunk alone"
    assert torch.equal(again.logits["again"], whole.logits["again"])
    other = tuner_of(trainable="lora", device_seed=1)
    assert any(not torch.equal(other._base[name], first._base[name]) for name in first.names)


def square(logits, labels):
    """A loss."""
    return (logits.sigmoid() - labels).square()


def with_a_buffer(value):
    model = tiny_model()
    model.register_buffer("level", torch.tensor(value))
    return model


def renamed(rows):
    tensors = dict(rows.tensors)
    tensors["user"], tensors["item"] = tensors["item"], tensors["user"]
    return type(rows)(tensors={name: tensors[name] for name in ("item", "user", "labels")}, users=rows.users)


ROWS, OTHER = tiny_rows(COUNTS), tiny_rows(COUNTS, seed=3)
CHANGES = {
    "the loss": (lambda: tuner_of(sample_loss=square), {}, "sample_loss"),
    "a buffer": (lambda: tuner_of(with_a_buffer(1.0)), {}, "model"),
    "the name of what is predicted": (tuner_of, {"predict": {"later": OTHER}}, "data"),
    "what rows are for": (tuner_of, {"validation": OTHER, "predict": {}}, "data"),
    "parameters that are kept": (tuner_of, {"keep_parameters": False}, "keep_parameters"),
    "the steps": (lambda: tuner_of(device_steps=4), {}, "arguments"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_what_is_stored_is_compared(tmp_path, change):
    tuner_of().fit(ROWS, predict={"test": OTHER}, store=tmp_path)
    other, options, differs = CHANGES[change]
    options = {"predict": {"test": OTHER}} | options
    with pytest.raises(ValueError, match=rf"another model or other arguments \(its {differs} differ\)"):
        other().fit(ROWS, store=tmp_path, **options)
    tuner_of().fit(ROWS, predict={"test": OTHER}, store=tmp_path)


def test_adapters_of_another_shape_are_another_run(tmp_path):
    wanted = LoraConfig(r=2, lora_alpha=4, target_modules=["hidden"])
    given = copy.deepcopy(wanted)
    tuner_of(trainable="lora", lora=wanted).fit(ROWS, store=tmp_path)
    tuner_of(trainable="lora", lora=given).fit(ROWS, store=tmp_path)
    with pytest.raises(ValueError, match=r"its lora differ"):
        tuner_of(trainable="lora", lora=LoraConfig(r=2, lora_alpha=8, target_modules=["hidden"])).fit(
            ROWS, store=tmp_path
        )


def test_columns_that_changed_their_names_are_other_data(tmp_path):
    tuner_of().fit(ROWS, store=tmp_path)
    with pytest.raises(ValueError, match="its data differ"):
        tuner = tuner_of()
        job = module._Job.__new__(module._Job)
        job.rows, job.validation, job.predict, job.chunks = renamed(ROWS), None, {}, []
        tuner._open(tmp_path, job, True)


@pytest.mark.parametrize("role", ["rows", "validation", "predict"])
def test_no_rows_at_all_are_refused(role):
    empty = type(ROWS)(tensors={name: value[:0] for name, value in ROWS.tensors.items()}, users=ROWS.users[:0])
    rows = empty if role == "rows" else ROWS
    options = {} if role == "rows" else {role: {"later": empty} if role == "predict" else empty}
    with pytest.raises(ValueError, match="has no rows: leave it out"):
        tuner_of().fit(rows, **options)
