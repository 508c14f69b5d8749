"""Mask R-CNN's branch: "Mask R-CNN", He et al., 2017, with the semantics of MMDetection 3.x."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from fusedet.errors import InputError
from fusedet.models.ops.layers import conv, kaiming
from fusedet.models.ops.losses import mean_over_ranks
from fusedet.models.ops.precision import without_autocast
from fusedet.models.roi.pooling import LevelPooling, PoolingFactory, boxes_to_rois
from fusedet.models.roi.sampling import RoISamples
from fusedet.types import BatchDetections, Features, Levels, Losses, Target

_CROPPED, _PASTED = 2**26, 2**22  # pixels of float masks at once: 256 MiB; 16 MiB, which caches hold


class MaskBranch(nn.Module):
    """Convolutions over a region's features, a transposed one that doubles them, and one mask per class (figure 4, right).

    levels: of the pyramid. num_classes: K. pooling: makes the pooling of a size, `LevelPooling` by default.
    size: of the pooled features, in cells a side; masks have twice as many. convs, channels: of the 3x3 convolutions. weight: of the
    loss in the total.
    """

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        pooling: PoolingFactory | None = None,
        size: int = 14,
        convs: int = 4,
        channels: int = 256,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if size < 1 or convs < 0 or channels < 1:
            raise InputError(f"size={size}, channels={channels} must be at least 1 and convs={convs} at least 0")
        self.num_classes, self.size = num_classes, 2 * size
        self.loss_weights = {"loss_mask": weight}
        self.pooling = pooling(size) if pooling else LevelPooling(levels, size)
        widths = [levels.channels[0], *[channels] * convs]
        self.convs = nn.ModuleList(conv(a, b, 3) for a, b in pairwise(widths))
        self.upsample = nn.ConvTranspose2d(widths[-1], channels, 2, stride=2)
        self.logits = conv(channels, num_classes, 1)
        kaiming(self)

    def forward(self, features: Features, rois: Tensor) -> Tensor:
        """Levels (N, C, H, W) and rois (M, 5) to logits (M, K, size, size)."""
        x = self.pooling(features, rois)
        for layer in self.convs:
            x = F.relu(layer(x))
        return self.logits(F.relu(self.upsample(x)))

    def loss(self, features: Features, samples: RoISamples, targets: Sequence[Target], sizes: Tensor) -> Losses:
        """Binary cross-entropy of the positive samples, each in the channel of its own class, the mean over them, their number averaged
        over ranks, and over their cells.

        sizes (N, 2) of the images are not needed here. Zero where no sample is positive. Raises InputError for targets without masks.
        """
        rois, owners, image = (x[samples.positive] for x in (samples.rois, samples.owners, samples.image))
        logits = self(features, rois)
        _, labels = samples.objects(targets)
        own = logits[torch.arange(len(rois), device=rois.device), labels].float()  # (R, size, size)
        wanted = crop_masks(targets, rois[:, 1:], image, owners, self.size)
        count = mean_over_ranks(own.new_tensor(len(own))) * self.size**2
        return {"loss_mask": F.binary_cross_entropy_with_logits(own, wanted, reduction="sum") / count}

    def predict(self, features: Features, found: BatchDetections) -> Tensor:
        """Masks (N, D, size, size) of detections, probabilities inside their boxes; `paste_masks` puts them into the image."""
        logits = self(features, boxes_to_rois(found.boxes))
        own = logits[torch.arange(len(logits), device=logits.device), found.labels.flatten()]
        return own.float().sigmoid().unflatten(0, found.labels.shape)


@torch.no_grad()
def crop_masks(targets: Sequence[Target], boxes: Tensor, image: Tensor, owners: Tensor, size: int) -> Tensor:
    """What each box (R, 4) of image (R,) holds of the mask of its object, number owners (R,): (R, size, size), 0.0 or 1.0.

    RoIAlign of the mask with as many samples as pixels, then 1 from a half on. Masks become floats a bounded number at a time.
    Raises InputError for objects without masks.
    """
    if bare := sum(len(t) for t in targets if t.masks is None):
        raise InputError(
            f"{bare} objects have no mask: a mask branch learns from data with masks alone, take it out of model.roi.branches"
        )
    masks = [t.masks for t in targets if t.masks is not None and len(t)]
    crops = boxes.new_zeros(len(boxes), size, size)
    if not masks:
        return crops
    every = torch.cat(masks)  # (G, H, W), the objects of all images
    height, width = every.shape[1:]
    firsts = torch.tensor([0, *accumulate(map(len, targets))], device=boxes.device)
    numbers = firsts[image] + owners  # (R,), the rows of `every`
    limit = boxes.new_tensor([width, height, width, height])
    rois = torch.cat([numbers[:, None].to(boxes.dtype), torch.minimum(boxes.clamp(min=0), limit)], dim=1).float()
    at_once = max(1, _CROPPED // (height * width))
    for i, part in enumerate(every.split(at_once)):
        here = (numbers // at_once == i).nonzero().squeeze(1)
        inside = rois[here] - rois.new_tensor([i * at_once, 0, 0, 0, 0])
        crops[here] = roi_align(part[:, None].float(), inside, size, aligned=True)[:, 0].to(crops.dtype)
    return (crops >= 0.5).to(crops.dtype)


@torch.no_grad()
def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Masks (D, m, m) of probabilities, stretched over their boxes (D, 4), as bool (D, H, W) in an image of size (H, W).

    True where the probability, bilinear between the centres of a mask's cells and 0 outside the mask, is at least `threshold` at a
    pixel's centre. A box without width or height has no pixel.
    """
    height, width = size
    masks, boxes = masks.float(), boxes.float()
    with without_autocast(masks):
        at_once, parts = max(1, _PASTED // (height * width)), []
        for mask, box in zip(masks.split(at_once), boxes.split(at_once)):
            x1, y1, x2, y2 = box.unbind(1)
            rows, columns = _shares(y1, y2, height, mask.shape[1]), _shares(x1, x2, width, mask.shape[2])
            parts.append(rows @ mask @ columns.mT >= threshold)  # a bilinear value is a product along either axis
        return torch.cat(parts)


def _shares(low: Tensor, high: Tensor, length: int, cells: int) -> Tensor:
    """What each of `cells` between low and high (D,) gives to each of `length` pixels: (D, length, cells)."""
    centres = torch.arange(length, device=low.device) + 0.5
    at = (centres - low[:, None]) / (high - low).clamp(min=1e-6)[:, None] * cells - 0.5  # (D, length), in cells
    return (1 - (at[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)
