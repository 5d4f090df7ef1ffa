"""The optimizer: when it applies, what it leaves alone, and what schedulers, scalers, Accelerate and Trainer see."""

import copy
import io
import math
import pickle

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from trainers.optimizers import (
    MSign,
    MSignAdamW,
    MSignFactory,
    MuonAdamW,
    msign_,
    parameter_groups,
    select_targets,
    stable_rank,
)


def make_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        attention_bias=True,
    )
    return LlamaForCausalLM(config)


def batch(step):
    return torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(step))


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        ids = batch(step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make(model, **options):
    return MSignAdamW(model, 1e-2, **{"period": 3, **options})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def is_restored(weight):
    return stable_rank(weight, exact=True).item() == pytest.approx(min(weight.shape), rel=1e-3)


# --- when and what


def test_it_is_the_base_optimizer_and_after_every_period_the_restoration():
    model, by_hand = make_model(), make_model()
    optimizer = make(model)
    groups = parameter_groups(by_hand, 0.1)
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(1, 8):
        train(model, optimizer, 1, first=step)
        train(by_hand, adamw, 1, first=step)
        if step % 3 == 0:
            for target in select_targets(by_hand):
                msign_(target.parameter.detach())
        assert optimizer.steps == step
        assert_equal(weights(model), weights(by_hand))
        restored = [is_restored(t.parameter) for t in select_targets(model)]
        assert all(restored) if step % 3 == 0 else not any(restored)
    for p, q in zip(model.parameters(), by_hand.parameters()):
        for key, value in adamw.state[q].items():
            assert torch.equal(optimizer.state[p][key], value), key  # no state is reset


def test_first_and_last_step_and_a_group_with_a_period_of_its_own():
    model = make_model()
    optimizer = make(model, period=2, start_step=3, stop_step=6)
    applied = []
    for step in range(1, 10):
        optimizer.last_report = {}
        train(model, optimizer, 1, first=step)
        applied += [step] * bool(optimizer.last_report)
    assert applied == [4, 6]
    model = make_model()
    groups = [
        {"params": [p for n, p in model.named_parameters() if ("layers.0" in n) == first], "msign_period": period}
        for first, period in ((True, 2), (False, 5))
    ]
    optimizer = MSign(torch.optim.SGD(groups, lr=1e-3), select_targets(model), period=3)
    seen = {}
    for step in range(1, 11):
        optimizer.last_report = {}
        train(model, optimizer, 1, first=step)
        seen[step] = {name.split(".")[2] for name in optimizer.last_report}
    assert {step: layers for step, layers in seen.items() if layers} == {
        2: {"0"}, 4: {"0"}, 5: {"1"}, 6: {"0"}, 8: {"0"}, 10: {"0", "1"}
    }  # fmt: skip


def test_the_report_names_every_matrix():
    model = make_model()
    optimizer = make(model, period=1, targets="all_2d")
    train(model, optimizer, 1)
    assert set(optimizer.last_report) == {target.name for target in select_targets(model, "all_2d")}
    for name, report in optimizer.last_report.items():
        weight = model.get_parameter(name)
        assert report.after == pytest.approx(min(weight.shape), rel=1e-3)
        assert 1 <= report.before < report.after
        assert report.scale == pytest.approx(weight.norm().item() / math.sqrt(min(weight.shape)), rel=1e-3)
        assert (report.matrices, report.restored) == (1, 1)


def test_the_stable_rank_trigger_restores_what_fell_only():
    model = make_model()
    fallen = model.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        fallen.copy_(torch.outer(torch.randn(16), torch.randn(16)) + 0.01 * torch.randn(16, 16))
    optimizer = make(model, period=1, trigger="stable_rank", srank_threshold=0.09)
    untouched, adamw = make_model(), None
    untouched.load_state_dict(model.state_dict())
    adamw = torch.optim.AdamW(parameter_groups(untouched, 0.1), lr=1e-2, betas=(0.9, 0.95))
    train(model, optimizer, 1)
    train(untouched, adamw, 1)
    restored = [name for name, report in optimizer.last_report.items() if report.restored]
    assert restored == ["model.layers.1.self_attn.o_proj.weight"] and len(optimizer.last_report) == 8
    assert is_restored(fallen)
    for name, weight in weights(untouched).items():
        assert torch.equal(model.get_parameter(name), weight) == (name not in restored)


# --- state


def test_resuming_in_the_middle_of_a_period_equals_an_uninterrupted_run():
    whole = make_model()
    train(whole, make(whole), 10)
    first = make_model()
    optimizer = make(first)
    train(first, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = make_model(seed=1)
    resumed = make(second)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(state_dict=saved["optimizer"])
    assert resumed.steps == 4
    train(second, resumed, 6, first=4)
    assert_equal(weights(second), weights(whole))


def test_what_is_loaded_wins_and_a_checkpoint_of_the_base_alone_is_taken():
    model = make_model()
    saved = make(model, period=7, rescale="spectral").state_dict()
    optimizer = make(model, period=3)
    optimizer.load_state_dict(saved)
    assert all(g["msign_period"] == 7 and g["msign_rescale"] == "spectral" for g in optimizer.param_groups)
    adamw = torch.optim.AdamW(parameter_groups(model, 0.1), lr=5.0)
    train(model, adamw, 1)
    optimizer = make(model, period=3)
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.steps == 0 and optimizer.param_groups[0]["lr"] == 5.0
    assert optimizer.param_groups[0]["msign_period"] == 3


def test_groups_and_state_are_the_base_optimizer_s():
    model = make_model()
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = MSign(base, select_targets(model), period=2)
    assert optimizer.param_groups is base.param_groups and optimizer.defaults is base.defaults
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state
    extra = nn.Parameter(torch.randn(4, 4))
    optimizer.add_param_group({"params": [extra]})
    assert base.param_groups[1]["msign_step"] == 1 and base.param_groups[1]["msign_period"] == 2
    extra.grad = torch.ones(4, 4)
    train(model, optimizer, 1)
    assert "lr" in repr(optimizer) and not is_restored(extra)
    assert [t.parameter for t in optimizer.targets] == [t.parameter for t in select_targets(model)]


def test_copies_and_pickles_go_on_alike():
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 2)
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # puts a `step` of its own in front
    for copied, again in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        train(copied, again, 1, first=2)
        assert again.steps == 3 and is_restored(copied.model.layers[0].self_attn.q_proj.weight)


def test_hooks_closures_schedulers_and_clipping():
    model = make_model()
    optimizer = make(model, period=1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    seen = []
    optimizer.register_step_post_hook(
        lambda *_: seen.append(is_restored(model.model.layers[0].self_attn.q_proj.weight))
    )

    def closure():
        optimizer.zero_grad()
        loss = model(batch(0), labels=batch(0)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    assert optimizer.step(closure).item() > 0
    schedule.step()
    assert seen == [True]
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-3]


def test_a_scaler_that_skips_a_step_skips_the_application():
    model = make_model()
    optimizer = make(model, period=1)
    scaler = torch.amp.GradScaler("cpu")
    for broken in (True, False):
        loss = model(batch(0), labels=batch(0)).loss
        scaler.scale(loss * (math.inf if broken else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.steps == int(not broken)
        assert is_restored(model.model.layers[0].self_attn.q_proj.weight) != broken


def test_a_step_that_only_creates_state_changes_no_weight():
    """`torch.distributed.checkpoint` takes one before it loads."""
    model = make_model()
    optimizer = make(model, period=1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights(model)
    optimizer.step()
    assert_equal(weights(model), before)
    optimizer.step()  # with state, it is a step like others, as in a warm-up
    assert is_restored(model.model.layers[0].self_attn.q_proj.weight)


def test_accelerate_prepares_it():
    model = make_model()
    accelerator = Accelerator(cpu=True)
    optimizer = make(model, period=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, prepared, schedule = accelerator.prepare(model, optimizer, schedule)
    for step in range(2):
        accelerator.backward(model(batch(step), labels=batch(step)).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        prepared.step()
        schedule.step()
        prepared.zero_grad()
    assert optimizer.steps == 2 and is_restored(model.model.layers[0].self_attn.q_proj.weight)


def test_weights_that_were_exchanged_in_the_groups_are_found():
    """As Accelerate does when it shards the model."""
    model = make_model()
    optimizer = make(model, period=1)
    fresh = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [fresh[p] for p in group["params"]]
    for p in fresh.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for target in select_targets(model):
        assert is_restored(fresh[target.parameter]) and not is_restored(target.parameter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 0}, "period=0"),
        ({"period": 2.5}, "period=2.5"),
        ({"start_step": -1}, "start_step=-1"),
        ({"start_step": 5, "stop_step": 4}, "stop_step=4"),
        ({"trigger": "loss"}, "trigger='loss'"),
        ({"rescale": "trace"}, "rescale='trace'"),
        ({"srank_threshold": 2.0}, "srank_threshold=2.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(make_model(), **options)


def test_bases_and_targets_that_do_not_fit_are_refused():
    model = make_model()
    with pytest.raises(TypeError, match="base is a Llama"):
        MSign(model, select_targets(model))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="targets is empty"):
        MSign(base, [])
    with pytest.raises(ValueError, match="q_proj.weight is no parameter of the base"):
        MSign(base, select_targets(make_model()))
    optimizer = MSign(base, select_targets(model), period=1)
    base.param_groups[0]["params"] = [nn.Parameter(p.detach().flatten()) for p in base.param_groups[0]["params"]]
    with pytest.raises(ValueError, match=r"flattened into shards.*FSDP2"):
        optimizer.step()  # as DeepSpeed leaves the groups


# --- Muon and the factory


def test_muon_for_matrices_and_adamw_for_the_rest_are_torch_s_own():
    model, by_hand = make_model(), make_model()
    matrices = {t.name for t in select_targets(model, "all_2d")}
    factory = MSignFactory()
    optimizer = factory(model, base="muon", lr=1e-2, weight_decay=0.1, period=100, betas=(0.9, 0.95))
    assert isinstance(optimizer.base, MuonAdamW)
    two_d = [p for n, p in by_hand.named_parameters() if n in matrices]
    rest = [group for group in parameter_groups(by_hand, 0.1)]
    for group in rest:
        group["params"] = [p for p in group["params"] if all(p is not q for q in two_d)]
    muon = torch.optim.Muon(two_d, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95))
    for step in range(3):
        train(model, optimizer, 1, first=step)
        by_hand(batch(step), labels=batch(step)).loss.backward()
        for one in (muon, adamw):
            one.step()
            one.zero_grad()
        if step == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(weights(model), weights(by_hand))


def test_muon_with_msign_restores_and_needs_its_groups():
    model = make_model()
    optimizer = MSignFactory()(model, base="muon", lr=1e-2, period=2, targets="all_2d")
    train(model, optimizer, 2)
    assert all(is_restored(target.parameter) for target in select_targets(model, "all_2d"))
    with pytest.raises(ValueError, match="use_muon"):
        MuonAdamW(model.parameters())


def test_the_factory_takes_a_class_and_refuses_other_names():
    model = make_model()
    optimizer = MSignFactory()(model, base=torch.optim.SGD, lr=0.1, momentum=0.9, period=5)
    assert isinstance(optimizer.base, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.param_groups[0]["msign_period"] == 5
    with pytest.raises(ValueError, match="base='lion'"):
        MSignFactory()(model, base="lion", lr=0.1)


def make_trainer(folder, *, model=None, **options):
    options = {"max_steps": 8, "learning_rate": 1e-2, "weight_decay": 0.1, "logging_steps": 1, **options}
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        save_steps=4,
        warmup_steps=2,
        **options,
    )
    rows = [{"input_ids": batch(i)[0], "labels": batch(i)[0]} for i in range(32)]
    kind = MSignFactory.for_trainer(args, period=3)
    return Trainer(model or make_model(), args, train_dataset=rows, optimizer_cls_and_kwargs=kind)


def test_the_trainer_resumes_to_the_last_bit(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    optimizer = whole.optimizer.optimizer
    assert isinstance(optimizer, MSign) and optimizer.steps == 8
    q_proj = whole.model.model.layers[0].self_attn.q_proj.weight
    assert 0.5 * 16 < stable_rank(q_proj, exact=True).item() < 16  # restored after step 6, and two more steps

    resumed = make_trainer(tmp_path / "resumed", model=make_model(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_equal(weights(resumed.model), weights(whole.model))
    assert resumed.optimizer.optimizer.steps == 8
    plain = make_trainer(tmp_path / "plain")
    plain.optimizer_cls_and_kwargs = None
    plain.train()
    assert not torch.equal(plain.model.model.layers[0].self_attn.q_proj.weight, q_proj)


def test_its_groups_are_the_trainer_s(tmp_path):
    ours, theirs = make_trainer(tmp_path), make_trainer(tmp_path)
    theirs.optimizer_cls_and_kwargs = None
    mine, right = ours.create_optimizer(), theirs.create_optimizer()
    names = [{p: n for n, p in t.model.named_parameters()} for t in (ours, theirs)]
    for group, expected in zip(mine.param_groups, right.param_groups, strict=True):
        assert [names[0][p] for p in group["params"]] == [names[1][p] for p in expected["params"]]
        for key in ("lr", "betas", "eps", "weight_decay"):
            assert group[key] == expected[key], key
    assert {group["weight_decay"] for group in mine.param_groups} == {0.1, 0.0}
