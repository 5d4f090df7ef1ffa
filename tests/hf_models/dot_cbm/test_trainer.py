"""Both stages through transformers' Trainer: on one process, and on two gloo processes against it."""

import tempfile
from functools import partial

import numpy
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_models.dot_cbm import DotCbmForImageClassification
from tests.gloo_ranks import results_of_ranks
from tests.hf_models.dot_cbm.tiny_dot_cbm import tiny_config


COUNT = 32


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def examples(count: int = COUNT, *, concepts: bool = True) -> list[dict]:
    """Images with a bright quarter for each of four concepts that they have; the class says which of two pairs."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        label = index % 2
        present = torch.tensor([label, label, 1 - label, 1 - label])
        pixels = 0.1 * torch.randn(3, 32, 32, generator=generator)
        for concept in present.nonzero().flatten().tolist():
            row, column = divmod(concept, 2)
            pixels[concept % 3, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 2.0
        example = {"pixel_values": pixels, "labels": label}
        made.append(example | ({"concept_labels": present} if concepts else {}))
    return made


def model(**fields) -> DotCbmForImageClassification:
    torch.manual_seed(0)
    shape = {"concept_names": list("abcd"), "concept_groups": None, "num_labels": 2, "adapter_dropout": 0.0}
    return DotCbmForImageClassification(tiny_config(**(shape | fields)))


def trained(network, *, steps: int, batch: int, lr: float, data=None, trainer=InOrder, **options):
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        learning_rate=lr,
        lr_scheduler_type="constant",
        label_names=["labels", "concept_labels"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        ddp_find_unused_parameters=False,
        **options,
    )
    made = trainer(network, arguments, train_dataset=examples() if data is None else data)
    made.train()
    return made


def two_stages(batch: int, *, accumulation: int = 1, **fields):
    """Losses of both stages, the statistics between them and the weights at the end."""
    network = model(**fields)
    # Adam would make large steps of the rounding in gradients that are 0, such as those of the keys' biases.
    options = {"gradient_accumulation_steps": accumulation, "batch": batch, "optim": "sgd", "lr": 0.1}
    first = trained(network, steps=3, **options)
    rank, world = first.args.process_index, first.args.world_size
    mine = [examples()[index : index + 4] for index in range(4 * rank, COUNT, 4 * world)]
    network.fit_activation_statistics({"pixel_values": torch.stack([e["pixel_values"] for e in es])} for es in mine)
    network.set_stage("class")
    second = trained(network, steps=3, **options)
    losses = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (first, second)]
    return {
        "world": world,
        "losses": losses,
        "state": {name: tensor.clone() for name, tensor in network.state_dict().items()},
    }


def one_step(shard: bool) -> dict[str, torch.Tensor]:
    """Gradients of one batch of 8, or of this rank's half of it, every parameter sharded."""
    network = model(freeze_backbone=False, training_stage="joint").train()
    data, rank = examples(8), 0
    if shard:
        rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
        data = data[4 * rank : 4 * rank + 4]
        for layer in (part for part in network.modules() if isinstance(part, GradientCheckpointingLayer)):
            fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh)
    network(**{key: torch.stack([torch.as_tensor(e[key]) for e in data]) for key in data[0]}).loss.backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if shard else grad for name, grad in found.items()}


SCHEDULES = {
    "frozen": {},
    "free": {"freeze_backbone": False},
    "vanilla": {"readout": "vanilla", "freeze_backbone": False},
}
JOBS = {name: partial(two_stages, 4, **fields) for name, fields in SCHEDULES.items()}
JOBS["sharded"] = partial(one_step, True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of_ranks(__name__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_two_processes_train_what_one_trains(results, name):
    """Batches of 4 on 2 ranks are batches of 8 on one; DDP would raise at a parameter without gradient."""
    ranks = results(name)
    alone = two_stages(8, **SCHEDULES[name])
    assert [rank["world"] for rank in ranks] == [2, 2] and alone["world"] == 1
    for key, tensor in alone["state"].items():
        torch.testing.assert_close(ranks[0]["state"][key], ranks[1]["state"][key], rtol=0, atol=0)
        torch.testing.assert_close(ranks[0]["state"][key], tensor, rtol=1e-3, atol=1e-4)
    numpy.testing.assert_allclose(ranks[0]["losses"], alone["losses"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.compatibility("FSDP2", method="dot_cbm", library="torch", gloo=True)
def test_sharded_parameters_get_the_gradients_of_whole_ones(results):
    expected = one_step(False)
    for rank in results("sharded"):
        assert rank.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(rank[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_accumulation_changes_nothing():
    whole, parts = two_stages(8), two_stages(4, accumulation=2)
    numpy.testing.assert_allclose(parts["losses"], whole["losses"], rtol=1e-4, atol=1e-4)
    for key, tensor in whole["state"].items():
        torch.testing.assert_close(parts["state"][key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_two_stages_learn_the_concepts_and_then_the_classes_and_interventions_help():
    network = model(saliency="uniform", freeze_backbone=False)
    trained(network, steps=60, batch=16, lr=3e-3)
    batch = torch.stack([example["pixel_values"] for example in examples()])
    labels = torch.tensor([example["labels"] for example in examples()])
    concepts = torch.stack([example["concept_labels"] for example in examples()])
    network.eval()
    found = network(batch).concept_probs
    assert ((found > 0.5) == concepts).float().mean() > 0.9
    network.fit_activation_statistics([{"pixel_values": batch}])
    network.set_stage("class")
    trained(network, steps=40, batch=16, lr=5e-2)
    network.eval()
    accuracy = (network(batch).logits.argmax(-1) == labels).float().mean()
    assert accuracy > 0.95
    # The other class' concepts make it the other class.
    turned = network(batch, interventions=1.0 - concepts).logits.argmax(-1)
    assert (turned == 1 - labels).all()
    known = network(batch, interventions=concepts.float()).logits.argmax(-1)
    assert (known == labels).float().mean() >= accuracy


def evaluated(*, concepts: bool, label_names: list[str]):
    seen = {}

    def metrics(prediction):
        seen["shapes"] = [part.shape for part in prediction.predictions]
        seen["labels"] = prediction.label_ids
        return {"accuracy": float((prediction.predictions[0].argmax(-1) == seen_labels(prediction)).mean())}

    def seen_labels(prediction):
        return prediction.label_ids[0] if isinstance(prediction.label_ids, tuple) else prediction.label_ids

    arguments = TrainingArguments(
        tempfile.mkdtemp(), label_names=label_names, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model(), arguments, compute_metrics=metrics, eval_dataset=examples(8, concepts=concepts))
    return trainer.evaluate(), seen


def test_an_evaluation_with_both_kinds_of_labels_gathers_small_outputs_only():
    metrics, seen = evaluated(concepts=True, label_names=["labels", "concept_labels"])
    assert seen["shapes"] == [(8, 2), (8, 4), (8, 4)] and len(seen["labels"]) == 2
    assert metrics["eval_loss"] > 0 and "eval_accuracy" in metrics


def test_an_evaluation_with_class_labels_alone_has_a_loss_and_metrics():
    metrics, seen = evaluated(concepts=False, label_names=["labels"])
    assert seen["labels"].shape == (8,) and "eval_accuracy" in metrics
    assert metrics["eval_loss"] == pytest.approx(0.7, abs=2.0)


def test_cached_features_go_through_the_trainer():
    network = model(adapter_dropout=0.0)
    data = []
    for example in examples(8):
        token, patches = network.model.extract_features(example["pixel_values"][None])
        rest = {name: value for name, value in example.items() if name != "pixel_values"}
        data.append(rest | {"token": token[0], "patches": patches[0]})

    def collate(batch):
        together = {name: torch.stack([torch.as_tensor(e[name]) for e in batch]) for name in batch[0]}
        return {"patch_features": (together.pop("token"), together.pop("patches")), **together}

    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=2,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        label_names=["labels", "concept_labels"],
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    before = network.model.visual_adapter.layers[0].weight.clone()
    trainer = Trainer(network, arguments, train_dataset=data, eval_dataset=data, data_collator=collate)
    trainer.train()
    assert not torch.equal(network.model.visual_adapter.layers[0].weight, before)
    assert trainer.evaluate()["eval_loss"] > 0
