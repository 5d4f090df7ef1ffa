import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from tests.trainers.callbacks.test_installation import SEQUENCE, make_model, train
from trainers.callbacks import ProgressiveSparsificationCallback, SparsificationStage


STAGES = [(0, [4, 2]), (2, [2, 1]), (5, 1)]
STEPS, ACCUMULATION = 6, 4
IN_FORCE = [[4, 2], [4, 2], [2, 1], [2, 1], [2, 1], [1, 1]]  # by step, from STAGES


def state_at(step, max_steps=100, tokens=0):
    return TrainerState(global_step=step, max_steps=max_steps, num_input_tokens_seen=tokens)


def recorded(model):
    """Per forward of the model, k of each layer."""
    seen = []
    for layer, router in enumerate(model.routers):
        router.register_forward_hook(lambda module, *_, layer=layer: seen.append((layer, module.top_k)))
    return seen


def by_forward(seen, layers=2):
    ks = [k for _, k in seen]
    return [ks[i : i + layers] for i in range(0, len(ks), layers)]


# --- the stage -----------------------------------------------------------------------------------------------------


@given(
    starts=st.lists(st.integers(1, 60), unique=True, max_size=5).map(sorted),
    unit=st.sampled_from(["steps", "tokens"]),
)
def test_stage_is_a_function_of_the_state(starts, unit):
    stages = [(start, 1) for start in [0, *starts]]
    lasting = ProgressiveSparsificationCallback(stages, unit=unit)
    for position in range(65):
        state = state_at(position if unit == "steps" else 7, tokens=position if unit == "tokens" else 7)
        expected = sum(start <= position for start in starts)
        fresh = ProgressiveSparsificationCallback(stages, unit=unit)
        assert lasting.stage_at(state) == fresh.stage_at(state) == expected


@given(st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total - 1), st.just(total))))
def test_a_fraction_that_names_a_step_switches_at_that_step(step_and_total):
    step, total = step_and_total
    stages = [(0, 2)] + [(step / total, 1)] * (step > 0)
    callback = ProgressiveSparsificationCallback(stages, unit="fraction")
    assert callback.stage_at(state_at(step, total)) == len(stages) - 1
    assert callback.stage_at(state_at(max(step - 1, 0), total)) == 0


@given(st.floats(0.001, 0.999), st.integers(1, 10_000))
def test_a_fraction_between_steps_switches_at_the_next(start, total):
    callback = ProgressiveSparsificationCallback([(0, 2), (start, 1)], unit="fraction")
    switch = math.ceil(round(start * total, 6))
    assert [callback.stage_at(state_at(step, total)) for step in (switch - 1, switch)] == [0, 1]


# --- in a Trainer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder with a checkpoint after each step, and k of each layer at each forward."""
    folder, model = tmp_path_factory.mktemp("uninterrupted"), make_model()
    seen = recorded(model)
    options = {"max_steps": STEPS, "gradient_accumulation_steps": ACCUMULATION, "save_strategy": "steps"}
    train(model, folder, ProgressiveSparsificationCallback(STAGES), save_steps=1, **options)
    return folder, by_forward(seen), model.state_dict()


def test_k_never_changes_inside_an_accumulation_window(uninterrupted):
    assert uninterrupted[1] == [k for k in IN_FORCE for _ in range(ACCUMULATION)]


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resume(uninterrupted, tmp_path, step):
    folder, expected, weights = uninterrupted
    model = make_model()
    seen = recorded(model)
    options = {"max_steps": STEPS, "gradient_accumulation_steps": ACCUMULATION}
    train(model, tmp_path, ProgressiveSparsificationCallback(STAGES), resume=folder / f"checkpoint-{step}", **options)
    assert by_forward(seen) == expected[step * ACCUMULATION :]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_checkpoints_are_served_as_they_were_trained(uninterrupted, step):
    checkpoint, expected = uninterrupted[0] / f"checkpoint-{step}", IN_FORCE[step - 1]
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["num_experts_per_tok"] == max(expected)
    assert config["num_experts_per_tok_per_layer"] == (expected if step < 6 else None)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert [router.top_k for router in model.routers] == model.config.top_k_per_layer == expected


@pytest.mark.parametrize("unit", ["fraction", "tokens"])
def test_other_units_switch_at_the_same_steps(tmp_path, unit):
    step = 1 / STEPS if unit == "fraction" else 2 * SEQUENCE
    stages = [SparsificationStage(start * step, top_k) for start, top_k in STAGES]
    model = make_model()
    seen = recorded(model)
    options = {"max_steps": STEPS, "include_num_input_tokens_seen": "all" if unit == "tokens" else "no"}
    options |= {"save_strategy": "steps", "save_steps": 1}
    train(model, tmp_path, ProgressiveSparsificationCallback(stages, unit=unit), **options)
    assert by_forward(seen) == IN_FORCE

    model = make_model()
    seen = recorded(model)
    callback = ProgressiveSparsificationCallback(stages, unit=unit)
    train(model, tmp_path / "resumed", callback, resume=tmp_path / "checkpoint-4", **options)
    assert by_forward(seen) == IN_FORCE[4:]


def test_evaluation_and_validation_see_what_is_in_force(tmp_path):
    model = make_model()
    seen = recorded(model)
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    train(model, tmp_path, ProgressiveSparsificationCallback(STAGES), **options)
    assert by_forward(seen) == [k for k in IN_FORCE[:3] for _ in ("train", "evaluate")]


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "unit", "message"),
    [
        ([], "steps", "the first must start at 0"),
        ([(1, 2)], "steps", "the first must start at 0"),
        ([(0, 2), (5, 1), (5, 2)], "steps", "each must start after the one before"),
        ([(0, 2), (5, 1), (4, 2)], "steps", "each must start after the one before"),
        ([(0, 2), (float("nan"), 1)], "fraction", "each must start after the one before"),
        ([(0, 2), (1.0, 1)], "fraction", r"a fraction of the run lies in \[0, 1\)"),
        ([(0, 2), (0.5, 1), (90, 1)], "fraction", r"a fraction of the run lies in \[0, 1\)"),
        ([(0, 2)], "epochs", "Choose one of"),
    ],
)
def test_refused_at_once(stages, unit, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveSparsificationCallback(stages, unit=unit)


@pytest.mark.parametrize("top_k", [[2], [2, 1, 1], [2, 5], [0, 1], 5, 0, (2, 1, 1)])
def test_lists_that_do_not_fit_the_model(tmp_path, top_k):
    with pytest.raises(ValueError, match=r"stage 1 has top_k=.* one value per layer, each in 1..num_experts"):
        train(make_model(), tmp_path, ProgressiveSparsificationCallback([(0, 1), (3, top_k)]))


@pytest.mark.parametrize("top_k", [1.5, True])
def test_a_number_of_experts_is_an_integer(tmp_path, top_k):
    with pytest.raises(ValueError, match="not an integer"):
        train(make_model(), tmp_path, ProgressiveSparsificationCallback([(0, top_k)]))


def test_tokens_that_nobody_counts(tmp_path):
    with pytest.raises(ValueError, match="include_num_input_tokens_seen='all'"):
        train(make_model(), tmp_path, ProgressiveSparsificationCallback([(0, 2), (48, 1)], unit="tokens"))


def test_a_model_without_routers(tmp_path):
    dense = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=8,
        )
    )
    with pytest.raises(TypeError, match="no routers to work on. Use a model of hf_models.moe"):
        train(dense, tmp_path, ProgressiveSparsificationCallback([(0, 1)]))


def test_a_list_that_the_caller_changes_later_does_no_harm(tmp_path):
    model = make_model()
    callback = ProgressiveSparsificationCallback([(0, [2, 1])])
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    callback.on_train_begin(args, state_at(0), TrainerControl(), model=model)
    model.config.num_experts_per_tok_per_layer[0] = 4
    assert callback.stages[0].top_k == [2, 1]
    assert torch.equal(torch.tensor([r.top_k for r in model.routers]), torch.tensor([2, 1]))
