"""Videos with drawn frames: H.264 with the times of the original, and its sound as it is."""

from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from fusedet.data.videos import Frame, Video, import_av
from fusedet.errors import StorageError

_MP4_SOUND = frozenset({"aac", "mp3", "ac3", "eac3", "alac"})
"""Codecs of sound that players expect in mp4; with others the file is mkv, which holds all."""


class VideoWriter:
    """Writes frames at the times of their video, and its sound; a context manager, whose end completes the file.

    Attributes:
        file: The file: .mp4, or .mkv where mp4 cannot hold the sound.
        has_sound: Whether the sound is kept.

    Args:
        folder: The folder of the file.
        name: Its name without an extension.
        video: The video that is read.
        start: Its time that becomes 0.
    """

    def __init__(self, folder: Path, name: str, video: Video, start: Fraction = Fraction(0)) -> None:
        self._video, self._start = video, start
        self._av = import_av()
        self.has_sound = video.sound is not None
        codec = video.sound.codec_context.name if video.sound else "aac"
        self.file = folder / f"{name}{'.mp4' if codec.partition('_')[0] in _MP4_SOUND else '.mkv'}"
        self._container: Any = None
        self._waiting: list[Any] = []  # sound before the first frame, whose size the file's header needs
        self._last = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._container is None:
            return
        try:
            if kind is None or not issubclass(kind, StorageError):
                self._write(lambda: self._container.mux(self._stream.encode(None)))
        finally:
            with suppress(self._av.error.FFmpegError):
                self._container.close()

    def add(self, image: Image.Image, frame: Frame) -> None:
        """Write a frame with its drawing; frames come in order.

        Raises:
            StorageError: The file cannot be written.
        """
        if self._container is None:
            self._begin(image.size)
        image = image if image.size == self._size else image.resize(self._size)
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
        if height % 2 or width % 2:  # H.264 halves the resolution of colors
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        own = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        own.time_base = self._video.time_base
        own.pts = self._last = max(self._last + 1, round((frame.time - self._start) / self._video.time_base))
        self._write(lambda: self._container.mux(self._stream.encode(own)))

    def add_sound(self, packet: Any) -> None:
        """Copy a packet of the video's sound.

        Raises:
            StorageError: The file cannot be written.
        """
        if self._container is None:
            self._waiting.append(packet)
        elif self.has_sound:
            moved = round((self._video.origin + self._start) / Fraction(packet.time_base))
            packet.pts = None if packet.pts is None else packet.pts - moved
            packet.dts = None if packet.dts is None else packet.dts - moved
            packet.stream = self._sound
            self._write(lambda: self._container.mux(packet))

    def _begin(self, size: tuple[int, int]) -> None:
        """Create the file with a header; without sound if its codec does not fit."""
        self._size = size
        if self.has_sound:
            try:
                self._open(with_sound=True)
            except (self._av.error.FFmpegError, ValueError):
                self.has_sound = False
                self._container.close()
        if not self.has_sound:
            self._write(lambda: self._open(with_sound=False))
        waiting, self._waiting = self._waiting, []
        for packet in waiting:
            self.add_sound(packet)

    def _open(self, with_sound: bool) -> None:
        self._container = self._av.open(str(self.file), "w")
        has_x264 = "libx264" in self._av.codecs_available
        codec, options = ("libx264", {"crf": "20", "preset": "veryfast"}) if has_x264 else ("mpeg4", {"qscale": "3"})
        self._stream = self._container.add_stream(codec, rate=self._video.rate, options=options)
        self._stream.width, self._stream.height = (side + side % 2 for side in self._size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.time_base = self._stream.codec_context.time_base = self._video.time_base
        self._sound = self._container.add_stream_from_template(self._video.sound) if with_sound else None
        self._container.start_encoding()

    def _write(self, action: Any) -> None:
        try:
            action()
        except (self._av.error.FFmpegError, OSError) as error:
            raise StorageError(f"{self.file} cannot be written: {error.strerror or error}") from error
