"""The five models against their equations, written out in float64 one row after the other."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_models.ctr import CtrForCtrPrediction, CtrModel
from hf_models.ctr.interactions import CtrInterest, inner_products, mean_of_known, pairwise_sum
from tests.hf_models.ctr.tiny_ctr import ARCHITECTURES, FEATURES, SIZES, batch, tiny, tiny_config


# --- the definition


def mlp(x, weights, name, act, output):
    layer = 0
    while (key := f"{name}layers.{layer}.linear.weight") in weights or f"{name}layers.{layer}.weight" in weights:
        key = key if key in weights else f"{name}layers.{layer}.weight"
        x = act(weights[key] @ x + weights[key.replace("weight", "bias")])
        layer += 1
    return weights[output] @ x


def attended(entries, target, w):
    """DIN's weighted sum of one history."""
    total = torch.zeros_like(target)
    for e in entries:
        unit = torch.cat([e, target, e - target, e * target])
        a = mlp(unit, w, "model.interest.", torch.sigmoid, "model.interest.output.weight")
        total = total + (a + w["model.interest.output.bias"]) * e
    return total


def row_logit(architecture, w, ids, numbers, sequences):
    """One row's logit by the equations in the module's docstring."""

    def mean(vectors, like):
        return sum(vectors) / len(vectors) if vectors else torch.zeros_like(like)

    names = ["user_id", "item_id", "hour"]
    logit = w["head.bias"][0]
    if architecture in ("lr", "wide_deep", "deepfm"):
        first = {n: w[f"model.first_order.tables.{n}.weight"][:, 0] for n in (*names, "genres", "history")}
        logit = logit + sum(first[n][i] for n, i in zip(names, ids))
        logit = logit + numbers @ w["model.first_order.numeric.weight"][:, 0]
        for n, entries in zip(("genres", "history"), sequences):
            logit = logit + mean([first[n][i] for i in entries if i], logit)
    if architecture == "lr":
        return logit
    tables = {n: w[f"model.embeddings.tables.{n}.weight"] for n in SIZES}
    fields = [tables[n][i] for n, i in zip(names, ids)]
    fields += [x * v for x, v in zip(numbers, w["model.embeddings.numeric.weight"])]
    item = fields[1]
    fields.append(mean([tables["genres"][i] for i in sequences[0] if i], item))
    history = [tables["item_id"][i] for i in sequences[1] if i]
    fields.append(attended(history, item, w) if architecture == "din" else mean(history, item))
    pairs = [fields[i] @ fields[j] for i in range(len(fields)) for j in range(i + 1, len(fields))]
    if architecture == "deepfm":
        logit = logit + sum(pairs)
    inputs = torch.cat(fields)
    if architecture == "pnn":
        inputs = torch.cat([inputs, torch.stack(pairs)])
    return logit + mlp(inputs, w, "model.", torch.relu, "head.output.weight")[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_its_equations(architecture):
    model, inputs = tiny(architecture).double(), batch(20)
    inputs["numeric_features"] = inputs["numeric_features"].double()
    out = model(**inputs)
    rows = zip(*(inputs[f"{kind}_features"] for kind in ("categorical", "numeric", "sequence")))
    expected = torch.stack([row_logit(architecture, model.state_dict(), *row) for row in rows])
    torch.testing.assert_close(out.logits, expected)
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(expected, inputs["labels"].double()))


def test_all_pairs_are_the_double_loop():
    fields = torch.randn(3, 5, 4, dtype=torch.float64)
    pairs = [(fields[:, i] * fields[:, j]).sum(-1) for i in range(5) for j in range(i + 1, 5)]
    torch.testing.assert_close(pairwise_sum(fields), sum(pairs))
    torch.testing.assert_close(inner_products(fields), torch.stack(pairs, dim=1))
    assert inner_products(fields[:, :1]).shape == (3, 0)


def test_one_history_entry_of_weight_one_is_its_embedding():
    unit = CtrInterest(tiny_config("din"))
    history, target = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 4)
    known = torch.tensor([[[True, False, False]], [[False, False, False]]])
    with torch.no_grad():
        unit.output.weight.zero_()
        unit.output.bias.fill_(1.0)
    interest, weights = unit(history, target, known)
    torch.testing.assert_close(interest[0, 0], history[0, 0, 0])
    assert (interest[1] == 0).all() and weights[0, 0].tolist() == [1.0, 0.0, 0.0]


def test_softmax_gives_one_entry_all_the_weight_and_an_empty_history_none():
    unit = CtrInterest(tiny_config("din", attention_normalization="softmax"))
    history, target = torch.randn(3, 1, 3, 4), torch.randn(3, 1, 4)
    known = torch.tensor([[[False, True, False]], [[False] * 3], [[True] * 3]])
    interest, weights = unit(history, target, known)
    torch.testing.assert_close(interest[0, 0], history[0, 0, 1])
    assert (interest[1] == 0).all() and torch.isfinite(interest).all()
    torch.testing.assert_close(weights[2].sum(), torch.tensor(1.0))


@pytest.mark.parametrize("normalization", ["none", "softmax"])
@pytest.mark.compatibility("Padding", method="ctr", note="of sequence features")
def test_the_candidate_chooses_in_the_history_and_padding_says_nothing(normalization):
    model, inputs = tiny("din", attention_normalization=normalization), batch()
    out = model(**inputs)
    assert out.interest_weights.shape == (6, 1, 4)
    assert ((out.interest_weights == 0) >= (inputs["sequence_features"][:, 1:] == 0)).all()
    other = dict(inputs, categorical_features=inputs["categorical_features"].roll(1, dims=0))
    assert (model(**other).interest_weights[:5] != out.interest_weights[:5]).any()
    longer = dict(inputs, sequence_features=F.pad(inputs["sequence_features"], (2, 3)))
    torch.testing.assert_close(model(**longer).logits, out.logits)
    shuffled = dict(inputs, sequence_features=inputs["sequence_features"].flip(-1))
    torch.testing.assert_close(model(**shuffled).logits, out.logits)


def test_the_mean_of_nothing_is_zero():
    embedded, known = torch.ones(1, 2, 3, 4), torch.tensor([[[True, True, False], [False] * 3]])
    assert mean_of_known(embedded, known).tolist() == [[[1.0] * 4, [0.0] * 4]]


def test_lr_becomes_scikit_learns_on_one_hot_features():
    torch.manual_seed(0)
    features = [{"name": "user", "role": "user", "vocab_size": 6}, {"name": "item", "role": "item", "vocab_size": 8}]
    ids = torch.stack([torch.randint(1, 6, (400,)), torch.randint(1, 8, (400,))], dim=1)
    labels = (torch.rand(400) < torch.sigmoid(0.7 * ids[:, 0] - 0.4 * ids[:, 1])).double()
    one_hot = np.concatenate([np.eye(6)[ids[:, 0]], np.eye(8)[ids[:, 1]]], axis=1)
    reference = LogisticRegression(C=10.0, solver="newton-cholesky", tol=1e-12).fit(one_hot, labels)
    model = CtrForCtrPrediction(tiny_config("lr", features=features)).double()
    tables = [t.weight for t in model.model.first_order.tables.values()]
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        penalty = sum(t.square().sum() for t in tables) / (2 * 10.0 * len(ids))
        loss = model(categorical_features=ids, labels=labels).loss + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        logits = model(categorical_features=ids).logits
    np.testing.assert_allclose(logits.numpy(), reference.decision_function(one_hot), atol=1e-4)
    np.testing.assert_allclose(torch.cat(tables).detach()[:, 0].numpy(), reference.coef_[0], atol=1e-4)
    assert float(model.head.bias.detach()) == pytest.approx(float(reference.intercept_[0]), abs=1e-4)


def test_without_hidden_layers_and_biases_deepfm_is_the_product_of_user_and_item():
    features = [{"name": "user", "role": "user", "vocab_size": 5}, {"name": "item", "role": "item", "vocab_size": 6}]
    model = tiny("deepfm", features=features, hidden_sizes=[], user_bias=False, item_bias=False, prior=None)
    assert set(dict(model.named_parameters())) == {
        "model.embeddings.tables.user.weight",
        "model.embeddings.tables.item.weight",
        "head.bias",
    }
    ids = torch.tensor([[1, 2], [4, 5], [2, 2]])
    user, item = (table.weight for table in model.model.embeddings.tables.values())
    expected = (user[ids[:, 0]] * item[ids[:, 1]]).sum(1) + model.head.bias
    torch.testing.assert_close(model(ids).logits, expected)


# --- the loss


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_model_predicts_the_prior_on_padding_and_every_parameter_learns(architecture):
    torch.manual_seed(0)
    model = CtrForCtrPrediction(tiny_config(architecture, initializer_range=0.01)).train()
    inputs = batch(64)
    empty = {name: torch.zeros_like(tensor) for name, tensor in inputs.items() if name != "labels"}
    assert torch.allclose(model(**empty).logits.sigmoid(), torch.tensor(0.3))
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        if ".tables." in name:
            assert (parameter[0] == 0).all() and (parameter.grad[0] == 0).all(), f"{name}: padding is trained"


def test_soft_labels_weights_and_offsets():
    model, inputs = tiny(), batch(labels=False)
    logits = model(**inputs).logits
    soft = torch.tensor([0.2, 0.9, 0.0, 1.0, 1.3, -0.2])  # a shifted label may leave [0, 1]
    weight, offset = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 3.0]), torch.linspace(-1, 1, 6)
    z = logits + offset
    terms = -(soft * F.logsigmoid(z) + (1 - soft) * F.logsigmoid(-z))
    out = model(**inputs, labels=soft, sample_weight=weight, logit_offset=offset)
    torch.testing.assert_close(out.loss, (weight * terms).sum() / weight.sum())
    torch.testing.assert_close(out.logits, logits)
    single = model(**inputs, labels=soft, logit_offset=torch.tensor(0.4)).loss
    torch.testing.assert_close(single, F.binary_cross_entropy_with_logits(logits + 0.4, soft))


def test_a_row_of_weight_zero_is_not_there():
    model, inputs = tiny(), batch()
    keep = torch.tensor([1.0, 1, 0, 1, 0, 0])
    left = {name: tensor[keep == 1] for name, tensor in inputs.items()}
    torch.testing.assert_close(model(**inputs, sample_weight=keep).loss, model(**left).loss)
    assert model(**inputs, sample_weight=torch.zeros(6)).loss == 0


def test_integer_and_boolean_labels_count_like_floats():
    model, inputs = tiny(), batch()
    losses = [model(**inputs | {"labels": inputs["labels"].to(dtype)}).loss for dtype in (torch.long, torch.bool)]
    assert all(torch.equal(loss, model(**inputs).loss) for loss in losses)


def test_features_that_are_missing_are_named():
    inputs = batch()
    for kind, name in (("numeric", "age"), ("sequence", "history")):
        with pytest.raises(ValueError, match=f"{kind}_features must be given: .*{name}"):
            tiny()(**{key: value for key, value in inputs.items() if key != f"{kind}_features"})


# --- tables


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_touched_rows_are_those_with_a_gradient(architecture):
    model, inputs = tiny(architecture), batch(4)
    model(**inputs).loss.backward()
    found = model.touched_rows(inputs["categorical_features"], inputs["sequence_features"])
    parameters = dict(model.named_parameters())
    assert {t.parameter for t in found} == {name for name in parameters if ".tables." in name}
    for touched in found:
        assert touched.module.weight is parameters[touched.parameter]
        moved = parameters[touched.parameter].grad.abs().sum(1).nonzero().flatten()
        assert set(moved.tolist()) <= set(touched.rows.tolist()) and 0 not in touched.rows
        if architecture == "lr":  # elsewhere a ReLU may be closed
            assert torch.equal(moved, touched.rows)
    by_name = {t.parameter: t.rows for t in found}
    if architecture != "lr":
        both = torch.cat([inputs["categorical_features"][:, 1], inputs["sequence_features"][:, 1].flatten()]).unique()
        assert torch.equal(by_name["model.embeddings.tables.item_id.weight"], both[both != 0])
    bare = model.model.touched_rows(inputs["categorical_features"])
    assert len(bare) == len(found) and not bare[0].parameter.startswith("model.")


def test_rows_that_are_not_touched_need_not_be_there():
    """What a device gets is a slice of the tables: nothing else of them is read."""
    model, inputs = tiny(), batch(3)
    expected = model(**inputs).logits
    with torch.no_grad():
        for touched in model.touched_rows(inputs["categorical_features"], inputs["sequence_features"]):
            other = torch.ones(touched.module.num_embeddings, dtype=torch.bool)
            other[torch.cat([touched.rows, torch.zeros(1, dtype=torch.long)])] = False
            touched.module.weight[other] = math.nan
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_a_feature_gets_rows_for_new_values():
    model, inputs = tiny(), batch()
    expected = model(**inputs).logits
    assert model.get_input_embeddings() is model.model.embeddings.tables["item_id"]
    model.resize_token_embeddings(15)
    assert model.config.tables["item_id"] == 15 == model.get_input_embeddings().num_embeddings
    torch.testing.assert_close(model(**inputs).logits, expected)
    new, unknown = (dict(inputs, categorical_features=torch.full((6, 3), 2)) for _ in range(2))
    new["categorical_features"] = torch.tensor([2, 14, 2]).expand(6, -1)
    unknown["categorical_features"] = torch.tensor([2, 1, 2]).expand(6, -1)
    torch.testing.assert_close(model(**new).logits, model(**unknown).logits)
    model(**new).loss.backward()
    assert model.get_input_embeddings().weight.grad[14].abs().sum() > 0
    assert model.model.first_order.tables["history"].num_embeddings == 15, "it is read with the same ids"
    for name, message in (("history", "'history' has no table of its own"), ("age", "'age' has no table")):
        with pytest.raises(ValueError, match=message):
            model.resize_feature(name, 20)
    with pytest.raises(Exception, match="at least 2"):
        model.resize_feature("hour", 1)
    assert model.config.tables["hour"] == 5


# --- as a transformers model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.compatibility("Auto classes", method="ctr")
def test_saving_and_loading(architecture, tmp_path):
    model, inputs = tiny(architecture), batch()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is CtrForCtrPrediction and not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    body, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(body) is CtrModel and not info["missing_keys"]
    inputs.pop("labels")
    torch.testing.assert_close(body(**inputs), model.model(**inputs))
    resized = tiny(architecture)
    resized.resize_feature("user_id", 30)
    resized.save_pretrained(tmp_path / "resized")
    again = CtrForCtrPrediction.from_pretrained(tmp_path / "resized")
    torch.testing.assert_close(again(**inputs).logits, resized(**inputs).logits)


def test_the_trainer_trains_it_the_same_with_accumulation(tmp_path):
    rows = batch(32)
    data = [{name: tensor[i] for name, tensor in rows.items()} for i in range(32)]
    weights = []
    for size, accumulation in ((8, 1), (2, 4)):
        args = TrainingArguments(
            str(tmp_path / str(size)),
            max_steps=6,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.5,
            optim="sgd",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        torch.manual_seed(0)
        model = tiny("din").train()
        trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before
        assert trainer.predict(data).predictions.shape == (32,)
        weights.append(model.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)


def test_features_are_read_by_their_kind_whatever_their_order_is():
    mixed = [FEATURES[i] for i in (5, 0, 3, 1, 6, 4, 2)]
    model, inputs = tiny("din"), batch()
    other = tiny("din", features=mixed)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits)
