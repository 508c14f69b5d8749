"""Predictions of any number of images, appended to one JSON-lines file per process and joined at the end."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from torch import Tensor

from fusedet.api.image_sources import Sources
from fusedet.api.prediction import Prediction
from fusedet.api.prediction_exports import Exports
from fusedet.api.prediction_lines import Info, describe_prediction, join_lines, list_line_files, open_lines, read_lines
from fusedet.api.predictor import Predictor
from fusedet.api.run_dir import choose_unused_name, create_run_dir, remove_files
from fusedet.atomic_io import write_atomically
from fusedet.data.large_images import LargeImage
from fusedet.errors import InputError, StorageError
from fusedet.file_hash import hash_file

T = TypeVar("T")
_PATIENCE = 60.0  # seconds for the first process to make the directory
COUNTS = ("images", "detections", "shown", "skipped", "left")


@dataclass(frozen=True)
class Options:
    """How images become predictions.

    Attributes:
        exports: What is written beside COCO's json.
        batch: Images predicted at once; with `test.tiles`, tiles.
        jsonl: Whether the JSON-lines files stay instead of one predictions.json.
        bad: What happens if an image cannot be read.
        hint: What the error then adds.
        workers: Threads that read images ahead.
        rank: This process's number.
        world: Number of processes that share the images.
    """

    exports: Exports
    batch: int
    jsonl: bool
    bad: Literal["error", "skip"]
    hint: str
    workers: int
    rank: int
    world: int


@dataclass(frozen=True)
class _Image:
    """An image of a batch; `is_done` if only others of its batch lack a line."""

    number: int
    path: Path
    name: str
    is_done: bool


def predict_images(
    predictor: Predictor,
    sources: Sources,
    target: Path,
    options: Options,
    *,
    precision: str = "fp32",
    resume: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> Info:
    """Predict the sources into the directory `target`, which holds predictions.json in COCO's format at the end.

    Images are numbered from 1 in the order of the sources. Process `rank` takes every `world`-th batch and appends a
    line per image to its own file; whichever process sees all images done joins the files. One batch is in memory at a
    time.

    Args:
        predictor: The model.
        sources: The images.
        target: A new directory, or with `resume` that of the same prediction.
        options: How the images are predicted.
        precision: The predictor's, which a resumed prediction must share.
        resume: Whether images that have a line are kept; the result equals that of an uninterrupted prediction.
        advance: Called with the number of further images that are done.

    Returns:
        Numbers of images, detections, detections of at least `exports.score` (shown), skipped images and images that
        other processes still have to predict (left), and the files.

    Raises:
        InputError: `target` holds other files, the request differs from that of the begun prediction, a line is
            damaged, or an image cannot be read; the earlier images are then in predictions.json, and without any the
            directory is removed.
        StorageError: A file cannot be written.
    """
    config = predictor.config
    request: Info = {
        "weights": hash_file(predictor.source),
        **{f"test.{key}": value for key, value in config.tree()["test"].items()},
        "data.size": list(config.data.size),
        "data.antialias": config.data.antialias,
        "data.range": config.tree()["data"]["range"],
        "precision": precision,
        "images": sources.count(),
        "jsonl": options.jsonl,
        **options.exports.to_dict(),
        "categories": predictor.categories,
    }
    begun = _begin(target, request, options.rank, resume)
    if begun.get("done"):
        advance(request["images"])
        return dict(begun["done"])
    try:
        _append(predictor, sources, target, options, request["images"], advance)
    except InputError:
        if options.world == 1:
            _end_early(target, options, request)
        raise
    return _finish(target, options, request)


def prefetch(read: Callable[[Any], T], items: Iterable[Any], workers: int) -> Iterator[T]:
    """Yield read(item) of each item, in order, while `workers` threads are at most two items each ahead."""
    if not workers:
        yield from map(read, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Any] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _begin(target: Path, request: Info, rank: int, resume: bool) -> Info:
    """Make the directory, or return what predict.json says of the begun prediction after comparing the request."""
    file = target / "predict.json"
    if not rank and not (resume and file.is_file()):
        if resume and target.is_dir() and any(target.iterdir()):
            raise InputError(f"out={target} holds no prediction that can be resumed: choose another directory")
        create_run_dir(target)
        write_atomically(file, json.dumps({"request": request}, indent=2).encode())
    end = time.monotonic() + _PATIENCE
    while not file.is_file():
        if time.monotonic() > end:
            raise InputError(
                f"{file} is missing: process 0 makes it; all processes need the same out=DIR on a shared disk"
            )
        time.sleep(0.1)
    begun = _read_begun(file)
    for key, value in request.items():
        if (earlier := begun["request"].get(key)) != value:
            raise InputError(
                f"{target} was begun with {key} {_shorten(earlier)}, now it is {_shorten(value)}: "
                "give the same settings, or choose another out"
            )
    return begun


def _read_begun(file: Path) -> Info:
    try:
        begun = json.loads(file.read_bytes())
        done = begun.get("done")
        is_whole = isinstance(begun["request"], dict) and (
            done is None or (all(type(done[key]) is int for key in COUNTS) and isinstance(done["files"], dict))
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise InputError(f"{file} is damaged: choose another out=DIR")
    return dict(begun)


def _append(
    predictor: Predictor, sources: Sources, target: Path, options: Options, total: int, advance: Callable[[int], None]
) -> None:
    """Append the missing lines of this process's batches to its file."""
    file = target / f"predictions-{options.rank}-of-{options.world}.jsonl"
    options.exports.create_folders(target)
    decode = partial(_decode, predictor=predictor)
    with ExitStack() as stack:
        opened = stack.enter_context(file.open("ab+"))
        opened.seek(0)
        opened.truncate(sum(len(line) for line in opened if line.endswith(b"\n")))  # the last one may be torn
        missing = _missing(sources, open_lines(target, stack), target, options, total, advance)
        decoded = prefetch(decode, missing, options.workers)
        while batch := list(islice(decoded, options.batch)):
            try:
                for image, prediction in _predict(predictor, batch, options.batch):
                    if not image.is_done:
                        opened.write(_format_line(image, prediction, target, options))
                opened.flush()
            except StorageError as error:
                raise StorageError(f"{error}; continue with --resume") from error
            except OSError as error:
                reason = f"{error.filename or file} cannot be written: {error.strerror or error}"
                raise StorageError(f"{reason}; continue with --resume") from error
            advance(len(batch))


def _predict(
    predictor: Predictor, batch: Sequence[tuple[_Image, Tensor | LargeImage | InputError]], size: int
) -> Iterator[tuple[_Image, Prediction | InputError]]:
    """Yield each image of a batch with its prediction, or with why it cannot be read.

    A large image is not read before it is predicted. Its batch is predicted image by image, since an error ends a call.
    """
    readable = [(pixels, image.path) for image, pixels in batch if not isinstance(pixels, InputError)]
    has_large = any(isinstance(pixels, LargeImage) for pixels, _ in readable)
    predictions = None if has_large else predictor.predict_batch(readable, size)
    for image, pixels in batch:
        if isinstance(pixels, InputError):
            yield image, pixels
            continue
        try:
            own = next(predictions or predictor.predict_batch([(pixels, image.path)], size))
        except InputError as error:
            if not isinstance(pixels, LargeImage):
                raise
            yield image, error
        else:
            yield image, own


def _missing(
    sources: Sources,
    lines: Sequence[BinaryIO],
    target: Path,
    options: Options,
    total: int,
    advance: Callable[[int], None],
) -> Iterator[_Image]:
    """Yield this process's images that lack a line, and all others of their batches, which must form again."""
    records = read_lines(lines)
    record = next(records, None)
    # all stems, and whether each is taken; only where files are named after images, since of a million they take 0.1 GB
    names = dict.fromkeys((path.stem for path in sources), False) if options.exports.list_folders() else None
    batch: list[_Image] = []
    for number, path in enumerate(sources, 1):
        is_done = False
        if record and record["id"] == number:
            if record["file_name"] != str(path):
                raise InputError(f"{target} holds predictions of other images than the sources now: choose another out")
            is_done, record = True, next(records, None)
        name = path.stem if names is None else _choose_name(path.stem, number, names)
        batch.append(_Image(number, path, name, is_done))
        if len(batch) == options.batch or number == total:
            is_own = (number - 1) // options.batch % options.world == options.rank
            if is_own and not all(image.is_done for image in batch):
                yield from batch
            else:
                advance(len(batch))
            batch = []


def _choose_name(stem: str, number: int, names: dict[str, bool]) -> str:
    """Return an image's stem, or where another image has it, one with the image's number that no stem equals."""
    name = choose_unused_name(f"{stem}-{number}", names.__contains__) if names.get(stem) else stem
    names[name] = True
    return name


def _decode(image: _Image, predictor: Predictor) -> tuple[_Image, Tensor | LargeImage | InputError]:
    try:
        return image, predictor.open_image(image.path)
    except InputError as error:
        return image, error


def _format_line(image: _Image, prediction: Prediction | InputError, target: Path, options: Options) -> bytes:
    """Return an image's line, and write its files; raise InputError for an image that must not be skipped."""
    record: Info = {"id": image.number, "file_name": str(image.path)}
    if not isinstance(prediction, InputError):
        try:
            options.exports.write_image_files(prediction, image.name, target)
        except StorageError:
            raise
        except InputError as error:  # a large image is read again
            prediction = error
    if isinstance(prediction, InputError):
        if options.bad == "error":
            raise InputError(f"{prediction}{options.hint}") from prediction
        record["skipped"] = str(prediction)
    else:
        record |= describe_prediction(prediction, image.number, options.exports.score)
    return (json.dumps(record) + "\n").encode()


def _end_early(target: Path, options: Options, request: Info) -> None:
    """Join the lines of the images that are done, or remove the directory if there are none."""
    with ExitStack() as stack:
        lines = open_lines(target, stack)
        is_empty = next(read_lines(lines), None) is None
        if not is_empty and not options.jsonl:
            join_lines(lines, target, request["categories"])
    if is_empty:
        files = [file.name for file in list_line_files(target)]
        remove_files(target, "predict.json", *files, *options.exports.list_folders())


def _finish(target: Path, options: Options, request: Info) -> Info:
    """Join the files if all images are done, and return the summary."""
    begun, files = target / "predict.json", list_line_files(target)
    counts = dict.fromkeys(COUNTS, 0)
    with ExitStack() as stack:
        try:
            lines = open_lines(target, stack)
        except FileNotFoundError:
            lines = []  # another process has joined and removed the files
        for record in read_lines(lines):
            counts["skipped" if "skipped" in record else "images"] += 1
            counts["detections"] += len(record.get("annotations", ()))
            counts["shown"] += record.get("shown", 0)
        counts["left"] = request["images"] - counts["images"] - counts["skipped"]
        if done := _read_begun(begun).get("done"):
            return dict(done)
        if counts["left"]:
            return counts | {"files": {}}
        exported = options.exports.write_summary_files(target, read_lines(lines), request["categories"])
        if not options.jsonl:
            join_lines(lines, target, request["categories"])
    written = {f.stem: str(f) for f in files} if options.jsonl else {"predictions": str(target / "predictions.json")}
    summary = counts | {"files": written | exported}
    write_atomically(begun, json.dumps({"request": request, "done": summary}, indent=2).encode())
    for file in () if options.jsonl else files:
        file.unlink(missing_ok=True)
    return summary


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."
