"""What a training is made of: the splits, the detector and the transform of a config, each checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fusedet.api.load_model import class_names, weights_file
from fusedet.api.validate import BOX_METRICS, MASK_METRICS, check_masks, has_mask_branch, shorten_list
from fusedet.config import Config
from fusedet.data.dataset import DetectionDataset
from fusedet.data.splits import read_split
from fusedet.data.transforms import TrainTransform
from fusedet.data.validation import compare_class_names
from fusedet.engine import checkpoint
from fusedet.errors import InputError, plural, unknown
from fusedet.models.backbones import TimmBackbone
from fusedet.models.detectors import build_detector, build_meta_detector, disable_pretrained


def open_data(config: Config, say: Callable[[str], None]) -> tuple[DetectionDataset, DetectionDataset]:
    """Read the training and validation splits, compare them, and say what was wrong with their annotations."""
    assert config.data.path is not None
    data, val = (read_split(config.data, split) for split in (config.data.train, config.data.val_split))
    if different := compare_class_names(data, val):
        raise InputError(different[0])
    for dataset in (data, val):
        if not len(dataset.labels):
            raise InputError(
                f"{dataset.source} has no objects: a detector can neither learn nor be scored on background alone"
            )
    for split, dataset in (("train", data), ("val", val)):
        counts = (
            plural(len(dataset), "image"),
            plural(len(dataset.labels), "object"),
            plural(len(dataset.names), "class"),
        )
        say(f"{split}: {', '.join(counts)} from {dataset.source}")
        for text, count in dataset.problems.items():
            say(f"  {text}: {count}")
    present = torch.bincount(data.labels, minlength=len(data.names))
    if absent := [name for name, n in zip(data.names, present.tolist()) if not n]:
        say(f"  no training object of {', '.join(absent)}: {'it' if len(absent) == 1 else 'they'} will not be found")
    return data, val


def make_detector(config: Config, dataset: DetectionDataset, say: Callable[[str], None], resume: bool) -> nn.Module:
    """Build the config's detector for the data's classes, with train.weights; without weights for a resumed run."""
    if resume:  # its weights are in the checkpoint
        return build_detector(disable_pretrained(config), len(dataset.names))
    detector = build_detector(config, len(dataset.names))
    backbone = detector.backbone
    if config.train.weights:
        file = weights_file(config.train.weights)
        state, meta = checkpoint.load_weights(file)
        names = class_names(meta, file) if "names" in meta else list(dataset.names)
        if names != list(dataset.names):
            own = detector.state_dict()
            new = {key: own[key] for key in class_tensors(config)}
            state = {key: value for key, value in state.items() if key not in new} | new
            classes = [f"{len(of)} classes {shorten_list(of)}" for of in (names, dataset.names)]
            say(
                f"{file} has the {classes[0]}, the data has the {classes[1]}: "
                f"the weights that depend on classes are initialized again ({', '.join(new)})"
            )
        checkpoint.load_into(detector, state, file)
    elif isinstance(backbone, TimmBackbone) and not backbone.has_weights and (backbone.frozen or backbone.norm_eval):
        say(
            "warning: the backbone starts from random weights, but parts of it are kept as they are: add "
            "model.backbone.frozen_stages=-1 model.backbone.norm_eval=false to train all of it"
        )
    return detector


def class_tensors(config: Config) -> list[str]:
    """Return the names of the weights whose shapes depend on the number of classes."""
    of_one, of_two = (build_meta_detector(config, count).state_dict() for count in (1, 2))
    return [key for key in of_one if of_one[key].shape != of_two[key].shape]


def check_monitor(config: Config) -> None:
    """Raise InputError where train.monitor is not a metric of a validation."""
    if config.train.monitor not in BOX_METRICS + MASK_METRICS:
        raise unknown("value of train.monitor:", config.train.monitor, BOX_METRICS + MASK_METRICS)


def learns_masks(config: Config, detector: nn.Module, data: DetectionDataset, val: DetectionDataset) -> bool:
    """Return whether the detector learns masks.

    Raises:
        InputError: It does, and the data have none; or it does not, and train.monitor is a metric of masks.
    """
    masks = has_mask_branch(detector)
    if masks:
        check_masks(data)
        check_masks(val)
    elif config.train.monitor in MASK_METRICS:
        raise InputError(
            f"train.monitor={config.train.monitor}: this detector has no masks, monitor one of {', '.join(BOX_METRICS)}"
        )
    return masks


def train_transform(config: Config) -> TrainTransform:
    """Return the transform of the training images."""
    data = config.data
    sizes = data.multi_scale or data.size[:1]
    return TrainTransform(
        sizes,
        data.size[1],
        resize="range" if data.multi_scale else "choice",
        flip=data.flip,
        photometric=data.photometric,
        antialias=data.antialias,
    )
