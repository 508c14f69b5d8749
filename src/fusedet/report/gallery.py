"""Thumbnails of errors and true positives, bounded in number, in bytes and in pixels that are decoded."""

import io
import math
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from PIL import Image
from torch import Tensor

from fusedet.data.dataset import DetectionDataset
from fusedet.data.dataset_images import read_dataset_image
from fusedet.data.large_images import LARGE, LargeImage, crop_image, open_large_image
from fusedet.errors import InputError
from fusedet.evaluation.coco_matching import rank_in_group
from fusedet.evaluation.image_matching import ImageMatches
from fusedet.evaluation.score_thresholds import find_score_bins
from fusedet.report.counts import BACKGROUND, CLASSIFICATION, CORRECT, DUPLICATE, KINDS, LOCALIZATION, MISSED
from fusedet.visualization.annotators import to_pil_image
from fusedet.visualization.page import make_jpeg_uri

PER_KIND = 20
"""Thumbnails of each kind that are chosen class by class, and as many that are spread over the scores."""

MOST_BYTES = 1_500_000
"""Bytes of all thumbnails; as text in the page they are a third more."""

MOST_PIXELS = 100_000_000
"""Pixels of the images that are decoded for them."""

_SIDE = 160  # pixels of a thumbnail's longer side
_NEIGHBORS = 12  # other instances whose boxes are drawn in a thumbnail

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class GalleryItem:
    """What a thumbnail shows.

    Attributes:
        image: Index in the dataset.
        kind: One of `KINDS`: what it is at each threshold up to `bin`.
        bin: In hundredths; -1 for an instance that no detection matches.
        detection: Index in `ImageMatches`, -1 without one.
        annotation: Index in the dataset, -1 without one. Above `bin` an instance that a detection matches is missed.
        label: Class of the detection, -1 without one.
        score: Its score.
    """

    image: int
    kind: str
    bin: int
    detection: int
    annotation: int
    label: int = -1
    score: float = math.nan

    def kind_at(self, threshold: int) -> str:
        """Return what it is at a threshold in hundredths, "" for nothing."""
        if threshold <= self.bin:
            return self.kind
        return MISSED if self.kind in (CORRECT, CLASSIFICATION, MISSED) else ""


@dataclass(frozen=True)
class Thumbnail:
    """A part of an image and what lies in it.

    Attributes:
        item: What it shows.
        data: A JPEG file.
        width: In pixels.
        height: In pixels.
        detection: The detection's box xyxy in the thumbnail, None without one.
        ground_truth: The instance's box, None without one.
        neighbors: Boxes of other instances.
    """

    item: GalleryItem
    data: bytes
    width: int
    height: int
    detection: Box | None
    ground_truth: Box | None
    neighbors: list[Box]

    @property
    def uri(self) -> str:
        """The JPEG file as a data URI."""
        return make_jpeg_uri(self.data)


def choose_items(dataset: DetectionDataset, pairs: ImageMatches, kinds: np.ndarray) -> list[GalleryItem]:
    """Choose what is shown, the kinds in turn.

    Half of each kind is chosen class by class: the largest missed instances, the detections of highest score. The other
    half is spread over the scores, so that every threshold has some.

    Args:
        dataset: The dataset.
        pairs: D detections and their matches.
        kinds: (D,) kind of each detection, as `counts.classify` returns it.
    """
    bins, area, image_of = find_score_bins(pairs.scores), dataset.area.numpy(), dataset.image_indices
    is_missed = pairs.counted.copy()
    is_missed[pairs.matches[pairs.matches >= 0]] = False
    missed = np.flatnonzero(is_missed)
    missed = missed[_in_turn(pairs.gt_labels[missed], area[missed])][: 2 * PER_KIND]
    groups = [[GalleryItem(int(image_of[j]), MISSED, -1, -1, j) for j in missed.tolist()]]
    for kind in (BACKGROUND, DUPLICATE, LOCALIZATION, CLASSIFICATION, CORRECT):
        own = np.flatnonzero(kinds == KINDS.index(kind))
        best = own[_in_turn(pairs.labels[own], pairs.scores[own])][:PER_KIND]
        own = own[np.argsort(pairs.scores[own], kind="stable")]
        at = np.searchsorted(pairs.scores[own], np.linspace(0.05, 1, PER_KIND, endpoint=False))
        spread = own[at[at < len(own)]]
        annotations = pairs.same_class_annotation if kind in (DUPLICATE, LOCALIZATION) else pairs.matches.clip(min=-1)
        groups.append(
            [
                GalleryItem(
                    int(pairs.images[d]),
                    kind,
                    int(bins[d]),
                    d,
                    int(annotations[d]),
                    int(pairs.labels[d]),
                    float(pairs.scores[d]),
                )
                for d in dict.fromkeys([*best.tolist(), *spread.tolist()])
            ]
        )
    return [item for row in zip_longest(*groups) for item in row if item is not None]


def make_thumbnails(
    dataset: DetectionDataset, pairs: ImageMatches, items: list[GalleryItem]
) -> tuple[list[Thumbnail], int]:
    """Cut the thumbnails of items, and count the images that cannot be read.

    The first items come first where `MOST_PIXELS` or `MOST_BYTES` are reached. An image is decoded once; of one
    that is too large for memory only the parts are decoded, where its format allows that.
    """
    by_image: dict[int, list[int]] = {}
    for at, item in enumerate(items):
        by_image.setdefault(item.image, []).append(at)
    made: dict[int, Thumbnail] = {}
    pixels, unread = MOST_PIXELS, 0
    for i, places in by_image.items():
        try:
            if (image := _open(dataset, i, pixels)) is None:
                continue
            pixels -= 0 if isinstance(image, LargeImage) else image.shape[1] * image.shape[2]
            for at in places:
                if (thumbnail := _cut(dataset, pairs, items[at], image)) is not None:
                    made[at] = thumbnail
        except (InputError, OSError):
            unread += 1
    kept, size = [], 0
    for at in sorted(made):
        size += len(made[at].data)
        if size <= MOST_BYTES:
            kept.append(made[at])
    return kept, unread


def _in_turn(labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return an order that takes the largest value of every class, then the second of every class, and so on."""
    order = np.lexsort((-values, labels))
    return order[np.lexsort((labels[order], rank_in_group(labels[order])))]


def _open(dataset: DetectionDataset, i: int, pixels: int) -> Tensor | LargeImage | None:
    """Read image i, or open one whose parts can be decoded; None for another one of more than `pixels`."""
    record = dataset[i]
    if record.tile is None and record.height * record.width > LARGE:
        large = open_large_image(record.path, dataset.channels, dataset.value_range, exif=dataset.exif)
        if large is not None:
            return large
    return read_dataset_image(dataset, record) if record.height * record.width <= pixels else None


def _cut(
    dataset: DetectionDataset, pairs: ImageMatches, item: GalleryItem, image: Tensor | LargeImage
) -> Thumbnail | None:
    """Cut an item out of its image; None where the part is too large for memory."""
    record, first = dataset[item.image], int(dataset.offsets[item.image])
    own = item.annotation - first if item.annotation >= 0 else -1
    boxes = [record.boxes[own]] if own >= 0 else []
    boxes += [pairs.boxes[item.detection]] if item.detection >= 0 else []
    corners = np.array(boxes)
    low, high = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
    sides = np.array([image.shape[2], image.shape[1]])
    window = np.minimum(sides, int(min(max(48.0, 1.5 * float((high - low).max())), float(sides.max()))))
    if isinstance(image, LargeImage) and window.prod() > LARGE:
        return None
    start = ((low + high) / 2 - window / 2).clip(0, sides - window).astype(int)
    (left, top), (right, bottom) = start.tolist(), (start + window).tolist()
    part = crop_image(image, (left, top, right, bottom))
    assert not isinstance(part, LargeImage), "a window of a large image is smaller than it"
    small = to_pil_image(part)
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    content = io.BytesIO()
    small.convert("RGB").save(content, "JPEG", quality=72)
    scale = small.width / part.shape[2]

    def place(box: np.ndarray) -> Box:
        x1, y1, x2, y2 = ((box - [left, top, left, top]) * scale).tolist()
        return x1, y1, x2, y2

    other = np.flatnonzero(
        (record.boxes[:, 2:] > start).all(axis=1) & (record.boxes[:, :2] < start + window).all(axis=1)
    )
    others = [place(record.boxes[j]) for j in other.tolist() if j != own and not record.eval_ignore[j]]
    return Thumbnail(
        item,
        content.getvalue(),
        small.width,
        small.height,
        place(pairs.boxes[item.detection]) if item.detection >= 0 else None,
        place(record.boxes[own]) if own >= 0 else None,
        others[:_NEIGHBORS],
    )
