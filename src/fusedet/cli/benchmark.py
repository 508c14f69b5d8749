"""The command `benchmark`: turns its arguments into a call of `fusedet.api` and prints the result."""

from typing import Annotated, Any

from typer import Argument, Option

import fusedet
from fusedet.cli import common as cli
from fusedet.cli.commands import USE


@cli.command("benchmark", "benchmark runs/a", "benchmark runs/a runs/a/export --size 800,1216", USE)
def benchmark(
    arguments: Annotated[
        list[str] | None,
        Argument(metavar="RUN|KEY=VALUE", help="Runs, checkpoints, published weights, configs, exports; settings."),
    ] = None,
    size: Annotated[str | None, Option(metavar="H,W", help="Size of the image, multiples of 32.")] = None,
    formats: Annotated[
        str | None,
        Option(
            "--format",
            metavar="NAME,...",
            help="eager, channels_last, bf16, compile, torch, onnx, openvino; by default all.",
        ),
    ] = None,
    batch: Annotated[str, Option(metavar="N,...", help="Images at once.")] = "1,8",
    runs: Annotated[int, Option(help="Measured calls.", min=1)] = 10,
    trust: cli.Trust = False,
    json: cli.Json = False,
) -> None:
    """Measure a model's speed in every installed engine.

    PyTorch, ONNX Runtime and OpenVINO take turns on this machine, each in its own process: latency, images per second,
    peak memory, file size and start time, from the image file to boxes and of the network. A run is exported to a
    temporary directory, unless an exported model is given too. Results go to out=DIR, by default to benchmark in the
    run directory.
    """
    sources, settings = cli.split_arguments(arguments)
    options: dict[str, Any] = {"size": cli.split_sides(size), "runs": runs, "trust": trust, "say": cli.err.print}
    options |= {"batch": cli.split_numbers(batch, "--batch", "numbers of images, such as 1,8")}
    options |= {} if formats is None else {"formats": formats}
    cli.show(fusedet.benchmark(sources, *settings, **options, progress=cli.console(json)), json)
