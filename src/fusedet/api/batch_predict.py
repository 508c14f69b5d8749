"""Predictions of any number of images: written in parts, each whole or not at all, so that they can be gone on with and shared out."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from torch import Tensor

from fusedet.api.image_sources import Sources
from fusedet.api.predict import Prediction, Predictor
from fusedet.api.prediction_files import Info, info_of, join, text
from fusedet.api.run_dir import fresh
from fusedet.atomic_io import remove_leftovers, write_atomically
from fusedet.data.image_decoding import to_tensor
from fusedet.errors import InputError

Reading = tuple[int, Path, Tensor | InputError]
PART = 1000
COUNTS = ("images", "detections", "shown", "skipped")
_PATIENCE = 60.0  # seconds for the first process to make the folder


@dataclass(frozen=True)
class Options:
    """How images become predictions.

    batch: images at once; score: the least of what is drawn and counted as shown; drawn: whether copies with boxes are made;
    part: images per part, by default `PART`, or fewer so that each process has some; parts: whether the parts stay as they are, or
    become one predictions.json; bad: what happens where an image cannot be read; workers: threads that read ahead;
    rank, world: this process's number, and how many share the images.
    """

    batch: int = 1
    score: float = 0.3
    drawn: bool = False
    part: int | None = None
    parts: bool = False
    bad: Literal["error", "skip"] = "error"
    workers: int = 2
    rank: int = 0
    world: int = 1


def predict(
    predictor: Predictor,
    sources: Sources,
    target: Path,
    options: Options,
    *,
    precision: str = "fp32",
    resume: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> Info:
    """Predict the sources into the folder `target`: predictions.json in COCO's form, scores included, or with options.parts its parts.

    Images are numbered from 1 in the order of the sources. What is in memory is one part's detections. With `resume` finished parts are
    not predicted again. Of several processes each takes its parts, in turn; who finishes last puts them together. advance: told of images
    that are done. Gives images, detections, shown, skipped (of all processes as far as they are done), left (parts of other processes
    that are still to come) and files.
    Raises InputError where target holds anything without `resume`, or predictions that were asked for differently, and for an image
    that cannot be read, with what was found before it in predictions.json.
    """
    total = sources.count()
    config = predictor.config
    seen = {"size": list(config.data.size), "antialias": config.data.antialias}
    asked = {
        "weights": _sha(predictor.source),
        "options": {"test": config.tree()["test"], **seen, "precision": precision},
        "images": total,
        "batch": options.batch,
        "score": options.score,
        "drawn": options.drawn,
        "parts": options.parts,
    }
    known = _begin(target, asked, options, resume)
    if known.get("done"):
        advance(total)
        return dict(known["done"])
    size = known["asked"]["part"]
    work = _Work(predictor, target, options, size, several=total > size or options.world > 1)
    files = iter(sources)
    for number in itertools.count():
        if not (paths := list(itertools.islice(files, size))):
            break
        work.do(number, paths, advance)
    return work.finish(number)


def _begin(target: Path, asked: Info, options: Options, resume: bool) -> Info:
    """What the folder is made of, once the first process has made it, or as it was begun; raises InputError where that is another."""
    file = target / "predict.json"
    if not options.rank and not (resume and file.is_file()):
        if resume and target.is_dir() and any(target.iterdir()):
            raise InputError(f"out={target} holds no predictions to go on with: choose another folder")
        fresh(target)
        part = options.part or min(PART, -(-asked["images"] // options.world))
        write_atomically(file, json.dumps({"asked": {**asked, "part": part}}, indent=2).encode())
    end = time.monotonic() + _PATIENCE
    while not file.is_file():
        if time.monotonic() > end:
            raise InputError(
                f"{file} has not come: process 0 makes it; all processes need the same out=FOLDER on a common disk"
            )
        time.sleep(0.1)
    known = _known(file)
    then = known["asked"]
    for key, value in {**asked, "part": options.part or then["part"]}.items():
        if then.get(key) != value:
            raise InputError(
                f"{target} was begun with {key} {_short(then.get(key))}, now it is {_short(value)}: ask the same, or choose another out"
            )
    return known


def _known(file: Path) -> Info:
    """What predict.json says; raises InputError where it is damaged."""
    try:
        known = json.loads(file.read_bytes())
        asked, done = known["asked"], known.get("done")
        whole = isinstance(asked, dict) and type(asked["part"]) is int and asked["part"] > 0
        whole &= done is None or (
            all(type(done[key]) is int for key in (*COUNTS, "left")) and isinstance(done["files"], dict)
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise InputError(f"{file} is damaged: choose another out=FOLDER")
    return dict(known)


class _Work:
    """One process's share of a folder's parts."""

    def __init__(self, predictor: Predictor, target: Path, options: Options, size: int, several: bool) -> None:
        self.predictor, self.target, self.options, self.size, self.several = predictor, target, options, size, several
        self.folder, self.images = target / "parts", target / "images"
        self.folder.mkdir(exist_ok=True)
        self.head = {
            "categories": [{"id": c, "name": name} for c, name in zip(predictor.category_ids, predictor.names)]
        }
        if options.world == 1:
            remove_leftovers(self.folder)
        if options.drawn:
            if not several:  # all of them are drawn again
                shutil.rmtree(self.images, ignore_errors=True)
            self.images.mkdir(exist_ok=True)

    def file(self, number: int) -> Path:
        """Part `number`, from 0."""
        return self.folder / f"part-{number:05}.json"

    def do(self, number: int, paths: list[Path], advance: Callable[[int], None]) -> None:
        """Predict a part, unless it is there, or another process's."""
        names = hashlib.sha256("\0".join(map(str, paths)).encode(errors="surrogateescape")).hexdigest()
        if (file := self.file(number)).is_file():
            if info_of(file)["names"] != names:
                raise InputError(f"{file} is of other images than the sources stand for now: choose another out")
            return advance(len(paths))
        if number % self.options.world != self.options.rank:
            return advance(len(paths))
        part = _Part({"part": number, "first": number * self.size + 1, "names": names})
        try:
            for found in self._found(part, paths):
                self._note(part, found)
                advance(1)
        except BaseException:
            # what was found before is not lost; of several processes the parts stand
            if self.options.world == 1 and not self.options.parts:
                content = part.content(self.head)
                join(
                    [*map(self.file, range(number)), content],
                    self.target / "predictions.json",
                    skipped=bool(part.skipped),
                )
            raise
        write_atomically(file, text(part.content(self.head)).encode(errors="surrogatepass"))

    def finish(self, count: int) -> Info:
        """Put the parts together where all of them are there."""
        with FileLock(self.target / ".lock"):
            known = _known(self.target / "predict.json")
            if known.get("done"):  # another process was the last one
                return dict(known["done"])
            infos = [info_of(file) for file in map(self.file, range(count)) if file.is_file()]
            figures: Info = {key: sum(info[key] for info in infos) for key in COUNTS} | {"left": count - len(infos)}
            if figures["left"]:
                return figures | {"files": {}}
            if self.options.parts:
                files = {"predictions": str(self.target / "index.json"), "parts": str(self.folder)}
                index = {
                    **figures,
                    "parts": [{"file": f"parts/{self.file(info['part']).name}", **info} for info in infos],
                }
                write_atomically(self.target / "index.json", json.dumps(index, indent=1).encode())
            else:
                files = {"predictions": str(self.target / "predictions.json")}
                join(
                    [self.file(i) for i in range(count)],
                    self.target / "predictions.json",
                    skipped=figures["skipped"] > 0,
                )
            done = figures | {"files": files | ({"images": str(self.images)} if self.options.drawn else {})}
            write_atomically(self.target / "predict.json", json.dumps({**known, "done": done}, indent=2).encode())
            if not self.options.parts:
                shutil.rmtree(self.folder)
            return done

    def _found(self, part: _Part, paths: Sequence[Path]) -> Iterator[tuple[int, Prediction]]:
        """The predictions of a part's images by their numbers; those that cannot be read are noted, or raise."""
        group: list[tuple[int, Path, Tensor]] = []
        for number, path, image in ahead(_read, list(enumerate(paths, start=part.info["first"])), self.options.workers):
            if isinstance(image, InputError):
                if self.options.bad == "error":
                    yield from self._together(group)
                    raise InputError(f"{image}; with --on-bad-image skip the others are predicted") from image
                part.skipped.append({"id": number, "file_name": str(path), "reason": str(image)})
                continue
            group.append((number, path, image))
            if len(group) == self.options.batch:
                yield from self._together(group)
                group = []
        yield from self._together(group)

    def _together(self, group: list[tuple[int, Path, Tensor]]) -> Iterator[tuple[int, Prediction]]:
        found = self.predictor.together([(image, path) for _, path, image in group])
        return zip((number for number, _, _ in group), found)

    def _note(self, part: _Part, found: tuple[int, Prediction]) -> None:
        number, one = found
        part.add(number, one, self.options.score)
        if self.options.drawn:
            assert one.path is not None
            stem = one.path.stem
            if self.several or (self.images / f"{stem}.jpg").exists():
                stem = f"{stem}-{number}"
            one.plot(self.images / f"{stem}.jpg", self.options.score)


class _Part:
    """What is found in the images of a part."""

    def __init__(self, info: Info) -> None:
        self.info = info
        self.images: list[Info] = []
        self.annotations: list[Info] = []
        self.skipped: list[Info] = []
        self.shown = 0

    def add(self, number: int, found: Prediction, score: float) -> None:
        """Take up an image's detections."""
        assert found.image is not None
        height, width = found.image.shape[1:]
        self.images.append({"id": number, "file_name": str(found.path), "height": height, "width": width})
        areas = (
            (found.boxes[:, 2:] - found.boxes[:, :2]).double().prod(dim=1)
            if found.masks is None
            else found.masks.sum(dim=(1, 2))
        )
        for one, area in zip(found.to_coco(number), areas.tolist()):
            self.annotations.append({"id": len(self.annotations) + 1, **one, "area": area, "iscrowd": 0})
        self.shown += int((found.scores >= score).sum())

    def content(self, head: Info) -> Info:
        """A part as it is written: figures first, so that they can be read alone."""
        counts = {
            "images": len(self.images),
            "detections": len(self.annotations),
            "shown": self.shown,
            "skipped": len(self.skipped),
        }
        return {
            "info": self.info | counts,
            "images": self.images,
            **head,
            "annotations": self.annotations,
            "skipped": self.skipped,
        }


def ahead(read: Callable[[Any], Reading], items: Iterable[Any], workers: int) -> Iterator[Reading]:
    """read(item) of each item, in order; `workers` threads are at most two items each ahead of what is asked for."""
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


def _read(item: tuple[int, Path]) -> Reading:
    number, path = item
    try:
        return number, path, to_tensor(path)
    except InputError as error:
        return number, path, error


def _sha(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _short(value: Any) -> str:
    shown = text(value)
    return shown if len(shown) <= 200 else shown[:200] + "..."
