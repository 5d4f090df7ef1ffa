r"""Can the users' distributions be found from their pooled uploads? A finite mixture, fitted and matched to the users.

Gaussians are linearly independent, so with enough uploads they can; Beta densities are not:

    Beta(a, b) = a/(a+b) Beta(a+1, b) + b/(a+b) Beta(a, b+1)

which protects from this attack alone, and not from an attacker who knows the parameters.
"""

from dataclasses import dataclass

import torch

from hf_models.personal_lm import PrivateNoise, UserDistribution

from .privacy import attribution_accuracy


@dataclass(frozen=True)
class Recovery:
    """What pooled uploads betray of the users' own distributions.

    Args:
        error: root mean square distance of the matched means from the users' own.
        error_of_one_mean: the same, had the attacker named the mean of all uploads for everybody.
        attribution: of an attacker with the fitted distributions.
        attribution_known: of one who knows the true ones.
    """

    error: float
    error_of_one_mean: float
    attribution: float
    attribution_known: float


def mixture_recovery(
    distribution: UserDistribution,
    *,
    uploads_per_user: int = 50,
    draws: int = 100,
    starts: int = 3,
    seed: int = 0,
    noise: PrivateNoise | None = None,
) -> Recovery:
    """
    Fit a mixture with one component a user to pooled uploads, match components to users (Hungarian), and attack.

    Gaussians by scikit-learn's `GaussianMixture` (spherical); Betas by expectation-maximisation with products of
    Betas, moments in place of the maximum. A shared mixture has no component of a user's own to be found.

    Args:
        starts: k-means starts of the Gaussian fit; the likeliest counts.

    Raises:
        ValueError: a mixture design.
        ImportError: scikit-learn or scipy are missing.
    """
    from scipy.optimize import linear_sum_assignment

    if distribution.config.design == "mixture":
        raise ValueError("a shared mixture has no component of each user: recovery is not defined for it.")
    noise = PrivateNoise() if noise is None else noise
    users = torch.arange(distribution.num_users).repeat(uploads_per_user)
    pooled = distribution.sample(users, noise=noise).detach().double().flatten(1)  # (uploads, entries)
    fit = _gaussian_components if distribution.config.design == "gaussian" else _beta_components
    parameters = fit(pooled, distribution.num_users, starts=starts, seed=seed)
    true = _means(distribution)
    found = parameters[0] if len(parameters) == 1 else parameters[0] / (parameters[0] + parameters[1])
    rows, columns = linear_sum_assignment(torch.cdist(true, found).numpy())
    order = torch.as_tensor(columns[rows.argsort()])
    believed = _like(distribution, [parameter[order] for parameter in parameters])
    return Recovery(
        error=_root_mean_square(found[order] - true),
        error_of_one_mean=_root_mean_square(pooled.mean(0) - true),
        attribution=attribution_accuracy(distribution, draws=draws, noise=noise, believed=believed),
        attribution_known=attribution_accuracy(distribution, draws=draws, noise=noise),
    )


def _gaussian_components(pooled: torch.Tensor, count: int, *, starts: int, seed: int) -> list[torch.Tensor]:
    from sklearn.mixture import GaussianMixture

    options = {"covariance_type": "spherical", "n_init": starts, "random_state": seed, "reg_covar": 1e-5}
    return [torch.as_tensor(GaussianMixture(count, **options).fit(pooled.numpy()).means_)]


def _beta_components(
    pooled: torch.Tensor, count: int, *, starts: int, seed: int, iterations: int = 60
) -> list[torch.Tensor]:
    """Alpha and beta `(components, entries)`; starts from k-means."""
    from sklearn.cluster import KMeans

    inside = pooled.clamp(1e-6, 1 - 1e-6)
    labels = torch.as_tensor(KMeans(count, n_init=starts, random_state=seed).fit_predict(pooled.numpy())).long()
    shares = torch.nn.functional.one_hot(labels, count).double()  # (uploads, components)
    for _ in range(iterations):
        totals = shares.sum(0).clamp_min(1e-9)
        # a component of one upload has no variance of its own: the pool's stands in, in part
        mean = (shares.T @ inside + pooled.mean(0)) / (totals[:, None] + 1)
        spread = (shares.T @ inside**2 + (pooled**2).mean(0)) / (totals[:, None] + 1) - mean**2
        strength = (mean * (1 - mean) / spread.clamp_min(1e-6) - 1).clamp(0.1, 1e4)
        alpha, beta = mean * strength, (1 - mean) * strength
        constant = torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta)
        joint = inside.log() @ (alpha - 1).T + torch.log1p(-inside) @ (beta - 1).T + constant.sum(1)
        shares = (joint + (totals / totals.sum()).log()).softmax(1)
    return [alpha, beta]


def _means(distribution: UserDistribution) -> torch.Tensor:
    if distribution.config.design == "gaussian":
        return distribution.mean.detach().double().flatten(1)
    alpha, beta = distribution.alpha.detach().double(), distribution.beta.detach().double()
    return (alpha / (alpha + beta)).flatten(1)


def _like(distribution: UserDistribution, parameters: list[torch.Tensor]) -> UserDistribution:
    made = distribution.rows(range(distribution.num_users))
    for parameter, values in zip(made.parameters(), parameters):
        parameter.data.copy_(values.reshape(parameter.shape))
    return made


def _root_mean_square(gaps: torch.Tensor) -> float:
    return float(gaps.square().sum(1).mean().sqrt())


__all__ = ["Recovery", "mixture_recovery"]
