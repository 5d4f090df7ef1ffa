# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""The balance losses against closed forms, slow references in numpy float64 and finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_models.moe.balance import (
    RoutingSums,
    RoutingWindow,
    expert_counts,
    global_batch_load_balancing_loss,
    load_balancing_loss_of,
    max_violation,
    normalized_scores,
    relative_deviation,
    router_z_loss,
    routing_sums,
    sequence_load_balancing_loss,
    starved_experts,
    sum_over_ranks,
    switch_load_balancing_loss,
    top1_load_balancing_loss,
    updated_expert_bias,
)


N = 96  # experts of Sigma-MoE-Tiny, for which the closed forms are published
HUGE = 1e4  # as a logit: one-hot in float64 for any temperature

LOSSES = {
    "switch": switch_load_balancing_loss,
    "sequence": lambda z, s, m=None: sequence_load_balancing_loss(
        z[None], s[None], None if m is None else m[None]
    ).squeeze(0),
    "global_batch": global_batch_load_balancing_loss,
    "top1": top1_load_balancing_loss,
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def slow_switch(logits, selected, mask=None, *, score_func="softmax", previous_counts=0.0):
    """N * sum f p, one token and one choice at a time."""
    tokens, num_experts = logits.shape
    counts, probs, real = np.zeros(num_experts), np.zeros(num_experts), 0
    for t in range(tokens):
        if mask is not None and not mask[t]:
            continue
        real += 1
        scores = np.exp(logits[t] - logits[t].max()) if score_func == "softmax" else 1 / (1 + np.exp(-logits[t]))
        probs += scores / scores.sum()
        for e in selected[t]:
            counts[e] += 1
    counts = counts + previous_counts
    return num_experts * float((counts / counts.sum()) @ (probs / real))


def slow_top1(logits, selected, mask=None, *, temperature=0.1):
    keep = np.ones(len(logits), bool) if mask is None else mask.astype(bool)
    q = softmax(logits[keep] / temperature)
    fhat = q.mean(0)
    qbar = np.mean([sum(row[e] for e in chosen) for row, chosen in zip(q, selected[keep], strict=True)])
    return logits.shape[-1] * float((fhat**2).sum() / qbar)


def random_routing(tokens, num_experts, top_k, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64)
    return logits, logits.topk(top_k, dim=-1).indices


# --- closed forms ----------------------------------------------------------------------------------------------------


def flat_router_on_one_expert():
    return torch.zeros(2 * N, N, dtype=torch.float64), torch.full((2 * N, 1), 5)


def balanced_one_hot():
    chosen = torch.arange(2 * N).remainder(N)
    return HUGE * F.one_hot(chosen, N).double(), chosen[:, None]


def one_hot_on_one_expert():
    chosen = torch.full((2 * N,), 5)
    return HUGE * F.one_hot(chosen, N).double(), chosen[:, None]


@pytest.mark.parametrize(
    ("routing", "conventional", "top1"),
    [(flat_router_on_one_expert, 1, N), (balanced_one_hot, 1, 1), (one_hot_on_one_expert, N, N)],
)
def test_closed_forms(routing, conventional, top1):
    logits, selected = routing()
    for kind in ("switch", "sequence", "global_batch"):
        assert LOSSES[kind](logits, selected).item() == pytest.approx(conventional, abs=1e-9), kind
    assert LOSSES["top1"](logits, selected).item() == pytest.approx(top1, abs=1e-9)


def test_shrinking_logits_hides_imbalance_from_the_conventional_loss_only():
    logits, selected = random_routing(4096, N, 1, seed=1)
    logits = logits + 1.2 * torch.randn(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    routing = logits.argmax(-1)
    gammas = (2.0, 1.0, 0.5, 0.1, 0.01, 0.001)
    conventional, top1 = [], []
    for gamma in gammas:
        scaled = gamma * logits
        assert torch.equal(scaled.argmax(-1), routing)
        conventional.append(switch_load_balancing_loss(scaled, routing[:, None]).item())
        top1.append(top1_load_balancing_loss(scaled, routing[:, None]).item())
    assert max_violation(expert_counts(routing[:, None], N)) > 3
    assert conventional == sorted(conventional, reverse=True)
    assert conventional[0] > 1.5 and conventional[-1] == pytest.approx(1, abs=0.01)
    assert top1 == sorted(top1) and top1[-1] > 5 * top1[0]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 6, 8])
def test_value_at_balance_is_one_for_every_k(kind, top_k):
    experts, tokens = 24, 24
    selected = (torch.arange(tokens)[:, None] + torch.arange(top_k)).remainder(experts)
    logits = torch.zeros(tokens, experts, dtype=torch.float64).scatter(-1, selected, HUGE)
    assert LOSSES[kind](logits, selected).item() == pytest.approx(1, abs=1e-9)


# --- slow references -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_losses_equal_slow_references(score_func, top_k):
    logits, selected = random_routing(37, 8, top_k, seed=3)
    mask = torch.rand(37, generator=torch.Generator().manual_seed(4)) > 0.3
    z, s, m = logits.numpy(), selected.numpy(), mask.numpy()
    expected = slow_switch(z, s, m, score_func=score_func)
    for loss in (switch_load_balancing_loss, global_batch_load_balancing_loss):
        assert loss(logits, selected, mask, score_func=score_func).item() == pytest.approx(expected, abs=1e-12)
    assert top1_load_balancing_loss(logits, selected, mask).item() == pytest.approx(slow_top1(z, s, m), abs=1e-10)
    warm = top1_load_balancing_loss(logits, selected, mask, temperature=1.0).item()
    assert warm == pytest.approx(slow_top1(z, s, m, temperature=1.0), abs=1e-12)


def test_sequence_loss_is_the_mean_of_switch_losses_of_non_empty_sequences():
    logits, selected = random_routing(5 * 11, 8, 2, seed=5)
    logits, selected = logits.view(5, 11, 8), selected.view(5, 11, 2)
    lengths = torch.tensor([11, 4, 0, 1, 7])
    mask = (torch.arange(11) < lengths[:, None]).long()
    expected = np.mean(
        [slow_switch(logits[b, :n].numpy(), selected[b, :n].numpy()) for b, n in enumerate(lengths.tolist()) if n]
    )
    assert sequence_load_balancing_loss(logits, selected, mask).item() == pytest.approx(expected, abs=1e-12)
    whole = sequence_load_balancing_loss(logits, selected).item()
    assert whole == pytest.approx(
        np.mean([slow_switch(z.numpy(), s.numpy()) for z, s in zip(logits, selected, strict=True)]), abs=1e-12
    )


def test_running_counts_of_earlier_micro_batches_enter_f_and_nothing_else():
    logits, selected = random_routing(20, 8, 2, seed=6)
    earlier = torch.tensor([5.0, 0, 0, 17, 1, 0, 2, 3])
    loss = global_batch_load_balancing_loss(logits, selected, previous_counts=earlier).item()
    assert loss == pytest.approx(
        slow_switch(logits.numpy(), selected.numpy(), previous_counts=earlier.double().numpy()), abs=1e-12
    )
    assert abs(loss - global_batch_load_balancing_loss(logits, selected).item()) > 1e-3


def test_leading_dimensions_are_independent_layers():
    logits, selected = random_routing(3 * 2 * 10, 8, 2, seed=7)
    logits, selected = logits.view(3, 2, 10, 8), selected.view(3, 2, 10, 2)
    mask = torch.ones(3, 2, 10)
    mask[:, 1, 6:] = 0
    for kind in ("switch", "global_batch", "top1"):
        together = load_balancing_loss_of(routing_sums(logits, selected, mask), kind)
        assert together.shape == (3, 2)
        for i, j in np.ndindex(3, 2):
            alone = load_balancing_loss_of(routing_sums(logits[i, j], selected[i, j], mask[i, j]), kind)
            torch.testing.assert_close(together[i, j], alone, rtol=0, atol=1e-12)
    assert load_balancing_loss_of(routing_sums(logits, selected, mask), "sequence").shape == (3,)
    assert torch.equal(load_balancing_loss_of(routing_sums(logits, selected), "none"), logits.new_zeros(3, 2))


@pytest.mark.parametrize("masked", [False, True])
def test_z_loss_closed_form(masked):
    logits, _ = random_routing(9, 8, 1, seed=8, scale=3.0)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1]) if masked else None
    z = logits.numpy()[mask.bool().numpy()] if masked else logits.numpy()
    expected = np.mean([np.log(sum(np.exp(v) for v in row)) ** 2 for row in z])
    assert router_z_loss(logits, mask).item() == pytest.approx(expected, abs=1e-12)
    assert router_z_loss(torch.zeros(4, N)).item() == pytest.approx(np.log(N) ** 2, rel=1e-6)


def test_all_padding_gives_zero_and_no_nan():
    logits, selected = random_routing(6, 8, 2)
    logits.requires_grad_()
    for kind, loss in LOSSES.items():
        value = loss(logits, selected, torch.zeros(6))
        (gradient,) = torch.autograd.grad(value, logits)
        assert value == 0 and gradient.abs().max() == 0, kind
    assert router_z_loss(logits, torch.zeros(6)) == 0


def test_half_precision_logits_are_summed_in_fp32():
    logits, selected = random_routing(4000, 8, 2, seed=9)
    low = logits.bfloat16()
    for loss in (switch_load_balancing_loss, top1_load_balancing_loss):
        assert loss(low, selected).dtype == torch.float32
        torch.testing.assert_close(loss(low, selected), loss(low.double(), selected).float(), rtol=1e-5, atol=0)
    assert router_z_loss(low).dtype == torch.float32
    assert expert_counts(selected, 8).sum() == 8000


def test_unknown_names_are_refused_with_the_value():
    logits, selected = random_routing(6, 8, 2)
    with pytest.raises(ValueError, match="kind='batch'.*top1"):
        load_balancing_loss_of(routing_sums(logits, selected), "batch")
    with pytest.raises(ValueError, match="score_func='relu'.*sigmoid"):
        normalized_scores(logits, "relu")


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients_by_finite_differences(kind, top_k):
    logits, selected = random_routing(12, 6, top_k, seed=10)
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0])
    if kind == "top1":  # so that softmax(z / 0.1) is not saturated, where a wrong gradient would also read 0
        logits = 0.1 * logits
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: LOSSES[kind](z, selected, mask), (logits,))
    (gradient,) = torch.autograd.grad(LOSSES[kind](logits, selected, mask), logits)
    assert gradient.abs().max() > 1e-4
    assert gradient[mask == 0].abs().max() == 0


def test_gradient_of_z_loss_and_of_sigmoid_scores_by_finite_differences():
    logits, selected = random_routing(10, 6, 2, seed=11)
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 1, 1])
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: router_z_loss(z, mask), (logits,))
    for loss in (switch_load_balancing_loss, global_batch_load_balancing_loss):
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, selected, mask, score_func="sigmoid"), (logits,))


@pytest.mark.parametrize("kind", ["switch", "sequence", "global_batch"])
def test_f_is_a_constant_for_autograd(kind):
    leading = (2,) if kind == "sequence" else ()
    counts = torch.rand(*leading, 6, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(*leading, 6, dtype=torch.float64, requires_grad=True)
    previous = torch.rand(6, dtype=torch.float64, requires_grad=True)
    one = torch.full((*leading, 1), 4.0, dtype=torch.float64)
    loss = load_balancing_loss_of(RoutingSums(counts, probs, one, one), kind, previous_counts=previous)
    by_counts, by_previous, by_probs = torch.autograd.grad(loss, (counts, previous, probs), allow_unused=True)
    for by_constant in (by_counts, by_previous):
        assert by_constant is None or by_constant.abs().max() == 0
    assert by_probs.abs().min() > 0


def test_both_parts_of_the_top1_loss_carry_gradient():
    logits, selected = random_routing(10, 6, 1, seed=12, scale=0.1)
    logits.requires_grad_()
    sums = routing_sums(logits, selected, temperature=0.1)
    by_probs, by_selected = torch.autograd.grad(load_balancing_loss_of(sums, "top1"), (sums.probs, sums.selected))
    assert by_probs.min() > 0 and by_selected.max() < 0


def test_without_processes_a_sum_over_ranks_is_the_tensor_itself():
    tensor = torch.ones(3, requires_grad=True)
    assert sum_over_ranks(tensor) is tensor


# --- properties ------------------------------------------------------------------------------------------------------


@st.composite
def padded_batches(draw):
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    experts = draw(st.integers(2, 9))
    top_k = draw(st.integers(1, experts))
    bits = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    bits[draw(st.integers(0, batch * length - 1))] = True
    return batch, length, experts, top_k, torch.tensor(bits).view(batch, length), draw(st.integers(0, 2**20))


@settings(max_examples=60, deadline=None)
@given(padded_batches())
def test_padding_never_counts(case):
    batch, length, experts, top_k, mask, seed = case
    logits, selected = random_routing(batch * length, experts, top_k, seed=seed)
    flat = mask.flatten()
    junk = torch.where(flat[:, None], logits, 50 * torch.randn(logits.shape, dtype=torch.float64))
    for kind in ("switch", "global_batch", "top1"):
        real = LOSSES[kind](logits[flat], selected[flat])
        torch.testing.assert_close(LOSSES[kind](junk, selected, flat), real, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(router_z_loss(junk, flat), router_z_loss(logits[flat]), rtol=1e-10, atol=1e-12)
    assert torch.equal(expert_counts(selected, experts, flat), expert_counts(selected[flat], experts))

    shaped = (junk.view(batch, length, -1), selected.view(batch, length, -1), mask)
    per_sequence = [switch_load_balancing_loss(z[m], s[m]) for z, s, m in zip(*shaped, strict=True) if m.any()]
    torch.testing.assert_close(
        sequence_load_balancing_loss(*shaped), torch.stack(per_sequence).mean(), rtol=1e-10, atol=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(padded_batches())
def test_order_of_tokens_and_names_of_experts_do_not_matter(case):
    batch, length, experts, top_k, mask, seed = case
    logits, selected = random_routing(batch * length, experts, top_k, seed=seed)
    flat = mask.flatten()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(len(flat), generator=generator)
    names = torch.randperm(experts, generator=generator)
    for kind in ("switch", "global_batch", "top1"):
        value = LOSSES[kind](logits, selected, flat)
        shuffled = LOSSES[kind](logits[tokens], selected[tokens], flat[tokens])
        renamed = LOSSES[kind](logits[:, names], names.argsort()[selected], flat)
        torch.testing.assert_close(shuffled, value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(renamed, value, rtol=1e-10, atol=1e-12)


# --- bias and statistics ---------------------------------------------------------------------------------------------


def test_expert_bias_moves_towards_starved_experts_by_the_rate():
    counts = torch.tensor([[4.0, 4, 4, 4], [0, 9, 3, 0], [0, 0, 0, 0]])
    bias = updated_expert_bias(torch.full((3, 4), 0.5), counts, rate=0.25)
    expected = torch.tensor([[0.5] * 4, [0.75, 0.25, 0.5, 0.75], [0.5] * 4])
    assert torch.equal(bias, expected)


def test_expert_bias_is_capped_on_both_sides_and_keeps_its_dtype():
    bias = torch.zeros(2)
    for _ in range(10):
        bias = updated_expert_bias(bias, torch.tensor([0.0, 8.0], dtype=torch.float64), rate=0.25, cap=1.0)
    assert torch.equal(bias, torch.tensor([1.0, -1.0])) and bias.dtype == torch.float32
    before = torch.zeros(2)
    updated_expert_bias(before, torch.tensor([0.0, 8.0]))
    assert torch.equal(before, torch.zeros(2))


def test_statistics_of_hand_made_counts():
    counts = torch.tensor([[10.0, 10, 10, 10], [40, 0, 0, 0], [30, 9, 0.9, 0.1], [0, 0, 0, 0]])
    expected = torch.tensor([[0.0, 0, 0, 0], [3, -1, -1, -1], [2, -0.1, -0.91, -0.99], [0, 0, 0, 0]])
    torch.testing.assert_close(relative_deviation(counts), expected)
    torch.testing.assert_close(max_violation(counts), torch.tensor([0.0, 3, 2, 0]))
    assert starved_experts(counts).tolist() == [0, 3, 2, 0]
    assert starved_experts(counts, threshold=0.95).tolist() == [0, 3, 3, 0]
    assert starved_experts(torch.tensor([1.0, 19.0])).item() == 0  # exactly a tenth of the mean is not below it


def slow_summary(micro_batches, num_experts):
    """One layer, one token at a time; `micro_batches` is a list of (logits, selected, mask or None)."""
    counts, probs, tokens, entropy, values = np.zeros(num_experts), np.zeros(num_experts), 0, 0.0, []
    for logits, selected, mask in micro_batches:
        for t in range(len(logits)):
            if mask is not None and not mask[t]:
                continue
            p = softmax(logits[t])
            tokens, probs, entropy = tokens + 1, probs + p, entropy - (p * np.log(p)).sum()
            values.extend(logits[t])
            for e in selected[t]:
                counts[e] += 1
    f, p = counts / counts.sum(), probs / tokens
    deviation = counts / counts.mean() - 1
    return {
        "counts": counts,
        "f": f,
        "p": p,
        "tokens": tokens,
        "entropy": entropy / tokens,
        "logit_std": np.std(values),
        "max_deviation": deviation.max(),
        "min_deviation": deviation.min(),
        "max_violation": deviation.max(),
        "starved_experts": (counts < 0.1 * counts.mean()).sum(),
        "load_balancing_loss": num_experts * (f * p).sum(),
    }


def test_routing_window_summary_equals_a_slow_reference_over_two_micro_batches():
    layers, experts, top_k = 3, 16, (1, 2, 4)
    window = RoutingWindow()
    assert window.summary() is None
    per_layer = [[] for _ in range(layers)]
    for micro, (tokens, padded) in enumerate([(13, True), (29, True), (7, False)]):
        mask = (torch.rand(tokens, generator=torch.Generator().manual_seed(micro)) > 0.4).long() if padded else None
        routing = [random_routing(tokens, experts, k, 10 * micro + i, 2.0) for i, k in enumerate(top_k)]
        window.add([z.float() for z, _ in routing], [s for _, s in routing], mask)
        for rows, (z, s) in zip(per_layer, routing, strict=True):
            rows.append((z.float().double().numpy(), s.numpy(), None if mask is None else mask.numpy()))
    summary = window.summary()
    for layer, rows in enumerate(per_layer):
        expected = slow_summary(rows, experts)
        assert summary.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(summary[key][layer].numpy(), value, rtol=2e-6, atol=1e-7, err_msg=key)
    window.reset()
    assert window.summary() is None and window.counts_of_all_ranks == 0


def test_routing_window_counts_exactly_under_autocast():
    logits, selected = random_routing(1001, 8, 2)
    plain, cast = RoutingWindow(), RoutingWindow()
    plain.add([logits.float()], [selected], torch.ones(1001))
    with torch.autocast("cpu", torch.bfloat16):
        cast.add([logits.float()], [selected], torch.ones(1001))
    expected, summary = plain.summary(), cast.summary()
    assert summary["tokens"].item() == 1001
    for key, value in expected.items():
        torch.testing.assert_close(summary[key], value, rtol=1e-6, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")


def test_losses_are_those_of_fp32_under_autocast():
    logits, selected = random_routing(1001, 8, 2)
    logits, mask = logits.float(), torch.arange(1001) < 900
    for kind, loss in {**LOSSES, "z": lambda z, s, m: router_z_loss(z, m)}.items():
        expected = loss(logits, selected, mask)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss(logits, selected, mask), expected, rtol=1e-6, atol=0, msg=kind)


def test_routing_window_keeps_no_graph():
    logits, selected = random_routing(5, 4, 1)
    window = RoutingWindow()
    window.add([logits.float().requires_grad_()], [selected], None)
    assert not any(value.requires_grad for value in window.summary().values())


# --- the paper's observation at toy scale ----------------------------------------------------------------------------


def balance_after_training(top_k, kind, *, seed, experts=96, hidden=64, vocabulary=4000, tokens=1024, steps=1000):
    """max and min relative deviation of one router on Zipf tokens, trained together with one vector per expert."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(vocabulary, hidden, generator=generator)
    target = torch.randn(vocabulary, hidden, generator=generator)
    zipf = 1 / torch.arange(1, vocabulary + 1)
    router = (torch.randn(experts, hidden, generator=generator) / hidden**0.5).requires_grad_()
    vectors = (0.1 * torch.randn(experts, hidden, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([router, vectors], lr=3e-3)
    counts = torch.zeros(experts)
    for step in range(steps):
        ids = torch.multinomial(zipf, tokens, replacement=True, generator=generator)
        logits = (0.9 * embedding[ids] + 0.1 * torch.randn(tokens, hidden, generator=generator)) @ router.T
        scores = logits.sigmoid()
        selected = scores.detach().topk(top_k, dim=-1).indices
        weights = scores.gather(-1, selected)
        if top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        output = torch.zeros(tokens, experts).scatter(-1, selected, weights) @ vectors
        loss = F.mse_loss(output, target[ids]) + 1e-2 * LOSSES[kind](logits, selected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps - 20:
            counts += expert_counts(selected, experts)
    deviation = relative_deviation(counts)
    return deviation.max().item(), deviation.min().item()


@pytest.mark.slow
def test_conventional_loss_with_one_expert_balances_worst():
    def found(*kind):
        """Means over seeds, of which a single one depends on the CPU."""
        runs = [balance_after_training(*kind, seed=seed) for seed in range(4)]
        return [sum(column) / len(runs) for column in zip(*runs)]

    conventional = found(1, "switch")
    for better in (found(8, "switch"), found(1, "top1")):
        assert conventional[0] > 1.4 * better[0]
        assert conventional[1] < better[1] - 0.1


def test_ids_behind_the_last_expert_are_no_expert():
    """As of a token that has fewer experts than others."""
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    selected = torch.tensor([[0, 1], [2, 4], [3, 4], [1, 2], [0, 4], [3, 0]])
    assert expert_counts(selected, 4).tolist() == [3, 2, 2, 2]
    sums = routing_sums(logits, selected)
    shares = logits.softmax(-1)
    expected = sum(
        shares[token, expert] for token, row in enumerate(selected.tolist()) for expert in row if expert < 4
    )
    assert sums.counts.tolist() == [3, 2, 2, 2]
    torch.testing.assert_close(sums.selected.squeeze(), expected)
