"""Kernels that are wrong in known ways, and those that we ship."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from trainers.reliability.numcheck import check_experts, cosine, expert_backends, main, numcheck, relative_error


class ScaledGradient(torch.autograd.Function):
    """The identity; its gradient is multiplied."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.scale, None


class Attention(nn.Module):
    """One head over (tokens, width); in known ways wrong."""

    def __init__(self, *, gradient_scale=1.0, causal=True, output_scale=1.0, noise=0.0):
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False)
        self.gradient_scale, self.causal, self.output_scale, self.noise = gradient_scale, causal, output_scale, noise

    def forward(self, x):
        q, k, v = ScaledGradient.apply(self.qkv(x), self.gradient_scale).chunk(3, dim=-1)
        scores = q @ k.T / 4 + self.noise * torch.randn(len(x), len(x))
        if self.causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        return scores.softmax(-1) @ v * self.output_scale


def inputs(generator):
    return (torch.randn(24, 16, generator=generator),)


def check(**wrong):
    return numcheck(Attention(**wrong), Attention(), inputs)


def by_name(report):
    return {each.name: each for each in report.comparisons}


def test_the_same_twice():
    report = check()
    assert report.passed and report.failures == ()
    assert list(by_name(report)) == ["output", "dx 0", "dw qkv.weight", "w10 qkv.weight"]
    for each in report.comparisons:
        assert each.relative_error == each.noise == 0.0
        assert each.cosine == pytest.approx(1.0) and each.noise_cosine == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1.02, 0.98])
def test_a_gradient_that_is_2_percent_off_has_a_perfect_cosine(scale):
    report = check(gradient_scale=scale)
    assert {each.name for each in report.failures} == {"dx 0", "dw qkv.weight"}
    for each in report.failures:
        assert each.cosine == pytest.approx(1.0, abs=1e-9)
        assert each.relative_error == pytest.approx(0.02, rel=1e-4)
    assert by_name(report)["output"].relative_error == 0.0  # a forward-only check passes it
    assert numcheck(Attention(gradient_scale=scale), Attention(), inputs, max_error=0.021).passed


def test_a_wrong_mask():
    report = check(causal=False)
    failing = by_name(report)
    for name in ("output", "dx 0"):
        assert failing[name].cosine < 0.9 and not failing[name].passed
    # The bound on the error off, the cosine gate alone:
    assert not numcheck(Attention(causal=False), Attention(), inputs, max_error=math.inf).passed


def test_nan_fails():
    report = check(output_scale=math.nan)
    assert not by_name(report)["output"].passed and "FAILS" in str(report)


def test_an_error_within_the_noise_passes():
    """Runs of one side that differ widen the bound by how much."""
    torch.manual_seed(0)
    report = numcheck(Attention(noise=0.02), Attention(), inputs, max_error=0.001)
    output = by_name(report)["output"]
    assert 0.001 < output.relative_error <= output.noise + 0.001 and output.passed
    assert output.noise_cosine < 1.0


def test_functions_without_parameters():
    report = numcheck(lambda x: x.sin() * 1.05, torch.sin, inputs)
    assert [each.name for each in report.failures] == ["output", "dx 0"]
    assert by_name(report)["output"].relative_error == pytest.approx(0.05)
    assert numcheck(lambda x: (x.sin(), None), torch.sin, inputs).passed


def test_both_sides_are_left_as_they_were():
    candidate, reference = Attention(), Attention()
    before = [module.qkv.weight.clone() for module in (candidate, reference)]
    assert not torch.equal(*before)  # the reference's weights are used for both
    assert numcheck(candidate, reference, inputs).passed
    for module, weight in zip((candidate, reference), before):
        assert torch.equal(module.qkv.weight, weight) and module.qkv.weight.grad is None


def test_weights_after_ten_steps_are_those_of_adam():
    module = Attention()
    generator, copy = torch.Generator().manual_seed(42), Attention()
    copy.load_state_dict(module.state_dict())
    optimizer = torch.optim.Adam(copy.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        copy(*inputs(generator)).mean().backward()
        optimizer.step()
    moved = relative_error(copy.qkv.weight.double().flatten(), module.qkv.weight.double().flatten())
    # Against a candidate whose gradient is 0 the weights differ by all that the reference has moved.
    report = by_name(check_against(module))
    assert report["w10 qkv.weight"].relative_error == pytest.approx(moved / (1 + 0), rel=0.05)


def check_against(module):
    return numcheck(Attention(gradient_scale=0.0), module, inputs)


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="The parameters differ.*weight"):
        numcheck(nn.Linear(3, 4), nn.Linear(4, 3), inputs)
    with pytest.raises(ValueError, match="repeats=1"):
        numcheck(torch.sin, torch.sin, inputs, repeats=1)


def test_measures():
    a, b = torch.tensor([3.0, 4.0]).double(), torch.tensor([4.0, 3.0]).double()
    assert cosine(a, b) == pytest.approx(24 / 25) and relative_error(a, b) == pytest.approx(math.sqrt(2) / 5)
    zero = torch.zeros(2).double()
    assert cosine(zero, zero) == 1.0 and cosine(a, zero) == 0.0
    assert relative_error(zero, zero) == 0.0 and relative_error(a, zero) == math.inf


@pytest.mark.parametrize("backend", expert_backends(torch.device("cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_backends(backend, dtype):
    report = check_experts(backend, dtype=dtype, tokens=24, hidden=32, intermediate=16, experts=4, repeats=2)
    assert report.passed, str(report)
    assert len(report.comparisons) == 7  # output, tokens, routing weights; two weights, before and after


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_backends_on_a_gpu(dtype):
    device = torch.device("cuda")
    assert "sigma_triton" in expert_backends(device)
    for backend in expert_backends(device):
        report = check_experts(backend, device=device, dtype=dtype, tokens=256, hidden=128, intermediate=64)
        assert report.passed, f"{backend}\n{report}"


def test_the_command(capsys):
    small = ["--device", "cpu", "--tokens", "16", "--hidden", "16", "--intermediate", "8", "--repeats", "2"]
    assert main([*small, "--backends", "grouped_mm"]) == 0
    assert "grouped_mm against eager: passed" in capsys.readouterr().out
    assert main([*small, "--backends", "batched_mm", "--dtype", "bfloat16", "--max_error", "1e-9"]) == 1
    assert "batched_mm against eager: FAILED" in capsys.readouterr().out


@pytest.mark.slow
def test_the_module_runs():
    command = [sys.executable, "-m", "trainers.reliability.numcheck", "--device", "cpu", "--repeats", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("passed") == len(expert_backends(torch.device("cpu")))
