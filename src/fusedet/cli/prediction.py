"""The command that predicts, in one process or many, a few images or millions."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from fusedet import config
from fusedet.api import batch_predict, distributed, predict, run_dir
from fusedet.api.image_sources import Sources
from fusedet.cli import tables
from fusedet.cli.args import Json, Trust, err, is_override, out, print_files, print_json
from fusedet.errors import InputError, plural, unknown


def predict_(
    model: Annotated[str, typer.Argument(metavar="RUN|CKPT", show_default=False)],
    sources: Annotated[list[str] | None, typer.Argument(metavar="SOURCE... [KEY=VALUE]...", show_default=False)] = None,
    score: Annotated[float, typer.Option(help="Boxes drawn have at least this score; the json holds all.")] = 0.3,
    batch: Annotated[int, typer.Option(help="Images at once.", min=1)] = 1,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    draw: Annotated[bool, typer.Option(help="Draw the boxes on copies of the images.")] = True,
    resume: Annotated[
        bool, typer.Option(help="Go on in out=FOLDER where the same command stopped; where it never began, begin.")
    ] = False,
    on_bad_image: Annotated[
        str, typer.Option(help="error: an image that cannot be read ends it; skip: it is counted and listed.")
    ] = "error",
    part: Annotated[
        int | None, typer.Option(help=f"Images written at once, {batch_predict.PART} where there are as many.", min=1)
    ] = None,
    parts_: Annotated[
        bool, typer.Option("--parts", help="Leave the parts, with an index.json, instead of one predictions.json.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Threads that read images ahead.", min=0)] = 2,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Find objects in images: files, folders, globs, @FILE with a path a line, or "-" for such a list on standard input."""
    given = [s for s in sources or [] if not is_override(s)]
    overrides = [s for s in sources or [] if is_override(s)]
    of_model = [o for o in overrides if o.partition("=")[0] not in ("device", "out")]
    options = config.parse(config.overridden({}, [o for o in overrides if o not in of_model]))
    predict.only(overrides, *predict.SETTABLE, "device", "out")
    if not given:
        raise InputError(
            'which images? Write fusedet predict RUN SOURCE..., files, folders, globs, @FILE with a path a line, or "-" for one '
            "on standard input"
        )
    if precision not in ("fp32", "bf16"):
        raise unknown("precision", precision, ("fp32", "bf16"))
    if on_bad_image not in ("error", "skip"):
        raise unknown("value of --on-bad-image:", on_bad_image, ("error", "skip"))
    rank, world, _ = distributed.place()
    if world > 1 and "-" in given:
        raise InputError("several processes cannot share standard input: write the list to a file, and give @FILE")
    if options.out is None and (world > 1 or resume):
        raise InputError(
            f"{'several processes need' if world > 1 else '--resume needs'} to know the folder: add out=FOLDER"
        )
    with ExitStack() as stack:
        found = Sources([_spooled(stack) if word == "-" else word for word in given])
        device = str(distributed.own_device(options.device))
        predictor = predict.load(model, *of_model, device=device, precision=cast(Any, precision), trust=trust)
        parent = Path(model) if Path(model).is_dir() else Path(model).parent
        target = Path(options.out) if options.out else run_dir.free(parent, "predict")
        asked = batch_predict.Options(
            batch, score, draw, part, parts_, cast(Literal["error", "skip"], on_bad_image), workers, rank, world
        )
        with tables.progress(err if json else out, found.count(), "images", hidden=rank > 0) as advance:
            written = batch_predict.predict(
                predictor, found, target, asked, precision=precision, resume=resume, advance=advance
            )
    _say(written, score, rank, json)


def _spooled(stack: ExitStack) -> str:
    """Standard input as a list in a file, which can be read again."""
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "paths.txt"
    with file.open("w", encoding="utf-8", errors="surrogateescape") as written:
        written.writelines(sys.stdin)
    return f"@{file}"


def _say(written: dict[str, Any], score: float, rank: int, json: bool) -> None:
    if written["left"]:
        return out.print(f"process {rank} has done its parts, {written['left']} of other processes are still to come")
    if json:
        return print_json(written)
    images, detections = (plural(written[f"{thing}s"], thing) for thing in ("image", "detection"))
    out.print(f"{images}, {detections}, {written['shown']} of them with a score of {score:g} or more")
    if written["skipped"]:
        out.print(
            f'{plural(written["skipped"], "image")} could not be read, listed under "skipped" in what was written'
        )
    print_files({name: Path(path) for name, path in written["files"].items()})
