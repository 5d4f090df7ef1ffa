r"""FedSubAvg, and the average of the authors' earlier system, which is not the same.

With n_m clients that have row m, K participants and w = 1, the update of a row, and its expectation in units of the
mean local update over the n_m clients:

    FedAvg                 1/K sum Delta                          n_m / N
    RoundwiseSubmodelAvg   sum Delta / (involved participants)    1 - C(N - n_m, K) / C(N, K)
    FedSubAvg              N/n_m 1/K sum Delta                    1

FedSubAvg: Ding et al., arXiv 2109.07704 (NeurIPS 2022), as its abstract and the authors' code have it.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .averaging import FedAvg, Part, add_rows, per_row
from .exchange import AggregationLog, CheckedUpdate, ClientUpdate, Tensors
from .heat import StreamingHeat, exact_heat
from .protocol import check_choice


class FedSubAvg(FedAvg):
    """Federated submodel averaging (arXiv 2109.07704): rows are corrected by c_m = N / n_m, dense parameters never.

    A row that one client owns moves by N/K of that client's update: unbiased, and noisy, so that the best local rate
    is below FedAvg's. `max_correction` caps it, at the price of some bias towards hot rows (ours).

    Args:
        weighting: `"clients"`, c_m = N / n_m, as in the paper's text; `"examples"`, as in the authors' code: c_m =
            (examples of all) / (examples of those that have m), and examples weigh in the round's average.
        heat: `"exact"`, from the involvement that `start` is given; `"streaming"`, from the rows that updates name
            (see [`StreamingHeat`][trainers.federated.core.heat.StreamingHeat]); or `{table: n_m}`, such as
            [`estimate_heat`][trainers.federated.core.heat.estimate_heat] gives it. With the last two, `start` needs
            no involvement.
        max_correction: the largest c_m; with estimated heat, this or a floor of the estimate is a must.
        options: those of [`FedAvg`]. Clipping and noise come after the correction, and `max_update_norm` holds for
            what comes and for what the correction makes of it. Noise needs heat that is given: n_m that is counted
            from the clients' rows lets each client change how much the others weigh, by more than noise scaled to
            one clipped update hides. Heat that is given is public; if it was estimated from randomised answers,
            their epsilon comes on top of [`epsilon_spent`][trainers.federated.core.epsilon_spent].
    """

    requires = frozenset({"submodel"})

    def __init__(
        self,
        *,
        weighting: str = "clients",
        heat: str | Mapping[str, torch.Tensor] = "exact",
        max_correction: float | None = None,
        **options: Any,
    ):
        super().__init__(weighting=weighting, **options)
        if isinstance(heat, str):
            check_choice("heat", heat, ("exact", "streaming"))
        if self.robust.rule != "mean":
            raise ValueError(f"rule={self.robust.rule!r}: a row that few clients own has no majority. Use clip_norm.")
        if max_correction is not None and not max_correction >= 1:
            raise ValueError(f"max_correction={max_correction} must be at least 1; None does not cap.")
        if self.robust.noise_multiplier and isinstance(heat, str):
            raise ValueError(
                f"noise_multiplier with heat={heat!r}: N / n_m then depends on everybody's rows, and one client can "
                "change the average by more than the noise is scaled to. Give heat={table: n_m} that is public, or "
                "estimate_heat's from randomised answers."
            )
        if weighting == "examples" and heat != "exact":
            raise ValueError(
                "weighting='examples' needs heat='exact': it weighs rows by the examples of their owners."
            )
        self.heat, self.max_correction = heat, max_correction

    def _begin(self) -> None:
        super()._begin()
        if isinstance(self.heat, str) and self.heat == "exact" and self._involvement is None:
            raise ValueError("FedSubAvg counts heat from involvement: give it to start, or choose another heat.")
        if self.weighting == "examples" and self._num_examples is None:
            raise ValueError("weighting='examples' needs num_examples of every client at the start.")
        self._streaming = self._next_streaming = None
        sizes = {name: len(x) for name, x in self._parameters.items() if x.dim()}
        weighed, total = self._heat, float(len(self._clients))
        if self.weighting == "examples":
            weighed = exact_heat(self._involvement, sizes, weights=self._num_examples)
            total = float(sum(self._num_examples.values()))
        elif self.heat == "streaming":
            self._streaming, weighed = StreamingHeat(sizes), {}
        elif not isinstance(self.heat, str):
            weighed = self._heat = self._given_heat()
        self._correction = self._corrections(weighed, total)

    def _given_heat(self) -> Tensors:
        heat = {}
        for table, given in self.heat.items():
            own = self._parameters.get(table)
            if own is None or not own.dim() or tuple(given.shape) != (len(own),):
                raise ValueError(f"heat of {table!r} does not fit a parameter of that name.")
            heat[table] = given.double().to(own.device)
            if not bool((torch.isfinite(heat[table]) & (heat[table] >= 0)).all()):
                raise ValueError(f"heat of {table!r} must be finite and not negative.")
        return heat

    def _corrections(self, heat: Mapping[str, torch.Tensor], total: float) -> Tensors:
        """c_m of every row, float64; 1 for rows that nobody has."""
        found = {}
        for table, n in heat.items():
            c = torch.where(n > 0, total / n.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
            found[table] = c.clamp_max(self.max_correction or math.inf).to(self._parameters[table].device)
        return found

    def correction(self, table: str) -> torch.Tensor:
        """c_m of every row of a table, float64, as it stands; ones of a table that has none."""
        self._require_start()
        found = self._correction.get(table)
        return torch.ones(len(self._parameters[table]), dtype=torch.float64) if found is None else found.clone()

    def _set_streamed(self, streaming: StreamingHeat, tables: Iterable[str]) -> None:
        estimates = streaming.estimate(len(self._clients))
        tables = sorted(set(tables) | set(self._heat))
        self._heat = {table: estimates[table].to(self._parameters[table].device) for table in tables}
        self._correction = self._corrections(self._heat, float(len(self._clients)))

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> AggregationLog:
        """Close a round, see [`FederatedAlgorithm.aggregate`]."""
        before = self._heat, self._correction
        try:
            return super().aggregate(round, updates)
        except FloatingPointError:
            self._heat, self._correction, self._next_streaming = *before, None
            raise

    def _parts(self, sifted: list[CheckedUpdate], log: AggregationLog) -> list[Part]:
        if self._streaming is None:
            return super()._parts(sifted, log)
        before = self._heat, self._correction
        while sifted:
            self._heat, self._correction = before
            self._next_streaming = self._streaming.with_clients({update.client: update.rows for update in sifted})
            self._set_streamed(self._next_streaming, {table for update in sifted for table in update.rows})
            parts = super()._parts(sifted, log)
            if len(parts) == len(sifted):
                return parts
            sifted = [update for update, _ in parts]  # heat is counted anew without those that were withdrawn
        self._heat, self._correction, self._next_streaming = *before, None
        return []

    def _close(self, round: int, parameters: Tensors, log: AggregationLog) -> None:
        super()._close(round, parameters, log)
        if self._next_streaming is not None:
            self._streaming, self._next_streaming = self._next_streaming, None

    def _amplified(self, update: CheckedUpdate) -> Tensors:
        tensors = dict(update.tensors)
        for table, c in self._correction.items():
            rows = update.rows.get(table)
            c = c if rows is None else c[rows]
            tensors[table] = tensors[table] * per_row(c, tensors[table]).to(tensors[table].dtype)
        return tensors

    def _norm_factor(self, name: str, accepted: list[CheckedUpdate]) -> torch.Tensor | None:
        factor, c = super()._norm_factor(name, accepted), self._correction.get(name)
        return factor if factor is None or c is None else factor / c**2

    def _save(self, tensors: dict[str, Tensors], record: dict[str, Any]) -> None:
        super()._save(tensors, record)
        if self._streaming is not None:
            tensors["heat_counts"], record["heat_seen"] = self._streaming.state_dict()
            record["heat_tables"] = sorted(self._heat)

    def _load(self, tensors: Mapping[str, Tensors], record: Mapping[str, Any]) -> None:
        super()._load(tensors, record)
        if self._streaming is not None:
            self._streaming.load_state_dict(tensors["heat_counts"], record["heat_seen"])
            self._set_streamed(self._streaming, record["heat_tables"])


class RoundwiseSubmodelAvg(FedAvg):
    """Each row averaged over those participants of the round that have it: what the authors' earlier system (MobiCom
    2020) called FedSubAvg. In expectation a cold row still moves less than a hot one, see the module.

    Args:
        options: those of [`FedAvg`]; `weighting` is `"clients"` by default.
    """

    requires = frozenset({"submodel"})

    def __init__(self, *, weighting: str = "clients", **options: Any):
        super().__init__(weighting=weighting, **options)
        if self.robust.rule != "mean" or self.robust.noise_multiplier:
            raise ValueError(
                "Averages over the few owners of a row take clip_norm only: noise and medians are no use."
            )

    def _divisor(self, name: str, accepted: list[CheckedUpdate], weights: list[float]) -> float | torch.Tensor:
        if not any(name in update.rows for update in accepted):
            return sum(weights)
        own = self._parameters[name]
        involved = self._involved(name, accepted, weights)
        return per_row(torch.where(involved > 0, involved, 1.0), own)

    def _involved(self, name: str, accepted: list[CheckedUpdate], weights: list[float]) -> torch.Tensor:
        """The weight of the participants that have each row."""
        own = self._parameters[name]
        involved = torch.zeros(len(own), dtype=torch.float64, device=own.device)
        for update, weight in zip(accepted, weights):
            add_rows(
                involved, rows := update.rows.get(name), torch.ones(len(own) if rows is None else len(rows)), weight
            )
        return involved

    def _norm_factor(self, name: str, accepted: list[CheckedUpdate]) -> torch.Tensor | None:
        factor = super()._norm_factor(name, accepted)
        if factor is None:
            return None
        weights = [self._weight(update, self.weighting) for update in accepted]
        return factor * (self._involved(name, accepted, weights) / sum(weights)) ** 2
