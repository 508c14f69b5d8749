"""Convert MMDetection's RoI heads to fusedet's model.roi."""

from __future__ import annotations

from typing import Any

from fusedet.errors import InputError
from fusedet.interop.mmdetection.config_reader import ConfigReader, read_norm_type
from fusedet.interop.mmdetection.head_config import MAX_CONVS, convert_box_loss, read_box_stds

Tree = dict[str, Any]
ROI_HEADS = ("StandardRoIHead", "CascadeRoIHead", "DynamicRoIHead", "GridRoIHead")


def convert_roi_head(reader: ConfigReader, trains: list[ConfigReader], legacy: bool) -> Tree:
    """Convert a roi_head to stages and branches.

    Args:
        reader: Reader of `roi_head`.
        trains: Readers of `train_cfg.rcnn`, one for all stages or one per stage.
        legacy: Whether RoIAlign is that of MMDetection 1.x unless the config says otherwise.
    """
    kind = reader.require_type(*ROI_HEADS)
    reader.require_value("shared_head", None)
    heads = reader.get_sections("bbox_head")
    if kind == "CascadeRoIHead" and len(heads) == 1:
        heads = heads * reader.get_int("num_stages", 3, 1, 16)
    if kind != "CascadeRoIHead" and len(heads) != 1:
        raise InputError(f"MMDetection's {reader.path}.bbox_head must be one mapping, got {len(heads)}")
    weights = reader.get_floats("stage_loss_weights", [1.0] * len(heads))
    trains = (trains or [ConfigReader("model.train_cfg.rcnn", None, reader.notes)]) * (
        len(heads) if len(trains) < 2 else 1
    )
    if not len(heads) == len(weights) == len(trains):
        raise InputError(
            f"MMDetection's {reader.path} has {len(heads)} stages, {len(weights)} loss weights and "
            f"{len(trains)} train_cfg"
        )
    pooled = reader.get_sections("bbox_roi_extractor")[:1]
    stages = [
        _convert_stage(h, w, t, _convert_pooling(pooled, legacy, 7), kind) for h, w, t in zip(heads, weights, trains)
    ]
    branches = []
    if masks := reader.get_sections("mask_head")[:1]:
        branches.append(
            _convert_mask_head(
                masks[0], _convert_pooling(reader.get_sections("mask_roi_extractor")[:1] or pooled, legacy, 14)
            )
        )
    if kind == "GridRoIHead":
        branches.append(
            _convert_grid_head(
                reader.get_section("grid_head"),
                trains[0],
                _convert_pooling(reader.get_sections("grid_roi_extractor")[:1] or pooled, legacy, 14),
            )
        )
    reader.note_unread("train_cfg", "test_cfg", "num_stages")
    return {"stages": stages, "branches": branches}


def _convert_stage(head: ConfigReader, weight: float, train: ConfigReader, pooling: Tree, kind: str) -> Tree:
    theirs = head.require_type("Shared2FCBBoxHead", "ConvFCBBoxHead", "SharedFCBBoxHead", "Shared4Conv1FCBBoxHead")
    four = theirs == "Shared4Conv1FCBBoxHead"
    convs, layers = (4, 1) if four else (0, 0 if theirs == "ConvFCBBoxHead" else 2)
    convs, layers = (
        head.get_int("num_shared_convs", convs),
        head.get_int("num_shared_fcs", head.get_int("num_fcs", layers)),
    )
    for key in ("num_cls_convs", "num_cls_fcs", "num_reg_convs", "num_reg_fcs"):
        head.require_value(key, 0)
    if (convs, layers) not in ((0, 2), (4, 1)):
        raise InputError(
            f"MMDetection's {head.path} has {convs} shared convolutions and {layers} shared layers: only none "
            "and two, or four and one are supported"
        )
    read_norm_type(head, "norm_cfg", None, None)
    head.require_value("with_avg_pool", False)
    for key in ("reg_predictor_cfg", "cls_predictor_cfg"):
        if str(head.get_section(key).get("type", "Linear")) != "Linear":
            raise InputError(f"MMDetection's {head.path}.{key} is not supported: only Linear is")
    if head.get_section("loss_cls").get_bool("use_sigmoid", False):
        raise InputError(f"MMDetection's {head.path}.loss_cls.use_sigmoid=True is not supported: only softmax is")
    sampler = train.get_section("sampler")
    options: Tree = {"type": "dynamic" if kind == "DynamicRoIHead" else "box"} | pooling
    options |= {"channels": head.get_int("fc_out_channels", 1024)} | (
        {"convs": convs, "layers": layers} if four else {}
    )
    options |= {
        "stds": read_box_stds(head, None),
        "num": sampler.get_int("num", 512),
        "fraction": sampler.get_float("pos_fraction", 0.25),
    }
    options["positive"] = train.get_section("assigner").get_float("pos_iou_thr", 0.5)
    if head.get_bool("reg_class_agnostic", False):
        options["class_agnostic"] = True
    if weight != 1.0:
        options["weight"] = weight
    if kind == "DynamicRoIHead":
        memory = train.get_section("dynamic_rcnn")
        names = {"iou_topk": 75, "beta_topk": 10, "update_iter_interval": 100}
        options |= {key.removeprefix("update_iter_"): memory.get_int(key, default) for key, default in names.items()}
        options |= {
            "initial_iou": memory.get_float("initial_iou", 0.4),
            "initial_beta": memory.get_float("initial_beta", 1.0),
        }
        head.get_section("loss_bbox")
    else:
        options |= {} if head.get_bool("with_reg", True) else {"regress": False}
        options |= convert_box_loss(head, "l1", "smooth_l1", "balanced_l1")
        options |= _convert_sampling(sampler)
    head.note_unread(
        "loss_cls", "loss_bbox", "roi_feat_size", "num_shared_fcs", "conv_out_channels", "target_means", "target_stds"
    )
    return options


def _convert_sampling(sampler: ConfigReader) -> Tree:
    kind = str(sampler.get("type", "RandomSampler"))
    if kind == "RandomSampler":
        return {}
    if kind == "CombinedSampler":
        return {"sampling": "balanced"}
    sampler.notes.append(f"further training samples randomly where MMDetection's {sampler.path} has {kind}")
    return {}


def _convert_pooling(extractors: list[ConfigReader], legacy: bool, size: int) -> Tree:
    """Convert a SingleRoIExtractor to the options size and pooling."""
    if not extractors:
        return {"pooling": {"type": "level", "samples": 2, "aligned": False}} if legacy else {}
    reader = extractors[0]
    reader.require_type("SingleRoIExtractor")
    layer = reader.get_section("roi_layer")
    layer.require_type("RoIAlign", "RoIAlignV2")
    layer.require_value("pool_mode", "avg")
    options: Tree = {}
    samples = layer.get_int("sampling_ratio", layer.get_int("sample_num", 0), 0, 100)
    if samples:
        options["samples"] = samples
    if not layer.get_bool("aligned", not legacy):
        options["aligned"] = False
    if (side := reader.get_float("finest_scale", 56)) != 56:
        options["finest_side"] = side
    if (count := len(reader.get_floats("featmap_strides", (4, 8, 16, 32)))) != 4:
        options["count"] = count
    key = "output_size" if layer.get("output_size") is not None else "out_size"
    sides = layer.get_typed(key, int | list[int], size)
    sides = [sides] if isinstance(sides, int) else sides
    if len(set(sides)) != 1 or not 1 <= (out := sides[0]) <= 1000:
        raise InputError(
            f"MMDetection's {layer.path}.{key}={layer.get(key)} must be one side of a square from 1 to 1000"
        )
    return ({"size": out} if out != size else {}) | ({"pooling": {"type": "level"} | options} if options else {})


def _convert_mask_head(head: ConfigReader, pooling: Tree) -> Tree:
    head.require_type("FCNMaskHead")
    read_norm_type(head, "norm_cfg", None, None)
    head.require_value("class_agnostic", False)
    head.require_value("conv_kernel_size", 3)
    upsample = head.get_section("upsample_cfg")
    if (
        str(upsample.get("type", "deconv")) != "deconv"
        or upsample.get("scale_factor", 2) != 2
        or head.get("upsample_method", "deconv") != "deconv"
    ):
        raise InputError(
            f"MMDetection's {head.path} does not upsample by a transposed convolution with factor 2: only that is "
            "supported"
        )
    options: Tree = {
        "type": "mask",
        "convs": head.get_int("num_convs", 4, 0, MAX_CONVS),
        "channels": head.get_int("conv_out_channels", 256),
    } | pooling
    if (weight := head.get_section("loss_mask").get_float("loss_weight", 1.0)) != 1.0:
        options["weight"] = weight
    head.note_unread("roi_feat_size")
    return options


def _convert_grid_head(head: ConfigReader, train: ConfigReader, pooling: Tree) -> Tree:
    head.require_type("GridHead")
    points = head.get_int("grid_points", 9, 1)
    groups = head.get_section("norm_cfg").get_int("num_groups", 36)
    head.require_value("deconv_kernel_size", 4)
    head.require_value("conv_kernel_size", 3)
    options: Tree = {
        "type": "grid",
        "side": round(points**0.5),
        "convs": head.get_int("num_convs", 8, 0, MAX_CONVS),
        "groups": groups,
    } | pooling
    options |= {"point_channels": head.get_int("point_feat_channels", 64), "radius": train.get_int("pos_radius", 1)}
    options |= {
        "num": train.get_int("max_num_grid", 192),
        "weight": head.get_section("loss_grid").get_float("loss_weight", 15),
    }
    head.note_unread("roi_feat_size")
    return options
