"""The data types that pass between packages: frozen, and validated when they are made.

Boxes are float (x1, y1, x2, y2) in pixels of the network's input, continuous, with the origin at the image's top left
corner.
Labels are 0..K-1; background is never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

Features = list[Tensor]
"""Feature maps, finest first, each (N, C, H, W)."""

MULTIPLE = 32
"""Images are padded to multiples of this, the largest stride of a usual backbone."""

Losses = dict[str, Tensor]
"""Named loss terms, scalars, unweighted."""


def _need(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


@dataclass(frozen=True)
class Levels:
    """Channels and strides of the feature maps of a backbone or neck, finest first."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        _need(
            len(self.channels) == len(self.strides) > 0,
            f"channels {self.channels} and strides {self.strides} must pair up",
        )
        _need(list(self.strides) == sorted(set(self.strides)), f"strides must increase, got {self.strides}")

    def __len__(self) -> int:
        return len(self.strides)


@dataclass(frozen=True)
class Priors:
    """Anchors, or anchor points as squares, of all levels: finest first, row by row, the priors of a cell together.

    Attributes:
        boxes: (P, 4).
        strides: (P,), the stride of each prior's level.
        counts: The number of priors per level; they sum to P.
    """

    boxes: Tensor
    strides: Tensor
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        _need(self.boxes.ndim == 2 and self.boxes.shape[1] == 4, f"boxes must be (P, 4), got {tuple(self.boxes.shape)}")
        _need(self.boxes.shape[0] == self.strides.shape[0], "one stride per prior")

    def __len__(self) -> int:
        return len(self.boxes)


torch.export.register_dataclass(Priors)  # so that a model whose forward returns priors can be exported


class Outputs(NamedTuple):
    """The outputs of a dense head's forward: maps by name and level, and the priors that they belong to."""

    maps: dict[str, list[Tensor]]
    priors: Priors


class Candidates(NamedTuple):
    """The decoded outputs of a dense head, before any selection.

    Attributes:
        boxes: (N, P, 4) or, with one box per class, (N, P, K, 4), not clipped.
        scores: (N, P, K) in 0..1; candidates are selected by them.
        quality: (N, P) in 0..1 or None; the factor of the selected scores before NMS (FCOS's center-ness).
    """

    boxes: Tensor
    scores: Tensor
    quality: Tensor | None = None


class Proposals(NamedTuple):
    """The proposals of an RPN, highest score first, in pixels of the network's input, padded to R per image.

    Attributes:
        boxes: (N, R, 4), inside the image.
        scores: (N, R) in 0..1.
        counts: (N,), how many of an image's proposals are real: the first ones.
    """

    boxes: Tensor
    scores: Tensor
    counts: Tensor


class BatchDetections(NamedTuple):
    """Final detections of N images as tensors, highest score first, padded to D per image.

    Shape:
        boxes (N, D, 4); scores (N, D) in 0..1; labels (N, D) int64; counts (N,): how many of an image's detections are
        real, the first ones; masks (N, D, m, m), probabilities inside the boxes, or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor
    masks: Tensor | None = None

    def trimmed(self) -> BatchDetections:
        """Drop the padding that no image needs, synchronizing with a GPU once; `counts` of the result is on the CPU."""
        counts = self.counts.cpu()
        most = int(counts.max())
        masks = None if self.masks is None else self.masks[:, :most]
        return BatchDetections(self.boxes[:, :most], self.scores[:, :most], self.labels[:, :most], counts, masks)


@dataclass(frozen=True)
class _Moves:
    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy the data to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy the data to page-locked memory; the data loader calls it."""
        return self._map(Tensor.pin_memory)

    def _map(self, copy: Callable[[Tensor], Tensor]) -> Self:
        """Copy every tensor, those of nested data too."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = copy(value)
            elif isinstance(value, tuple) and value and isinstance(value[0], _Moves):
                changed[field.name] = tuple(item._map(copy) for item in value)
        return replace(self, **changed)


@dataclass(frozen=True)
class Target(_Moves):
    """The ground truth of one image.

    Attributes:
        boxes: (G, 4).
        labels: (G,) int64.
        masks: (G, H, W) bool or None.
        ignore: (I, 4) or None; crowds and difficult instances, which evaluation counts as nothing.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    ignore: Tensor | None = None

    def __post_init__(self) -> None:
        _need(self.boxes.ndim == 2 and self.boxes.shape[1] == 4, f"boxes must be (G, 4), got {tuple(self.boxes.shape)}")
        _need(self.labels.shape == self.boxes.shape[:1], "one label per box")
        _need(self.masks is None or len(self.masks) == len(self.boxes), "one mask per box")

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class Detections(_Moves):
    """The detections in one image, highest score first.

    Attributes:
        boxes: (D, 4).
        scores: (D,) in 0..1.
        labels: (D,) int64.
        masks: (D, H, W) bool or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        _need(self.boxes.ndim == 2 and self.boxes.shape[1] == 4, f"boxes must be (D, 4), got {tuple(self.boxes.shape)}")
        _need(self.scores.shape == self.labels.shape == self.boxes.shape[:1], "one score and one label per box")

    def __len__(self) -> int:
        return len(self.boxes)

    def to_dict(self) -> dict[str, Tensor]:
        """Return boxes, scores, labels and any masks by torchvision's names; labels stay 0..K-1."""
        tensors = {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}
        return tensors if self.masks is None else tensors | {"masks": self.masks}

    def to_coco(self, image_id: int = 0, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return COCO results: boxes as [x, y, width, height], masks as RLE.

        Args:
            image_id: The image's id in the dataset.
            category_ids: The category id of each label; without them the labels are used.
        """
        corners = self.boxes.detach().cpu().double()
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
        rows = zip(boxes, self.scores.tolist(), self.labels.tolist(), strict=True)
        results: list[dict[str, Any]] = [
            {"image_id": image_id, "category_id": category_ids[k] if category_ids else k, "bbox": box, "score": score}
            for box, score, k in rows
        ]
        if self.masks is not None and results:
            from faster_coco_eval.core import mask as coco_mask

            columns = self.masks.to("cpu", torch.uint8).mT.contiguous().numpy().T  # (H, W, D), column by column as RLE
            for result, rle in zip(results, coco_mask.encode(columns), strict=True):
                result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        return results

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`.

        Raises:
            ImportError: supervision is not installed; the message has the command that installs it.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision() needs the package supervision: pip install supervision") from error
        masks = None if self.masks is None else self.masks.cpu().numpy()
        return supervision.Detections(
            xyxy=self.boxes.float().cpu().numpy(),
            confidence=self.scores.float().cpu().numpy(),
            class_id=self.labels.cpu().numpy(),
            mask=masks,
        )


@dataclass(frozen=True)
class Batch(_Moves):
    """A batch of preprocessed images.

    Attributes:
        images: (N, C, H, W) uint8, padded with zeros at the right and the bottom; C is 3 for RGB.
        sizes: (N, 2) int64, height and width of each image inside the padding.
        ids: The images' ids in the dataset.
        scales: (N, 2) float32, network pixels per original pixel along x and y.
        targets: One per image, or None.
        flipped: Whether the images are flipped horizontally; set in testing only.
        tta_batches: The same images at other sizes or flipped, for test-time augmentation.
        windows: (N, 4) int64 where the images are windows of others, in testing only: left and top of each window, and
            height and width of its image, in original pixels.
        is_last: Whether each window is the last one of its image.
    """

    images: Tensor
    sizes: Tensor
    ids: tuple[int, ...]
    scales: Tensor
    targets: tuple[Target, ...] | None = None
    flipped: bool = False
    tta_batches: tuple[Batch, ...] = ()
    windows: Tensor | None = None
    is_last: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.images)
        _need(
            self.images.ndim == 4 and self.images.shape[1] > 0,
            f"images must be (N, C, H, W), got {tuple(self.images.shape)}",
        )
        _need(self.images.dtype == torch.uint8, f"images must be uint8, got {self.images.dtype}")
        _need(
            self.sizes.shape == (n, 2) and self.scales.shape == (n, 2) and len(self.ids) == n,
            "one size, scale and id per image",
        )
        _need(self.targets is None or len(self.targets) == n, "one target per image")
        _need(all(batch.ids == self.ids for batch in self.tta_batches), "tta_batches are of the same images")
        is_windowed = self.windows is not None
        _need(len(self.is_last) == n * is_windowed, "windows need to know which one is the last of its image")

    def __len__(self) -> int:
        return len(self.images)
