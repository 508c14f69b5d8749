"""Compare prediction and a training step of fusedet's and torchvision's Faster R-CNN R50, interleaved.

One 800x1216 image, CPU; prediction in every engine, the training step in float32.

For prediction both have the same weights, get the same uint8 image and return final boxes; neither resizes. In
training both freeze the stem and the first stage, keep the batch norms' statistics, and take one SGD step on the same
image and boxes. Each side keeps its own definition of RoIAlign: fusedet as many samples as a cell is wide,
torchvision two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import copy_weights, interleave, print_report, summarize_times
from engines import measure_prediction, parse_options, serve_call
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from fusedet import create_model
from fusedet.types import Batch, Target

HEIGHT, WIDTH = 800, 1216
CONFIG, OVERRIDES = "faster_rcnn_r50", ["model.backbone.pretrained=false"]


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return torchvision's Faster R-CNN without resizing and fusedet's, with the same random weights.

    Scores and boxes differ from place to place like those of a trained detector.
    """
    sizes = {"min_size": HEIGHT, "max_size": WIDTH}
    theirs = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=81, trainable_backbone_layers=3, **sizes
    )
    rpn, box = theirs.rpn.head, theirs.roi_heads.box_predictor
    for layer, std in ((rpn.cls_logits, 0.05), (rpn.bbox_pred, 0.01), (box.cls_score, 0.05), (box.bbox_pred, 0.001)):
        torch.nn.init.normal_(layer.weight, std=std)
    ours = create_model(CONFIG, *OVERRIDES)
    copy_weights(ours, theirs)
    return theirs, ours


def torchvision(image: torch.Tensor) -> Callable[[], object]:
    """Torchvision's prediction."""
    torch.manual_seed(0)
    theirs = models()[0].eval()
    return torch.inference_mode()(lambda: theirs([image.float() / 255]))


def step(loss: Callable[[], dict[str, torch.Tensor]], made: torch.nn.Module) -> Callable[[], None]:
    """One SGD step on the summed losses."""
    optimizer = torch.optim.SGD(
        [p for p in made.parameters() if p.requires_grad], lr=1e-5, momentum=0.9, weight_decay=1e-4
    )

    def run() -> None:
        optimizer.zero_grad()
        sum(loss().values()).backward()
        optimizer.step()

    return run


def training(image: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return both sides' training step."""
    corner = torch.rand(20, 2) * torch.tensor([WIDTH - 220, HEIGHT - 220])
    boxes, labels = torch.cat([corner, corner + 20 + 200 * torch.rand(20, 2)], dim=1), torch.randint(0, 80, (20,))
    theirs, ours = (side.train() for side in models())
    batch = Batch(image[None], torch.tensor([[HEIGHT, WIDTH]]), (0,), torch.ones(1, 2), (Target(boxes, labels),))
    objects = [{"boxes": boxes, "labels": labels + 1}]
    return {
        "torchvision": step(lambda: theirs([image.float() / 255], objects), theirs),
        "fusedet": step(lambda: ours.loss(batch), ours),
    }


def main() -> None:
    """Measure and print JSON."""
    options = parse_options(__doc__, only=["predict", "train_step"])
    if options.serve:
        serve_call(torchvision, options.serve)
        return
    about = {"image": [HEIGHT, WIDTH], "detector": "Faster R-CNN R50 FPN, 80 classes"}
    torch.manual_seed(0)
    if options.only in (None, "predict"):
        ours = models()[1]
        engines = measure_prediction(__file__, CONFIG, OVERRIDES, ours, (HEIGHT, WIDTH), options)
        print_report(benchmark="two_stage predict", **about, **engines)
    if options.only in (None, "train_step"):
        image = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
        measured = summarize_times(interleave(training(image), options.repeats), "torchvision")
        print_report(benchmark="two_stage train_step", **about, **measured)


if __name__ == "__main__":
    main()
