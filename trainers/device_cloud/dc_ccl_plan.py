"""How long and how fast each phase of DC-CCL trains."""

import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .dc_ccl import Phase1Loss


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One Trainer run. `max_steps` goes before `epochs`; every run starts a fresh optimizer."""

    learning_rate: float
    max_steps: int = -1
    epochs: float = 1.0
    batch_size: int = 32
    optim: str = "adamw_torch"
    optim_args: str | None = None
    weight_decay: float = 0.0
    schedule: str = "constant"

    def arguments(self, base: TrainingArguments, *, seed: int, rate_factor: float = 1.0) -> TrainingArguments:
        """`base` with the values of this run; it saves nothing and logs in silence."""
        return replace(
            base,
            output_dir=str(Path(base.output_dir) / "trainer"),
            learning_rate=self.learning_rate * rate_factor,
            max_steps=self.max_steps,
            num_train_epochs=self.epochs,
            per_device_train_batch_size=self.batch_size,
            optim=self.optim,
            optim_args=self.optim_args,
            weight_decay=self.weight_decay,
            lr_scheduler_type=self.schedule,
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            resume_from_checkpoint=None,
        )


@dataclass(frozen=True, kw_only=True)
class DcCclPlan:
    """The phases of a run.

    Args:
        cloud, control: phases 1 and 2, on the cloud.
        co_cloud, co_device: one round on either side. Equal `weights` presume about as many steps on both.
        head: the tuning of the co-submodel's last linear layer after each average, on the device; `None` for none.
        rounds: how many.
        weights: of the cloud's and the device's state in the average.
        late_from, late_factor: from that round on, rates are multiplied by the factor (0.5 from the ninth on in the
            first author's code). `None`: never.
        phase1_loss: as in [`DcCclTrainer`].
        cache: frozen logits are computed once; not for augmented images.
        seed: of everything that is drawn.
    """

    cloud: Fit
    control: Fit
    co_cloud: Fit
    co_device: Fit
    head: Fit | None = None
    rounds: int = 10
    weights: tuple[float, float] = (0.5, 0.5)
    late_from: int | None = None
    late_factor: float = 0.5
    phase1_loss: Phase1Loss | None = None
    cache: bool = True
    seed: int = 0

    def seed_of(self, phase: str, turn: int) -> int:
        """A seed for one Trainer run: the same in a run that was interrupted and in one that was not."""
        return zlib.crc32(f"{self.seed}/{phase}/{turn}".encode()) % 2**31

    def rate_factor(self, turn: int) -> float:
        """What learning rates of a round are multiplied by."""
        return self.late_factor if self.late_from is not None and turn >= self.late_from else 1.0

    def both(self) -> Fit:
        """A round of an arm that trains in one place: the steps of both sides, at the cloud's rate."""
        steps = max(self.co_cloud.max_steps, 0) + max(self.co_device.max_steps, 0)
        return replace(self.co_cloud, max_steps=steps or -1)

    def to_json(self) -> dict[str, Any]:
        """As JSON has it, for the record of a run."""
        return asdict(self) | {"weights": list(self.weights)}


__all__ = ["DcCclPlan", "Fit"]
