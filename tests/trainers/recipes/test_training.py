"""The options that every recipe has: MSign around the optimizer that `--optim` names, and the reliability suite."""

import os
import signal

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from tests.trainers.recipes.tiny_comparison import TINY
from trainers.callbacks import ExpertBalanceCallback, GoodputCallback, MSignCallback, ThroughputCallback
from trainers.optimizers import MSign
from trainers.recipes.arguments import RecipeTrainingArguments
from trainers.recipes.training import build_trainer, train
from trainers.reliability import find_last_valid_checkpoint, read_events, recommended


ROWS = [{"input_ids": torch.arange(8) + i % 7, "labels": torch.arange(8) + i % 7} for i in range(64)]


def trainer_of(folder, *callbacks, **options):
    torch.manual_seed(0)
    defaults = {"max_steps": 4, "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    args = RecipeTrainingArguments(str(folder), use_cpu=True, per_device_train_batch_size=2, **defaults | options)
    return build_trainer(SigmaMoeForCausalLM(SigmaMoeConfig(**TINY)), args, callbacks, train_dataset=ROWS)


def test_by_default_nothing_is_added(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.create_optimizer()
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    added = {type(c) for c in trainer.callback_handler.callbacks} & {type(c) for c in recommended()}
    assert added == {ThroughputCallback}


@pytest.mark.parametrize(
    ("optim", "base"), [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("rmsprop", torch.optim.RMSprop)]
)
def test_msign_goes_around_the_optimizer_that_optim_names(tmp_path, optim, base):
    trainer = trainer_of(
        tmp_path, optimizer="msign", optim=optim, msign_period=3, msign_targets="all_2d", learning_rate=0.25
    )
    trainer.create_optimizer()
    assert isinstance(trainer.optimizer, MSign) and type(trainer.optimizer.base) is base
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.25}
    assert {group["msign_period"] for group in trainer.optimizer.param_groups} == {3}
    kinds = {target.name.split(".")[3] for target in trainer.optimizer.targets}
    assert kinds == {"self_attn", "mlp"}


def test_optimizers_that_want_more_than_groups_are_refused_by_name(tmp_path, monkeypatch):
    class ScheduleFree(torch.optim.SGD):
        def train(self):
            pass

    for answer in ((torch.optim.SGD, {"lr": 1.0, "params": []}), (ScheduleFree, {"lr": 1.0})):
        monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *_, answer=answer: answer))
        with pytest.raises(ValueError, match=f"--optim .*{answer[0].__name__}.*MSignCallback"):
            trainer_of(tmp_path, optimizer="msign")


def test_msign_restores_at_its_period_and_decays_what_the_trainer_decays(tmp_path):
    class Ranks(TrainerCallback):
        def __init__(self):
            self.flat = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            s = torch.linalg.svdvals(model.model.layers[0].self_attn.o_proj.weight)
            self.flat.append(bool(torch.allclose(s, s.mean().expand_as(s), rtol=1e-3)))

    trainer = trainer_of(
        tmp_path, ranks := Ranks(), optimizer="msign", msign_period=2, weight_decay=0.3, learning_rate=0.05
    )
    trainer.train()
    assert ranks.flat == [False, True, False, True]
    plain = Trainer(trainer.model, trainer.args, train_dataset=ROWS)
    decayed = plain.get_decay_parameter_names(plain.model)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.3 if names[id(p)] in decayed else 0.0)


def test_reliability_on_installs_the_recommended_set_once(tmp_path):
    trainer = trainer_of(tmp_path, ExpertBalanceCallback(), reliability="on", optimizer="msign")
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    for kind in [*map(type, recommended()), ExpertBalanceCallback]:
        assert kinds.count(kind) == 1, kind
    assert MSignCallback not in kinds  # the optimizer does it


def test_a_healthy_run_with_the_set_ends_in_the_same_weights_and_says_nothing(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    plain, watched = trainer_of(tmp_path / "a", **options), trainer_of(tmp_path / "b", reliability="on", **options)
    for trainer in (plain, watched):
        train(trainer, None)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, watched.model.state_dict()[name]), name
    assert [e.message for e in read_events(tmp_path / "b") if e.severity not in ("info",)] in ([], [_flat(tmp_path)])
    assert find_last_valid_checkpoint(tmp_path / "b").name == "checkpoint-4"


def _flat(tmp_path):
    """The balance alarm is right about an untrained router."""
    return next((e.message for e in read_events(tmp_path / "b", component="expert_balance")), None)


class Disturb(TrainerCallback):
    """SIGTERM, or a NaN in the weights' gradients, in the middle of step 2."""

    def __init__(self, how):
        self.how = how

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2 and self.how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if state.global_step == 2 and self.how == "nan":
            self.handle, self.how = model.model.embed_tokens.register_forward_hook(self._spoil), None

    def _spoil(self, module, args, output):
        self.handle.remove()
        return output * float("nan")


def test_a_stop_saves_ends_the_process_and_the_same_command_goes_on(tmp_path):
    trainer = trainer_of(tmp_path, Disturb("signal"), reliability="on", max_steps=5)
    with pytest.raises(SystemExit) as ending:
        train(trainer, None)
    assert ending.value.code == 0 and trainer.state.global_step == 3
    checkpoint = find_last_valid_checkpoint(tmp_path)
    assert checkpoint.name == "checkpoint-3"
    again = trainer_of(tmp_path, reliability="on", max_steps=5)
    train(again, checkpoint)
    whole = trainer_of(tmp_path / "whole", max_steps=5)
    whole.train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


@pytest.mark.parametrize("mode", ["on", "rollback"])
def test_a_nan_is_skipped_or_rolled_back(tmp_path, mode):
    trainer = trainer_of(
        tmp_path, Disturb("nan"), reliability=mode, max_steps=5, save_strategy="steps", save_steps=1, logging_steps=1
    )
    train(trainer, None)
    assert trainer.state.global_step == 5
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    actions = {e.action for e in read_events(tmp_path, component="loss_guard") if e.severity != "info"}
    assert actions == {"skip" if mode == "on" else "rollback"}
    if mode == "rollback":
        (event,) = read_events(tmp_path, component="rollback")
        assert (event.step, event.evidence["checkpoint"]) == (2, 2)


def test_the_ledger_counts_the_run(tmp_path):
    trainer = trainer_of(tmp_path, reliability="on")
    assert any(isinstance(c, GoodputCallback) for c in trainer.callback_handler.callbacks)
    train(trainer, None)
    assert any(path.name.startswith("goodput") for path in tmp_path.iterdir()), sorted(tmp_path.iterdir())
