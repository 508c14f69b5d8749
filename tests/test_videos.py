"""Videos: decoding with the right times, parts, broken files, and copies with sound."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fusedet.api.image_sources import Sources
from fusedet.data.video_parts import Part, is_stream, parse_time
from fusedet.data.video_writing import VideoWriter
from fusedet.data.videos import Frame, Video
from fusedet.errors import InputError
from making_videos import HEIGHT, SIDE, UNEVEN, WIDTH, make_video, read_index

av = pytest.importorskip("av")

WHOLE = Part()


def read(file: Path, part: Part = WHOLE) -> list[Frame]:
    with Video(file) as video:
        return list(video.read(part))


def read_to_error(items: Iterator[Any]) -> tuple[list[Any], str]:
    """What comes before an error, and its sentence."""
    seen = []
    try:
        for item in items:
            seen.append(item)
    except InputError as error:
        return seen, str(error)
    return seen, ""


def to_array(image: Tensor) -> np.ndarray:
    return np.asarray(image.permute(1, 2, 0))


def milliseconds(frames: list[Frame]) -> list[int]:
    return [round(1000 * frame.time) for frame in frames]


def read_sound(file: Path) -> list[tuple[float, bytes]]:
    """The packets of the sound with their times."""
    with av.open(str(file)) as container:
        (stream,) = container.streams.audio
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(stream) if p.pts is not None]


# -- decoding


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_frames_come_with_their_indices_and_uneven_times(name: str, tmp_path: Path) -> None:
    file = make_video(tmp_path / name, UNEVEN)
    frames = read(file)
    assert [frame.index for frame in frames] == list(range(len(UNEVEN)))
    assert [read_index(to_array(frame.image)) for frame in frames] == list(range(len(UNEVEN)))
    assert milliseconds(frames) == UNEVEN
    assert frames[0].image.shape == (3, HEIGHT, WIDTH)
    assert frames[0].image.dtype == torch.uint8
    with Video(file) as video:
        assert float(video.duration or 0) == pytest.approx(1.7, abs=0.05)
        count = video.count(WHOLE)
        assert count is not None
        assert count == len(UNEVEN) or name == "a.mkv", "mkv knows the duration only"


@pytest.mark.parametrize(
    ("every", "start", "end", "indices"),
    [
        (4, 0, None, [0, 4, 8, 12, 16, 20]),
        (1, "0.5", "0.94", [5, 6, 7, 8]),
        (2, 0.501, 1.3, [6, 8, 10]),
        (1, "0:01.35", None, list(range(13, 21))),
        (1, 0, 0.05, [0, 1]),
    ],
)
def test_parts(every: int, start: float | str, end: float | str | None, indices: list[int], tmp_path: Path) -> None:
    """Frames from a time on are those of the whole video: key frames before it are not counted twice or lost."""
    frames = read(make_video(tmp_path / "a.mp4", UNEVEN), Part.parse(every, start, end))
    assert [frame.index for frame in frames] == indices
    assert [read_index(to_array(frame.image)) for frame in frames] == indices
    assert milliseconds(frames) == [UNEVEN[i] for i in indices]


def test_frames_before_the_part_are_not_decoded(tmp_path: Path) -> None:
    """Key frames are every eighth, so before the part, 16 frames are skipped."""
    file = make_video(tmp_path / "a.mp4", UNEVEN)
    with Video(file) as video:
        skipped, key, held = video._skip_to(video._demux(WHOLE, None), Fraction(16, 10))
    assert (skipped, key) == (16, Fraction(UNEVEN[16], 1000))
    assert len(held) <= 5


def test_rotated_videos_become_upright(tmp_path: Path) -> None:
    """Turned by 90 degrees against the clock, the square at the left side stands at the bottom."""
    (frame, *_) = read(make_video(tmp_path / "a.mp4", [0, 40], rotation=90))
    assert frame.image.shape == (3, WIDTH, HEIGHT)
    y, x = (frame.image.float().mean(0) > 200).nonzero().unbind(1)
    assert (int(y.min()), int(y.max()) + 1) == (WIDTH - SIDE, WIDTH)
    assert (int(x.min()), int(x.max()) + 1) == (16, 16 + SIDE)


def test_truncated_video_is_read_up_to_the_break(tmp_path: Path) -> None:
    file = make_video(tmp_path / "a.mkv", range(0, 4000, 40), sound="aac")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with Video(file) as video:
        seen, error = read_to_error(video.read(WHOLE))
    assert re.search(r"a\.mkv is truncated or damaged at [12]\.\d s of 4\.\d s: the file ends there", error)
    assert 25 < len(seen) < 75
    assert [read_index(to_array(frame.image)) for frame in seen[:25]] == list(range(25))


def test_error_of_the_decoder_ends_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames that the decoder still holds come before the error."""
    file = make_video(tmp_path / "a.mp4")
    with Video(file) as video:
        packets = video._demux(WHOLE, None)

        def damaged(part: Part, on_sound: Any) -> Any:
            for number, packet in enumerate(packets):
                if number == 12:
                    raise av.error.InvalidDataError(1, "Invalid data found")
                yield packet

        monkeypatch.setattr(video, "_demux", damaged)
        seen, error = read_to_error(video.read(WHOLE))
    assert "is truncated or damaged at 0.4 s of 0.8 s: Invalid data found" in error
    assert [frame.index for frame in seen] == list(range(12))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no video that can be read, or its beginning is damaged"),
        (b"text" * 100, "is no video that can be read, or its beginning is damaged"),
        (None, "there is no video"),
    ],
)
def test_what_is_no_video_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        Video(file)


def test_sound_without_frames_and_huge_frames_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
        container.mux(stream.encode(None))
    with pytest.raises(InputError, match=r"a\.mkv holds no video"):
        Video(tmp_path / "a.mkv")
    file = make_video(tmp_path / "b.mp4", [0])
    monkeypatch.setenv("FUSEDET_MAX_PIXELS", "6000")
    with pytest.raises(InputError, match="frames of more than 6000 pixels"):
        Video(file)


def test_a_part_behind_the_end(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no frame from 5 s on: it ends at 0\.8 s"):
        read(make_video(tmp_path / "a.mp4"), Part.parse(1, 5, None))


def test_streams_and_cameras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(map(is_stream, ["0", "12", "rtsp://a/b", "HTTP://a"]))
    assert not any(map(is_stream, ["a.mp4", "c:/a.mp4", "-", ""]))
    (tmp_path / "0").write_text("")
    assert not is_stream("0"), "a file of that name"
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(InputError, match="there is no camera 97: /dev/video97 does not exist"):
        Video("97")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(InputError, match="camera 97: cameras are read on Linux and macOS only"):
        Video("97")


def test_an_address_without_a_server() -> None:
    with pytest.raises(InputError, match=r"rtsp://127\.0\.0\.1:1/door cannot be opened: Connection refused"):
        Video("rtsp://127.0.0.1:1/door")


@pytest.mark.parametrize(
    ("value", "seconds"), [(0, 0), (2.5, 2.5), ("12.25", 12.25), ("1:30", 90), ("1:02:03.5", 3723.5), ("0:05.", 5)]
)
def test_times(value: float | str, seconds: float) -> None:
    assert parse_time("from", value) == seconds


@pytest.mark.parametrize("value", ["-1", -1, "1m", "", "1:2:3:4", "nan", "1e3"])
def test_wrong_times(value: Any) -> None:
    with pytest.raises(InputError, match=r"from=.* must be seconds, such as 12\.5, or 1:30 or 1:02:03"):
        parse_time("from", value)


def test_wrong_parts() -> None:
    with pytest.raises(InputError, match="every=0 must be 1 or more"):
        Part.parse(0, 0, None)
    with pytest.raises(InputError, match="to=1 must be later than from=1:00"):
        Part.parse(1, "1:00", 1)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r'videos need the package av: pip install "fusedet\[video\]"'):
        Video("a.mp4")


# -- writing


def write(source: Path, folder: Path, part: Part = WHOLE) -> VideoWriter:
    """Copy a video frame by frame."""
    with Video(source) as video, VideoWriter(folder, "copy", video, part.start) as writer:
        for frame in video.read(part, writer.add_sound):
            writer.add(Image.fromarray(to_array(frame.image)), frame)
    return writer


@pytest.mark.parametrize(("name", "sound", "ending"), [("a.mp4", "aac", ".mp4"), ("a.mkv", "pcm_s16le", ".mkv")])
def test_copies_have_the_same_times_and_sound(name: str, sound: str, ending: str, tmp_path: Path) -> None:
    source = make_video(tmp_path / name, UNEVEN, sound=sound)
    writer = write(source, tmp_path)
    assert writer.file == tmp_path / f"copy{ending}"
    assert writer.has_sound
    frames = read(writer.file)
    assert milliseconds(frames) == UNEVEN
    assert [read_index(to_array(frame.image)) for frame in frames] == list(range(len(UNEVEN)))
    expected, copied = read_sound(source), read_sound(writer.file)
    assert [data for _, data in copied] == [data for _, data in expected], "not encoded again"
    assert [time for time, _ in copied] == pytest.approx([time for time, _ in expected], abs=2e-3)


def test_copy_of_a_part_keeps_frames_and_sound_together(tmp_path: Path) -> None:
    source = make_video(tmp_path / "a.mp4", UNEVEN, sound="aac")
    writer = write(source, tmp_path, Part.parse(2, 0.5, 1.4))
    with av.open(str(writer.file)) as container:
        times = [round(1000 * frame.time) for frame in container.decode(video=0)]
    assert times == [0, 40, 440, 800, 880], "of the frames at 500, 540, 940, 1300 and 1380"
    expected = [(time - 0.5, data) for time, data in read_sound(source) if 0.5 <= time < 1.4]
    copied = read_sound(writer.file)
    assert [data for _, data in copied] == [data for _, data in expected]
    assert [time for time, _ in copied] == pytest.approx([time for time, _ in expected], abs=2e-3)


def test_odd_and_changing_sizes_are_written(tmp_path: Path) -> None:
    """H.264 needs even sides: the last row and column are repeated. Frames of another size are resized."""
    source = make_video(tmp_path / "a.mp4", [0, 40, 80])
    with Video(source) as video, VideoWriter(tmp_path, "copy", video) as writer:
        for frame, size in zip(video.read(WHOLE), [(95, 63), (95, 63), (40, 30)]):
            writer.add(Image.fromarray(to_array(frame.image)).resize(size), frame)
    assert [tuple(frame.image.shape) for frame in read(writer.file)] == [(3, 64, 96)] * 3


def test_sound_that_no_format_takes_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_video(tmp_path / "a.mp4", [0, 40, 80], sound="aac")
    original = VideoWriter._open

    def refuse(self: VideoWriter, with_sound: bool) -> None:
        original(self, with_sound)
        if with_sound:
            raise av.error.InvalidDataError(1, "no tag")

    monkeypatch.setattr(VideoWriter, "_open", refuse)
    writer = write(source, tmp_path)
    assert not writer.has_sound
    assert len(read(writer.file)) == 3
    with av.open(str(writer.file)) as container:
        assert not container.streams.audio


def test_sources_of_both_kinds(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.png", "c.txt", "d.MKV"):
        (tmp_path / name).write_bytes(b"x")
    both = Sources([str(tmp_path)], ("image", "video"))
    assert [path.name for path in both] == ["a.mp4", "b.png", "d.MKV"]
    assert [path.name for path in both.only("video")] == ["a.mp4", "d.MKV"]
    assert [path.name for path in Sources([str(tmp_path)])] == ["b.png"]
    with pytest.raises(InputError, match=r"a\.mp4 matches no image"):
        Sources([str(tmp_path / "a.mp4")])
