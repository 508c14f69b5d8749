"""The table of a dry run."""

from collections.abc import Mapping, Sequence
from typing import Any

from fusedet.ablation.render import CITED, Sheet, drop_empty_paper_columns
from fusedet.ablation.spec import METRICS
from fusedet.config.interval import format_duration
from fusedet.errors import format_count
from fusedet.evaluation.formatting import format_number


def make_plan_sheet(rows: Sequence[Mapping[str, Any]], classes: int, seeds: int) -> Sheet:
    """Make the table of a dry run.

    Args:
        rows: Result of `experiment.preview_plan`.
        classes: Number of classes of the counted models.
        seeds: Number of runs per row.
    """
    names = [
        name
        for name in (*METRICS, *(f"delta_{name}" for name in METRICS))
        if any(name in row["published"] for row in rows)
    ]
    has_estimate = any(row["seconds"] is not None for row in rows)
    head = [
        "row",
        *(name.replace("delta_", "Δ") for name in names),
        "#Param paper (M)",
        "#Param (M)",
        "multiply-adds (G)",
    ]
    head += ["time paper (ms)", "runs to do", *(["estimate"] * has_estimate)]
    lines = []
    for row in rows:
        cells = [
            row["label"],
            *(format_number(row["published"].get(name), 1) for name in names),
            format_number(row["params_M"], 2),
        ]
        if row["trainable"] is None:
            cells += [CITED, CITED]
        else:
            cells += [f"{row['trainable'] / 1e6:.2f}", f"{row['multiply_adds'] / 1e9:.2f}"]
        cells += [format_number(row["time_ms"], 1), "-" if row["left"] is None else str(row["left"])]
        cells += [("-" if row["seconds"] is None else format_duration(row["seconds"]))] * has_estimate
        lines.append(cells)
    published = "Published metrics in percent; counted" if names else "Counted"
    title = f"{published} with {classes} classes; {format_count(seeds, 'seed')} per row"
    return drop_empty_paper_columns(Sheet(title, head, lines))
