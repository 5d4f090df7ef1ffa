r"""How much an upload betrays of who sent it: attacks on the embeddings of anonymous personalisation, and bounds.

"Anonymous" is a matter of degree, so every accuracy wants one of these numbers beside it. The worst case everywhere is
an attacker who knows all users' distributions. What the text itself betrays is measured by nothing in here.

    attribution    whose upload is it?                     two Gaussians: Phi(||mu_1 - mu_2|| / 2 sigma)
    linkage        do two uploads come from one user?
    membership     was this text trained on?
    recovery       can the users' distributions be found from their pooled uploads?      (see `mixture_recovery`)
    epsilon        of the Gaussian mechanism, means within a radius of a public centre

All of this is our accounting: the attacks of the paper were not readable to us.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_models.personal_lm import PrivateNoise, UserDistribution


@dataclass(frozen=True)
class PrivacyReport:
    """What to print beside an accuracy. Attribution and linkage are of the worst case; `chance` is 1 / users.

    `bound` holds for every attacker on one upload (`None`: nothing is proved), `epsilon` for one upload at `delta`.
    Several draws for one text are several uploads, whose text links them: `attribution_linked` is theirs.
    """

    users: int
    chance: float
    attribution: float
    attribution_linked: dict[int, float]
    linkage_auc: float
    bound: float | None
    epsilon: float | None
    delta: float
    radius_over_std_mean: float | None
    radius_over_std_max: float | None


def attribution_accuracy(
    distribution: UserDistribution,
    *,
    links: int = 1,
    draws: int = 200,
    noise: PrivateNoise | None = None,
    believed: UserDistribution | None = None,
) -> float:
    """
    Share of uploads whose user an attacker with uniform prior names right.

    The attacker takes the user of greatest likelihood, knowing every user's parameters, and guesses among equals.

    Args:
        links: uploads that are known to come from one user (one session, one address), attributed together.
        draws: such groups of each user.
        noise: of the draws; `None`: the operating system's.
        believed: the parameters that the attacker has instead, in the users' order.
    """
    known = distribution if believed is None else believed
    noise = PrivateNoise() if noise is None else noise
    share = 0.0
    for user in range(distribution.num_users):
        likelihoods = torch.zeros(draws, known.num_users, dtype=torch.float64)
        for _ in range(links):
            uploads = distribution.sample(torch.full((draws,), user), noise=noise).detach()
            likelihoods += known.log_prob(uploads).detach()
        best = likelihoods.max(dim=1, keepdim=True).values
        ties = likelihoods >= best - 1e-9 * best.abs().clamp_min(1.0)
        share += float((ties[:, user] / ties.sum(1)).sum())
    return share / (draws * distribution.num_users)


def two_user_attribution(separation: float) -> float:
    """Attribution between two Gaussians whose means are `separation` standard deviations apart: Phi(sep / 2)."""
    return _phi(separation / 2)


def mixture_attribution_bound(weights: torch.Tensor) -> float:
    """(1/N) sum_k max_u w_uk of `weights (N users, K components)`: no attacker on one upload of a shared mixture does
    better, and it is at most K/N.

    An upload says at most which component it came from, and that component's best guess is right with that
    probability.
    """
    return float(weights.double().max(dim=0).values.sum()) / len(weights)


def gaussian_attribution_bound(radius_over_std: float, num_users: int, *, links: int = 1) -> float:
    """
    1/N + TV, which no attacker exceeds when every mean is within the radius of one centre.

    Attribution is a mean of P_u(A_u) over disjoint regions A_u, each at most P_centre(A_u) + TV(P_u, P_centre), and
    TV = 2 Phi(r / 2 sigma) - 1; `links` uploads together are one with sqrt(links) times the radius.
    """
    distance = radius_over_std * math.sqrt(links)
    return min(1.0, 1 / num_users + 2 * _phi(distance / 2) - 1)


def linkage_auc(
    distribution: UserDistribution, *, pairs: int = 2000, noise: PrivateNoise | None = None, attacker: str = "informed"
) -> float:
    """
    Area under the curve of telling pairs of uploads of one user from pairs of two.

    Args:
        pairs: of each kind.
        attacker: `"informed"` knows all parameters and scores by the likelihood ratio; `"blind"` knows none and scores
            by how near the two are.

    Raises:
        ImportError: scikit-learn is missing.
    """
    from sklearn.metrics import roc_auc_score

    if attacker not in ("informed", "blind"):
        raise ValueError(f"attacker={attacker!r} must be 'informed' or 'blind'.")
    noise = PrivateNoise() if noise is None else noise
    count = distribution.num_users
    if count < 2:
        raise ValueError("linkage needs two users.")
    first = (noise.uniform((2 * pairs,)) * count).long()
    others = (first + 1 + (noise.uniform((2 * pairs,)) * (count - 1)).long()) % count
    second = torch.where(torch.arange(2 * pairs) < pairs, first, others)
    one, two = (distribution.sample(users, noise=noise).detach() for users in (first, second))
    if attacker == "blind":
        scores = -(one - two).flatten(1).norm(dim=1)
    else:
        scores = _link_scores(distribution.log_prob(one).detach(), distribution.log_prob(two).detach())
    return float(roc_auc_score((torch.arange(2 * pairs) < pairs).numpy(), scores.numpy()))


def _link_scores(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """log P(both | one user) - log P(both | two users): uniform priors, two different users in the second."""
    count = one.shape[1]
    a, b = one.log_softmax(1), two.log_softmax(1)
    same = (a + b).logsumexp(1).exp().clamp(1e-300, 1 - 1e-15)  # sum_u p(u | e1) p(u | e2)
    return (same / (1 - same)).log() + math.log(count - 1)


def membership_auc(members: Sequence[float] | torch.Tensor, others: Sequence[float] | torch.Tensor) -> float:
    """
    Area under the curve of the attack that takes texts of low loss for those that were trained on.

    Args:
        members, others: the losses `(texts,)` of texts in and out of training; see
            `trainers.device_cloud.user_embeddings.sample_losses`.

    Raises:
        ImportError: scikit-learn is missing.
    """
    from sklearn.metrics import roc_auc_score

    inside, outside = (torch.as_tensor(values).double().flatten() for values in (members, others))
    labels = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
    return float(roc_auc_score(labels.numpy(), -torch.cat([inside, outside]).numpy()))


def dp_epsilon(radius_over_std: float, *, delta: float = 1e-5, uploads: int = 1) -> float:
    """
    The least epsilon for which the uploads of a Gaussian user are (epsilon, delta)-locally private.

    What is protected is the user's mean: any two means within the radius of the public centre, sigma public and fixed,
    so the sensitivity is twice the radius. Exact for all epsilon by the analytic Gaussian mechanism (Balle and Wang,
    2018, theorem 8); `uploads` with independent noise are one with sqrt(uploads) times the sensitivity.

    Nothing is claimed of the text that is uploaded along, of means that were not projected, of a sigma that was
    fitted, of the Beta design or the mixture, or of the last bits of floating-point numbers.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} must lie between 0 and 1.")
    if radius_over_std < 0 or uploads < 1:
        raise ValueError("a radius must not be negative, and at least one upload is made.")
    gap = 2 * radius_over_std * math.sqrt(uploads)
    if gap == 0:
        return 0.0
    low, high = 0.0, 1.0
    while _gaussian_delta(high, gap) > delta:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _gaussian_delta(middle, gap) > delta else (low, middle)
    return high


def _gaussian_delta(epsilon: float, gap: float) -> float:
    """The delta of the Gaussian mechanism of sensitivity `gap` standard deviations."""
    log_second = epsilon + _log_phi(-gap / 2 - epsilon / gap)
    return _phi(gap / 2 - epsilon / gap) - (math.exp(log_second) if log_second > -700 else 0.0)


def privacy_report(
    distribution: UserDistribution,
    *,
    links: Sequence[int] = (4, 16),
    draws: int = 200,
    delta: float = 1e-5,
    noise: PrivateNoise | None = None,
) -> PrivacyReport:
    """
    Every number that belongs beside the accuracy of a run with this distribution.

    Raises:
        ValueError: a mean lies beyond `max_radius`, so that neither bound nor epsilon would hold.
    """
    count, config = distribution.num_users, distribution.config
    radii, bound, epsilon = distribution.radius_over_std(), None, None
    if config.design == "mixture":
        bound = mixture_attribution_bound(distribution.weights.detach())
    elif config.design == "gaussian" and config.max_radius is not None:
        largest = _proved_radius(distribution)
        bound, epsilon = gaussian_attribution_bound(largest, count), dp_epsilon(largest, delta=delta)
    return PrivacyReport(
        users=count,
        chance=1 / count,
        attribution=attribution_accuracy(distribution, draws=draws, noise=noise),
        attribution_linked={
            k: attribution_accuracy(distribution, links=k, draws=max(1, draws // 2), noise=noise) for k in links
        },
        linkage_auc=linkage_auc(distribution, noise=noise) if count > 1 else 1.0,
        bound=bound,
        epsilon=epsilon,
        delta=delta,
        radius_over_std_mean=None if radii is None else float(radii.mean()),
        radius_over_std_max=None if radii is None else float(radii.max()),
    )


def _proved_radius(distribution: UserDistribution) -> float:
    """`max_radius` / sigma, or by how little rounding puts a mean beyond it."""
    with torch.no_grad():
        found = (distribution.mean.double() - distribution.centre.double()).flatten(1).norm(dim=1)
    largest = distribution.config.max_radius
    if not (found <= largest * (1 + 1e-5)).all():
        user = int(found.nan_to_num(nan=math.inf).argmax())
        raise ValueError(
            f"the mean of user {user} lies {float(found[user]):g} from the centre, beyond max_radius={largest:g}: no "
            "bound and no epsilon would hold. Call project_() before anything is drawn."
        )
    return max(largest, float(found.max())) / distribution.config.std


@dataclass(frozen=True)
class EntropyBin:
    """Texts whose predictions depend on the user to a like degree: `low <= H < high` in nats, and each method's
    accuracy on them (`None` where there are none)."""

    low: float
    high: float
    count: int
    accuracy: dict[str, float | None]


def user_entropy_report(
    predictions: torch.Tensor, correct: dict[str, torch.Tensor], num_classes: int, *, bins: int = 6
) -> list[EntropyBin]:
    """
    Accuracy by how much the prediction depends on the user, the paper's analysis plot.

    Args:
        predictions: `(texts, users)`, the class of each text with the draws of several random users.
        correct: by method, `(texts,)`, whether it was right with the text's own user.
        num_classes: bins of equal width cover [0, ln of it].
    """
    shares = torch.nn.functional.one_hot(predictions.long(), num_classes).double().mean(1)  # (texts, classes)
    entropies = torch.special.entr(shares).sum(1)
    edges = torch.linspace(0, math.log(num_classes), bins + 1, dtype=torch.float64)
    places = torch.bucketize(entropies, edges[1:-1].contiguous(), right=True)
    found = []
    for index in range(bins):
        inside = places == index
        accuracy = {
            name: float(hits[inside].double().mean()) if inside.any() else None for name, hits in correct.items()
        }
        found.append(EntropyBin(float(edges[index]), float(edges[index + 1]), int(inside.sum()), accuracy))
    return found


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _log_phi(x: float) -> float:
    return float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))


__all__ = [
    "EntropyBin",
    "PrivacyReport",
    "attribution_accuracy",
    "dp_epsilon",
    "gaussian_attribution_bound",
    "linkage_auc",
    "membership_auc",
    "mixture_attribution_bound",
    "privacy_report",
    "two_user_attribution",
    "user_entropy_report",
]
