"""Write backbones.json.gz: MMDetection's backbones, the shapes of their weights, and samples of their feature maps.

`filled.fill` gives the weights and `filled.image` the image. Needs MMDetection 3.3.0, and MMPretrain for ConvNeXt;
compiled operators are not used.

    python tests/parity/make_backbones.py
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from filled import fill, image
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmpretrain.models.backbones.convnext import ConvNeXt

SIZE = (96, 160)
SAMPLES = 16


def hrnet(width: int) -> dict[str, Any]:
    """Make the `extra` of an HRNet."""
    stages = {"stage1": (1, "BOTTLENECK", [64])}
    for i, modules in enumerate((1, 4, 3), start=2):
        stages[f"stage{i}"] = (modules, "BASIC", [width * 2**k for k in range(i)])
    return {
        name: {
            "num_modules": modules,
            "num_branches": len(channels),
            "block": block,
            "num_blocks": [4] * len(channels),
            "num_channels": channels,
        }
        for name, (modules, block, channels) in stages.items()
    }


CONTEXT = {
    "cfg": {"type": "ContextBlock", "ratio": 1 / 16},
    "stages": [False, True, True, True],
    "position": "after_conv3",
}
CASES: dict[str, dict[str, Any]] = {
    "regnet": {"type": "RegNet", "arch": "regnetx_400mf"},
    "hrnet": {"type": "HRNet", "extra": hrnet(18)},
    "resnest": {"type": "ResNeSt", "depth": 50, "stem_channels": 64, "radix": 2, "reduction_factor": 4},
    "res2net": {"type": "Res2Net", "depth": 50, "scales": 4, "base_width": 26},
    "group_norm": {"type": "ResNet", "depth": 50, "norm_cfg": {"type": "GN", "num_groups": 32}},
    "context_block": {"type": "ResNet", "depth": 50, "plugins": [CONTEXT]},
    "swin": {"type": "SwinTransformer", "embed_dims": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "pvt_v2": {"type": "PyramidVisionTransformerV2", "embed_dims": 32, "num_layers": [2, 2, 2, 2]},
    "convnext": {
        "type": "ConvNeXt",
        "arch": "tiny",
        "out_indices": [0, 1, 2, 3],
        "layer_scale_init_value": 1.0,
        "gap_before_final_norm": False,
    },
}


def main() -> None:
    """Build and run every backbone."""
    register_all_modules()
    cases = {}
    for name, config in CASES.items():
        own = {key: value for key, value in config.items() if key != "type"}
        model = ConvNeXt(**own) if name == "convnext" else MODELS.build(json.loads(json.dumps(config)))
        model.eval()
        state = model.state_dict()
        for key, value in state.items():
            if not key.endswith("relative_position_index"):
                state[key] = torch.from_numpy(fill(f"backbone.{key}", tuple(value.shape), 1.0))
        model.load_state_dict(state)
        pixels = torch.from_numpy(image(*SIZE)).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            maps = model((pixels - 127.5) / 64)
        cases[name] = {
            "config": config,
            "keys": {f"backbone.{key}": list(value.shape) for key, value in state.items()},
            "shapes": [list(m.shape) for m in maps],
            "samples": [[round(float(v), 5) for v in m.flatten()[:: m.numel() // SAMPLES][:SAMPLES]] for m in maps],
            "largest": [round(float(m.abs().max()), 5) for m in maps],
        }
    text = json.dumps({"size": SIZE, "samples": SAMPLES, "cases": cases}, separators=(",", ":"))
    Path(__file__).with_name("backbones.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
