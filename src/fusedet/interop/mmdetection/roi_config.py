"""Convert MMDetection's RoI heads to fusedet's model.roi."""

from typing import Any

from fusedet.errors import InputError
from fusedet.interop.mmdetection.anchor_config import MAX_CONVS, convert_box_loss, read_box_stds
from fusedet.interop.mmdetection.config_reader import ConfigReader

Tree = dict[str, Any]
_TRAINING = {
    "num": ("sampler.num", 512),
    "fraction": ("sampler.pos_fraction", 0.25),
    "positive": ("assigner.pos_iou_thr", 0.5),
}
_DYNAMIC = {
    "iou_topk": ("dynamic_rcnn.iou_topk", 75),
    "beta_topk": ("dynamic_rcnn.beta_topk", 10),
    "interval": ("dynamic_rcnn.update_iter_interval", 100),
    "initial_iou": ("dynamic_rcnn.initial_iou", 0.4),
    "initial_beta": ("dynamic_rcnn.initial_beta", 1.0),
}
_GRID = {
    "convs": ("num_convs", 8, 0, MAX_CONVS),
    "groups": ("norm_cfg.num_groups", 36),
    "point_channels": ("point_feat_channels", 64),
    "weight": ("loss_grid.loss_weight", 15.0),
}
_DOUBLE = {
    "blocks": ("num_convs", 4, 0, MAX_CONVS),
    "layers": ("num_fcs", 2, 1, MAX_CONVS),
    "box_channels": ("conv_out_channels", 1024),
    "channels": ("fc_out_channels", 1024),
    "cls_weight": ("loss_cls.loss_weight", 2.0),
    "box_weight": ("loss_bbox.loss_weight", 2.0),
}
_MASK = {"convs": ("num_convs", 4, 0, MAX_CONVS), "channels": ("conv_out_channels", 256)}


def convert_roi_head(reader: ConfigReader, trains: list[ConfigReader], legacy: bool) -> Tree:
    """Convert a roi_head to stages and branches.

    Args:
        reader: Reader of `roi_head`.
        trains: Readers of `train_cfg.rcnn`, one for all stages or one per stage.
        legacy: Whether RoIAlign is that of MMDetection 1.x unless the config says otherwise.

    Raises:
        InputError: The RoI head, or an option of it, is not supported, or its stages, loss weights and `trains` differ
            in number.
    """
    kind = reader.require_type(
        "StandardRoIHead",
        "CascadeRoIHead",
        "DynamicRoIHead",
        "GridRoIHead",
        "DoubleHeadRoIHead",
        "PISARoIHead",
        "TridentRoIHead",
    )
    if kind == "PISARoIHead":
        reader.notes.append("further training is without PISA's weights of the samples (ISR, CARL)")
    shared = reader.get_section("shared_head")
    if shared and kind not in ("StandardRoIHead", "TridentRoIHead"):
        raise InputError(
            f"MMDetection's {reader.path}.shared_head with {kind} is not supported: it must be a StandardRoIHead or a "
            "TridentRoIHead"
        )
    heads = reader.get_sections("bbox_head")
    if kind == "CascadeRoIHead" and len(heads) == 1:
        heads = heads * reader.get_int("num_stages", 3, 1, 16)
    if kind != "CascadeRoIHead" and len(heads) != 1:
        raise InputError(f"MMDetection's {reader.path}.bbox_head must be one mapping, got {len(heads)}")
    weights = reader.get_floats("stage_loss_weights", [1.0] * len(heads))
    trains = trains or [ConfigReader("model.train_cfg.rcnn", None, reader.notes)]
    trains = trains * len(heads) if len(trains) == 1 else trains
    if not len(heads) == len(weights) == len(trains):
        raise InputError(
            f"MMDetection's {reader.path} has {len(heads)} stages, {len(weights)} loss weights and "
            f"{len(trains)} train_cfg"
        )
    pooled = reader.get_sections("bbox_roi_extractor")[:1]

    def convert_branch_pooling(key: str) -> Tree:
        return _convert_pooling(reader.get_sections(key)[:1] or pooled, legacy, 14)

    if shared:
        stages = [_convert_c4_stage(shared, heads[0], trains[0]) | _convert_pooling(pooled, legacy, 14, 1)]
    else:
        stages = [
            _convert_stage(h, w, t, kind) | _convert_pooling(pooled, legacy, 7)
            for h, w, t in zip(heads, weights, trains)
        ]
    if kind == "DoubleHeadRoIHead":
        stages[0]["enlarge"] = reader.get_float("reg_roi_scale_factor", 1.3)
    branches = [
        _convert_mask_head(head) | convert_branch_pooling("mask_roi_extractor")
        for head in reader.get_sections("mask_head")[:1]
    ]
    if kind == "GridRoIHead":
        grid = _convert_grid_head(reader.get_section("grid_head"), trains[0])
        branches.append(grid | convert_branch_pooling("grid_roi_extractor"))
    reader.note_unread("num_stages", "num_branch", "test_branch_idx")
    return {"stages": stages, "branches": branches}


def _convert_stage(head: ConfigReader, weight: float, train: ConfigReader, kind: str) -> Tree:
    if kind == "DoubleHeadRoIHead":
        return _convert_double_stage(head, train)
    theirs = head.require_type("Shared2FCBBoxHead", "ConvFCBBoxHead", "SharedFCBBoxHead", "Shared4Conv1FCBBoxHead")
    convs, layers = {"Shared4Conv1FCBBoxHead": (4, 1), "ConvFCBBoxHead": (0, 0)}.get(theirs, (0, 2))
    convs = head.get_int("num_shared_convs", convs)
    layers = head.get_int(head.find_key("num_shared_fcs", "num_fcs"), layers)
    if layers < 1:
        raise InputError(f"MMDetection's {head.path} has no shared fully connected layer: at least one is needed")
    for key in ("num_cls_convs", "num_cls_fcs", "num_reg_convs", "num_reg_fcs"):
        head.require_value(key, 0)
    norm = head.require_norm("norm_cfg", None, None, "GN", "BN")
    head.require_value("with_avg_pool", False)
    for key in ("reg_predictor_cfg", "cls_predictor_cfg"):
        head.get_section(key).require_type("Linear")
    head.get_section("loss_cls").require_value("use_sigmoid", False)
    options: Tree = {"type": "box", "channels": head.get_int("fc_out_channels", 1024)}
    options |= {"convs": convs} if convs else {}
    options |= {"layers": layers} if convs or layers != 2 else {}
    options |= {"norm": norm.lower()} if convs and norm else {}
    options |= {"stds": read_box_stds(head, None)} | train.get_options(_TRAINING)
    options |= head.get_changes({"class_agnostic": ("reg_class_agnostic", False)})
    options |= {"weight": weight} if weight != 1.0 else {}
    if kind == "DynamicRoIHead":
        options |= {"type": "dynamic"} | train.get_options(_DYNAMIC)
    else:
        options |= head.get_changes({"regress": ("with_reg", True)})
        options |= convert_box_loss(head, "l1", "smooth_l1", "balanced_l1")
        options |= _convert_sampling(train.get_section("sampler"))
    head.note_unread("loss_bbox", "num_shared_fcs", "conv_out_channels")
    return options


def _convert_c4_stage(shared: ConfigReader, head: ConfigReader, train: ConfigReader) -> Tree:
    """Convert a ResLayer, the stage that the backbone leaves out, and the head on the mean of its output."""
    shared.require_type("ResLayer")
    shared.require_value("stage", 3)
    shared.require_value("stride", 2)
    shared.require_value("dilation", 1)
    shared.require_value("dcn", None)
    shared.require_norm("norm_cfg", "BN", "BN")
    head.require_type("BBoxHead")
    if not head.get("with_avg_pool", False):
        raise InputError(f"MMDetection's {head.path}.with_avg_pool=False is not supported: it must be True")
    head.get_section("loss_cls").require_value("use_sigmoid", False)
    options: Tree = {"type": "c4", "stds": read_box_stds(head, None)} | train.get_options(_TRAINING)
    options |= head.get_changes({"class_agnostic": ("reg_class_agnostic", False)})
    options |= convert_box_loss(head, "l1", "smooth_l1", "balanced_l1")
    options |= _convert_sampling(train.get_section("sampler"))
    options |= train.get_section("sampler").get_changes({"ground_truth": ("add_gt_as_proposals", True)})
    shared.note_unread("depth", "style", "norm_eval")
    head.note_unread("loss_bbox")
    return options


def _convert_double_stage(head: ConfigReader, train: ConfigReader) -> Tree:
    head.require_type("DoubleConvFCBBoxHead")
    head.require_norm("norm_cfg", "BN", "BN")
    head.get_section("loss_cls").require_value("use_sigmoid", False)
    options: Tree = {"type": "double_head"} | head.get_options(_DOUBLE) | {"stds": read_box_stds(head, None)}
    options |= train.get_options(_TRAINING) | head.get_changes({"class_agnostic": ("reg_class_agnostic", False)})
    options |= convert_box_loss(head, "smooth_l1", "l1", "balanced_l1")
    options |= _convert_sampling(train.get_section("sampler"))
    head.note_unread("loss_bbox", "with_avg_pool")
    return options


def _convert_sampling(sampler: ConfigReader) -> Tree:
    kind = str(sampler.get("type", "RandomSampler"))
    if kind == "CombinedSampler":
        return {"sampling": "balanced"}
    if kind != "RandomSampler":
        sampler.notes.append(f"further training samples randomly where MMDetection's {sampler.path} has {kind}")
    return {}


def _convert_pooling(extractors: list[ConfigReader], legacy: bool, size: int, levels: int = 4) -> Tree:
    """Convert a SingleRoIExtractor to the options size and pooling."""
    if not extractors:
        return {"pooling": {"type": "level", "samples": 2, "aligned": False}} if legacy else {}
    (reader,) = extractors
    reader.require_type("SingleRoIExtractor")
    layer = reader.get_section("roi_layer")
    layer.require_type("RoIAlign", "RoIAlignV2")
    layer.require_value("pool_mode", "avg")
    options: Tree = {}
    if samples := layer.get_int(layer.find_key("sampling_ratio", "sample_num"), 0, 0, 100):
        options["samples"] = samples
    if not layer.get_typed("aligned", bool, not legacy):
        options["aligned"] = False
    options |= reader.get_changes({"finest_side": ("finest_scale", 56.0)})
    if (count := len(reader.get_floats("featmap_strides", (4, 8, 16, 32)))) != levels:
        options["count"] = count
    key = layer.find_key("output_size", "out_size")
    given = layer.get_typed(key, int | list[int], size)
    sides = {given} if isinstance(given, int) else {*given}
    if len(sides) != 1 or not 1 <= (side := sides.pop()) <= 1000:
        raise InputError(f"MMDetection's {layer.path}.{key}={given} must be one side of a square from 1 to 1000")
    return ({"size": side} if side != size else {}) | ({"pooling": {"type": "level"} | options} if options else {})


def _convert_mask_head(head: ConfigReader) -> Tree:
    head.require_type("FCNMaskHead")
    norm = head.require_norm("norm_cfg", None, None, "GN", "BN")
    head.require_value("class_agnostic", False)
    head.require_value("conv_kernel_size", 3)
    head.require_value("upsample_method", "deconv")
    upsample = head.get_section("upsample_cfg")
    upsample.require_type("deconv")
    upsample.require_value("scale_factor", 2)
    options: Tree = {"type": "mask"} | head.get_options(_MASK) | ({"norm": norm.lower()} if norm else {})
    options |= head.get_changes({"weight": ("loss_mask.loss_weight", 1.0)})
    head.note_unread()
    return options


def _convert_grid_head(head: ConfigReader, train: ConfigReader) -> Tree:
    head.require_type("GridHead")
    head.require_value("deconv_kernel_size", 4)
    head.require_value("conv_kernel_size", 3)
    options: Tree = {"type": "grid", "side": round(head.get_int("grid_points", 9, 1) ** 0.5)}
    options |= head.get_options(_GRID) | train.get_options({"radius": ("pos_radius", 1), "num": ("max_num_grid", 192)})
    head.note_unread()
    return options
