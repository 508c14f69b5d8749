"""Adapters of ATSS and the dense heads built on it: GFL, PAA, TOOD, DDOD."""

from __future__ import annotations

from collections.abc import Callable

from cases import Case, Errors
from torch import Tensor, nn

from fusedet.models.heads import ATSSHead, DDODHead, GFLHead, PAAHead, TOODHead
from fusedet.types import Levels

Compared = tuple[Errors, dict[str, int]]
Compare = Callable[..., Compared]
TOWERS = [
    (r"^(cls|reg)_convs\.(\d+)\.conv\.conv_offset\.", lambda m: f"towers.{m[1]}.{3 * int(m[2])}.offset."),
    (r"^(cls|reg)_convs\.(\d+)\.conv\.", lambda m: f"towers.{m[1]}.{3 * int(m[2])}."),
    (r"^(cls|reg)_convs\.(\d+)\.gn\.", lambda m: f"towers.{m[1]}.{3 * int(m[2]) + 1}."),
]
RENAMES = {
    "ATSSHead": [*TOWERS, (r"^atss_(cls|reg)\.", r"\1."), (r"^atss_(centerness|iou)\.", "quality.")],
    "PAAHead": [*TOWERS, (r"^atss_(cls|reg)\.", r"\1."), (r"^atss_(centerness|iou)\.", "quality.")],
    "TOODHead": [
        (r"^inter_convs\.(\d+)\.conv\.conv_offset\.", r"shared.\1.0.offset."),
        (r"^inter_convs\.(\d+)\.conv\.", r"shared.\1.0."),
        (r"^inter_convs\.(\d+)\.gn\.", r"shared.\1.1."),
        (r"^(cls|reg)_decomp\.layer_attention\.", r"\1_task.attention."),
        (r"^(cls|reg)_decomp\.reduction_conv\.conv\.", r"\1_task.reduce."),
        (r"^(cls|reg)_decomp\.reduction_conv\.gn\.", r"\1_task.norm."),
        (r"^(cls|reg)_(?:prob|offset)_module\.", r"\1_alignment."),
        (r"^tood_(cls|reg)\.", r"\1."),
    ],
    "DDODHead": [*TOWERS, (r"^atss_(cls|reg)\.", r"\1."), (r"^atss_(centerness|iou)\.", "quality.")],
    "GFLHead": [*TOWERS, (r"^gfl_(cls|reg)\.", r"\1."), (r"^integral\.project$", "distances")],
}


def levels_of(case: Case) -> Levels:
    """Return the levels of a case's pyramid."""
    c = case.config["head"]
    strides = tuple(c["anchor_generator"]["strides"])
    return Levels((c["in_channels"],) * len(strides), strides)


def shared_options(case: Case) -> dict[str, object]:
    """Return the options that all heads of the family have."""
    c = case.config["head"]
    return {
        "convs": c["stacked_convs"],
        "channels": c["feat_channels"],
        "base_scale": c["anchor_generator"]["octave_base_scale"],
        "box_weight": c["loss_bbox"]["loss_weight"],
    }


def maps_of(*names: str) -> Callable[[dict[str, list[Tensor]]], list[list[Tensor]]]:
    """Return a function that picks maps by name."""
    return lambda maps: [maps[name] for name in names]


def atss(case: Case, compare: Compare) -> Compared:
    """Compare ATSS's head."""
    c = case.config["head"]
    head = ATSSHead(
        levels_of(case),
        c["num_classes"],
        topk=case.config["train_cfg"]["assigner"]["topk"],
        alpha=c["loss_cls"]["alpha"],
        gamma=c["loss_cls"]["gamma"],
        centerness_weight=c["loss_centerness"]["loss_weight"],
        **shared_options(case),
    )
    losses = {"loss_cls": "loss_cls", "loss_box": "loss_bbox", "loss_centerness": "loss_centerness"}
    return compare(case, head, RENAMES["ATSSHead"], losses, maps_of("cls", "reg", "quality"))


def gfl(case: Case, compare: Compare) -> Compared:
    """Compare GFL's head."""
    c = case.config["head"]
    head: nn.Module = GFLHead(
        levels_of(case),
        c["num_classes"],
        bins=c["reg_max"],
        topk=case.config["train_cfg"]["assigner"]["topk"],
        beta=c["loss_cls"]["beta"],
        dfl_weight=c["loss_dfl"]["loss_weight"],
        **shared_options(case),
    )
    losses = {"loss_cls": "loss_cls", "loss_box": "loss_bbox", "loss_dfl": "loss_dfl"}
    return compare(case, head, RENAMES["GFLHead"], losses, maps_of("cls", "reg"))


def paa(case: Case, compare: Compare) -> Compared:
    """Compare PAA's head, with and without score voting."""
    c = case.config["head"]
    head = PAAHead(
        levels_of(case),
        c["num_classes"],
        positive=case.config["train_cfg"]["assigner"]["pos_iou_thr"],
        topk=c["topk"],
        alpha=c["loss_cls"]["alpha"],
        gamma=c["loss_cls"]["gamma"],
        iou_weight=c["loss_centerness"]["loss_weight"],
        voting=c["score_voting"],
        **shared_options(case),
    )
    losses = {"loss_cls": "loss_cls", "loss_box": "loss_bbox", "loss_iou": "loss_iou"}
    return compare(case, head, RENAMES["PAAHead"], losses, maps_of("cls", "reg", "quality"))


def tood(case: Case, compare: Compare) -> Compared:
    """Compare TOOD's head in the epoch of the case."""
    c, train = case.config["head"], case.config["train_cfg"]
    head = TOODHead(
        levels_of(case),
        c["num_classes"],
        deformable=c.get("num_dcn", 0),
        anchor_based=c["anchor_type"] == "anchor_based",
        topk=train["initial_assigner"]["topk"],
        initial_epochs=train["initial_epoch"],
        aligned_topk=train["assigner"]["topk"],
        metric_alpha=train["alpha"],
        metric_beta=train["beta"],
        alpha=c["initial_loss_cls"]["alpha"],
        gamma=c["initial_loss_cls"]["gamma"],
        beta=c["loss_cls"]["beta"],
        **shared_options(case),
    )
    head.set_epoch(case.config["epoch"])
    losses = {"loss_cls": "loss_cls", "loss_box": "loss_bbox"}
    return compare(case, head, RENAMES["TOODHead"], losses, maps_of("cls", "reg"))


def ddod(case: Case, compare: Compare) -> Compared:
    """Compare DDOD's head in its first training step."""
    c, train = case.config["head"], case.config["train_cfg"]
    head = DDODHead(
        levels_of(case),
        c["num_classes"],
        topk=train["assigner"]["topk"],
        cls_exponent=train["assigner"]["alpha"],
        box_exponent=train["reg_assigner"]["alpha"],
        alpha=c["loss_cls"]["alpha"],
        gamma=c["loss_cls"]["gamma"],
        iou_weight=c["loss_iou"]["loss_weight"],
        **shared_options(case),
    )
    case.tensors["state.level_counts"] = head.level_counts
    losses = {"loss_cls": "loss_cls", "loss_box": "loss_bbox", "loss_iou": "loss_iou"}
    return compare(case, head, RENAMES["DDODHead"], losses, maps_of("cls", "reg", "quality"))


ATSS_FAMILY = {"ATSSHead": atss, "GFLHead": gfl, "PAAHead": paa, "TOODHead": tood, "DDODHead": ddod}
