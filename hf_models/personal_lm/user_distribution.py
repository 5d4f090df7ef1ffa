r"""What a user's device keeps: a distribution D_u over embeddings, a few kilobytes (arXiv 2501.06062).

    gaussian   N(mu, sigma^2)       mu (tokens, width) private and, with `max_radius` r, at most r from a public centre
    beta       Beta(alpha, beta)    both private, one pair for each entry
    mixture    sum_k w_k N(c_k, sigma^2)   components c_k public and the same for all; the weights w (K) are private

The first two are the paper's. The third is ours: for more users than components the D_u are linearly dependent, and
whoever sees one upload guesses its user right with probability at most (1/N) sum_k max_u w_uk <= K/N.

A table of several users serves simulations, where they are fitted together; a device has a table of one.
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .private_noise import PrivateNoise


DESIGNS = ("gaussian", "beta", "mixture")
_FORMAT = "hf-sigma user distribution"
_PUBLIC_FORMAT = "hf-sigma design of user distributions"
DESIGN_FILE = "user_design.json"  # its name beside a published model
_LEAST = 1e-2  # of alpha and beta: below it Beta's mass sits on 0 and 1 in floating point


@dataclasses.dataclass(frozen=True)
class UserDistributionConfig:
    """The design of a [`UserDistribution`]: public, and the same for all users.

    Args:
        hidden_size, num_tokens: an embedding is `(num_tokens, hidden_size)`.
        design: `"gaussian"`, `"beta"` or `"mixture"`.
        std: sigma of the Gaussian and of the components: public, the same for all. 0.2 is the authors'.
        initial_mean: mu at the start, and the public centre; 0.1 is the authors' (for T5).
        max_radius: mu stays within this distance of the centre, over all its entries. `None`: it may go anywhere.
        initial_alpha, initial_beta: 2 and 5 are the authors' to classify, 5 and 6 to generate.
        num_components: K of the mixture.
    """

    hidden_size: int
    num_tokens: int = 1
    design: str = "gaussian"
    std: float = 0.2
    initial_mean: float = 0.1
    max_radius: float | None = None
    initial_alpha: float = 2.0
    initial_beta: float = 5.0
    num_components: int = 5

    def __post_init__(self):
        if self.design not in DESIGNS:
            raise ValueError(f"design={self.design!r} is not known. Choose one of {DESIGNS}.")
        for name in ("hidden_size", "num_tokens", "std", "initial_alpha", "initial_beta", "num_components"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.max_radius is not None:
            if self.design != "gaussian":
                raise ValueError(f"max_radius belongs to design='gaussian', not to {self.design!r}. Leave it out.")
            if not self.max_radius > 0:
                raise ValueError(f"max_radius={self.max_radius} must be positive, or None for no bound.")

    @property
    def shape(self) -> tuple[int, int]:
        """Of one embedding."""
        return self.num_tokens, self.hidden_size


class UserDistribution(nn.Module):
    """
    The distributions of `num_users` users, of one on a device.

    `centre (tokens, width)` of a Gaussian and `components (K, tokens, width)` of a mixture are public; all else is
    private. Nothing of this module is ever part of a model of `PersonalLm`: it is no submodule of one, and
    [`save`][UserDistribution.save] writes a file of its own.
    """

    def __init__(
        self,
        config: UserDistributionConfig,
        num_users: int = 1,
        *,
        centre: torch.Tensor | None = None,
        components: torch.Tensor | None = None,
    ):
        super().__init__()
        self.config, self.num_users = config, num_users
        shape = (num_users, *config.shape)
        if config.design == "gaussian":
            public = torch.full(config.shape, float(config.initial_mean)) if centre is None else centre.float()
            self.register_buffer("centre", _of_shape(public, config.shape, "centre").clone())
            self.mean = nn.Parameter(self.centre.expand(shape).clone())
        elif config.design == "beta":
            self.alpha = nn.Parameter(torch.full(shape, float(config.initial_alpha)))
            self.beta = nn.Parameter(torch.full(shape, float(config.initial_beta)))
        else:
            wanted = (config.num_components, *config.shape)
            if components is None:
                raise ValueError(f"a mixture needs its public components, a tensor of shape {wanted}.")
            self.register_buffer("components", _of_shape(components.float(), wanted, "components").clone())
            self.weights_logits = nn.Parameter(torch.zeros(num_users, config.num_components))

    @property
    def weights(self) -> torch.Tensor:
        """`(users, K)` of a mixture."""
        return self.weights_logits.softmax(dim=-1)

    @torch.no_grad()
    def set_weights(self, weights: torch.Tensor) -> None:
        """Give each user weights `(users, K)` over the components, zeros allowed. `ValueError` if they are none."""
        weights = _of_shape(weights, tuple(self.weights_logits.shape), "weights").to(self.weights_logits)
        if (weights < 0).any() or not torch.allclose(weights.sum(-1), torch.ones_like(weights[:, 0]), atol=1e-4):
            raise ValueError("weights must not be negative, and sum to 1 for each user.")
        self.weights_logits.copy_(weights.log())

    def sample(self, users: torch.Tensor | None = None, *, noise: PrivateNoise | None = None) -> torch.Tensor:
        """
        One draw for each entry of `users`, reparameterised: `(batch, tokens, width)`.

        Gradients reach the mean, alpha and beta; a mixture's weights have none through a draw (see
        `trainers.device_cloud.assign_components`).

        Args:
            users: rows of the table, `(batch,)`. `None`: each row once.
            noise: `None`: the operating system's.
        """
        noise = PrivateNoise() if noise is None else noise
        if users is None:
            users = torch.arange(self.num_users)
        users = users.to(self._device)
        shape = (len(users), *self.config.shape)
        if self.config.design == "beta":
            alpha, beta = self.alpha[users].double(), self.beta[users].double()
            x, y = noise.gamma(alpha), noise.gamma(beta)
            return (x / (x + y)).to(self.alpha)
        if self.config.design == "gaussian":
            location = self.mean[users]
        else:
            edges = self.weights.double().cumsum(-1)[users]  # (batch, K)
            point = noise.uniform((len(users), 1)).to(edges) * edges[:, -1:]
            location = self.components[(point > edges).sum(-1)]
        return location + self.config.std * noise.normal(shape).to(location)

    def log_prob(self, embeds: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        """Log density of `embeds (batch, tokens, width)` under every user, `(batch, users)`, in float64."""
        rows = torch.arange(self.num_users) if users is None else users
        flat = embeds.double().flatten(1)  # (batch, entries)
        if self.config.design == "beta":
            a = self.alpha[rows].double().flatten(1)
            b = self.beta[rows].double().flatten(1)
            inside = flat.clamp(1e-12, 1 - 1e-12)
            constant = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
            return inside.log() @ (a - 1).T + torch.log1p(-inside) @ (b - 1).T + constant.sum(-1)
        if self.config.design == "gaussian":
            return _log_normal(flat, self.mean[rows].double().flatten(1), self.config.std)
        parts = _log_normal(flat, self.components.double().flatten(1), self.config.std)  # (batch, K)
        return torch.logsumexp(parts[:, None] + self.weights_logits[rows].double().log_softmax(-1), dim=-1)

    def kl(self, other: "UserDistribution | None" = None) -> torch.Tensor:
        """
        KL divergence of each user's distribution from `other`'s row of the same number, `(users,)`.

        `None`: from where all began, N(centre, sigma^2) or the initial Beta. A mixture's is that of its weights
        (against equal ones), which bounds the divergence of the densities from above.
        """
        if self.config.design == "gaussian":
            start = self.centre if other is None else other.mean
            scale = 1.0 if other is None else other.config.std / self.config.std
            gap = ((self.mean - start) / (self.config.std * scale)) ** 2
            return 0.5 * (gap + scale**-2 - 1 + 2 * math.log(scale)).flatten(1).sum(-1)
        if self.config.design == "beta":
            ours = torch.distributions.Beta(self.alpha, self.beta)
            first = (self.config.initial_alpha, self.config.initial_beta)
            theirs = [torch.full_like(self.alpha, value) for value in first] if other is None else None
            theirs = torch.distributions.Beta(*(theirs or (other.alpha, other.beta)))
            return torch.distributions.kl_divergence(ours, theirs).flatten(1).sum(-1)
        ours = self.weights_logits.log_softmax(-1)
        theirs = (
            torch.full_like(ours, -math.log(ours.shape[1])) if other is None else other.weights_logits.log_softmax(-1)
        )
        terms = ours.exp() * (ours - theirs)
        return torch.where(ours.exp() > 0, terms, torch.zeros_like(terms)).sum(-1)

    @torch.no_grad()
    def project_(self) -> None:
        """Bring every mean back to within `max_radius` of the centre, alpha and beta to what can be drawn from."""
        if self.config.design == "beta":
            self.alpha.clamp_(min=_LEAST)
            self.beta.clamp_(min=_LEAST)
        elif self.config.design == "gaussian" and self.config.max_radius is not None:
            gap = self.mean - self.centre
            distance = gap.flatten(1).norm(dim=1)[:, None, None]
            # a hair inside: in float32 the norm of what lies on the sphere may come out above its radius
            allowed = self.config.max_radius * (1 - 1e-6)
            self.mean.copy_(self.centre + gap * (allowed / distance.clamp_min(1e-30)).clamp_max(1.0))

    @torch.no_grad()
    def radius_over_std(self) -> torch.Tensor | None:
        """Each user's ||mu - centre|| / sigma, `(users,)`: what an attacker's success depends on. Gaussian only."""
        if self.config.design != "gaussian":
            return None
        return (self.mean - self.centre).flatten(1).norm(dim=1) / self.config.std

    def rows(self, users: torch.Tensor | Sequence[int]) -> "UserDistribution":
        """A table of its own with these users alone, such as a device's with one."""
        users = torch.as_tensor(list(users) if isinstance(users, range) else users)
        made = UserDistribution(self.config, len(users), **self._public())
        for name, parameter in made.named_parameters():
            parameter.data.copy_(getattr(self, name).detach()[users])
        return made.to(self._device)

    @torch.no_grad()
    def put_rows(self, users: torch.Tensor | list[int], other: "UserDistribution") -> None:
        """Take over these users' parameters from a table like that of [`rows`][UserDistribution.rows]."""
        for name, parameter in other.named_parameters():
            getattr(self, name)[torch.as_tensor(users)] = parameter.detach()

    def save(self, path: str | os.PathLike) -> Path:
        """Write everything to one safetensors file, whole or not at all. It is private: keep it on the device."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        metadata = {"format": _FORMAT, "num_users": str(self.num_users)}
        metadata["config"] = json.dumps(dataclasses.asdict(self.config))
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, temporary, metadata)
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "UserDistribution":
        """What [`save`][UserDistribution.save] wrote. `ValueError` for another file."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} holds no user distribution: it was not written by UserDistribution.save.")
            state = {name: file.get_tensor(name) for name in file.keys()}
        public = {name: state[name] for name in ("centre", "components") if name in state}
        config = UserDistributionConfig(**json.loads(metadata["config"]))
        made = cls(config, int(metadata["num_users"]), **public)
        made.load_state_dict(state)
        return made

    def save_design(self, folder: str | os.PathLike) -> Path:
        """
        Write what is public into `user_design.json` of a folder: configuration, centre or components, nobody's own.

        A model was trained with these; whoever uses it needs the same, see
        [`from_design`][UserDistribution.from_design].
        """
        path = Path(folder) / DESIGN_FILE
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        public = {name: tensor.tolist() for name, tensor in self._public().items()}
        content = {"format": _PUBLIC_FORMAT, "config": dataclasses.asdict(self.config), "public": public}
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def from_design(cls, path: str | os.PathLike, num_users: int = 1) -> "UserDistribution":
        """New users of a published model, where everybody begins: at the centre, or with equal weights.

        Raises:
            ValueError: another file than [`save_design`][UserDistribution.save_design] writes.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            known = content["format"] == _PUBLIC_FORMAT
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(f"{path} holds no design: it was not written by UserDistribution.save_design.")
        public = {name: torch.tensor(values) for name, values in content["public"].items()}
        return cls(UserDistributionConfig(**content["config"]), num_users, **public)

    def _public(self) -> dict[str, torch.Tensor]:
        return dict(self.named_buffers())

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device


def _of_shape(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} have shape {tuple(tensor.shape)}, expected {shape}.")
    return tensor


def _log_normal(points: torch.Tensor, means: torch.Tensor, std: float) -> torch.Tensor:
    """Log density of N(mean, std^2) in the entries: `(batch, means)` of `(batch, entries)` and `(means, entries)`."""
    points, means = points / std, means / std
    squares = points.square().sum(1)[:, None] - 2 * points @ means.T + means.square().sum(1)
    return -0.5 * squares - points.shape[1] * (math.log(std) + 0.5 * math.log(2 * math.pi))


__all__ = ["DESIGNS", "DESIGN_FILE", "UserDistribution", "UserDistributionConfig"]
