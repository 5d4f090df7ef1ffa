"""Explanations and interventions as methods of the classifier."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from .backbone import grid_of_patches
from .explanation import ConceptRecord, concept_records, heatmaps_in_pixels
from .interventions import concept_index, intervention_on


class ExplainingMixin:
    """`explain`, `heatmaps`, `contributions`, `intervention`."""

    def intervention(
        self, truth: torch.Tensor, *, concepts: Iterable[int | str] = (), groups: Iterable[str] = ()
    ) -> torch.Tensor:
        """What `interventions=` takes: `truth (batch, M)` at the named concepts and groups, NaN elsewhere."""
        return intervention_on(self.config, truth, concepts=concepts, groups=groups)

    def heatmaps(
        self,
        plan: torch.Tensor,
        image_size: int | tuple[int, int],
        *,
        grid: tuple[int, int] | None = None,
        probabilities: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`plan` or `concept_maps (batch, N, M)` to `(batch, M, height, width)`, each with maximum 1, or with its
        concept's probability where `probabilities (batch, M)` are given."""
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        grid = grid_of_patches(self.config, plan.shape[1]) if grid is None else grid
        return heatmaps_in_pixels(plan, grid, size, probabilities=probabilities)

    def require_concepts(self) -> None:
        """`ValueError` for a linear probe."""
        if self.config.readout == "linear_probe":
            raise ValueError("a linear probe has no concepts, so its prediction has no parts to explain.")

    @torch.no_grad()
    def contributions(self, head_inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What each concept adds to the logit of a class, `(batch, M)`, for `labels (batch,)`. Over the concepts, plus
        the classifier's bias, they sum to that logit. `ValueError` for a linear probe."""
        self.require_concepts()
        weight = self.classifier.weight[labels].float()  # (batch, features)
        return (weight * head_inputs.to(weight.device).float()).view(len(labels), self.config.num_concepts, -1).sum(-1)

    @torch.no_grad()
    def explain(
        self,
        pixel_values: torch.Tensor | None = None,
        top_k: int | None = 5,
        *,
        labels: torch.Tensor | None = None,
        concepts: Sequence[int | str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        **inputs,
    ) -> list[list[ConceptRecord]]:
        """For each image, what the `top_k` concepts that weigh most in its prediction, for or against, saw and where.

        Args:
            labels: classes to explain, `(batch,)`. `None`: the predicted ones.
            concepts: names or indices, in the order in which they are wanted, instead of the `top_k`.
            image_size: height and width of boxes and heatmaps. `None`: that of `pixel_values`, or of the config.
            inputs: whatever else `forward` takes, such as `patch_features`, `interventions`.
        """
        was_training = self.training
        self.eval()
        output = self(pixel_values, output_transport_plan=True, **inputs)
        self.train(was_training)
        labels = output.logits.argmax(-1) if labels is None else labels.to(output.logits.device)
        if image_size is None:
            image_size = self.config.input_size if pixel_values is None else pixel_values.shape[-2:]
        return self.records_of(output, labels, top_k=top_k, concepts=concepts, image_size=image_size)

    @torch.no_grad()
    def records_of(
        self,
        output: Mapping,
        labels: torch.Tensor,
        *,
        image_size: int | tuple[int, int],
        top_k: int | None = 5,
        concepts: Sequence[int | str] | None = None,
    ) -> list[list[ConceptRecord]]:
        """The same of an output with `concept_maps` that is there already."""
        parts = self.contributions(output["head_inputs"], labels.to(self.classifier.weight.device))
        parts = parts.to(output["concept_maps"].device)
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        names, top_k = self.config.concept_names, self.config.num_concepts if top_k is None else top_k
        wanted = None if concepts is None else [concept_index(self.config, concept) for concept in concepts]
        grid = output["grid"]
        return [
            concept_records(
                output["concept_maps"][row],
                output["concept_probs"][row],
                parts[row],
                names=names,
                label=self.config.id2label[int(labels[row])],
                grid=tuple(int(side) for side in (grid[row] if torch.is_tensor(grid) else grid)),
                image_size=size,
                indices=parts[row].abs().argsort(descending=True)[:top_k].tolist() if wanted is None else wanted,
                threshold=self.config.heatmap_threshold,
            )
            for row in range(len(labels))
        ]


__all__ = ["ExplainingMixin"]
