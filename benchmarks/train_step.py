"""One training step: fusedet's RetinaNet-R50 and torchvision's, 800x1216, CPU, float32, interleaved in one run.

`--bf16` adds fusedet with autocast to bf16.

Both freeze the stem and the first stage, keep the batch norms' statistics, and take one SGD step on the same image
and boxes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import interleave, measure_peak_memory, print_report, summarize_times
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from fusedet import create_model
from fusedet.api.timing import read_peak_memory
from fusedet.types import Batch, Target

HEIGHT, WIDTH = 800, 1216


def step(loss: Callable[[], dict[str, torch.Tensor]], parameters: list[torch.nn.Parameter]) -> Callable[[], None]:
    """Return a call that makes one SGD step on the summed losses."""
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        sum(loss().values()).backward()
        optimizer.step()

    return run


def fusedet(image: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, bf16: bool = False) -> Callable[[], None]:
    """Return fusedet's training step, in float32 or with autocast to bf16 as `train.precision=bf16`."""
    model = create_model("retinanet_r50", "model.backbone.pretrained=false").train()
    n = len(image)
    sizes = torch.tensor([list(image.shape[2:])] * n)
    batch = Batch(image, sizes, tuple(range(n)), torch.ones(n, 2), tuple(Target(boxes, labels) for _ in range(n)))

    def loss() -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model.loss(batch)

    return step(loss, [p for p in model.parameters() if p.requires_grad])


def torchvision(image: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Return torchvision's training step, with its FrozenBatchNorm2d."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        trainable_layers=3,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(2048, 256),
    )
    model = RetinaNet(backbone, num_classes=80, min_size=image.shape[2], max_size=image.shape[3]).train()
    targets = [{"boxes": boxes, "labels": labels} for _ in image]
    return step(
        lambda: model([p.float() / 255 for p in image], targets), [p for p in model.parameters() if p.requires_grad]
    )


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=[HEIGHT, WIDTH], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--bf16", action="store_true", help="measure fusedet in bf16 too")
    parser.add_argument("--only", choices=["fusedet", "fusedet-bf16", "torchvision"])
    options = parser.parse_args()
    torch.manual_seed(0)
    height, width = options.size
    image = torch.randint(0, 256, (options.batch, 3, height, width), dtype=torch.uint8)
    corner = torch.rand(20, 2) * torch.tensor([width - 220, height - 220])
    boxes, labels = torch.cat([corner, corner + 20 + 200 * torch.rand(20, 2)], dim=1), torch.randint(0, 80, (20,))
    makers = {
        "torchvision": lambda: torchvision(image, boxes, labels),
        "fusedet": lambda: fusedet(image, boxes, labels),
        "fusedet-bf16": lambda: fusedet(image, boxes, labels, bf16=True),
    }
    if not options.bf16 and options.only != "fusedet-bf16":
        del makers["fusedet-bf16"]
    if options.only:
        run = makers[options.only]()
        run(), run()
        print(read_peak_memory())
        return
    measured = summarize_times(interleave({k: make() for k, make in makers.items()}, options.repeats), "torchvision")
    sizes = ["--batch", str(options.batch), "--size", str(height), str(width)]
    for side in makers:
        measured[side]["peak_MiB"] = round(measure_peak_memory(__file__, side, *sizes))
    measured["fusedet"]["peak_ratio"] = round(measured["fusedet"]["peak_MiB"] / measured["torchvision"]["peak_MiB"], 3)
    print_report(
        benchmark="train_step",
        image=[height, width],
        batch=options.batch,
        detector="RetinaNet R50 FPN, 80 classes",
        **measured,
    )


if __name__ == "__main__":
    main()
