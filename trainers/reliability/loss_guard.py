"""NaN and infinities on the rank where they arise, before an all-reduce spreads them and Trainer's log hides them.

After the checks of the SIGMA stack and of Megatron on the *local* loss before any reduction (arXiv 2512.13488,
section 4 of our digest). Trainer's callbacks see reduced, delayed numbers, in which `logging_nan_inf_filter` replaces
NaN; here hooks look at every micro-batch.
"""

import hashlib
import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.autograd import Variable
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback
from transformers.utils import logging

from .agreement import any_rank, from_all_ranks
from .events import EventLog
from .rerun import Snapshot, Suspicion, clear_suspicion, diagnose, exit_code, loss_of, read_suspicion
from .rollback import RollbackRequested


logger = logging.get_logger(__name__)
COMPONENT = "loss_guard"
Policy = Literal["raise", "skip", "rollback"]
SHOWN_PARAMETERS = 5
WATCH = "_hf_sigma_reduction_watch"  # attribute of the DDP object, which takes one hook in its life


class NonFiniteLossError(RuntimeError):
    """Raised on all ranks in the same step; `accused`: what each rank that saw NaN or infinity reports."""

    def __init__(self, message: str, accused: list[dict[str, Any]]):
        super().__init__(message)
        self.accused = accused


@dataclass
class _MicroBatch:
    """What is kept of a forward until the optimizer step; tensors stay on their device, unread."""

    index: int
    inputs: dict[str, Any]
    snapshot: Snapshot | None = None
    loss: torch.Tensor | None = None
    norms: list[tuple[list[str], torch.Tensor]] = field(default_factory=list)  # of each gradient


class LocalLossGuardCallback(TrainerCallback):
    """Find NaN and infinities in the local loss and in local gradients, name the rank, and act on all ranks together.

    *Where it looks.* A forward hook on the model without its wrappers keeps the loss of every training forward, as a
    tensor. Gradients are looked at where they are still this rank's own: at the end of every backward that reduces
    nothing (one process, accumulation under DDP's `no_sync`), and in a communication hook of DDP, bucket by bucket,
    before the all-reduce. That hook averages as DDP does (`allreduce_hook`: divides, then sums; the same bits for
    powers of two) and stays with the DDP object. Under FSDP, and where DDP has another communication hook, gradients
    are seen reduced, and no rank is accused for them.

    *Where ranks agree.* In `on_pre_optimizer_step`, whatever they saw before: backward and all-reduce have been
    entered and left by all, NaN or not, and every rank makes the same calls there. This costs a read of the device and
    an all-reduce of one number per optimizer step.

    *What happens then*, by `policy`:

    - `"raise"`: [`NonFiniteLossError`] on all ranks.
    - `"skip"`: all gradients become `None`, so that the optimizer does nothing, no decay and no moments, on any rank.
      The step counts, and the learning-rate schedule goes on. What forwards have counted (routing windows, and with
      them the loss-free expert bias) is kept. More than `max_consecutive_skips` in a row raise.
    - `"rollback"`: [`RollbackRequested`] on all ranks, for [`~trainers.reliability.rollback.train_with_rollback`].

    Each accused rank writes an event: device, micro-batch of the step, loss, parameters with bad gradients, and a
    digest of the batch (SHA-256 of its main input, the first 16 digits).

    With fp16 and a gradient scaler infinite gradients are how the scaler finds its scale: gradients are not checked.
    A model whose forward itself reduces over ranks (balance losses of the global batch) may show the NaN of one rank
    in the loss of all; then all are accused. A loss that Trainer forms (`compute_loss_func`, label smoothing) is not
    seen here, its gradients are.

    Args:
        policy: see above.
        check_gradients: look at gradients too; the loss may be finite where its gradient is not.
        max_consecutive_skips: of the policy `"skip"`.
        diagnose: repeat the micro-batch that is accused once, on all ranks ([`~trainers.reliability.rerun.diagnose`]),
            and write `transient` or `reproducible` into the event. Keeps the arguments of a step's micro-batches.
        exit_codes: with `diagnose`: leave a reproducible fault to another machine: the process exits with code 16, and
            with 17 if another machine had found the same (see `rerun`). Needs a run that is started again from a
            checkpoint before that step.

    Raises:
        ValueError: an unknown policy, `exit_codes` without `diagnose`; when training begins, several devices in one
            process, or DeepSpeed, which keeps gradients to itself.
    """

    def __init__(
        self,
        policy: Policy = "raise",
        *,
        check_gradients: bool = True,
        max_consecutive_skips: int = 3,
        diagnose: bool = False,
        exit_codes: bool = False,
    ):
        if policy not in get_args(Policy):
            raise ValueError(f"policy={policy!r} is not known. Choose one of {get_args(Policy)}.")
        if exit_codes and not diagnose:
            raise ValueError("exit_codes=True needs diagnose=True: the code says what the diagnosis found.")
        if max_consecutive_skips < 1:
            raise ValueError(f"max_consecutive_skips={max_consecutive_skips}: give 1 or more, or policy='raise'.")
        self.policy, self.check_gradients, self.max_consecutive_skips = policy, check_gradients, max_consecutive_skips
        self.diagnose, self.exit_codes = diagnose, exit_codes
        self.skipped_steps = 0
        self._handles: list[Any] = []

    # --- what the hooks see --------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if args.n_gpu > 1:
            raise ValueError(
                f"n_gpu={args.n_gpu}: one process drives several devices (DataParallel), which have no ranks to "
                "accuse. Start one process per device: accelerate launch."
            )
        kind = AcceleratorState().distributed_type
        if kind == DistributedType.DEEPSPEED:
            raise ValueError("DeepSpeed keeps the gradients to itself, so no step can be skipped here. Use FSDP.")
        self._log = EventLog(args.output_dir, rank=args.process_index)
        self._remove_hooks()  # of a run that ended in an exception
        self._model, self._ddp, self._own = model, None, True
        self._forwards: list[_MicroBatch] = []
        self._micro_step = self._consecutive = 0
        self._suspicion = read_suspicion(args.output_dir) if self.exit_codes else None
        self._looks_at_gradients = self.check_gradients and getattr(optimizer, "scaler", None) is None
        self._names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        if kind == DistributedType.FSDP or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            self._own = False
        self._handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._after))

    def on_step_begin(self, args, state, control, **kwargs):
        self._forwards.clear()
        self._micro_step = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self._micro_step += 1

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hooks()
        if (watch := getattr(self._ddp, WATCH, None)) is not None:
            watch.listener = None

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        snapshot = Snapshot.of(module, args, kwargs) if self.diagnose else None
        name = getattr(module, "main_input_name", "input_ids")
        main = kwargs.get(name, args[0] if args else None)
        self._forwards.append(_MicroBatch(self._micro_step, {name: main}, snapshot))

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not module.training or not self._forwards:
            return
        micro_batch, loss = self._forwards[-1], loss_of(output)
        if loss is None:
            logger.warning_once(f"{type(module).__name__} returned no loss, so {COMPONENT} sees its gradients only.")
        else:
            micro_batch.loss = loss.detach().clone()  # Trainer multiplies it in place
        if self._looks_at_gradients:
            self._join_ddp()
            start = loss if loss is not None else getattr(output, "logits", None)
            if isinstance(start, torch.Tensor) and start.requires_grad:
                start.register_hook(lambda _: Variable._execution_engine.queue_callback(self._after_backward))

    def _join_ddp(self) -> None:
        # A callback is not given the wrapper; while the model runs inside it, torch knows which one it is.
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is None or ddp is self._ddp:
            return
        self._ddp, watch = ddp, getattr(ddp, WATCH, None)
        if watch is None:
            watch = _ReductionWatch(ddp.process_group)
            try:
                ddp.register_comm_hook(watch, _watched_allreduce)
            except RuntimeError as error:
                logger.warning(f"DDP takes no second communication hook ({error}): gradients are checked reduced.")
                self._own = False
                return
            setattr(ddp, WATCH, watch)
        watch.listener = self

    def _after_backward(self) -> None:
        reduces = self._ddp is not None and self._ddp.require_backward_grad_sync
        if self._own and not reduces:
            self.look_at(self._model.parameters(), [parameter.grad for parameter in self._model.parameters()])

    @torch.no_grad()
    def look_at(self, parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> None:
        """Keep the norm of each gradient for the end of the step: NaN and infinities show in it, as in the norm that
        Trainer clips by. On a CPU it takes a twentieth of the time of `isfinite`."""
        known = [
            (self._names.get(id(p), "?"), g.to_local() if isinstance(g, DTensor) else g)
            for p, g in zip(parameters, gradients)
            if g is not None and not g.is_sparse
        ]
        known = [(name, gradient) for name, gradient in known if gradient.numel()]
        if known and self._forwards:
            names, tensors = zip(*known)
            # In fp32: the norm of finite fp16 gradients may be beyond fp16.
            wide = any(tensor.dtype == torch.float64 for tensor in tensors)
            norms = torch._foreach_norm(list(tensors), 2, dtype=None if wide else torch.float32)
            self._forwards[-1].norms.append((list(names), torch.stack([norm.to(norms[0]) for norm in norms])))

    # --- what all ranks decide -----------------------------------------------------------------------------------

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self._looks_at_gradients and not self._own:
            self.look_at(model.parameters(), [parameter.grad for parameter in model.parameters()])
        if not any_rank(self._saw_something(), device=args.device):
            self._consecutive = 0
            self._close_suspicion(args, state)
            return
        report = self._report(args)
        reports = from_all_ranks(report)
        accused = [each for each in reports if each is not None]
        diagnosis, code = self._diagnose(args, state, accused, report)
        if policy_skips := self.policy == "skip":
            self._consecutive += 1
            policy_skips = self._consecutive <= self.max_consecutive_skips
        message = _sentence(accused, state.global_step + 1, diagnosis)
        action = "exit" if code else self.policy if policy_skips or self.policy == "rollback" else "stop"
        if report is not None:
            self._record(state, report, action, message, diagnosis, code)
        if code:
            raise SystemExit(code)
        if policy_skips:
            self._skip(model, optimizer)
        elif self.policy == "rollback":
            raise RollbackRequested(state.global_step, message, args.gradient_accumulation_steps)
        else:
            raise NonFiniteLossError(self._remedy(message), accused)

    def _record(
        self, state, report: dict[str, Any], action: str, message: str, diagnosis: dict[int, str], code: int
    ) -> None:
        label = diagnosis.get(report["rank"])
        self._log.record(
            COMPONENT,
            "warning" if action == "skip" else "fatal" if action in ("stop", "exit") else "error",
            step=state.global_step,
            action=action,
            message=message,
            confidence=1.0 if report["own"] else 0.5,
            evidence={name: value for name, value in report.items() if name not in ("rank", "host", "own")}
            | ({"diagnosis": label} if label else {})
            | ({"exit_code": code} if code else {}),  # launchers end with 1 whatever their workers end with
        )

    def _remedy(self, message: str) -> str:
        if self.policy == "skip":
            return (
                f"{message} {self.max_consecutive_skips} steps in a row have been skipped before (max_consecutive_"
                "skips): the run does not recover by itself. Go back to a checkpoint, with a lower learning rate."
            )
        return f"{message} To go on use policy='skip' or 'rollback', to learn whether it repeats diagnose=True."

    def _skip(self, model: nn.Module, optimizer) -> None:
        self.skipped_steps += 1
        optimized = (p for group in getattr(optimizer, "param_groups", ()) for p in group["params"])
        for parameter in (*model.parameters(), *optimized):
            parameter.grad = None

    def _saw_something(self) -> bool:
        seen = [f.loss.float() for f in self._forwards if f.loss is not None]
        seen += [norms for f in self._forwards for _, norms in f.norms]
        if not seen:
            return False
        device = seen[0].device
        return not bool(torch.stack([value.isfinite().all().to(device) for value in seen]).all())

    def _report(self, args) -> dict[str, Any] | None:
        """What this rank has to say; `None` if all is finite here."""
        for micro_batch in self._forwards:
            loss = None if micro_batch.loss is None else micro_batch.loss.item()
            bad = [
                name
                for names, norms in micro_batch.norms
                for name, finite in zip(names, norms.isfinite().tolist())
                if not finite
            ]
            if (loss is None or math.isfinite(loss)) and not bad:
                continue
            return {
                "rank": args.process_index,
                "host": socket.gethostname(),
                "device": str(args.device),
                "micro_batch": micro_batch.index,
                "loss": loss,
                "seen_in": "gradient" if loss is None or math.isfinite(loss) else "loss",
                "parameters": bad[:SHOWN_PARAMETERS],
                "bad_parameters": len(bad),
                "batch": batch_digest(micro_batch.inputs),
                "own": self._own or (loss is not None and not math.isfinite(loss)),
            }
        return None

    # --- the machine or the numbers ------------------------------------------------------------------------------

    def _diagnose(
        self, args, state, accused: list[dict[str, Any]], report: dict[str, Any] | None
    ) -> tuple[dict[int, str], int]:
        """Labels by accused rank, and the exit code (0: none), the same on all ranks."""
        if not self.diagnose:
            return {}, 0
        number = min(each["micro_batch"] for each in accused)
        suspects = [forward for forward in self._forwards if forward.index == number]
        label = None
        for forward in suspects:  # all ranks, since a forward may be a collective
            first = math.nan if forward.loss is None else forward.loss.item()
            found = diagnose(
                self._model, forward.snapshot, first, gradients_were_finite=report is None, backward=self._own
            )
            if report is not None and report["micro_batch"] == number and label != "reproducible":
                label = found.label
        labels = {rank: each for rank, each in enumerate(from_all_ranks(label)) if each is not None}
        code = 0
        if self.exit_codes and "reproducible" in labels.values():
            culprit = next(each for each in accused if labels.get(each["rank"]) == "reproducible")
            now = Suspicion(
                step=state.global_step,
                rank=culprit["rank"],
                micro_batch=culprit["micro_batch"],
                batch=culprit["batch"],
                host=culprit["host"],
            )
            code = exit_code(self._suspicion, now, host=culprit["host"])
            if state.is_world_process_zero:
                now.file(args.output_dir)
        return labels, code

    def _close_suspicion(self, args, state) -> None:
        known = self._suspicion
        if known is None or state.global_step < known.step:
            return
        self._suspicion = None
        if not state.is_world_process_zero:
            return
        clear_suspicion(args.output_dir)
        hosts_now = socket.gethostname()
        if state.global_step == known.step:
            elsewhere = hosts_now != known.host
            self._log.record(
                "rerun",
                "error" if elsewhere else "warning",
                step=state.global_step,
                action="exclude" if elsewhere else "none",
                message=f"The fault of rank {known.rank} on {known.host} in step {known.step + 1} did not come back"
                + (f" on {hosts_now}: {known.host} errs persistently." if elsewhere else ": it was transient."),
                evidence={"accused_host": known.host, "accused_rank": known.rank, "batch": known.batch},
                confidence=0.9 if elsewhere else 0.5,
            )


class _ReductionWatch:
    """State of DDP's communication hook, which lives as long as the DDP object: who listens now."""

    def __init__(self, process_group):
        self.process_group = process_group
        self.listener: LocalLossGuardCallback | None = None


def _watched_allreduce(watch: _ReductionWatch, bucket) -> torch.futures.Future[torch.Tensor]:
    if watch.listener is not None:
        watch.listener.look_at(bucket.parameters(), bucket.gradients())
    return allreduce_hook(watch.process_group, bucket)


def batch_digest(inputs: dict[str, Any]) -> str:
    """16 digits of the SHA-256 of the tensors of a batch, shapes included; `"unknown"` if it has none."""
    digest, tensors = hashlib.sha256(), 0
    for name, value in sorted(inputs.items()):
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{name}{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
            tensors += 1
    return digest.hexdigest()[:16] if tensors else "unknown"


def _sentence(accused: list[dict[str, Any]], step: int, diagnosis: dict[int, str]) -> str:
    first = accused[0]
    what = f"loss {first['loss']}" if first["seen_in"] == "loss" else f"gradient of {first['parameters'][0]}"
    if not first["own"]:
        return f"The {what} is not finite in optimizer step {step}, seen after the reduction on {len(accused)} ranks."
    label = diagnosis.get(first["rank"])
    others = f" Ranks {[each['rank'] for each in accused]} saw the like." if len(accused) > 1 else ""
    return (
        f"rank {first['rank']} ({first['host']}, {first['device']}) has a {what} that is not finite in optimizer step "
        f"{step}, micro-batch {first['micro_batch']}, batch {first['batch']}{f' ({label})' if label else ''}.{others}"
    )


__all__ = ["LocalLossGuardCallback", "NonFiniteLossError", "batch_digest"]
