"""Images that could not be read in the middle of a training: replaced by others, listed in the run, and no more than a stated share."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import distributed

from fusedet.atomic_io import write_atomically
from fusedet.errors import InputError


class ReplacedImage(NamedTuple):
    """One time that an image was replaced: in which epoch and batch (from 1), the image's id and file, and what was wrong."""

    epoch: int
    batch: int
    image_id: int
    file: str
    reason: str


class BadImageLog:
    """What a training had to replace, in skipped.csv of its folder; the same file for any number of processes and after a resume.

    share: of the `images`, how many different ones may be bad, at least one. Each process writes down its own at once; they come
    together when an epoch begins and ends, so all processes call `begin`, `end` and `close` alike.
    """

    def __init__(self, folder: Path, images: int, share: float, rank: int = 0, world: int = 1) -> None:
        self.folder, self.images, self.share, self.rank, self.world = folder, images, share, rank, world
        self.rows: list[ReplacedImage] = []  # of this process; of all of them before the run began, for the first
        self.bad: set[int] = set()
        self.begun = False

    @property
    def file(self) -> Path:
        """Where this process writes."""
        return self.folder / ("skipped.csv" if self.rank == 0 else f"skipped-{self.rank}.csv")

    def begin(self, epoch: int, batch: int) -> None:
        """The training goes on with this batch of this epoch (both from 0): what an earlier attempt listed from there on is forgotten."""
        if self.begun:
            return
        self.begun = True
        if self.rank == 0:
            parts = sorted(self.folder.glob("skipped*.csv"))
            rows: Counter[ReplacedImage] = Counter()
            for part in (
                parts
            ):  # not added up: a part may be in the whole list already, and be left of a process that was killed below
                rows |= Counter(row for row in _read(part) if (row.epoch, row.batch) < (epoch + 1, batch + 1))
            self.rows = sorted(rows.elements())
            self._rewrite(self.rows)
            for part in parts:
                if part != self.file:
                    part.unlink()
        self._share()

    def add(self, row: ReplacedImage) -> None:
        """Write one down. Raises InputError where it is one image too many."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = not self.file.exists()
        with self.file.open("a", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            writer = csv.writer(stream)
            if new:
                writer.writerow(ReplacedImage._fields)
            writer.writerow(row)
        self.rows.append(row)
        self.bad.add(row.image_id)
        self._check(row)

    def end(self) -> None:
        """An epoch is over. Raises InputError in all processes where they met too many together."""
        self._share()
        self._check()

    def close(self) -> list[ReplacedImage]:
        """All processes' rows in one file, in the order of the training; gives them."""
        rows = sorted(row for part in _gathered(self.rows, self.world) for row in part)
        if not self.rank:
            self._rewrite(rows)
        _gathered([], self.world)  # nobody removes a part before the whole list is there
        if self.rank:
            self.file.unlink(missing_ok=True)
        return rows

    def _share(self) -> None:
        self.bad |= {row.image_id for part in _gathered(self.rows, self.world) for row in part}

    def _check(self, last: ReplacedImage | None = None) -> None:
        if len(self.bad) <= count_allowed_bad_images(self.images, self.share):
            return
        raise InputError(
            f"{len(self.bad)} of the {self.images} training images cannot be read, more than train.max_bad_images={self.share:g} allows"
            f"{f', the last: {last.reason}' if last else ''}; fusedet doctor lists them, raise the share if they shall be trained around"
        )

    def _rewrite(self, rows: list[ReplacedImage]) -> None:
        if not rows:
            self.file.unlink(missing_ok=True)
            return
        text = io.StringIO(newline="")
        csv.writer(text).writerows([ReplacedImage._fields, *rows])
        write_atomically(self.file, text.getvalue().encode(errors="surrogateescape"))


def count_allowed_bad_images(images: int, share: float) -> int:
    """How many of the images may be bad: the share, rounded up.

    >>> allowed(8, 0.01), allowed(1000, 0.01), allowed(1000, 0)
    (1, 10, 0)
    """
    return math.ceil(round(images * share, 6))


def format_replacement_summary(rows: Iterable[ReplacedImage], file: Path) -> str:
    """One line for the user."""
    rows = list(rows)
    files = {row.file: row.reason for row in rows}
    plural = "image was" if len(files) == 1 else "images were"
    times = "once" if len(rows) == 1 else f"{len(rows)} times"
    return (
        f"warning: {len(files)} training {plural} replaced {times}, see {file}; the first: {next(iter(files.values()))}"
    )


def _read(file: Path) -> list[ReplacedImage]:
    """The rows of a list; one that was cut short when its process was killed is left out. Raises InputError for a list that is damaged."""
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1].decode("utf-8", "surrogateescape")
    rows = csv.reader(io.StringIO(whole, newline=""))
    found = []
    try:
        for row in rows:
            if tuple(row) != ReplacedImage._fields:
                epoch, batch, image_id, name, reason = row
                found.append(ReplacedImage(int(epoch), int(batch), int(image_id), name, reason))
    except (ValueError, csv.Error) as error:
        raise InputError(
            f"{file}, line {rows.line_num} is damaged: a row is epoch, batch, image_id, file, reason, the first three whole numbers; "
            "correct or delete that row, and give the command again with --resume"
        ) from error
    return found


def _gathered(rows: list[ReplacedImage], world: int) -> list[list[ReplacedImage]]:
    if world == 1:
        return [rows]
    everyone: list[list[ReplacedImage]] = [[] for _ in range(world)]
    distributed.all_gather_object(everyone, rows)
    return everyone
