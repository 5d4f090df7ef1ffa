"""A language model that learns from speakers who keep their speeches: LoRA over the wire, clients that sleep.

    python -m trainers.recipes.federated_lm --preset demo

Each part of Shakespeare's plays is a client. A small model learns from half of the parts as any model does; then the
others train an adapter on it together, each there for eight hours of a day, and all that travels is that adapter. Arms
differ in how they deal with those who sleep. Rates are searched by every arm on the first seed, by speeches that are
not reported. A repeated command goes on: finished runs are kept.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments, set_seed

from ..data import load_tokenizer, read_shakespeare_characters, train_tokenizer, user_split
from ..data.shakespeare_characters import SHAKESPEARE_LICENSE
from ..federated import FederatedTrainer, SleepWindow
from ..redaction import command_line
from ..report import Data, FigureFile, Model, Results, collect_versions, device_name, write_results
from .arguments import RecipeTrainingArguments, parse_arguments, refuse_options, training_arguments_of
from .comparison import BITS, print_metrics, wall_seconds_so_far
from .federated_arms import OF_CLIENTS, SILENT_SGD, Shared, require_arms, strategy_of
from .federated_cells import Cell, Compared, Comparison, Experiment, Outcome, run_rounds
from .federated_results import arms_metric, curves_figure, last, present
from .language_model import require_writable
from .training import build_trainer


LM_ARMS = ["fed_la_avg", "mifa", "fed_avg", "fed_prox", "fed_adam"]
SPEAKERS = "speakers"


@dataclasses.dataclass
class FederatedLmArguments:
    """What is compared, over whose speeches."""

    arms: list[str] = dataclasses.field(
        default_factory=lambda: list(LM_ARMS), metadata={"help": "The first is the method."}
    )
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    learning_rates: list[float] = dataclasses.field(default_factory=lambda: [0.3, 1.0, 2.0])
    clients: int = dataclasses.field(default=60, metadata={"help": "The largest parts at even places."})
    min_characters: int = dataclasses.field(default=8_000, metadata={"help": "Of a part."})
    vocab_size: int = 512
    sequence_length: int = 64
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    base_steps: int = dataclasses.field(default=600, metadata={"help": "Of the model that the adapter is on."})
    base_learning_rate: float = 3e-3
    base_batch_size: int = 16
    lora_rank: int = 4
    clients_per_round: int = 6
    rounds: int = 96
    rounds_per_day: int = dataclasses.field(default=24, metadata={"help": "Each client is there for a third of them."})
    local_steps: int = 4
    proximal: float = 0.01
    server_learning_rate: float = 0.01
    evaluate_every: int = 8
    note: str = dataclasses.field(
        default="", metadata={"help": "What was changed after results were seen, for the record."}
    )


@dataclasses.dataclass(frozen=True)
class LmSetting:
    """All that decides a run, besides arm, rate and seed; see the recipe's arguments."""

    clients: int
    min_characters: int
    vocab_size: int
    sequence_length: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    base_steps: int
    base_learning_rate: float
    base_batch_size: int
    lora_rank: int
    clients_per_round: int
    rounds: int
    rounds_per_day: int
    local_steps: int
    batch_size: int
    proximal: float
    server_learning_rate: float
    evaluate_every: int


BASE = SILENT_SGD | {"per_device_train_batch_size": 8}
PRESETS: dict[str, dict[str, Any]] = {
    "demo": BASE
    | {
        **{
            "output_dir": "runs/federated_lm",
            "seeds": [0],
            "learning_rates": [1.0],
            "arms": ["fed_la_avg", "fed_avg"],
        },
        **{"clients": 24, "base_steps": 150, "rounds": 48, "clients_per_round": 4},
    },
    "evidence": BASE | {"output_dir": "runs/federated_lm_evidence"},
    # No paper has this task: shapes for one GPU, with as many speakers as say enough.
    "paper": BASE
    | {
        **{"output_dir": "runs/federated_lm-paper", "clients": 200, "hidden_size": 512, "num_hidden_layers": 8},
        **{"num_attention_heads": 8, "vocab_size": 8192, "sequence_length": 256, "base_steps": 20_000},
        **{"base_batch_size": 64, "base_learning_rate": 1e-3, "lora_rank": 16, "clients_per_round": 20},
        **{"rounds": 960, "rounds_per_day": 96, "local_steps": 10, "use_cpu": False, "save_strategy": "steps"},
    },
}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Token ids `(N, length)` and the speaker of each row; a batch is what indexing with many gives."""

    input_ids: torch.Tensor
    speakers: np.ndarray

    fixed_rows = True  # clients may keep them

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.input_ids[index]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        chosen = self.input_ids[torch.as_tensor(indices)]
        return {"input_ids": chosen, "labels": chosen}


@dataclasses.dataclass(frozen=True)
class Speeches:
    """What clients train on, is chosen by and reported on; what the base model learns from; letters a token, of the
    reported part."""

    parts: dict[str, Blocks]
    base: Blocks
    characters_per_token: float

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens."""
        digest = hashlib.sha256()
        for part in (*self.parts.values(), self.base):
            digest.update(part.input_ids.numpy().tobytes())
        return f"sha256:{digest.hexdigest()[:16]}"


def read_speeches(args: FederatedLmArguments, root: Path) -> Speeches:
    """Parts at even places of the order of size are clients, the others make the base model, and its tokenizer. Of a
    client the first 70 % of the speeches train, 10 % choose, 20 % are reported. `ValueError` for too few parts."""
    rows = read_shakespeare_characters(min_characters=args.min_characters, max_users=2 * args.clients)
    users = np.asarray(rows["user"][:])
    if users.max() + 1 < 2 * args.clients:
        raise ValueError(f"{users.max() + 1} parts are as large, {2 * args.clients} are needed. Lower --clients.")
    own, others = rows.select(np.flatnonzero(users % 2 == 0)), rows.select(np.flatnonzero(users % 2 == 1))
    tokenizer = train_tokenizer(others["text"][:], vocab_size=args.vocab_size, show_progress=False)
    tokenizer.save_pretrained(root)
    tokenizer = load_tokenizer(root)
    splits = user_split(own, "user", time_column="time", fractions=(0.7, 0.1, 0.2))
    parts = {name: _blocks(split, tokenizer, args.sequence_length) for name, split in splits.items()}
    letters = sum(map(len, splits["test"]["text"]))
    tokens = sum(len(ids) for ids in tokenizer(splits["test"]["text"][:])["input_ids"])
    return Speeches(parts, _blocks(others, tokenizer, args.sequence_length), letters / tokens)


def _blocks(rows: Dataset, tokenizer: Any, length: int) -> Blocks:
    """Each speaker's speeches end to end, cut into blocks; what is left at the end is dropped."""
    ids, users, blocks = tokenizer(rows["text"][:])["input_ids"], np.asarray(rows["user"][:]), []
    speakers = []
    for user in np.unique(users):
        stream = [t for index in np.flatnonzero(users == user) for t in (*ids[index], tokenizer.eos_token_id)]
        whole = len(stream) // length
        blocks.append(torch.tensor(stream[: whole * length], dtype=torch.int64).reshape(whole, length))
        speakers += [int(user)] * whole
    return Blocks(torch.cat(blocks), np.asarray(speakers))


def base_model(setting: LmSetting, speeches: Speeches, seed: int, args: TrainingArguments, folder: Path) -> Path:
    """Where the model is that the adapter goes on: trained once for a seed, with Adam; beside it, what with."""
    names = [name for name in dataclasses.asdict(setting) if name.startswith(("base", "hidden", "num_", "sequence"))]
    identity = {name: getattr(setting, name) for name in names} | {"data": speeches.fingerprint, "seed": seed}
    done = folder / "identity.json"
    if done.exists():
        if json.loads(done.read_text()) != identity:
            raise ValueError(f"{folder.name} was trained with other settings. Choose another --output_dir.")
        return folder
    set_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=int(max(part.input_ids.max() for part in (*speeches.parts.values(), speeches.base))) + 1,
        hidden_size=setting.hidden_size,
        intermediate_size=2 * setting.hidden_size,
        num_hidden_layers=setting.num_hidden_layers,
        num_attention_heads=setting.num_attention_heads,
        num_key_value_heads=setting.num_attention_heads,
        max_position_embeddings=setting.sequence_length,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    own = training_arguments_of(
        args,
        output_dir=str(folder / "run"),
        optim="adamw_torch",
        learning_rate=setting.base_learning_rate,
        lr_scheduler_type="cosine",
        max_steps=setting.base_steps,
        max_grad_norm=1.0,
        per_device_train_batch_size=setting.base_batch_size,
        save_strategy="no",
        seed=seed,
    )
    trainer = build_trainer(
        AutoModelForCausalLM.from_config(config), own, train_dataset=speeches.base, data_collator=_as_it_is
    )
    trainer.train()
    trainer.model.save_pretrained(folder)
    done.write_text(json.dumps(identity))
    return folder


def _as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch


def adapted(base: Path, rank: int, seed: int) -> PeftModel:
    """A fresh adapter on every linear layer of the base model but its head."""
    model = AutoModelForCausalLM.from_pretrained(base)
    set_seed(seed)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def federation(cell: Cell, speeches: Speeches, base: Path, args: TrainingArguments) -> FederatedTrainer:
    """The trainer of a cell. Who sleeps when is drawn by the seed."""
    setting, train = cell.experiment.setting, speeches.parts["train"]
    hours = np.random.default_rng(cell.seed).uniform(0, 24, size=int(train.speakers.max()) + 1)
    shared = Shared(
        learning_rate=cell.learning_rate,
        clients_per_round=setting.clients_per_round,
        seed=cell.seed,
        weighting="clients",
        proximal=setting.proximal,
        server_learning_rate=setting.server_learning_rate,
    )
    return FederatedTrainer(
        adapted(base, setting.lora_rank, cell.seed),
        args,
        strategy=strategy_of(cell.run, shared),
        rounds=setting.rounds,
        train_dataset=train,
        partition_by=train.speakers,
        local_steps=setting.local_steps,
        availability=SleepWindow(
            {str(speaker): float(hours[speaker]) for speaker in np.unique(train.speakers)}, setting.rounds_per_day
        ),
        data_collator=_as_it_is,
    )


@torch.no_grad()
def bits_per_character(model: PreTrainedModel, part: Blocks, characters_per_token: float) -> float:
    """The mean over speakers of the mean over each one's blocks."""
    model.eval()
    losses = []
    for rows in torch.arange(len(part)).split(64):
        ids = part.input_ids[rows].to(model.device)
        scores = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        losses.append(-scores.gather(-1, ids[:, 1:, None])[..., 0].mean(1).cpu())
    by_block = torch.cat(losses).double().numpy() / math.log(2) / characters_per_token
    return float(np.mean([by_block[part.speakers == speaker].mean() for speaker in np.unique(part.speakers)]))


def run_cell(cell: Cell, folder: Path, *, speeches: Speeches, args: TrainingArguments) -> Outcome:
    """One run, and what the base model comes to without an adapter."""
    setting = cell.experiment.setting
    root = Path(args.output_dir)
    base = base_model(setting, speeches, cell.seed, args, root / "base" / f"seed{cell.seed}")
    own = training_arguments_of(
        args,
        output_dir=str(folder),
        seed=cell.seed,
        learning_rate=cell.learning_rate,
        per_device_train_batch_size=setting.batch_size,
    )
    trainer = federation(cell, speeches, base, own)

    def bits(split: str) -> float:
        return bits_per_character(trainer.model, speeches.parts[split], speeches.characters_per_token)

    def measure(done: int) -> dict[str, float]:
        trainer.serve()
        return {"validation": bits("validation"), "test": bits("test")}

    before = bits("test")
    outcome = run_rounds(trainer, measure, every=setting.evaluate_every)
    if not outcome["diverged"]:
        trainer.save_pretrained(folder / "adapter")
    adapter = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in trainer.model.parameters()) - adapter
    return outcome | {"base": before, "adapter_parameters": adapter, "base_parameters": whole}


def score(arm: str, outcome: Outcome) -> float:
    """Minus the validation bits of the last quarter of the rounds."""
    return -float(last(outcome, "validation").mean())


def compare(preset: str, args: FederatedLmArguments, training_args: RecipeTrainingArguments) -> Results:
    """Run what is missing; write the first arm's adapter of the first seed, `results.json` and a figure."""
    start, root = time.perf_counter(), Path(training_args.output_dir)
    require_arms(args.arms, LM_ARMS)
    require_writable(root)
    speeches = read_speeches(args, root)
    names = [field.name for field in dataclasses.fields(LmSetting) if field.name != "batch_size"]
    values = {name: getattr(args, name) for name in names}
    setting = LmSetting(batch_size=training_args.per_device_train_batch_size, **values)
    experiment = Experiment(SPEAKERS, setting, args.arms)
    comparison = Comparison(
        root=root,
        seeds=args.seeds,
        grid=args.learning_rates,
        run=partial(run_cell, speeches=speeches, args=training_args),
        score=score,
        data=speeches.fingerprint,
    )
    found = comparison.compare([experiment])
    compared = found[SPEAKERS]
    first = Cell(experiment, args.arms[0], args.seeds[0], compared.rates[args.arms[0]])
    _publish(root, root / "base" / f"seed{args.seeds[0]}", first.folder(root) / "adapter")
    # the base model as one more arm: what nobody's training comes to
    compared.outcomes["base"] = compared.outcomes[args.arms[0]]
    metrics = _metrics(compared, args.arms)
    results = Results(
        method="federated_lm",
        title="LoRA over speakers who sleep",
        preset=preset,
        seeds=args.seeds,
        command=command_line(),
        device=device_name(),
        versions=collect_versions(),
        wall_seconds=wall_seconds_so_far(root, time.perf_counter() - start),
        metrics=metrics,
        evidence=comparison.record([experiment], found)
        | {
            "learning_rate_chosen_on": "validation speeches of the clients, of the first seed",
            "changed_after_results_were_seen": args.note,
        },
        data=_describe(args, speeches),
        model=_describe_model(compared.outcomes[args.arms[0]][0]),
        figures=[_figure(compared, args.arms, root)],
    )
    write_results(root, results)
    print_metrics(results)
    return results


def _metrics(compared: Compared, arms: list[str]) -> dict[str, Any]:
    def bits(arm: str, outcome: Outcome) -> float:
        return outcome["base"] if arm == "base" else float(last(outcome, "test").mean())

    return present(
        {
            "bits_per_character": arms_metric(
                compared,
                bits,
                [*arms, "base"],
                higher_is_better=False,
                unit=BITS,
                note="mean over speakers, last quarter of the rounds; base: without an adapter",
            ),
            "bytes": arms_metric(
                compared,
                lambda arm, o: o["bytes_up"] + o["bytes_down"],
                arms,
                higher_is_better=False,
                unit="bytes",
                note="up and down, all rounds: adapters alone",
            ),
        }
    )


def _describe(args: FederatedLmArguments, speeches: Speeches) -> Data:
    return Data(
        name="Shakespeare's characters",
        fingerprint=speeches.fingerprint,
        license=SHAKESPEARE_LICENSE,
        language=["en"],
        note=f"{args.clients} parts are clients, as many others made the base model; blocks of {args.sequence_length} "
        "tokens; of a client the first 70 % train, the last 20 % are reported",
    )


def _describe_model(outcome: Outcome) -> Model:
    adapter = outcome["adapter_parameters"]
    return Model(
        parameters_total=outcome["base_parameters"] + adapter,
        parameters_active=adapter,
        parameters_non_embedding=adapter,
        note="active: the adapter, which is what travels",
    )


def _figure(compared: Compared, arms: list[str], root: Path) -> FigureFile:
    return curves_figure(
        compared,
        lambda arm: "test",
        root / "figures" / "rounds.png",
        caption="Held-out bits per character over the rounds, mean over speakers and seeds.",
        y_label="held-out bits/character",
        arms=arms,
        higher_is_better=False,
    )


def _publish(root: Path, base: Path, adapter: Path) -> None:
    """The base model and, in `adapter`, what the clients trained on it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(root)
    PeftModel.from_pretrained(model, adapter).save_pretrained(root / "adapter")


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (FederatedLmArguments, RecipeTrainingArguments)
    preset, (args, training_args) = parse_arguments(types, PRESETS, argv, default_preset="demo")
    refuse_options(training_args, "optimizer", "reliability", because=OF_CLIENTS)
    try:
        compare(preset, args, training_args)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
