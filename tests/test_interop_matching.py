"""MMDetection's configs of the matching and anchor-free heads, and of the necks beside FPN."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedet import config
from fusedet.errors import InputError
from fusedet.interop.conversion import convert_mmdetection_weights, count_classes
from fusedet.interop.mmdetection.detector_config import convert_config
from fusedet.interop.mmdetection.infer_config import infer_config

MODELS = [
    "atss_r50-caffe_fpn_dyhead_1x_coco",
    "autoassign_r50-caffe_fpn_1x_coco",
    "dh-faster-rcnn_r50_fpn_1x_coco",
    "fovea_r50_fpn_4xb4-1x_coco",
    "fovea_r50_fpn_gn-head-align_4xb4-2x_coco",
    "fsaf_r50_fpn_1x_coco",
    "yolof_r50_c5_8x8_1x_coco",
]
NECK = {"type": "FPN", "start_level": 1, "add_extra_convs": "on_input", "num_outs": 5}
CODER = {"type": "DeltaXYWHBBoxCoder", "target_stds": [1.0] * 4, "add_ctr_clamp": True, "ctr_clamp": 20}


def detector(head: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """MMDetection's config with a head and the parts given."""
    model = {"type": "SingleStageDetector", "backbone": {"type": "ResNet", "depth": 18}, "neck": NECK}
    return {"model": model | {"bbox_head": head} | parts}


def convert_head(head: dict[str, Any], **parts: Any) -> dict[str, Any]:
    tree = convert_config(detector(head, **parts), {}).tree
    return dict(tree["model"]["head"])


def test_weights_show_the_published_models(shared: Path) -> None:
    """Inferred from names and shapes, each has its config's parts, and all weights have counterparts."""
    with gzip.open(shared / "zoo" / "zoo.jsonl.gz", "rt", encoding="utf-8") as lines:
        models = {model["name"]: model for model in map(json.loads, lines) if model["name"] in MODELS}
    assert set(models) == set(MODELS)
    for name, model in models.items():
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in model["keys"].items()}
            tree = convert_config(infer_config(state)[0], state).tree
            options = config.parse(tree)
            convert_mmdetection_weights(state, options, count_classes(state, options), name)
        assert count_classes(state, options) == 80
        wanted = convert_config({"model": model["model"]}, state).tree["model"]
        assert tree["model"]["neck"] == wanted["neck"]
        hidden: dict[str, Any] = {"offset": 0.5, "ranges": None}  # weights do not show them
        if wanted["head"].get("convs") == 0:
            hidden["norm"] = None
        assert tree["model"]["head"] | hidden == wanted["head"] | hidden
        assert tree["model"].get("roi") == wanted.get("roi")


def test_options_of_the_heads() -> None:
    fovea = {"type": "FoveaHead", "base_edge_list": [32.0, 64, 128, 256, 512], "sigma": 0.3}
    head = convert_head(fovea | {"scale_ranges": [[1, 9]] * 5})
    assert (head["type"], head["base_scale"], head["sigma"], head["ranges"]) == ("fovea", 4, 0.3, [[1, 9]] * 5)
    head = convert_head({"type": "FreeAnchorRetinaHead", "pre_anchor_topk": 30, "bbox_thr": 0.5})
    assert (head["type"], head["topk"], head["threshold"], head["box_weight"]) == ("free_anchor", 30, 0.5, 0.75)
    head = convert_head({"type": "AutoAssignHead", "center_loss_weight": 0.5})
    assert (head["type"], head["center_weight"], head["norm"]) == ("autoassign", 0.5, True)
    anchors = {"type": "AnchorGenerator", "octave_base_scale": 1, "scales_per_octave": 1, "ratios": [1.0]}
    fsaf = {"type": "FSAFHead", "anchor_generator": anchors, "bbox_coder": {"type": "TBLRBBoxCoder"}}
    head = convert_head(fsaf, train_cfg={"assigner": {"pos_scale": 0.25, "neg_scale": 0.25}})
    assert (head["type"], head["scale"]) == ("fsaf", 0.25)
    yolof = {"type": "YOLOFHead", "anchor_generator": {"ratios": [1.0], "scales": [1, 3]}, "bbox_coder": CODER}
    head = convert_head(yolof, neck={"type": "DilatedEncoder"})
    assert (head["type"], head["scales"], head["most_shift"], head["convs"]) == ("yolof", [1, 3], 20, 4)


@pytest.mark.parametrize(
    ("head", "parts", "message"),
    [
        ({"type": "FoveaHead", "base_edge_list": [16, 32, 64, 128, 200]}, {}, "base_edge_list"),
        ({"type": "FoveaHead", "base_edge_list": []}, {}, r"base_edge_list=\[\]"),
        ({"type": "FSAFHead", "bbox_coder": {"type": "TBLRBBoxCoder", "normalizer": 2.0}}, {}, "normalizer=2.0"),
        ({"type": "AutoAssignHead", "force_topk": True}, {}, "force_topk=True"),
        ({"type": "YOLOFHead", "anchor_generator": {"ratios": [2.0]}, "bbox_coder": CODER}, {}, "ratios"),
        ({"type": "YOLOFHead", "bbox_coder": CODER | {"add_ctr_clamp": False}}, {}, "add_ctr_clamp=False"),
        ({"type": "RetinaHead"}, {"neck": [NECK, {"type": "DyHead", "out_channels": 128}]}, "out_channels=128"),
        ({"type": "RetinaHead"}, {"neck": {"type": "NASFPN", "num_outs": 4, "norm_cfg": {"type": "BN"}}}, "num_outs=4"),
        ({"type": "RetinaHead"}, {"neck": {"type": "DilatedEncoder", "block_mid_channels": 100}}, "must divide"),
        (
            {"type": "RetinaHead"},
            {"backbone": {"type": "ResNet", "depth": 18, "out_indices": [3]}},
            "neck.type=FPN is not supported",
        ),
        ({"type": "RetinaHead"}, {"test_cfg": {"nms": {"type": "soft_nms", "method": "naive"}}}, "method='naive'"),
        ({"type": "RetinaHead"}, {"test_cfg": {"nms": {"class_agnostic": True}}}, "nms.class_agnostic=True"),
        ({"type": "RetinaHead"}, {"test_cfg": {"min_bbox_size": 32}}, "test_cfg.min_bbox_size=32"),
        ({"type": "FCOSHead", "bbox_coder": {"clip_border": False}}, {}, "clip_border=False"),
    ],
)
def test_what_has_no_counterpart_is_refused(head: dict[str, Any], parts: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert_head(head, **parts)


def test_necks() -> None:
    neck = {"type": "NASFPN", "stack_times": 3, "start_level": 1, "num_outs": 5, "out_channels": 64}
    tree = convert_config(detector({"type": "RetinaHead"}, neck=neck | {"norm_cfg": {"type": "BN"}}), {}).tree["model"]
    assert tree["neck"] == {"type": "nas_fpn", "repeats": 3}
    assert tree["pyramid"] == {"channels": 64, "finest": 3, "coarsest": 7}
    tree = convert_config(detector({"type": "RetinaHead"}, neck=[NECK, {"type": "DyHead", "num_blocks": 2}]), {}).tree
    assert tree["model"]["neck"][1] == {"type": "dyhead", "blocks": 2}


def test_what_is_not_read_of_a_test_cfg_is_noted() -> None:
    test = {"nms_pre": 1000, "min_bbox_size": 0, "score_thr": 0.1, "max_per_img": 50, "nms": {"iou_threshold": 0.6}}
    head = {"type": "RetinaHead"}
    known = convert_config(detector(head, test_cfg=test), {}).notes
    more = test | {"voting": True, "nms": test["nms"] | {"max_num": 9}}
    notes = convert_config(detector(head, test_cfg=more), {}).notes
    assert [note for note in notes if note not in known] == [
        "not converted of model.test_cfg.nms: max_num",
        "not converted of model.test_cfg: voting",
    ]
    assert not any("test_cfg" in note for note in known)


def test_soft_nms_of_a_config() -> None:
    nms = {"type": "soft_nms", "iou_threshold": 0.4, "method": "gaussian", "sigma": 0.3}
    tree = convert_config(detector({"type": "RetinaHead"}, test_cfg={"nms": nms}), {}).tree
    wanted = {"nms": 0.4, "soft_nms": "gaussian", "soft_sigma": 0.3, "soft_min_score": 0.001}
    assert {key: tree["test"].get(key) for key in wanted} == wanted
    tree = convert_config(detector({"type": "RetinaHead"}, test_cfg={"nms": {"type": "soft_nms"}}), {}).tree
    assert (tree["test"]["nms"], tree["test"]["soft_nms"]) == (0.3, "linear")  # mmcv's defaults
    assert "soft_nms" not in convert_config(detector({"type": "RetinaHead"}), {}).tree["test"]
