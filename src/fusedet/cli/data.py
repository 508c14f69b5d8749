"""The commands that look at data or convert it, and other projects' weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fusedet.api import browse as browsing
from fusedet.api import run_dir
from fusedet.api.check_dataset import check_dataset
from fusedet.api.convert_weights import convert as convert_weights
from fusedet.cli import tables
from fusedet.cli.args import Json, Words, any_config, out, print_json, separate, track
from fusedet.data.conversion import convert_dataset as convert_data
from fusedet.errors import InputError, plural


def doctor(
    words: Words = None,
    read_images: Annotated[
        bool, typer.Option("--images/--no-images", help="Read every image, not the annotations alone.")
    ] = True,
    json: Json = False,
) -> None:
    """Check data=PATH before a training does: exit 1 where something would stop it."""
    options = any_config(words)
    if options.data.path is None:
        raise InputError("no data: write fusedet doctor data=PATH")
    check = check_dataset(
        options,
        read_images=read_images,
        progress=lambda items, total, split: track(json, items, total, split),
    )
    if json:
        print_json(
            {split: vars(r) for split, r in check.splits.items()} | {"between": check.mismatches, "ok": check.passed}
        )
    else:
        for split, found in check.splits.items():
            tables.report(out, split, found)
        for text in check.mismatches:
            out.print(f"[red]error[/] {escape(text)}")
        out.print(
            "[green]this data can be trained on[/]" if check.passed else "[red]this data would stop a training[/]"
        )
    raise typer.Exit(0 if check.passed else 1)


def browse(
    words: Words = None,
    split: Annotated[str | None, typer.Option(help="The split, by default data.train.")] = None,
    images: Annotated[int, typer.Option(help="How many images.", min=1)] = 16,
    epoch: Annotated[int, typer.Option(help="The epoch whose chance (flips, sizes, colours) is shown.", min=0)] = 0,
    centres: Annotated[
        bool, typer.Option("--centres", help="Draw instead where the centres of all objects lie, class by class.")
    ] = False,
    json: Json = False,
) -> None:
    """Draw data=PATH as the network sees it in training, boxes included, into one image, out=FILE.png."""
    options = any_config(words)
    if options.data.path is None:
        raise InputError("no data: write fusedet browse data=PATH")
    if centres:
        target = Path(options.out) if options.out else run_dir.free(".", "centres", ".png")
        classes = browsing.centres(options, split or options.data.train, target)
        if json:
            return print_json({"image": str(target), "classes": classes})
        tables.centres(out, classes)
        return out.print(f"centres: {escape(str(target))}")
    target = Path(options.out) if options.out else run_dir.free(".", "browse", ".png")
    shown = browsing.browse(options, split or options.data.train, images, epoch, target)
    if json:
        return print_json({"image": str(target), "images": shown})
    out.print(f"{plural(shown, 'image')}: {escape(str(target))}")


def convert_data_(
    source: Annotated[str, typer.Argument(metavar="SRC", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="DST", show_default=False)],
    to: Annotated[str, typer.Option(help="coco, voc or yolo.")],
    link: Annotated[bool, typer.Option(help="Hard links to the images instead of copies.")] = False,
    json: Json = False,
) -> None:
    """Write the dataset SRC to the new folder DST in another form; boxes keep their values."""
    report = convert_data(source, target, to, link=link)
    if json:
        return print_json({"out": target, "splits": report})
    for name, figures in report.items():
        out.print(escape(f"{name}: " + ", ".join(f"{count} {what}" for what, count in figures.items())))
    out.print(f"next: fusedet train retinanet_r50 data={escape(target)} out=runs/a")


def convert_weights_(
    source: Annotated[str, typer.Argument(metavar="FILE.pth", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="OUT", show_default=False)],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--config", metavar="CONFIG.py|NAME", help="MMDetection's config, or a config here; else the file tells."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Convert a checkpoint of MMDetection, or torchvision's detection weights, into the new folder OUT."""
    name, overrides = separate(words)
    if name is not None:
        raise InputError(
            f"{name} is neither FILE.pth nor OUT, and options are written key=value: name the config with --config {name}"
        )
    file, found = convert_weights(source, target, like, overrides)
    if json:
        return print_json({"out": target, "weights": str(file), "classes": found.names, "notes": found.notes})
    for note in found.notes:
        out.print(f"note: {escape(note)}")
    out.print(escape(f"weights: {file}"))
    out.print(escape(f"next: fusedet predict {target} IMAGE_OR_FOLDER..."))
