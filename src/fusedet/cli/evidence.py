"""The commands that say how far a figure can be relied on."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape

from fusedet import ablation, config
from fusedet.ablation import render, summary_text
from fusedet.ablation.estimate import format_duration
from fusedet.api import cam, compare, predict
from fusedet.api.image_sources import Sources
from fusedet.cli import tables
from fusedet.cli.args import Json, Trust, is_override, out, print_files, print_json, separate, speaker
from fusedet.errors import InputError, unknown


def compare_(
    a: Annotated[str, typer.Argument(metavar="RUN_A", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="RUN_B", show_default=False)],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    split: Annotated[
        str | None, typer.Option(help="The split whose stored results are compared, by default data.val.")
    ] = None,
    resamples: Annotated[int, typer.Option(help="How often the images are drawn again.", min=40)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the resamples.", min=0)] = 0,
    json: Json = False,
) -> None:
    """Compare two runs, or results in COCO's form with data=PATH: B less A with its interval over images, and why."""
    name, overrides = separate(words)
    if name is not None:
        raise InputError(f"two runs are compared, {a} and {b}; {name} is one too many: options are written key=value")
    options = config.parse(config.overridden({}, predict.only(overrides, "data", "out")))
    found = compare.compare(a, b, options, split, resamples=resamples, seed=seed)
    if json:
        return print_json(found.figures | {"out": str(found.out)})
    tables.comparison(out, found.figures)
    out.print(escape(found.figures["conclusion"]))
    print_files(found.files)


def ablate_(
    table: Annotated[str | None, typer.Argument(metavar="TABLE", show_default=False)] = None,
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each row.", min=1)] = 3,
    rows: Annotated[
        list[str] | None, typer.Option(metavar="LABEL,...", help="The rows to run, by default all.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show what would run, and, with data=PATH, how long it takes.")
    ] = False,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Begin no run that would not fit, such as 2h.")
    ] = None,
    launcher: Annotated[
        str, typer.Option(help="local: here, on all GPUs side by side; slurm: a job per run.")
    ] = "local",
    slurm: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of the jobs, as submitit has it.", show_default=False)
    ] = None,
    resamples: Annotated[int, typer.Option(help="How often the images are drawn again.", min=40)] = 1000,
    json: Json = False,
) -> None:
    """Train every row of TABLE (a shipped name or a YAML file) with several seeds on data=PATH into out=DIR, published beside measured."""
    if table is None:
        raise InputError(
            f"which table? Write fusedet ablate TABLE data=PATH out=DIR, with TABLE one of {', '.join(ablation.list_tables())}, or a file"
        )
    if launcher not in ("local", "slurm"):
        raise unknown("launcher", launcher, ("local", "slurm"))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("fusedet ablate starts its own processes: call it without torchrun")
    seconds = None if budget is None else ablation.parse_duration(budget)
    name, overrides = separate(words)
    if name is not None:
        raise InputError(f"one table at a time, {table} and {name} are two: options are written key=value")
    folder = config.parse(config.overridden({}, [word for word in overrides if word.startswith("out=")])).out
    if folder is None and not dry_run:
        raise InputError("no output folder: add out=FOLDER")
    more = [word for word in overrides if not word.startswith("out=")]
    say = speaker(json)
    plan = ablation.make_plan(
        ablation.load_table(table), more, seeds=seeds, rows=rows or (), out=folder or "", need_data=not dry_run, say=say
    )
    if dry_run:
        lines, basis = ablation.preview_plan(plan, say=say)
        total = [row["seconds"] for row in lines if row["seconds"] is not None]
        if json:
            return print_json(
                {
                    "table": plan.table.source,
                    "classes": plan.classes,
                    "rows": lines,
                    "seconds": sum(total),
                    "basis": basis,
                }
            )
        out.print(escape(plan.table.title))
        render.print_sheet(out, render.make_plan_sheet(lines, plan.classes, seeds))
        if total:
            out.print(escape(f"about {format_duration(sum(total))} on one device, by {basis}"))
        elif not plan.data:
            out.print("with data=PATH the time is estimated too")
        return None
    given = {
        "--seeds": [str(seeds)],
        "--rows": rows or [],
        "--budget": [budget] if budget else [],
        "--slurm": slurm or [],
    }
    given |= {"--launcher": [launcher] if launcher != "local" else [], "--resamples": [str(resamples)]}
    command = [
        "fusedet",
        "ablate",
        table,
        *overrides,
        *(word for key, values in given.items() for value in values for word in (key, value)),
    ]
    options = ablation.LaunchOptions(seconds, launcher, dict(map(_pair, slurm or [])), resamples, tuple(command))
    found, files = ablation.run_plan(plan, options, say=say, quiet=json)
    if json:
        return print_json(found | {"out": str(plan.out), "files": {name: str(file) for name, file in files.items()}})
    for sheet in render.make_sheets(found):
        render.print_sheet(out, sheet)
    for row in found["rows"]:
        if not row["cited"]:
            out.print(escape(f"{row['label']}: {row['conclusion']}"))
    for line in [
        *summary_text.describe_coverage(found),
        *summary_text.collect_notes(found),
        summary_text.describe_cost(found),
    ]:
        out.print(escape(line))
    return print_files(files)


def _pair(text: str) -> tuple[str, Any]:
    """A key and its value in YAML."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(
            f"--slurm {text}: write KEY=VALUE, such as --slurm timeout_min=600 --slurm slurm_partition=gpu"
        )
    return key, yaml.safe_load(value)


def cam_(
    run: Annotated[str, typer.Argument(metavar="RUN|CKPT", show_default=False)],
    sources: Annotated[list[str] | None, typer.Argument(metavar="IMAGE... [KEY=VALUE]...", show_default=False)] = None,
    beside: Annotated[
        str | None, typer.Option(metavar="RUN_B", help="A second run, drawn beside the first in the same colours.")
    ] = None,
    class_: Annotated[
        str | None, typer.Option("--class", help="The class, by default that of each image's best detection.")
    ] = None,
    score: Annotated[float, typer.Option(help="The least score of a detection.")] = 0.3,
    alone: Annotated[
        bool, typer.Option("--best", help="Of the class's best place alone, not of all places by their scores.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"Only this, can be repeated: {', '.join(cam.PARTS)}.")] = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Draw what the features of a run speak for in images, level by level, before and after each module, and its gates and weights."""
    words = sources or []
    files = [word for word in words if not is_override(word)]
    overrides = [word for word in words if is_override(word)]
    own = [word for word in overrides if word.partition("=")[0] in ("device", "out")]
    options = config.parse(config.overridden({}, own))
    predict.only(overrides, *predict.SETTABLE, "device", "out")
    if not files:
        raise InputError("which images? Write fusedet cam RUN IMAGE..., files, folders or globs")
    made = cam.cam(
        run,
        list(Sources(files)),
        [word for word in overrides if word not in own],
        beside=beside,
        name=class_,
        score=score,
        best_only=alone,
        only=only or (),
        device=options.device,
        out=options.out,
        trust=trust,
    )
    if json:
        return print_json({"out": str(made.out), "images": made.figures})
    for line in cam.format_report(made.figures):
        out.print(escape(line))
    print_files(made.files)
