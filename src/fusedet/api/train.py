"""Training: from a config to a run's folder with weights, figures and images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import torch
from lightning_fabric import Fabric
from torch import nn

from fusedet import evaluation, visualization
from fusedet.api.distributed import process_group, silent, together
from fusedet.api.load_model import class_names, weights_file, with_weights
from fusedet.api.results import RunResult
from fusedet.api.run_dir import about, data_prints, fresh, record_replaced_images, withdraw, write_json
from fusedet.api.settings import Settings, Source, training_config
from fusedet.api.validate import (
    FIGURES,
    MASK_FIGURES,
    check_masks,
    detect,
    evaluate_detector,
    has_mask_branch,
    mask_figures,
    report,
    some,
    val_loader,
)
from fusedet.atomic_io import replace
from fusedet.config import Config, interval
from fusedet.data.bad_images import BadImageLog
from fusedet.data.dataset import DetectionDataset
from fusedet.data.loader import build_train_loader
from fusedet.data.readers.auto import read_dataset
from fusedet.data.transforms import TrainTransform
from fusedet.data.validation import compare_class_names, require_usable_images
from fusedet.engine import checkpoint, logging, optim, rng, trainer
from fusedet.engine.determinism import deterministic
from fusedet.engine.peers import Peers
from fusedet.engine.train_state import TABLES
from fusedet.errors import InputError, plural, unknown
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
        return _train(options, resume, say, quiet)


def _train(config: Config, resume: bool, say: Callable[[str], None], quiet: bool) -> RunResult:
    if config.data.path is None:
        raise InputError("no data: add data=PATH, a folder or file in COCO, VOC or YOLO form")
    if config.out is None:
        raise InputError("no output folder: add out=FOLDER")
    out = Path(config.out)
    begun = resume and (out / "last.ckpt").is_file()
    if resume and not begun and not (out / "config.yaml").is_file():
        raise InputError(f"out={out} holds no run to resume: give the run's folder, fusedet train RUN --resume")
    check_monitor(config)
    build_meta_detector(config)  # what cannot be built is told before the data are read
    with process_group(config) as fabric, Peers(fabric, out / "last.ckpt", say):
        return _fit(fabric, config, out, resume, begun, say if fabric.is_global_zero else silent, quiet)


def _fit(
    fabric: Fabric, config: Config, out: Path, resume: bool, begun: bool, say: Callable[[str], None], quiet: bool
) -> RunResult:
    """What each process does. begun: with `resume`, there is a checkpoint to go on from."""
    loggers = logging.loggers(config.train.loggers, out)
    data, val = open_data(config, say)
    if begun:
        _check_prints(out, data, val, say)
    elif resume:
        say(f"{out} was stopped before its first checkpoint: it begins anew")
    rng.seed(config.train.seed)
    detector = make_detector(config, val, say, begun)
    masks = learns_masks(config, detector, data, val)
    batch, rate = config.train.batch // config.train.accumulate, config.train.lr
    ledger = None
    if config.train.on_bad_image == "skip":
        ledger = BadImageLog(out, len(data), config.train.max_bad_images, fabric.global_rank, fabric.world_size)
    loader = build_train_loader(
        data,
        train_transform(config),
        batch=batch,
        seed=config.train.seed,
        workers=config.data.workers,
        rank=fabric.global_rank,
        world=fabric.world_size,
        masks=masks,
        pin=fabric.device.type == "cuda",
        bad_image_log=ledger,
    )
    if config.train.base_batch:
        rate = optim.scaled_lr(rate, config.train.batch, config.train.base_batch)
        if rate != config.train.lr:
            say(
                f"learning rate {config.train.lr:g} is for a batch of {config.train.base_batch}: {rate:g} for {config.train.batch}"
            )
    recipe = make_recipe(config, rate)
    if config.data.check:
        max_bad = config.train.max_bad_images if config.train.on_bad_image == "skip" else 0.0
        together(fabric, lambda: require_usable_images(data, val, max_bad_share=max_bad, warn=say))
    if not resume:
        together(fabric, lambda: fresh(out))
        say(f"results: {out}")
    prints = {"train": data.fingerprint(), "val": val.fingerprint()}
    known = about(str(fabric.device), fabric.world_size) | {"data": prints, "lr": rate, "seed": config.train.seed}
    if fabric.is_global_zero and not begun:
        replace(out / "config.yaml", config.to_yaml().encode())
        write_json(out / "run.json", known)
    share = val_loader(config, val, fabric.global_rank, fabric.world_size)

    def validate(module: nn.Module, epoch: int) -> dict[str, float]:
        results = detect(module, share, val, fabric.device)
        figures = evaluation.evaluate_coco(val, results, per_class=False)
        if masks:
            figures |= mask_figures(val, results)
        return {name: figures[name] for name in FIGURES + MASK_FIGURES if name in figures}

    meta = {
        "config": config.to_yaml(),
        "names": list(data.names),
        "category_ids": list(data.category_ids),
        "format": "fusedet",
    }
    try:
        options: dict[str, Any] = {
            "validate": validate,
            "resume": begun,
            "loggers": loggers,
            "meta": meta,
            "quiet": quiet,
            "say": say,
        }
        done = trainer.fit(
            fabric, detector, loader, recipe, out=out, saved=lambda: _note(config, fabric, out, known), **options
        )
    except trainer.NonFinite:
        raise  # its metrics.csv shows how it came to that
    except InputError:
        if fabric.is_global_zero and not begun and not (out / "last.ckpt").exists():
            withdraw(out, "config.yaml", "run.json", "skipped.csv", *TABLES)
        raise
    _note(config, fabric, out, known)
    if ledger:
        ledger.begin(done["epoch"], 0)  # or nothing would be known of the epochs before, where none was left to train
        record_replaced_images(ledger, out, say)
    fabric.barrier()
    return finish(config, fabric, out, val)


def _note(config: Config, fabric: Fabric, out: Path, known: dict[str, Any]) -> None:
    """Write the config as it is now, because a resumed run may have got another one (train.epochs=24), and run.json where it is gone."""
    if fabric.is_global_zero:
        replace(out / "config.yaml", config.to_yaml().encode())
        if not (out / "run.json").is_file():
            write_json(out / "run.json", known)


def _check_prints(out: Path, data: DetectionDataset, val: DetectionDataset, say: Callable[[str], None]) -> None:
    """Raises InputError where a run was begun on other data, or what its run.json says is damaged."""
    known = data_prints(out)
    if known is None:
        return say(
            f"warning: {out / 'run.json'} is gone, so nothing tells whether {out} was begun on these data; it is written anew"
        )
    for name, dataset in (("train", data), ("val", val)):
        if known.get(name) != dataset.fingerprint():
            raise InputError(
                f"out={out} cannot be resumed: its {name} images or boxes were not those of {dataset.source} now"
            )


def finish(config: Config, fabric: Fabric, out: Path, val: DetectionDataset) -> RunResult:
    """Score the best weights once more and draw what there is to see."""
    best = with_weights(config, len(val.names), weights_file(out)).to(fabric.device).eval()
    evaluated = evaluate_detector(best, config, val, fabric.device, rank=fabric.global_rank, world=fabric.world_size)
    if fabric.global_rank:
        return RunResult(out, {}, {})
    files = report(val, evaluated.results, evaluated.metrics, out, title=out.name)
    files["training curves"] = out / "training.png"
    visualization.plot_training(out / "metrics.csv", files["training curves"])
    return RunResult(out, evaluated.metrics, files, f"{out}: best weights on {config.data.val}")


def open_data(config: Config, say: Callable[[str], None]) -> tuple[DetectionDataset, DetectionDataset]:
    """The training and validation splits, checked against each other; says what was wrong with their annotations."""
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
    """The config's detector for the data's classes, with train.weights loaded where it names some; bare where a run is resumed."""
    if resume:  # its weights are in the checkpoint
        return build_detector(disable_pretrained(config), len(dataset.names))
    detector = build_detector(config, len(dataset.names))
    body: Any = detector.backbone
    if config.train.weights:
        file = weights_file(config.train.weights)
        state, meta = checkpoint.load_weights(file)
        known = class_names(meta, file) if "names" in meta else list(dataset.names)
        if known != list(dataset.names):
            own = detector.state_dict()
            anew = {key: own[key] for key in class_tensors(config)}
            state = {key: value for key, value in state.items() if key not in anew} | anew
            say(
                f"{file} knows the {len(known)} classes {some(known)}, the data has the {len(dataset.names)} classes "
                f"{some(dataset.names)}: what depends on classes starts anew ({', '.join(anew)})"
            )
        checkpoint.load_into(detector, state, file)
    elif not body.has_weights and (body.frozen or body.norm_eval):
        say(
            "warning: the backbone starts from random weights, but parts of it are kept as they are: add "
            "model.backbone.frozen_stages=-1 model.backbone.norm_eval=false to train all of it"
        )
    return detector


def class_tensors(config: Config) -> list[str]:
    """The names of the weights whose shapes depend on how many classes there are."""
    one, two = (build_meta_detector(config, count).state_dict() for count in (1, 2))
    return [key for key in one if one[key].shape != two[key].shape]


def check_monitor(config: Config) -> None:
    """Raises InputError where train.monitor is no figure of a validation."""
    if config.train.monitor not in FIGURES + MASK_FIGURES:
        raise unknown("value of train.monitor:", config.train.monitor, FIGURES + MASK_FIGURES)


def learns_masks(config: Config, detector: nn.Module, data: DetectionDataset, val: DetectionDataset) -> bool:
    """Whether the detector learns masks. Raises InputError where the data have none then, and where train.monitor asks for them else."""
    masks = has_mask_branch(detector)
    if masks:
        check_masks(data)
        check_masks(val)
    elif config.train.monitor in MASK_FIGURES:
        raise InputError(
            f"train.monitor={config.train.monitor}: this detector finds no masks, monitor one of {', '.join(FIGURES)}"
        )
    return masks


def train_transform(config: Config) -> TrainTransform:
    """How the network sees the training images."""
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


def make_recipe(config: Config, rate: float) -> trainer.Recipe:
    """The engine's recipe at a learning rate that is already scaled."""
    t = config.train
    options = optim.Optim(
        name=t.optimizer,
        lr=rate,
        weight_decay=t.weight_decay,
        momentum=t.momentum,
        decay_norm_and_bias=t.decay_norm_and_bias,
        decay_bias=t.decay_bias,
        bias_lr=t.bias_lr,
        policy=t.policy,
        milestones=t.milestones,
        gamma=t.gamma,
        warmup_steps=t.warmup_steps,
        warmup_ratio=t.warmup_ratio,
    )
    return trainer.Recipe(
        epochs=t.epochs,
        optim=options,
        clip_norm=t.clip_norm,
        accumulate=t.accumulate,
        ema_decay=t.ema,
        validate_every=t.validate_every,
        checkpoint_every=None if t.checkpoint_every is None else interval(t.checkpoint_every, "train.checkpoint_every"),
        monitor=t.monitor,
        patience=t.patience,
        compile=t.compile,
    )
