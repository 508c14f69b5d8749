"""Gradient norms that reach neck and backbone at initialization, for detectors trained from scratch.

Prints a Markdown row for each neck of the table `necks` under the recipe of docs/evidence, and for each config from
scratch, then the smallest norm; exits with 1 if one is below `least_norm`. The batch is the first training batch of the
config.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

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
    "model.backbone={name: tf_efficientnet_lite0, pretrained: false, frozen_stages: 1, norm_eval: true}",
    "model.pyramid.channels=64",
    "model.head={convs: 2, channels: 64, norm: true, base_scale: 2.0}",
    "data.size=[192,320]",
    "train.batch=4",
]
"""The recipe of docs/evidence, without its weights: narrow towers learn with norm only."""


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
    """Compute the gradient norm for the total loss of a batch: of the neck, if it has parameters, and the backbone."""
    losses = detector.loss(batch)
    sum(value * detector.loss_weights[name] for name, value in losses.items()).backward()

    parts = {name: list(getattr(detector, name).parameters()) for name in ("neck", "backbone")}
    gradients = {name: [p.grad.flatten() for p in part if p.grad is not None] for name, part in parts.items() if part}
    return {name: float(torch.cat(values).norm()) for name, values in gradients.items()}


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
    weights = Path("../shared/weights/tf_efficientnet_lite0.safetensors")
    parser.add_argument("--weights", type=Path, default=weights, help="ImageNet weights of the necks' backbone")
    parser.add_argument("overrides", nargs="*", help="further settings of the necks, such as model.head.norm=false")
    args = parser.parse_args()
    dataset = read_dataset(args.data, "train")
    table, recipe = load_table("necks"), [*RECIPE, f"model.backbone.weights={args.weights}"]
    rows = {f"`necks`: {row.label}": row.config(table, *recipe, *args.overrides) for row in table.rows}
    rows |= {f"`{name}`": config.load(name) for name in list_configs()}
    smallest, is_small = float("inf"), False
    print("| | neck | backbone |\n|---|---|---|")
    for label, settings in rows.items():
        norms = measure_gradients(settings, dataset)
        smallest = min(smallest, *norms.values())
        is_small |= min(norms.values()) < least_norm(settings)
        cells = [f"{norms[name]:.2g}" if name in norms else "-" for name in ("neck", "backbone")]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)
    print(f"\nsmallest: {smallest:.2g}")
    return int(is_small)


if __name__ == "__main__":
    sys.exit(main())
