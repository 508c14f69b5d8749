"""The commands `convert data` and `convert weights`."""

from typing import Annotated, Literal

from typer import Argument, Option

import fusedet
from fusedet.cli import common as cli
from fusedet.cli.commands import DATA

CONVERT_HELP = "Convert a dataset to another format, or another project's weights."
cli.app.add_typer(cli.converters, name="convert", help=CONVERT_HELP, rich_help_panel=DATA)
Source = Annotated[str, Argument(metavar="SOURCE", help="What is converted.")]
Target = Annotated[str, Argument(metavar="TARGET", help="The new directory.")]


@cli.command("data", "convert data voc coco --to coco", "convert data voc yolo --to yolo --link")
def convert_data(
    source: Source,
    target: Target,
    arguments: cli.Settings = None,
    to: Annotated[Literal["coco", "voc", "yolo"], Option(help="The format.")] = ...,  # type: ignore[assignment]
    split: Annotated[list[str] | None, Option(help="A split to write, by default all; may be repeated.")] = None,
    link: Annotated[bool, Option("--link", help="Make hard links to the images instead of copies.")] = False,
    json: cli.Json = False,
) -> None:
    """Convert a dataset to another format.

    The splits of SOURCE whose files exist are written to the new directory TARGET. Boxes keep their values.
    data.classes and data.rename select classes, and data.val=0.2 holds out a share of the images.
    """
    settings = cli.settings_only(arguments, "convert data takes SOURCE and TARGET")
    result = fusedet.convert_dataset(source, target, to, *settings, splits=split, link=link)
    cli.show(result, json, result.next_command)


@cli.command("weights", "convert weights resnet.pth runs/a", "convert weights a.pth runs/a --config a.py")
def convert_weights(
    source: Source,
    target: Target,
    arguments: cli.Settings = None,
    config: Annotated[str | None, Option(help="MMDetection's config file, or a config of fusedet.")] = None,
    json: cli.Json = False,
) -> None:
    """Convert weights of MMDetection or torchvision.

    TARGET is a new run directory. The model is inferred from the checkpoint unless --config names it.
    """
    settings = cli.settings_only(
        arguments, "convert weights takes SOURCE and TARGET, and the config as --config CONFIG"
    )
    result = fusedet.convert_weights(source, target, *settings, config=config)
    cli.show(result, json, *cli.list_steps_after("val", target))
