"""Prediction of images and videos into a directory, in one process or many: the command `predict`."""

import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Unpack

from rich.console import Console, Group, RenderableType

from fusedet.api import batch_predict, run_dir
from fusedet.api.distributed import select_device
from fusedet.api.image_sources import Sources, describe_left_out
from fusedet.api.predict_videos import VideoCounts, VideoOptions, predict_videos
from fusedet.api.prediction_exports import Exports, parse_formats
from fusedet.api.predictor import SETTABLE as SETTABLE_OF_MODEL
from fusedet.api.predictor import Precision, load
from fusedet.api.progress import progress_bar
from fusedet.api.results import CommandResult, format_paths, group_lines, list_files
from fusedet.api.settings import Settings, refuse_other_keys, split_overrides, to_overrides
from fusedet.api.video_stream import import_tracker
from fusedet.data.video_parts import Part, is_stream
from fusedet.data.videos import import_av
from fusedet.errors import InputError, format_count, require_choice
from fusedet.exporters import find_export
from fusedet.process_ranks import get_ranks

SETTABLE_OF_FILES = ("data.workers", "device", "out")
SETTABLE = (*SETTABLE_OF_MODEL, *SETTABLE_OF_FILES)
"""What can be set for a prediction; all else follows from the weights."""
OnBadImage = Literal["error", "skip"]


@dataclass(frozen=True)
class PredictionSummary(CommandResult):
    """The written predictions.

    Attributes:
        counts: Numbers of images, videos, their frames, detections, detections of at least `score` (`shown`), images
            and videos that were skipped, and images that other processes still have to predict (`left`).
        files: The files written, by what they show; empty while images are missing.
        score: The least score of the detections that are drawn.
        rank: This process's number.
        left_out: Number of images in the directories whose formats are not read, by extension.
        notes: A sentence for each video that could not be read to its end, or whose sound was left out.
        skipped_videos: How many of the skipped are videos; `notes` has a sentence for each.
    """

    counts: dict[str, int]
    files: dict[str, Path]
    score: float
    rank: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    skipped_videos: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, the files and the notes."""
        return self.counts | {"files": format_paths(self.files), "left_out": self.left_out, "notes": list(self.notes)}

    def __rich__(self) -> RenderableType:
        if left := self.counts["left"]:
            return group_lines(
                [f"process {self.rank} is done, other processes still have to predict {format_count(left, 'image')}"]
            )
        counts, detections = self.counts, format_count(self.counts["detections"], "detection")
        frames = f"{format_count(counts['frames'], 'frame')} of {format_count(counts['videos'], 'video')}"
        seen = [format_count(counts["images"], "image")] * bool(counts["images"] or not counts["videos"])
        seen += [frames] * bool(counts["videos"])
        of_score = f"{counts['shown']} of them with a score of {self.score:g} or more"
        text = [f"{' and '.join(seen)}, {detections}, {of_score}", *self.notes]
        if skipped := self.counts["skipped"] - self.skipped_videos:
            text.append(
                f'{format_count(skipped, "image")} could not be read, listed under "skipped" in what was written'
            )
        if left_out := describe_left_out(self.left_out):
            text.append(left_out)
        return Group(group_lines(text), list_files(self.files))


def predict(
    run: str | Path,
    sources: str | Path | Iterable[str | Path],
    *overrides: str,
    score: float = 0.3,
    precision: Precision = "fp32",
    draw: bool = True,
    resume: bool = False,
    on_bad_image: OnBadImage = "error",
    jsonl: bool = False,
    crops: bool = False,
    save: str | Iterable[str] = (),
    every: int = 1,
    start: float | str = 0,
    end: float | str | None = None,
    track: bool = False,
    trust: bool = False,
    progress: Console | None = None,
    **settings: Unpack[Settings],
) -> PredictionSummary:
    """Predict the objects in image files, in COCO's format, and in videos, as JSON lines and drawn copies.

    For predictions in memory use `fusedet.load`.

    >>> fusedet.predict("runs/a", "images/", out="predictions")  # doctest: +SKIP

    Args:
        run: A run directory, a checkpoint or a name of published weights.
        sources: Files, directories, globs, lists of paths (`@FILE`), and "-" for such a list on standard input; for
            videos also the number of a camera ("0") and addresses ("rtsp://...").
        overrides: "key=value" texts for the keys of `SETTABLE`. `test.batch` images (1) are predicted at once,
            `data.workers` threads (2) read images ahead. `out` is the directory, by default predict, predict-2,
            ... in the run directory.
        score: The least score of the boxes that are drawn; all are written.
        precision: "fp32" or "bf16".
        draw: Whether copies of the images and videos with boxes are written.
        resume: Whether the directory may hold a part of the same prediction, which is kept.
        on_bad_image: "error": an image or video that cannot be read ends the prediction; "skip": it is listed.
        jsonl: Whether the JSON-lines files, one per process, stay instead of one predictions.json.
        crops: Whether the parts of the images in the boxes of at least `score` are written, to crops/CLASS.
        save: Formats beside COCO's json: "csv" (predictions.csv, a row per detection) and "yolo" (labels/NAME.txt, of
            the boxes of at least `score`, and classes.txt); as a list or joined by commas.
        every: Of a video, the first of each `every` frames is predicted.
        start: Seconds, or "1:30", from which a video is predicted.
        end: Seconds, or "1:30", up to which a video is predicted, by default its end.
        track: Whether the objects of a video are numbered (ByteTrack); tracks start with detections of `score`.
        trust: Whether the checkpoint's config may name classes of other packages, whose code then runs.
        progress: Shows how many images and frames are done, if it is a terminal.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: The run or a source does not exist, an image cannot be read, or the directory holds other files.
    """
    formats = parse_formats([save] if isinstance(save, str) else save)
    if not 0 <= score <= 1:
        raise InputError(f"score={score} must be 0 to 1")
    require_choice("precision", precision, Precision)
    require_choice("value of --on-bad-image", on_bad_image, OnBadImage)
    texts = refuse_other_keys(to_overrides(overrides, settings), *SETTABLE)
    options, of_model = split_overrides(texts, *SETTABLE_OF_FILES)
    rank, world, _ = get_ranks()
    if options.out is None and (world > 1 or resume):
        needed = "several processes need" if world > 1 else "--resume needs"
        raise InputError(f"{needed} a known output directory: add out=DIR")
    arguments = [str(sources)] if isinstance(sources, (str, Path)) else list(map(str, sources))
    if not arguments:
        raise InputError("which images? Write fusedet predict RUN SOURCE..., files, directories, globs, @FILE or -")
    if "-" in arguments and world > 1:
        raise InputError("several processes cannot share standard input: write the list to a file, and give @FILE")
    part = Part.parse(every, start, end)
    with ExitStack() as stack:
        paths = [
            _store_stdin(stack) if argument == "-" else argument for argument in arguments if not is_stream(argument)
        ]
        files = Sources(paths, ("image", "video"))
        images, videos = files.only("image"), [*files.only("video"), *filter(is_stream, arguments)]
        _check_videos(len(videos), part, track, world, resume)
        device = options.device if find_export(run) else str(select_device(options.device))
        predictor = load(run, *of_model, device=device, precision=precision, trust=trust)
        target = Path(options.out) if options.out else run_dir.find_free_path(run_dir.parent_of(run), "predict")
        workers, batch = options.data.workers, predictor.config.test.batch or 1
        exports = Exports(score, draw, formats, crops)
        count, written = images.count(), dict.fromkeys(batch_predict.COUNTS, 0)
        outputs: dict[str, Path] = {}
        hint = "; with --on-bad-image skip the others are predicted" if count + len(videos) > 1 else ""
        if count or not videos:
            asked = batch_predict.Options(exports, batch, jsonl, on_bad_image, hint, workers, rank, world)
            with progress_bar(None if rank else progress, count, "images") as advance:
                result = batch_predict.predict_images(
                    predictor, images, target, asked, precision=precision, resume=resume, advance=advance
                )
            outputs = {name: Path(path) for name, path in result.pop("files").items()}
            written |= result
        else:
            run_dir.check_new_dir(target)
        seen = VideoCounts()
        if videos:
            own = VideoOptions(exports, batch, on_bad_image, hint, part, score if track else None)
            seen = predict_videos(predictor, videos, target, own, progress)
            outputs |= {"videos": target / "videos"} if seen.videos else {}
    counts = {name: value + getattr(seen, name, 0) for name, value in written.items()}
    counts |= {"videos": seen.videos, "frames": seen.frames}
    return PredictionSummary(counts, outputs, score, rank, files.count_left_out(), tuple(seen.notes), seen.skipped)


def _check_videos(count: int, part: Part, track: bool, world: int, resume: bool) -> None:
    """Raise InputError for options that do not fit the number of videos."""
    if not count and (part != Part() or track):
        raise InputError("--every, --from, --to and --track are for videos: none is among the sources")
    if not count:
        return
    import_av()
    if track:
        import_tracker()
    if world > 1:
        raise InputError("several processes share images, not videos: start the prediction of videos without torchrun")
    if resume:
        raise InputError("--resume continues the prediction of images: a video is predicted in one go, leave it out")


def _store_stdin(stack: ExitStack) -> str:
    """Return standard input as @FILE, which can be read again."""
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "paths.txt"
    with file.open("w", encoding="utf-8", errors="surrogateescape") as written:
        written.writelines(sys.stdin)
    return f"@{file}"
