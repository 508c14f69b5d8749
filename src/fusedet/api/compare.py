"""Comparison of two runs on the same images, with intervals from a paired bootstrap: the command `compare`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from PIL.Image import Image
from rich.console import Group, RenderableType

from fusedet import config, evaluation, visualization
from fusedet.api import run_dir
from fusedet.api.results import CommandResult, format_paths, group_lines, list_files
from fusedet.api.settings import Settings, get_source_name, refuse_other_keys, to_overrides
from fusedet.api.tables import comparison_table
from fusedet.api.worst_images import make_painter
from fusedet.config import Config
from fusedet.data.dataset import DetectionDataset
from fusedet.data.splits import read_split
from fusedet.errors import InputError, require_at_least
from fusedet.evaluation.bootstrap import METRICS as BOOTSTRAP_METRICS
from fusedet.evaluation.confidence_intervals import LEVEL
from fusedet.evaluation.formatting import describe_interval, format_difference
from fusedet.evaluation.results import DetectionTable
from fusedet.exporters import find_export
from fusedet.interop.published_weights import is_published_name

RESULTS, METRICS = "val.bbox.json", "metrics.json"
SAME = "Nothing can be concluded: A and B are the same, detection by detection."
SETTABLE = ("data", "out")
"""What can be set for a comparison."""


@dataclass(frozen=True)
class Comparison(CommandResult):
    """Two runs side by side.

    Attributes:
        report: Metrics, intervals, classes, error breakdown and `conclusion`, as compare.json holds them.
        out: The directory of the files.
        files: The files written, by what they show.
    """

    report: dict[str, Any]
    out: Path
    files: dict[str, Path]

    def to_dict(self) -> dict[str, Any]:
        """Return the report, the directory and the files."""
        return self.report | {"out": str(self.out), "files": format_paths(self.files)}

    def __rich__(self) -> RenderableType:
        return Group(comparison_table(self.report), group_lines([self.report["conclusion"]]), list_files(self.files))


def compare(
    a: str | Path,
    b: str | Path,
    *overrides: str,
    split: str | None = None,
    resamples: int = 1000,
    bootstrap_seed: int = 0,
    **settings: Unpack[Settings],
) -> Comparison:
    """Compare the stored results of two runs: metrics, B - A with intervals over images, and the error breakdown.

    >>> fusedet.compare("runs/a", "runs/b").report["conclusion"]  # doctest: +SKIP

    Args:
        a: A run directory, a name of published weights whose results `validate` wrote, or a file of results in COCO's
            format; the baseline.
        b: The same; what is compared with the baseline.
        overrides: "key=value" texts for `data` and `out`. The data are those of the first run by default; `out` is
            compare-A in B's directory by default.
        split: The split whose results are compared, by default `data.val`.
        resamples: How often the bootstrap draws the images, 40 or more.
        bootstrap_seed: Seed of these draws.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: There are no stored results, or they are not of the same data.
        StorageError: A file cannot be written.
    """
    require_at_least(40, resamples=resamples)
    require_at_least(0, bootstrap_seed=bootstrap_seed)
    texts = refuse_other_keys(to_overrides(overrides, settings), *SETTABLE, of="a comparison")
    a, b = str(a), str(b)
    runs = [run for run in map(_config_of, (a, b)) if run is not None]
    options = config.parse(config.apply_overrides({"data": runs[0].tree()["data"]} if runs else {}, texts))
    data = options.data
    if data.path is None:
        raise InputError(f"{a} and {b} do not say on which data they were made: add data=PATH")
    scored = split or data.val_split
    stored = [_stored(source, scored) for source in (a, b)]
    run_dir.check_new_dir(options.out)
    dataset = read_split(data, scored, need_images=False)
    results = [evaluation.load_results(file, dataset) for file in stored]
    for file in stored:
        _same_data(file, dataset)
    tables = [evaluation.build_detection_table(dataset, detections) for detections in results]
    metrics = dict(evaluation.paired_bootstrap(dataset, *tables, resamples=resamples, seed=bootstrap_seed))
    report = {
        "a": a,
        "b": b,
        "data": str(data.path),
        "split": scored,
        "stamp": evaluation.create_stamp(dataset, results[0]) | {"detections": list(map(len, results))},
        "resamples": resamples,
        "seed": bootstrap_seed,
        "level": LEVEL,
        "conclusion": SAME if results[0] == results[1] else conclude_comparison(metrics["AP"], len(dataset)),
        "metrics": {name: metrics[name] for name in BOOTSTRAP_METRICS},
        "classes": metrics["classes"],
        "errors": {side: evaluation.analyze_errors(dataset, table) for side, table in zip("ab", tables)},
    }
    name = f"compare-{get_source_name(a)}"
    out = run_dir.create_run_dir(options.out or run_dir.find_free_path(run_dir.parent_of(b), name))
    files = {
        "comparison": out / "compare.json",
        "differences by class": out / "classes.png",
        "images that differ most": out / "images.png",
    }
    run_dir.write_json(files["comparison"], report)
    title = f"{_short(b)} less {_short(a)}: AP by class, {100 * LEVEL:g} % over images"
    visualization.plot_differences(
        metrics["classes"], files["differences by class"], title, {"name": "all classes"} | metrics["AP"]
    )
    if (sheet := _differing(dataset, tables)) is None:
        del files["images that differ most"]
    else:
        visualization.save_image(sheet, files["images that differ most"])
    return Comparison(report, out, files)


def conclude_comparison(row: dict[str, float], images: int) -> str:
    """Return what the difference of AP and its interval allow one to conclude, as a sentence or two."""
    change, low, high = format_difference(row["difference"]), row["low"], row["high"]
    if math.isnan(low):
        return "Nothing can be concluded: the data hold no object that counts."
    ends = describe_interval((low, high), images)
    if low <= 0 <= high:
        difference = f"the difference of AP is {change}, but its {ends} holds 0"
        return f"Nothing can be concluded about which is better: {difference}."
    better, worse = ("B", "A") if row["difference"] > 0 else ("A", "B")
    return (
        f"{better} is better than {worse} on images such as these: "
        f"AP {change[1:]} higher, {ends} of B - A. "
        "This is about these two sets of weights; another seed may give another difference."
    )


def _config_of(source: str) -> Config | None:
    """Return the config of a run directory; None for anything else."""
    file = Path(source) / "config.yaml"
    return config.load(file) if file.is_file() else None


def _stored(source: str, split: str) -> Path:
    """Return the file of a run's stored results on a split."""
    is_name = is_published_name(source)
    path = run_dir.parent_of(source) if is_name else Path(source)
    if not (path.is_dir() or is_name):
        if path.suffix != ".json":
            raise InputError(
                f"{source} is neither a run directory, a name of published weights nor a results file (.json)"
            )
        return path
    run = _config_of(source)
    # of an exported model and of published weights there is only what val wrote
    is_own = (run is None or run.data.val_split == split) and not (is_name or find_export(path))
    file = path / RESULTS if is_own else path / f"val-{Path(split).stem}" / RESULTS
    if not file.is_file():
        what = f"fusedet val {source} --split {split}{' data=PATH' * is_name}"
        raise InputError(f"{source} has no stored results on '{split}' ({file} is absent): make them with {what}")
    return file


def _same_data(file: Path, dataset: DetectionDataset) -> None:
    """Raise InputError if the stamp beside a run's results is of other data."""
    metrics_file = file.with_name(METRICS)
    if file.name != RESULTS or not metrics_file.is_file():
        return  # results of another program: their ids are checked where they are read
    stamp = (run_dir.read_json(metrics_file) or {}).get("stamp")
    if not isinstance(stamp, dict) or "data" not in stamp:
        raise InputError(
            f"{metrics_file} is not what fusedet val writes, it has no stamp: score the run again with fusedet val"
        )
    if stamp["data"] != (here := dataset.fingerprint()):
        other = f"(fingerprint {stamp['data']}, {stamp.get('images')} images)"
        raise InputError(
            f"{file} was made on other data {other} than {dataset.source} ({here}, {len(dataset)} images): "
            "two runs are compared on the same images and annotations"
        )


def _differing(dataset: DetectionDataset, tables: list[DetectionTable], n: int = 8) -> Image | None:
    """Return the n images on which the two differ most, A left and B right; None if they do not differ."""
    paint = [make_painter(dataset, table) for table in tables]
    drawn, captions = [], []
    for i, *rows in evaluation.find_differing_images(dataset, tables[0], tables[1], n=n):
        images = [draw(i) for draw in paint]
        for side, image, (quality, misses, false) in zip("AB", images, rows):
            if image is not None:
                drawn.append(image)
                captions.append(f"{side}, {dataset.path(i).name}: F1 {quality:.2f}, {misses} missed, {false} false")
    return visualization.draw_image_grid(drawn, captions, columns=4) if drawn else None


def _short(source: str) -> str:
    path = Path(source)
    return path.parent.name if path.name == RESULTS and path.parent.name else get_source_name(source)
