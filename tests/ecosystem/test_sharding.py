"""FSDP2 on two gloo processes: sharded parameters get the gradients of whole ones, and are saved as whole ones."""

import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.ecosystem.families import CAUSAL_LMS, LEARNERS
from tests.gloo_ranks import results_of_ranks


SHARDED = [family for family in LEARNERS if family.method != "dot_cbm"]  # which has such a test of its own
SAVED = CAUSAL_LMS + LEARNERS


def sharded(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(family, rank, *, shard):
    """Of the rows of a rank: every second one."""
    model = family.model()
    if shard:
        sharded(model)
    rows = family.rows()[rank : 2 * (len(family.rows()) // 2) : 2]
    model(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() for name, grad in found.items()} if shard else found


def of_this_rank(family):
    return gradients(family, dist.get_rank(), shard=True)


def files_of(model, **options):
    """What a saved model's folder holds beside its weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        return {path.name: path.read_text() for path in Path(folder).iterdir() if path.suffix in (".py", ".json")}


def saved_from_ranks(family):
    model = sharded(family.model())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return files_of(model, state_dict=state) if dist.get_rank() == 0 else None


JOBS = {family.method: partial(of_this_rank, family) for family in SHARDED}
JOBS |= {f"saved {family.method}": partial(saved_from_ranks, family) for family in SAVED}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of_ranks(__name__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("family", SHARDED, ids=lambda family: family.method)
@pytest.mark.compatibility("FSDP2", library="torch", gloo=True)
def test_sharded_parameters_get_the_mean_of_the_gradients_of_the_ranks(family, results):
    of_ranks = [gradients(family, rank, shard=False) for rank in (0, 1)]
    for found in results(family.method):
        assert found.keys() == of_ranks[0].keys() and found
        for name, gradient in found.items():
            mean = (of_ranks[0][name] + of_ranks[1][name]) / 2
            torch.testing.assert_close(gradient, mean, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("family", SAVED, ids=lambda family: family.method)
@pytest.mark.compatibility("FSDP2: saved with its code", library="torch", gloo=True)
def test_a_sharded_model_is_saved_with_its_own_code(family, results):
    found, _ = results(f"saved {family.method}")
    whole = files_of(family.model())
    assert found.keys() == whole.keys() and any(name.startswith("modeling_") for name in found)
    assert found == whole
