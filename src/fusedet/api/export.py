"""Export of a detector to files that run without fusedet, each compared with PyTorch: the command `export`."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Unpack

from rich.console import Console

import fusedet
from fusedet import exporters
from fusedet.api import run_dir
from fusedet.api.export_files import Traced, trace_detector, write_files
from fusedet.api.export_options import Precision, add_aot, check_calibration, check_formats, check_opset, check_shapes
from fusedet.api.export_result import ExportResult
from fusedet.api.load_model import build_untrained, is_config, rebuild_detector, require_known_source, weights_file
from fusedet.api.predictor import SETTABLE, prepare_detector
from fusedet.api.progress import say_nothing
from fusedet.api.quantize import CalibrationData, read_calibration_data
from fusedet.api.settings import Settings, refuse_other_keys, resolve_config, to_overrides
from fusedet.config import Config
from fusedet.errors import InputError, StorageError, require_choice
from fusedet.exporters.formats import package_versions
from fusedet.exporters.metadata import DESCRIPTION, License, Metadata, Resize, Thresholds
from fusedet.exporters.quantization import PACKAGES
from fusedet.file_hash import hash_file
from fusedet.interop.published_weights import find_published_weights, is_published_name
from fusedet.models.detectors import DetectorModule
from fusedet.models.roi import MaskBranch
from fusedet.types import MULTIPLE


class _Source(NamedTuple):
    """A detector to export, ready for inference, and what is known about it."""

    detector: DetectorModule
    config: Config
    names: list[str]
    category_ids: list[int]
    file: Path | None
    license: str | None = None


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
    require_choice("precision", precision, Precision)
    names = check_formats(formats, precision)
    if aot:
        names = add_aot(names)
    check_calibration(precision, calibrate, raw, calibration_images, max_drop)
    check_opset(opset)
    shapes = check_shapes(size, dynamic, batch)
    texts = to_overrides(overrides, settings)
    model, out = _load(source, texts, calibrate, trust, say)
    run_dir.check_new_dir(out)
    target = Path(out)
    data: CalibrationData | None = None
    if calibrate:
        names_of_model, file = model.names, str(model.file or source)
        data = read_calibration_data(model.config, names_of_model, file, calibration_images, max_drop, progress)
    # a directory that exists may be a link, the current one or a mounted volume, none of which can be replaced
    exists = target.is_dir()
    try:
        parent = target if exists else target.parent
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=parent))
    except OSError as error:
        raise InputError(f"out={target} cannot be created: {error.strerror}") from error
    try:
        traced = trace_detector(model.detector, shapes, raw)
        metadata = _describe(model, traced, Path(source).name, shapes, names, precision, opset, raw)
        report = write_files(model.detector, traced, shapes, metadata, names, scratch, data)
        if exists:
            for path in sorted(scratch.iterdir(), key=lambda path: path.name == DESCRIPTION):  # the description last
                path.replace(target / path.name)
        else:
            scratch.chmod(0o755)
            scratch.replace(target)
    except OSError as error:
        raise StorageError(f"out={target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return ExportResult(target, report)


def _load(
    source: str | Path, texts: Sequence[str], calibrate: bool, trust: bool, say: Callable[[str], None]
) -> tuple[_Source, str | Path]:
    """Return the detector and the directory to write."""
    if is_config(source):
        detector, config, names = build_untrained(source, texts)
        say(f"{source} is a config: its weights are random, not trained")
        model = _Source(prepare_detector(detector, config, names=names), config, names, list(range(len(names))), None)
        return model, config.out or run_dir.find_free_path("exports", Path(source).stem)
    if exporters.find_export(source):
        raise InputError(f"{source} is exported already: give the run that it came from")
    texts = refuse_other_keys(texts, *SETTABLE, *(["data"] if calibrate else []), "out")
    require_known_source(source)
    file = weights_file(source)
    detector, config, names, ids = rebuild_detector(file, trust)
    config = resolve_config(config.replace(out=None), texts)
    if config.data.channels != 3:
        raise InputError(
            f"{source} takes images of {config.data.channels} channels: exported files take RGB images only"
        )
    out = config.out or run_dir.find_free_path(run_dir.parent_of(source), "export")
    license = find_published_weights(source).license if is_published_name(source) else None
    return _Source(prepare_detector(detector, config, names=names), config, names, ids, file, license), out


def _describe(
    model: _Source,
    traced: Traced,
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
        smallest=traced.smallest,
        resize=Resize(short=config.data.size[0], long=config.data.size[1], antialias=config.data.antialias),
        thresholds=Thresholds(score=test.score, nms=test.nms, max_det=test.max_det, pre_nms=test.pre_nms),
        strides=list(detector.neck.levels.strides),
        mask_size=branches[0].size if branches and not raw else None,
        precision=precision,
        raw=raw,
        opset=opset,
        outputs=traced.outputs,
        weights_sha256=None if model.file is None else hash_file(model.file),
        training_data=None if path is None or model.file is None else Path(path).name,
        license=License(code="Apache-2.0", weights=model.license),
        versions=package_versions(packages),
        config=config.replace(out=None).tree(),
    )
