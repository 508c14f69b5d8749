"""The generated parts of the site's reference: commands, Python API and published weights, as Markdown."""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from typer import Context
from typer.main import get_command

import fusedet
from fusedet.cli import app

LATENCIES = Path(__file__).with_name("reference") / "latency.jsonl"
PARTS = {
    "Data types": ["fusedet.types"],
    "Contracts of the parts": ["fusedet.models.protocols"],
    "Modules of the papers": [
        "fusedet.models.necks.mse_fpn",
        "fusedet.models.necks.smsl",
        "fusedet.models.modules.msil",
        "fusedet.models.modules.msfm",
    ],
    "Necks": [
        f"fusedet.models.necks.{name}"
        for name in ("fpn", "pafpn", "bfp", "bifpn", "aug_fpn", "nas_fpn", "dyhead", "dilated_encoder")
    ],
    "Detectors": ["fusedet.models.detectors.one_stage", "fusedet.models.detectors.two_stage"],
    "Data": ["fusedet.data.dataset", "fusedet.data.transforms", "fusedet.data.loader"],
}
"""Modules that are documented beside the public names, by subject."""


def list_commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every command with its whole name, in the order of the help."""
    if hasattr(command, "list_commands"):
        context = Context(command)
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            assert subcommand
            if not subcommand.hidden:
                yield from list_commands(subcommand, f"{path} {name}")
        if not command.invoke_without_command:
            return
    if " " in path:
        yield path, command


def describe_commands() -> str:
    """Return a section per command: its help, arguments and options."""
    return "\n".join(_describe_command(path, command) for path, command in list_commands(get_command(app), "fusedet"))


def _describe_command(path: str, command: Any) -> str:
    context = Context(command, info_name=path)
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        name, text = record or (parameter.make_metavar(context), getattr(parameter, "help", "") or "")
        rows.append(f"| `{_plain(name)}` | {_plain(text).replace('<', '&lt;')} |")
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    table = "\n".join(["| | |", "|---|---|", *rows])
    text = command.help or ""
    return f"## {path.removeprefix('fusedet ')}\n\n```text\n{usage}\n\n{_plain(text, cell=False)}\n```\n\n{table}\n"


def _plain(text: str, cell: bool = True) -> str:
    """Return help text without rich's markup, as the text of a table's cell or of a block."""
    text = re.sub(r"(?<!\\)\[/?(?:bold|dim|cyan|green|yellow|red|italic)[^\]]*\]", "", text)
    text = text.replace("\b\n", "").replace("\b", "").replace("\\[", "[").replace("\f", "").strip()
    return re.sub(r"\s+", " ", text).replace("|", "\\|") if cell else text


def describe_api() -> str:
    """Return autodoc directives of every public name, then of the parts' modules."""
    sections = ["## Public names\n"]
    for name in fusedet.__all__:
        value = getattr(fusedet, name)
        if callable(value):
            kind = "autofunction" if not isinstance(value, type) else "autoclass"
            members = "\n   :members:" if kind == "autoclass" and not issubclass(value, Exception) else ""
            sections.append(_directive(f".. {kind}:: fusedet.{name}{members}"))
    for subject, modules in PARTS.items():
        sections.append(f"## {subject}\n")
        sections += [f"### {module}\n\n" + _directive(f".. automodule:: {module}\n   :members:") for module in modules]
    return "\n".join(sections)


def _directive(text: str) -> str:
    return f"```{{eval-rst}}\n{text}\n```\n"


def describe_weights() -> str:
    """Return how the latency was measured, then a table of the published weights per family."""
    about, latencies = read_latencies()
    families = defaultdict(list)
    listed = fusedet.list_weights().weights
    for weights in listed:
        families[weights.family].append(weights)
    tables = (_describe_family(family, rows, latencies) for family, rows in sorted(families.items()))
    missing = sum(weights.name not in latencies for weights in listed)
    return "\n".join([_describe_measurement(about, latencies, missing), *tables])


def read_latencies() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Read the results of benchmarks/zoo_latency.py: about the measurement, and the latencies by name of the weights.

    Without a detection, RoI branches and selection had nothing to do: these latencies are left out.
    """
    about, *rows = map(json.loads, LATENCIES.read_text(encoding="utf-8").splitlines())
    return about, {name: row for row in rows for name in row["names"] if row["detections"]}


def _describe_measurement(about: dict[str, Any], latencies: dict[str, dict[str, Any]], missing: int) -> str:
    height, width = about["size"]
    machine = about["machine"]
    reference = statistics.median(row["processor_ms"] / row["ratio"] for row in latencies.values())
    version = machine["torch"].partition("+")[0]
    left = f" {missing} cells are empty: with random weights an HRNet with RoI heads detects nothing."
    return (
        f"The latency is that of one image of {height} x {width} pixels on one thread, from pixels to final boxes and "
        f"masks: the median of {about['repeats']} calls, in milliseconds of the processor. The last column is relative "
        f"to `{about['reference']}`, which had its turns in between ({reference:.0f} ms). Weights were random, and the "
        f"score threshold such that {about['candidates']} boxes passed it. RoI heads weigh more in so small an image "
        f"than in a large one. {machine['cpu']}, torch {version}, fp32.{left if missing else ''}\n"
    )


def _describe_family(family: str, rows: list, latencies: dict[str, dict[str, Any]]) -> str:
    columns = (
        "name",
        "AP (masks)",
        "parameters (M)",
        "multiply-adds (G)",
        "latency (ms)",
        "relative latency",
        "backbone",
    )
    head = f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 2)}---|"
    lines = [
        f"| `{row.name}` | {_average_precision(row)} "
        f"| {row.parameters / 1e6:.2f} | {row.multiply_adds / 1e9:.1f} "
        f"| {_number(latency.get('processor_ms'), 0)} | {_number(latency.get('ratio'), 2)} | {row.backbone} |"
        for row in rows
        for latency in [latencies.get(row.name, {})]
    ]
    return "\n".join([f"## {family}\n", head, *lines, ""])


def _average_precision(row: Any) -> str:
    masks = "" if row.mask_ap is None else f" ({row.mask_ap:.1f})"
    return _number(row.box_ap) + masks


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


GENERATED: dict[str, Callable[[], str]] = {
    "commands": describe_commands,
    "api": describe_api,
    "weights": describe_weights,
}
"""What stands in the place of `<!-- generated: NAME -->`."""
