r"""FedAvg and its plain relatives.

    x <- x + lr * sum_{i in C_r} w_i Delta_i / sum_{i in C_r} w_i,     Delta_i = local - received

FedAvg: McMahan et al., arXiv 1602.05629. FedProx: Li et al., arXiv 1812.06127. FedAdam: Reddi et al., arXiv
2003.00295, algorithm 2. These three from memory of the papers; as baselines they are those of the papers whose
algorithms stand beside.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .exchange import AggregationLog, CheckedUpdate, ClientUpdate, Tensors, joint_norm
from .heat import exact_heat
from .protocol import FederatedAlgorithm, check_choice
from .robust import Robust
from .uploads import norm_of_tensor


WEIGHTINGS = ("clients", "examples")
Part = tuple[CheckedUpdate, Tensors]


@dataclass(frozen=True)
class ServerAdam:
    r"""Adam on the averaged update d, without bias correction:

        m <- b1 m + (1 - b1) d,   v <- b2 v + (1 - b2) d^2,   x <- x + lr m / (sqrt(v) + tau),   v_0 = tau^2

    It drifts fast towards whoever is available (FedLaAvg's supplement, arXiv 2002.07399).
    """

    learning_rate: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    tau: float = 1e-3

    def begin(self, parameters: Tensors) -> dict[str, Tensors]:
        """The moments before the first step."""
        return {
            "adam_first": {name: torch.zeros_like(tensor) for name, tensor in parameters.items()},
            "adam_second": {name: torch.full_like(tensor, self.tau**2) for name, tensor in parameters.items()},
        }

    def step(
        self, parameters: Tensors, direction: Tensors, moments: dict[str, Tensors]
    ) -> tuple[Tensors, dict[str, Tensors]]:
        """New parameters and moments; nothing is written to."""
        b1, b2 = self.betas
        first = {name: b1 * m + (1 - b1) * direction[name] for name, m in moments["adam_first"].items()}
        second = {name: b2 * v + (1 - b2) * direction[name] ** 2 for name, v in moments["adam_second"].items()}
        stepped = {
            name: tensor + self.learning_rate * first[name] / (second[name].sqrt() + self.tau)
            for name, tensor in parameters.items()
        }
        return stepped, {"adam_first": first, "adam_second": second}


class FedAvg(FederatedAlgorithm):
    """Federated averaging (arXiv 1602.05629).

    Where `start` is given involvement, clients train and send submodels, and the zeros of those that lack a row count:
    a row that n of N clients have moves at n/N of its speed. See [`FedSubAvg`][trainers.federated.core.FedSubAvg].

    Args:
        weighting: `"examples"`, or `"clients"`: all alike.
        server_learning_rate: lr above.
        server_optimizer: a [`ServerAdam`] in place of lr.
        robust: clipping, noise and other rules than the mean, see [`Robust`].
        clients_per_round, max_update_norm, seed: see [`FederatedAlgorithm`].
    """

    takes_rows = True

    def __init__(
        self,
        *,
        clients_per_round: int | None = None,
        weighting: str = "examples",
        server_learning_rate: float = 1.0,
        server_optimizer: ServerAdam | None = None,
        robust: Robust | None = None,
        max_update_norm: float | None = None,
        seed: int = 0,
    ):
        super().__init__(clients_per_round=clients_per_round, max_update_norm=max_update_norm, seed=seed)
        check_choice("weighting", weighting, WEIGHTINGS)
        self.weighting, self.server_learning_rate = weighting, server_learning_rate
        self.server_optimizer, self.robust = server_optimizer, robust or Robust()
        if weighting != "clients" and (self.robust.noise_multiplier or self.robust.rule != "mean"):
            raise ValueError(
                "noise, the median and the trimmed mean need updates of equal weight: weighting='clients'."
            )

    def _checked_involvement(self, involvement: Any) -> dict[str, Tensors]:
        if self.robust.rule != "mean":
            raise ValueError(f"rule={self.robust.rule!r}: a row that few clients own has no majority. Use clip_norm.")
        return super()._checked_involvement(involvement)

    def _begin(self) -> None:
        self._moments = {} if self.server_optimizer is None else self.server_optimizer.begin(self._parameters)
        self._heat = {}
        if self._involvement is not None:
            heat = exact_heat(self._involvement, {name: len(x) for name, x in self._parameters.items() if x.dim()})
            self._heat = {name: count.to(self._parameters[name].device) for name, count in heat.items()}
        self._owned = {name: count > 0 for name, count in self._heat.items()}  # by what start was told

    def _save(self, tensors: dict[str, Tensors], record: dict[str, Any]) -> None:
        tensors |= self._moments

    def _load(self, tensors: Mapping[str, Tensors], record: Mapping[str, Any]) -> None:
        self._moments = {name: self._placed(tensors[name]) for name in self._moments}

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> AggregationLog:
        """Close a round, see [`FederatedAlgorithm.aggregate`]."""
        chains, log = self._sifted(round, updates)
        parts = self._parts(chains["mixed"], log)
        if not parts:
            log.events.append("no update counts: the parameters stay")
            self._close(round, self._parameters, log)
            return log
        if few := self.robust.too_few(len(parts)):
            log.events.append(few)
        accepted = [update for update, _ in parts]
        direction, moments = self._direction(round, parts), self._moments
        log.elementwise_gradient_norm = self._elementwise_norm(direction, accepted)
        if self.server_optimizer is None:
            stepped = {name: x + self.server_learning_rate * direction[name] for name, x in self._parameters.items()}
        else:
            stepped, moments = self.server_optimizer.step(self._parameters, direction, moments)
        self._close(round, stepped, log)
        self._moments = moments
        return log

    def _parts(self, sifted: list[CheckedUpdate], log: AggregationLog) -> list[Part]:
        """Each update with what is averaged of it: amplified, and clipped. One that is too large or not finite once it
        is amplified is withdrawn."""
        parts = []
        for update in sifted:
            amplified = self._amplified(update)
            norm = self._amplified_norm(update, amplified)
            if not math.isfinite(norm):
                log._withdraw(update.client, f"its norm is {update.norm:.4g}, and no number once it is amplified")
            elif self.max_update_norm is not None and norm > self.max_update_norm:
                limit = f"at most {self.max_update_norm:.4g} is allowed"
                log._withdraw(update.client, f"its norm is {norm:.4g} once it is amplified, {limit}")
            else:
                parts.append((update, self.robust.clipped(amplified, norm)))
        return parts

    def _direction(self, round: int, parts: list[Part]) -> Tensors:
        """What the server steps along: the average, in the parameters' dtype."""
        accepted = [update for update, _ in parts]
        weights = [self._weight(update, self.weighting) for update in accepted]
        direction = {}
        for name, own in self._parameters.items():
            if self.robust.rule == "mean":
                total = torch.zeros(own.shape, dtype=torch.float64, device=own.device)
                for (update, part), weight in zip(parts, weights):
                    add_rows(total, update.rows.get(name), part[name], weight)
                average = total / self._divisor(name, accepted, weights)
            else:
                average = self.robust.centre(torch.stack([part[name].double() for _, part in parts]))
            if self.robust.noise_multiplier:
                average += self._noise(round, name, len(parts))
            direction[name] = average.to(own.dtype)
        return direction

    def _noise(self, round: int, name: str, clients: int) -> torch.Tensor:
        """For an average over `clients`; none in rows that nobody has."""
        own, owned = self._parameters[name], self._owned.get(name)
        drawn = self.robust.noise(own, clients, round, name)
        return drawn if owned is None else drawn * per_row(owned, own)

    def _amplified(self, update: CheckedUpdate) -> Tensors:
        """An update as it is clipped and averaged; tensors that stay as they are, not copied."""
        return update.tensors

    def _amplified_norm(self, update: CheckedUpdate, amplified: Tensors) -> float:
        norms = update.tensor_norms
        changed = {name: norm_of_tensor(x) for name, x in amplified.items() if x is not update.tensors[name]}
        return joint_norm((norms | changed).values())

    def _divisor(self, name: str, accepted: list[CheckedUpdate], weights: list[float]) -> float | torch.Tensor:
        return sum(weights)

    def _elementwise_norm(self, direction: Tensors, accepted: list[CheckedUpdate]) -> float:
        total = 0.0
        for name, d in direction.items():
            squares = d.double().square()
            if (factor := self._norm_factor(name, accepted)) is not None:
                squares = squares.flatten(1).sum(1) * factor  # (rows,)
            total += float(squares.sum())
        return total

    def _norm_factor(self, name: str, accepted: list[CheckedUpdate]) -> torch.Tensor | None:
        """Of each row, N/n_m times the square of (plain average / direction); `None` of a dense parameter."""
        heat = self._heat.get(name)
        return None if heat is None else len(self._clients) / heat.double().clamp_min(1)


class FedProx(FedAvg):
    """FedAvg whose clients add mu/2 ||y - received||^2, with the square, to their loss (arXiv 1812.06127); mu goes
    down as `config["proximal"]`.

    Args:
        proximal: mu.
        options: those of [`FedAvg`].
    """

    def __init__(self, *, proximal: float, **options: Any):
        if proximal < 0:
            raise ValueError(f"proximal={proximal} must not be negative.")
        super().__init__(**options)
        self.proximal = proximal

    def _config(self, round: int, client: str) -> dict[str, Any]:
        return super()._config(round, client) | {"proximal": self.proximal}


class FedSGD(FedAvg):
    """FedAvg with one local step (arXiv 1602.05629), which goes down as `config["local_steps"]`; options as
    [`FedAvg`]."""

    def _config(self, round: int, client: str) -> dict[str, Any]:
        return super()._config(round, client) | {"local_steps": 1}


class FedAdam(FedAvg):
    """FedAvg whose server steps by Adam (arXiv 2003.00295).

    Args:
        learning_rate, betas, tau: see [`ServerAdam`].
        options: those of [`FedAvg`].
    """

    def __init__(
        self,
        *,
        learning_rate: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        tau: float = 1e-3,
        **options: Any,
    ):
        super().__init__(server_optimizer=ServerAdam(learning_rate, betas, tau), **options)


def per_row(factor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(rows,)` as `(rows, 1, ...)`, to multiply a table by."""
    return factor.reshape(-1, *[1] * (like.dim() - 1))


def add_rows(total: torch.Tensor, rows: torch.Tensor | None, values: torch.Tensor, weight: float) -> None:
    """Add weighted values to the rows of a float64 total that they belong to; `None`: to all."""
    if rows is None:
        total.add_(values, alpha=weight)
    else:
        total.index_add_(0, rows, values.double(), alpha=weight)
