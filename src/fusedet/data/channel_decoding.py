"""Images of any number of channels, such as multispectral TIFF files and numpy arrays."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedet.data.image_decoding import ImageValues, scale_values
from fusedet.data.image_opening import (
    TRANSPOSE,
    Range,
    Source,
    get_max_pixels,
    get_orientation,
    has_deep_color,
    name_source,
    open_image,
)
from fusedet.data.image_windows import Window
from fusedet.errors import InputError, format_count

_MAGIC = b"\x93NUMPY"
_SAMPLES, _EXTRA_SAMPLES = 277, 338  # tags of TIFF


def is_array_file(source: Source) -> bool:
    """Return whether a source is a numpy file (.npy), by its name or its first bytes."""
    return source[:6] == _MAGIC if isinstance(source, bytes) else os.fspath(source).lower().endswith(".npy")


def read_channels(
    source: Source,
    channels: int,
    value_range: Range | None = None,
    *,
    exif: bool = True,
    window: Window | None = None,
) -> Tensor:
    """Decode all channels of an image as they are stored.

    - A numpy file is (H, W) or (H, W, C).
    - The pages of a TIFF file are joined: it may have one page with all channels, or one per channel.
    - Nothing is composited: a fourth channel is no transparency, whatever the file calls it.
    - 16-bit values are scaled to 8 bits.

    Args:
        source: The image's file or its bytes.
        channels: C, the number of channels that it must have.
        value_range: The values that become 0 and 255 where there are more than 8 bits; by default 0 and 65535 of 16
            bits. Other types of numbers need it.
        exif: Whether EXIF orientation is applied.
        window: The part to read, which lies inside the image; None reads all of it. Of a numpy file, only this part is
            read.

    Returns:
        uint8 (C, H, W), channels-last in memory.

    Raises:
        InputError: The file cannot be read, or has another number of channels.
    """
    values = _load(source, channels, value_range, exif)
    if window:
        left, top, right, bottom = window
        values = values[top:bottom, left:right]
    return _to_tensor(values, value_range, source)


def inspect_channels(
    source: Source, channels: int, value_range: Range | None = None, *, exif: bool = True
) -> tuple[Tensor, ImageValues]:
    """Decode an image as `read_channels` does, and measure the values of its file.

    Args:
        source: As for `read_channels`.
        channels: As for `read_channels`.
        value_range: As for `read_channels`.
        exif: As for `read_channels`.

    Returns:
        The image (C, H, W) uint8, and its values.

    Raises:
        InputError: As for `read_channels`.
    """
    values = _load(source, channels, value_range, exif)
    return _to_tensor(values, value_range, source), _measure(values)


def read_array_size(source: Source) -> tuple[int, int]:
    """Return (height, width) of a numpy file, from its header."""
    height, width = _load_array(source).shape[:2]
    return height, width


def _load(source: Source, channels: int, value_range: Range | None, exif: bool) -> np.ndarray:
    """Open an image as (H, W, C) of the numbers that its file holds."""
    values = _load_array(source) if is_array_file(source) else _load_pages(source, value_range, exif)
    if values.shape[2] != channels:
        raise InputError(
            f"{name_source(source)} has {format_count(values.shape[2], 'channel')}, but data.channels={channels}: set "
            "data.channels to what all images have"
        )
    return values


def _load_array(source: Source) -> np.ndarray:
    """Open a numpy file as (H, W, C), mapped into memory where it is a file."""
    name = name_source(source)
    try:
        if isinstance(source, bytes):
            array = np.load(io.BytesIO(source), allow_pickle=False)
        else:
            array = np.load(Path(source), mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{name} does not exist: an image was expected there") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{name} is no whole numpy file of numbers: {str(error).rstrip('.')}") from error
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or 0 in array.shape:
        shape = getattr(array, "shape", type(array).__name__)
        raise InputError(f"{name} must be an array (H, W) or (H, W, C), it is {shape}")
    if array.shape[0] * array.shape[1] > get_max_pixels():
        raise InputError(
            f"{name} has more than {get_max_pixels()} pixels: set the environment variable FUSEDET_MAX_PIXELS"
        )
    return array if array.ndim == 3 else array[..., None]


def _load_pages(source: Source, value_range: Range | None, exif: bool) -> np.ndarray:
    """Decode all pages of an image file as (H, W, C)."""
    name, planes = name_source(source), []
    with open_image(source) as image:
        for page in range(getattr(image, "n_frames", 1)):
            image.seek(page)
            if value_range is not None and has_deep_color(image):
                raise InputError(
                    f"{name} has 16 bits per channel in color, of which Pillow reads 8, so that data.range cannot be "
                    "applied: save it as npy, or with one channel per page"
                )
            transpose = TRANSPOSE.get(get_orientation(image, exif))
            samples = _keep_fourth_channel(image)
            image.load()
            whole: Any = (
                image.convert("RGB") if image.mode == "P" else image.convert("L") if image.mode == "1" else image
            )
            values = np.asarray(whole if transpose is None else whole.transpose(transpose))
            if samples > (values.shape[2] if values.ndim == 3 else 1):
                raise InputError(
                    f"{name} has a page of {samples} channels, of which Pillow reads {len(whole.getbands())}: save it "
                    "with one channel per page, or as npy"
                )
            planes.append(values if values.ndim == 3 else values[..., None])
        if len({plane.shape[:2] for plane in planes}) > 1:
            raise InputError(f"{name} has pages of several sizes: its channels must have the same")
        return np.concatenate(planes, axis=2)


def _keep_fourth_channel(image: Any) -> int:
    """Return the channels of a page, 1 where no tag says it, and make Pillow keep the fourth of a TIFF as stored.

    By its tag ExtraSamples, Pillow would drop the channel, or divide the colors by it; only alpha that is not
    associated with the colors is kept.
    """
    if image.format != "TIFF":
        return 1
    samples = image.tag_v2.get(_SAMPLES, 1)
    if samples == 4 and image.tag_v2.get(_EXTRA_SAMPLES) in ((0,), (1,)):
        image.tag_v2[_EXTRA_SAMPLES] = (2,)
        image._setup()  # derives the mode from the tags, as when the page was opened
    return int(samples)


def _to_tensor(values: np.ndarray, value_range: Range | None, source: Source) -> Tensor:
    return torch.from_numpy(_to_bytes(values, value_range, name_source(source))).permute(2, 0, 1)


def _measure(values: np.ndarray) -> ImageValues:
    depth = {"|u1": 8, "<u2": 16, ">u2": 16}.get(values.dtype.str, 32)
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return ImageValues(low, high, depth, transparent=0.0)


def _to_bytes(values: np.ndarray, value_range: Range | None, name: str) -> np.ndarray:
    """Convert values (H, W, C) to contiguous uint8."""
    if values.dtype == np.uint8:
        return np.array(values, order="C")
    if value_range is not None and values.dtype.kind in "biuf":
        return scale_values(np.asarray(values), value_range)
    if values.dtype in (np.dtype("<u2"), np.dtype(">u2")):
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    raise InputError(
        f"{name} holds {values.dtype} numbers, which have no agreed range of brightness: set data.range to the values "
        "that are black and white"
    )
