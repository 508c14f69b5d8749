"""Another project's checkpoint as a config and weights of this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fusedet import config as configs
from fusedet.config import Config
from fusedet.detectors import from_config
from fusedet.errors import InputError
from fusedet.interop import pyconfig, reading, rows, torchvision
from fusedet.interop.architecture import Architecture, is_legacy, translate
from fusedet.interop.guess import guess
from fusedet.interop.keys import as_rgb, joined, matched, renamed, rules
from fusedet.interop.names import classes

Tree = dict[str, Any]
Weights = dict[str, Tensor]
DYNAMIC = ("threshold", "beta", "overlaps", "shifts", "steps")  # what a stage with a memory knows, and MMDetection does not save


@dataclass(frozen=True)
class Converted:
    """A detector as a checkpoint here has it, and notes for the user: what was assumed, differs or was left out."""

    config: Config
    weights: Weights
    names: list[str]
    category_ids: list[int]
    notes: list[str]


def convert(file: str | Path, config: str | None = None, overrides: Sequence[str] = ()) -> Converted:
    """The checkpoint of MMDetection (1.x, 2.x, 3.x) or torchvision in a file.

    config: MMDetection's config, a .py file; or the name or YAML file of a config here. Where none is given, the checkpoint's own copy of
    MMDetection's is taken, else what names and shapes tell. overrides: "key=value" texts of this project's config on top.
    Raises InputError for a file that cannot be read, holds code, is of no detector here, or does not match in every key.
    """
    content = reading.read(file)
    state = reading.weights(content, file)
    meta = content.get("meta") if isinstance(content.get("meta"), Mapping) else {}
    if torchvision.knows(state):
        if config is not None:
            raise InputError(f"--config={config}: {file} is of torchvision, its weights tell all; leave --config out")
        return _of_torchvision(state, file, overrides)
    own = config is not None and not config.endswith(".py")
    source, notes = ({}, []) if own else _config(config, meta, file)
    legacy = is_legacy(source, state, str(meta.get("mmdet_version", "")))  # type: ignore[union-attr]
    state = rows.modern(state) if legacy else state
    if own:
        options = configs.load(str(config), [*overrides, "model.backbone.pretrained=false", "model.backbone.weights=null"])
        translated = Architecture({}, False, notes)
    else:
        if not source:
            source, notes = guess(state, legacy)
        translated = translate(source, state, legacy)
        options = configs.parse(configs.overridden(translated.tree, overrides))
    notes += translated.notes
    if legacy:
        notes.append(
            "the checkpoint is of MMDetection's 1.x line: background rows come last or are dropped, boxes include their last pixel"
        )
        if own:
            notes.append(f"anchors and pooling are those of {config}, which are the 1.x line's only where it says so")
    count = class_count(state, options)
    weights = _mmdetection(as_rgb(state) if translated.bgr else state, options, count, file)
    names, category_ids = classes(meta, count, notes)
    return Converted(options, weights, names, category_ids, notes)


def _config(path: str | None, meta: Any, file: str | Path) -> tuple[Tree, list[str]]:
    """MMDetection's config of a file, else of the checkpoint's meta, else nothing; and what to say of it."""
    text = next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str) and "model" in meta[key]), None)
    if path is None and text is None:
        return {}, []
    read = pyconfig.read(path) if path is not None else pyconfig.parse(str(text), "the checkpoint's own config")
    if not read.missing:
        return read.tree, []
    model = read.tree.get("model")
    if not isinstance(model, Mapping) or not all(isinstance(model.get(key), (Mapping, list)) for key in ("backbone", "neck")):
        raise InputError(
            f"{path or file}: the _base_ {read.missing[0]} is not there, and without it there is no whole model: copy it beside it, or "
            "give the whole config"
        )
    return read.tree, [f"bases that are not there were left out: {', '.join(read.missing)}"]


def class_count(state: Mapping[str, Tensor], options: Config) -> int:
    """K, from the rows of what tells classes apart."""
    head = options.model.head if isinstance(options.model.head, Mapping) else {"type": options.model.head}
    anchors = len(state["bbox_head.retina_reg.weight"]) // 4 if "bbox_head.retina_reg.weight" in state else 1
    places = {
        "retina": (("bbox_head.retina_cls.weight",), anchors, 0),
        "fcos": (("bbox_head.conv_cls.weight", "bbox_head.fcos_cls.weight"), 1, 0),
        "vfnet": (("bbox_head.vfnet_cls.weight",), 1, 0),
        "reppoints": (("bbox_head.reppoints_cls_out.weight",), 1, 0),
        "rpn": (("roi_head.bbox_head.fc_cls.weight", "roi_head.bbox_head.0.fc_cls.weight"), 1, 1),
    }
    names, share, background = places.get(str(head.get("type")), ((), 1, 0))
    found = next((state[name] for name in names if name in state), None)
    count = 0 if found is None else len(found) // share - background
    if count < 1:
        raise InputError(
            f"the weights are not of a detector with model.head={head.get('type')}: they have no {' or '.join(names) or 'such head'}"
        )
    return count


def _mmdetection(state: Weights, options: Config, count: int, file: Any) -> Weights:
    detector = from_config(options, count)
    levels = sum(stride >= 2**options.model.pyramid.finest for stride in detector.backbone.levels.strides)
    table = rules(options.model, levels)
    found: Weights = {}
    sources: dict[str, str] = {}
    for key, value in joined(state).items():
        name = renamed(key, table)
        if name in found:
            raise InputError(f"{file} holds {sources[name]} and {key}, which are one weight here ({name}): leave one of them out")
        found[name], sources[name] = value, key
    own = detector.state_dict()
    fresh = tuple(key for key in own if key.startswith("stages.") and key.rpartition(".")[2] in DYNAMIC)
    return matched(found, sources, own, file, fresh)


def _of_torchvision(state: Weights, file: str | Path, overrides: Sequence[str]) -> Converted:
    read = torchvision.translate(state, Path(file).name)
    options = configs.parse(configs.overridden(read.tree, overrides))
    own = from_config(options, len(read.names)).state_dict()
    return Converted(options, matched(read.weights, read.sources, own, file), read.names, read.category_ids, read.notes)
