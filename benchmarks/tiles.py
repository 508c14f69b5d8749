"""Measure whether tiles help, on synthetic images whose objects are small, and on images whose objects are large.

Trains `retinanet_tiny` from scratch on tiles of 2048-pixel images with objects of 8 to 16 pixels, on the same images as
a whole for the same number of steps, and on images with objects of 200 to 800 pixels. `val --tiles-help` then compares
prediction with and without tiles, also on 4096-pixel images. With --seeds, the training on tiles is repeated, and the
difference on 2048-pixel images has an interval over seeds. With --run, a trained detector of the demo's classes takes
the place of all trainings. Prints a JSON line per comparison, then a table. Finished trainings and comparisons are
kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import fusedet
from fusedet import evaluation
from fusedet.data.shape_drawing import SHAPES, draw_image
from fusedet.data.synthetic import generate_dataset

GRID = 8  # scenes along a side of a large image, each with up to six objects
TILES, SIDE = 256, 384  # a tile in original pixels, and in those of the network
SMALL = (8.0, 16.0)
LARGE = (200.0, 800.0)
COMMON = [f"data.size=[{SIDE},{SIDE}]", "data.workers=0", "train.batch=4", "device=cpu"]
IN_TILES = f"data.tiles={{size: {TILES}, overlap: 0.1}}"
DENSE = ["test.max_det=1000", "test.batch=4"]


@dataclass(frozen=True)
class Sizes:
    """Numbers of images and epochs; an epoch of tiles has 81 times the images of 2048 pixels."""

    train: int
    val: int
    huge: int
    large: int
    epochs: int

    @property
    def steps_as_tiles(self) -> int:
        """The epochs of whole images that take as many steps as the epochs of tiles."""
        return 81 * self.epochs


SCALES = {"full": Sizes(16, 12, 6, 300, 2), "quarter": Sizes(8, 6, 3, 150, 1), "quick": Sizes(1, 4, 2, 60, 1)}


def write_grid(folder: Path, split: str, images: int, side: int, seed: int) -> None:
    """Write uncompressed TIFF images of `side` pixels and their objects in COCO format; a whole split stays."""
    target = folder / "annotations" / f"instances_{split}.json"
    if target.is_file():
        return
    (folder / split).mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    about: list[dict[str, Any]] = []
    scene_side = side // GRID
    for number in range(1, images + 1):
        pixels = np.zeros((side, side, 3), np.uint8)
        for index, (row, column) in enumerate(np.ndindex(GRID, GRID)):
            rng = np.random.default_rng([seed, number, index])
            scene, instances = draw_image(rng, (scene_side, scene_side), diameters=SMALL)
            y, x = row * scene_side, column * scene_side
            pixels[y : y + scene_side, x : x + scene_side] = scene
            for label, mask in instances:
                ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                width, height = int(xs[-1] - xs[0]) + 1, int(ys[-1] - ys[0]) + 1
                box = [x + int(xs[0]), y + int(ys[0]), width, height]
                ids = {"id": len(rows) + 1, "image_id": number, "category_id": label + 1, "iscrowd": 0}
                rows.append(ids | {"bbox": box, "area": width * height})
        name = f"{number:06d}.tif"
        Image.fromarray(pixels).save(folder / split / name)
        about.append({"id": number, "file_name": name, "height": side, "width": side})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES)]
    target.write_text(json.dumps({"images": about, "annotations": rows, "categories": categories}))


def train(name: str, data: Path, out: Path, *settings: str) -> Path:
    """Train a detector, or keep its finished run; return the run."""
    run = out / name
    if not (run / "metrics.json").is_file():
        own = [*COMMON, *settings, f"data={data}", f"out={run}"]
        fusedet.train("retinanet_tiny", *own, resume=(run / "last.ckpt").is_file())
    return run


def compare_tiles(run: Path, name: str, out: Path, *settings: str) -> dict[str, Any]:
    """Run `val --tiles-help`, or read its report; return what the table shows."""
    out = out / f"{run.name}-{name.split()[0]}"
    if not (out / "tiles.json").is_file():
        fusedet.measure_tiles(run, *DENSE, *settings, f"out={out}")
    report = json.loads((out / "tiles.json").read_text())
    row = report["metrics"]["AP"]
    seconds = {side: round(value, 2) for side, value in report["seconds_per_image"].items()}
    metrics = {key: round(row[key], 4) for key in ("a", "b", "difference", "low", "high")}
    text = {"images": report["images"], "conclusion": report["conclusion"]}
    return {"case": name, "run": run.name, **metrics, "seconds": seconds, **text}


def format_table(rows: list[dict[str, Any]], whole: Mapping[str, Any] | None) -> str:
    """Format the comparisons as Markdown, the interval over seeds, and the model that was trained on whole images."""
    lines = [
        "| validation images | trained on | AP, whole images | AP, tiles | difference | 95 % interval | s per image |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        interval, seconds = f"{row['low']:+.3f} to {row['high']:+.3f}", row["seconds"]
        cells = [f"{row['images']} of {row['case']}", row["run"], f"{row['a']:.3f}", f"{row['b']:.3f}"]
        cells += [f"{row['difference']:+.3f}", interval, f"{seconds['a']:.2f}, {seconds['b']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    for case in dict.fromkeys(row["case"] for row in rows):
        differences = [row["difference"] for row in rows if row["case"] == case]
        if len(differences) > 1:
            over = evaluation.compute_seed_interval(differences)
            interval = f"{over.value:+.3f}, {over.low:+.3f} to {over.high:+.3f}"
            lines.append(f"\n{case}, difference over {len(differences)} seeds with its 95 % interval: {interval}")
    if whole is not None:
        lines.append(f"\ntrained on whole images of 2048 pixels for as many steps: AP {whole['AP']:.3f}")
    return "\n".join(lines)


def main() -> None:
    """Generate, train, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tiles"), help="the folder of the images and runs")
    parser.add_argument("--run", type=Path, help="a trained run, such as demo/run, in place of the trainings")
    parser.add_argument("--only", nargs="+", choices=["small", "large", "whole"], default=["small", "large", "whole"])
    parser.add_argument("--seeds", type=int, default=1, help="the number of trainings on tiles")
    parser.add_argument("--scale", choices=list(SCALES), default="full", help="the training steps; quick is a test")
    options = parser.parse_args()
    sizes, out = SCALES[options.scale], options.out
    data, huge, rows, whole = out / "data-2048", out / "data-4096", [], None
    write_grid(data, "train", 0 if options.run else sizes.train, 2048, 0)
    write_grid(data, "val", sizes.val, 2048, 1)
    if "small" in options.only:
        write_grid(huge, "val", sizes.huge if options.seeds == 1 else 0, 4096, 2)
        last = f"train.validate_every={sizes.epochs}"
        own = [IN_TILES, f"train.epochs={sizes.epochs}", last]
        for seed in range(1 if options.run else options.seeds):
            name = f"tiles-{seed}" if seed else "tiles"
            run = options.run or train(name, data, out, *own, f"train.seed={seed}")
            for case, folder in (("2048 pixels", data), ("4096 pixels", huge))[: 2 if options.seeds == 1 else 1]:
                rows.append(compare_tiles(run, case, out, f"data={folder}", f"test.tiles.size={TILES}"))
                print(json.dumps(rows[-1]), flush=True)
    if "large" in options.only:
        split = {"train": 0.8, "val": 0.2}
        folder = generate_dataset(
            out / "data-large", images=sizes.large, size=(1024, 1024), splits=split, diameters=LARGE, masks=False
        )
        epochs = 3 * sizes.epochs
        run = options.run or train("large", folder, out, f"train.epochs={epochs}", f"train.validate_every={epochs}")
        rows.append(compare_tiles(run, "1024 pixels, large objects", out, f"data={folder}", "test.tiles.size=512"))
        print(json.dumps(rows[-1]), flush=True)
    if "whole" in options.only and not options.run:
        epochs = sizes.steps_as_tiles
        run = train("whole", data, out, f"train.epochs={epochs}", f"train.validate_every={epochs}", *DENSE[:1])
        whole = json.loads((run / "metrics.json").read_text())
        print(json.dumps({"case": "trained whole", "AP": whole["AP"]}), flush=True)
    print(format_table(rows, whole))


if __name__ == "__main__":
    main()
