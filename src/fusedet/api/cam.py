"""Class activation maps before and after each module, of one run or of two runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from rich.console import Group, RenderableType
from torch import Tensor

from fusedet import config as configs
from fusedet import visualization
from fusedet.api import run_dir
from fusedet.api.image_sources import Sources
from fusedet.api.predict import SETTABLE, Prediction, Predictor, load
from fusedet.api.results import Result, lines, list_files
from fusedet.api.settings import Settings, refuse_other_keys, to_overrides
from fusedet.data.image_decoding import to_tensor
from fusedet.errors import InputError, unknown
from fusedet.exporters import ExportedDetector, find_export
from fusedet.visualization import heat_maps
from fusedet.visualization.activation_maps import (
    PARTS,
    ROWS,
    ActivationMaps,
    Row,
    compute_activation_maps,
    heat_share_inside,
    resize_map,
)
from fusedet.visualization.annotators import to_pil_image

LONG = 320  # pixels of a map's longer side
UNITS = {
    "classification": "contribution to the class's log-odds, summed over all candidates with their scores as weights",
    "regression": "contribution to how far box sides lie outward, in box sizes, weighted alike",
    "objectness": "contribution to the objectness log-odds, summed over all anchors with their scores as weights",
    "proposals": "contribution to how far proposal sides lie outward, in box sizes, weighted alike",
}


@dataclass(frozen=True)
class CamResult(Result):
    """Numbers and files of a call of `cam`.

    Attributes:
        images: By image the class, the numbers of each run and the files, as cam.json holds them.
        out: The directory of the files.
        files: The files written, by what they show.
    """

    images: dict[str, Any]
    out: Path
    files: dict[str, Path]

    def to_dict(self) -> dict[str, Any]:
        """Return the directory and the images."""
        return {"out": str(self.out), "images": self.images}

    def __rich__(self) -> RenderableType:
        return Group(lines(format_report(self.images)), list_files(self.files))


@dataclass(frozen=True)
class _Job:
    """An image, the class to explain, and each run's detections of it."""

    path: Path
    image: Tensor
    name: str
    detections: dict[str, Prediction]


def cam(
    run: str | Path,
    sources: str | Path | Iterable[str | Path],
    *overrides: str,
    beside: str | Path | None = None,
    class_name: str | None = None,
    score: float = 0.3,
    best_only: bool = False,
    only: Collection[str] = (),
    trust: bool = False,
    **settings: Unpack[Settings],
) -> CamResult:
    """Draw heat maps, gates and level weights of a run, or of two runs in the same colors, on images.

    >>> fusedet.cam("runs/a", "street.jpg", beside="runs/b")  # doctest: +SKIP

    Args:
        run: A run directory or a checkpoint.
        sources: Files, directories, globs, and lists of paths (`@FILE`).
        overrides: "key=value" texts for `api.predict.SETTABLE`, `device` and `out`. `out` is by default cam in the run
            directory.
        beside: A second run.
        class_name: The class, by default that of the best detection of `run` in each image.
        score: The least score of a detection.
        best_only: Whether only the best location of the class is explained, not all locations weighted by score.
        only: Some of `PARTS`.
        trust: Whether the checkpoints' configs may name classes of other packages, whose code then runs.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: A run does not know the class, an image has no detection and no class is given, or no run has a
            part of `only`.
    """
    texts = refuse_other_keys(to_overrides(overrides, settings), *SETTABLE, "device", "out")
    own = [text for text in texts if text.partition("=")[0] in ("device", "out")]
    options = configs.parse(configs.apply_overrides({}, own))
    of_model, out = [text for text in texts if text not in own], options.out
    images = Sources([str(sources)] if isinstance(sources, (str, Path)) else map(str, sources))
    if not images.words:
        raise InputError("which images? Write fusedet cam RUN IMAGE..., files, directories or globs")
    for part in only:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    if out is not None:
        run_dir.check_new_dir(out)  # before the work starts
    for source in (run, beside):
        if source is not None and find_export(source):
            raise InputError(
                f"{source} is an exported model, whose layers cannot be seen: give the run that it is from"
            )
    runs = {
        source: load(source, *of_model, device=options.device, trust=trust)
        for source in dict.fromkeys(str(source) for source in (run, beside) if source)
    }
    for source, predictor in runs.items():
        if class_name is not None and class_name not in predictor.names:
            raise unknown(f"class of {source}", class_name, predictor.names)
    jobs = [_job(runs, path, class_name, score) for path in images]
    target: Path | None = None
    figures: dict[str, Any] = {}
    files: dict[str, Path] = {}
    for job in jobs:
        seen = {source: _compute(predictor, job, best_only) for source, predictor in runs.items()}
        known = [part for part in PARTS if any(part in maps.parts for maps in seen.values())]
        if missing := [part for part in only if part not in known]:
            has = "has" if len(runs) == 1 else "have"
            raise InputError(f"--only {missing[0]}: {' and '.join(runs)} {has} only {', '.join(known)}")
        if target is None:
            target = run_dir.create_run_dir(out) if out else run_dir.create_numbered_dir(run_dir.parent_of(run), "cam")
        drawn, numbers = _draw(job, seen, set(only or PARTS), _stem(target, job.path))
        figures[str(job.path)] = {
            "class": job.name,
            **numbers,
            "files": {what: str(file) for what, file in drawn.items()},
        }
        files |= {f"{job.path.name}, {what}": file for what, file in drawn.items()}
    assert target is not None, "no image was given"
    run_dir.write_json(target / "cam.json", figures)
    return CamResult(figures, target, files | {"figures": target / "cam.json"})


def format_report(figures: Mapping[str, Any]) -> list[str]:
    """Format the share of the heat inside the detected boxes, one line per image, kind of map and row."""
    lines = []
    for path, numbers in figures.items():
        runs = numbers["runs"]
        best = ", ".join(f"{source} {own['score']:.2f}" for source, own in runs.items())
        lines.append(f"{path}: {numbers['class']}, highest score {best}")
        lines += [f"  not in {source}: {', '.join(own['missing'])}" for source, own in runs.items() if own["missing"]]
        if numbers["area"] is None:
            continue
        lines.append(f"  heat inside the boxes, which cover {100 * numbers['area']:.0f} % of the image:")
        for kind in UNITS:
            heats = [own["heat"].get(kind, {}) for own in runs.values()]
            for key in _ordered(row for heat in heats for row in heat):
                rows = [heat.get(key) for heat in heats]
                caption = _caption([row and row["caption"] for row in rows])
                lines.append(f"  {kind}, {caption}: {' | '.join(map(_format_share, rows))}")
    return lines


def _format_share(row: Mapping[str, Any] | None) -> str:
    return "-" if row is None or row["inside"] is None else f"{100 * row['inside']:.0f} %"


def _ordered(keys: Iterable[str]) -> list[str]:
    """The distinct keys of rows, from the backbone to the head."""
    return sorted(set(keys), key=lambda key: (ROWS.index(key.partition(" #")[0]), key))


def _caption(own: Sequence[str | None]) -> str:
    """One caption for a row from those of the runs; None for a run without the row."""
    known = {text: letter for letter, text in zip("AB", own) if text}
    return next(iter(known)) if len(known) == 1 else ", ".join(f"{text} ({letter})" for text, letter in known.items())


def _job(runs: Mapping[str, Predictor], path: Path, name: str | None, score: float) -> _Job:
    """Detect the class in an image with each run; by default the class of the first run's best detection."""
    image = to_tensor(path)
    detections: dict[str, Prediction] = {}
    for source, predictor in runs.items():
        own = predictor.predict(image)
        assert isinstance(own, Prediction)
        if name is None:
            if not len(own) or own.scores[0] < score:
                best = f"the highest score is {own.scores[0]:.2f}" if len(own) else "it detects nothing at all"
                raise InputError(
                    f"{path}: {source} detects nothing with a score of {score:g} or more, {best}: lower --score, or "
                    "name a --class"
                )
            name = own.names[own.labels[0]]
        if name not in own.names:
            raise InputError(
                f"{source} does not know the class '{name}', which was detected in {path}: name a class of both runs "
                "with --class"
            )
        keep = (own.labels == own.names.index(name)) & (own.scores >= score)
        detections[source] = replace(
            own, boxes=own.boxes[keep], scores=own.scores[keep], labels=own.labels[keep], masks=None
        )
    assert name is not None
    return _Job(path, image, name, detections)


def _compute(predictor: Predictor, job: _Job, best_only: bool) -> ActivationMaps:
    """A run's maps for an image, resized to it."""
    batch = replace(predictor.seen([job.image]), views=())
    label = predictor.names.index(job.name)
    assert not isinstance(predictor.detector, ExportedDetector)
    maps = compute_activation_maps(predictor.detector, batch.to(predictor.device), label, best_only)
    size, shown = (int(batch.sizes[0, 0]), int(batch.sizes[0, 1])), _size(job.image)

    def resized(rows: list[Row]) -> list[Row]:
        return [row._replace(maps={s: resize_map(x, s, size, shown) for s, x in row.maps.items()}) for row in rows]

    return replace(maps, heat={kind: resized(rows) for kind, rows in maps.heat.items()}, gates=resized(maps.gates))


def _draw(
    job: _Job, runs: Mapping[str, ActivationMaps], only: set[str], stem: Path
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Write the figures; return the files by what they show, and the numbers."""
    heat = {
        kind: {source: [row for row in own.heat.get(kind, []) if row.part in only] for source, own in runs.items()}
        for kind in UNITS
    }
    gates = {source: [row for row in own.gates if row.part in only] for source, own in runs.items()}
    weights = {source: own.level_weights if "smsl" in only else [] for source, own in runs.items()}
    boxes = next(iter(job.detections.values())).boxes * (LONG / max(job.image.shape[1:]))  # of the first run, for both
    numbers: dict[str, Any] = {
        "area": heat_share_inside(torch.zeros(_size(job.image)), boxes)[1] if len(boxes) else None,
        "runs": {},
    }
    for source, own in runs.items():
        numbers["runs"][source] = run_dir.to_plain(
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


def _sheet(job: _Job, runs: Mapping[str, list[Row]], path: Path, title: str, unit: str, is_heat: bool) -> None:
    """Draw one figure: rows from the backbone to the head, a block of columns per run."""
    own = [{row.key: row.caption for row in rows} for rows in runs.values()]
    captions = {key: _caption([row.get(key) for row in own]) for key in _ordered(key for row in own for key in row)}
    strides = sorted({s for rows in runs.values() for row in rows for s in row.maps})
    panels = []
    height, width = _size(job.image)
    plain = to_pil_image(job.image).resize((width, height), Image.Resampling.LANCZOS)
    image, scale = to_tensor(plain), LONG / max(job.image.shape[1:])
    for (source, rows), letter in zip(runs.items(), "AB"):
        if not rows:
            continue
        columns = {row.key: {f"stride {s}": x.numpy() for s, x in row.maps.items()} for row in rows}
        if is_heat:
            columns = {row.key: {"all levels": _sum_of_levels(row).numpy()} | columns[row.key] for row in rows}
        detections = job.detections[source]
        marked = visualization.draw_boxes(image, detections.boxes * scale, detections.labels, detections.names)
        panels.append(heat_maps.Panel(f"{letter}: {source}" if len(runs) > 1 else source, marked, columns))
    names = [*(["all levels"] if is_heat else []), *(f"stride {s}" for s in strides)]
    heat_maps.draw_maps(plain, panels, captions, names, path, title, unit, None if is_heat else 1.0)


def _numbers(row: Row, boxes: Tensor) -> dict[str, Any]:
    """A row's peak per level, and the share of its heat inside the boxes, of all levels together."""
    inside = heat_share_inside(_sum_of_levels(row), boxes)[0] if len(boxes) else None
    return {"caption": row.caption, "peak": _per_level(row, Tensor.max), "inside": inside}


def _per_level(row: Row, statistic: Callable[[Tensor], Tensor]) -> dict[int, float]:
    """A statistic of every level's map, by its stride."""
    return {stride: float(statistic(x)) for stride, x in row.maps.items()}


def _sum_of_levels(row: Row) -> Tensor:
    return torch.stack(list(row.maps.values())).sum(dim=0)


def _size(image: Tensor) -> tuple[int, int]:
    """Height and width of an image's maps."""
    height, width = image.shape[1:]
    return max(1, round(height * LONG / max(height, width))), max(1, round(width * LONG / max(height, width)))


def _stem(target: Path, path: Path) -> Path:
    """A file name prefix that no other image has; two images may have the same name."""
    names = (path.stem if i == 1 else f"{path.stem}-{i}" for i in range(1, 1_000_000))
    return next(target / name for name in names if not list(target.glob(f"{name}-[a-z]*.png")))
