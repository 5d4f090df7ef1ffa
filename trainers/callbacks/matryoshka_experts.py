"""M-MoE (arXiv 2509.26520): train with a number of active experts that is drawn anew, evaluate and save with a fixed
one."""

from collections import Counter
from collections.abc import Sequence

from transformers import TrainerCallback
from transformers.utils import logging

from hf_models.moe.elastic import (
    apply_experts_of_config,
    experts_in_force,
    put_active_experts,
    require_active_experts,
    routers_of,
)
from hf_models.moe.expert_sampling import ExpertSampling

from .installation import add_to_log


logger = logging.get_logger(__name__)
Stages = Sequence[tuple[float, ExpertSampling]]


class MatryoshkaExpertsCallback(TrainerCallback):
    """Draw the active experts per token of each layer before each micro-batch.

    For `MMoeForCausalLM` and its relatives, and for any model of transformers after `wrap_moe`, whose balance loss is
    right for every draw. A draw depends on `(k_seed, global step, micro-batch, layer)` alone: the same on all ranks,
    after resuming, and when gradient checkpointing runs a layer again.

    Draws live in the routers from the beginning of a micro-batch to the optimizer step. The config keeps the number
    for inference, and the routers get it back before anything else runs: evaluation, checkpoints and the trained model
    use that one. Only an exception in a training step leaves the last draw behind (`apply_experts_of_config` undoes
    it).

    Logged: `moe/mean_k`, `moe/k_share_<k>` (share of the draws, realised since the last log), `moe/expected_k` (of the
    law, before a budget), `moe/expert_flops_share` (mean k / k_max: 0.58 for the uniform 1..6). `histogram` counts all
    draws of this process since training began.

    `torch.compile` takes k as a constant: a graph for each k and layer if layers are compiled one by one, for each
    combination if the model is compiled whole.

    Args:
        sampling: what to draw; `None`: what the model's config says. Or stages `(start, sampling)`, starts being
            fractions of the run, the first 0: see `hf_models.moe.expert_sampling.phds_stages`. The (first) sampling is
            noted in the config.

    Raises, when training begins:
        TypeError: no routers, or a model of transformers that is not wrapped.
        ValueError: nothing to draw from, or more experts than a token can use.

    Not together with `ProgressiveSparsificationCallback`, which sets the same numbers by a schedule and refuses: the
    methods follow each other, the schedule in pre-training, M-MoE in the training that continues it.
    """

    def __init__(self, sampling: ExpertSampling | Stages | None = None):
        self._given = [(0.0, sampling)] if isinstance(sampling, ExpertSampling) else list(sampling or [])
        starts = [start for start, _ in self._given]
        if starts and (starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1):
            raise ValueError(f"stages start at {starts}: fractions of a run from 0 on, increasing, below 1.")
        self.stages = self._given
        self.histogram: Counter[int] = Counter()
        self._since_log: Counter[int] = Counter()
        self._micro_step = 0
        self._drawn: list[int] | None = None

    def sampling_at(self, state) -> ExpertSampling:
        """What the step that follows `state` draws from."""
        # Rounded, since 0.9 * 10 may be a little more than 9.
        reached = [s for start, s in self.stages if state.global_step >= round(start * state.max_steps, 6)]
        return reached[-1]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        routers = routers_of(model)
        if not hasattr(model, "set_active_experts"):
            raise TypeError(
                f"{type(model).__name__} is not elastic: its own balance loss knows one k only. Use "
                "wrap_moe(model) of hf_models.moe."
            )
        self.stages = self._given
        if not self.stages:
            sampling = ExpertSampling.from_config(model.config)
            if sampling is None:
                raise ValueError(
                    "The config of the model samples nothing (k_sampling='none'). Set k_sampling and k_max, or give "
                    "the callback an ExpertSampling."
                )
            self.stages = [(0.0, sampling)]
        for _, sampling in self.stages:
            require_active_experts(routers, [sampling.k_max] * len(routers))
        self.stages[0][1].write_to(model.config)
        self.histogram.clear()
        self._since_log.clear()

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._micro_step = 0
        self._draw(state, model)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self._restore(model)
        self._micro_step += 1
        self._draw(state, model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._restore(model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self._restore(model, used=False)  # of a window that another callback has stopped

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._restore(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        draws = sum(self._since_log.values())
        if "loss" not in (logs or {}) or not draws:
            return
        sampling = self.sampling_at(state)
        mean = sum(k * number for k, number in self._since_log.items()) / draws
        extra = {"moe/mean_k": mean, "moe/expected_k": sampling.expected_k}
        extra["moe/expert_flops_share"] = mean / max(s.k_max for _, s in self.stages)
        extra |= {f"moe/k_share_{k}": number / draws for k, number in sorted(self._since_log.items())}
        add_to_log(state, logs, extra)
        self._since_log.clear()

    def _draw(self, state, model) -> None:
        routers = routers_of(model)
        self._drawn = self.sampling_at(state).draw(state.global_step, self._micro_step, len(routers))
        put_active_experts(routers, self._drawn)

    def _restore(self, model, *, used: bool = True) -> None:
        if self._drawn is None:
            return
        drawn, now, self._drawn = self._drawn, experts_in_force(model), None
        apply_experts_of_config(model)
        if now != drawn:
            raise RuntimeError(
                f"The micro-batch was to run with {drawn} active experts per layer and ran with {now}: something else "
                "sets them during training. Remove the other callback."
            )
        if used:
            self.histogram.update(drawn)
            self._since_log.update(drawn)


__all__ = ["MatryoshkaExpertsCallback"]
