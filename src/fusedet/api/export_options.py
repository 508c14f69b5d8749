"""The options of an export, checked before anything is loaded."""

from collections.abc import Iterable, Sequence
from typing import Literal

from fusedet import exporters
from fusedet.errors import InputError, require_at_least, split_names
from fusedet.exporters.formats import AOT, check_compiler, check_packages
from fusedet.exporters.quantization import PACKAGES
from fusedet.exporters.runtime import check_bf16
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
"""ONNX's operator sets that an export can have."""


def check_formats(formats: str | Iterable[str], precision: str) -> list[str]:
    """Return the formats without duplicates, ONNX before OpenVINO, which is made from it.

    Raises:
        InputError: A format is unknown or does not exist in this precision, a package is not installed, or the CPU does
            not compute in bf16.
    """
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


def add_aot(names: list[str]) -> list[str]:
    """Return the formats with the compiled one after torch.

    Raises:
        InputError: torch is not among the formats, or there is no C++ compiler.
    """
    if "torch" not in names:
        raise InputError("--aot compiles the format torch: add --format torch, or leave --aot out")
    check_compiler()
    return ["torch", AOT, *names[1:]]


def check_calibration(precision: str, calibrate: bool, raw: bool, images: int | None, max_drop: float | None) -> None:
    """Check the options of int8.

    Args:
        precision: Of the exported model.
        calibrate: Whether images to calibrate on are given.
        raw: Whether the model is exported without its selection of detections.
        images: Number of images to calibrate on, at least 1; None for the default.
        max_drop: Largest accepted loss of AP, in 0..1; None for the default.

    Raises:
        InputError: An option of int8 is missing, is out of its range, or has no meaning.
    """
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
        require_at_least(1, calibration_images=images)
    if max_drop is not None and not 0 <= max_drop <= 1:
        raise InputError(f"max_drop={max_drop:g} must be 0 to 1, such as 0.01 for one percent of AP")


def check_opset(opset: int) -> None:
    """Raise InputError for an operator set that is not in `OPSETS`."""
    if opset not in OPSETS:
        raise InputError(f"opset={opset} must be {OPSETS[0]} to {OPSETS[-1]}")


def check_shapes(size: Sequence[int] | None, dynamic: bool, batch: int | None) -> exporters.Shapes:
    """Return the sizes that the files take; raise InputError where the options contradict each other."""
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
