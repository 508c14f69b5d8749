"""The settings of the config in the help of `fusedet train`, one panel per section."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from typer.core import TyperCommand


class SettingsCommand(TyperCommand):
    """A command whose help lists the settings of the config."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then key, type and default of every setting."""
        from fusedet.config import Config

        super().format_help(ctx, formatter)
        console = Console(highlight=False, emoji=False)
        groups: dict[str, Table] = {}
        for row in list_settings(Config):
            section = row[0].partition(".")[0] if "." in row[0] else "run"
            groups.setdefault(section, Table.grid(padding=(0, 2))).add_row(*map(escape, row))
        for section, table in groups.items():
            console.print(Panel(table, title=f"Settings: {section}", title_align="left", border_style="dim"))


def list_settings(schema: Any, prefix: str = "") -> list[tuple[str, str, str]]:
    """Return key, type and default of every setting of a section."""
    rows, hints = [], get_type_hints(schema)
    for field in fields(schema):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        if is_dataclass(hint):
            rows += list_settings(hint, f"{key}.")
            continue
        kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        default = {} if field.default is MISSING else field.default
        rows.append((key, kind, "null" if default is None else str(default)))
    return rows
