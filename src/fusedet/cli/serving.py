"""The command `app`: turns its arguments into a call of `fusedet.serve_app`."""

from typing import Annotated, Any

from typer import Argument, Option

import fusedet
from fusedet.cli import common as cli
from fusedet.cli.commands import USE


@cli.command("app", "app runs/a", "app runs/a runs/b --port 9000 test.max_det=300", USE)
def app(
    run: Annotated[
        str, Argument(metavar="RUN", help="Run directory, checkpoint, published weights or exported model.")
    ],
    arguments: Annotated[
        list[str] | None, Argument(metavar="RUN_B|KEY=VALUE", help="A second model beside it; settings.")
    ] = None,
    port: Annotated[int, Option(help="Port; 0 takes a free one.", min=0, max=65535, rich_help_panel="Server")] = 8000,
    host: Annotated[str, Option(help="Address to bind; 0.0.0.0 for all.", rich_help_panel="Server")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None,
        Option(metavar="NAME", help="Name by which others call the server.", rich_help_panel="Server"),
    ] = None,
    max_size_mb: Annotated[int, Option(help="Largest file in megabytes.", min=1, rich_help_panel="Server")] = 32,
    queue: Annotated[
        int, Option(help="Requests that may wait; more are refused.", min=0, rich_help_panel="Server")
    ] = 16,
    examples: Annotated[
        list[str] | None,
        Option(metavar="SOURCE", help="Example images: files, directories, globs; by default of the run's dataset."),
    ] = None,
    trust: cli.Trust = False,
) -> None:
    """Serve a page to try a model, and its JSON interface.

    Drop an image on the page to see boxes, scores, masks and heat maps, of two models side by side if a second one is
    given. Only this machine reaches it unless --host says otherwise. Needs the extra "app". Ctrl-C ends it.
    """
    seconds, settings = cli.split_arguments(arguments)
    cli.settings_only(seconds[1:], "app takes one model or two")
    options: dict[str, Any] = {"host": host, "port": port, "allowed_hosts": allow_host or (), "queue": queue}
    options |= {"beside": seconds[0] if seconds else None, "max_size_mb": max_size_mb, "examples": examples}
    fusedet.serve_app(run, *settings, **options, trust=trust, say=cli.out.print)
