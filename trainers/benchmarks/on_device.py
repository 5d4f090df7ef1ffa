"""Time the fine-tuning of many users at once against a Trainer for each user, and against a plain loop for each.

All arms fine-tune users of the same data, drawn clicks or MovieLens, from the same model of the click-through rate, on
the same samples, for the same steps of full-batch gradient descent, and end at the same parameters: the largest
difference is in the report. The Trainer's arm is what a script would do: copy the model, build a Trainer, train;
neither logs, evaluates nor saves. The plain loop copies the model too, and calls backward and the optimizer by hand.
Loops may be over some of the users, evenly, which are as many seconds each: what is compared is the time of a user.
"""

import argparse
import copy
import dataclasses
import tempfile
from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_models.ctr import CtrForCtrPrediction

from ..data import CtrCollator, CtrData, CtrRows, encode_ctr, user_split
from ..data.drifted_clicks import draw_drifted_clicks
from ..data.movielens import MOVIELENS_COLUMNS, read_movielens_100k
from ..device_cloud.on_device import OnDeviceArguments, OnDeviceFineTuner
from ..device_cloud.on_device_rows import RowsByUser
from .alternating_blocks import Timing, TimingVerdict, judge, median_ratio, time_alternately
from .timing_report import TimingReport, add_timing_arguments, clock_of, write_report


RESOLUTION = 0.05  # an interval wider than this resolves nothing
DATA = ("drifted-clicks", "movielens-100k")
States = dict[int, dict[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserComparison:
    """All users at once against `baseline`: seconds for all of them, those of a baseline of fewer `baseline_users`
    multiplied; users a second by the clock of the verdict, and the largest difference between a user's parameters
    afterwards. The limit of the ratio is 1: no slower."""

    baseline: str
    baseline_users: int
    ours_users_per_second: float
    baseline_users_per_second: float
    largest_difference: float
    limit: float
    resolution: float
    verdict: TimingVerdict
    process: Timing
    wall: Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnDeviceReport(TimingReport):
    """What `on_device-<device>.json` holds; `clock` names the one that verdicts rest on."""

    clock: str
    data: str
    users: int
    samples_per_user: int
    device_steps: int
    parameters: int
    comparisons: list[UserComparison]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_timing_arguments(parser, blocks=10, steps_per_block=1)
    parser.add_argument("--architecture", default="deepfm", help="lr, wide_deep, pnn, deepfm")
    parser.add_argument("--data", choices=DATA, default=DATA[0])
    parser.add_argument("--users", type=int, default=64, help="of drawn clicks; MovieLens has 943")
    parser.add_argument("--samples", type=int, default=64, help="of each user; of MovieLens their last ones, at most")
    parser.add_argument("--items", type=int, default=1000, help="of drawn clicks")
    parser.add_argument("--baseline-users", type=int, default=0, help="that the loops go over; 0: all")
    parser.add_argument("--device-steps", type=int, default=10, help="steps of gradient descent of each user")
    parser.add_argument("--embedding-dim", type=int, default=16)
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[64, 32])


def run(options: argparse.Namespace) -> None:
    """Measure on the CPU, write the report, print its table."""
    torch.set_num_threads(options.threads)
    data = data_of(options)
    shape = {"embedding_dim": options.embedding_dim, "hidden_sizes": options.hidden_sizes}
    torch.manual_seed(0)
    model = CtrForCtrPrediction(data.config(options.architecture, **shape))
    report = measure(
        model,
        last_rows(data.rows("train"), options.samples),
        data_name=options.data,
        baseline_users=options.baseline_users,
        steps=options.device_steps,
        blocks=options.blocks,
        steps_per_block=options.steps_per_block,
    )
    variant = "" if options.data == DATA[0] else options.data
    print(f"{markdown_table(report)}\n\nWrote {write_report(report, options.output, variant=variant)}")


def data_of(options: argparse.Namespace) -> CtrData:
    """The data that was asked for; `train` is what users fine-tune on."""
    if options.data == "movielens-100k":
        ratings = read_movielens_100k().sort("timestamp")
        splits = user_split(ratings, MOVIELENS_COLUMNS.user, time_column=MOVIELENS_COLUMNS.time)
        return encode_ctr(splits, MOVIELENS_COLUMNS)
    sizes = {"num_users": options.users, "num_local": options.samples, "num_items": options.items, "num_test": 1}
    return draw_drifted_clicks(**sizes).data()


def last_rows(rows: CtrRows, count: int) -> CtrRows:
    """At most so many of each user's rows."""
    return rows.select(RowsByUser(rows.users, last=count).kept())


def measure(
    model: CtrForCtrPrediction,
    rows: CtrRows,
    *,
    steps: int,
    blocks: int,
    steps_per_block: int,
    learning_rate: float = 0.1,
    data_name: str = DATA[0],
    baseline_users: int = 0,
) -> OnDeviceReport:
    """Both comparisons, on all users of `rows`; the loops on `baseline_users` of them, evenly chosen, or on all."""
    everybody = rows.by_user()
    chosen = list(everybody)[:: max(1, len(everybody) // (baseline_users or len(everybody)))]
    by_user = {user: everybody[user] for user in chosen[: baseline_users or None]}
    share = len(by_user) / len(everybody)
    with tempfile.TemporaryDirectory() as folder:
        ours, states = _at_once(model, rows, list(by_user), steps, learning_rate, folder)
        baselines: dict[str, Callable[[], States]] = {
            "a Trainer for each user": lambda: _trainers(model, by_user, steps, learning_rate, folder),
            "a plain loop for each user": lambda: _loops(model, by_user, steps, learning_rate),
        }
        clock = clock_of(torch.get_num_threads())
        comparisons = []
        for name, baseline in baselines.items():
            difference = _largest_difference(states, baseline())
            ours()  # the first pass allocates
            timings = time_alternately(ours, baseline, blocks=blocks, steps_per_block=steps_per_block)
            timings = {name: _per_user(timing, share) for name, timing in timings.items()}
            timing = timings[clock]
            comparisons.append(
                UserComparison(
                    baseline=name,
                    baseline_users=len(by_user),
                    ours_users_per_second=len(everybody) / timing.ours_seconds,
                    baseline_users_per_second=len(everybody) / timing.baseline_seconds,
                    largest_difference=difference,
                    limit=1.0,
                    resolution=RESOLUTION,
                    verdict=judge(timing.ratio, limit=1.0, resolution=RESOLUTION),
                    **timings,
                )
            )
    return OnDeviceReport(
        benchmark="on_device",
        shape=model.config.to_diff_dict(),
        blocks=blocks,
        steps_per_block=steps_per_block,
        clock=clock,
        data=data_name,
        users=len(everybody),
        samples_per_user=len(rows) // len(everybody),
        device_steps=steps,
        parameters=model.num_parameters(),
        comparisons=comparisons,
    )


def _per_user(timing: Timing, share: float) -> Timing:
    """As if the baseline had gone over all users instead of a `share` of them."""
    ratios = [ratio * share for ratio in timing.ratios]
    seconds = timing.baseline_seconds / share
    return dataclasses.replace(timing, ratio=median_ratio(ratios), baseline_seconds=seconds, ratios=ratios)


def _at_once(
    model, rows: CtrRows, users: list[int], steps: int, rate: float, folder: str
) -> tuple[Callable[[], object], States]:
    args = OnDeviceArguments(device_steps=steps, device_learning_rate=rate, min_samples=1, roll_back=False)
    tuner = OnDeviceFineTuner(model, args)
    tuner.fit(rows, store=folder)
    states = {user: tuner.user_state(folder, user) for user in users}
    return lambda: tuner.fit(rows), states


def _trainers(model, by_user: dict[int, CtrRows], steps: int, rate: float, folder: str) -> States:
    states = {}
    for user, rows in by_user.items():
        own = copy.deepcopy(model)
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=len(rows),
            learning_rate=rate,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = Trainer(own, args, train_dataset=rows, data_collator=CtrCollator())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        states[user] = own.state_dict()
    return states


def _loops(model, by_user: dict[int, CtrRows], steps: int, rate: float) -> States:
    states = {}
    for user, rows in by_user.items():
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=rate)
        inputs = {name: value for name, value in rows.tensors.items() if name != "labels"}
        for _ in range(steps):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(own(**inputs).logits, rows.tensors["labels"]).backward()
            optimizer.step()
        states[user] = own.state_dict()
    return states


def _largest_difference(ours: States, theirs: States) -> float:
    return max(
        float((value - theirs[user][name]).abs().max())
        for user, state in ours.items()
        for name, value in state.items()
    )


def markdown_table(report: OnDeviceReport) -> str:
    """Users a second and ratios of the report; verdicts rest on its `clock`."""
    lines = [
        f"Fine-tuning {report.users} users of {report.data}, {report.samples_per_user} samples (mean) and "
        f"{report.device_steps} steps each, all {report.parameters:,} parameters; {report.device}; {report.blocks} "
        f"alternating blocks of {report.steps_per_block} rounds; verdicts by {report.clock} time, limit 1.",
        "",
        "| against | users/s | its users/s | time ratio, process | wall | largest difference | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in report.comparisons:
        process, wall = (
            f"{ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"
            for ratio in (item.process.ratio, item.wall.ratio)
        )
        lines.append(
            f"| {item.baseline}, {item.baseline_users} of them | {item.ours_users_per_second:.1f} | "
            f"{item.baseline_users_per_second:.1f} | {process} | {wall} | {item.largest_difference:.1e} | "
            f"{item.verdict} |"
        )
    return "\n".join(lines)
