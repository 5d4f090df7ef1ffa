"""The forward as one graph: compiled without a break, and exported."""

import pytest
import torch

from tests.hf_models.dot_cbm.tiny_dot_cbm import BACKBONES, CONCEPTS, LABELS, READOUTS, images, tiny


class Logits(torch.nn.Module):
    """Classes and concepts of images: exporters want tensors in and tensors out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        out = self.model(pixel_values, output_transport_plan=True)
        return out.logits, out.concept_probs, out.transport_plan


def same_as_eager(model, backend):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        found, expected = (each(images(), output_transport_plan=True) for each in (compiled, model))
    for name in ("logits", "concept_logits", "concept_maps", "saliency"):
        if expected.get(name) is not None:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert found.grid == expected.grid


def test_the_forward_is_one_graph():
    same_as_eager(tiny(), "eager")  # without C++: whether it is one graph at all


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "readout"), [*((kind, READOUTS[0]) for kind in BACKBONES[1:]), *(("dinov2", r) for r in READOUTS[1:])]
)
def test_the_forward_is_one_graph_with_every_backbone_and_readout(kind, readout):
    same_as_eager(tiny(kind, readout=readout), "eager")


@pytest.mark.slow
def test_training_is_one_graph():
    torch._dynamo.reset()
    losses = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, fullgraph=True, backend="eager")):
        model = tiny(freeze_backbone=False, training_stage="joint", adapter_dropout=0.0).train()
        loss = wrap(model)(images(), labels=LABELS, concept_labels=CONCEPTS).loss
        loss.backward()
        losses.append((loss.detach(), model.model.visual_adapter.layers[0].weight.grad))
    torch.testing.assert_close(*losses)


@pytest.mark.slow
def test_an_exported_program_runs_without_us_and_with_any_batch():
    model = Logits(tiny("dinov2_with_registers")).eval()
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (images(2),), dynamic_shapes=batch)
    assert not [node for node in program.graph.nodes if "sigma_kernels" in str(node.target)]
    for size in (1, 3):
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images(size)), model(images(size)), rtol=1e-4, atol=1e-5)
