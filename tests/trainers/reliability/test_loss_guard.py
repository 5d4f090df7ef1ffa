"""Faults put into real runs, alone and on one of two gloo processes: who is accused, and what all ranks do."""

import json
import os
import shutil
import socket
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from tests.trainers.callbacks.test_installation import make_model, make_rows, train
from trainers.callbacks import (
    ExpertBalanceCallback,
    ProgressiveSparsificationCallback,
    ResumeGuardCallback,
    ThroughputCallback,
)
from trainers.callbacks.installation import install_callbacks
from trainers.reliability.events import read_events
from trainers.reliability.loss_guard import LocalLossGuardCallback, NonFiniteLossError, batch_digest
from trainers.reliability.rerun import read_suspicion
from trainers.reliability.rollback import (
    DataSkip,
    RollbackRequested,
    _checkpoint_before,
    read_skips,
    skipped_batches,
    train_with_rollback,
    with_skip,
)


class Fault(TrainerCallback):
    """NaN in the logits (`"loss"`), or in the gradient of one weight (`"gradient"`), in the given optimizer steps
    (counted from 1) and micro-batch; at most `times` times. Remembers the input of every training forward."""

    def __init__(self, *steps, seen_in="loss", micro_batch=0, rank=0, times=10**6):
        self.steps, self.seen_in, self.micro_batch, self.rank, self.times = steps, seen_in, micro_batch, rank, times
        self.batches, self.handles = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for handle in self.handles:
            handle.remove()
        self.state, self.active = state, args.process_index == self.rank
        self.handles = [model.lm_head.register_forward_hook(self.on_logits)]
        self.handles.append(model.register_forward_pre_hook(self.on_forward, with_kwargs=True))
        self.weight = model.model.layers[1].self_attn.v_proj.weight
        if self.seen_in == "gradient":
            self.handles.append(self.weight.register_hook(self.on_gradient))

    def on_step_begin(self, args, state, control, **kwargs):
        self.step, self.micro = state.global_step + 1, -1

    def on_forward(self, module, args, kwargs):
        if module.training:
            self.micro += 1
            self.batches.append((self.step, batch_digest({"input_ids": kwargs["input_ids"]})))

    def due(self):
        due = self.active and self.times > 0 and self.step in self.steps and self.micro == self.micro_batch
        self.times -= due
        return due

    def on_logits(self, module, args, output):
        if module.training and self.seen_in == "loss" and self.due():
            return output * float("nan")

    def on_gradient(self, gradient):
        return gradient * float("inf") if self.due() else None


class Weights(TrainerCallback):
    """Weights after each step."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = {n: t.detach().clone() for n, t in model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seen_in", ["loss", "gradient"])
def test_raise(tmp_path, seen_in):
    model, fault = make_model(), Fault(3, seen_in=seen_in)
    weights = Weights()
    with pytest.raises(NonFiniteLossError, match="rank 0.*optimizer step 3, micro-batch 0") as error:
        train(model, tmp_path, fault, weights, LocalLossGuardCallback())

    assert_equal(dict(model.state_dict()), weights.after[2])
    [event] = read_events(tmp_path)
    assert (event.component, event.severity, event.action, event.step) == ("loss_guard", "fatal", "stop", 2)
    [accused] = error.value.accused
    assert accused["rank"] == event.rank == 0 and accused["host"] == event.host == socket.gethostname()
    assert event.evidence["batch"] == fault.batches[-1][1]
    assert event.evidence["device"] == "cpu" and event.evidence["seen_in"] == seen_in
    if seen_in == "gradient":
        assert event.evidence["parameters"] == ["model.layers.1.self_attn.v_proj.weight"]
        assert isinstance(event.evidence["loss"], float)
    else:
        assert event.evidence["loss"] == "nan" and event.evidence["bad_parameters"] > 5


def test_gradients_are_not_looked_at_on_request(tmp_path):
    train(make_model(), tmp_path, Fault(4, seen_in="gradient"), LocalLossGuardCallback(check_gradients=False))
    assert read_events(tmp_path) == []


@pytest.mark.parametrize("seen_in", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [0, 2])
def test_the_micro_batch_is_named(tmp_path, seen_in, bad):
    fault = Fault(2, seen_in=seen_in, micro_batch=bad)
    with pytest.raises(NonFiniteLossError):
        train(make_model(), tmp_path, fault, LocalLossGuardCallback(), gradient_accumulation_steps=3)
    [event] = read_events(tmp_path)
    assert event.evidence["micro_batch"] == bad
    assert event.evidence["batch"] == fault.batches[3 + bad][1] != fault.batches[3 + (bad + 1) % 3][1]


def test_a_healthy_run_is_left_alone(tmp_path):
    options = {"gradient_accumulation_steps": 2, "weight_decay": 0.1}
    plain, guarded = make_model(attention_dropout=0.2), make_model(attention_dropout=0.2)
    train(plain, tmp_path / "plain", **options)
    train(guarded, tmp_path / "guarded", LocalLossGuardCallback(diagnose=True), **options)
    assert_equal(dict(plain.state_dict()), dict(guarded.state_dict()))
    assert not (tmp_path / "guarded" / "events.jsonl").exists()
    assert not guarded._forward_hooks and not guarded._forward_pre_hooks


def test_skip_does_nothing_in_that_step(tmp_path):
    guard, weights = LocalLossGuardCallback("skip"), Weights()
    options = {"max_steps": 5, "weight_decay": 0.1, "lr_scheduler_type": "linear"}
    trainer = train(make_model(), tmp_path, Fault(3), guard, weights, **options)

    assert_equal(weights.after[3], weights.after[2])
    assert not torch.equal(weights.after[4]["lm_head.weight"], weights.after[3]["lm_head.weight"])
    assert all(bool(torch.isfinite(t).all()) for t in weights.after[5].values())
    assert guard.skipped_steps == 1 and trainer.state.global_step == 5
    assert {s["step"].item() for s in trainer.optimizer.state_dict()["state"].values()} == {4}  # moments of 4 steps
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert rates == pytest.approx([1e-2 * (1 - step / 5) for step in range(5)])
    [event] = read_events(tmp_path)
    assert (event.severity, event.action) == ("warning", "skip")


def test_skipping_gives_up(tmp_path):
    guard = LocalLossGuardCallback("skip", max_consecutive_skips=2)
    with pytest.raises(NonFiniteLossError, match="2 steps in a row"):
        train(make_model(), tmp_path, Fault(2, 4, 5, 6), guard, max_steps=8)
    assert [(e.step, e.action) for e in read_events(tmp_path)] == [(1, "skip"), (3, "skip"), (4, "skip"), (5, "stop")]


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="policy='ignore'.*'raise', 'skip', 'rollback'"):
        LocalLossGuardCallback("ignore")
    with pytest.raises(ValueError, match="needs diagnose=True"):
        LocalLossGuardCallback(exit_codes=True)
    with pytest.raises(ValueError, match="max_consecutive_skips=0"):
        LocalLossGuardCallback("skip", max_consecutive_skips=0)


# --- diagnosis -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seen_in", ["loss", "gradient"])
@pytest.mark.parametrize(("times", "label"), [(1, "transient"), (10**6, "reproducible")])
def test_diagnosis(tmp_path, seen_in, times, label):
    fault = Fault(3, seen_in=seen_in, times=times, micro_batch=1)
    train(
        make_model(),
        tmp_path,
        fault,
        LocalLossGuardCallback("skip", diagnose=True),
        gradient_accumulation_steps=2,
    )
    [event] = read_events(tmp_path)
    assert event.evidence["diagnosis"] == label and label in event.message
    assert event.evidence["micro_batch"] == 1


def test_a_diagnosis_leaves_no_trace(tmp_path):
    """Random state, counts of the balance loss, gradients and tokens are what they were without it."""
    ends, tokens = [], []
    for diagnose in (False, True):
        model, throughput = make_model(attention_dropout=0.2, expert_bias_update_rate=0.01), ThroughputCallback()
        guard = LocalLossGuardCallback("skip", diagnose=diagnose)
        callbacks = (Fault(2, times=1), ExpertBalanceCallback(), throughput, guard)
        train(model, tmp_path / str(diagnose), *callbacks, gradient_accumulation_steps=2, max_steps=7)
        ends.append(dict(model.state_dict()))
        tokens.append((throughput.steady_tokens, (tmp_path / str(diagnose) / "logs" / "balance.jsonl").read_text()))
    assert_equal(*ends)
    assert tokens[0] == tokens[1]


def test_exit_codes(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}

    def run(fault, resume=None):
        guard = LocalLossGuardCallback(diagnose=True, exit_codes=True)
        return train(make_model(), tmp_path, fault, guard, resume=resume, **options)

    with pytest.raises(SystemExit) as ended:
        run(Fault(3))
    assert ended.value.code == 16
    suspicion = read_suspicion(tmp_path)
    assert (suspicion.step, suspicion.rank, suspicion.host) == (2, 0, socket.gethostname())

    with pytest.raises(SystemExit) as ended:  # started again on the same machine: still nothing is known
        run(Fault(3), tmp_path / "checkpoint-2")
    assert ended.value.code == 16

    values = json.loads((tmp_path / "rerun.json").read_text())
    (tmp_path / "rerun.json").write_text(json.dumps(values | {"host": "elsewhere"}))
    with pytest.raises(SystemExit) as ended:  # two machines say the same
        run(Fault(3), tmp_path / "checkpoint-2")
    assert ended.value.code == 17

    (tmp_path / "rerun.json").write_text(json.dumps(values | {"host": "elsewhere"}))
    run(Fault(), tmp_path / "checkpoint-2")  # it passes here: the other machine is to blame
    [event] = read_events(tmp_path, component="rerun")
    assert event.action == "exclude" and event.evidence["accused_host"] == "elsewhere"
    assert read_suspicion(tmp_path) is None


def test_a_transient_fault_does_not_exit(tmp_path):
    guard = LocalLossGuardCallback("skip", diagnose=True, exit_codes=True)
    train(make_model(), tmp_path, Fault(3, times=1), guard)
    assert guard.skipped_steps == 1 and read_suspicion(tmp_path) is None


# --- rollback --------------------------------------------------------------------------------------------------------


def newest(folder):
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return found[-1] if found else None


def make_trainer(folder, *callbacks, **options):
    torch.set_num_threads(1)
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 8,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "learning_rate": 1e-2,
            **options,
        }
    )
    model = make_model(attention_dropout=0.2, expert_bias_update_rate=0.01)
    trainer = Trainer(model=model, args=args, train_dataset=make_rows())
    trainer.remove_callback(PrinterCallback)
    stages = ProgressiveSparsificationCallback([(0, [3, 2]), (5, 1)])
    install_callbacks(trainer, stages, ExpertBalanceCallback(), *callbacks)
    return trainer


@pytest.mark.fault(
    "NaN in a loss, with rollback",
    survived_if="the run goes on from the checkpoint before, behind the batch, bitwise as a new process would",
)
def test_rollback_restores_everything_and_skips_the_data(tmp_path):
    """The incident in step 6 goes back to checkpoint-4. What follows equals, bit for bit, a new process that resumes
    there with the same skip: nothing of the abandoned steps is left, stage and expert bias included."""
    undisturbed = Fault()
    make_trainer(tmp_path / "undisturbed", undisturbed, max_steps=10).train()
    order = [digest for _, digest in undisturbed.batches]

    fault, top_k = Fault(6, times=1), []
    trainer = make_trainer(tmp_path / "run", fault, LocalLossGuardCallback("rollback"))
    trainer.model.routers[0].register_forward_hook(lambda module, *_: top_k.append(module.top_k))
    train_with_rollback(trainer, find_checkpoint=newest)

    assert trainer.state.global_step == 8
    assert [step for step, _ in fault.batches[::2]] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    # 8 micro-batches of 4 kept steps, 4 of two given up, then straight on.
    assert [digest for _, digest in fault.batches] == order[:20]
    assert read_skips(tmp_path / "run") == [DataSkip(4, 4, read_skips(tmp_path / "run")[0].reason)]
    assert top_k[::2] == [3, 3, 3, 3, 3, 1, 3, 1, 1, 1]  # the stage of step 6 was taken back for step 5
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert rates == pytest.approx([1e-2 * (1 - step / 8) for step in range(8)])
    [event] = read_events(tmp_path / "run", component="rollback")
    assert event.evidence == {"checkpoint": 4, "lost_steps": 1, "skipped_batches": 4}

    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    shutil.copy(tmp_path / "run" / "data_skips.json", tmp_path / "again")
    again = make_trainer(tmp_path / "again")
    train_with_rollback(again, tmp_path / "again" / "checkpoint-4", find_checkpoint=newest)
    assert_equal(dict(trainer.model.state_dict()), dict(again.model.state_dict()))
    assert any(router.e_score_correction_bias.any() for router in again.model.routers)


def test_a_resume_after_the_rollback_stays_behind_the_skip(tmp_path):
    fault = Fault(6, times=1)
    trainer = make_trainer(tmp_path, fault, LocalLossGuardCallback("rollback"))
    train_with_rollback(trainer, find_checkpoint=newest)

    later = Fault()
    again = make_trainer(tmp_path, later)
    train_with_rollback(again, tmp_path / "checkpoint-6", find_checkpoint=newest)
    assert later.batches == fault.batches[-4:]
    assert_equal(dict(trainer.model.state_dict()), dict(again.model.state_dict()))


def test_data_goes_on_over_the_end_of_an_epoch(tmp_path):
    """12 rows are 3 steps an epoch. Behind the skip comes what an undisturbed run has there, epoch after epoch."""
    undisturbed = Fault()
    trainer = make_trainer(tmp_path / "undisturbed", undisturbed, max_steps=10)
    trainer.train_dataset = make_rows(12)
    trainer.train()

    fault = Fault(5, times=1)
    trainer = make_trainer(tmp_path / "run", fault, LocalLossGuardCallback("rollback"), save_steps=2)
    trainer.train_dataset = make_rows(12)
    train_with_rollback(trainer, find_checkpoint=newest)
    assert trainer.state.global_step == 8
    assert [digest for _, digest in fault.batches] == [digest for _, digest in undisturbed.batches[:18]]


def test_after_a_change_of_data_the_skip_is_counted_in_the_new_data(tmp_path):
    """A run resumes at step 2 with other data, and goes back from step 7 to a checkpoint of its own. The guard of the
    resume, told a folder at the start, reads the record of the one that the rollback chose."""
    make_trainer(tmp_path / "old", ResumeGuardCallback(data_key="old"), max_steps=2).train()
    other = make_rows(64)[::-1]

    def resumed(folder, *callbacks):
        shutil.copytree(tmp_path / "old" / "checkpoint-2", folder / "start")
        guard = ResumeGuardCallback(data_key="new", checkpoint=folder / "start")
        trainer = make_trainer(folder, guard, *callbacks, max_steps=10)
        trainer.train_dataset = other
        train_with_rollback(trainer, folder / "start", find_checkpoint=newest)
        return trainer

    undisturbed, fault = Fault(), Fault(7, times=1)
    resumed(tmp_path / "undisturbed", undisturbed)
    trainer = resumed(tmp_path / "run", fault, LocalLossGuardCallback("rollback"))
    assert trainer.state.global_step == 10
    assert [step for step, _ in fault.batches[::2]] == [3, 4, 5, 6, 7, 7, 8, 9, 10]
    order = [digest for _, digest in undisturbed.batches]
    assert [digest for _, digest in fault.batches][: len(order)] == order


def test_without_skipping_the_same_data_comes_again(tmp_path):
    fault = Fault(4, times=1)
    trainer = make_trainer(tmp_path, fault, LocalLossGuardCallback("rollback"))
    train_with_rollback(trainer, find_checkpoint=newest, skip_data=False)
    assert [digest for _, digest in fault.batches[4:8]] == [digest for _, digest in fault.batches[8:12]]
    assert read_skips(tmp_path) == []


def test_rollbacks_are_counted(tmp_path):
    trainer = make_trainer(tmp_path, Fault(4), LocalLossGuardCallback("rollback"))
    with pytest.raises(RollbackRequested, match="optimizer step 4"):
        train_with_rollback(trainer, max_rollbacks=2, find_checkpoint=newest)
    assert [e.evidence["skipped_batches"] for e in read_events(tmp_path, component="rollback")] == [4, 4]
    assert skipped_batches(read_skips(tmp_path), 2) == 8
    assert trainer.get_batch_samples.__func__ is Trainer.get_batch_samples


def test_nothing_to_go_back_to(tmp_path):
    trainer = make_trainer(tmp_path, Fault(1), LocalLossGuardCallback("rollback"))
    with pytest.raises(RuntimeError, match="no valid checkpoint.*save_steps"):
        train_with_rollback(trainer, find_checkpoint=newest)


def test_checkpoints_that_are_too_new_are_abandoned(tmp_path):
    class Regret(TrainerCallback):
        asked = False

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7 and not self.asked:
                self.asked = True
                raise RollbackRequested(7, "Step 5 was wrong.", newest=4)

    watch = Fault()
    train_with_rollback(make_trainer(tmp_path, watch, Regret()), find_checkpoint=newest)
    assert (tmp_path / "abandoned-checkpoint-6").is_dir() and (tmp_path / "checkpoint-6").is_dir()
    assert [step for step, _ in watch.batches[::2]] == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8]
    assert len({digest for _, digest in watch.batches}) == 22  # no batch twice


def test_positions():
    """Data positions as counted by hand: 2 micro-batches a step."""
    first = with_skip([], checkpoint=4, step=5, batches_per_step=2, seen=2)
    assert first == [DataSkip(4, 4)]  # 12 seen, 8 kept
    second = with_skip(first, checkpoint=6, step=9, batches_per_step=2, seen=0)
    assert second == [DataSkip(4, 4), DataSkip(6, 6)]
    deeper = with_skip(second, checkpoint=2, step=9, batches_per_step=2, seen=0)
    assert deeper == [DataSkip(2, 2 * 9 + 10 - 4)]
    assert [skipped_batches(second, step) for step in (3, 4, 5, 6, 9)] == [0, 4, 4, 10, 10]


def test_an_unreadable_list_of_skips(tmp_path):
    (tmp_path / "data_skips.json").write_text("[{")
    with pytest.raises(ValueError, match="data_skips.json is not a list of skips.*Restore it"):
        read_skips(tmp_path)


# --- two processes ---------------------------------------------------------------------------------------------------


def run_two(folder, *callbacks, **options):
    model, error, weights = make_model(**options.pop("model", {})), None, Weights()
    options = {"max_steps": 4, "weight_decay": 0.1} | options
    try:
        train(model, folder, *callbacks, weights, **options)
    except (NonFiniteLossError, SystemExit) as raised:
        error = (type(raised).__name__, str(raised))
    return {"weights": dict(model.state_dict()), "after": weights.after, "error": error}


def make_jobs():
    """Name -> (fault, guard, options)."""
    accumulated = {"gradient_accumulation_steps": 2}
    return {
        "plain": (Fault(), None, {}),
        "healthy": (Fault(), LocalLossGuardCallback(), {}),
        "skip": (Fault(2, rank=1), LocalLossGuardCallback("skip"), {}),
        "raise": (Fault(3, rank=1), LocalLossGuardCallback(), {}),
        "gradient": (Fault(2, rank=1, seen_in="gradient"), LocalLossGuardCallback("skip"), {}),
        "accumulated": (Fault(2, rank=1, micro_batch=0), LocalLossGuardCallback("skip"), accumulated),
        "gradient 0": (Fault(2, rank=1, seen_in="gradient"), LocalLossGuardCallback("skip"), accumulated),
        "gradient 1": (
            Fault(2, rank=1, seen_in="gradient", micro_batch=1),
            LocalLossGuardCallback("skip"),
            accumulated,
        ),
        "transient": (Fault(2, rank=1, times=1), LocalLossGuardCallback("skip", diagnose=True), {}),
        "reproducible": (
            Fault(2, rank=1),
            LocalLossGuardCallback("skip", diagnose=True, exit_codes=True),
            # Its balance loss is a collective in the forward: both ranks must repeat it.
            {"model": {"router_aux_loss_type": "global_batch"}},
        ),
    }


def run_rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for name, (fault, guard, options) in make_jobs().items():
        callbacks = [fault] if guard is None else [fault, guard]
        try:
            result = run_two(Path(folder) / name, *callbacks, **options) | {"batches": fault.batches}
        except Exception:
            result = {"crash": traceback.format_exc()}
        torch.save(result, f"{folder}/{name}-{rank}.pt")
    fault = Fault(6, rank=1, times=1)
    trainer = make_trainer(f"{folder}/rollback", fault, LocalLossGuardCallback("rollback"), max_steps=7)
    train_with_rollback(trainer, find_checkpoint=newest)
    torch.save({"weights": dict(trainer.model.state_dict()), "batches": fault.batches}, f"{folder}/rollback-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """`ranks(job)` -> what each of two processes saw, and the events of the run folder that they share."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = mp.spawn(run_rank, args=(port, str(folder)), nprocs=2, join=False)
    deadline = time.monotonic() + 240
    while not processes.join(timeout=5):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"the ranks hang; finished: {sorted(path.name for path in folder.glob('*.pt'))}")

    def load(job):
        both = [torch.load(folder / f"{job}-{rank}.pt", weights_only=False) for rank in range(2)]
        assert not any("crash" in result for result in both), both
        return *both, read_events(folder / job)

    return load


@pytest.mark.slow
def test_the_communication_hook_averages_as_ddp_does(ranks):
    plain, *_ = ranks("plain")
    first, second, events = ranks("healthy")
    assert_equal(first["weights"], second["weights"])
    assert_equal(first["weights"], plain["weights"])
    assert events == []


@pytest.mark.slow
@pytest.mark.fault(
    "NaN in a loss or gradient of rank 1 of 2",
    survived_if="rank 1 and its batch are named; both ranks skip the step together",
)
@pytest.mark.parametrize(
    ("job", "seen_in", "micro_batch", "label"),
    [
        ("skip", "loss", 0, None),
        ("gradient", "gradient", 0, None),
        ("accumulated", "loss", 0, None),
        ("gradient 0", "gradient", 0, None),
        ("gradient 1", "gradient", 1, None),
        ("transient", "loss", 0, "transient"),
    ],
)
def test_rank_1_is_accused_and_both_skip(ranks, job, seen_in, micro_batch, label):
    *both, events = ranks(job)
    [event] = events
    assert (event.rank, event.step, event.action) == (1, 1, "skip")
    assert event.evidence["seen_in"] == seen_in and event.evidence["micro_batch"] == micro_batch
    per_step = 2 if job.startswith(("accumulated", "gradient ")) else 1
    assert event.evidence["batch"] == both[1]["batches"][per_step + micro_batch][1]
    assert event.evidence.get("diagnosis") == label
    for result in both:
        assert result["error"] is None
        assert_equal(result["after"][2], result["after"][1])
    assert_equal(both[0]["weights"], both[1]["weights"])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in both[0]["weights"].values())
    assert not torch.equal(both[0]["after"][3]["lm_head.weight"], both[0]["after"][2]["lm_head.weight"])


@pytest.mark.slow
def test_both_raise_in_the_same_step(ranks):
    *both, events = ranks("raise")
    assert [(event.rank, event.step, event.action) for event in events] == [(1, 2, "stop")]
    for result in both:
        kind, message = result["error"]
        assert kind == "NonFiniteLossError" and message.startswith("rank 1 ")
        assert sorted(result["after"]) == [1, 2]
    assert_equal(both[0]["weights"], both[1]["weights"])


@pytest.mark.slow
def test_both_exit(ranks):
    *both, events = ranks("reproducible")
    [event] = events
    assert (event.rank, event.action, event.evidence["diagnosis"]) == (1, "exit", "reproducible")
    assert [result["error"] for result in both] == [("SystemExit", "16")] * 2


@pytest.mark.slow
@pytest.mark.fault(
    "NaN on rank 1 of 2, with rollback",
    survived_if="both ranks go back and on together, with the same weights and no batch twice",
)
def test_both_go_back(ranks):
    *both, events = ranks("rollback")
    assert_equal(both[0]["weights"], both[1]["weights"])
    for result in both:
        assert [step for step, _ in result["batches"][::2]] == [1, 2, 3, 4, 5, 6, 5, 6, 7]
    digests = [digest for result in both for _, digest in result["batches"]]
    # 36 micro-batches of an epoch of 32: all of it, then the first four of the next.
    assert len(set(digests[:16] + digests[18:34])) == 32
    assert [e.component for e in events] == ["loss_guard", "rollback"]


def test_rollbacks_do_not_lose_what_an_earlier_one_put_aside(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    request = RollbackRequested(6, "a spike.", newest=3)
    for found in (4, 6):
        (tmp_path / f"checkpoint-{found}").mkdir()
    assert _checkpoint_before(trainer, request, lambda folder: None) is None
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == ["checkpoint-4", "checkpoint-6"], "nothing older"
    (tmp_path / "checkpoint-2").mkdir()
    for _ in range(2):
        assert _checkpoint_before(trainer, request, lambda folder: folder / "checkpoint-2").name == "checkpoint-2"
        assert not (tmp_path / "checkpoint-6").exists()
        (tmp_path / "checkpoint-6").mkdir()
    names = {p.name for p in tmp_path.glob("abandoned-*")}
    assert names == {"abandoned-checkpoint-4", "abandoned-checkpoint-6", "abandoned-checkpoint-6-2"}
