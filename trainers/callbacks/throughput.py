"""Tokens per second and model FLOPs utilisation, start-up apart from steady state."""

import time
from collections.abc import Sequence

from transformers import TrainerCallback

from hf_models.moe.elastic import experts_in_force

from .installation import add_to_log


class ThroughputCallback(TrainerCallback):
    """Log `throughput/tokens_per_second` (all ranks), `throughput/step_seconds`, and `throughput/mfu` if the peak is
    given.

    Time is that of optimizer steps only: from `on_step_begin` to `on_step_end`, so evaluation, saving and the data's
    first fetch do not count. The first `warmup_steps` steps of a (resumed) run are kept apart as `startup_seconds`.

    Args:
        warmup_steps: steps that count as start-up (compilation, allocator, caches).
        peak_flops: dense peak FLOP/s of one device in the training precision, from its data sheet; with it the
            utilisation is logged: [`flops_per_token`] * tokens / (seconds * devices * peak). What gradient
            checkpointing computes twice counts once.
    """

    _hook = None

    def __init__(self, *, warmup_steps: int = 5, peak_flops: float | None = None):
        self.warmup_steps, self.peak_flops = warmup_steps, peak_flops

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.startup_seconds = self.steady_seconds = self._logged_seconds = 0.0
        self.steady_tokens = self._logged_tokens = self._logged_steps = 0
        self._first_step = state.global_step
        self._tokens = self._sequence_length = 0
        if self._hook is not None:  # of a run that ended in an exception, or tokens would count twice
            self._hook.remove()
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
    """FLOPs of forward and backward per token, with the experts per token *in force*: a single `num_experts_per_tok`
    is wrong under a schedule.

    Sigma-MoE and its relatives: [`gemm_flops_per_token`]. Other models: 6 * parameters, of which a head counts and an
    untied embedding table does not, + 12 * layers * attention width * sequence length for the attention scores,
    uncausal as is the convention there.
    """
    config = model.config
    if hasattr(model, "set_experts_per_token"):
        return gemm_flops_per_token(config, sequence_length, experts_in_force(model))
    parameters = model.num_parameters()
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:  # looking a row up costs nothing; a tied table is the head too
        parameters -= table.weight.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 6 * parameters + 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * sequence_length


def gemm_flops_per_token(config, sequence_length: int, top_k: Sequence[int] | None = None) -> int:
    r"""FLOPs of all matrix products of forward and backward per token of a Sigma-MoE: three times the forward's

        2 [ L (h H d + 2 h KV d + H d h) + L s H d + sum_l k_l 3 h f + L h E + h V ]

    with L layers, width h, H query and KV key-value heads of d, sequence length s, k_l of E experts of width f in
    layer l, vocabulary V. L s H d is the causal half of the scores and of their product with the values. The
    accounting is ours; with one k and without the router's L h E it is the formula of the SIGMA stack's Megatron fork
    (arXiv 2512.13488), which knows one k for all layers.

    Neurons that MoNE leaves out count as computed, since training computes them. A sliding window is not subtracted.
    `top_k`: one per layer; default: what the config says.
    """
    layers, hidden = config.num_hidden_layers, config.hidden_size
    top_k = config.top_k_per_layer if top_k is None else top_k
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = layers * (2 * hidden * queries + 2 * hidden * keys + sequence_length * queries)
    experts = sum(top_k) * 3 * hidden * config.moe_intermediate_size
    router = layers * hidden * config.num_experts
    return 3 * 2 * (attention + experts + router + hidden * config.vocab_size)
