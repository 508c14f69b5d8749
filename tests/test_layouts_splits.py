"""A share of the images as validation, classes selected and renamed, EXIF orientation, and conversion of all of it."""

import json
import shlex
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fusedet
from fusedet import config
from fusedet.cli import app
from fusedet.config.schema import Data
from fusedet.data import annotation_cleaning as cleaning
from fusedet.data.readers.auto import list_splits, read_dataset
from fusedet.data.splits import hold_out, read_split, select_classes
from fusedet.data.usable_targets import count_annotations
from fusedet.data.validation import check_image_headers
from fusedet.errors import InputError
from fusedet.evaluation import load_results
from layouts import CLASSES, IMAGES, LAYOUTS, coco, contents, put_images, put_xml, write_json
from shared_fixtures import SMALL
from tiny import image, write_coco, write_yolo

TRAIN = [*SMALL, "train.epochs=1", "train.batch=2", "data.workers=0", "model.backbone.pretrained=false", "device=cpu"]


def write_many(root: Path, objects: dict[str, list[str]]) -> Path:
    """A COCO dataset of one split: the classes of the objects of each image."""
    names = sorted({name for own in objects.values() for name in own})
    images, annotations = [], []
    for i, (stem, own) in enumerate(objects.items(), 1):
        images.append({"id": i, "file_name": f"{stem}.jpg", "width": 40, "height": 30})
        rng = np.random.default_rng(i)
        for name in own:
            x, y = rng.integers(0, 20, 2).tolist()
            row = {"id": len(annotations) + 1, "image_id": i, "category_id": names.index(name), "bbox": [x, y, 12, 10]}
            annotations.append(row)
        image(root / "images" / f"{stem}.jpg")
    categories = [{"id": k, "name": name} for k, name in enumerate(names)]
    write_json(root / "result.json", {"images": images, "annotations": annotations, "categories": categories})
    return root


def stems(dataset: fusedet.data.dataset.DetectionDataset) -> list[str]:
    return [r.path.stem for r in dataset]


# -- a share


def test_a_share_is_stratified(tmp_path: Path) -> None:
    objects = {f"{i:03d}": ["car"] * (1 + i % 3) + ["bus"] * (i % 4 == 0) + ["owl"] * (i % 20 == 7) for i in range(100)}
    objects |= {f"empty{i}": [] for i in range(20)}
    dataset = read_dataset(write_many(tmp_path, objects), "train")
    held_out = hold_out(dataset, 0.2, seed=0)
    assert held_out.sum() == 24
    for name, label in (("bus", 25), ("car", 100), ("owl", 5)):
        k = dataset.names.index(name)
        has = np.array([k in r.labels for r in dataset])
        assert has.sum() == label
        assert (held_out & has).sum() == pytest.approx(0.2 * label, abs=0.5)
    empty = np.array([not len(r.labels) for r in dataset])
    assert (held_out & empty).sum() == 4
    assert (held_out == hold_out(dataset, 0.2, seed=0)).all()
    assert (held_out != hold_out(dataset, 0.2, seed=1)).any()


def test_a_class_of_one_image_is_trained_on(tmp_path: Path) -> None:
    root = write_many(tmp_path, {**{str(i): ["car"] for i in range(9)}, "x": ["owl"]})
    for seed in range(5):
        held_out = hold_out(read_dataset(root, "train"), 0.3, seed)
        assert held_out.sum() == 3
        assert not held_out[9]


@pytest.mark.parametrize(("images", "share", "expected"), [(2, 0.01, 1), (2, 0.99, 1), (5, 0.2, 1), (10, 0.25, 2)])
def test_both_sides_have_images(tmp_path: Path, images: int, share: float, expected: int) -> None:
    dataset = read_dataset(write_many(tmp_path, {str(i): ["car"] for i in range(images)}), "train")
    assert hold_out(dataset, share, 0).sum() == expected
    with pytest.raises(InputError, match=r"has 1 image: data\.val=0\.5 needs at least 2"):
        hold_out(read_dataset(write_many(tmp_path / "one", {"a": ["car"]}), "train"), 0.5, 0)


def test_augmented_copies_stay_together(tmp_path: Path) -> None:
    copies = {f"{i}_jpg.rf.{10 * i + k:032x}": ["car"] for i in range(10) for k in range(3)}
    dataset = read_dataset(write_many(tmp_path, copies), "train")
    held_out = hold_out(dataset, 0.2, 0)
    assert held_out.sum() == 6
    sides = [
        {stem.split(".")[0] for stem, is_held in zip(stems(dataset), held_out, strict=True) if is_held == side}
        for side in (True, False)
    ]
    assert len(sides[0]) == 2
    assert not sides[0] & sides[1]


def test_the_split_of_a_config(tmp_path: Path) -> None:
    put_images(tmp_path / "few" / "images")
    put_xml(tmp_path / "few" / "annotations")
    data = Data(path=str(tmp_path / "few"), val=0.25)
    train, val = read_split(data, data.train), read_split(data, data.val_split)
    assert (len(train), len(val)) == (3, 1)
    assert contents(train) | contents(val) == IMAGES
    assert train.names == val.names == tuple(CLASSES)
    assert "left by data.val=0.25" in train.source
    assert "held out by data.val=0.25" in val.source
    assert len(val.labels), "one image with objects, not the one without"
    many = Data(path=str(write_many(tmp_path / "many", {str(i): ["car"] for i in range(12)})), val=0.25)
    assert len({tuple(stems(read_split(many.replace(split_seed=seed), "val"))) for seed in range(8)}) > 1
    assert len(read_split(data.replace(val="train"), "train")) == 4


def test_problems_are_those_of_the_part_and_its_classes(tmp_path: Path) -> None:
    """A negative box of a cat in b, an empty one of a dog in c, and an annotation of no image."""
    put_images(tmp_path / "train")
    content = coco()
    content["annotations"][2]["bbox"][2:] = [-5, -5]
    content["annotations"][4]["bbox"][2:] = [0, 3]
    content["annotations"].append(content["annotations"][0] | {"id": 9, "image_id": 99})
    write_json(tmp_path / "annotations" / "instances_train.json", content)
    data = Data(path=str(tmp_path), val=0.25)
    boxes = {cleaning.NEGATIVE: ("b", "cat"), cleaning.NO_AREA: ("c", "dog")}
    for seed in range(4):
        for split in ("train", "val"):
            part = read_split(data.replace(split_seed=seed), split)
            own = {text: 1 for text, (stem, _) in boxes.items() if stem in stems(part)}
            assert part.problems == own | ({cleaning.NO_IMAGE: 1} if split == "train" else {})
            assert all(part.examples[text].endswith(f"{boxes[text][0]}.jpg") for text in own)
            assert count_annotations(part) == sum(len(IMAGES[stem][2]) for stem in stems(part))
    whole = read_split(Data(path=str(tmp_path), classes=["dog"]), "train")
    assert whole.problems == {cleaning.NO_IMAGE: 1, cleaning.NO_AREA: 1}


@pytest.mark.parametrize("value", ["1.5", "0.0", "-0.2", "1"])
def test_shares_out_of_range_are_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"data\.val=.* must be a split, or a share above 0 and below 1"):
        config.load("retinanet_tiny", [f"data.val={value}"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a share, with classes joined, selected and in another order."""
    root = tmp_path_factory.mktemp("run")
    objects = {f"{i:02d}": [("car", "truck", "bus", "owl")[i % 4]] * 2 for i in range(20)}
    write_many(root / "data", objects)
    arguments = [f"data.path={root / 'data'}", "data.val=0.2", "data.rename={truck: car}", "data.classes=[car,bus]"]
    fusedet.train("retinanet_tiny", *TRAIN, *arguments, f"out={root / 'run'}", quiet=True, say=lambda text: None)
    return root


@pytest.mark.slow
def test_a_run_writes_its_split(run: Path) -> None:
    split = json.loads((run / "run" / "split.json").read_text())
    assert (split["share"], split["seed"]) == (0.2, 0)
    assert (len(split["train"]), len(split["val"])) == (16, 4)
    everything = {str(file) for file in (run / "data" / "images").iterdir()}
    assert set(split["train"]) | set(split["val"]) == everything
    ids = {r["image_id"] for r in json.loads((run / "run" / "val.bbox.json").read_text())}
    assert ids <= {int(Path(file).stem) + 1 for file in split["val"]}


@pytest.mark.slow
def test_a_resumed_run_has_the_same_split(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run / "run", tmp_path / "run"))
    before = (copy / "split.json").read_text()
    fusedet.train(copy, "train.epochs=2", "device=cpu", resume=True, quiet=True, say=lambda text: None)
    assert (copy / "split.json").read_text() == before
    with pytest.raises(InputError, match="cannot be resumed: its train images or boxes were not those"):
        fusedet.train(
            copy, "train.epochs=3", "data.split_seed=1", "device=cpu", resume=True, quiet=True, say=lambda text: None
        )


@pytest.mark.slow
def test_commands_follow_the_classes_of_the_run(run: Path, tmp_path: Path) -> None:
    checked = fusedet.validate(run / "run", "device=cpu", out=tmp_path / "val", say=lambda text: None)
    stored = json.loads((run / "run" / "metrics.json").read_text())
    assert checked.metrics["stamp"]["data"] == stored["stamp"]["data"]
    assert checked.metrics["stamp"]["images"] == 4
    predictor = fusedet.load(run / "run", device="cpu")
    assert predictor.names == ("car", "bus")
    assert predictor.category_ids == (1, 0)  # the dataset's own: bus 0, car 1, owl 2, truck 3
    report = fusedet.compare(run / "run", run / "run", out=tmp_path / "compare", resamples=40).report
    assert report["split"] == "val"
    assert {row["name"] for row in report["classes"]} == {"car", "bus"}
    assert fusedet.check_dataset(config=run / "run").reports["val"].statistics["images"] == 4


# -- classes


def test_classes_are_renamed_joined_and_selected(tmp_path: Path) -> None:
    root = write_many(tmp_path, {"a": ["bus", "truck", "owl"], "b": ["car"], "c": ["owl"]})
    whole = read_dataset(root, "train")
    assert whole.names == ("bus", "car", "owl", "truck")
    joined = select_classes(whole, [], {"truck": "car"})
    assert joined.names == ("bus", "car", "owl")
    assert joined.category_ids == (0, 1, 2)
    assert [joined.names[k] for k in joined.labels] == ["bus", "car", "owl", "car", "owl"]
    chosen = select_classes(whole, ["car", "bus"], {"truck": "car"})
    assert chosen.names == ("car", "bus")
    assert chosen.category_ids == (1, 0)
    assert [[chosen.names[k] for k in r.labels] for r in chosen] == [["bus", "car"], ["car"], []]
    for before, after in zip(whole, chosen, strict=True):
        keep = [whole.names[k] != "owl" for k in before.labels]
        np.testing.assert_array_equal(after.boxes, before.boxes[keep])
    assert select_classes(whole, [], {}) is whole
    swapped = select_classes(whole, [], {"car": "bus", "bus": "car"})
    assert swapped.names == ("car", "bus", "owl", "truck")


@pytest.mark.parametrize(
    ("classes", "rename", "message"),
    [
        (["cat"], {}, r"data\.classes: .*unknown class 'cat': did you mean 'car'\?"),
        ([], {"truk": "car"}, r"data\.rename: .*unknown class 'truk': did you mean 'truck'\?"),
        (["truck"], {"truck": "lorry"}, r"data\.classes: .*unknown class 'truck'"),
    ],
)
def test_unknown_classes_are_refused(tmp_path: Path, classes: list[str], rename: dict[str, str], message: str) -> None:
    dataset = read_dataset(write_many(tmp_path, {"a": ["truck", "car"]}), "train")
    with pytest.raises(InputError, match=message):
        select_classes(dataset, classes, rename)


# -- EXIF


def turned(folder: Path, name: str) -> None:
    """An image that is stored 40 wide and 30 high and shown 30 wide and 40 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image(folder / name, 40, 30, exif=exif)


def test_boxes_on_stored_pixels_are_noticed(tmp_path: Path) -> None:
    content = coco()
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:2]
    write_json(tmp_path / "train.json", content)
    turned(tmp_path / "images", "a.jpg")
    (message,) = check_image_headers(read_dataset(tmp_path, "train"))
    assert message.endswith(
        "a.jpg is 30x40 pixels, but its annotation says 40x30: its boxes were made on the pixels as stored, before "
        "EXIF turns them; add data.exif=false"
    )
    assert not check_image_headers(read_dataset(tmp_path, "train", exif=False))
    # without an annotated size the boxes tell it
    content["images"][0] |= {"width": None, "height": None}
    content["annotations"][0]["bbox"] = [30, 2, 8, 20]
    write_json(tmp_path / "train.json", content)
    (message,) = check_image_headers(read_dataset(tmp_path, "train"))
    assert message.endswith("as stored (40x30), before EXIF turns them; add data.exif=false")
    assert not check_image_headers(read_dataset(tmp_path, "train", exif=False))


@pytest.mark.parametrize("layout", ["LabelImg", "LabelMe, rectangles", "CVAT for images, boxes", "CVAT)", "kangaroo"])
def test_boxes_on_stored_pixels_are_noticed_in_every_format_with_sizes(tmp_path: Path, layout: str) -> None:
    name = next(name for name in LAYOUTS if layout in name and not name.startswith(("YOLO", "Darknet")))
    LAYOUTS[name][1](tmp_path)
    file = next(tmp_path.rglob("a.jpg"))
    turned(file.parent, file.name)
    (message,) = check_image_headers(read_dataset(tmp_path, "train"))
    assert message.endswith("before EXIF turns them; add data.exif=false")
    assert not check_image_headers(read_dataset(tmp_path, "train", exif=False))


def test_boxes_on_turned_pixels_are_right(tmp_path: Path) -> None:
    turned(tmp_path / "images" / "train", "a.jpg")
    write_yolo(tmp_path)
    turned(tmp_path / "images" / "train", "a.jpg")
    assert read_dataset(tmp_path, "train")[0].boxes.tolist() == [[7.5, 10, 22.5, 30]]
    assert read_dataset(tmp_path, "train", exif=False)[0].boxes.tolist() == [[10, 7.5, 30, 22.5]]
    assert not check_image_headers(read_dataset(tmp_path, "train"))


def test_images_are_loaded_as_stored(tmp_path: Path) -> None:
    from fusedet.data.image_decoding import read_image

    turned(tmp_path, "a.jpg")
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:15] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    stored, shown = read_image(tmp_path / "a.png", exif=False), read_image(tmp_path / "a.png")
    assert torch.equal(stored, torch.from_numpy(pixels).permute(2, 0, 1))
    assert tuple(shown.shape) == (3, 40, 30)
    assert torch.equal(stored.rot90(-1, (1, 2)), shown)


# -- conversion


def test_absent_splits_are_left_out(tmp_path: Path) -> None:
    file = write_yolo(
        tmp_path / "src", yaml="train: ../images/train\nval: ../valid/images\ntest: ../test/images\nnames: [dog, cat]"
    )
    done = fusedet.convert_dataset(file, tmp_path / "dst", "coco")
    assert list(done.splits) == ["train"]
    assert [note.split(" is left out")[0] for note in done.notes] == ["the split 'val'", "the split 'test'"]
    assert "src/valid/images does not exist" in done.notes[0]
    with pytest.raises(InputError, match="valid/images does not exist"):
        fusedet.convert_dataset(file, tmp_path / "x", "coco", splits=["val"])
    with pytest.raises(InputError, match="has no split 'tets'"):
        fusedet.convert_dataset(file, tmp_path / "x", "coco", splits=["tets"])
    assert not (tmp_path / "x").exists()


def test_a_share_replaces_the_validation_split_with_a_note(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_coco(tmp_path / "src", split=split)
    done = fusedet.convert_dataset(tmp_path / "src", tmp_path / "dst", "coco", "data.val=0.5")
    assert {split: counts["images"] for split, counts in done.splits.items()} == {"train": 1, "val": 1}
    (note,) = done.notes
    assert (
        note == f"the split 'val' of {tmp_path / 'src'} is left out: data.val=0.5 makes one of that name from 'train'"
    )
    done = fusedet.convert_dataset(tmp_path / "src", tmp_path / "part", "coco", "data.val=0.5", splits=["train"])
    assert not done.notes


@pytest.mark.parametrize("to", ["coco", "voc", "yolo"])
def test_the_next_command_works(tmp_path: Path, to: str) -> None:
    objects = {f"{i:02d}": [("car", "truck", "bus")[i % 3]] for i in range(12)}
    write_many(tmp_path / "src", objects)
    arguments = [
        "convert",
        "data",
        str(tmp_path / "src"),
        str(tmp_path / "my dst"),
        "--to",
        to,
        "data.rename={truck: car}",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    *_, line = result.output.strip().splitlines()
    assert line.startswith("next: fusedet train retinanet_r50 data=")
    assert list(list_splits(tmp_path / "my dst")) == ["train"]
    arguments = [word for word in shlex.split(line)[3:] if not word.startswith("out=")]
    checked = fusedet.check_dataset(*arguments[1:])
    assert checked.ok
    assert Counter(
        {name: n for r in checked.reports.values() for name, n in r.statistics["classes"].items()}
    ).keys() == {"bus", "car"}
    shared = fusedet.convert_dataset(tmp_path / "src", tmp_path / "both", to, "data.val=0.25")
    assert {name: counts["images"] for name, counts in shared.splits.items()} == {"train": 9, "val": 3}
    assert shared.next_command.endswith("both out=runs/a")
    only = fusedet.convert_dataset(tmp_path / "both", tmp_path / "one", to, splits=["val"])
    assert list(only.splits) == ["val"]
    assert only.next_command.endswith("one --split val")


def test_conversion_without_exif_says_so(tmp_path: Path) -> None:
    content = coco()
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:2]
    write_json(tmp_path / "src" / "train.json", content)
    turned(tmp_path / "src" / "images", "a.jpg")
    done = fusedet.convert_dataset(tmp_path / "src", tmp_path / "dst", "yolo", data={"exif": False})
    assert "data.exif=false" in done.next_command
    assert "read them with data.exif=false" in done.notes[0]
    np.testing.assert_allclose(
        read_dataset(tmp_path / "dst", "train", exif=False).boxes,
        read_dataset(tmp_path / "src", "train").boxes,
        atol=1e-6,
    )
    with pytest.raises(InputError, match=r"train\.epochs=3 changes nothing for a conversion"):
        fusedet.convert_dataset(tmp_path / "src", tmp_path / "x", "yolo", "train.epochs=3")


# -- results with the dataset's own ids


def test_results_carry_text_ids(tmp_path: Path) -> None:
    content = coco()
    for row in content["images"]:
        row["id"] = f"frame_{row['id']}"
    for row in content["annotations"]:
        row["image_id"] = f"frame_{row['image_id']}"
    write_json(tmp_path / "data" / "val.json", content)
    put_images(tmp_path / "data" / "images")
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in content["annotations"]
    ]
    write_json(tmp_path / "results.json", perfect)
    scored = fusedet.validate(tmp_path / "results.json", f"data.path={tmp_path / 'data'}", out=tmp_path / "out")
    assert scored.metrics["AP"] == pytest.approx(1)
    written = json.loads((tmp_path / "out" / "val.bbox.json").read_text())
    assert {r["image_id"] for r in written} == {"frame_1", "frame_2", "frame_3"}
    assert load_results(tmp_path / "out" / "val.bbox.json", read_dataset(tmp_path / "data", "val"))[0]["image_id"] == 1
    perfect[0]["image_id"] = "frame_99"
    write_json(tmp_path / "results.json", perfect)
    with pytest.raises(InputError, match="'image_id' of result 0 must be an integer, it is 'frame_99'"):
        fusedet.validate(tmp_path / "results.json", f"data.path={tmp_path / 'data'}", out=tmp_path / "out2")
    fusedet.convert_dataset(tmp_path / "data", tmp_path / "again", "coco")
    assert read_dataset(tmp_path / "again", "val").list_image_ids() == ["frame_1", "frame_2", "frame_3", "frame_4"]


def test_quoted_digits_in_results(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", [{"image_id": "0006", "category_id": "1", "bbox": [1, 2, 3, 4], "score": 0.5}])
    (row,) = load_results(tmp_path / "r.json")
    assert (row["image_id"], row["category_id"]) == (6, 1)
