"""Gradient norms that reach neck and backbone at initialization, for detectors trained from scratch.

Prints a Markdown row for each neck of the table `necks` under a recipe of small detectors, and for each config from
scratch, then the smallest norm; exits with 1 if one is below `least_norm`. The batch is the first training batch of the
config.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedet import config
from fusedet.ablation import load_table
from fusedet.api.train_inputs import train_transform
from fusedet.config import Config
from fusedet.data.dataset import DetectionDataset
from fusedet.data.loader import build_train_loader
from fusedet.data.readers.auto import read_dataset
from fusedet.models.detectors import build_detector
from fusedet.types import Batch

LEAST, LEAST_OF_GFL, LEAST_OF_GFLV2 = 0.1, 0.025, 0.01
"""GFL weighs its box losses by scores, which start at 0.01, and GFLv2 halves them by its predictor of the quality."""
RECIPE = [
    "model.backbone={name: resnet18.tv_in1k, pretrained: false, frozen_stages: -1, norm_eval: false}",
    "model.pyramid.channels=64",
    "model.head.norm=true",
    "data.size=[240,400]",
    "train.batch=4",
]
"""The recipe of the necks: narrow towers learn with norm only."""


def least_norm(settings: Config) -> float:
    """Return what must reach neck and backbone."""
    head = settings.model.head
    if head["type"] != "gfl":
        return LEAST
    return LEAST_OF_GFLV2 if head.get("quality_channels") else LEAST_OF_GFL


def list_configs() -> list[str]:
    """List the shipped configs from scratch, without those that add a mask or grid branch to another one."""
    names = (name for name in config.names() if name.endswith(("_small", "_tiny")))
    return [name for name in names if not (config.load(name).model.roi or {}).get("branches")]


def gradient_norms(detector: Any, batch: Batch) -> dict[str, float]:
    """Compute the gradient norm of each part's parameters for the total loss of a batch."""
    losses = detector.loss(batch)
    sum(value * detector.loss_weights[name] for name, value in losses.items()).backward()

    def norm(part: nn.Module) -> float:
        gradients = [p.grad.flatten() for p in part.parameters() if p.grad is not None]
        return float(torch.cat(gradients).norm())

    return {"neck": norm(detector.neck), "backbone": norm(detector.backbone)}


def measure_gradients(settings: Config, dataset: DetectionDataset) -> dict[str, float]:
    """Compute the gradient norms of a config's detector for its first training batch."""
    torch.manual_seed(settings.train.seed)
    detector = build_detector(settings, len(dataset.names)).train()
    loader = build_train_loader(
        dataset, train_transform(settings), batch=settings.train.batch, seed=settings.train.seed
    )
    return gradient_norms(detector, next(iter(loader.epoch(0))))


def main() -> int:
    """Print the table; return 1 if a norm is too small."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/bccd"))
    parser.add_argument("overrides", nargs="*", help="further settings of the necks, such as model.head.norm=false")
    args = parser.parse_args()
    dataset = read_dataset(args.data, "train")
    table = load_table("necks")
    rows = {f"`necks`: {row.label}": row.config(table, *RECIPE, *args.overrides) for row in table.rows}
    rows |= {f"`{name}`": config.load(name) for name in list_configs()}
    smallest, is_small = float("inf"), False
    print("| | neck | backbone |\n|---|---|---|")
    for label, settings in rows.items():
        norms = measure_gradients(settings, dataset)
        smallest = min(smallest, *norms.values())
        is_small |= min(norms.values()) < least_norm(settings)
        print(f"| {label} | {norms['neck']:.2g} | {norms['backbone']:.2g} |", flush=True)
    print(f"\nsmallest: {smallest:.2g}")
    return int(is_small)


if __name__ == "__main__":
    sys.exit(main())
