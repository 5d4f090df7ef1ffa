# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
r"""Sigma-MoE (Sigma-MoE-Tiny, arXiv 2512.16248): Qwen3-MoE's block with the router and the balance that one active
expert needs.

    a = x + Attn(n1(x))                                    grouped-query attention, RMSNorm on q and k before RoPE
    y = a + sum_{e in S(u)} g_e E_e(u),   u = n2(a)        every layer is a mixture, no dense and no shared expert
    E_e(u) = W_down,e (SiLU(W_gate,e u) * (W_up,e u))
    z = W_r u (fp32);  s = sigmoid(z) or softmax(z);  S = top-k of s + b;  g_e = s_e / sum_S s for k > 1, s_e for k = 1

k is a property of each layer; b is the loss-free balancing bias, which selects but never weighs. The balance loss is
formed per layer and summed (`balance.py`).
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeExperts,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .balance import RoutingWindow
from .configuration_sigma_moe import SigmaMoeConfig
from .elastic import ElasticExperts, ElasticGeneration, num_active_parameters, set_active_experts
from .neurons import (
    ElasticNeurons,
    NeuronSparseExperts,
    collected_neuron_sums,
    idle_neuron_parameters,
    mean_neuron_loss,
)
from .routing_losses import RoutingLossMixin


logger = logging.get_logger(__name__)


@dataclass
class SigmaMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    r"""
    `loss = cross-entropy + router_aux_loss_coef * aux_loss + router_z_loss_coef * z_loss + neuron_aux_loss_coef *
    neuron_aux_loss` up to the scaling of gradient accumulation; `aux_loss` and `z_loss` are sums over layers of means
    over tokens, `neuron_aux_loss` (training only) is a mean over layers.

    load_balancing_losses (`torch.FloatTensor` of shape `(num_hidden_layers,)`): the terms of `aux_loss`, without
    gradient.
    """

    z_loss: torch.FloatTensor | None = None
    neuron_aux_loss: torch.FloatTensor | None = None
    load_balancing_losses: torch.FloatTensor | None = None


class SigmaMoeTopKRouter(Qwen3MoeTopKRouter):
    """Router of one layer: `hidden_states (tokens, hidden)` -> logits `(tokens, experts)` and weights `(tokens, k)`,
    both fp32, and indices `(tokens, k)`. `top_k` is a plain int, so that a stage of the sparsification schedule is one
    assignment.

    Another router overrides one of the steps `logits`, `scores`, `select` and `weigh`; a body whose `router_class` it
    is builds it; a loss of its own is `own_router_loss` of the language model. Where its `select` finds that a token
    does without an expert, the index is `num_experts`, and its `leaves_out_experts` is True: experts look for such
    indices only when told so.
    """

    leaves_out_experts = False

    def __init__(self, config: SigmaMoeConfig, layer_idx: int):
        super().__init__(config)
        self.top_k = config.top_k_per_layer[layer_idx]
        self.scoring_func = config.scoring_func
        self.norm_top1_prob = config.norm_top1_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.e_score_correction_bias = nn.Buffer(torch.zeros(self.num_experts, dtype=torch.float32))

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(tokens, experts)` in fp32, also under autocast: in bf16 those of 96 experts tie, and ties route
        differently from kernel to kernel."""
        with maybe_autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.float(), self.weight.float())

    def scores(self, router_logits: torch.Tensor) -> torch.Tensor:
        """Score of each expert `(tokens, experts)` in fp32."""
        return router_logits.sigmoid() if self.scoring_func == "sigmoid" else router_logits.softmax(dim=-1)

    def select(self, scores: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
        """Indices `(tokens, top_k)` of the experts with the highest score plus bias; by default as many as in
        force."""
        top_k = self.top_k if top_k is None else top_k
        biased = scores + self.e_score_correction_bias.float()
        if top_k == 1:
            return biased.max(dim=-1, keepdim=True).indices  # several times as fast as topk on a CPU
        return biased.topk(top_k, dim=-1).indices

    def weigh(self, scores: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Weights `(tokens, k)` of the experts `indices (tokens, k)`; 0 for those left out."""
        if self.leaves_out_experts:
            weights = scores.gather(-1, indices.clamp(max=self.num_experts - 1)) * (indices < self.num_experts)
        else:
            weights = scores.gather(-1, indices)
        if self.norm_topk_prob and (self.top_k > 1 or self.norm_top1_prob):
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.routed_scaling_factor

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        router_logits = self.logits(hidden_states.reshape(-1, self.hidden_dim))
        scores = self.scores(router_logits)
        indices = self.select(scores.detach())
        return router_logits, self.weigh(scores, indices), indices


class SigmaMoeExperts(NeuronSparseExperts, Qwen3MoeExperts):
    """SwiGLU experts as 3-D parameters: `gate_up_proj (E, 2I, H)`, `down_proj (E, H, I)`; of each, a token uses all
    neurons or the top ones."""

    def __init__(self, config: SigmaMoeConfig, layer_idx: int):
        super().__init__(config)
        self.choose_neurons(config, layer_idx)


class SigmaMoeSparseMoeBlock(Qwen3MoeSparseMoeBlock):
    """Router and experts of one layer: `(batch, tokens, hidden)` -> the same."""

    def __init__(
        self, config: SigmaMoeConfig, layer_idx: int, router_class: type[SigmaMoeTopKRouter] = SigmaMoeTopKRouter
    ):
        nn.Module.__init__(self)  # the parent would build its own experts first
        self.experts = SigmaMoeExperts(config, layer_idx)
        self.gate = router_class(config, layer_idx)
        self.num_experts = config.num_experts
        self.leaves_out_experts = router_class.leaves_out_experts
        if self.leaves_out_experts:
            # transformers' experts look for indices without an expert under expert parallelism only.
            self.experts._is_expert_parallel = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(flat)
        if self.leaves_out_experts and getattr(self.experts, "num_experts", self.num_experts) < self.num_experts:
            # Experts that are divided among ranks exchange tokens by index; weights of those left out are 0.
            indices = indices.clamp(max=self.num_experts - 1)
        # Kernels want the weights in the activations' dtype; the sum over experts stays in theirs.
        return self.experts(flat, indices, weights.to(flat.dtype)).reshape(hidden_states.shape)


class SigmaMoeDecoderLayer(Qwen3MoeDecoderLayer):
    def __init__(
        self, config: SigmaMoeConfig, layer_idx: int, router_class: type[SigmaMoeTopKRouter] = SigmaMoeTopKRouter
    ):
        nn.Module.__init__(self)  # the parent would build its own experts first
        self.hidden_size = config.hidden_size
        self.self_attn = Qwen3MoeAttention(config, layer_idx)
        self.mlp = SigmaMoeSparseMoeBlock(config, layer_idx, router_class)
        self.input_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class SigmaMoePreTrainedModel(ElasticExperts, ElasticNeurons, PreTrainedModel):
    """Initialisation, plans and the per-layer number of active experts."""

    config: SigmaMoeConfig
    config_class = SigmaMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SigmaMoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["mlp.gate"]
    _keys_to_ignore_on_load_missing = [r"mlp\.gate\.e_score_correction_bias$"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(SigmaMoeTopKRouter, index=0),
        "hidden_states": SigmaMoeDecoderLayer,
        "attentions": Qwen3MoeAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The parent looks for a decorator in the file of the class, which is another one for the sister families.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, SigmaMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, SigmaMoeTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """As in transformers, but experts are written as the 3-D tensors that they are. `save_original_format=True`
        writes one tensor per expert matrix, as Sigma-V2 and Qwen3-MoE files have it. Both load.

        Trainer resumes through `load_state_dict(..., strict=False)`, which passes over per-expert names: experts would
        silently go back to their initialisation.
        """
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    @property
    def routers(self) -> list[SigmaMoeTopKRouter]:
        """The router of each layer, in order."""
        return [module for module in self.modules() if isinstance(module, SigmaMoeTopKRouter)]

    def set_experts_per_token(self, top_k: int | list[int]) -> None:
        """Set the active experts per token, one number for all layers or one per layer, in routers and config.

        Takes effect with the next forward; `save_pretrained` writes what is in force. Never call it inside a
        gradient-accumulation window. Raises `ValueError` for a wrong length or values outside `1..num_experts`.
        """
        set_active_experts(self, top_k)

    def num_active_parameters(self, include_embeddings: bool = False) -> int:
        """Parameters that one token uses, with the experts per token in force (the most, where a router leaves some
        out); embeddings and head only on request.

        The count behind the published 0.5B of Sigma-MoE-Tiny leaves embeddings and head out.
        """
        return num_active_parameters(self, include_embeddings=include_embeddings) - idle_neuron_parameters(self)


class SigmaMoeModel(SigmaMoePreTrainedModel):
    """The decoder without a head: token ids -> hidden states. A sister family may have routers of its own class."""

    router_class = SigmaMoeTopKRouter

    def __init__(self, config: SigmaMoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [SigmaMoeDecoderLayer(config, i, self.router_class) for i in range(config.num_hidden_layers)]
        )
        self.norm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """`(batch, tokens)` ids, mask (0: padding) and positions, or `(batch, tokens, hidden)` embeddings, to
        `last_hidden_state (batch, tokens, hidden)`; `output_router_logits=True` adds `router_logits (batch * tokens,
        experts)` of each layer, fp32. `ValueError` unless one of ids and embeddings is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)

        create_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        mask = create_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class SigmaMoeForCausalLM(RoutingLossMixin, ElasticGeneration, SigmaMoePreTrainedModel, GenerationMixin):
    """Language model: inputs as of the body to `logits (batch, tokens, vocabulary)`, or those of `logits_to_keep`, the
    last so many tokens or the places of a tensor `(kept,)`. With `labels (batch, tokens)` (-100: nothing to predict)
    it gives a loss. While training, or with `output_router_logits=True`, a loss includes the auxiliary losses."""

    body_class = SigmaMoeModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: SigmaMoeConfig):
        super().__init__(config)
        self.model = self.body_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.routing_window = RoutingWindow()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SigmaMoeCausalLMOutputWithPast:
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        learning = self.training and labels is not None
        self._warn_if_labels_are_withheld(labels, kwargs)
        follow_neurons = learning and self.config.neuron_aux_loss_coef > 0
        with collected_neuron_sums(self, attention_mask) if follow_neurons else nullcontext(()) as followed:
            outputs, router_logits, selected = self._run_body(
                output_router_logits or learning,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
            neuron_loss = mean_neuron_loss(followed)
        hidden_states = outputs.last_hidden_state
        keep = (
            slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        )  # slice(0, None) keeps all
        logits = self.lm_head(hidden_states[:, keep, :])

        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs) if labels is not None else None
        balance = z_loss = None
        aux = torch.zeros((), device=hidden_states.device)
        if router_logits:
            batch_size = hidden_states.shape[0]
            balance, z_loss, own = self._routing_losses(router_logits, selected, attention_mask, batch_size, learning)
            aux = self.config.router_aux_loss_coef * balance.sum() + self.config.router_z_loss_coef * z_loss + own
        if neuron_loss is not None:
            aux = aux + self.config.neuron_aux_loss_coef * neuron_loss.to(aux.device)
        if loss is not None and (output_router_logits or learning):
            loss = loss + self._scaled_like_cross_entropy(aux, labels, learning, **kwargs).to(loss)

        return SigmaMoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance.sum() if balance is not None else None,
            z_loss=z_loss,
            neuron_aux_loss=neuron_loss,
            load_balancing_losses=balance.detach() if balance is not None else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=router_logits if output_router_logits else None,
        )

    def _run_body(self, records_routing: bool, **inputs):
        """The body's output, the router logits of each layer, and the experts that each layer chose (None: whatever
        `routers` say); of a body that is not ours they come from elsewhere."""
        outputs = self.model(output_router_logits=records_routing, **inputs)
        return outputs, outputs.router_logits, None


class SigmaMoeForSequenceClassification(GenericForSequenceClassification, SigmaMoePreTrainedModel):
    """The decoder with a classifier on the last real token."""

    body_class = SigmaMoeModel

    def __init__(self, config: SigmaMoeConfig):
        # The generic head asks AutoModel for the body, and AutoModel knows no class that came with a Hub repository.
        AutoModel.register(type(config), self.body_class, exist_ok=True)
        super().__init__(config)


class SigmaMoeForTokenClassification(GenericForTokenClassification, SigmaMoePreTrainedModel):
    """The decoder with a classifier on every token."""

    body_class = SigmaMoeModel

    def __init__(self, config: SigmaMoeConfig):
        AutoModel.register(type(config), self.body_class, exist_ok=True)
        super().__init__(config)


def register_expert_layouts(model_type: str) -> None:
    """Let files with one tensor per expert matrix, as in Qwen3-MoE, load too (`convert.py` also knows Sigma-V2's other
    names)."""
    converters = [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
    register_checkpoint_conversion_mapping(model_type, converters, overwrite=True)


# Here, not in the package's registry, because it has to travel with the code of a Hub repository.
register_expert_layouts("sigma_moe")

__all__ = [
    "SigmaMoeForCausalLM",
    "SigmaMoeForSequenceClassification",
    "SigmaMoeForTokenClassification",
    "SigmaMoeModel",
    "SigmaMoePreTrainedModel",
]
