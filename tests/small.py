"""Small versions of every detector (timm's smallest ResNet, 32 channels, narrow heads), and helpers to check losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedet import config as configs
from fusedet.models.detectors import OneStage, TwoStage, create_model
from fusedet.types import Batch, Losses, Target

ONE_STAGE = ["retinanet", "fcos", "vfnet", "reppoints"]
TWO_STAGE = ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "dynamic_rcnn", "grid_rcnn", "libra_rcnn"]
DOUBLE_HEAD = "double_head_rcnn"
ATSS_FAMILY = ["atss", "gfl", "gflv2", "paa", "tood", "ddod"]
MATCHING = ["freeanchor", "foveabox", "fsaf", "autoassign", "yolof"]
ON_FCOS = ["ota", "dw", "borderdet"]
DETECTORS = ONE_STAGE + TWO_STAGE
BRANCHES = {
    "mask": {"type": "mask", "convs": 1, "channels": 8},
    "grid": {"type": "grid", "convs": 1, "point_channels": 4, "groups": 9},
}
EVERYTHING = 100_000  # more than there are anchors or proposals
CLASSES = 3


def make(name: str, *overrides: str, everything: bool = False, norm_eval: bool = False) -> OneStage | TwoStage:
    """Build the detector of the shipped config `name` with small parts and CLASSES classes.

    Args:
        name: The config's name without "_r18".
        overrides: Settings as on the command line.
        everything: Make the losses deterministic: all anchors become proposals, all are sampled, RoIs have no jitter.
        norm_eval: Keep the backbone's BatchNorm in eval mode.
    """
    config = configs.load(f"{name}_r18")
    has_plugin = any(override.startswith("model.plugin") for override in overrides)
    backbone = "resnet10t" if has_plugin else "test_resnet"  # whose widths MSFM's ratios do not divide
    model: dict[str, Any] = {
        "backbone": {"name": backbone, "pretrained": False, "frozen_stages": -1, "norm_eval": norm_eval},
        "pyramid": {"channels": 32},
    }
    if name not in (*TWO_STAGE, DOUBLE_HEAD):
        model["head"] = {"convs": 1} | ({"norm": True} if name != "yolof" else {})  # which has BatchNorm
    else:
        few = {"proposals": 50, "train_proposals": 100, "train_pre_nms": 200}
        all_anchors = {
            "num": EVERYTHING,
            "fraction": 1.0,
            "most_negatives": None,
            "allowed_border": None,
            "ratios": [1.0],
        }
        all_proposals = {"nms": 1.0, "train_proposals": EVERYTHING, "train_pre_nms": EVERYTHING}
        model["head"] = all_anchors | all_proposals if everything else few
        stage = {"channels": 32} | ({"num": EVERYTHING, "fraction": 1.0} if everything else {"num": 64})
        if name == DOUBLE_HEAD:
            stage |= {"box_channels": 32, "blocks": 1}
        branches = [BRANCHES[kind] for kind in config.model.roi.get("branches") or []]
        if everything:
            branches = [b | {"num": EVERYTHING, "jitter": 0.0} if b["type"] == "grid" else b for b in branches]
        model["roi"] = {"stages": [s | stage for s in config.model.roi["stages"]], "branches": branches}
    return create_model(f"{name}_r18", *overrides, num_classes=CLASSES, model=model)


def target(boxes: Any, labels: list[int] | None = None, size: tuple[int, int] = (64, 96)) -> Target:
    """Make instances with masks that fill their boxes inside the image; classes 0, 1, 2, 0, ... by default."""
    corners = torch.as_tensor(boxes, dtype=torch.get_default_dtype()).reshape(-1, 4)
    y, x = (torch.arange(n) + 0.5 for n in size)
    x1, y1, x2, y2 = corners[:, :, None].unbind(1)
    masks = ((y1 < y) & (y < y2))[:, :, None] & ((x1 < x) & (x < x2))[:, None]
    return Target(corners, torch.tensor(labels) if labels else torch.arange(len(corners)) % CLASSES, masks)


def total(detector: Any, batch: Batch) -> Tensor:
    """Sum a batch's weighted losses."""
    return weighted(detector, detector.loss(batch))


def weighted(detector: Any, losses: Losses) -> Tensor:
    """Sum the weighted losses, which must be finite scalars."""
    assert set(losses) == set(detector.loss_weights)
    assert all(v.ndim == 0 and v.isfinite() for v in losses.values()), losses
    return torch.stack([v * detector.loss_weights[k] for k, v in losses.items()]).sum()


def without_gradient(detector: nn.Module) -> list[str]:
    """List trained parameters without a finite gradient; a missing one would stop DDP."""
    return [
        k for k, p in detector.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]


def livelier(detector: nn.Module) -> None:
    """Randomize scales and shifts, so that no ReLU is at exactly 0, and widen the last layers, so that outputs vary."""
    for key, p in detector.named_parameters():
        if p.ndim < 2:
            p.data.add_(0.1 * torch.randn_like(p))
        elif key.startswith(("head.", "stages.", "branches.")) and p.data.any():  # offsets may start at 0
            p.data.mul_(0.3 / (p.data.std() * p[0].numel() ** 0.5))


@contextmanager
def float64() -> Iterator[pytest.MonkeyPatch]:
    """Compute in float64, also where code converts to float32, so that differences of 1e-9 are errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield patch
        finally:
            torch.set_default_dtype(torch.float32)
