"""Distribution of box centers: quadrant counts by hand, normalized densities, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusedet import cli
from fusedet.data.readers.auto import read_dataset
from fusedet.errors import InputError
from fusedet.visualization.object_centers import QUADRANTS, count_quadrants, estimate_density, plot_centers


def test_quadrants_by_hand() -> None:
    points = np.array([[0.1, 0.1], [0.49, 0.49], [0.5, 0.1], [0.2, 0.5], [0.5, 0.5], [1.0, 1.0]])
    assert count_quadrants(points).tolist() == [2, 1, 1, 2]
    assert count_quadrants(points[:0]).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("count", [1, 7, 5000])
def test_a_density_has_the_mean_1(count: int) -> None:
    """Holds at the borders too, where the points of this beta distribution concentrate."""
    points = np.random.default_rng(0).beta(0.4, 0.7, size=(count, 2))
    density = estimate_density(points)
    assert density.mean() == pytest.approx(1)
    assert (density >= 0).all()


def test_a_density_is_uniform_for_a_grid() -> None:
    steps = (np.arange(64) + 0.5) / 64
    points = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    inner = estimate_density(points)[10:-10, 10:-10]
    np.testing.assert_allclose(inner, 1, atol=0.02)


def test_a_density_is_highest_at_the_point() -> None:
    """x counts columns, y rows."""
    assert np.unravel_index(estimate_density(np.array([[0.9, 0.2]]), cells=10).argmax(), (10, 10)) == (2, 9)


def test_classes_without_annotations_have_no_panel(tmp_path: Path) -> None:
    points = np.random.default_rng(0).uniform(size=(20, 2))
    plot_centers([points, points[:0], points], ["a", "b", "c"], tmp_path / "two.png")
    plot_centers([points, points], ["a", "c"], tmp_path / "same.png")
    two, same = (np.asarray(Image.open(tmp_path / name)) for name in ("two.png", "same.png"))
    assert np.array_equal(two, same)
    with pytest.raises(InputError, match="no annotations"):
        plot_centers([points[:0]], ["a"], tmp_path / "none.png")


def test_the_command_counts_all_annotations_but_ignored_ones(
    capsys: pytest.CaptureFixture[str], scenes: Path, tmp_path: Path
) -> None:
    target = tmp_path / "centers.png"
    assert cli.run(["browse", f"data={scenes}", "--centers", f"out={target}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    dataset = read_dataset(scenes, "train")
    expected = {name: dict.fromkeys(QUADRANTS, 0) for name in dataset.names}
    for image in dataset:
        for (x1, y1, x2, y2), k, ignored in zip(image.boxes, image.labels, image.ignore):
            side = "left" if (x1 + x2) / 2 < image.width / 2 else "right"
            height = "upper" if (y1 + y2) / 2 < image.height / 2 else "lower"
            expected[dataset.names[k]][f"{height} {side}"] += not ignored
    assert {row["name"]: {q: row[q] for q in QUADRANTS} for row in result["classes"]} == expected
    assert all(row["objects"] == sum(row[q] for q in QUADRANTS) for row in result["classes"])
    assert min(Image.open(target).size) > 300


def test_refused(capsys: pytest.CaptureFixture[str], scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "there.png").touch()
    for out, text in (("there.png", "exists: nothing is overwritten"), ("a.bmp", "must end in .png, .pdf or .svg")):
        assert cli.run(["browse", f"data={scenes}", "--centers", f"out={tmp_path / out}"]) == 2
        assert text in capsys.readouterr().err
