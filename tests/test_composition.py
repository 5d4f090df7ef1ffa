"""Methods together: each test takes two or three of them, as a user would, and checks the numbers where they meet.

Sigma-MoE, MoNE and M-MoE in one model: `tests/hf_models/moe/test_family.py`.
"""

import importlib
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_models.ctr import CtrConfig, CtrForCtrPrediction
from hf_models.m3bert import M3BertForSequenceClassification
from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from hf_models.moe.growth import GrowthPlan, grow_model, grow_pretrained
from tests.hf_models.m3bert.tiny_m3bert import tiny as tiny_m3bert
from tests.test_readme import FEDERATED, GROW_ON
from tests.trainers.device_cloud.tiny_clicks import one_by_one
from tests.trainers.federated.tiny_federation import arguments, assert_same, federation
from trainers import recipes
from trainers.callbacks import (
    ExpertBalanceCallback,
    MSignCallback,
    ProgressiveSparsificationCallback,
    install_callbacks,
)
from trainers.data import CtrCollator, CtrRows, train_tokenizer
from trainers.device_cloud import (
    Correction,
    DeviceBudget,
    DeviceBudgetError,
    LabelCorrectionCallback,
    LabelCorrectionCollator,
    OnDeviceArguments,
    OnDeviceFineTuner,
    correct_labels,
)
from trainers.device_cloud.label_correction import model_prior
from trainers.federated import ClientRows, FedAvg, FederatedTrainer, FedLaAvg, FedSubAvg
from trainers.federated.core import WireMeter, pack
from trainers.optimizers import MSignFactory
from trainers.reliability import find_last_valid_checkpoint, reliability


QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
MOE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts": 6,
    "num_experts_per_tok_per_layer": [4, 2],
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "router_aux_loss_coef": 0.05,
    "pad_token_id": 0,
}
IDS = torch.randint(2, 40, (8, 20), generator=torch.Generator().manual_seed(0))


def sigma_moe(**fields):
    torch.manual_seed(0)
    return SigmaMoeForCausalLM(SigmaMoeConfig(**MOE | fields))


@torch.no_grad()
def logits_of(model, ids=IDS):
    return model.eval()(ids).logits


def assert_flat(weight):
    """Singular values all alike, as MSign leaves them."""
    s = torch.linalg.svdvals(weight.detach().float())
    torch.testing.assert_close(s, s.mean().expand_as(s), rtol=1e-2, atol=0)


# --- any recipe with --optimizer msign and --reliability on ----------------------------------------------------------


BOTH = ("optimizer", "reliability")
# What cannot act in a recipe is refused with the reason, never ignored.
REFUSED = {
    "federated_ctr": (BOTH, "clients begin every round with a fresh optimizer"),
    "federated_digits": (BOTH, "clients begin every round with a fresh optimizer"),
    "federated_lm": (BOTH, "clients begin every round with a fresh optimizer"),
    "train_dc_ccl": (BOTH, "short runs of their own"),
    "compare_collaboration": (BOTH, "short runs of their own"),
    "m3bert_evidence": (BOTH, "plain_st2d runs in Sentence Transformers' own trainer"),
    "stability_msign": (("optimizer",), "--arms say which run has MSign"),
    "train_dot_cbm": (("optimizer",), "AdamW whose rate halves"),
    "dot_cbm_evidence": (("optimizer",), "AdamW whose rate halves"),
}
VALUES = {"optimizer": "msign", "reliability": "on"}


def training_recipes():
    """Those that take the arguments of training; `prune_neurons`, for one, does not train."""
    modules = {
        m.name: importlib.import_module(f"{recipes.__name__}.{m.name}") for m in pkgutil.iter_modules(recipes.__path__)
    }
    return {n: m for n, m in modules.items() if hasattr(m, "main") and hasattr(m, "RecipeTrainingArguments")}


def test_every_training_recipe_has_both_options_and_none_ignores_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = training_recipes()
    assert len(found) >= 18 and REFUSED.keys() <= found.keys()
    for name, module in found.items():
        with pytest.raises(SystemExit) as ending:
            module.main(["--help"])
        shown = capsys.readouterr().out
        assert ending.value.code == 0 and "--optimizer {base,msign}" in shown and "--reliability {off,on" in shown, (
            name
        )
    for name, (options, because) in REFUSED.items():
        for option in options:
            with pytest.raises(SystemExit, match=f"--{option} {VALUES[option]}: .*{because}"):
                found[name].main([f"--{option}", VALUES[option]])
    with pytest.raises(SystemExit, match="--optimizer msign, --reliability on: .*--objective"):
        argv = "--model_name x --objective matryoshka_2d --optimizer msign --reliability on".split()
        found["finetune_m3bert"].main(argv)
    assert not list(tmp_path.iterdir()), "refused before anything is written"


def test_post_training_with_both(tmp_path):
    from trainers.recipes.sft_sigma_moe import main

    words = ("red", "blue", "green", "yellow", "black", "white", "pink", "grey")
    tokenizer = train_tokenizer([f"Say {word}" for word in words] * 3, vocab_size=290, model_max_length=32)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sigma_moe(vocab_size=len(tokenizer), **ids).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    turns = [[{"role": "user", "content": f"Say {w}"}, {"role": "assistant", "content": w}] for w in words]
    Dataset.from_list([{"messages": turn} for turn in turns]).to_json(tmp_path / "chat.jsonl")
    main(
        f"--model_name_or_path {tmp_path}/base --dataset_name {tmp_path}/chat.jsonl --output_dir {tmp_path}/chat "
        "--max_steps 4 --save_steps 2 --logging_steps 1 --held_out_fraction 0.3 --warmup_steps 1 --use_cpu true "
        "--report_to none --optimizer msign --msign_period 2 --msign_targets all_2d --reliability on "
        '--lr_scheduler_kwargs {"num_decay_steps":2}'.split()
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "chat")
    assert_flat(model.model.layers[1].self_attn.o_proj.weight)
    for expert in model.model.layers[0].mlp.experts.down_proj:
        assert_flat(expert)
    assert find_last_valid_checkpoint(tmp_path / "chat").name == "checkpoint-4"


def test_personalisation_with_both(tmp_path):
    from trainers.recipes.personalize_anonymously import main

    main(
        f"--users 6 --arms central static --stage1_steps 4 --max_steps 4 --output_dir {tmp_path}/run "
        "--optimizer msign --msign_period 2 --msign_targets all_2d --reliability on".split()
    )
    stage1 = tmp_path / "run" / "runs" / "main" / "stage1" / "seed0"
    model = AutoModelForSequenceClassification.from_pretrained(stage1)
    matrices = {n: p for n, p in model.named_parameters() if n.endswith("attn.c_proj.weight")}
    assert matrices
    for matrix in matrices.values():
        assert_flat(matrix)
    assert list((stage1 / "trainer").glob("goodput*"))


# --- growth in the middle of a run, and on ---------------------------------------------------------------------------


def moe_trainer(model, folder, stages, steps):
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=len(IDS),
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=2,
        **QUIET,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    install_callbacks(trainer, ProgressiveSparsificationCallback(stages, unit="fraction"), ExpertBalanceCallback())
    return trainer


def test_a_checkpoint_grows_and_the_schedule_goes_on(tmp_path):
    small = moe_trainer(sigma_moe(), tmp_path / "small", [(0, [4, 2])], 4)
    small.train()
    before = small.evaluate()["eval_loss"]

    plan = GrowthPlan(depth_factor=2, width_factor=2, depth_copy_init="zero_output", noise_alpha=0.0)
    grow_pretrained(tmp_path / "small" / "checkpoint-4", tmp_path / "grown", plan)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert_same(model.state_dict(), grow_model(small.model, plan).state_dict())
    assert (model.config.num_experts, model.config.top_k_per_layer) == (12, [8, 8, 4, 4])
    torch.testing.assert_close(logits_of(model), logits_of(small.model), rtol=0, atol=1e-5)

    grown = moe_trainer(model, tmp_path / "run", [(0, [8, 8, 4, 4]), (0.5, 1)], 8)
    assert abs(grown.evaluate()["eval_loss"] - before) < 1e-5
    grown.train()
    log = [entry for entry in grown.state.log_history if "loss" in entry]
    assert [entry["moe/stage"] for entry in log] == [0] * 4 + [1] * 4
    assert log[3]["loss"] < log[0]["loss"] and log[7]["loss"] < log[4]["loss"]
    # The first loss is what evaluation said, and the balance of four layers in the place of two.
    balance = log[0]["moe/load_balancing_loss"] * 4 * MOE["router_aux_loss_coef"]
    assert abs(log[0]["loss"] - balance - before) < 2e-3
    lines = (tmp_path / "run" / "logs" / "balance.jsonl").read_text().splitlines()
    assert len(lines) == 8 * 4

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-8")
    assert again.config.top_k_per_layer == [1] * 4
    assert torch.equal(logits_of(again), logits_of(grown.model))


def test_width_alone_changes_not_even_the_balance_loss(tmp_path):
    model = sigma_moe().train()
    grown = grow_model(model, GrowthPlan(width_factor=2, noise_alpha=0.0))
    one, other = (m(input_ids=IDS, labels=IDS) for m in (model, grown))
    torch.testing.assert_close(other.load_balancing_losses, one.load_balancing_losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(other.loss, one.loss, rtol=0, atol=1e-5)


# --- federated LoRA of a Sigma-MoE -----------------------------------------------------------------------------------


def adapted(**fields):
    """Adapters on attention and on the 3-D parameters of the experts."""
    model = sigma_moe(**fields)
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def speakers(clients=3):
    """Each has words of their own."""
    rows = []
    for client in range(clients):
        for start in range(4):
            ids = [1, *(2 + client * 8 + (start + step) % 8 for step in range(7))]
            rows.append({"user": f"u{client}", "input_ids": ids, "labels": ids})
    return Dataset.from_list(rows)


STRATEGIES = {"FedAvg": lambda: FedAvg(clients_per_round=2), "FedLaAvg": lambda: FedLaAvg(learning_rate=0.5)}


@pytest.mark.parametrize("name", STRATEGIES)
def test_federated_lora_of_experts(name, tmp_path):
    def run(folder, rounds, **fields):
        args = {"learning_rate": 0.5, "save_strategy": "steps"}
        fed = federation(folder, adapted(**fields), speakers(), STRATEGIES[name](), rounds=rounds, args=args)
        fed.train(resume_from_checkpoint=True)
        return fed

    fed = run(tmp_path / "whole", 2, output_router_logits=True)
    served = fed.strategy.parameters
    assert all("lora_" in parameter for parameter in served)
    assert {parameter.split(".")[6] for parameter in served} == {"q_proj", "v_proj", "experts"}
    assert all(tensor.any() for parameter, tensor in served.items() if "lora_B" in parameter)

    # On the wire: the adapter, and names and shapes of its tensors.
    size = sum(4 * tensor.numel() for tensor in served.values())
    header = len(pack({f"parameters/{n}": t for n, t in served.items()})) - size
    for record in fed.history:
        clients = len(record["accepted"])
        for way in ("up", "down"):
            assert 0 < record[f"bytes_{way}"] - clients * size < clients * (header + 300), way
    assert fed.history[1]["loss"] < fed.history[0]["loss"]

    # The balance loss reaches the adapters, though they do not touch the routers.
    without = run(tmp_path / "without", 2, router_aux_loss_coef=0.0)
    assert without.history[0]["loss"] < fed.history[0]["loss"]
    assert not all(torch.equal(without.strategy.parameters[parameter], served[parameter]) for parameter in served)

    fed.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(sigma_moe(), tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(fed.model))
    assert (logits_of(again) - logits_of(sigma_moe())).abs().max() > 0.1

    run(tmp_path / "part", 1, output_router_logits=True)
    resumed = run(tmp_path / "part", 2, output_router_logits=True)
    assert_same(resumed.strategy.parameters, served)
    assert resumed.history == fed.history


# --- a truncated m3BERT on the device --------------------------------------------------------------------------------


def texts_of_users(users=3, rows=8):
    """A text's class is where its user has put the first word, each user elsewhere."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (users * rows, 9), generator=generator)
    ids[::3, 6:] = 1  # padding
    whose = torch.arange(len(ids)) % users
    labels = (ids[:, 0] % 3 + whose) % 3
    tensors = {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": labels}
    return SimpleNamespace(tensors=tensors, users=whose)


def test_a_truncated_m3bert_is_the_device_side_of_a_clouds_model(tmp_path):
    rows = texts_of_users()
    cloud = tiny_m3bert(M3BertForSequenceClassification)
    examples = [{name: tensor[i] for name, tensor in rows.tensors.items()} for i in range(len(rows.users))]
    args = TrainingArguments(str(tmp_path / "cloud"), max_steps=5, learning_rate=1e-3, save_strategy="no", **QUIET)
    Trainer(cloud, args, train_dataset=examples).train()

    small = cloud.truncate(layers=2, dim=8).eval()
    with torch.no_grad():
        state = cloud.eval().model(
            rows.tensors["input_ids"], rows.tensors["attention_mask"], exit_layer=2, embed_dim=8
        )
        own = small.model(rows.tensors["input_ids"], rows.tensors["attention_mask"])
    assert torch.equal(own.last_hidden_state, state.last_hidden_state)

    options = OnDeviceArguments(device_learning_rate=0.05, device_steps=3, min_samples=3, roll_back=False)
    budget, meter = DeviceBudget(max_bytes=80_000, max_peak_bytes=800_000), WireMeter()
    with pytest.raises(DeviceBudgetError, match="M3Bert|OneUser"):
        OnDeviceFineTuner(cloud, options, budget=budget).fit(rows)
    tuner = OnDeviceFineTuner(small, options, budget=budget, meter=meter)
    users = tuner.fit(rows, predict={"own": rows}, store=tmp_path / "users")
    assert users.cost.bytes < 80_000 < sum(4 * p.numel() for p in cloud.parameters())
    assert meter.totals() == {"up": 0, "down": 3 * len(pack(small.state_dict()))}

    for user in range(3):
        alone = one_by_one(small, tuner.names, rows, user, rate=0.05, steps=3)
        kept = tuner.user_state(tmp_path / "users", user)
        for name, tensor in alone.items():
            torch.testing.assert_close(kept[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    mine, labels = rows.users == 1, rows.tensors["labels"]
    before = F.cross_entropy(tuner.predict_cloud(rows)[mine], labels[mine])
    assert F.cross_entropy(users.logits["own"][mine], labels[mine]) < before
    tuner.save_user(tmp_path / "users", 1, tmp_path / "phone")
    phone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "phone").eval()
    inputs = {name: tensor[mine] for name, tensor in rows.tensors.items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(phone(**inputs).logits, users.logits["own"][mine], rtol=1e-4, atol=1e-5)


# --- label correction inside a federated round -----------------------------------------------------------------------


def click_model():
    features = [
        {"name": "user", "role": "user", "vocab_size": 7},
        {"name": "item", "role": "item", "vocab_size": 20},
    ]
    torch.manual_seed(0)
    return CtrForCtrPrediction(CtrConfig(features=features, embedding_dim=4, hidden_sizes=[6], initializer_range=0.5))


def clicks(users=4, rows=8):
    """Users who click more often the higher their number."""
    generator = torch.Generator().manual_seed(0)
    whose = torch.arange(users).repeat_interleave(rows)
    ids = torch.stack([whose + 2, torch.randint(1, 20, whose.shape, generator=generator)], dim=1)
    labels = (torch.arange(len(whose)) % rows < 2 * whose + 1).float()
    return CtrRows({"categorical_features": ids, "labels": labels}, whose)


def as_dataset(rows):
    columns = {name: tensor.tolist() for name, tensor in rows.tensors.items()}
    return Dataset.from_dict({"user": rows.users.tolist()} | columns)


def ctr_federation(folder, data, strategy, *, rounds=2, model=None, **options):
    settings = {"local_steps": 3, "data_collator": CtrCollator(), "partition_by": "user"} | options
    args = {"per_device_train_batch_size": 8, "remove_unused_columns": False}
    model = click_model() if model is None else model
    return federation(folder, model, data, strategy, rounds=rounds, args=args, **settings)


def trained_alone(start, rows, labels, user, *, rate=0.1, steps=3):
    """What a client's round is: so many steps of gradient descent on its rows, with these labels."""
    model = click_model()
    model.load_state_dict(start, strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    own = rows.users == user
    for _ in range(steps):
        optimizer.zero_grad()
        model(categorical_features=rows.tensors["categorical_features"][own], labels=labels[own]).loss.backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("strategy", [FedAvg, FedSubAvg])
def test_clients_correct_their_labels_by_the_global_share(strategy, tmp_path):
    rows = clicks()
    data, share = as_dataset(rows), 0.3
    collator = LabelCorrectionCollator.of_dataset(data, share, group_column="user", collator=CtrCollator())
    clients = ClientRows(data, "user", collate=collator)
    fed = ctr_federation(tmp_path / "a", clients, strategy(), rounds=1)
    start = fed.local.parameters
    fed.train()
    soft = correct_labels(rows.tensors["labels"], share, groups=rows.users)
    for user in range(4):
        own = rows.users == user
        batch = fed.clients.data(str(user)).batch(None)
        torch.testing.assert_close(batch["labels"], soft[own], rtol=0, atol=1e-6)
        assert abs(float(batch["labels"].mean()) - share) < 1e-6
    # The same round on labels that were corrected directly, and, of plain averaging, by hand.
    by_hand = CtrRows(rows.tensors | {"labels": soft}, rows.users)
    direct = ctr_federation(tmp_path / "b", by_hand, strategy(), rounds=1, partition_by=rows.users)
    direct.train()
    for name, tensor in fed.strategy.parameters.items():
        torch.testing.assert_close(tensor, direct.strategy.parameters[name], rtol=0, atol=1e-6)
    if strategy is FedAvg:
        ends = [trained_alone(start, rows, soft, user) for user in range(4)]
        for name, tensor in fed.strategy.parameters.items():
            torch.testing.assert_close(tensor, torch.stack([end[name] for end in ends]).mean(0), rtol=0, atol=1e-5)
    # Evaluation sees what users did, not what clients made of it.
    again = fed.evaluate(data)
    with torch.no_grad():
        plain = fed.model.eval()(**rows.tensors).loss
    assert abs(again["eval_loss"] - float(plain)) < 1e-5


class PriorOfServedModel(TrainerCallback):
    """Each round, each client's reference is the mean prediction of the model that it gets on its own rows."""

    def __init__(self, trainer, rows, collator):
        self.trainer, self.rows, self.collator, self.seen = trainer, rows, collator, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.serve()
        logits = logits_of(self.trainer.model, self.rows.tensors["categorical_features"]).flatten()
        priors = model_prior(logits, groups=self.rows.users)
        self.collator.p_ref.update(zip(self.rows.users.tolist(), priors.tolist()))
        self.seen.append(dict(self.collator.p_ref))


@pytest.mark.parametrize("strategy", [FedAvg, FedSubAvg])
def test_clients_correct_their_labels_by_the_model_that_they_are_served(strategy, tmp_path):
    rows = clicks()
    data = as_dataset(rows)
    known = dict.fromkeys(range(4), 0.5)  # until the first round; which rows clients read is asked before
    collator = LabelCorrectionCollator.of_dataset(data, known, group_column="user", collator=CtrCollator())
    fed = ctr_federation(tmp_path / "fed", ClientRows(data, "user", collate=collator), strategy(), rounds=2)
    fed.add_callback(prior := PriorOfServedModel(fed, rows, collator))
    fed.train()

    # Directly: a federation of one round on labels corrected by the model, twice.
    model = click_model()
    for number in range(2):
        logits = logits_of(model, rows.tensors["categorical_features"]).flatten()
        targets = Correction(method="scale", prior="model").targets(rows.tensors["labels"], rows.users, logits)
        for user in range(4):
            own = rows.users == user
            assert abs(prior.seen[number][user] - float(logits[own].double().sigmoid().mean())) < 1e-6
            assert abs(prior.seen[number][user] - float(targets.labels[own].mean())) < 1e-6
        corrected = CtrRows(rows.tensors | {"labels": targets.labels}, rows.users)
        options = {"rounds": 1, "partition_by": rows.users, "model": model}
        one = ctr_federation(tmp_path / str(number), corrected, strategy(), **options)
        one.train()
    assert prior.seen[0] != prior.seen[1]
    for name, tensor in fed.strategy.parameters.items():
        torch.testing.assert_close(tensor, one.strategy.parameters[name], rtol=0, atol=1e-5)


def test_clients_take_weights_and_offsets_of_a_correction_too(tmp_path):
    rows = clicks()
    cloud = logits_of(click_model(), rows.tensors["categorical_features"]).flatten()
    targets = Correction(method="offset", prior="model").targets(rows.tensors["labels"], rows.users, cloud)
    corrected = CtrRows(rows.tensors | targets._asdict(), rows.users)
    plain, offset = (
        ctr_federation(tmp_path / str(i), r, FedSubAvg(), partition_by=r.users)
        for i, r in enumerate((rows, corrected))
    )
    plain.train(), offset.train()
    batch = offset.clients.data("2").batch(None)
    assert torch.equal(batch["logit_offset"], targets.logit_offset[rows.users == 2]) and batch["logit_offset"].any()
    assert any(not torch.equal(t, plain.strategy.parameters[n]) for n, t in offset.strategy.parameters.items())


# --- what does not compose says so -----------------------------------------------------------------------------------


def test_what_would_act_on_nothing_in_a_federated_trainer_is_refused(tmp_path):
    data = as_dataset(clicks())
    fed = ctr_federation(tmp_path, data, FedAvg())
    with pytest.raises(
        ValueError, match=r"reliability\(\) has nothing to work on in a FederatedTrainer.*save_strategy"
    ):
        reliability(fed)
    collator = LabelCorrectionCollator.of_dataset(data, 0.3, group_column="user")
    for install in (collator.install, LabelCorrectionCallback(0.3, group_column="user").install):
        with pytest.raises(ValueError, match="nothing to work on.*ClientRows"):
            install(fed)
    with pytest.raises(ValueError, match="gives whole batches.*correction.targets"):
        collator(clicks().__getitems__([0, 1]))
    fed.add_callback(MSignCallback(1, targets=r"weight$"))
    with pytest.raises(ValueError, match="MSignCallback was told of no optimizer's step"):
        fed.train()
    args = arguments(tmp_path)
    for optimizer in (MSignFactory.for_trainer(args), (MSignFactory, {"lr": 1.0})):
        with pytest.raises(ValueError, match="MSignFactory: clients begin each round with a fresh optimizer"):
            FederatedTrainer(
                click_model(),
                args,
                train_dataset=data,
                partition_by="user",
                strategy=FedAvg(),
                rounds=1,
                optimizer_cls_and_kwargs=optimizer,
            )


# --- the README's section --------------------------------------------------------------------------------------------


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sigma_moe().save_pretrained("runs/mine/checkpoint-1000")
    names = {"AutoModelForCausalLM": AutoModelForCausalLM}
    exec(compile(GROW_ON, "README", "exec"), names)
    assert names["model"].config.top_k_per_layer == [8, 8, 4, 4]
    rows = clicks()
    names |= {"texts": speakers(), "ratings": as_dataset(rows), "click_model": click_model()}
    names["args"] = arguments(tmp_path / "federated", remove_unused_columns=False, max_steps=-1)
    before = {name: p.detach().clone() for name, p in names["click_model"].named_parameters()}
    exec(compile(FEDERATED, "README", "exec"), names)
    assert any(p.any() for name, p in names["adapted"].named_parameters() if "lora_B" in name)
    assert not all(torch.equal(p, before[name]) for name, p in names["click_model"].named_parameters())
