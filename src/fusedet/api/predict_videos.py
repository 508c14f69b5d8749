"""Prediction of videos and streams into a directory: a line per frame, and copies with drawn frames."""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fusedet.api import run_dir
from fusedet.api.prediction_exports import Exports, write_class_names, write_csv
from fusedet.api.prediction_lines import Info, describe_prediction
from fusedet.api.predictor import Predictor
from fusedet.api.progress import progress_bar
from fusedet.api.video_stream import predict_frames
from fusedet.data.video_parts import Part, is_stream
from fusedet.data.video_writing import VideoWriter
from fusedet.data.videos import Video
from fusedet.errors import InputError, StorageError, format_count


@dataclass(frozen=True)
class VideoOptions:
    """How videos become predictions.

    Attributes:
        exports: What is written beside the JSON lines.
        batch: Frames predicted at once.
        bad: What happens if a video cannot be read, or not to its end.
        hint: What the error then adds.
        part: Which frames are predicted.
        track: The least score of a detection that starts a track; None does not track.
    """

    exports: Exports
    batch: int
    bad: Literal["error", "skip"]
    hint: str
    part: Part
    track: float | None


@dataclass
class VideoCounts:
    """What was done.

    Attributes:
        videos: Videos of which frames were predicted.
        frames: Predicted frames.
        detections: Detections.
        shown: Detections of at least `exports.score`.
        skipped: Videos that could not be read.
        notes: A sentence for each video that could not be read to its end or whose sound was left out.
    """

    videos: int = 0
    frames: int = 0
    detections: int = 0
    shown: int = 0
    skipped: int = 0
    notes: list[str] = field(default_factory=list)


def predict_videos(
    predictor: Predictor, sources: Iterable[str | Path], target: Path, options: VideoOptions, console: Console | None
) -> VideoCounts:
    """Predict videos, one after the other, into target/videos.

    Of each video, NAME.jsonl has a line per frame and NAME.mp4 the frames with boxes, at their times and with the
    sound. What the exports write of an image, they write of each frame.

    Args:
        predictor: The model.
        sources: Files, numbers of cameras and addresses.
        target: The output directory, which is created with the first video that can be opened.
        options: How they are predicted.
        console: Shows how many frames of a video are done, if it is a terminal.

    Raises:
        InputError: A video cannot be read, or not to its end; the frames before are written.
        StorageError: A file cannot be written.
    """
    if predictor.config.data.channels != 3:
        raise InputError(f"videos have 3 channels, the model takes data.channels={predictor.config.data.channels}")
    folder, counts, names = target / "videos", VideoCounts(), set[str]()
    for source in map(str, sources):
        name = _choose_name(source, names)
        before = counts.frames
        try:
            _predict_video(predictor, source, name, folder, options, counts, console)
        except StorageError:
            raise
        except InputError as error:
            done = counts.frames - before
            kept = f"; {format_count(done, 'frame')} before it are in {folder / name}.jsonl" if done else ""
            if not done:
                run_dir.remove_files(folder, f"{name}.jsonl")
            if options.bad == "error":
                raise InputError(f"{error}{kept}{options.hint}") from error
            counts.notes.append(f"{error}{kept}")
            counts.skipped += not done
        finally:
            counts.videos += counts.frames > before
    if counts.videos and "yolo" in options.exports.save:
        write_class_names(target / "classes.txt", predictor.categories)
    return counts


def _choose_name(source: str, names: set[str]) -> str:
    """Return the name of a video's files, different from those before."""
    stem = f"camera-{source}" if source.isdecimal() else "stream" if is_stream(source) else Path(source).stem
    name = run_dir.choose_unused_name(stem, names.__contains__)
    names.add(name)
    return name


def _predict_video(
    predictor: Predictor,
    source: str,
    name: str,
    folder: Path,
    options: VideoOptions,
    counts: VideoCounts,
    console: Console | None,
) -> None:
    exports, part, file = options.exports, options.part, folder / f"{name}.jsonl"
    of_frames = replace(exports, drawn=False)
    with ExitStack() as stack:
        video = stack.enter_context(Video(source))
        if not folder.is_dir():
            run_dir.create_run_dir(folder)
            of_frames.create_folders(folder.parent)
        opened = stack.enter_context(file.open("wb"))
        writer = stack.enter_context(VideoWriter(folder, name, video, part.start)) if exports.drawn else None
        advance = stack.enter_context(progress_bar(console, video.count(part), f"{name}, frames"))
        on_sound = writer.add_sound if writer else None
        for frame, prediction in predict_frames(
            video, predictor.predict_batch, part, options.batch, options.track, on_sound
        ):
            record: Info = {"frame": frame.index, "time": round(float(frame.time), 6), "file_name": source}
            record |= describe_prediction(prediction, frame.index, exports.score)
            try:
                opened.write((json.dumps(record) + "\n").encode())
                opened.flush()
            except OSError as error:
                raise StorageError(f"{file} cannot be written: {error.strerror}") from error
            if writer:
                writer.add(prediction.plot(score=exports.score), frame)
            of_frames.write_image_files(prediction, f"{name}-{frame.index:06d}", folder.parent)
            counts.frames += 1
            counts.detections += len(prediction)
            counts.shown += record["shown"]
            advance(1)
        if writer and video.sound and not writer.has_sound:
            counts.notes.append(f"{writer.file} has no sound: its format does not take that of {source}")
    if "csv" in exports.save:
        write_csv(folder / f"{name}.csv", _read(file), predictor.categories, ("frame", "time"), ("track_id",))


def _read(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        yield from map(json.loads, lines)
