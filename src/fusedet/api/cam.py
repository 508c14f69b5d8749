"""Heat maps of what a run's features speak for, before and after each module, of one run or of two side by side."""

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
from fusedet.visualization import heat_maps
from fusedet.visualization.activation_maps import PARTS, ROWS, Row, Seen, look, share_inside, spread
from fusedet.visualization.annotators import canvas

LONG = 320  # pixels of a map's longer side
UNITS = {
    "classification": "what the features add to the class's log-odds, summed over all places with their scores as weights, per pixel",
    "regression": "what the features add to how far the boxes' sides lie outward, in box sizes, weighted alike, per pixel",
    "objectness": "what the features add to the log-odds of an object, summed over all anchors with their scores as weights, per pixel",
    "proposals": "what the features add to how far the proposals' sides lie outward, in box sizes, weighted alike, per pixel",
}


@dataclass(frozen=True)
class CamResult(Result):
    """The written heat maps.

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
        return Group(lines(report(self.images)), list_files(self.files))


@dataclass(frozen=True)
class Job:
    """An image, the class that is asked about, and what each run finds there of it."""

    path: Path
    image: Tensor
    name: str
    found: dict[str, Prediction]


def cam(
    run: str | Path,
    sources: str | Path | Iterable[str | Path],
    *overrides: str,
    beside: str | Path | None = None,
    class_name: str | None = None,
    score: float = 0.3,
    best: bool = False,
    only: Collection[str] = (),
    trust: bool = False,
    **settings: Unpack[Settings],
) -> CamResult:
    """Draw heat maps, gates and level weights of a run, or of two runs in the same colours, on images.

    >>> fusedet.cam("runs/a", "street.jpg", beside="runs/b")  # doctest: +SKIP

    Args:
        run: A run directory or a checkpoint.
        sources: Files, directories, globs, and lists of paths (`@FILE`).
        overrides: "key=value" texts for `api.predict.SETTABLE`, `device` and `out`. `out` is by default cam in the run directory.
        beside: A second run.
        class_name: The class, by default that of the best detection of `run` in each image.
        score: The least score of a detection.
        best: Whether only the best location of the class is explained, not all locations weighted by score.
        only: Some of `PARTS`.
        trust: Whether the checkpoints' configs may name classes of other packages, whose code then runs.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: A run does not know the class, an image has no detection and no class is named, or no run has a part.
    """
    texts = refuse_other_keys(to_overrides(overrides, settings), *SETTABLE, "device", "out")
    own = [text for text in texts if text.partition("=")[0] in ("device", "out")]
    options = configs.parse(configs.overridden({}, own))
    of_model, out = [text for text in texts if text not in own], options.out
    images = Sources([str(sources)] if isinstance(sources, (str, Path)) else map(str, sources))
    for part in only:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    if out is not None:
        run_dir.check(out)  # before the work, not after it
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
        seen = {source: _look(predictor, job, best) for source, predictor in runs.items()}
        has = [part for part in PARTS if any(part in one.parts for one in seen.values())]
        if lacking := [part for part in only if part not in has]:
            raise InputError(
                f"--only {lacking[0]}: {' and '.join(runs)} {'has' if len(runs) == 1 else 'have'} only {', '.join(has)}"
            )
        if target is None:
            target = run_dir.fresh(out) if out else run_dir.numbered(run_dir.parent_of(run), "cam")
        drawn, numbers = _draw(job, seen, set(only or PARTS), _stem(target, job.path))
        figures[str(job.path)] = {
            "class": job.name,
            **numbers,
            "files": {what: str(file) for what, file in drawn.items()},
        }
        files |= {f"{job.path.name}, {what}": file for what, file in drawn.items()}
    assert target is not None, "there is no image"
    run_dir.write_json(target / "cam.json", figures)
    return CamResult(figures, target, files | {"figures": target / "cam.json"})


def report(figures: Mapping[str, Any]) -> list[str]:
    """How much of the heat lies in the boxes found, in a line for each image, kind of map and row."""
    lines = []
    for path, one in figures.items():
        best = ", ".join(f"{source} {found['score']:.2f}" for source, found in one["runs"].items())
        lines.append(f"{path}: {one['class']}, highest score {best}")
        lines += [
            f"  not in {source}: {', '.join(found['missing'])}"
            for source, found in one["runs"].items()
            if found["missing"]
        ]
        if one["area"] is None:
            continue
        lines.append(f"  heat inside the boxes, which cover {100 * one['area']:.0f} % of the image:")
        heats = [found["heat"] for found in one["runs"].values()]
        for kind in UNITS:
            for key in _ordered(row for found in heats for row in found.get(kind, {})):
                values = [found.get(kind, {}).get(key) for found in heats]
                shares = [
                    "-" if value is None or value["inside"] is None else f"{100 * value['inside']:.0f} %"
                    for value in values
                ]
                lines.append(
                    f"  {kind}, {_caption([value and value['caption'] for value in values])}: {' | '.join(shares)}"
                )
    return lines


def _ordered(keys: Iterable[str]) -> list[str]:
    """Each key of a row once, from the body to the head."""
    return sorted(set(keys), key=lambda key: (ROWS.index(key.partition(" #")[0]), key))


def _caption(own: Sequence[str | None]) -> str:
    """One caption from those of the runs, None for a run that has no such row."""
    known = {text: letter for letter, text in zip("AB", own) if text}
    return next(iter(known)) if len(known) == 1 else ", ".join(f"{text} ({letter})" for text, letter in known.items())


def _job(runs: Mapping[str, Predictor], path: Path, name: str | None, score: float) -> Job:
    """Raises InputError where no class is named and nothing is found, or one that not all runs know."""
    image = to_tensor(path)
    found: dict[str, Prediction] = {}
    for source, predictor in runs.items():
        one = predictor.predict(image)
        assert isinstance(one, Prediction)
        if name is None:
            if not len(one) or one.scores[0] < score:
                best = f"the highest score is {one.scores[0]:.2f}" if len(one) else "there is no detection at all"
                raise InputError(
                    f"{path}: {source} finds nothing with a score of {score:g} or more, {best}: lower --score, or name a --class"
                )
            name = one.names[one.labels[0]]
        if name not in one.names:
            raise InputError(
                f"{source} does not know the class '{name}', which is found in {path}: name one of both with --class"
            )
        keep = (one.labels == one.names.index(name)) & (one.scores >= score)
        found[source] = replace(
            one, boxes=one.boxes[keep], scores=one.scores[keep], labels=one.labels[keep], masks=None
        )
    assert name is not None
    return Job(path, image, name, found)


def _look(predictor: Predictor, job: Job, alone: bool) -> Seen:
    """What a run shows of an image in the first of its views."""
    batch = replace(predictor.seen([job.image]), views=())
    seen = look(predictor.detector, batch.to(predictor.device), predictor.names.index(job.name), alone)
    size, shown = (int(batch.sizes[0, 0]), int(batch.sizes[0, 1])), _size(job.image)

    def scaled(rows: list[Row]) -> list[Row]:
        return [row._replace(maps={s: spread(one, s, size, shown) for s, one in row.maps.items()}) for row in rows]

    return replace(seen, heat={kind: scaled(rows) for kind, rows in seen.heat.items()}, gates=scaled(seen.gates))


def _draw(job: Job, seen: Mapping[str, Seen], only: set[str], stem: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """The files, by what they show, and the figures."""
    files: dict[str, Path] = {}
    boxes = next(iter(job.found.values())).boxes * (LONG / max(job.image.shape[1:]))  # of the first run, for both
    area = share_inside(torch.zeros(_size(job.image)), boxes)[1] if len(boxes) else None
    numbers: dict[str, Any] = {"area": area, "runs": {}}
    for source, one in seen.items():
        rows = {
            kind: {row.key: _numbers(row, boxes) for row in rows if row.part in only} for kind, rows in one.heat.items()
        }
        gates = {
            row.key: {"caption": row.caption, "mean": _each(row, Tensor.mean)} for row in one.gates if row.part in only
        }
        weights = [
            {"strides": w.strides, "weights": w.weights.mean(dim=2)} for w in one.level_weights if "smsl" in only
        ]
        found = {"score": one.score, "heat": rows, "gates": gates, "level_weights": weights, "missing": one.missing}
        numbers["runs"][source] = run_dir.plain(found)
    for kind in UNITS:
        if any(row.part in only for one in seen.values() for row in one.heat.get(kind, [])):
            files[kind] = Path(f"{stem}-{kind}.png")
            chosen = {
                source: [row for row in one.heat.get(kind, []) if row.part in only] for source, one in seen.items()
            }
            _sheet(job, chosen, files[kind], f"{kind}: {job.name} in {job.path.name}", UNITS[kind], True)
    gates_ = {source: [row for row in one.gates if row.part in only] for source, one in seen.items()}
    if any(gates_.values()):
        files["gates"] = Path(f"{stem}-gates.png")
        _sheet(job, gates_, files["gates"], f"gates: {job.path.name}", "mean over the channels", False)
    mixtures = [(source, w) for source, one in seen.items() for w in one.level_weights if "smsl" in only]
    if mixtures:
        files["level weights"] = Path(f"{stem}-smsl.png")
        spreads = [w.weights.quantile(torch.tensor([0.1, 0.9]), dim=2).numpy() for _, w in mixtures]
        levels = [[f"stride {s}" for s in w.strides] for _, w in mixtures]
        panels = [
            (source, names, w.weights.mean(dim=2).numpy(), ends)
            for (source, w), names, ends in zip(mixtures, levels, spreads)
        ]
        title = f"SMSL's weights in {job.path.name}: mean over the channels, and where 80 % of them lie"
        heat_maps.shares(panels, files["level weights"], title)
    return files, numbers


def _sheet(job: Job, runs: Mapping[str, list[Row]], path: Path, title: str, unit: str, is_heat: bool) -> None:
    """One figure: rows from body to head, a block of columns for each run."""
    own = [{row.key: row.caption for row in rows} for rows in runs.values()]
    captions = {key: _caption([row.get(key) for row in own]) for key in _ordered(key for row in own for key in row)}
    strides = sorted({s for rows in runs.values() for row in rows for s in row.maps})
    panels = []
    height, width = _size(job.image)
    plain = canvas(job.image).resize((width, height), Image.Resampling.LANCZOS)
    image, scale = to_tensor(plain), LONG / max(job.image.shape[1:])
    for (source, rows), letter in zip(runs.items(), "AB"):
        if not rows:
            continue
        columns = {row.key: {f"stride {s}": x.numpy() for s, x in row.maps.items()} for row in rows}
        if is_heat:
            columns = {row.key: {"all levels": _together(row).numpy()} | columns[row.key] for row in rows}
        found = job.found[source]
        marked = visualization.boxes(image, found.boxes * scale, found.labels, found.names)
        panels.append(heat_maps.Panel(f"{letter}: {source}" if len(runs) > 1 else source, marked, columns))
    names = [*(["all levels"] if is_heat else []), *(f"stride {s}" for s in strides)]
    heat_maps.maps(plain, panels, captions, names, path, title, unit, None if is_heat else 1.0)


def _numbers(row: Row, boxes: Tensor) -> dict[str, Any]:
    """A row's peak on each level, and the share of its heat that lies in the boxes, of all levels together."""
    inside = share_inside(_together(row), boxes)[0] if len(boxes) else None
    return {"caption": row.caption, "peak": _each(row, Tensor.max), "inside": inside}


def _each(row: Row, figure: Callable[[Tensor], Tensor]) -> dict[int, float]:
    """A figure of every level's map, by its stride."""
    return {stride: float(figure(x)) for stride, x in row.maps.items()}


def _together(row: Row) -> Tensor:
    """The sum of all levels at every pixel."""
    return torch.stack(list(row.maps.values())).sum(dim=0)


def _size(image: Tensor) -> tuple[int, int]:
    """Height and width of an image's maps."""
    height, width = image.shape[1:]
    return max(1, round(height * LONG / max(height, width))), max(1, round(width * LONG / max(height, width)))


def _stem(target: Path, path: Path) -> Path:
    """A beginning of file names that no other image has: two may share their names."""
    names = (path.stem if i == 1 else f"{path.stem}-{i}" for i in range(1, 1_000_000))
    return next(target / name for name in names if not list(target.glob(f"{name}-[a-z]*.png")))
