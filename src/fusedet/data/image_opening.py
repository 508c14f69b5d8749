"""Opening of image files: formats, limits, EXIF orientation, and faults as InputErrors."""

import contextlib
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from PIL import Image, UnidentifiedImageError

from fusedet.errors import InputError

Source = str | os.PathLike[str] | bytes
Range = tuple[float, float]
ORIENTATION = 0x0112  # the EXIF tag; values 1..8 as in EXIF 2.3, table 4.6.4
TRANSPOSE = {
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


def name_source(source: Source) -> str:
    """Name an image for messages."""
    return f"the image of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)


@contextmanager
def open_image(source: Source) -> Iterator[Image.Image]:
    """Open an image and read its header; faults while it is open become InputErrors."""
    name, limit = name_source(source), get_max_pixels()
    if not isinstance(source, bytes):
        _require_regular_file(source)
    with (
        explain_faults(name),
        # no path: Pillow would map an uncompressed TIFF into memory, and then turns it wrongly
        io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file,
        Image.open(file, formats=get_image_formats()) as image,
    ):
        if image.width * image.height > limit:
            raise _too_large(name)
        yield image


def _require_regular_file(path: str | os.PathLike[str]) -> None:
    """Raise InputError for a pipe or a device, whose reading might never end."""
    with explain_faults(os.fspath(path)):
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
    """Return the supported image formats: all of Pillow's, except those that run a program.

    HEIF, the format of phones, is among them where the package pillow-heif is installed.
    """
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in Image.ID if name not in _REFUSED)


@contextmanager
def explain_faults(name: str) -> Iterator[None]:
    """Turn the exceptions of reading an image into InputErrors that name it."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name} does not exist: an image was expected there") from None
    except UnidentifiedImageError as error:
        hints = {
            (".heic", ".heif", ".hif"): ": pip install pillow-heif",
            (".tif", ".tiff"): ": save other channels than RGB with one per page, or as npy",
        }
        hint = next((text for endings, text in hints.items() if name.lower().endswith(endings)), "")
        raise InputError(f"{name} is empty or not an image in a format that Pillow reads{hint}") from error
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except _DAMAGE as error:
        # errors of the operating system have a number, Pillow's own have none
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            raise InputError(f"{name} cannot be opened: {error.strerror}") from error
        raise InputError(f"{name} is truncated or damaged: {str(error).rstrip('.') or type(error).__name__}") from error


def get_orientation(image: Image.Image, exif: bool = True) -> int:
    """Return the EXIF orientation that is still to be applied, or without `exif` undone.

    Pillow turns TIFF files itself.
    """
    is_turned = image.format == "TIFF"
    if is_turned == exif:
        return 1
    # PNG's own getexif would decode the whole image to look behind the pixels, where no writer puts it
    own = int(Image.Image.getexif(image).get(ORIENTATION, 1))
    return {6: 8, 8: 6}.get(own, own) if is_turned else own


def has_deep_color(image: Image.Image) -> bool:
    """Return whether an image that is not loaded yet has several channels of 16 bits, which Pillow cuts to 8."""
    return not image.mode.startswith("I") and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
