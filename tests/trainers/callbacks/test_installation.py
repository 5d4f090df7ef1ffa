"""Callbacks in a real Trainer: what they log reaches TensorBoard, and a PEFT-wrapped model is found."""

import torch
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback, ProgressCallback

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from trainers.callbacks import (
    ExpertBalanceCallback,
    ProgressiveSparsificationCallback,
    ThroughputCallback,
    install_callbacks,
)


LAYERS, EXPERTS, SEQUENCE = 2, 4, 12


def make_model(**overrides) -> SigmaMoeForCausalLM:
    torch.manual_seed(0)
    config = SigmaMoeConfig(
        **{
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "moe_intermediate_size": 8,
            "num_experts": EXPERTS,
            "max_position_embeddings": 32,
            "initializer_range": 0.2,
            "router_aux_loss_coef": 0.01,
            **overrides,
        }
    )
    return SigmaMoeForCausalLM(config)


def make_rows(number=64, vocab_size=40):
    ids = torch.randint(0, vocab_size, (number, SEQUENCE), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model, folder, *callbacks, resume=None, **options) -> Trainer:
    """A real run of a few steps with `callbacks` installed; returns its Trainer."""
    torch.set_num_threads(1)
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "learning_rate": 1e-2,
            **options,
        }
    )
    trainer = Trainer(model=model, args=args, train_dataset=make_rows(), eval_dataset=make_rows(4))
    trainer.remove_callback(PrinterCallback)
    install_callbacks(trainer, *callbacks)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def all_callbacks():
    return (
        ProgressiveSparsificationCallback([(0, [3, 2]), (2, 1)]),
        ExpertBalanceCallback(),
        ThroughputCallback(warmup_steps=1, peak_flops=1e12),
    )


LOGGED = (
    *("moe/stage", "moe/mean_top_k", "moe/active_parameters"),
    *("moe/max_violation", "moe/starved_experts", "moe/load_balancing_loss", "moe/router_entropy"),
    *("throughput/tokens_per_second", "throughput/step_seconds", "throughput/mfu"),
)


def test_logs_reach_tensorboard_and_the_history(tmp_path):
    model = make_model()
    trainer = train(model, tmp_path, *all_callbacks(), report_to=["tensorboard"])

    history = [row for row in trainer.state.log_history if "loss" in row]
    [events] = tmp_path.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent)).Reload()
    for name in LOGGED:
        kept = {row["step"]: row[name] for row in history if name in row}
        shown = {event.step: event.value for event in board.Scalars(f"train/{name}")}
        assert kept.keys() == shown.keys() == ({2, 3, 4} if name.startswith("throughput") else {1, 2, 3, 4}), name
        torch.testing.assert_close(shown, kept, rtol=1e-5, atol=1e-9, check_dtype=False)

    assert [row["moe/stage"] for row in history] == [0, 0, 1, 1]
    assert [row["moe/mean_top_k"] for row in history] == [2.5, 2.5, 1, 1]
    per_expert = 3 * 16 * 8
    without_embeddings = sum(p.numel() for p in model.parameters()) - 2 * 40 * 16
    idle = [(EXPERTS - 3) + (EXPERTS - 2), 2 * (EXPERTS - 1)]
    expected = [without_embeddings - idle[stage] * per_expert for stage in (0, 0, 1, 1)]
    assert [row["moe/active_parameters"] for row in history] == expected


def test_evaluation_and_the_final_summary_are_left_alone(tmp_path):
    trainer = train(make_model(), tmp_path, *all_callbacks(), eval_strategy="steps", eval_steps=2)
    others = [row for row in trainer.state.log_history if "loss" not in row]
    assert {name for row in others for name in row if "/" in name} == set()
    assert any("eval_loss" in row for row in others) and any("train_loss" in row for row in others)


class Recorder(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_init_end(self, args, state, control, **kwargs):
        self.seen.append("init")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(sorted(logs))


def test_order(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    late = Recorder()
    trainer = Trainer(model=make_model(), args=args, train_dataset=make_rows(), callbacks=[late])
    first, second = Recorder(), Recorder()
    install_callbacks(trainer, first, second)
    kinds = [
        callback if isinstance(callback, Recorder) else type(callback)
        for callback in trainer.callback_handler.callbacks
    ]
    assert kinds == [DefaultFlowCallback, first, second, late, ProgressCallback]
    assert first.seen == second.seen == late.seen == ["init"]


def test_lora(tmp_path):
    model = make_model(expert_bias_update_rate=0.01)
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    wrapped = get_peft_model(model, lora)
    top_k = []
    for router in model.routers:
        router.register_forward_hook(lambda module, *_: top_k.append(module.top_k))
    progressive, balance, throughput = all_callbacks()
    trainer = train(wrapped, tmp_path, progressive, balance, throughput)

    assert top_k == [3, 2, 3, 2, 1, 1, 1, 1]
    assert (model.config.num_experts_per_tok, model.config.num_experts_per_tok_per_layer) == (1, None)
    assert len((tmp_path / "logs" / "balance.jsonl").read_text().splitlines()) == 4 * LAYERS
    assert all(router.e_score_correction_bias.abs().max() > 0 for router in model.routers)
    assert throughput.steady_tokens == 3 * 2 * SEQUENCE
    last = [row for row in trainer.state.log_history if "loss" in row][-1]
    assert set(LOGGED) <= set(last)
