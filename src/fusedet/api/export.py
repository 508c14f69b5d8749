"""Export of a detector to files that run without fusedet, each compared with PyTorch: the command `export`."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

from rich.console import RenderableType

import fusedet
from fusedet import config as configs
from fusedet import exporters
from fusedet.api import run_dir
from fusedet.api.load_model import build_untrained, rebuild, require_known_source, weights_file
from fusedet.api.predict import SETTABLE, tuned
from fusedet.api.progress import say_nothing
from fusedet.api.results import CommandResult, lines
from fusedet.api.settings import Settings, refuse_other_keys, resolve_config, to_overrides
from fusedet.config import Config
from fusedet.errors import InputError, StorageError, one_of, plural, split_names
from fusedet.exporters.formats import check_packages, package_versions
from fusedet.exporters.graph import smallest_side
from fusedet.exporters.metadata import Licence, Metadata, Resize, Thresholds, hash_file
from fusedet.exporters.reference import compute_nudged_outputs, compute_outputs
from fusedet.exporters.verification import MAX_UNDECIDED, TOLERANCES
from fusedet.models.detectors import DetectorModule
from fusedet.models.roi import MaskBranch
from fusedet.types import MULTIPLE

Precision = Literal["fp32"]
OPSETS = range(18, 24)
EXAMPLES = Path(exporters.__file__).parent


@dataclass(frozen=True)
class ExportResult(CommandResult):
    """Exported files.

    Attributes:
        out: Their directory.
        report: What report.json holds: the tolerance, and per format the files, their size, the seconds that writing
            them took, and a row per compared input.
    """

    out: Path
    report: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the report and the directory."""
        return self.report | {"out": str(self.out)}

    def __rich__(self) -> RenderableType:
        rows = []
        for name, row in self.report["formats"].items():
            cases = row["cases"]
            compared = plural(sum(case["detections"] for case in cases), "detection")
            box, score = (max(case[key] for case in cases) for key in ("box", "score"))
            rows.append(
                f"{name}: {self.out / row['files'][0]}, {row['megabytes']:.1f} MB, equal to PyTorch on "
                f"{plural(len(cases), 'input')} ({compared}): boxes within {box:.2g} pixels, scores within {score:.2g}"
            )
        return lines([*rows, f"report: {self.out / 'report.json'}"])


class _Source(NamedTuple):
    """A detector to export, ready for inference, and what is known about it."""

    detector: DetectorModule
    config: Config
    names: list[str]
    category_ids: list[int]
    file: Path | None


def export(
    source: str | Path,
    *overrides: str,
    formats: str | Iterable[str] = "onnx",
    size: Sequence[int] | None = None,
    dynamic: bool = False,
    batch: int | None = None,
    precision: Precision = "fp32",
    opset: int = 18,
    raw: bool = False,
    trust: bool = False,
    say: Callable[[str], None] = say_nothing,
    **settings: Unpack[Settings],
) -> ExportResult:
    """Export a detector. Each file is compared with PyTorch first; one that differs is not kept.

    >>> fusedet.export("runs/a", formats=["onnx", "openvino"]).out  # doctest: +SKIP

    Args:
        source: A run directory, a checkpoint, or the name of a config, which is exported untrained.
        overrides: "key=value" texts for `test`, `data.size`, `data.antialias` and `out`; of a config, for `model` too.
            `out` is the directory, by default export, export-2, ... in the run directory.
        formats: Names of `fusedet.exporters.FORMATS`, or one text with commas.
        size: Height and width of the input, multiples of 32; images that are larger after the usual resize are resized
            to fit. By default any height and width.
        dynamic: Any height and width, which is the default; not with `size`.
        batch: Images per input; by default 1 with `size`, and otherwise any number.
        precision: Floating-point format of the weights.
        opset: ONNX's operator set.
        raw: Leave out the final selection: boxes and scores of all candidates.
        trust: Whether the checkpoint's config may name classes of other packages, whose code then runs.
        say: Takes warnings.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: A package is missing, a size is no multiple of 32, or a file differs from PyTorch.
        StorageError: A file cannot be written.
    """
    names = _check_formats(formats)
    one_of("precision", precision, Precision)
    if opset not in OPSETS:
        raise InputError(f"opset={opset} must be {OPSETS[0]} to {OPSETS[-1]}")
    shapes = _check_shapes(size, dynamic, batch)
    texts = to_overrides(overrides, settings)
    model, out = _load(source, texts, trust, say)
    run_dir.check_new_dir(out)
    target = Path(out)
    metadata = _describe(model, Path(source).name, shapes, names, precision, opset, raw)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise InputError(f"out={target} cannot be created: {error.strerror}") from error
    try:
        report = _write(model.detector, shapes, metadata, names, scratch)
        if target.is_dir():
            target.rmdir()  # it is empty
        scratch.chmod(0o755)
        scratch.replace(target)
    except OSError as error:
        raise StorageError(f"out={target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return ExportResult(target, report)


def _check_formats(formats: str | Iterable[str]) -> list[str]:
    """Return the formats without duplicates, ONNX before OpenVINO, which is made from it."""
    names = split_names("format", formats, exporters.FORMATS)
    if not names:
        raise InputError(f"formats=[]: name at least one of {', '.join(exporters.FORMATS)}")
    for name in names:
        check_packages(name, exporters.FORMATS[name])
    return names


def _check_shapes(size: Sequence[int] | None, dynamic: bool, batch: int | None) -> exporters.Shapes:
    if batch is not None and batch < 1:
        raise InputError(f"batch={batch} must be at least 1")
    if size is None:
        return exporters.Shapes(None, batch)
    if dynamic:
        raise InputError(f"size={','.join(map(str, size))} is a fixed size: leave it out, or leave out --dynamic")
    return exporters.Shapes(check_size(size), batch or 1)


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """Return height and width of an input; raise InputError unless they are multiples of 32."""
    if len(size) != 2 or min(size) < MULTIPLE or any(side % MULTIPLE for side in size):
        near = [max(1, round(side / MULTIPLE)) * MULTIPLE for side in size]
        raise InputError(
            f"size={','.join(map(str, size))} must be height,width in multiples of {MULTIPLE}, such as "
            + ",".join(map(str, near if len(near) == 2 else (800, 1344)))
        )
    return size[0], size[1]


def _load(
    source: str | Path, texts: Sequence[str], trust: bool, say: Callable[[str], None]
) -> tuple[_Source, str | Path]:
    """Return the detector and the directory to write."""
    if str(source) in configs.names() or Path(source).suffix in (".yaml", ".yml"):
        detector, config, names = build_untrained(source, texts)
        say(f"{source} is a config: its weights are random, not trained")
        model = _Source(tuned(detector, config, names=names), config, names, list(range(len(names))), None)
        return model, config.out or run_dir.find_free_path("exports", Path(source).stem)
    if exporters.find_export(source):
        raise InputError(f"{source} is exported already: give the run that it came from")
    texts = refuse_other_keys(texts, *SETTABLE, "out")
    require_known_source(source)
    file = weights_file(source)
    detector, config, names, ids = rebuild(file, trust)
    config = resolve_config(config.replace(out=None), texts)
    if config.data.channels != 3:
        raise InputError(
            f"{source} takes images of {config.data.channels} channels: exported files take RGB images only"
        )
    out = config.out or run_dir.find_free_path(run_dir.parent_of(source), "export")
    return _Source(tuned(detector, config, names=names), config, names, ids, file), out


def _describe(
    model: _Source,
    name: str,
    shapes: exporters.Shapes,
    names: Sequence[str],
    precision: str,
    opset: int,
    raw: bool,
) -> Metadata:
    detector, config = model.detector, model.config
    branches = [part for part in detector.modules() if isinstance(part, MaskBranch)]
    test, path = config.test, config.data.path
    quality = [] if raw else ["labels", "counts", *(["masks"] if branches else [])]
    return Metadata(
        fusedet=fusedet.__version__,
        name=name,
        names=list(model.names),
        category_ids=list(model.category_ids),
        size=None if shapes.size is None else list(shapes.size),
        batch=shapes.batch,
        multiple=MULTIPLE,
        smallest=smallest_side(detector) if shapes.size is None else MULTIPLE,
        resize=Resize(short=config.data.size[0], long=config.data.size[1], antialias=config.data.antialias),
        thresholds=Thresholds(score=test.score, nms=test.nms, max_det=test.max_det, pre_nms=test.pre_nms),
        strides=list(detector.neck.levels.strides),
        mask_size=branches[0].size if branches and not raw else None,
        precision=precision,
        raw=raw,
        opset=opset,
        outputs=["boxes", "scores", *quality],
        weights_sha256=None if model.file is None else hash_file(model.file),
        training_data=None if path is None or model.file is None else Path(path).name,
        licence=Licence(code="Apache-2.0", weights=None),
        versions=package_versions(names),
        config=config.replace(out=None).tree(),
    )


def _write(
    detector: DetectorModule, shapes: exporters.Shapes, metadata: Metadata, names: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Write all formats into a directory, compare each with PyTorch, and return the report."""
    start = time.perf_counter()
    with _named("the model cannot be traced by torch.export"):
        program, outputs = exporters.trace(detector, shapes, metadata.raw)
    traced = time.perf_counter() - start
    metadata = metadata.model_copy(update={"outputs": list(outputs)})
    least = metadata.smallest if "torch" in names else MULTIPLE
    cases = exporters.make_cases(metadata.resize.short, metadata.resize.long, shapes.size, shapes.batch, least)
    expected = [compute_outputs(detector, case, metadata) for case in cases]
    if not metadata.raw and not sum(int(tensors["counts"].sum()) for tensors in expected):
        raise InputError(
            "the model detects nothing in any of the images that are compared, so that nothing could be compared: "
            f"lower test.score={metadata.thresholds.score:g}, or train longer"
        )
    tolerance = TOLERANCES[metadata.precision]
    formats, files = {}, {}
    for name in names:
        start = time.perf_counter()
        with _named(f"the model cannot be converted to the format {name}"):
            files[name] = exporters.write_format(name, program, outputs, folder, metadata)
        seconds = time.perf_counter() - start + traced
        session = exporters.open_session(name, files[name][0], metadata)
        rows = []
        for case, ours in zip(cases, expected):
            with _named(f"{files[name][0].name} fails in '{case.name}'"):
                theirs = session(case.images, case.sizes)
            nudged = partial(compute_nudged_outputs, detector, case, metadata)
            rows.append(exporters.compare_outputs(case, ours, theirs, tolerance, files[name][0].name, nudged))
        _check_decided(rows, files[name][0].name)
        formats[name] = {
            "files": [path.name for path in files[name]],
            "megabytes": sum(path.stat().st_size for path in files[name]) / 1e6,
            "seconds": seconds,
            "cases": [row.to_dict() for row in rows],
        }
    report = {"tolerance": vars(tolerance), "formats": formats}
    exporters.write_description(folder, metadata, files)
    run_dir.write_json(folder / "report.json", report)
    if not metadata.raw:
        script = EXAMPLES / ("example_torch.py" if names == ["torch"] else "example.py")
        shutil.copyfile(script, folder / "example.py")
    return report


@contextmanager
def _named(failure: str) -> Iterator[None]:
    """Turn what an exporter or a runtime raises into an InputError that begins with `failure`."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        lines_of_error = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{failure}: {lines_of_error[0][:300]}; nothing was written") from error


def _check_decided(rows: Sequence[exporters.Comparison], source: str) -> None:
    """Raise InputError where rounding decides about so many detections that the comparison shows nothing."""
    undecided, count = sum(row.undecided for row in rows), sum(row.detections for row in rows)
    if undecided > MAX_UNDECIDED * count:
        raise InputError(
            f"{source} cannot be compared with PyTorch: rounding decides which {undecided} of {count} detections are "
            "kept, so alike are the scores; train longer, or raise test.score; nothing was written"
        )
