"""The synthetic dataset: format, exactness of masks, determinism."""

import colorsys
import json

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from fusedet.data import shape_drawing, synthetic
from fusedet.errors import InputError

pytestmark = pytest.mark.usefixtures("unrendered")

COUNT = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synthetic.generate_dataset(tmp_path_factory.mktemp("demo") / "shapes", images=COUNT)


def load(folder, split):
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_coco_format(folder):
    train, val = load(folder, "train"), load(folder, "val")
    assert (len(train["images"]), len(val["images"])) == (16, 4)
    assert [c["name"] for c in train["categories"]] == list(shape_drawing.SHAPES)
    assert not {i["id"] for i in train["images"]} & {i["id"] for i in val["images"]}
    for split, data in (("train", train), ("val", val)):
        assert len({a["id"] for a in data["annotations"]}) == len(data["annotations"])
        for path in data["images"]:
            with Image.open(folder / split / path["file_name"]) as image:
                assert image.size == (path["width"], path["height"])
                assert 224 <= min(image.size) <= max(image.size) <= 288


def test_boxes_and_areas_are_those_of_the_masks(folder):
    for data in (load(folder, "train"), load(folder, "val")):
        for a in data["annotations"]:
            mask = coco_mask.decode(a["segmentation"])
            assert coco_mask.toBbox(a["segmentation"]).tolist() == a["bbox"]
            assert mask.sum() == a["area"] > 0


def test_masks_of_an_image_do_not_overlap(folder):
    data = load(folder, "train")
    for path in data["images"]:
        own = [coco_mask.decode(a["segmentation"]) for a in data["annotations"] if a["image_id"] == path["id"]]
        assert len(own) <= shape_drawing.MAX_INSTANCES
        assert not own or np.sum(own, axis=0).max() == 1


def test_masks_match_the_drawing():
    """Colors step at the borders of masks, far more than elsewhere."""
    for seed in range(5):
        pixels, instances = shape_drawing.draw_image(np.random.default_rng(seed), (224, 288))
        for _, mask in instances:
            across = mask[:, 1:] != mask[:, :-1]
            step = np.abs(np.diff(pixels.astype(float), axis=1)).sum(2)
            assert step[across].mean() > 3 * np.median(step)


def test_sizes_classes_overlap_and_empty_images(folder):
    data = load(folder, "train")
    sides = np.array([max(a["bbox"][2:]) for a in data["annotations"]])
    assert sides.min() < 14
    assert sides.max() > 128
    assert 0.3 < (sides < 40).mean() < 0.7, "log-uniform: about as many small as large ones"
    assert {a["category_id"] for a in data["annotations"]} == set(range(1, 7))
    with_objects = {a["image_id"] for a in data["annotations"]}
    assert 1 <= len(data["images"]) - len(with_objects) <= 5


@pytest.mark.parametrize("name", list(shape_drawing.SHAPES))
def test_shapes_have_their_areas(name):
    """Area of each shape of circumradius about 1, by its formula."""
    areas = {
        "circle": np.pi * 0.95**2,
        "ring": np.pi * (0.96**2 - 0.52**2),
        "square": 1.48**2,
        "triangle": 3 * np.sqrt(3) / 4,
        "cross": 4 * 0.94 * 0.26 * 2 - 0.52**2,
        "star": 5 * 0.45 * np.sin(np.pi / 5),
    }
    x, y = np.meshgrid(*[np.linspace(-1.2, 1.2, 1201)] * 2)
    assert (shape_drawing.SHAPES[name](x, y) <= 0).mean() * 2.4**2 == pytest.approx(areas[name], rel=0.01)


def test_deterministic(tmp_path, folder):
    again = synthetic.generate_dataset(tmp_path / "again", images=COUNT)
    assert contents(again) == contents(folder)
    other = synthetic.generate_dataset(tmp_path / "other", images=5, seed=1)
    assert (other / "train/000000.jpg").read_bytes() != (folder / "train/000000.jpg").read_bytes()


def test_only_the_same_dataset_is_reused(tmp_path):
    path = synthetic.generate_dataset(tmp_path / "a", images=4)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    assert synthetic.generate_dataset(path, images=4) == path
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before
    with pytest.raises(InputError, match="exists and is not the requested synthetic dataset"):
        synthetic.generate_dataset(path, images=5)
    strange = tmp_path / "b"
    strange.mkdir()
    (strange / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        synthetic.generate_dataset(strange, images=4)
    assert (strange / "thesis.txt").read_text() == "mine"
    with pytest.raises(InputError, match="exists"):
        synthetic.generate_dataset(strange / "thesis.txt", images=4)


def test_empty_folder_and_leftovers_are_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a.part").mkdir()
    (tmp_path / "a.part" / "half").write_text("left by an interrupted run")
    path = synthetic.generate_dataset(tmp_path / "a", images=4, splits={"train": 0.5, "val": 0.25, "test": 0.25})
    assert len(load(path, "test")["images"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "wrong",
    [{"images": 1}, {"seed": -1}, {"size": (300, 200)}, {"size": (10, 20)}, {"splits": {"train": 1, "val": 0}}]
    + [{"frequencies": []}, {"frequencies": [1, 0]}],
)
def test_wrong_options(tmp_path, wrong):
    with pytest.raises(InputError):
        synthetic.generate_dataset(tmp_path / "a", **wrong)
    assert not (tmp_path / "a").exists()


def test_sizes_of_a_given_range_are_log_uniform(tmp_path):
    """Without masks areas are those of the boxes; each octave from 4 to 64 pixels has as many objects."""
    options = {"images": 80, "size": (96, 96), "splits": {"val": 1}, "diameters": (4.4, 71), "masks": False}
    path = synthetic.generate_dataset(tmp_path / "a", **options)
    annotations = load(path, "val")["annotations"]
    for a in annotations:
        assert "segmentation" not in a
        assert a["area"] == a["bbox"][2] * a["bbox"][3]
    octaves = np.bincount(np.log2([np.sqrt(a["area"]) for a in annotations]).astype(int), minlength=7)
    assert octaves[2:6].min() > 0.7 * len(annotations) / 4
    assert octaves[:2].sum() + octaves[6:].sum() < 0.05 * len(annotations)
    assert synthetic.generate_dataset(path, **options) == path
    with pytest.raises(InputError, match="exists and is not the requested"):
        synthetic.generate_dataset(path, **options | {"masks": True})
    with pytest.raises(InputError, match="diameters must be the smallest and the largest"):
        synthetic.generate_dataset(tmp_path / "b", size=(64, 64), diameters=(4, 100))


def test_frequencies_give_the_classes_and_their_shares(tmp_path):
    """Every seventh class has the first one's shape in another hue; a class is as frequent as its weight says."""
    path = synthetic.generate_dataset(
        tmp_path / "a", images=40, size=(64, 64), diameters=(10, 20), frequencies=[8, *[1] * 12]
    )
    data = load(path, "train")
    assert [c["name"] for c in data["categories"]][5:] == [
        "cross",
        *(f"{s} 2" for s in shape_drawing.SHAPES),
        "circle 3",
    ]
    counts = np.bincount([a["category_id"] for a in data["annotations"]], minlength=14)[1:]
    assert 0.25 < counts[0] / counts.sum() < 0.55
    hues = []
    for label in (0, 6, 12):
        frequencies = [1e-9] * 13
        frequencies[label] = 1.0
        pixels, instances = shape_drawing.draw_image(np.random.default_rng(1), (64, 64), frequencies=frequencies)
        assert {own for own, _ in instances} == {label}
        color = pixels[instances[0][1]].mean(0) / 255
        hues.append(colorsys.rgb_to_hsv(*color)[0])
    for hue, expected in zip(hues, (0, 1 / 3, 2 / 3)):
        assert abs((hue - expected + 0.5) % 1 - 0.5) < shape_drawing.HUE_SPREAD + 0.02
