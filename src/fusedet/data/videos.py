"""Videos, cameras and network streams: frames with their times, decoded by PyAV."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fusedet.data.image_opening import get_max_pixels, is_pipe_or_device
from fusedet.data.video_parts import Part, is_stream
from fusedet.errors import InputError

_TIMEOUTS = (10.0, 30.0)  # seconds to wait for a network stream: for its start, and between its packets
_LATE = 1.0  # seconds of sound that may lie behind the frames of its time
_MISSING = 0.5  # seconds that may lack at a file's end, as headers round
_RATE = Fraction(25)  # frames per second where a stream does not say


def import_av() -> ModuleType:
    """Return the package av.

    Raises:
        InputError: It is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise InputError('videos need the package av: pip install "fusedet[video]"') from error
    return av


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes:
        index: Its number in the video, from 0.
        time: Seconds since the video's start.
        image: uint8 (3, H, W) in RGB, upright.
    """

    index: int
    time: Fraction
    image: Tensor


class Video:
    """An open video, camera or network stream; a context manager.

    Attributes:
        source: What was opened.
        is_live: Whether it has no end: a camera or an address.
        rate: Frames per second, an average where they vary.
        duration: Seconds, or None where they are unknown.
        sound: PyAV's first audio stream, or None.
        time_base: Seconds per unit of the frames' timestamps.

    Raises:
        InputError: The source does not exist or holds no video, or PyAV is not installed.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.source, self._av = os.fspath(source), import_av()
        self.is_live = is_stream(self.source)
        self._container = self._open()
        try:
            if not self._container.streams.video:
                raise InputError(f"{self.source} holds no video")
            self._stream = self._container.streams.video[0]
            self._stream.thread_type = "AUTO"
            size = self._stream.codec_context.width * self._stream.codec_context.height
            if size > get_max_pixels():
                raise InputError(f"{self.source} has frames of more than {get_max_pixels()} pixels")
        except BaseException:
            self._container.close()
            raise
        self.sound = next(iter(self._container.streams.audio), None)
        self.rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or _RATE)
        self.time_base = Fraction(self._stream.time_base)
        length = None if self.is_live else self._container.duration
        self.duration = None if length is None else Fraction(length, self._av.time_base)
        begin = self._container.start_time
        self._origin = None if begin is None else Fraction(begin, self._av.time_base)
        self._reached = Fraction(0)
        self._fault: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._container.close()

    def _open(self) -> Any:
        options: dict[str, Any] = {"options": {"protocol_whitelist": "file"}}  # a file may name others
        name = self.source
        if self.is_live and name.isdecimal():
            name, options = _name_camera(int(name))
        elif self.is_live:
            options = {"options": {"rtsp_transport": "tcp"} if name.startswith("rtsp") else {}, "timeout": _TIMEOUTS}
        elif not os.path.exists(name):
            raise InputError(f"there is no video {name}")
        elif is_pipe_or_device(name):
            raise InputError(f"{name} is a pipe or a device: a video file was expected there")
        try:
            return self._av.open(name, metadata_errors="ignore", **options)
        except (self._av.error.FFmpegError, ValueError) as error:
            what = "cannot be opened" if self.is_live else "is no video that can be read, or its beginning is damaged"
            raise InputError(f"{self.source} {what}: {_describe(error)}") from error

    @property
    def origin(self) -> Fraction:
        """The timestamp of the video's start, in seconds."""
        return self._origin or Fraction(0)

    def count(self, part: Part) -> int | None:
        """Estimate the number of frames of a part by the file's header; None where it does not say."""
        end = part.end if self.duration is None else min(part.end or self.duration, self.duration)
        if end is None:
            return None
        whole = part.start == 0 and end == self.duration and self._stream.frames
        frames = whole or round((end - part.start) * self.rate)
        return max(0, -(-frames // part.every))

    def read(self, part: Part, on_sound: Callable[[Any], None] | None = None) -> Iterator[Frame]:
        """Decode the frames of a part, once for each `Video`.

        Args:
            part: Which frames.
            on_sound: Takes each packet of the sound from `part.start` to `part.end`.

        Raises:
            InputError: The file is truncated or damaged; the frames up to that place come before.
        """
        number, last = 0, Fraction(0)
        for index, time, frame in self._decode(self._demux(part, on_sound), part.start):
            if not part.holds(time):
                continue
            last = time
            if number % part.every == 0:
                yield Frame(index, time, _to_tensor(frame))
            number += 1
        expected = self.duration if part.end is None or self.duration is None else min(part.end, self.duration)
        if self._fault is None and expected is not None and self._reached + Fraction(_MISSING) < expected:
            last, self._fault = self._reached, "the file ends there"
        if self._fault is not None:
            whole = "" if self.duration is None else f" of {float(self.duration):.1f} s"
            what = "broke off" if self.is_live else "is truncated or damaged"
            raise InputError(f"{self.source} {what} at {float(last):.1f} s{whole}: {self._fault}")
        if not number:
            raise InputError(
                f"{self.source} has no frame from {float(part.start):g} s on: it ends at {float(self._reached):.1f} s"
            )

    def time_of(self, stamp: int | None, base: Fraction | None) -> Fraction | None:
        """Return a timestamp in seconds since the video's start; None stays None."""
        if stamp is None or base is None:
            return None
        seconds = stamp * Fraction(base)
        if self._origin is None:
            self._origin = seconds
        return seconds - self._origin

    def _demux(self, part: Part, on_sound: Callable[[Any], None] | None) -> Iterator[Any]:
        """Yield the packets of the video up to the part's end, and give those of its sound away."""
        for packet in self._container.demux():
            time = self.time_of(packet.dts if packet.pts is None else packet.pts, packet.time_base)
            if time is not None:
                self._reached = max(self._reached, time + (packet.duration or 0) * Fraction(packet.time_base))
            if packet.stream_index == self._stream.index:
                decoded = self.time_of(packet.dts, packet.time_base)
                if part.end is not None and decoded is not None and decoded > part.end + Fraction(_LATE):
                    return
                yield packet
            elif on_sound and self.sound and packet.stream_index == self.sound.index and part.holds(time):
                on_sound(packet)

    def _decode(self, packets: Iterator[Any], start: Fraction) -> Iterator[tuple[int, Fraction, Any]]:
        """Yield index, time and frame from the last key frame at or before `start`; errors go to `_fault`."""
        errors = self._av.error.FFmpegError
        index, first = 0, None

        def number_frames(frames: Iterable[Any]) -> Iterator[tuple[int, Fraction, Any]]:
            nonlocal index
            for frame in frames:
                time = self.time_of(frame.pts, frame.time_base)
                if time is None:
                    time = index / self.rate
                if first is None or time >= first:
                    yield index, time, frame
                    index += 1

        try:
            if start:
                index, first, held = self._skip_to(packets, start)
                packets = chain(held, packets)
            for packet in packets:
                try:
                    frames = packet.decode()
                except errors:
                    if not self.is_live:
                        raise
                    continue  # a packet was lost in the network
                yield from number_frames(frames)
        except errors as error:
            self._fault = _describe(error)
            with suppress(errors):  # the frames before the break that the decoder still holds
                yield from number_frames(self._stream.decode(None))

    def _skip_to(self, packets: Iterator[Any], start: Fraction) -> tuple[int, Fraction | None, list[Any]]:
        """Take packets up to `start` without decoding them.

        Returns:
            The number of frames before the last key frame, its time, and the packets from it on.
        """
        skipped, key = 0, None
        held: list[Any] = []
        for packet in packets:
            time, decoded = (self.time_of(stamp, packet.time_base) for stamp in (packet.pts, packet.dts))
            if packet.is_keyframe and time is not None and time <= start:
                skipped, key, held = skipped + len(held), time, []
            held.append(packet)
            if decoded is None or decoded > start:
                break
        if key is not None:  # frames that come after a key frame may be shown before it
            times = [self.time_of(packet.pts, packet.time_base) for packet in held]
            skipped += sum(time is not None and time < key for time in times)
        return skipped, key, held


def _to_tensor(frame: Any) -> Tensor:
    """Return a frame as uint8 (3, H, W), channels-last in memory, turned upright."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def _name_camera(number: int) -> tuple[str, dict[str, Any]]:
    """Return the name of a camera for FFmpeg, and the options that open it."""
    if sys.platform == "darwin":
        return str(number), {"format": "avfoundation", "options": {"framerate": "30"}}
    if sys.platform != "linux":
        raise InputError(
            f"camera {number}: cameras are read on Linux and macOS only, give an address such as rtsp://..."
        )
    device = f"/dev/video{number}"
    if not os.path.exists(device):
        raise InputError(f"there is no camera {number}: {device} does not exist")
    return device, {"format": "v4l2"}


def _describe(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).rstrip(".")
