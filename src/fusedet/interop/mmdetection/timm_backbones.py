"""Convert the configs of MMDetection's backbones other than ResNet to timm's models."""

from collections.abc import Callable
from typing import Any

from fusedet.errors import InputError
from fusedet.interop.mmdetection.config_reader import ConfigReader

Tree = dict[str, Any]
_REGNETS = {
    "400mf": "004",
    "800mf": "008",
    "1.6gf": "016",
    "3.2gf": "032",
    "4.0gf": "040",
    "6.4gf": "064",
    "8.0gf": "080",
    "12gf": "120",
}
"""Sizes of RegNetX in MMDetection's and timm's names."""
_HRNET_WIDTHS = (18, 30, 32, 40, 44, 48, 64)
_RESNESTS = {50: ("resnest50d", 64), 101: ("resnest101e", 128), 200: ("resnest200e", 128)}
"""timm's name and the channels of the stem by depth."""
_STAGES = {
    "num_stages": (4,),
    "out_indices": ([0, 1, 2, 3],),
    "strides": ([1, 2, 2, 2],),
    "dilations": ([1, 1, 1, 1],),
    "in_channels": (3,),
    "base_channels": (64,),
    "conv_cfg": (None,),
    "plugins": (None,),
    "style": ("pytorch",),
}
"""Supported values of the options that ResNet's relatives share; the first is the default."""


_SWINS = (
    ("tiny", 96, [2, 2, 6, 2], [3, 6, 12, 24]),
    ("small", 96, [2, 2, 18, 2], [3, 6, 12, 24]),
    ("base", 128, [2, 2, 18, 2], [4, 8, 16, 32]),
    ("large", 192, [2, 2, 18, 2], [6, 12, 24, 48]),
)
"""Name, channels, blocks and heads of Swin's sizes."""
_PVTS = (
    ("b0", 32, [2, 2, 2, 2], [8, 8, 4, 4]),
    ("b1", 64, [2, 2, 2, 2], [8, 8, 4, 4]),
    ("b2", 64, [3, 4, 6, 3], [8, 8, 4, 4]),
    ("b3", 64, [3, 4, 18, 3], [8, 8, 4, 4]),
    ("b4", 64, [3, 8, 27, 3], [8, 8, 4, 4]),
    ("b5", 64, [3, 6, 40, 3], [4, 4, 4, 4]),
)
"""Name, channels, layers and MLP ratios of PVTv2's sizes."""
_TRANSFORMER = (
    ("in_channels", (3,)),
    ("out_indices", ([0, 1, 2, 3],)),
    ("qkv_bias", (True,)),
    ("qk_scale", (None,)),
    ("drop_rate", (0,)),
    ("attn_drop_rate", (0,)),
)


def _convert_common(reader: ConfigReader, *skipped: str) -> Tree:
    for key, values in _STAGES.items():
        if key not in skipped:
            reader.require_value(key, *values)
    reader.require_norm("norm_cfg", "BN", "BN")
    return reader.get_options({"frozen_stages": ("frozen_stages", -1), "norm_eval": ("norm_eval", True)})


def _convert_regnet(reader: ConfigReader) -> Tree:
    arch = reader.get("arch")
    size = arch.removeprefix("regnetx_") if isinstance(arch, str) else None
    if size not in _REGNETS:
        raise InputError(
            f"MMDetection's {reader.path}.arch={arch!r} is not supported: supported are "
            f"{', '.join(f'regnetx_{s}' for s in _REGNETS)}"
        )
    for key, values in (("strides", [2, 2, 2, 2]), ("base_channels", 32), ("stem_channels", 32)):
        reader.require_value(key, values)
    return {"name": f"regnetx_{_REGNETS[size]}"} | _convert_common(reader, "strides", "base_channels")


def _convert_hrnet(reader: ConfigReader) -> Tree:
    extra = reader.get_section("extra")
    widths = extra.get_section("stage2").get("num_channels")
    width = widths[0] if isinstance(widths, (list, tuple)) and widths else None
    if width not in _HRNET_WIDTHS:
        raise InputError(
            f"MMDetection's {reader.path}.extra.stage2.num_channels={widths!r} is not supported: its first value must "
            f"be one of {', '.join(map(str, _HRNET_WIDTHS))}"
        )
    for i, modules in enumerate((1, 1, 4, 3), start=1):
        stage = extra.get_section(f"stage{i}")
        stage.require_value("num_modules", modules)
        stage.require_value("num_branches", i)
        stage.require_value("block", "BOTTLENECK" if i == 1 else "BASIC")
        stage.require_value("num_blocks", [4] * i)
        stage.require_value("num_channels", [64] if i == 1 else [width * 2**k for k in range(i)])
    reader.require_value("multiscale_output", True)
    options = _convert_common(reader) | {"frozen_stages": -1}
    return {"name": f"hrnet_w{width}", "branch_maps": True} | options


def _convert_deep_stem(reader: ConfigReader) -> Tree:
    """Convert the options that ResNeSt and Res2Net share."""
    for key in ("deep_stem", "avg_down"):
        reader.require_value(key, True)
    return _convert_common(reader)


def _convert_resnest(reader: ConfigReader) -> Tree:
    name, stem = _RESNESTS[reader.require_value("depth", *_RESNESTS)]
    for key, value in (("stem_channels", stem), ("radix", 2), ("reduction_factor", 4), ("avg_down_stride", True)):
        reader.require_value(key, value)
    reader.require_value("groups", 1)
    return {"name": name} | _convert_deep_stem(reader)


def _convert_res2net(reader: ConfigReader) -> Tree:
    depth = reader.require_value("depth", 50, 101)
    for key, value in (("scales", 4), ("base_width", 26), ("stem_channels", 64)):
        reader.require_value(key, value)
    return {"name": f"res2net{depth}d", "pool_first": False} | _convert_deep_stem(reader)


def _convert_swin(reader: ConfigReader) -> Tree:
    dims, window = reader.get_int("embed_dims", 96), reader.get_int("window_size", 7)
    depths, heads = ([*reader.get_typed(key, list[int], [])] for key in ("depths", "num_heads"))
    shape = (dims, depths or [2, 2, 6, 2], heads or [3, 6, 12, 24])
    size = next((name for name, *known in _SWINS if (*known,) == shape), None)
    side = {7: 224, 12: 384}.get(window)
    if size is None or side is None or (window == 12 and size in ("tiny", "small")):
        raise InputError(
            f"MMDetection's {reader.path} has embed_dims={shape[0]}, depths={shape[1]}, num_heads={shape[2]}, "
            f"window_size={window}: supported are Swin's sizes tiny, small, base and large with windows of 7, and base "
            "and large with windows of 12"
        )
    for key, values in (
        *_TRANSFORMER,
        ("patch_size", (4,)),
        ("mlp_ratio", (4,)),
        ("strides", ([4, 2, 2, 2],)),
        ("patch_norm", (True,)),
        ("use_abs_pos_embed", (False,)),
    ):
        reader.require_value(key, *values)
    return {
        "name": f"swin_{size}_patch4_window{window}_{side}",
        "output_norm": True,
        "frozen_stages": reader.get_int("frozen_stages", -1),
    }


def _convert_pvt2(reader: ConfigReader) -> Tree:
    dims, layers = reader.get_int("embed_dims", 64), [*reader.get_typed("num_layers", list[int], [3, 4, 6, 3])]
    ratios = [*reader.get_typed("mlp_ratios", list[int], [8, 8, 4, 4])]
    size = next((name for name, *known in _PVTS if known == [dims, layers, ratios]), None)
    if size is None:
        raise InputError(
            f"MMDetection's {reader.path} has embed_dims={dims}, num_layers={layers}, mlp_ratios={ratios}: supported "
            "are PVTv2's sizes b0 to b5"
        )
    for key, values in (
        *_TRANSFORMER,
        ("num_heads", ([1, 2, 5, 8],)),
        ("sr_ratios", ([8, 4, 2, 1],)),
        ("patch_sizes", ([7, 3, 3, 3],)),
        ("strides", ([4, 2, 2, 2],)),
    ):
        reader.require_value(key, *values)
    return {"name": f"pvt_v2_{size}"}


def _convert_convnext(reader: ConfigReader) -> Tree:
    arch = reader.require_value("arch", "tiny", "small", "base", "large", "xlarge")
    for key, values in (
        ("out_indices", ([0, 1, 2, 3], -1)),
        ("gap_before_final_norm", (False,)),
        ("linear_pw_conv", (True,)),
        ("use_grn", (False,)),
    ):
        reader.require_value(key, *values)
    return {
        "name": f"convnext_{arch}",
        "output_norm": True,
        "frozen_stages": reader.get_int("frozen_stages", 0) or -1,  # 0 freezes nothing there
    }


FAMILIES: dict[str, Callable[[ConfigReader], Tree]] = {
    "RegNet": _convert_regnet,
    "HRNet": _convert_hrnet,
    "ResNeSt": _convert_resnest,
    "Res2Net": _convert_res2net,
    "SwinTransformer": _convert_swin,
    "PyramidVisionTransformerV2": _convert_pvt2,
    "ConvNeXt": _convert_convnext,
}
"""Conversion to `model.backbone` by MMDetection's type."""
