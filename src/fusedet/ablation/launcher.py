"""Start the runs of a plan: in this process, side by side on several devices, or as Slurm jobs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import torch

from fusedet.ablation import worker
from fusedet.ablation.estimate import Clock
from fusedet.ablation.plan import DATA, FAILED, MARKER, Plan, Run, State
from fusedet.ablation.summary_text import shorten_path
from fusedet.api.predictor import pick_device
from fusedet.api.run_dir import read_json, write_json
from fusedet.config.interval import format_duration
from fusedet.engine.signals import Interrupted, Interrupts
from fusedet.errors import InputError

Say = Callable[[str], None]
POLL = 0.2
INTERRUPTED = "interrupted; what was trained is kept, repeat the command to continue"
SIGNAL_CODES = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM))
LOCK = ".lock"


@dataclass
class Queue:
    """The unfinished runs, and which of them the budget allows.

    Whole rows come first, in order: a row is started only if all of its missing runs are expected to fit beside the
    runs in progress. Then come single runs that fit. A run of unknown duration fits. A run that scores the weights of
    another run waits for it.

    Attributes:
        rows: Unfinished runs of each row.
        clock: Estimated durations.
        budget: Seconds from now; None for no limit.
        parallel: Number of runs at a time.
        start: Time when the queue was made.
        started: Labels of the rows that were started.
        running: Label and start time of the runs in progress, by run directory.
    """

    rows: list[list[Run]]
    clock: Clock
    budget: float | None = None
    parallel: int = 1
    start: float = field(default_factory=time.monotonic)
    started: set[str] = field(default_factory=set)
    running: dict[Path, tuple[str, float]] = field(default_factory=dict)

    def take_next(self) -> Run | None:
        """Take the next run; None if no run is left, none fits, or all wait for weights."""
        self.rows = [kept for row in self.rows if (kept := [run for run in row if not _lost_its_weights(run)])]
        for whole_rows in (True, False):
            for row in self.rows:
                ready = next((run for run in row if _has_its_weights(run)), None)
                if ready is None:
                    continue
                needed = row if whole_rows and ready.label not in self.started else [ready]
                if self._fits(needed):
                    self.started.add(ready.label)
                    self.running[ready.folder] = ready.label, time.monotonic()
                    row.remove(ready)
                    return ready
        return None

    def mark_finished(self, run: Run) -> None:
        """Free the run's place and note its duration if it has finished."""
        self.running.pop(run.folder, None)
        self.clock.add(run)

    @property
    def left(self) -> list[Run]:
        """Runs that were not taken."""
        return [run for row in self.rows for run in row]

    @property
    def left_seconds(self) -> float | None:
        """Estimated seconds of the runs that were not taken; None if unknown."""
        expected = [self.clock.expected(run.label) for run in self.left]
        return None if None in expected else sum(e for e in expected if e is not None) / self.parallel

    def _fits(self, runs: Sequence[Run]) -> bool:
        if self.budget is None:
            return True
        now = time.monotonic()
        spent = now - self.start
        busy = [max(0.0, (self.clock.expected(label) or 0.0) - (now - since)) for label, since in self.running.values()]
        places = sorted([*busy, *[0.0] * self.parallel], reverse=True)[: self.parallel]
        end = 0.0
        for run in runs:  # each run gets the place that is free first
            places.sort()
            places[0] += self.clock.expected(run.label) or 0.0
            end = max(end, places[0])
        return spent < self.budget and spent + end <= self.budget


def _has_its_weights(run: Run) -> bool:
    return run.weights_from is None or read_json(run.weights_from / "metrics.json") is not None


def _lost_its_weights(run: Run) -> bool:
    """Return whether the training whose weights a run would score has failed."""
    return run.weights_from is not None and (run.weights_from / FAILED).is_file()


def write_marker(plan: Plan, command: Sequence[str]) -> None:
    """Record the table and the command in the output directory.

    Raises:
        InputError: The directory has something else.
    """
    check_out_dir(plan)
    plan.out.mkdir(parents=True, exist_ok=True)
    commands = (read_json(plan.out / MARKER) or {"commands": []})["commands"]
    if (shortened := [shorten_path(argument) for argument in command]) not in commands:
        commands.append(shortened)
    about = {"table": plan.table.name, "content": plan.table.content, "rows": [row.label for row in plan.table.rows]}
    write_json(plan.out / MARKER, about | {"commands": commands})


def check_out_dir(plan: Plan) -> None:
    """Check that the output directory is empty or has an ablation of this table, so that nothing is overwritten.

    Raises:
        InputError: The directory has something else.
    """
    if not plan.out.is_dir() or not any(path.name not in (LOCK, DATA) for path in plan.out.iterdir()):
        return
    marker = read_json(plan.out / MARKER)
    if marker is None:
        raise InputError(f"out={plan.out} exists and has no ablation: nothing is overwritten, choose another folder")
    name = Path(marker["table"]).stem  # older markers have the path of the table
    rows = marker.get("rows", ())
    shares_rows = not rows or any(row.label in rows for row in plan.table.rows)  # a table may get further rows
    if marker.get("content") != plan.table.content and (name != plan.table.name or not shares_rows):
        other = "another table of that name" if name == plan.table.name else f"the ablation of {name}"
        raise InputError(f"out={plan.out} has {other}, not of {plan.table.source}: choose another folder")


def list_unfinished(plan: Plan, states: Mapping[Path, State]) -> list[list[Run]]:
    """List the runs of the selected rows that have neither finished nor failed, row by row."""
    return [[run for run in row if states[run.folder] in ("absent", "resumable")] for row in plan.selected_runs()]


def list_devices(name: str, parallel: int = 1) -> list[str]:
    """List all GPUs of this machine if the config does not name one, else the one device, each `parallel` times."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1:
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] * parallel
    return [name] * parallel


def run_local(queue: Queue, devices: Sequence[str], say: Say, quiet: bool = False) -> None:
    """Run the queue on this machine.

    One device runs in this process. On several devices each run has a process, and its output goes to a .log file
    beside the run directory. Runs on the same device share the threads.

    Args:
        queue: The runs.
        devices: Devices to use at the same time; one that stands twice has two runs.
        say: Receives progress messages.
        quiet: Whether trainings show no progress.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; every run has written its last.ckpt.
        InputError: A run ended with an error.
    """
    total, done = len(queue.left), 0
    running: dict[int, tuple[subprocess.Popen[bytes], Run]] = {}

    def announce(run: Run, place: str = "") -> None:
        expected, others = queue.clock.expected(run.label), queue.left_seconds
        estimates = ""
        if expected is not None and others is not None:
            estimates = f", about {format_duration(expected)}; the runs after it about {format_duration(others)}"
        say(f"run {done + len(running) + 1} of {total}: row '{run.label}', seed {run.seed}{place}{estimates}")

    if len(devices) == 1:
        while run := queue.take_next():
            announce(run)
            worker.execute_run(run, say, quiet)
            queue.mark_finished(run)
            done += 1
        return
    interrupts = Interrupts()
    # A terminal sends the signal to the processes too; a second one within two seconds changes nothing.
    try:
        with interrupts:
            while True:
                for i, device in enumerate(devices):
                    if i not in running and (run := queue.take_next()):
                        announce(run, f" on {device}, {run.folder}.log")
                        # Runs on one device share the threads. That those on other GPUs need none of them is an
                        # assumption, which was not measured.
                        threads = max(1, torch.get_num_threads() // devices.count(device))
                        running[i] = _start_process(run, device, threads), run
                if not running:
                    return
                time.sleep(POLL)
                for i, (process, run) in list(running.items()):
                    if process.poll() is not None:
                        del running[i]
                        _check_exit(process, run)
                        queue.mark_finished(run)
                        done += 1
    except KeyboardInterrupt:
        raise Interrupted(INTERRUPTED, interrupts.received) from None
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def _start_process(run: Run, device: str, threads: int) -> subprocess.Popen[bytes]:
    """Start a process that executes a run on a device, with a number of threads for operators on the CPU."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    task = {"label": run.label, "config": run.config.replace(device=device).tree()}
    task |= {"weights_from": str(run.weights_from)} if run.weights_from else {}
    with open(f"{run.folder}.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", worker.__name__],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
    assert process.stdin is not None
    with process.stdin as stream:
        stream.write(json.dumps(task).encode())
    return process


def _check_exit(process: subprocess.Popen[bytes], run: Run) -> None:
    if process.returncode in SIGNAL_CODES:  # it received the signal before this process
        raise Interrupted(INTERRUPTED, process.returncode - 128)
    if process.returncode:
        log = Path(f"{run.folder}.log")
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        raise InputError(
            f"the run of row '{run.label}', seed {run.seed}, ended with exit code {process.returncode}: {lines[-1]} "
            f"(see {log})"
        )


def run_slurm(queue: Queue, folder: Path, options: Mapping[str, Any], say: Say, cluster: str = "slurm") -> None:
    """Submit one job per run through submitit and wait for them; jobs of an earlier call are not submitted again.

    Args:
        queue: The runs.
        folder: Folder of submitit's logs.
        options: Options of submitit's `update_parameters`, such as timeout_min and slurm_partition.
        say: Receives progress messages.
        cluster: Cluster type of submitit.

    Raises:
        InputError: A job has failed.
    """
    submitit = import_module("submitit")
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    executor.update_parameters(name="fusedet", **options)
    job_class = getattr(submitit, f"{cluster.title()}Job")
    # Runs that score the weights of others are submitted in a later round.
    while _submit_round(queue, folder, executor, job_class, say):
        pass


def _submit_round(queue: Queue, folder: Path, executor: Any, job_class: Any, say: Say) -> bool:
    """Submit the runs that can start and wait for them; return whether there were any."""
    record = folder / "jobs.json"
    known = read_json(record) or {}
    jobs = []
    while run := queue.take_next():
        earlier = known.get(str(run.folder))
        job = job_class(folder=folder, job_id=earlier) if earlier else None
        if job is None or job.done():
            job = executor.submit(worker.execute_run, run, print, True)
            known[str(run.folder)] = job.job_id
            folder.mkdir(parents=True, exist_ok=True)
            write_json(record, known)
        say(f"row '{run.label}', seed {run.seed}: job {job.job_id}")
        jobs.append((job, run))
    if not jobs:
        return False
    say(f"waiting for {len(jobs)} jobs; they continue if this command is stopped, and the same command finds them")
    problems = [
        f"row '{run.label}', seed {run.seed}: {error}" for job, run in jobs if (error := job.exception()) is not None
    ]
    if problems:
        raise InputError(
            f"{len(problems)} of {len(jobs)} jobs have failed, see {folder}: {' '.join(problems[0].split())}"
        )
    return True


def check_slurm() -> None:
    """Check that submitit and Slurm are available.

    Raises:
        InputError: One of them is missing.
    """
    if find_spec("submitit") is None:
        raise InputError("--launcher slurm needs submitit, which is not installed: pip install 'fusedet[slurm]'")
    if which("srun") is None:
        raise InputError(
            "--launcher slurm needs Slurm, and this machine has no srun: use a login node, or --launcher local"
        )
