"""Images whose pixel values are probably not meant as they are read: dark, of few bits, transparent."""

import math
from collections.abc import Sequence

from fusedet.data.dataset import DetectionDataset
from fusedet.data.findings import Finding
from fusedet.data.image_decoding import ImageValues
from fusedet.errors import format_count

_FULL_DEPTH = 2**14  # 16-bit values below this are less than a quarter of the range
_DARK = 16  # the highest 8-bit value of an image in which hardly anything can be seen


def describe_values(dataset: DetectionDataset, values: Sequence[ImageValues | None]) -> list[Finding]:
    """Describe the images of a split whose values are probably not meant as they are read.

    Args:
        dataset: The split.
        values: The values of each image, None for one that cannot be read.
    """
    findings = []
    known = [(i, own) for i, own in enumerate(values) if own]

    def add(images: list[tuple[int, ImageValues]], kind: str, text: str, advice: str) -> None:
        if images:
            path = str(dataset.path(images[0][0]))
            message = f"{format_count(len(images), 'image')} {text}: {advice} (first {path})"
            findings.append(Finding("warning", message, kind, len(images), path, advice))

    if dataset.value_range is None:
        shallow = [(i, own) for i, own in known if own.depth == 16 and own.high < _FULL_DEPTH]
        low, high = _measure_range(shallow)
        bits = max(1, math.ceil(math.log2(high + 1)))
        add(
            shallow,
            "16-bit images that use a part of the range only",
            f"of 16 bits with values from {low:g} to {high:g} only, which become nearly black",
            f"set data.range=[0,{2**bits - 1}] if these are {bits}-bit data",
        )
    else:
        black, white = dataset.value_range
        clipped = [(i, own) for i, own in known if own.depth > 8 and (own.high > white or own.low < black)]
        low, high = _measure_range(clipped)
        add(
            clipped,
            "images with values beyond data.range",
            f"with values from {low:g} to {high:g}, which data.range=[{black:g},{white:g}] clips",
            "widen data.range if they show objects",
        )
    dark = [(i, own) for i, own in known if own.depth == 8 and own.high <= _DARK and own.transparent < 1]
    low, high = _measure_range(dark)
    add(
        dark,
        "nearly black images",
        f"of 8 bits with values from {low:g} to {high:g} only, which are nearly black",
        "scale their values to 0..255",
    )
    transparent = [(i, own) for i, own in known if own.transparent > 0]
    most = max((own.transparent for _, own in transparent), default=0.0)
    add(
        transparent,
        "images with transparent pixels",
        f"with transparent pixels, up to {100 * most:.0f} % of an image, which are shown over white",
        "save them without an alpha channel if another background is meant",
    )
    return findings


def _measure_range(images: list[tuple[int, ImageValues]]) -> tuple[float, float]:
    return min((v.low for _, v in images), default=0.0), max((v.high for _, v in images), default=0.0)
