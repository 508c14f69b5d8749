"""Another project's checkpoint as a config and weights of this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fusedet import config as configs
from fusedet.config import Config
from fusedet.errors import InputError
from fusedet.interop import torchvision
from fusedet.interop.class_names import resolve_class_names
from fusedet.interop.mmdetection import legacy_1x, load_checkpoint, python_config
from fusedet.interop.mmdetection.backbone_config import read_resizing
from fusedet.interop.mmdetection.detector_config import (
    convert_config,
    is_1x_checkpoint,
    read_backbone_settings,
    uses_1x_keys,
)
from fusedet.interop.mmdetection.infer_config import infer_config
from fusedet.interop.mmdetection.weight_names import (
    build_rules,
    flip_stem_channels,
    join_weights,
    match_weights,
    rename_weight,
)
from fusedet.interop.weight_shapes import axis_size
from fusedet.models.detectors import build_detector

Tree = dict[str, Any]
Weights = dict[str, Tensor]
DYNAMIC = (
    "threshold",
    "beta",
    "overlaps",
    "shifts",
    "steps",
)  # what a stage with a memory knows, and MMDetection does not save


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A detector as a checkpoint here has it, and notes for the user: what was assumed, differs or was left out."""

    config: Config
    weights: Weights
    names: list[str]
    category_ids: list[int]
    notes: list[str]


def convert_checkpoint(
    file: str | Path, config: str | None = None, overrides: Sequence[str] = ()
) -> ConvertedCheckpoint:
    """The checkpoint of MMDetection (1.x, 2.x, 3.x) or torchvision in a file.

    config: MMDetection's config, a .py file; or the name or YAML file of a config here, to which the checkpoint's own copy of MMDetection's
    adds style, mean, BGR and how images are resized. Where none is given, that copy is taken, else what names and shapes tell.
    overrides: "key=value" texts of this project's config on top.
    Raises InputError for a file that cannot be read, holds code, is of no detector here, or does not match in every key.
    """
    content = load_checkpoint.read_checkpoint(file)
    state = load_checkpoint.extract_weights(content, file)
    meta = content.get("meta") if isinstance(content.get("meta"), Mapping) else {}
    if torchvision.is_torchvision(state):
        if config is not None:
            raise InputError(f"--config={config}: {file} is of torchvision, its weights tell all; leave --config out")
        return _of_torchvision(state, file, overrides)
    own = config is not None and not config.endswith(".py")
    source, notes = _own_config(meta, file) if own else _config(config, meta, file)
    legacy = is_1x_checkpoint(source or {}, state, str(meta.get("mmdet_version", "")))  # type: ignore[union-attr]
    state = legacy_1x.convert_1x_weights(state) if legacy else state
    if own:
        words = [*overrides, "model.backbone.pretrained=false", "model.backbone.weights=null"]
        options = configs.load(str(config), words)
        translated = read_backbone_settings(source or {}, options.model.backbone, str(config))
        backbone = {**options.model.backbone, **translated.tree}
        options = configs.load(
            str(config),
            words,
            {"model": {"backbone": backbone}, "data": {"antialias": read_resizing(source or {}, [])["antialias"]}},
        )
    else:
        if source is None:
            source, notes = infer_config(state, legacy)
            translated = convert_config(source, state, legacy)
        else:
            translated = convert_config(source, state, uses_1x_keys(source))
        options = configs.parse(configs.overridden(translated.tree, overrides))
    notes += translated.notes
    if legacy:
        notes += _of_the_1x_line(options, config or "its own config")
    count = count_classes(state, options)
    weights = _mmdetection(flip_stem_channels(state) if translated.bgr else state, options, count, file)
    names, category_ids = resolve_class_names(meta, count, notes)
    return ConvertedCheckpoint(options, weights, names, category_ids, notes)


def _of_the_1x_line(options: Config, name: str) -> list[str]:
    """What to say of a checkpoint of the 1.x line, of whose rules a detector of these options has the anchors or not."""
    notes = ["the checkpoint is of MMDetection's 1.x line: background rows come last or are dropped"]
    head = options.model.head if isinstance(options.model.head, Mapping) else {"type": options.model.head}
    if head.get("type") in ("retina", "rpn"):
        if head.get("round_anchors"):
            return [*notes, "anchors are that line's, and boxes include their last pixel"]
        notes.append(
            f"anchors and boxes are those of later lines, as {name} says, and boxes may be a pixel off: a config of the 1.x line, or one "
            "with LegacyAnchorGenerator, has those of the checkpoint's line"
        )
    return notes


def _own_config(meta: Any, file: str | Path) -> tuple[Tree | None, list[str]]:
    """The checkpoint's own config beside another that is to be used: where it cannot be read, that is said."""
    try:
        return _config(None, meta, file)
    except InputError as error:
        return None, [f"the checkpoint's own config is not looked at: {error}"]


def _config(path: str | None, meta: Any, file: str | Path) -> tuple[Tree | None, list[str]]:
    """MMDetection's config of a file, else of the checkpoint's meta, else None; and what to say of it."""
    text = next(
        (meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str) and "model" in meta[key]), None
    )
    if path is None and text is None:
        return None, []
    read = (
        python_config.read_config(path)
        if path is not None
        else python_config.parse_config(str(text), "the checkpoint's own config")
    )
    if not read.tree and not read.missing:
        raise InputError(
            f"{path or file}: the config is empty; give the one that the checkpoint was trained with, or leave --config out"
        )
    if not read.missing:
        return read.tree, []
    model = read.tree.get("model")
    if not isinstance(model, Mapping) or not all(
        isinstance(model.get(key), (Mapping, list)) for key in ("backbone", "neck")
    ):
        raise InputError(
            f"{path or file}: the _base_ {read.missing[0]} is not there, and without it there is no whole model: copy it beside it, or "
            "give the whole config"
        )
    return read.tree, [f"bases that are not there were left out: {', '.join(read.missing)}"]


def count_classes(state: Mapping[str, Tensor], options: Config) -> int:
    """K, from the rows of what tells classes apart."""
    head = options.model.head if isinstance(options.model.head, Mapping) else {"type": options.model.head}
    codes = "bbox_head.retina_reg.weight"
    anchors = max(axis_size(state, codes) // 4, 1) if codes in state else 1
    places = {
        "retina": (("bbox_head.retina_cls.weight",), anchors, 0),
        "fcos": (("bbox_head.conv_cls.weight", "bbox_head.fcos_cls.weight"), 1, 0),
        "vfnet": (("bbox_head.vfnet_cls.weight",), 1, 0),
        "reppoints": (("bbox_head.reppoints_cls_out.weight",), 1, 0),
        "rpn": (("roi_head.bbox_head.fc_cls.weight", "roi_head.bbox_head.0.fc_cls.weight"), 1, 1),
    }
    names, share, background = places.get(str(head.get("type")), ((), 1, 0))
    found = next((name for name in names if name in state), None)
    count = 0 if found is None else axis_size(state, found) // share - background
    if count < 1:
        raise InputError(
            f"the weights are not of a detector with model.head={head.get('type')}: they have no {' or '.join(names) or 'such head'}"
        )
    return count


def _mmdetection(state: Weights, options: Config, count: int, file: Any) -> Weights:
    detector = build_detector(options, count)
    levels = sum(stride >= 2**options.model.pyramid.finest for stride in detector.backbone.levels.strides)
    table = build_rules(options.model, levels)
    found: Weights = {}
    sources: dict[str, str] = {}
    for key, value in join_weights(state).items():
        name = rename_weight(key, table)
        if name in found:
            raise InputError(
                f"{file} holds {sources[name]} and {key}, which are one weight here ({name}): leave one of them out"
            )
        found[name], sources[name] = value, key
    own = detector.state_dict()
    fresh = tuple(key for key in own if key.startswith("stages.") and key.rpartition(".")[2] in DYNAMIC)
    return match_weights(found, sources, own, file, fresh)


def _of_torchvision(state: Weights, file: str | Path, overrides: Sequence[str]) -> ConvertedCheckpoint:
    read = torchvision.convert_weights(state, Path(file).name)
    options = configs.parse(configs.overridden(read.tree, overrides))
    own = build_detector(options, len(read.names)).state_dict()
    return ConvertedCheckpoint(
        options, match_weights(read.weights, read.sources, own, file), read.names, read.category_ids, read.notes
    )
