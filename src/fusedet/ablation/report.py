"""Write the files of a summary: table.json, table.md, table.csv and report.html, a self-contained page."""

import re
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path

from fusedet.ablation.plots import draw_plots, validation_metric
from fusedet.ablation.render import CITED, COST, NOT_MEASURED, Sheet, format_csv, format_markdown, make_sheets
from fusedet.ablation.summary_text import Summary, collect_notes, describe_cost, describe_coverage, shorten_path
from fusedet.api.run_dir import write_json
from fusedet.atomic_io import write_atomically
from fusedet.config.interval import format_duration
from fusedet.visualization.page import make_faint, make_page, make_plain_table, make_section

PAGE_COLORS = {"#ffffff": "none", "#262626": "currentColor", "#ebebeb": "var(--grid)", "#d4d4d4": "var(--rest)"}
"""Colors of a plot that are replaced by those of the page, light or dark."""


def write_ablation_report(summary: Summary, out: Path) -> dict[str, Path]:
    """Write a summary into an output directory, over an earlier one; return the files by what they are.

    Raises:
        StorageError: A file cannot be written; the earlier one is still whole.
    """
    written = {
        "table": out / "table.md",
        "spreadsheet": out / "table.csv",
        "data": out / "table.json",
        "page": out / "report.html",
    }
    write_atomically(written["table"], format_markdown(summary).encode())
    write_atomically(written["spreadsheet"], format_csv(summary).encode())
    write_json(written["data"], summary)
    plots = draw_plots(summary, out / "plots")
    write_atomically(written["page"], make_report_page(summary, plots).encode())
    return written


def make_report_page(summary: Summary, plots: Mapping[str, Path]) -> str:
    """Make the page: tables, conclusions, inlined plots and how they were made."""
    first, *others = make_sheets(summary)
    images = {name: inline_svg(file, name, i) for i, (name, file) in enumerate(plots.items())}
    classes = {name: svg for name, svg in images.items() if name.endswith("by class")}
    main = {name: svg for name, svg in images.items() if name not in classes}
    parts = [
        f"<h1>{escape(summary['title'])}</h1>",
        f'<p class="faint">{escape(summary["paper"])}</p>' if summary["paper"] else "",
        make_section(first.title, _make_table(first)),
        make_section(
            "Conclusions",
            make_plain_table([(row["label"], row["conclusion"]) for row in summary["rows"] if not row["cited"]]),
        ),
        make_section(
            "What the intervals cover",
            "".join(f"<p>{escape(line)}</p>" for line in [*describe_coverage(summary), *collect_notes(summary)]),
        ),
        *(make_section(name, f"<figure>{svg}</figure>{_make_caption(name, summary)}") for name, svg in main.items()),
        make_section("Differences by class", _make_folded_plots(classes)) if classes else "",
        *(
            make_section(
                sheet.title, _make_table(sheet) + (make_faint(describe_cost(summary)) if sheet.title == COST else "")
            )
            for sheet in others
        ),
        make_section("How it was made", _describe_origin(summary)),
    ]
    return make_page(summary["title"], parts)


def inline_svg(file: Path, name: str, number: int) -> str:
    """Return an SVG file as part of a page, with the page's colors and with ids that are unique in the page."""
    text = file.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for color, replacement in PAGE_COLORS.items():
        text = text.replace(color, replacement)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>p{number}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)


def _make_table(sheet: Sheet) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in sheet.head)
    rows = "".join(f"<tr>{''.join(map(_make_cell, row))}</tr>\n" for row in sheet.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'


def _make_cell(text: str) -> str:
    return (
        f'<td class="none">{escape(text)}</td>'
        if text in (NOT_MEASURED, CITED, "none", "-", "- / -")
        else f"<td>{escape(text)}</td>"
    )


def _make_folded_plots(images: Mapping[str, str]) -> str:
    text = "<p>Intervals are over images; gray if they contain 0.</p>"
    return text + "".join(
        f"<details><summary>{escape(name)}</summary><figure>{svg}</figure></details>" for name, svg in images.items()
    )


def _make_caption(name: str, summary: Summary) -> str:
    if name == "Learning curves":
        return make_faint(
            f"{validation_metric(summary['metric'])} of each validation: thin lines are seeds, thick ones their mean. "
            "The tables have each run's best weights."
        )
    return make_faint(
        "Points are means over seeds, ticks the seeds, lines the t intervals; the baseline is dark."
        if name.endswith("by object size")
        else "Points are means over seeds, lines their t intervals."
    )


def _describe_origin(summary: Summary) -> str:
    """Describe data, versions, devices and commands."""
    runs = [run for row in summary["rows"] for run in row.get("runs", ()) if run["state"] == "finished"]
    rows = [("table", summary["table"]), ("classes", ", ".join(summary["data"]["classes"]))]
    for split in ("train", "val"):
        about = summary["data"][split]
        counts = f"{about['images']} images, {about['instances']} instances"
        rows.append((split, f"{about['source']}: {counts}, fingerprint {about['fingerprint']}"))
    for version in dict.fromkeys(
        ", ".join(f"{name} {v}" for name, v in (run["versions"] or {}).items()) for run in runs
    ):
        rows += [("versions", version)] if version else []
    rows += [("device", device) for device in dict.fromkeys(run["device"] for run in runs) if device]
    trained = {
        run["folder"]: run["seconds"]
        for row in summary["rows"]
        if not row.get("weights_of")
        for run in row.get("runs", ())
    }
    own = [
        trained[folder] for folder in dict.fromkeys(run["folder"] for run in runs) if trained.get(folder) is not None
    ]
    if own:
        rows.append(("training time", f"{format_duration(sum(own))} for {len(own)} runs, validation included"))
    if missing := len({run["folder"] for run in runs} & trained.keys()) - len(own):
        rows.append(("training time unknown", f"{missing} runs, which were killed or have no record of it"))
    commands = "\n".join(shlex.join(command) for command in summary["commands"])
    folders = dict.fromkeys(shorten_path(run["folder"], keep=2) for run in runs if run["folder"] in trained)
    again = "\n".join(shlex.join(["fusedet", "train", f"{folder}/config.yaml", "out=DIR"]) for folder in folders)
    text = make_plain_table(rows) + f"<p>The table:</p><pre><code>{escape(commands)}</code></pre>"
    return text + (
        f"<details><summary>Repeat one run</summary><pre><code>{escape(again)}</code></pre></details>" if again else ""
    )
