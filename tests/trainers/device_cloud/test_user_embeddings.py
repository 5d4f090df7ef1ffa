"""Stages 2 and 3 of anonymous personalisation: what is trained, what is not, and what of a user leaves the device."""

import dataclasses
import tempfile

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_models.personal_lm import SimulatedNoise, UserDistribution, UserDistributionConfig, kept_secret
from tests.gloo_ranks import results_of_ranks
from tests.hf_models.personal_lm.tiny_personal_lm import VOCABULARY, WIDTH, classifier, draws, language_model, texts
from trainers.device_cloud.static_user_embeddings import NumberedUserCollator, StaticUserModel, fine_tune_alone
from trainers.device_cloud.user_embedding_mixture import (
    assign_components,
    clustered_components,
    component_losses,
    random_components,
    upload_parts,
)
from trainers.device_cloud.user_embedding_wire import send_requests
from trainers.device_cloud.user_embeddings import (
    AnonymousUserCollator,
    FitArguments,
    fit_user_distribution,
    sample_losses,
    text_key,
)
from trainers.federated.core.wire import WireMeter, unpack


def pad(rows):
    """A batch of rows of `input_ids` and `labels`, refusing what it does not know."""
    assert all(set(row) == {"input_ids", "labels"} for row in rows), "a column of the user reached the collator"
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([r["labels"] for r in rows])}


def rows(users: int = 3, each: int = 6, *, seed: int = 0) -> list[dict]:
    """Each user gives their own label to any text."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for user in range(users):
        for _ in range(each):
            length = int(torch.randint(3, 7, (1,), generator=generator))
            ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
            made.append({"input_ids": ids, "labels": user % 3, "user": user})
    return made


def table(design: str = "gaussian", users: int = 3, **fields) -> UserDistribution:
    config = UserDistributionConfig(WIDTH, design=design, **({"num_components": 3} | fields))
    return UserDistribution(config, users, **({"components": torch.randn(3, 1, WIDTH)} if design == "mixture" else {}))


FAST = FitArguments(learning_rate=0.05, steps=12, batch_size=4, evaluate_every=4)
UNTRAINED = dataclasses.replace(FAST, learning_rate=1e-30)
SIMULATED = {"simulation": True, "seed": 0}


def unseen_loss(model, users: UserDistribution, texts: list[dict], collate=pad) -> float:
    """On texts that neither the fit nor the choice of its best step has seen, many draws of each."""
    many, losses = [row for row in texts for _ in range(20)], []
    for start in range(0, len(many), 120):
        part = many[start : start + 120]
        drawn = users.sample(torch.tensor([row["user"] for row in part]), noise=SimulatedNoise(start)).detach()
        batch = collate([{name: value for name, value in row.items() if name != "user"} for row in part])
        losses.append(sample_losses(model, batch | {"user_embeds": drawn}).detach())
    return float(torch.cat(losses).mean())


# --- stage 2


@pytest.mark.parametrize("design", ["gaussian", "beta"])
def test_stage_2_changes_no_weight_of_the_backbone_and_lowers_the_loss(design):
    model, users, control = classifier().train(), table(design), table(design)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    args = FAST if design == "gaussian" else dataclasses.replace(FAST, learning_rate=0.2)
    record = fit_user_distribution(model, users, rows(), rows(seed=1), pad, args, **SIMULATED)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags and model.training
    assert sum(record.hold_out_after) < sum(record.hold_out_before) - 0.1 * len(record.hold_out_before)
    assert max(record.best_step) > 0 and record.randomness == "simulation=True, seed 0"
    assert len(record.radius_over_std) == (3 if design == "gaussian" else 0)
    fit_user_distribution(model, control, rows(), rows(seed=1), pad, UNTRAINED, **SIMULATED)
    model.eval()
    assert unseen_loss(model, users, rows(seed=2)) < unseen_loss(model, control, rows(seed=2)) - 0.1


@pytest.mark.parametrize("design", ["gaussian", "beta"])
@pytest.mark.parametrize("options", [SIMULATED, {}], ids=["simulated", "private"])
def test_who_learns_nothing_has_the_same_hold_out_every_time(design, options):
    """Noise of its own each time would have made the best of several measurements an improvement by luck."""
    record = fit_user_distribution(classifier(), table(design), rows(), rows(seed=1), pad, UNTRAINED, **options)
    assert record.hold_out_after == record.hold_out_before and record.best_step == [0, 0, 0]


def test_many_users_at_once_are_each_as_alone():
    """Equal texts for all, noise switched off, and the same order: the rows of one table and three runs agree."""

    class Still(SimulatedNoise):
        def normal(self, shape):
            return torch.zeros(shape, dtype=torch.float64)

        def uniform(self, shape):
            return torch.linspace(0.1, 0.9, shape[0], dtype=torch.float64)

    from trainers.device_cloud import user_embeddings

    model, together = classifier(), table()
    original = user_embeddings.noise_source
    user_embeddings.noise_source = lambda **_: Still(0)
    try:
        fit_user_distribution(model, together, rows(), rows(seed=1), pad, FAST, **SIMULATED)
        for user in range(3):
            alone = table(users=1)
            own = [[row | {"user": 0} for row in part if row["user"] == user] for part in (rows(), rows(seed=1))]
            fit_user_distribution(model, alone, *own, pad, FAST, **SIMULATED)
            torch.testing.assert_close(together.mean[user], alone.mean[0], rtol=1e-3, atol=1e-4)
    finally:
        user_embeddings.noise_source = original


def test_the_radius_holds_and_more_steps_go_further():
    model, ratios = classifier(), []
    for steps in (2, 12):
        users = table()
        args = FitArguments(learning_rate=0.05, steps=steps, batch_size=4, evaluate_every=steps)
        record = fit_user_distribution(model, users, rows(), rows(), pad, args, **SIMULATED)
        ratios.append(sum(record.radius_over_std))
        bounded = table(max_radius=0.02)
        fit_user_distribution(model, bounded, rows(), rows(), pad, args, **SIMULATED)
        assert (bounded.mean - bounded.centre).flatten(1).norm(dim=1).max() <= 0.02 + 1e-6
    assert ratios[0] < ratios[1]


def test_a_language_model_s_users_are_fitted_too():
    def collate(batch):
        made = pad([row | {"labels": 0} for row in batch])
        return made | {"labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}

    def spoken(seed):  # every user says words of their own
        return [
            row | {"input_ids": [5 + 10 * row["user"] + i % 3 for i in row["input_ids"]]} for row in rows(seed=seed)
        ]

    losses, model = [], language_model()
    for args in (dataclasses.replace(FAST, steps=40, evaluate_every=10), UNTRAINED):
        users = UserDistribution(UserDistributionConfig(WIDTH, 2), 3)
        record = fit_user_distribution(model, users, spoken(0), spoken(1), collate, args, **SIMULATED)
        losses.append((sum(record.hold_out_after), unseen_loss(model, users, spoken(2), collate)))
    assert losses[0][0] < losses[1][0] - 0.3 and losses[0][1] < losses[1][1] - 0.1


def test_losses_of_texts_average_to_the_model_s():
    model = classifier()
    batch = texts() | {"user_embeds": draws(), "labels": torch.tensor([0, 2])}
    torch.testing.assert_close(sample_losses(model, batch).mean(), model(**batch).loss)
    speaking, ids = language_model(), texts(None)
    batch = ids | {"user_embeds": draws(1, 2), "labels": ids["input_ids"]}
    whole = speaking(**batch).loss * 6  # the user's last token predicts the first of the text, which is left out here
    first = torch.nn.functional.cross_entropy(
        speaking.model(inputs_embeds=draws(1, 2)).logits[:, -1], ids["input_ids"][:, 0]
    )
    torch.testing.assert_close(sample_losses(speaking, batch)[0] * 5, whole - first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"train": rows(2)}, "train has no row of user 2"),
        ({"validation": rows(1)}, "validation has no row of user 1"),
        ({"train": [row | {"user": 7} for row in rows()]}, r"train\[0\] has user=7"),
        ({"distribution": table("mixture")}, "assign_components"),
        ({"seed": None}, "operating"),
    ],
)
def test_what_cannot_be_fitted_is_refused(part, message):
    given = {"distribution": table(), "train": rows(), "validation": rows(seed=1)} | SIMULATED | part
    with pytest.raises(ValueError, match=message):
        fit_user_distribution(
            classifier(), given.pop("distribution"), given.pop("train"), given.pop("validation"), pad, FAST, **given
        )


# --- mixtures


def test_each_user_gets_the_component_of_least_loss():
    model, users = classifier(), table("mixture", std=1e-4)
    losses = assign_components(model, users, rows(), pad, **SIMULATED)
    for user in range(3):
        own = [row for row in rows() if row["user"] == user]
        batch = pad([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in own])
        for k in range(3):
            embeds = users.components[k].expand(len(own), -1, -1)
            expected = sample_losses(model, batch | {"user_embeds": embeds}).mean()
            torch.testing.assert_close(losses[user, k], expected.detach(), rtol=1e-2, atol=1e-2)
    assert torch.equal(users.weights.argmax(1), losses.argmin(1)) and set(users.weights.flatten().tolist()) == {0, 1}


def test_a_temperature_is_the_minimum_of_the_expected_loss_with_an_entropy_bonus():
    model, users = classifier(), table("mixture")
    losses = assign_components(model, users, rows(), pad, temperature=0.3, **SIMULATED)
    torch.testing.assert_close(users.weights, (-losses / 0.3).softmax(1))

    def objective(weights):
        return (weights * losses).sum(1) - 0.3 * torch.special.entr(weights).sum(1)

    best = objective(users.weights)
    for seed in range(20):
        other = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed))
        assert (best <= objective(other / other.sum(1, keepdim=True)) + 1e-5).all()
    again = component_losses(model, users, rows(), pad, noise=SimulatedNoise(0))
    torch.testing.assert_close(again, losses)
    for wrong in ({"temperature": -1.0}, {"distribution": table()}):
        with pytest.raises(ValueError):
            assign_components(model, wrong.pop("distribution", users), rows(), pad, **wrong)


def test_components_of_volunteers_and_of_nobody():
    pytest.importorskip("sklearn")
    groups = torch.tensor([0.0, 5.0, -5.0]).repeat_interleave(4)[:, None, None].expand(-1, 1, WIDTH)
    found = clustered_components(groups + 0.01 * torch.randn(12, 1, WIDTH), 3)
    assert sorted(round(float(c.mean())) for c in found) == [-5, 0, 5]
    with pytest.raises(ValueError, match="2 volunteers for 3"):
        clustered_components(groups[:2], 3)
    drawn = random_components(6, (2, WIDTH), 3.0)
    assert drawn.shape == (6, 2, WIDTH) and torch.allclose(
        drawn.flatten(1).norm(dim=1).mean(), torch.tensor(3.0), atol=0.5
    )


# --- stage 3


def test_a_batch_has_detached_draws_of_its_own_users_and_no_user():
    users = table()
    with torch.no_grad():
        users.mean.copy_(torch.arange(3.0)[:, None, None].expand(-1, 1, WIDTH) * 100)
    chosen = [rows()[index] for index in (13, 0, 7)]
    batch = AnonymousUserCollator(pad, users)(chosen)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "user_embeds"}
    assert not batch["user_embeds"].requires_grad
    assert batch["user_embeds"].mean((1, 2)).div(100).round().tolist() == [2, 0, 1]
    assert "user" in chosen[0], "rows are not changed"


@pytest.mark.parametrize("design", ["gaussian", "beta", "mixture"])
@pytest.mark.parametrize("options", [SIMULATED, {}], ids=["simulated", "private"])
def test_a_text_has_one_draw_whatever_is_beside_it_and_every_text_another(design, options):
    collator, data = AnonymousUserCollator(pad, table(design), **options), rows()
    whole = collator(data)["user_embeds"]
    assert len({tuple(row.flatten().tolist()) for row in whole}) == len(data)
    for indices in ([0], [5, 17, 2], list(range(17, -1, -1))):
        assert torch.equal(collator([data[index] for index in indices])["user_embeds"], whole[indices])
    relabelled = [row | {"labels": 0} for row in data]
    assert torch.equal(collator(relabelled)["user_embeds"], whole), "the text links what it is labelled with"
    theirs = collator([row | {"user": (row["user"] + 1) % 3} for row in data])["user_embeds"]
    assert not (theirs == whole).flatten(1).all(1).any()


def test_draws_of_another_object_are_the_same_with_the_secret_alone(tmp_path):
    users, data = table(), rows()
    secret = kept_secret(tmp_path / "secret.bin")
    assert kept_secret(tmp_path / "secret.bin") == secret and (tmp_path / "secret.bin").stat().st_mode & 0o77 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["secret.bin"]
    one, again = (AnonymousUserCollator(pad, users, secret=secret)(data)["user_embeds"] for _ in range(2))
    assert torch.equal(one, again)
    without = AnonymousUserCollator(pad, users)(data)["user_embeds"]
    assert not (without == one).flatten(1).all(1).any()
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(ValueError, match="holds 3 bytes"):
        kept_secret(tmp_path / "short")


def test_another_fit_draws_with_other_noise():
    """The same noise at another mean would betray by how much the mean moved, to the last digit."""
    users, moved = table(), table()
    with torch.no_grad():
        moved.mean.add_(1.0)
    first, second = (AnonymousUserCollator(pad, t, **SIMULATED)(rows())["user_embeds"] for t in (users, moved))
    gap = second - first
    assert gap.std() > 0.2 and abs(float(gap.mean()) - 1.0) < 0.1


def test_fresh_draws_are_an_option_and_what_does_not_go_with_a_secret_is_refused(monkeypatch):
    collator = AnonymousUserCollator(pad, table(), fresh=True)
    first, second = (collator(rows())["user_embeds"] for _ in range(2))
    assert not (first == second).flatten(1).all(1).any()
    for options in ({"fresh": True}, SIMULATED):
        with pytest.raises(ValueError, match="leave it out"):
            AnonymousUserCollator(pad, table(), secret=bytes(32), **options)
    with pytest.raises(ValueError, match="it has 32"):
        AnonymousUserCollator(pad, table(), secret=b"short")(rows())
    with pytest.raises(ValueError, match="no column 'words'"):
        AnonymousUserCollator(pad, table(), text_columns=["words"])(rows())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="would draw twice for one text"):
        AnonymousUserCollator(pad, table())
    AnonymousUserCollator(pad, table(), secret=bytes(32))


def test_parts_have_texts_of_every_user_and_no_text_twice():
    data = rows(users=3, each=7)
    data += [data[0] | {"labels": 2}, data[8] | {"user": 0}]  # said again, and another's words
    parts = upload_parts(Dataset.from_list(data), 3)
    assert sorted(index for part in parts for index in part) == list(range(len(data)))
    for part in parts:
        assert {data[index]["user"] for index in part} == {0, 1, 2}
    seen = [{(data[index]["user"], text_key(data[index])) for index in part} for part in parts]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    for wrong, message in ((0, "positive"), (8, "has 7 texts")):
        with pytest.raises(ValueError, match=message):
            upload_parts(rows(each=7), wrong)


def test_only_the_batch_s_users_are_drawn(monkeypatch):
    collator, asked = AnonymousUserCollator(pad, table()), []
    real = UserDistribution.sample
    monkeypatch.setattr(
        UserDistribution, "sample", lambda self, users, **o: asked.append(users.tolist()) or real(self, users, **o)
    )
    collator([rows()[index] for index in (13, 0)])
    assert asked == [[2, 0]]


def test_a_user_without_a_distribution_is_named_or_gets_zeros():
    strangers = [row | {"user": user} for row, user in zip(rows(), (1, -1, 9))]
    with pytest.raises(ValueError, match="user -1 has no distribution among 3"):
        AnonymousUserCollator(pad, table())(strangers)
    embeds = AnonymousUserCollator(pad, table(), missing_user="zero")(strangers)["user_embeds"]
    assert embeds[0].abs().sum() > 0 and not embeds[1:].any()
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        AnonymousUserCollator(pad, table())([{"input_ids": [5], "labels": 0}])
    with pytest.raises(ValueError, match="missing_user"):
        AnonymousUserCollator(pad, table(), missing_user="first")


def arguments(folder, **fields) -> TrainingArguments:
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    options |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "remove_unused_columns": False}
    return TrainingArguments(str(folder), **(options | fields))


def test_stage_3_is_an_ordinary_run_that_leaves_the_distributions_alone(tmp_path):
    model, users = classifier(), table()
    collator = AnonymousUserCollator(pad, users, **SIMULATED)
    before = model.classifier.weight.detach().clone()
    seen = []

    class Watching(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(set(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Watching(model, arguments(tmp_path), train_dataset=rows(), data_collator=collator)
    trainer.train()
    trainer.save_model(tmp_path / "cloud")
    assert seen and all("user" not in names and "user_embeds" in names for names in seen)
    assert not torch.equal(model.classifier.weight, before)
    assert torch.equal(users.mean, table().mean) and users.mean.grad is None
    saved = load_file(tmp_path / "cloud" / "model.safetensors")
    assert saved.keys() <= model.state_dict().keys() and not any("mean" in name or "user" in name for name in saved)


def test_epochs_of_a_run_upload_a_text_once(tmp_path):
    """Three epochs: what reached the model of a text is one embedding, and a run that goes on has the same."""
    seen = {}

    class Watching(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            for ids, embeds in zip(inputs["input_ids"].tolist(), inputs["user_embeds"]):
                text = tuple(i for i in ids if i)
                seen.setdefault(text, []).append(embeds.clone())
            return super().compute_loss(model, inputs, *args, **kwargs)

    for steps, resume in ((5, False), (15, True)):
        collator = AnonymousUserCollator(pad, table(), **SIMULATED)
        args = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=5)
        trainer = Watching(classifier(), args, train_dataset=rows(), data_collator=collator)
        trainer.train(resume_from_checkpoint=resume)
    assert len(seen) == 18 and sum(map(len, seen.values())) > 50
    assert all(torch.equal(e, draws[0]) for draws in seen.values() for e in draws)


def test_ranks_of_a_simulation_draw_alike_and_if_fresh_differently_and_repeatably(monkeypatch):
    for fresh in (False, True):
        drawn = {}
        for rank in ("0", "1", "0"):
            monkeypatch.setenv("RANK", rank)
            embeds = AnonymousUserCollator(pad, table(), fresh=fresh, **SIMULATED)([rows()[0]])["user_embeds"]
            assert torch.equal(drawn.setdefault(rank, embeds), embeds)
        assert torch.equal(drawn["0"], drawn["1"]) != fresh


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True])
def test_workers_of_a_loader_draw_once_for_a_text_or_if_fresh_differently_in_each_epoch(fresh):
    collator = AnonymousUserCollator(pad, table(), fresh=fresh, **SIMULATED)
    same = [rows()[0]] * 8
    loader = torch.utils.data.DataLoader(same, batch_size=2, num_workers=2, collate_fn=collator)
    drawn = torch.cat([batch["user_embeds"] for _ in range(2) for batch in loader]).flatten(1)
    assert len({tuple(row.tolist()) for row in drawn}) == (16 if fresh else 1)


def rank_trains():
    """Stage 3 on this rank: the weights, and the embedding of every text that it saw, by the text."""
    seen = {}

    class Watching(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            for ids, embeds in zip(inputs["input_ids"].tolist(), inputs["user_embeds"]):
                seen.setdefault(tuple(i for i in ids if i), set()).add(tuple(embeds.flatten().tolist()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = classifier()
    with tempfile.TemporaryDirectory() as folder:
        collator = AnonymousUserCollator(pad, table(), **SIMULATED)
        Watching(model, arguments(folder, max_steps=12), train_dataset=rows(), data_collator=collator).train()
    return {"weights": model.classifier.weight.detach().clone(), "seen": seen}


JOBS = {"stage3": rank_trains}


@pytest.mark.slow
def test_two_processes_train_one_model_on_one_draw_for_each_text(tmp_path):
    first, second = results_of_ranks(__name__, tmp_path)("stage3")
    torch.testing.assert_close(first["weights"], second["weights"])
    both = first["seen"].keys() & second["seen"].keys()
    assert len(first["seen"].keys() | second["seen"].keys()) == 18 and len(both) > 4
    for text in first["seen"].keys() | second["seen"].keys():
        assert len(first["seen"].get(text, set()) | second["seen"].get(text, set())) == 1
    collator = AnonymousUserCollator(pad, table(), **SIMULATED)
    alone = {tuple(row["input_ids"]): collator([row])["user_embeds"][0] for row in rows()}
    assert all(first["seen"][text] == {tuple(alone[text].flatten().tolist())} for text in both)


def test_what_is_sent_has_no_user_no_padding_and_is_what_is_counted():
    users, meter = table(), WireMeter()
    chosen = [rows()[index] for index in (0, 7)]
    batch = AnonymousUserCollator(pad, users)(chosen)
    payloads = send_requests(meter, batch, users=[row["user"] for row in chosen], round=2, what="training")
    assert meter.totals() == {"up": sum(map(len, payloads)), "down": 0} and set(meter.by_user()) == {0, 1}
    for payload, row, embeds in zip(payloads, chosen, batch["user_embeds"]):
        tensors, metadata = unpack(payload)
        assert set(tensors) == {"input_ids", "user_embeds", "labels"} and metadata == {}
        assert tensors["input_ids"].tolist() == row["input_ids"] and torch.equal(tensors["user_embeds"], embeds)
    numbered = send_requests(meter, NumberedUserCollator(pad)(chosen))
    assert [int(unpack(payload)[0]["user"]) for payload in numbered] == [0, 1]


# --- baselines


def test_a_static_embedding_is_looked_up_and_trained(tmp_path):
    model = StaticUserModel(classifier(), 3)
    batch = NumberedUserCollator(pad)(rows()[::6])
    assert batch["user"].tolist() == [0, 1, 2]
    zero = model.model(
        **{name: value for name, value in batch.items() if name != "user"}, user_embeds=torch.zeros(3, 1, WIDTH)
    )
    torch.testing.assert_close(model(**batch).logits, zero.logits)
    Trainer(
        model, arguments(tmp_path, max_steps=30), train_dataset=rows(), data_collator=NumberedUserCollator(pad)
    ).train()
    assert (model.table.detach().flatten(1).norm(dim=1) > 0).all()
    stranger = dict(batch) | {"user": torch.full((3,), -1)}
    model.eval()
    assert torch.equal(model(**stranger).logits, model(**stranger).logits)


def test_a_device_alone_learns_its_own_labels_and_leaves_the_cloud_s_model():
    cloud = classifier()
    own = [{"input_ids": r["input_ids"], "labels": 1} for r in rows(1)]
    before = [parameter.detach().clone() for parameter in cloud.parameters()]
    device = fine_tune_alone(cloud, own, pad, learning_rate=1e-2, steps=15, noise=SimulatedNoise(0))
    assert all(torch.equal(parameter, old) for parameter, old in zip(cloud.parameters(), before))
    assert sample_losses(device, pad(own)).mean() < sample_losses(cloud, pad(own)).mean()


def test_rows_of_a_data_set_are_taken_too():
    users = table()
    args = FitArguments(learning_rate=0.05, steps=2, batch_size=2, evaluate_every=1)
    parts = [Dataset.from_list(rows()), Dataset.from_list(rows(seed=1))]
    assert len(fit_user_distribution(classifier(), users, *parts, pad, args, **SIMULATED).best_step) == 3
    for wrong in ({"steps": 0}, {"learning_rate": -1.0}):
        with pytest.raises(ValueError, match="positive"):
            FitArguments(**wrong)
