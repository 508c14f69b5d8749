"""Convert MMDetection's HRFPN, NAS-FPN, DyHead and dilated encoder."""

from collections.abc import Callable
from typing import Any

from fusedet.errors import InputError
from fusedet.interop.mmdetection.config_reader import ConfigReader

Tree = dict[str, Any]
_MAX_BLOCKS = 100
"""Most blocks of a neck; it bounds the size of the model that an untrusted config builds."""


def convert_dyhead(reader: ConfigReader) -> Tree:
    """Convert a DyHead, which refines the pyramid of the neck before it.

    Raises:
        InputError: An option of the module is not supported.
    """
    width = reader.get_int("in_channels", 256)
    reader.require_value("out_channels", width)
    reader.get("zero_init_offset")  # matters before the first step only
    options: Tree = {"type": "dyhead", "blocks": reader.get_int("num_blocks", 6, 1, _MAX_BLOCKS)}
    reader.note_unread("out_channels")
    return options


def _convert_nas_fpn(reader: ConfigReader) -> tuple[Any, Tree]:
    reader.require_norm("norm_cfg", None, "BN")
    reader.require_value("end_level", -1)
    reader.require_value("num_outs", 5)
    finest = 2 + reader.get_int("start_level", 0, 0, 3)
    pyramid = {"channels": reader.get_int("out_channels", 256), "finest": finest, "coarsest": finest + 4}
    neck = {"type": "nas_fpn", "repeats": reader.get_int("stack_times", 7, 1, _MAX_BLOCKS)}
    reader.note_unread()
    return neck, pyramid


def _convert_dilated_encoder(reader: ConfigReader) -> tuple[Any, Tree]:
    channels, middle = reader.get_int("out_channels", 512, 1), reader.get_int("block_mid_channels", 128, 1)
    dilations = reader.get_typed("block_dilations", list[int], [2, 4, 6, 8])
    if channels % middle:
        raise InputError(f"MMDetection's {reader.path}.block_mid_channels={middle} must divide out_channels={channels}")
    reader.require_value("num_residual_blocks", len(dilations))
    neck = {"type": "dilated_encoder", "dilations": dilations, "reduction": channels // middle}
    reader.note_unread()
    return neck, {"channels": channels, "finest": 5, "coarsest": 5}


def _convert_hrfpn(reader: ConfigReader) -> tuple[Any, Tree]:
    reader.require_value("pooling_type", "AVG")
    reader.require_norm("norm_cfg", None, None)
    first = 2 if reader.require_value("stride", 1, 2) == 1 else 3
    last = first + reader.get_int("num_outs", 5, 4, 16) - 1
    reader.note_unread()
    return "hrfpn", {"channels": reader.get_int("out_channels", 256), "finest": first, "coarsest": last}


NECK_CONVERTERS: dict[str, Callable[[ConfigReader], tuple[Any, Tree]]] = {
    "HRFPN": _convert_hrfpn,
    "NASFPN": _convert_nas_fpn,
    "DilatedEncoder": _convert_dilated_encoder,
}
"""Conversion to `model.neck` and `model.pyramid` of each neck that makes a pyramid of its own kind."""
