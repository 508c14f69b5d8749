"""The schedule of the learning tests, and what their script reports of a run; docs/learning.md has the results."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from fakes import load_benchmark
from fusedet import config
from fusedet.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def learning() -> ModuleType:
    return load_benchmark("learning")


def test_every_detector_learns_under_one_recipe(learning: ModuleType, tmp_path: Path) -> None:
    """All small configs are included; their runs differ in pyramid, neck, head and stages only."""
    assert {f"{name}_tiny" for name in learning.LEAST} == {name for name in config.names() if name.endswith("_tiny")}
    recipes = [learning.recipe(name, tmp_path, tmp_path) for name in learning.LEAST]
    assert {c.train.policy for c in recipes} == {"cosine"}
    # a schedule's name only names the values beside it, and a cosine has no milestones
    assert len({c.train.replace(schedule=None, milestones=()) for c in recipes}) == 1
    assert len({c.data for c in recipes}) == 1
    backbones = [{key: value for key, value in c.model.backbone.items() if key != "trident_stages"} for c in recipes]
    assert all(backbone == backbones[0] for backbone in backbones)
    assert {c.model.pyramid.channels for c in recipes} == {64}
    assert not any(c.model.backbone["pretrained"] for c in recipes)


def write_run(folder: Path, name: str, scores: dict[str, float], *overrides: str) -> Path:
    """A finished run of three logged rows."""
    folder.mkdir()
    (folder / "config.yaml").write_text(config.load(f"{name}_tiny", overrides).to_yaml())
    rows = ["epoch,step,images_per_second", "1,10,8.0", "1,15,4.0", "2,25,8.0"]
    (folder / "speed.csv").write_text("\n".join(rows) + "\n")
    (folder / "metrics.json").write_text(json.dumps(scores))
    return folder


def test_metrics_of_a_run_by_hand(learning: ModuleType, tmp_path: Path) -> None:
    """10, 5 and 10 steps of 4 images, at 8, 4 and 8 images per second: 5 + 5 + 5 seconds."""
    run = write_run(tmp_path / "run", "fcos", {"AP": 0.61239, "AP50": 0.9})
    assert learning.summarize_run("fcos", run) == {
        "detector": "fcos",
        "AP": 0.612,
        "AP50": 0.9,
        "least_AP50": learning.LEAST["fcos"]["AP50"],
        "reached": True,
        "seconds": 15,
        "images_per_second": 6.7,
    }


@pytest.mark.parametrize(("boxes", "masks", "reached"), [(0.0, 0.0, True), (-0.01, 0.0, False), (0.0, -0.01, False)])
def test_both_values_must_be_reached(
    learning: ModuleType, tmp_path: Path, boxes: float, masks: float, reached: bool
) -> None:
    least = learning.LEAST["mask_rcnn"]
    scores = {"AP": 0.1, "AP50": least["AP50"] + boxes, "mask_AP": 0.1, "mask_AP50": least["mask_AP50"] + masks}
    assert learning.summarize_run("mask_rcnn", write_run(tmp_path / "run", "mask_rcnn", scores))["reached"] is reached


def test_finished_runs_are_reused_unless_the_recipe_differs(learning: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "vfnet", "vfnet", {}, *learning.COMMON, "data=elsewhere")
    assert learning.finished("vfnet", tmp_path, tmp_path)
    assert not learning.finished("fcos", tmp_path, tmp_path)
    write_run(tmp_path / "fcos", "fcos", {}, *learning.COMMON, "train.epochs=8")
    with pytest.raises(InputError, match="another recipe"):
        learning.finished("fcos", tmp_path, tmp_path)


def test_documented_minimums_are_those_of_the_script(learning: ModuleType) -> None:
    """Each detector has a row in docs/learning.md with its minimums, below the measured values."""
    page = (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")
    for name, least in learning.LEAST.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}_tiny` |"))
        _, box, least_box, mask, least_mask, *_ = [
            float(cell) if cell.strip() else None for cell in row.strip("|").split("|")[1:]
        ]
        assert (least_box, least_mask) == (least["AP50"], least.get("mask_AP50"))
        assert box is not None
        assert 0.03 < box - least["AP50"] < 0.1
        assert (mask is None) == (least_mask is None)
