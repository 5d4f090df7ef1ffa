"""What a round is: of DC-CCL, and of the methods that it is compared with.

| arm | what learns from the device's data | what crosses the wire |
|---|---|---|
| `dc_ccl` | F_s under G's control, on both sides, averaged | G, E and F_s once; F_s up and down each round |
| `distr_true` | the same with the true F_c on the "device": an oracle | F_c too, which the device could not hold |
| `fedavg_small` | the same with no control: the small model alone | as DC-CCL, without G |
| `cloud_only` | nothing | G, E and F_s once |
| `central` | everything, from raw data on the cloud: an upper bound | the device's rows |
| `device_only` | the small model alone, on the device | nothing |
| `kd_uplink` | F_c, distilled on cloud rows from the device's F_s | E, F_s and public rows once; F_s up each round |
| `split_learning` | F_c and F_s on the cloud | E once; features and labels of every device batch |

The baselines are our readings of their names; the last two are after FedMD and split learning, with the parts that
all arms share.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset
from transformers import PrinterCallback, TrainingArguments, set_seed

from hf_models.dc_ccl import DcCclForCausalLM, DcCclForImageClassification, DcCclPreTrainedModel

from ..federated.core import Upload, UploadError, WireMeter, check_upload, received_upload, unpack
from .budget import DeviceBudget, DeviceCost, device_cost
from .dc_ccl import DcCclTrainer, frozen_submodel
from .dc_ccl_data import (
    DcCclData,
    WithColumn,
    accuracy,
    average_states,
    columns,
    features_of,
    labels_of,
    logits_of,
    state_of,
)
from .dc_ccl_plan import DcCclPlan, Fit


DEVICE = "device"
State = dict[str, dict[str, torch.Tensor]]
DcCclModel = DcCclForImageClassification | DcCclForCausalLM


@dataclass(kw_only=True)
class Setting:
    """What all arms are given. `transport` is what lies between a device and the cloud: bytes in, bytes out;
    `seconds` is the training time of each side so far."""

    model: DcCclModel
    plan: DcCclPlan
    data: DcCclData
    args: TrainingArguments
    budget: DeviceBudget | None = None
    transport: Callable[[bytes], bytes] = bytes
    meter: WireMeter = field(default_factory=WireMeter)
    seconds: dict[str, float] = field(default_factory=dict)
    _kept: dict[tuple[int, str], WithColumn] = field(default_factory=dict)

    def fit(
        self,
        model: DcCclPreTrainedModel,
        phase: str,
        fit: Fit,
        dataset: Dataset,
        *,
        turn: int,
        trainer: type[DcCclTrainer] = DcCclTrainer,
        **options: Any,
    ) -> None:
        """One run of a `trainer`, seeded by the plan, the phase and the `turn`."""
        started = time.perf_counter()
        args = fit.arguments(self.args, seed=self.plan.seed_of(phase, turn), rate_factor=self.plan.rate_factor(turn))
        options["cache"] = self.plan.cache
        if phase in ("co", "head"):  # what is frozen then is the same in every round
            dataset = self.with_kept_logits(model, dataset, options.get("branch", "device"))
            options["cache"] = False
        run = trainer(model, args, phase=phase, train_dataset=dataset, **options)
        run.remove_callback(PrinterCallback)  # a line for each of hundreds of runs
        run.train()
        side = "cloud" if model is self.model else DEVICE
        self.seconds[side] = self.seconds.get(side, 0.0) + time.perf_counter() - started

    def with_kept_logits(self, model: DcCclPreTrainedModel, dataset: Dataset, branch: str) -> Dataset:
        """`dataset` with the logits of what is frozen in `branch` while only the co-submodel learns, computed once."""
        frozen = frozen_submodel(model, "co", branch)
        if frozen is None or not self.plan.cache:
            return dataset
        column, submodel = frozen
        key = (id(dataset), submodel)  # the data set is held by what is kept, so the id stays its own
        if key not in self._kept:
            self._kept[key] = WithColumn(dataset, column, logits_of(model, dataset, submodel))
        return self._kept[key]

    def up(self, tensors: Mapping[str, torch.Tensor], turn: int, what: str, like: Mapping[str, torch.Tensor]) -> dict:
        """Send an upload and check what arrives against `like`. `UploadError` if it may not be used."""
        upload = Upload(round=turn, sender=DEVICE, tensors=tensors, num_samples=len(self.data.device))
        payload = self.meter.send(
            upload.tensors, direction="up", round=turn, user=DEVICE, what=what, metadata=upload.metadata
        )
        received = received_upload(self.transport(payload), sender=DEVICE)
        check_upload(received, expected=like, round=turn)
        return dict(received.tensors)

    def down(self, tensors: Mapping[str, torch.Tensor], turn: int, what: str) -> dict[str, torch.Tensor]:
        """Send something down, and what arrives."""
        return unpack(self.meter.send(tensors, direction="down", round=turn, user=DEVICE, what=what))[0]


class Arm:
    """One way of learning from a device's data.

    Attributes:
        served, on_device (`str`): the branches that answer on the cloud and, where there is something, on the device.
        trains (`str`): the phase that is trained on the device; `None` where none is.
        changes (`tuple[str, ...]`): the parts of the cloud's model that rounds change.
        within_budget (`bool`): whether what lies on the device has to fit it.
    """

    served: str = "serve"
    on_device: str | None = "device"
    trains: str | None = None
    changes: tuple[str, ...] = ("co_submodel",)
    within_budget: bool = True

    def __init__(self, setting: Setting):
        self.setting = setting
        self.model = setting.model
        self.device: DcCclPreTrainedModel = self.model
        self.tuning = setting.data.tuning

    def cost(self) -> DeviceCost | None:
        """Of what the device computes with, one row at a time: of training where it trains, else of answering. `None`
        where it holds no submodel. `DeviceBudgetError` for what does not fit."""
        if self.on_device is None:
            return None
        device, branch = self._new_device(), self._computed()
        for name in set(device.config.submodel_configs) - set(device.submodels_of(branch)):
            setattr(device, name, nn.Identity())
        if self.trains is not None:
            device.set_phase(self.trains)
        row = {name: torch.as_tensor(value)[None].clone() for name, value in self.setting.data.device[0].items()}
        example = {name: value.to(device.device) for name, value in row.items()} | {"branch": branch}
        measure = device_cost
        if self.setting.budget is not None and self.within_budget:
            measure = self.setting.budget.check
        return measure(device, example, training=self.trains is not None)

    def _new_device(self) -> DcCclPreTrainedModel:
        return self.model.device_package()

    def _computed(self) -> str:
        """The branch that the device computes."""
        return self.on_device

    def start(self) -> None:
        """What crosses the wire before the first round."""

    def attach(self) -> None:
        """Make the device's side out of the cloud's state, at the start and after a kill."""

    def accuracy(self, model: DcCclPreTrainedModel, dataset: Dataset | None, branch: str | None) -> float | None:
        """Of a `branch` of the cloud's or the device's model; `None` where there is nothing to ask."""
        if dataset is None or branch is None:
            return None
        if self.changes == ("co_submodel",):
            dataset = self.setting.with_kept_logits(model, dataset, branch)
        return accuracy(model, dataset, branch)

    def round(self, turn: int) -> None:
        """Round `turn`, from 1 on."""

    def state(self) -> State:
        """What rounds have changed, to be kept; `restore` takes it."""
        parts = {name: getattr(self.model, name) for name in self.changes}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def restore(self, state: State) -> None:
        """Go on from a `state`, the device's side included."""
        for name, tensors in state.items():
            getattr(self.model, name).load_state_dict(tensors)
        self.attach()


class Controlled(Arm):
    """DC-CCL's round; with another `branch` the oracle, or federated averaging of the small model."""

    branch = "device"
    trains = "co"

    def start(self) -> None:
        self.setting.down(self._package(self._new_device()), 0, "package")
        if self.setting.plan.head is not None:
            self.setting.down(columns(self.setting.data.public), 0, "public rows")

    def _new_device(self) -> DcCclPreTrainedModel:
        return copy.deepcopy(self.model) if self.branch == "serve" else super()._new_device()

    def _computed(self) -> str:
        return self.branch

    def _package(self, device: DcCclPreTrainedModel) -> dict[str, torch.Tensor]:
        """Of the device's model what this branch needs."""
        needed = ("shared_encoder", *device.submodels_of(self.branch))
        return {key: value for key, value in state_of(device).items() if key.split(".")[0] in needed}

    def attach(self) -> None:
        self.device = self._new_device()

    def round(self, turn: int) -> None:
        before = copy.deepcopy(self.model.co_submodel.state_dict())
        try:
            self._average(turn)
            if self.setting.plan.head is not None:
                self._tune_head(turn)
        except UploadError:
            self.model.co_submodel.load_state_dict(before)
            self.attach()
            raise

    def _average(self, turn: int) -> None:
        run, plan, data = self.setting, self.setting.plan, self.setting.data
        run.fit(self.device, "co", plan.co_device, data.device, turn=turn, branch=self.branch)
        theirs = run.up(self.device.co_state(), turn, "co-submodel", self.model.co_state())
        run.fit(self.model, "co", plan.co_cloud, data.cloud, turn=turn, branch=self.branch)
        average = average_states([self.model.co_state(), theirs], plan.weights)
        self.model.load_co_update(average)
        self.device.load_co_update(run.down(average, turn, "co-submodel"))

    def _tune_head(self, turn: int) -> None:
        """On the device, on its own rows and the few public ones: none of its own goes up."""
        run = self.setting
        run.fit(self.device, "head", run.plan.head, self.tuning, turn=turn, branch=self.branch)
        head = run.up(self.device.head_state(), turn, "head", self.model.head_state())
        self.model.load_co_update(self.model.co_state() | head)


class Oracle(Controlled):
    """The true F_c on the "device"."""

    branch = "serve"
    within_budget = False


class FedAvgSmall(Controlled):
    """No control model: G = 0."""

    branch = served = on_device = "co"


class CloudOnly(Arm):
    """Phases 1 and 2, and no more."""

    served, on_device, changes = "cloud", "control", ()

    def start(self) -> None:
        self.setting.down(state_of(self.model.device_package()), 0, "package")


class Central(Arm):
    """All that is served, trained on all data, for as many steps as both sides together take."""

    on_device = None
    changes = ("shared_encoder", "cloud_submodel", "co_submodel")

    def start(self) -> None:
        self.setting.meter.send(columns(self.setting.data.device), direction="up", user=DEVICE, what="raw data")

    def round(self, turn: int) -> None:
        data, plan = self.setting.data, self.setting.plan
        both = ConcatDataset([data.cloud, data.device])
        self.setting.fit(self.model, "joint", plan.both(), both, turn=turn, branch="serve")


class DeviceOnly(Arm):
    """The small model and an encoder of its own, on the device's data alone, from random weights."""

    served = on_device = "co"
    trains = "alone"
    changes = ("shared_encoder", "co_submodel")

    def attach(self) -> None:
        set_seed(self.setting.plan.seed_of("alone", 0))
        self.device = type(self.model)(self.model.config).device_package()
        self.model = self.device  # nothing else is there to be asked

    def restore(self, state: State) -> None:
        self.attach()
        for name, tensors in state.items():
            getattr(self.device, name).load_state_dict(tensors)

    def round(self, turn: int) -> None:
        run = self.setting
        run.fit(self.device, "alone", run.plan.co_device, run.data.device, turn=turn)


class KdUplink(Arm):
    """The device's small model, trained on its own and the public rows, teaches the cloud's large one on the cloud's
    rows. Its head is tuned as in the other arms."""

    served, on_device = "cloud", "co"
    trains = "co"
    changes = ("cloud_submodel", "co_submodel")

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self._shown = ConcatDataset([setting.data.public, setting.data.device])

    def start(self) -> None:
        package = state_of(self.model.device_package())
        kept = {key: value for key, value in package.items() if not key.startswith("control_model.")}
        self.setting.down(kept, 0, "package")
        self.setting.down(columns(self.setting.data.public), 0, "public rows")

    def attach(self) -> None:
        self.device = self._new_device()

    def round(self, turn: int) -> None:
        run, plan = self.setting, self.setting.plan
        run.fit(self.device, "co", plan.co_device, self._shown, turn=turn, branch="co")
        if plan.head is not None:
            run.fit(self.device, "head", plan.head, self.tuning, turn=turn, branch="co")
        theirs = run.up(self.device.co_state(), turn, "co-submodel", self.model.co_state())
        self.model.load_co_update(theirs)
        run.fit(self.model, "teach", plan.co_cloud, run.data.cloud, turn=turn, phase1_loss=plan.phase1_loss)


class SplitLearning(Arm):
    """The device sends what the frozen shared encoder makes of each of its batches, and the labels."""

    on_device = None
    changes = ("cloud_submodel", "co_submodel")

    def __init__(self, setting: Setting):
        super().__init__(setting)
        if self.model.shared_encoder is None:
            raise ValueError("split learning cuts the model behind its shared encoder, and this one has none.")

    def start(self) -> None:
        self.setting.down(self.model.shared_encoder.state_dict(), 0, "package")

    def attach(self) -> None:
        data = self.setting.data
        sides = [FeatureRows(features_of(self.model, side), labels_of(side)) for side in (data.cloud, data.device)]
        self._rows = ConcatDataset(
            [WithColumn(side, "sent", torch.full((len(side),), sent)) for side, sent in zip(sides, (False, True))]
        )

    def round(self, turn: int) -> None:
        def send(sent: dict[str, torch.Tensor]) -> None:
            self.setting.meter.send(sent, direction="up", round=turn, user=DEVICE, what="features")

        plan, trainer = self.setting.plan, FeatureTrainer
        self.setting.fit(
            self.model, "upper", plan.both(), self._rows, turn=turn, branch="serve", trainer=trainer, send=send
        )


class FeatureTrainer(DcCclTrainer):
    """A trainer on features, of which each step's are sent that a device has: rows whose `sent` is true."""

    def __init__(self, *args: Any, send: Callable[[dict[str, torch.Tensor]], None], **options: Any):
        super().__init__(*args, **options)
        self._send = send

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """The loss, after the device's rows of the batch were sent. Here and not where batches are made: some are
        made that no step takes, and in other processes."""
        inputs = dict(inputs)
        of_device = inputs.pop("sent").bool()
        if model.training and of_device.any():
            self._send({name: tensor[of_device] for name, tensor in inputs.items()})
        return super().compute_loss(model, inputs, *args, **options)


class FeatureRows(Dataset):
    """What a shared encoder made of images, and their labels."""

    def __init__(self, features: torch.Tensor, labels: torch.Tensor):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"shared_features": self.features[index], "labels": self.labels[index]}


ARMS: dict[str, type[Arm]] = {
    "dc_ccl": Controlled,
    "cloud_only": CloudOnly,
    "central": Central,
    "device_only": DeviceOnly,
    "fedavg_small": FedAvgSmall,
    "distr_true": Oracle,
    "kd_uplink": KdUplink,
    "split_learning": SplitLearning,
}

__all__ = ["ARMS", "Arm", "Setting"]
