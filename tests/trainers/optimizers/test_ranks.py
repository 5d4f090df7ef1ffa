"""MSign on two real gloo processes against one: replicas, shards, experts, and the checkpoints of FSDP2.

One pair of processes runs every job below once and writes what it saw to files.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from tests.gloo_ranks import results_of_ranks
from trainers.optimizers import MSign, msign_, ranks, select_targets
from trainers.optimizers.ranks import owners_by_cost, restore_weights
from trainers.optimizers.restoration import RestorationOptions, restore, restore_views
from trainers.optimizers.targets import MatrixTarget


WORLD = 2
STEPS = 5


def make_model():
    torch.manual_seed(0)
    config = SigmaMoeConfig(
        vocab_size=31,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=4,
        moe_intermediate_size=8,
        num_experts=3,  # not a multiple of the ranks
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return SigmaMoeForCausalLM(config)


def rows(step):
    """This rank's half of four rows; all of them without a process group."""
    ids = torch.randint(0, 30, (4, 8), generator=torch.Generator().manual_seed(step))
    return ids[2 * dist.get_rank() :][:2] if dist.is_initialized() else ids


def make_optimizer(model, **options):
    # Not Adam, which makes large differences of the small ones between a sum over ranks and one over rows.
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return MSign(base, select_targets(model, "all_2d"), **{"period": 2, **options})


def train(model, optimizer, first=0, steps=STEPS):
    for step in range(first, first + steps):
        ids = rows(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model):
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()
    }


def sharded(mesh):
    model = make_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# --- jobs


def job_world():
    return dist.get_world_size(), dist.get_rank()


def job_replicas():
    model = make_model()
    computed = []

    def counted(views, options):
        computed.append(len(views))
        return restore_views(views, options)

    ranks.restore_views = counted
    optimizer = make_optimizer(model)
    train(DistributedDataParallel(model), optimizer)
    ranks.restore_views = restore_views
    return {"weights": whole(model), "report": optimizer.last_report, "computed": computed}


def job_owner():
    """Replicas that differ in their last bits, as on different devices."""
    torch.manual_seed(0)
    fused = torch.randn(12, 6)
    wide = torch.randn(6, 12)
    noise = 1e-6 * dist.get_rank()
    jobs = [
        (MatrixTarget("fused", (slice(0, 4), slice(4, 12))), fused + noise * torch.randn(12, 6)),
        (MatrixTarget("columns", (slice(0, 6), slice(6, 12)), -1), wide + noise * torch.randn(6, 12)),
        (MatrixTarget("stack"), torch.randn(3, 4, 4) + noise),
    ]
    report = restore_weights(jobs, RestorationOptions())
    return {"weights": {target.name: weight for target, weight in jobs}, "report": report}


def job_strangers():
    torch.manual_seed(dist.get_rank())
    weight = torch.randn(6, 6)
    try:
        restore_weights([(MatrixTarget("w"), weight.clone())], RestorationOptions())
        error = ""
    except RuntimeError as caught:
        error = str(caught)
    alone = weight.clone()
    restore_weights([(MatrixTarget("w"), alone)], RestorationOptions(), None)
    return {"error": error, "alone": torch.equal(alone, msign_(weight.clone()))}


def matrices_to_shard():
    torch.manual_seed(3)
    low = torch.outer(torch.randn(9), torch.randn(7)) + 1e-3 * torch.randn(9, 7)
    stack = torch.randn(5, 6, 4)
    stack[2] = torch.outer(torch.randn(6), torch.randn(4)) + 1e-3 * torch.randn(6, 4)
    return {
        "even": torch.randn(8, 8),
        "low": low,
        "fused": torch.randn(15, 5),
        "stack": stack,
        "tall": torch.randn(7, 3),
    }


TARGETS = {
    name: MatrixTarget(name, (slice(0, 10), slice(10, 15)) if name == "fused" else None)
    for name in matrices_to_shard()
}
LAYOUTS = {
    "rows": ((WORLD,), (Shard(0),)),
    "columns": ((WORLD,), (Shard(1),)),
    "replicated": ((WORLD,), (Replicate(),)),
    "hybrid": ((WORLD, 1), (Replicate(), Shard(0))),
    "hybrid, one replica": ((1, WORLD), (Replicate(), Shard(0))),
    "two dimensions": ((1, WORLD), (Shard(1), Shard(0))),
}
OPTIONS = {"all": RestorationOptions(), "fallen": RestorationOptions(below=0.3)}


def job_layouts():
    results = {}
    for layout, (shape, placements) in LAYOUTS.items():
        mesh = init_device_mesh("cpu", shape)
        for kind, options in OPTIONS.items():
            jobs = [(TARGETS[n], distribute_tensor(w, mesh, placements)) for n, w in matrices_to_shard().items()]
            if layout == "hybrid" and dist.get_rank() == 1:  # a replica that drifted apart
                jobs[3][1].to_local().mul_(1 + 1e-6)
            report = restore_weights(jobs, options)
            weights = {target.name: weight.full_tensor() for target, weight in jobs}
            local = {target.name: weight.to_local().clone() for target, weight in jobs}
            results[layout, kind] = {"weights": weights, "report": report, "local": local}
    return results


def job_fsdp2():
    mesh = init_device_mesh("cpu", (WORLD,))
    model = sharded(mesh)
    optimizer = make_optimizer(model)
    train(model, optimizer)
    kinds = {type(p) for p in model.parameters()}
    return {"weights": whole(model), "report": optimizer.last_report, "sharded": kinds == {DTensor} or str(kinds)}


def job_fsdp2_optimizer_from_before():
    """The optimizer is made first and its parameters are exchanged, as Accelerate does."""
    model = make_model()
    optimizer = make_optimizer(model)
    names = {id(p): n for n, p in model.named_parameters()}
    order = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model, mesh=mesh)
    now = dict(model.named_parameters())
    for group, of_group in zip(optimizer.param_groups, order, strict=True):
        group["params"] = [now[name] for name in of_group]
    train(model, optimizer)
    return {"weights": whole(model)}


def job_fsdp2_resume():
    mesh = init_device_mesh("cpu", (WORLD,))
    model = sharded(mesh)
    optimizer = make_optimizer(model, period=3)
    train(model, optimizer, steps=2)
    saved = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    train(model, optimizer, first=2, steps=3)
    again = sharded(mesh)
    resumed = make_optimizer(again, period=1)  # what is loaded wins
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(saved[name])
    set_optimizer_state_dict(again, resumed, state)
    steps = resumed.steps
    train(again, resumed, first=2, steps=3)
    return {"steps": steps, "weights": whole(model), "resumed": whole(again)}


JOBS = {name.removeprefix("job_"): job for name, job in list(globals().items()) if name.startswith("job_")}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """`two_ranks(job)` -> what each rank returned."""
    return results_of_ranks(__name__, tmp_path_factory.mktemp("ranks"), world_size=WORLD)


@pytest.fixture(scope="module")
def alone():
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer)
    return {"weights": whole(model), "report": optimizer.last_report}


def assert_close(actual, expected, **tolerances):
    assert actual.keys() == expected.keys() and actual
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **tolerances)


def assert_same_reports(actual, expected, rel=1e-3):
    assert list(actual) == list(expected)
    for name in expected:
        assert actual[name] == pytest.approx(expected[name], rel=rel), name


def test_there_really_are_two_processes(two_ranks):
    assert two_ranks("world") == [(2, 0), (2, 1)]


def test_replicas_stay_equal_share_the_work_and_are_what_one_process_gets(two_ranks, alone):
    results = two_ranks("replicas")
    assert_close(results[1]["weights"], results[0]["weights"], rtol=0, atol=0)
    for result in results:
        assert_close(result["weights"], alone["weights"], rtol=1e-3, atol=1e-4)
        assert_same_reports(result["report"], alone["report"], rel=1e-2)
    shares = [result["computed"] for result in results]  # at both applications
    assert [sum(share) for share in zip(*shares, strict=True)] == [len(alone["report"])] * 2
    assert min(shares[0] + shares[1]) > len(alone["report"]) // 4


def test_replicas_end_with_the_bits_of_the_owner(two_ranks):
    first, second = two_ranks("owner")
    assert_close(second["weights"], first["weights"], rtol=0, atol=0)
    torch.manual_seed(0)
    fused, wide = torch.randn(12, 6), torch.randn(6, 12)
    expected = {
        "fused": torch.cat([msign_(part.clone()) for part in fused.split([4, 8])]),
        "columns": torch.cat([msign_(part.clone()) for part in wide.split(6, dim=1)], dim=1),
    }
    for name, weight in expected.items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-4)
    assert list(first["report"]) == ["fused[0]", "fused[1]", "columns[0]", "columns[1]", "stack"]
    assert first["report"] == second["report"] and first["report"]["stack"].restored == 3


def test_weights_that_are_no_replicas_are_not_broadcast(two_ranks):
    for result in two_ranks("strangers"):
        assert "process_group=None" in result["error"]
        assert result["alone"]


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_shards_gives_the_weights_of_one_process(two_ranks, layout, kind):
    weights = matrices_to_shard()
    report = restore_weights([(TARGETS[name], weight) for name, weight in weights.items()], OPTIONS[kind], None)
    by_rank = [result[layout, kind] for result in two_ranks("layouts")]
    for result in by_rank:
        assert_close(result["weights"], weights, rtol=0, atol=1e-5 if layout == "hybrid" else 1e-6)
        assert_same_reports(result["report"], report)
    if layout in ("hybrid", "replicated"):
        assert_close(by_rank[1]["local"], by_rank[0]["local"], rtol=0, atol=0)
    fallen = {name: r.restored for name, r in report.items()}
    if kind == "fallen":
        assert fallen["low"] == 1 and fallen["stack"] >= 1 and fallen["even"] == 0
        assert torch.equal(by_rank[0]["weights"]["even"], matrices_to_shard()["even"])
    else:
        assert fallen == {"even": 1, "low": 1, "fused[0]": 1, "fused[1]": 1, "stack": 5, "tall": 1}


def test_a_sharded_model_learns_what_one_process_does(two_ranks, alone):
    for job in ("fsdp2", "fsdp2_optimizer_from_before"):
        first, second = two_ranks(job)
        assert_close(second["weights"], first["weights"], rtol=0, atol=0)
        assert_close(first["weights"], alone["weights"], rtol=1e-3, atol=1e-4)
    first, second = two_ranks("fsdp2")
    assert first["sharded"] is True
    assert_same_reports(first["report"], alone["report"], rel=1e-2)
    assert first["report"] == second["report"]


def test_fsdp2_s_own_checkpoints_carry_steps_and_options(two_ranks):
    for result in two_ranks("fsdp2_resume"):
        assert result["steps"] == 2
        assert_close(result["resumed"], result["weights"], rtol=0, atol=0)
        q_proj = restore(result["weights"]["model.layers.0.self_attn.q_proj.weight"])
        assert 1 < q_proj.before < 12


def test_owners_have_about_equal_work():
    assert owners_by_cost([1, 1, 1, 1], 2) == [0, 1, 0, 1]
    assert owners_by_cost([1, 5, 1, 3], 2) == [1, 0, 1, 1]
    assert owners_by_cost([2.0], 3) == [0]
    assert set(owners_by_cost([1.0] * 9, 3)) == {0, 1, 2}


def test_flat_weights_are_refused():
    with pytest.raises(ValueError, match=r"flattened into shards.*FSDP2"):
        restore_weights([(MatrixTarget("w"), nn.Parameter(torch.randn(12)))], RestorationOptions())
