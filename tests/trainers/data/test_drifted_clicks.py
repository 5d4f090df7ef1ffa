"""The drawn clicks have the drift that was asked for, and drift does to a fine-tuned device what it is drawn for."""

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

from trainers.data.drifted_clicks import draw_drifted_clicks
from trainers.evaluation.users import auc_by_user


def rates(clicks):
    labels = np.asarray(clicks.splits["train"]["label"][:]).reshape(clicks.drift.size, -1)
    return labels.mean(axis=1)


def test_more_drift_spreads_the_rates_of_the_users():
    spread = {drift: rates(draw_drifted_clicks(drift=drift)).std() for drift in (0.0, 1.0, 3.0)}
    # label_correction.md, 6.1: .09, .18, .33
    assert spread == pytest.approx({0.0: 0.09, 1.0: 0.18, 3.0: 0.33}, abs=0.015)
    assert 0.35 < rates(draw_drifted_clicks(drift=0.0)).mean() < 0.42


def test_a_seed_is_a_draw_and_no_item_is_shown_twice_to_a_user():
    first, again, other = (draw_drifted_clicks(num_users=20, seed=seed) for seed in (1, 1, 2))
    for split, rows in (("train", 100), ("test", 60)):
        assert first.splits[split].to_dict() == again.splits[split].to_dict() != other.splits[split].to_dict()
        assert len(first.splits[split]) == 20 * rows
    assert (first.cloud_vector == other.cloud_vector).all()
    shown = np.concatenate([np.asarray(first.splits[s]["item"][:]).reshape(20, -1) for s in ("train", "test")], axis=1)
    assert all(len(set(row)) == 160 for row in shown.tolist())


def test_the_cloud_model_is_the_product_of_user_and_item():
    clicks = draw_drifted_clicks(num_users=30, num_items=200)
    data = clicks.data()
    rows, model = data.rows("test"), clicks.model(data)
    logits = model(**rows.tensors).logits.detach().numpy()
    items = clicks.items[np.asarray(clicks.splits["test"]["item"][:])]
    np.testing.assert_allclose(logits, items @ clicks.cloud_vector, atol=1e-5)
    assert model.head.bias == 0 and not hasattr(model.model, "first_order")


def fine_tuned_auc(clicks, data, labels):
    """Mean AUC of the users after 60 full-batch steps of 0.5 on each one's vector, all users at once."""
    model, users = clicks.model(data), clicks.drift.size
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    name = "model.embeddings.tables.user.weight"
    train, test = (data.rows(s).tensors["categorical_features"].view(users, -1, 2) for s in ("train", "test"))
    train[..., 0] = test[..., 0] = 2  # each user has a table of three rows

    def loss(table, ids, targets):
        return functional_call(
            model, parameters | {name: table}, (), {"categorical_features": ids, "labels": targets}
        ).loss

    step = vmap(grad(loss))
    tables = parameters[name][:3].expand(users, -1, -1)
    for _ in range(60 if labels is not None else 0):
        tables = tables - 0.5 * step(tables, train, labels)
    logits = vmap(lambda table, ids: functional_call(model, parameters | {name: table}, (ids,)).logits)(tables, test)
    rows = data.rows("test")
    assert (rows.users.view(users, -1).diff() == 0).all(), "a table is one user's"
    return auc_by_user(logits.flatten().numpy(), rows.tensors["labels"].numpy(), rows.users.numpy()).mean()


@pytest.mark.slow
def test_plain_fine_tuning_harms_where_there_is_drift_and_helps_where_there_is_none():
    found = {}
    for drift in (0.0, 3.0):
        clicks = draw_drifted_clicks(drift=drift)
        data = clicks.data()
        labels = data.rows("train").tensors["labels"].view(clicks.drift.size, -1)
        local, target = labels.mean(1, keepdim=True), labels.mean()
        lowered = target / local.clamp_min(1e-9) * labels
        raised = labels + (1 - labels) * (target - local) / (1 - local).clamp_min(1e-9)
        scaled = torch.where(local > target, lowered, raised)
        found[drift] = [fine_tuned_auc(clicks, data, y) for y in (None, labels, scaled)]
    cloud, plain, scaled = found[3.0]
    assert plain < cloud - 0.02 and scaled > cloud + 0.005 and scaled > plain + 0.03
    cloud, plain, scaled = found[0.0]
    assert plain > cloud + 0.02 and abs(scaled - plain) < 0.01


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="550 \\+ 60 rows need as many items"):
        draw_drifted_clicks(num_local=550)
    with pytest.raises(ValueError, match="drift not negative"):
        draw_drifted_clicks(drift=-1.0)
