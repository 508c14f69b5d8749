"""Prediction: every engine of fusedet's RetinaNet-R50 and torchvision's, one 800x1216 image, CPU, in turn in one run.

Both have the same weights, get the same uint8 image and return boxes after NMS; neither resizes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import copy_weights, print_report
from engines import measure_prediction, parse_options, serve_call
from torchvision.models.detection import retinanet_resnet50_fpn

from fusedet import create_model
from fusedet.api.benchmark_plan import draw_scene
from fusedet.data.image_decoding import to_tensor

SIZE = HEIGHT, WIDTH = 800, 1216
OVERRIDES = ["model.backbone.pretrained=false", "model.pyramid.top=on_output"]
CANDIDATES = 4000
"""Candidates above the score threshold, about as many as a trained detector has in an image with many objects."""


@torch.no_grad()
def trained(image: torch.Tensor) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return torchvision's RetinaNet without resizing and fusedet's, with the same random weights.

    Both have P6 from P5. The last bias gives as many candidates as a trained detector has.
    """
    torch.manual_seed(0)
    theirs = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=80, min_size=HEIGHT, max_size=WIDTH
    ).eval()
    theirs.detections_per_img = 100
    last = theirs.head.classification_head.cls_logits
    for final, std in ((last, 0.05), (theirs.head.regression_head.bbox_reg, 0.005)):
        torch.nn.init.normal_(final.weight, std=std)
    ours = create_model("retinanet_r50", *OVERRIDES).eval()
    copy_weights(ours, theirs)
    logits = torch.cat([m.flatten() for m in ours(image[None]).maps["cls"]])
    last.bias += math.log(0.05 / 0.95) - logits.topk(CANDIDATES).values[-1]
    ours.head.cls.bias.copy_(last.bias)
    return theirs, ours


def torchvision(image: torch.Tensor) -> Callable[[], object]:
    """Torchvision's detector with its own normalization."""
    model = trained(image)[0]
    return torch.inference_mode()(lambda: model([image.float() / 255]))


def main() -> None:
    """Measure and print JSON."""
    options = parse_options(__doc__)
    if options.serve:
        serve_call(torchvision, options.serve)
        return
    with tempfile.TemporaryDirectory() as folder:
        ours = trained(to_tensor(draw_scene(SIZE, Path(folder) / "image.jpg")))[1]
    engines = measure_prediction(__file__, "retinanet_r50", OVERRIDES, ours, SIZE, options)
    print_report(benchmark="predict", image=SIZE, detector="RetinaNet R50 FPN, 80 classes", **engines)


if __name__ == "__main__":
    main()
