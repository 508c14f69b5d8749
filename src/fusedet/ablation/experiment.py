"""An ablation from its plan to its report, and what it would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fusedet.ablation import estimate, launcher
from fusedet.ablation.cost import count_costs
from fusedet.ablation.plan import Plan
from fusedet.ablation.report import write_report
from fusedet.ablation.summary import summarize
from fusedet.errors import InputError

Say = Callable[[str], None]


@dataclass(frozen=True)
class LaunchOptions:
    """How a plan is run. budget: seconds after which no run is begun; those that would not fit are not begun either.

    slurm: options of the jobs, as submitit takes them. command: noted in the report.
    """

    budget: float | None = None
    launcher: str = "local"
    slurm: Mapping[str, Any] = field(default_factory=dict)
    resamples: int = 1000
    command: tuple[str, ...] = ()


def run_plan(
    plan: Plan, launch: LaunchOptions, *, say: Say = print, quiet: bool = False
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Train what a plan asks for and has not finished, then sum up; gives the summary and the files written, by what they are.

    Raises InputError before anything has run where a folder holds something else, or is in use.
    """
    if launch.launcher == "slurm":
        launcher.check_slurm()
        if launch.budget is not None:
            raise InputError("--budget goes with --launcher local: what Slurm runs at a time is not known here")
    launcher.check_out_dir(plan)
    states = plan.states()
    plan.out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(plan.out / launcher.LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"out={plan.out} is in use by another fusedet ablate: wait for it, or choose another folder"
        ) from error
    with lock:
        launcher.write_marker(plan, launch.command)
        costs = count_costs(plan.configs, plan.classes)
        places = launcher.list_devices(next(iter(plan.configs.values())).device)
        queue = launcher.Queue(
            launcher.list_unfinished(plan, states), estimate.make_clock(plan, costs), launch.budget, len(places)
        )
        if launch.budget is not None and queue.left and not queue.clock.seconds:
            _time_step(plan, queue.left[0].label, costs, queue.clock, say)
        if launch.launcher == "slurm" and queue.left:
            launcher.run_slurm(queue, plan.out / "slurm", launch.slurm, say)
        elif queue.left:
            launcher.run_local(queue, places, say, quiet)
        if queue.left:
            say(_describe_left(queue))
        say("summing up")
        found = summarize(plan, costs, resamples=launch.resamples)
        return found, write_report(found, plan.out)


def preview_plan(plan: Plan, *, say: Say = print) -> tuple[list[dict[str, Any]], str]:
    """What `ablate` would do: a row of figures per row of the table, as `tables.plan_sheet` takes them, and what the estimate rests on.

    Without data nothing is estimated. With data and no finished run, a step of the baseline's model is timed on images of the data.
    """
    if plan.out != Path():
        launcher.check_out_dir(plan)
    costs = count_costs(plan.configs, plan.classes)
    clock, lacking = None, {plan.owners[label]: plan.seeds for label in plan.chosen}
    if plan.data:
        clock = estimate.make_clock(plan, costs)
        states = plan.states()
        lacking = {row[0].label: len(row) for row in launcher.list_unfinished(plan, states) if row}
        if not clock.seconds and lacking:
            _time_step(plan, next(iter(lacking)), costs, clock, say)
    rows = []
    for row in plan.table.rows:
        cost = costs.get(row.label, {})
        left = (
            lacking.pop(plan.owners[row.label], 0) if row.label in plan.chosen else None
        )  # of rows that share runs the first has them
        expected = clock.expected(plan.owners[row.label]) if clock and left else None
        rows.append(
            {
                "label": row.label,
                "cited": row.cited,
                "published": dict(row.published),
                "params_M": row.params_M,
                "time_ms": row.time_ms,
                "trainable": cost.get("trainable"),
                "multiply_adds": cost.get("multiply_adds"),
                "left": left,
                "seconds": None if expected is None or not left else expected * left,
            }
        )
    return rows, clock.basis if clock else ""


def _time_step(
    plan: Plan, label: str, costs: Mapping[str, Mapping[str, float]], clock: estimate.Clock, say: Say
) -> None:
    """Where no run has finished, a step tells how long one takes."""
    say(f"timing a training step of '{label}'")
    estimate.time_training_step(plan, label, costs[label]["multiply_adds"], clock)


def _describe_left(queue: launcher.Queue) -> str:
    """What the budget did not allow."""
    names = [f"'{cell.label}' seed {cell.seed}" for cell in queue.left]
    some = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    rest = "" if queue.remaining is None else f", about {estimate.format_duration(queue.remaining)}"
    return f"the budget leaves {len(names)} runs undone{rest}: {some}; give the same command to go on"
