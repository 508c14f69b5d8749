"""Convert a checkpoint of another project to a config and weights of this one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fusedet import config as configs
from fusedet.config import Config
from fusedet.errors import InputError
from fusedet.function_skipping import uninitialized
from fusedet.interop import torchvision
from fusedet.interop.class_names import resolve_class_names
from fusedet.interop.mmdetection import legacy_1x, load_checkpoint
from fusedet.interop.mmdetection.backbone_config import read_resizing
from fusedet.interop.mmdetection.backbone_weights import reorder_weights
from fusedet.interop.mmdetection.detector_config import (
    convert_config,
    is_1x_checkpoint,
    read_backbone_settings,
    uses_1x_keys,
)
from fusedet.interop.mmdetection.infer_config import infer_config
from fusedet.interop.mmdetection.python_config import parse_config, read_config
from fusedet.interop.mmdetection.weight_names import (
    as_mapping,
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
DYNAMIC = ("threshold", "beta", "overlaps", "shifts", "steps")
"""State of a stage of Dynamic R-CNN, which MMDetection does not save."""
_CLASS_LAYERS = {
    "retina": ("bbox_head.retina_cls.weight",),
    "fcos": ("bbox_head.conv_cls.weight", "bbox_head.fcos_cls.weight"),
    "vfnet": ("bbox_head.vfnet_cls.weight",),
    "reppoints": ("bbox_head.reppoints_cls_out.weight",),
    "atss": ("bbox_head.atss_cls.weight",),
    "paa": ("bbox_head.atss_cls.weight",),
    "ddod": ("bbox_head.atss_cls.weight",),
    "gfl": ("bbox_head.gfl_cls.weight",),
    "tood": ("bbox_head.tood_cls.weight",),
    "free_anchor": ("bbox_head.retina_cls.weight",),
    "fsaf": ("bbox_head.retina_cls.weight",),
    "fovea": ("bbox_head.conv_cls.weight",),
    "yolof": ("bbox_head.cls_score.weight",),
    "autoassign": ("bbox_head.conv_cls.weight",),
    "rpn": ("roi_head.bbox_head.fc_cls.weight", "roi_head.bbox_head.0.fc_cls.weight"),
}
"""Names of the layer with a row per class, by the type of the head; with proposals (rpn) it has one more."""


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A converted detector.

    Attributes:
        config: Config of this project.
        weights: State dict of the detector.
        names: Class names.
        category_ids: Category ids of the classes.
        notes: Notes for the user: what was assumed, differs or was left out.
    """

    config: Config
    weights: Weights
    names: list[str]
    category_ids: list[int]
    notes: list[str]


def convert_checkpoint(
    file: str | Path, config: str | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> ConvertedCheckpoint:
    """Convert a checkpoint of MMDetection (1.x, 2.x, 3.x) or torchvision.

    Args:
        file: The checkpoint.
        config: MMDetection's config, a .py file; or the name or YAML file of a config of this project, to which the
            checkpoint's own copy of MMDetection's config adds style, mean, channel order and resizing. By default that
            copy is converted, or the config is inferred from names and shapes of the weights. A mapping is
            MMDetection's config of 2.x or later, whatever the checkpoint says about itself.
        overrides: "key=value" overrides of the converted config.

    Raises:
        InputError: The file cannot be read, has code, is of no supported detector, or does not match in every key.
    """
    content = load_checkpoint.read_checkpoint(file)
    state = load_checkpoint.extract_weights(content, file)
    meta = content["meta"] if isinstance(content.get("meta"), Mapping) else {}
    if torchvision.is_torchvision(state):
        if config is not None:
            raise InputError(
                f"--config={config}: {file} is of torchvision, whose weights need no config: leave --config out"
            )
        return _convert_torchvision(state, file, overrides)
    own = config if isinstance(config, str) and not config.endswith(".py") else None
    notes: list[str] = []
    source, legacy = config, False
    if not isinstance(source, Mapping):
        source, notes = _read_mmdetection_config(None if own else source, meta, file, required=own is None)
        legacy = is_1x_checkpoint(source, state, str(meta.get("mmdet_version", "")))
    state = legacy_1x.convert_1x_weights(state) if legacy else state
    if own:
        forced = [*overrides, "model.backbone.pretrained=false", "model.backbone.weights=null"]
        given = configs.load(own, forced).model.backbone
        translated = read_backbone_settings(source, given, own)
        resizing = {"antialias": read_resizing(source, [])["antialias"]}
        options = configs.load(own, forced, {"model": {"backbone": {**given, **translated.tree}}, "data": resizing})
    else:
        is_old = uses_1x_keys(source)
        if not source:
            source, notes = infer_config(state, legacy)
            is_old = legacy
        translated = convert_config(source, state, is_old)
        options = configs.parse(configs.apply_overrides(translated.tree, overrides))
    notes += translated.notes
    if legacy:
        notes += _note_1x_differences(options, str(config or "its own config"))
    count = count_classes(state, options)
    weights = convert_mmdetection_weights(flip_stem_channels(state) if translated.bgr else state, options, count, file)
    names, category_ids = resolve_class_names(meta, count, notes)
    return ConvertedCheckpoint(options, weights, names, category_ids, notes)


def _note_1x_differences(options: Config, name: str) -> list[str]:
    """Note how a checkpoint of MMDetection 1.x differs, depending on whether the config has the anchors of 1.x."""
    notes = ["the checkpoint is of MMDetection 1.x: background rows are moved to the end or dropped"]
    head = as_mapping(options.model.head)
    if head.get("round_anchors"):
        notes.append("anchors are those of 1.x, and boxes include their last pixel")
    elif head.get("type") in ("retina", "rpn"):
        notes.append(
            f"anchors and boxes are those of later versions, as in {name}, and boxes may be a pixel off: a config of "
            "1.x, or one with LegacyAnchorGenerator, has those of the checkpoint's version"
        )
    return notes


def _read_mmdetection_config(
    path: str | None, meta: Mapping[str, Any], file: str | Path, required: bool
) -> tuple[Tree, list[str]]:
    """Read MMDetection's config from a file, else from the checkpoint's meta; return it, empty if absent, and notes."""
    texts = [text for key in ("cfg", "config") if isinstance(text := meta.get(key), str) and "model" in text]
    if path is None and not texts:
        return {}, []
    try:
        source = read_config(path) if path else parse_config(texts[0], "the checkpoint's own config")
        if not source.tree and not source.missing:
            raise InputError(
                f"{path or file}: the config is empty; use the one that the checkpoint was trained with, or leave "
                "--config out"
            )
        model = source.tree.get("model")
        parts = [model.get(key) for key in ("backbone", "neck")] if isinstance(model, Mapping) else [None]
        if source.missing and not all(isinstance(part, (Mapping, list)) for part in parts):
            raise InputError(
                f"{path or file}: the _base_ {source.missing[0]} is missing, and the model is incomplete without it: "
                "copy it to the config's folder, or use the complete config"
            )
    except InputError as error:
        if required:
            raise
        return {}, [f"the checkpoint's own config is ignored: {error}"]
    notes = [f"missing base configs were left out: {', '.join(source.missing)}"] if source.missing else []
    return source.tree, notes


def count_classes(state: Mapping[str, Tensor], options: Config) -> int:
    """Count the classes K by the rows of the classification layer.

    Raises:
        InputError: The weights have no classification layer of this head.
    """
    kind = as_mapping(options.model.head).get("type")
    if kind == "rpn" and not options.model.roi:
        return 1
    deltas = {"yolof": "bbox_head.bbox_pred.weight"}.get(str(kind), "bbox_head.retina_reg.weight")
    has_anchors = kind in ("retina", "free_anchor", "yolof") and deltas in state
    rows_per_class = max(axis_size(state, deltas) // 4, 1) if has_anchors else 1
    names = _CLASS_LAYERS.get(str(kind), ())
    layer = next((name for name in names if name in state), None)
    count = 0 if layer is None else axis_size(state, layer) // rows_per_class - (kind == "rpn")
    if count < 1:
        raise InputError(
            f"the weights are not of a detector with model.head={kind}: they have no "
            f"{' or '.join(names) or 'such head'}"
        )
    return count


def convert_mmdetection_weights(state: Weights, options: Config, count: int, file: Any) -> Weights:
    """Rename MMDetection's weights to those of a config's detector; every key must match.

    Args:
        state: State dict with the names and rows of 3.x.
        options: Config of the detector.
        count: Number of classes.
        file: Name of the file in messages.

    Raises:
        InputError: A weight has no counterpart, is missing, or has another shape.
    """
    with uninitialized():
        detector = build_detector(options, count)
    levels = sum(stride >= 2**options.model.pyramid.finest for stride in detector.backbone.levels.strides)
    rules = build_rules(options.model, levels)
    renamed: Weights = {}
    sources: dict[str, str] = {}
    for key, value in join_weights(reorder_weights(state)).items():
        if key.startswith("bbox_head.loss_"):  # statistics of a loss (GHM), state of its training only
            continue
        name = rename_weight(key, rules)
        if name in renamed:
            raise InputError(
                f"{file} holds {sources[name]} and {key}, which are one weight here ({name}): leave one of them out"
            )
        renamed[name], sources[name] = value, key
    wanted = detector.state_dict()
    unsaved = tuple(key for key in wanted if key.startswith("stages.") and key.rpartition(".")[2] in DYNAMIC)
    unsaved += ("head.level_counts",)
    return match_weights(renamed, sources, wanted, file, unsaved)


def _convert_torchvision(state: Weights, file: str | Path, overrides: Sequence[str]) -> ConvertedCheckpoint:
    converted = torchvision.convert_torchvision_weights(state, Path(file).name)
    options = configs.parse(configs.apply_overrides(converted.tree, overrides))
    with uninitialized():
        wanted = build_detector(options, len(converted.names)).state_dict()
    return ConvertedCheckpoint(
        options,
        match_weights(converted.weights, converted.sources, wanted, file),
        converted.names,
        converted.category_ids,
        converted.notes,
    )
