"""What a run needs, before it is paid for: memory of a rank, FLOPs of a step, days, GPU hours, cost.

    python -m trainers.plan --preset sigma-moe-tiny --gpus 64 --tokens 1e12
    python -m trainers.plan --preset mone --gpus 64 --gpu h200 --sharding fsdp2 --ep 8 --tokens 1e11 --json plan.json
    python -m trainers.plan --preset ORG/MODEL --gpus 8 --tokens 2e9 --batch-size 4 --price-per-gpu-hour 2.5

`--preset` is one of ours, a model folder or a Hub id (its config.json only). A preset brings its recipe's batch,
sequence length, accumulation, checkpointing and stages of active experts. Memory comes from a training step on fake
tensors and from how the libraries shard (`trainers.planning`); it is tested within 10 % of the allocations of real
steps on CPUs, alone and as two gloo processes, never on GPUs. Exit code 2 for a plan that does not divide or fit, with
field, value and remedy.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from transformers.utils import logging

from .planning import (
    GPUS,
    PRESETS,
    Gpu,
    Memory,
    PlanError,
    PlannedModel,
    Sharding,
    StepTrace,
    Throughput,
    Utilisation,
    memory_of,
    planned_model,
    throughput_of,
    trace_step,
)
from .planning.memory import trace_options
from .planning.throughput import ASSUMED_DENSE, SIGMA_STACK, flops_per_token
from .report import write_text_atomically


GIB = 2**30


@dataclasses.dataclass(kw_only=True)
class Plan:
    """A plan that holds, with everything that it rests on."""

    model: str
    parameters: int
    gpu: Gpu
    sharding: Sharding
    batch_size: int
    sequence_length: int
    gradient_accumulation: int
    bf16: bool
    checkpointing: bool
    memory: Memory
    memory_otherwise: Memory  # with checkpointing where the plan has none, and the other way round
    headroom: float
    throughput: Throughput
    utilisation: Utilisation
    notes: list[str]


def make_plan(args: argparse.Namespace) -> Plan:
    """Trace, add up, and refuse what cannot be. [`PlanError`] names field, value and remedy."""
    model = planned_model(args.preset, trust_remote_code=args.trust_remote_code)
    _override(model, args)
    gpu = _gpu(args)
    sharding = Sharding(
        kind=args.sharding, gpus=args.gpus, replicas=args.replicas, ep=args.ep, sync_each_batch=args.sync_each_batch
    )
    sharding.check(model)
    _check_numbers(args, model)
    default = SIGMA_STACK if model.num_experts else ASSUMED_DENSE
    utilisation = Utilisation(*args.mfu, "given by --mfu") if args.mfu else default
    training = model.training
    (memory, trace), (otherwise, _) = (
        _memory(model, sharding, args.optimizer_bytes, checkpointing)
        for checkpointing in (training.checkpointing, not training.checkpointing)
    )
    _require_fit(model, memory, otherwise, args, gpu)
    throughput = throughput_of(
        _flops_of_stages(model, trace),
        tokens=args.tokens,
        tokens_per_step=sharding.gpus
        * training.batch_size
        * training.sequence_length
        * training.gradient_accumulation,
        gpus=sharding.gpus,
        peak_flops=gpu.peak_flops,
        utilisation=utilisation,
        price=args.price_per_gpu_hour,
    )
    return Plan(
        model=model.name,
        parameters=model.parameters,
        gpu=gpu,
        sharding=sharding,
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        gradient_accumulation=training.gradient_accumulation,
        bf16=training.bf16,
        checkpointing=training.checkpointing,
        memory=memory,
        memory_otherwise=otherwise,
        headroom=args.headroom,
        throughput=throughput,
        utilisation=utilisation,
        notes=[*training.notes, *_notes(model, sharding, training.gradient_accumulation)],
    )


def _override(model: PlannedModel, args: argparse.Namespace) -> None:
    for field in ("batch_size", "sequence_length", "gradient_accumulation", "checkpointing", "bf16"):
        if (value := getattr(args, field)) is not None:
            setattr(model.training, field, value)


def _check_numbers(args: argparse.Namespace, model: PlannedModel) -> None:
    training = model.training
    for field in ("batch_size", "sequence_length", "gradient_accumulation"):
        if getattr(training, field) < 1:
            raise PlanError(f"{field}: {getattr(training, field)} is less than 1. Give 1 or more.")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and training.sequence_length > positions:
        raise PlanError(
            f"sequence_length: {training.sequence_length} is more than the model's {positions} positions. Give "
            f"--sequence-length {positions} or less."
        )
    if args.tokens <= 0:
        raise PlanError(f"tokens: {args.tokens} is not a number of tokens. Give a positive one, such as 1e12.")
    if args.price_per_gpu_hour is not None and args.price_per_gpu_hour < 0:
        raise PlanError(f"price_per_gpu_hour: {args.price_per_gpu_hour} is negative. Give 0 or more.")
    if not 0 <= args.headroom < 1:
        raise PlanError(f"headroom: {args.headroom} is no share of the memory. Give one in [0, 1).")


def _gpu(args: argparse.Namespace) -> Gpu:
    known = GPUS[args.gpu]
    if args.gpu_memory is None and args.peak_flops is None:
        return known
    if args.gpu_memory is None or args.peak_flops is None:
        raise PlanError(
            "gpu_memory, peak_flops: a GPU outside the table needs both. Give --gpu-memory and --peak-flops."
        )
    if args.gpu_memory <= 0 or args.peak_flops <= 0:
        raise PlanError(f"gpu_memory, peak_flops: {args.gpu_memory}, {args.peak_flops} must be positive.")
    return Gpu("given", args.gpu_memory * 1e9, args.peak_flops)


def _memory(
    model: PlannedModel, sharding: Sharding, optimizer_bytes: float, checkpointing: bool
) -> tuple[Memory, StepTrace]:
    training = model.training
    options = trace_options(sharding, bf16=training.bf16, accumulation=training.gradient_accumulation)
    half = options.pop("half_parameters")
    top_k = model.largest_stage()
    trace = trace_step(
        lambda: model.build(top_k, half),
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        checkpointing=checkpointing,
        kept_fraction=training.kept_fraction,
        **options,
    )
    k = max(top_k) if top_k else getattr(model.config, "num_experts_per_tok", None) or 1
    memory = memory_of(
        model,
        trace,
        sharding,
        bf16=training.bf16,
        accumulation=training.gradient_accumulation,
        optimizer_bytes=optimizer_bytes,
        exchanged=training.batch_size * training.sequence_length * k * model.config.hidden_size,
    )
    return memory, trace


def _flops_of_stages(model: PlannedModel, largest: StepTrace) -> list[tuple[float, dict[str, float], float]]:
    """Share of the tokens and FLOPs of a token for each stage; `largest`: the trace of the largest one."""
    training = model.training
    tokens = training.batch_size * training.sequence_length
    stages = []
    for share, top_k in training.stages or [(1.0, None)]:
        trace = largest
        if top_k != model.largest_stage():
            trace = trace_step(
                lambda k=top_k: model.build(k),
                batch_size=training.batch_size,
                sequence_length=training.sequence_length,
                checkpointing=training.checkpointing,
                kept_fraction=training.kept_fraction,
            )
        stages.append((share, *flops_per_token(trace, tokens)))
    return stages


def _require_fit(model: PlannedModel, memory: Memory, otherwise: Memory, args: argparse.Namespace, gpu: Gpu) -> None:
    usable = gpu.memory * (1 - args.headroom)
    if memory.total <= usable:
        return
    training = model.training
    remedies = []
    if not training.checkpointing and otherwise.total < memory.total:
        remedies.append(f"--checkpointing (then {_gib(otherwise.total)})")
    if args.sharding == "ddp":
        remedies.append("--sharding fsdp2")
    else:
        remedies += ["--sync-each-batch"] if training.gradient_accumulation > 1 and not args.sync_each_batch else []
        remedies.append("more --gpus")
    remedies.append("a smaller --batch-size" if training.batch_size > 1 else "a shorter --sequence-length")
    raise PlanError(
        f"gpu: {gpu.name} has {_gib(gpu.memory)}, {_gib(usable)} without the headroom, and a rank needs "
        f"{_gib(memory.total)} ({memory.moment}; states {_gib(memory.parameters + memory.optimizer)}, gradients "
        f"{_gib(memory.gradients)}, activations {_gib(memory.kept + memory.working)}, buffers "
        f"{_gib(memory.buffers)}). Try {', '.join(remedies)}, or a --gpu with more memory."
    )


def _notes(model: PlannedModel, sharding: Sharding, accumulation: int) -> list[str]:
    notes = []
    rows, ranks = sharding.rows_of_experts(model)
    if rows % ranks:
        notes.append(
            f"{rows} experts on {ranks} ranks: the fullest rank holds {-(-rows // ranks)}, others fewer or none. A "
            "number of ranks that divides them, with --replicas for the rest, wastes nothing."
        )
    if sharding.kind == "fsdp2" and accumulation > 1 and not sharding.sync_each_batch:
        notes.append(
            "Accumulation keeps whole gradients on every rank, Trainer's default; --sync-each-batch "
            '(accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": true}}) keeps shards, for more '
            "traffic."
        )
    if sharding.ep > 1:
        notes.append("Expert parallelism: exchanged tokens are counted for balanced experts; not traced.")
    return notes


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _range(pair: tuple[float, float], form: str) -> str:
    low, high = (format(each, form) for each in sorted(pair))
    return low if low == high else f"{low} to {high}"


def render(plan: Plan) -> str:
    """The plan for people."""
    memory, otherwise, run = plan.memory, plan.memory_otherwise, plan.throughput
    sharding = plan.sharding
    layout = sharding.kind + (f", {sharding.replicas} replicas" if sharding.replicas > 1 else "")
    layout += f", experts over {sharding.ep} ranks" if sharding.ep > 1 else ""
    share = memory.total / plan.gpu.memory
    flops = sum(run.flops_per_token.values())
    kinds = ", ".join(f"{kind.replace('_', ' ')} {value / flops:.0%}" for kind, value in run.flops_per_token.items())
    rows = [
        ("model", f"{plan.model}, {plan.parameters / 1e9:.3f}B parameters"),
        ("devices", f"{sharding.gpus} x {plan.gpu.name}, {layout}"),
        (
            "micro-batch",
            f"{plan.batch_size} x {plan.sequence_length} tokens, {'bf16' if plan.bf16 else 'fp32'}, "
            f"{'with' if plan.checkpointing else 'without'} checkpointing",
        ),
        ("step", f"{run.tokens_per_step:,} tokens (accumulation {plan.gradient_accumulation})"),
        None,
        ("memory of a rank", f"{_gib(memory.total)}, {share:.0%} of {_gib(plan.gpu.memory)}"),
        ("  fullest at", memory.moment),
        ("  parameters", _gib(memory.parameters)),
        ("  optimizer states", _gib(memory.optimizer)),
        ("  gradients", _gib(memory.gradients)),
        ("  activations kept", _gib(memory.kept)),
        ("  logits and loss" if memory.moment.startswith("loss") else "  segment at hand", _gib(memory.working)),
        ("  buffers of ranks", _gib(memory.buffers)),
        (f"  {'without' if plan.checkpointing else 'with'} checkpointing", f"{_gib(otherwise.total)} in all"),
        ("  left for others", f"{plan.headroom:.0%} assumed: context, NCCL, fragmentation"),
        None,
        ("FLOPs of a token", f"{flops / 1e9:.4g} GFLOP ({kinds})"),
        ("FLOPs of a step", f"{run.step_flops / 1e15:.4g} PFLOP; computed again {run.recomputed / flops:.0%} on top"),
        ("utilisation (MFU)", f"{plan.utilisation.low:.2%} to {plan.utilisation.high:.2%}, {plan.utilisation.source}"),
        ("tokens a day", _range(run.tokens_per_day, ".3g")),
        (f"{run.tokens:.3g} tokens", f"{_range(run.days, ',.1f')} days, {_range(run.gpu_hours, ',.0f')} GPU hours"),
        ("cost", "not given: --price-per-gpu-hour" if run.cost is None else _range(run.cost, ",.0f")),
    ]
    lines = ["" if row is None else f"{row[0]:<24}{row[1]}" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in plan.notes)]).rstrip()


def to_json(plan: Plan) -> dict:
    """The plan for programs; sizes in bytes, with their sums."""
    values = dataclasses.asdict(plan)
    for name in ("memory", "memory_otherwise"):
        values[name]["total"] = getattr(plan, name).total
    values["throughput"]["step_flops"] = plan.throughput.step_flops
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainers.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--preset", required=True, help=f"{', '.join(PRESETS)}, a model folder, or a Hub id")
    parser.add_argument("--gpus", type=int, required=True, help="devices of the run")
    parser.add_argument("--tokens", type=float, required=True, help="tokens of the run, such as 1e12")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--gpu-memory", type=float, help="GB (10^9 bytes) of a device outside the table")
    parser.add_argument("--peak-flops", type=float, help="its dense bf16 FLOP/s")
    parser.add_argument("--sharding", choices=("ddp", "fsdp2"), default="fsdp2")
    parser.add_argument("--ep", type=int, default=1, help="ranks that own different experts; with fsdp2")
    parser.add_argument("--replicas", type=int, default=1, help="whole copies of the model (HSDP); with fsdp2")
    parser.add_argument("--sync-each-batch", action="store_true", help="reduce gradients after each micro-batch")
    parser.add_argument("--batch-size", type=int, help="sequences of a micro-batch and device")
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--gradient-accumulation", type=int)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument(
        "--optimizer-bytes", type=float, default=8.0, help="states per parameter; 8: AdamW, 4: momentum, in fp32"
    )
    parser.add_argument("--headroom", type=float, default=0.1, help="share of the memory that a plan must leave")
    parser.add_argument("--mfu", type=float, nargs=2, metavar=("LOW", "HIGH"), help="default: reported or assumed")
    parser.add_argument("--price-per-gpu-hour", type=float, help="in any currency; without it, no cost")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code of a Hub id")
    parser.add_argument("--json", type=Path, help="also write the plan to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command-line entry. Exit code 0, or 2 for a plan that is refused."""
    args = _parser().parse_args(argv)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        plan = make_plan(args)
    except PlanError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    finally:
        logging.set_verbosity(verbosity)
    print(render(plan))
    if args.json is not None:
        write_text_atomically(args.json, json.dumps(to_json(plan), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
