"""Class colors that are safe for color-blind readers, and fonts that contain the letters of a text."""

import colorsys
from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageColor, ImageFont

Color = tuple[int, int, int]

# Okabe and Ito's palette, ordered so that the colors that stand out in photographs come first.
_BASE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#0072B2")
_GOLDEN = 0.618033988749895

WHITE, GRAY = (255, 255, 255), (170, 170, 170)
TRUE_POSITIVE, FALSE_POSITIVE = (86, 180, 233), (213, 94, 0)
FALSE_NEGATIVE, WRONG_CLASS = (240, 228, 66), (204, 121, 167)


def class_color(k: int) -> Color:
    """Return the color (red, green, blue in 0..255) of class k: always the same, no two alike.

    The first seven are safe for color-blind readers. The next ones step round the hues by the golden ratio, with three
    lightnesses in turn.
    """
    if k < len(_BASE):
        return ImageColor.getrgb(_BASE[k])[:3]
    turn = k - len(_BASE)
    red, green, blue = colorsys.hls_to_rgb(
        (0.76 + turn * _GOLDEN) % 1, (0.62, 0.42, 0.78)[turn % 3], (0.75, 0.85, 0.7)[turn % 3]
    )
    return round(red * 255), round(green * 255), round(blue * 255)


def text_color(background: Color) -> Color:
    """Return black or white, whichever contrasts more with a background (relative luminance of WCAG 2)."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def load_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a font of `size` pixels: DejaVu Sans, or the first installed font with all letters of the text."""
    return _truetype(str(_font_file(frozenset(text))), size)


def font_families(texts: list[str]) -> list[str]:
    """List font families that together contain the letters of all texts, for matplotlib's `fontfamily`."""
    files = dict.fromkeys(_font_file(frozenset(text)) for text in texts)
    return list(dict.fromkeys(["DejaVu Sans", *(FT2Font(str(file)).family_name for file in files)]))


@lru_cache(maxsize=64)
def _truetype(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@lru_cache(maxsize=1024)
def _font_file(letters: frozenset[str]) -> Path:
    """Return DejaVu Sans where it has the letters or no font has them."""
    default = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    if letters <= _letters(default):
        return default
    for font in font_manager.fontManager.ttflist:
        # Last Resort claims every letter and draws none.
        if font.style == "normal" and "Last Resort" not in font.name and letters <= _letters(Path(font.fname)):
            return Path(font.fname)
    return default


@lru_cache(maxsize=512)
def _letters(file: Path) -> frozenset[str]:
    """Return the letters of a font file; none for a file that was removed or is not a font."""
    try:
        return frozenset(map(chr, FT2Font(str(file)).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()
