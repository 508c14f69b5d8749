"""Training: from a config to a run directory with weights, metrics and plots."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

import torch
from lightning_fabric import Fabric
from torch import nn

from fusedet import evaluation, visualization
from fusedet.api.distributed import get_ranks, process_group, run_on_first
from fusedet.api.load_model import class_names, weights_file, with_weights
from fusedet.api.results import RunResult
from fusedet.api.run_dir import (
    create_run_dir,
    describe_environment,
    read_fingerprints,
    record_replaced_images,
    remove_files,
    write_json,
)
from fusedet.api.settings import Settings, Source, training_config
from fusedet.api.validate import (
    FIGURES,
    MASK_FIGURES,
    Evaluation,
    build_val_loader,
    check_masks,
    compute_mask_metrics,
    detect,
    evaluate_detector,
    has_mask_branch,
    shorten_list,
    write_report,
)
from fusedet.atomic_io import write_atomically
from fusedet.config import Config
from fusedet.data.bad_images import BadImageLog
from fusedet.data.dataset import DetectionDataset
from fusedet.data.loader import build_train_loader
from fusedet.data.readers.auto import read_dataset
from fusedet.data.transforms import TrainTransform
from fusedet.data.validation import compare_class_names, require_usable_images
from fusedet.engine import checkpoint, logging, optim, rng, trainer
from fusedet.engine.determinism import deterministic
from fusedet.engine.train_state import TABLES
from fusedet.errors import DivergenceError, InputError, plural, unknown
from fusedet.models.backbones import TimmBackbone
from fusedet.models.detectors import build_detector, build_meta_detector, disable_pretrained


def train(
    config: Source | None,
    *overrides: str,
    resume: bool = False,
    trust: bool = False,
    say: Callable[[str], None] = print,
    quiet: bool = False,
    **settings: Unpack[Settings],
) -> RunResult:
    """Train a detector and evaluate its best weights.

    >>> fusedet.train("retinanet_r50", data="data/coco", train={"epochs": 24}, out="runs/a")  # doctest: +SKIP

    Args:
        config: A config's name, a YAML file, a run directory or a `Config`.
        overrides: "key=value" texts. `out` is the directory of the run, by default runs/NAME, runs/NAME-2, ...
        resume: Whether the run in `out`, or the given run directory, is continued. A run that was killed before its
            first checkpoint starts from the beginning.
        trust: Whether a run directory's config may name classes of other packages, whose code then runs.
        say: Takes lines of progress.
        quiet: Whether the progress bar is left out.
        settings: The same settings as `overrides`, by keyword.

    Returns:
        Metrics of the best weights and files. In other processes than the first one both are empty.

    Raises:
        InputError: Data, names or settings are wrong; nothing is written then.
        DivergenceError: A loss, a gradient or a weight is not finite.
        StorageError: A file cannot be written.
        Interrupted: Ctrl-C or SIGTERM; the run can be resumed.
    """
    options = training_config(config, overrides, settings, resume, trust)
    with deterministic(options.train.deterministic):
        out, is_begun = _check_config(options, resume)
        with process_group(options) as fabric:
            is_first = fabric.is_global_zero
            dataset, evaluated = _fit(fabric, options, out, resume, is_begun, say if is_first else _say_nothing, quiet)
        if not is_first:
            return RunResult(out, {}, {})
        files = write_report(dataset, evaluated.results, evaluated.metrics, out, title=out.name)
        files["training curves"] = out / "training.png"
        visualization.plot_training(out / "metrics.csv", files["training curves"])
        return RunResult(out, evaluated.metrics, files, f"{out}: best weights on {options.data.val}")


def _check_config(config: Config, resume: bool) -> tuple[Path, bool]:
    """Return the run directory, and whether it has a checkpoint to resume."""
    if config.data.path is None:
        raise InputError("no data: add data=PATH, a folder or file in COCO, VOC or YOLO form")
    if config.out is None:
        raise InputError("no output directory: add out=FOLDER")
    out = Path(config.out)
    is_begun = resume and (out / "last.ckpt").is_file()
    if resume and not is_begun and not (out / "config.yaml").is_file():
        raise InputError(f"out={out} holds no run to resume: give the run's directory, fusedet train RUN --resume")
    check_monitor(config)
    build_meta_detector(config)  # a model that cannot be built is reported before the data are read
    return out, is_begun


def _fit(
    fabric: Fabric, config: Config, out: Path, resume: bool, is_begun: bool, say: Callable[[str], None], quiet: bool
) -> tuple[DetectionDataset, Evaluation]:
    """Train in each process; return the validation split and the evaluation of the best weights on it."""
    settings = config.train
    loggers = logging.make_loggers(settings.loggers, out)
    data, val = open_data(config, say)
    if is_begun:
        _check_fingerprints(out, data, val, say)
    elif resume:
        say(f"{out} was stopped before its first checkpoint: it begins again")
    rng.seed(settings.seed)
    detector = make_detector(config, val, say, is_begun)
    masks = learns_masks(config, detector, data, val)
    bad_image_log = None
    if settings.on_bad_image == "skip":
        bad_image_log = BadImageLog(out, len(data), settings.max_bad_images, fabric.global_rank, fabric.world_size)
    loader = build_train_loader(
        data,
        train_transform(config),
        batch=settings.batch // settings.accumulate,
        seed=settings.seed,
        workers=config.data.workers,
        rank=fabric.global_rank,
        world=fabric.world_size,
        masks=masks,
        pin=fabric.device.type == "cuda",
        bad_image_log=bad_image_log,
    )
    lr = _scaled_lr(config, say)
    if config.data.check:
        max_bad = config.train.max_bad_images if config.train.on_bad_image == "skip" else 0.0
        run_on_first(fabric, lambda: require_usable_images(data, val, max_bad_share=max_bad, warn=say))
    if not resume:
        run_on_first(fabric, lambda: create_run_dir(out))
        say(f"results: {out}")
    val_share = build_val_loader(config, val, fabric.global_rank, fabric.world_size)

    def validate(module: nn.Module, epoch: int) -> dict[str, float]:
        results = detect(module, val_share, val, fabric.device)
        figures = evaluation.evaluate_coco(val, results, per_class=False)
        if masks:
            figures |= compute_mask_metrics(val, results)
        return {name: figures[name] for name in FIGURES + MASK_FIGURES if name in figures}

    meta = {
        "config": config.to_yaml(),
        "names": list(data.names),
        "category_ids": list(data.category_ids),
        "format": "fusedet",
    }
    description = out / "config.yaml"
    earlier = description.read_bytes() if is_begun and fabric.is_global_zero and description.is_file() else None
    try:
        run = trainer.setup(
            fabric,
            detector,
            loader,
            settings,
            lr=lr,
            out=out,
            validate=validate,
            resume=is_begun,
            loggers=loggers,
            meta=meta,
            quiet=quiet,
            say=say,
        )
        if fabric.is_global_zero:
            if not run.is_finished:  # else the config is of a training that never took place
                write_atomically(description, config.to_yaml().encode())
            _write_description(config, out, fabric, lr, data, val, is_begun)
        done = trainer.fit(run)
    except DivergenceError:  # metrics.csv shows how the run came to that
        if earlier is not None:  # the next --resume must not repeat the settings that diverged
            write_atomically(description, earlier)
        raise
    except InputError as error:
        if get_ranks()[
            2
        ]:  # the command line lets the first process of a machine speak, which may not have met this image
            print(f"error: process {fabric.global_rank}: {error}", file=sys.stderr, flush=True)
        if fabric.is_global_zero and not is_begun and not (out / "last.ckpt").exists():
            remove_files(out, "config.yaml", "run.json", "skipped.csv", *TABLES)
        raise
    if bad_image_log:
        bad_image_log.begin(done["epoch"], 0)  # else the earlier epochs would be unknown where none was left to train
        record_replaced_images(bad_image_log, out, say)
    fabric.barrier()
    best = with_weights(config, len(val.names), weights_file(out)).to(fabric.device).eval()
    return val, evaluate_detector(best, config, val, fabric.device, rank=fabric.global_rank, world=fabric.world_size)


def _scaled_lr(config: Config, say: Callable[[str], None]) -> float:
    """Return the learning rate for the total batch, and say it where it differs from the config's."""
    lr, batch, base_batch = config.train.lr, config.train.batch, config.train.base_batch
    if not base_batch:
        return lr
    scaled = optim.scaled_lr(lr, batch, base_batch)
    if scaled != lr:
        say(f"learning rate {lr:g} is for a batch of {base_batch}: {scaled:g} for {batch}")
    return scaled


def _write_description(
    config: Config,
    out: Path,
    fabric: Fabric,
    lr: float,
    data: DetectionDataset,
    val: DetectionDataset,
    is_begun: bool,
) -> None:
    """Write run.json, for a resumed run only if it is missing."""
    if not is_begun or not (out / "run.json").is_file():
        prints = {"train": data.fingerprint(), "val": val.fingerprint()}
        more = {"data": prints, "lr": lr, "seed": config.train.seed}
        write_json(out / "run.json", describe_environment(str(fabric.device), fabric.world_size) | more)


def _say_nothing(text: str) -> None:
    """Take the lines of all processes but the first."""


def _check_fingerprints(out: Path, data: DetectionDataset, val: DetectionDataset, say: Callable[[str], None]) -> None:
    """Raise InputError where a run was begun on other data, or its run.json is damaged."""
    known = read_fingerprints(out)
    if known is None:
        return say(
            f"warning: {out / 'run.json'} is missing, so {out} may have been begun on other data; it is written again"
        )
    for name, dataset in (("train", data), ("val", val)):
        if known.get(name) != dataset.fingerprint():
            raise InputError(
                f"out={out} cannot be resumed: its {name} images or boxes were not those of {dataset.source} now"
            )


def open_data(config: Config, say: Callable[[str], None]) -> tuple[DetectionDataset, DetectionDataset]:
    """Read the training and validation splits, compare them, and say what was wrong with their annotations."""
    assert config.data.path is not None
    data, val = (
        read_dataset(config.data.path, split, images=config.data.images)
        for split in (config.data.train, config.data.val)
    )
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
    if config.train.monitor not in FIGURES + MASK_FIGURES:
        raise unknown("value of train.monitor:", config.train.monitor, FIGURES + MASK_FIGURES)


def learns_masks(config: Config, detector: nn.Module, data: DetectionDataset, val: DetectionDataset) -> bool:
    """Return whether the detector learns masks.

    Raises:
        InputError: It does, and the data have none; or it does not, and train.monitor is a metric of masks.
    """
    masks = has_mask_branch(detector)
    if masks:
        check_masks(data)
        check_masks(val)
    elif config.train.monitor in MASK_FIGURES:
        raise InputError(
            f"train.monitor={config.train.monitor}: this detector has no masks, monitor one of {', '.join(FIGURES)}"
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
