"""A resumable run: what is the same after an interruption, what is refused, and what a full disk leaves."""

import json
import logging
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from hf_models.moe import SigmaMoeConfig
from trainers.evaluation import held_out_loss
from trainers.recipes.arguments import DataArguments
from trainers.recipes.language_model import fit, prepare_language_data
from trainers.recipes.sigma_moe_arms import Schedule, build_arm
from trainers.recipes.sigma_moe_probes import SwitchProbe


FUNCTION = '''def scale_{i}(left, right):
    """Add two numbers and scale the sum by {i}."""
    total = left + right
    return total * {i}


'''
STEPS, SWITCH = 6, 3
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "initializer_range": 0.1,
}


def write_corpus(folder, documents=40):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        (folder / f"module_{i:02}.py").write_text("".join(FUNCTION.format(i=5 * i + j) for j in range(4)))
    return folder


def make_data(corpus, **options):
    values = {"held_out_fraction": 0.2, "tokenizer_vocab_size": 300, "sequence_length": 24, "max_eval_blocks": 4}
    args = DataArguments(dataset_name=str(corpus), **(values | options))
    return prepare_language_data(args, TrainingArguments(use_cpu=True, report_to="none"))


def make_arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 7,
            **options,
        }
    )


def run(folder, data, arm="progressive", *extra, switch_at=SWITCH / STEPS, model_options=None, start=1.0, **options):
    """`(model, Fit)` of one arm of the recipe, with what the recipe installs."""
    torch.set_num_threads(1)
    tokenizer = data.tokenizer
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = SigmaMoeConfig(vocab_size=320, max_position_embeddings=24, **TINY, **special, **(model_options or {}))
    args = make_arguments(folder, **options)
    model, callbacks = build_arm(arm, config, Schedule([3, 2], switch_at), args.seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(start)
    if arm == "progressive":
        callbacks = [SwitchProbe(callbacks[0], data), *callbacks]
    return model, fit(arm, model, data, args, [*callbacks, *extra])


def losses(history):
    """What was logged, without clocks; Trainer's closing summary is that of a session, not of the run."""
    clocks = ("throughput", "runtime", "per_second")
    rows = [row for row in history if "train_loss" not in row]
    return [{k: v for k, v in row.items() if not any(word in k for word in clocks)} for row in rows]


def interrupted(finished, folder, step, *, checkpoints=1):
    """The folder of a run that was killed some time after `step` was saved."""
    for number in range(step - checkpoints + 1, step + 1):
        shutil.copytree(finished / f"checkpoint-{number}", folder / f"checkpoint-{number}")
    if (finished / "logs").exists():
        shutil.copytree(finished / "logs", folder / "logs", ignore=shutil.ignore_patterns("switch.json"))
    signature = json.loads((finished / "fit.json").read_text())["signature"]
    (folder / "fit.json").write_text(json.dumps({"signature": signature}))


def assert_same_weights(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(write_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Folder with a checkpoint after each step, trained model, Fit."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, *run(folder, data)


# --- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_resume_is_bitwise_the_uninterrupted_run(finished, data, tmp_path, step):
    folder, model, result = finished
    interrupted(folder, tmp_path, step)
    resumed, again = run(tmp_path, data)

    assert_same_weights(resumed, model)
    assert losses(again.history) == losses(result.history)
    assert (again.nats_per_token, again.tokens, again.steps) == (result.nats_per_token, result.tokens, result.steps)
    assert (tmp_path / "logs" / "balance.jsonl").read_text() == (folder / "logs" / "balance.jsonl").read_text()
    if step <= SWITCH:  # also when the first step after the interruption is the switch itself
        assert (tmp_path / "logs" / "switch.json").read_text() == (folder / "logs" / "switch.json").read_text()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("arm", ["loss_free", "qwen3_moe", "dense"])
def test_baselines_resume_bitwise(data, tmp_path, arm):
    model, result = run(tmp_path / "whole", data, arm)
    interrupted(tmp_path / "whole", tmp_path / "resumed", 4)
    resumed, again = run(tmp_path / "resumed", data, arm)
    assert_same_weights(resumed, model)
    assert losses(again.history) == losses(result.history)


def test_the_history_crosses_the_switch(finished, data):
    folder, _, result = finished
    stages = [row["moe/stage"] for row in result.history if "loss" in row]
    assert stages == [0] * SWITCH + [1] * (STEPS - SWITCH)
    switch = json.loads((folder / "logs" / "switch.json").read_text())
    assert (switch["step"], switch["top_k"]) == (SWITCH, [[3, 2], [1, 1]])
    # The same weights under both stages; those of the checkpoint just before the switch.
    model = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{SWITCH}")
    for name, top_k in (("before", [3, 2]), ("after", 1)):
        model.set_experts_per_token(top_k)
        assert switch[name] == pytest.approx(held_out_loss(model, data.validation, data.tokenizer).nats_per_token)


def cut_weights(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_optimizer(checkpoint):
    file = checkpoint / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])


def cut_state(checkpoint):
    file = checkpoint / "trainer_state.json"
    file.write_text(file.read_text()[:100])


def no_state(checkpoint):
    (checkpoint / "trainer_state.json").unlink()


@pytest.mark.parametrize("damage", [cut_weights, cut_optimizer, cut_state, no_state])
def test_the_checkpoint_before_a_damaged_one(finished, data, tmp_path, caplog, damage):
    folder, model, result = finished
    interrupted(folder, tmp_path, 4, checkpoints=2)
    damage(tmp_path / "checkpoint-4")
    with caplog.at_level(logging.WARNING, logger="trainers.reliability.checkpoints"):
        resumed, again = run(tmp_path, data)
    assert "checkpoint-4 is incomplete" in caplog.text
    assert_same_weights(resumed, model)
    assert losses(again.history) == losses(result.history)


# --- a finished run ----------------------------------------------------------------------------------------------


class Counter(TrainerCallback):
    steps = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps += 1


def test_a_finished_run_is_not_trained_again(finished, data):
    folder, model, result = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    counter = Counter()
    loaded, again = run(folder, data, "progressive", counter)
    assert counter.steps == 0 and again == result
    assert_same_weights(loaded, model)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_finished_run_is_loaded_with_its_experts_per_token(data, tmp_path):
    options = {"max_steps": 1, "switch_at": 0.9, "eval_strategy": "no"}  # over before the switch
    model, _ = run(tmp_path, data, **options)
    loaded, _ = run(tmp_path, data, **options)
    assert [router.top_k for router in loaded.routers] == [router.top_k for router in model.routers] == [3, 2]


def test_what_a_fit_says(finished, data):
    folder, model, result = finished
    assert (result.name, result.seed, result.steps, result.learning_rate) == ("progressive", 7, STEPS, 1e-2)
    assert result.tokens == STEPS * 2 * 2 * 24
    held_out = held_out_loss(model, data.validation, data.tokenizer)
    assert result.nats_per_token == pytest.approx(held_out.nats_per_token, rel=1e-6)
    assert result.bits_per_character == pytest.approx(held_out.bits_per_character, rel=1e-6)
    tokens, curve = result.curve()
    assert tokens == [2 * 96, 4 * 96, 6 * 96] and curve[-1] == pytest.approx(held_out.nats_per_token, rel=1e-4)
    assert result.parameters == sum(p.numel() for p in model.parameters())
    timed = [row["throughput/step_seconds"] for row in result.history if "throughput/step_seconds" in row]
    assert result.train_seconds == pytest.approx(STEPS * sum(timed) / len(timed))


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 2e-2},
        {"seed": 8},
        {"max_steps": STEPS + 1},
        {"gradient_accumulation_steps": 1},
        {"switch_at": 0.9},
        {"model_options": {"router_aux_loss_coef": 0.5}},
        {"start": 1.001},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_options_are_refused(finished, data, change):
    with pytest.raises(ValueError, match="other options .* choose another --output_dir"):
        run(finished[0], data, **change)


@pytest.mark.parametrize(
    "change",
    [{"held_out_fraction": 0.4}, {"max_documents": 30}, {"tokenizer_vocab_size": 290}, {"max_eval_blocks": 3}],
)
def test_other_data_is_refused(finished, tmp_path, change):
    other = make_data(write_corpus(tmp_path), **change)
    with pytest.raises(ValueError, match="other options"):
        run(finished[0], other)


def test_what_does_not_decide_the_outcome_may_change(finished, data):
    assert run(finished[0], data, logging_steps=3, save_steps=2, save_total_limit=1, eval_steps=3)[1] == finished[2]


def test_foreign_checkpoints(finished, data, tmp_path):
    shutil.copytree(finished[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoints of another run. Choose another --output_dir"):
        run(tmp_path, data)


def test_a_folder_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="choose an --output_dir that you may write to"):
        run(tmp_path / "file" / "run", data)


class FullDisk(TrainerCallback):
    """From the end of a step on, no file of this process grows beyond a few bytes."""

    def __init__(self, step, limit):
        self.step, self.limit = step, limit

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("limit", [20_000, 60_000])  # full while writing the weights; while writing the optimizer
def test_disk_full(finished, data, tmp_path, limit):
    _, model, result = finished
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="after step 4 failed .*earlier checkpoints are untouched.*command goes on"):
            run(tmp_path, data, "progressive", FullDisk(4, limit))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for name, tensor in load_file(finished[0] / "checkpoint-3" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "checkpoint-3" / "model.safetensors")[name])
    resumed, again = run(tmp_path, data)
    assert_same_weights(resumed, model)
    assert losses(again.history) == losses(result.history)


# --- data --------------------------------------------------------------------------------------------------------


def test_streaming(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    data = make_data(corpus, streaming=True, max_eval_blocks=3)
    assert len(data.validation) == 3
    model, result = run(tmp_path / "whole", data)
    interrupted(tmp_path / "whole", tmp_path / "resumed", 4)
    resumed, again = run(tmp_path / "resumed", make_data(corpus, streaming=True, max_eval_blocks=3))
    assert_same_weights(resumed, model)
    assert losses(again.history) == losses(result.history)


def test_missing_tokenizer(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="no tokenizer could be loaded .*--tokenizer_name"):
        make_data(write_corpus(tmp_path / "corpus"), tokenizer_name=str(tmp_path / "empty"))


def test_a_tokenizer_from_a_folder(data, tmp_path):
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    other = make_data(write_corpus(tmp_path / "corpus"), tokenizer_name=str(tmp_path / "tokenizer"))
    assert other.tokenizer.get_vocab() == data.tokenizer.get_vocab()
    assert other.validation[0] == data.validation[0]


@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_empty_dataset(tmp_path, content):
    if content is not None:
        (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(ValueError, match="no .* file in this folder|name another dataset"):
        make_data(tmp_path)


def test_too_little_text_for_one_block(tmp_path):
    with pytest.raises(ValueError, match="too few for one block .*smaller sequence_length"):
        make_data(write_corpus(tmp_path, documents=8), sequence_length=5000)


def test_evaluation_blocks_are_taken_evenly(tmp_path):
    corpus = write_corpus(tmp_path)
    every, some = make_data(corpus, max_eval_blocks=None).validation, make_data(corpus, max_eval_blocks=4).validation
    stride = len(every) / 4
    assert stride > 2 and [row["input_ids"] for row in some] == [every[int(i * stride)]["input_ids"] for i in range(4)]
