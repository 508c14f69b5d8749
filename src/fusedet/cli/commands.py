"""The commands: each turns its arguments into a call of `fusedet.api` and prints the result."""

import shlex
import sys
from typing import Annotated, Any, Literal

from typer import Argument, Context, Option

import fusedet
from fusedet.cli import common as cli

TRAIN, USE, COMPARE, DATA = "Train and evaluate", "Use a model", "Compare and explain", "Data"
Split = Annotated[str | None, Option(help="The split, by default data.val; of browse data.train.")]
Resamples = Annotated[int, Option(help="Bootstrap draws of the images.", min=40, rich_help_panel="Statistics")]


@cli.command(
    "train", "train retinanet_r50 data=coco out=runs/a", "train runs/a --resume", TRAIN, cls=cli.SettingsCommand
)
def train(
    arguments: cli.ConfigAndSettings = None,
    resume: Annotated[bool, Option("--resume", help="Continue the given run, or the run in out=DIR.")] = False,
    trust: cli.Trust = False,
    json: cli.Json = False,
) -> None:
    """Train a detector and evaluate its best weights.

    data=PATH is in COCO, VOC, YOLO or another format of docs/data.md. Weights, metrics, plots and the page report.html
    go to out=DIR, by default runs/CONFIG.
    """
    name, settings = cli.split_config(arguments)
    result = fusedet.train(name, *settings, resume=resume, trust=trust, say=cli.console(json).print, quiet=json)
    if result.metrics:
        cli.show(result, json, *cli.list_steps_after("train", result.out, trust=trust))


@cli.command("val", "val runs/a", "val runs/a/val.bbox.json data=data/coco --evaluator pycocotools", TRAIN)
def val(
    context: Context,
    source: Annotated[
        str, Argument(metavar="RUN", help="Run directory, checkpoint, published weights or results (.json).")
    ],
    arguments: cli.Settings = None,
    split: Split = None,
    voc: Annotated[bool, Option("--voc", help="Compute VOC's AP too; for VOC data it always is.")] = False,
    evaluator: Annotated[
        Literal["fusedet", "faster-coco-eval", "pycocotools"], Option(help="What computes COCO's metrics.")
    ] = "fusedet",
    submission: Annotated[bool, Option("--submission", help="Write the files that COCO's test server takes.")] = False,
    tiles_help: Annotated[bool, Option("--tiles-help", help="Say whether tiles help, with and without them.")] = False,
    resamples: Resamples = 1000,
    open_page: Annotated[bool, Option("--open", help="Open the page report.html in the browser.")] = False,
    trust: cli.Trust = False,
    json: cli.Json = False,
) -> None:
    """Evaluate a run, a checkpoint or stored results.

    The data are the run's own or data=PATH. Results, metrics, plots and the page report.html go to out=DIR, by default
    RUN/val-SPLIT.
    """
    settings = cli.settings_only(arguments, "val takes one run, checkpoint or results file")
    if tiles_help:
        cli.refuse_other_options(context, "--tiles-help", "tiles_help", "split", "resamples", "trust", "json")
        own: dict[str, Any] = {"split": split, "resamples": resamples, "trust": trust}
        return cli.show(fusedet.measure_tiles(source, *settings, **own, progress=cli.console(json)), json)
    cli.refuse_other_options(context, "val without --tiles-help", *(set(context.params) - {"resamples"}))
    options: dict[str, Any] = {"split": split, "voc": voc, "evaluator": evaluator, "submission": submission}
    options |= {"trust": trust, "progress": cli.console(json), "say": cli.err.print}
    result = fusedet.validate(source, *settings, **options)
    if result.metrics:
        steps = [] if source.endswith(".json") else cli.list_steps_after("val", source, trust=trust)
        cli.show(result, json, *steps)
        if open_page:
            cli.open_in_browser(result.files.get("report"))
    return None


@cli.command("demo", "demo", "demo --images 200 train.seed=1 out=small_demo", TRAIN)
def demo(
    arguments: cli.Settings = None,
    images: Annotated[int, Option(help="Images to generate.", min=10)] = 800,
    json: cli.Json = False,
) -> None:
    """Train a small detector on synthetic images.

    Nothing is downloaded. Data, run and drawn predictions go to out=DIR, by default demo.
    """
    settings = cli.settings_only(arguments, "demo takes no config")
    result = fusedet.demo(*settings, images=images, say=cli.console(json).print, quiet=json)
    steps = cli.list_steps_after("val", result.out / "run", shlex.quote(str(result.out / "data" / "val")))
    own = "fusedet train retinanet_r18_small data=PATH out=runs/mine  # your data: COCO, VOC, YOLO, ..."
    cli.show(result, json, *steps, own)


@cli.command("predict", "predict runs/a street.jpg images/", "predict runs/a street.mp4 --from 1:30 --track", USE)
def predict(
    run: cli.Run,
    arguments: cli.ImagesAndVideos = None,
    score: Annotated[float, Option(help="Least score of the boxes drawn; the json holds all.")] = 0.3,
    precision: Annotated[Literal["fp32", "bf16"], Option(help="Floating-point format.")] = "fp32",
    draw: Annotated[bool, Option(help="Draw the boxes on copies of the images.")] = True,
    resume: Annotated[bool, Option("--resume", help="Continue the same prediction in out=DIR.")] = False,
    on_bad_image: Annotated[Literal["error", "skip"], Option(help="Stop there, or list it and go on.")] = "error",
    jsonl: Annotated[bool, Option("--jsonl", help="Keep a JSON-lines file per process, no predictions.json.")] = False,
    crops: Annotated[bool, Option("--crops", help="Write the parts of the images in the boxes too.")] = False,
    save: cli.Save = None,
    every: cli.Every = 1,
    start: cli.From = "0",
    end: cli.To = None,
    track: cli.Track = False,
    trust: cli.Trust = False,
    json: cli.Json = False,
) -> None:
    """Detect objects in images and videos.

    Predictions go to out=DIR, by default predict in the run directory: of images in COCO's format, of videos as JSON
    lines. test.batch images are predicted at once, and data.workers threads read images ahead.
    """
    sources, settings = cli.split_arguments(arguments)
    options: dict[str, Any] = {"score": score, "precision": precision, "draw": draw, "resume": resume, "trust": trust}
    options |= {"on_bad_image": on_bad_image, "jsonl": jsonl, "crops": crops, "save": save or ()}
    options |= {"every": every, "start": start, "end": end, "track": track}
    result = fusedet.predict(run, sources, *settings, **options, progress=cli.console(json))
    left = result.counts["left"]
    cli.show(result, json and not left, *([] if left else cli.list_steps_after("predict", run, trust=trust)))


@cli.command("export", "export runs/a", "export runs/a --format onnx,openvino --size 800,1216 out=exported", USE)
def export(
    source: Annotated[str, Argument(metavar="RUN", help="Run directory, checkpoint, published weights or config.")],
    arguments: cli.Settings = None,
    formats: Annotated[str, Option("--format", help="torch, onnx, openvino; several with commas.")] = "onnx",
    size: Annotated[str | None, Option(metavar="H,W", help="A fixed input size, multiples of 32.")] = None,
    dynamic: Annotated[bool, Option("--dynamic", help="Any input size; the default without --size.")] = False,
    batch: Annotated[int | None, Option(help="Images per input; by default any, 1 with --size.", min=1)] = None,
    precision: Annotated[Literal["fp32", "fp16", "bf16", "int8"], Option(help="Number format.")] = "fp32",
    opset: Annotated[int, Option(help="ONNX's operator set.", min=18, max=23)] = 18,
    raw: Annotated[bool, Option("--raw", help="Leave NMS out: boxes and scores of all candidates.")] = False,
    aot: Annotated[bool, Option("--aot", help="Compile the format torch for this CPU too.")] = False,
    calibrate: Annotated[bool, Option("--calibrate", help="Calibrate int8 on images of data=PATH.")] = False,
    calibration_images: Annotated[int | None, Option(help="Number of these images.", min=1, show_default="300")] = None,
    max_drop: Annotated[
        float | None, Option(help="Largest loss of AP by int8, 0 to 1.", min=0, max=1, show_default="0.01")
    ] = None,
    trust: cli.Trust = False,
    json: cli.Json = False,
) -> None:
    """Export a model to files that run without fusedet.

    Each file is compared with PyTorch on several images; one that differs is not written. Files, their description and
    an example script go to out=DIR, by default to export in the run directory.
    """
    settings = cli.settings_only(arguments, "export takes one run, checkpoint or config")
    options: dict[str, Any] = {"formats": formats, "size": cli.split_sides(size), "dynamic": dynamic, "batch": batch}
    options |= {"precision": precision, "opset": opset, "raw": raw, "trust": trust, "say": cli.err.print}
    options |= {"aot": aot, "calibrate": calibrate, "calibration_images": calibration_images, "max_drop": max_drop}
    options["progress"] = cli.err
    result = fusedet.export(source, *settings, **options)
    example = f"python {shlex.quote(str(result.out / 'example.py'))} IMAGE  # without fusedet"
    cli.show(result, json, *([] if raw else [example]))


@cli.command("info", "info", "info retinanet_r50 model.neck=bifpn", USE)
def info(
    arguments: cli.ConfigAndSettings = None,
    classes: Annotated[int | None, Option(help="Number of classes, by default the run's own, else 80.")] = None,
    trust: cli.Trust = False,
    json: cli.Json = False,
) -> None:
    """Count a model's parameters and multiply-adds.

    The model is that of a config, a run directory or a checkpoint. Without CONFIG all shipped configs and schedules are
    listed.
    """
    name, settings = cli.split_config(arguments)
    cli.show(fusedet.info(name, *settings, classes=classes, trust=trust), json)


@cli.command("config", "config retinanet_r50 model.neck=bifpn > mine.yaml", "config --schema > schema.json", USE)
def config(
    arguments: cli.ConfigAndSettings = None,
    schema: Annotated[bool, Option("--schema", help="Print the JSON schema of configs, for editors, instead.")] = False,
) -> None:
    """Print a config as YAML.

    The config is complete, with the given settings applied. A file of it can be used as CONFIG. What a training
    would refuse is refused here too.
    """
    from fusedet.api.train_inputs import resolve_checked_config
    from fusedet.config import read_schema

    name, settings = cli.split_config(arguments)
    if schema and arguments:
        raise fusedet.InputError("config --schema takes no config and no settings: it is the schema of all configs")
    sys.stdout.write(read_schema("schema") if schema else resolve_checked_config(name, settings).to_yaml())


@cli.command("weights", "weights vfnet", "weights get torchvision/fasterrcnn_resnet50_fpn_v2", USE)
def weights(
    arguments: Annotated[
        list[str] | None, Argument(metavar="[FILTER]|get NAME|where NAME", help="A part of names; or what to do.")
    ] = None,
    json: cli.Json = False,
) -> None:
    """List, fetch or locate published detection weights.

    Each name can stand where a run or checkpoint can, and is fetched when it is used first. FILTER is a part of a name,
    family, backbone or dataset; "get NAME" fetches the weights now; "where NAME" says where they are kept.
    """
    first, *rest = arguments or [""]
    if first in ("get", "where"):
        if len(rest) != 1:
            raise fusedet.InputError(f"weights {first} takes one name, such as fusedet weights {first} {cli.EXAMPLE}")
        return cli.show((fusedet.get_weights if first == "get" else fusedet.locate_weights)(rest[0]), json)
    if rest:
        raise fusedet.InputError(f"{rest[0]} is one too many: weights takes one FILTER, get NAME or where NAME")
    return cli.show(fusedet.list_weights(first), json)


@cli.command("compare", "compare runs/a runs/b", "compare a.json b.json data=data/coco --resamples 2000", COMPARE)
def compare(
    a: Annotated[str, Argument(metavar="RUN_A", help="Baseline: run directory, published weights or results (.json).")],
    b: Annotated[str, Argument(metavar="RUN_B", help="The same; compared with the baseline.")],
    arguments: cli.Settings = None,
    split: Split = None,
    resamples: Resamples = 1000,
    bootstrap_seed: Annotated[int, Option(help="Seed of the draws.", min=0, rich_help_panel="Statistics")] = 0,
    json: cli.Json = False,
) -> None:
    """Compare two runs with confidence intervals.

    Their stored results on the same images give B - A with intervals over images, and the error breakdown.
    """
    settings = cli.settings_only(arguments, f"two runs are compared, {a} and {b}")
    result = fusedet.compare(a, b, *settings, split=split, resamples=resamples, bootstrap_seed=bootstrap_seed)
    cli.show(result, json)


@cli.command("ablate", "ablate smsl_table1 data=coco out=smsl", "ablate mine.yaml data=coco --dry-run", COMPARE)
def ablate(
    context: Context,
    table: Annotated[str | None, Argument(metavar="TABLE", help="A shipped table or a YAML file.")] = None,
    arguments: cli.Settings = None,
    seeds: Annotated[int, Option(help="Trainings of each row.", min=1)] = 3,
    rows: Annotated[list[str] | None, Option(metavar="LABEL,...", help="Rows to run, by default all.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check only; with data=PATH estimate the time too.")] = False,
    budget: Annotated[str | None, Option(metavar="TIME", help="Start no run that would not fit, such as 2h.")] = None,
    parallel: Annotated[int, Option(help="Runs at a time on each device.", min=1)] = 1,
    launcher: cli.Launcher = "local",
    slurm: cli.Slurm = None,
    resamples: Resamples = 1000,
    power: Annotated[bool, Option("--power", help="Seeds and images that show +1 AP, by the baseline's runs.")] = False,
    schema: Annotated[bool, Option("--schema", help="Print the JSON schema of tables, for editors, instead.")] = False,
    json: cli.Json = False,
) -> None:
    """Train all rows of an ablation table and compare them.

    Every row is trained with several seeds on data=PATH into out=DIR. The report shows published and measured
    metrics with intervals. The same command goes on where it stopped.
    """
    if schema:
        from fusedet.config import read_schema

        cli.refuse_other_options(context, "--schema", "schema")
        if table:
            raise fusedet.InputError("ablate --schema takes no table and no settings: it is the schema of all tables")
        sys.stdout.write(read_schema("ablation_schema"))
        return None
    settings = cli.settings_only(arguments, f"one table at a time, {table}")
    options: dict[str, Any] = {"seeds": seeds, "say": cli.console(json).print}
    if power:
        cli.refuse_other_options(context, "--power", "power", "seeds", "resamples", "json")
        return cli.show(fusedet.estimate_power(table, *settings, resamples=resamples, **options), json)
    options["rows"] = rows or ()
    if dry_run:
        cli.refuse_other_options(context, "--dry-run", "dry_run", "seeds", "rows", "json")
        return cli.show(fusedet.preview_ablation(table, *settings, **options), json)
    options |= {"budget": budget, "parallel": parallel, "launcher": launcher, "slurm": slurm or ()}
    options |= {"resamples": resamples, "quiet": json}
    return cli.show(fusedet.ablate(table, *settings, **options), json)


@cli.command("cam", "cam runs/a street.jpg", "cam runs/a images/ --beside runs/b --class car", COMPARE)
def cam(
    run: cli.Run,
    arguments: cli.Sources = None,
    beside: Annotated[str | None, Option(metavar="RUN_B", help="A second run, drawn in the same colors.")] = None,
    class_name: Annotated[str | None, Option("--class", help="By default that of the best detection.")] = None,
    score: Annotated[float, Option(help="Least score of a detection.")] = 0.3,
    best: Annotated[bool, Option("--best", help="Explain the best location only, not all weighted by score.")] = False,
    only: Annotated[list[str] | None, Option(metavar="PART", help="Only this part; can be repeated.")] = None,
    trust: cli.Trust = False,
    json: cli.Json = False,
) -> None:
    """Draw class activation maps, gates and level weights.

    The maps are drawn level by level, before and after each module, into out=DIR, by default RUN/cam.
    """
    sources, settings = cli.split_arguments(arguments)
    options: dict[str, Any] = {"beside": beside, "class_name": class_name, "score": score, "only": only or ()}
    cli.show(fusedet.cam(run, sources, *settings, **options, best_only=best, trust=trust), json)
