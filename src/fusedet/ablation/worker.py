"""One run of an ablation: begun, or taken up where it stopped. As a program it reads the run's label and config from standard input."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fusedet import config
from fusedet.ablation.plan import FAILED, TIMES, Run, read_json
from fusedet.api.load_model import weights_file, with_weights
from fusedet.api.predict import pick_device, tuned
from fusedet.api.run_dir import about, fresh, write_json
from fusedet.api.train import open_data, train
from fusedet.api.validate import evaluate_detector, report
from fusedet.atomic_io import replace
from fusedet.engine.trainer import Interrupted, NonFinite
from fusedet.errors import InputError


def execute_run(cell: Run, say: Callable[[str], None] = print, quiet: bool = False) -> None:
    """Train and score a run that is not finished, or score its row's weights; how long it took is noted in its folder.

    One that diverged is noted too and raises nothing: the other runs of a table do not depend on it.
    """
    folder = cell.folder
    resumed = (folder / "last.ckpt").is_file()
    if not resumed and folder.exists():
        shutil.rmtree(folder)  # it stopped before its first checkpoint: nothing of it can be used
    earlier = _sessions(folder) if resumed else []
    if resumed:
        _note(folder, [*earlier, None])
    began = time.perf_counter()
    try:
        if cell.trained:
            score_trained_weights(cell, say)
        else:
            train(cell.config, resume=resumed, say=say, quiet=quiet)
    except NonFinite as error:
        write_json(folder / FAILED, {"reason": str(error)})
    finally:
        if (folder / "config.yaml").is_file():
            _note(folder, [*earlier, time.perf_counter() - began])


def score_trained_weights(cell: Run, say: Callable[[str], None] = print) -> None:
    """Score the weights of the run `cell.trained` as the cell's config tests, into the cell's folder: results, figures and images."""
    assert cell.trained is not None
    one = cell.config
    device = pick_device(one.device)
    train_split, dataset = open_data(one, say)
    detector = tuned(with_weights(one, len(dataset.names), weights_file(cell.trained)).to(device), one)
    evaluated = evaluate_detector(detector, one, dataset, device)
    folder = fresh(cell.folder)
    replace(folder / "config.yaml", one.to_yaml().encode())
    prints = {"train": train_split.fingerprint(), "val": dataset.fingerprint()}
    write_json(folder / "run.json", about(str(device), 1) | {"data": prints, "seed": cell.seed})
    report(dataset, evaluated.results, evaluated.metrics, folder, title=cell.label)


def _sessions(folder: Path) -> list[float | None]:
    """Seconds of each session of a run so far; None for one that could not say, because it was killed."""
    return (read_json(folder / TIMES) or {}).get("sessions", [None])


def _note(folder: Path, sessions: Sequence[float | None]) -> None:
    """Write how long a run took: seconds of all sessions together, None where one of them is not known."""
    known = [one for one in sessions if one is not None]
    seconds = sum(known) if len(known) == len(sessions) else None
    write_json(folder / TIMES, {"seconds": seconds, "resumed": len(sessions) > 1, "sessions": list(sessions)})


def main() -> int:
    """Run what standard input says; exits as the command line does."""
    asked = json.load(sys.stdin)
    try:
        execute_run(
            Run(asked["label"], config.parse(asked["config"]), Path(asked["trained"]) if asked.get("trained") else None)
        )
    except InputError as error:
        print(str(error), file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(str(stop), file=sys.stderr)
        return stop.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
