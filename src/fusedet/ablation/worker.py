"""Execute one run of an ablation. As a program it reads the run's label and config from standard input."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fusedet import config
from fusedet.ablation.plan import FAILED, TIMES, Run
from fusedet.api.detector_evaluation import evaluate_detector, write_report
from fusedet.api.load_model import build_with_weights, weights_file
from fusedet.api.predictor import pick_device, prepare_detector
from fusedet.api.run_dir import create_run_dir, describe_environment, read_json, write_json
from fusedet.api.train import train
from fusedet.api.train_inputs import open_data
from fusedet.atomic_io import write_atomically
from fusedet.engine.signals import Interrupted
from fusedet.errors import DivergenceError, InputError


def execute_run(run: Run, say: Callable[[str], None] = print, quiet: bool = False) -> None:
    """Train and score a run, resuming it where it stopped, or score its row's weights; record the duration.

    A training that diverges is recorded and raises nothing, because the other runs of a table do not depend on it.
    """
    folder = run.folder
    resumed = (folder / "last.ckpt").is_file()
    if not resumed and folder.exists():
        shutil.rmtree(folder)  # it stopped before its first checkpoint: nothing of it can be used
    earlier = _read_sessions(folder) if resumed else []
    if resumed:
        _write_times(folder, [*earlier, None])
    start = time.perf_counter()
    try:
        if run.weights_from:
            score_trained_weights(run, say)
        else:
            train(run.config, resume=resumed, say=say, quiet=quiet)
    except DivergenceError as error:
        write_json(folder / FAILED, {"reason": str(error)})
    finally:
        if (folder / "config.yaml").is_file():
            _write_times(folder, [*earlier, time.perf_counter() - start])


def score_trained_weights(run: Run, say: Callable[[str], None] = print) -> None:
    """Score the weights of `run.weights_from` with the run's test section; write results, metrics and images."""
    assert run.weights_from is not None
    options = run.config
    device = pick_device(options.device)
    train_split, dataset = open_data(options, say)
    weights = weights_file(run.weights_from)
    detector = prepare_detector(build_with_weights(options, len(dataset.names), weights).to(device), options)
    evaluated = evaluate_detector(detector, options, dataset, device)
    folder = create_run_dir(run.folder)
    write_atomically(folder / "config.yaml", options.to_yaml().encode())
    prints = {"train": train_split.fingerprint(), "val": dataset.fingerprint()}
    write_json(folder / "run.json", describe_environment(str(device), 1) | {"data": prints, "seed": run.seed})
    write_report(dataset, evaluated.results, evaluated.metrics, folder, title=run.label)


def _read_sessions(folder: Path) -> list[float | None]:
    """Read the seconds of each session of a run; None for a session that was killed."""
    return (read_json(folder / TIMES) or {}).get("sessions", [None])


def _write_times(folder: Path, sessions: Sequence[float | None]) -> None:
    """Write the seconds of all sessions and their sum; the sum is None if one of them is unknown."""
    known = [session for session in sessions if session is not None]
    seconds = sum(known) if len(known) == len(sessions) else None
    write_json(folder / TIMES, {"seconds": seconds, "resumed": len(sessions) > 1, "sessions": list(sessions)})


def main() -> int:
    """Execute the run on standard input and return the exit code of the command line."""
    task = json.load(sys.stdin)
    weights_from = Path(task["weights_from"]) if task.get("weights_from") else None
    try:
        execute_run(Run(task["label"], config.parse(task["config"]), weights_from))
    except InputError as error:
        print(str(error), file=sys.stderr)
        return error.exit_code
    except Interrupted as stop:
        print(str(stop), file=sys.stderr)
        return stop.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
