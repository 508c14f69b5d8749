"""Mask R-CNN's branch, with the semantics of MMDetection 3.x.

References:
    "Mask R-CNN", He et al., 2017.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from fusedet.errors import InputError
from fusedet.models.ops.autocast import without_autocast
from fusedet.models.ops.layers import Norm, conv, conv_norm, init_kaiming
from fusedet.models.ops.losses import mean_over_ranks
from fusedet.models.roi.pooling import LevelPooling, PoolingFactory, boxes_to_rois
from fusedet.models.roi.sampling import RoISamples
from fusedet.types import BatchDetections, Features, Levels, Losses, Target

_CROP_PIXELS = 2**26  # of float masks at once: 256 MiB
_PASTE_PIXELS = 2**22  # 16 MiB, which CPU caches hold


class MaskBranch(nn.Module):
    """Convolutions on the pooled features of an RoI, 2x upsampling, and one mask per class (figure 4, right).

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        pooling: Makes the pooling of a size; `LevelPooling` by default.
        size: Size of the pooled features, in cells per side; masks have twice as many.
        convs: Number of 3x3 convolutions.
        channels: Their width.
        norm: Norm after each of them, which have no bias then: "gn", GroupNorm of 32 groups, or "bn".
        weight: Weight of the loss, relative to the stage's.

    Raises:
        InputError: An option is out of its range.
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
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        if size < 1 or convs < 0 or channels < 1:
            raise InputError(f"size={size}, channels={channels} must be at least 1 and convs={convs} at least 0")
        self.num_classes, self.size = num_classes, 2 * size
        self.loss_weights = {"loss_mask": weight}
        self.pooling = pooling(size) if pooling else LevelPooling(levels, size)
        widths = [levels.channels[0], *[channels] * convs]
        self.convs = nn.ModuleList(conv_norm(a, b, 3, norm) for a, b in pairwise(widths))
        self.upsample = nn.ConvTranspose2d(widths[-1], channels, 2, stride=2)
        self.logits = conv(channels, num_classes, 1)
        init_kaiming(self)

    def forward(self, features: Features, rois: Tensor) -> Tensor:
        """Compute the mask logits of every RoI and class.

        Shape:
            features: levels (N, C, H, W); rois (M, 5), index of the image in the batch, then a box in pixels; result
            (M, K, size, size), where `self.size` is the mask's size.
        """
        x = self.pooling(features, rois)
        for layer in self.convs:
            x = F.relu(layer(x))
        return self.logits(F.relu(self.upsample(x)))

    def loss(self, features: Features, samples: RoISamples, targets: Sequence[Target], sizes: Tensor) -> Losses:
        """Compute the binary cross-entropy of the positive samples' masks, each in the channel of its class.

        It is the mean over the samples, their number averaged over ranks, and their cells; 0 without positives.

        Args:
            features: Levels (N, C, H, W).
            samples: RoIs of the stage.
            targets: Ground truth of each image.
            sizes: Unused.

        Raises:
            InputError: An instance has no mask.
        """
        rois, instances, image = (x[samples.positive] for x in (samples.rois, samples.instances, samples.image))
        logits = self(features, rois)
        _, labels = samples.gather(targets)
        own = logits[torch.arange(len(rois), device=rois.device), labels].float()  # (R, size, size)
        wanted = crop_masks(targets, rois[:, 1:], image, instances, self.size)
        count = mean_over_ranks(own.new_full((), len(own))) * self.size**2
        return {"loss_mask": F.binary_cross_entropy_with_logits(own, wanted, reduction="sum") / count}

    def predict(self, features: Features, detections: BatchDetections) -> Tensor:
        """Predict masks (N, D, size, size), probabilities inside the detections' boxes.

        `paste_masks` puts them into the image.
        """
        logits = self(features, boxes_to_rois(detections.boxes))
        own = logits[torch.arange(logits.shape[0], device=logits.device), detections.labels.flatten()]
        return own.float().sigmoid().unflatten(0, detections.labels.shape)


@torch.no_grad()
def crop_masks(targets: Sequence[Target], boxes: Tensor, image: Tensor, instances: Tensor, size: int) -> Tensor:
    """Crop each box's instance mask to the box.

    The result is RoIAlign of the mask with as many sampling points as pixels, then 1 from 0.5 on. A bounded number of
    masks is converted to float at a time.

    Args:
        targets: Ground truth of each image.
        boxes: (R, 4).
        image: (R,), index of each box's image.
        instances: (R,), index of each box's instance within its image.
        size: Size of the result.

    Returns:
        (R, size, size), 0.0 or 1.0.

    Raises:
        InputError: An instance has no mask.
    """
    if missing := sum(len(t) for t in targets if t.masks is None):
        raise InputError(
            f"{missing} instances have no mask: a mask branch needs a dataset with masks, use one or remove the branch "
            "from model.roi.branches"
        )
    masks = [t.masks for t in targets if t.masks is not None and len(t)]
    crops = boxes.new_zeros(len(boxes), size, size)
    if not masks:
        return crops
    stacked = torch.cat(masks)  # (G, H, W), the instances of all images
    height, width = stacked.shape[1:]
    first = torch.stack([instances.new_full((), i) for i in accumulate(map(len, targets), initial=0)])
    index = first[image] + instances  # (R,), into `stacked`
    xs, ys = boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)
    inside = torch.stack([xs, ys], dim=2).flatten(1)
    rois = torch.cat([index[:, None].to(boxes.dtype), inside], dim=1).float()
    chunk = max(1, _CROP_PIXELS // (height * width))
    for i, part in enumerate(stacked.split(chunk)):
        rows = (index // chunk == i).nonzero().squeeze(1)
        shifted = torch.cat([rois[rows, :1] - i * chunk, rois[rows, 1:]], dim=1)
        crops[rows] = roi_align(part[:, None].float(), shifted, size, aligned=True)[:, 0].to(crops.dtype)
    return (crops >= 0.5).to(crops.dtype)


@torch.no_grad()
def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Paste masks into an image by bilinear interpolation.

    A pixel is True where the probability at its center is at least `threshold`; outside the mask it is 0. A box without
    width or height has no pixels.

    Args:
        masks: (D, m, m), probabilities, stretched over their boxes.
        boxes: (D, 4).
        size: Height and width of the image.
        threshold: Minimum probability.

    Returns:
        (D, H, W) bool.
    """
    height, width = size
    masks, boxes = masks.float(), boxes.float()
    with without_autocast(masks):
        chunk, parts = max(1, _PASTE_PIXELS // (height * width)), []
        for mask, box in zip(masks.split(chunk), boxes.split(chunk)):
            x1, y1, x2, y2 = box.unbind(1)
            rows = _interpolation_weights(y1, y2, height, mask.shape[1])
            columns = _interpolation_weights(x1, x2, width, mask.shape[2])
            parts.append(rows @ mask @ columns.mT >= threshold)  # bilinear interpolation is a product along each axis
        return torch.cat(parts)


def stretch_masks(masks: Tensor, boxes: Tensor, around: Tensor) -> Tensor:
    """Resample masks from their boxes to another box, by bilinear interpolation; outside its box a mask is 0.

    Shape:
        masks (D, m, m), probabilities; boxes (D, 4); around (4,); result (D, m, m).
    """
    cells = masks.shape[-1]
    scale = cells / (around[2:] - around[:2]).clamp(min=1e-6).repeat(2)
    x1, y1, x2, y2 = ((boxes - around[:2].repeat(2)) * scale).unbind(1)  # in cells of `around`
    rows, columns = (_interpolation_weights(low, high, cells, cells) for low, high in ((y1, y2), (x1, x2)))
    return rows @ masks.float() @ columns.mT


def _interpolation_weights(low: Tensor, high: Tensor, length: int, cells: int) -> Tensor:
    """Compute linear weights (D, length, cells) of `cells` between low and high (D,) for each of `length` pixels."""
    centers = torch.arange(length, device=low.device) + 0.5
    position = (centers - low[:, None]) / (high - low).clamp(min=1e-6)[:, None] * cells - 0.5  # (D, length), in cells
    return (1 - (position[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)
