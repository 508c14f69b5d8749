"""Rename and reorder the weights of MMDetection's backbones to timm's."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusedet.errors import InputError
from fusedet.interop.mmdetection.weight_tables import Rule

_BODY = "backbone.body."
STEMS = (
    "backbone.conv1.weight",
    "backbone.stem.0.weight",
    "backbone.patch_embed.projection.weight",
    "backbone.layers.0.0.projection.weight",
    "backbone.downsample_layers.0.0.weight",
)
"""Names of the first convolution's weight."""


def _regnet_block(suffix: str) -> Callable[[re.Match[str]], str]:
    return lambda m: f"{_BODY}s{m[1]}.b{int(m[2]) + 1}.{m.expand(suffix)}"


_BLOCK = r"^backbone\.layer(\d)\.(\d+)\."
_REGNET: list[Rule] = [
    (r"^backbone\.conv1\.", f"{_BODY}stem.conv."),
    (r"^backbone\.bn1\.", f"{_BODY}stem.bn."),
    (_BLOCK + r"conv2\.conv_offset\.", _regnet_block("conv2.conv.offset.")),
    (_BLOCK + r"conv(\d)\.", _regnet_block(r"conv\3.conv.")),
    (_BLOCK + r"bn(\d)\.", _regnet_block(r"conv\3.bn.")),
    (_BLOCK + r"downsample\.0\.", _regnet_block("downsample.conv.")),
    (_BLOCK + r"downsample\.1\.", _regnet_block("downsample.bn.")),
]
_DEEP_STEM: list[Rule] = [(r"^backbone\.stem\.7\.", f"{_BODY}bn1."), (r"^backbone\.stem\.", f"{_BODY}conv1.")]
_STAGE = r"^backbone\.stages\.(\d)\."
_SWIN: list[Rule] = [
    (r"^backbone\.patch_embed\.projection\.", f"{_BODY}patch_embed.proj."),
    (r"^backbone\.norm(\d)\.", r"backbone.output_norms.\1."),
    (_STAGE + r"downsample\.", lambda m: f"{_BODY}layers_{int(m[1]) + 1}.downsample."),
    (_STAGE + r"blocks\.(\d+)\.attn\.w_msa\.", rf"{_BODY}layers_\1.blocks.\2.attn."),
    (_STAGE + r"blocks\.(\d+)\.ffn\.layers\.0\.0\.", rf"{_BODY}layers_\1.blocks.\2.mlp.fc1."),
    (_STAGE + r"blocks\.(\d+)\.ffn\.layers\.1\.", rf"{_BODY}layers_\1.blocks.\2.mlp.fc2."),
    (_STAGE, rf"{_BODY}layers_\1."),
]
_LAYER = r"^backbone\.layers\.(\d)\."
_PVT: list[Rule] = [
    (r"^backbone\.layers\.0\.0\.projection\.", f"{_BODY}patch_embed.proj."),
    (r"^backbone\.layers\.0\.0\.", f"{_BODY}patch_embed."),
    (_LAYER + r"0\.projection\.", rf"{_BODY}stages_\1.downsample.proj."),
    (_LAYER + r"0\.", rf"{_BODY}stages_\1.downsample."),
    (_LAYER + r"2\.", rf"{_BODY}stages_\1.norm."),
    (_LAYER + r"1\.(\d+)\.attn\.attn\.out_proj\.", rf"{_BODY}stages_\1.blocks.\2.attn.proj."),
    (_LAYER + r"1\.(\d+)\.attn\.attn\.", rf"{_BODY}stages_\1.blocks.\2.attn."),
    (_LAYER + r"1\.(\d+)\.ffn\.layers\.0\.", rf"{_BODY}stages_\1.blocks.\2.mlp.fc1."),
    (_LAYER + r"1\.(\d+)\.ffn\.layers\.1\.", rf"{_BODY}stages_\1.blocks.\2.mlp.dwconv."),
    (_LAYER + r"1\.(\d+)\.ffn\.layers\.4\.", rf"{_BODY}stages_\1.blocks.\2.mlp.fc2."),
    (_LAYER + r"1\.", rf"{_BODY}stages_\1.blocks."),
]
_CONVNEXT: list[Rule] = [
    (r"^backbone\.norm(\d)\.", r"backbone.output_norms.\1."),
    (r"^backbone\.downsample_layers\.0\.(\d)\.", rf"{_BODY}stem_\1."),
    (r"^backbone\.downsample_layers\.(\d)\.", rf"{_BODY}stages_\1.downsample."),
    (_STAGE + r"(\d+)\.depthwise_conv\.", rf"{_BODY}stages_\1.blocks.\2.conv_dw."),
    (_STAGE + r"(\d+)\.pointwise_conv(\d)\.", rf"{_BODY}stages_\1.blocks.\2.mlp.fc\3."),
    (_STAGE + r"(\d+)\.", rf"{_BODY}stages_\1.blocks.\2."),
]
_RULES: dict[str, list[Rule]] = {
    "regnetx": _REGNET,
    "resnest": _DEEP_STEM,
    "res2net": _DEEP_STEM,
    "swin": _SWIN,
    "pvt": _PVT,
    "convnext": _CONVNEXT,
}
_RESNET: list[Rule] = [
    # Offsets of deformable convolutions: 1.0 has them beside the convolution, later versions inside it, and modulated
    # ones had another name for some time.
    (r"^backbone\.(.*\.conv2)(?:_offset|\.conv_offset(?:_mask)?)\.", rf"{_BODY}\1.offset."),
    (r"^backbone\.(layer.*\.)context_block\.conv_mask\.", rf"{_BODY}\1drop_path.plugin.mask."),
    (r"^backbone\.(layer.*\.)context_block\.channel_add_conv\.", rf"{_BODY}\1drop_path.plugin.transform."),
    (r"^backbone\.(|layer.*\.)gn(\d)\.", rf"{_BODY}\1bn\2."),
    (r"^backbone\.", _BODY),
]


def backbone_rules(backbone: Mapping[str, Any]) -> list[Rule]:
    """Build the renaming rules of `model.backbone`."""
    name = str(backbone.get("name", ""))
    return next((rules for start, rules in _RULES.items() if name.startswith(start)), []) + _RESNET


def reorder_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the weights of transformers into timm's layout; others stay.

    - Swin's tables of biases are ordered by relative position, as the checkpoint's own index says. The inputs of its
      merging of 2x2 cells are ordered by cell, then channel, with cells by column; MMDetection orders them by channel,
      then cell, with cells by row.
    - PVT's joint projection of query, key and value is split, and its 1x1 convolutions become linear layers.
    """
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("relative_position_index"):
            continue
        if key.endswith("relative_position_bias_table"):
            index = state.get(key.removesuffix("bias_table") + "index")
            result[key] = value if index is None else _order_biases(value, index, key)
            continue
        if not key.startswith("backbone."):
            result[key] = value
        elif re.search(r"\.downsample\.(norm|reduction)\.", key) and value.shape[-1] % 4 == 0:
            cells = value.unflatten(-1, (-1, 2, 2))  # (..., C, row, column)
            result[key] = cells.movedim(-3, -1).transpose(-3, -2).flatten(-3)
        elif (m := re.search(r"\.in_proj_(weight|bias)$", key)) and len(value) % 3 == 0:
            start = key.removesuffix(m[0])
            result[f"{start}.q.{m[1]}"], result[f"{start}.kv.{m[1]}"] = value.split(
                [len(value) // 3, len(value) // 3 * 2]
            )
        elif re.search(r"\.ffn\.layers\.[04]\.weight$", key) and value.shape[2:] == (1, 1):
            result[key] = value.flatten(1)
        else:
            result[key] = value
    return result


def _order_biases(table: Tensor, index: Tensor, key: str) -> Tensor:
    """Order the rows of a table ((2 w - 1)^2, heads) by the relative position in a window of w x w cells.

    Args:
        table: The biases.
        index: (w^2, w^2), the row of every pair of cells.
        key: Name of the table in messages.

    Raises:
        InputError: Pairs of the same relative position have different rows.
    """
    window = math.isqrt(len(index))
    if table.is_meta or index.shape != (window**2, window**2) or len(table) != (2 * window - 1) ** 2:
        return table
    cells = torch.arange(window**2)
    rows, columns = cells // window, cells % window
    own = (rows[:, None] - rows + window - 1) * (2 * window - 1) + columns[:, None] - columns + window - 1
    given = index.long()
    source = torch.zeros(len(table), dtype=torch.int64)
    source[own.flatten()] = given.flatten()
    if not torch.equal(source[own], given) or not 0 <= int(given.min()) <= int(given.max()) < len(table):
        raise InputError(
            f"{key} cannot be converted: the checkpoint's relative_position_index must depend on the relative position "
            "only"
        )
    return table[source]
