"""MMDetection checkpoints of the reference data, converted by the command line, predict what was recorded."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import fusedet
from fusedet import cli
from partners import partners

NAMES = [
    "retinanet_r18",
    "faster_rcnn_r50",
    "fcos_r50_caffe_gn",
    "atss_r50_fpn_1x_coco",
    "gfl_r50_fpn_1x_coco",
    "paa_r50_fpn_1x_coco",
    "tood_r50_fpn_1x_coco",
    "fcos_hrnetv2p-w18-gn-head_4xb4-1x_coco",
    "retinanet_regnetx-800MF_fpn_1x_coco",
    "mask-rcnn_swin-t-p4-w7_fpn_1x_coco",
    "fovea_r50_fpn_4xb4-1x_coco",
    "freeanchor_r50_fpn_1x_coco",
    "fsaf_r50_fpn_1x_coco",
]


WRITTEN = "faster_rcnn_r50"
"""The model with which the command `predict` runs too."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_recorded_predictions(shared: Path, tmp_path: Path, name: str) -> None:
    spec = json.loads((shared / "checkpoints" / f"{name}.json").read_text())
    fill = runpy.run_path(str(shared / "checkpoints" / "fill_weights.py"))["fill"]
    state = {k: torch.from_numpy(np.array(fill(k, tuple(shape), spec["stem"]))) for k, shape in spec["keys"].items()}
    torch.save({"state_dict": state, "meta": {"mmdet_version": "3.3.0"}}, tmp_path / "model.pth")
    (tmp_path / "config.py").write_text(f"model = {spec['model']!r}\n")
    out = tmp_path / "out"
    arguments = [tmp_path / "model.pth", out, "--config", tmp_path / "config.py"]
    assert cli.run(["convert", "weights", *map(str, arguments)]) == 0
    image = shared / "data" / "coco_tiny" / "val2017" / spec["picture"]
    width, height = spec["picture_size"]
    size = f"data.size=[{min(width, height)},{max(width, height)}]"
    predictor = fusedet.load(out, size, device="cpu")
    detections = predictor.predict(image)
    expected = {key: torch.tensor(spec["predictions"][key]) for key in ("boxes", "scores", "labels")}
    close = (detections.boxes[:, None] - expected["boxes"]).abs().amax(dim=2) <= 0.5
    close &= (detections.scores[:, None] - expected["scores"]).abs() <= 0.002
    close &= detections.labels[:, None] == expected["labels"]
    assert len(detections) == len(expected["scores"])
    assert -1 not in partners(close)
    assert list(predictor.names[::79]) == ["person", "toothbrush"]
    assert predictor.category_ids[-1] == 90
    if name != WRITTEN:
        return
    assert cli.run(["predict", str(out), str(image), size, "device=cpu", "--no-draw"]) == 0
    written = json.loads((out / "predict" / "predictions.json").read_text())
    assert len(written["annotations"]) == len(detections)
    assert [c["name"] for c in written["categories"]][::79] == ["person", "toothbrush"]
    assert written["categories"][-1]["id"] == 90
