"""The commands that make, score and use a model."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from fusedet import config, evaluation
from fusedet.api import coco_submission, distributed, predict, run_dir, validate
from fusedet.api.demo import demo as run_demo
from fusedet.api.load_model import at_most, countable
from fusedet.api.train import train as run_training
from fusedet.cli import tables
from fusedet.cli.args import (
    Classes,
    Json,
    Trust,
    Words,
    any_config,
    err,
    load_config,
    of_run,
    out,
    print_files,
    print_json,
    separate,
    speaker,
    track,
)
from fusedet.config import Config
from fusedet.data.readers.auto import read
from fusedet.errors import InputError, plural, unknown
from fusedet.models import profiling
from fusedet.models.detectors import bare


def train(
    words: Words = None,
    resume: Annotated[
        bool, typer.Option(help="Go on where the run in out=FOLDER (or the run's folder given as MODEL) stopped.")
    ] = False,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Train MODEL (a config's name, a YAML file or a run's folder) on data=PATH; results go to out=FOLDER."""
    name, overrides = separate(words)
    if name is None:
        raise InputError(
            f"which model? Write fusedet train MODEL data=PATH, with MODEL one of the {len(config.names())} that fusedet info lists, such "
            "as retinanet_r50, a YAML file or a run's folder"
        )
    options = _run_config(name, overrides, resume, trust)
    trained = run_training(options, resume=resume, say=speaker(json), quiet=json)
    if not trained.figures:
        return
    if json:
        return print_json(trained.figures | {"out": str(trained.out)})
    tables.score(out, trained.figures, f"{trained.out}: best weights on {options.data.val}")
    print_files(trained.files)
    out.print(f"next: fusedet predict {escape(str(trained.out))} IMAGE_OR_FOLDER...")


def val_(
    source: Annotated[str, typer.Argument(metavar="RUN|CKPT|RESULTS.json", show_default=False)],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    split: Annotated[str | None, typer.Option(help="The split to score on, by default data.val.")] = None,
    voc: Annotated[bool, typer.Option(help="VOC's AP too (for VOC data it is always given).")] = False,
    evaluator: Annotated[str, typer.Option(help=f"One of {', '.join(evaluation.EVALUATORS)}.")] = evaluation.EVALUATORS[
        0
    ],
    submit: Annotated[
        bool, typer.Option("--submission", help="Write the json and zip that COCO's test server takes.")
    ] = False,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Score a run, a checkpoint, or results in COCO's form against data=PATH (by default the run's own data)."""
    _, overrides = separate(words)
    if evaluator not in evaluation.EVALUATORS:
        raise unknown("evaluator", evaluator, evaluation.EVALUATORS)
    path, is_results = Path(source), source.endswith(".json")
    if is_results:
        options = config.parse(config.overridden({}, overrides))
        if options.data.path is None:
            raise InputError(f"{source} are results: add data=PATH, what they were made on")
    else:
        file = predict.weights_file(source)
        detector, saved, names, _ = predict.rebuild(file, trust)
        wanted = predict.only(overrides, "data", "test", "device", "out")
        options = config.parse(config.overridden(saved.tree() | {"out": None}, wanted))
    scored = split or options.data.val
    dataset = read(options.data.path or "", scored, images=options.data.images, need_images=not is_results)
    if options.out:
        run_dir.check(options.out)  # before the work, not after it
    server_split = coco_submission.of_server(dataset, options.test.max_det) if submit else None
    if server_split and (warning := coco_submission.incomplete(dataset, server_split)) and not distributed.place()[0]:
        err.print(escape(warning))
    annotated = len(dataset.labels) > 0
    if not annotated and not submit:
        raise InputError(
            f"{dataset.source} has no objects to score by: use fusedet predict, or for COCO's server --submission"
        )
    if is_results:
        results = evaluation.load_results(path)
        masks = bool(results) and all("segmentation" in result for result in results)
    else:
        validate.check_names(dataset, names, str(file))
        if masks := validate.finds_masks(detector):
            validate.check_masks(dataset)
        with distributed.shared(options.device) as (rank, world, device):
            ready = predict.tuned(detector.to(device), options)
            loader = validate.val_loader(options, dataset, rank, world)
            results = validate.detect(
                ready, loader if rank else track(json, loader, len(loader), "images"), dataset, device
            )
        if rank:
            return
    rows = coco_submission.checked(dataset, results) if submit else {}
    figures: dict[str, Any] = {"detections": len(results)}
    if annotated:
        figures = validate.score(dataset, results, voc=voc or dataset.form == "voc", evaluator=evaluator, masks=masks)
    parent = path if path.is_dir() else path.parent
    target = run_dir.fresh(options.out) if options.out else run_dir.numbered(parent, f"val-{Path(scored).stem}")
    files = validate.report(dataset, results, figures, target, title=f"{path.name} on {scored}") if annotated else {}
    if server_split:
        files |= coco_submission.write(rows, server_split, path.name if path.is_dir() else path.stem, target)
    if json:
        return print_json(figures | {"out": str(target), "files": {name: str(file) for name, file in files.items()}})
    if annotated:
        tables.score(out, figures, f"{source if is_results else file} on {scored} of {options.data.path}")
    print_files(files)


def info(words: Words = None, classes: Classes = None, trust: Trust = False, json: Json = False) -> None:
    """Parameters, trainable parameters and multiply-adds of MODEL, per part."""
    name, overrides = separate(words)
    if name is None:
        if json:
            return print_json({"models": config.names(), "schedules": config.names("schedules")})
        out.print("models: " + ", ".join(config.names()))
        return out.print("schedules (train.schedule=NAME): " + ", ".join(config.names("schedules")))
    options = load_config(name, overrides, trust)
    known, weights = _trained(name, trust) if Path(name).is_dir() and name not in config.names() else (80, None)
    classes = known if classes is None else classes
    with countable(name):
        with weights or nullcontext():
            detector = bare(options, classes)
        figures = profiling.cost(detector, *profiling.network_size(options.data.size))
    if json:
        return print_json({"model": name, "classes": classes, **figures})
    tables.cost(out, figures, f"{name}, {plural(classes, 'class')}")


def demo(
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    images: Annotated[int, typer.Option(help="Images to generate.", min=10)] = 800,
    seed: Annotated[int, typer.Option(help="Of the images and the training.", min=0)] = 0,
    json: Json = False,
) -> None:
    """Generate a dataset, train retinanet_tiny on it, score it and draw what it found: no download, minutes on two cores."""
    trained = run_demo([f"train.seed={seed}", *(words or [])], images, seed, say=speaker(json), quiet=json)
    if json:
        return print_json(
            trained.figures | {"out": str(trained.out.parent), "files": {k: str(v) for k, v in trained.files.items()}}
        )
    tables.score(out, trained.figures, "RetinaNet on generated scenes: AP by object size")
    print_files(trained.files)
    out.print(escape(f"next: fusedet predict {trained.out} {trained.out.parent / 'data' / 'val'}"))
    out.print("or your own data (COCO, VOC or YOLO): fusedet train retinanet_r18_small data=PATH out=runs/mine")


def config_(words: Words = None) -> None:
    """Print MODEL's config as a run would have it, overrides included."""
    sys.stdout.write(any_config(words).to_yaml())


def _trained(run: str, trust: bool) -> tuple[int, AbstractContextManager[None]]:
    """How many classes a run knows, and what stops the making of a model of many more weights: its config may be somebody else's."""
    file = predict.weights_file(run)
    detector, _, names, _ = predict.rebuild(file, trust)
    return len(names), at_most(len(detector.state_dict()), file)


def _run_config(name: str, overrides: list[str], resume: bool, trust: bool) -> Config:
    """The config of a training: of a name or file, or of a run's folder, which with --resume is also where it goes on."""
    path = Path(name)
    if name not in config.names() and path.is_dir():
        options = config.load(of_run(path), [f"out={path}" if resume else "out=null", *overrides], trust=trust)
    elif resume:
        if name not in config.names() and not path.exists():
            raise InputError(f"{name} does not exist: there is no run to resume")
        asked = config.load(name, overrides)
        if asked.out is None:
            raise InputError(
                "which run shall be resumed? Give its folder, fusedet train RUN --resume, or add out=FOLDER"
            )
        if not (Path(asked.out) / "config.yaml").is_file():
            raise InputError(
                f"out={asked.out} holds no run to resume: give the run's folder, fusedet train RUN --resume"
            )
        options = config.load(of_run(Path(asked.out)), [f"out={asked.out}", *overrides])
        if options.model != asked.model:
            raise InputError(
                f"{name} is not the model that out={asked.out} trains: give the run's folder, fusedet train RUN --resume"
            )
    else:
        options = config.load(name, overrides)
    if options.out is None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("several processes need one folder: add out=FOLDER")
        options = options.replace(out=str(run_dir.free("runs", path.stem if not path.is_dir() else path.name)))
    return options
