"""Two runs on the same images: what differs, and how far chance in the choice of the images could have made it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from fusedet import config, evaluation, visualization
from fusedet.api import run_dir
from fusedet.api.validate import Result, painter
from fusedet.config import Config
from fusedet.data.dataset import DetectionDataset
from fusedet.data.readers.auto import read_dataset
from fusedet.errors import InputError
from fusedet.evaluation.bootstrap import METRICS as BOOTSTRAP_METRICS
from fusedet.evaluation.confidence_intervals import LEVEL, choose_decimals

RESULTS, METRICS = "val.bbox.json", "metrics.json"
SAME = "Nothing can be concluded: A and B are the same, detection by detection."


@dataclass(frozen=True)
class Compared:
    """What was found, as compare.json has it, and the files written, by what they show."""

    figures: dict[str, Any]
    out: Path
    files: dict[str, Path]


def compare(
    a: str, b: str, options: Config, split: str | None = None, *, resamples: int = 1000, seed: int = 0
) -> Compared:
    """Compare the stored results of two runs' folders or results files; A is what B's figures are measured against.

    The data are `options.data`'s, else those of the first run's folder; written are compare.json and images into
    `options.out`, else B's folder. Raises InputError where there are no results, or not on the same data.
    """
    runs = [run for run in map(_config_of, (a, b)) if run is not None]
    if options.data.path is None and not runs:
        raise InputError(f"{a} and {b} do not say on which data they were made: add data=PATH")
    data = options.data if options.data.path is not None else runs[0].data
    scored = split or (runs[0].data.val if runs else data.val)
    stored = [_stored(source, scored) for source in (a, b)]
    if options.out:
        run_dir.check(options.out)  # before the work, not after it
    dataset = read_dataset(data.path or "", scored, images=data.images, need_images=False)
    results = [evaluation.load_results(file) for file in stored]
    for file, found in zip(stored, results):
        _same_data(file, dataset, found)
    tables = [evaluation.build_detection_table(dataset, found) for found in results]
    figures = dict(evaluation.paired_bootstrap(dataset, *tables, resamples=resamples, seed=seed))
    report = {
        "a": a,
        "b": b,
        "data": str(data.path),
        "split": scored,
        "stamp": evaluation.create_stamp(dataset, results[0]) | {"detections": [len(found) for found in results]},
        "resamples": resamples,
        "seed": seed,
        "level": LEVEL,
        "conclusion": SAME if results[0] == results[1] else conclusion(figures["AP"], len(dataset)),
        "figures": {name: figures[name] for name in BOOTSTRAP_METRICS},
        "classes": figures["classes"],
        "errors": {side: evaluation.analyze_errors(dataset, table) for side, table in zip("ab", tables)},
    }
    beside = Path(b) if Path(b).is_dir() else Path(b).parent
    out = run_dir.fresh(options.out) if options.out else run_dir.numbered(beside, f"compare-{Path(a).stem}")
    files = {
        "comparison": out / "compare.json",
        "differences by class": out / "classes.png",
        "images that differ most": out / "images.png",
    }
    run_dir.write_json(files["comparison"], report)
    title = f"{_short(b)} less {_short(a)}: AP by class, {100 * LEVEL:g} % over images"
    visualization.plot_differences(
        figures["classes"], files["differences by class"], title, {"name": "all classes"} | figures["AP"]
    )
    if (sheet := _differing(dataset, results, tables)) is None:
        del files["images that differ most"]
    else:
        sheet.save(files["images that differ most"])
    return Compared(report, out, files)


def conclusion(row: dict[str, float], images: int) -> str:
    """What the difference of AP and its interval allow one to conclude, as a sentence or two."""
    change, low, high = row["difference"], row["low"], row["high"]
    if math.isnan(low):
        return "Nothing can be concluded: the data hold no object that counts."
    digits = choose_decimals(change, low, high, least=3)
    ends = f"{100 * LEVEL:g} % interval over the {images} images {low:+.{digits}f} to {high:+.{digits}f}"
    if low <= 0 <= high:
        return f"Nothing can be concluded about which is better: the difference of AP is {change:+.{digits}f}, but its {ends} holds 0."
    better, worse = ("B", "A") if change > 0 else ("A", "B")
    return (
        f"{better} is better than {worse} on images such as these: AP {abs(change):.{digits}f} higher, {ends} of B - A. "
        "This is about these two sets of weights; another seed may give another difference."
    )


def _config_of(source: str) -> Config | None:
    """The config of a run's folder; None for anything else."""
    file = Path(source) / "config.yaml"
    return config.load(file) if file.is_file() else None


def _stored(source: str, split: str) -> Path:
    """The file of a run's stored results on a split."""
    path = Path(source)
    if not path.is_dir():
        if path.suffix != ".json":
            raise InputError(f"{source} is neither a run's folder nor a results file (.json)")
        return path
    run = _config_of(source)
    file = path / RESULTS if run is None or run.data.val == split else path / f"val-{Path(split).stem}" / RESULTS
    if not file.is_file():
        what = f"fusedet val {source} --split {split}"
        raise InputError(f"{source} has no stored results on '{split}' ({file} is absent): make them with {what}")
    return file


def _same_data(file: Path, dataset: DetectionDataset, results: list[Result]) -> None:
    """Raises InputError where the stamp beside a run's results is of other data."""
    metrics = file.with_name(METRICS)
    if file.name != RESULTS or not metrics.is_file():
        return  # results of another program: their ids are checked where they are read
    try:
        stored = json.loads(metrics.read_text(encoding="utf-8"))["stamp"]
        made_on = stored["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{metrics} is not what fusedet val writes, it has no stamp: score the run again with fusedet val"
        ) from error
    if made_on != (here := evaluation.create_stamp(dataset, results)["data"]):
        raise InputError(
            f"{file} was made on other data (fingerprint {made_on}, {stored.get('images')} images) than {dataset.source} "
            f"({here}, {len(dataset)} images): two runs are compared on the same images and annotations"
        )


def _differing(dataset: DetectionDataset, results: list[list[Result]], tables: list[Any], n: int = 8) -> Image | None:
    """The n images on which the two differ most, A left and B right; None where there is none."""
    paint = [painter(dataset, found) for found in results]
    drawn, captions = [], []
    for i, *rows in evaluation.find_differing_images(dataset, tables[0], tables[1], n=n):
        images = [one(i) for one in paint]
        for side, image, (quality, misses, false) in zip("AB", images, rows):
            if image is not None:
                drawn.append(image)
                captions.append(f"{side}, {dataset.path(i).name}: F1 {quality:.2f}, {misses} missed, {false} false")
    return visualization.draw_image_grid(drawn, captions, columns=4) if drawn else None


def _short(source: str) -> str:
    path = Path(source)
    return path.parent.name if path.name == RESULTS and path.parent.name else path.stem
