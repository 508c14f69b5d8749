"""The settings of the config in the help of `fusedet train`, one panel per section."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from typer.core import TyperCommand


class SettingsCommand(TyperCommand):
    """A command whose help lists the settings of the config."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then key, type, default, meaning and range of every setting."""
        from fusedet.config import settings

        super().format_help(ctx, formatter)
        console = Console(highlight=False, emoji=False)
        for group, rows in groupby(settings(), key=lambda setting: setting.group):
            table = Table.grid(padding=(0, 2))
            table.add_column(no_wrap=True)  # keys are copied from here
            table.add_column(max_width=24)
            table.add_column(max_width=16)
            table.add_column()
            for row in rows:
                limits = f" ({row.range})" if row.range else ""
                table.add_row(*map(escape, (row.key, row.type, row.default, row.help + limits)))
            title = f"Settings: {group or 'run'}"
            console.print(Panel(table, title=title, title_align="left", border_style="dim"))
