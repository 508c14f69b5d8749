"""Use fusedet's necks in torchvision's detectors: python torchvision_necks.py trains a Mask R-CNN by a step."""

from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from fusedet.models.necks import MSEFPN
from fusedet.types import Levels

LEVELS = {3: (8, 16, 32), 4: (4, 8, 16, 32)}
"""Strides of the maps that torchvision's detectors hand to their FPN: three in RetinaNet and FCOS, four in R-CNNs."""


class TorchvisionNeck(nn.Module):
    """A neck of fusedet, named maps in and out as torchvision's FeaturePyramidNetwork has them."""

    def __init__(self, neck, names):
        super().__init__()
        self.neck, self.names = neck, names

    def forward(self, maps):
        """Compute the pyramid: a dict of (N, C, H, W) by name, finest first."""
        return OrderedDict(zip(self.names, self.neck(list(maps.values())), strict=True))


def replace_fpn(detector, make_neck):
    """Replace the FPN of a torchvision detector, in place.

    Args:
        detector: A RetinaNet, FCOS, Faster, Mask or Keypoint R-CNN on a ResNet with FPN.
        make_neck: Takes the backbone's `Levels`, `channels`, `finest`, `coarsest` and `top`, as fusedet's necks do.
    """
    fpn = detector.backbone.fpn
    inputs = tuple(block[0].in_channels for block in fpn.inner_blocks)
    is_rcnn = len(inputs) == 4
    neck = make_neck(
        Levels(inputs, LEVELS[len(inputs)]),
        channels=detector.backbone.out_channels,
        finest=2 if is_rcnn else 3,
        coarsest=6 if is_rcnn else 7,
        top="max_pool" if is_rcnn else "on_input" if fpn.extra_blocks.use_P5 is False else "on_output",
    )
    names = ["0", "1", "2", "3", "pool"] if is_rcnn else ["0", "1", "2", "p6", "p7"]
    detector.backbone.fpn = TorchvisionNeck(neck, names)


if __name__ == "__main__":
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=128, max_size=128)
    replace_fpn(model, MSEFPN)
    target = {
        "boxes": torch.tensor([[10.0, 20.0, 90.0, 100.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 128, 128, dtype=torch.uint8),
    }
    losses = model([torch.rand(3, 128, 128)], [target])
    sum(losses.values()).backward()
    print({name: round(value.item(), 3) for name, value in losses.items()})
