"""`pipeline("image-classification")` with the concepts behind each prediction."""

from typing import Any

import numpy as np
import torch
from transformers import ImageClassificationPipeline
from transformers.image_utils import get_image_size, load_image

from .explanation import ConceptRecord


class DotCbmPipeline(ImageClassificationPipeline):
    """Labels and scores of an image, and an explanation.

        explainer = pipeline("image-classification", model=model, image_processor=processor,
                             pipeline_class=DotCbmPipeline)
        prediction = explainer("bird.jpg")  # {"predictions": [{"label", "score"}, ...], "explanation": [records]}

    `top_k` labels are returned as by the parent class; `top_k_concepts` concepts explain the first of them, with boxes
    and heatmaps in the pixels of the image as it was given, turned upright where its EXIF data say so. `explain=False`
    gives what the parent gives, and is all that a linear probe can: `ValueError` without it.
    """

    def _sanitize_parameters(self, top_k_concepts: int | None = None, explain: bool | None = None, **kwargs):
        before, forward, after = super()._sanitize_parameters(**kwargs)
        if top_k_concepts is not None:
            after["top_k_concepts"] = top_k_concepts
        if explain is not None:
            forward["explain"] = after["explain"] = explain
        return before, forward, after

    def preprocess(self, image: Any, timeout: float | None = None) -> dict[str, Any]:
        if isinstance(image, np.ndarray | torch.Tensor):
            height, width = get_image_size(image)
        else:
            image = load_image(image, timeout=timeout)
            width, height = image.size
        inputs = super().preprocess(image, timeout=timeout)
        inputs["image_size"] = torch.tensor([[height, width]])  # a row for each image, so that batches can be made
        return inputs

    def _forward(self, model_inputs: dict[str, Any], explain: bool = True):
        sizes = model_inputs.pop("image_size")
        if explain:
            self.model.require_concepts()
        outputs = self.model(**model_inputs, output_transport_plan=explain)
        if not explain:
            return {"logits": outputs.logits}
        kept = {name: outputs[name] for name in ("logits", "concept_probs", "head_inputs", "concept_maps")}
        # A row for each image, or a batch could not be taken apart again.
        return kept | {"grid": torch.tensor([outputs.grid] * len(sizes)), "image_size": sizes}

    def postprocess(self, model_outputs, explain: bool = True, top_k_concepts: int = 5, **kwargs):
        predictions = super().postprocess(model_outputs, **kwargs)
        if not explain:
            return predictions
        best = model_outputs["logits"].argmax(-1)
        return {"predictions": predictions, "explanation": self._records(model_outputs, best, top_k_concepts)}

    def _records(self, outputs, label: torch.Tensor, top_k: int) -> list[ConceptRecord]:
        height, width = outputs["image_size"][0].tolist()
        return self.model.records_of(outputs, label, top_k=top_k, image_size=(height, width))[0]


__all__ = ["DotCbmPipeline"]
