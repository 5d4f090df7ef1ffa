"""What users turn on in a Trainer: TensorBoard, gradient checkpointing and bf16."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from trainers.callbacks import ExpertBalanceCallback, install_callbacks


ROWS = torch.randint(2, 40, (8, 12), generator=torch.Generator().manual_seed(0))


def train(model, folder, *callbacks, **options):
    """Six steps on the same eight rows, two micro-batches each; returns the Trainer."""
    args = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    trainer = Trainer(model, TrainingArguments(**args | options), train_dataset=rows, eval_dataset=rows[:4])
    install_callbacks(trainer, *callbacks)
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.compatibility("TensorBoard", library="tensorboard")
def test_tensorboard_shows_all_that_was_logged(family, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard, which is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callbacks = family.schedule(family.config().num_hidden_layers), ExpertBalanceCallback()
    options = {"report_to": "tensorboard", "eval_strategy": "steps", "eval_steps": 3}
    trainer = train(family.model(), tmp_path, *callbacks, **options)

    expected = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            part, name = ("eval", name.removeprefix("eval_")) if name.startswith("eval_") else ("train", name)
            if name != "step":
                expected[f"{part}/{name}", entry["step"]] = value
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    shown = {(tag, s.step): s.value for tag in accumulator.Tags()["scalars"] for s in accumulator.Scalars(tag)}
    assert shown == pytest.approx(expected, rel=1e-6)
    for name, values in family.logged.items():
        assert [shown[f"train/{name}", step] for step in range(1, 7)] == values
    assert {("train/moe/max_violation", 6), ("train/loss", 6), ("eval/loss", 3)} <= set(shown)


@pytest.mark.compatibility("Gradient checkpointing", library="transformers")
def test_gradient_checkpointing_computes_twice_and_changes_nothing(family, tmp_path):
    runs = []
    for checkpointing in (False, True):
        model, forwards = family.model(), []
        model.base_model.layers[0].self_attn.register_forward_hook(lambda *_, calls=forwards: calls.append(1))
        trainer = train(model, tmp_path, ExpertBalanceCallback(), gradient_checkpointing=checkpointing)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        names = [name for name in logged[0] if name.startswith("moe/") or name in ("loss", "grad_norm")]
        runs.append(([[entry[name] for name in names] for entry in logged], len(forwards)))
    (plain, once), (saved, twice) = runs
    assert (once, twice) == (6 * 2, 6 * 2 * 2) and len(plain[0]) > 3
    torch.testing.assert_close(torch.tensor(saved), torch.tensor(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.compatibility("bf16 training", library="transformers")
def test_training_in_bf16_learns_and_keeps_weights_and_routers_in_fp32(family, tmp_path):
    model, seen = family.model(), {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", family.router.strip("."))):
            module.register_forward_hook(lambda module, args, out, name=name: seen.setdefault(name, []).append(out))
    history = losses(train(model, tmp_path, bf16=True))
    assert all(late < early for early, late in zip(history[:2], history[-2:], strict=True))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    for name, outputs in seen.items():
        router = not name.endswith("q_proj")
        dtype = {(out[0] if router else out).dtype for out in outputs}
        assert dtype == {torch.float32 if router else torch.bfloat16}, name
    # of several models: in one, a token that goes to another expert or neuron moves a loss by more than the rounding
    runs = [[losses(train(family.model(seed), tmp_path, bf16=bf16)) for seed in range(4)] for bf16 in (True, False)]
    half, full = (torch.tensor(run).mean(0) for run in runs)
    torch.testing.assert_close(half, full, rtol=0.02, atol=0)


@pytest.mark.compatibility("bf16 inference", library="transformers")
def test_a_model_loaded_in_bf16_generates_with_its_router_in_fp32(saved, family, text_fields):
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    dtypes = {family.router in name: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    ids = torch.randint(5, text_fields["vocab_size"], (2, 9))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "output_logits": True}
    out = model.generate(ids, return_dict_in_generate=True, **options)
    assert out.sequences.shape == (2, 21)
    with torch.no_grad():
        whole = family.model(**text_fields)(out.sequences).logits[:, 8:-1].log_softmax(-1)
    stepwise = torch.stack(out.logits, dim=1).float().log_softmax(-1)
    divergence = F.kl_div(stepwise, whole, log_target=True, reduction="none").sum(-1)
    assert divergence.max() < 0.05
