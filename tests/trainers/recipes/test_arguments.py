import dataclasses
import json

import pytest
import torch
from transformers import SchedulerType, TrainingArguments

from hf_models.moe import SIGMA_MOE_TINY_INITIAL_TOP_K, SigmaMoeConfig, SigmaMoeForCausalLM
from trainers.recipes.arguments import DataArguments, parse_arguments, training_arguments_of
from trainers.recipes.pretrain_sigma_moe import PRESETS, SigmaMoeArguments


TYPES = (SigmaMoeArguments, DataArguments, TrainingArguments)
PAPER = ("--preset", "paper", "--use_cpu")


def parse(*argv, presets=PRESETS, types=TYPES, default="demo"):
    return parse_arguments(types, presets, argv, default_preset=default)


def refused(capsys, *argv, **options):
    with pytest.raises(SystemExit) as error:
        parse(*argv, **options)
    assert error.value.code == 2
    return capsys.readouterr().err


def write(path, values):
    if path.suffix == ".json":
        path.write_text(json.dumps(values))
    else:
        path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items()))
    return str(path)


# --- who wins ------------------------------------------------------------------------------------------------------


def test_the_default_preset():
    preset, (args, data, training) = parse()
    assert preset == "demo"
    assert (args.initial_top_k, args.baselines) == ([8, 4, 2, 1, 1, 1], ["lbl_top1", "dense", "dense_equal_seconds"])
    assert (data.dataset_name, data.sequence_length, data.max_eval_blocks) == ("python-stdlib", 256, 128)
    assert (training.max_steps, training.learning_rate, training.adam_beta2) == (650, 2e-3, 0.95)
    assert training.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY
    assert training.per_device_train_batch_size * data.sequence_length <= 1024


@pytest.mark.parametrize("name", ["c.yaml", "c.yml", "c.json"])
def test_preset_then_file_then_command_line(tmp_path, name):
    file = write(tmp_path / name, {"max_steps": 7, "seed": 5, "baselines": ["dense"], "initial_top_k": None})
    _, (args, _, training) = parse("--seed", "6", "--config", file)
    assert (training.max_steps, training.seed, training.learning_rate) == (7, 6, 2e-3)
    assert (args.baselines, args.initial_top_k) == (["dense"], None)
    _, (args, _, training) = parse("--config", file, "--preset", "paper", "--use_cpu", "true", "--max_steps=3")
    assert (training.max_steps, training.seed, training.learning_rate) == (3, 5, 4e-4)
    assert args.model_preset == "sigma-moe-tiny"


def test_trainers_own_push_is_refused_with_the_safe_way(capsys):
    assert "model_cards.publish" in refused(capsys, "--push_to_hub")


def test_lists():
    _, (args, _, _) = parse("--initial_top_k", "3", "2", "1", "--baselines", "dense", "loss_free", "--seed", "1")
    assert args.initial_top_k == [3, 2, 1] and args.baselines == ["dense", "loss_free"]
    _, (args, _, _) = parse("--initial_top_k", "--baselines")  # taken back
    assert not args.initial_top_k and not args.baselines


def test_a_list_of_one_in_a_file(tmp_path):
    file = write(tmp_path / "c.yaml", {"baselines": "dense", "initial_top_k": 3})
    _, (args, _, _) = parse("--config", file)
    assert args.baselines == ["dense"] and args.initial_top_k == [3]


def test_numbers_as_yaml_writes_them(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "learning_rate: 4e-4\nstreaming: yes\nlr_scheduler_kwargs: {num_decay_steps: 3}\n"
    )
    _, (_, data, training) = parse("--config", str(tmp_path / "c.yaml"))
    assert training.learning_rate == 4e-4  # YAML reads a number without a point as text
    assert data.streaming is True and training.lr_scheduler_kwargs == {"num_decay_steps": 3}


def test_json_on_the_command_line():
    _, (_, _, training) = parse("--lr_scheduler_kwargs", '{"num_decay_steps": 3}')
    assert training.lr_scheduler_kwargs == {"num_decay_steps": 3}


def test_an_option_that_must_be_given(tmp_path, capsys):
    @dataclasses.dataclass
    class Needy:
        student: str

    options = {"types": (Needy,), "presets": {"a": {}, "b": {"student": "from preset"}}, "default": "a"}
    assert "--student" in refused(capsys, **options)
    assert parse("--preset", "b", **options)[1][0].student == "from preset"
    file = write(tmp_path / "c.yaml", {"student": "from file"})
    assert parse("--config", file, **options)[1][0].student == "from file"
    assert parse("--student", "from line", **options)[1][0].student == "from line"


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--learning_rat", "1"], "--learning_rat"),
        (["--no_such_option", "1"], "--no_such_option"),
        (["stray"], "stray"),
        (["--preset", "nope"], "'nope'"),
        (["--max_steps", "many"], "'many'"),
        (["--config", "no/such/file.yaml"], "no/such/file.yaml: No such file or directory. Name a readable YAML"),
    ],
)
def test_refused(capsys, argv, named):
    assert named in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("c.yaml", "learning_rat: 1", "'learning_rat'"),
        ("c.json", '{"preset": "demo"}', "'preset'"),
        ("c.yaml", "a: [1", "cannot be parsed"),
        ("c.json", "{", "cannot be parsed"),
        ("c.yaml", "", "NoneType"),
        ("c.json", "[1]", "list"),
        ("c.yaml", "max_steps: many", "'many'"),
    ],
)
def test_refused_in_a_file(tmp_path, capsys, name, content, named):
    (tmp_path / name).write_text(content)
    assert named in refused(capsys, "--config", str(tmp_path / name))


def test_a_typing_error_in_a_preset(capsys):
    assert "'max_stepz'" in refused(capsys, presets={"demo": {"max_stepz": 3}})


def test_help(capsys):
    with pytest.raises(SystemExit) as error:
        parse("--help")
    assert error.value.code == 0
    text = capsys.readouterr().out
    for option in ("--preset", "--config", "--initial_top_k", "--dataset_name", "--learning_rate", "--switch_at"):
        assert option in text


# --- training arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [(), PAPER])
def test_a_copy_differs_in_what_was_asked_for(argv):
    _, (_, _, base) = parse(*argv)
    copy = training_arguments_of(base, max_steps=3, output_dir="elsewhere")
    different = {
        field.name
        for field in dataclasses.fields(base)
        if field.init and str(getattr(base, field.name)) != str(getattr(copy, field.name))
    }
    assert different == {"max_steps", "output_dir"}
    assert str(training_arguments_of(copy, max_steps=base.max_steps, output_dir=base.output_dir)) == str(base)


def test_paper_preset_wants_its_precision():
    """Where there is no GPU, transformers refuses bf16 unless the CPU was asked for."""
    if torch.cuda.is_available():
        pytest.skip("this machine has what the preset wants")
    with pytest.raises(ValueError, match="use_cpu"):
        parse("--preset", "paper")


def test_paper_preset():
    _, (args, data, training) = parse(*PAPER)
    assert (training.bf16, training.max_steps, training.per_device_train_batch_size) == (True, 100_000, 1)
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.95, 0.1)
    assert args.initial_top_k == SIGMA_MOE_TINY_INITIAL_TOP_K and args.switch_at == 0.9
    with torch.device("meta"):
        model = SigmaMoeForCausalLM(
            SigmaMoeConfig.from_preset(args.model_preset, max_position_embeddings=data.sequence_length)
        )
    # Digest of Sigma-MoE-Tiny, section 3: 20B in all; 0.5B active, 0.65B before the switch, embeddings left out.
    embeddings = 2 * model.config.vocab_size * model.config.hidden_size
    per_expert, routers = 3 * 1536 * 768, 56 * 96 * 1536
    norms = 56 * (2 * 1536 + 2 * 96) + 1536
    rest = 56 * (2 * 1536 * 1536 + 2 * 1536 * 384) + routers + norms
    assert model.num_parameters() == embeddings + rest + 56 * 96 * per_expert
    assert model.num_active_parameters() == rest + 56 * per_expert
    assert round(model.num_active_parameters() / 1e9, 1) == 0.5 and round(model.num_parameters() / 1e9) == 20
    model.set_experts_per_token(args.initial_top_k)
    assert model.num_active_parameters() == rest + 88 * per_expert
    assert round(model.num_active_parameters() / 1e9, 2) == 0.65
