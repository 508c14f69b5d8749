"""Whether tiles help a trained detector on its data: the option `--tiles-help` of the command `val`."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from rich.console import Console, Group, RenderableType

from fusedet import evaluation
from fusedet.api import run_dir, tables
from fusedet.api.detection import AnyDetector, check_tile_size, get_strides
from fusedet.api.detector_evaluation import build_val_loader, detect, require_class_names
from fusedet.api.predictor import pick_device, prepare_detector
from fusedet.api.progress import track
from fusedet.api.results import CommandResult, format_paths, group_lines, list_files
from fusedet.api.settings import Settings, to_overrides
from fusedet.api.validate import open_model
from fusedet.atomic_io import write_atomically
from fusedet.config import Config
from fusedet.config.schema import PredictionTiles
from fusedet.data.dataset import DetectionDataset
from fusedet.data.splits import read_split
from fusedet.data.tiling import count_windows
from fusedet.data.usable_targets import require_usable_targets
from fusedet.errors import InputError, require_at_least
from fusedet.evaluation.confidence_intervals import LEVEL
from fusedet.evaluation.formatting import describe_interval, format_difference
from fusedet.evaluation.results import Result
from fusedet.exporters import ExportedDetector
from fusedet.process_ranks import get_ranks


@dataclass(frozen=True)
class TilesHelp(CommandResult):
    """A detector's metrics without (a) and with (b) tiles.

    Attributes:
        report: Metrics with the interval of their difference, seconds per image, tiles, and `conclusion`, as tiles.json
            holds them.
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
        table = tables.tiles_table(self.report)
        return Group(table, group_lines([self.report["conclusion"]]), list_files(self.files))


def measure_tiles(
    source: str | Path,
    *overrides: str,
    split: str | None = None,
    resamples: int = 1000,
    bootstrap_seed: int = 0,
    trust: bool = False,
    progress: Console | None = None,
    **settings: Unpack[Settings],
) -> TilesHelp:
    """Evaluate a detector on a split without and with tiles, and say whether they help there.

    >>> fusedet.measure_tiles("runs/a", test={"tiles": {"size": 640}}).report["conclusion"]  # doctest: +SKIP

    Args:
        source: A run directory, a checkpoint, a name of published weights or an exported model.
        overrides: "key=value" texts as for `validate`. The tiles are those of `test.tiles`; without a size, that of
            `data.tiles`, else the short side of `data.size`, which shows a tile at the scale of its image.
        split: The split, by default `data.val`.
        resamples: How often the bootstrap draws the images, 40 or more.
        bootstrap_seed: Seed of these draws.
        trust: Whether the checkpoint's config may name classes of other packages, whose code then runs.
        progress: Shows how many batches are done, if it is a terminal.
        settings: The same settings as `overrides`, by keyword. The data are the run's own by default.

    Raises:
        InputError: As `validate`; or no image is longer than a tile, or there are several processes.
        StorageError: A file cannot be written.
    """
    require_at_least(40, resamples=resamples)
    require_at_least(0, bootstrap_seed=bootstrap_seed)
    if get_ranks()[1] > 1:
        raise InputError(
            "--tiles-help measures the time per image, so it runs in one process: start it without torchrun"
        )
    if Path(source).suffix == ".json":
        raise InputError(f"{source} holds results, but --tiles-help predicts: give a run, a checkpoint or an export")
    detector, _, options, names, file = open_model(source, to_overrides(overrides, settings), trust)
    tiles = options.test.tiles
    if tiles.size is None:
        tiles = PredictionTiles(size=options.data.tiles.size or options.data.size[0], overlap=tiles.overlap)
    check_tile_size("test.tiles.size", tiles.size, get_strides(detector))
    scored = split or options.data.val_split
    run_dir.check_new_dir(options.out)
    dataset = read_split(options.data, scored)
    if not len(dataset.labels):
        raise InputError(f"{dataset.source} has no objects to score by")
    require_usable_targets(dataset, for_training=False)
    require_class_names(dataset, names, str(file))
    count = sum(count_windows(dataset, tiles))
    if count == len(dataset):
        longest = int(dataset.sizes.max())
        raise InputError(
            f"no image of {dataset.source} is longer than a tile of test.tiles.size={tiles.size}: the longest has "
            f"{longest} pixels, take smaller tiles"
        )
    device = pick_device(options.device)
    ready = prepare_detector(detector.to(device), options, names=names)
    sides = [options.replace(test=options.test.replace(tiles=own)) for own in (PredictionTiles(), tiles)]
    free = options.out or run_dir.find_free_path(run_dir.parent_of(source), "val-tiles")
    with run_dir.reserve_run_dir(free) as out:
        results, seconds = zip(*(_detect(ready, side, dataset, device, progress) for side in sides))
        metrics = dict(
            evaluation.paired_bootstrap(
                dataset, *results, resamples=resamples, seed=bootstrap_seed, size_bins=options.test.size_bins or ()
            )
        )
        classes = metrics.pop("classes")
        report = {
            "source": str(source),
            "data": str(options.data.path),
            "split": scored,
            "images": len(dataset),
            "tiles": tiles.model_dump() | {"per_image": count / len(dataset)},
            "seconds_per_image": dict(zip("ab", seconds)),
            "resamples": resamples,
            "seed": bootstrap_seed,
            "level": LEVEL,
            "metrics": metrics,
            "classes": classes,
            "conclusion": conclude_tiles(metrics, seconds[1] / seconds[0], len(dataset)),
        }
        files = {
            "report": out / "tiles.json",
            "results": out / "whole.bbox.json",
            "results in tiles": out / "tiles.bbox.json",
        }
        run_dir.write_json(files["report"], report)
        for path, own in zip(list(files.values())[1:], results):
            stored = evaluation.to_dataset_ids(own, dataset)
            boxes = [{k: v for k, v in row.items() if k != "segmentation"} for row in stored]
            write_atomically(path, json.dumps(boxes).encode())
    return TilesHelp(report, out, files)


def conclude_tiles(metrics: Mapping[str, Mapping[str, float]], slower: float, images: int) -> str:
    """Return whether tiles help, as sentences.

    Args:
        metrics: Metrics a (without), b (with tiles), their difference and its interval.
        slower: How many times as long an image takes with tiles.
        images: The number of images.
    """
    row = metrics["AP"]
    change, low, high = format_difference(row["difference"]), row["low"], row["high"]
    cost = f"an image takes {slower:.1f} times as long"
    if not low <= high:  # NaN
        return f"Nothing can be concluded about tiles: the data hold no object that counts; {cost}."
    ends = describe_interval((low, high), images)
    if low <= 0 <= high:
        text = f"It is open whether tiles help here: AP {change}, {ends} holds 0; {cost}."
    else:
        verdict = "help" if row["difference"] > 0 else "harm"
        text = f"Tiles {verdict} here: AP {change}, {ends}; {cost}."
    sizes = {"APs": "small", "APm": "medium", "APl": "large"}
    for word, sign in (("gain", 1), ("lose", -1)):
        own = [name for key, name in sizes.items() if min(sign * metrics[key]["low"], sign * metrics[key]["high"]) > 0]
        if own:
            text += f" {' and '.join(own).capitalize()} objects {word}."
    return text


def _detect(
    detector: AnyDetector, options: Config, dataset: DetectionDataset, device: torch.device, progress: Console | None
) -> tuple[list[Result], float]:
    """Return the detections of a split, and seconds per image from the file to the detections."""
    canvas = detector.canvas if isinstance(detector, ExportedDetector) else None
    loader = build_val_loader(options, dataset, canvas=canvas, pin=device.type == "cuda")
    detect(detector, [next(iter(loader))], dataset, device)  # the first batch is slower
    start = time.perf_counter()
    batches = track(loader, len(loader), label="images", console=progress)
    results = detect(detector, batches, dataset, device, options.test.tiles.ios)
    return results, (time.perf_counter() - start) / len(dataset)
