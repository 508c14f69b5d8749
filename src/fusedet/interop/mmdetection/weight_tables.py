"""Tables of MMDetection's names of weights: outputs of dense heads, and necks."""

import re
from collections.abc import Callable

Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""A pattern of MMDetection's names, and the name here, or a function of the match that makes it."""

_RETINA: list[Rule] = [(r"^bbox_head\.retina_(cls|reg)\.", r"head.\1.")]
_ANCHORS: list[Rule] = [
    (r"^bbox_head\.atss_(cls|reg)\.", r"head.\1."),
    (r"^bbox_head\.atss_(?:centerness|iou)\.", "head.quality."),
    (r"^bbox_head\.(scales)$", r"head.\1"),
]
OUTPUTS: dict[str, list[Rule]] = {
    "retina": _RETINA,
    "fcos": [
        (r"^bbox_head\.(?:conv|fcos)_(cls|reg|centerness)\.", r"head.\1."),
        (r"^bbox_head\.(scales)$", r"head.\1"),
    ],
    "vfnet": [
        (r"^bbox_head\.vfnet_reg_conv\.conv\.", "head.reg_conv.0."),
        (r"^bbox_head\.vfnet_reg_conv\.gn\.", "head.reg_conv.1."),
        (r"^bbox_head\.vfnet_reg_refine_dconv\.", "head.refine_star."),
        (r"^bbox_head\.vfnet_cls_dconv\.", "head.cls_star."),
        (r"^bbox_head\.vfnet_reg_refine\.", "head.refine."),
        (r"^bbox_head\.vfnet_(cls|reg)\.", r"head.\1."),
        (r"^bbox_head\.(scales|scales_refine)$", r"head.\1"),
    ],
    "atss": _ANCHORS,
    "paa": _ANCHORS,
    "ddod": _ANCHORS,
    "gfl": [
        (r"^bbox_head\.gfl_(cls|reg)\.", r"head.\1."),
        (r"^bbox_head\.integral\.project$", "head.distances"),
        (r"^bbox_head\.(scales)$", r"head.\1"),
    ],
    "tood": [
        (r"^bbox_head\.inter_convs\.(\d+)\.conv\.conv_offset\.", r"head.shared.\1.0.offset."),
        (r"^bbox_head\.inter_convs\.(\d+)\.conv\.", r"head.shared.\1.0."),
        (r"^bbox_head\.inter_convs\.(\d+)\.gn\.", r"head.shared.\1.1."),
        (r"^bbox_head\.(cls|reg)_decomp\.layer_attention\.", r"head.\1_task.attention."),
        (r"^bbox_head\.(cls|reg)_decomp\.reduction_conv\.conv\.", r"head.\1_task.reduce."),
        (r"^bbox_head\.(cls|reg)_decomp\.reduction_conv\.gn\.", r"head.\1_task.norm."),
        (r"^bbox_head\.(cls|reg)_(?:prob|offset)_module\.", r"head.\1_alignment."),
        (r"^bbox_head\.tood_(cls|reg)\.", r"head.\1."),
        (r"^bbox_head\.(scales)$", r"head.\1"),
    ],
    "free_anchor": _RETINA,
    "fsaf": _RETINA,
    "fovea": [
        (r"^bbox_head\.conv_(cls|reg)\.", r"head.\1."),
        (r"^bbox_head\.feature_adaption\.conv_offset\.", "head.align.offset."),
        (r"^bbox_head\.feature_adaption\.conv_adaption\.", "head.align.conv."),
    ],
    "yolof": [
        (r"^bbox_head\.cls_subnet\.(\d+)\.conv\.", lambda m: f"head.cls_tower.{3 * int(m[1])}."),
        (r"^bbox_head\.cls_subnet\.(\d+)\.bn\.", lambda m: f"head.cls_tower.{3 * int(m[1]) + 1}."),
        (r"^bbox_head\.bbox_subnet\.(\d+)\.conv\.", lambda m: f"head.reg_tower.{3 * int(m[1])}."),
        (r"^bbox_head\.bbox_subnet\.(\d+)\.bn\.", lambda m: f"head.reg_tower.{3 * int(m[1]) + 1}."),
        (r"^bbox_head\.cls_score\.", "head.cls."),
        (r"^bbox_head\.bbox_pred\.", "head.reg."),
        (r"^bbox_head\.object_pred\.", "head.objectness."),
    ],
    "autoassign": [
        (r"^bbox_head\.conv_(cls|reg|centerness)\.", r"head.\1."),
        (r"^bbox_head\.center_prior\.mean$", "head.center"),
        (r"^bbox_head\.center_prior\.sigma$", "head.width"),
        (r"^bbox_head\.(scales)$", r"head.\1"),
    ],
    "reppoints": [
        (r"^bbox_head\.reppoints_(cls|pts_init|pts_refine)_conv\.", r"head.\1_conv."),
        (r"^bbox_head\.reppoints_(cls|pts_init|pts_refine)_out\.", r"head.\1."),
        (r"^bbox_head\.moment_transfer$", "head.moment_transfer"),
    ],
}
NECK_RULES: dict[str, list[Rule]] = {
    "hrfpn": [(r"reduction_conv\.conv\.", "reduction."), (r"fpn_convs\.(\d+)\.conv\.", r"output.\1.")],
    "dyhead": [
        (r"dyhead_blocks\.(\d+)\.spatial_conv_high\.", r"blocks.\1.coarser."),
        (r"dyhead_blocks\.(\d+)\.spatial_conv_mid\.", r"blocks.\1.own."),
        (r"dyhead_blocks\.(\d+)\.spatial_conv_low\.", r"blocks.\1.finer."),
        (r"dyhead_blocks\.(\d+)\.spatial_conv_offset\.", r"blocks.\1.offset."),
        (r"dyhead_blocks\.(\d+)\.scale_attn_module\.1\.", r"blocks.\1.scale."),
        (r"dyhead_blocks\.(\d+)\.task_attn_module\.conv1\.conv\.", r"blocks.\1.relu.squeeze."),
        (r"dyhead_blocks\.(\d+)\.task_attn_module\.conv2\.conv\.", r"blocks.\1.relu.expand."),
    ],
    "nas_fpn": [
        (r"lateral_convs\.(\d+)\.(conv|bn)\.", lambda m: f"lateral.{m[1]}.{int(m[2] == 'bn')}."),
        (r"extra_downsamples\.(\d+)\.0\.(conv|bn)\.", lambda m: f"top.{m[1]}.{int(m[2] == 'bn')}."),
        (
            r"fpn_stages\.(\d+)\.(\w+)\.out_conv\.(conv|bn)\.",
            lambda m: f"stacks.{m[1]}.{m[2]}.{int(m[3] == 'bn')}.",
        ),
    ],
    "dilated_encoder": [
        (r"lateral_(conv|norm)\.", lambda m: f"project.0.{int(m[1] == 'norm')}."),
        (r"fpn_(conv|norm)\.", lambda m: f"project.0.{2 + int(m[1] == 'norm')}."),
        (
            r"dilated_encoder_blocks\.(\d+)\.conv(\d)\.(conv|bn)\.",
            lambda m: f"blocks.0.{m[1]}.{int(m[2]) - 1}.{int(m[3] == 'bn')}.",
        ),
    ],
}
"""Renaming rules of the necks that are built in other ways than FPN."""
