"""The data that flows through the house: frozen, checked when made.

Boxes are float (x1, y1, x2, y2) in pixels of the network's input, continuous, with the origin at the image's top left corner.
Labels are 0..K-1; background is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Channels and strides of the maps that a backbone or neck promises, finest first."""

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
    """Anchors, or points as squares, of all levels, finest level first, row by row, all priors of a cell together.

    boxes (P, 4); strides (P,), the stride of each prior's level; counts, the priors per level (they sum to P).
    """

    boxes: Tensor
    strides: Tensor
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        _need(self.boxes.ndim == 2 and self.boxes.shape[1] == 4, f"boxes must be (P, 4), got {tuple(self.boxes.shape)}")
        _need(len(self.boxes) == len(self.strides), "one stride per prior")

    def __len__(self) -> int:
        return len(self.boxes)


torch.export.register_dataclass(Priors)  # a raw forward that gives priors exports


class Outputs(NamedTuple):
    """What a dense head's forward gives: its maps by name, per level, and the priors that they speak of."""

    maps: dict[str, list[Tensor]]
    priors: Priors


class Candidates(NamedTuple):
    """What a dense head's decode gives, before any selection.

    boxes (N, P, 4) or, one for each class, (N, P, K, 4), not clipped; scores (N, P, K) in 0..1, by which candidates are chosen;
    quality (N, P) in 0..1 or None: what the scores of the chosen ones are multiplied with before suppression (FCOS's centre-ness).
    """

    boxes: Tensor
    scores: Tensor
    quality: Tensor | None = None


class Proposals(NamedTuple):
    """Regions where a two-stage detector looks again, best first, in pixels of the network's input.

    boxes (N, R, 4), inside the image; scores (N, R) in 0..1; counts (N,), how many of an image's are real: the first ones.
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
        """Drop the padding that no image needs; synchronises with the GPU."""
        most = int(self.counts.max())
        masks = None if self.masks is None else self.masks[:, :most]
        return BatchDetections(self.boxes[:, :most], self.scores[:, :most], self.labels[:, :most], self.counts, masks)


@dataclass(frozen=True)
class _Moves:
    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same data on another device."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, _Moves)):
                changed[field.name] = value.to(device, non_blocking=non_blocking)
            elif isinstance(value, tuple) and value and isinstance(value[0], _Moves):
                changed[field.name] = tuple(item.to(device, non_blocking=non_blocking) for item in value)
        return replace(self, **changed)

    def pin_memory(self) -> Self:
        """The same data in page-locked memory (the loader calls it)."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, _Moves)):
                changed[field.name] = value.pin_memory()
            elif isinstance(value, tuple) and value and isinstance(value[0], _Moves):
                changed[field.name] = tuple(item.pin_memory() for item in value)
        return replace(self, **changed)


@dataclass(frozen=True)
class Target(_Moves):
    """The objects of one image.

    boxes (G, 4); labels (G,) int64; masks (G, H, W) bool or None; ignore (I, 4), regions that evaluation takes as neither object nor
    background (crowds, difficult objects), or None.
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
    """What was found in one image, best first.

    boxes (D, 4), scores (D,) in 0..1, labels (D,) int64, masks (D, H, W) bool or None.
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
        """boxes, scores, labels (and masks) by torchvision's names; labels stay 0..K-1."""
        found = {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}
        return found if self.masks is None else found | {"masks": self.masks}

    def to_coco(self, image_id: int = 0, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO's result form: [x, y, width, height] boxes, masks as RLE; labels become category ids where these are given (K,)."""
        corners = self.boxes.detach().cpu().double()
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
        found = zip(boxes, self.scores.tolist(), self.labels.tolist(), strict=True)
        results: list[dict[str, Any]] = [
            {"image_id": image_id, "category_id": category_ids[k] if category_ids else k, "bbox": box, "score": score}
            for box, score, k in found
        ]
        if self.masks is not None and results:
            from faster_coco_eval.core import mask as coco_mask

            columns = (
                self.masks.to("cpu", torch.uint8).mT.contiguous().numpy().T
            )  # (H, W, D), column by column as RLE runs
            for result, code in zip(results, coco_mask.encode(columns), strict=True):
                result["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
        return results

    def to_supervision(self) -> Any:
        """The same as `supervision.Detections`; raises ImportError with the command to install it."""
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
    """Images on their way to the network.

    images uint8 (N, 3, H, W), padded with zeros at the right and the bottom; sizes (N, 2) int64, height and width of
    the image inside the padding; ids, the images' ids in the dataset; scales (N, 2) float32, network pixels per
    original pixel along x and y; targets, one per image, or None; flipped, whether the images are mirrored left to right
    (said in testing alone); views, the same images seen in other ways, for testing at several sizes or with flips.
    """

    images: Tensor
    sizes: Tensor
    ids: tuple[int, ...]
    scales: Tensor
    targets: tuple[Target, ...] | None = None
    flipped: bool = False
    views: tuple[Batch, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.images)
        _need(
            self.images.ndim == 4 and self.images.shape[1] == 3,
            f"images must be (N, 3, H, W), got {tuple(self.images.shape)}",
        )
        _need(self.images.dtype == torch.uint8, f"images must be uint8, got {self.images.dtype}")
        _need(
            self.sizes.shape == (n, 2) and self.scales.shape == (n, 2) and len(self.ids) == n,
            "one size, scale and id per image",
        )
        _need(self.targets is None or len(self.targets) == n, "one target per image")
        _need(all(view.ids == self.ids for view in self.views), "views are of the same images")

    def __len__(self) -> int:
        return len(self.images)
