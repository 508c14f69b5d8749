"""A page about a checked dataset: histograms of classes and sizes, extreme annotations and suspects with thumbnails."""

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from fusedet.atomic_io import write_atomically
from fusedet.data.annotation_cleaning import find_faults
from fusedet.data.class_names import label_classes
from fusedet.data.dataset import DetectionDataset
from fusedet.data.dataset_images import read_dataset_image
from fusedet.data.findings import Finding
from fusedet.data.validation import DatasetReport
from fusedet.errors import InputError, format_count
from fusedet.visualization.annotators import BoxAnnotation, LineStyle, draw_annotations, to_pil_image
from fusedet.visualization.colors import class_color
from fusedet.visualization.page import make_jpeg_uri, make_page, make_section

_SHOWN = 8  # annotations or images of a row
_SIDE = 200  # pixels of a thumbnail's longer side
_EDGES = (0, 4, 8, 16, 32, 64, 96, 128, 256, 512, 1024, np.inf)  # pixels: the square root of an annotation's area
_SUSPECT = (214, 40, 40)
_STYLE = """
:root { --error: #b3261e; --warning: #8a5a00; --bar: #4269d0; }
@media (prefers-color-scheme: dark) { :root { --error: #ff8a80; --warning: #e8b34a; --bar: #7c9bee; } }
h2 { border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
li, figcaption, .bars td:first-child { overflow-wrap: anywhere; }
.error { color: var(--error); font-weight: 600; }
.warning { color: var(--warning); font-weight: 600; }
.bars td { padding: .1rem .6rem .1rem 0; border: 0; }
.bars .bar { width: 24rem; }
.bar div { background: var(--bar); height: .9rem; min-width: 1px; }
.charts { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.row { display: flex; flex-wrap: wrap; gap: .75rem; }
.row figure { margin: 0; width: 200px; }
img { max-width: 100%; }
figcaption { font-size: .75rem; color: var(--faint); }
"""


def write_dataset_page(
    file: Path,
    title: str,
    *,
    ok: bool,
    reports: Mapping[str, DatasetReport],
    between: Sequence[Finding],
    splits: Mapping[str, DetectionDataset],
    summary: Sequence[Finding],
) -> None:
    """Write the page as one HTML file, which holds its images and loads nothing.

    Args:
        file: The file.
        title: Its title.
        ok: Whether nothing would stop a training.
        reports: The report of each split.
        between: What concerns several splits.
        splits: The splits that could be read.
        summary: The findings, the worst first.

    Raises:
        StorageError: The file cannot be written.
    """
    verdict = "This data can be trained on." if ok else "This data would stop a training."
    parts = [f"<h1>{escape(title)}</h1><p class='{'faint' if ok else 'error'}'>{verdict}</p>"]
    if summary:
        parts.append(f"<h3>Summary, the worst first</h3><ol>{''.join(map(_item, summary))}</ol>")
    for split, report in reports.items():
        dataset = splits.get(split)
        content = _describe_split(dataset) if dataset else []
        if report.findings:
            content.append(f"<h3>Findings</h3><ul>{''.join(map(_item, report.findings[:100]))}</ul>")
            content += _row("Examples of the findings", _example_images(report.findings, dataset))
        parts.append(make_section(split, "".join(content)))
    if between:
        content = [f"<ul>{''.join(map(_item, between))}</ul>"]
        for dataset in splits.values():
            content += _row("Examples", _example_images(between, dataset))
        parts.append(make_section("Between the splits", "".join(content)))
    write_atomically(file, make_page(title, parts, _STYLE).encode("utf-8", "replace"))


def _item(finding: Finding) -> str:
    return f"<li><span class={finding.severity}>{finding.severity}</span> {escape(finding.message)}</li>"


def _describe_split(dataset: DetectionDataset) -> list[str]:
    """Show counts, histograms, the smallest and largest annotations, and those with a fault."""
    boxes, labels = dataset.boxes.numpy(), dataset.labels.numpy()
    image_indices = dataset.image_indices
    sides = (boxes[:, 2:] - boxes[:, :2]).clip(0)
    area = sides.prod(axis=1)
    counts = np.bincount(labels, minlength=len(dataset.names)).tolist()
    background = int((np.diff(dataset.offsets.numpy()) == 0).sum())
    intro = (
        f"<p>{format_count(len(dataset), 'image')} ({background} without annotations), "
        f"{format_count(len(labels), 'annotation')} "
        f"<span class=faint>from {escape(dataset.source)}</span></p>"
    )
    by_count = sorted(zip(label_classes(dataset), counts, strict=True), key=lambda pair: -pair[1])
    histogram, _ = np.histogram(np.sqrt(area), _EDGES)
    ranges = [f"{low:g} to {high:g}" if np.isfinite(high) else f"{low:g} and more" for low, high in pairwise(_EDGES)]
    names = label_classes(dataset)

    def show(j: int) -> str:
        caption = f"{names[labels[j]]}, {sides[j, 0]:.4g} x {sides[j, 1]:.4g} pixels"
        return _annotation_figure(dataset, int(image_indices[j]), j, caption)

    real = np.flatnonzero(area > 0)
    order = real[np.argsort(area[real], kind="stable")].tolist()
    parts = [
        intro,
        "<div class=charts>",
        _bars("Annotations by class", by_count),
        _bars("Annotations by size: square root of the area, in pixels", list(zip(ranges, histogram.tolist()))),
        "</div>",
        *_row("Smallest annotations", map(show, order[:_SHOWN])),
        *_row("Largest annotations", map(show, order[::-1][:_SHOWN])),
    ]
    for text, is_faulty in find_faults(image_indices, boxes, labels, dataset.sizes.numpy())[1].items():
        if is_faulty.any():
            rows = np.flatnonzero(is_faulty)
            parts += _row(f"Suspects: {text} ({len(rows)})", map(show, rows[:_SHOWN].tolist()))
    return parts


def _bars(title: str, rows: Sequence[tuple[str, int]]) -> str:
    """Format a histogram as a table with bars."""
    most = max((count for _, count in rows), default=0) or 1
    lines = (
        f"<tr><td>{escape(name)}</td><td>{count:,}</td>"
        f"<td class=bar>{f'<div style=width:{100 * count / most:.1f}%></div>' if count else ''}</td></tr>"
        for name, count in rows
    )
    return f"<div><h3>{escape(title)}</h3><table class=bars>{''.join(lines)}</table></div>"


def _row(title: str, cells: Iterable[str]) -> list[str]:
    own = [cell for cell in cells if cell]
    return [f"<h3>{escape(title)}</h3><div class=row>{''.join(own)}</div>"] if own else []


def _annotation_figure(dataset: DetectionDataset, i: int, j: int, caption: str) -> str:
    """Draw the surroundings of annotation j of the dataset, in image i, with its box in red."""
    box = dataset.boxes[j].tolist()
    name = f"{caption}, in {dataset.path(i).name}"
    try:
        image = to_pil_image(read_dataset_image(dataset, dataset[i]))
    except InputError as error:
        return f"<figure><figcaption>{escape(f'{name}: {error}')}</figcaption></figure>"
    width, height = image.size
    reach = max(1.5 * max(box[2] - box[0], box[3] - box[1]), 48)  # pixels of the surroundings' sides
    center = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    is_inside = 0 <= center[0] < width and 0 <= center[1] < height
    if is_inside and reach < max(width, height):
        left, top = max(0, int(center[0] - reach / 2)), max(0, int(center[1] - reach / 2))
        right, bottom = min(width, int(left + reach) + 1), min(height, int(top + reach) + 1)
    else:
        left, top, right, bottom = 0, 0, width, height
    part = image.crop((left, top, right, bottom))
    scale = _SIDE / max(part.size)
    part = part.resize((max(1, round(part.width * scale)), max(1, round(part.height * scale))))
    shown = [(v - start) * scale for v, start in zip(box, (left, top) * 2)]
    if np.isfinite(shown).all() and np.abs(shown).max() < 1e5:
        part = draw_annotations(part, [BoxAnnotation(shown, _SUSPECT)], LineStyle(2, 10))
    return _figure(part, name)


def _example_images(findings: Iterable[Finding], dataset: DetectionDataset | None) -> Iterable[str]:
    """Yield figures of the images that findings name, with all boxes."""
    if dataset is None:
        return []
    known = {str(dataset.path(i)): i for i in range(len(dataset))}
    shown: dict[str, Finding] = {}
    for finding in findings:
        if finding.example in known:
            shown.setdefault(finding.example, finding)
    cells = (_image_figure(dataset, known[path], finding.kind) for path, finding in list(shown.items())[: 3 * _SHOWN])
    return (cell for cell in cells if cell)


def _image_figure(dataset: DetectionDataset, i: int, caption: str) -> str:
    """Draw an image with all its boxes; "" where it cannot be read."""
    record = dataset[i]
    try:
        pixels = read_dataset_image(dataset, record)
    except InputError:
        return ""
    image = to_pil_image(pixels)
    scale = _SIDE / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    boxes = [
        BoxAnnotation([v * scale for v in box], class_color(int(k)))
        for box, k in zip(record.boxes.tolist(), record.labels.tolist(), strict=True)
        if np.isfinite(box).all() and np.abs(box).max() * scale < 1e5
    ]
    return _figure(
        draw_annotations(small, boxes, LineStyle(1, 10)) if boxes else small, f"{record.path.name}: {caption}"
    )


def _figure(image: Image.Image, caption: str) -> str:
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=85)
    uri, text = make_jpeg_uri(content.getvalue()), escape(caption)
    return f"<figure><img alt='' src='{uri}'><figcaption>{text}</figcaption></figure>"
