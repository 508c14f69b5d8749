"""Pictures from files, memory or arrays to uint8 RGB tensors."""

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

_ORIENTATION = 0x0112  # EXIF's tag; the values 1..8 are of EXIF 2.3, table 4.6.4
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DAMAGE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AssertionError, AttributeError),
    *(MemoryError, struct.error, zlib.error),
)
"""What Pillow's decoders raise on damaged files."""

MAX_PIXELS = 178_956_970
"""Pictures of more pixels are refused from their header, before anything is decoded; the environment's FUSEDET_MAX_PIXELS overrides it."""

_REFUSED = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # EPS runs a program, the others Pillow knows by name alone


def read_image(source: Source) -> Tensor:
    """A picture's file, or its bytes, as uint8 (3, H, W) in RGB.

    EXIF orientation is applied; of several frames the first is read; transparent pixels are laid over white; 16-bit
    grey is scaled to 8 bit. The tensor lies channels-last in memory, as decoders write it.
    Raises InputError, naming the file, for what is missing, empty, truncated, not a picture, larger than `max_pixels()`,
    or in pixels without an agreed range (floats, 32-bit integers).
    """
    with _opened(source) as picture:
        return _tensor(picture, _name(source))


def image_size(source: Source, *, any_mode: bool = False) -> tuple[int, int]:
    """(height, width) of the tensor that `read_image` would give, from the file's header alone; raises InputError as it does.

    any_mode: whether pixels without an agreed range, which `read_image` refuses, have a size too.
    """
    with _opened(source) as picture:
        if not any_mode:
            _refuse_mode(picture, _name(source))
        return _upright_size(picture)


def to_tensor(picture: Any) -> Tensor:
    """A picture in any of the usual forms as uint8 (3, H, W) in RGB.

    Taken are a path, a file's bytes, a PIL image, a numpy array (H, W, 3) or (H, W) of uint8 in RGB or grey, and a tensor
    (3, H, W) of uint8, or of floats in 0..1. Raises InputError for anything else.
    """
    if isinstance(picture, (str, os.PathLike, bytes)):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        with _explained("the PIL image"):
            return _tensor(picture, "the PIL image")
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)):
            raise InputError(f"a numpy picture must be uint8 (H, W, 3) or (H, W), got {picture.dtype} {picture.shape}")
        rgb = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
        return _not_empty(torch.from_numpy(np.array(rgb)).permute(2, 0, 1))
    if isinstance(picture, Tensor):
        return _from_tensor(picture.detach().cpu())
    raise InputError(f"a picture must be a path, a PIL image, a numpy array or a tensor, got {type(picture).__name__}")


def _from_tensor(picture: Tensor) -> Tensor:
    if picture.ndim != 3 or picture.shape[0] != 3 or not (picture.dtype == torch.uint8 or picture.is_floating_point()):
        raise InputError(f"a tensor picture must be (3, H, W) of uint8, or of floats in 0..1, got {picture.dtype} {tuple(picture.shape)}")
    _not_empty(picture)
    if picture.dtype == torch.uint8:
        return picture
    low, high = (float(x) for x in torch.aminmax(picture))
    if not (low >= 0 and high <= 1):  # false for NaN too
        raise InputError(f"a float picture must lie in 0..1, got values from {low:g} to {high:g}")
    return (picture.float() * 255).round().to(torch.uint8)


def _not_empty(picture: Tensor) -> Tensor:
    if picture.numel() == 0:
        raise InputError(f"the picture has no pixels: its shape is {tuple(picture.shape)}")
    return picture


def _name(source: Source) -> str:
    return f"the picture of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    """The picture with its header read; whatever goes wrong while it is open is told as an InputError."""
    name, limit = _name(source), max_pixels()
    if not isinstance(source, bytes):
        _regular(source)
    with _explained(name), Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source), formats=formats()) as picture:
        if picture.width * picture.height > limit:
            raise _too_large(name)
        yield picture


def _regular(path: str | os.PathLike[str]) -> None:
    """Raises InputError for a pipe or a device, which could be read for ever."""
    with _explained(os.fspath(path)):
        if endless(path):
            raise InputError(f"{os.fspath(path)} is a pipe or a device: a picture's file was expected there")


def endless(path: str | os.PathLike[str]) -> bool:
    """Whether what is there is neither a file nor a folder, so that reading it may never end. Raises OSError where nothing is."""
    mode = os.stat(path).st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def max_pixels() -> int:
    """The most pixels of a picture. Raises InputError where FUSEDET_MAX_PIXELS is no number."""
    given = os.environ.get("FUSEDET_MAX_PIXELS")
    if given is None:
        return MAX_PIXELS
    if not given.isdecimal():
        raise InputError(f"the environment variable FUSEDET_MAX_PIXELS={given} must be a whole number of pixels")
    if Image.MAX_IMAGE_PIXELS and int(given) > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = int(given)  # Pillow's own limit would come first
    return int(given)


def _too_large(name: str) -> InputError:
    return InputError(
        f"{name} has more than {max_pixels()} pixels, the limit against decompression bombs: if it is sound, set the environment variable "
        "FUSEDET_MAX_PIXELS"
    )


@cache
def formats() -> tuple[str, ...]:
    """The picture formats that are read: all of Pillow's, but for those that run a program."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _REFUSED)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name} does not exist: a picture was expected there") from None
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is empty or not a picture in a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None and error.strerror:  # the system's, Pillow's own have no number
            raise InputError(f"{name} cannot be opened: {error.strerror}") from error
        raise InputError(f"{name} is truncated or damaged: {str(error).rstrip('.') or type(error).__name__}") from error


def _turned(picture: Image.Image) -> int:
    """EXIF's orientation as far as it is still to be applied: Pillow turns TIFF files itself."""
    if picture.format == "TIFF":
        return 1
    # PNG's own getexif would decode the whole picture to look behind the pixels, where no writer puts it
    return Image.Image.getexif(picture).get(_ORIENTATION, 1)


def _upright_size(picture: Image.Image) -> tuple[int, int]:
    width, height = picture.size
    return (width, height) if _turned(picture) in (5, 6, 7, 8) else (height, width)


def _tensor(picture: Image.Image, name: str) -> Tensor:
    if 0 in picture.size:
        raise InputError(f"{name} has no pixels: it is {picture.width} wide and {picture.height} high")
    turn = _TURN.get(_turned(picture))
    rgb = _rgb(picture, name)
    if turn is not None:
        rgb = rgb.transpose(turn)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _rgb(picture: Image.Image, name: str) -> Image.Image:
    """The picture in mode RGB."""
    picture.load()  # `transparency` of a PNG is complete only now
    mode = picture.mode
    if mode == "RGB" and "transparency" not in picture.info:
        return picture
    _refuse_mode(picture, name)
    if mode.startswith("I"):
        eight = (np.asarray(picture).astype(np.uint32) + 128) // 257
        return Image.fromarray(eight.astype(np.uint8)).convert("RGB")
    if "transparency" in picture.info or mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        over = picture.convert("LA").convert("RGBA") if mode == "La" else picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return picture.convert("RGB")


def _refuse_mode(picture: Image.Image, name: str) -> None:
    """Raises InputError for pixels without an agreed range; the header alone tells."""
    mode = picture.mode
    if mode == "F" or (mode == "I" and picture.format not in ("PNG", "PPM")):  # Pillow before 11.1 holds their 16 bit as "I"
        kind = "32-bit integers" if mode == "I" else "floating-point numbers"
        raise InputError(f"{name} holds {kind}, which have no agreed range of brightness: save it with 8 or 16 bit per channel")
    if mode == "LAB":
        raise InputError(f"{name} holds L*a*b* colours: save it as RGB")
