# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Growth from files to files: layouts, shards, what comes along, memory, and refusals that leave nothing behind."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OlmoeForCausalLM,
    OlmoeModel,
    PreTrainedTokenizerFast,
    Qwen3MoeForSequenceClassification,
)

from hf_models.moe import checkpoint_files, growth_drift, growth_tensors
from hf_models.moe import growth as growth_module
from hf_models.moe.growth import GrowthPlan, grow_model, grow_pretrained, main
from tests.hf_models.moe.growth_hosts import EXPERTS, HOSTS, TOKENS, host, host_config, logits_of


PLAN = GrowthPlan(depth_factor=2, width_factor=2, expert_order="interleave")
EXACT = GrowthPlan(
    depth_factor=2, depth_copy_init="zero_output", width_factor=2, noise_alpha=0.0, expert_order="interleave"
)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def split(folder: Path, shards: int, order) -> Path:
    """The same checkpoint in several files, tensors dealt out in the given order of their names."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(shards):
        names = order(sorted(tensors))[i::shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def saved(folder: Path, name: str = "olmoe", **overrides) -> Path:
    host(name, **overrides).save_pretrained(folder)
    return folder


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", HOSTS)
def test_both_layouts_grow_as_the_model_does_and_reload_whole(tmp_path, name, fused):
    model = host(name)
    model.save_pretrained(tmp_path / "source", save_original_format=not fused)
    per_expert = any(re.search(r"experts\.0\.", key) for key in tensors_of(tmp_path / "source"))
    assert per_expert is not fused
    destination = grow_pretrained(tmp_path / "source", tmp_path / "grown", PLAN)
    assert any(re.search(r"experts\.11\.", key) for key in tensors_of(destination)) is not fused
    reloaded, info = AutoModelForCausalLM.from_pretrained(destination, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    in_memory = grow_model(model, PLAN)
    assert same(reloaded.state_dict(), in_memory.state_dict())  # noise and all
    ignored = ("architectures", "transformers_version", "dtype", "_name_or_path")
    configs = [{k: v for k, v in m.config.to_dict().items() if k not in ignored} for m in (reloaded, in_memory)]
    assert configs[0] == configs[1]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(reloaded.generate(TOKENS, **options), reloaded.generate(TOKENS, use_cache=False, **options))


@pytest.mark.parametrize("name", ["deepseek_v3", "sigma_moe"])
def test_files_keep_the_logits_without_noise_and_say_so(tmp_path, name):
    model = host(name)
    model.save_pretrained(tmp_path / "source")
    destination = grow_pretrained(tmp_path / "source", tmp_path / "grown", EXACT)
    reloaded = AutoModelForCausalLM.from_pretrained(destination)
    torch.testing.assert_close(logits_of(reloaded), logits_of(model), rtol=0, atol=1e-5)
    manifest = json.loads((destination / "growth.json").read_text())
    assert manifest["function_changed_by"] == []
    assert manifest["logit_drift"]["max_abs"] < 1e-5 and manifest["logit_drift"]["top1_agreement"] == 1
    assert manifest["before"]["parameters"] == sum(t.numel() for t in tensors_of(tmp_path / "source").values())
    assert manifest["after"]["parameters"] == sum(t.numel() for t in tensors_of(destination).values())
    assert manifest["after"]["tensors"] == len(tensors_of(destination))


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral"])
def test_neither_the_order_of_shards_nor_their_number_matters(tmp_path, name):
    grown = []
    for i, (shards, order) in enumerate([(1, None), (3, list), (5, lambda names: names[::-1])]):
        torch.manual_seed(7)
        source = saved(tmp_path / f"source{i}", name)
        if order is not None:
            split(source, shards, order)
        grown.append(tensors_of(grow_pretrained(source, tmp_path / f"grown{i}", PLAN, measure_drift=False)))
    assert same(grown[0], grown[1]) and same(grown[0], grown[2])
    other = grow_pretrained(source, tmp_path / "other", GrowthPlan(**{**vars(PLAN), "seed": 1}), measure_drift=False)
    assert not same(grown[0], tensors_of(other))


def test_large_checkpoints_are_written_in_shards(tmp_path):
    source = saved(tmp_path / "source")
    grown = grow_pretrained(source, tmp_path / "grown", PLAN, max_shard_bytes=20_000)
    index = json.loads((grown / "model.safetensors.index.json").read_text())
    files = sorted(grown.glob("*.safetensors"))
    assert len(files) > 3 and {file.name for file in files} == set(index["weight_map"].values())
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(file)
        assert {name for name, holder in index["weight_map"].items() if holder == file.name} == set(tensors)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000 or len(tensors) == 1
    tensors = tensors_of(grown)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    whole = grow_pretrained(source, tmp_path / "whole", PLAN)
    assert [file.name for file in whole.glob("*.safetensors")] == ["model.safetensors"]
    assert same(tensors, tensors_of(whole))
    assert AutoModelForCausalLM.from_pretrained(grown).config.num_hidden_layers == 6


def test_dtypes_are_kept(tmp_path):
    host("sigma_moe").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    before = tensors_of(tmp_path / "source")
    after = tensors_of(grow_pretrained(tmp_path / "source", tmp_path / "grown", PLAN))
    for name, tensor in after.items():
        source = re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) // 2}", name)
        assert tensor.dtype == before[source].dtype, name


def test_tokenizer_generation_config_code_and_manifest_come_along(tmp_path):
    source = saved(tmp_path / "source", "sigma_moe")
    vocabulary = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(source)
    (source / "generation_config.json").write_text('{"max_new_tokens": 9}')
    (source / "training_args.bin").write_bytes(b"a token")
    grown = grow_pretrained(source, tmp_path / "grown", PLAN)
    assert AutoTokenizer.from_pretrained(grown)("a").input_ids == [0]
    assert json.loads((grown / "generation_config.json").read_text())["max_new_tokens"] == 9
    config = json.loads((grown / "config.json").read_text())
    for path in config["auto_map"].values():
        module = ast.parse((grown / f"{path.partition('.')[0]}.py").read_text())
        assert path.partition(".")[2] in {node.name for node in module.body if isinstance(node, ast.ClassDef)}
    assert not (grown / "training_args.bin").exists() and not (grown / "growth.py").exists()

    manifest = json.loads((grown / "growth.json").read_text())
    assert manifest["plan"]["width_factor"] == 2 and manifest["layer_order"] == [0, 0, 1, 1, 2, 2]
    assert manifest["source"]["name"] == "source" and manifest["source"]["file"] == "model.safetensors"
    assert len(manifest["source"]["sha256"]) == 64 and manifest["source"]["revision"] is None
    assert len(manifest["function_changed_by"]) == 2 and manifest["logit_drift"]["relative_l2"] > 0.01
    assert str(tmp_path) not in (grown / "growth.json").read_text()

    again = grow_pretrained(grown, tmp_path / "again", GrowthPlan(width_factor=2), measure_drift=False)
    manifest_again = json.loads((again / "growth.json").read_text())
    assert manifest_again["source"]["growth"] == manifest
    assert manifest_again["logit_drift"] == {"skipped": "on request"}


def test_code_of_others_does_not_come_along(tmp_path):
    source = saved(tmp_path / "source", "deepseek_v3")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "configuration_deepseek.py").write_text("raise RuntimeError")
    grown = grow_pretrained(source, tmp_path / "grown", PLAN)
    assert "auto_map" not in json.loads((grown / "config.json").read_text())
    assert not list(grown.glob("*.py"))


@pytest.mark.parametrize("model_class", [Qwen3MoeForSequenceClassification, OlmoeModel])
def test_other_heads_grow(tmp_path, model_class):
    name = "olmoe" if model_class is OlmoeModel else "qwen3_moe"
    model = model_class(host_config(name)).eval()
    model.save_pretrained(tmp_path / "source")
    grown = grow_pretrained(tmp_path / "source", tmp_path / "grown", EXACT)
    assert json.loads((grown / "growth.json").read_text())["logit_drift"]["max_abs"] < 1e-5
    reloaded, info = model_class.from_pretrained(grown, output_loading_info=True)
    assert not info["missing_keys"] and reloaded.config.num_hidden_layers == 6


def test_tied_heads(tmp_path):
    source = saved(tmp_path / "source", tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors_of(source)
    grown = AutoModelForCausalLM.from_pretrained(grow_pretrained(source, tmp_path / "grown", PLAN))
    assert grown.lm_head.weight is grown.model.embed_tokens.weight
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"lm_head.weight is missing, expected shape \(37, 16\).*Nothing was written"):
        grow_pretrained(source, tmp_path / "untied", PLAN)


def test_layers_behind_the_last_stay_behind_it(tmp_path):
    # As in DeepSeek-V3's files: a layer that predicts one more token, which the language model passes over.
    source = saved(tmp_path / "source", "deepseek_v3")
    tensors = tensors_of(source)
    extra = {k.replace("layers.2.", "layers.3."): v.clone() for k, v in tensors.items() if ".layers.2." in k}
    extra["model.layers.3.eh_proj.weight"] = torch.ones(2, 2)
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # in files of old versions
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    grown = tensors_of(grow_pretrained(source, tmp_path / "grown", PLAN))
    assert torch.equal(grown["model.layers.6.eh_proj.weight"], torch.ones(2, 2))
    assert len([name for name in grown if name.startswith("model.layers.6.mlp.experts.")]) == 3 * 2 * EXPERTS
    assert not any("layers.7." in name or "inv_freq" in name for name in grown)


def test_a_hub_id_is_grown_at_the_commit_that_was_read(tmp_path, monkeypatch):
    snapshot = saved(tmp_path / "models--someone--tiny" / "snapshots" / ("c" * 40))
    asked = []

    def download(repo, revision, allow_patterns):
        asked.append((repo, revision))
        return str(snapshot)

    monkeypatch.setattr(checkpoint_files, "snapshot_download", download)
    grown = grow_pretrained("someone/tiny", tmp_path / "grown", PLAN, revision="main")
    assert asked == [("someone/tiny", "main"), ("someone/tiny", "c" * 40)]
    source = json.loads((grown / "growth.json").read_text())["source"]
    assert (source["name"], source["revision"]) == ("someone/tiny", "c" * 40)


# --- refusals, and crashes


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def change_tensors(change):
    def rewrite(folder):
        tensors = tensors_of(folder)
        save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def point_elsewhere(folder):
    split(folder, 2, list)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"../{file}" for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


ROUTER = "model.layers.1.mlp.gate.weight"
MATRIX = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (change_config(model_type="gpt2"), ValueError, "model_type='gpt2' is not known.*'olmoe'"),
        (change_config(architectures=["OlmoeForChess"]), ValueError, "OlmoeForChess.*OlmoeForCausalLM"),
        (change_config(num_experts_per_tok=7), ValueError, "num_experts_per_tok=7"),
        (change_config(num_experts=5), ValueError, r"5 experts: .*experts\.5.* is unexpected.*Nothing was written"),
        (change_config(num_hidden_layers=4), ValueError, "model.layers.3.* is missing"),
        (change_config(num_hidden_layers=2), ValueError, "model.layers.2.* is unexpected"),
        (change_config(quantization_config={"quant_method": "fp8"}), ValueError, "quantization_config"),
        (change_tensors(lambda t: {k: v for k, v in t.items() if k != ROUTER}), ValueError, f"{ROUTER} is missing"),
        (change_tensors(lambda t: t | {ROUTER: t[ROUTER].T.contiguous()}), ValueError, "gate.weight has shape"),
        (
            change_tensors(lambda t: t | {MATRIX + "_scale_inv": torch.ones(1)}),
            ValueError,
            "no layout that growth knows",
        ),
        (
            change_tensors(lambda t: {k.replace("experts.", "ffn_experts."): v for k, v in t.items()}),
            ValueError,
            "is missing.*Nothing was written",
        ),
        (point_elsewhere, ValueError, "is not a plain file name"),
        (pickled, FileNotFoundError, "Pickles .'pytorch_model.bin'. are not read"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), ValueError, "adapter_config.json.*Merge"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "no config.json"),
    ],
)
def test_bad_sources_are_refused_before_anything_is_written(tmp_path, monkeypatch, spoil, error, message):
    source = saved(tmp_path / "source")
    spoil(source)
    monkeypatch.setattr(growth_module, "in_one_piece", lambda _: pytest.fail("started to write"))
    with pytest.raises(error, match=message):
        grow_pretrained(source, tmp_path / "grown", PLAN)
    assert os.listdir(tmp_path) == ["source"]


def test_plans_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    source = saved(tmp_path / "source", "deepseek_v3", topk_group=2)
    for plan, message in (
        (GrowthPlan(), "depth_factor=1 and width_factor=1 grow nothing"),
        (GrowthPlan(width_factor=2), "breaks n_group=3"),
        (GrowthPlan(depth_factor=2, keep_first=3), "leave none of 3 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            grow_pretrained(source, tmp_path / "grown", plan)
    assert os.listdir(tmp_path) == ["source"]


def test_group_limited_drift_is_measured(tmp_path):
    source = saved(tmp_path / "source", "deepseek_v3", topk_group=1)
    plan = GrowthPlan(width_factor=2, noise_alpha=0.0, expert_order="interleave")
    manifest = json.loads((grow_pretrained(source, tmp_path / "grown", plan) / "growth.json").read_text())
    assert manifest["logit_drift"]["max_abs"] > 1e-3 and manifest["logit_drift"]["kl"] > 0
    assert "topk_group=1 of n_group=3" in manifest["function_changed_by"][0]


def test_existing_destinations(tmp_path):
    source = saved(tmp_path / "source")
    (tmp_path / "grown").mkdir()
    grow_pretrained(source, tmp_path / "grown", PLAN)  # empty: nothing to lose
    with pytest.raises(FileExistsError, match="overwrite=True"):
        grow_pretrained(source, tmp_path / "grown", PLAN)
    grow_pretrained(source, tmp_path / "grown", GrowthPlan(depth_factor=3), overwrite=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "grown").config.num_hidden_layers == 9
    with pytest.raises(ValueError, match="is or contains the source"):
        grow_pretrained(source, source, PLAN, overwrite=True)


@pytest.mark.parametrize("where", ["save_file", "logit_drift", "copy_side_files"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_crash_leaves_what_was_there(tmp_path, monkeypatch, where, existing):
    source = saved(tmp_path / "source")
    if existing:
        (tmp_path / "grown").mkdir()
        (tmp_path / "grown" / "precious").write_text("")
    calls = []

    def crash(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2 or where != "save_file":
            raise RuntimeError("no space left")
        save_file(*args, **kwargs)

    monkeypatch.setattr(growth_tensors if where == "save_file" else growth_module, where, crash)
    with pytest.raises(RuntimeError, match="no space left"):
        grow_pretrained(source, tmp_path / "grown", PLAN, overwrite=True, max_shard_bytes=20_000)
    assert sorted(os.listdir(tmp_path)) == (["grown", "source"] if existing else ["source"])
    assert not existing or os.listdir(tmp_path / "grown") == ["precious"]


def test_drift_is_measured_only_if_the_model_fits(tmp_path, monkeypatch):
    source = saved(tmp_path / "source")
    monkeypatch.setattr(growth_module, "available_memory", lambda: 1000)
    grown = grow_pretrained(source, tmp_path / "a", PLAN)
    assert "more than half of the 1000" in json.loads((grown / "growth.json").read_text())["logit_drift"]["skipped"]
    grown = grow_pretrained(source, tmp_path / "b", PLAN, measure_drift=True)
    assert "max_abs" in json.loads((grown / "growth.json").read_text())["logit_drift"]


def test_available_memory(monkeypatch):
    assert growth_drift.available_memory() > 0

    def unknown(name):
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", unknown)
    assert growth_drift.available_memory() == 0


# --- the command line


def test_command_line(tmp_path, capsys):
    source = saved(tmp_path / "source")
    arguments = "--depth-factor 3 --depth-method stack --keep-first 1 --width-factor 2 --noise-alpha 0.5".split()
    arguments += "--noise-targets experts --seed 4 --no-measure-drift".split()
    main([str(source), str(tmp_path / "grown"), *arguments])
    assert "Wrote" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "grown" / "growth.json").read_text())
    assert manifest["layer_order"] == [0, 1, 2, 1, 2, 1, 2]
    assert manifest["plan"]["noise_targets"] == ["experts"] and manifest["plan"]["noise_alpha"] == 0.5
    assert manifest["plan"]["seed"] == 4 and manifest["logit_drift"] == {"skipped": "on request"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width-factor", "0"], "width_factor=0 is not an integer"),
        ([], "grow nothing"),
        (["--depth-factor", "2", "--keep-last", "9"], "leave none of 3 layers"),
    ],
)
def test_command_line_errors_are_messages(tmp_path, capsys, arguments, message):
    source = saved(tmp_path / "source")
    with pytest.raises(SystemExit) as exit:
        main([str(source), str(tmp_path / "grown"), *arguments])
    assert exit.value.code == 1
    assert re.search(f"^error: .*{message}", capsys.readouterr().err, flags=re.MULTILINE)


# --- memory

_MEASURED = """
import resource, sys
from hf_models.moe.growth import GrowthPlan, grow_pretrained

plan = GrowthPlan(depth_factor=2, width_factor=2)
warm_up, source, destination = sys.argv[1:]
grow_pretrained(warm_up, destination + "-warm-up", plan, measure_drift=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
grow_pretrained(source, destination, plan, measure_drift=False)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("fused", [True, False])
def test_memory_stays_below_two_of_the_largest_shards(tmp_path, fused):
    wide = {"hidden_size": 512, "intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 4}
    model = OlmoeForCausalLM(host_config("olmoe", **wide))
    model.save_pretrained(tmp_path / "source", max_shard_size="52MB", save_original_format=not fused)
    del model
    saved(tmp_path / "warm-up")
    arguments = [str(tmp_path / name) for name in ("warm-up", "source", "grown")]
    # Freed memory goes back at once instead of into the allocator's reserve, which would be counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _MEASURED, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    files = [*(tmp_path / "source").glob("*.safetensors"), *(tmp_path / "grown").glob("*.safetensors")]
    largest = max(file.stat().st_size for file in files)
    assert len(files) > 12 and largest < 70e6
    assert sum(file.stat().st_size for file in files) > 15 * largest
    assert int(result.stdout.split()[-1]) < 2 * largest
