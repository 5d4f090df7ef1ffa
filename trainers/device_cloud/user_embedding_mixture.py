r"""The shared mixture of anonymous personalisation: public components, and a user's private weights over them.

    D_u = sum_k w_uk N(c_k, sigma^2)
    L_uk = E_{e ~ N(c_k, sigma^2)} loss of user u's texts        what a device measures, the model frozen

Ours, not the paper's. The expected loss sum_k w_uk L_uk is linear in the weights, so the best of them are one-hot
(`temperature=0`); with an entropy bonus of weight T they are softmax(-L_u / T).
"""

import math
from collections import defaultdict

import torch
from transformers import PreTrainedModel

from hf_models.personal_lm import PrivateNoise, UserDistribution, noise_source

from .user_embeddings import Collator, Rows, as_list, frozen, rows_by_user, sample_losses, text_key, without


def assign_components(
    model: PreTrainedModel,
    distribution: UserDistribution,
    train: Rows,
    collator: Collator,
    *,
    temperature: float = 0.0,
    draws: int = 1,
    batch_size: int = 256,
    user_column: str = "user",
    simulation: bool = False,
    seed: int | None = None,
) -> torch.Tensor:
    """
    Stage 2 of a mixture: set each user's weights by the losses of their own texts, the model as it is.

    Args:
        temperature: 0: the component of least loss; above: softmax(-loss / temperature), which hides a user among
            those with other weights, at some loss of fit.
        draws: of each component for each text.

    Returns:
        `(users, K)`, the losses.

    Raises:
        ValueError: no mixture, a negative temperature, a user without a text, a seed without `simulation=True`.
    """
    if distribution.config.design != "mixture":
        raise ValueError(f"design={distribution.config.design!r} has no components: use fit_user_distribution.")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative.")
    noise = noise_source(simulation=simulation, seed=seed)
    losses = component_losses(
        model, distribution, train, collator, noise=noise, draws=draws, batch_size=batch_size, user_column=user_column
    )
    if temperature == 0:
        weights = torch.nn.functional.one_hot(losses.argmin(1), losses.shape[1]).float()
    else:
        weights = (-losses / temperature).softmax(1)
    distribution.set_weights(weights)
    return losses


@torch.no_grad()
def component_losses(
    model: PreTrainedModel,
    distribution: UserDistribution,
    rows: Rows,
    collator: Collator,
    *,
    noise: PrivateNoise,
    draws: int = 1,
    batch_size: int = 256,
    user_column: str = "user",
) -> torch.Tensor:
    """The mean loss of each user's rows with each component, `(users, K)`."""
    rows = as_list(rows)
    by_user = rows_by_user(rows, distribution.num_users, user_column, "train")
    owners = torch.tensor([user for user, indices in enumerate(by_user) for _ in indices])
    order = [index for indices in by_user for index in indices]
    sums = torch.zeros(distribution.num_users, distribution.config.num_components)
    with frozen(model):
        for start in range(0, len(order), batch_size):
            part = [without(rows[index], user_column) for index in order[start : start + batch_size]]
            batch = {name: value.to(model.device) for name, value in collator(part).items()}
            for k in range(sums.shape[1]):
                for _ in range(draws):
                    eps = noise.normal((len(part), *distribution.config.shape)).to(distribution.components)
                    drawn = (distribution.components[k] + distribution.config.std * eps).to(model.device)
                    losses = sample_losses(model, batch | {"user_embeds": drawn}).float().cpu()
                    sums[:, k].index_add_(0, owners[start : start + batch_size], losses)
    return sums / (draws * torch.bincount(owners, minlength=len(by_user)))[:, None]


def clustered_components(embeds: torch.Tensor, num_components: int, *, seed: int = 0) -> torch.Tensor:
    """
    Components for a mixture: the k-means centres of embeddings of volunteers, `(K, tokens, width)`.

    The embeddings `(volunteers, tokens, width)` are seen by whoever makes the components: of users who agreed, or of
    public data, never of everybody.

    Raises:
        ValueError: fewer embeddings than components.
        ImportError: scikit-learn is missing.
    """
    from sklearn.cluster import KMeans

    if len(embeds) < num_components:
        raise ValueError(f"{len(embeds)} volunteers for {num_components} components: at least as many are needed.")
    found = KMeans(num_components, n_init=10, random_state=seed).fit(embeds.detach().flatten(1).double().numpy())
    return torch.as_tensor(found.cluster_centers_, dtype=torch.float32).reshape(num_components, *embeds.shape[1:])


def random_components(num_components: int, shape: tuple[int, int], scale: float, *, seed: int = 0) -> torch.Tensor:
    """Components that nobody's data is in: random directions of length `scale`, `(K, tokens, width)`.

    They mean nothing before stage 3 has been trained with them: assign at random first, then alternate, on texts of
    their own each time ([`upload_parts`]).
    """
    drawn = torch.randn(num_components, *shape, generator=torch.Generator().manual_seed(seed))
    return drawn * (scale / math.sqrt(drawn[0].numel()))


def upload_parts(rows: Rows, parts: int, *, user_column: str = "user") -> list[list[int]]:
    """
    Indices of `rows` in `parts` parts, every user's texts spread over all of them and no text of a user in two.

    For stages 2 and 3 that alternate: a part is drawn for, uploaded and trained on under one assignment. The same text
    under several would be linked by itself, and the sequence of its components names its user: of N users with random
    assignments to K components, T of them tell K^T apart.

    Raises:
        ValueError: no part, or more parts than some user has texts.
    """
    rows = as_list(rows)
    places: dict[int, dict[bytes, int]] = defaultdict(dict)
    found: list[list[int]] = [[] for _ in range(max(parts, 0))]
    if not found:
        raise ValueError(f"parts={parts} must be positive.")
    for index, row in enumerate(rows):
        own = places[row[user_column]]
        found[own.setdefault(text_key(row), len(own)) % parts].append(index)
    if short := [user for user, own in places.items() if len(own) < parts]:
        raise ValueError(f"user {short[0]} has {len(places[short[0]])} texts, too few for {parts} parts.")
    return found


__all__ = ["assign_components", "clustered_components", "component_losses", "random_components", "upload_parts"]
