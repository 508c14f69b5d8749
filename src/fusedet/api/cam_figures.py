"""Figures and numbers of activation maps, of one run or of two side by side."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fusedet import visualization
from fusedet.api.prediction import Prediction
from fusedet.api.run_dir import to_plain
from fusedet.data.image_decoding import to_tensor
from fusedet.visualization import heat_maps
from fusedet.visualization.activation_maps import ROWS, ActivationMaps, MapRow, heat_share_inside
from fusedet.visualization.annotators import to_pil_image

LONG = 320  # pixels of a map's longer side
UNITS = {
    "classification": "contribution to the class's log-odds, summed over all candidates with their scores as weights",
    "regression": "contribution to how far box sides lie outward, in box sizes, weighted alike",
    "objectness": "contribution to the objectness log-odds, summed over all anchors with their scores as weights",
    "proposals": "contribution to how far proposal sides lie outward, in box sizes, weighted alike",
}


@dataclass(frozen=True)
class Job:
    """An image, the class to explain, and each run's detections of it."""

    path: Path
    image: Tensor
    name: str
    detections: dict[str, Prediction]


def draw_figures(
    job: Job, runs: Mapping[str, ActivationMaps], only: set[str], stem: Path
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Write the heat maps, gates and level weights of one or two runs as figures.

    Args:
        job: The image, the class and the detections.
        runs: Maps of each run, by the name that captions show.
        only: Names of the parts to show, such as "smsl".
        stem: Path of the files, without "-KIND.png".

    Returns:
        The files by what they show, and the numbers behind them, as JSON holds them: the share of the image that the
        boxes cover, and per run the score, the heat of each row, the mean gates and level weights.
    """
    heat = {
        kind: {source: [row for row in own.heat.get(kind, []) if row.part in only] for source, own in runs.items()}
        for kind in UNITS
    }
    gates = {source: [row for row in own.gates if row.part in only] for source, own in runs.items()}
    weights = {source: own.level_weights if "smsl" in only else [] for source, own in runs.items()}
    boxes = next(iter(job.detections.values())).boxes * (LONG / max(job.image.shape[1:]))  # of the first run, for both
    numbers: dict[str, Any] = {
        "area": heat_share_inside(torch.zeros(map_size(job.image)), boxes)[1] if len(boxes) else None,
        "runs": {},
    }
    for source, own in runs.items():
        numbers["runs"][source] = to_plain(
            {
                "score": own.score,
                "heat": {kind: {row.key: _numbers(row, boxes) for row in heat[kind][source]} for kind in own.heat},
                "gates": {
                    row.key: {"caption": row.caption, "mean": _per_level(row, Tensor.mean)} for row in gates[source]
                },
                "level_weights": [{"strides": w.strides, "weights": w.weights.mean(dim=2)} for w in weights[source]],
                "missing": own.missing,
            }
        )
    files: dict[str, Path] = {}
    for kind, unit in UNITS.items():
        if any(heat[kind].values()):
            files[kind] = Path(f"{stem}-{kind}.png")
            _sheet(job, heat[kind], files[kind], f"{kind}: {job.name} in {job.path.name}", f"{unit}, per pixel", True)
    if any(gates.values()):
        files["gates"] = Path(f"{stem}-gates.png")
        _sheet(job, gates, files["gates"], f"gates: {job.path.name}", "mean over the channels", False)
    if any(weights.values()):
        files["level weights"] = Path(f"{stem}-smsl.png")
        panels = [
            heat_maps.WeightPanel(
                source,
                [f"stride {s}" for s in w.strides],
                w.weights.mean(dim=2).numpy(),
                w.weights.quantile(torch.tensor([0.1, 0.9]), dim=2).numpy(),
            )
            for source, own_weights in weights.items()
            for w in own_weights
        ]
        title = f"SMSL's weights in {job.path.name}: mean over the channels, and the range of the middle 80 %"
        heat_maps.draw_level_weights(panels, files["level weights"], title)
    return files, numbers


def _sheet(job: Job, runs: Mapping[str, list[MapRow]], path: Path, title: str, unit: str, is_heat: bool) -> None:
    """Draw one figure: rows from the backbone to the head, a block of columns per run."""
    own = [{row.key: row.caption for row in rows} for rows in runs.values()]
    captions = {
        key: join_captions([row.get(key) for row in own]) for key in order_rows(key for row in own for key in row)
    }
    strides = sorted({s for rows in runs.values() for row in rows for s in row.maps})
    panels = []
    height, width = map_size(job.image)
    plain = to_pil_image(job.image).resize((width, height), Image.Resampling.LANCZOS)
    image, scale = to_tensor(plain), LONG / max(job.image.shape[1:])
    for (source, rows), letter in zip(runs.items(), "AB"):
        if not rows:
            continue
        columns = {row.key: {f"stride {s}": x.numpy() for s, x in row.maps.items()} for row in rows}
        if is_heat:
            columns = {row.key: {"all levels": sum_levels(row).numpy()} | columns[row.key] for row in rows}
        detections = job.detections[source]
        marked = visualization.draw_boxes(image, detections.boxes * scale, detections.labels, detections.names)
        panels.append(heat_maps.Panel(f"{letter}: {source}" if len(runs) > 1 else source, marked, columns))
    names = [*(["all levels"] if is_heat else []), *(f"stride {s}" for s in strides)]
    heat_maps.draw_maps(plain, panels, captions, names, path, title, unit, None if is_heat else 1.0)


def _numbers(row: MapRow, boxes: Tensor) -> dict[str, Any]:
    """Compute a row's peak per level, and the share of its heat inside the boxes, of all levels together."""
    inside = heat_share_inside(sum_levels(row), boxes)[0] if len(boxes) else None
    return {"caption": row.caption, "peak": _per_level(row, Tensor.max), "inside": inside}


def _per_level(row: MapRow, statistic: Callable[[Tensor], Tensor]) -> dict[int, float]:
    """Compute a statistic of every level's map, by its stride."""
    return {stride: float(statistic(x)) for stride, x in row.maps.items()}


def sum_levels(row: MapRow) -> Tensor:
    """Add the maps of all levels, (h, w)."""
    return torch.stack(list(row.maps.values())).sum(dim=0)


def map_size(image: Tensor) -> tuple[int, int]:
    """Return height and width of an image's maps."""
    height, width = image.shape[1:]
    return max(1, round(height * LONG / max(height, width))), max(1, round(width * LONG / max(height, width)))


def order_rows(keys: Iterable[str]) -> list[str]:
    """List the distinct keys of rows, from the backbone to the head."""
    return sorted(set(keys), key=lambda key: (ROWS.index(key.partition(" #")[0]), key))


def join_captions(captions: Sequence[str | None]) -> str:
    """Join the captions of a row from those of the runs; None for a run without the row."""
    known = {text: letter for letter, text in zip("AB", captions) if text}
    return next(iter(known)) if len(known) == 1 else ", ".join(f"{text} ({letter})" for text, letter in known.items())
