"""From the sources of a benchmark to its engines: checkpoints, exported models and what cannot run here."""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fusedet
from fusedet import exporters
from fusedet.api.engines import PYTORCH, Task, resize_settings
from fusedet.api.load_model import build_untrained, is_config, rebuild_detector, require_known_source, weights_file
from fusedet.api.progress import say_nothing
from fusedet.api.run_dir import read_json
from fusedet.api.settings import refuse_other_keys, resolve_config
from fusedet.config import Config, parse
from fusedet.data.shape_drawing import draw_image
from fusedet.data.transforms import keep_ratio_size
from fusedet.engine.checkpoint import save_weights
from fusedet.errors import InputError
from fusedet.exporters.formats import check_packages
from fusedet.exporters.runtime import choose_file
from fusedet.file_hash import hash_file
from fusedet.models.profiling import network_size

SETTABLE = ("test.score", "test.nms", "test.max_det", "test.pre_nms")
"""What can be set for a run; of a config, `model` too. Exported files have their thresholds inside."""
Size = tuple[int, int]
MakeTask = Callable[..., Task]


@dataclass(frozen=True)
class Candidate:
    """An engine to measure.

    Attributes:
        model: The source, as the user named it.
        engine: A name of `engines.ENGINES`.
        precision: The floating-point format that it computes in.
        command: The command line of its process; None for an engine that cannot run here.
        reason: Why it cannot.
        megabytes: Size of the model's files, in units of 1e6 bytes.
        ap: AP of these weights in this precision, where it was measured with images of this size and these settings.
    """

    model: str
    engine: str
    precision: str
    command: list[str] | None = None
    reason: str | None = None
    megabytes: float | None = None
    ap: float | None = None


@contextmanager
def plan_engines(
    sources: Sequence[str | Path],
    formats: Sequence[str],
    size: Size | None = None,
    texts: Sequence[str] = (),
    trust: bool = False,
    say: Callable[[str], None] = say_nothing,
) -> Iterator[tuple[list[Candidate], Size]]:
    """List the engines of the sources; the files that they need exist inside the block.

    Args:
        sources: As `fusedet.benchmark` takes them.
        formats: Names of `engines.ENGINES`.
        size: Height and width of the image; None for the largest input of the first source.
        texts: "key=value" settings.
        trust: As `fusedet.load` takes it.
        say: Takes warnings.

    Yields:
        The engines, and the size of the image.

    Raises:
        InputError: A source does not exist or cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="fusedet-benchmark-") as name:
        scratch = Path(name)
        exports = [exporters.find_export(source) for source in sources]
        files = [
            _find_checkpoint(source, texts, scratch / f"{i}.safetensors", say) if export is None else Path(source)
            for i, (source, export) in enumerate(zip(sources, exports))
        ]
        settings = tuple(text for text in texts if not re.match(r"model[.=]", text))
        if all(exports):
            refuse_other_keys(texts, "out", of="exported models")
        # also refuses what is no checkpoint, and wrong settings, before anything is measured
        saved = [
            resolve_config(
                rebuild_detector(file, trust)[1] if export is None else parse(exporters.read_export(export)[0].config),
                settings,
            )
            for file, export in zip(files, exports)
        ]
        size = size or _largest_input(saved[0], exports[0])
        image = draw_scene(size, scratch / "image.jpg")
        task = partial(Task, image=str(image), size=size, threads=torch.get_num_threads())
        candidates: list[Candidate] = []
        for i, (source, file, export, config) in enumerate(zip(map(str, sources), files, exports, saved)):
            is_scored = not settings and _is_as_validated(config, size)
            if export is not None:
                rows = _list_exported(source, file, export, formats, partial(task, settings=(), trust=trust))
                ap = _read_exported_ap(export, config.data.val_split) if is_scored else None
                candidates += [replace(row, ap=ap) for row in rows]
                continue
            ap = _read_ap(Path(source) / "metrics.json") if is_scored else None
            make = partial(task, path=str(file), settings=settings, trust=trust)
            candidates += [
                Candidate(
                    model=source,
                    engine=engine,
                    precision=precision,
                    command=make(engine=engine).command,
                    megabytes=file.stat().st_size / 1e6,
                    ap=ap if precision == "fp32" else None,
                )
                for engine, precision in PYTORCH.items()
                if engine in formats
            ]
            if not any(exports):
                asked = [name for name in formats if name in exporters.FORMATS]
                texts_of_export = [*settings, *resize_settings(size)]
                for engine, result in _export(file, asked, texts_of_export, scratch / str(i), trust).items():
                    if isinstance(result, str):
                        candidates.append(Candidate(source, engine, "fp32", reason=result))
                        continue
                    trusted = partial(task, settings=(), trust=True)
                    rows = _list_exported(source, result, result, [engine], trusted)
                    candidates += [replace(row, ap=ap) for row in rows]
        yield candidates, size


def _find_checkpoint(source: str | Path, texts: Sequence[str], target: Path, say: Callable[[str], None]) -> Path:
    """Return the checkpoint of a source; of a config one with random weights is written to `target`."""
    of = "a benchmark"
    if is_config(source):
        refuse_other_keys(texts, *SETTABLE, "model", of=of)
        detector, config, names = build_untrained(source, texts)
        say(f"{source} is a config: its weights are random, not trained")
        ids = json.dumps(list(range(len(names))))
        meta = {"config": config.to_yaml(), "names": json.dumps(names), "category_ids": ids}
        save_weights(target, detector.state_dict(), meta)
        return target
    refuse_other_keys(texts, *SETTABLE, of=of)
    require_known_source(source)
    return weights_file(source)


def _largest_input(config: Config, export: Path | None) -> Size:
    """Return height and width of the largest input of a model: of a fixed size, that size."""
    fixed = exporters.read_export(export)[0].size if export is not None else None
    return network_size(config.data.size) if fixed is None else (fixed[0], fixed[1])


def _is_as_validated(config: Config, size: Size) -> bool:
    """Return whether an image of that size is predicted as in validation: not resized, not augmented and not tiled."""
    seen, test = network_size(keep_ratio_size(*size, *config.data.size)), config.test
    return seen == size and test.scales is None and not test.flip and test.tiles.size is None


def draw_scene(size: Size, path: Path) -> Path:
    """Write the scene that is predicted, of a height and width, as JPEG; return its path."""
    pixels, _ = draw_image(np.random.default_rng(0), (max(size), max(size)))
    Image.fromarray(pixels[: size[0], : size[1]]).save(path, quality=95)
    return path


def _list_exported(source: str, asked: Path, folder: Path, formats: Sequence[str], task: MakeTask) -> list[Candidate]:
    """List the engines of an exported model: all its formats, or that of the asked file."""
    metadata, files = exporters.read_export(folder)
    names = [name for name in files if name in formats]
    if asked.is_file():
        names = [choose_file(files, asked)[0]]
    return [
        Candidate(
            model=source,
            engine=name,
            precision=metadata.precision,
            command=task(engine=name, path=str(files[name][0])).command,
            megabytes=sum(path.stat().st_size for path in files[name]) / 1e6,
        )
        for name in names
    ]


def _export(
    file: Path, formats: Sequence[str], texts: Sequence[str], target: Path, trust: bool
) -> dict[str, Path | str]:
    """Export a checkpoint with dynamic sizes; return the directory by format, or why it failed.

    All formats are exported at once, or one by one if that fails.
    """
    results: dict[str, Path | str] = {}
    ready: list[str] = []
    for name in formats:
        try:
            check_packages(name, exporters.FORMATS[name])
            ready.append(name)
        except InputError as error:
            results[name] = str(error)
    groups = [ready] if ready else []
    while groups:
        group = groups.pop()
        out = target / "-".join(group)
        try:
            fusedet.export(file, *texts, formats=group, trust=trust, out=out)
            results |= dict.fromkeys(group, out)
        except InputError as error:
            if len(group) == 1:
                results[group[0]] = str(error)
            else:
                groups = [[name] for name in group]
    return {name: results[name] for name in formats}


def _read_exported_ap(folder: Path, split: str) -> float | None:
    """Return the AP of an exported model: of its last `val`, else in fp32 that of the run with the same weights.

    Args:
        folder: The directory of the export.
        split: The run's validation split; a `val` of another split, or of other data than the run's, does not count.
    """
    run = folder.parent / "metrics.json"
    own = re.compile(rf"val-{re.escape(Path(split).stem)}(-\d+)?")
    validations = [
        path
        for path in folder.glob("val-*/metrics.json")
        if own.fullmatch(path.parent.name) and (not run.is_file() or _read_data(path) == _read_data(run))
    ]
    if validations:
        return _read_ap(max(validations, key=lambda path: path.stat().st_mtime))
    metadata, _ = exporters.read_export(folder)
    weights = folder.parent / "best.safetensors"
    if metadata.precision != "fp32" or not weights.is_file() or hash_file(weights) != metadata.weights_sha256:
        return None
    return _read_ap(run)


def _read_data(metrics: Path) -> str | None:
    """Return the fingerprint of the data in a metrics.json; None without the file or without a stamp in it."""
    stamp = (read_json(metrics) or {}).get("stamp")
    return stamp.get("data") if isinstance(stamp, dict) else None


def _read_ap(metrics: Path) -> float | None:
    """Return the AP in a metrics.json; None without the file or without AP in it."""
    ap = (read_json(metrics) or {}).get("AP")
    return float(ap) if isinstance(ap, (int, float)) else None
