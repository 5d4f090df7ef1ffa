r"""MSign (arXiv 2602.01734, algorithm 1): any optimizer, and every P steps the weights themselves are restored.

    base.step()
    if t mod P == 0:   W <- (||W||_F / ||sign(W)||_F) sign(W)   for each target

`t` counts optimizer steps from 1, so that the first application comes after step P. The state of the base optimizer
is not touched. The paper tests AdamW only; Muon orthogonalises updates where MSign orthogonalises weights, and both
together are an experiment of ours.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from .muon import MuonAdamW
from .ranks import MatrixReport, restore_weights
from .restoration import RestorationOptions
from .targets import MatrixTarget, Selection, Split, select_targets


logger = logging.get_logger(__name__)

TRIGGERS = (None, "stable_rank")


class MSign(torch.optim.Optimizer):
    """Wraps `base` and has its groups and state: schedulers, clipping, scalers and checkpoints see one optimizer.

    Options and the step counter are kept in the parameter groups under `msign_*`, which every kind of checkpoint
    carries, those of FSDP2 included; like a learning rate, what is loaded wins over what was given. A group may have
    values of its own. A step that a GradScaler skips is not counted.

    Args:
        base: any optimizer. It updates the weights that are restored: where fp32 masters are kept, those must be its
            parameters, as they are under autocast and FSDP2's mixed precision.
        targets: from [`select_targets`]; all of them parameters of `base`.
        period: steps between applications (P). The paper: 100 for all; 10 hurts quality, 100,000 prevents nothing.
        rescale: `"frobenius"` (the paper's), `"spectral"`, `"nuclear"` or `"none"`.
        backend, rtol: how signs are computed: see `sigma_kernels.polar_with_rank`.
        start_step, stop_step: first and last step (inclusive) at which weights may be restored.
        trigger: `None`: every target at every application (the paper's); `"stable_rank"` (ours): of them, only
            matrices whose stable rank is below `srank_threshold * min(m, n)`.
        srank_threshold: for that trigger. A random square matrix has 0.25.
        process_group: the ranks that hold the same plain tensors, which share the work; `"world"`: all of them;
            `None`: each rank by itself. DTensors know theirs.

    Raises:
        TypeError: `base` is no optimizer.
        ValueError: an option out of its range; no targets, or one that `base` does not have; when it steps, weights
            that are flattened into shards.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        targets: Sequence[MatrixTarget],
        *,
        period: int = 100,
        rescale: str = "frobenius",
        backend: str = "auto",
        rtol: float | None = None,
        start_step: int = 0,
        stop_step: int | None = None,
        trigger: str | None = None,
        srank_threshold: float = 0.1,
        process_group: "dist.ProcessGroup | str | None" = "world",
    ):
        if not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"base is a {type(base).__name__}: give an optimizer of torch.")
        require_schedule(period, start_step, stop_step, trigger)
        RestorationOptions(rescale=rescale, backend=backend, rtol=rtol, below=srank_threshold)
        options = {"step": 0, "period": period, "start_step": start_step, "stop_step": stop_step}
        options |= {"rescale": rescale, "rtol": rtol, "srank_threshold": srank_threshold if trigger else None}
        # As torch does for an optimizer that was not built by __init__: groups and state are those of `base`.
        super().__setstate__({"base": base, "last_report": {}, "_backend": backend, "_process_group": process_group})
        self._options = {f"msign_{key}": value for key, value in options.items()}
        self._targets = self._located(targets)
        self._complete_groups()

    def _located(self, targets: Sequence[MatrixTarget]) -> list[tuple[int, int, MatrixTarget]]:
        """Group and place of each target: FSDP2 and others put new parameters there."""
        places = {id(p): (g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])}
        if not targets:
            raise ValueError("targets is empty: MSign would do nothing. Use select_targets(model, ...).")
        for target in targets:
            if id(target.parameter) not in places:
                raise ValueError(
                    f"{target.name} is no parameter of the base optimizer. Select the targets from the same model, "
                    "before or after it is wrapped, as for the optimizer."
                )
        # Without the parameters: they would keep alive what sharding has replaced.
        return [(*places[id(t.parameter)], MatrixTarget(t.name, t.parts, t.dim)) for t in targets]

    param_groups = property(
        lambda self: self.base.param_groups, lambda self, new: setattr(self.base, "param_groups", new)
    )
    state = property(lambda self: self.base.state, lambda self, new: setattr(self.base, "state", new))
    defaults = property(lambda self: self.base.defaults, lambda self, new: setattr(self.base, "defaults", new))

    @property
    def steps(self) -> int:
        """Optimizer steps that were taken, over all resumed runs."""
        return self.param_groups[0]["msign_step"]

    @property
    def targets(self) -> list[MatrixTarget]:
        """What is restored, with the parameters that the optimizer has now."""
        groups = self.param_groups
        return [MatrixTarget(t.name, t.parts, t.dim, groups[g]["params"][i]) for g, i, t in self._targets]

    def step(self, closure: Callable[[], Any] | None = None):
        """A step of the base optimizer and, every `period` steps, an application. Returns the closure's loss."""
        rates = [group.get("lr", 1.0) for group in self.param_groups]
        # torch.distributed.checkpoint takes such a step to create the state that it loads into.
        creates_state = not self.state and not any(rates)
        loss = self.base.step(closure)
        for group in self.param_groups:
            group["msign_step"] += 1
        if not creates_state:
            self._apply_if_due()
        return loss

    @torch.no_grad()
    def _apply_if_due(self) -> None:
        due: dict[RestorationOptions, list] = {}
        for g, i, target in self._targets:
            group = self.param_groups[g]
            if is_due(group["msign_step"], *(group[f"msign_{key}"] for key in ("period", "start_step", "stop_step"))):
                options = RestorationOptions(
                    rescale=group["msign_rescale"],
                    backend=self._backend,
                    rtol=group["msign_rtol"],
                    below=group["msign_srank_threshold"],
                )
                due.setdefault(options, []).append((target, group["params"][i]))
        if due:
            self.last_report: dict[str, MatrixReport] = {}
        for options, jobs in due.items():
            self.last_report |= restore_weights(jobs, options, self._process_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict) -> None:
        """Add weights to the base optimizer; none of them is a target."""
        self.base.add_param_group(param_group)
        self._complete_groups()

    def state_dict(self) -> dict:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` returned. One of the base optimizer alone is taken, too; its steps count as 0."""
        self.base.load_state_dict(state_dict)
        if any("msign_step" not in group for group in self.param_groups):
            logger.warning("The checkpoint has no MSign in it: its steps are counted from 0.")
        self._complete_groups()

    def _complete_groups(self) -> None:
        steps = max(group.get("msign_step", 0) for group in self.param_groups)
        for group in self.param_groups:
            for key, value in (self._options | {"msign_step": steps}).items():
                group.setdefault(key, value)

    def __getstate__(self) -> dict:
        # Schedulers put a `step` of theirs in front.
        ours = ("base", "last_report", "_backend", "_process_group", "_options", "_targets")
        return {key: self.__dict__[key] for key in ours}


class MSignAdamW(MSign):
    """AdamW with MSign, for all trainable weights of `model`; those with weight decay as the Trainer chooses them.

    Args:
        model: before or after it is wrapped or sharded.
        lr, betas, eps, weight_decay: of AdamW; the paper's are the defaults, but for `lr`, which it sets per model.
        targets, split: of [`select_targets`].
        options: of [`MSign`].
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        targets: Selection = "attention",
        split: Mapping[str, Split] | None = None,
        **options,
    ):
        base = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps)
        super().__init__(base, select_targets(model, targets, split=split), **options)


class MSignFactory:
    """What the Trainer builds MSign with: `Trainer(..., optimizer_cls_and_kwargs=MSignFactory.for_trainer(args))`.

    The Trainer calls `MSignFactory()(model, **kwargs)`, since it gives parameters without names to optimizer classes.
    """

    @classmethod
    def for_trainer(cls, args: TrainingArguments, **options) -> tuple[type["MSignFactory"], dict]:
        """The tuple for the Trainer, with the learning rate, betas, epsilon and weight decay of `args`."""
        base = options.get("base", "adamw")
        if isinstance(base, str):
            options.setdefault("betas", (args.adam_beta1, args.adam_beta2))
            options.setdefault("eps", args.adam_epsilon)
        return cls, {"lr": args.learning_rate, "weight_decay": args.weight_decay, **options}

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        base: str | type[torch.optim.Optimizer] = "adamw",
        targets: Selection = "attention",
        split: Mapping[str, Split] | None = None,
        **options,
    ) -> MSign:
        """MSign around a new base optimizer for `model`.

        Args:
            lr, weight_decay: of the base; weights without decay are those that the Trainer leaves out, too.
            base: `"adamw"`; `"muon"`: Muon for the 2-D matrices of the blocks, AdamW for the rest; or a class, called
                with parameter groups, `lr` and what is left of `options`.
            targets, split: of [`select_targets`].
            options: of [`MSign`] and of the base optimizer (`betas`, `eps`, `momentum`).

        Raises `ValueError` for another base, and what [`MSign`] and [`select_targets`] raise.
        """
        known = {"adamw": torch.optim.AdamW, "muon": MuonAdamW}
        if isinstance(base, str) and base not in known:
            raise ValueError(f"base={base!r} is not known. Choose 'adamw' or 'muon', or give an optimizer class.")
        of_msign = {key: options.pop(key) for key in list(options) if key in MSign.__init__.__kwdefaults__}
        muon = {id(t.parameter) for t in select_targets(model, "all_2d")} if base == "muon" else None
        groups = parameter_groups(model, weight_decay, muon=muon)
        optimizer = known.get(base, base)(groups, lr=lr, **options)
        return MSign(optimizer, select_targets(model, targets, split=split), **of_msign)


def parameter_groups(model: nn.Module, weight_decay: float, *, muon: set[int] | None = None) -> list[dict]:
    """The trainable weights of `model` in the Trainer's groups: with `weight_decay`, and without (biases and norms).

    Weights on different device meshes (expert parallelism) get groups of their own, as there. `muon`: ids of weights
    for Muon, which takes 2-D ones only; the groups then say `use_muon`.
    """
    # It does not look at its trainer, and another version may draw the line elsewhere.
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    groups: dict[tuple, dict] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        use_muon = muon is not None and id(p) in muon and p.ndim == 2
        mesh = p.device_mesh if isinstance(p, DTensor) else None
        group = {"params": [], "weight_decay": weight_decay if name in decayed else 0.0}
        if muon is not None:
            group["use_muon"] = use_muon
        groups.setdefault((name not in decayed, use_muon, mesh), group)["params"].append(p)
    # In the Trainer's order, so that its checkpoints of another optimizer's groups fit.
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0][:2])]


def is_due(step: int, period: int, start_step: int, stop_step: int | None) -> bool:
    """Whether weights are restored after optimizer step number `step`, the first being 1."""
    return step > 0 and step % period == 0 and start_step <= step and (stop_step is None or step <= stop_step)


def require_schedule(period: int, start_step: int, stop_step: int | None, trigger: str | None) -> None:
    """Raise `ValueError` if these options of [`MSign`] are out of range."""
    if not isinstance(period, int) or period < 1:
        raise ValueError(f"period={period!r} is not a number of steps of at least 1.")
    if start_step < 0 or (stop_step is not None and stop_step < start_step):
        raise ValueError(f"start_step={start_step} and stop_step={stop_step} are not 0 <= start <= stop.")
    if trigger not in TRIGGERS:
        raise ValueError(f"trigger={trigger!r} is not known. Choose one of {TRIGGERS}.")


__all__ = ["MSign", "MSignAdamW", "MSignFactory", "is_due", "parameter_groups", "require_schedule"]
