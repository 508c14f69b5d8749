"""What a training is made of: the splits, the detector and the transform of a config, each checked."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from fusedet.api.detection import check_tile_size, get_strides
from fusedet.api.detector_evaluation import BOX_METRICS, MASK_METRICS, check_masks, has_mask_branch
from fusedet.api.load_model import parse_class_names, weights_file
from fusedet.api.settings import is_run_dir, resolve_config
from fusedet.api.starting_weights import adapt_class_rows, describe_matches, match_class_names
from fusedet.config import Config
from fusedet.data.augmentation import AugmentedTransform
from fusedet.data.class_names import compare_class_names, count_per_label, label_classes
from fusedet.data.dataset import DetectionDataset
from fusedet.data.split_checks import (
    NO_ANNOTATIONS,
    check_box_convention,
    check_class_names,
    check_targets,
    describe_crowded_images,
)
from fusedet.data.splits import read_split
from fusedet.data.tiling import tile_dataset
from fusedet.data.transforms import TrainTransform
from fusedet.engine import checkpoint
from fusedet.errors import InputError, format_count, make_unknown_error, shorten_list
from fusedet.models.backbones import TimmBackbone
from fusedet.models.detectors import (
    DetectorModule,
    build_detector,
    build_meta_detector,
    disable_pretrained,
    selection_options,
)


def open_data(config: Config, say: Callable[[str], None]) -> tuple[DetectionDataset, DetectionDataset]:
    """Read the training and validation splits, compare them, and say what was wrong with their annotations.

    Raises:
        InputError: A split cannot be read, the two have different classes, or a check finds an error, such as a split
            without a usable target.
    """
    data, val = (read_split(config.data, split) for split in (config.data.train, config.data.val_split))
    if different := compare_class_names(data, val):
        raise InputError(different[0])
    for split, dataset in (("train", data), ("val", val)):
        findings = check_targets(dataset, for_training=split == "train")
        findings += [*check_box_convention(dataset), *check_class_names(dataset)]
        if error := next((finding for finding in findings if finding.severity == "error"), None):
            raise InputError(error.message)
        if crowded := describe_crowded_images(dataset, config.test.max_det):
            findings.append(crowded)
        background = int((dataset.offsets.diff() == 0).sum())
        counts = (
            f"{format_count(len(dataset), 'image')} ({background} without annotations)",
            format_count(len(dataset.labels), "annotation"),
            format_count(len(dataset.names), "class"),
        )
        say(f"{split}: {', '.join(counts)} from {dataset.source}")
        for text, count in dataset.problems.items():
            say(f"  {text}: {count}{f', first {dataset.examples[text]}' if text in dataset.examples else ''}")
        for finding in findings:
            if finding.kind != NO_ANNOTATIONS:  # said below, of the training split only
                say(f"  warning: {finding.message}")
    if absent := [name for name, n in zip(label_classes(data), count_per_label(data)) if not n]:
        say(
            f"  no training annotation of {', '.join(absent)}: {'it' if len(absent) == 1 else 'they'} will not be "
            "detected"
        )
    return data, val


def make_detector(
    config: Config, dataset: DetectionDataset, say: Callable[[str], None], resume: bool
) -> DetectorModule:
    """Build the config's detector for the data's classes, with train.weights; without weights for a resumed run.

    Of train.weights with other classes, the rows of classes with equal names are kept.

    Args:
        config: Of the training.
        dataset: The training split; its names are the classes.
        say: Takes a sentence about weights that do not fit the classes, or about a frozen backbone without weights.
        resume: Whether a checkpoint will bring the weights.

    Raises:
        InputError: train.weights cannot be read or do not fit the model, or train.checkpoint_backbone is set for a
            backbone that is not timm's.
    """
    overwritten = resume or config.train.weights is not None
    detector = build_detector(disable_pretrained(config) if overwritten else config, len(dataset.names))
    detector.selection = selection_options(config.test, dataset.names)
    if config.train.checkpoint_backbone:
        if not isinstance(detector.backbone, TimmBackbone):
            name = type(detector.backbone).__name__
            raise InputError(f"train.checkpoint_backbone=true needs a backbone of timm, not {name}: leave it out")
        detector.backbone.checkpoint_stages()
    if resume:  # its weights are in the checkpoint
        return detector
    backbone = detector.backbone
    if config.train.weights:
        file = weights_file(config.train.weights)
        state, meta = checkpoint.load_weights(file)
        names = parse_class_names(meta, file) if "names" in meta else list(dataset.names)
        if names != list(dataset.names):
            matches = match_class_names(dataset.names, names)
            state, keys = adapt_class_rows(state, detector.state_dict(), config, len(names), matches)
            classes = [f"{len(of)} classes {shorten_list(of)}" for of in (names, dataset.names)]
            what = "are initialized again"
            if matches:
                what = f"are taken over by name: {describe_matches(dataset.names, names, matches)}"
            say(
                f"{config.train.weights} has the {classes[0]}, the data has the {classes[1]}: "
                f"the weights that depend on classes {what} ({', '.join(keys)})"
            )
        checkpoint.load_into(detector, state, file)
    elif isinstance(backbone, TimmBackbone) and not backbone.has_weights and (backbone.frozen or backbone.norm_eval):
        say(
            "warning: the backbone starts from random weights, but parts of it are kept as they are: add "
            "model.backbone.frozen_stages=-1 model.backbone.norm_eval=false to train all of it"
        )
    return detector


def resolve_checked_config(source: str | None, overrides: Sequence[str]) -> Config:
    """Return a config as `resolve_config` does, after the checks of a training.

    A run may be somebody else's: its model is not built.

    Raises:
        InputError: As `resolve_config`, or a training would refuse the config.
    """
    config = resolve_config(source, overrides)
    if source is not None and not is_run_dir(source):
        check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raise InputError where a training would refuse a config before it reads the data."""
    check_monitor(config)
    detector = build_meta_detector(config)
    for key, tiles in (("data.tiles.size", config.data.tiles), ("test.tiles.size", config.test.tiles)):
        check_tile_size(key, tiles.size, get_strides(detector))


def check_monitor(config: Config) -> None:
    """Raise InputError where train.monitor is not a metric of a validation."""
    known = (*BOX_METRICS, *MASK_METRICS)
    if (limit := config.test.max_det) > 100:
        known += tuple(f"{kind}{name}@{limit}" for kind in ("", "mask_") for name in ("AP", "AP50", "AP75", "AR"))
    if config.train.monitor not in known:
        raise make_unknown_error("value", config.train.monitor, known, of="train.monitor")


def learns_masks(config: Config, detector: DetectorModule, data: DetectionDataset, val: DetectionDataset) -> bool:
    """Return whether the detector learns masks.

    Args:
        config: Of the training.
        detector: The detector.
        data: The training split.
        val: The validation split.

    Raises:
        InputError: It does, and the data have none; or it does not, and train.monitor is a metric of masks.
    """
    masks = has_mask_branch(detector)
    if masks:
        check_masks(data)
        check_masks(val)
    elif config.train.monitor.startswith("mask_"):
        raise InputError(
            f"train.monitor={config.train.monitor}: this detector has no masks, monitor one of {', '.join(BOX_METRICS)}"
        )
    return masks


def training_images(config: Config, dataset: DetectionDataset) -> DetectionDataset:
    """Return the images that training sees: those of a split, or their tiles."""
    tiles = config.data.tiles
    if tiles.size is None:
        return dataset
    return tile_dataset(dataset, tiles.size, tiles.overlap, config.data.min_visible)


def train_transform(config: Config) -> TrainTransform:
    """Return the transform of the training images."""
    data = config.data
    basic: dict[str, Any] = {
        "sizes": data.multi_scale or data.size[:1],
        "max_size": data.size[1],
        "resize": "range" if data.multi_scale else "choice",
        "flip": data.flip,
        "photometric": data.photometric,
        "antialias": data.antialias,
    }
    names = ("scale_jitter", "crop", "rotate", "shear", "right_angles", "mosaic", "mixup", "copy_paste")
    further = {name: value for name in names if (value := getattr(data, name))}
    if not further:
        return TrainTransform(**basic)
    epochs = math.ceil(data.mosaic_until * config.train.epochs)
    return AugmentedTransform(**basic, **further, min_visible=data.min_visible, mixing_epochs=epochs)
