"""Memory over thousands of steps and images, and of large annotations. The numbers are printed: make soak."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusedet import cli
from fusedet.data.synthetic import generate_dataset
from large import write
from resident import MIB, line, of_command, run
from shared_fixtures import SMALL

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc"),
]

PER_STEP, PER_IMAGE = 8192, 512
"""Bytes by which memory may grow at most, at the interval's upper end: a batch of these images is 36 KiB as uint8."""
WORKERS = 4
PROGRAM = Path(__file__).parents[1] / "annotated.py"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """200 small images, and the run of a training of 2,000 steps on them."""
    root = tmp_path_factory.mktemp("memory")
    data = generate_dataset(
        root / "data", images=208, seed=0, size=(64, 96), splits={"train": 200 / 208, "val": 8 / 208}
    )
    return data, root / "run"


def test_training_of_2000_steps(run_folder: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    data, out = run_folder
    arguments = ["train", "retinanet_tiny", f"data={data}", f"out={out}", *SMALL]
    arguments += ["data.workers=1", "train.batch=2", "train.epochs=20", "train.validate_every=5", "--json"]
    taken = of_command("loss", 5, arguments)
    fit = line(taken[:, 0], taken[:, 2])
    with capsys.disabled():
        print(f"\ntraining, {taken[-1, 0]} steps: {fit} steps; {taken[-1, 2] / MIB:.0f} MiB at the end")
    assert taken[-1, 0] >= 1990
    assert fit.high < PER_STEP


def test_prediction_of_20000_images(
    run_folder: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = run_folder
    if not (out / "best.safetensors").is_file():
        assert cli.run(["train", "retinanet_tiny", f"data={data}", f"out={out}", *SMALL, "--json"]) == 0
    images = sorted(p for p in (data / "train").rglob("*") if p.suffix in (".jpg", ".png"))
    (tmp_path / "many").mkdir()
    for i in range(20_000):
        one = images[i % len(images)]
        os.link(one, tmp_path / "many" / f"{i:05d}{one.suffix}")
    arguments = [
        "predict",
        out,
        tmp_path / "many",
        f"out={tmp_path / 'predicted'}",
        "--no-draw",
        "test.batch=4",
        "--json",
    ]
    taken = of_command("detect", 25, arguments)
    fit = line(taken[:, 1], taken[:, 2])
    with capsys.disabled():
        print(f"\nprediction, {taken[-1, 1]} images: {fit} images; {taken[-1, 2] / MIB:.0f} MiB at the end")
    assert taken[-1, 1] >= 19_900
    assert fit.high < PER_IMAGE


LIMITS = {"coco": (20, 1024), "coco with polygons": (20, 2048), "yolo": (40, 1024), "voc": (40, 1024)}
"""Seconds of one core and MiB; a file for each image takes longer than one for all."""


@pytest.mark.parametrize("form", LIMITS)
def test_a_million_boxes(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Measure time and memory of 100,000 images; what four workers add, beside what they add to 100 images.

    The memory is the process's own, without the mapped files of torch and other libraries. Forked workers, Linux's
    default, add at most 10 % of the memory of the process that holds the annotations; for spawned ones torch moves the
    annotations to shared memory once.
    """
    large, small = (
        run(PROGRAM, write(tmp_path / str(n), form.split()[0], n, 10, polygons="poly" in form), WORKERS, "fork,spawn")
        for n in (100_000, 100)
    )
    added = {method: large[method] - small[method] for method in ("fork", "spawn")}
    with capsys.disabled():
        more = ", ".join(f"{n / MIB:+.1f} MiB with {method}" for method, n in added.items())
        print(
            f"\n{form}: {large['images']} images, {large['boxes']} boxes in {large['cpu_s']:.1f} s of one core "
            f"({large['wall_s']:.1f} s by the clock), {large['peak'] / MIB:.0f} MiB at the most, "
            f"{(large['peak'] - large['empty']) / MIB:.0f} of them for reading and {large['libraries'] / MIB:.0f} "
            "mapped libraries; "
            f"held {large['dataset'] / MIB:.0f} MiB; {WORKERS} workers: {more} to {large['alone'] / MIB:.0f}"
        )
    assert (large["images"], large["boxes"]) == (100_000, 1_000_000)
    seconds, mebibytes = LIMITS[form]
    assert large["cpu_s"] <= seconds
    assert large["peak"] - large["libraries"] <= mebibytes * MIB
    assert added["fork"] <= 0.1 * large["alone"]
    assert added["spawn"] <= large["dataset"] + 0.1 * large["alone"]
