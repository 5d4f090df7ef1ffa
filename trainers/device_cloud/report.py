"""One report for every way of sharing work between a cloud and devices: quality by user, bytes, memory and time."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..evaluation.users import harm_rate, worst_decile
from ..figures import DPI, FAINT, INK, OKABE_ITO, STYLE, WIDTH
from ..report import Metric, summarise, verdict
from .budget import DeviceCost


@dataclass(frozen=True, kw_only=True)
class DeviceArm:
    """One way of doing it, measured.

    Args:
        quality (`dict`): by user, of all users that the bytes are of; NaN for those without a value, such as an AUC of
            one class.
        wire (`dict[str, int]`, *optional*): bytes `up` and `down` over all users, as [`WireMeter.totals`] gives them;
            `None` if nobody has counted them.
        cost (`DeviceCost`, *optional*): of the model on one device.
        device_seconds (`float`, *optional*): computing on one device, the mean over users.
        cloud_seconds (`float`, *optional*): computing on the cloud.
    """

    quality: Mapping[Hashable, float]
    wire: Mapping[str, int] | None = None
    cost: DeviceCost | None = None
    device_seconds: float | None = None
    cloud_seconds: float | None = None


_NUMBERS = {  # name: (unit, whether higher is better)
    "harm_rate": ("", False),
    "bytes_up_per_user": ("bytes", False),
    "bytes_down_per_user": ("bytes", False),
    "device_parameters": ("", False),
    "device_bytes": ("bytes", False),
    "device_peak_bytes": ("bytes", False),
    "device_flops": ("FLOPs", False),
    "device_seconds_per_user": ("s", False),
    "cloud_seconds": ("s", False),
}


@dataclass(frozen=True, kw_only=True)
class DeviceCloudReport:
    """One run, or one seed of it.

    Example:
        >>> report = DeviceCloudReport(
        ...     arms={"ours": DeviceArm(quality={"a": 0.9, "b": 0.8}, wire=meter.totals()), "cloud": cloud},
        ...     quality_name="accuracy",
        ... )
        >>> results.metrics |= DeviceCloudReport.metrics([report])

    Args:
        arms (`dict[str, DeviceArm]`): the first is ours, the others are its baselines.
        quality_name (`str`): of what `quality` holds, in snake_case.
        higher_is_better (`bool`): of that quality.
        reference (`str`): the arm that users would have without a device; who is worse off than with it is harmed. The
            harm rate is left out where no arm has that name.
        cold_users (`set`): users that the cloud has never seen; their mean is reported apart.
    """

    arms: Mapping[str, DeviceArm]
    quality_name: str = "accuracy"
    higher_is_better: bool = True
    reference: str = "cloud"
    cold_users: frozenset = frozenset()

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("`arms` is empty: nothing to report.")
        for name, arm in self.arms.items():
            if not any(np.isfinite(value) for value in arm.quality.values()):
                raise ValueError(f"Arm {name!r} has no user with a {self.quality_name}.")

    def numbers(self) -> dict[str, dict[str, float]]:
        """`{quantity: {arm: value}}`; an arm lacks what was not measured for it."""
        found: dict[str, dict[str, float]] = {}
        for name, arm in self.arms.items():
            for quantity, value in self._of(name, arm).items():
                if value is not None:
                    found.setdefault(quantity, {})[name] = float(value)
        return found

    def _of(self, name: str, arm: DeviceArm) -> dict[str, float | None]:
        known = {user: value for user, value in arm.quality.items() if np.isfinite(value)}
        cold = [value for user, value in known.items() if user in self.cold_users]
        values, users = np.array(list(known.values())), max(1, len(arm.quality))
        cost = arm.cost or DeviceCost(parameters=0, bytes=0)
        return {
            f"{self.quality_name}_of_users": values.mean(),
            f"{self.quality_name}_worst_decile": worst_decile(values, higher_is_better=self.higher_is_better),
            f"{self.quality_name}_cold_users": np.mean(cold) if cold else None,
            "harm_rate": self._harm(name, known),
            "bytes_up_per_user": arm.wire["up"] / users if arm.wire else None,
            "bytes_down_per_user": arm.wire["down"] / users if arm.wire else None,
            "device_parameters": cost.parameters or None,
            "device_bytes": cost.bytes or None,
            "device_peak_bytes": cost.peak_bytes,
            "device_flops": cost.flops,
            "device_seconds_per_user": arm.device_seconds,
            "cloud_seconds": arm.cloud_seconds,
        }

    def _harm(self, name: str, known: Mapping[Hashable, float]) -> float | None:
        before = self.arms[self.reference].quality if self.reference in self.arms else {}
        both = [user for user in known if np.isfinite(before.get(user, np.nan))]
        if name == self.reference or not both:
            return None
        ours, theirs = (np.array([values[user] for user in both]) for values in (known, before))
        return harm_rate(ours, theirs, higher_is_better=self.higher_is_better)

    @staticmethod
    def metrics(reports: Sequence["DeviceCloudReport"]) -> dict[str, Metric]:
        """What goes into `results.json`, of one report a seed: each quantity of the first arm, with the other arms as
        its baselines, and verdicts where there are three seeds. Quantities that the first arm lacks are left out, and
        those of an arm that some seed lacks."""
        first = reports[0]
        seeds = [report.numbers() for report in reports]
        metrics = {}
        for quantity in seeds[0]:
            unit, higher = _NUMBERS.get(quantity, ("", first.higher_is_better))
            of_arm = {
                arm: summarise([seed[quantity][arm] for seed in seeds], unit=unit, higher_is_better=higher)
                for arm in first.arms
                if all(arm in seed.get(quantity, {}) for seed in seeds)
            }
            ours, *others = first.arms
            if ours in of_arm:
                metrics[quantity] = of_arm.pop(ours)
                metrics[quantity].baseline = {arm: of_arm[arm] for arm in others if arm in of_arm}
                for baseline in metrics[quantity].baseline.values():
                    baseline.verdict = verdict(metrics[quantity].values, baseline.values, higher)
        return metrics

    def figure(self, path: str | Path) -> Path:
        """Draw, for each arm, users sorted by what they gain over the reference, beside quality over bytes.

        Raises:
            ValueError: no arm has the name of the reference.
        """
        if self.reference not in self.arms:
            raise ValueError(f"There is no arm {self.reference!r} to draw gains over.")
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
            gains, wires = figure.subplots(1, 2, width_ratios=(3, 2))
            for index, (name, arm) in enumerate(self.arms.items()):
                colour = OKABE_ITO[index % len(OKABE_ITO)]
                self._draw(gains, wires, name, arm, colour)
            gains.axhline(0, color=INK, linewidth=0.8)
            gains.set_xlabel("share of the users")
            gains.set_ylabel(f"{self.quality_name.replace('_', ' ')} gained over {self.reference}")
            wires.set_xlabel("bytes per user, up and down")
            wires.set_xscale("symlog", linthresh=1000)
            most = max([_sent(arm) for arm in self.arms.values() if arm.wire], default=0)
            powers = [10**k for k in range(3, 16) if 10**k <= 10 * most]
            wires.set_xticks([0, *powers], ["0", *(f"$10^{{{len(str(power)) - 1}}}$" for power in powers)])
            wires.set_ylabel(f"{self.quality_name.replace('_', ' ')}, mean over users")
            figure.legend(*wires.get_legend_handles_labels(), loc="outside lower center", ncols=4)
            figure.suptitle(self._title(), x=0.01, ha="left", fontsize=11.5, fontweight="bold")
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            FigureCanvasAgg(figure)
            # no version of matplotlib inside the file: the same data gives the same bytes
            figure.savefig(path, dpi=DPI, metadata={"Software": None})
        return path

    def _draw(self, gains, wires, name: str, arm: DeviceArm, colour: str) -> None:
        before = self.arms[self.reference].quality
        sign = 1 if self.higher_is_better else -1
        gain = np.sort([sign * (value - before[user]) for user, value in arm.quality.items() if user in before])
        gain = gain[np.isfinite(gain)]
        if name != self.reference and len(gain):
            gains.plot((np.arange(len(gain)) + 0.5) / len(gain), gain, color=colour, linewidth=1.8)
        values = np.array(list(arm.quality.values()), dtype=float)
        sent = _sent(arm) if arm.wire else np.nan  # no dot, but a place in the legend
        edge = FAINT if name == self.reference else colour
        wires.plot([sent], [np.nanmean(values)], "o", color=colour, markeredgecolor=edge, markersize=8, label=name)

    def _title(self) -> str:
        numbers = self.numbers()
        ours = next(iter(self.arms))
        mean = numbers[f"{self.quality_name}_of_users"]
        harm = numbers.get("harm_rate", {}).get(ours)
        words = f"{self.quality_name.replace('_', ' ')} {mean[ours]:.3f} with {ours}"
        if ours != self.reference:
            words += f", {mean[self.reference]:.3f} with {self.reference}"
        return words if harm is None else f"{words}; {harm:.0%} of the users are worse off"


def _sent(arm: DeviceArm) -> float:
    """Bytes per user, up and down."""
    return (arm.wire["up"] + arm.wire["down"]) / max(1, len(arm.quality))
