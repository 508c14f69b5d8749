"""Narrow detectors from scratch pass gradient on to neck and backbone from the first step on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fakes import load_benchmark
from fusedet import config
from fusedet.ablation import load_table
from fusedet.config import Config
from fusedet.models.detectors import build_detector
from fusedet.types import Batch, Target

gradients = load_benchmark("gradients")


def gradient_norms(settings: Config) -> dict[str, float]:
    """The gradient norms in neck and backbone for two images with three instances each."""
    torch.manual_seed(0)
    detector = build_detector(settings, 3).train()
    boxes = torch.tensor([[10.0, 10, 50, 54], [60, 20, 130, 84], [20, 70, 44, 90]])
    targets = (Target(boxes, torch.tensor([0, 1, 2])), Target(boxes + 4, torch.tensor([2, 0, 0])))
    images = torch.randint(0, 256, (2, 3, 96, 160), dtype=torch.uint8)
    batch = Batch(images, torch.tensor([[96, 160]] * 2), torch.arange(2), torch.ones(2, 2), targets)
    return gradients.gradient_norms(detector, batch)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if config.load(n).model.roi else ()) for n in gradients.list_configs()],
)
def test_configs_from_scratch_have_norm_where_their_heads_need_it(name: str) -> None:
    settings = config.load(name)
    assert min(gradient_norms(settings).values()) > gradients.least_norm(settings)


def test_without_norm_almost_nothing_reaches_neck_and_backbone() -> None:
    assert max(gradient_norms(config.load("retinanet_r18_small", ["model.head.norm=false"])).values()) < 0.01


def test_a_neck_without_parameters_has_no_norm() -> None:
    c4 = ["model.neck=identity", "model.pyramid={finest: 4, coarsest: 4}"]
    assert gradient_norms(config.load("retinanet_r18_small", c4)).keys() == {"backbone"}


@pytest.mark.slow
@pytest.mark.parametrize("label", [row.label for row in load_table("necks").rows])
def test_gradient_reaches_every_neck(shared: Path, label: str) -> None:
    recipe = [*gradients.RECIPE, f"model.backbone.weights={shared / 'weights' / 'tf_efficientnet_lite0.safetensors'}"]
    table = load_table("necks")
    (row,) = (row for row in table.rows if row.label == label)
    assert min(gradient_norms(row.config(table, *recipe)).values()) > gradients.LEAST
