"""Log of the images that a training replaced because they could not be read, with a limit on their share."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fusedet.atomic_io import write_atomically
from fusedet.collectives import gather_objects
from fusedet.errors import InputError


class ReplacedImage(NamedTuple):
    """One replacement of an image.

    Attributes:
        epoch: The epoch, from 1.
        batch: The batch of the epoch, from 1.
        image_id: The id of the bad image.
        file: The file of the bad image.
        reason: Why the image could not be read.
    """

    epoch: int
    batch: int
    image_id: int
    file: str
    reason: str


class BadImageLog:
    """The replaced images of a training, in `skipped.csv` of its output directory.

    The file is the same for any number of processes and after a resume. Each process appends to its own file; `begin`
    and `close` merge the files. All processes must call `begin`, `end` and `close` alike: their bad images are counted
    together.

    Args:
        folder: The output directory of the training.
        images: Number of training images.
        share: Share of the images that may be bad, rounded up to whole images.
        rank: Rank of this process.
    """

    def __init__(self, folder: Path, images: int, share: float, rank: int = 0) -> None:
        self.folder, self.images, self.share, self.rank = folder, images, share, rank
        self.rows: list[ReplacedImage] = []  # of this process; on rank 0 also those of all processes before a resume
        self.bad: set[int] = set()
        self.begun = False

    @property
    def file(self) -> Path:
        """The file of this process."""
        return self.folder / ("skipped.csv" if self.rank == 0 else f"skipped-{self.rank}.csv")

    def begin(self, epoch: int, batch: int) -> None:
        """Begin or resume at a batch of an epoch, both from 0; later rows of an earlier attempt are dropped."""
        if self.begun:
            return
        self.begun = True
        if self.rank == 0:
            files = sorted(self.folder.glob("skipped*.csv"))
            rows: Counter[ReplacedImage] = Counter()
            # the union, not the sum: after a kill during the merge below, a row can be in two files
            for file in files:
                rows |= Counter(row for row in _read_rows(file) if (row.epoch, row.batch) < (epoch + 1, batch + 1))
            self.rows = sorted(rows.elements())
            self._rewrite(self.rows)
            for file in files:
                if file != self.file:
                    file.unlink()
        self._gather_bad_ids()

    def add(self, row: ReplacedImage) -> None:
        """Append a replacement; raises InputError where there are more bad images than allowed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        is_new = not self.file.exists()
        with self.file.open("a", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            writer = csv.writer(stream)
            if is_new:
                writer.writerow(ReplacedImage._fields)
            writer.writerow(row)
        self.rows.append(row)
        self.bad.add(row.image_id)
        self._require_few(row)

    def end(self) -> None:
        """End an epoch; raises InputError in all processes where they met too many bad images together."""
        self._gather_bad_ids()
        self._require_few()

    def close(self) -> list[ReplacedImage]:
        """Merge the files of all processes, in the order of the training, and return the rows."""
        rows = sorted(row for own in gather_objects(self.rows) for row in own)
        if not self.rank:
            self._rewrite(rows)
        gather_objects([])  # a barrier: no file is removed before the merged one is written
        if self.rank:
            self.file.unlink(missing_ok=True)
        return rows

    def _gather_bad_ids(self) -> None:
        self.bad |= {row.image_id for own in gather_objects(self.rows) for row in own}

    def _require_few(self, last: ReplacedImage | None = None) -> None:
        if len(self.bad) <= count_allowed_bad_images(self.images, self.share):
            return
        reason = f", the last: {last.reason}" if last else ""
        raise InputError(
            f"{len(self.bad)} of the {self.images} training images cannot be read, more than "
            f"train.max_bad_images={self.share:g} allows{reason}; fusedet doctor lists them, raise the share to train "
            "without them"
        )

    def _rewrite(self, rows: list[ReplacedImage]) -> None:
        if not rows:
            self.file.unlink(missing_ok=True)
            return
        text = io.StringIO(newline="")
        csv.writer(text).writerows([ReplacedImage._fields, *rows])
        write_atomically(self.file, text.getvalue().encode(errors="surrogateescape"))


def count_allowed_bad_images(images: int, share: float) -> int:
    """Return how many of the images may be bad: the share, rounded up.

    >>> count_allowed_bad_images(8, 0.01), count_allowed_bad_images(1000, 0.01), count_allowed_bad_images(1000, 0)
    (1, 10, 0)
    """
    return math.ceil(round(images * share, 6))


def format_replacement_summary(rows: Iterable[ReplacedImage], file: Path) -> str:
    """Summarize replacements in one line for the user."""
    rows = list(rows)
    reasons = {row.file: row.reason for row in rows}
    images = "image was" if len(reasons) == 1 else "images were"
    times = "once" if len(rows) == 1 else f"{len(rows)} times"
    first = next(iter(reasons.values()))
    return f"warning: {len(reasons)} training {images} replaced {times}, see {file}; the first: {first}"


def _read_rows(file: Path) -> list[ReplacedImage]:
    """Read a file, without a last line that a kill has cut short; raises InputError for a damaged file."""
    content = file.read_bytes()
    text = content[: content.rfind(b"\n") + 1].decode("utf-8", "surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""))
    rows = []
    try:
        for row in reader:
            if tuple(row) != ReplacedImage._fields:
                epoch, batch, image_id, name, reason = row
                rows.append(ReplacedImage(int(epoch), int(batch), int(image_id), name, reason))
    except (ValueError, csv.Error) as error:
        raise InputError(
            f"{file}, line {reader.line_num} is damaged: a row is epoch, batch, image_id, file, reason, the first "
            "three whole numbers; correct or delete that row, and give the command again with --resume"
        ) from error
    return rows
