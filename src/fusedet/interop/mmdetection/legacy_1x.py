"""Checkpoints of MMDetection's 1.x line: their names and the order of their rows, as in 2.x and 3.x.

There a two-stage detector with K classes has K + 1 of everything, background first: of `fc_cls` rows 1..K are the classes and row 0 is
background, which here comes last; of `fc_reg` the first four rows and of `mask_head.conv_logits` the first row belong to background and
are dropped. One-stage heads have no background in their rows in either line.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def convert_1x_weights(state: Weights) -> Weights:
    """A state dict of the 1.x line by the names and rows of 3.x."""
    two_stage = any(key.startswith("rpn_head.") for key in state) and any(
        re.match(r"bbox_head\.(\d+\.)?fc_cls\.", key) for key in state
    )
    found = {}
    for key, value in state.items():
        name = re.sub(r"^(bbox_head|mask_head|grid_head)\.", r"roi_head.\1.", key) if two_stage else key
        found[name] = _rows(name, value) if two_stage else value
    return found


def _rows(name: str, value: Tensor) -> Tensor:
    if value.ndim == 0:  # no rows: `keys.matched` says of what shape it should be
        return value
    layer = name.rpartition(".")[0]
    if layer.endswith("fc_cls"):
        return torch.cat([value[1:], value[:1]])
    if layer.endswith("fc_reg"):
        return value if len(value) == 4 else value[4:]
    if layer.endswith("conv_logits"):
        return value[1:]
    return value
