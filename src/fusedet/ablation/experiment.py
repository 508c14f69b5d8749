"""Run an ablation from its plan to its report, or preview it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fusedet.ablation import estimate, launcher
from fusedet.ablation.cost import count_costs
from fusedet.ablation.plan import Plan
from fusedet.ablation.report import write_ablation_report
from fusedet.ablation.summary import summarize_runs
from fusedet.config.interval import format_duration
from fusedet.errors import InputError, format_count, shorten_list

Say = Callable[[str], None]


@dataclass(frozen=True)
class LaunchOptions:
    """Options of `run_plan`.

    Attributes:
        budget: Seconds in which all runs must end; a run that is not expected to fit is not started.
        launcher: "local" or "slurm".
        parallel: Runs at a time on each device, of the local launcher.
        slurm: Options of the jobs, as submitit's `update_parameters` takes them.
        resamples: Number of bootstrap resamples of the images.
        command: Command line to record in the report.
    """

    budget: float | None = None
    launcher: str = "local"
    parallel: int = 1
    slurm: Mapping[str, Any] = field(default_factory=dict)
    resamples: int = 1000
    command: tuple[str, ...] = ()


def run_plan(
    plan: Plan, launch: LaunchOptions, *, say: Say = print, quiet: bool = False
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Train the unfinished runs of a plan, then summarize all runs and write the report.

    Args:
        plan: The plan.
        launch: How the runs are started.
        say: Receives progress messages.
        quiet: Whether trainings show no progress.

    Returns:
        The summary, as table.json has it, and the written files by what they are.

    Raises:
        InputError: A folder has something else, or is in use; nothing has run yet.
    """
    if launch.launcher == "slurm":
        launcher.check_slurm()
        if launch.budget is not None:
            raise InputError("--budget needs --launcher local: how many jobs Slurm runs at once is unknown here")
        if launch.parallel != 1:
            raise InputError("--parallel needs --launcher local: Slurm decides how many jobs run at once")
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
        devices = launcher.list_devices(next(iter(plan.configs.values())).device, launch.parallel)
        clock = estimate.make_clock(plan, costs)
        queue = launcher.Queue(launcher.list_unfinished(plan, states), clock, launch.budget, len(devices))
        if launch.budget is not None and queue.left and not clock.seconds:
            _time_step(plan, queue.left[0].label, costs, clock, say)
        if launch.launcher == "slurm" and queue.left:
            launcher.run_slurm(queue, plan.out / "slurm", launch.slurm, say)
        elif queue.left:
            launcher.run_local(queue, devices, say, quiet)
        if queue.left:
            say(_describe_left(queue))
        say("summarizing")
        summary = summarize_runs(plan, costs, resamples=launch.resamples)
        return summary, write_ablation_report(summary, plan.out)


def preview_plan(plan: Plan, *, say: Say = print) -> tuple[list[dict[str, Any]], str]:
    """Preview what `run_plan` would do.

    Nothing is estimated without data. With data and no finished run, a training step of the baseline is timed.

    Returns:
        One mapping per row of the table, as `plan_sheet.make_plan_sheet` takes them, and the basis of the estimate.
    """
    if plan.out != Path():
        launcher.check_out_dir(plan)
    costs = count_costs(plan.configs, plan.classes)
    # A row that scores the weights of another row needs its training.
    weights = {plan.weights_of[label] for label in plan.selected if plan.weights_of[label] != plan.runs_of[label]}
    needed = {*plan.selected, *weights}
    clock, missing = None, {plan.runs_of[label]: plan.seeds for label in needed}
    if plan.data:
        clock = estimate.make_clock(plan, costs)
        missing = {runs[0].label: len(runs) for runs in launcher.list_unfinished(plan, plan.states()) if runs}
        if not clock.seconds and missing:
            _time_step(plan, next(iter(missing)), costs, clock, say)
    rows = []
    for row in plan.table.rows:
        cost = costs.get(row.label, {})
        # Of rows that share runs, the first one has them.
        left = missing.pop(plan.runs_of[row.label], 0) if row.label in needed else None
        expected = clock.expected(plan.runs_of[row.label]) if clock and left else None
        rows.append(
            {
                "label": row.label,
                "cited": row.is_only_cited,
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
    say(f"timing a training step of '{label}'")
    estimate.time_training_step(plan, label, costs[label]["multiply_adds"], clock)


def _describe_left(queue: launcher.Queue) -> str:
    """Say which runs the budget has left out."""
    listed, seconds = shorten_list((f"'{run.label}' seed {run.seed}" for run in queue.left), 6), queue.left_seconds
    rest = "" if seconds is None else f", about {format_duration(seconds)}"
    return (
        f"the budget leaves out {format_count(len(queue.left), 'run')}{rest}: {listed}; repeat the command to continue"
    )
