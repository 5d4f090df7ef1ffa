"""Tokens per second and model FLOPs utilisation, start-up apart from steady state."""

import time

from transformers import TrainerCallback

from .installation import add_to_log


class ThroughputCallback(TrainerCallback):
    """Log `throughput/tokens_per_second` (all ranks), `throughput/step_seconds`, and `throughput/mfu` if the peak is
    given.

    Time is that of optimizer steps only: from `on_step_begin` to `on_step_end`, so evaluation, saving and the data's
    first fetch do not count. The first `warmup_steps` steps of a (resumed) run are kept apart as `startup_seconds`.

    Args:
        warmup_steps: steps that count as start-up (compilation, allocator, caches).
        peak_flops: peak FLOP/s of one device in the training precision; with it the utilisation is logged. FLOPs are 6
        per active
            parameter and token, with the experts per token *in force* (a single `num_experts_per_tok` is wrong under a
            schedule), plus 12 * layers * attention width * sequence length per token for attention scores, uncausal as
            is the convention.
    """

    def __init__(self, *, warmup_steps: int = 5, peak_flops: float | None = None):
        self.warmup_steps, self.peak_flops = warmup_steps, peak_flops

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.startup_seconds = self.steady_seconds = self._logged_seconds = 0.0
        self.steady_tokens = self._logged_tokens = self._logged_steps = 0
        self._first_step = state.global_step
        self._tokens = self._sequence_length = 0
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._world = args.world_size

    def on_step_begin(self, args, state, control, **kwargs):
        self._tokens, self._start = 0, time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        seconds, tokens = time.perf_counter() - self._start, self._tokens * self._world
        if state.global_step - self._first_step <= self.warmup_steps:
            self.startup_seconds += seconds
            return
        self.steady_seconds += seconds
        self.steady_tokens += tokens
        self._logged_seconds += seconds
        self._logged_tokens += tokens
        self._logged_steps += 1

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" not in (logs or {}) or not self._logged_steps:
            return
        rate = self._logged_tokens / self._logged_seconds
        extra = {
            "throughput/tokens_per_second": round(rate, 1),
            "throughput/step_seconds": round(self._logged_seconds / self._logged_steps, 5),
        }
        if self.peak_flops:
            per_token = flops_per_token(model, self._sequence_length)
            extra["throughput/mfu"] = round(rate * per_token / (self.peak_flops * self._world), 4)
        add_to_log(state, logs, extra)
        self._logged_seconds, self._logged_tokens, self._logged_steps = 0.0, 0, 0

    def on_train_end(self, args, state, control, **kwargs):
        self._hook.remove()

    @property
    def tokens_per_second(self) -> float | None:
        """Steady-state tokens per second of the run so far, all ranks; `None` before the first step after start-up."""
        return self.steady_tokens / self.steady_seconds if self.steady_seconds else None

    def _count(self, module, args, kwargs) -> None:
        ids = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        if module.training and ids is not None:
            self._tokens += ids.shape[0] * ids.shape[1]
            self._sequence_length = ids.shape[1]


def flops_per_token(model, sequence_length: int) -> float:
    """FLOPs of forward and backward per token: 6 * active parameters (head included) + attention scores."""
    config = model.config
    routed = hasattr(model, "num_active_parameters")
    active = model.num_active_parameters(include_embeddings=True) if routed else model.num_parameters()
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:  # looking a row up costs nothing; a tied table is the head too
        active -= table.weight.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 6 * active + 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * sequence_length
