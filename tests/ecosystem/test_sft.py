"""TRL's SFTTrainer: what it does to our balance loss, and how to keep it."""

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from trainers.callbacks import ExpertBalanceCallback, install_callbacks
from trainers.data import chat_examples


CHATS = [
    [{"role": "user", "content": f"add {n}"}, {"role": "assistant", "content": f"x + {n}" * (n % 3 + 1)}]
    for n in range(8)
]
TEXTS = [f"def add_{n}(x):\n    return x + {n}\n" * (n % 3 + 1) for n in range(8)]
OPTIONS = {
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="needs trl, which is not installed")


@pytest.fixture
def model(family, text_fields):
    return family.model(**text_fields)


@pytest.fixture
def sft(trl, model, tokenizer, tmp_path):
    """`sft(rows)`: an SFTTrainer, or a subclass, of `model` on a column of `rows`."""

    def build(rows, cls=trl.SFTTrainer, **options):
        args = trl.SFTConfig(output_dir=str(tmp_path / "run"), **OPTIONS | options)
        return cls(model, args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)

    return build


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def chat_batch(tokenizer):
    """All conversations as one batch with labels on what the assistant says, by our own functions."""
    examples = chat_examples(Dataset.from_dict({"messages": CHATS}), tokenizer, sequence_length=128)
    return DataCollatorForSeq2Seq(tokenizer)(list(examples))


@torch.no_grad()
def forward(model, batch):
    """Cross-entropy and router logits."""
    out = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    return loss.item(), out.router_logits


@pytest.mark.compatibility(
    "SFTTrainer",
    library="trl",
    note="adds Mixtral's balance loss, of all layers taken together, in place of the model's own",
)
def test_sft_learns_the_answers_and_the_saved_model_comes_back(sft, model, tokenizer, tmp_path):
    batch = chat_batch(tokenizer)
    cross_entropy, router_logits = forward(model, batch)
    trainer = sft({"messages": CHATS}, assistant_only_loss=True)
    install_callbacks(trainer, ExpertBalanceCallback())
    trainer.train()
    history = losses(trainer)
    assert all(late < early for early, late in zip(history[:2], history[-2:], strict=True))

    # The loss is TRL's: it passes over the head's forward, and with it the model's balance loss and statistics.
    config = model.config
    balance = load_balancing_loss_func(
        router_logits, config.num_experts, config.num_experts_per_tok, batch["attention_mask"]
    ).item()
    first = trainer.state.log_history[0]
    assert first["aux_loss"] == pytest.approx(balance, rel=1e-4)
    assert first["loss"] == pytest.approx(cross_entropy + config.router_aux_loss_coef * balance, rel=1e-4)
    assert model.routing_window.summary() is None

    trainer.save_model(tmp_path / "saved")
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), batch["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=0, atol=0)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.apply_chat_template(CHATS[0]) == tokenizer.apply_chat_template(CHATS[0])


@pytest.mark.compatibility(
    "SFTTrainer with the model's own balance loss",
    library="trl",
    note="in a subclass with `compute_loss = transformers.Trainer.compute_loss`",
)
def test_a_subclass_with_the_loss_of_transformers_trains_as_its_trainer_does(
    sft, trl, family, model, text_fields, tokenizer, tmp_path
):
    class OwnLoss(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    ours = sft({"messages": CHATS}, OwnLoss, assistant_only_loss=True, **accumulated)
    examples = list(chat_examples(Dataset.from_dict({"messages": CHATS}), tokenizer, sequence_length=128))
    theirs = Trainer(
        family.model(**text_fields),
        TrainingArguments(output_dir=str(tmp_path / "plain"), **OPTIONS | accumulated),
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    for trainer in (ours, theirs):
        install_callbacks(trainer, ExpertBalanceCallback())
        trainer.train()
    for got, expected in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for name in expected:
            if name.startswith("moe/") or name in ("loss", "grad_norm"):
                assert got[name] == pytest.approx(expected[name], rel=1e-3), name
    assert "moe/max_violation" in ours.state.log_history[0]


@pytest.mark.compatibility("SFTTrainer with packing", library="trl")
def test_packed_texts_do_not_see_each_other(sft, model, tokenizer):
    trainer = sft({"text": TEXTS}, packing=True, max_length=128)
    packed = next(iter(trainer.get_train_dataloader()))
    starts = (packed["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == len(TEXTS) and packed["input_ids"].shape[0] == 1
    inputs = {name: value for name, value in packed.items() if name != "labels"}
    with torch.no_grad():
        together = model.eval()(**inputs).logits[0]
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            alone = model(packed["input_ids"][:, start:end]).logits[0]
            torch.testing.assert_close(together[start:end], alone, rtol=1e-4, atol=1e-4)
    trainer.train()
    history = losses(trainer)
    assert all(late < early for early, late in zip(history[:2], history[-2:], strict=True))
