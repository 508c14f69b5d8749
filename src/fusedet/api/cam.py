"""Class activation maps before and after each module, of one run or of two runs side by side."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from rich.console import Group, RenderableType
from torch import Tensor

from fusedet.api import run_dir
from fusedet.api.cam_figures import UNITS, Job, draw_figures, join_captions, map_size, order_rows
from fusedet.api.image_sources import Sources
from fusedet.api.predictor import SETTABLE, Prediction, Predictor, load
from fusedet.api.results import CommandResult, group_lines, list_files
from fusedet.api.settings import Settings, refuse_other_keys, split_overrides, to_overrides
from fusedet.errors import InputError, make_unknown_error
from fusedet.exporters import ExportedDetector, find_export
from fusedet.visualization.activation_maps import PARTS, ActivationMaps, MapRow, compute_activation_maps, resize_map


@dataclass(frozen=True)
class CamResult(CommandResult):
    """Numbers and files of a call of `cam`.

    Attributes:
        images: By image the class, the numbers of each run and the files, as cam.json holds them.
        out: The directory of the files.
        files: The files written, by what they show.
        skipped: Why no map was drawn, by image without a detection.
    """

    images: dict[str, Any]
    out: Path
    files: dict[str, Path]
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the directory, the images and those that were skipped."""
        return {"out": str(self.out), "images": self.images, "skipped": self.skipped}

    def __rich__(self) -> RenderableType:
        skipped = [f"skipped: {reason}" for reason in self.skipped.values()]
        return Group(group_lines([*format_report(self.images), *skipped]), list_files(self.files))


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
        run: A run directory, a checkpoint or a name of published weights.
        sources: Files, directories, globs, and lists of paths (`@FILE`).
        overrides: "key=value" texts for `api.predictor.SETTABLE`, `device` and `out`. `out` is by default cam in the
            run directory.
        beside: A second run.
        class_name: The class, by default that of the best detection of `run` in each image.
        score: The least score of a detection.
        best_only: Whether only the best location of the class is explained, not all locations weighted by score.
        only: Some of `PARTS`.
        trust: Whether the checkpoints' configs may name classes of other packages, whose code then runs.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: A run does not know the class, no image has a detection and no class is given, or no run has a
            part of `only`. An image without a detection is skipped where another has one.
    """
    texts = refuse_other_keys(to_overrides(overrides, settings), *SETTABLE, "device", "out")
    options, of_model = split_overrides(texts, "device", "out")
    images = Sources([str(sources)] if isinstance(sources, (str, Path)) else map(str, sources))
    if not images.arguments:
        raise InputError("which images? Write fusedet cam RUN IMAGE..., files, directories or globs")
    for part in only:
        if part not in PARTS:
            raise make_unknown_error("part", part, PARTS)
    run_dir.check_new_dir(options.out)
    for source in (run, beside):
        if source is not None and find_export(source):
            raise InputError(
                f"{source} is an exported model, whose layers cannot be seen: give the run that it is from"
            )
    runs = {
        source: load(source, *of_model, device=options.device, trust=trust)
        for source in dict.fromkeys(str(source) for source in (run, beside) if source is not None)
    }
    for source, predictor in runs.items():
        if class_name is not None and class_name not in predictor.names:
            raise make_unknown_error(f"class of {source}", class_name, predictor.names)
    explained: list[tuple[Path, str, dict[str, Prediction]]] = []
    skipped: dict[str, str] = {}
    for path in images:
        detected = _detect(runs, path, class_name, score)
        if isinstance(detected, str):
            skipped[str(path)] = detected
        else:
            explained.append((path, *detected))
    if not explained:
        first = next(iter(skipped.values()))
        raise InputError(
            first if len(skipped) == 1 else f"none of {len(skipped)} images has a detection, the first: {first}"
        )
    target: Path | None = None
    report: dict[str, Any] = {}
    files: dict[str, Path] = {}
    names: set[str] = set()
    for path, class_of_image, detections in explained:
        # decoded again, since all images would not fit into memory
        job = Job(path, _decode(runs, path), class_of_image, detections)
        seen = {source: compute_maps(predictor, job.image, job.name, best_only) for source, predictor in runs.items()}
        known = [part for part in PARTS if any(part in maps.parts for maps in seen.values())]
        if missing := [part for part in only if part not in known]:
            has = "has" if len(runs) == 1 else "have"
            raise InputError(f"--only {missing[0]}: {' and '.join(runs)} {has} only {', '.join(known)}")
        if target is None:
            target = run_dir.create_run_dir(options.out or run_dir.find_free_path(run_dir.parent_of(run), "cam"))
        name = run_dir.choose_unused_name(path.stem, names.__contains__)
        names.add(name)
        drawn, numbers = draw_figures(job, seen, set(only or PARTS), target / name)
        report[str(job.path)] = {
            "class": job.name,
            **numbers,
            "files": {what: str(file) for what, file in drawn.items()},
        }
        files |= {f"{job.path.name}, {what}": file for what, file in drawn.items()}
    assert target is not None, "no image was given"
    run_dir.write_json(target / "cam.json", report)
    return CamResult(report, target, files | {"report": target / "cam.json"}, skipped)


def format_report(report: Mapping[str, Any]) -> list[str]:
    """Format the share of the heat inside the detected boxes, one line per image, kind of map and row."""
    lines = []
    for path, numbers in report.items():
        runs = numbers["runs"]
        best = ", ".join(f"{source} {own['score']:.2f}" for source, own in runs.items())
        lines.append(f"{path}: {numbers['class']}, highest score {best}")
        lines += [f"  not in {source}: {', '.join(own['missing'])}" for source, own in runs.items() if own["missing"]]
        if numbers["area"] is None:
            continue
        lines.append(f"  heat inside the boxes, which cover {100 * numbers['area']:.0f} % of the image:")
        for kind in UNITS:
            heats = [own["heat"].get(kind, {}) for own in runs.values()]
            for key in order_rows(row for heat in heats for row in heat):
                rows = [heat.get(key) for heat in heats]
                shares = [row["inside"] if row else None for row in rows]
                texts = ["-" if share is None else f"{100 * share:.0f} %" for share in shares]
                caption = join_captions([row and row["caption"] for row in rows])
                lines.append(f"  {kind}, {caption}: {' | '.join(texts)}")
    return lines


def _decode(runs: Mapping[str, Predictor], path: Path) -> Tensor:
    return next(iter(runs.values())).decode_image(path)


def _detect(
    runs: Mapping[str, Predictor], path: Path, name: str | None, score: float
) -> tuple[str, dict[str, Prediction]] | str:
    """Detect the class in an image with each run; by default the class of the first run's best detection.

    Returns:
        The class and each run's detections, without the image; or why no map can be drawn: nothing is detected, and no
        class is given.
    """
    image = _decode(runs, path)
    detections: dict[str, Prediction] = {}
    for source, predictor in runs.items():
        own = predictor.predict(image)
        assert isinstance(own, Prediction)
        if name is None:
            if not len(own) or own.scores[0] < score:
                best = f"the highest score is {own.scores[0]:.2f}" if len(own) else "it detects nothing at all"
                return (
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
            own, boxes=own.boxes[keep], scores=own.scores[keep], labels=own.labels[keep], masks=None, image=None
        )
    assert name is not None
    return name, detections


def compute_maps(predictor: Predictor, image: Tensor, class_name: str, best_only: bool = False) -> ActivationMaps:
    """Compute the maps of a run for an image, resized to `cam_figures.map_size` of it.

    Args:
        predictor: A loaded run, not an exported model.
        image: uint8 (C, H, W).
        class_name: One of the run's classes.
        best_only: As for `cam`.
    """
    batch = replace(predictor.preprocess([image]), tta_batches=())
    label = predictor.names.index(class_name)
    assert not isinstance(predictor.detector, ExportedDetector)
    maps = compute_activation_maps(predictor.detector, batch.to(predictor.device), label, best_only)
    size, shown = (int(batch.sizes[0, 0]), int(batch.sizes[0, 1])), map_size(image)

    def resized(rows: list[MapRow]) -> list[MapRow]:
        return [row._replace(maps={s: resize_map(x, s, size, shown) for s, x in row.maps.items()}) for row in rows]

    return replace(maps, heat={kind: resized(rows) for kind, rows in maps.heat.items()}, gates=resized(maps.gates))
