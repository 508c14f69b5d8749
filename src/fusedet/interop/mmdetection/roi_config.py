"""MMDetection's RoI heads as fusedet's model.roi says them."""

from __future__ import annotations

from typing import Any

from fusedet.errors import InputError
from fusedet.interop.mmdetection.config_reader import Part, norm
from fusedet.interop.mmdetection.head_config import LAYERS, box_loss, code

Tree = dict[str, Any]
ROI_HEADS = ("StandardRoIHead", "CascadeRoIHead", "DynamicRoIHead", "GridRoIHead")


def roi(part: Part, trains: list[Part], legacy: bool) -> Tree:
    """A roi_head as stages and branches. trains: MMDetection's train_cfg.rcnn, one or one per stage. legacy: of the 1.x line."""
    kind = part.kind(*ROI_HEADS)
    part.need("shared_head", None)
    heads = part.parts("bbox_head")
    if kind == "CascadeRoIHead" and len(heads) == 1:
        heads = heads * part.integer("num_stages", 3, 1, 16)
    if kind != "CascadeRoIHead" and len(heads) != 1:
        raise InputError(f"MMDetection's {part.where}.bbox_head must be one mapping, got {len(heads)}")
    weights = part.numbers("stage_loss_weights", [1.0] * len(heads))
    trains = (trains or [Part("model.train_cfg.rcnn", None, part.notes)]) * (len(heads) if len(trains) < 2 else 1)
    if not len(heads) == len(weights) == len(trains):
        raise InputError(
            f"MMDetection's {part.where} has {len(heads)} stages, {len(weights)} loss weights and {len(trains)} train_cfg"
        )
    pooled = part.parts("bbox_roi_extractor")[:1]
    stages = [_stage(h, w, t, _pooling(pooled, legacy, 7), kind) for h, w, t in zip(heads, weights, trains)]
    branches = []
    if masks := part.parts("mask_head")[:1]:
        branches.append(_mask(masks[0], _pooling(part.parts("mask_roi_extractor")[:1] or pooled, legacy, 14)))
    if kind == "GridRoIHead":
        branches.append(
            _grid(
                part.part("grid_head"), trains[0], _pooling(part.parts("grid_roi_extractor")[:1] or pooled, legacy, 14)
            )
        )
    part.rest("train_cfg", "test_cfg", "num_stages")
    return {"stages": stages, "branches": branches}


def _stage(head: Part, weight: float, train: Part, pooling: Tree, kind: str) -> Tree:
    theirs = head.kind("Shared2FCBBoxHead", "ConvFCBBoxHead", "SharedFCBBoxHead", "Shared4Conv1FCBBoxHead")
    four = theirs == "Shared4Conv1FCBBoxHead"
    convs, layers = (4, 1) if four else (0, 0 if theirs == "ConvFCBBoxHead" else 2)
    convs, layers = (
        head.integer("num_shared_convs", convs),
        head.integer("num_shared_fcs", head.integer("num_fcs", layers)),
    )
    for key in ("num_cls_convs", "num_cls_fcs", "num_reg_convs", "num_reg_fcs"):
        head.need(key, 0)
    if (convs, layers) not in ((0, 2), (4, 1)):
        raise InputError(
            f"MMDetection's {head.where} has {convs} shared convolutions and {layers} shared layers: what can be converted has none and "
            "two, or four and one"
        )
    norm(head, "norm_cfg", None, None)
    head.need("with_avg_pool", False)
    for key in ("reg_predictor_cfg", "cls_predictor_cfg"):
        if str(head.part(key).get("type", "Linear")) != "Linear":
            raise InputError(f"MMDetection's {head.where}.{key} is not here: what can be converted has Linear")
    if head.part("loss_cls").flag("use_sigmoid", False):
        raise InputError(
            f"MMDetection's {head.where}.loss_cls.use_sigmoid=True is not here: what can be converted has the softmax"
        )
    sampler = train.part("sampler")
    found: Tree = {"type": "dynamic" if kind == "DynamicRoIHead" else "box"} | pooling
    found |= {"channels": head.integer("fc_out_channels", 1024)} | ({"convs": convs, "layers": layers} if four else {})
    found |= {
        "stds": code(head, None),
        "num": sampler.integer("num", 512),
        "fraction": sampler.number("pos_fraction", 0.25),
    }
    found["positive"] = train.part("assigner").number("pos_iou_thr", 0.5)
    if head.flag("reg_class_agnostic", False):
        found["class_agnostic"] = True
    if weight != 1.0:
        found["weight"] = weight
    if kind == "DynamicRoIHead":
        memory = train.part("dynamic_rcnn")
        names = {"iou_topk": 75, "beta_topk": 10, "update_iter_interval": 100}
        found |= {key.removeprefix("update_iter_"): memory.integer(key, usual) for key, usual in names.items()}
        found |= {"initial_iou": memory.number("initial_iou", 0.4), "initial_beta": memory.number("initial_beta", 1.0)}
        head.part("loss_bbox")
    else:
        found |= {} if head.flag("with_reg", True) else {"regress": False}
        found |= box_loss(head, "l1", "smooth_l1", "balanced_l1")
        found |= _sampling(sampler)
    head.rest(
        "loss_cls", "loss_bbox", "roi_feat_size", "num_shared_fcs", "conv_out_channels", "target_means", "target_stds"
    )
    return found


def _sampling(sampler: Part) -> Tree:
    kind = str(sampler.get("type", "RandomSampler"))
    if kind == "RandomSampler":
        return {}
    if kind == "CombinedSampler":
        return {"sampling": "balanced"}
    sampler.notes.append(f"further training samples at random where MMDetection's {sampler.where} has {kind}")
    return {}


def _pooling(extractors: list[Part], legacy: bool, size: int) -> Tree:
    """A SingleRoIExtractor as the options size and pooling."""
    if not extractors:
        return {"pooling": {"type": "level", "samples": 2, "aligned": False}} if legacy else {}
    part = extractors[0]
    part.kind("SingleRoIExtractor")
    layer = part.part("roi_layer")
    layer.kind("RoIAlign", "RoIAlignV2")
    layer.need("pool_mode", "avg")
    found: Tree = {}
    samples = layer.integer("sampling_ratio", layer.integer("sample_num", 0), 0, 100)
    if samples:
        found["samples"] = samples
    if not layer.flag("aligned", not legacy):
        found["aligned"] = False
    if (side := part.number("finest_scale", 56)) != 56:
        found["finest_side"] = side
    if (count := len(part.numbers("featmap_strides", (4, 8, 16, 32)))) != 4:
        found["count"] = count
    key = "output_size" if layer.get("output_size") is not None else "out_size"
    sides = layer.typed(key, int | list[int], size)
    sides = [sides] if isinstance(sides, int) else sides
    if len(set(sides)) != 1 or not 1 <= (out := sides[0]) <= 1000:
        raise InputError(
            f"MMDetection's {layer.where}.{key}={layer.get(key)} must be one side of a square from 1 to 1000"
        )
    return ({"size": out} if out != size else {}) | ({"pooling": {"type": "level"} | found} if found else {})


def _mask(head: Part, pooling: Tree) -> Tree:
    head.kind("FCNMaskHead")
    norm(head, "norm_cfg", None, None)
    head.need("class_agnostic", False)
    head.need("conv_kernel_size", 3)
    upsample = head.part("upsample_cfg")
    if (
        str(upsample.get("type", "deconv")) != "deconv"
        or upsample.get("scale_factor", 2) != 2
        or head.get("upsample_method", "deconv") != "deconv"
    ):
        raise InputError(
            f"MMDetection's {head.where} does not double its maps by a transposed convolution, as what can be converted does"
        )
    found: Tree = {
        "type": "mask",
        "convs": head.integer("num_convs", 4, 0, LAYERS),
        "channels": head.integer("conv_out_channels", 256),
    } | pooling
    if (weight := head.part("loss_mask").number("loss_weight", 1.0)) != 1.0:
        found["weight"] = weight
    head.rest("roi_feat_size")
    return found


def _grid(head: Part, train: Part, pooling: Tree) -> Tree:
    head.kind("GridHead")
    points = head.integer("grid_points", 9, 1)
    groups = head.part("norm_cfg").integer("num_groups", 36)
    head.need("deconv_kernel_size", 4)
    head.need("conv_kernel_size", 3)
    found: Tree = {
        "type": "grid",
        "side": round(points**0.5),
        "convs": head.integer("num_convs", 8, 0, LAYERS),
        "groups": groups,
    } | pooling
    found |= {"point_channels": head.integer("point_feat_channels", 64), "radius": train.integer("pos_radius", 1)}
    found |= {"num": train.integer("max_num_grid", 192), "weight": head.part("loss_grid").number("loss_weight", 15)}
    head.rest("roi_feat_size")
    return found
