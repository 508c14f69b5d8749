"""Texts of a summary: conclusions, coverage of the intervals, notes, cost, and paths without machine-specific parts."""

import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedet.ablation.spec import RESAMPLED
from fusedet.evaluation.formatting import format_difference, format_interval

Summary = Mapping[str, Any]
NO_IMAGE_INTERVAL = "There is no interval over images: other images may change the sign."
ONE_SEED = "With fewer than two seeds on a side, other trainings are not covered."


def shorten_path(argument: str, keep: int = 1) -> str:
    """Make an absolute path in a command's argument relative to the working directory.

    Of a path that shares no top-level folder with the working directory, only the last `keep` names stay, because the
    rest is specific to the machine.

    >>> paths = "train.epochs=2", os.path.abspath("runs/a"), "data=" + os.path.abspath("b")
    >>> [shorten_path(path) for path in paths]
    ['train.epochs=2', 'runs/a', 'data=b']
    """
    key, sign, path = argument.partition("=")
    if not sign:
        path = argument
    if not os.path.isabs(path):
        return argument
    here = Path.cwd()
    if Path(path).parts[:2] == here.parts[:2]:
        short = os.path.relpath(path, here)
    else:
        short = "/".join(("...", *Path(path).parts[1:][-keep:]))
    return f"{key}={short}" if sign else short


def draw_conclusion(row: Summary, metric: str, runs_of: Mapping[str, str], references: Container[str | None]) -> str:
    """Say in a sentence or two what the intervals of a row's difference to its reference allow one to conclude.

    Args:
        row: Row of a summary: label, reference, measured and difference.
        metric: Metric of the conclusion.
        runs_of: By label, the row whose runs a row uses.
        references: Labels of the rows that other rows are compared with.
    """
    reference = row["reference"]
    if reference is not None and runs_of[row["label"]] == runs_of[reference]:
        same = f"The same config as '{reference}'"
        if row["label"] == reference:
            same = "The baseline of the other rows" if reference in references else "Compared with no other row"
        return f"{same}." if row["measured"] else f"{same}; not measured."
    if not row["measured"]:
        return "Not measured: no conclusion."
    if not row["difference"]:
        name = "The baseline" if reference is None else f"'{reference}'"
        return f"{name} was not measured: no conclusion about a difference."
    change = row["difference"].get(metric)
    if change is None or change["value"] is None or (metric in RESAMPLED and change["over_images"] is None):
        return "The data has no instance that counts: no conclusion."
    value = change["value"]
    head = f"{metric} {format_difference(value, 2)[1:]} {'higher' if value > 0 else 'lower'} than '{reference}'"
    images, seeds = (format_interval(change[f"over_{name}"], 2, signed=True) for name in ("images", "seeds"))
    clear_over_images, clear_over_seeds = (_excludes_0(change[f"over_{name}"]) for name in ("images", "seeds"))
    if metric not in RESAMPLED:
        if change["over_seeds"] is None:
            return f"No conclusion: {ONE_SEED[0].lower()}{ONE_SEED[1:]} {NO_IMAGE_INTERVAL}"
        if clear_over_seeds:
            return f"{head} on these images, for other seeds too ({seeds}). {NO_IMAGE_INTERVAL}"
        return f"No conclusion: {seeds} contains 0. {NO_IMAGE_INTERVAL}"
    if clear_over_images and clear_over_seeds:
        return f"{head}, for other images of this kind ({images}) and for other seeds ({seeds})."
    with_these_weights = f"{head} on other images of this kind ({images}) with these weights"
    if change["over_seeds"] is None:
        if clear_over_images:
            return f"{with_these_weights}. {ONE_SEED}"
        return f"No conclusion: the interval over images ({images}) contains 0. {ONE_SEED}"
    if clear_over_images:
        return f"{with_these_weights}; another training may change the sign ({seeds})."
    if clear_over_seeds:
        return f"{head} on these images, for other seeds too ({seeds}); other images may change the sign ({images})."
    return f"No conclusion: both intervals contain 0, over images {images}, over seeds {seeds}."


def list_sizes(metric: str, bins: Sequence[str]) -> Sequence[str]:
    """List the metrics by object size: those of the size bins, or of COCO's small, medium and large objects."""
    kind = "mask_" if metric.startswith("mask_") else ""
    return bins or [f"{kind}{name}" for name in ("APs", "APm", "APl")]


def conclude_sizes(row: Summary, names: Sequence[str]) -> str:
    """Say for which object sizes both intervals of a row's difference to its reference exclude 0; "" if none is known.

    Args:
        row: Row of a summary.
        names: Metrics by object size, as `list_sizes` returns them.
    """
    changes = {name: (row["difference"] or {}).get(name) for name in names}
    known = {name: change for name, change in changes.items() if change and change["value"] is not None}
    is_clear = {
        name: all(_excludes_0(own[f"over_{what}"]) for what in ("images", "seeds")) for name, own in known.items()
    }
    clear = ", ".join(f"{name} ({format_difference(known[name]['value'], 2)})" for name in known if is_clear[name])
    unclear = ", ".join(name for name in known if not is_clear[name])
    if clear:
        return f"Both intervals exclude 0 for {clear}" + (f"; not for {unclear}." if unclear else ".")
    return f"No conclusion for {unclear}." if unclear else ""


def _excludes_0(ends: Sequence[float] | None) -> bool:
    return ends is not None and not ends[0] <= 0 <= ends[1]


def describe_coverage(summary: Summary) -> list[str]:
    """Say in sentences what each interval and metric covers."""
    val, level = summary["data"]["val"], f"{100 * summary['level']:g} %"
    compared = sum(bool(row.get("difference")) for row in summary["rows"])
    lines = [
        f"Measured on {val['images']} images of {val['source']}; published on the data of the paper. Other data or "
        "another recipe gives other levels: compare differences within a column, not the columns.",
        f"Over seeds ({level}): Student's t interval of the mean, for differences Welch's, or that of the differences "
        "by seed if two rows score the same weights. It covers other seeds on these images.",
    ]
    if summary["resampled"]:
        lines.append(
            f"Over images ({level}): percentiles of {summary['resamples']} paired bootstrap resamples of the images, "
            "of the mean over seeds. It covers other images from the same source with these weights."
        )
    else:
        lines.append(f"Over images: none. {summary['metric']} is not resampled, so other images are not covered.")
    noise = next((row.get("noise") for row in summary["rows"] if row["label"] == summary["baseline"]), None)
    if noise and noise["power"] is not None:
        visible = noise["visible_difference"]
        lines.append(
            f"Power: with {noise['seeds']} seeds per row, a true difference of {noise['effect']:g} {summary['metric']} "
            f"is concluded with a probability of {100 * noise['power']:.0f} %, "
            f"{'none' if visible is None else f'one of {visible:.1f}'} with 80 %, by the noise of "
            f"'{summary['baseline']}' between seeds ({noise['between_seeds']:.2f}) and of pairs of seeds over images "
            f"({noise['of_pairs']:.2f})."
        )
    if summary["best_weights"]:
        lines.append(
            "Each run has the weights of its best validation, chosen on the images that are scored here: levels may be "
            "slightly too high."
        )
    if compared > 1:
        lines.append(
            f"{compared} rows are compared with a reference: of twenty intervals of rows without any difference, about "
            "one misses 0."
        )
    return lines


def collect_notes(summary: Summary) -> list[str]:
    """Collect notes of the table and its rows: remarks, shared runs and weights, failures, missing seeds."""
    rows = summary["rows"]
    texts = [summary["note"]] if summary["note"] else []
    texts += [f"{row['label']}: {row['note']}" for row in rows if row["note"]]
    texts += [
        f"{row['label']}: the same config as '{row['same_as']}', whose runs it shares"
        for row in rows
        if row.get("same_as")
    ]
    texts += [
        f"{row['label']}: the weights of '{row['weights_of']}', scored with this row's test section"
        for row in rows
        if row.get("weights_of")
    ]
    for row in rows:
        texts += [
            f"{row['label']}, seed {run['seed']}: {run['reason']}" for run in row.get("runs", ()) if run["reason"]
        ]
    done = {row["label"]: count_finished(row) for row in rows if not row["cited"]}
    if missing := [f"{label} {count}" for label, count in done.items() if count < summary["seeds"]]:
        others = "; all in the other rows" if len(missing) < len(done) else ""
        texts.append(f"Finished seeds, of {summary['seeds']}: {', '.join(missing)}{others}.")
    return list(dict.fromkeys(texts))


def count_finished(row: Summary) -> int:
    """Count the finished seeds of a row."""
    return sum(run["state"] == "finished" for run in row.get("runs", ()))


def describe_cost(summary: Summary) -> str:
    """Say how the costs were counted and measured."""
    measured = [row["cost"] for row in summary["rows"] if row.get("cost")]
    speeds = [cost["prediction"] for cost in measured if cost["prediction"]]
    sizes = dict.fromkeys("x".join(map(str, cost["image"])) for cost in measured)
    text = f"#Param counts trainable parameters; multiply-adds are of one image of {' or '.join(sizes)}."
    if speeds:
        text += (
            f" Latency: one image at a time on {speeds[0]['device']}, {speeds[0]['images']} images, the rows in turn. "
            "Peak memory: tensors alive at once in a prediction, weights included."
        )
    if places := dict.fromkeys(cost["training"]["device"] for cost in measured if cost["training"]):
        text += (
            f" Trained on {'; '.join(places)}. Training images per second are of each row's own training, at different "
            "times: other load on the machine affects them."
        )
    return text
