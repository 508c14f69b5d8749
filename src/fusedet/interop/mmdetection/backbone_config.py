"""MMDetection's bodies, necks and normalisation as fusedet's config says them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm

from fusedet.errors import InputError
from fusedet.interop.mmdetection.config_reader import ConfigReader, read_norm_type

Tree = dict[str, Any]
TAGS = {
    "resnet18": "tv_in1k",
    "resnet34": "tv_in1k",
    "resnet50": "tv_in1k",
    "resnet101": "tv_in1k",
    "resnet152": "tv_in1k",
    "resnext101_32x4d": "gluon_in1k",
    "resnext101_64x4d": "tv_in1k",
}
_TOPS = {("on_input", False): "on_input", ("on_input", True): "on_input_relu"}
_TOPS |= {("on_output", True): "on_output", ("on_output", False): "on_output_plain"}


def convert_backbone(part: ConfigReader) -> Tree:
    """ResNet and ResNeXt."""
    kind = part.require_type("ResNet", "ResNeXt")
    depth = part.get_int("depth", 50)
    name = f"resnet{depth}"
    if kind == "ResNeXt" or part.get("groups", 1) != 1:
        groups, width = part.get_int("groups", 1), part.get_int("base_width", 4)
        name = f"resnext{depth}_{groups}x{width}d"
    if not timm.is_model(name):
        raise InputError(f"MMDetection's {part.where}: there is no {name} here")
    for key, right in (
        ("num_stages", 4),
        ("out_indices", [0, 1, 2, 3]),
        ("strides", [1, 2, 2, 2]),
        ("dilations", [1, 1, 1, 1]),
        ("deep_stem", False),
        ("avg_down", False),
        ("plugins", None),
        ("gcb", None),
        ("gen_attention", None),
    ):
        part.require_value(key, right, *([False] if right is None else []))
    for key in ("in_channels", "stem_channels", "base_channels"):
        part.require_value(key, 3 if key == "in_channels" else 64)
    part.require_value("conv_cfg", None)
    read_norm_type(part, "norm_cfg", "BN", "BN")
    found: Tree = {"name": f"{name}.{TAGS[name]}" if name in TAGS else name, "pretrained": False}
    found |= {"frozen_stages": part.get_int("frozen_stages", -1), "norm_eval": part.get_bool("norm_eval", True)}
    if part.require_value("style", "pytorch", "caffe") == "caffe" and depth >= 50:
        found["style"] = "caffe"
    return found | _deformable(part)


def _deformable(part: ConfigReader) -> Tree:
    dcn, where = part.get_section("dcn"), part.get_typed("stage_with_dcn", list[bool], [False] * 4)
    if not dcn:
        return {}
    kind = dcn.require_type("DCN", "DCNv2", "DCNv1")
    modulated = kind == "DCNv2" or dcn.get_bool("modulated", False)
    for key in ("deform_groups", "deformable_groups"):
        dcn.require_value(key, 1)
    dcn.require_value("fallback_on_stride", False)
    if len(where) != 4:
        raise InputError(f"MMDetection's {part.where}.stage_with_dcn={where} must have four items, one for each stage")
    stages = [i for i, yes in enumerate(where, start=1) if yes]
    return {"deformable_stages": stages, "modulated": modulated} if stages else {}


def convert_necks(parts: list[ConfigReader]) -> tuple[Any, Tree]:
    """A neck's spec, or a list of them, and the pyramid that it makes."""
    first, *others = parts
    specs: list[Any] = []
    kind = first.require_type("FPN", "PAFPN")
    first.require_value("end_level", -1)
    first.require_value("no_norm_on_lateral", False)
    if first.get_section("upsample_cfg").get("mode", "nearest") != "nearest":
        raise InputError(
            f"MMDetection's {first.where}.upsample_cfg is not here: what can be converted upsamples by nearest neighbours"
        )
    normed = read_norm_type(first, "norm_cfg", None, None, *(["GN"] if kind == "FPN" else [])) == "GN"
    start, count = first.get_int("start_level", 0, 0, 3), first.get_int("num_outs", 5, 1, 16)
    pyramid: Tree = {"channels": first.get_int("out_channels", 256), "finest": 2 + start, "coarsest": 1 + start + count}
    if count < 4 - start:
        raise InputError(
            f"MMDetection's {first.where}.num_outs={count} leaves out a level of the body: there are {4 - start} or more here"
        )
    pyramid["top"] = _top(first, count - (4 - start))
    specs.append({"type": kind.lower()} | ({"norm": True} if normed else {}))
    first.note_unread("relu_before_extra_convs", "extra_convs_on_inputs")
    for part in others:
        part.require_type("BFP")
        part.require_value("num_levels", count)
        read_norm_type(part, "norm_cfg", None, None)
        refine = part.require_value("refine_type", "none", "conv", "non_local")
        specs.append({"type": "bfp", "refine_level": part.get_int("refine_level", 2), "refine": refine})
        part.note_unread()
    return (specs if len(specs) > 1 else specs[0]), pyramid


def _top(part: ConfigReader, more: int) -> str:
    extra = part.get_typed("add_extra_convs", bool | str, False)
    if extra is True:  # before 2.x's names
        extra = "on_input" if part.get_bool("extra_convs_on_inputs", True) else "on_output"
    relu = part.get_bool("relu_before_extra_convs", False)
    if not extra:
        return "max_pool"
    if more < 2:  # no second convolution that a ReLU could precede
        relu = extra == "on_output"
    if (extra, relu) not in _TOPS:
        raise InputError(
            f"MMDetection's {part.where}.add_extra_convs={extra!r} is not here: on_input and on_output can be converted"
        )
    return _TOPS[extra, relu]


def read_normalization(config: Mapping[str, Any], notes: list[str]) -> tuple[list[float], list[float], bool] | None:
    """Mean and std of RGB, and whether the weights take BGR; None where a config says nothing of images."""
    model = config.get("model") or {}
    if model.get("data_preprocessor") or config.get("data_preprocessor"):
        part = ConfigReader(
            "model.data_preprocessor", model.get("data_preprocessor") or config["data_preprocessor"], notes
        )
        bgr = not part.get_bool("bgr_to_rgb", False)
        part.require_value("rgb_to_bgr", False)
        if (divisor := part.get_int("pad_size_divisor", 1)) != 32:
            notes.append(
                f"images were padded to multiples of {divisor}, here of 32: values near the right and lower edge may differ"
            )
    else:
        found = config.get("img_norm_cfg") or _step(config, "Normalize")
        if not found:
            return None
        part = ConfigReader("img_norm_cfg", found, notes)
        bgr = not part.get_bool("to_rgb", True)
    mean, std = part.get_floats("mean", (0, 0, 0)), part.get_floats("std", (1, 1, 1))
    if len(mean) != 3 or len(std) != 3:
        raise InputError(f"MMDetection's {part.where} must have a mean and a std of three channels")
    if bgr:
        mean, std = mean[::-1], std[::-1]
    return mean, std, bgr


def is_imagenet_normalization(mean: list[float], std: list[float]) -> bool:
    """Whether they are ImageNet's."""
    return all(abs(a - b) < 5e-3 for a, b in zip(mean + std, (123.675, 116.28, 103.53, 58.395, 57.12, 57.375)))


def read_resizing(config: Mapping[str, Any], notes: list[str]) -> Tree:
    """How images are resized in MMDetection's test pipeline, as `data` says it: as OpenCV does, not antialiased, unless by Pillow."""
    for source in (config.get("test_pipeline"), config.get("test_dataloader"), _inside(config.get("data"), "test")):
        step: Any = _step(source, "Resize", "MultiScaleFlipAug", having=("scale", "img_scale"))
        scale = step and (step.get("scale") or step.get("img_scale"))
        if isinstance(scale, (list, tuple)) and scale and isinstance(scale[0], (list, tuple)):
            scale = scale[0]
        if isinstance(scale, (list, tuple)) and len(scale) == 2 and all(isinstance(v, int) for v in scale):
            inner = _step(step.get("transforms"), "Resize") or step  # in MultiScaleFlipAug, which has the scale
            if inner.get("keep_ratio", True) is False:
                notes.append(f"images were stretched to {scale[0]} x {scale[1]}, here their ratio is kept")
            if (kind := inner.get("interpolation", "bilinear")) != "bilinear":
                notes.append(f"images were resized by '{kind}', here bilinearly")
            size = {"size": sorted(scale)} if min(scale) >= 32 else {}
            return size | {"antialias": inner.get("backend", "cv2") == "pillow"}
    return {"antialias": False}


def _inside(tree: Any, key: str) -> Any:
    return tree.get(key) if isinstance(tree, Mapping) else None


def _step(tree: Any, *types: str, having: tuple[str, ...] = ("type",)) -> Any:
    """The first mapping of one of these types, with one of these keys, anywhere inside."""
    if isinstance(tree, Mapping):
        if str(tree.get("type", "")).rpartition(".")[2] in types and any(tree.get(key) for key in having):
            return tree
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return next((found for item in tree if (found := _step(item, *types, having=having))), None)
    return None
