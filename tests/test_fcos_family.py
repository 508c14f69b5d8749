"""The detectors on FCOS's head, OTA, DW and BorderDet: parameter counts, modules and exports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchvision.ops import box_iou

from fakes import batch, objects
from fusedet.models.detectors import create_model
from small import ON_FCOS, make, target, weighted

TARGETS = [objects([[4, 4, 40, 44], [10, 12, 30, 30]], [0, 1]), objects([])]
FCOS = 32_072_026
"""With biases in the towers."""
COUNTS = {
    "ota_r50": FCOS,
    "dw_r50": FCOS + 9 * 256 * 8 + 8,
    # each border module has a convolution to five times its width and one back to 256 channels
    "borderdet_r50": FCOS + sum(257 * 5 * width + 5 * width * 256 + 256 for width in (256, 128)) + 257 * 80 + 257 * 4,
    "ota_r101": FCOS + 18_992_128,
}
PRINTED = {"ota_r50": 32_072_026, "dw_r50": 32_090_466, "borderdet_r50": 33_079_086}


@pytest.mark.parametrize("name", COUNTS)
def test_trainable_parameters(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, "model.backbone.pretrained=false")
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == COUNTS[name] == PRINTED.get(name, count)
    if name in PRINTED:
        assert f"{count:,}" in type(model.head).__doc__


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_FCOS)
def test_two_images_are_learned(name: str) -> None:
    """Assignment, losses and decoding work together: after 100 steps every rectangle is detected, with its class."""
    torch.manual_seed(0)
    scenes = [([[6, 6, 36, 40], [50, 20, 90, 58]], [0, 1]), ([[20, 10, 70, 50]], [2])]
    data = batch(*(target(boxes, labels) for boxes, labels in scenes))
    images = data.images // 4
    for image, (boxes, labels) in zip(images, scenes):
        for (x1, y1, x2, y2), label in zip(boxes, labels):
            image[label, y1:y2, x1:x2] = 250  # red, green or blue
    data = replace(data, images=images)
    detector = make(name).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    for _ in range(100):
        optimizer.zero_grad()
        weighted(detector, detector.loss(data)).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        optimizer.step()
    for detections, truth in zip(detector.eval().predict(data), data.targets or ()):
        best = detections.scores > 0.5
        ious = box_iou(truth.boxes, detections.boxes[best])
        assert ious.amax(dim=1).min() > 0.8
        assert detections.labels[best][ious.argmax(dim=1)].tolist() == truth.labels.tolist()
        assert int(best.sum()) == len(truth)
