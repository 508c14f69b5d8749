"""Images too large for memory, which are decoded window by window."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from fusedet.data.channel_decoding import is_array_file, read_array_size, read_channels
from fusedet.data.image_decoding import read_image, read_image_size
from fusedet.data.image_opening import Range
from fusedet.data.image_windows import Window, decodes_windows

LARGE = 2**24
"""Images of more pixels are decoded window by window, where their format allows it."""
_STRIP = 2**24  # pixels of a strip, 64 MiB in Pillow
_KEPT = 2**26  # pixels of the rows that are kept for the windows beside, 192 MiB


@dataclass(frozen=True)
class LargeImage:
    """An image of which only windows are decoded.

    Attributes:
        shape: C, H and W, as of a tensor.
        crop: Decodes a window, uint8 (C, h, w).
    """

    shape: tuple[int, int, int]
    crop: Callable[[Window], Tensor]

    def read(self) -> Tensor:
        """Decode the whole image, uint8 (C, H, W)."""
        return self.crop((0, 0, self.shape[2], self.shape[1]))

    def resize(self, size: tuple[int, int], antialias: bool) -> Tensor:
        """Resize the image to (height, width), uint8 (C, height, width).

        A bilinear resize is a product along each axis. So strips are resized along x, and their results along y, as
        torch does with the whole image.
        """
        _, height, width = self.shape
        rows = max(1, _STRIP // width)
        strips = []
        for top in range(0, height, rows):
            strip = self.crop((0, top, width, min(top + rows, height)))
            strips.append(_resize(strip, (strip.shape[1], size[1]), antialias).permute(1, 2, 0))
        return _resize(torch.cat(strips).permute(2, 0, 1), size, antialias)


def open_large_image(
    path: Path, channels: int, value_range: Range | None = None, *, exif: bool = True
) -> LargeImage | None:
    """Open a file of more than `LARGE` pixels whose windows can be decoded without the rest; None for any other.

    These are numpy files, and TIFF whose rows, strips or tiles can be decoded. Arguments are those of `read_channels`.

    Raises:
        InputError: The file cannot be read.
    """
    is_array = is_array_file(path)
    height, width = read_array_size(path) if is_array else read_image_size(path, any_mode=True, exif=exif)
    if height * width <= LARGE:
        return None
    if is_array:
        return LargeImage(
            (channels, height, width), lambda window: read_channels(path, channels, value_range, window=window)
        )
    if channels != 3 or not decodes_windows(path, value_range, exif=exif):
        return None
    rows = _Rows(width, lambda window: read_image(path, value_range, exif=exif, window=window))
    return LargeImage((3, height, width), rows.crop)


@dataclass
class _Rows:
    """Decodes windows; the rows of the last one stay for those beside it, since decoders decode whole rows.

    Attributes:
        width: The image's width.
        decode: Decodes a window.
    """

    width: int
    decode: Callable[[Window], Tensor]
    kept: tuple[int, int] | None = None
    pixels: Tensor | None = None

    def crop(self, window: Window) -> Tensor:
        left, top, right, bottom = window
        if self.width * (bottom - top) > _KEPT:
            return self.decode(window)
        if self.kept != (top, bottom) or self.pixels is None:
            self.pixels = None  # before the next ones are decoded
            self.kept, self.pixels = (top, bottom), self.decode((0, top, self.width, bottom))
        return self.pixels[:, :, left:right].permute(1, 2, 0).contiguous().permute(2, 0, 1)


def crop_image(image: Tensor | LargeImage, window: Window) -> Tensor | LargeImage:
    """Cut a window out of an image (C, H, W); the image itself where the window is all of it."""
    left, top, right, bottom = window
    if (left, top, right, bottom) == (0, 0, image.shape[2], image.shape[1]):
        return image
    if isinstance(image, LargeImage):
        return image.crop(window)
    # one block of memory, channels last, as decoders write it
    return image[:, top:bottom, left:right].permute(1, 2, 0).contiguous().permute(2, 0, 1)


def resize_image(image: Tensor | LargeImage, size: tuple[int, int], antialias: bool) -> Tensor:
    """Resize an image (C, H, W) to (height, width)."""
    return image.resize(size, antialias) if isinstance(image, LargeImage) else _resize(image, size, antialias)


def _resize(image: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    return F.resize(tv_tensors.Image(image), list(size), antialias=antialias)
