"""Print the AP of the rare classes in an ablation table, beside that of the others, and the difference to a row.

    python benchmarks/rare_classes.py DIR [--reference plain] [--images 25]

DIR is the output directory of `fusedet ablate`. A class is rare if at most --images images of the training split show
it. Values are means over the classes, in percent; the interval over seeds is Welch's, as in `fusedet ablate`, and one
seed has none.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean

from fusedet import config, evaluation
from fusedet.data.class_balance import count_images_per_class
from fusedet.data.splits import read_split


def read_rows(folder: Path) -> dict[str, list[Path]]:
    """List the run directories of each row."""
    rows: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*/seed*/metrics.json")):
        rows.setdefault(file.parent.parent.name, []).append(file.parent)
    return rows


def average_classes(run: Path, names: set[str]) -> float:
    """Average the AP over these classes."""
    classes = json.loads((run / "metrics.json").read_text())["classes"]
    return 100 * fmean(row["AP"] for row in classes if row["name"] in names)


def main() -> None:
    """Read the runs, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the output directory of `fusedet ablate`")
    parser.add_argument("--reference", default="plain", help="the row that the others are compared with")
    parser.add_argument("--images", type=int, default=25, help="the most images of a rare class")
    options = parser.parse_args()
    rows = read_rows(options.folder)
    dataset = read_split(config.load(rows[options.reference][0] / "config.yaml").data, "train")
    images = dict(zip(dataset.names, count_images_per_class(dataset).tolist(), strict=True))
    rare = {name for name, count in images.items() if count <= options.images}
    print("images per class:", ", ".join(f"{name} {count}" for name, count in images.items()))
    print(f"\n| row | classes | AP per seed | AP | difference to {options.reference} | 95 % interval over seeds |")
    print("|---|---|---|---|---|---|")
    for kind, names in (("all", set(images)), (f"{len(rare)} rare", rare), ("the others", set(images) - rare)):
        reference = [average_classes(run, names) for run in rows[options.reference]]
        for row, runs in sorted(rows.items(), key=lambda item: item[0] != options.reference):
            values = [average_classes(run, names) for run in runs]
            cells = [row, kind, " ".join(f"{value:.2f}" for value in values), f"{fmean(values):.2f}"]
            if row != options.reference:
                change = evaluation.compute_seed_difference(reference, values, paired=False)
                has_interval = not math.isnan(change.low)
                cells += [f"{change.value:+.2f}", f"{change.low:+.2f} to {change.high:+.2f}" if has_interval else ""]
            print(f"| {' | '.join(cells + [''] * (6 - len(cells)))} |")


if __name__ == "__main__":
    main()
