"""Measure time and peak memory of predicting one very large image in tiles, in each file format.

The model is `retinanet_tiny` with random weights, because its detections do not matter. Each format is predicted by
the command in a process of its own, whose peak memory is that of everything: Python, torch, the model and the image.
Prints a JSON line per format, then a table; exits with 1 if a process needed more than --limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fusedet import config
from fusedet.data.shape_drawing import draw_image
from fusedet.engine import checkpoint
from fusedet.models.detectors import build_detector

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "TIFF, uncompressed": ("tif", {}),
    "TIFF, deflate": ("deflate.tif", {"compression": "tiff_adobe_deflate"}),
    "TIFF, LZW": ("lzw.tif", {"compression": "tiff_lzw"}),
    "JPEG": ("jpg", {"quality": 85}),
    "PNG": ("png", {"compress_level": 1}),
    "npy": ("npy", {}),
}
CHILD = """
import sys, fusedet
result = fusedet.predict(*sys.argv[1:4], *sys.argv[4:], draw=False, device="cpu")
print("detections", result.counts["detections"])
print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def write_image(folder: Path, name: str, side: int) -> Path:
    """Write a square image of repeated synthetic scenes."""
    ending, options = FORMATS[name]
    scene, _ = draw_image(np.random.default_rng(0), (500, 500))
    pixels = np.tile(scene, (-(-side // 500), -(-side // 500), 1))[:side, :side]
    file = folder / f"image.{ending}"
    if ending == "npy":
        np.save(file, pixels)
    else:
        Image.fromarray(pixels).save(file, **options)
    return file


def write_model(folder: Path) -> Path:
    """Write a checkpoint of random weights."""
    options = config.load("retinanet_tiny", ["data.size=[320,320]"])
    meta = {"config": options.to_yaml(), "names": '["a", "b"]', "category_ids": "[1, 2]"}
    file = folder / "model.safetensors"
    checkpoint.save_weights(file, build_detector(options, 2).state_dict(), meta)
    return file


def measure(model: Path, image: Path, tile: int) -> dict[str, float]:
    """Predict an image in a process of its own; return seconds and peak memory in GiB."""
    out = tempfile.mkdtemp(dir=image.parent)
    arguments = [str(model), str(image), f"out={out}", f"test.tiles.size={tile}", "test.batch=2", "data.workers=1"]
    environment = os.environ | {"FUSEDET_MAX_PIXELS": str(10**9)}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, *arguments], capture_output=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-2000:])
    peak = next(line.split() for line in done.stdout.decode().splitlines() if "VmHWM" in line)
    return {"seconds": round(time.perf_counter() - start, 1), "peak_gib": round(int(peak[1]) / 2**20, 3)}


def main() -> None:
    """Write, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=20_000, help="pixels of a side")
    parser.add_argument("--tile", type=int, default=2_000, help="pixels of a tile")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--limit", type=float, default=2.0, help="GiB")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        for name in options.formats:
            file = write_image(Path(folder), name, options.side)
            row = {"format": name, "file_mib": round(file.stat().st_size / 2**20), **measure(model, file, options.tile)}
            rows.append(row)
            print(json.dumps(row), flush=True)
            file.unlink()
    print("\n| format | file, MiB | seconds | peak memory, GiB |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['format']} | {row['file_mib']} | {row['seconds']} | {row['peak_gib']:.2f} |")
    sys.exit(any(row["peak_gib"] > options.limit for row in rows))


if __name__ == "__main__":
    main()
