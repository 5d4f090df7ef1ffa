"""The README's promises about devices and a cloud: its code runs, and does what the sentences beside it say."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from tests.test_readme import README, ROOT, measured
from trainers.data import CtrRows, draw_drifted_clicks
from trainers.report import read_results


SECTION = README.split("## Devices and a cloud")[1].split("## Runs that do not die")[0]
ON_DEVICE, DC_CCL, PERSONAL, FEDERATED = (part.split("```")[0] for part in SECTION.split("```python\n")[1:])


def test_the_on_device_example_fine_tunes_every_user(tmp_path, monkeypatch, capsys):
    clicks = draw_drifted_clicks(num_users=5, num_local=20, num_test=10)
    data = clicks.data()
    parts = {name: CtrRows.from_dataset(rows) for name, rows in data.splits.items()}
    names = {"model": clicks.model(data), "train": parts["train"], "validation": parts["test"], "later": parts["test"]}
    monkeypatch.chdir(tmp_path)
    exec(compile(ON_DEVICE, "README", "exec"), names)
    results = names["users"]
    assert len(results.users) == 5 and results.logits["later"].shape == (50,)
    assert (results.validation_after[results.accepted] >= results.validation_before[results.accepted]).all()
    assert str(results.users_per_second) in capsys.readouterr().out and (tmp_path / "runs" / "users").is_dir()


@torch.no_grad()
def test_the_dc_ccl_example_splits_and_packs():
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    vit = ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=8, num_labels=3))
    names = {"vit": vit.eval(), "pixel_values": torch.randn(2, 3, 16, 16), "torch": torch}
    exec(compile(DC_CCL, "README", "exec"), names)
    assert names["served"].shape == (2, 3)
    assert not any("cloud" in name for name in names["phone"].state_dict())


def test_the_personal_example_generates():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=None,
    )  # fmt: skip
    names = {"model": LlamaForCausalLM(config).eval(), "ids": torch.arange(5)[None]}
    exec(compile(PERSONAL, "README", "exec"), names)
    assert names["tokens"].shape == (1, 13)
    draws = [names["mine"].sample() for _ in range(2)]
    assert not torch.equal(*draws)


def test_the_federated_example_trains_and_goes_on(tmp_path, monkeypatch, capsys):
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    rows = {"user": ["a", "a", "b", "c"], "input_ids": [[2, 3], [4, 5], [6, 7], [2, 9]], "labels": [0, 1, 0, 1]}
    args = TrainingArguments("runs/fed", learning_rate=0.1, optim="sgd", use_cpu=True, report_to="none")
    names = {"args": args, "ratings": Dataset.from_dict(rows), "later": Dataset.from_dict(rows)}
    monkeypatch.chdir(tmp_path)
    example = FEDERATED.replace("rounds=100", "rounds=2").replace("local_steps=10", "local_steps=1")
    for _ in range(2):  # the second time there is nothing left to do
        names["model"] = BertForSequenceClassification(BertConfig(vocab_size=12, **shape))
        exec(compile(example, "README", "exec"), names)
        assert len(names["fed"].history) == 2 and "'up'" in capsys.readouterr().out
    assert BertForSequenceClassification.from_pretrained("runs/federated").num_labels == 2


MEASURED = " ".join(README.split("## What was measured so far")[1].split())


def test_the_numbers_of_label_correction_are_those_of_the_committed_results():
    gauc = measured("label_correction")["gauc"]
    others = {name: gauc.baseline[name] for name in ("cloud", "plain", "scale_model")}
    assert f"(GAUC) is {others['cloud'].value:.4f} with the cloud's model" in MEASURED
    assert f"{others['plain'].value:.4f} after plain fine-tuning, {gauc.value:.4f} with labels scaled" in MEASURED
    assert f"which is worse than plain, and {others['scale_model'].value:.4f} with the share" in MEASURED
    assert [other.verdict for other in others.values()] == ["holds", "fails", "null"]


@pytest.mark.parametrize(
    ("task", "sentence", "verdicts"),
    [
        (
            "digits",
            "serves {ours:.1f} % (the cloud alone {cloud_only:.1f}, FedAvg of the small model {fedavg_small:.1f} and "
            "sending features {split_learning:.1f}, neither resolved)",
            ["holds", "null", "null"],
        ),
        (
            "fashion_mnist",
            "a ViT, {ours:.1f} % ({cloud_only:.1f} and {fedavg_small:.1f}, neither resolved; sending features, "
            "{split_learning:.1f}, is better)",
            ["null", "null", "fails"],
        ),
    ],
)
def test_the_numbers_of_dc_ccl_are_those_of_the_committed_results(task, sentence, verdicts):
    served = measured("dc_ccl")[f"{task}_served_accuracy"]
    others = {name: served.baseline[name] for name in ("cloud_only", "fedavg_small", "split_learning")}
    values = {name: 100 * other.value for name, other in others.items()}
    assert sentence.format(ours=100 * served.value, **values) in MEASURED
    assert [other.verdict for other in others.values()] == verdicts


def test_the_bytes_of_dc_ccl_are_those_of_the_committed_results():
    sent = [measured("dc_ccl")[f"{task}_bytes_up_per_user"] for task in ("digits", "fashion_mnist")]
    ours = [f"{metric.value / 1e6:.2f}" for metric in sent]
    features = [f"{metric.baseline['split_learning'].value / 1e6:.1f}" for metric in sent]
    assert f"sent {' and '.join(ours)} MB, in place of {' and '.join(features)} MB of features" in MEASURED


def test_the_numbers_of_user_embeddings_are_those_of_the_committed_results():
    metrics = measured("anonymous_user_embeddings")
    accuracy, attribution = metrics["accuracy"], metrics["attribution"]

    def of(arm):
        return f"{accuracy.baseline[arm].value:.3f} ({attribution.baseline[arm].value:.3f}"

    assert f"a mixture of 5 components {accuracy.value:.3f} ({attribution.value:.3f})" in MEASURED
    for words, arm in {
        "without users": "central",
        "random ones": "mixture_k5_random",
        "within two deviations": "gaussian_r2",
        "Beta": "beta_80",
        "without bound": "gaussian_free",
        "a fixed embedding": "static",
    }.items():
        assert f"{words} {of(arm)}" in MEASURED, arm
    alone = accuracy.baseline["on_device"].value
    assert f"sends nothing at all and has {alone:.3f}" in MEASURED
    hidden = [arm for arm, other in attribution.baseline.items() if arm != "on_device" and other.value < 0.3]
    assert all(accuracy.baseline[arm].value < alone for arm in hidden)


def test_the_numbers_of_block_cyclic_are_those_of_the_committed_results():
    metrics = measured("block_cyclic")
    accuracy, sent = metrics["blocks_accuracy"], metrics["blocks_bytes"]
    others = {name: accuracy.baseline[name] for name in ("mm_psgd", "fed_avg", "separate")}
    percent = {name: f"{100 * other.value:.1f} %" for name, other in others.items()}
    assert (
        f"{100 * accuracy.value:.1f} % with MC-PSGD and on {percent['mm_psgd']} with MM-PSGD, not resolved" in MEASURED
    )
    assert f"one federated model has {percent['fed_avg']}" in MEASURED
    assert f"each block alone has {percent['separate']}, which is better" in MEASURED
    assert [other.verdict for other in others.values()] == ["null", "holds", "fails"]
    assert 2.9 < sent.value / sent.baseline["mm_psgd"].value < 3.1


def test_the_numbers_of_fed_la_avg_are_those_of_the_committed_results():
    metrics = measured("fed_la_avg")
    accuracy, span, rounds, deep = (
        metrics[name]
        for name in ("convex_accuracy", "convex_accuracy_range", "convex_rounds_to_target", "nonconvex_accuracy")
    )
    others = [accuracy.baseline[name] for name in ("fed_avg", "mifa")]
    ours, average, mifa = (f"{100 * metric.value:.1f} %" for metric in (accuracy, *others))
    assert f"FedLaAvg is right on {ours}, FedAvg on {average} (not resolved) and MIFA on {mifa}, which is" in MEASURED
    of_fed_avg = [metric.baseline["fed_avg"] for metric in (span, rounds, deep)]
    assert f"lie {100 * span.value:.1f} points for FedLaAvg and {100 * of_fed_avg[0].value:.1f} for FedAvg" in MEASURED
    assert f"from round {rounds.value:.0f} on, FedAvg from round {of_fed_avg[1].value:.0f} of 320 on" in MEASURED
    assert f"({100 * deep.value:.1f} % against {100 * of_fed_avg[2].value:.1f} % with FedAvg)" in MEASURED
    assert [other.verdict for other in others] == ["null", "fails"]
    assert [other.verdict for other in of_fed_avg] == ["holds", "holds", "null"]


def test_the_numbers_of_fed_sub_avg_are_those_of_the_committed_results():
    results = read_results(ROOT / "model_cards" / "fed_sub_avg")
    auc = results.metrics["lr_auc"]
    others = [auc.baseline[name] for name in ("fed_avg", "fed_adam", "roundwise")]
    average, adam, roundwise = (f"{other.value:.3f}" for other in others)
    assert f"at an AUC of {auc.value:.3f} on later ratings, FedAvg at {average} (not resolved)" in MEASURED
    assert f"FedAdam has {adam} and the average over those users of a round who have the row {roundwise}" in MEASURED
    assert [other.verdict for other in others] == ["null", "fails", "fails"]
    rates = dict(results.evidence["learning_rate_chosen"]["lr"])
    assert (rates.pop("fed_sub_avg"), min(rates.values()), max(rates.values())) == (0.01, 0.3, 1.0)
