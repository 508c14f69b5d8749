"""Colours that everybody can tell apart, and fonts that hold the letters of the text."""

from __future__ import annotations

import colorsys
from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

Color = tuple[int, int, int]

# Okabe and Ito's colours for every kind of colour vision, the ones that stand out in photographs first.
_BASE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#0072B2")
_GOLDEN = 0.618033988749895

WHITE, GREY = (255, 255, 255), (170, 170, 170)
TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE, WRONG_CLASS = (
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (204, 121, 167),
)
"""What became of an object or a detection, in every image."""


def class_color(k: int) -> Color:
    """The colour (red, green, blue in 0..255) of class k: always the same one, no two alike.

    The first seven are safe for colour-blind readers; the next ones go round the hues in steps of the golden ratio, with
    three lightnesses in turn.
    """
    if k < len(_BASE):
        return parse_hex_color(_BASE[k])
    turn = k - len(_BASE)
    red, green, blue = colorsys.hls_to_rgb(
        (0.76 + turn * _GOLDEN) % 1, (0.62, 0.42, 0.78)[turn % 3], (0.75, 0.85, 0.7)[turn % 3]
    )
    return round(red * 255), round(green * 255), round(blue * 255)


def parse_hex_color(code: str) -> Color:
    """A colour from its hex code.

    >>> parse_hex_color("#E69F00")
    (230, 159, 0)
    """
    red, green, blue = bytes.fromhex(code[1:])
    return red, green, blue


def text_color(background: Color) -> Color:
    """Black or white, whichever is read better on a background (relative luminance as in WCAG 2)."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def load_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of `size` pixels for a text: DejaVu Sans, or the first one on this machine that holds all its letters."""
    return _truetype(str(_font_file(frozenset(text))), size)


def font_families(texts: list[str]) -> list[str]:
    """Names of fonts that together hold the letters of all texts, for matplotlib's `fontfamily`."""
    files = dict.fromkeys(_font_file(frozenset(text)) for text in texts)
    return list(dict.fromkeys(["DejaVu Sans", *(FT2Font(str(file)).family_name for file in files)]))


@lru_cache(maxsize=64)
def _truetype(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@lru_cache(maxsize=1024)
def _font_file(letters: frozenset[str]) -> Path:
    """DejaVu Sans where it holds the letters or no font does."""
    usual = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    if letters <= _letters(usual):
        return usual
    entries = (
        entry
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal" and "Last Resort" not in entry.name
    )
    others = (Path(entry.fname) for entry in entries)  # Last Resort holds every letter and draws none
    return next((file for file in dict.fromkeys(others) if letters <= _letters(file)), usual)


@lru_cache(maxsize=512)
def _letters(file: Path) -> frozenset[str]:
    """The letters that a font draws; none for a file that has gone or is not a font."""
    try:
        return frozenset(map(chr, FT2Font(str(file)).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()
