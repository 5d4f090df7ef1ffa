"""Progressive sparsification (Sigma-MoE-Tiny, arXiv 2512.16248): more active experts in the low layers first."""

from dataclasses import dataclass

from transformers import TrainerCallback
from transformers.utils import logging

from .installation import add_to_log, routed_model


logger = logging.get_logger(__name__)
UNITS = ("steps", "tokens", "fraction")


@dataclass(frozen=True)
class SparsificationStage:
    """From `start` on (inclusive; in the unit of the callback) each layer activates `top_k` experts per token."""

    start: float
    top_k: int | list[int]


class ProgressiveSparsificationCallback(TrainerCallback):
    """Set the number of active experts of each layer as training goes on.

    The stage is a function of the trainer's state alone (global step, or tokens seen), read before each optimizer
    step: resuming at any step gives what the uninterrupted run had, and k never changes inside a gradient-accumulation
    window. The model's config always holds what is in force, so every checkpoint is served as it was trained.

    Args:
        stages: [`SparsificationStage`]s in order of `start`, the first at 0; `(start, top_k)` pairs are taken too. A
            list has one entry per layer.
        unit: `"steps"`, `"fraction"` of `max_steps`, or `"tokens"` (needs
            `TrainingArguments(include_num_input_tokens_seen=...)`).

    Raises:
        ValueError: no stage at 0, starts that do not increase, a fraction outside [0, 1), an unknown unit; at
            `on_train_begin`, a list that does not fit the model, tokens that are not counted, or
            `load_best_model_at_end`, which would load weights of one stage into a model of another.

    The paper's lists were not seen; our reconstruction is `hf_models.moe.SIGMA_MOE_TINY_INITIAL_TOP_K`, then 1.
    """

    def __init__(self, stages, *, unit: str = "steps"):
        if unit not in UNITS:
            raise ValueError(f"unit={unit!r} is not known. Choose one of {UNITS}.")
        self.stages = [s if isinstance(s, SparsificationStage) else SparsificationStage(*s) for s in stages]
        self.unit = unit
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0:
            raise ValueError(f"stages start at {starts}: the first must start at 0, so that every step has a stage.")
        if any(not b > a for a, b in zip(starts, starts[1:], strict=False)):
            raise ValueError(f"stages start at {starts}: each must start after the one before.")
        if unit == "fraction" and starts[-1] >= 1:
            raise ValueError(f"stages start at {starts}: a fraction of the run lies in [0, 1).")
        self._applied: tuple[int, int] | None = None  # stage and model, so that logging happens on a change only

    def stage_at(self, state) -> int:
        """Index of the stage in force for the step that follows `state`."""
        if self.unit == "tokens":
            position = state.num_input_tokens_seen
        else:
            position = state.global_step
        scale = state.max_steps if self.unit == "fraction" else 1
        # Rounded, since 0.07 * 100 is a little more than 7.
        return max(i for i, stage in enumerate(self.stages) if position >= round(stage.start * scale, 6))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.unit == "tokens" and args.include_num_input_tokens_seen in (False, "no"):
            raise ValueError(
                "unit='tokens' needs TrainingArguments(include_num_input_tokens_seen='all'), or the tokens are not "
                "counted."
            )
        if args.load_best_model_at_end and len(self.stages) > 1:
            raise ValueError(
                "load_best_model_at_end=True may load weights of an earlier stage into a model of the last one. Turn "
                "it off, and load the checkpoint that you want by its folder: its config has its experts per token."
            )
        routed, layers = routed_model(model), routed_model(model).config.num_hidden_layers
        for number, stage in enumerate(self.stages):
            values = stage.top_k if isinstance(stage.top_k, (list, tuple)) else [stage.top_k] * layers
            if len(values) != layers or not all(1 <= k <= routed.config.num_experts for k in values):
                raise ValueError(
                    f"stage {number} has top_k={stage.top_k}, which does not fit num_hidden_layers={layers} and "
                    f"num_experts={routed.config.num_experts}: give one value per layer, each in 1..num_experts."
                )
        self._applied = None
        self._apply(state, model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        # Here, not only when training begins: MatryoshkaExpertsCallback may come later in the list.
        if (sampling := getattr(routed_model(model).config, "k_sampling", "none")) != "none":
            raise ValueError(
                f"k_sampling={sampling!r} draws the experts per token anew for each micro-batch, over any schedule. "
                "Remove one of the two callbacks, or set config.k_sampling='none'."
            )
        self._apply(state, model)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if self._applied is None or "loss" not in (logs or {}):
            return
        top_k = routed_model(model).config.top_k_per_layer
        extra = {"moe/stage": self._applied[0], "moe/mean_top_k": sum(top_k) / len(top_k)}
        add_to_log(state, logs, extra | {"moe/active_parameters": routed_model(model).num_active_parameters()})

    def _apply(self, state, model) -> None:
        stage, routed = self.stage_at(state), routed_model(model)
        if self._applied == (stage, id(routed)):
            return
        routed.set_experts_per_token(self.stages[stage].top_k)
        logger.info(f"step {state.global_step}: stage {stage}, experts per token {self.stages[stage].top_k}")
        self._applied = (stage, id(routed))
