"""The generated parts of the site's reference: commands, Python API and published weights, as Markdown."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from typer import Context
from typer.main import get_command

import fusedet
from fusedet.cli import app

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
    """Return a table of the published weights per family."""
    families = defaultdict(list)
    for weights in fusedet.list_weights().weights:
        families[weights.family].append(weights)
    return "\n".join(_describe_family(family, rows) for family, rows in sorted(families.items()))


def _describe_family(family: str, rows: list) -> str:
    columns = (
        "name",
        "backbone",
        "dataset",
        "AP, boxes",
        "AP, masks",
        "parameters (M)",
        "multiply-adds (G)",
        "licence",
    )
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    lines = [
        f"| `{row.name}` | {row.backbone} | {row.dataset} | {_number(row.box_ap)} | {_number(row.mask_ap)} "
        f"| {row.parameters / 1e6:.2f} | {row.multiply_adds / 1e9:.1f} | {row.licence} |"
        for row in rows
    ]
    return "\n".join([f"## {family}\n", head, *lines, ""])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


GENERATED: dict[str, Callable[[], str]] = {
    "commands": describe_commands,
    "api": describe_api,
    "weights": describe_weights,
}
"""What stands in the place of `<!-- generated: NAME -->`."""
