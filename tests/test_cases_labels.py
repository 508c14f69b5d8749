"""Labels as real tools write them: key points, nothing usable, names, files that are left out, shared images."""

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode

import fusedet
from bad_data import HEIGHT, WIDTH, write_dataset
from fusedet import cli
from fusedet.api.check_dataset import DatasetCheck
from fusedet.data import annotation_cleaning as cleaning
from fusedet.data import validation
from fusedet.data.class_names import normalize_class_name
from fusedet.data.duplicate_images import ImagePrint, compute_print, find_shared_images
from fusedet.data.image_decoding import read_image
from fusedet.data.readers.auto import read_dataset
from fusedet.data.readers.key_points import resemble_key_points
from fusedet.data.readers.yolo import read_yolo
from fusedet.errors import InputError

FORMATS = ("coco", "voc", "yolo")


def edit_boxes(root: Path, dataset_format: str, change: Callable[[list[float], int], list[float]]) -> Path:
    """Change the boxes of all files as they are written: xywh of COCO, corners of VOC, shares of YOLO."""
    count = 0
    for file in sorted(
        [*root.glob("annotations/*.json"), *root.glob("Annotations/*.xml"), *root.rglob("labels/**/*.txt")]
    ):
        text = file.read_text()
        if dataset_format == "coco":
            content = json.loads(text)
            for annotation in content["annotations"]:
                annotation["bbox"] = change(annotation["bbox"], count)
                annotation.pop("segmentation", None)
                count += 1
            file.write_text(json.dumps(content))
        elif dataset_format == "voc":

            def replaced(match: re.Match[str]) -> str:
                nonlocal count
                values = change([float(v) for v in match.groups()], count)
                count += 1
                return "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>".format(*values)

            tags = r"\s*".join(rf"<{side}>([\d.]+)</{side}>" for side in ("xmin", "ymin", "xmax", "ymax"))
            file.write_text(re.sub(tags, replaced, text))
        else:
            lines = []
            for line in text.splitlines():
                number, *values = line.split()
                lines.append(" ".join([number, *map(str, change(list(map(float, values))[:4], count))]))
                count += 1
            file.write_text("\n".join(lines))
    assert count
    return root


def check(root: Path, **data: object) -> DatasetCheck:
    return fusedet.check_dataset(data={"path": root, **data}, read_images=False)


# -- key points


def write_pose(root: Path, points: int, step: int, extra: str = "", images: int = 3) -> Path:
    """Boxes of 0.2 x 0.1 at (0.3, 0.4) and (0.6, 0.5) with key points inside them."""
    for split in ("train", "val"):
        (root / split / "images").mkdir(parents=True)
        (root / split / "labels").mkdir()
        for i in range(images):
            Image.new("RGB", (100, 50)).save(root / split / "images" / f"{i}.png")
            lines = []
            for cx, cy in ((0.3, 0.4), (0.6, 0.5)):
                key_points = [[cx - 0.05 + 0.01 * p, cy + 0.02, 2][:step] for p in range(points)]
                lines.append(" ".join(map(str, [0, cx, cy, 0.2, 0.1, *np.ravel(key_points)])))
            (root / split / "labels" / f"{i}.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text(f"train: train/images\nval: val/images\nnames: [person]\n{extra}")
    return root


@pytest.mark.parametrize(("points", "step"), [(1, 2), (2, 2), (2, 3), (17, 3), (5, 2)])
def test_boxes_of_key_points(tmp_path: Path, points: int, step: int) -> None:
    dataset = read_dataset(write_pose(tmp_path, points, step, f"kpt_shape: [{points}, {step}]\n"), "train")
    for image in dataset:
        assert image.boxes == pytest.approx(np.array([[20, 17.5, 40, 22.5], [50, 22.5, 70, 27.5]]))
        assert image.segmentations == [None, None]
    assert dataset.problems == {cleaning.KEY_POINTS: 6}
    assert dataset.examples[cleaning.KEY_POINTS].endswith("0.txt")


def test_lines_must_fit_kpt_shape(tmp_path: Path) -> None:
    root = write_pose(tmp_path, 2, 3, "kpt_shape: [3, 3]\n")
    with pytest.raises(InputError, match=r"0\.txt, line 1: 11 values, but with kpt_shape a line is .* 14 in all"):
        read_dataset(root, "train")
    (root / "data.yaml").write_text((root / "data.yaml").read_text().replace("[3, 3]", "[2, 3]"))
    label = root / "train/labels/1.txt"
    label.write_text(label.read_text() + "\n0 0.5 0.5 0.1 0.1")
    with pytest.raises(InputError, match=r"1\.txt, line 3: 5 values, but with kpt_shape"):
        read_dataset(root, "train")


@pytest.mark.parametrize("shape", ["3", "[2]", "[2, 4]", "[0, 2]", "[a, 2]", "{a: 1}", "[2, 3, 1]"])
def test_malformed_kpt_shape(tmp_path: Path, shape: str) -> None:
    with pytest.raises(InputError, match=r"data\.yaml: 'kpt_shape' must be"):
        read_dataset(write_pose(tmp_path, 2, 3, f"kpt_shape: {shape}\n"), "train")


@pytest.mark.parametrize("step", [2, 3])
def test_key_points_without_kpt_shape_are_suspected(tmp_path: Path, step: int) -> None:
    dataset = read_dataset(write_pose(tmp_path, 2, step, images=10), "train")
    assert dataset.problems[cleaning.LIKE_KEY_POINTS] == 20
    odd = write_pose(tmp_path / "odd", 3, 3)
    with pytest.raises(InputError, match=r"line 1: 14 values, .*key points need kpt_shape"):
        read_dataset(odd, "train")


def test_polygons_do_not_resemble_key_points() -> None:
    rng = np.random.default_rng(0)
    for count in (3, 4, 5, 8):
        centers, angles = rng.random((50, 1, 2)), np.sort(rng.random((50, count)) * 2 * np.pi, axis=1)
        radius = 0.02 + 0.2 * rng.random((50, 1, 1))
        polygons = centers + radius * np.stack([np.cos(angles), np.sin(angles)], axis=2)
        assert not resemble_key_points(polygons.reshape(50, -1).tolist())
        assert not resemble_key_points(polygons[:25].reshape(25, -1).tolist())


def test_case_of_pose_labels(shared: Path) -> None:
    case = shared / "cases/01-pose-labels-read-as-polygons"
    plain = read_dataset(case / "same_pictures_boxes_only", "train")
    boxes = {image.path.name: image.boxes for image in plain}
    for folder in ("kpt2x2", "kpt2x3"):
        dataset = read_dataset(case / folder, "train")
        assert dataset.problems[cleaning.KEY_POINTS] == len(dataset.labels)
        for image in dataset:
            assert image.boxes == pytest.approx(boxes[image.path.name], abs=0.01)


# -- nothing left to learn


def outside(box: list[float], _: int) -> list[float]:
    return [value + 900 for value in box[:2]] + [value + 900 for value in box[2:]]


def flat_coco(box: list[float], _: int) -> list[float]:
    return [*box[:2], 0, box[3]]


def normalized(box: list[float], _: int) -> list[float]:
    return [box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT]


USELESS = {
    "coco-outside": ("coco", outside, "lie wholly outside their image", "belong to these images"),
    "voc-outside": ("voc", outside, "lie wholly outside their image", "belong to these images"),
    "yolo-pixels": ("yolo", lambda b, _: [b[0] * 640, b[1] * 480, b[2] * 64, b[3] * 48], "lie wholly outside", "are these labels in pixels?"),
    "coco-without-area": ("coco", flat_coco, "have no area", "width and height"),
    "voc-without-area": ("voc", lambda b, _: [b[0], b[1], b[0] - 1, b[3]], "have no area", "width and height"),
    "yolo-without-area": ("yolo", lambda b, _: [*b[:2], 0, 0], "have no area", "width and height"),
    "coco-normalized": ("coco", normalized, "end within the first pixel", "normalized (0..1), but COCO's are in pixels"),
    "voc-normalized": ("voc", normalized, "end within the first pixel", "normalized (0..1), but VOC's are in pixels"),
    "coco-negative": ("coco", lambda b, _: [*b[:2], -5, b[3]], "have a negative width or height", "order of the coordinates"),
    "voc-swapped": ("voc", lambda b, _: [b[2], b[3], b[0], b[1]], "have a negative width or height", "order of the coordinates"),
    "yolo-nan": ("yolo", lambda b, _: [float("nan"), *b[1:]], "have NaN or infinite coordinates", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", USELESS)
def test_a_split_without_a_usable_target_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By doctor, train and ablate --dry-run, with the count, the cause and the first file."""
    dataset_format, change, cause, advice = USELESS[name]
    root = edit_boxes(write_dataset(tmp_path / "data", dataset_format), dataset_format, change)
    result = check(root)
    assert not result.ok
    (error,) = result.reports["train"].errors
    assert re.search(rf"no usable target among its (\d+) objects: all \1 {re.escape(cause)}", error), error
    assert advice in error
    assert "p0." in error
    with pytest.raises(InputError, match="no usable target"):
        fusedet.train("retinanet_r18_small", data=root, out=tmp_path / "run", say=lambda text: None)
    assert not (tmp_path / "run").exists()
    if name == "yolo-pixels":  # the same function reads the data of all tables
        assert cli.run(["ablate", "smsl_table1", f"data={root}", f"out={tmp_path / 'a'}", "--dry-run"]) == 2
        assert "no usable target" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["iscrowd", "ignore"])
def test_flags_of_coco(tmp_path: Path, flag: str) -> None:
    root = write_dataset(tmp_path, "coco")
    for file in root.glob("annotations/*.json"):
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            annotation[flag] = 1
        file.write_text(json.dumps(content))
    result = check(root)
    (error,) = result.reports["train"].errors
    word = "are crowds (iscrowd=1); CVAT writes iscrowd=1" if flag == "iscrowd" else "have ignore=1"
    assert word in error
    # evaluation counts what has `ignore`, as pycocotools does
    assert bool(result.reports["val"].errors) == (flag == "iscrowd")


def test_difficult_objects_of_voc(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, "voc")
    for file in root.glob("Annotations/*.xml"):
        text = re.sub(r"<difficult>\d</difficult>", "", file.read_text())
        file.write_text(text.replace("<bndbox>", "<difficult>1</difficult><bndbox>"))
    errors = check(root).reports["val"].errors
    assert "are difficult" in errors[0]


@pytest.mark.parametrize("dataset_format", FORMATS)
def test_above_a_fifth_is_a_warning(tmp_path: Path, dataset_format: str) -> None:
    """One of four boxes is outside: a warning with the kind and the first file; one of twelve is none."""

    def every(n: int) -> Callable[[list[float], int], list[float]]:
        return lambda box, i: [v + 900 for v in box] if i % n == n - 1 else box

    few = edit_boxes(write_dataset(tmp_path / "few", dataset_format), dataset_format, every(12))
    assert not any("usable" in w for w in check(few).reports["train"].warnings)
    root = edit_boxes(write_dataset(tmp_path / "many", dataset_format), dataset_format, every(4))
    result = check(root)
    assert result.ok
    (warning,) = (w for w in result.reports["train"].warnings if "usable" in w)
    assert "3 of 12 objects are no usable targets: 3 lie wholly outside their image" in warning
    assert "p1." in warning


def test_val_refuses_a_split_that_cannot_be_scored(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", "coco")
    file = root / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    file.write_text(json.dumps(content))
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(InputError, match=r"no usable target among its 4 objects: all 4 are crowds"):
        fusedet.validate(tmp_path / "results.json", data=root, out=tmp_path / "out")


@pytest.mark.parametrize("case", ["02-all-objects-iscrowd", "03-no-box-left-to-train-on", "06-normalised-coco-boxes"])
def test_cases_without_usable_targets(shared: Path, case: str) -> None:
    result = check(shared / "cases" / case / "data")
    assert all("no usable target" in report.errors[0] for report in result.reports.values())


# -- names


@pytest.mark.parametrize(
    ("a", "b"),
    [("cat", "CAT"), ("Traffic Light", "traffic_light"), ("Muell", "müll"), ("café", "cafe"), ("a-b", "A B"), ("dog", "dogs")],
)  # fmt: skip
def test_normalized_names(a: str, b: str) -> None:
    assert (normalize_class_name(a) == normalize_class_name(b)) == ((a, b) not in [("Muell", "müll"), ("dog", "dogs")])


def rename_classes(root: Path, dataset_format: str, names: tuple[str, str]) -> Path:
    for file in [*root.glob("annotations/*.json"), *root.glob("Annotations/*.xml"), *root.glob("*.yaml")]:
        text = file.read_text()
        for old, new in zip(("cat", "dog"), names):
            text = re.sub(rf"\b{old}\b", new, text)
        file.write_text(text)
    return root


@pytest.mark.parametrize("dataset_format", FORMATS)
def test_names_that_differ_in_case_only(tmp_path: Path, dataset_format: str) -> None:
    root = rename_classes(write_dataset(tmp_path, dataset_format), dataset_format, ("cat", "Cat"))
    report = check(root).reports["train"]
    (finding,) = (f for f in report.findings if f.kind == "similar class names")
    assert re.search("'[Cc]at' \\(6\\) and '[Cc]at' \\(6\\) differ in case only", finding.message)
    assert finding.count == 6
    assert Path(finding.example).name.startswith("p0")


@pytest.mark.parametrize("dataset_format", ["coco", "yolo"])
def test_two_classes_of_one_name(tmp_path: Path, dataset_format: str) -> None:
    """VOC has names only. Counts are by class, not by name."""
    root = rename_classes(write_dataset(tmp_path, dataset_format), dataset_format, ("cat", "cat"))
    report = check(root).reports["train"]
    assert any("2 classes are named 'cat'" in e and e.count("6 annotations") == 2 for e in report.errors)
    assert sorted(report.statistics["classes"].values()) == [6, 6]
    assert all(name.startswith("cat (id ") for name in report.statistics["classes"])
    with pytest.raises(InputError, match="2 classes are named 'cat'"):
        fusedet.train("retinanet_r18_small", data=root, out=tmp_path / "run", say=lambda text: None)


def test_names_of_the_splits_that_differ_in_case_only(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, "coco")
    file = root / "annotations/instances_val.json"
    file.write_text(file.read_text().replace('"cat"', '"Cat"'))
    assert any("'cat' and 'Cat' differ in case, spaces or accents only" in f.message for f in check(root).between)


def test_cases_of_names(shared: Path) -> None:
    for folder in ("data", "roboflow_group_called_as_class"):
        report = check(shared / "cases/05-two-classes-of-one-name" / folder).reports["train"]
        assert any("2 classes are named 'cat'" in w for w in report.warnings)
        assert 6 in report.statistics["classes"].values()
        assert len(report.statistics["classes"]) == 3 if folder == "data" else True
    report = check(shared / "cases/20-class-names-differ-in-case/data").reports["train"]
    assert any("'cat' (5) and 'CAT' (1) differ in case only" in w for w in report.warnings)


# -- files that are left out


def test_yolo_files_that_are_left_out(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, "yolo")
    images, labels = root / "images/train", root / "labels/train"
    (images / "p0.jpg").rename(images / "p0.HEIC")
    (images / "p1.jpg").rename(images / "p1.jxl")
    (images / "p2.jpg").unlink()
    (labels / "classes.txt").write_text("cat\ndog\n")
    (labels / "p3.txt").unlink()
    dataset = read_dataset(root, "train")
    assert dataset.problems == {
        cleaning.NO_LABELS: 1,
        cleaning.NO_IMAGE_FILE: 3,
        cleaning.UNREAD_HEIF.format(extension=".heic"): 1,
        cleaning.UNREAD.format(extension=".jxl"): 1,
    }
    assert dataset.examples[cleaning.NO_IMAGE_FILE].endswith("p0.txt")
    summary = "\n".join(f.message for f in check(root).summarize())
    assert "(.heic): left out (train): 1, such as" in summary
    assert "pip install pillow-heif" in summary
    assert "convert them to PNG or JPEG" in summary


def test_yolo_labels_beside_the_images(tmp_path: Path) -> None:
    """Only label files count there; lists of images and classes are no labels. An image of another split is one."""
    data = tmp_path / "obj"
    data.mkdir()
    for i in range(4):
        Image.new("RGB", (20, 10)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (data / "lost.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    for name, text in (("classes.txt", "cat\n"), ("empty.txt", ""), ("notes.txt", "1 2 3\n")):
        (data / name).write_text(text)
    for split, numbers in (("train", (0, 1)), ("val", (2, 3))):
        (data / f"{split}.txt").write_text("".join(f"obj/{i}.png\n" for i in numbers))
    (tmp_path / "data.yaml").write_text("train: obj/train.txt\nval: obj/val.txt\nnames: [cat]\n")
    assert read_dataset(tmp_path, "train").problems == {cleaning.NO_IMAGE_FILE: 1}


def test_a_label_file_of_two_images(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, "yolo")
    shutil.copy(root / "images/train/p0.jpg", root / "images/train/p0.jpeg")
    dataset = read_dataset(root, "train")
    assert dataset.problems == {cleaning.SHARED_LABELS: 1}
    root = write_dataset(tmp_path / "voc", "voc")
    shutil.copy(root / "JPEGImages/p0.jpg", root / "JPEGImages/p0.jpeg")
    assert read_dataset(root, "train").problems == {cleaning.SAME_STEM: 1}


def test_voc_images_that_are_left_out(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, "voc")
    for name in ("new.jpg", "phone.heic"):
        shutil.copy(root / "JPEGImages/p0.jpg", root / "JPEGImages" / name)
    dataset = read_dataset(root, "train")
    assert dataset.problems[cleaning.NO_ANNOTATION_FILE] == 1
    assert dataset.examples[cleaning.NO_ANNOTATION_FILE].endswith("new.jpg")
    assert any("(.heic)" in text for text in dataset.problems)
    (root / "JPEGImages/p0.jpg").unlink()
    (root / "JPEGImages/p0.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    errors = fusedet.check_dataset(data=root).reports["train"].errors
    assert any("p0.heic" in e for e in errors), "not that p0.jpg is absent"


def test_coco_images_that_no_json_lists(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, "coco")
    assert not check(root).between
    shutil.copy(root / "train/p0.jpg", root / "train/new.jpg")
    shutil.copy(root / "train/p0.jpg", root / "val/new.cr2")
    (finding,) = check(root).between
    assert finding.kind == "images in the data folder that no json lists"
    assert finding.count == 2
    whole = json.loads((root / "annotations/instances_train.json").read_text())
    whole["images"] = [{**whole["images"][0], "file_name": "../train/new.jpg"}]
    whole["annotations"] = []
    (root / "annotations/instances_test.json").write_text(json.dumps(whole))
    (finding,) = check(root).between
    assert finding.count == 1, "an image of another split is listed"


def test_voc_annotations_that_no_list_names(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, "voc")
    assert not check(root).between
    shutil.copy(root / "Annotations/p0.xml", root / "Annotations/new.xml")
    (finding,) = check(root).between
    assert finding.kind == "annotation files that no list names"
    assert (finding.count, Path(finding.example).name) == (1, "new.xml")
    (root / "ImageSets/Main/test.txt").write_text("new\n")
    assert not check(root).between, "another list names it"


def test_corners_instead_of_coco_boxes(tmp_path: Path) -> None:
    """x1, y1, x2, y2 of 28 x 30 and 60 x 44 pixels in 64 x 48: read as width and height they leave the image."""
    root = write_dataset(tmp_path, "coco")
    assert not any("x1, y1" in w for w in check(root).reports["train"].warnings)
    edit_boxes(root, "coco", lambda b, _: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
    report = check(root).reports["train"]
    assert any("boxes that look like x1, y1, x2, y2: 6 of 12 leave their image" in w for w in report.warnings)


@pytest.mark.parametrize("dataset_format", FORMATS)
def test_background_is_counted(tmp_path: Path, dataset_format: str) -> None:
    root = write_dataset(tmp_path, dataset_format)
    if dataset_format == "coco":
        file = root / "annotations/instances_train.json"
        content = json.loads(file.read_text())
        first = content["images"][0]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]
        file.write_text(json.dumps(content))
    elif dataset_format == "voc":
        file = root / "Annotations/p0.xml"
        file.write_text(re.sub(r"<object>.*</object>", "", file.read_text(), flags=re.DOTALL))
    else:
        (root / "labels/train/p0.txt").write_text("")
    assert check(root).reports["train"].statistics["empty_images"] == 1
    said: list[str] = []
    from fusedet.api.train_inputs import open_data

    open_data(fusedet.resolve_config("retinanet_r18_small", [f"data={root}"]), said.append)
    assert said[0].startswith("train: 6 images (1 without annotations), 10 annotations")


def test_case_of_heic_images(shared: Path) -> None:
    dataset = read_yolo(shared / "cases/04-labels-without-picture-heic/data/data.yaml", "train")
    assert dataset.problems[cleaning.NO_IMAGE_FILE] == 2
    assert any("(.heic)" in text and count == 2 for text, count in dataset.problems.items())


# -- images of two splits


def photo(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Smooth structure, as photographs have it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def test_shared_images(tmp_path: Path) -> None:
    """The same file by a link, the same bytes, another compression and size; different images are not the same."""
    train, val = tmp_path / "train", tmp_path / "val"
    train.mkdir()
    val.mkdir()
    for i in range(12):
        photo(i).save(train / f"{i}.png")
    (val / "link.png").symlink_to(train / "0.png")
    shutil.copy(train / "1.png", val / "copy.png")
    photo(2).save(val / "recompressed.jpg", quality=60)
    photo(3).resize((48, 36)).save(val / "smaller.png")
    photo(99).save(val / "new.png")
    Image.new("RGB", (50, 50), "white").save(val / "white.png")
    Image.new("RGB", (60, 60), "white").save(train / "white.png")
    files = sorted(train.iterdir()), sorted(val.iterdir())
    prints = [[compute_print(path, read_image(path)) for path in own] for own in files]
    shared = find_shared_images(files[1], files[0], prints[1], prints[0])
    named = [
        {(files[1][i].name, files[0][j].name) for i, j in pairs}
        for pairs in (shared.same_file, shared.same_content, shared.similar)
    ]
    assert named == [
        {("link.png", "0.png")},
        {("copy.png", "1.png")},
        {("recompressed.jpg", "2.png"), ("smaller.png", "3.png")},
    ]
    assert len(find_shared_images(files[1], files[0]).same_file) == 1, "by path without decoding"


@pytest.mark.parametrize(("height", "width"), [(1, 2), (37, 50), (64, 300)])
def test_a_print_is_the_reduced_image(tmp_path: Path, height: int, width: int) -> None:
    (tmp_path / "file").touch()
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = interpolate(image.float().mean(dim=0)[None, None], size=(16, 16), mode="area")[0, 0]
    np.testing.assert_allclose(compute_print(tmp_path / "file", image).gray, expected, rtol=1e-3)


def test_large_images_are_decoded_by_fewer_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, threads = write_dataset(tmp_path, "coco"), []

    class Recorder(ThreadPoolExecutor):
        def __init__(self, max_workers: int) -> None:
            threads.append(max_workers)
            super().__init__(max_workers)

    monkeypatch.setattr(validation, "ThreadPoolExecutor", Recorder)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    for pixels in (validation._DECODED, 3 * WIDTH * HEIGHT, 1):
        monkeypatch.setattr(validation, "_DECODED", pixels)
        fusedet.check_dataset(data={"path": root, "val": "train"})
    assert threads == [12, 3, 1]


class CallCounter(TorchFunctionMode):
    """Counts the calls of PyTorch's functions."""

    calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_frames_of_a_fixed_camera_are_compared_at_once() -> None:
    """All pairs correlate, and the first images of the other split differ too much in contrast."""
    rng = np.random.default_rng(0)
    view = rng.normal(0, 40, (16, 16))
    frames = [ImagePrint(str(i), (view + rng.normal(0, 1, view.shape)).astype(np.float16)) for i in range(900)]
    others = [ImagePrint("pale", (2 * view).astype(np.float16))] * 300 + frames[:400]
    paths = [[Path(f"{split}{i}.png") for i in range(n)] for split, n in (("val", 500), ("train", 700))]
    with CallCounter() as counter:
        shared = find_shared_images(*paths, frames[400:], others)
    assert counter.calls < 40 * 500, "a call per pair would be 350,000"
    assert shared.similar == [(i, 300) for i in range(500)]


@pytest.mark.parametrize("dataset_format", FORMATS)
def test_doctor_finds_images_of_both_splits(tmp_path: Path, dataset_format: str) -> None:
    root = write_dataset(tmp_path, dataset_format)
    folders = {"coco": ("train", "val"), "voc": ("JPEGImages",) * 2, "yolo": ("images/train", "images/val")}
    train, val = (root / folder for folder in folders[dataset_format])
    assert not fusedet.check_dataset(data=root).between
    shutil.copy(train / "p0.jpg", val / "p6.jpg")
    result = fusedet.check_dataset(data=root)
    assert result.ok
    (finding,) = result.between
    assert finding.kind == "validation images with the content of training images"
    assert finding.count == 1
    assert "1 of 2" in finding.message
    assert "p6.jpg" in finding.message
    assert "p0.jpg" in finding.message


def test_one_split_for_both(tmp_path: Path) -> None:
    result = check(write_dataset(tmp_path, "coco"), val="train")
    assert result.ok
    (finding,) = result.between
    assert "data.train and data.val are both 'train'" in finding.message


def test_real_images_are_not_taken_for_the_same(shared: Path) -> None:
    """BCCD's cells on one background look alike."""
    files = sorted((shared / "data/bccd").rglob("*.jpg"))[:60]
    prints = [compute_print(path, read_image(path)) for path in files]
    shared_images = find_shared_images(files[30:], files[:30], prints[30:], prints[:30])
    assert not shared_images.same_content
    assert not shared_images.similar
