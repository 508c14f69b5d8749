"""Export of a detector to files that run without fusedet, each compared with PyTorch: the command `export`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

from rich.console import Console, RenderableType

import fusedet
from fusedet import exporters
from fusedet.api import run_dir
from fusedet.api.export_files import write_files
from fusedet.api.load_model import build_untrained, is_config, rebuild, require_known_source, weights_file
from fusedet.api.predict import SETTABLE, tuned
from fusedet.api.progress import say_nothing
from fusedet.api.quantize import CalibrationData, read_calibration_data
from fusedet.api.results import CommandResult, lines
from fusedet.api.settings import Settings, refuse_other_keys, resolve_config, to_overrides
from fusedet.config import Config
from fusedet.errors import InputError, StorageError, at_least, one_of, plural, split_names
from fusedet.exporters.formats import AOT, check_compiler, check_packages, package_versions
from fusedet.exporters.graph import smallest_side
from fusedet.exporters.metadata import Licence, Metadata, Resize, Thresholds
from fusedet.exporters.quantization import PACKAGES
from fusedet.exporters.runtime import check_bf16
from fusedet.file_hash import hash_file
from fusedet.interop.published_weights import find_published_weights, is_published_name
from fusedet.models.detectors import DetectorModule
from fusedet.models.roi import MaskBranch
from fusedet.types import MULTIPLE

Precision = Literal["fp32", "fp16", "bf16", "int8"]
FORMATS_OF = {
    "fp32": tuple(exporters.FORMATS),
    "fp16": ("onnx", "openvino"),
    "bf16": ("openvino",),
    "int8": ("onnx", "openvino"),
}
"""The formats of each precision."""
OPSETS = range(18, 24)


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
            if "price" in row:
                rows += self._describe_price(name, row)
                continue
            compared = plural(sum(case["detections"] for case in cases), "detection")
            box, score = (max(case[key] for case in cases) for key in ("box", "score"))
            rows.append(
                f"{name}: {self.out / row['files'][0]}, {row['megabytes']:.1f} MB, equal to PyTorch on "
                f"{plural(len(cases), 'input')} ({compared}): boxes within {box:.2g} pixels, scores within {score:.2g}"
            )
        return lines([*rows, f"report: {self.out / 'report.json'}"])

    def _describe_price(self, name: str, row: dict[str, Any]) -> list[str]:
        """Return what int8 costs, as lines."""
        data, kept = self.report["calibration"], len(row["floating_point"])
        layers = f", {plural(kept, 'convolution')} in floating point" if kept else ""
        interval = f"{100 * data['level']:g} % interval"
        return [
            f"{name}: {self.out / row['files'][0]}, {row['megabytes']:.1f} MB, int8 calibrated on "
            f"{plural(data['images'], 'image')} of {data['split']}{layers}; price on "
            f"{plural(data['val_images'], 'image')} of {data['val']}:",
            *(
                f"  {metric}: {price['a']:.4f} -> {price['b']:.4f}, {price['difference']:+.4f}, {interval} "
                f"{price['low']:+.4f} to {price['high']:+.4f}"
                for metric, price in row["price"].items()
            ),
        ]


class _Source(NamedTuple):
    """A detector to export, ready for inference, and what is known about it."""

    detector: DetectorModule
    config: Config
    names: list[str]
    category_ids: list[int]
    file: Path | None
    licence: str | None = None


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
    aot: bool = False,
    calibrate: bool = False,
    calibration_images: int | None = None,
    max_drop: float | None = None,
    trust: bool = False,
    progress: Console | None = None,
    say: Callable[[str], None] = say_nothing,
    **settings: Unpack[Settings],
) -> ExportResult:
    """Export a detector. Each file is compared with PyTorch first; one that differs is not kept.

    >>> fusedet.export("runs/a", formats=["onnx", "openvino"]).out  # doctest: +SKIP

    Args:
        source: A run directory, a checkpoint, a name of published weights, or the name of a config, which is exported
            untrained.
        overrides: "key=value" texts for `test`, `data.size`, `data.antialias` and `out`; of a config, for `model` too.
            `out` is the directory, by default export, export-2, ... in the run directory. With `calibrate`, all of
            `data`.
        formats: Names of `fusedet.exporters.FORMATS`, or one text with commas.
        size: Height and width of the input, multiples of 32; images that are larger after the usual resize are resized
            to fit. By default any height and width.
        dynamic: Any height and width, which is the default; not with `size`.
        batch: Images per input; by default 1 with `size`, and otherwise any number.
        precision: "fp32"; "fp16", weights in fp16 and computation in fp32; "bf16", OpenVINO's computation in bf16; or
            "int8", convolutions in int8.
        opset: ONNX's operator set.
        raw: Leave out the final selection: boxes and scores of all candidates.
        aot: Compile the format torch for this CPU too, with AOTInductor.
        calibrate: For int8: take the ranges of activations from images of `data.train`, and measure the loss of AP on
            `data.val`.
        calibration_images: How many images, chosen by a fixed seed, by default 300.
        max_drop: The largest loss of AP by int8, in 0..1, by default 0.01. Where it is larger, the most sensitive
            convolutions stay in floating point; where that does not help, nothing is written.
        trust: Whether the checkpoint's config may name classes of other packages, whose code then runs.
        progress: Shows how far the evaluation of int8 is, if it is a terminal.
        say: Takes warnings.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: A package is missing, a size is no multiple of 32, a file differs from PyTorch, or int8 loses more
            AP than `max_drop`.
        StorageError: A file cannot be written.
    """
    one_of("precision", precision, Precision)
    names = _check_formats(formats, precision)
    if aot:
        names = _add_aot(names)
    _check_calibration(precision, calibrate, raw, calibration_images, max_drop)
    if opset not in OPSETS:
        raise InputError(f"opset={opset} must be {OPSETS[0]} to {OPSETS[-1]}")
    shapes = _check_shapes(size, dynamic, batch)
    texts = to_overrides(overrides, settings)
    model, out = _load(source, texts, calibrate, trust, say)
    run_dir.check_new_dir(out)
    target = Path(out)
    data: CalibrationData | None = None
    if calibrate:
        names_of_model, file = model.names, str(model.file or source)
        data = read_calibration_data(model.config, names_of_model, file, calibration_images, max_drop, progress)
    metadata = _describe(model, Path(source).name, shapes, names, precision, opset, raw)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise InputError(f"out={target} cannot be created: {error.strerror}") from error
    try:
        report = write_files(model.detector, shapes, metadata, names, scratch, data)
        if target.is_dir():
            target.rmdir()  # it is empty
        scratch.chmod(0o755)
        scratch.replace(target)
    except OSError as error:
        raise StorageError(f"out={target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return ExportResult(target, report)


def _check_formats(formats: str | Iterable[str], precision: str) -> list[str]:
    """Return the formats without duplicates, ONNX before OpenVINO, which is made from it."""
    names = split_names("format", formats, exporters.FORMATS)
    if not names:
        raise InputError(f"formats=[]: name at least one of {', '.join(exporters.FORMATS)}")
    for name in names:
        if name not in FORMATS_OF[precision]:
            reason = "ONNX Runtime does not compute in bf16 on a CPU; " if (name, precision) == ("onnx", "bf16") else ""
            raise InputError(
                f"precision={precision} does not exist for the format {name}: {reason}it is for "
                f"{' and '.join(FORMATS_OF[precision])}"
            )
        check_packages(name, exporters.FORMATS[name])
        if precision == "int8":
            check_packages(f"{name} in int8", PACKAGES[name])
    if precision == "bf16":
        check_bf16()
    return names


def _add_aot(names: list[str]) -> list[str]:
    if "torch" not in names:
        raise InputError("--aot compiles the format torch: add --format torch, or leave --aot out")
    check_compiler()
    return ["torch", AOT, *names[1:]]


def _check_calibration(precision: str, calibrate: bool, raw: bool, images: int | None, max_drop: float | None) -> None:
    """Check the options of int8."""
    if precision != "int8":
        options = {"--calibrate": calibrate or None, "--calibration-images": images, "--max-drop": max_drop}
        if given := [name for name, value in options.items() if value is not None]:
            raise InputError(f"{given[0]} is for --precision int8, not for {precision}: leave it out")
        return
    if not calibrate:
        raise InputError("precision=int8 needs images to calibrate on: add --calibrate data=PATH")
    if raw:
        raise InputError("--raw leaves out the detections by whose AP int8 is judged: leave out --raw or int8")
    if images is not None:
        at_least(1, calibration_images=images)
    if max_drop is not None and not 0 <= max_drop <= 1:
        raise InputError(f"max_drop={max_drop:g} must be 0 to 1, such as 0.01 for one percent of AP")


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
    source: str | Path, texts: Sequence[str], calibrate: bool, trust: bool, say: Callable[[str], None]
) -> tuple[_Source, str | Path]:
    """Return the detector and the directory to write."""
    if is_config(source):
        detector, config, names = build_untrained(source, texts)
        say(f"{source} is a config: its weights are random, not trained")
        model = _Source(tuned(detector, config, names=names), config, names, list(range(len(names))), None)
        return model, config.out or run_dir.find_free_path("exports", Path(source).stem)
    if exporters.find_export(source):
        raise InputError(f"{source} is exported already: give the run that it came from")
    texts = refuse_other_keys(texts, *SETTABLE, *(["data"] if calibrate else []), "out")
    require_known_source(source)
    file = weights_file(source)
    detector, config, names, ids = rebuild(file, trust)
    config = resolve_config(config.replace(out=None), texts)
    if config.data.channels != 3:
        raise InputError(
            f"{source} takes images of {config.data.channels} channels: exported files take RGB images only"
        )
    out = config.out or run_dir.find_free_path(run_dir.parent_of(source), "export")
    licence = find_published_weights(source).licence if is_published_name(source) else None
    return _Source(tuned(detector, config, names=names), config, names, ids, file, licence), out


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
    packages = [package for name in names for package in exporters.FORMATS.get(name, ())]
    if precision == "int8":
        packages += [package for name in names for package in PACKAGES[name]]
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
        licence=Licence(code="Apache-2.0", weights=model.licence),
        versions=package_versions(packages),
        config=config.replace(out=None).tree(),
    )
