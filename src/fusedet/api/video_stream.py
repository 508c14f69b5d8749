"""Predictions of the frames of a video, in batches, and the tracks of their objects."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedet.api.prediction import Prediction
from fusedet.data.video_parts import Part
from fusedet.data.videos import Frame, Video
from fusedet.errors import InputError

Group = Sequence[tuple[Tensor, Path | None]]


def predict_frames(
    video: Video,
    predict: Callable[[Group, int], Iterable[Prediction]],
    part: Part,
    batch: int,
    track: float | None = None,
    on_sound: Callable[[Any], None] | None = None,
) -> Iterator[tuple[Frame, Prediction]]:
    """Yield the frames of a part of a video with their predictions.

    Args:
        video: The open video.
        predict: Predicts images (3, H, W) uint8, given with their paths, `batch` at once.
        part: Which frames.
        batch: Frames at once; of a camera or address one, so that none waits for another.
        track: The least score of a detection that starts a track; None does not track.
        on_sound: Takes the packets of the sound.

    Raises:
        InputError: The video is truncated or damaged, after the predictions of the frames before.
    """
    tracker = None if track is None else Tracker(track, video.rate / part.every)
    path = Path(video.source)
    for group in _group(video.read(part, on_sound), 1 if video.is_live else batch):
        predictions = predict([(frame.image, path) for frame in group], batch)
        for frame, prediction in zip(group, predictions):
            yield frame, prediction if tracker is None else tracker.update(prediction, frame.time)


def _group(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    """Yield lists of frames; the last one before an error or the end may be shorter."""
    group: list[Frame] = []
    try:
        for frame in frames:
            group.append(frame)
            if len(group) == size:
                yield group
                group = []
    except InputError:
        if group:
            yield group
        raise
    if group:
        yield group


def import_tracker() -> Any:
    """Return the class of ByteTrack in the package trackers.

    Raises:
        InputError: It is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # supervision recommends OpenCV
            from trackers import ByteTrackTracker
    except ImportError as error:
        raise InputError('tracks need the package trackers: pip install "fusedet[track]"') from error
    return ByteTrackTracker


class Tracker:
    """Numbers the objects of a video by ByteTrack.

    Args:
        score: The least score of a detection that starts a track; lower ones only continue tracks.
        rate: Frames per second, which say for how many frames a lost track is kept.

    Raises:
        InputError: The package trackers is not installed.

    References:
        Zhang et al., ByteTrack: Multi-Object Tracking by Associating Every Detection Box, ECCV 2022.
    """

    def __init__(self, score: float, rate: Fraction) -> None:
        self._tracker = import_tracker()(
            frame_rate=float(rate), track_activation_threshold=score, high_conf_det_threshold=score
        )

    def update(self, prediction: Prediction, time: Fraction) -> Prediction:
        """Return the prediction of the next frame, at a time in seconds, with `track_ids`; ids count from 1."""
        detections = replace(prediction, masks=None).to_supervision()
        detections.data["row"] = np.arange(len(prediction))
        tracked = self._tracker.update(detections, timestamp=float(time))
        ids = torch.full((len(prediction),), -1)
        if len(tracked):
            numbers = torch.from_numpy(np.asarray(tracked.tracker_id)).long()
            ids[torch.from_numpy(tracked.data["row"])] = torch.where(numbers < 0, -1, numbers + 1)
        return replace(prediction, track_ids=ids)
