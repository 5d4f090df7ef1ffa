"""Several processes: the files for `accelerate launch`, and expert and tensor parallelism on two gloo processes.

Nothing here has run on several GPUs: what passes is gloo-tested. DDP and FSDP2 on two processes are in
`tests/hf_models/moe/test_distributed.py`, inference under all plans in `tests/transformers_suite`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers.distributed import DistributedConfig

import trainers
from hf_models.moe import SigmaMoeForCausalLM
from tests.gloo_ranks import results_of_ranks
from tests.hf_models.moe.test_distributed import (
    SAME_TARGETS,
    assert_same,
    expected_gradients,
    gradients,
    make_model,
    mine,
    stacked,
)
from tests.trainers.recipes.test_language_model import TINY, write_corpus
from tests.trainers.recipes.test_pretrain_sigma_moe import DRIVER, LAUNCHERS, ROOT, plain


CONFIGS = sorted((Path(trainers.__path__[0]) / "configs").glob("*.yaml"))
WORLD = 2
# Before, `ep_router` masked the experts of other ranks on a batch that all ranks share.
EXCHANGES_TOKENS = "ep_size" in DistributedConfig.__dataclass_fields__


# --- files for `accelerate launch` -----------------------------------------------------------------------------------


def test_every_layout_has_its_file():
    assert [path.stem for path in CONFIGS] == ["ddp_8gpu", "fsdp2_8gpu", "fsdp2_multinode"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_its_file(path):
    """`load_config_from_file` refuses keys that it does not know."""
    config = load_config_from_file(str(path))
    fsdp = path.stem.startswith("fsdp2")
    assert config.distributed_type == (DistributedType.FSDP if fsdp else DistributedType.MULTI_GPU)
    assert config.num_processes == 8 * config.num_machines and config.mixed_precision == "bf16"
    assert not config.use_cpu and "configs/" + path.name in path.read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_the_processes_are_told(path, monkeypatch):
    monkeypatch.setattr("accelerate.commands.launch.is_bf16_available", lambda *args: True, raising=False)
    args = launch_command_parser().parse_args(["--config_file", str(path), "--main_process_port", "29511", "x.py"])
    args, _, _ = _validate_launch_command(args)
    told = prepare_multi_gpu_env(args)
    values = yaml.safe_load(path.read_text())
    assert told["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if "fsdp_config" not in values:
        assert "ACCELERATE_USE_FSDP" not in told
        return
    assert (told["ACCELERATE_USE_FSDP"], told["FSDP_VERSION"]) == ("true", "2")
    assert told["FSDP_RESHARD_AFTER_FORWARD"] == "true" and told["FSDP_ACTIVATION_CHECKPOINTING"] == "false"
    assert told["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    if shape := values.get("parallelism_config"):
        assert told["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
        sizes = [told[f"PARALLELISM_CONFIG_{name}_SIZE"] for name in ("DP_REPLICATE", "DP_SHARD", "TP", "CP")]
        assert sizes == [str(value) for key, value in sorted(shape.items(), key=_order)]
        assert int(sizes[0]) * int(sizes[1]) == values["num_processes"]


def _order(item):
    return [f"parallelism_config_{name}_size" for name in ("dp_replicate", "dp_shard", "tp", "cp")].index(item[0])


# Accelerate refuses a `parallelism_config` on CPUs (MULTI_CPU): the file for several nodes is only read, above.
LAUNCHED = [path for path in CONFIGS if "parallelism_config" not in yaml.safe_load(path.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_the_recipe_starts_with_the_file_on_two_processes(path, tmp_path):
    """On CPUs Accelerate starts one process where `--cpu` is given, so the environment says it instead; and it leaves
    FSDP out, so that what trains is DDP: this tests the files and the launch."""
    write_corpus(tmp_path / "corpus")
    (tmp_path / "driver.py").write_text(DRIVER.format(tiny=TINY))
    launcher = [*LAUNCHERS["accelerate"][:2], "--config_file", str(path), "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--main_process_port", "0"]
    argv = plain(max_steps=2, eval_steps=2, save_steps=2, sequence_length=32, num_completions=0, initial_top_k=[])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "EXPECTED_WORLD": "2"}
    command = [sys.executable, *launcher, "driver.py", *argv]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    fit = json.loads((tmp_path / "run" / "fit.json").read_text())["fit"]
    assert fit["steps"] == 2 and fit["tokens"] == 2 * 2 * 2 * 32
    assert (tmp_path / "run" / "model.safetensors").exists()


# --- models that transformers shards while it loads them -------------------------------------------------------------


# Tensor parallelism gives each rank key-value heads of its own.
TWO_HEADS = {"num_key_value_heads": 2}


def loaded(kind, backend=None, overrides=None, **sizes):
    """The model of [`make_model`], sharded at loading."""
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        make_model(kind, **overrides or {}).save_pretrained(folder)  # rank 0 alone writes
        dist.barrier()
        options = {"experts_implementation": backend} if backend else {}
        sharding = DistributedConfig(**sizes)
        model = SigmaMoeForCausalLM.from_pretrained(
            shared[0], distributed_config=sharding, dtype=torch.float32, **options
        )
        dist.barrier()
    return model.train()


def whole(tensors):
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def step_of(model, rows):
    out = model(**stacked(rows))
    out.loss.backward()
    experts = {n: tuple(p.to_local().shape) for n, p in model.named_parameters() if ".experts." in n}
    return {"gradients": whole(gradients(model)), "loss": out.loss.detach(), "experts": experts}


def job_expert_parallel():
    """Ranks with batches of their own, which own three experts each and exchange tokens."""
    results = {}
    for kind in ("global_batch", "sequence"):
        for backend in (None, "sigma_triton"):
            results[kind, backend] = step_of(loaded(kind, backend, fsdp_size=WORLD, ep_size=WORLD), mine(SAME_TARGETS))
    return results


def job_tensor_parallel():
    """One batch, every matrix in two parts."""
    return step_of(loaded("switch", overrides=TWO_HEADS, tp_size=WORLD), SAME_TARGETS)


def job_rank():
    return dist.get_rank()


JOBS = {name.removeprefix("job_"): job for name, job in list(globals().items()) if name.startswith("job_")}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results_of_ranks(__name__, tmp_path_factory.mktemp("ranks"), world_size=WORLD)


@pytest.mark.slow
def test_there_really_are_two_processes(ranks):
    assert ranks("rank") == [0, 1]


@pytest.mark.slow
@pytest.mark.skipif(not EXCHANGES_TOKENS, reason="this transformers exchanges no tokens between expert ranks")
@pytest.mark.parametrize("backend", [None, "sigma_triton"])
@pytest.mark.parametrize("kind", ["global_batch", "sequence"])
def test_experts_on_two_ranks_train_as_on_one(ranks, kind, backend):
    expected, _ = expected_gradients(kind, [[SAME_TARGETS[:2], SAME_TARGETS[2:]]])
    for result in ranks("expert_parallel"):
        assert {shape[0] for shape in result[kind, backend]["experts"].values()} == {3}
        assert_same(result[kind, backend]["gradients"], expected)


@pytest.mark.slow
def test_matrices_on_two_ranks_train_as_on_one(ranks):
    model = make_model("switch", **TWO_HEADS).train()
    expected = step_of_one(model, SAME_TARGETS)
    for result in ranks("tensor_parallel"):
        torch.testing.assert_close(result["loss"], expected["loss"])
        assert_same(result["gradients"], expected["gradients"])


def step_of_one(model, rows):
    out = model(**stacked(rows))
    out.loss.backward()
    return {"gradients": gradients(model), "loss": out.loss.detach()}
