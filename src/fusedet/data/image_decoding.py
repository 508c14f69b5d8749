"""Decoding of images from files, memory or arrays into uint8 RGB tensors."""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fusedet.errors import InputError

Source = str | os.PathLike[str] | bytes

_ORIENTATION = 0x0112  # the EXIF tag; values 1..8 as in EXIF 2.3, table 4.6.4
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DAMAGE = (
    *(
        OSError,
        EOFError,
        SyntaxError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        RuntimeError,
        AssertionError,
        AttributeError,
    ),
    *(MemoryError, struct.error, zlib.error),
)
"""Exceptions that Pillow's decoders raise on damaged files."""

MAX_PIXELS = 178_956_970
"""Images with more pixels are refused before decoding; the environment variable FUSEDET_MAX_PIXELS overrides it."""

_REFUSED = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # EPS runs a program; Pillow has no decoder for the others


def read_image(source: Source, *, exif: bool = True) -> Tensor:
    """Decode an image from its file or its bytes.

    - EXIF orientation is applied.
    - Only the first of several frames is read.
    - Transparent pixels are composited over white.
    - 16-bit grey is scaled to 8 bit.

    Args:
        source: The image's file or its bytes.
        exif: Whether EXIF orientation is applied.

    Returns:
        uint8 (3, H, W) in RGB, channels-last in memory, as decoders write it.

    Raises:
        InputError: The image is missing, empty, truncated, not an image, has more than `get_max_pixels()` pixels, or
            pixels without an agreed range (floating-point numbers, 32-bit integers).
    """
    with _opened(source) as image:
        return _tensor(image, _name(source), exif)


def read_image_size(source: Source, *, any_mode: bool = False, exif: bool = True) -> tuple[int, int]:
    """Read (height, width), as `read_image` would return it, from an image's header.

    Args:
        source: The image's file or its bytes.
        any_mode: Whether to accept pixels without an agreed range, which `read_image` refuses.
        exif: Whether EXIF orientation is applied.

    Raises:
        InputError: As `read_image`, as far as the header shows it.
    """
    with _opened(source) as image:
        if not any_mode:
            _refuse_mode(image, _name(source))
        return _upright_size(image) if exif else (image.height, image.width)


def to_tensor(image: Any) -> Tensor:
    """Convert an image to uint8 (3, H, W) in RGB.

    Args:
        image: One of

            - a path, or the bytes of a file;
            - a PIL image;
            - a numpy array of uint8, (H, W, 3) in RGB or (H, W) in grey;
            - a tensor (3, H, W) of uint8, or of floats in 0..1.

    Raises:
        InputError: The image is anything else.
    """
    if isinstance(image, (str, os.PathLike, bytes)):
        return read_image(image)
    if isinstance(image, Image.Image):
        with _explained("the PIL image"):
            return _tensor(image, "the PIL image")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise InputError(f"a numpy image must be uint8 (H, W, 3) or (H, W), got {image.dtype} {image.shape}")
        rgb = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        return _not_empty(torch.from_numpy(np.array(rgb)).permute(2, 0, 1))
    if isinstance(image, Tensor):
        return _from_tensor(image.detach().cpu())
    raise InputError(f"an image must be a path, a PIL image, a numpy array or a tensor, got {type(image).__name__}")


def _from_tensor(image: Tensor) -> Tensor:
    if image.ndim != 3 or image.shape[0] != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise InputError(
            f"a tensor image must be (3, H, W) of uint8, or of floats in 0..1, got {image.dtype} {tuple(image.shape)}"
        )
    _not_empty(image)
    if image.dtype == torch.uint8:
        return image
    low, high = (float(x) for x in torch.aminmax(image))
    if not (low >= 0 and high <= 1):  # false for NaN too
        raise InputError(f"a float image must lie in 0..1, got values from {low:g} to {high:g}")
    return (image.float() * 255).round().to(torch.uint8)


def _not_empty(image: Tensor) -> Tensor:
    if image.numel() == 0:
        raise InputError(f"the image has no pixels: its shape is {tuple(image.shape)}")
    return image


def _name(source: Source) -> str:
    return f"the image of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    """Open an image and read its header; faults while it is open become InputErrors."""
    name, limit = _name(source), get_max_pixels()
    if not isinstance(source, bytes):
        _require_regular_file(source)
    with (
        _explained(name),
        Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else Path(source), formats=get_image_formats()
        ) as image,
    ):
        if image.width * image.height > limit:
            raise _too_large(name)
        yield image


def _require_regular_file(path: str | os.PathLike[str]) -> None:
    """Raise InputError for a pipe or a device, whose reading might never end."""
    with _explained(os.fspath(path)):
        if is_pipe_or_device(path):
            raise InputError(f"{os.fspath(path)} is a pipe or a device: an image file was expected there")


def is_pipe_or_device(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is neither a file nor a folder, so that reading it might never end.

    Raises:
        OSError: The path does not exist.
    """
    mode = os.stat(path).st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def get_max_pixels() -> int:
    """Return the maximum number of pixels of an image; raises InputError for a malformed FUSEDET_MAX_PIXELS."""
    value = os.environ.get("FUSEDET_MAX_PIXELS")
    if value is None:
        return MAX_PIXELS
    if not value.isdecimal():
        raise InputError(f"the environment variable FUSEDET_MAX_PIXELS={value} must be a whole number of pixels")
    if Image.MAX_IMAGE_PIXELS and int(value) > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = int(value)  # else Pillow's own limit would apply first
    return int(value)


def _too_large(name: str) -> InputError:
    return InputError(
        f"{name} has more than {get_max_pixels()} pixels, the limit against decompression bombs: if the image is "
        "valid, set the environment variable FUSEDET_MAX_PIXELS"
    )


@cache
def get_image_formats() -> tuple[str, ...]:
    """Return the supported image formats: all of Pillow's, except those that run a program."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _REFUSED)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name} does not exist: an image was expected there") from None
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is empty or not an image in a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except _DAMAGE as error:
        # errors of the operating system have a number, Pillow's own have none
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            raise InputError(f"{name} cannot be opened: {error.strerror}") from error
        raise InputError(f"{name} is truncated or damaged: {str(error).rstrip('.') or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied: Pillow rotates TIFF files itself."""
    if image.format == "TIFF":
        return 1
    # PNG's own getexif would decode the whole image to look behind the pixels, where no writer puts it
    return Image.Image.getexif(image).get(_ORIENTATION, 1)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def _tensor(image: Image.Image, name: str, exif: bool = True) -> Tensor:
    if 0 in image.size:
        raise InputError(f"{name} has no pixels: it is {image.width} wide and {image.height} high")
    transpose = _TRANSPOSE.get(_orientation(image)) if exif else None
    rgb = _rgb(image, name)
    if transpose is not None:
        rgb = rgb.transpose(transpose)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert an image to mode RGB."""
    image.load()  # the `transparency` of a PNG is complete only after loading
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    _refuse_mode(image, name)
    if mode.startswith("I"):
        eight = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(eight.astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        over = image.convert("LA").convert("RGBA") if mode == "La" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _refuse_mode(image: Image.Image, name: str) -> None:
    """Raise InputError for pixels without an agreed range, which the header shows."""
    mode = image.mode
    # Pillow before 11.1 reads 16-bit PNG and PPM as "I"
    if mode == "F" or (mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "32-bit integers" if mode == "I" else "floating-point numbers"
        raise InputError(
            f"{name} holds {kind}, which have no agreed range of brightness: save it with 8 or 16 bit per channel"
        )
    if mode == "LAB":
        raise InputError(f"{name} holds L*a*b* colours: save it as RGB")
