"""The README's promises: its code runs, its commands exist, its table names every method."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForTextEncoding,
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from hf_models.moe.elastic import experts_in_force
from hf_models.moe.growth import GrowthPlan, grow_model
from model_cards.methods import METHODS
from trainers.data import train_tokenizer
from trainers.reliability import find_last_valid_checkpoint
from trainers.reliability.goodput import read_goodput
from trainers.report import read_results


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LOAD, TRAIN, MONE, M_MOE, GROWTH, M3BERT, DOT_CBM, *_, RELIABILITY, MSIGN, GROW_ON, FEDERATED, KERNELS = EXAMPLES


def test_the_load_example_generates(tmp_path, monkeypatch, capsys):
    tokenizer = train_tokenizer(["def read(path):\n    return open(path).read()\n"] * 3, vocab_size=280)
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = SigmaMoeConfig.from_preset("demo", **shape, head_dim=16, vocab_size=len(tokenizer))
    SigmaMoeForCausalLM(config).save_pretrained(tmp_path / "runs" / "demo")
    tokenizer.save_pretrained(tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    code = [line for line in LOAD.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(code) <= 5
    exec(compile(LOAD, "README", "exec"), {})
    assert capsys.readouterr().out.startswith("def read(path):")
    assert AutoTokenizer.from_pretrained("runs/demo").chat_template


def test_the_trainer_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(0, 4096, (8, 16)).tolist()
    names = {"my_dataset": Dataset.from_dict({"input_ids": ids, "labels": ids})}
    exec(compile(TRAIN, "README", "exec"), names)
    trainer = names["trainer"]
    trainer.args.max_steps = 10
    trainer.args.logging_steps = 2
    trainer.train()
    assert (tmp_path / "runs" / "mine" / "logs" / "balance.jsonl").read_text().count("\n") == 5 * 6
    assert trainer.model.config.top_k_per_layer == [1] * 6


TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def tiny_sigma_moe() -> SigmaMoeForCausalLM:
    fields = {"vocab_size": 50, "num_experts_per_tok": 4, "eos_token_id": None, "scoring_func": "softmax"}
    return SigmaMoeForCausalLM(SigmaMoeConfig.from_preset("demo", **TINY | fields)).eval()


@torch.no_grad()
def test_the_neurons_example_leaves_neurons_out_and_no_weight_changes(tmp_path, monkeypatch):
    model, ids = tiny_sigma_moe(), torch.arange(5)[None]
    model.save_pretrained(tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    names = {"ids": ids}
    exec(compile(MONE, "README", "exec"), names)
    mone = names["mone"]
    assert not torch.allclose(names["logits"], mone(ids).logits) and mone.config.neuron_ratio == 0.5
    mone.set_active_neurons(ratio=1.0)
    assert torch.equal(mone(ids).logits, model(ids).logits)


def test_the_dial_example_turns_ours_and_others():
    shape = TINY | {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 16, "vocab_size": 50}
    for model in (tiny_sigma_moe(), Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)).eval()):
        names = {"model": model, "ids": torch.arange(5)[None]}
        exec(compile(M_MOE, "README", "exec"), names)
        assert names["model"] is model and experts_in_force(model) == [3, 1]
        assert names["tokens"].shape == (1, 13)


def test_the_concept_example_explains_and_obeys(tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = ViTModel(ViTConfig(**shape, image_size=16, patch_size=4), add_pooling_layer=False)
    pixels = torch.randn(1, 3, 16, 16)
    names = {"backbone": backbone, "pixel_values": pixels, "image": Image.new("RGB", (16, 16)), "torch": torch}
    exec(compile(DOT_CBM, "README", "exec"), names)
    model, records = names["model"], names["records"]
    assert {record.concept for record in records} == {"hat", "beard", "blue hair"}
    assert names["logits"].shape == (1, 40)
    assert not torch.allclose(names["logits"], model.eval()(pixels).logits)


def test_the_reliability_and_msign_examples_train(tmp_path):
    ids = torch.randint(0, 50, (8, 16)).tolist()
    args = TrainingArguments(str(tmp_path / "run"), max_steps=4, save_steps=2, use_cpu=True, report_to="none")
    names = {"my_dataset": Dataset.from_dict({"input_ids": ids, "labels": ids}), "model": tiny_sigma_moe()}
    names["trainer"] = Trainer(names["model"], args, train_dataset=names["my_dataset"])
    exec(compile(RELIABILITY, "README", "exec"), names)
    names["trainer"].train()
    assert find_last_valid_checkpoint(tmp_path / "run").name == "checkpoint-4"
    assert read_goodput(tmp_path / "run").attempts == {"succeeded": 1}
    exec(compile(MSIGN.replace("period=100", "period=2"), "README", "exec"), names)
    names["trainer"].train()
    s = torch.linalg.svdvals(names["model"].model.layers[0].self_attn.o_proj.weight.detach())
    torch.testing.assert_close(s, s.mean().expand_as(s), rtol=1e-2, atol=0)


@torch.no_grad()
def test_the_growth_example_grows_and_the_exact_ways_are_exact():
    model, ids = tiny_sigma_moe(), torch.arange(5)[None]
    names = {"model": model}
    exec(compile(GROWTH, "README", "exec"), names)
    assert names["grown"].config.num_hidden_layers == 4 and names["grown"].config.num_experts == 64
    for exact in ({"width_factor": 2, "noise_alpha": 0.0}, {"depth_factor": 2, "depth_copy_init": "zero_output"}):
        grown = grow_model(model, GrowthPlan(**exact))
        torch.testing.assert_close(grown(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_encoder_example_is_cut_to_a_model_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"ids": torch.arange(10).view(2, 5)}
    exec(compile(M3BERT, "README", "exec"), names)
    assert names["vectors"].shape == (2, 64) and len(names["small"].model.layers) == 4
    assert torch.equal(names["small"](names["ids"]).embeddings, names["vectors"])
    names["encoder"].save_pretrained("runs/whole")
    for options in ({}, {"num_layers": 4, "embed_dim": 64}):
        folder = "runs/whole" if options else "runs/small"
        loaded = AutoModelForTextEncoding.from_pretrained(folder, **options).eval()
        assert torch.equal(loaded(names["ids"]).embeddings, names["vectors"])


def test_the_experts_example_switches_and_computes():
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = SigmaMoeForCausalLM(SigmaMoeConfig.from_preset("demo", **shape, head_dim=16, vocab_size=50)).eval()
    ids = torch.arange(5)[None]
    expected = model(ids).logits
    exec(compile(KERNELS, "README", "exec"), {"model": model})
    assert model.config._experts_implementation == "sigma_triton"
    torch.testing.assert_close(model(ids).logits, expected)


COMMANDS = sorted(set(re.findall(r"-m ((?:trainers|hf_models|model_cards|sigma_kernels)[\w.]+)", README)))


def test_the_table_has_its_commands():
    assert len(COMMANDS) >= 15 and "trainers.recipes.pretrain_sigma_moe" in COMMANDS
    for module in COMMANDS:
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.slow  # each imports torch and transformers anew
@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_of_the_table_answers(module):
    if module.endswith(".flower"):
        pytest.importorskip("flwr")
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{module}: {done.stderr[-500:]}"


def test_the_table_has_every_method_and_its_links_exist():
    rows = [line for line in README.splitlines() if "https://arxiv.org/abs/" in line]
    assert len(rows) == len(METHODS)
    assert set(re.findall(r"abs/(\d{4}\.\d{5})", README)) == {method.arxiv for method in METHODS}
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_measured_numbers_are_those_of_the_committed_results():
    metrics = read_results(ROOT / "model_cards" / "sigma_moe").metrics
    quality = metrics["held_out_bits_per_character"]
    section = README.split("## What was measured so far")[1].split("\n## ")[0]
    rows = [line.split("|")[2:4] for line in section.splitlines() if line.startswith("| ")][1:]
    arms = ("lbl_top1", "top1_lbl", "loss_free", "qwen3_moe", "dense", "dense_equal_seconds")
    words = {"holds": "progressive is better", "null": "not resolved", "fails": "dense is better"}
    expected = [[f"{quality.baseline[a].value:.3f}", words[quality.baseline[a].verdict]] for a in arms]
    assert [[cell.strip() for cell in row] for row in rows] == expected
    assert f"at {quality.value:.3f}:" in section
    before, after, end = (metrics[f"loss_{when}"].value for when in ("before_switch", "after_switch", "at_end"))
    assert f"costs {after - before:.2f} nats" in section and f"wins back {after - end:.2f}" in section
    deviation = metrics["layer0_max_deviation"]
    shares = [metrics["layer0_max_deviation_before_switch"], deviation]
    shares += [deviation.baseline[arm] for arm in ("lbl_top1", "top1_lbl")]
    assert re.findall(r"\+(\d+) %", section) == [f"{100 * share.value:.0f}" for share in shares]


def measured(method):
    return read_results(ROOT / "model_cards" / method).metrics


def test_the_numbers_of_mone_are_those_of_the_committed_results():
    metrics, section = measured("mone"), README.split("## What was measured so far")[1].split("\n## ")[0]
    quality, equal = metrics["held_out_bits_per_character"], metrics["equal_active_parameters"]
    moe, unused = quality.baseline["moe"], metrics["unused_neurons"]
    assert f"reaches {quality.value:.3f} bits" in section and f"({moe.value:.3f}; not resolved)" in section
    assert moe.verdict == "null" and equal.baseline["moe"].verdict == "holds"
    assert f"reach {equal.value:.3f}: MoNE is better" in section
    assert f"from {unused.baseline['mone_unbalanced'].value:.1%} to {unused.value:.1%}".replace("%", " %") in section
    assert quality.baseline["mone_unbalanced"].verdict == "null"
    whole, sixty, ninety = (metrics[f"pruned_{share}_percent"].baseline["moe"].value for share in ("00", "60", "90"))
    assert f"leaving out 60 % at inference costs {sixty - whole:.3f} bits, 90 % {ninety - whole:.3f}" in section
    (report,) = (ROOT / "trainers" / "benchmarks" / "results").glob("decode-float32-*.json")
    rows = json.loads(report.read_text())["comparisons"]
    (row,) = (r for r in rows if r["ratio"] == 0.25 and r["baseline"] == "dense_grouped_mm")
    assert f"decoded {1 / row['process']['ratio']['median']:.2f} times as fast" in section


def test_the_numbers_of_m_moe_are_those_of_the_committed_results():
    metrics, section = measured("m_moe"), " ".join(README.split("## What was measured so far")[1].split())
    ratios = {k: metrics[f"over_specialist_at_{k}_experts"] for k in (1, 2, 4, 6)}
    above = {k: f"{100 * (ratio.value - 1):.1f}" for k, ratio in ratios.items()}
    assert f"is {above[1]} % above the specialist's perplexity at one expert" in section
    assert f"and {above[2]}, {above[4]} and {above[6]} % at two, four and six, where 3 % was the target" in section
    assert [ratios[k].baseline["target"].verdict for k in (2, 4, 6)] == ["null", "fails", "null"]
    at = {k: metrics[f"perplexity_at_{k}_experts"].baseline for k in (1, 2, 3, 4, 5, 6, 8)}
    assert {at[k]["fixed_k4"].verdict for k in (2, 3, 4, 5, 6, 8)} == {"fails"}
    drawn = ("layer_raw", "micro_batch", "global_batch")
    assert {at[k][arm].verdict for k in at for arm in drawn} == {"null"}


def test_the_numbers_of_msign_are_those_of_the_committed_results():
    metrics, section = measured("msign"), " ".join(README.split("## What was measured so far")[1].split())
    hard, best = metrics["held_out_loss_driven_hard"], metrics["held_out_loss"]
    assert f"{hard.value:.3f} with MSign on all matrices of the layers" in section
    for arm, words in (("msign_attention", "on attention alone"), ("adamw_clip", "with AdamW and clipping")):
        assert f"{hard.baseline[arm].value:.3f} {words}" in section
    assert f"{hard.baseline['adamw'].value:.3f} without clipping" in section
    beaten = ("msign_attention", "msign_mlp", "adamw_clip", "adamw")
    assert {hard.baseline[arm].verdict for arm in beaten} == {"holds"}
    assert f"and Muon, at {hard.baseline['muon'].value:.3f}, better than MSign" in section
    assert hard.baseline["muon"].verdict == "fails"
    assert f"it is {best.value:.3f} against {best.baseline['adamw_clip'].value:.3f}" in section
    assert f"Muon is at {best.baseline['muon'].value:.3f}" in section
    assert (best.baseline["adamw_clip"].verdict, best.baseline["muon"].verdict) == ("null", "fails")
    for name in ("stable_rank_of_v", "stable_rank_of_o"):
        assert round(metrics[name].baseline["adamw_clip"].value) == 2


def test_the_cost_of_the_reliability_set_is_that_of_the_committed_report():
    (file,) = (ROOT / "trainers" / "benchmarks" / "results").glob("reliability-*.json")
    report = json.loads(file.read_text())
    ratio, section = report["process"]["ratio"], " ".join(README.split("## Runs that do not die")[1].split())
    assert report["verdict"] == "not resolved" and "is not resolved" in section
    assert f"a ratio of {ratio['median']:.3f}, between {ratio['low']:.3f} and {ratio['high']:.3f}" in section
    assert f"own time is {100 * report['share_of_all']:.2f} % of it" in section


def test_the_numbers_of_m3bert_are_those_of_the_committed_results():
    metrics, section = measured("m3bert"), " ".join(README.split("## What was measured so far")[1].split())
    corner, alone = metrics["recall_at_10_small_corner"], metrics["recall_at_10_alone_layer_1_dim_16"]
    values = [corner.value] + [corner.baseline[arm].value for arm in ("plain", "plain_equal_seconds", "plain_st2d")]
    after, plain, seconds, st2d = (f"{value:.3f}" for value in values)
    assert f"{after} after pre-training on the whole grid, {plain} after plain pre-training" in section
    assert f"{seconds} for as many seconds, {st2d} with Matryoshka2dLoss" in section
    assert {baseline.verdict for baseline in corner.baseline.values()} == {"null"}
    assert f"plain is better ({alone.baseline['plain'].value:.3f} against {alone.value:.3f} at layer 1" in section
    assert alone.baseline["plain"].verdict == "fails"


def test_the_costs_of_m3bert_are_those_of_the_committed_reports():
    section = " ".join(README.split("## One encoder")[1].split("## Runs that")[0].split())
    (file,) = (ROOT / "triton_kernels" / "benchmarks" / "results").glob("linear-cross-entropy-cpu-*.json")
    cells = json.loads(file.read_text())["cells"]
    memory = cells["256x250002x12 heads"]["arms"]
    megabytes = {name: f"{memory[name]['activation_bytes'] / 1e6:,.0f}" for name in memory}
    ours, plain = megabytes["linear_cross_entropy_grid"], megabytes["plain"]
    assert f"needs {ours} MB for activations where torch's cross-entropy needs {plain}" in section
    faster = cells["64x250002x12 heads"]["arms"]["linear_cross_entropy_grid"]["faster_than_plain"]["median"]
    assert f"in {1 / faster:.2f} of the time at 64 tokens" in section
    (file,) = (ROOT / "trainers" / "benchmarks" / "results").glob("encoder-*.json")
    comparisons = json.loads(file.read_text())["comparisons"]
    whole, third = (next(c for c in comparisons if (c["layer"], c["length"]) == (n, 256)) for n in (12, 4))
    values = [f"{c['process']['ratio']['median']:.2f}" for c in (whole, third)]
    assert f"takes {values[0]} of the time, and {values[1]} at a third of the depth" in section
    points = [round(100 * (c["process"]["ratio"]["high"] - c["process"]["ratio"]["low"])) for c in (whole, third)]
    assert f"intervals of {points[0]} and {points[1]} points" in section and whole["verdict"] == "not resolved"


def test_the_numbers_of_dot_cbm_are_those_of_the_committed_results():
    metrics, section = measured("dot_cbm"), " ".join(README.split("## What was measured so far")[1].split())
    energy, alone = metrics["energy_in_mask_id"], metrics["claim_1_energy_in_mask"]
    cosine, uniform = alone.baseline["max cosine, no OT"], alone.baseline["a uniform heatmap"]
    assert f"{alone.value:.3f} with transport alone, {cosine.value:.3f} with the maximum" in section
    assert f"{uniform.value:.3f} for a uniform heatmap" in section and cosine.verdict == "fails"
    free = metrics["claim_1_pointing_without_shortcut"]
    others = [free.baseline[name] for name in ("vanilla CBM", "mean cosine, no OT", "max cosine, no OT")]
    assert f"({free.value:.3f} of its peaks inside the mask, {others[0].value:.3f})" in section
    assert f"mean of the cosines ({others[1].value:.3f})" in section
    assert f"not resolvably differently from their maximum ({others[2].value:.3f})" in section
    assert [other.verdict for other in others] == ["holds", "holds", "null"]
    best, printed = metrics["claim_2_prior_accuracy_ood0"], metrics["claim_2_prior_cls_accuracy_ood0"]
    assert f"{best.value:.3f} right, {best.baseline['OT'].value:.3f} without" in section
    assert f"CLS times patch ({printed.value:.3f})" in section
    assert (best.baseline["OT"].verdict, printed.baseline["OT"].verdict) == ("holds", "holds")
    known, shifted, auc = metrics["accuracy_id"], metrics["accuracy_ood0"], metrics["concept_auc_id"]
    assert f"{known.value:.3f} right on the known backgrounds and {shifted.value:.3f} on random ones" in section
    classic = [metric.baseline["vanilla CBM"] for metric in (known, shifted, energy, auc)]
    assert f"bottleneck {classic[0].value:.3f} and {classic[1].value:.3f}, neither resolved" in section
    assert [baseline.verdict for baseline in classic] == ["null", "null", "holds", "fails"]
    inside = f"{energy.value:.3f} of its heatmaps are inside, more than the classic one's {classic[2].value:.3f}"
    assert inside in section
    assert f"against {energy.baseline['max cosine, no OT'].value:.3f} of the cosines not resolved" in section
    assert energy.baseline["max cosine, no OT"].verdict == "null"
    assert f"(AUC {auc.value:.3f}, classic {classic[3].value:.3f})" in section
    leaking = metrics["leakage_hard"]
    assert f"leave {leaking.value:.3f} right, the classic ones {leaking.baseline['vanilla CBM'].value:.3f}" in section
    assert leaking.baseline["vanilla CBM"].verdict == "fails"
    half = metrics["interventions_uncertainty_half"]
    assert f"brings {half.baseline['no group set'].value:.3f} to {half.value:.3f}, not resolved" in section
    assert half.baseline["no group set"].verdict == "null"
    assert f"(concept AUC {auc.baseline['OT, Eq. 12 as printed'].value:.3f})" in section


def test_the_speed_of_the_transport_is_that_of_the_committed_report():
    section = " ".join(README.split("## Concepts that show")[1].split("## Runs that")[0].split())
    (file,) = (ROOT / "triton_kernels" / "benchmarks" / "results").glob("sinkhorn-cpu-*.json")
    arms = json.loads(file.read_text())["cells"]["8x324x312, eps 0.1, plan"]["arms"]
    times = [f"{arms[name]['times_sinkhorn']['median']:.1f}" for name in ("POT", "POT log")]
    assert f"{times[0]} times as fast as POT's fastest path and {times[1]} times as its stable one" in section


def test_the_cost_of_msign_is_that_of_the_committed_report():
    (file,) = (ROOT / "trainers" / "benchmarks" / "results").glob("msign-*.json")
    report = json.loads(file.read_text())
    ratio, section = report["process"]["ratio"], " ".join(README.split("## Runs that do not die")[1].split())
    percent = {name: f"{100 * (ratio[name] - 1):.1f}" for name in ("median", "low", "high")}
    assert f"all {report['matrices']} matrices of the demo's model every {report['period']} steps" in section
    assert f"cost {percent['median']} % of the step" in section
    assert f"between {percent['low']} and {percent['high']}" in section


def test_the_speed_of_rounds_is_that_of_the_committed_reports():
    folder, section = ROOT / "trainers" / "benchmarks" / "results", " ".join(README.split())
    for shape, words in (
        ("lr-1", "{:.1f} times as many client updates a second as Flower's own FedAvg"),
        ("deepfm-5", "and {:.1f} times as many where it is five steps of DeepFM"),
    ):
        (file,) = folder.glob(f"federated_flower-{shape}-steps-*.json")
        report = json.loads(file.read_text())
        (plain,) = [c for c in report["comparisons"] if c["baseline"].startswith("Flower's FedAvg")]
        assert words.format(plain["speedup"][0]) in section and plain["verdict"] == "fails"
        assert max(report["load_average"]) < 2, "measured on a machine that others used"
    (file,) = folder.glob("federated-*.json")
    (loop,) = json.loads(file.read_text())["comparisons"]
    assert 0.95 < loop["wall"]["ratio"]["median"] < 1.05, "torch's own time, as in a plain loop"


def test_the_numbers_of_growth_are_those_of_the_committed_results():
    metrics, section = measured("growth"), " ".join(README.split("## What was measured so far")[1].split())
    depth, width = metrics["held_out_bits_depth"], metrics["held_out_bits_width"]
    assert f"the base {metrics['base_bits_per_character'].value:.3f}" in section
    for name, metric in (("depth", depth), ("width", width)):
        scratch = metric.baseline[f"scratch_{name}"]
        assert re.search(f"grown in {name} {metric.value:.3f},[ a-z]* from scratch {scratch.value:.3f}", section)
        assert scratch.verdict == "holds" and metric.baseline["continued"].verdict == "fails"
    stack = depth.baseline["stack"]
    assert f"stacking, at {stack.value:.3f}" in section and stack.verdict == "fails"
    assert f"at {depth.baseline['continued'].value:.3f}, better than both" in section
    total = {at: metrics[f"grown_at_{at}_fixed_total"].baseline["grown_at_1400"].verdict for at in (350, 700)}
    assert total == {350: "fails", 700: "null"}
