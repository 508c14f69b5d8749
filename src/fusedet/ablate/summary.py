"""What the finished runs say: published beside measured, with intervals over seeds and over pictures, cost and a conclusion per row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fusedet import evaluate
from fusedet.ablate.cost import predicting, training_speed
from fusedet.ablate.plan import FAILED, MARKER, TIMES, Cell, Plan, read_json
from fusedet.evaluate import bootstrap
from fusedet.evaluate.intervals import LEVEL, Interval
from fusedet.verbs.predict import pick_device
from fusedet.verbs.val import FIGURES, MASK_FIGURES

SHOWN = bootstrap.FIGURES
MEASURED = (*FIGURES, *MASK_FIGURES, "VOC_AP", "VOC_AP_11_point")
Found = dict[str, Any]


def summary(plan: Plan, counts: Mapping[str, Found], *, resamples: int = 1000) -> Found:
    """All that is known of a table's runs, as table.json has it; figures and differences in percent, None where nothing was measured.

    counts: `cost.counted` of the rows. Per row: published, params_M and time_ms as printed; runs, one per seed; measured,
    {figure: {mean, low, high, values}}, the t interval over seeds; difference to the baseline row, {figure: {value, over_pictures: [low,
    high], over_seeds: [low, high]}}, by the paired bootstrap of the mean over seeds and by Welch's t; classes, the same of each class;
    cost; conclusion.
    """
    cells = {label: plan.cells(label) for label in plan.configs}
    states = plan.states()
    ready = {label: [cell for cell in several if states[cell.folder] == "finished"] for label, several in cells.items()}
    figures = {cell.folder: _figures(cell) for several in ready.values() for cell in several}
    device = pick_device(next(iter(plan.configs.values())).device)
    first = {plan.owners[label]: several[0].folder for label, several in ready.items() if several}
    speeds = predicting(first, plan.val, device) if first else {}
    samples = _resampled(plan, ready, resamples)
    rows = []
    for row in plan.table.rows:
        found: Found = {
            "label": row.label,
            "cited": row.cited,
            "published": dict(row.published),
            "params_M": row.params_M,
            "time_ms": row.time_ms,
            "split": row.split or plan.table.split,
            "note": row.note,
        }
        if not row.cited:
            owner = plan.owners[row.label]
            mine = ready[row.label]
            found |= {
                "base": row.base or plan.table.base,
                "overrides": [*plan.table.overrides, *row.overrides],
                "same_as": None if owner == row.label else owner,
                "runs": [_run(cell, states[cell.folder], figures) for cell in cells[row.label]],
                "measured": _measured([figures[cell.folder] for cell in mine]),
                "cost": {**counts[row.label]} | {"prediction": speeds.get(owner), "training": _training(mine)},
            }
            found |= _differences(plan, row.label, ready, figures, samples)
            found["conclusion"] = conclusion(found, plan.baseline, plan.owners)
        rows.append(found)
    return _about(plan, first) | {"resamples": resamples, "level": LEVEL, "rows": rows}


def conclusion(row: Mapping[str, Any], baseline: str | None, owners: Mapping[str, str]) -> str:
    """What the intervals of a row's difference of AP to the baseline allow one to say, as a sentence or two."""
    if baseline is not None and owners[row["label"]] == owners[baseline]:
        same = "The baseline: what the other rows are compared with" if row["label"] == baseline else f"The same config as '{baseline}'"
        return f"{same}." if row["measured"] else f"{same}; not measured."
    if not row["measured"]:
        return "Not measured: nothing can be said."
    if not row["difference"]:
        return "The baseline was not measured: nothing can be said of a difference."
    change = row["difference"]["AP"]
    value = change["value"]
    if value is None or change["over_pictures"] is None:
        return "The data hold no object that counts: nothing can be said."
    word = "higher" if value > 0 else "lower"
    pictures, seeds = _ends(change["over_pictures"]), _ends(change["over_seeds"])
    sure, steady = (ends is not None and not ends[0] <= 0 <= ends[1] for ends in (change["over_pictures"], change["over_seeds"]))
    head = f"AP {abs(value):.2f} {word} than '{baseline}'"
    if sure and steady:
        return f"{head}, for other pictures such as these ({pictures}) and for other seeds ({seeds})."
    if change["over_seeds"] is None:
        begin = f"{head} on other pictures such as these ({pictures}) with these weights" if sure else "Nothing can be concluded"
        reason = "" if sure else f": the interval over pictures ({pictures}) holds 0"
        return f"{begin}{reason}. With fewer than two seeds on a side nothing is known of other trainings."
    if sure:
        return f"{head} on other pictures such as these ({pictures}) with these weights; another training may give another sign ({seeds})."
    if steady:
        return f"{head} on these very pictures for other seeds too ({seeds}); other pictures may give another sign ({pictures})."
    return f"Nothing can be concluded: both intervals hold 0, over pictures {pictures}, over seeds {seeds}."


def _ends(ends: Sequence[float] | None) -> str:
    return "none" if ends is None else f"{ends[0]:+.2f} to {ends[1]:+.2f}"


def _figures(cell: Cell) -> Found:
    """The figures of a finished run, in percent; those of classes as they are."""
    figures = read_json(cell.folder / "metrics.json")
    return {name: 100 * value for name, value in figures.items() if name in MEASURED and value is not None}


def _run(cell: Cell, state: str, figures: Mapping[Path, Found]) -> Found:
    about = read_json(cell.folder / "run.json") or {}
    failed = read_json(cell.folder / FAILED) or {}
    return {
        "seed": cell.seed,
        "state": state,
        "folder": str(cell.folder),
        "figures": figures.get(cell.folder),
        "seconds": (read_json(cell.folder / TIMES) or {}).get("seconds"),
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
            mean, low, high = evaluate.over_seeds(values)
            found[name] = {"mean": mean, "low": _known(low), "high": _known(high), "values": values}
    return found


def _training(cells: Sequence[Cell]) -> Found | None:
    """The mean speed of the runs' training, and where it was measured."""
    speeds = [speed for cell in cells if (speed := training_speed(cell.folder)) is not None]
    if not speeds:
        return None
    places = dict.fromkeys(str((read_json(cell.folder / "run.json") or {}).get("device")) for cell in cells)
    return {"images_per_second": sum(speeds) / len(speeds), "device": "; ".join(places)}


def _resampled(plan: Plan, ready: Mapping[str, Sequence[Cell]], resamples: int) -> dict[str, bootstrap.Resampled]:
    """The mean over seeds of every measured row on the same resamples of the pictures, by the row that owns the runs."""
    base = plan.baseline
    if base is None or not ready[base]:
        return {}
    weights = bootstrap.drawn_pictures(len(plan.val), resamples, 0)
    wanted = {plan.owners[label]: several for label, several in ready.items() if several}

    def one(cells: Sequence[Cell]) -> bootstrap.Resampled:
        stored = (evaluate.load_results(cell.folder / "val.bbox.json") for cell in cells)
        return bootstrap.mean_of([bootstrap.resampled(plan.val, results, weights) for results in stored])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(one, wanted.values())))


def _differences(
    plan: Plan, label: str, ready: Mapping[str, Sequence[Cell]], figures: Mapping[Path, Found], samples: Mapping[str, bootstrap.Resampled]
) -> Found:
    """The row less the baseline, by figure and by class; None for the baseline itself and where either was not measured."""
    base = plan.baseline
    if base is None or not ready[base] or not ready[label] or plan.owners[label] == plan.owners[base]:
        return {"difference": None, "classes": None}
    over_pictures = bootstrap.difference(samples[plan.owners[base]], samples[plan.owners[label]], plan.val.names)
    sides = [[figures[cell.folder] for cell in ready[one]] for one in (base, label)]
    changes = {}
    for name in SHOWN:
        values = [[run[name] for run in side if name in run] for side in sides]
        change = over_pictures[name]
        over_seeds = evaluate.difference_over_seeds(*values, paired=False) if all(values) else Interval(math.nan, math.nan, math.nan)
        changes[name] = _interval(change) | {"over_seeds": _pair(over_seeds.low, over_seeds.high, 1)}
    return {"difference": changes, "classes": [{"name": row["name"]} | _interval(row) for row in over_pictures["classes"]]}


def _interval(row: Mapping[str, float]) -> Found:
    value = _known(row["difference"])
    return {"value": None if value is None else 100 * value, "over_pictures": _pair(row["low"], row["high"], 100)}


def _pair(low: float, high: float, scale: float) -> list[float] | None:
    return None if math.isnan(low) or math.isnan(high) else [scale * low, scale * high]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _about(plan: Plan, first: Mapping[str, Path]) -> Found:
    """The table, the data and how it was made."""
    table, val = plan.table, plan.val
    train = next(iter(plan.data.values()))[0]
    marker = read_json(plan.out / MARKER) or {}
    return {
        "table": table.source,
        "title": table.title,
        "paper": table.paper,
        "note": table.note,
        "baseline": plan.baseline,
        "seeds": plan.seeds,
        "overrides": list(plan.overrides),
        "commands": marker.get("commands", []),
        "data": {
            "train": {"source": train.source, "pictures": len(train), "objects": len(train.labels), "fingerprint": train.fingerprint()},
            "val": {"source": val.source, "pictures": len(val), "objects": len(val.labels), "fingerprint": val.fingerprint()},
            "classes": list(val.names),
        },
        "unit": "percent",
    }
