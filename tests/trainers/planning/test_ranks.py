"""Memory of two real gloo processes against the plan: DDP, and FSDP2 wrapped as Accelerate wraps it, on a CPU mesh."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_models.moe import SigmaMoeConfig
from tests.gloo_ranks import results_of_ranks
from tests.trainers.planning.allocations import allocation_peak, train
from trainers.planning import PlannedModel, Sharding, memory_of, trace_step
from trainers.planning.memory import trace_options
from trainers.planning.shapes import Training
from trainers.planning.step_trace import checkpoint_layers


pytestmark = pytest.mark.slow
WORLD, BATCH, SEQUENCE = 2, 2, 128
# Of 6 experts two ranks hold 3 each; of 5, one holds 3 and the other 2: what is planned is the fuller one.
CASES = {
    "ddp": ("ddp", 6, {}),
    "ddp, accumulation": ("ddp", 6, {"accumulation": 2}),
    "fsdp2": ("fsdp2", 6, {}),
    "fsdp2, uneven": ("fsdp2", 5, {}),
    "fsdp2, bf16": ("fsdp2", 6, {"bf16": True}),
    "fsdp2, bf16, checkpointing": ("fsdp2", 6, {"bf16": True, "checkpointing": True}),
    "fsdp2, bf16, accumulation": ("fsdp2", 6, {"bf16": True, "accumulation": 2}),
    "ep": ("ep", 6, {}),
    "ep, checkpointing": ("ep", 6, {"checkpointing": True}),
}


def planned(experts):
    config = SigmaMoeConfig.from_preset(
        "demo", vocab_size=1000, num_hidden_layers=4, num_experts=experts, num_experts_per_tok_per_layer=[2, 1, 1, 1]
    )
    return PlannedModel("tiny", config, Training())


def sharded(model, bf16):
    """As `accelerate.utils.fsdp_utils.fsdp2_prepare_model` (1.15) does it."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16, "output_dtype": torch.bfloat16}
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(**half if bf16 else {})}
    for layer in model.model.layers:
        fully_shard(layer, **options, reshard_after_forward=True)
    fully_shard(model.model.embed_tokens, **options, reshard_after_forward=True)
    fully_shard([model.model.norm, model.lm_head], **options, reshard_after_forward=False)
    return fully_shard(model, **options)


def loaded(experts):
    """Sharded by transformers: three experts on each rank, everything else in two parts."""
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        planned(experts).build().save_pretrained(folder)  # rank 0 alone writes
        dist.barrier()
        sharding = DistributedConfig(fsdp_size=WORLD, ep_size=WORLD)
        model = AutoModelForCausalLM.from_pretrained(shared[0], distributed_config=sharding, dtype=torch.float32)
        dist.barrier()
    return model


def measured(name):
    kind, experts, options = CASES[name]
    bf16, checkpointing = options.get("bf16", False), options.get("checkpointing", False)

    def prepare():
        torch.manual_seed(0)
        model = loaded(experts) if kind == "ep" else planned(experts).build()
        if checkpointing:
            checkpoint_layers(model)
        if kind == "ep":
            return model
        return DistributedDataParallel(model) if kind == "ddp" else sharded(model, bf16)

    step = {"batch_size": BATCH, "sequence_length": SEQUENCE, "bf16": bf16}
    return allocation_peak(prepare, lambda model: train(model, **step, accumulation=options.get("accumulation", 1)))


JOBS = {name: (lambda name=name: measured(name)) for name in CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results_of_ranks(__name__, tmp_path_factory.mktemp("ranks"), world_size=WORLD)


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_within_a_tenth_of_the_fuller_rank(ranks, name):
    kind, experts, options = CASES[name]
    bf16, accumulation = options.get("bf16", False), options.get("accumulation", 1)
    model = planned(experts)
    sharding = Sharding(kind="fsdp2", gpus=WORLD, ep=WORLD) if kind == "ep" else Sharding(kind=kind, gpus=WORLD)
    how = trace_options(sharding, bf16=bf16, accumulation=accumulation)
    half = how.pop("half_parameters")
    trace = trace_step(
        lambda: model.build(half=half),
        batch_size=BATCH,
        sequence_length=SEQUENCE,
        checkpointing=options.get("checkpointing", False),
        **how,
    )
    # The most that a token activates in a layer is two experts.
    exchanged = BATCH * SEQUENCE * 2 * model.config.hidden_size
    memory = memory_of(model, trace, sharding, bf16=bf16, accumulation=accumulation, exchanged=exchanged)
    peaks = ranks(name)
    print(f"{name}: planned {memory.total / 2**20:.2f} MiB ({memory.moment}), measured {[p / 2**20 for p in peaks]}")
    assert memory.total == pytest.approx(max(peaks), rel=0.1)
