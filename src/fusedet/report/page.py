"""The page of a run as one HTML file: numbers, curves, a confusion matrix and a gallery that follow the threshold."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from fusedet.atomic_io import write_atomically
from fusedet.data.dataset import DetectionDataset
from fusedet.errors import format_count
from fusedet.evaluation.results import DetectionTable, Result
from fusedet.report import sections, threshold
from fusedet.report.analysis import Analysis, analyze_run
from fusedet.visualization.page import make_page
from fusedet.visualization.training_curves import read_columns

_LINKS = {
    "fails": "Where it fails",
    "per-class": "Classes",
    "matrix": "Confusion",
    "gallery": "Gallery",
    "curves": "Precision and recall",
    "calibration": "Calibration",
    "training": "Training",
    "origin": "How it was made",
}


def write_report_page(
    file: Path,
    dataset: DetectionDataset,
    results: Sequence[Result] | DetectionTable,
    metrics: dict[str, Any],
    *,
    title: str,
    size_bins: Sequence[float] = (),
    metrics_csv: Path | None = None,
    origin: Sequence[tuple[str, str]] = (),
    commands: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page; it loads nothing and is readable without its script.

    Args:
        file: The HTML file.
        dataset: The split, with instances.
        results: The detections, in COCO's result format.
        metrics: Their metrics.
        title: Its title.
        size_bins: Edges of size bins in pixels, as in `evaluate_coco`.
        metrics_csv: The training's metrics.csv, for the learning curves.
        origin: Names and texts: data, versions, device.
        commands: What each command did, and the command.

    Raises:
        InputError: The results do not fit the dataset, or metrics.csv cannot be read.
        StorageError: The file cannot be written.
    """
    analysis = analyze_run(dataset, results, metrics, size_bins)
    training = sections.make_training(read_columns(metrics_csv)) if metrics_csv else ""
    text = render(analysis, dataset, title, training, sections.make_origin(origin, commands))
    write_atomically(file, text.encode("utf-8", "replace"))


def render(analysis: Analysis, dataset: DetectionDataset, title: str, training: str, origin: str) -> str:
    """Return the page as HTML.

    Args:
        analysis: What the page shows.
        dataset: The split.
        title: Title of the page.
        training: HTML of the training curves; "" without.
        origin: HTML of the origin of the metrics.
    """
    subtitle = (
        f"{format_count(analysis.images, 'image')}, {format_count(analysis.objects, 'instance')} of "
        f"{format_count(len(analysis.names), 'class')}"
    )
    links = (f'<a href="#{name}">{text}</a>' for name, text in _LINKS.items() if training or name != "training")
    # "<" could end the element, and is an escape in JSON texts only
    numbers = json.dumps(analysis.counts.to_plain(), separators=(",", ":")).replace("<", "\\u003c")
    parts = [
        f"<header><h1>{escape(title)}</h1><p class=faint>{subtitle}</p><nav>{' '.join(links)}</nav></header>",
        sections.make_overview(analysis),
        '<div class="follows">',
        threshold.make_control(analysis),
        threshold.make_classes(analysis),
        threshold.make_confusion(analysis),
        threshold.make_gallery(analysis, dataset),
        "</div>",
        sections.make_precision_recall(analysis),
        sections.make_calibration(analysis),
        training,
        sections.make_metrics(analysis),
        origin,
        f'<script type="application/json" id="counts">{numbers}</script>',
    ]
    css, script = ((files("fusedet.report") / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return make_page(title, parts, css, script)
