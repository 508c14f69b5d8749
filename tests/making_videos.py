"""Small videos for tests: a bright square that moves over a dark ground, with a tone."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

HEIGHT, WIDTH, SIDE = 64, 96, 24
BASE = Fraction(1, 1000)
UNEVEN = [0, 40, 80, 200, 240, 500, 520, 540, 900, 940, 1000, 1300, *range(1340, 1700, 40)]
"""Milliseconds of the frames of a video of variable frame rate."""


def draw_frame(index: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A square whose left side lies at 2 * index, (height, width, 3); the gray of the ground tells the index."""
    pixels = np.full((height, width, 3), 10 + 7 * index, np.uint8)
    pixels[16 : 16 + SIDE, 2 * index : 2 * index + SIDE] = (240, 240, 240)
    return pixels


def read_index(image: np.ndarray) -> int:
    """The index of a frame, from the gray of its ground (H, W, 3)."""
    return round((float(image[-8:].mean()) - 10) / 7)


def make_video(
    path: Path,
    milliseconds: Sequence[int] = range(0, 800, 40),
    *,
    sound: str | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    rotation: int = 0,
) -> Path:
    """Write a video with a frame at each of the times, key frames every eighth, and a tone of the codec `sound`."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {"crf": "10", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = stream.codec_context.time_base = BASE
        stream.codec_context.gop_size = 8
        tone = container.add_stream(sound, rate=8000) if sound else None
        for index, time in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(draw_frame(index % 26, *size), format="rgb24")
            frame.pts, frame.time_base = time, BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if tone is not None:
            count = 8 * (milliseconds[-1] + 40)
            wave = (8000 * np.sin(np.arange(count) * 0.3)).astype(np.int16)[None]
            samples = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = 8000, 0, Fraction(1, 8000)
            container.mux(tone.encode(samples))
            container.mux(tone.encode(None))
    if rotation:
        path.write_bytes(rotate_display(path.read_bytes(), rotation))
    return path


def rotate_display(mp4: bytes, degrees: int) -> bytes:
    """Set the display matrix of the first track of an MP4 file (ISO/IEC 14496-12, track header box, version 0).

    Written here since the oldest PyAV that fusedet supports reads the matrix, but cannot write it.
    """
    cosine, sine = (round(part(math.radians(degrees))) << 16 for part in (math.cos, math.sin))
    matrix = struct.pack(">9i", cosine, -sine, 0, sine, cosine, 0, 0, 0, 1 << 30)
    start = mp4.index(b"tkhd") + 44
    return mp4[:start] + matrix + mp4[start + 36 :]
