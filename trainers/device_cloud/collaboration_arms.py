"""DC-CCL and its baselines behind the interface that all classes are compared by."""

from dataclasses import dataclass

from ..federated.core import WireMeter
from .budget import DeviceBudget, device_cost
from .collaboration_entries import CollaborationClass
from .collaboration_task import CollaborationTask, Served, add_to_meter, pixels_of, serve_through
from .dc_ccl_arms import ARMS
from .dc_ccl_data import logits_of
from .dc_ccl_rounds import run_dc_ccl


KINDS: dict[str, CollaborationClass | None] = {  # `None`: nothing of one side is learned from by the other
    "dc_ccl": "parameter",
    "distr_true": "parameter",
    "fedavg_small": "parameter",
    "kd_uplink": "parameter",
    "cloud_only": None,
    "device_only": None,
    "central": "data",
    "split_learning": "feature",
}
_WITHOUT_CLOUD = ("fedavg_small", "device_only")  # what is served is the small model, and it is on the device


@dataclass(kw_only=True)
class DcCclMethod:
    """One arm of DC-CCL's comparison: `arm` is a key of `trainers.device_cloud.dc_ccl_arms.ARMS`.

    The arms that serve the small model alone answer on the device, and send no request. Rounds are committed to the
    task's folder, so that a killed run goes on.
    """

    arm: str = "dc_ccl"

    def __post_init__(self) -> None:
        if self.arm not in KINDS:
            raise ValueError(f"arm {self.arm!r} is not known. Choose one of {', '.join(KINDS)}.")

    @property
    def name(self) -> str:
        """As it is called in a comparison."""
        return self.arm

    @property
    def kind(self) -> CollaborationClass | None:
        """Its class, by what crosses the wire while it learns."""
        return KINDS[self.arm]

    def train(self, task: CollaborationTask, meter: WireMeter, budget: DeviceBudget | None = None) -> Served:
        """See [`CollaborationMethod`]."""
        arm, model = ARMS[self.arm], task.model()
        on_device = model.device_package()
        if arm.on_device and arm.on_device != "device":
            delattr(on_device, "control_model" if arm.on_device == "co" else "co_submodel")
        example = task.example | {"branch": arm.on_device}
        cost = None
        if arm.on_device:
            cost = budget.check(on_device, example) if budget else device_cost(on_device, example)
        run = run_dc_ccl(model, task.plan, task.data, task.args, arm=self.arm, trained=True)
        add_to_meter(meter, run.meter)
        test = task.data.test
        alone = logits_of(run.model, test, arm.on_device) if arm.on_device else None
        if self.arm in _WITHOUT_CLOUD:
            return Served(logits=alone, device_logits=alone, cost=cost)
        run.model.eval()
        logits = serve_through(
            meter, pixels_of(test), lambda rows: run.model(rows, branch=arm.served).logits, what="pixel_values"
        )
        return Served(logits=logits, device_logits=alone, cost=cost, cloud_calls=len(logits))


__all__ = ["DcCclMethod"]
