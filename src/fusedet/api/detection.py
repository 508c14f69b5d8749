"""From a stream of batches to the detections of each image: test-time augmentation, tiles and their merging."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusedet.api import exported
from fusedet.config import Config
from fusedet.data.transforms import EvalTransform
from fusedet.errors import InputError
from fusedet.exporters import ExportedDetector
from fusedet.host_copy import copy_to_host
from fusedet.models.detectors import DetectorModule
from fusedet.models.detectors.cut_objects import find_cut, join_cut_objects
from fusedet.models.detectors.tta import ImageDetections, detect_augmented, merge_detections
from fusedet.models.protocols import InferenceDetector
from fusedet.models.roi.mask import paste_masks
from fusedet.types import Batch, Detections

AnyDetector = DetectorModule | ExportedDetector
"""A detector in PyTorch, or an exported file that detects as one does."""


def build_tta_transforms(config: Config, canvas: tuple[int, int] | None = None) -> tuple[EvalTransform, ...]:
    """Return the transforms of TTA: each of `test.scales`, with the aspect ratio of `data.size`, then each mirrored.

    Args:
        config: The config.
        canvas: Height and width that every augmented image must fit; None for no limit.
    """
    short, long = config.data.size
    sizes = [(scale, round(scale * long / short)) for scale in config.test.scales or (short,)]
    return tuple(
        exported.CanvasTransform(*size, flip=flip, antialias=config.data.antialias, canvas=canvas)
        if canvas
        else EvalTransform(*size, flip=flip, antialias=config.data.antialias)
        for flip in (False, True)[: 1 + config.test.flip]
        for size in sizes
    )


def detect_batch(detector: InferenceDetector, batch: Batch, device: torch.device) -> list[Detections]:
    """Return the detections of each image of a batch, as `detect_images` does."""
    return [detections for _, detections in detect_images(detector, [batch], device)]


@torch.no_grad()
def detect_images(
    detector: InferenceDetector, batches: Iterable[Batch], device: torch.device, ios: float | None = None
) -> Iterator[tuple[int, Detections]]:
    """Yield id and detections of each image, by descending score, in original pixels, on the CPU.

    Masks are pasted at the original size, not resized. Detections of augmented copies, and of all windows of an
    image, are merged by the detector's thresholds. One copy is on the device at a time. Its detections are copied once
    per batch; with masks, which need much memory, once per image.

    Args:
        detector: In eval mode, on `device`.
        batches: Batches of images, or of windows, those of an image in a row.
        device: Where the images go.
        ios: `test.tiles.ios`, from which `join_cut_objects` joins objects that windows cut.
    """
    options = {key: value for key, value in detector.selection.items() if key in ("iou", "max_det")}
    parts: list[ImageDetections] = []
    for batch in batches:
        of_copies = [
            detect_augmented(
                detector,
                replace(copy, tta_batches=(), targets=None, windows=batch.windows, is_last=batch.is_last).to(
                    device, non_blocking=True
                ),
            )
            for copy in (batch, *batch.tta_batches)
        ]
        ids: list[int] = []
        results: list[tuple[Tensor | None, ...]] = []
        for i, (size, window) in enumerate(zip(_list_image_sizes(batch), _list_windows(batch))):
            own = [detections[i] for detections in of_copies]
            number = len(parts) // len(own)
            parts += own if ios is None or window is None else [_mark_cut(part, window, size, number) for part in own]
            if window is not None and not batch.is_last[i]:
                continue
            merged = _merge(parts, ios if len(parts) > len(own) else None, **options)
            parts = []
            ids.append(batch.ids[i])
            if merged.masks is None:
                results.append((merged.boxes, merged.scores, merged.labels, None))
            else:
                masks = paste_masks(merged.masks, merged.boxes, size)
                results.append(copy_to_host((merged.boxes, merged.scores, merged.labels, masks)))
        for image_id, columns in zip(ids, copy_to_host(results), strict=True):
            yield image_id, Detections(*columns)  # type: ignore[arg-type]


def check_tile_size(key: str, size: int | None, strides: Sequence[int]) -> None:
    """Raise InputError for tiles smaller than the largest stride of a detector.

    Args:
        key: The setting, "data.tiles.size" or "test.tiles.size".
        size: Its value.
        strides: The strides of the detector's feature levels, finest first.
    """
    if size is not None and size < strides[-1]:
        raise InputError(
            f"{key}={size} is smaller than the largest stride of the feature pyramid, {strides[-1]} pixels: "
            f"take tiles of at least {strides[-1]}, or a smaller model.pyramid.coarsest"
        )


def get_strides(detector: AnyDetector) -> Sequence[int]:
    """Return the strides of a detector's feature levels, finest first."""
    if isinstance(detector, ExportedDetector):
        return detector.metadata.strides
    return tuple(detector.neck.levels.strides)


def _list_image_sizes(batch: Batch) -> list[tuple[int, int]]:
    """Return (height, width) of each image in original pixels; of a window, those of its image."""
    if batch.windows is not None:
        return [(height, width) for height, width in batch.windows[:, 2:].tolist()]
    return [(h, w) for h, w in (batch.sizes / batch.scales.flip(1)).round().long().tolist()]


def _list_windows(batch: Batch) -> list[tuple[int, int, int, int] | None]:
    """Return left, top, right and bottom of each window; None for images."""
    if batch.windows is None:
        return [None] * len(batch)
    sides = (batch.sizes / batch.scales.flip(1)).round().long().tolist()
    corners = batch.windows[:, :2].tolist()
    return [(left, top, left + width, top + height) for (left, top), (height, width) in zip(corners, sides)]


def _mark_cut(
    part: ImageDetections, window: tuple[int, int, int, int], size: tuple[int, int], number: int
) -> ImageDetections:
    """Say of each detection whether tile `number` cuts it."""
    low, high, sides = part.boxes.new_tensor([window[:2], window[2:], size[::-1]])
    is_cut = find_cut(part.boxes, low, high, sides)
    return part._replace(cut_by=torch.where(is_cut, number, -1))


def _merge(
    parts: Sequence[ImageDetections], ios: float | None, iou: float = 0.5, max_det: int = 100
) -> ImageDetections:
    if len(parts) == 1:
        return parts[0]
    if ios is None:
        return merge_detections(parts, iou, max_det)
    joined = join_cut_objects(merge_detections(parts, iou, None), ios)
    boxes, scores, labels, masks, _ = joined
    return ImageDetections(
        boxes[:max_det], scores[:max_det], labels[:max_det], None if masks is None else masks[:max_det]
    )
