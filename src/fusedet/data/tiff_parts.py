"""Compressed TIFF by parts: only the strips or tiles of a window are decompressed."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image, TiffImagePlugin

Window = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of an image in pixels, after EXIF rotation."""
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES = 256, 257, 258, 259, 277
_STRIP_OFFSETS, _STRIP_ROWS, _STRIP_BYTES, _PLANAR = 273, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_COPIED = (_BITS, _COMPRESSION, 262, 266, _SAMPLES, _PLANAR, 317, 338, 339, 347, 530, 532)
"""Tags that say how a part is coded: color space, bit order, predictor, alpha, number format, JPEG's tables, ..."""
_CODECS = {5, 7, 8, 32773, 32946, 50000}
"""LZW, JPEG, deflate, PackBits, deflate's old number, Zstandard."""
_MODES = ("L", "RGB", "RGBA", "I;16", "I;16B")
_MOST = 2**24  # pixels of a part; larger ones save no memory


@dataclass(frozen=True)
class TiffLayout:
    """Where the parts of an image lie in its file.

    Attributes:
        width: Width of a part in pixels.
        height: Height of a part; the last strip is lower.
        offsets: The places of the parts in the file, row by row.
        counts: Their lengths in bytes.
        is_tiled: Whether the parts at the borders are padded to full size.
    """

    width: int
    height: int
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    is_tiled: bool


def read_layout(image: Image.Image) -> TiffLayout | None:
    """Return the layout of a TIFF that is not loaded yet and whose parts can be decompressed alone, else None."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or image.mode not in _MODES:
        return None
    tags = image.tag_v2
    if tags.get(_COMPRESSION) not in _CODECS or tags.get(_PLANAR, 1) != 1:
        return None
    width, height, is_tiled = image.width, tags.get(_STRIP_ROWS, image.height), _TILE_OFFSETS in tags
    if is_tiled:
        width, height = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_HEIGHT, 0)
    height = height if is_tiled else min(height, image.height)
    offsets = tags.get(_TILE_OFFSETS if is_tiled else _STRIP_OFFSETS, ())
    counts = tags.get(_TILE_BYTES if is_tiled else _STRIP_BYTES, ())
    if width < 1 or height < 1 or width * height > _MOST:
        return None
    expected = -(-image.width // width) * -(-image.height // height)
    if not len(offsets) == len(counts) == expected:
        return None
    return TiffLayout(width, height, tuple(offsets), tuple(counts), is_tiled)


def decode_window(image: Any, layout: TiffLayout, window: Window) -> Image.Image:
    """Decompress the parts of a window and join them.

    Args:
        image: The open TIFF, which is not loaded.
        layout: Its layout.
        window: Left, top, right and bottom in pixels.

    Returns:
        The window, in the image's mode.

    Raises:
        OSError: A part is damaged.
    """
    left, top, right, bottom = window
    canvas = Image.new(image.mode, (right - left, bottom - top))
    for number, x, y in _list_parts(image.width, layout, window):
        height = layout.height if layout.is_tiled else min(layout.height, image.height - y)
        image.fp.seek(layout.offsets[number])
        data = image.fp.read(layout.counts[number])
        with Image.open(io.BytesIO(_make_file(image, layout.width, height, data)), formats=["TIFF"]) as part:
            canvas.paste(part, (x - left, y - top))
    return canvas


def _list_parts(width: int, layout: TiffLayout, window: Window) -> Iterator[tuple[int, int, int]]:
    """Yield number, left and top of each part that a window touches."""
    left, top, right, bottom = window
    columns = -(-width // layout.width)
    for row in range(top // layout.height, -(-bottom // layout.height)):
        for column in range(left // layout.width, -(-right // layout.width)):
            yield row * columns + column, column * layout.width, row * layout.height


def _make_file(image: Any, width: int, height: int, data: bytes) -> bytes:
    """Return a TIFF file of one strip, which holds the bytes of a part."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=image.tag_v2.prefix)
    for tag in _COPIED:
        if tag in image.tag_v2:
            tags.tagtype[tag] = image.tag_v2.tagtype[tag]
            tags[tag] = image.tag_v2[tag]
    tags[_WIDTH], tags[_HEIGHT], tags[_STRIP_ROWS] = width, height, height
    tags[_STRIP_BYTES], tags[_STRIP_OFFSETS] = len(data), 0  # Pillow moves the offset behind the tags
    file = io.BytesIO()
    tags.save(file)
    return file.getvalue() + data
