"""A recipe whose processes divide the experts among them learns what one process learns."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM, configuration_sigma_moe
from tests.gloo_ranks import results_of_ranks
from tests.trainers.recipes.test_language_model import TINY, losses, write_corpus
from tests.trainers.recipes.test_pretrain_sigma_moe import LAUNCHERS, SEQUENCE, fit_of, plain, start
from trainers.recipes import pretrain_sigma_moe
from trainers.recipes.arguments import RecipeTrainingArguments
from trainers.recipes.expert_parallel import divide_experts, require_expert_parallel
from trainers.recipes.pretrain_sigma_moe import main


EXCHANGES_TOKENS = pytest.mark.skipif(
    "ep_size" not in DistributedConfig.__dataclass_fields__, reason="this transformers exchanges no tokens"
)
SHAPE = TINY | {"vocab_size": 50, "num_experts_per_tok": 1, "max_position_embeddings": 64, "pad_token_id": 0}
OPTIONS = {"max_steps": 6, "save_steps": 3, "eval_steps": 3}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(configuration_sigma_moe.PRESETS, "tiny", configuration_sigma_moe.PRESETS["demo"] | TINY)


@EXCHANGES_TOKENS
@pytest.mark.slow
@pytest.mark.parametrize(("processes", "backend"), [(2, "grouped_mm"), (4, "sigma_triton")])
def test_several_processes_are_one(tmp_path, monkeypatch, processes, backend):
    homes = [tmp_path / name for name in ("several", "one")]
    for home in homes:
        write_corpus(home / "corpus")
    divided = {"expert_parallel_size": processes, "save_only_model": True, "experts_implementation": backend}
    argv = plain(per_device_train_batch_size=4 // processes, **OPTIONS | divided)
    launcher = [*LAUNCHERS["torchrun"][:-1], str(processes)]
    environment = {"ACCELERATE_USE_CPU": "true", "EXPECTED_WORLD": str(processes)}
    process = start(homes[0], launcher, *argv, **environment)
    assert process.wait(timeout=500) == 0, (homes[0] / "out.txt").read_text()[-5000:]

    monkeypatch.chdir(homes[1])
    main(plain(per_device_train_batch_size=4, **OPTIONS))
    several, one = (fit_of(home / "run") for home in homes)
    assert (several.steps, several.tokens) == (one.steps, one.tokens) == (6, 6 * 4 * SEQUENCE)
    assert several.parameters == one.parameters
    for a, b in zip(losses(several.history), losses(one.history), strict=True):
        for field in ("loss", "eval_loss", "grad_norm", "moe/max_violation", "moe/load_balancing_loss"):
            if field in b:
                assert a[field] == pytest.approx(b[field], rel=2e-5), (a["step"], field)
    assert several.nats_per_token == pytest.approx(one.nats_per_token, rel=1e-5)
    saved = [load_file(home / "run" / "model.safetensors") for home in homes]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[1].items():
        torch.testing.assert_close(saved[0][name], tensor, rtol=1e-3, atol=1e-5)
    code = [{path.name: path.read_bytes() for path in (home / "run").glob("*.py")} for home in homes]
    assert code[0] == code[1] and "modeling_sigma_moe.py" in code[0]
    maps = [json.loads((home / "run" / "config.json").read_text())["auto_map"] for home in homes]
    assert maps[0] == maps[1]
    assert not (homes[0] / "run" / "start").exists() and (homes[0] / "run" / "results.json").exists()

    # What Trainer keeps of such a run is not enough to go on, neither so nor in one process.
    for home in homes:
        file = home / "run" / "fit.json"
        file.write_text(json.dumps({"signature": json.loads(file.read_text())["signature"]}))
    again = start(homes[0], launcher, *argv, **environment)
    assert again.wait(timeout=500) != 0
    refusal = f"checkpoint-6 cannot be gone on from with expert_parallel_size={processes}"
    assert refusal in (homes[0] / "out.txt").read_text()
    for path in (homes[1] / "run" / "checkpoint-6").glob("optimizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="checkpoint-6 holds no optimizer state .*--save_only_model"):
        main(plain(per_device_train_batch_size=4, **OPTIONS))


# --- what a rank holds ----------------------------------------------------------------------------------------------


def job_divided():
    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    model = SigmaMoeForCausalLM(SigmaMoeConfig(**SHAPE)).train()
    model.set_experts_implementation("sigma_triton")
    divided = divide_experts(model, 2, Path(shared[0]) / "start")
    shapes = {name: tuple(p.to_local().shape) for name, p in divided.named_parameters()}
    left = (Path(shared[0]) / "start").exists()
    return {"shapes": shapes, "backend": divided.config._experts_implementation, "left": left}


JOBS = {"divided": job_divided}


@EXCHANGES_TOKENS
@pytest.mark.slow
def test_a_rank_holds_its_experts_and_its_part_of_the_rest(tmp_path):
    for rank, found in enumerate(results_of_ranks(__name__, tmp_path)("divided")):
        assert found["backend"] == "sigma_triton" and not (rank == 0 and found["left"])
        for name, shape in found["shapes"].items():
            if ".experts." in name:
                assert shape[0] == 2, name
        assert found["shapes"]["model.embed_tokens.weight"] == (25, 16)


# --- refused before the work ----------------------------------------------------------------------------------------


def refused(tmp_path, size=1, experts=4, **options):
    args = RecipeTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
    with pytest.raises(ValueError) as caught:
        require_expert_parallel(size, experts, args)
    return str(caught.value)


@pytest.mark.parametrize("size", [0, 2, 3])
def test_a_number_that_does_not_divide(tmp_path, size):
    assert f"expert_parallel_size={size} divides 4 experts among 1 processes" in refused(tmp_path, size)


@EXCHANGES_TOKENS
def test_what_cannot_be_with_it(tmp_path, monkeypatch):
    assert "--save_only_model" in refused(tmp_path)
    for name, value in {"optimizer": "msign", "reliability": "on", "torch_compile": True}.items():
        found = refused(tmp_path, save_strategy="no", **{name: value})
        assert f"--{name} {value} does not work with a model in parts. Leave it out." in found
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "leave --fsdp out" in refused(tmp_path, save_strategy="no")
    monkeypatch.undo()
    args = RecipeTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", save_only_model=True)
    require_expert_parallel(1, 4, args)


def test_the_recipe_refuses_before_it_trains(tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expert_parallel_size=3 divides 4 experts"):
        main(plain(expert_parallel_size=3))
    assert not (tmp_path / "run" / "fit.json").exists()


def test_baselines_are_refused(tmp_path, monkeypatch):
    """Once the run itself is found to be possible, which takes several processes."""
    write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain_sigma_moe, "require_expert_parallel", lambda *_: None)
    with pytest.raises(ValueError, match="expert_parallel_size=2.*Leave --baselines empty"):
        main(plain(expert_parallel_size=2, baselines=["dense"]))
    assert not (tmp_path / "run" / "fit.json").exists()
