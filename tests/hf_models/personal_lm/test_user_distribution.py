"""What a user keeps: draws and their randomness, densities, gradients, the projection, and a file of its own."""

import json
import math
import os

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_models.personal_lm import (
    MemoisedNoise,
    PrivateNoise,
    SimulatedNoise,
    UserDistribution,
    UserDistributionConfig,
    noise_source,
    private_noise,
)
from tests.hf_models.personal_lm.tiny_personal_lm import WIDTH, classifier


def made(design: str = "gaussian", users: int = 3, *, seed: int = 0, **fields) -> UserDistribution:
    generator = torch.Generator().manual_seed(seed)
    config = UserDistributionConfig(WIDTH, 2, design=design, **({"num_components": 4} | fields))
    public = {"components": torch.randn(4, 2, WIDTH, generator=generator)} if design == "mixture" else {}
    table = UserDistribution(config, users, **public)
    with torch.no_grad():
        for parameter in table.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).abs())
    return table


DESIGNS = ("gaussian", "beta", "mixture")


# --- randomness


def test_a_generator_s_seed_is_32_bits_which_is_why_no_draw_comes_from_one():
    one, other = (torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7 + 2**32))
    assert torch.equal(one, other)


@pytest.mark.parametrize("design", DESIGNS)
def test_two_draws_of_a_user_differ_and_no_seed_repeats_them(design):
    table = made(design)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(table.sample(torch.tensor([1, 1])))
    first, second = drawn
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert first.shape == (2, 2, WIDTH) and first.dtype == torch.float32


@pytest.mark.parametrize("design", DESIGNS)
def test_draws_read_the_operating_system_alone(design, monkeypatch):
    asked = []
    real = os.urandom
    monkeypatch.setattr(private_noise.os, "urandom", lambda count: asked.append(count) or real(count))
    state = torch.get_rng_state()
    made(design).sample()
    assert sum(asked) >= 8 * 3 * 2 * WIDTH and torch.equal(torch.get_rng_state(), state)
    asked.clear()
    made(design).sample(noise=SimulatedNoise(0))
    assert not asked


def test_a_seed_needs_the_word_simulation():
    assert type(noise_source()) is PrivateNoise
    assert noise_source(simulation=True, seed=3).simulation
    for fields in ({"seed": 3}, {"simulation": True}):
        with pytest.raises(ValueError, match="operating system"):
            noise_source(**fields)
    again = [made().sample(noise=noise_source(simulation=True, seed=3)) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize(
    "noise",
    [PrivateNoise(), SimulatedNoise(0), MemoisedNoise(bytes(32), [str(i).encode() for i in range(20_000)])],
    ids=["private", "simulated", "memoised"],
)
def test_noise_has_the_distributions_that_it_is_named_after(noise):
    count = 20_000
    for sample, cdf in (
        (noise.uniform((count,)), scipy.stats.uniform.cdf),
        (noise.normal((count,)), scipy.stats.norm.cdf),
        *(
            (noise.gamma(torch.full((count,), shape, dtype=torch.float64)), scipy.stats.gamma(shape).cdf)
            for shape in (0.3, 1.0, 2.5, 40.0)
        ),
    ):
        assert scipy.stats.kstest(sample.numpy(), cdf).pvalue > 1e-5
    assert 0 < float(noise.uniform((count,)).min()) and float(noise.uniform((count,)).max()) < 1


@pytest.mark.parametrize("design", DESIGNS)
def test_memoised_noise_belongs_to_its_text(design):
    """Whatever the batch: the rejections of Beta's gamma draws too."""
    table, names = made(design), [str(i).encode() for i in range(40)]
    users = torch.arange(40) % 3
    whole = table.sample(users, noise=MemoisedNoise(bytes(32), names)).detach()
    for start, end in ((0, 1), (7, 20), (39, 40)):
        part = table.sample(users[start:end], noise=MemoisedNoise(bytes(32), names[start:end])).detach()
        assert torch.equal(part, whole[start:end])
    other = table.sample(users, noise=MemoisedNoise(bytes([1] * 32), names)).detach()
    assert not (other == whole).flatten(1).all(1).any()
    noise = MemoisedNoise(bytes(32), names)
    one, two = noise.normal((40, 8)), noise.normal((40, 8))
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1])) < 0.25
    with pytest.raises(ValueError, match="one row for each"):
        noise.uniform((39, 2))
    with pytest.raises(ValueError, match="it has 32"):
        MemoisedNoise(b"short", names)


def test_draws_have_the_moments_of_their_distributions():
    users, noise = torch.arange(3).repeat(4000), SimulatedNoise(0)
    for design in DESIGNS:
        table = made(design)
        drawn = table.sample(users, noise=noise).detach().reshape(4000, 3, 2, WIDTH)
        if design == "gaussian":
            mean, std = table.mean, torch.full_like(table.mean, 0.2)
        elif design == "beta":
            theirs = torch.distributions.Beta(table.alpha, table.beta)
            mean, std = theirs.mean, theirs.stddev
        else:
            mean = torch.einsum("uk,ktd->utd", table.weights, table.components)
            second = torch.einsum("uk,ktd->utd", table.weights, table.components**2) + 0.2**2
            std = (second - mean**2).sqrt()
        torch.testing.assert_close(drawn.mean(0), mean.detach(), rtol=0, atol=0.12)
        torch.testing.assert_close(drawn.std(0), std.detach(), rtol=0.15, atol=0.02)


# --- gradients and densities


def test_the_gradient_of_a_draw_is_its_finite_difference():
    """The same noise, a mean a little further: e = mu + sigma eps. Of Beta: as the quantile function moves."""
    table = made("gaussian", 1)
    table.sample(noise=SimulatedNoise(1)).sum().backward()
    step = 1e-2
    moved = made("gaussian", 1)
    with torch.no_grad():
        moved.mean[0, 0, 0] += step
    gain = (moved.sample(noise=SimulatedNoise(1)) - table.sample(noise=SimulatedNoise(1))).sum() / step
    assert float(table.mean.grad[0, 0, 0]) == pytest.approx(gain.item(), rel=1e-3)


@pytest.mark.parametrize("which", ["alpha", "beta"])
def test_the_gradient_of_a_beta_draw_is_that_of_its_quantile(which):
    table = made("beta", 1)
    drawn = table.sample(noise=SimulatedNoise(1))
    drawn.sum().backward()
    values = {name: getattr(table, name)[0, 0].detach().double().numpy() for name in ("alpha", "beta")}
    level = scipy.stats.beta.cdf(drawn[0, 0].detach().double().numpy(), values["alpha"], values["beta"])
    step, moved = 1e-4, []
    for sign in (1, -1):
        there = dict(values)
        there[which] = there[which] + sign * step
        moved.append(scipy.stats.beta.ppf(level, there["alpha"], there["beta"]))
    quantile_gradient = torch.as_tensor((moved[0] - moved[1]) / (2 * step))
    # Through two gamma draws a single sample's gradient is another unbiased one: their means over many agree.
    users = torch.zeros(20_000, dtype=torch.long)
    parameter = getattr(table, which)
    parameter.grad = None
    many = table.sample(users, noise=SimulatedNoise(2))
    (many.sum() / len(users)).backward()
    a, b = (torch.as_tensor(values[name]) for name in ("alpha", "beta"))
    exact = b / (a + b) ** 2 if which == "alpha" else -a / (a + b) ** 2  # of the mean a / (a + b)
    torch.testing.assert_close(parameter.grad[0, 0].double(), exact, rtol=0.1, atol=0.01)
    assert torch.equal(quantile_gradient.sign(), exact.sign())


@pytest.mark.parametrize("design", DESIGNS)
def test_log_densities_are_those_of_torch_distributions(design):
    table = made(design)
    embeds = torch.rand(5, 2, WIDTH) * 0.9 + 0.05
    found = table.log_prob(embeds)
    if design == "gaussian":
        theirs = torch.distributions.Normal(table.mean.double(), 0.2)
        expected = theirs.log_prob(embeds.double()[:, None]).sum((-1, -2))
    elif design == "beta":
        theirs = torch.distributions.Beta(table.alpha.double(), table.beta.double())
        expected = theirs.log_prob(embeds.double()[:, None]).sum((-1, -2))
    else:
        parts = torch.distributions.Normal(table.components.double(), 0.2)
        parts = parts.log_prob(embeds.double()[:, None]).sum((-1, -2))
        expected = torch.logsumexp(parts[:, None] + table.weights.double().log(), dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_divergences_are_those_of_torch_distributions():
    one, other = made("gaussian"), made("gaussian", seed=1, std=0.3)
    theirs = [torch.distributions.Normal(t.mean.double(), t.config.std) for t in (one, other)]
    expected = torch.distributions.kl_divergence(*theirs).sum((-1, -2))
    torch.testing.assert_close(one.kl(other).double(), expected, rtol=1e-4, atol=1e-3)
    fresh = UserDistribution(UserDistributionConfig(WIDTH))
    assert float(fresh.kl()) == 0 and float(UserDistribution(UserDistributionConfig(4, design="beta")).kl()) == 0
    mixture = made("mixture", 2)
    assert (mixture.kl() > 0).all() and torch.allclose(mixture.kl(mixture), torch.zeros(2))
    mixture.set_weights(torch.tensor([[1.0, 0, 0, 0], [0.25] * 4]))
    torch.testing.assert_close(mixture.kl(), torch.tensor([math.log(4), 0.0]))


def test_beta_densities_are_linearly_dependent():
    """The identity that makes a pooled Beta mixture ambiguous: section 3 of the digest, our reading of the claim."""
    grid = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)

    def density(a, b):
        parameters = (torch.tensor(value, dtype=torch.float64) for value in (a, b))
        return torch.distributions.Beta(*parameters).log_prob(grid).exp()

    for a, b in ((2.0, 5.0), (0.5, 0.5), (3.3, 0.7)):
        mixed = a / (a + b) * density(a + 1, b) + b / (a + b) * density(a, b + 1)
        torch.testing.assert_close(mixed, density(a, b), rtol=1e-11, atol=1e-12)


# --- mixtures


def test_weights_of_zero_are_never_drawn_and_leave_the_right_ones():
    table = made("mixture", 2, std=1e-4)
    table.set_weights(torch.tensor([[0, 0, 1.0, 0], [0.5, 0, 0, 0.5]]))
    users = torch.arange(2).repeat(500)
    drawn = table.sample(users).reshape(500, 2, 1, -1)
    nearest = (drawn - table.components.flatten(1)).norm(dim=-1).argmin(-1)  # (500, 2)
    assert (nearest[:, 0] == 2).all() and set(nearest[:, 1].tolist()) == {0, 3}
    assert 0.4 < (nearest[:, 1] == 0).float().mean() < 0.6
    for wrong in (torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[2.0, -1, 0, 0], [1, 0, 0, 0]])):
        with pytest.raises(ValueError, match="sum to 1"):
            table.set_weights(wrong)


def test_a_mixture_needs_its_components():
    with pytest.raises(ValueError, match=r"components, a tensor of shape \(4, 2, 16\)"):
        UserDistribution(UserDistributionConfig(WIDTH, 2, design="mixture", num_components=4))


# --- the projection


@settings(max_examples=30, deadline=None)
@given(
    radius=st.floats(1e-3, 10.0),
    scale=st.floats(1e-6, 1e3),
    seed=st.integers(0, 1000),
)
def test_the_projection_keeps_every_mean_within_its_radius_and_leaves_the_others(radius, scale, seed):
    table = UserDistribution(UserDistributionConfig(7, 2, max_radius=radius), 5)
    with torch.no_grad():
        table.mean.add_(scale * torch.randn(table.mean.shape, generator=torch.Generator().manual_seed(seed)))
    before = table.mean.detach().clone()
    table.project_()
    distance = (table.mean - table.centre).double().flatten(1).norm(dim=1)
    # the centre itself is a float32 sum away from the mean
    assert (distance <= radius + 1e-6).all()
    inside = (before - table.centre).flatten(1).norm(dim=1) < 0.99 * radius
    torch.testing.assert_close(table.mean[inside], before[inside], rtol=0, atol=1e-6)


def test_without_a_radius_nothing_moves_and_beta_stays_where_it_can_be_drawn():
    table = made()
    before = table.mean.detach().clone()
    table.project_()
    assert torch.equal(table.mean, before)
    beta = made("beta")
    with torch.no_grad():
        beta.alpha.fill_(-1.0)
    beta.project_()
    assert (beta.alpha > 0).all() and beta.sample().isfinite().all()


# --- files


@pytest.mark.parametrize("design", DESIGNS)
def test_a_row_is_a_device_s_own_file(design, tmp_path):
    table = made(design)
    alone = table.rows([1])
    alone.save(tmp_path / "mine.safetensors")
    loaded = UserDistribution.load(tmp_path / "mine.safetensors")
    assert loaded.config == table.config and loaded.num_users == 1
    embeds = torch.rand(4, 2, WIDTH)
    torch.testing.assert_close(loaded.log_prob(embeds), table.log_prob(embeds)[:, 1:2])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]
    assert (tmp_path / "mine.safetensors").stat().st_size < 8192
    other = made(design, seed=4)
    kept = {name: tensor.detach().clone() for name, tensor in other.named_parameters()}
    other.put_rows([2], alone)
    for name, tensor in other.named_parameters():
        assert torch.equal(tensor[2], getattr(alone, name)[0]) and torch.equal(tensor[:2], kept[name][:2])


@pytest.mark.parametrize("design", DESIGNS)
def test_a_design_has_what_is_public_and_nothing_else(design, tmp_path):
    fields = {"max_radius": 5.0, "initial_mean": 0.3} if design == "gaussian" else {}
    table = made(design, std=0.37, **fields)
    path = table.save_design(tmp_path)
    content = json.loads(path.read_text())
    public = {"gaussian": {"centre"}, "beta": set(), "mixture": {"components"}}[design]
    assert path.name == "user_design.json" and set(content["public"]) == public
    for other in (made(design, seed=9, std=0.37, **fields), made(design, users=5, std=0.37, **fields)):
        if design == "mixture":
            other.components.copy_(table.components)
        (tmp_path / "other").mkdir(exist_ok=True)
        assert other.save_design(tmp_path / "other").read_bytes() == path.read_bytes(), "nobody's parameters are in it"
    new = UserDistribution.from_design(path, 2)
    assert new.config == table.config and new.num_users == 2
    for name, tensor in table.named_buffers():
        assert torch.equal(dict(new.named_buffers())[name], tensor)
    if design == "mixture":
        assert torch.equal(new.weights, torch.full((2, 4), 0.25))
    else:
        assert (new.kl() == 0).all()
    table.save(tmp_path / "mine.safetensors")
    (tmp_path / "list.json").write_text("[]")
    for wrong in ("mine.safetensors", "list.json"):
        with pytest.raises(ValueError, match="holds no design"):
            UserDistribution.from_design(tmp_path / wrong)


def test_other_files_are_refused(tmp_path):
    classifier().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no user distribution"):
        UserDistribution.load(tmp_path / "model.safetensors")


def test_the_cloud_s_checkpoint_has_no_distribution(tmp_path):
    model, table = classifier(), made(users=3)
    model(input_ids=torch.tensor([[5, 6]]), user_embeds=table.sample(torch.tensor([0]))[:, :1])
    model.save_pretrained(tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert name.startswith(("model.", "classifier."))
        assert not any(tensor.shape == parameter.shape for parameter in table.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"design": "cauchy"}, "not known"),
        ({"std": 0.0}, "positive"),
        ({"max_radius": -1.0}, "positive"),
        ({"design": "beta", "max_radius": 1.0}, "Leave it out"),
    ],
)
def test_what_makes_no_distribution_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UserDistributionConfig(WIDTH, **fields)
