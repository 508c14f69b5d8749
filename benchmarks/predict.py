"""Prediction: fusedet's RetinaNet-R50 and torchvision's, one 800x1216 image, CPU, interleaved in one run.

Both have the same weights, get the same uint8 image and return boxes after NMS; neither resizes.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable

import torch
from common import copy_weights, interleave, measure_peak_memory, print_report, read_peak_memory, summarize_times
from torchvision.models.detection import retinanet_resnet50_fpn

from fusedet import create_model
from fusedet.models.detectors import prepare_for_inference
from fusedet.types import Batch

HEIGHT, WIDTH = 800, 1216
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
    for final in (last, theirs.head.regression_head.bbox_reg):
        torch.nn.init.normal_(final.weight, std=0.05)
    ours = create_model("retinanet_r50", "model.backbone.pretrained=false", "model.pyramid.top=on_output").eval()
    copy_weights(ours, theirs)
    logits = torch.cat([m.flatten() for m in ours(image[None]).maps["cls"]])
    last.bias += math.log(0.05 / 0.95) - logits.topk(CANDIDATES).values[-1]
    ours.head.cls.bias.copy_(last.bias)
    return theirs, ours


def fusedet(image: torch.Tensor, precision: str) -> Callable[[], object]:
    """Fusedet's detector as `fusedet.load` prepares it."""
    model = prepare_for_inference(trained(image)[1], precision)
    batch = Batch(image[None], torch.tensor([[HEIGHT, WIDTH]]), (0,), torch.ones(1, 2))
    return functools.partial(model.predict, batch)


def torchvision(image: torch.Tensor) -> Callable[[], object]:
    """Torchvision's detector with its own normalisation."""
    model = trained(image)[0]
    return torch.inference_mode()(lambda: model([image.float() / 255]))


MAKERS = {
    "torchvision": torchvision,
    "fusedet": functools.partial(fusedet, precision="fp32"),
    "fusedet_bf16": functools.partial(fusedet, precision="bf16"),
}


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=MAKERS)
    options = parser.parse_args()
    image = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if options.only:
        call = MAKERS[options.only](image)
        call(), call()
        print(read_peak_memory())
        return
    figures = summarize_times(
        interleave({k: make(image) for k, make in MAKERS.items()}, options.repeats), "torchvision"
    )
    for side in MAKERS:
        figures[side]["peak_MiB"] = round(measure_peak_memory(__file__, side))
    print_report(benchmark="predict", image=[HEIGHT, WIDTH], detector="RetinaNet R50 FPN, 80 classes", **figures)


if __name__ == "__main__":
    main()
