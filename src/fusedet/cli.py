"""The command line: one typed function per verb; a user's mistake is one line and exit 2."""

from __future__ import annotations

import json as jsonlib
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fusedet import config, evaluate, measure
from fusedet.config import Config
from fusedet.data.convert import convert as convert_data
from fusedet.data.read import read
from fusedet.detectors import from_config
from fusedet.engine.loop import Interrupted
from fusedet.errors import InputError, unknown
from fusedet.verbs import browse as browsing
from fusedet.verbs import folder, predict, show, val
from fusedet.verbs.check import check_data
from fusedet.verbs.demo import demo as run_demo
from fusedet.verbs.train import train as run_training
from fusedet.verbs.weights import convert as convert_weights

app = typer.Typer(
    help="Object detection with feature pyramids. Options are key=value: fusedet train retinanet_r50 data=PATH train.epochs=24 out=runs/a",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out, err = (Console(stderr=to_err, soft_wrap=True, highlight=False, emoji=False) for to_err in (False, True))

Words = Annotated[list[str] | None, typer.Argument(metavar="[MODEL] [KEY=VALUE]...", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
Classes = Annotated[int | None, typer.Option(help="Number of classes; by default a run's own, else COCO's 80.")]


@app.command("train")
def train_(
    words: Words = None,
    resume: Annotated[bool, typer.Option(help="Go on where the run in out=FOLDER (or the run's folder given as MODEL) stopped.")] = False,
    json: Json = False,
) -> None:
    """Train MODEL (a config's name, a YAML file or a run's folder) on data=PATH; results go to out=FOLDER."""
    name, overrides = _split(words)
    if name is None:
        raise InputError(f"which model? Write fusedet train MODEL data=PATH, with MODEL one of {', '.join(config.names())}, or a YAML file")
    options = _run_config(name, overrides, resume)
    trained = run_training(options, resume=resume, say=_say(json), quiet=json)
    if not trained.figures:
        return
    if json:
        return _json(trained.figures | {"out": str(trained.out)})
    show.score(out, trained.figures, f"{trained.out}: best weights on {options.data.val}")
    _files(trained.files)
    out.print(f"next: fusedet predict {escape(str(trained.out))} PICTURE_OR_FOLDER...")


@app.command("val")
def val_(
    source: Annotated[str, typer.Argument(metavar="RUN|CKPT|RESULTS.json", show_default=False)],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    split: Annotated[str | None, typer.Option(help="The split to score on, by default data.val.")] = None,
    voc: Annotated[bool, typer.Option(help="VOC's AP too (for VOC data it is always given).")] = False,
    evaluator: Annotated[str, typer.Option(help=f"One of {', '.join(evaluate.EVALUATORS)}.")] = evaluate.EVALUATORS[0],
    json: Json = False,
) -> None:
    """Score a run, a checkpoint, or results in COCO's form against data=PATH (by default the run's own data)."""
    _, overrides = _split(words)
    if evaluator not in evaluate.EVALUATORS:
        raise unknown("evaluator", evaluator, evaluate.EVALUATORS)
    path, is_results = Path(source), source.endswith(".json")
    if is_results:
        options = config.parse(config.overridden({}, overrides))
        if options.data.path is None:
            raise InputError(f"{source} are results: add data=PATH, what they were made on")
    else:
        file = predict.weights_file(source)
        detector, saved, names, _ = predict.rebuild(file)
        wanted = predict.only(overrides, "data", "test", "device", "out")
        options = config.parse(config.overridden(saved.tree() | {"out": None}, wanted))
    scored = split or options.data.val
    records = read(options.data.path or "", scored, images=options.data.images, need_pictures=not is_results)
    if options.out:
        folder.check(options.out)  # before the work, not after it
    if is_results:
        results = evaluate.load_results(path)
        masks = bool(results) and all("segmentation" in result for result in results)
    else:
        val.check_names(records, names, str(file))
        device = predict.pick_device(options.device)
        ready = predict.tuned(detector.to(device), options)
        if masks := val.finds_masks(ready):
            val.check_masks(records)
        loader = val.val_loader(options, records)
        results = val.detect(ready, _track(json, loader, len(loader), "pictures"), records, device)
    figures = val.score(records, results, voc=voc or records.form == "voc", evaluator=evaluator, masks=masks)
    parent = path if path.is_dir() else path.parent
    target = folder.fresh(options.out) if options.out else folder.numbered(parent, f"val-{Path(scored).stem}")
    files = val.report(records, results, figures, target, title=f"{path.name} on {scored}")
    if json:
        return _json(figures | {"out": str(target)})
    show.score(out, figures, f"{source} on {scored} of {options.data.path}")
    _files(files)


@app.command("predict")
def predict_(
    model: Annotated[str, typer.Argument(metavar="RUN|CKPT", show_default=False)],
    sources: Annotated[list[str] | None, typer.Argument(metavar="SOURCE... [KEY=VALUE]...", show_default=False)] = None,
    score: Annotated[float, typer.Option(help="Boxes drawn have at least this score; the json holds all.")] = 0.3,
    batch: Annotated[int, typer.Option(help="Pictures at once.", min=1)] = 1,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    draw: Annotated[bool, typer.Option(help="Draw the boxes on copies of the pictures.")] = True,
    json: Json = False,
) -> None:
    """Find objects in pictures: files, folders, globs, or "-" for a list of paths on standard input."""
    given = [s for s in sources or [] if not _is_override(s)]
    overrides = [s for s in sources or [] if _is_override(s)]
    of_model = [o for o in overrides if o.partition("=")[0] not in ("device", "out")]
    options = config.parse(config.overridden({}, [o for o in overrides if o not in of_model]))
    if not given:
        raise InputError('which pictures? Write fusedet predict RUN SOURCE..., files, folders, globs or "-" for a list on standard input')
    if precision not in ("fp32", "bf16"):
        raise unknown("precision", precision, ("fp32", "bf16"))
    listed = [line.strip() for line in sys.stdin if line.strip()] if "-" in given else []
    pictures = predict.pictures([*(s for s in given if s != "-"), *listed])
    predictor = predict.load(model, *of_model, device=options.device, precision=precision)  # type: ignore[arg-type]
    parent = Path(model) if Path(model).is_dir() else Path(model).parent
    target = folder.fresh(options.out) if options.out else folder.numbered(parent, "predict")
    written = predict.write(predictor, _track(json, pictures, len(pictures), "pictures"), target, batch=batch, score=score, drawn=draw)
    if json:
        return _json(written)
    out.print(
        f"{written['pictures']} pictures, {written['detections']} detections, {written['shown']} of them with a score of {score:g} or more"
    )
    _files({name: Path(path) for name, path in written["files"].items()})


@app.command()
def info(words: Words = None, classes: Classes = None, json: Json = False) -> None:
    """Parameters, trainable parameters and multiply-adds of MODEL, per part."""
    name, overrides = _split(words)
    if name is None:
        if json:
            return _json({"models": config.names(), "schedules": config.names("schedules")})
        out.print("models: " + ", ".join(config.names()))
        return out.print("schedules (train.schedule=NAME): " + ", ".join(config.names("schedules")))
    # what a model costs does not depend on its weights: none are fetched
    options = _load(name, [*overrides, "model.backbone.pretrained=false", "model.backbone.weights=null"])
    if classes is None:
        classes = len(predict.rebuild(predict.weights_file(name))[2]) if Path(name).is_dir() and name not in config.names() else 80
    short, long = options.data.size
    figures = measure.cost(from_config(options, classes), _padded(short), _padded(long))
    if json:
        return _json({"model": name, "classes": classes, **figures})
    show.cost(out, figures, f"{name}, {classes} classes")


@app.command("doctor")
def doctor_(
    words: Words = None,
    read_pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Read every picture, not the annotations alone.")] = True,
    json: Json = False,
) -> None:
    """Check data=PATH before a training does: exit 1 where something would stop it."""
    options = _any_config(words)
    if options.data.path is None:
        raise InputError("no data: write fusedet doctor data=PATH")
    reports, between = check_data(options, read_pictures, lambda items, total, split: _track(json, items, total, split))
    failed = bool(between) or any(r.errors for r in reports.values())
    if json:
        _json({split: vars(r) for split, r in reports.items()} | {"between": between, "ok": not failed})
    else:
        for split, found in reports.items():
            show.report(out, split, found)
        for text in between:
            out.print(f"[red]error[/] {escape(text)}")
        out.print("[red]this data would stop a training[/]" if failed else "[green]this data can be trained on[/]")
    raise typer.Exit(1 if failed else 0)


@app.command()
def browse(
    words: Words = None,
    split: Annotated[str | None, typer.Option(help="The split, by default data.train.")] = None,
    images: Annotated[int, typer.Option(help="How many pictures.", min=1)] = 16,
    epoch: Annotated[int, typer.Option(help="The epoch whose chance (flips, sizes, colours) is shown.", min=0)] = 0,
    json: Json = False,
) -> None:
    """Draw data=PATH as the network sees it in training, boxes included, into one picture, out=FILE.png."""
    options = _any_config(words)
    if options.data.path is None:
        raise InputError("no data: write fusedet browse data=PATH")
    target = Path(options.out or "browse.png")
    shown = browsing.browse(options, split or options.data.train, images, epoch, target)
    if json:
        return _json({"picture": str(target), "images": shown})
    out.print(f"{shown} pictures: {escape(str(target))}")


converting = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.add_typer(converting, name="convert", help="Write a data set in another form, or another project's weights as a checkpoint here.")


@converting.command("data")
def convert_data_(
    source: Annotated[str, typer.Argument(metavar="SRC", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="DST", show_default=False)],
    to: Annotated[str, typer.Option(help="coco, voc or yolo.")],
    link: Annotated[bool, typer.Option(help="Hard links to the pictures instead of copies.")] = False,
    json: Json = False,
) -> None:
    """Write the data set SRC to the new folder DST in another form; boxes keep their values."""
    report = convert_data(source, target, to, link=link)
    if json:
        return _json({"out": target, "splits": report})
    for split, figures in report.items():
        out.print(escape(f"{split}: " + ", ".join(f"{count} {what}" for what, count in figures.items())))
    out.print(f"next: fusedet train retinanet_r50 data={escape(target)} out=runs/a")


@converting.command("weights")
def convert_weights_(
    source: Annotated[str, typer.Argument(metavar="FILE.pth", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="OUT", show_default=False)],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    like: Annotated[
        str | None,
        typer.Option("--config", metavar="CONFIG.py|NAME", help="MMDetection's config, or a config here; else the file tells."),
    ] = None,
    json: Json = False,
) -> None:
    """Convert a checkpoint of MMDetection, or torchvision's detection weights, into the new folder OUT."""
    name, overrides = _split(words)
    if name is not None:
        raise InputError(f"{name} is neither FILE.pth nor OUT, and options are written key=value: name the config with --config {name}")
    file, found = convert_weights(source, target, like, overrides)
    if json:
        return _json({"out": target, "weights": str(file), "classes": found.names, "notes": found.notes})
    for note in found.notes:
        out.print(f"note: {escape(note)}")
    out.print(escape(f"weights: {file}"))
    out.print(escape(f"next: fusedet predict {target} PICTURE_OR_FOLDER..."))


@app.command()
def demo(
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    images: Annotated[int, typer.Option(help="Pictures to generate.", min=10)] = 800,
    seed: Annotated[int, typer.Option(help="Of the pictures and the training.", min=0)] = 0,
    json: Json = False,
) -> None:
    """Generate a data set, train retinanet_tiny on it, score it and draw what it found: no download, minutes on two cores."""
    trained = run_demo([f"train.seed={seed}", *(words or [])], images, seed, say=_say(json), quiet=json)
    if json:
        return _json(trained.figures | {"out": str(trained.out.parent), "files": {k: str(v) for k, v in trained.files.items()}})
    show.score(out, trained.figures, "RetinaNet on generated scenes: AP by object size")
    _files(trained.files)
    out.print(escape(f"next: fusedet predict {trained.out} {trained.out.parent / 'data' / 'val'}"))
    out.print("or your own data (COCO, VOC or YOLO): fusedet train retinanet_r18_small data=PATH out=runs/mine")


@app.command("config")
def config_(words: Words = None) -> None:
    """Print MODEL's config as a run would have it, overrides included."""
    sys.stdout.write(_any_config(words).to_yaml())


def main() -> None:
    """Run a verb. Exit codes: 0 well, 1 the doctor found errors, 2 wrong input, 130 stopped by Ctrl-C or SIGTERM."""
    sys.exit(run())


def run(arguments: list[str] | None = None) -> int:
    """The exit code of a command line."""
    try:
        app(arguments, prog_name="fusedet")
    except SystemExit as end:
        return int(end.code or 0)
    except InputError as error:
        # what all processes of a training raise, the first one says
        return 2 if int(os.environ.get("RANK", 0)) else _complain(str(error))
    except Interrupted as stop:
        err.print(escape(str(stop)))
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 0
    except OSError as error:  # a full disk, a folder without permission: said, not traced
        return _complain(f"{error.filename or 'a file'}: {error.strerror or error}")
    return 0


def _complain(text: str) -> int:
    err.print(f"[red]error:[/] {escape(' '.join(text.splitlines()))}")
    return 2


def _run_config(name: str, overrides: list[str], resume: bool) -> Config:
    """The config of a training: of a name or file, or of a run's folder, which with --resume is also where it goes on."""
    path = Path(name)
    if name not in config.names() and path.is_dir():
        options = config.load(_of_run(path), [f"out={path}" if resume else "out=null", *overrides])
    elif resume:
        asked = config.load(name, overrides)
        if asked.out is None or not (Path(asked.out) / "last.ckpt").is_file():
            raise InputError(f"out={asked.out} holds no last.ckpt to resume: give the run's folder, fusedet train RUN --resume")
        options = config.load(_of_run(Path(asked.out)), [f"out={asked.out}", *overrides])
        if options.model != asked.model:
            raise InputError(f"{name} is not the model that out={asked.out} trains: give the run's folder, fusedet train RUN --resume")
    else:
        options = config.load(name, overrides)
    if options.out is None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("several processes need one folder: add out=FOLDER")
        options = replace(options, out=str(folder.free("runs", path.stem if not path.is_dir() else path.name)))
    return options


def _any_config(words: list[str] | None) -> Config:
    name, overrides = _split(words)
    return _load(name, overrides) if name else config.parse(config.overridden({}, overrides))


def _load(name: str, overrides: list[str]) -> Config:
    """The config of a shipped name, a YAML file or a run's folder (its `out` is not taken: nothing is written there again)."""
    if name in config.names() or not Path(name).is_dir():
        return config.load(name, overrides)
    return config.load(_of_run(Path(name)), ["out=null", *overrides])


def _of_run(folder: Path) -> Path:
    file = folder / "config.yaml"
    if not file.is_file():
        raise InputError(f"{folder} is not a run's folder: it has no config.yaml")
    return file


def _split(words: list[str] | None) -> tuple[str | None, list[str]]:
    """The model's name, if any, and the overrides; order does not matter."""
    names = [w for w in words or [] if not _is_override(w)]
    if len(names) > 1:
        raise InputError(f"one model at a time, got {' and '.join(names)}: options are written key=value")
    return (names[0] if names else None), [w for w in words or [] if _is_override(w)]


def _is_override(word: str) -> bool:
    key = word.partition("=")[0]
    return "=" in word and not Path(word).exists() and key.replace(".", "").replace("_", "").replace("[", "").replace("]", "").isalnum()


def _padded(side: int) -> int:
    return -(-side // 32) * 32


def _say(json: bool) -> Any:
    return lambda text: (err if json else out).print(escape(text))


def _track(json: bool, items: Iterable[Any], total: int, text: str) -> Iterable[Any]:
    return show.track(err if json else out, items, total, text)


def _files(files: dict[str, Path]) -> None:
    for name, path in files.items():
        out.print(f"{name}: {escape(str(path))}")


def _json(content: dict[str, Any]) -> None:
    print(jsonlib.dumps(folder.plain(content), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
