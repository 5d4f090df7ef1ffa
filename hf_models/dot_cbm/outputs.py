"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import ModelOutput


@dataclass
class DotCbmModelOutput(ModelOutput):
    r"""
    Concepts of images, and the plan and the maps behind them.

    concept_logits (`torch.FloatTensor` of shape `(batch, concepts)`):
        Of the M concepts; `None` for a linear probe.
    transport_plan, concept_maps (`torch.FloatTensor` of shape `(batch, patches, concepts)`):
        With `output_transport_plan=True`. The plan; `None` for a read-out without one. What heatmaps are made of: the
        plan, or softmax(cosine / eps) over the patches, or what each patch would add to the concept's logit in the
        global token's place.
    saliency, theta (`torch.FloatTensor` of shape `(batch, patches)`):
        Saliency as computed, and the patch marginal that it became.
    grid (`tuple[int, int]`):
        Rows and columns of patches.
    global_token (`torch.FloatTensor` of shape `(batch, hidden_size)`):
        The image's CLS token, or what stands for it.
    patch_directions (`(batch, patches, projection_dim)`), concept_directions (`(concepts, projection_dim)`):
        Adapted, of length 1; `None` where the read-out does not adapt.
    concept_pairs (`torch.FloatTensor` of shape `(batch, concepts, 2, cem_dim)`):
        CEM's embeddings of a concept present and absent.
    hidden_states, attentions (`tuple[torch.FloatTensor, ...]`):
        The backbone's, with `output_hidden_states=True` and `output_attentions=True`.
    """

    concept_logits: torch.FloatTensor | None = None
    transport_plan: torch.FloatTensor | None = None
    concept_maps: torch.FloatTensor | None = None
    saliency: torch.FloatTensor | None = None
    theta: torch.FloatTensor | None = None
    grid: tuple[int, int] | None = None
    global_token: torch.FloatTensor | None = None
    patch_directions: torch.FloatTensor | None = None
    concept_directions: torch.FloatTensor | None = None
    concept_pairs: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class DotCbmOutput(ModelOutput):
    r"""
    Classes of images, and the concepts that they were predicted from.

    loss (`torch.FloatTensor`), losses (`dict[str, torch.FloatTensor]`):
        The objective of the stage, and its terms without their weights and gradient: `"concept"`, `"vop"`, `"top"`,
        `"class"`, as far as labels were there to compute them.
    logits (`torch.FloatTensor` of shape `(batch, num_labels)`):
        Of the classes.
    concept_logits, concept_probs (`torch.FloatTensor` of shape `(batch, concepts)`):
        Before interventions, and after them; `None` for a linear probe.
    head_inputs (`torch.FloatTensor` of shape `(batch, features)`):
        What the classifier saw.
    transport_plan, concept_maps, saliency, theta, grid, hidden_states, attentions:
        As in [`DotCbmModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    concept_logits: torch.FloatTensor | None = None
    concept_probs: torch.FloatTensor | None = None
    head_inputs: torch.FloatTensor | None = None
    transport_plan: torch.FloatTensor | None = None
    concept_maps: torch.FloatTensor | None = None
    saliency: torch.FloatTensor | None = None
    theta: torch.FloatTensor | None = None
    grid: tuple[int, int] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    losses: dict[str, torch.FloatTensor] | None = None


__all__ = ["DotCbmModelOutput", "DotCbmOutput"]
