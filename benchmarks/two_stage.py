"""Faster R-CNN R50: fusedet's and torchvision's, one 800x1216 picture, CPU, float32: prediction, and a training step, each interleaved.

For prediction both have the same weights, get the same uint8 picture and give final boxes; neither resizes. In training both freeze the
stem and the first stage, keep the batch norms' statistics, and take one SGD step on the same picture and boxes. Each side keeps its own
definition of RoIAlign: fusedet as many samples as a cell is wide, torchvision two.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable

import torch
from common import interleave, report, summary
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from fusedet import create_model
from fusedet.detectors import for_inference
from fusedet.types import Batch, Target

HEIGHT, WIDTH = 800, 1216


def torchvision_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights by torchvision's names; its background is class 0, ours the last."""
    rules = [
        (r"^neck\.lateral\.(\d)", r"backbone.fpn.inner_blocks.\1.0"),
        (r"^neck\.output\.(\d)", r"backbone.fpn.layer_blocks.\1.0"),
        (r"^head\.tower\.0", "rpn.head.conv.0.0"),
        (r"^head\.cls", "rpn.head.cls_logits"),
        (r"^head\.reg", "rpn.head.bbox_pred"),
        (r"^stages\.0\.shared\.(\d)", lambda m: f"roi_heads.box_head.fc{6 + int(m[1])}"),
        (r"^stages\.0\.cls", "roi_heads.box_predictor.cls_score"),
        (r"^stages\.0\.reg", "roi_heads.box_predictor.bbox_pred"),
    ]
    theirs = {}
    for key, value in state.items():
        if key.startswith("stages.0.cls"):
            value = value.roll(1, dims=0)
        if key.startswith("stages.0.reg"):
            value = torch.cat([torch.zeros_like(value[:4]), value])
        for ours, name in rules:
            key = re.sub(ours, name, key)
        theirs[key] = value
    return theirs


def model() -> torch.nn.Module:
    """A Faster R-CNN with random weights whose scores and boxes differ from place to place, like a trained one's."""
    made = create_model("faster_rcnn_r50", "model.backbone.pretrained=false")
    for layer, std in ((made.head.cls, 0.05), (made.head.reg, 0.01), (made.stages[0].cls, 0.05)):
        torch.nn.init.normal_(layer.weight, std=std)
    return made


def theirs(ours: torch.nn.Module) -> torch.nn.Module:
    """torchvision's with the same weights, told not to resize."""
    made = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=81, min_size=HEIGHT, max_size=WIDTH, trainable_backbone_layers=3
    )
    made.load_state_dict(torchvision_state(ours.state_dict()))
    return made


def prediction(picture: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Both sides' prediction."""
    ours = model().eval()
    other, ready = theirs(ours).eval(), for_inference(ours)
    batch = Batch(picture[None], torch.tensor([[HEIGHT, WIDTH]]), (0,), torch.ones(1, 2))
    return {
        "torchvision": torch.inference_mode()(lambda: other([picture.float() / 255])),
        "fusedet": functools.partial(ready.predict, batch),
    }


def step(loss: Callable[[], dict[str, torch.Tensor]], made: torch.nn.Module) -> Callable[[], None]:
    """One SGD step on the summed losses."""
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=1e-5, momentum=0.9, weight_decay=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        sum(loss().values()).backward()
        optimizer.step()

    return run


def training(picture: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Both sides' training step."""
    corner = torch.rand(20, 2) * torch.tensor([WIDTH - 220, HEIGHT - 220])
    boxes, labels = torch.cat([corner, corner + 20 + 200 * torch.rand(20, 2)], dim=1), torch.randint(0, 80, (20,))
    ours = model().train()
    other = theirs(ours).train()
    batch = Batch(picture[None], torch.tensor([[HEIGHT, WIDTH]]), (0,), torch.ones(1, 2), (Target(boxes, labels),))
    objects = [{"boxes": boxes, "labels": labels + 1}]
    return {
        "torchvision": step(lambda: other([picture.float() / 255], objects), other),
        "fusedet": step(lambda: ours.loss(batch), ours),
    }


def main() -> None:
    """Measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=["predict", "train_step"])
    options = parser.parse_args()
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
    for name, make in {"predict": prediction, "train_step": training}.items():
        if options.only in (None, name):
            figures = summary(interleave(make(picture), options.repeats), "torchvision")
            report(benchmark=f"two_stage {name}", picture=[HEIGHT, WIDTH], detector="Faster R-CNN R50 FPN, 80 classes", **figures)


if __name__ == "__main__":
    main()
