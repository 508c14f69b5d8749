"""Train torchvision's Faster R-CNN R18 on BCCD with the data, schedule and evaluation of `faster_rcnn_r18_small`.

Prints COCO's metrics on `test` as JSON, which docs/bccd.md compares with; 69 minutes on one core under load.
"""

from __future__ import annotations

import argparse
import sys

import torch
from common import print_report
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from fusedet import config, evaluation
from fusedet.api import train_inputs
from fusedet.api.detector_evaluation import build_val_loader
from fusedet.data.loader import build_train_loader
from fusedet.engine.optim import lr_factor
from fusedet.errors import InputError
from fusedet.types import Batch, Detections


def images(batch: Batch) -> list[Tensor]:
    """Return images (3, H, W) as floats in 0..1 without padding."""
    return [image[:, :h, :w].float() / 255 for image, (h, w) in zip(batch.images, batch.sizes.tolist())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="the folder of BCCD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=24)
    given = parser.parse_args()
    overrides = [f"data={given.data}", "data.val=test", "data.workers=0", f"train.seed={given.seed}"]
    recipe = config.load("faster_rcnn_r18_small", overrides).train
    milestones = [milestone * given.epochs / recipe.epochs for milestone in recipe.milestones]
    options = config.load("faster_rcnn_r18_small", [*overrides, f"train.milestones={milestones}"])
    recipe = options.train
    try:
        data, test = train_inputs.open_data(options, lambda text: print(text, file=sys.stderr))
    except InputError as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(given.seed)
    layers = {f"layer{i}": str(i - 1) for i in range(1, 5)}
    backbone = BackboneWithFPN(resnet18(weights=None), layers, [64, 128, 256, 512], options.model.pyramid.channels)
    short, long = options.data.size
    model = FasterRCNN(backbone, len(data.names) + 1, min_size=short, max_size=long).train()
    loader = build_train_loader(
        data, train_inputs.train_transform(options), batch=recipe.batch, seed=given.seed, workers=0
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    step = 0
    for epoch in range(given.epochs):
        for batch in loader.epoch(epoch):
            factor = lr_factor(step, recipe, total_steps=len(loader) * given.epochs, steps_per_epoch=len(loader))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * factor
            targets = [{"boxes": target.boxes, "labels": target.labels + 1} for target in batch.targets or ()]
            loss = sum(model(images(batch), targets).values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm or float("inf"))
            optimizer.step()
            step += 1
        print(f"epoch {epoch + 1}/{given.epochs}, last loss {float(loss.detach()):.3f}", file=sys.stderr, flush=True)
    model.eval()
    results = []
    for batch in build_val_loader(options, test, 0, 1):
        with torch.no_grad():
            outputs = model(images(batch))
        for output, image_id, scale in zip(outputs, batch.ids, batch.scales):
            own = Detections(output["boxes"] / scale.repeat(2), output["scores"], output["labels"] - 1)
            results += own.to_coco(image_id, test.category_ids)
    print_report(seed=given.seed, epochs=given.epochs, **evaluation.evaluate_coco(test, results))


if __name__ == "__main__":
    main()
