"""Operators of fusedet and of torchvision and torch, at the sizes of an 800x1216 image, CPU, interleaved in one run."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import interleave, print_report, summarize_times
from torch import Tensor
from torchvision.ops import deform_conv2d, roi_align

from fusedet.models.necks import SMSL
from fusedet.models.necks.gates import pool_rows_and_columns
from fusedet.models.ops.deformable import deform_conv2d_by_rows
from fusedet.models.ops.roi_align_cpu import roi_align_cpu
from fusedet.types import Levels

Sides = dict[str, Callable[[], object]]
STRIDES = (8, 16, 32, 64, 128)


def map_of(stride: int) -> Tensor:
    """Make a feature map of 256 channels in channels_last, as in detectors."""
    return torch.randn(1, 256, -(-800 // stride), -(-1216 // stride)).contiguous(memory_format=torch.channels_last)


def aligning(backward: bool) -> Sides:
    """Prepare RoIAlign of 512 regions of the finest level, with adaptive sampling."""
    feature, corner = map_of(4).requires_grad_(backward), torch.rand(512, 2) * torch.tensor([1000.0, 600.0])
    rois = torch.cat([torch.zeros(512, 1), corner, corner + 20 + 92 * torch.rand(512, 2)], dim=1)

    def library() -> Tensor:
        return roi_align(feature, rois, 7, 1 / 4, sampling_ratio=0, aligned=True)

    def own() -> Tensor:
        return roi_align_cpu(feature, rois, 7, 4)

    sides = {"torchvision": library, "fusedet": own}
    return {name: _backward(call(), feature) for name, call in sides.items()} if backward else {**sides}


def _backward(pooled: Tensor, feature: Tensor) -> Callable[[], object]:
    grown = torch.randn_like(pooled)
    return lambda: torch.autograd.grad(pooled, feature, grown, retain_graph=True)


def deforming() -> Sides:
    """Prepare a modulated deformable 3x3 convolution of C4's size."""
    x, weight = map_of(16), torch.randn(256, 256, 3, 3) / 48
    offset, mask = torch.randn(1, 18, *x.shape[2:]), torch.rand(1, 9, *x.shape[2:])
    return {
        name: lambda call=call: call(x, offset, weight, None, stride=1, padding=1, dilation=1, mask=mask)
        for name, call in {"torchvision": deform_conv2d, "fusedet": deform_conv2d_by_rows}.items()
    }


def pooling() -> Sides:
    """Prepare the means of rows and columns of P3."""
    x = map_of(8)
    return {
        "torch": lambda: (x.mean(dim=3, keepdim=True), x.mean(dim=2, keepdim=True)),
        "fusedet": lambda: pool_rows_and_columns(x),
    }


def smsl() -> Sides:
    """Prepare SMSL after a neck of five levels."""
    neck, maps = SMSL(Levels((256,) * 5, STRIDES)).eval(), [map_of(s) for s in STRIDES]
    return {"fusedet": lambda: neck(maps)}


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    cases = {
        "RoIAlign": aligning(False),
        "RoIAlign, backward": aligning(True),
        "deformable convolution": deforming(),
        "means of rows and columns": pooling(),
        "SMSL": smsl(),
    }
    measured = {}
    for name, sides in cases.items():
        with torch.set_grad_enabled(name.endswith("backward")):
            measured[name] = summarize_times(interleave(sides, options.repeats), next(iter(sides)))
    print_report(benchmark="operators", **measured)


if __name__ == "__main__":
    main()
