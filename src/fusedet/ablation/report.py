"""The files of a summary: table.json, table.md, table.csv and report.html, a page that stands alone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from fusedet.ablation.estimate import format_duration
from fusedet.ablation.plots import draw_plots, validation_metric
from fusedet.ablation.render import CITED, COST, NOTHING, Sheet, format_csv, format_markdown, make_sheets
from fusedet.ablation.summary_text import collect_notes, describe_cost, describe_coverage, shorten_path
from fusedet.api.run_dir import write_json

Found = Mapping[str, Any]
INKS = {"#ffffff": "none", "#262626": "currentColor", "#ebebeb": "var(--grid)", "#d4d4d4": "var(--rest)"}
"""Colours of a plot that follow the page's, light or dark."""


def write_report(found: Found, out: Path) -> dict[str, Path]:
    """Write a summary into an ablation's folder, over an earlier one; gives the files by what they are."""
    made = {
        "table": out / "table.md",
        "spreadsheet": out / "table.csv",
        "all of it": out / "table.json",
        "page": out / "report.html",
    }
    made["table"].write_text(format_markdown(found), encoding="utf-8")
    made["spreadsheet"].write_text(format_csv(found), encoding="utf-8")
    write_json(made["all of it"], found)
    drawn = draw_plots(found, out / "plots")
    made["page"].write_text(make_page(found, drawn), encoding="utf-8")
    return made


def make_page(found: Found, drawn: Mapping[str, Path]) -> str:
    """The whole page: tables, conclusions, plots inside it, and how it was made."""
    first, *others = make_sheets(found)
    images = {name: inline_svg(file, name, i) for i, (name, file) in enumerate(drawn.items())}
    classes = {name: svg for name, svg in images.items() if name.endswith("by class")}
    main = {name: svg for name, svg in images.items() if name not in classes}
    parts = [
        f"<h1>{escape(found['title'])}</h1>",
        f'<p class="faint">{escape(found["paper"])}</p>' if found["paper"] else "",
        _section(first.title, _table(first)),
        _section(
            "What can be concluded",
            _plain([(row["label"], row["conclusion"]) for row in found["rows"] if not row["cited"]]),
        ),
        _section(
            "What the figures cover",
            "".join(f"<p>{escape(line)}</p>" for line in [*describe_coverage(found), *collect_notes(found)]),
        ),
        *(_section(name, f"<figure>{svg}</figure>{_caption(name, found)}") for name, svg in main.items()),
        _section("Differences by class", _folded(classes)) if classes else "",
        *(
            _section(sheet.title, _table(sheet) + (_faint(describe_cost(found)) if sheet.title == COST else ""))
            for sheet in others
        ),
        _section("How it was made", _origin(found)),
    ]
    css = (files("fusedet.ablation") / "report.css").read_text(encoding="utf-8")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(found["title"])}</title>'
    # an empty icon, or a browser asks for one
    head += f'<link rel="icon" href="data:,"><style>{css}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{"".join(part + chr(10) for part in parts if part)}</body></html>\n'


def inline_svg(file: Path, name: str, number: int) -> str:
    """An svg file as part of a page: its colours follow the page's, its ids are its own."""
    text = file.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for ink, own in INKS.items():
        text = text.replace(ink, own)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>p{number}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _table(sheet: Sheet) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in sheet.head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in sheet.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _cell(text: str) -> str:
    return (
        f'<td class="none">{escape(text)}</td>'
        if text in (NOTHING, CITED, "none", "-", "- / -")
        else f"<td>{escape(text)}</td>"
    )


def _plain(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>\n" for name, text in rows)
    return f'<div class="scroll"><table class="plain"><tbody>\n{body}</tbody></table></div>'


def _folded(images: Mapping[str, str]) -> str:
    text = "<p>Intervals are over images; grey where they hold 0.</p>"
    return text + "".join(
        f"<details><summary>{escape(name)}</summary><figure>{svg}</figure></details>" for name, svg in images.items()
    )


def _caption(name: str, found: Found) -> str:
    if name == "Learning curves":
        return _faint(
            f"{validation_metric(found['figure'])} of each validation: thin a seed, thick the mean. The tables have each run's best weights."
        )
    return _faint(
        "Points are means over seeds, strokes the seeds, lines the t intervals; the baseline is dark."
        if name.endswith("by object size")
        else "Points are means over seeds, lines their t intervals."
    )


def _faint(text: str) -> str:
    return f'<p class="faint">{escape(text)}</p>'


def _origin(found: Found) -> str:
    """Data, versions, machines and commands."""
    runs = [run for row in found["rows"] for run in row.get("runs", ()) if run["state"] == "finished"]
    rows = [("table", found["table"]), ("classes", ", ".join(found["data"]["classes"]))]
    for split in ("train", "val"):
        about = found["data"][split]
        rows.append(
            (
                split,
                f"{about['source']}: {about['images']} images, {about['objects']} objects, fingerprint {about['fingerprint']}",
            )
        )
    for version in dict.fromkeys(
        ", ".join(f"{name} {v}" for name, v in (run["versions"] or {}).items()) for run in runs
    ):
        rows += [("versions", version)] if version else []
    rows += [("machine", device) for device in dict.fromkeys(run["device"] for run in runs) if device]
    trained = {
        run["folder"]: run["seconds"]
        for row in found["rows"]
        if not row.get("weights_of")
        for run in row.get("runs", ())
    }
    own = [
        trained[folder] for folder in dict.fromkeys(run["folder"] for run in runs) if trained.get(folder) is not None
    ]
    if own:
        rows.append(("training time", f"{format_duration(sum(own))} for {len(own)} runs, validation included"))
    if lacking := len({run["folder"] for run in runs} & trained.keys()) - len(own):
        rows.append(("training time not known", f"{lacking} runs, which were killed in between or left no note of it"))
    commands = "\n".join(shlex.join(command) for command in found["commands"])
    folders = dict.fromkeys(shorten_path(run["folder"], keep=2) for run in runs if run["folder"] in trained)
    again = "\n".join(shlex.join(["fusedet", "train", f"{folder}/config.yaml", "out=FOLDER"]) for folder in folders)
    text = _plain(rows) + f"<p>The table:</p><pre><code>{escape(commands)}</code></pre>"
    return text + (
        f"<details><summary>One run again</summary><pre><code>{escape(again)}</code></pre></details>" if again else ""
    )
