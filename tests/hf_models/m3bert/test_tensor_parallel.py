"""Tensor parallelism: an encoder whose matrices stand in two parts gives what the whole one gives."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from hf_models.m3bert import M3BertForMaskedLM, M3BertForSentenceEmbedding
from tests.gloo_ranks import results_of_ranks
from tests.hf_models.m3bert.tiny_m3bert import IDS, MASK, tiny


NO_DROPOUT = {"attention_dropout": 0.0, "embedding_dropout": 0.0}


def step(model):
    """The loss of a grid of exits and dims, and the gradients; or the embeddings of a cell."""
    if isinstance(model, M3BertForSentenceEmbedding):
        with torch.no_grad():
            return model(IDS, attention_mask=MASK).embeddings
    loss = model.train()(IDS, attention_mask=MASK, labels=IDS).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    return loss.detach(), whole


def job_divided():
    shared, found = [tempfile.mkdtemp()], {}
    dist.broadcast_object_list(shared)
    for model_class in (M3BertForMaskedLM, M3BertForSentenceEmbedding):
        folder = f"{shared[0]}/{model_class.__name__}"
        if dist.get_rank() == 0:
            tiny(model_class, **NO_DROPOUT).save_pretrained(folder)
        dist.barrier()
        model = model_class.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
        halves = [
            name for name, p in model.named_parameters() if hasattr(p, "to_local") and p.to_local().shape != p.shape
        ]
        found[model_class.__name__] = halves, step(model)
    return found


JOBS = {"divided": job_divided}


@pytest.mark.slow
@pytest.mark.compatibility("Tensor parallelism", method="m3bert", library="torch", gloo=True)
def test_matrices_in_two_parts_learn_and_embed_as_whole_ones(tmp_path):
    for found in results_of_ranks(__name__, tmp_path)("divided"):
        for halves, _ in found.values():
            assert {name.split(".")[-2] for name in halves} >= {"q_proj", "o_proj", "gate_proj", "down_proj"}, halves
        loss, gradients = found["M3BertForMaskedLM"][1]
        expected, wanted = step(tiny(M3BertForMaskedLM, **NO_DROPOUT))
        torch.testing.assert_close(loss, expected)
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        embeddings = found["M3BertForSentenceEmbedding"][1]
        torch.testing.assert_close(embeddings, step(tiny(M3BertForSentenceEmbedding)), rtol=1e-4, atol=1e-5)
