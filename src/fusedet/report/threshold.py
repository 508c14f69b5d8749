"""The parts of a page that follow the threshold: classes, confusion matrix and gallery, as HTML at one threshold."""

import math
from html import escape

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import format_count
from fusedet.evaluation.formatting import format_interval, format_number
from fusedet.report.analysis import Analysis
from fusedet.report.counts import (
    BACKGROUND,
    CLASSIFICATION,
    CORRECT,
    DEFAULT,
    DUPLICATE,
    KINDS,
    LOCALIZATION,
    MISSED,
    NEAR,
    count_from,
    fill_matrix,
)
from fusedet.report.gallery import Box, Thumbnail
from fusedet.visualization.page import make_faint, make_section

_NAMES = {
    MISSED: ("Missed instances", "no detection matches the instance"),
    BACKGROUND: ("Background errors", f"no instance of their class at IoU {NEAR:g} or more"),
    DUPLICATE: ("Duplicates", "a second box on one instance"),
    LOCALIZATION: ("Localization errors", f"badly placed: IoU {NEAR:g} to 0.5 with an instance of their class"),
    CLASSIFICATION: ("Classification errors", "the box matches an instance of another class"),
    CORRECT: ("True positives", "the box matches an instance of its class"),
}


def make_control(analysis: Analysis) -> str:
    """Return the threshold's slider, which the script shows, and the counts at the threshold."""
    counts, best = analysis.counts, analysis.best[-1]
    numbers = ""
    for kind in KINDS:
        count = _count_kind(analysis, kind)
        numbers += f'<div><dt>{escape(_NAMES[kind][0])}</dt><dd data-count="{kind}">{count:,}</dd></div>'
    jump = ""
    if math.isfinite(best.threshold):
        ends = f" ({format_interval((best.low, best.high), 2)})" if math.isfinite(best.low) else ""
        jump = (
            f'<button type="button" data-jump="{round(100 * best.threshold)}">Best F1 of all classes: '
            f"{best.threshold:.2f}{ends}</button>"
        )
    objects = sum(counts.objects)
    return (
        '<div class="control"><label hidden>Score threshold '
        f'<input type="range" min="0" max="100" step="1" value="{DEFAULT}" id="threshold"></label>'
        f'<output id="at" for="threshold">{DEFAULT / 100:.2f}</output><span hidden>{jump}</span></div>'
        f'<p>At this score threshold, of {objects:,} instances:</p><dl class="tiles">{numbers}</dl>'
    )


def _count_kind(analysis: Analysis, kind: str) -> int:
    counts = analysis.counts
    if kind != MISSED:
        return count_from(counts.kinds[kind], DEFAULT)
    return sum(counts.objects) - _count_kind(analysis, CORRECT) - _count_kind(analysis, CLASSIFICATION)


def make_classes(analysis: Analysis) -> str:
    """Return the table of the classes, the lowest AP first; the script makes it sortable."""
    head = [
        "class",
        "images",
        "instances",
        "AP",
        "95 % interval",
        "AP50",
        "best threshold",
        "its interval",
        "F1 there",
        "precision",
        "recall",
    ]
    cells = "".join(f'<th scope="col">{name}</th>' for name in head)
    own = zip(analysis.metrics["classes"], analysis.class_intervals, analysis.best, strict=False)
    rows = []
    for k, (row, ends, best) in enumerate(own):
        true_positives, false_positives = (
            count_from(own[k], DEFAULT) for own in (analysis.counts.true_positives, analysis.counts.false_positives)
        )
        objects = analysis.counts.objects[k]
        precision = (
            true_positives / (true_positives + false_positives) if true_positives + false_positives else math.nan
        )
        recall = true_positives / objects if objects else math.nan
        values = [
            _make_number(row["images"], f"{row['images']:,}"),
            _make_number(row["objects"], f"{row['objects']:,}"),
            _make_number(row["AP"], format_number(row["AP"])),
            _make_number(ends[1] - ends[0], format_interval(ends)),
            _make_number(row["AP50"], format_number(row["AP50"])),
            _make_number(best.threshold, format_number(best.threshold, 2)),
            _make_number(best.high - best.low, format_interval((best.low, best.high), 2)),
            _make_number(best.f1, format_number(best.f1)),
            _make_number(precision, format_number(precision), "precision"),
            _make_number(recall, format_number(recall), "recall"),
        ]
        name = f'<th scope="row">{escape(row["name"])}</th>'
        rows.append((row["AP"], f'<tr data-class="{k}">{name}{"".join(values)}</tr>'))
    rows.sort(key=lambda item: math.inf if math.isnan(item[0]) else item[0])
    table = (
        f'<table id="classes"><thead><tr>{cells}</tr></thead><tbody>{"".join(row for _, row in rows)}</tbody></table>'
    )
    note = "Precision and recall are those at the threshold above. F1 is highest at the best threshold."
    return make_section("Classes", _make_scroll("Classes", table, "tall") + make_faint(note), "per-class")


def _make_scroll(label: str, content: str, kind: str = "") -> str:
    """Return a part that scrolls by itself, which the keyboard reaches."""
    return f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def _make_number(value: float, text: str, role: str = "") -> str:
    own = f' data-role="{role}"' if role else ""
    return (
        f'<td data-v="{value:.6g}"{own}>{escape(text)}</td>'
        if math.isfinite(value)
        else f"<td{own}>{escape(text)}</td>"
    )


def make_confusion(analysis: Analysis) -> str:
    """Return the confusion matrix at the threshold."""
    counts, matrix = analysis.counts, fill_matrix(analysis.counts, DEFAULT)
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in [*counts.rows, MISSED])
    lines = ""
    for r, (name, row) in enumerate(zip([*counts.rows, BACKGROUND], matrix, strict=True)):
        total = sum(row)
        cells = ""
        for c, count in enumerate(row):
            kind = "none" if r == c == len(counts.rows) else "hit" if r == c else "error"
            share = count / total if total else 0
            cells += f'<td class="{kind}" style="--a:{share:.2f}">{count if count else ""}</td>'
        lines += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    table = (
        f'<table class="confusion" id="confusion"><thead><tr><td></td>{head}</tr></thead><tbody>{lines}</tbody></table>'
    )
    grouped = len(analysis.names) > len(counts.rows)
    note = "Rows are ground-truth classes, columns predicted ones, at IoU 0.5; the last row has the false detections."
    more = f" The {len(counts.rows) - 1} classes with the most errors; the others share a row and a column." * grouped
    return make_section("Confusion matrix", _make_scroll("Confusion matrix", table) + make_faint(note + more), "matrix")


def make_gallery(analysis: Analysis, dataset: DetectionDataset) -> str:
    """Return the gallery: a group per kind with the thumbnails that are of it at the threshold."""
    if not analysis.thumbnails:
        reason = "The images cannot be read here, so there are none to show." if analysis.unread else "Nothing to show."
        return make_section("Gallery", make_faint(reason), "gallery")
    groups, hidden = "", ""
    by_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for order, thumbnail in enumerate(analysis.thumbnails):
        figure = _make_figure(thumbnail, order, dataset, analysis)
        if kind := thumbnail.item.kind_at(DEFAULT):
            by_kind[kind].append(figure)
        else:
            hidden += figure
    for kind in KINDS:
        title, meaning = _NAMES[kind]
        count = _count_kind(analysis, kind)
        groups += (
            f'<details{"" if kind == CORRECT else " open"} data-group="{kind}"><summary>{title}: '
            f'<span data-count="{kind}">{count:,}</span> <span class="faint">({escape(meaning)}; '
            f'<span data-shown="{kind}">{len(by_kind[kind])}</span> shown)</span></summary>'
            f'<div class="thumbs" tabindex="0" role="region" aria-label="{title}">'
            f"{''.join(by_kind[kind])}</div></details>"
        )
    key = (
        '<p class="faint">Boxes: <span class="swatch ground-truth"></span> the instance, '
        '<span class="swatch detection"></span> the detection, <span class="swatch other"></span> other instances. The '
        "gallery is a sample: of each type the largest or surest of each class, and some of every score."
        + (f" {format_count(analysis.unread, 'image')} could not be read." if analysis.unread else "")
        + "</p>"
    )
    return make_section("Gallery", f'{key}{groups}<div id="apart" hidden>{hidden}</div>', "gallery")


def _make_figure(thumbnail: Thumbnail, order: int, dataset: DetectionDataset, analysis: Analysis) -> str:
    own = thumbnail.item
    gt_name = analysis.names[int(dataset.labels[own.annotation])] if own.annotation >= 0 else ""
    detection = analysis.names[own.label] if own.detection >= 0 else ""
    score = f"{detection} {own.score:.2f}" if detection else ""
    caption = (
        " in place of ".join([score, gt_name]) if detection and gt_name not in ("", detection) else score or gt_name
    )
    missed = f'<span class="as-missed">{escape(gt_name)}</span>' if gt_name else ""
    name = dataset.path(own.image).name
    rectangles = "".join(_make_rectangle(box, "other") for box in thumbnail.neighbors)
    rectangles += _make_rectangle(thumbnail.ground_truth, "ground-truth")
    rectangles += _make_rectangle(thumbnail.detection, "detection")
    width, height = thumbnail.width, thumbnail.height
    state = ' class="is-missed"' if own.kind_at(DEFAULT) == MISSED else ""
    late = MISSED if own.kind in (CORRECT, CLASSIFICATION, MISSED) else ""
    return (
        f'<figure{state} data-order="{order}" data-bin="{own.bin}" data-kind="{own.kind}" data-above="{late}" '
        f'title="{escape(name)}"><div class="thumb"><img alt="" width="{width}" height="{height}" '
        f'src="{thumbnail.uri}"><svg viewBox="0 0 {width} {height}" aria-hidden="true">{rectangles}</svg></div>'
        f'<figcaption><span class="as-detected">{escape(caption)}</span>{missed}<br><span class="faint">'
        f"{escape(name)}</span></figcaption></figure>"
    )


def _make_rectangle(box: Box | None, kind: str) -> str:
    if box is None:
        return ""
    x1, y1, x2, y2 = (min(max(v, -2000.0), 4000.0) for v in box)
    return f'<rect class="{kind}" x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}"/>'
