"""The rule on given times, then two real gloo ranks under Trainer, of which one sleeps."""

import socket
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from tests.forked import start_ranks
from trainers.callbacks.stragglers import StragglerCallback, StragglerJudge
from trainers.reliability.events import read_events


WORLD = 2
HEALTHY, SLEEP = 0.03, 0.2  # seconds a step; the machine of the tests has better things to do than to be punctual
SLOW_FROM = 8  # the first step that is slow


# --- the rule --------------------------------------------------------------------------------------------------------


def judge(samples, **options):
    """`samples[i][rank]` seconds of compute -> (sample, rank, accused) of every verdict."""
    rule = StragglerJudge(**{"threshold": 4.0, "tolerance": 0.05, "warmup": 3, "patience": 2, "decay": 0.9, **options})
    return [(i, v.rank, v.accused) for i, sample in enumerate(samples) for v in rule([{"compute": t} for t in sample])]


def test_a_rank_that_becomes_slow_is_named_after_patience_samples_and_once():
    samples = [[1.0, 1.01, 0.99, 1.0]] * 5 + [[1.0, 1.01, 2.0, 1.0]] * 10
    assert judge(samples) == [(6, 2, True)]


def test_with_two_ranks_too():
    assert judge([[1.0, 1.0]] * 5 + [[1.0, 1.5]] * 4) == [(6, 1, True)]


def test_all_slower_names_nobody():
    assert judge([[1.0, 1.02, 0.98]] * 5 + [[3.0, 3.1, 2.9]] * 10) == []


def test_slowly_slower_together_names_nobody():
    assert judge([[1.0 + 0.1 * i] * 3 for i in range(30)]) == []


def test_one_slow_sample_is_no_straggler():
    assert judge(([[1.0, 1.0, 1.0]] * 5 + [[1.0, 4.0, 1.0]]) * 4) == []


def test_slow_from_the_start_is_noted_not_accused():
    assert judge([[1.0, 2.0, 1.0]] * 20) == [(4, 1, False)]


def test_a_slow_rank_does_not_become_its_own_standard():
    samples = [[1.0, 1.0]] * 4 + [[1.0, 2.0]] * 30 + [[1.0, 1.0]] * 2 + [[1.0, 2.0]] * 2
    assert judge(samples) == [(5, 1, True), (37, 1, True)]


def test_noise_of_all_ranks_widens_the_standard():
    noisy = [[1.0, 0.7, 1.3, 1.0, 0.8, 1.2]] * 6
    assert judge(noisy + [[1.0, 0.7, 1.3, 1.5, 0.8, 1.2]] * 5) == []
    assert judge(noisy + [[1.0, 0.7, 1.3, 9.0, 0.8, 1.2]] * 5) == [(7, 3, True)]


def test_the_phase_with_the_largest_excess_is_named():
    rule = StragglerJudge(threshold=4.0, tolerance=0.05, warmup=1, patience=1, decay=0.9)
    rule([{"data": 0.1, "compute": 5.0}] * 3)
    [verdict] = rule([{"data": 0.1, "compute": 5.0}, {"data": 3.0, "compute": 5.1}, {"data": 0.1, "compute": 5.0}])
    assert (verdict.rank, verdict.phase, verdict.accused) == (1, "data", True)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"every": 0}, "every=0"), ({"patience": 0}, "patience=0"), ({"decay": 1.0}, "decay=1.0")],
)
def test_arguments_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        StragglerCallback(**options)


# --- two ranks -------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Two rows are a micro-batch; the loader fetches one ahead."""

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, 0

    def __len__(self):
        return 256

    def __getitem__(self, index):
        self.calls += 1
        time.sleep(self.seconds(self.calls / 2) / 2)
        ids = torch.arange(8) % 7
        return {"input_ids": ids, "labels": ids}


def run_job(folder, *, data=lambda step: 0.0, forward=lambda step: 0.0, backward=lambda step: 0.0, **options):
    """Train a Sigma-MoE, whose balance loss reduces over ranks inside the forward; sleeps are by optimizer step."""
    torch.manual_seed(0)
    model = SigmaMoeForCausalLM(
        SigmaMoeConfig(
            vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=1, max_position_embeddings=16,
            router_aux_loss_type="global_batch", router_aux_loss_coef=0.1,
        )
    )  # fmt: skip
    steps = {"forward": 0}

    def sleep_in_forward(*_):
        steps["forward"] += 1
        time.sleep(HEALTHY + forward(steps["forward"]))

    def sleep_in_backward(_):
        time.sleep(backward(steps["forward"]))

    model.model.layers[0].register_forward_pre_hook(sleep_in_forward)
    model.model.embed_tokens.weight.register_hook(sleep_in_backward)
    args = TrainingArguments(
        **{
            "output_dir": folder, "max_steps": 16, "per_device_train_batch_size": 2, "logging_steps": 3,
            "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, **options,
        }
    )  # fmt: skip
    callback = StragglerCallback(every=2, tolerance=0.25, warmup=2)
    trainer = Trainer(model=model, args=args, train_dataset=Rows(data), callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather_into_tensor", "barrier")}
    trainer.train()
    assert all(getattr(dist, name) is function for name, function in originals.items())
    assert not model._forward_pre_hooks and not any(p._post_accumulate_grad_hooks for p in model.parameters())


def slow(rank, who=(1,)):
    return lambda step: SLEEP if rank in who and step >= SLOW_FROM else 0.0


JOBS = {
    "healthy": lambda rank, folder: run_job(folder),
    "data": lambda rank, folder: run_job(folder, data=slow(rank)),
    "forward": lambda rank, folder: run_job(folder, forward=slow(rank, who=(0,))),
    "backward": lambda rank, folder: run_job(folder, backward=slow(rank)),
    "everybody": lambda rank, folder: run_job(folder, data=slow(rank, who=(0, 1)), forward=slow(rank, who=(0, 1))),
}


def run_jobs(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    for name, job in JOBS.items():
        try:
            job(rank, f"{folder}/{name}")
        except Exception:
            with open(f"{folder}/{name}-{rank}.error", "w") as file:
                file.write(traceback.format_exc())
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """`ranks(job)` -> the events of its run."""
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(run_jobs, str(folder), world_size=WORLD)

    def events(job):
        for error in folder.glob(f"{job}-*.error"):
            pytest.fail(error.read_text())
        return read_events(folder / job, component="straggler")

    return events


@pytest.mark.fault("A rank that becomes slow", survived_if="it is named, with the phase in which it is slow")
@pytest.mark.parametrize(
    ("job", "rank", "phase"), [("data", 1, "data"), ("forward", 0, "compute"), ("backward", 1, "compute")]
)
def test_the_rank_that_sleeps_is_named(ranks, job, rank, phase):
    accusations = [event for event in ranks(job) if event.severity == "warning"]
    assert [event.evidence["accused_rank"] for event in accusations] == [rank]
    [event] = accusations
    assert event.evidence["phase"] == phase
    assert event.evidence["accused_host"] == socket.gethostname()
    assert event.step <= SLOW_FROM + 2 + 2 * 2  # the loader is one batch ahead; `patience` samples, every other step
    seconds = event.evidence["seconds"][phase]
    assert seconds[rank] > 0.8 * SLEEP and seconds[rank] - seconds[1 - rank] > 0.4 * SLEEP


@pytest.mark.fault("A job that is slow on all ranks, or healthy", survived_if="no rank is named")
@pytest.mark.parametrize("job", ["healthy", "everybody"])
def test_nobody_is_named_who_is_not_slower_than_the_others(ranks, job):
    assert [event.message for event in ranks(job) if event.severity != "info"] == []


def test_one_process_measures_nothing(tmp_path):
    run_job(str(tmp_path), max_steps=4)
    assert read_events(tmp_path) == []
