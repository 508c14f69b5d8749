"""Convert names and row order of MMDetection 1.x checkpoints to those of 2.x and 3.x.

In 1.x, a two-stage detector with K classes has K + 1 rows, background first:

- fc_cls: row 0 is background, which comes last here; rows 1..K are the classes.
- fc_reg: the first four rows belong to background and are dropped.
- mask_head.conv_logits: the first row belongs to background and is dropped.

One-stage heads have no background rows in any version.
"""

import re

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def convert_1x_weights(state: Weights) -> Weights:
    """Return a state dict of 1.x with the names and rows of 3.x."""
    two_stage = any(key.startswith("rpn_head.") for key in state) and any(
        re.match(r"bbox_head\.(\d+\.)?fc_cls\.", key) for key in state
    )
    converted = {}
    for key, value in state.items():
        name = re.sub(r"^(bbox_head|mask_head|grid_head)\.", r"roi_head.\1.", key) if two_stage else key
        converted[name] = _reorder_rows(name, value) if two_stage else value
    return converted


def _reorder_rows(name: str, value: Tensor) -> Tensor:
    if value.ndim == 0:  # no rows: `match_weights` reports the shape
        return value
    layer = name.rpartition(".")[0]
    if layer.endswith("fc_cls"):
        return torch.cat([value[1:], value[:1]])
    if layer.endswith("fc_reg"):
        return value if len(value) == 4 else value[4:]
    if layer.endswith("conv_logits"):
        return value[1:]
    return value
