"""Convert MMDetection's backbones, necks and image preprocessing to fusedet's config."""

from collections.abc import Mapping
from typing import Any

import timm

from fusedet.config import BACKBONES
from fusedet.errors import InputError
from fusedet.interop.mmdetection.config_reader import ConfigReader
from fusedet.interop.mmdetection.neck_config import NECK_CONVERTERS, convert_dyhead
from fusedet.interop.mmdetection.timm_backbones import FAMILIES

Tree = dict[str, Any]
_TAGGED = {name.partition(".")[0]: name for name in (*BACKBONES.values(), "resnet34.tv_in1k", "resnet152.tv_in1k")}
_FIXED = {
    "deep_stem": (False,),
    "avg_down": (False,),
    "gcb": (None, False),
    "gen_attention": (None, False),
    "in_channels": (3,),
    "stem_channels": (64,),
    "base_channels": (64,),
    "conv_cfg": (None,),
}
"""Supported values of options that do not exist here; the first is the default."""
_TOPS = {("on_input", False): "on_input", ("on_input", True): "on_input_relu"}
_TOPS |= {("on_output", True): "on_output", ("on_output", False): "on_output_plain"}


def convert_backbone(reader: ConfigReader) -> Tree:
    """Convert a backbone to `model.backbone`.

    Raises:
        InputError: The backbone, or an option of it, is not supported.
    """
    kind = reader.require_type("ResNet", "ResNeXt", "TridentResNet", *FAMILIES)
    if kind in FAMILIES:
        family = FAMILIES[kind](reader) | {"pretrained": False} | _convert_deformable(reader)
        reader.note_unread()
        return family
    depth, groups = reader.get_int("depth", 50), reader.get_int("groups", 1)
    name = f"resnet{depth}"
    if kind == "ResNeXt" or groups != 1:
        name = f"resnext{depth}_{groups}x{reader.get_int('base_width', 4)}d"
    if not timm.is_model(name):
        raise InputError(f"MMDetection's {reader.path}: the backbone {name} is not supported")
    stages = reader.require_value("num_stages", 4, 3)
    reader.require_value("out_indices", *(([0, 1, 2, 3], [3]) if stages == 4 else ([2],)))
    reader.require_value("strides", [1, 2, 2, 2][:stages])
    reader.require_value("dilations", [1] * stages)
    for key, values in _FIXED.items():
        reader.require_value(key, *values)
    options: Tree = {"name": _TAGGED.get(name, name), "pretrained": False}
    options |= {"norm": "gn"} if reader.require_norm("norm_cfg", "BN", "BN", "GN") == "GN" else {}
    options |= reader.get_options({"frozen_stages": ("frozen_stages", -1), "norm_eval": ("norm_eval", True)})
    if reader.require_value("style", "pytorch", "caffe") == "caffe" and depth >= 50:
        options["style"] = "caffe"
    options |= _convert_deformable(reader)
    options |= _convert_trident(reader) if kind == "TridentResNet" else {}
    reader.note_unread("base_width", "plugins")
    return options


def convert_plugins(reader: ConfigReader) -> Tree | None:
    """Convert a backbone's plugins to `model.plugin`: GCNet's context block or none.

    Raises:
        InputError: There are several plugins, or another than the context block.
    """
    plugins = reader.get_sections("plugins") if reader.values.get("plugins") else []
    if not plugins:
        return None
    first = plugins[0]
    block = first.get_section("cfg")
    block.require_type("ContextBlock")
    block.require_value("pooling_type", "att")
    block.require_value("fusion_types", ["channel_add"])
    position = first.require_value("position", "after_conv3")
    if len(plugins) > 1:
        raise InputError(f"MMDetection's {reader.path}.plugins has {len(plugins)} items: only one is supported")
    used = first.get_typed("stages", list[bool], [True] * 4)
    stages = [i for i, inserted in enumerate(used, start=1) if inserted]
    return {
        "type": "context_block",
        "positions": [position],
        "stages": stages,
        "ratio": block.get_float("ratio", 1 / 16),
    }


def _convert_trident(reader: ConfigReader) -> Tree:
    dilations = reader.get_typed("trident_dilations", list[int], [1, 2, 3])
    reader.require_value("num_branch", len(dilations))
    branch = reader.get_int("test_branch_idx", 1)
    return {
        "trident_stages": [3],
        "trident_dilations": dilations,
        "trident_branch": None if branch < 0 else branch,
    }


def _convert_deformable(reader: ConfigReader) -> Tree:
    used = reader.get_typed("stage_with_dcn", list[bool], [False] * 4)
    if not (dcn := reader.get_section("dcn")):
        return {}
    modulated = dcn.require_type("DCN", "DCNv2", "DCNv1") == "DCNv2" or dcn.get_typed("modulated", bool, False)
    dcn.require_value(dcn.find_key("deform_groups", "deformable_groups"), 1)
    dcn.require_value("fallback_on_stride", False)
    if len(used) != 4:
        raise InputError(f"MMDetection's {reader.path}.stage_with_dcn={used} must have four items, one for each stage")
    stages = [i for i, deformable in enumerate(used, start=1) if deformable]
    return {"deformable_stages": stages, "modulated": modulated} if stages else {}


def convert_necks(readers: list[ConfigReader], last_only: bool = False) -> tuple[Any, Tree]:
    """Convert one neck or several to `model.neck` and `model.pyramid`.

    Args:
        readers: Readers of the necks, in their order.
        last_only: Whether the backbone has only C5; the neck is then a DilatedEncoder.

    Raises:
        InputError: A neck, or an option of it, is not supported.
    """
    first, *others = readers
    if last_only:
        first.require_type("DilatedEncoder")
    kind = first.require_type("FPN", "PAFPN", *NECK_CONVERTERS)
    if kind in NECK_CONVERTERS and not others:
        return NECK_CONVERTERS[kind](first)
    first.require_value("end_level", -1)
    first.require_value("no_norm_on_lateral", False)
    first.get_section("upsample_cfg").require_value("mode", "nearest")
    norm = first.require_norm("norm_cfg", None, None, *(["GN"] if kind == "FPN" else []))
    start, count = first.get_int("start_level", 0, 0, 3), first.get_int("num_outs", 5, 1, 16)
    pyramid: Tree = {"channels": first.get_int("out_channels", 256), "finest": 2 + start, "coarsest": 1 + start + count}
    if count < 4 - start:
        raise InputError(
            f"MMDetection's {first.path}.num_outs={count} leaves out a level of the backbone: "
            f"at least {4 - start} are needed"
        )
    pyramid["top"] = _convert_top(first, count - (4 - start))
    specs: list[Any] = [{"type": kind.lower()} | ({"norm": True} if norm else {})]
    for reader in others:
        if reader.require_type("BFP", "DyHead") == "DyHead":
            specs.append(convert_dyhead(reader))
            continue
        reader.require_value("num_levels", count)
        reader.require_norm("norm_cfg", None, None)
        refine = reader.require_value("refine_type", "none", "conv", "non_local")
        specs.append({"type": "bfp", "refine_level": reader.get_int("refine_level", 2), "refine": refine})
    for reader in readers:
        reader.note_unread("extra_convs_on_inputs")
    return (specs if others else specs[0]), pyramid


def _convert_top(reader: ConfigReader, more: int) -> str:
    relu = reader.get_typed("relu_before_extra_convs", bool, False)
    extra = reader.get_typed("add_extra_convs", bool | str, False)
    if not extra:
        return "max_pool"
    if extra is True:  # the name before 2.x
        extra = "on_input" if reader.get_typed("extra_convs_on_inputs", bool, True) else "on_output"
    if more < 2:  # there is no second convolution that a ReLU could precede
        relu = extra == "on_output"
    if (extra, relu) not in _TOPS:
        raise InputError(
            f"MMDetection's {reader.path}.add_extra_convs={extra!r} is not supported: supported values are on_input "
            "and on_output"
        )
    return _TOPS[extra, relu]


def read_normalization(config: Mapping[str, Any], notes: list[str]) -> tuple[list[float], list[float], bool] | None:
    """Return mean and std in RGB order, and whether the weights expect BGR; None if the config has no preprocessing.

    Raises:
        InputError: Mean and std do not have three channels, or the preprocessing also turns RGB to BGR.
    """
    model = config.get("model") or {}
    if given := model.get("data_preprocessor") or config.get("data_preprocessor"):
        reader = ConfigReader("model.data_preprocessor", given, notes)
        bgr = not reader.get_typed("bgr_to_rgb", bool, False)
        reader.require_value("rgb_to_bgr", False)
        if (divisor := reader.get_int("pad_size_divisor", 1)) != 32:
            notes.append(
                f"images were padded to multiples of {divisor}, here to multiples of 32: values near the right and "
                "bottom edge may differ"
            )
    else:
        step = config.get("img_norm_cfg") or _find_step(config, "Normalize")
        if not step:
            return None
        reader = ConfigReader("img_norm_cfg", step, notes)
        bgr = not reader.get_typed("to_rgb", bool, True)
    mean, std = reader.get_floats("mean", (0, 0, 0)), reader.get_floats("std", (1, 1, 1))
    if len(mean) != 3 or len(std) != 3:
        raise InputError(f"MMDetection's {reader.path} must have a mean and a std of three channels")
    return (mean[::-1], std[::-1], True) if bgr else (mean, std, False)


def read_resizing(config: Mapping[str, Any], notes: list[str]) -> Tree:
    """Convert the resizing of MMDetection's test pipeline to `data`: without antialiasing (OpenCV) unless by Pillow."""
    data = config.get("data")
    test = data.get("test") if isinstance(data, Mapping) else None
    for source in (config.get("test_pipeline"), config.get("test_dataloader"), test):
        step: Any = _find_step(source, "Resize", "MultiScaleFlipAug", having=("scale", "img_scale"))
        scale = step and (step.get("scale") or step.get("img_scale"))
        if isinstance(scale, (list, tuple)) and scale and isinstance(scale[0], (list, tuple)):
            scale = scale[0]
        if isinstance(scale, (list, tuple)) and len(scale) == 2 and all(isinstance(v, int) for v in scale):
            # In a MultiScaleFlipAug, which has the scale, the Resize is nested.
            inner = _find_step(step.get("transforms"), "Resize") or step
            # the default of 3.x, which has the key `scale`; that of 2.x is True
            if not inner.get("keep_ratio", "scale" not in step):
                notes.append(f"images were stretched to {scale[0]} x {scale[1]}, here their aspect ratio is kept")
            if (kind := inner.get("interpolation", "bilinear")) != "bilinear":
                notes.append(f"images were resized by '{kind}', here bilinear")
            size = {"size": sorted(scale)} if min(scale) >= 32 else {}
            return size | {"antialias": inner.get("backend", "cv2") == "pillow"}
    return {"antialias": False}


def _find_step(tree: Any, *types: str, having: tuple[str, ...] = ("type",)) -> Any:
    """Find the first mapping of one of the types with one of the keys, at any depth."""
    if isinstance(tree, Mapping):
        if str(tree.get("type", "")).rpartition(".")[2] in types and any(tree.get(key) for key in having):
            return tree
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return next((step for item in tree if (step := _find_step(item, *types, having=having))), None)
    return None
