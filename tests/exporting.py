"""Runs whose weights are random but decided: scores differ by more than rounding, so that exports can be compared."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedet import config as configs
from fusedet.data.shape_drawing import SHAPES
from fusedet.engine.checkpoint import save_weights
from fusedet.models.detectors import build_detector
from small import livelier

NAMES = list(SHAPES)
TINY = [
    "model.backbone={name: test_resnet, pretrained: false}",
    "model.pyramid.channels=32",
    "data.size=[64,96]",
    "data.workers=0",
    "train.batch=4",
    "test.score=0.005",
]
ONE_STAGE = ["model.head.convs=1"]
TWO_STAGE = ["model.head.proposals=50"]


TWO_LEVELS = ["model.pyramid.finest=4", "model.pyramid.coarsest=5"]
"""Fewer operators: converting them to ONNX takes most of an export's time."""
ONE_LEVEL = ["model.pyramid.finest=5", "model.pyramid.coarsest=5"]
"""Even fewer."""
PATCHES = [*ONE_LEVEL, "model.backbone={type: 'patches:Patches'}"]
"""Hardly any but those of the detector; the backbone's class needs `trust`."""


def choose(chosen: Collection[Any], all_values: Iterable[Any]) -> list[Any]:
    """Leave all cases of a slow test but the chosen ones to make soak."""
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.soak) for value in all_values]


def save_run(folder: Path, name: str, *overrides: str, data: Path | None = None) -> Path:
    """Write a run directory of the config `name`_tiny, or else `name`_r18, with random weights."""
    head = TWO_STAGE if "rcnn" in name else ONE_STAGE
    known = f"{name}_tiny" if f"{name}_tiny" in configs.names() else f"{name}_r18"
    config = configs.load(known, [*TINY, *head, *overrides])
    if data is not None:
        config = config.replace(data=config.data.replace(path=str(data)))
    torch.manual_seed(0)
    detector = build_detector(config, len(NAMES))
    livelier(detector)
    folder.mkdir(parents=True)
    ids = list(range(1, len(NAMES) + 1))
    meta = {
        "config": config.to_yaml(),
        "names": json.dumps(NAMES),
        "category_ids": json.dumps(ids),
        "format": "fusedet",
    }
    save_weights(folder / "best.safetensors", detector.state_dict(), meta)
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder
