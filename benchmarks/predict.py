"""Prediction: fusedet's RetinaNet-R50 and torchvision's, one 800x1216 picture, CPU, interleaved in one run.

Both have the same weights, get the same uint8 picture and give final boxes after suppression; neither resizes.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable

import torch
from common import interleave, own_peak, peak_memory, report, summary, torchvision_name
from torchvision.models.detection import retinanet_resnet50_fpn

from fusedet import create_model
from fusedet.detectors import for_inference
from fusedet.types import Batch

HEIGHT, WIDTH = 800, 1216


CANDIDATES = 4000
"""Pairs of place and class above the score threshold, about what a trained detector gives for a busy picture."""


@torch.no_grad()
def trained(picture: torch.Tensor) -> torch.nn.Module:
    """A RetinaNet with random weights, P6 from P5 as torchvision has it, and, by its last bias, as many candidates as a trained one."""
    model = create_model("retinanet_r50", "model.backbone.pretrained=false", "model.pyramid.top=on_output").eval()
    for final in (model.head.cls, model.head.reg):
        torch.nn.init.normal_(final.weight, std=0.05)
    logits = torch.cat([m.flatten() for m in model(picture[None]).maps["cls"]])
    model.head.cls.bias += math.log(0.05 / 0.95) - logits.topk(CANDIDATES).values[-1]
    return model


def fusedet(model: torch.nn.Module, picture: torch.Tensor, precision: str) -> Callable[[], object]:
    """fusedet's detector as `fusedet.load` prepares it."""
    model = for_inference(model, precision)
    batch = Batch(picture[None], torch.tensor([[HEIGHT, WIDTH]]), (0,), torch.ones(1, 2))
    return functools.partial(model.predict, batch)


def torchvision(model: torch.nn.Module, picture: torch.Tensor) -> Callable[[], object]:
    """torchvision's detector with the same weights and its own normalisation, told not to resize."""
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=80, min_size=HEIGHT, max_size=WIDTH).eval()
    theirs.load_state_dict({torchvision_name(k): v for k, v in model.state_dict().items()})
    theirs.detections_per_img = 100

    @torch.inference_mode()
    def predict() -> object:
        return theirs([picture.float() / 255])

    return predict


def main() -> None:
    """Measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=["fusedet", "fusedet_bf16", "torchvision"])
    options = parser.parse_args()
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
    model = trained(picture)
    makers = {
        "torchvision": lambda: torchvision(model, picture),
        "fusedet": lambda: fusedet(model, picture, "fp32"),
        "fusedet_bf16": lambda: fusedet(model, picture, "bf16"),
    }
    if options.only:
        call = makers[options.only]()
        call(), call()
        print(own_peak())
        return
    figures = summary(interleave({k: make() for k, make in makers.items()}, options.repeats), "torchvision")
    for side in makers:
        figures[side]["peak_MiB"] = round(peak_memory(__file__, side))
    report(benchmark="predict", picture=[HEIGHT, WIDTH], detector="RetinaNet R50 FPN, 80 classes", **figures)


if __name__ == "__main__":
    main()
