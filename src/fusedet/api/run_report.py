"""The page of a training or validation, written after all else: report.html."""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusedet.api.detector_evaluation import Evaluation
from fusedet.api.run_dir import describe_environment
from fusedet.data.dataset import DetectionDataset
from fusedet.errors import StorageError
from fusedet.report import write_report_page

PAGE = "report.html"


def write_run_page(
    out: Path,
    dataset: DetectionDataset,
    evaluated: Evaluation,
    *,
    title: str,
    scored: str,
    device: str,
    say: Callable[[str], None],
    size_bins: Sequence[float] = (),
    run: Path | None = None,
) -> dict[str, Path]:
    """Write the page of an evaluated split; return it by what it shows, or nothing where it cannot be made.

    All else is written by then. So a page that cannot be made is a warning, and a full disk an error.

    Args:
        out: The directory.
        dataset: The split, with instances.
        evaluated: Its detections and metrics.
        title: The page's title.
        scored: What was evaluated on what, for the table of its origin.
        device: The device of the evaluation.
        say: Takes the warning.
        size_bins: Edges of size bins in pixels.
        run: The directory of the training, with metrics.csv and run.json, if there is one.

    Raises:
        StorageError: The file cannot be written.
    """
    try:
        origin, commands = _describe_origin(dataset, evaluated.metrics, scored, device, run)
        table = run / "metrics.csv" if run else None
        write_report_page(
            out / PAGE,
            dataset,
            evaluated.results,
            evaluated.metrics,
            title=title,
            size_bins=size_bins,
            metrics_csv=table if table and table.is_file() else None,
            origin=origin,
            commands=commands,
        )
    except StorageError:
        raise
    except Exception as error:  # a page is no reason to lose a run, whatever it fails by
        say(f"warning: {out / PAGE} is not written: {type(error).__name__}: {error}")
        return {}
    return {"report": out / PAGE}


def _describe_origin(
    dataset: DetectionDataset, metrics: dict[str, Any], scored: str, device: str, run: Path | None
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return rows and commands that say how the numbers were made."""
    trained, now = _read_json(run / "run.json") if run else {}, describe_environment(device, 1)
    made = {"training": trained, "evaluation": {} if trained.get("command") == now["command"] else now}
    commands = [
        (f"The {name}:", _format_command(about["command"]))
        for name, about in made.items()
        if about.get("command") and about["command"][0] not in ("", "-", "-c")
    ]
    rows = [("evaluated", scored), ("annotations", dataset.source)]
    if stamp := metrics.get("stamp"):
        rows.append(("evaluator", str(stamp["evaluator"])))
        rows.append(("fingerprint of the annotations", str(stamp["data"])))
        rows.append(
            ("detections", f"{stamp['detections']:,}, at most {stamp['max_dets'][-1]} per image and class count")
        )
    for name, about in made.items():
        if about.get("versions"):
            versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
            rows.append((f"versions, {name}", f"{versions}, Python {about.get('python')}"))
            rows.append((f"machine, {name}", f"{about.get('device')}, {about.get('platform')}, {about.get('started')}"))
    if "seed" in trained:
        rows.append(("seed of the training", str(trained["seed"])))
    return rows, commands


def _format_command(command: Sequence[str]) -> str:
    """Return a command as it can be given again, without the path of the program."""
    name, *arguments = map(str, command)
    program = "fusedet" if Path(name).name in ("__main__.py", "fusedet") else name
    return shlex.join([program, *arguments])


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
