"""Windows of images: of TIFF, only the rows, strips or tiles of a window are decoded."""

from typing import Any

from PIL import Image

from fusedet.data.image_opening import ORIENTATION, Range, Source, get_orientation, has_deep_color, open_image
from fusedet.data.tiff_parts import Window, decode_window, read_layout

_BYTES = {"L": 1, "RGB": 3, "RGBA": 4, "I;16": 2, "I;16B": 2}
"""Bytes per pixel of uncompressed rows, by Pillow's raw mode."""


def decodes_windows(source: Source, value_range: Range | None = None, *, exif: bool = True) -> bool:
    """Return whether `read_image` decodes a window of an image without the rest, by the image's header.

    Raises:
        InputError: The header cannot be read.
    """
    with open_image(source) as image:
        if get_orientation(image, exif) != 1 or (value_range is not None and has_deep_color(image)):
            return False
        if _is_raw(image):
            return all(_has_known_rows(part) for part in image.tile)  # type: ignore[attr-defined]
        return _is_upright(image) and read_layout(image) is not None


def _is_upright(image: Image.Image) -> bool:
    """Return whether an image stays as it is stored; else Pillow turns a TIFF while it loads."""
    return bool(Image.Image.getexif(image).get(ORIENTATION, 1) == 1)


def _is_raw(image: Image.Image) -> bool:
    """Return whether an image that is not loaded yet is uncompressed and upright."""
    parts = getattr(image, "tile", [])
    return bool(parts) and _is_upright(image) and all(part[0] == "raw" for part in parts)


def _has_known_rows(part: Any) -> bool:
    """Return whether the rows of an uncompressed strip, as Pillow describes it, can be found in the file."""
    arguments = part[3]
    return isinstance(arguments, tuple) and arguments[0] in _BYTES and arguments[2:] == (1,)


def cut_window(image: Image.Image, window: Window) -> Image.Image:
    """Return a part of an image that is not loaded yet; of TIFF, only its rows, strips or tiles are decoded."""
    layout = read_layout(image) if _is_upright(image) else None
    if layout is not None:
        cut = decode_window(image, layout, window)
        cut.format = image.format
        return cut
    if _is_raw(image):
        left, top, right, bottom = window
        image.tile = [  # type: ignore[attr-defined]
            _take_rows(part, top, bottom)
            for part in image.tile  # type: ignore[attr-defined]
            if part[1][0] < right and part[1][2] > left and part[1][1] < bottom and part[1][3] > top
        ]
    cut = image.crop(window)
    cut.format = image.format  # it decides how 16 bits are read
    return cut


def _take_rows(part: Any, top: int, bottom: int) -> Any:
    """Return the rows top..bottom of an uncompressed strip as Pillow describes it, or all where rows are unknown."""
    codec, (x1, y1, x2, y2), offset, arguments = part
    if not _has_known_rows(part):
        return part
    low, high = max(top, y1), min(bottom, y2)
    row = arguments[1] or (x2 - x1) * _BYTES[arguments[0]]
    own = (codec, (x1, low, x2, high), offset + (low - y1) * row, arguments)
    return part._make(own) if hasattr(part, "_make") else own  # Pillow before 11 has plain tuples
