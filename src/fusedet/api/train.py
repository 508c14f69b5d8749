"""Training: from a config to a run directory with weights, metrics and plots."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Unpack

from lightning_fabric import Fabric

from fusedet import visualization
from fusedet.api.choose_batch import choose_batch
from fusedet.api.detector_evaluation import (
    Evaluation,
    evaluate_detector,
    evaluate_results,
    write_report,
)
from fusedet.api.distributed import process_group, run_on_first
from fusedet.api.epoch_validation import EpochValidation
from fusedet.api.load_model import build_with_weights, weights_file
from fusedet.api.progress import say_nothing
from fusedet.api.results import RunResult
from fusedet.api.run_dir import (
    check_new_dir,
    create_run_dir,
    describe_environment,
    read_fingerprints,
    record_replaced_images,
    remove_files,
    write_json,
)
from fusedet.api.run_report import write_run_page
from fusedet.api.settings import Settings, Source, to_overrides, training_config
from fusedet.api.train_inputs import (
    check_config,
    learns_masks,
    make_detector,
    open_data,
    train_transform,
    training_images,
)
from fusedet.atomic_io import write_atomically
from fusedet.config import Config, apply_overrides, load
from fusedet.data.bad_images import BadImageLog
from fusedet.data.dataset import DetectionDataset
from fusedet.data.loader import TrainLoader, build_train_loader
from fusedet.data.splits import NO_DATA
from fusedet.data.validation import require_usable_images
from fusedet.engine import logging, optim, rng, trainer
from fusedet.engine.determinism import enable_determinism
from fusedet.engine.train_state import TABLES, TrainingRun
from fusedet.errors import DivergenceError, InputError, format_count
from fusedet.interop.published_weights import find_published_weights, is_published_name
from fusedet.process_ranks import get_ranks


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
        config: A config's name, a YAML file, a run directory, a name of published weights, from which the training
            starts, or a `Config`.
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
    if isinstance(config, (str, Path)) and is_published_name(config):
        find_published_weights(config)
        texts = to_overrides(overrides, settings)
        path = apply_overrides({}, texts).get("data", {}).get("path")
        _require_data(path)  # before the weights are fetched
        if not os.path.exists(path):
            raise InputError(f"{path} does not exist: data must be a folder, a COCO json or a YOLO yaml")
    options = training_config(config, overrides, settings, resume, trust)
    with enable_determinism(options.train.deterministic):
        out, is_begun = _check_config(options, resume)
        with process_group(options) as fabric:
            is_first = fabric.is_global_zero
            dataset, evaluated = _fit(fabric, options, out, resume, is_begun, say if is_first else say_nothing, quiet)
        if not is_first:
            return RunResult(out, {}, {})
        files = write_report(dataset, evaluated.results, evaluated.metrics, out, title=out.name)
        files["training curves"] = out / "training.png"
        visualization.plot_training(out / "metrics.csv", files["training curves"])
        weights, scored = "best", options.data.val_split
        if not (out / "best.safetensors").is_file():
            weights = "last"
            say(
                f"warning: train.monitor={options.train.monitor} had no value on {scored}, so that no best weights "
                "were kept: monitor a metric that the split has, such as AP"
            )
        title = f"{out}: {weights} weights on {scored}"
        files |= write_run_page(
            out,
            dataset,
            evaluated,
            title=f"{out.name} on {scored}",
            scored=title,
            device=options.device,
            say=say,
            size_bins=options.test.size_bins or (),
            run=out,
        )
        return RunResult(out, evaluated.metrics, files, title)


def _require_data(path: str | None) -> None:
    if path is None:
        raise InputError(NO_DATA)


def _check_config(config: Config, resume: bool) -> tuple[Path, bool]:
    """Return the run directory, and whether it has a checkpoint to resume."""
    _require_data(config.data.path)
    if config.out is None:
        raise InputError("no output directory: add out=DIR")
    out = Path(config.out)
    is_begun = resume and (out / "last.ckpt").is_file()
    if resume and not is_begun and not (out / "config.yaml").is_file():
        raise InputError(f"out={out} holds no run to resume: give the run's directory, fusedet train RUN --resume")
    if not resume:
        check_new_dir(out)
    check_config(config)
    return out, is_begun


def _fit(
    fabric: Fabric, config: Config, out: Path, resume: bool, is_begun: bool, say: Callable[[str], None], quiet: bool
) -> tuple[DetectionDataset, Evaluation]:
    """Train in each process; return the validation split and the evaluation of the best weights on it."""
    loggers = logging.make_loggers(config.train.loggers, out)
    data, val = open_data(config, say)
    if is_begun:
        _check_fingerprints(out, data, val, say)
    elif resume:
        say(f"{out} was stopped before its first checkpoint: it begins again")
    rng.seed(config.train.seed)
    detector = make_detector(config, val, say, is_begun)
    masks = learns_masks(config, detector, data, val)
    images, transform = training_images(config, data), train_transform(config)
    if config.train.batch == "auto":
        if is_begun:  # a resumed run keeps the number that was chosen when it began
            batch = load(out / "config.yaml").train.batch
            config = config.replace(train=config.train.replace(batch=batch))
        else:
            config = choose_batch(fabric, config, detector, images, masks, say)
    settings = config.train
    bad_image_log = None
    if settings.on_bad_image == "skip":
        bad_image_log = BadImageLog(out, len(data), settings.max_bad_images, fabric.global_rank)
    loader = build_train_loader(
        images,
        transform,
        batch=settings.total_batch // settings.accumulate,
        seed=settings.seed,
        workers=config.data.workers,
        rank=fabric.global_rank,
        world=fabric.world_size,
        masks=masks,
        pin=fabric.device.type == "cuda",
        bad_image_log=bad_image_log,
        balance=settings.balance,
    )
    lr = optim.scaled_lr(settings)
    _say_what_differs(config, data, loader, lr, say)
    if config.data.check:
        max_bad = settings.max_bad_images if settings.on_bad_image == "skip" else 0.0
        run_on_first(fabric, lambda: require_usable_images(data, val, max_bad_share=max_bad, warn=say))
    if not resume:
        run_on_first(fabric, lambda: create_run_dir(out))
        say(f"results: {out}")
    validate = EpochValidation(fabric, config, val, masks)
    with _errors_reported(fabric, out, is_begun):
        if fabric.is_global_zero and not is_begun:  # the first file, so that --resume knows a run that is killed here
            write_atomically(out / "config.yaml", config.to_yaml().encode())
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
            meta=_describe_model(config, data),
            quiet=quiet,
            say=say,
        )
        if (steps := settings.epochs * run.steps_per_epoch) < settings.warmup_steps and not resume:
            say(
                f"train.warmup_steps={settings.warmup_steps}, but the training has {format_count(steps, 'step')}: the "
                f"learning rate only rises and stays below {lr:g}; set fewer, or more train.epochs"
            )
        if fabric.is_global_zero and not (is_begun and (out / "run.json").is_file()):
            _write_run_files(run, config, data, val)
        with _described(config, run) if fabric.is_global_zero else nullcontext():
            done = trainer.fit(run)
    if bad_image_log:
        bad_image_log.begin(done["epoch"], 0)  # else the earlier epochs would be unknown where none was left to train
        record_replaced_images(bad_image_log, out, say)
    fabric.barrier()
    if validate.results is not None and not run.state["stale"]:  # the last weights are the best, and evaluated
        if not fabric.is_global_zero:
            return val, Evaluation(validate.results, {})
        return val, evaluate_results(val, validate.results, config.test, masks=masks)
    best = build_with_weights(config, len(val.names), weights_file(out)).to(fabric.device).eval()
    return val, evaluate_detector(best, config, val, fabric.device, rank=fabric.global_rank, world=fabric.world_size)


def _say_what_differs(
    config: Config, data: DetectionDataset, loader: TrainLoader, lr: float, say: Callable[[str], None]
) -> None:
    """Say where an epoch has other images than the dataset, and where the learning rate is scaled."""
    settings = config.train
    if len(loader.dataset) != len(data):
        say(f"data.tiles.size={config.data.tiles.size}: an epoch has {format_count(len(loader.dataset), 'tile')}")
    if settings.balance is not None:
        epoch = format_count(len(loader) * loader.batch, "image")
        say(f"train.balance={settings.balance:g}: an epoch has {epoch}, those of rare classes several times")
    if lr != settings.lr:
        say(f"learning rate {settings.lr:g} is for a batch of {settings.base_batch}: {lr:g} for {settings.total_batch}")


def _describe_model(config: Config, data: DetectionDataset) -> dict[str, Any]:
    """Return what the checkpoints say about the model."""
    return {
        "config": config.to_yaml(),
        "names": list(data.names),
        "category_ids": list(data.category_ids),
        "format": "fusedet",
    }


def _write_run_files(run: TrainingRun, config: Config, data: DetectionDataset, val: DetectionDataset) -> None:
    """Write run.json and, where a share is held out, split.json."""
    fingerprints = {"data": {"train": data.fingerprint(), "val": val.fingerprint()}}
    about = describe_environment(str(run.fabric.device), run.fabric.world_size)
    write_json(run.out / "run.json", about | fingerprints | {"lr": run.lr, "seed": run.settings.seed})
    if isinstance(config.data.val, float):
        files = {name: [str(d.path(i)) for i in range(len(d))] for name, d in (("train", data), ("val", val))}
        write_json(run.out / "split.json", {"share": config.data.val, "seed": config.data.split_seed} | files)


@contextmanager
def _errors_reported(fabric: Fabric, out: Path, is_begun: bool) -> Iterator[None]:
    """Report an error of the training inside; of one that ends before its first checkpoint remove the files."""
    try:
        yield
    except DivergenceError:
        raise  # metrics.csv shows how the run came to that
    except InputError as error:
        if get_ranks()[2]:  # only a machine's first process reports errors, and it may not have met this one
            print(f"error: process {fabric.global_rank}: {error}", file=sys.stderr, flush=True)
        if fabric.is_global_zero and not is_begun and not (out / "last.ckpt").exists():
            remove_files(out, "config.yaml", "run.json", "split.json", "skipped.csv", *TABLES)
        raise


@contextmanager
def _described(config: Config, run: TrainingRun) -> Iterator[None]:
    """Write config.yaml for the training inside; put the earlier one back unless last.ckpt is written.

    The next --resume then neither repeats settings that failed nor shows settings that never trained.
    """
    file, saved = run.out / "config.yaml", run.saved
    earlier = file.read_bytes() if run.last.is_file() and file.is_file() else None
    write_atomically(file, config.to_yaml().encode())
    try:
        yield
    finally:
        if earlier is not None and run.saved == saved:
            write_atomically(file, earlier)


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
