"""Auto-detection of dataset formats, in the layouts that users have."""

import json
import re
import shutil
from pathlib import Path

import pytest

from fusedet.data.readers.auto import detect_format, list_splits, read_dataset
from fusedet.errors import InputError
from tiny import coco_dict, image, write_coco, write_voc, write_yolo


def images(folder: Path) -> None:
    image(folder / "a.jpg", 20, 10)
    image(folder / "b.jpg", 40, 30)


def write_json(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(coco_dict()))
    return file


@pytest.mark.parametrize(
    ("file", "folder", "split"),
    [
        ("annotations/instances_train2017.json", "train2017", "train"),
        ("annotations/instances_train2017.json", "train2017", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017", "train"),
        ("annotations/instances_minival2014.json", "val2014", "minival"),
        ("annotations/train.json", "images/train", "train"),
        ("annotations/instances_val.json", "images", "val"),
        ("annotations/fold1.json", ".", "fold1"),
        ("annotations/image_info_test-dev2017.json", "test2017", "test-dev"),
        ("train.json", "train", "train"),
        ("train.json", "images", "train"),
        ("mine.json", "images", "mine"),
        ("train/_annotations.coco.json", "train", "train"),
        ("valid/_annotations.coco.json", "valid", "valid"),
        ("valid/_annotations.coco.json", "valid", "val"),
        ("valid/_annotations.coco.json", "valid", "validation"),
        ("annotations/instances_val2017.json", "val2017", "valid"),
    ],
)
def test_coco_layouts(tmp_path: Path, file: str, folder: str, split: str) -> None:
    write_json(tmp_path / file)
    images(tmp_path / folder)
    assert detect_format(tmp_path) == "coco"
    dataset = read_dataset(tmp_path, split)
    assert {dataset.path(i) for i in range(2)} == {tmp_path / folder / "a.jpg", tmp_path / folder / "b.jpg"}


def test_each_split_has_its_own_images(tmp_path: Path) -> None:
    for split in ("train", "val", "trainval"):
        write_coco(tmp_path, split=split)
    for split in ("train", "val", "trainval"):
        assert read_dataset(tmp_path, split).path(0).parent.name == f"{split}2017"


def test_splits_of_every_format(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    write_json(root / "valid" / "_annotations.coco.json")
    write_json(root / "annotations" / "person_keypoints_train2017.json")
    (root / "results.json").write_text('[{"image_id": 1}]')
    assert set(list_splits(root)) == {"train", "val"}
    assert list_splits(root)["train"] == str(root / "annotations" / "instances_train2017.json")
    assert set(list_splits(write_voc(tmp_path / "voc"))) == {"train", "val"}
    yaml = write_yolo(tmp_path / "yolo")
    assert list_splits(yaml) == list_splits(yaml.parent) == {"train": "images/train", "val": "images/val"}
    assert [detect_format(tmp_path / f) for f in ("coco", "voc", "yolo")] == ["coco", "voc", "yolo"]
    assert detect_format(yaml) == "yolo"


def test_two_years_need_the_full_name(tmp_path: Path) -> None:
    write_json(tmp_path / "annotations" / "instances_train2014.json")
    write_json(tmp_path / "annotations" / "instances_train2017.json")
    images(tmp_path / "images")
    assert len(read_dataset(tmp_path, "train2014")) == 2
    with pytest.raises(InputError, match="several splits 'train': give one of train2014, train2017"):
        read_dataset(tmp_path, "train")


def test_missing_split_lists_those_that_exist(tmp_path: Path) -> None:
    for root in (
        write_coco(tmp_path / "a"),
        write_voc(tmp_path / "b", lists={"train": "a"}),
        write_yolo(tmp_path / "c").parent,
    ):
        with pytest.raises(InputError, match="has no split 'test': it has train"):
            read_dataset(root, "test")


def test_json_as_path_is_train(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    file = root / "annotations" / "instances_train2017.json"
    assert list_splits(file) == {"train": str(file)}
    assert read_dataset(file, "train").path(0) == root / "train2017" / "b.jpg"
    with pytest.raises(InputError, match=re.escape("no split 'val': give that as a file too, e.g. data.val=FILE.json")):
        read_dataset(file, "val")


def test_split_as_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_coco(tmp_path / "coco")
    other = write_json(tmp_path / "coco" / "more" / "x.json")
    assert len(read_dataset(root, str(other))) == 2
    assert len(read_dataset(root, "more/x.json")) == 2
    assert (
        len(read_dataset(root / "annotations" / "instances_train2017.json", str(other), images=root / "train2017")) == 2
    )
    voc, yolo = write_voc(tmp_path / "voc"), write_yolo(tmp_path / "yolo")
    (tmp_path / "mine.txt").write_text("b\n")
    assert read_dataset(voc, str(tmp_path / "mine.txt")).path(0).name == "b.jpg"
    (yolo.parent / "some.txt").write_text("images/val/b.jpg\n")
    assert read_dataset(yolo, "some.txt").path(0).name == "b.jpg"
    monkeypatch.chdir(tmp_path)
    assert read_dataset("voc", "mine.txt").path(0).name == "b.jpg"
    assert read_dataset("voc", "ImageSets/Main/train.txt").path(0).name == "a.jpg"
    with pytest.raises(InputError, match=r"the file none\.json does not exist"):
        read_dataset(root, "none.json")


def test_images_given(tmp_path: Path) -> None:
    file = write_json(tmp_path / "x" / "train.json")
    images(tmp_path / "y")
    assert read_dataset(file, "train", images=tmp_path / "y").path(0) == tmp_path / "y" / "b.jpg"
    with pytest.raises(InputError, match="is not a folder"):
        read_dataset(file, "train", images=tmp_path / "z")
    with pytest.raises(InputError, match="goes with a COCO json only"):
        read_dataset(write_voc(tmp_path / "v"), "train", images=tmp_path / "y")
    with pytest.raises(InputError, match="none of the first images"):
        read_dataset(file, "train")
    assert len(read_dataset(file, "train", need_images=False)) == 2


def test_file_names_may_start_at_the_data_folder(tmp_path: Path) -> None:
    data = coco_dict()
    for entry in data["images"]:
        entry["file_name"] = f"../train2017/{entry['file_name']}"
    write_coco(tmp_path, data)
    assert read_dataset(tmp_path, "train").path(0) == tmp_path / "train2017" / "b.jpg"
    data["images"][0]["file_name"] = "../../b.jpg"
    write_coco(tmp_path, data)
    with pytest.raises(InputError, match="outside the data folder"):
        read_dataset(tmp_path, "train")


def test_exported_yolo(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        image(tmp_path / split / "images" / "a.jpg")
        (tmp_path / split / "labels").mkdir()
        (tmp_path / split / "labels" / "a.txt").write_text("0 0.5 0.5 1 1")
    (tmp_path / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 1\nnames: ['dog']\n"
    )
    assert len(read_dataset(tmp_path, "val").labels) == 1
    assert len(read_dataset(tmp_path / "data.yaml", "train").labels) == 1


def test_refused_folders(tmp_path: Path) -> None:
    def error_of(path: Path) -> str:
        with pytest.raises(InputError) as error:
            read_dataset(path, "train")
        return str(error.value)

    assert "does not exist" in error_of(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "is an empty folder" in error_of(tmp_path / "empty")
    assert "neither a folder, a COCO .json nor a YOLO .yaml" in error_of(image(tmp_path / "some" / "a.jpg"))
    assert "holds no dataset" in error_of(tmp_path / "some")
    write_voc(tmp_path / "devkit" / "VOC2007")
    assert f"did you mean {tmp_path / 'devkit' / 'VOC2007'}?" in error_of(tmp_path / "devkit")
    write_yolo(tmp_path / "no_yaml").unlink()
    assert "has no data.yaml" in error_of(tmp_path / "no_yaml")
    write_yolo(write_coco(tmp_path / "both"))
    assert "holds data in COCO and YOLO format" in error_of(tmp_path / "both")
    (tmp_path / "x.json").write_text("{}")
    assert "is not COCO" in error_of(tmp_path / "x.json")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.json").write_text("")
    assert "not valid json" in error_of(tmp_path / "bad")


def test_voc_without_lists(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    shutil.rmtree(root / "ImageSets")
    assert len(read_dataset(root, "train")) == 2
    with pytest.raises(InputError, match=r"no split 'val': it has train; data\.val=0\.2 holds out a fifth of it"):
        read_dataset(root, "val")


def test_real_data(shared: Path) -> None:
    bccd, coco = shared / "data" / "bccd", shared / "data" / "coco_tiny"
    assert {split: len(read_dataset(bccd, split)) for split in list_splits(bccd)} == {
        "train": 205,
        "val": 87,
        "trainval": 292,
        "test": 72,
    }
    assert {split: len(read_dataset(coco, split)) for split in list_splits(coco)} == {"train": 80, "val": 80}
    assert read_dataset(coco, "train").ignore.sum() == 6
