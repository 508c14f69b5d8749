"""Decoding of images from files, memory or arrays into uint8 RGB tensors."""

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, decode_png

from fusedet.data.image_opening import (
    TRANSPOSE,
    Range,
    Source,
    explain_faults,
    get_orientation,
    has_deep_color,
    name_source,
    open_image,
)
from fusedet.data.image_windows import Window, cut_window
from fusedet.errors import InputError

_LARGE = 2**24
"""JPEG and PNG of more pixels are decoded by torchvision: equal pixels without Pillow's copies."""
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")


@dataclass(frozen=True)
class ImageValues:
    """The pixel values of an image's file, before any conversion.

    Attributes:
        low: The lowest value of a pixel.
        high: The highest value.
        depth: Bits per channel: 8, 16 or 32.
        transparent: The share of the pixels that are not opaque, in 0..1.
    """

    low: float
    high: float
    depth: int
    transparent: float


def read_image(
    source: Source, value_range: Range | None = None, *, exif: bool = True, window: Window | None = None
) -> Tensor:
    """Decode an image from its file or its bytes.

    - EXIF orientation is applied.
    - Only the first of several frames is read.
    - Transparent pixels are composited over white.
    - 16-bit gray is scaled to 8 bit.

    Args:
        source: The image's file or its bytes.
        value_range: The values that become 0 and 255 in images of more than 8 bits per channel: 16 bits,
            floating-point numbers and 32-bit integers. By default 0 and 65535, and the last two are refused.
        exif: Whether EXIF orientation is applied.
        window: The part to read, which lies inside the image; None reads all of it. Of TIFF, only its rows, strips or
            tiles are decoded.

    Returns:
        uint8 (3, H, W) in RGB, channels-last in memory, as decoders write it.

    Raises:
        InputError: The image is missing, empty, truncated, not an image, has more than `get_max_pixels()` pixels, or
            pixels without an agreed range (floating-point numbers, 32-bit integers).
    """
    if window is None:
        return inspect_image(source, value_range, exif=exif, measure=False)[0]
    left, top, right, bottom = window
    with open_image(source) as image:
        if get_orientation(image, exif) == 1 and not (value_range is not None and has_deep_color(image)):
            return _tensor(cut_window(image, window), name_source(source), value_range, exif)
    return inspect_image(source, value_range, exif=exif, measure=False)[0][:, top:bottom, left:right]


def inspect_image(
    source: Source, value_range: Range | None = None, *, exif: bool = True, measure: bool = True
) -> tuple[Tensor, ImageValues | None]:
    """Decode an image as `read_image` does, and measure the values of its file.

    Args:
        source: As for `read_image`.
        value_range: As for `read_image`.
        exif: As for `read_image`.
        measure: Whether the values are measured; without, a large image may be decoded in a faster way.

    Returns:
        The image (3, H, W) uint8, and its values, None unless measured.

    Raises:
        InputError: As for `read_image`.
    """
    with open_image(source) as image:
        name, is_deep = name_source(source), has_deep_color(image)
        if value_range is not None and is_deep:
            tensor = _scale_deep_color(source, image, value_range, name, exif)
        elif not measure and not is_deep and _is_large(image, exif):
            tensor = _decode_large(source)
        else:
            tensor = _tensor(image, name, value_range, exif)
        return tensor, _measure(image, is_deep) if measure else None


def read_image_size(
    source: Source, *, any_mode: bool = False, value_range: Range | None = None, exif: bool = True
) -> tuple[int, int]:
    """Read (height, width), as `read_image` would return it, from an image's header.

    Args:
        source: The image's file or its bytes.
        any_mode: Whether to accept pixels without an agreed range, which `read_image` refuses.
        value_range: As for `read_image`.
        exif: Whether EXIF orientation is applied.

    Raises:
        InputError: As `read_image`, as far as the header shows it.
    """
    with open_image(source) as image:
        if not any_mode:
            _refuse_mode(image, name_source(source), value_range)
        return _get_size(image, exif)


def to_tensor(image: Any, value_range: Range | None = None) -> Tensor:
    """Convert an image to uint8 (3, H, W) in RGB.

    Args:
        image: One of

            - a path, or the bytes of a file;
            - a PIL image;
            - a numpy array of uint8, (H, W, 3) in RGB or (H, W) in gray;
            - a tensor (3, H, W) of uint8, or of floats in 0..1.
        value_range: As for `read_image`; for paths, bytes and PIL images.

    Raises:
        InputError: The image is anything else.
    """
    if isinstance(image, (str, os.PathLike, bytes)):
        return read_image(image, value_range)
    if isinstance(image, Image.Image):
        with explain_faults("the PIL image"):
            return _tensor(image, "the PIL image", value_range)
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


def _get_size(image: Image.Image, exif: bool) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if get_orientation(image, exif) in (5, 6, 7, 8) else (height, width)


def _tensor(image: Image.Image, name: str, value_range: Range | None, exif: bool = True) -> Tensor:
    if 0 in image.size:
        raise InputError(f"{name} has no pixels: it is {image.width} wide and {image.height} high")
    transpose = TRANSPOSE.get(get_orientation(image, exif))
    rgb = _rgb(image, name, value_range)
    if transpose is not None:
        rgb = rgb.transpose(transpose)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _is_large(image: Image.Image, exif: bool) -> bool:
    """Return whether an image that is not loaded yet is a large JPEG or PNG, whose pixels stay as they are stored."""
    is_plain = image.mode == "RGB" and "transparency" not in image.info and get_orientation(image, exif) == 1
    is_known = image.format in ("JPEG", "PNG") and not getattr(image, "is_animated", False)
    return is_plain and is_known and image.width * image.height > _LARGE


def _decode_large(source: Source) -> Tensor:
    _release_free_memory()
    if isinstance(source, bytes):
        content = np.frombuffer(bytearray(source), np.uint8)
    else:
        content = np.fromfile(source, np.uint8)
    try:
        return decode_image(torch.from_numpy(content), ImageReadMode.RGB)
    except RuntimeError as error:
        raise OSError(str(error).rpartition(", ")[2]) from error  # without the line of the C++ code


def _release_free_memory() -> None:
    """Return what was freed before, as by loading a model, from the heap to the system where the C library is glibc."""
    with suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _rgb(image: Image.Image, name: str, value_range: Range | None) -> Image.Image:
    """Convert an image to mode RGB."""
    image.load()  # the `transparency` of a PNG is complete only after loading
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    _refuse_mode(image, name, value_range)
    if mode.startswith("I") or mode == "F":
        values = np.asarray(image)
        if value_range is None:
            eight = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        else:
            eight = scale_values(values, value_range)
        return Image.fromarray(eight).convert("RGB")
    if "transparency" in image.info or mode in _ALPHA_MODES:
        over = image.convert("LA").convert("RGBA") if mode == "La" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def scale_values(values: np.ndarray, value_range: Range) -> np.ndarray:
    """Map the range linearly to 0..255, clipped and rounded; NaN becomes 0."""
    low, high = value_range
    scaled = (values.astype(np.float64) - low) * 255 / (high - low)
    return np.nan_to_num(np.rint(scaled.clip(0, 255))).astype(np.uint8)


def _scale_deep_color(source: Source, image: Image.Image, value_range: Range, name: str, exif: bool) -> Tensor:
    """Scale colors of 16 bits by a range; torchvision decodes them whole."""
    if image.format != "PNG" or image.mode not in ("RGB", "RGBA"):
        raise InputError(
            f"{name} has 16 bits per channel in color, of which Pillow reads 8, so that data.range cannot be applied: "
            "save it as PNG, or with 8 bits"
        )
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    rgb = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    turned = torch.from_numpy(scale_values(rgb.permute(1, 2, 0).numpy(), value_range))
    transpose = TRANSPOSE.get(get_orientation(image, exif))
    if transpose is not None:
        turned = torch.from_numpy(np.array(Image.fromarray(turned.numpy()).transpose(transpose)))
    return turned.permute(2, 0, 1)


def _measure(image: Image.Image, is_deep: bool = False) -> ImageValues:
    """Measure the values of an image; those of colors of 16 bits by the 8 bits that Pillow keeps."""
    image.load()
    is_plain = image.mode in ("L", "RGB", "F", *_ALPHA_MODES[:2]) or image.mode.startswith("I")
    values, transparent = np.asarray(image if is_plain else image.convert("RGB")), 0.0  # 1 bit, palette, CMYK
    if is_plain and image.mode in _ALPHA_MODES:
        values = values[..., :-1]
    if "transparency" in image.info or image.mode in _ALPHA_MODES:
        transparent = float((np.asarray(image.convert("RGBA"))[..., 3] < 255).mean())
    depth = 32 if image.mode in ("F", "I") else 16 if is_deep or image.mode.startswith("I") else 8
    finite = values[np.isfinite(values)] if image.mode == "F" else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    scale = 257 if is_deep else 1
    return ImageValues(low * scale, high * scale, depth, transparent)


def _refuse_mode(image: Image.Image, name: str, value_range: Range | None) -> None:
    """Raise InputError for pixels without an agreed range, which the header shows."""
    mode = image.mode
    # Pillow before 11.1 reads 16-bit PNG and PPM as "I"
    if value_range is None and (mode == "F" or (mode == "I" and image.format not in ("PNG", "PPM"))):
        kind = "32-bit integers" if mode == "I" else "floating-point numbers"
        values = _measure(image)
        raise InputError(
            f"{name} holds {kind} from {values.low:g} to {values.high:g}, which have no agreed range of brightness: "
            f"set data.range to the values that are black and white, such as {_suggest_range(values)}, or save it with "
            "8 or 16 bits per channel"
        )
    if mode == "LAB":
        raise InputError(f"{name} holds L*a*b* colors: save it as RGB")


def _suggest_range(values: ImageValues) -> str:
    """Return the likeliest range of values as text: 0 to 1, 255 or 2^n - 1, or as measured where some are negative."""
    if values.low < 0:
        return f"[{values.low:.10g},{values.high:.10g}]"
    steps = (1, 255, *(2**bits - 1 for bits in range(9, 65)))
    return f"[0,{next((high for high in steps if values.high <= high), f'{values.high:.10g}')}]"
