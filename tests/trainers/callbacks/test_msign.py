"""MSign as a callback, in the real Trainer, beside optimizers that know nothing of it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from trainers.callbacks import MSignCallback, install_callbacks
from trainers.optimizers import MSignFactory, MuonAdamW, parameter_groups, select_targets, stable_rank
from trainers.reliability.events import EventLog, read_events


def make_model(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.2))


class Ranks(TrainerCallback):
    """The stable rank of one weight after each step."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weight = model.model.layers[0].self_attn.q_proj.weight
        self.seen[state.global_step] = stable_rank(weight, exact=True).item()


def make_trainer(folder, *callbacks, model=None, **options):
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        max_steps=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=4,
        report_to="none",
        disable_tqdm=True,
    )
    ids = torch.randint(0, 50, (32, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model or make_model(), args, train_dataset=rows, **options)
    install_callbacks(trainer, *callbacks)
    return trainer


def test_it_applies_reports_and_resumes_to_the_last_bit(tmp_path):
    callback, ranks = MSignCallback(3), Ranks()
    whole = make_trainer(tmp_path / "whole", callback, ranks)
    whole.train()
    full = {step for step, rank in ranks.seen.items() if rank > 15.9}
    assert full == {3, 6}

    names = {target.name for target in select_targets(whole.model)}
    events = read_events(tmp_path / "whole", component="msign")
    assert [(e.step, e.severity, e.action) for e in events] == [(3, "info", "restore"), (6, "info", "restore")]
    assert set(events[1].evidence["matrices"]) == names == set(callback.last_report)
    for name, report in events[1].evidence["matrices"].items():
        assert report == callback.last_report[name]._asdict()
        assert 1 < report["before"] < report["after"] == pytest.approx(16, rel=1e-3)
    logged = {e["step"]: e for e in whole.state.log_history if "msign/srank_after" in e}
    assert sorted(logged) == [3, 6]
    assert logged[6]["msign/srank_after"] == pytest.approx(16, rel=1e-3) and logged[6]["msign/restored"] == 8
    before = torch.tensor([report.before for report in callback.last_report.values()])
    assert logged[6]["msign/srank_before"] == pytest.approx(before.log().mean().exp().item(), rel=1e-4)

    resumed = make_trainer(tmp_path / "resumed", MSignCallback(3), model=make_model(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, weight in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), weight), name


def test_it_does_what_the_optimizer_does(tmp_path):
    by_callback = make_trainer(tmp_path / "callback", MSignCallback(2, targets="all_2d"))
    by_callback.train()
    options = {"optimizer_cls_and_kwargs": (MSignFactory, {"lr": 1e-2, "period": 2, "targets": "all_2d"})}
    by_optimizer = make_trainer(tmp_path / "optimizer", **options)
    by_optimizer.train()
    for name, weight in by_callback.model.named_parameters():
        torch.testing.assert_close(by_optimizer.model.get_parameter(name), weight, rtol=0, atol=1e-6)


def test_beside_muon(tmp_path):
    model = make_model()
    muon = {id(target.parameter) for target in select_targets(model, "all_2d")}
    optimizer = MuonAdamW(parameter_groups(model, 0.0, muon=muon), lr=1e-2)
    ranks = Ranks()
    events = EventLog(tmp_path / "elsewhere")
    callback = MSignCallback(4, stop_step=4, events=events)
    make_trainer(tmp_path, callback, ranks, model=model, optimizers=(optimizer, None)).train()
    assert ranks.seen[4] > 15.9 > ranks.seen[8]
    assert len(read_events(tmp_path / "elsewhere")) == 1 and not read_events(tmp_path)


def test_the_trigger_leaves_healthy_weights_alone(tmp_path):
    callback, ranks = MSignCallback(2, trigger="stable_rank", srank_threshold=0.05), Ranks()
    make_trainer(tmp_path, callback, ranks).train()
    assert max(ranks.seen.values()) < 15
    assert len(callback.last_report) == 8 and not any(r.restored for r in callback.last_report.values())
    assert [event.action for event in read_events(tmp_path, component="msign")] == ["none"] * 4


class SkippedStep:
    step_was_skipped = True


def test_nothing_is_restored_after_a_step_that_mixed_precision_skipped(tmp_path):
    callback = MSignCallback(1)
    trainer = make_trainer(tmp_path, callback)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    callback.on_optimizer_step(trainer.args, trainer.state, trainer.control, optimizer=SkippedStep())
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    callback.on_optimizer_step(trainer.args, trainer.state, trainer.control, optimizer=None)
    assert not all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_what_would_go_wrong_is_refused(tmp_path):
    double = make_trainer(tmp_path, MSignCallback(), optimizer_cls_and_kwargs=(MSignFactory, {"lr": 1e-3}))
    with pytest.raises(ValueError, match="done twice"):
        double.train()
    with pytest.raises(ValueError, match="selects no trainable matrix"):
        make_trainer(tmp_path, MSignCallback(targets="nothing")).train()
    trainer = make_trainer(tmp_path)
    trainer.args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match="DeepSpeed"):
        MSignCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    for options in ({"period": 0}, {"srank_threshold": 0.0}, {"rescale": "no"}, {"trigger": "loss"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            MSignCallback(**options)
