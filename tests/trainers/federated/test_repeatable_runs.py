"""What makes a run another, or the same: rows that are drawn when they are read, stops, damage, other settings."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    default_data_collator,
)

from tests.trainers.federated.tiny_federation import Quadratic, clicks, federation, quadratic_clients, recommender
from trainers.data import train_tokenizer
from trainers.federated import MCPSGD, BlockSchedule, FedAvg, FedLaAvg, FedSubAvg


SAVING = {"save_strategy": "steps"}


class Seen(Quadratic):
    """Writes down what it is shown."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def forward(self, target, labels=None):
        self.shown += target.flatten().tolist()
        return super().forward(target)


class Drawing(torch.utils.data.Dataset):
    """Rows with noise, as an augmentation of images is."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"target": index + torch.rand(())}


def _noisy(rows):
    return {"target": [value + float(torch.rand(())) for value in rows["target"]]}


def _jittered(rows):
    batch = default_data_collator(rows)
    return batch | {"target": batch["target"] + torch.rand(batch["target"].shape)}


TARGETS = {"a": 0.0, "b": 1.0, "c": 10.0}
KINDS = {
    "transform": lambda: ({"partition_by": list(TARGETS)}, quadratic_clients(TARGETS).with_transform(_noisy)),
    "dataset": lambda: ({"partition_by": list(TARGETS)}, Drawing()),
    "collator": lambda: ({"data_collator": _jittered}, quadratic_clients(TARGETS)),
}


def _made(folder, kind, rounds, **args):
    options, dataset = KINDS[kind]()
    args = {"remove_unused_columns": False} | args
    return federation(folder, Seen(), dataset, FedAvg(), rounds=rounds, local_steps=1, args=args, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_each_round_draws_anew_and_a_resumed_run_draws_the_same(tmp_path, kind):
    whole = _made(tmp_path / "whole", kind, 4)
    whole.train()
    shown = whole.model.shown
    assert len(set(shown)) == len(shown) == 4 * len(TARGETS)
    part = _made(tmp_path / "part", kind, 2, **SAVING)
    part.train()
    torch.rand(7)  # whatever else was drawn in between
    again = _made(tmp_path / "part", kind, 4, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert part.model.shown + again.model.shown == shown
    assert torch.equal(again.strategy.parameters["x"], whole.strategy.parameters["x"])


def test_equal_candidates_have_equal_losses_where_a_collator_draws(tmp_path):
    schedule, comparisons = BlockSchedule.by_rounds([1, 1]), []

    class Watched(MCPSGD):
        def compare(self, round, losses):
            comparisons.append(losses)
            return super().compare(round, losses)

    federation(
        tmp_path,
        Quadratic(),
        quadratic_clients(TARGETS),
        Watched(schedule),
        rounds=2,
        block_by=[0, 0, 0],
        data_collator=_jittered,
        args={"learning_rate": 0.0},
    ).train()
    losses = [found for compared in comparisons for found in compared.values()]
    assert losses and all(len(found) == 2 and len(set(found.values())) == 1 for found in losses)


def test_masking_at_random_has_no_submodels(tmp_path):
    texts = [f"def add_{number}(x): return x + {number}" for number in range(24)]
    tokenizer = train_tokenizer(texts, vocab_size=300, show_progress=False)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes)
    rows = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    made = {"partition_by": [index % 6 for index in range(len(rows))]}
    made["data_collator"] = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    fed = federation(tmp_path, BertForMaskedLM(config), rows, FedSubAvg(), rounds=1, **made)
    with pytest.raises(ValueError, match="DataCollatorForLanguageModeling draws which rows.*submodels=False"):
        fed.train()
    whole = federation(tmp_path, BertForMaskedLM(config), rows, FedAvg(), rounds=1, **made)
    assert whole.train().metrics["train_loss"] > 0


def test_runs_stop_early_and_keep_the_round_they_stopped_behind(tmp_path):
    args = SAVING | {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "learning_rate": 0.5}
    opposite = clicks().map(lambda row: {"labels": 1 - row["labels"]})

    def made(rounds):
        return federation(
            tmp_path,
            recommender(),
            clicks(),
            FedAvg(),
            rounds=rounds,
            commit_every=10,
            args=args | {"greater_is_better": False},
            eval_dataset=opposite,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        )

    fed = made(15)
    fed.train()
    assert len(fed.history) == 3 and fed.state.best_global_step == 1
    assert [path.name for path in (tmp_path / "rounds").iterdir()] == ["round-00000002"]
    again = made(4)
    assert again.train(resume_from_checkpoint=True).global_step == 4


def test_a_client_without_rows_is_not_evaluated(tmp_path):
    rows = clicks()
    fed = federation(tmp_path, recommender(), rows, FedAvg(), rounds=1)
    fed.train()
    found = fed.evaluate({"u0": rows.select([0, 1]), "u1": rows.select([])}, per_client=True)
    assert list(found["eval_by_client"]) == ["u0"] and found["eval_clients"] == 1


def test_a_failing_log_names_the_file_and_leaves_it(tmp_path):
    def made(rounds):
        return federation(tmp_path, recommender(), clicks(), FedAvg(), rounds=rounds, args=SAVING)

    made(2).train()
    log = tmp_path / "federated_log.jsonl"
    log.write_text("")
    with pytest.raises(ValueError, match=r"federated_log.jsonl has 0 bytes, and had \d+"):
        made(3).train(resume_from_checkpoint=True)
    assert log.read_text() == ""


@pytest.mark.parametrize("change", [{"warmup_steps": 2}, {"optim": "adamw_torch", "adam_beta1": 0.5}])
def test_other_schedules_and_optimizers_are_another_run(tmp_path, change):
    optim = {"optim": change.get("optim", "sgd")}
    federation(tmp_path, recommender(), clicks(), FedAvg(), rounds=2, args=SAVING | optim).train()
    other = federation(tmp_path, recommender(), clicks(), FedAvg(), rounds=3, args=SAVING | change)
    with pytest.raises(ValueError, match="Rounds of another run are here: (warmup_steps|optim_options)="):
        other.train(resume_from_checkpoint=True)


def test_an_adapter_on_another_base_is_another_run(tmp_path):
    def made(seed, rounds):
        model = recommender(seed)
        model.hidden.requires_grad_(False)
        return federation(tmp_path, model, clicks(), FedAvg(), rounds=rounds, args=SAVING)

    made(0, 2).train()
    with pytest.raises(ValueError, match="frozen_parameters="):
        made(1, 3).train(resume_from_checkpoint=True)
    assert made(0, 3).train(resume_from_checkpoint=True).global_step == 3


def test_the_memory_of_clients_reaches_back_as_far_as_the_rounds_that_are_kept(tmp_path):
    def made(folder, rounds):
        return federation(folder, recommender(), clicks(), FedLaAvg(learning_rate=0.1), rounds=rounds, args=SAVING)

    made(tmp_path / "part", 3).train()
    for newest in (2, 1):
        (tmp_path / "part" / "rounds" / f"round-0000000{newest}" / "record.json").write_text("damaged")
    again, whole = made(tmp_path / "part", 4), made(tmp_path / "whole", 4)
    again.train(resume_from_checkpoint=True)
    whole.train()
    for name, tensor in whole.strategy.parameters.items():
        assert torch.equal(again.strategy.parameters[name], tensor), name
