"""Norms against their definitions, alone, under DDP and on shards; the valley on profiles made for it."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.stats import spearmanr
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback, TrainerState, TrainingArguments

from tests.trainers.callbacks.test_installation import EXPERTS, LAYERS, make_model, train
from trainers.callbacks.norm_profile import (
    NormProfileCallback,
    ValleyWatch,
    depth_slope,
    parts_of,
    squared_norms,
    valley_depth,
)
from trainers.reliability.events import read_events


FAMILIES = ["q", "k", "v", "o", "gate", "up", "down", "router"]


def matrices(tensors, layer):
    """Family -> the matrices of one layer of our toy model, by their names."""
    prefix = f"model.layers.{layer}."
    gate_up, down = (tensors[f"{prefix}mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    attention = {family: [tensors[f"{prefix}self_attn.{family}_proj.weight"]] for family in "qkvo"}
    experts = {"gate": list(gate_up[:, :8]), "up": list(gate_up[:, 8:]), "down": list(down)}
    return attention | experts | {"router": [tensors[f"{prefix}mlp.gate.weight"]]}


def norm(tensors):
    return sum(tensor.double().square().sum() for tensor in tensors).sqrt().item()


# --- measurements ----------------------------------------------------------------------------------------------------


class Definition(TrainerCallback):
    """Weights before and after each step, and the gradients between."""

    def __init__(self):
        self.steps = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        after = {n: p.detach().clone() for n, p in model.named_parameters()}
        update = {n: after[n] - self.before[n] for n in after}
        self.steps[state.global_step] = {"weight": after, "gradient": self.gradients, "update": update}


def test_norms_are_those_of_the_definition(tmp_path):
    definition = Definition()
    callback = NormProfileCallback(2, per_expert=True)
    model = make_model()
    train(model, tmp_path, definition, callback, max_steps=5, weight_decay=0.1)

    events = read_events(tmp_path)
    assert [(event.component, event.severity, event.step) for event in events] == [
        ("norm_profile", "info", 2),
        ("norm_profile", "info", 4),
    ]
    for event in events:
        for kind, tensors in definition.steps[event.step].items():
            assert set(event.evidence[kind]) == set(FAMILIES)
            for layer in range(LAYERS):
                for family, parts in matrices(tensors, layer).items():
                    assert event.evidence[kind][family][layer] == pytest.approx(norm(parts), rel=5.1e-5), (
                        kind,
                        family,
                    )
                    if len(parts) == EXPERTS:
                        each = [norm([part]) for part in parts]
                        assert event.evidence["experts"][kind][family][layer] == pytest.approx(each, rel=5.1e-5)
        assert set(event.evidence["experts"]["weight"]) == {"gate", "up", "down"}
        assert set(event.evidence["valley"]) == set(event.evidence["slope"]) == set(FAMILIES)


def test_smallest_and_largest_expert(tmp_path):
    model = make_model()
    model.model.layers[0].mlp.experts.down_proj.data[2] *= 50
    train(model, tmp_path, NormProfileCallback(1, updates=False), max_steps=1, learning_rate=0.0)
    [event] = read_events(tmp_path)
    each = [norm([part]) for part in model.model.layers[0].mlp.experts.down_proj.detach()]
    assert event.evidence["experts"]["weight"]["down"][0] == pytest.approx([min(each), max(each)], rel=5.1e-5)
    assert "update" not in event.evidence and "update" not in event.evidence["experts"]


def test_it_changes_nothing(tmp_path):
    plain, measured = make_model(), make_model()
    train(plain, tmp_path / "plain")
    train(measured, tmp_path / "measured", NormProfileCallback(1))
    for a, b in zip(plain.parameters(), measured.parameters()):
        assert torch.equal(a, b)


def test_families_of_a_dense_model():
    config = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=40, num_hidden_layers=3, intermediate_size=24, **config))
    found = [(part.layer, part.family, part.experts) for part in parts_of(model)]
    assert sorted(found) == sorted((l, f, 0) for l in range(3) for f in FAMILIES[:-1])


def test_missing_gradients_count_nothing():
    model = make_model()
    parts = parts_of(model)
    sums = squared_norms(parts, {part.name: None for part in parts})
    assert [tuple(s.shape) for s in sums] == [(part.experts,) if part.experts else () for part in parts]
    assert not any(s.any() for s in sums)


def test_options_are_checked():
    with pytest.raises(ValueError, match="every=0"):
        NormProfileCallback(0)


# --- the valley ------------------------------------------------------------------------------------------------------


def test_a_growing_profile_has_no_valley():
    assert valley_depth([1 + 0.1 * l for l in range(20)]) == 0.0
    assert depth_slope([1 + 0.1 * l for l in range(20)]) == pytest.approx(1.0)
    assert depth_slope([3 - 0.1 * l for l in range(20)]) == pytest.approx(-1.0)


def test_a_valley_in_closed_form():
    """Ten layers of 1, of which four in the middle have 1 - d: two of these keep their value under a mean of three."""
    for depth in (0.05, 0.2, 0.5):
        profile = [1.0] * 3 + [1 - depth] * 4 + [1.0] * 3
        assert valley_depth(profile) == pytest.approx(depth)
    # One layer alone is smoothed to a third.
    assert valley_depth([1.0] * 5 + [0.4] + [1.0] * 5) == pytest.approx(0.2)


def test_the_ends_are_not_the_middle():
    """The last tenth may fall, and the first layers have nothing before them."""
    assert valley_depth([1.0] * 19 + [0.1]) == pytest.approx(0.0)
    assert valley_depth([0.1, *[1.0] * 19]) == 0.0
    assert valley_depth([1.0, 0.1, 0.1, 1.0]) == 0.0  # four layers have no middle


def test_slope_is_spearmans():
    generator = torch.Generator().manual_seed(0)
    for layers in (5, 12, 56):
        values = torch.rand(layers, generator=generator).tolist()
        assert depth_slope(values) == pytest.approx(spearmanr(values, range(layers)).statistic)
    tied = [1.0, 2.0, 2.0, 3.0, 1.0, 4.0]
    assert depth_slope(tied) == pytest.approx(spearmanr(tied, range(6)).statistic)


def test_a_flat_profile_has_no_slope():
    assert depth_slope([1.0, 1.005, 1.01, 1.015]) == 0.0
    assert depth_slope([1.0, 1.01, 1.02, 1.03]) == depth_slope([1.0, 1.005, 1.01, 1.015], flat=0.0) == 1.0


def test_random_matrices_scatter_less_than_the_bound():
    """Two hundred models of 24 layers, by chance alone: none has a valley beyond what the callback allows for."""
    generator = torch.Generator().manual_seed(0)
    for elements in (64, 1024):
        norms = torch.randn(200, 24, elements, generator=generator).norm(dim=-1)
        deepest = max(valley_depth(profile) for profile in norms.tolist())
        assert deepest < 0.1 + 4 / (2 * elements) ** 0.5
    assert deepest < 0.1 < 4 / 128**0.5


def test_three_measurements_in_a_row():
    watch = ValleyWatch()
    assert [watch.update(v, 0.5) is not None for v in (0.2, 0.2, 0.0, 0.2, 0.2)] == [False] * 5
    assert "valley of 20%" in watch.update(0.2, 0.5)
    assert watch.update(0.2, 0.5) is None  # said once
    assert watch.update(0.1, 0.5) is None  # the bound itself is no valley: over
    assert [watch.update(v, 0.5) is not None for v in (0.2, 0.2, 0.2)] == [False, False, True]


def test_a_slope_that_was_and_is_no_more():
    watch = ValleyWatch()
    assert [watch.update(0.0, s) is not None for s in (0.1, -0.5, 0.2)] == [False] * 3  # it never was
    assert watch.update(0.0, 0.61) is None and watch.update(0.0, 0.3) is None
    assert "Spearman 0.29" in watch.update(0.0, 0.29)
    assert watch.update(0.0, 0.0) is None


class Valley(TrainerCallback):
    """Presses the middle layers' matrices of one family down, more at each step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for layer in model.model.layers[3:6]:
            layer.self_attn.o_proj.weight.data.mul_(0.9)


def test_the_warning_names_the_family(tmp_path):
    train(make_model(num_hidden_layers=9), tmp_path, Valley(), NormProfileCallback(1), max_steps=9, learning_rate=1e-5)
    [warning] = [event for event in read_events(tmp_path) if event.severity == "warning"]
    # Measured after step n layers 3 to 5 stand at 0.9^(n - 1) of the others; the bound is 0.1 + 4 / sqrt(2 * 256).
    assert warning.evidence["family"] == "o" and warning.action == "none" and warning.step in (6, 7, 8)
    assert warning.evidence["valley"] > 0.27 and len(warning.evidence["weight"]) == 9


def test_no_warning_at_initialisation_nor_in_warm_up(tmp_path):
    train(make_model(num_hidden_layers=12), tmp_path / "calm", NormProfileCallback(1), max_steps=4, learning_rate=1e-6)
    events = read_events(tmp_path / "calm")
    assert len(events) == 4 and {event.severity for event in events} == {"info"}
    options = {"max_steps": 9, "learning_rate": 1e-5, "warmup_steps": 9}
    train(make_model(num_hidden_layers=9), tmp_path / "warm-up", Valley(), NormProfileCallback(1), **options)
    assert {event.severity for event in read_events(tmp_path / "warm-up")} == {"info"}


# --- ranks -----------------------------------------------------------------------------------------------------------


def make_sharded_case():
    model = make_model(num_experts=5)  # an odd number: one rank holds more experts than the other
    generator = torch.Generator().manual_seed(3)
    gradients = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    return model, gradients


def run_rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    train(make_model(), f"{folder}/ddp", NormProfileCallback(2))

    # Accelerate leaves FSDP alone on CPUs: the hooks are called in Trainer's order by hand.
    model, gradients = make_sharded_case()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    args = TrainingArguments(f"{folder}/fsdp", use_cpu=True, report_to="none")
    state, callback = (
        TrainerState(max_steps=4, is_world_process_zero=rank == 0),
        NormProfileCallback(1, per_expert=True),
    )
    callback.on_train_begin(args, state, None, model=model)
    for name, parameter in model.named_parameters():
        whole = gradients[name]
        parameter.grad = torch.distributed.tensor.distribute_tensor(whole, mesh, parameter.placements)
    callback.on_pre_optimizer_step(args, state, None)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    callback.on_optimizer_step(args, state, None)
    state.global_step = 1
    callback.on_step_end(args, state, None)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(run_rank, args=(port, str(folder)), nprocs=2, start_method="spawn")
    return folder


@pytest.mark.slow
def test_shards_add_up(two_ranks):
    """FSDP2 over two ranks against the whole tensors, experts too, of which the ranks hold three and two."""
    [event] = read_events(two_ranks / "fsdp")
    model, gradients = make_sharded_case()
    weights = {n: p.detach() - 0.1 * gradients[n] for n, p in model.named_parameters()}
    expected = {"weight": weights, "gradient": gradients, "update": {n: 0.1 * g for n, g in gradients.items()}}
    for kind, tensors in expected.items():
        for layer in range(LAYERS):
            for family, parts in matrices(tensors, layer).items():
                assert event.evidence[kind][family][layer] == pytest.approx(norm(parts), rel=5.1e-5), (kind, family)
                if len(parts) == 5:
                    each = [norm([part]) for part in parts]
                    assert event.evidence["experts"][kind][family][layer] == pytest.approx(each, rel=5.1e-5)


@pytest.mark.slow
def test_under_ddp_one_rank_measures(two_ranks, tmp_path):
    train(make_model(), tmp_path, NormProfileCallback(2), per_device_train_batch_size=4)
    two, one = read_events(two_ranks / "ddp"), read_events(tmp_path)
    assert [(event.rank, event.step) for event in two] == [(0, 2), (0, 4)]
    for a, b in zip(two, one):
        for family in FAMILIES:
            assert a.evidence["weight"][family] == pytest.approx(b.evidence["weight"][family], rel=1e-4)
            assert a.evidence["gradient"][family] == pytest.approx(b.evidence["gradient"][family], rel=1e-3)
