"""LoRA by PEFT: on attention and on 3-D expert parameters, trained, saved, merged and pushed."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.hub.client import call_client
from tests.hub.server import LoopbackHub


IDS = torch.randint(2, 40, (8, 12), generator=torch.Generator().manual_seed(0))
TOKEN = "hf_fake_alice"
WHERE = {"attention": "LoRA on attention", "experts": "LoRA on 3-D expert parameters"}


def on_each(feature="{}", library="peft", note=""):
    """The test once for each place of the adapter, each with a row of its own."""
    row = partial(pytest.mark.compatibility, library=library, note=note)
    return pytest.mark.parametrize(
        "where", [pytest.param(where, marks=row(feature.format(name))) for where, name in WHERE.items()]
    )


def targets(family, where):
    if where == "attention":
        return {"target_modules": family.attention}
    return {"target_modules": [], "target_parameters": family.experts}


def trained(family, where, folder):
    """An adapter after ten steps of a real Trainer."""
    model = get_peft_model(
        family.model(), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets(family, where))
    )
    args = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=10,
        per_device_train_batch_size=len(IDS),
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])
    trainer.train()
    return model.eval(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@on_each()
def test_an_adapter_learns_and_leaves_the_base_alone(family, where, tmp_path):
    model, losses = trained(family, where, tmp_path)
    assert all(late < early for early, late in zip(losses[:3], losses[-3:], strict=True))
    base = family.model().state_dict()
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in model.state_dict().items()}
    state = {name.replace("base_layer.", ""): tensor for name, tensor in state.items() if "lora_" not in name}
    assert state.keys() == base.keys() and all(torch.equal(state[name], base[name]) for name in base)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert learned and all("lora_" in name and p.any() for name, p in learned.items())
    places = family.attention if where == "attention" else ["mlp.experts"]
    for layer in range(model.config.num_hidden_layers):
        assert all(any(f"layers.{layer}." in name and place in name for name in learned) for place in places)


@on_each()
def test_a_saved_adapter_comes_back_on_a_fresh_base(family, where, tmp_path):
    model, _ = trained(family, where, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    again = PeftModel.from_pretrained(family.model(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    assert (expected - logits(family.model())).abs().max() > 0.1
    with again.disable_adapter():
        torch.testing.assert_close(logits(again), logits(family.model()), rtol=0, atol=0)


@on_each()
def test_a_merged_adapter_is_a_plain_checkpoint(family, where, tmp_path):
    model, _ = trained(family, where, tmp_path)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is type(family.model())
    assert merged.state_dict().keys() == family.model().state_dict().keys()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(merged), rtol=0, atol=0)


# --- through the Hub -------------------------------------------------------------------------------------------------


# Both run in processes of their own, where they import what they need: a client knows one Hub only.


def push(base, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import hf_models  # noqa: F401

    AutoModelForCausalLM.from_pretrained(base).push_to_hub("alice/base")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("alice/base"), adapter)
    model.push_to_hub("alice/adapter")
    model.merge_and_unload().push_to_hub("alice/merged")


def pull(ids):
    """As somebody without our package, with the code that the repositories bring."""
    import sys

    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    models = {
        "peft": AutoPeftModelForCausalLM.from_pretrained("alice/adapter", trust_remote_code=True),
        "transformers": AutoModelForCausalLM.from_pretrained("alice/adapter", trust_remote_code=True),
        "merged": AutoModelForCausalLM.from_pretrained("alice/merged", trust_remote_code=True),
    }
    assert "hf_models" not in sys.modules
    with torch.no_grad():
        return {name: model.eval()(torch.tensor(ids)).logits.tolist() for name, model in models.items()}


@pytest.mark.slow
@on_each("{}, pushed to the Hub and pulled", "huggingface-hub", "with a Hub on the loopback interface")
def test_a_pushed_adapter_and_the_merged_model_come_back_by_their_ids(family, where, tmp_path):
    model, _ = trained(family, where, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    family.model().save_pretrained(tmp_path / "base")
    with LoopbackHub({TOKEN: "alice"}) as hub:
        paths = [str(tmp_path / name) for name in ("base", "adapter")]
        call_client(push, hub, *paths, home=tmp_path / "writer", token=TOKEN)
        answers = call_client(pull, hub, IDS.tolist(), home=tmp_path / "reader", token=None)
        assert "adapter_model.safetensors" in hub.files("alice/adapter")
        assert not any(name.startswith("adapter") for name in hub.files("alice/merged"))
    expected = logits(model)
    for name, answer in answers.items():
        torch.testing.assert_close(torch.tensor(answer), expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m)
