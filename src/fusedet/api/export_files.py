"""The files of an export: each is written, compared with PyTorch and described in a report."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusedet import exporters
from fusedet.api import run_dir
from fusedet.api.quantize import CalibrationData, quantize_format
from fusedet.api.timing import Span, time_call
from fusedet.errors import InputError
from fusedet.exporters.metadata import Metadata
from fusedet.exporters.reference import compute_nudged_outputs, compute_outputs
from fusedet.exporters.runtime import Session
from fusedet.exporters.verification import MAX_UNDECIDED, TOLERANCES, Case, compute_similarity
from fusedet.models.detectors import DetectorModule
from fusedet.types import MULTIPLE

EXAMPLES = Path(exporters.__file__).parent


class Reference(NamedTuple):
    """A detector, inputs, and its outputs, with which every file is compared."""

    detector: DetectorModule
    cases: list[Case]
    outputs: list[dict[str, Any]]


class Traced(NamedTuple):
    """A detector's program, the names of its outputs, the smallest side that it takes, and the time of tracing."""

    program: Any
    outputs: list[str]
    smallest: int
    span: Span


def trace_detector(detector: DetectorModule, shapes: exporters.Shapes, raw: bool) -> Traced:
    """Trace a detector, ready for inference, for every format.

    Raises:
        InputError: torch.export cannot trace it.
    """
    with _named("the model cannot be traced by torch.export"):
        (program, outputs, smallest), span = time_call(partial(exporters.trace, detector, shapes, raw))
    return Traced(program, list(outputs), smallest, span)


def write_files(
    detector: DetectorModule,
    traced: Traced,
    shapes: exporters.Shapes,
    metadata: Metadata,
    names: Sequence[str],
    folder: Path,
    calibration: CalibrationData | None = None,
) -> dict[str, Any]:
    """Write all formats, model.json, report.json and the example into a directory.

    Args:
        detector: Ready for inference, on the CPU.
        traced: Its program.
        shapes: The sizes that the files take.
        metadata: Their description.
        names: Names of `exporters.FORMATS`.
        folder: The directory.
        calibration: The data of int8.

    Returns:
        The report.

    Raises:
        InputError: A file cannot be made, or differs from PyTorch.
    """
    program, outputs, _, tracing = traced
    reference = _make_reference(detector, shapes, metadata, "torch" in names)
    report: dict[str, Any] = {"tolerance": None, "formats": {}}
    files = {}
    if calibration is None:
        report["tolerance"] = vars(TOLERANCES[metadata.precision])
        for name in names:
            write = partial(exporters.write_format, name, program, outputs, folder, metadata)
            with _named(f"the model cannot be converted to the format {name}"):
                files[name], span = time_call(write)
            rows = _compare(name, files[name][0], metadata, reference)
            report["formats"][name] = _describe_files(files[name], tracing, span) | {"cases": rows}
    else:
        scratch = folder / "fp32"
        scratch.mkdir()
        plain = metadata.model_copy(update={"precision": "fp32"})
        with _named("the model cannot be converted to ONNX"):
            source = exporters.write_format("onnx", program, outputs, scratch, plain)[0]
        _compare("onnx", source, plain, reference)
        calibration.evaluate_fp32(exporters.open_session("onnx", source, plain), plain)
        report["calibration"] = calibration.describe()
        for name in names:
            quantize = partial(quantize_format, name, source, folder, metadata, calibration)
            with _named(f"the model cannot be quantized for the format {name}"):
                (files[name], price), span = time_call(quantize)
            session = exporters.open_session(name, files[name][0], metadata)
            rows = _measure_similarity(session, files[name][0].name, reference)
            report["formats"][name] = _describe_files(files[name], tracing, span) | price | {"cases": rows}
        shutil.rmtree(scratch)
    exporters.write_description(folder, metadata, files)
    run_dir.write_json(folder / "report.json", report)
    if not metadata.raw:
        script = EXAMPLES / ("example.py" if {"onnx", "openvino"} & set(names) else "example_torch.py")
        shutil.copyfile(script, folder / "example.py")
    return report


def _make_reference(
    detector: DetectorModule, shapes: exporters.Shapes, metadata: Metadata, has_torch: bool
) -> Reference:
    least = metadata.smallest if has_torch else MULTIPLE
    cases = exporters.make_cases(metadata.resize.short, metadata.resize.long, shapes.size, shapes.batch, least)
    expected = [compute_outputs(detector, case, metadata) for case in cases]
    if not metadata.raw and not sum(int(tensors["counts"].sum()) for tensors in expected):
        raise InputError(
            "the model detects nothing in any of the images that are compared, so that nothing could be compared: "
            f"lower test.score={metadata.thresholds.score}, or train longer"
        )
    return Reference(detector, cases, expected)


def _describe_files(files: Sequence[Path], tracing: Span, writing: Span) -> dict[str, Any]:
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    wall, processor = tracing.wall + writing.wall, tracing.processor + writing.processor
    names = [path.name for path in files]
    return {"files": names, "megabytes": megabytes, "seconds": wall, "processor_seconds": processor}


def _compare(name: str, file: Path, metadata: Metadata, reference: Reference) -> list[dict[str, Any]]:
    """Compare a file with PyTorch on every input; a row per input."""
    session, tolerance, rows = exporters.open_session(name, file, metadata), TOLERANCES[metadata.precision], []
    for case, ours in zip(reference.cases, reference.outputs):
        theirs = _run(session, case, file.name)
        nudged = partial(compute_nudged_outputs, reference.detector, case, metadata, tolerance.noise)
        rows.append(exporters.compare_outputs(case, ours, theirs, tolerance, file.name, nudged))
    undecided, count = sum(row.undecided for row in rows), sum(row.detections for row in rows)
    if undecided > MAX_UNDECIDED * count:
        raise InputError(
            f"{file.name} cannot be compared with PyTorch: rounding decides which {undecided} of {count} detections "
            "are kept, so alike are the scores; train longer, or raise test.score; nothing was written"
        )
    return [row.to_dict() for row in rows]


def _measure_similarity(session: Session, source: str, reference: Reference) -> list[dict[str, Any]]:
    """Run an int8 file on every input and say how alike its detections are; a row per input."""
    rows = []
    for case, ours in zip(reference.cases, reference.outputs):
        theirs = _run(session, case, source)
        _check_outputs(ours, theirs, case.name, source)
        row = {"case": case.name, "shape": list(case.images.shape), "detections": int(ours["counts"].sum())}
        rows.append(row | {"similarity": compute_similarity(ours, theirs)})
    return rows


def _check_outputs(ours: Mapping[str, Any], theirs: Mapping[str, Any], case: str, source: str) -> None:
    """Raise InputError where an output is of another shape, not finite, or lies in an image of size 0."""
    for name, values in ours.items():
        if theirs[name].shape != values.shape or not np.isfinite(theirs[name]).all():
            raise InputError(
                f"{source} gives wrong {name} in '{case}', of shape {theirs[name].shape}; nothing was written"
            )
    if case == "no detection" and theirs["counts"].any():
        raise InputError(f"{source} detects something in '{case}'; nothing was written")


def _run(session: Session, case: Case, source: str) -> dict[str, Any]:
    with _named(f"{source} fails in '{case.name}'"):
        return session(case.images, case.sizes)


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
