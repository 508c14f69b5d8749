"""Prediction: a checkpoint alone becomes a model that takes images of any kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fusedet import visualization
from fusedet.api.load_model import rebuild, weights_file
from fusedet.api.settings import Sections, refuse_other_keys, to_overrides
from fusedet.config import Config, overridden, parse
from fusedet.data.collate import collate_views, make_samples
from fusedet.data.dataset import ImageAnnotations
from fusedet.data.image_decoding import to_tensor
from fusedet.data.transforms import EvalTransform
from fusedet.errors import InputError
from fusedet.models.detectors import DetectorModule, prepare_for_inference, selection_options
from fusedet.models.detectors.tta import detect_view, merge_detections
from fusedet.models.roi.mask import paste_masks
from fusedet.types import Batch, Detections

Precision = Literal["fp32", "bf16"]
SETTABLE = ("test", "data.size", "data.antialias")
"""What can be set for a trained detector; all else follows from its weights."""


@dataclass(frozen=True)
class Prediction(Detections):
    """Detections in the pixels of the image as it was given, with the names of the classes, and the image itself.

    image (3, H, W) uint8; names (K,); category_ids (K,), the dataset's own; path, where the image came from a file.
    """

    image: Tensor | None = None
    names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    path: Path | None = None

    def to_coco(self, image_id: int = 0, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """As `Detections.to_coco`, with the dataset's own category ids by default."""
        return super().to_coco(image_id, category_ids or self.category_ids)

    def plot(self, path: str | Path | None = None, score: float = 0.3) -> Image.Image:
        """The image with the boxes and masks of `score` and more drawn on it; saved where a path is given."""
        if self.image is None:
            raise ValueError("this prediction holds no image to draw on")
        keep = self.scores >= score
        masks = None if self.masks is None else self.masks[keep]
        drawn = visualization.draw_boxes(
            self.image, self.boxes[keep], self.labels[keep], self.names, self.scores[keep], masks
        )
        if path is not None:
            drawn.save(path)
        return drawn


class Predictor:
    """A trained detector that takes images: `fusedet.load` makes it.

    names and category_ids (K,) are those of the data that it was trained on; config is its run's.
    """

    def __init__(
        self, detector: DetectorModule, config: Config, names: Sequence[str], category_ids: Sequence[int], source: Path
    ) -> None:
        self.detector, self.config, self.source = detector, config, source
        self.names, self.category_ids = tuple(names), tuple(category_ids)
        self.views = views(config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.detector.backbone.scale.device

    def predict(self, source: Any, batch: int = 1) -> Prediction | list[Prediction]:
        """What is in an image, or, for a list, in each of its images, `batch` of them at a time.

        An image is a path, bytes of a file, a PIL image, an RGB numpy array (H, W, 3) or (H, W) of uint8, or a tensor (3, H, W) of
        uint8 or of floats in 0..1. Raises InputError for an image that cannot be read.
        """
        if isinstance(source, (list, tuple)):
            return list(self.stream(source, batch))
        return next(self.stream([source], 1))

    def stream(self, sources: Iterable[Any], batch: int = 1) -> Iterator[Prediction]:
        """The same for any number of images, one after the other, in the order in which they come."""
        group: list[tuple[Tensor, Path | None]] = []
        for source in sources:
            try:
                group.append((to_tensor(source), Path(source) if isinstance(source, (str, Path)) else None))
            except InputError:
                yield from self.together(group)  # what came before it is not lost
                raise
            if len(group) == batch:
                yield from self.together(group)
                group = []
        yield from self.together(group)

    def seen(self, images: Sequence[Tensor]) -> Batch:
        """Images (3, H, W) uint8 as the network sees them, in all views."""
        return collate_views([make_samples(image, _empty(image), self.views) for image in images], self.views[1:])

    def together(self, group: Sequence[tuple[Tensor, Path | None]]) -> Iterator[Prediction]:
        """What is in each of some images (3, H, W) uint8, given with the paths that they come from, all at once."""
        if not group:
            return
        batch = self.seen([image for image, _ in group])
        for found, (image, path) in zip(find(self.detector, batch, self.device), group):
            yield Prediction(**vars(found), image=image, names=self.names, category_ids=self.category_ids, path=path)


def load(
    path: str | Path,
    *overrides: str,
    device: str = "auto",
    precision: Precision = "fp32",
    which: Literal["best", "last"] = "best",
    trust: bool = False,
    **settings: Unpack[Sections],
) -> Predictor:
    """Load a trained detector, ready to predict, from a run directory or a checkpoint.

    >>> fusedet.load("runs/a", test={"score": 0.3}).predict("street.jpg")  # doctest: +SKIP

    Args:
        path: A run directory (its best weights, or the last where there are no best), best.safetensors or last.ckpt.
        overrides: "key=value" texts for the run's config; what follows from the weights (all but `SETTABLE`) stays.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: "fp32" or "bf16".
        which: Which weights of a run directory.
        trust: Whether the checkpoint's config may name classes of other packages, whose code then runs.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: The file is not a checkpoint, is cut short, or holds code.
    """
    file = weights_file(path, which)
    detector, config, names, category_ids = rebuild(file, trust)
    texts = refuse_other_keys(to_overrides(overrides, settings), *SETTABLE)
    config = parse(overridden(config.tree(), texts))
    return Predictor(tuned(detector.to(pick_device(device)), config, precision), config, names, category_ids, file)


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises InputError for a device that this machine lacks."""
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise InputError(f"device={name} is not a device: write auto, cpu, cuda, cuda:1 or mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise InputError(f"device={name} is not there ({reason}): use device=cpu or device=auto") from error
    return device


def tuned(detector: DetectorModule, config: Config, precision: Precision = "fp32") -> DetectorModule:
    """The detector for prediction, with the config's thresholds (which may differ from those it was trained with)."""
    ready = prepare_for_inference(detector, precision)
    ready.selection = selection_options(config.test)
    return ready


def views(config: Config) -> tuple[EvalTransform, ...]:
    """How the network sees an image in testing: at each of test.scales, whose long sides keep data.size's proportion, then mirrored."""
    short, long = config.data.size
    sizes = [(scale, round(scale * long / short)) for scale in config.test.scales or (short,)]
    return tuple(
        EvalTransform(*size, flip=flip, antialias=config.data.antialias)
        for flip in (False, True)[: 1 + config.test.flip]
        for size in sizes
    )


@torch.no_grad()
def find(detector: Any, batch: Batch, device: torch.device) -> list[Detections]:
    """What is in each image of a batch, best first: in the pixels of the images that it was made of, on the CPU.

    As the detector's own `predict` gives it in the network's pixels, but for the masks: they are pasted at this size, not resized.
    What is found in the batch's further views is merged with it by the detector's own thresholds; one view is on the device at a time.
    """
    seen = [
        detect_view(detector, replace(view, views=()).to(device, non_blocking=True)) for view in (batch, *batch.views)
    ]
    sizes = (batch.sizes / batch.scales.flip(1)).round().long().tolist()
    results = []
    shared = {key: value for key, value in getattr(detector, "selection", {}).items() if key in ("iou", "max_det")}
    for found, (height, width) in zip(zip(*seen), sizes):
        one = merge_detections(found, **shared) if len(found) > 1 else found[0]
        masks = None if one.masks is None else paste_masks(one.masks, one.boxes, (height, width))
        results.append(Detections(one.boxes, one.scores, one.labels, masks).to("cpu"))
    return results


def _empty(image: Tensor) -> ImageAnnotations:
    none = np.zeros(0)
    height, width = image.shape[1:]
    return ImageAnnotations(0, Path(), height, width, np.zeros((0, 4)), none.astype(int), none.astype(bool), none, [])
