"""What the finished runs say: published beside measured, with intervals over seeds and over images, cost and a conclusion per row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fusedet import evaluation
from fusedet.ablation.cost import measure_prediction, training_speed
from fusedet.ablation.plan import FAILED, MARKER, TIMES, Plan, Run, read_json
from fusedet.ablation.spec import DELTA, Row, Table
from fusedet.ablation.summary_text import shorten_path
from fusedet.api.predict import pick_device
from fusedet.api.validate import FIGURES, MASK_FIGURES
from fusedet.evaluation import bootstrap
from fusedet.evaluation.confidence_intervals import LEVEL, Interval, choose_decimals

MEASURED = (*FIGURES, *MASK_FIGURES, "VOC_AP", "VOC_AP_11_point")
RESAMPLED = (*bootstrap.METRICS, *(f"mask_{name}" for name in bootstrap.METRICS))
"""The figures that have an interval over images."""
BOXES, MASKS = "val.bbox.json", "val.segm.json"
UNDRAWN = "Over images there is no interval of it: other images may give another sign."
Found = dict[str, Any]


def compared_metrics(figure: str) -> tuple[str, ...]:
    """The figures whose differences are looked at in a table about a figure: AP to APl, of masks where it is one of masks."""
    kind = "mask_" if figure.startswith("mask_") else ""
    names = tuple(f"{kind}{name}" for name in bootstrap.METRICS)
    return names if figure in names else (figure, *names)


def summarize(plan: Plan, counts: Mapping[str, Found], *, resamples: int = 1000) -> Found:
    """All that is known of a table's runs, as table.json has it; figures and differences in percent, None where nothing was measured.

    counts: `cost.count_costs` of the rows. figure: what the table is about, and drawn, whether the images are resampled for it. Per row:
    published, params_M and time_ms as printed, published_difference; runs, one per seed; measured, {figure: {mean, low, high, values}},
    the t interval over seeds; reference, the row that it is compared with; difference to that, {figure: {value, over_images: [low,
    high], over_seeds: [low, high]}}, by the paired bootstrap of the mean over seeds and by Welch's t; classes, the same of each class;
    cost; conclusion.
    """
    cells = {label: plan.runs(label) for label in plan.configs}
    states = plan.states()
    ready = {label: [cell for cell in several if states[cell.folder] == "finished"] for label, several in cells.items()}
    figures = {cell.folder: _figures(cell, plan) for several in ready.values() for cell in several}
    device = pick_device(next(iter(plan.configs.values())).device)
    first = {plan.owners[label]: several[0] for label, several in ready.items() if several}
    speeds = measure_prediction(first, plan.val, device) if first else {}
    samples = _resampled(plan, ready, resamples)
    rows = []
    for row in plan.table.rows:
        found: Found = {
            "label": row.label,
            "cited": row.cited,
            "published": dict(row.published),
            "published_difference": published_differences(plan.table, row),
            "params_M": row.params_M,
            "time_ms": row.time_ms,
            "split": row.split or plan.table.split,
            "note": row.note,
        }
        if not row.cited:
            owner = plan.owners[row.label]
            mine, trainer = ready[row.label], plan.trainers[row.label]
            found |= {
                "base": row.base or plan.table.base,
                "overrides": [*plan.table.overrides, *row.overrides],
                "same_as": None if owner == row.label else owner,
                "weights_of": None if trainer == owner else trainer,
                "reference": plan.reference(row.label),
                "runs": [_run(cell, states[cell.folder], figures) for cell in cells[row.label]],
                "measured": _measured([figures[cell.folder] for cell in mine]),
                "cost": {**counts[row.label]} | {"prediction": speeds.get(owner), "training": _training(mine)},
            }
            found |= _differences(plan, row.label, ready, figures, samples)
            found["conclusion"] = draw_conclusion(found, plan.table.figure, plan.owners)
        rows.append(found)
    return _about(plan) | {"resamples": resamples, "level": LEVEL, "rows": rows}


def published_differences(table: Table, row: Row) -> Found:
    """What the paper prints of a row's difference to its reference, in percent, or the difference of what it prints of both.

    Of a row that is only cited, against a reference of its own alone; none between different splits.
    """
    reference = row.reference or (
        None if row.cited else table.reference or next((one.label for one in table.rows if not one.cited), None)
    )
    split = row.split or table.split
    alike = (one for one in table.rows if one is not row and (one.split or table.split) == split)
    other: Mapping[str, float] = next((one.published for one in alike if one.label == reference), {})
    known = {name: round(value - other[name], 6) for name, value in row.published.items() if name in other}
    return known | {name.removeprefix(DELTA): value for name, value in row.published.items() if name.startswith(DELTA)}


def draw_conclusion(row: Mapping[str, Any], figure: str, owners: Mapping[str, str]) -> str:
    """What the intervals of a row's difference of a figure to its reference allow one to say, as a sentence or two."""
    reference = row["reference"]
    if reference is not None and owners[row["label"]] == owners[reference]:
        same = (
            "The baseline: what other rows are compared with"
            if row["label"] == reference
            else f"The same config as '{reference}'"
        )
        return f"{same}." if row["measured"] else f"{same}; not measured."
    if not row["measured"]:
        return "Not measured: nothing can be said."
    if not row["difference"]:
        return f"{_named(reference)} was not measured: nothing can be said of a difference."
    change = row["difference"].get(figure)
    if change is None or change["value"] is None:
        return "The data hold no object that counts: nothing can be said."
    value = change["value"]
    digits = choose_decimals(value, least=2)
    word = "higher" if value > 0 else "lower"
    images, seeds = _ends(change["over_images"]), _ends(change["over_seeds"])
    sure, steady = (
        ends is not None and not ends[0] <= 0 <= ends[1] for ends in (change["over_images"], change["over_seeds"])
    )
    head = f"{figure} {abs(value):.{digits}f} {word} than '{reference}'"
    if figure not in RESAMPLED:
        if change["over_seeds"] is None:
            return f"Nothing can be concluded: with fewer than two seeds on a side nothing is known of other trainings. {UNDRAWN}"
        said = (
            f"{head} on these very images for other seeds too ({seeds})"
            if steady
            else f"Nothing can be concluded: {seeds} holds 0"
        )
        return f"{said}. {UNDRAWN}"
    if change["over_images"] is None:
        return "The data hold no object that counts: nothing can be said."
    if sure and steady:
        return f"{head}, for other images such as these ({images}) and for other seeds ({seeds})."
    if change["over_seeds"] is None:
        begin = (
            f"{head} on other images such as these ({images}) with these weights"
            if sure
            else "Nothing can be concluded"
        )
        reason = "" if sure else f": the interval over images ({images}) holds 0"
        return f"{begin}{reason}. With fewer than two seeds on a side nothing is known of other trainings."
    if sure:
        return f"{head} on other images such as these ({images}) with these weights; another training may give another sign ({seeds})."
    if steady:
        return (
            f"{head} on these very images for other seeds too ({seeds}); other images may give another sign ({images})."
        )
    return f"Nothing can be concluded: both intervals hold 0, over images {images}, over seeds {seeds}."


def _ends(ends: Sequence[float] | None) -> str:
    if ends is None:
        return "none"
    digits = choose_decimals(*ends, least=2)
    return f"{ends[0]:+.{digits}f} to {ends[1]:+.{digits}f}"


def _named(reference: str | None) -> str:
    return "The baseline" if reference is None else f"'{reference}'"


def _figures(cell: Run, plan: Plan) -> Found:
    """The figures of a finished run, in percent; VOC's are computed of the stored results where the table is about them."""
    figures = read_json(cell.folder / "metrics.json")
    if plan.table.figure.startswith("VOC_") and plan.table.figure not in figures:
        stored = evaluation.load_results(cell.folder / BOXES)
        figures["VOC_AP"] = evaluation.evaluate_voc(plan.val, stored)["mAP"]
        figures["VOC_AP_11_point"] = evaluation.evaluate_voc(plan.val, stored, points=11)["mAP"]
    return {
        name: 100 * value
        for name, value in figures.items()
        if name in MEASURED and value is not None and not math.isnan(value)
    }


def _run(cell: Run, state: str, figures: Mapping[Path, Found]) -> Found:
    about = read_json(cell.folder / "run.json") or {}
    failed = read_json((cell.trained or cell.folder) / FAILED) or {}
    times = read_json(cell.folder / TIMES) or {}
    # an older note of a resumed run knows its last session alone
    seconds = None if times.get("resumed") and "sessions" not in times else times.get("seconds")
    return {
        "seed": cell.seed,
        "state": state,
        "folder": str(cell.folder),
        "figures": figures.get(cell.folder),
        "seconds": seconds,
        "device": about.get("device"),
        "versions": about.get("versions"),
        "reason": failed.get("reason"),
    }


def _measured(runs: Sequence[Found]) -> Found | None:
    """The mean over seeds of every figure that all runs have."""
    if not runs:
        return None
    found = {}
    for name in MEASURED:
        if all(name in run for run in runs):
            values = [run[name] for run in runs]
            mean, low, high = evaluation.compute_seed_interval(values)
            found[name] = {"mean": mean, "low": _known(low), "high": _known(high), "values": values}
    return found


def _training(cells: Sequence[Run]) -> Found | None:
    """The mean speed of the runs' training, and where it was measured."""
    folders = [cell.trained or cell.folder for cell in cells]
    speeds = [speed for folder in folders if (speed := training_speed(folder)) is not None]
    if not speeds:
        return None
    places = dict.fromkeys(
        str((read_json(folder / "run.json") or {}).get("device") or "a device that is not noted") for folder in folders
    )
    return {"images_per_second": sum(speeds) / len(speeds), "device": "; ".join(places)}


def _resampled(plan: Plan, ready: Mapping[str, Sequence[Run]], resamples: int) -> dict[str, bootstrap.ResampledMetrics]:
    """The mean over seeds of every measured row on the same resamples of the images, by the row that owns the runs."""
    wanted: dict[str, Sequence[Run]] = {}
    for label in ready:
        for one in _sides(plan, label, ready) or ():
            wanted[plan.owners[one]] = ready[one]
    if not wanted:
        return {}
    weights = bootstrap.draw_image_weights(len(plan.val), resamples, 0)
    masks = plan.table.figure.startswith("mask_")

    def resampled(cells: Sequence[Run]) -> bootstrap.ResampledMetrics:
        stored = (evaluation.load_results(cell.folder / (MASKS if masks else BOXES)) for cell in cells)
        return bootstrap.average_runs(
            [bootstrap.resample_metrics(plan.val, results, weights, "segm" if masks else "bbox") for results in stored]
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(resampled, wanted.values())))


def _differences(
    plan: Plan,
    label: str,
    ready: Mapping[str, Sequence[Run]],
    figures: Mapping[Path, Found],
    samples: Mapping[str, bootstrap.ResampledMetrics],
) -> Found:
    """The row less its reference, by figure and by class; None for a reference itself and where either was not measured."""
    pair = _sides(plan, label, ready)
    if not pair:
        return {"difference": None, "classes": None}
    over_images = bootstrap.compute_difference(
        samples[plan.owners[pair[0]]], samples[plan.owners[pair[1]]], plan.val.names
    )
    sides = [[figures[cell.folder] for cell in ready[one]] for one in pair]
    changes = {}
    for name in compared_metrics(plan.table.figure):
        values = [[run[name] for run in side if name in run] for side in sides]
        over_seeds = (
            evaluation.compute_seed_difference(*values, paired=False)
            if all(values)
            else Interval(math.nan, math.nan, math.nan)
        )
        change: Found = {"value": _known(over_seeds.value), "over_images": None}
        if name in RESAMPLED:
            change = _interval(over_images[name.removeprefix("mask_")])
        changes[name] = change | {"over_seeds": _pair(over_seeds.low, over_seeds.high, 1)}
    return {
        "difference": changes,
        "classes": [{"name": row["name"]} | _interval(row) for row in over_images["classes"]],
    }


def _sides(plan: Plan, label: str, ready: Mapping[str, Sequence[Run]]) -> tuple[str, str] | None:
    """A row's reference and the row, where both are measured and not the same; else None."""
    base = plan.reference(label)
    if base is None or not ready[base] or not ready[label] or plan.owners[label] == plan.owners[base]:
        return None
    return base, label


def _interval(row: Mapping[str, float]) -> Found:
    value = _known(row["difference"])
    return {"value": None if value is None else 100 * value, "over_images": _pair(row["low"], row["high"], 100)}


def _pair(low: float, high: float, scale: float) -> list[float] | None:
    return None if math.isnan(low) or math.isnan(high) else [scale * low, scale * high]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _about(plan: Plan) -> Found:
    """The table, the data and how it was made."""
    table, val = plan.table, plan.val
    train = next(iter(plan.data.values()))[0]
    marker = read_json(plan.out / MARKER) or {}
    return {
        "table": Path(table.source).name,
        "title": table.title,
        "paper": table.paper,
        "note": table.note,
        "figure": table.figure,
        "drawn": table.figure in RESAMPLED,
        "chosen": any(one.train.validate_every < one.train.epochs for one in plan.configs.values()),
        "baseline": plan.baseline,
        "seeds": plan.seeds,
        "overrides": [shorten_path(word) for word in plan.overrides],
        "commands": list(
            map(list, dict.fromkeys(tuple(map(shorten_path, command)) for command in marker.get("commands", [])))
        ),
        "data": {
            "train": {
                "source": shorten_path(train.source),
                "images": len(train),
                "objects": len(train.labels),
                "fingerprint": train.fingerprint(),
            },
            "val": {
                "source": shorten_path(val.source),
                "images": len(val),
                "objects": len(val.labels),
                "fingerprint": val.fingerprint(),
            },
            "classes": list(val.names),
        },
        "unit": "percent",
    }
