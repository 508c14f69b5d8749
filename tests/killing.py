"""Trainings in separate processes that are killed at a random time or a chosen place, and the comparison of runs."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from fusedet import cli
from fusedet.api import detector_evaluation
from fusedet.api import train as command
from fusedet.engine import checkpoint, logging, trainer
from shared_fixtures import save_unrendered
from warm import SERVER, make_ranks

FILES = ("metrics.csv", "val.bbox.json", "skipped.csv")


class Training:
    """A training in one or several processes; their output goes to `log`, their present activity to `log`.doing.

    Args:
        fault: (place, number, signal): at the number-th passage of a place of `PLACES` the process sends itself the
            signal.
    """

    def __init__(
        self, arguments: Sequence[object], log: Path, processes: int = 1, fault: tuple[str, int, int] | None = None
    ) -> None:
        self.log = log
        log.with_suffix(".doing").unlink(missing_ok=True)
        self.processes = []
        for own in make_ranks(processes) if processes > 1 else [{}]:
            process = SERVER.Process(
                target=_work, args=([str(argument) for argument in arguments], own, str(log), fault)
            )
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float | None = None) -> bool:
        """Whether all processes end within that time."""
        end = None if seconds is None else time.monotonic() + seconds
        while alive := [process for process in self.processes if process.is_alive()]:
            if end is not None and time.monotonic() >= end:
                return False
            connection.wait([process.sentinel for process in alive], 0.1)
            if len(alive) < len(self.processes) and any(self.codes):
                self._end_like_torchrun(alive)
        return True

    def _end_like_torchrun(self, alive: list[Any], seconds: float = 30.0) -> None:
        """Give the other processes of a failed one some time to end, then kill them, as torchrun's agent does."""
        deadline = time.monotonic() + seconds
        for process in alive:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()

    def doing(self) -> str:
        """Return the first process's present activity."""
        file = self.log.with_suffix(".doing")
        return (file.read_text().strip() if file.exists() else "") or "starting"

    def steps(self) -> bool:
        """Wait until the first step begins, or the end; return whether a step began."""
        while self.doing() == "starting" and not self.wait(0):
            time.sleep(0.01)
        return self.doing() != "starting"

    def kill(self) -> str:
        """Kill all processes; return their activity."""
        doing = self.doing()
        for process in self.processes:
            process.kill()
        self.wait()
        return doing

    @property
    def codes(self) -> list[int | None]:
        """The exit codes; of a signal, minus its number."""
        return [process.exitcode for process in self.processes]


def _work(arguments: list[str], env: dict[str, str], log: str, fault: tuple[str, int, int] | None) -> None:
    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    Figure.savefig = save_unrendered  # type: ignore[method-assign]
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of its workers: this process's own would import everything once more
    if env.get("RANK", "0") == "0":
        _mark(Path(log).with_suffix(".doing"))
    if fault:
        place, number, kind = fault
        PLACES[place](_at(number, kind))
    code = cli.run(arguments)
    os._exit(code)  # what a launcher sees; without Python's slow shutdown


def _at(number: int, kind: int) -> Callable[[], None]:
    """Return a function that sends the process a signal when it is called for the number-th time."""
    left = [number]

    def pass_by() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), kind)

    return pass_by


def _mark(file: Path) -> None:
    """Note in a file what the process is doing."""
    doing = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.pwrite(doing, b"starting  ", 0)

    def note(module: Any, name: str, word: str) -> None:
        inner = getattr(module, name)

        def outer(*args: Any, **options: Any) -> Any:
            os.pwrite(doing, f"{word:<10}".encode(), 0)
            try:
                return inner(*args, **options)
            finally:
                os.pwrite(doing, f"{'between':<10}".encode(), 0)

        setattr(module, name, outer)

    note(trainer, "_train_step", "step")
    note(trainer, "_validate", "validation")
    note(checkpoint, "save", "checkpoint")
    note(checkpoint, "save_weights", "best")
    note(logging.MetricsTable, "add", "row")
    note(command, "write_report", "scoring")


# -- places


def _before_run_json(hit: Callable[[], None]) -> None:
    inner = command.write_json
    command.write_json = lambda *args: (hit(), inner(*args))[1]


def _in_a_step(hit: Callable[[], None]) -> None:
    inner = trainer.sum_losses
    trainer.sum_losses = lambda *args: (hit(), inner(*args))[1]


def _in_a_validation(hit: Callable[[], None]) -> None:
    inner = command.detect
    for module in (command, detector_evaluation):
        module.detect = lambda *args: (hit(), inner(*args), hit())[1]


def _before_a_checkpoint_is_in_its_place(hit: Callable[[], None]) -> None:
    inner = Path.replace

    def outer(self: Path, target: Path) -> Path:
        if Path(target).name == "last.ckpt":
            hit()
        return inner(self, target)

    Path.replace = outer  # type: ignore[method-assign]


def _in_the_middle_of_a_checkpoint(hit: Callable[[], None]) -> None:
    def torn(self: Path, target: Path) -> Path:
        if Path(target).name == "last.ckpt":
            whole = self.read_bytes()
            self.write_bytes(whole[: len(whole) // 2])
            hit()
            self.write_bytes(whole)
        return inner(self, target)

    inner = Path.replace
    Path.replace = torn  # type: ignore[method-assign]


def _after_half_a_row(hit: Callable[[], None]) -> None:
    inner = logging.MetricsTable.add

    def outer(self: logging.MetricsTable, row: Any) -> None:
        if self.path.name == "metrics.csv":
            whole = self.path.read_bytes()
            with self.path.open("a") as file:
                file.write("1,3,0.0")
            hit()
            self.path.write_bytes(whole)
        inner(self, row)

    logging.MetricsTable.add = outer  # type: ignore[method-assign]


def _after_the_row_of_a_validation(hit: Callable[[], None]) -> None:
    inner = logging.MetricsTable.add

    def outer(self: logging.MetricsTable, row: Any) -> None:
        inner(self, row)
        if "AP" in row:
            hit()

    logging.MetricsTable.add = outer  # type: ignore[method-assign]


def _between_best_and_last(hit: Callable[[], None]) -> None:
    inner = checkpoint.save_weights

    def outer(*args: Any) -> None:
        inner(*args)
        hit()

    checkpoint.save_weights = outer


PLACES: dict[str, Callable[[Callable[[], None]], None]] = {
    "before run.json": _before_run_json,
    "in a step": _in_a_step,
    "in a validation": _in_a_validation,
    "in the middle of a checkpoint": _in_the_middle_of_a_checkpoint,
    "before a checkpoint is in its place": _before_a_checkpoint_is_in_its_place,
    "after half a row": _after_half_a_row,
    "after the row of a validation": _after_the_row_of_a_validation,
    "between best and last": _between_best_and_last,
}


# -- what must be the same


def differences(a: Path, b: Path) -> list[str]:
    """List where two runs are not bit for bit the same: state, best weights and their description, and `FILES`."""
    different = _different(checkpoint.load(a / "last.ckpt"), checkpoint.load(b / "last.ckpt"), "last.ckpt")
    best = [checkpoint.load_weights(run / "best.safetensors") for run in (a, b)]
    different += _different(_without_folder(best[0]), _without_folder(best[1]), "best.safetensors")
    different += [name for name in FILES if _content(a / name) != _content(b / name)]
    steps = [[(row["epoch"], row["step"]) for row in csv.DictReader((run / "speed.csv").open())] for run in (a, b)]
    different += ["speed.csv"] if steps[0] != steps[1] else []
    return different + [f"{run} keeps {file.name}" for run in (a, b) for file in run.glob(".*.part")]


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def _without_folder(best: tuple[Any, dict[str, str]]) -> tuple[Any, Any]:
    return best[0], {key: value for key, value in best[1].items() if key != "config"}


def _different(a: Any, b: Any, where: str) -> list[str]:
    if where == "last.ckpt.meta":  # its config names the folder
        a, b = ({key: value for key, value in side.items() if key != "config"} for side in (a, b))
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        keys = [where] if not isinstance(b, dict) or a.keys() != b.keys() else []
        return keys or [text for key in a for text in _different(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        lengths = [where] if not isinstance(b, (list, tuple)) or len(a) != len(b) else []
        return lengths or [text for i, (x, y) in enumerate(zip(a, b)) for text in _different(x, y, f"{where}.{i}")]
    return [] if a == b or (a != a and b != b) else [where]  # a metric of no object is NaN


def killed_at_random(
    arguments: Sequence[object], whole: Path, out: Path, kills: int, seed: int, processes: int = 1
) -> list[str]:
    """Kill a training and its resumptions `kills` times, let it end, and compare it with the run in `whole`.

    One moment of five lies in a process's start. The rest lie between its first step and the time that a whole training
    takes from there, more of them early, so that a chain has many links. A training that ends before its kill is
    compared too, and the next one begins.

    Returns:
        The activities at the kills.
    """
    draw, done, chain, doing = random.Random(seed), 0, 0, []
    start, usual = (float(text) for text in (whole / "seconds").read_text().split())
    while True:
        run = out / str(chain)
        log = out / f"{chain}.log"
        resume = ["--resume"] if (run / "config.yaml").exists() else []
        training = Training([*arguments, f"out={run}", *resume], log, processes)
        early, share = draw.random() < 0.2, draw.random()
        moment = None
        if done < kills:
            moment = start * share if early or not training.steps() else usual * share**2
        if not training.wait(moment):
            doing.append(training.kill())
            done += 1
            continue
        assert training.codes == [0] * processes, log.read_text()[-3000:]
        different = differences(whole, run)
        assert not different, f"seed {seed}, chain {chain}, killed while {doing}: {different[:5]}"
        if done == kills:
            print(
                f"seed {seed}, {processes} processes: killed while {', '.join(doing)}; the same in {chain + 1} "
                "trainings"
            )
            return doing
        chain += 1


def undisturbed(arguments: Sequence[object], out: Path, processes: int = 1) -> Path:
    """Train without a kill; return the directory, with the times of the start and of the rest in `seconds`."""
    first = SERVER.Process(target=int)  # the server's imports are not a training's time
    first.start()
    first.join()
    began = time.monotonic()
    training = Training([*arguments, f"out={out}"], out.with_suffix(".log"), processes)
    training.steps()
    stepped = time.monotonic()
    training.wait()
    assert training.codes == [0] * processes, out.with_suffix(".log").read_text()[-3000:]
    (out / "seconds").write_text(f"{stepped - began} {time.monotonic() - stepped}")
    return out


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
