"""A full disk: whichever file cannot be written, the error is a StorageError, and no part of that file stays."""

import builtins
import errno
import importlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fusedet
from fusedet import evaluation, interop, visualization
from fusedet.ablation import report as ablation_report
from fusedet.api import tiles_help
from fusedet.api.browse import draw_predictions
from fusedet.api.coco_submission import write_submission
from fusedet.api.detector_evaluation import write_report
from fusedet.config import Config
from fusedet.data.readers.auto import read_dataset
from fusedet.errors import InputError, StorageError
from fusedet.interop.conversion import ConvertedCheckpoint
from fusedet.visualization import training_curves
from test_compare import guesses

pytestmark = pytest.mark.usefixtures("unrendered")


@dataclass
class Inputs:
    """A run, its data, an empty folder to write into, and results of two detectors."""

    run: Path
    data: Path
    out: Path
    a: Path
    b: Path
    patch: pytest.MonkeyPatch


@pytest.fixture
def inputs(trained: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    files = tmp_path / "a.json", tmp_path / "b.json"
    for file, recall in zip(files, (0.4, 0.9), strict=True):
        file.write_text(json.dumps(guesses(scenes, "val", recall=recall, spread=0.05, seed=1)))
    (tmp_path / "out").mkdir()
    return Inputs(trained, scenes, tmp_path / "out", *files, monkeypatch)


def fill_disk(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let no file whose name contains `name` be written, whichever function opens it."""
    original = builtins.open

    def open_file(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if name in os.path.basename(str(file)) and set(mode) & set("wxa"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return original(file, mode, *args, **options)

    patch.setattr(builtins, "open", open_file)
    patch.setattr(io, "open", open_file)  # pathlib's and zipfile's


def plot_training(own: Inputs) -> None:
    training_curves.plot_training(own.run / "metrics.csv", own.out / "training.png")


def write_run_report(own: Inputs) -> None:
    dataset = read_dataset(own.data, "val")
    results = evaluation.load_results(own.b, dataset)
    write_report(dataset, results, dict.fromkeys(("AP", "APs", "APm", "APl", "mask_AP"), 0.5), own.out, title="run")


def measure_tiles(own: Inputs) -> None:
    own.patch.setattr(tiles_help, "_detect", lambda *_: ([], 1.0))
    own.patch.setattr(tiles_help, "check_tile_size", lambda *_: None)
    tiles = {"tiles": {"size": 64}}
    fusedet.measure_tiles(own.run, test=tiles, resamples=40, out=own.out / "tiles")


def compare(own: Inputs) -> None:
    fusedet.compare(own.a, own.b, data={"path": own.data}, resamples=40, out=own.out / "compared")


def check_dataset(own: Inputs) -> None:
    fusedet.check_dataset(data=own.data, report=own.out / "page.html")


def browse(own: Inputs) -> None:
    fusedet.browse(data={"path": own.data, "workers": 0}, images=1, out=own.out / "browse.webp")


def draw_grid(own: Inputs) -> None:
    draw_predictions(fusedet.load(own.run), sorted((own.data / "val").iterdir())[:1], own.out / "predictions.jpg")


def draw_copies(own: Inputs) -> None:
    image = next((own.data / "val").iterdir())
    fusedet.predict(own.run, image, out=own.out / "predicted", data={"workers": 0})


def submit(own: Inputs) -> None:
    write_submission({"bbox": []}, "val2017", "run", own.out)


def convert_weights(own: Inputs) -> None:
    converted = ConvertedCheckpoint(Config(), {"w": torch.zeros(1)}, ["cat"], [1], [])
    own.patch.setattr(interop, "convert_checkpoint", lambda *_: converted)
    fusedet.convert_weights("model.pth", own.out)


def summarize_ablation(own: Inputs) -> None:
    own.patch.setattr(ablation_report, "draw_plots", lambda *_: {})
    for name in ("format_markdown", "format_csv"):
        own.patch.setattr(ablation_report, name, lambda _: "text")
    own.patch.setattr(ablation_report, "make_report_page", lambda *_: "text")
    ablation_report.write_ablation_report({}, own.out)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (plot_training, "training.png"),
        (write_run_report, "val.bbox.json"),
        (write_run_report, "val.segm.json"),
        (write_run_report, "worst.png"),
        (measure_tiles, "tiles.bbox.json"),
        (compare, "images.png"),
        (check_dataset, "page.html"),
        (browse, "browse.webp"),
        (draw_grid, "predictions.jpg"),
        (draw_copies, ".jpg"),
        (submit, "results.json"),
        (submit, "results.zip"),
        (convert_weights, "config.yaml"),
        (summarize_ablation, "table.md"),
        (summarize_ablation, "table.csv"),
        (summarize_ablation, "report.html"),
    ],
)
def test_a_file_that_cannot_be_written(inputs: Inputs, write: Callable[[Inputs], None], name: str) -> None:
    fill_disk(inputs.patch, name)
    with pytest.raises(StorageError, match=f"{name} cannot be written: No space left on device") as caught:
        write(inputs)
    assert caught.value.exit_code == 4
    assert not [file for file in inputs.out.rglob("*") if name in file.name]


def validate(own: Inputs) -> None:
    fusedet.validate(own.b, data={"path": own.data}, out=own.out / "new" / "val")


def measure_new_tiles(own: Inputs) -> None:
    fusedet.measure_tiles(own.run, test={"tiles": {"size": 64}}, out=own.out / "new" / "tiles")


def benchmark(own: Inputs) -> None:
    fusedet.benchmark(own.run, formats="eager", out=own.out / "new" / "benchmark")


@pytest.mark.parametrize(
    ("work", "module", "function"),
    [
        (validate, "validate", "evaluate_results"),
        (measure_new_tiles, "tiles_help", "_detect"),
        (benchmark, "benchmark", "measure_engines"),
    ],
)
def test_the_directory_is_created_before_the_work(
    inputs: Inputs, work: Callable[[Inputs], None], module: str, function: str
) -> None:
    """One that cannot be created loses no result, and a failure leaves no empty directories."""
    calls: list[list[str]] = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append([path.parent.name for path in inputs.out.rglob("*") if path.parent.name == "new"])
        raise RuntimeError("failed")

    inputs.patch.setattr(importlib.import_module(f"fusedet.api.{module}"), function, fail)
    inputs.patch.setattr(tiles_help, "check_tile_size", lambda *_: None)
    with pytest.raises(RuntimeError, match="failed"):
        work(inputs)
    assert calls == [["new"]]
    assert not list(inputs.out.iterdir())
    (inputs.out / "new").write_text("no directory")
    with pytest.raises(InputError, match=r"out=.* cannot be created: Not a directory"):
        work(inputs)
    assert len(calls) == 1


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp"])
def test_images_have_the_format_of_their_suffix(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"image{suffix}"
    visualization.save_image(Image.new("RGB", (8, 8)), file)
    with Image.open(file) as image:
        assert image.format == {".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix, suffix[1:].upper())
