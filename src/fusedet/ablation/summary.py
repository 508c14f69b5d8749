"""Summarize finished runs: published and measured metrics, intervals over seeds and images, cost and conclusions."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from fusedet import evaluation
from fusedet.ablation import power
from fusedet.ablation.cost import measure_prediction, read_training_speed
from fusedet.ablation.plan import FAILED, MARKER, TIMES, Plan, Run, State
from fusedet.ablation.spec import DELTA, METRICS, RESAMPLED, Row, Table
from fusedet.ablation.summary_text import conclude_sizes, draw_conclusion, list_sizes, shorten_path
from fusedet.api.predictor import pick_device
from fusedet.api.run_dir import read_json
from fusedet.evaluation import bootstrap
from fusedet.evaluation.confidence_intervals import LEVEL, ConfidenceInterval

BOXES, MASKS = "val.bbox.json", "val.segm.json"
Tree = dict[str, Any]


def compared_metrics(metric: str, bins: Sequence[str] = ()) -> tuple[str, ...]:
    """List the metrics whose differences a table about `metric` shows: AP to APl, of masks for a mask metric; bins."""
    kind = "mask_" if metric.startswith("mask_") else ""
    names = (*(f"{kind}{name}" for name in bootstrap.METRICS), *bins)
    return names if metric in names else (metric, *names)


def summarize_runs(plan: Plan, costs: Mapping[str, Tree], *, resamples: int = 1000) -> Tree:
    """Summarize the runs of a plan as table.json has them; metrics in percent, None where nothing was measured.

    Args:
        plan: The plan.
        costs: Result of `cost.count_costs`.
        resamples: Number of bootstrap resamples of the images.

    Returns:
        Facts about the table and the data, and `rows`, each with these keys, as far as it was run:

        - published, published_difference, params_M, time_ms, split: as printed
        - runs: one per seed, with state, metrics, seconds, device and versions
        - measured: {metric: {mean, low, high, values}} with the t interval over seeds
        - reference: label of the row to compare with
        - difference: {metric: {value, over_images: [low, high], over_seeds: [low, high]}}, by the paired bootstrap of
          the mean over seeds and by Welch's t, or of rows with the same weights by the t of the differences by seed
        - classes: the same of each class
        - noise: see `power.Noise`, of the table's metric; None where it is not resampled
        - cost: counts, prediction and training
        - conclusion: sentences about the table's metric and about object sizes
    """
    runs = {label: plan.runs(label) for label in plan.configs}
    states = plan.states()
    finished = {label: [run for run in own if states[run.folder] == "finished"] for label, own in runs.items()}
    metrics = {run.folder: _read_metrics(run, plan) for own in finished.values() for run in own}
    device = pick_device(next(iter(plan.configs.values())).device)
    first = {plan.runs_of[label]: own[0] for label, own in finished.items() if own}
    speeds = measure_prediction(first, plan.val, device) if first else {}
    samples = resample_runs(plan, finished, resamples)
    bins = bootstrap.name_bins(plan.size_bins)
    for label, own in finished.items():
        for run, sample in zip(own, samples.get(plan.runs_of[label], ())):
            on_dataset = dict(zip(sample.names, 100 * sample.metrics[:, 0]))
            metrics[run.folder] |= {name: float(on_dataset[name]) for name in bins if not math.isnan(on_dataset[name])}
    compared = [(label, plan.reference(label)) for label in plan.configs]
    references = {reference for label, reference in compared if reference != label}
    rows = []
    for row in plan.table.rows:
        summary: Tree = {
            "label": row.label,
            "cited": row.is_only_cited,
            "published": dict(row.published),
            "published_difference": published_differences(plan.table, row),
            "params_M": row.params_M,
            "time_ms": row.time_ms,
            "split": row.split or plan.table.split,
            "note": row.note,
        }
        if not row.is_only_cited:
            own, same, weights = finished[row.label], plan.runs_of[row.label], plan.weights_of[row.label]
            summary |= {
                "base": row.base or plan.table.base,
                "overrides": [*plan.table.overrides, *row.overrides],
                "same_as": None if same == row.label else same,
                "weights_of": None if weights == same else weights,
                "reference": plan.reference(row.label),
                "runs": [_describe_run(run, states[run.folder], metrics) for run in runs[row.label]],
                "measured": _average_over_seeds([metrics[run.folder] for run in own], (*METRICS, *bins)),
                "noise": _describe_noise(plan, row.label, samples),
                "cost": {**costs[row.label], "prediction": speeds.get(same), "training": _average_speed(own)},
            }
            summary |= _compute_differences(plan, row.label, finished, metrics, samples, bins)
            sizes = conclude_sizes(summary, list_sizes(plan.table.metric, bins))
            conclusion = draw_conclusion(summary, plan.table.metric, plan.runs_of, references)
            summary["conclusion"] = f"{conclusion} {sizes}".strip()
        rows.append(summary)
    table = _describe_table(plan) | {"resamples": resamples, "level": LEVEL, "size_bins": list(bins)}
    return table | {"rows": rows}


def published_differences(table: Table, row: Row) -> Tree:
    """Return the published differences of a row to its reference, in percent.

    A difference is as the paper prints it, or that of the two published metrics if both rows have the same split. A
    cited row is only compared with a reference of its own.
    """
    reference = row.reference or (
        None if row.cited else table.reference or next((other.label for other in table.rows if not other.cited), None)
    )
    split = row.split or table.split
    same_split = (other for other in table.rows if other is not row and (other.split or table.split) == split)
    base: Mapping[str, float] = next((other.published for other in same_split if other.label == reference), {})
    known = {name: round(value - base[name], 6) for name, value in row.published.items() if name in base}
    return known | {name.removeprefix(DELTA): value for name, value in row.published.items() if name.startswith(DELTA)}


def _read_metrics(run: Run, plan: Plan) -> Tree:
    """Read the metrics of a finished run in percent; compute VOC's from stored results if the table needs them."""
    metrics = read_json(run.folder / "metrics.json")
    assert metrics is not None, "a finished run has them"
    if plan.table.metric.startswith("VOC_") and plan.table.metric not in metrics:
        stored = evaluation.load_results(run.folder / BOXES, plan.val)
        metrics["VOC_AP"] = evaluation.evaluate_voc(plan.val, stored)["mAP"]
        metrics["VOC_AP_11_point"] = evaluation.evaluate_voc(plan.val, stored, points=11)["mAP"]
    return {
        name: 100 * value
        for name, value in metrics.items()
        if name in METRICS and value is not None and not math.isnan(value)
    }


def _describe_run(run: Run, state: State, metrics: Mapping[Path, Tree]) -> Tree:
    about = read_json(run.folder / "run.json") or {}
    failed = read_json((run.weights_from or run.folder) / FAILED) or {}
    times = read_json(run.folder / TIMES) or {}
    # An older record of a resumed run has its last session only.
    seconds = None if times.get("resumed") and "sessions" not in times else times.get("seconds")
    return {
        "seed": run.seed,
        "state": state,
        "folder": str(run.folder),
        "metrics": metrics.get(run.folder),
        "seconds": seconds,
        "device": about.get("device"),
        "versions": about.get("versions"),
        "reason": failed.get("reason"),
    }


def _average_over_seeds(runs: Sequence[Tree], names: Sequence[str]) -> Tree | None:
    """Average every metric that all runs have."""
    if not runs:
        return None
    measured = {}
    for name in names:
        if all(name in run for run in runs):
            values = [run[name] for run in runs]
            mean, low, high = evaluation.compute_seed_interval(values)
            measured[name] = {"mean": mean, "low": _none_if_nan(low), "high": _none_if_nan(high), "values": values}
    return measured


def _average_speed(runs: Sequence[Run]) -> Tree | None:
    """Average the training speed of runs, with the devices that they were trained on."""
    folders = [run.weights_from or run.folder for run in runs]
    speeds = [speed for folder in folders if (speed := read_training_speed(folder)) is not None]
    if not speeds:
        return None
    devices = dict.fromkeys(
        str((read_json(folder / "run.json") or {}).get("device") or "an unknown device") for folder in folders
    )
    return {"images_per_second": sum(speeds) / len(speeds), "device": "; ".join(devices)}


def resample_runs(
    plan: Plan, finished: Mapping[str, Sequence[Run]], resamples: int
) -> dict[str, list[bootstrap.ResampledMetrics]]:
    """Compute the metrics of finished runs on the same resamples of the images, by the row that has the runs."""
    wanted = {plan.runs_of[label]: runs for label, runs in finished.items() if runs}
    weights = bootstrap.draw_image_weights(len(plan.val), resamples, 0)
    masks = plan.table.metric.startswith("mask_")

    def resample(runs: Sequence[Run]) -> list[bootstrap.ResampledMetrics]:
        stored = (evaluation.load_results(run.folder / (MASKS if masks else BOXES), plan.val) for run in runs)
        kind: Literal["bbox", "segm"] = "segm" if masks else "bbox"
        return [bootstrap.resample_metrics(plan.val, one, weights, kind, plan.size_bins) for one in stored]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(resample, wanted.values())))


def _describe_noise(plan: Plan, label: str, samples: Mapping[str, Sequence[bootstrap.ResampledMetrics]]) -> Tree | None:
    """Describe the noise of the table's metric in a row, and the power with the fewest seeds of the compared rows."""
    own = samples.get(plan.runs_of[label], ())
    if len(own) < 2 or plan.table.metric not in RESAMPLED:
        return None
    noise = power.measure_noise(own, plan.table.metric.removeprefix("mask_"))
    pairs = [(other, plan.reference(other)) for other in plan.runs_of]
    compared = {plan.runs_of[name] for pair in pairs if label in pair for name in pair if name is not None}
    seeds = min(len(samples[same]) for same in compared if same in samples)
    return None if noise is None else power.describe_power(noise, seeds)


def _compute_differences(
    plan: Plan,
    label: str,
    finished: Mapping[str, Sequence[Run]],
    metrics: Mapping[Path, Tree],
    samples: Mapping[str, Sequence[bootstrap.ResampledMetrics]],
    bins: Sequence[str],
) -> Tree:
    """Compute the differences of a row to its reference by metric and by class; None without such runs.

    Rows with the same weights are compared seed by seed, on the seeds that both have.
    """
    pair = _measured_pair(plan, label, finished)
    if not pair:
        return {"difference": None, "classes": None}
    common = set.intersection(*({run.seed for run in finished[name]} for name in pair))
    paired = bool(common) and len({plan.weights_of[name] for name in pair}) == 1
    runs = [
        [both for both in zip(finished[name], samples[plan.runs_of[name]]) if not paired or both[0].seed in common]
        for name in pair
    ]
    reference, row = (bootstrap.average_runs([sample for _, sample in side]) for side in runs)
    over_images = bootstrap.compute_difference(reference, row, plan.val.names)
    sides = [[metrics[run.folder] for run, _ in side] for side in runs]
    changes = {}
    for name in compared_metrics(plan.table.metric, bins):
        over_seeds = _compute_over_seeds(name, sides, paired)
        change: Tree = {"value": _none_if_nan(over_seeds.value), "over_images": None}
        if (resampled := over_images.get(name.removeprefix("mask_"))) is not None:
            change = _image_interval(resampled)
        changes[name] = change | {"over_seeds": _interval_or_none(over_seeds.low, over_seeds.high, 1)}
    return {
        "difference": changes,
        "classes": [{"name": row["name"]} | _image_interval(row) for row in over_images["classes"]],
    }


def _compute_over_seeds(name: str, sides: Sequence[Sequence[Tree]], paired: bool) -> ConfidenceInterval:
    """Compute the difference of a metric with its interval over seeds; NaN where a side lacks the metric."""
    if paired:
        sides = list(zip(*(pair for pair in zip(*sides) if all(name in run for run in pair)))) or [(), ()]
    values = [[run[name] for run in side if name in run] for side in sides]
    if not all(values):
        return ConfidenceInterval(math.nan, math.nan, math.nan)
    return evaluation.compute_seed_difference(*values, paired=paired)


def _measured_pair(plan: Plan, label: str, finished: Mapping[str, Sequence[Run]]) -> tuple[str, str] | None:
    """Return a row's reference and the row if both are measured and have different runs, else None."""
    base = plan.reference(label)
    if base is None or not finished[base] or not finished[label] or plan.runs_of[label] == plan.runs_of[base]:
        return None
    return base, label


def _image_interval(row: Mapping[str, float]) -> Tree:
    value = _none_if_nan(row["difference"])
    return {
        "value": None if value is None else 100 * value,
        "over_images": _interval_or_none(row["low"], row["high"], 100),
    }


def _interval_or_none(low: float, high: float, scale: float) -> list[float] | None:
    return None if math.isnan(low) or math.isnan(high) else [scale * low, scale * high]


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _describe_table(plan: Plan) -> Tree:
    """Describe the table, the data and the commands."""
    table = plan.table
    commands = (read_json(plan.out / MARKER) or {}).get("commands", [])
    splits = {"train": next(iter(plan.data.values()))[0], "val": plan.val}
    return {
        "table": Path(table.source).name,
        "title": table.title,
        "paper": table.paper,
        "note": table.note,
        "metric": table.metric,
        "resampled": table.metric in RESAMPLED,
        "best_weights": any(c.train.validate_every < c.train.epochs for c in plan.configs.values()),
        "baseline": plan.baseline,
        "seeds": plan.seeds,
        "overrides": [shorten_path(override) for override in plan.overrides],
        "commands": list(map(list, dict.fromkeys(tuple(map(shorten_path, command)) for command in commands))),
        "data": {
            name: {
                "source": shorten_path(split.source),
                "images": len(split),
                "instances": len(split.labels),
                "fingerprint": split.fingerprint(),
            }
            for name, split in splits.items()
        }
        | {"classes": list(plan.val.names)},
        "unit": "percent",
    }
