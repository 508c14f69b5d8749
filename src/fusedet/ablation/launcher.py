"""Running what a plan asks for: here, on one device or several side by side, or as jobs of a cluster."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import torch

from fusedet.ablation import worker
from fusedet.ablation.estimate import Clock, format_duration
from fusedet.ablation.plan import FAILED, MARKER, Plan, Run, State, read_json
from fusedet.ablation.summary_text import shorten_path
from fusedet.api.predict import pick_device
from fusedet.api.run_dir import write_json
from fusedet.engine.signals import Interrupted, Interrupts
from fusedet.errors import InputError

Say = Callable[[str], None]
POLL = 0.2
KEPT = "stopped; what was trained is kept, give the same command to go on"
STOPPED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM))
LOCK = ".lock"


@dataclass
class Queue:
    """The runs that are still to be done, and which of them the budget allows.

    rows: the runs of each row that are not finished; budget: seconds from now, all where None; beside: how many run at a time.
    Whole rows come first, in order: one is begun only where all that it lacks is expected to fit beside what those that run still need;
    then single runs that fit. Where nothing is known of how long a run takes, it fits. A run that scores the weights of another one
    waits for it. running: the runs in progress by their folders, with their rows and when they were taken.
    """

    rows: list[list[Run]]
    clock: Clock
    budget: float | None = None
    beside: int = 1
    began: float = field(default_factory=time.monotonic)
    begun: set[str] = field(default_factory=set)
    running: dict[Path, tuple[str, float]] = field(default_factory=dict)

    def take(self) -> Run | None:
        """The next run; None where there is none, none that fits, or none whose weights are there."""
        self.rows = [kept for row in self.rows if (kept := [cell for cell in row if not _cannot_run(cell)])]
        for whole in (True, False):
            for row in self.rows:
                ready = next(
                    (cell for cell in row if not cell.trained or read_json(cell.trained / "metrics.json") is not None),
                    None,
                )
                asked = row if whole and row[0].label not in self.begun else [ready]
                if ready is not None and self._fits([cell for cell in asked if cell is not None]):
                    self.begun.add(ready.label)
                    self.running[ready.folder] = ready.label, time.monotonic()
                    row.remove(ready)
                    return ready
        return None

    def mark_finished(self, cell: Run) -> None:
        """A run has ended: its place is free, and what it took is known."""
        self.running.pop(cell.folder, None)
        self.clock.add(cell)

    @property
    def left(self) -> list[Run]:
        """What was not taken."""
        return [cell for row in self.rows for cell in row]

    @property
    def remaining(self) -> float | None:
        """Expected seconds of what was not taken; None where nothing is known."""
        expected = [self.clock.expected(cell.label) for cell in self.left]
        return None if None in expected else sum(e for e in expected if e is not None) / self.beside

    def _fits(self, cells: Sequence[Run]) -> bool:
        if self.budget is None:
            return True
        now = time.monotonic()
        spent = now - self.began
        rest = [max(0.0, (self.clock.expected(label) or 0.0) - (now - since)) for label, since in self.running.values()]
        places = sorted([*rest, *[0.0] * self.beside], reverse=True)[: self.beside]
        end = 0.0
        for cell in cells:  # each goes to the place that is free first
            places.sort()
            places[0] += self.clock.expected(cell.label) or 0.0
            end = max(end, places[0])
        return spent < self.budget and spent + end <= self.budget


def write_marker(plan: Plan, command: Sequence[str]) -> None:
    """Write which table a folder is of, and the command, into its marker. Raises InputError for a folder of something else."""
    check_out_dir(plan)
    plan.out.mkdir(parents=True, exist_ok=True)
    commands = (read_json(plan.out / MARKER) or {"commands": []})["commands"]
    if (own := [shorten_path(word) for word in command]) not in commands:
        commands.append(own)
    about = {"table": plan.table.name, "content": plan.table.content, "rows": [row.label for row in plan.table.rows]}
    write_json(plan.out / MARKER, about | {"commands": commands})


def check_out_dir(plan: Plan) -> None:
    """Raises InputError where the folder holds anything but an ablation of this table: nothing is overwritten."""
    if not plan.out.is_dir() or not any(path.name != LOCK for path in plan.out.iterdir()):
        return
    known = read_json(plan.out / MARKER)
    if known is None:
        raise InputError(f"out={plan.out} exists and holds no ablation: nothing is overwritten, choose another folder")
    name = Path(known["table"]).stem  # an older marker has the path as it was given
    rows = known.get("rows", ())
    shared = not rows or any(row.label in rows for row in plan.table.rows)  # a table may get further rows
    if known.get("content") != plan.table.content and (name != plan.table.name or not shared):
        other = "another table of that name" if name == plan.table.name else f"the ablation of {name}"
        raise InputError(f"out={plan.out} holds {other}, not of {plan.table.source}: choose another folder")


def _cannot_run(cell: Run) -> bool:
    """Whether the training whose weights a run would score has failed."""
    return cell.trained is not None and (cell.trained / FAILED).is_file()


def list_unfinished(plan: Plan, states: Mapping[Path, State]) -> list[list[Run]]:
    """The runs of the chosen rows that have neither finished nor failed."""
    return [[cell for cell in row if states[cell.folder] in ("absent", "begun")] for row in plan.to_run()]


def list_devices(name: str) -> list[str]:
    """All GPUs of this machine where the config leaves the choice, else the one device."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1:
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [name]


def run_local(queue: Queue, places: Sequence[str], say: Say, quiet: bool = False) -> None:
    """Run the queue on these devices: one in this process, several with a process per run, whose output goes to a .log beside its folder.

    Raises Interrupted after Ctrl-C or SIGTERM, with every run's last.ckpt written; InputError where a run cannot go on.
    """
    total, done = len(queue.left), 0
    running: dict[int, tuple[subprocess.Popen[bytes], Run]] = {}

    def announce(cell: Run, place: str = "") -> None:
        expected, others = queue.clock.expected(cell.label), queue.remaining
        rest = (
            ""
            if expected is None or others is None
            else f", about {format_duration(expected)}; the others after it about {format_duration(others)}"
        )
        say(f"run {done + len(running) + 1} of {total}: row '{cell.label}', seed {cell.seed}{place}{rest}")

    if len(places) == 1:
        while cell := queue.take():
            announce(cell)
            worker.execute_run(cell, say, quiet)
            queue.mark_finished(cell)
            done += 1
        return
    interrupts = Interrupts()
    # the processes get the signal too where it comes from a terminal; a second one within two seconds changes nothing
    try:
        with interrupts:
            while True:
                for i, place in enumerate(places):
                    if i not in running and (cell := queue.take()):
                        announce(cell, f" on {place}, {cell.folder}.log")
                        running[i] = (_start(cell, place), cell)
                if not running:
                    return
                time.sleep(POLL)
                for i, (process, cell) in list(running.items()):
                    if process.poll() is not None:
                        del running[i]
                        _check_exit(process, cell)
                        queue.mark_finished(cell)
                        done += 1
    except KeyboardInterrupt:
        raise Interrupted(KEPT, interrupts.received) from None
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def _start(cell: Run, place: str) -> subprocess.Popen[bytes]:
    """A process that does a run on a device."""
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    asked = {"label": cell.label, "config": replace(cell.config, device=place).tree()}
    asked |= {"trained": str(cell.trained)} if cell.trained else {}
    with open(f"{cell.folder}.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", worker.__name__], stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    assert process.stdin is not None
    with process.stdin as stream:
        stream.write(json.dumps(asked).encode())
    return process


def _check_exit(process: subprocess.Popen[bytes], cell: Run) -> None:
    if process.returncode in STOPPED:  # it has got the signal before this process
        raise Interrupted(KEPT, process.returncode - 128)
    if process.returncode:
        log = Path(f"{cell.folder}.log")
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        raise InputError(
            f"the run of row '{cell.label}', seed {cell.seed}, ended with {process.returncode}: {last[-1]} (see {log})"
        )


def run_slurm(queue: Queue, folder: Path, options: Mapping[str, Any], say: Say, cluster: str = "slurm") -> None:
    """Submit a job per run through submitit, and wait for them; jobs that an earlier call has submitted are not submitted again.

    folder: of submitit's logs; options: as submitit's `update_parameters` takes them, such as timeout_min and slurm_partition. Raises
    InputError where a job has failed.
    """
    submitit = import_module("submitit")
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    executor.update_parameters(name="fusedet", **options)
    job_class = getattr(submitit, f"{cluster.title()}Job")
    noted = folder / "jobs.json"
    known = read_json(noted) or {}
    while _submit_round(queue, folder, executor, job_class, noted, known, say):
        pass  # those that score the weights of others come after these


def _submit_round(
    queue: Queue, folder: Path, executor: Any, job_class: Any, noted: Path, known: dict[str, str], say: Say
) -> bool:
    """Submit what can be begun and wait for it; whether there was anything."""
    jobs = []
    while cell := queue.take():
        before = known.get(str(cell.folder))
        job = job_class(folder=folder, job_id=before) if before else None
        if job is None or job.done():
            job = executor.submit(worker.execute_run, cell, print, True)
            known[str(cell.folder)] = job.job_id
            folder.mkdir(parents=True, exist_ok=True)
            write_json(noted, known)
        say(f"row '{cell.label}', seed {cell.seed}: job {job.job_id}")
        jobs.append((job, cell))
    if not jobs:
        return False
    say(f"waiting for {len(jobs)} jobs; stopped here, they go on, and the same command takes them up")
    problems = [
        f"row '{cell.label}', seed {cell.seed}: {error}" for job, cell in jobs if (error := job.exception()) is not None
    ]
    if problems:
        raise InputError(
            f"{len(problems)} of {len(jobs)} jobs have failed, see {folder}: {' '.join(problems[0].split())}"
        )
    return True


def check_slurm() -> None:
    """Raises InputError where submitit or Slurm is not there."""
    if find_spec("submitit") is None:
        raise InputError("--launcher slurm needs submitit, which is not installed: pip install 'fusedet[slurm]'")
    if which("srun") is None:
        raise InputError(
            "--launcher slurm needs Slurm, and this machine has no srun: use a login node, or --launcher local"
        )
