"""The whole loop of DC-CCL and of what it is compared with: phases 1 and 2 on the cloud, then rounds that survive a
kill."""

import copy
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from hf_models.dc_ccl import DcCclPreTrainedModel

from ..federated.core import RoundStore, WireMeter
from .budget import DeviceBudget, DeviceCost
from .dc_ccl_arms import ARMS, DEVICE, Arm, DcCclModel, Setting
from .dc_ccl_data import DcCclData, fingerprint_of, measured_gap
from .dc_ccl_plan import DcCclPlan
from .report import DeviceArm


logger = logging.get_logger(__name__)


@dataclass(kw_only=True)
class DcCclRun:
    """What a run came to.

    Args:
        model: the cloud's, after the last round; of an arm without a cloud the device's.
        history: one record a round, from 0 (before the first) on: `round`, `served` and `device` accuracy on the test
            set (`None` where there is nothing to ask), of images or of next tokens; `user`, the served accuracy on
            what only the device has; `validation`, that where rates are chosen; `bytes_up` and `bytes_down` so far,
            `seconds` of the round; in record 0 also `control_gap` on held-out cloud rows and on the device's.
        meter: what crossed the wire, by round and by purpose.
        cost: of what the device computes with; `None` where it holds no submodel.
        seconds: of training in rounds, by side; a side that trains nothing is left out.
    """

    model: DcCclPreTrainedModel
    history: list[dict[str, Any]]
    meter: WireMeter
    cost: DeviceCost | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def for_report(self) -> DeviceArm:
        """This run as an arm of a [`DeviceCloudReport`], its user's quality on what only the device has, or else on
        the test set."""
        last = self.history[-1]
        return DeviceArm(
            quality={DEVICE: last["served"] if last["user"] is None else last["user"]},
            wire=self.meter.totals(),
            cost=self.cost,
            device_seconds=self.seconds.get(DEVICE),
            cloud_seconds=self.seconds.get("cloud"),
        )


def train_cloud(model: DcCclModel, plan: DcCclPlan, data: DcCclData, args: TrainingArguments) -> DcCclModel:
    """Phases 1 and 2, in place: the cloud submodel with the shared encoder, then the control model."""
    setting = Setting(model=model, plan=plan, data=data, args=args)
    setting.fit(model, "cloud", plan.cloud, data.cloud, turn=0, phase1_loss=plan.phase1_loss)
    setting.fit(model, "control", plan.control, data.cloud, turn=0)
    model.train_all()
    return model


def cloud_record(model: DcCclModel, plan: DcCclPlan, data: DcCclData) -> dict[str, Any]:
    """All that phases 1 and 2 depend on, as JSON: what is kept of them is of use while this is the same."""
    of_cloud = ("cloud", "control", "phase1_loss", "seed")
    return {
        "plan": {name: value for name, value in plan.to_json().items() if name in of_cloud},
        "data": fingerprint_of(data.cloud),
        "model": _digest_of(model),
    }


# What a configuration notes besides the shape of a model; the Trainer, for one, sets `use_cache`.
_BESIDES = ("transformers_version", "architectures", "auto_map", "dtype", "_name_or_path", "use_cache", "problem_type")


def _digest_of(model: DcCclModel) -> str:
    """Hash of what a model's configuration says of its shape."""

    def shape(value: Any) -> Any:
        return {n: shape(v) for n, v in value.items() if n not in _BESIDES} if isinstance(value, dict) else value

    fields = shape(json.loads(model.config.to_json_string()))
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def run_dc_ccl(
    model: DcCclModel,
    plan: DcCclPlan,
    data: DcCclData,
    args: TrainingArguments,
    *,
    arm: str = "dc_ccl",
    trained: bool = False,
    budget: DeviceBudget | None = None,
    transport: Callable[[bytes], bytes] = bytes,
) -> DcCclRun:
    """Train `model` in place, all sides in this process; what would cross a wire is packed, counted and unpacked.

    Models of images and language models go the same way. That DC-CCL carries over to text is our reading; quality is
    the share of next tokens there. `split_learning` needs a shared encoder, which language models have none of.

    Rounds are committed to `args.output_dir/rounds`: the same call, after a kill, goes on behind the last whole round
    and ends bit for bit where it would have ended. An upload that is corrupt (NaN, another shape, another round)
    raises and leaves model and rounds as they were before that round.

    Args:
        args: device, precision and folder of all Trainer runs; what [`Fit`] names comes from the plan.
        arm: the method, or one of its baselines: a key of `ARMS`.
        trained: phases 1 and 2 are done already, by [`train_cloud`].
        budget: checked on what the device computes with before anything is trained or sent; not for the oracle.
        transport: what lies between device and cloud: bytes in, bytes out.

    Raises:
        DeviceBudgetError: the package does not fit; nothing was sent.
        UploadError: an upload was refused.
        ValueError: an unknown arm, or a folder that holds the rounds of another arm, plan, budget, data (see
            [`fingerprint_of`]) or model configuration.
    """
    if arm not in ARMS:
        raise ValueError(f"arm {arm!r} is not known. Choose one of {', '.join(ARMS)}.")
    setting = Setting(model=model, plan=plan, data=data, args=args, budget=budget, transport=transport)
    store = RoundStore(Path(args.output_dir) / "rounds")
    described = {"arm": arm, "plan": plan.to_json(), "data": data.fingerprints(), "model": _digest_of(model)}
    described = json.loads(json.dumps(described | {"budget": asdict(budget) if budget else None}))
    last = store.latest()
    if last is None:
        side, history, cost = _started(setting, store, described, trained)
    else:
        side, history, cost = _resumed(setting, store, last, described)
    try:
        for turn in range(len(history), plan.rounds + 1 if side.changes else 1):
            started = time.perf_counter()
            side.round(turn)
            history.append(_measured(side, data, turn, started))
            logger.info(f"{arm}: {history[-1]}")
            _commit(store, side, turn, described, history)
    finally:
        for one in (model, side.model):
            one.train_all()
    return DcCclRun(model=side.model, history=history, meter=setting.meter, cost=cost, seconds=setting.seconds)


def _started(
    setting: Setting, store: RoundStore, described: dict[str, Any], trained: bool
) -> tuple[Arm, list[dict[str, Any]], DeviceCost | None]:
    side = ARMS[described["arm"]](setting)
    cost = side.cost()
    if not trained:
        train_cloud(setting.model, setting.plan, setting.data, setting.args)
    side.start()
    side.attach()
    history = [_measured(side, setting.data, 0, time.perf_counter())]
    _commit(store, side, 0, described, history, whole=True)
    return side, history, cost


def _resumed(
    setting: Setting, store: RoundStore, last: int, described: dict[str, Any]
) -> tuple[Arm, list[dict[str, Any]], DeviceCost | None]:
    changed, record = store.load(last)
    other = [name for name in described if record["run"].get(name) != described[name]]
    if other:
        raise ValueError(f"{store.folder} holds rounds of another {' and '.join(other)}. Give another output_dir.")
    logger.warning(f"Going on behind round {last} of {store.folder.parent.name}.")
    setting.model.load_state_dict(store.load(0)[0]["model"])
    setting.meter.load_state_dict(record["wire"])
    setting.seconds.update(record["seconds"])
    side = ARMS[described["arm"]](setting)
    cost = side.cost()
    side.restore({name: value for name, value in changed.items() if name != "model"})
    return side, record["history"], cost


def _commit(
    store: RoundStore,
    side: Arm,
    turn: int,
    described: dict[str, Any],
    history: list[dict[str, Any]],
    *,
    whole: bool = False,
) -> None:
    tensors = copy.copy(side.state())
    if whole:
        tensors["model"] = side.setting.model.state_dict()
    record = {
        "run": described,
        "history": history,
        "wire": side.setting.meter.state_dict(),
        "seconds": side.setting.seconds,
    }
    store.commit(turn, tensors, record)


def _measured(side: Arm, data: DcCclData, turn: int, started: float) -> dict[str, Any]:
    totals = side.setting.meter.totals()
    whole, gaps = side.setting.model, {}
    if turn == 0:  # of what is frozen from here on
        sets = {"held_out": data.held_out, "device": data.device}
        gaps = {name: measured_gap(whole, dataset) for name, dataset in sets.items() if dataset is not None}
    return {
        "round": turn,
        "served": side.accuracy(side.model, data.test, side.served),
        "device": side.accuracy(side.device, data.test, side.on_device),
        "user": side.accuracy(side.model, data.device_test, side.served),
        "validation": side.accuracy(side.model, data.validation, side.served),
        "bytes_up": totals["up"],
        "bytes_down": totals["down"],
        "control_gap": gaps,
        "seconds": time.perf_counter() - started,
    }


__all__ = ["DcCclRun", "cloud_record", "run_dc_ccl", "train_cloud"]
