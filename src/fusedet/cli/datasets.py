"""The commands that look at a dataset: `doctor` and `browse`."""

from typing import Annotated, Any

from typer import Exit, Option

import fusedet
from fusedet.cli import common as cli
from fusedet.cli.commands import DATA, Split


@cli.command("doctor", "doctor data=data/coco", "doctor data=data/voc data.size=[600,1000] --no-decode", DATA)
def doctor(
    arguments: cli.ConfigAndSettings = None,
    decode: Annotated[bool, Option(help="Decode every image, not only read the annotations.")] = True,
    report: Annotated[str | None, Option(metavar="FILE.html", help="Write a page with histograms and images.")] = None,
    json: cli.Json = False,
) -> None:
    """Check a dataset before a training.

    Counts what data=PATH holds, lists errors and warnings, and ends with a summary, the worst first. The exit code is 1
    if a training would stop.
    """
    name, settings = cli.split_config(arguments)
    options: dict[str, Any] = {"read_images": decode, "report": report, "progress": cli.console(json)}
    result = fusedet.check_dataset(*settings, config=name, **options)
    cli.show(result, json)
    if report and not json:
        cli.out.print(f"page: {report}", soft_wrap=True)
    raise Exit(0 if result.ok else 1)


@cli.command("browse", "browse data=data/coco out=images.png", "browse data=data/coco --centers", DATA)
def browse(
    arguments: cli.ConfigAndSettings = None,
    split: Split = None,
    images: Annotated[int | None, Option(help="Number of images, by default 16.", min=1)] = None,
    epoch: Annotated[int | None, Option(help="Epoch whose data augmentation is shown, by default 0.", min=0)] = None,
    centers: Annotated[bool, Option("--centers", help="Draw the centers of all objects instead, by class.")] = False,
    json: cli.Json = False,
) -> None:
    """Draw training images as the network sees them.

    Images of data=PATH with their boxes, resized and augmented, go to one image file, out=FILE.png.
    """
    name, settings = cli.split_config(arguments)
    cli.show(fusedet.browse(*settings, config=name, split=split, images=images, epoch=epoch, centers=centers), json)
