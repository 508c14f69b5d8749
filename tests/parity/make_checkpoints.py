"""Write checkpoints/*.json: complete MMDetection models and their detections. Needs MMDetection 3.x only.

Each file holds MMDetection's config of a model, the names and shapes of its weights (`filled.fill` gives the values),
an image size (`filled.image`, padded to multiples of 32) and MMDetection's detections. They come from MMDetection 3.3.0
on MMCV's Python code, with torchvision's RoIAlign, NMS and deformable convolutions in place of MMCV's compiled ones. In
that environment the three checkpoints of the reference data agree with their recorded detections to 0.001 pixel.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filled import fill, image
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from pycocotools import mask as coco_mask

SIZE = (150, 220)
GN = {"type": "GN", "num_groups": 32, "requires_grad": True}
NARROW = {"neck": {"out_channels": 64}, "bbox_head": {"in_channels": 64, "feat_channels": 64, "num_classes": 5}}
R18 = {"backbone": {"depth": 18, "init_cfg": None}, "neck": {"in_channels": [64, 128, 256, 512]}}
BOX = {"in_channels": 64, "fc_out_channels": 128, "num_classes": 5}
TWO = {
    "neck": {"out_channels": 64},
    "rpn_head": {"in_channels": 64, "feat_channels": 64},
    "roi_head": {"bbox_roi_extractor": {"out_channels": 64}, "bbox_head": BOX},
}
MASK = {
    "roi_head": {
        "mask_roi_extractor": {"out_channels": 64},
        "mask_head": {"in_channels": 64, "conv_out_channels": 64, "num_classes": 5},
    }
}
GRID = {
    "roi_head": {
        "grid_roi_extractor": {"out_channels": 64},
        "grid_head": {"in_channels": 64, "point_feat_channels": 16},
    }
}
X50 = {"backbone": {"type": "ResNeXt", "depth": 50, "groups": 32, "base_width": 4, "init_cfg": None}}
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "retinanet_r18_gn": ("retinanet/retinanet_r18_fpn_1x_coco.py", [R18, NARROW, {"bbox_head": {"norm_cfg": GN}}]),
    "retinanet_r50_caffe": ("retinanet/retinanet_r50-caffe_fpn_1x_coco.py", [NARROW]),
    "libra_retinanet_r18": ("libra_rcnn/libra-retinanet_r50_fpn_1x_coco.py", [R18, NARROW]),
    "fcos_r50_caffe_dcn": ("fcos/fcos_r50-dcn-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py", [NARROW]),
    "vfnet_r50_mdconv": ("vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco.py", [NARROW]),
    "reppoints_r18_gn": (
        "reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py",
        [R18, NARROW, {"bbox_head": {"point_feat_channels": 64}}],
    ),
    "reppoints_r18_minmax": (
        "reppoints/reppoints-moment_r50_fpn_1x_coco.py",
        [R18, NARROW, {"bbox_head": {"transform_method": "minmax"}}],
    ),
    "faster_rcnn_r18_pafpn": ("pafpn/faster-rcnn_r50_pafpn_1x_coco.py", [R18, TWO]),
    "faster_rcnn_x50_dconv": ("dcn/faster-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py", [X50, TWO]),
    "libra_rcnn_r18": ("libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py", [R18, TWO]),
    "dynamic_rcnn_r18": ("dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py", [R18, TWO]),
    "mask_rcnn_r18": ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", [R18, TWO, MASK]),
    "cascade_mask_rcnn_r18": ("cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py", [R18, TWO, MASK]),
    "grid_rcnn_r18": ("grid_rcnn/grid-rcnn_r50_fpn_gn-head_2x_coco.py", [R18, TWO, GRID]),
}


def narrow(model: Any, changes: dict[str, Any]) -> None:
    """Merge changes into a config, and into each item of a list (a chain of necks, stages) that has the key."""
    for key, change in changes.items():
        inner = model.get(key)
        if isinstance(inner, list) and isinstance(change, dict):
            for item in inner:
                taken = (
                    {"out_channels": "in_channels"} if item["type"] == "BFP" else {k: k for k in change}
                )  # it takes a pyramid
                narrow(item, {taken[k]: v for k, v in change.items() if k in taken})
        elif isinstance(inner, dict) and isinstance(change, dict):
            narrow(inner, change)
        else:
            model[key] = change


def make(name: str, configs: Path) -> dict[str, Any]:
    """Build a model, run it, and return the content of its file."""
    file, changes = CASES[name]
    config = Config.fromfile(str(configs / file)).model
    config.backbone.init_cfg = None
    for change in changes:
        narrow(config, change)
    model = MODELS.build(ConfigDict(config)).eval()
    stem = 0.017 if config.data_preprocessor.std[0] == 1 else 1.0
    keys = {k: list(v.shape) for k, v in model.state_dict().items()}
    model.load_state_dict({k: torch.from_numpy(np.asarray(fill(k, tuple(s), stem))) for k, s in keys.items()})
    height, width = SIZE
    padded = tuple(-(-side // 32) * 32 for side in SIZE)
    sample = DetDataSample(
        metainfo={"img_shape": SIZE, "ori_shape": SIZE, "scale_factor": (1.0, 1.0), "batch_input_shape": padded}
    )
    bgr = np.ascontiguousarray(image(height, width)[..., ::-1])
    with torch.no_grad():
        data = model.data_preprocessor(
            {"inputs": [torch.from_numpy(bgr).permute(2, 0, 1)], "data_samples": [sample]}, False
        )
        instances = model.predict(data["inputs"], data["data_samples"], rescale=False)[0].pred_instances
    predictions = {
        "boxes": [[round(v, 3) for v in box] for box in instances.bboxes.tolist()],
        "scores": [round(v, 6) for v in instances.scores.tolist()],
        "labels": instances.labels.tolist(),
    }
    if "masks" in instances:
        codes = coco_mask.encode(np.asfortranarray(instances.masks.permute(1, 2, 0).numpy().astype(np.uint8)))
        predictions["masks"] = [code["counts"].decode() for code in codes[::10]]  # of every tenth detection
    return {
        "mmdet_config": file,
        "stem": stem,
        "size": SIZE,
        "model": config.to_dict(),
        "keys": keys,
        "predictions": predictions,
    }


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: make_checkpoints.py CONFIGS_FOLDER_OF_MMDETECTION [CASE]...")
    register_all_modules()
    target = Path(__file__).with_name("checkpoints")
    target.mkdir(exist_ok=True)
    for case in sys.argv[2:] or CASES:
        content = make(case, Path(sys.argv[1]))
        (target / f"{case}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
        scores = content["predictions"]["scores"]
        print(case, len(scores), scores[:1], scores[-1:])
