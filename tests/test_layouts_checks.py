"""Layouts of annotation tools together with the checks: files left out, data.range, EXIF, a share as validation."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fusedet
from fusedet.config import Data
from fusedet.data import annotation_cleaning as cleaning
from fusedet.data.image_decoding import read_image, read_image_size
from fusedet.data.readers.auto import read_dataset
from fusedet.data.splits import read_key, read_split
from fusedet.errors import InputError
from layouts import IMAGES, LAYOUTS, coco, labelme, put_images, put_xml, write_json
from test_cases_values import png_16_bit
from tiny import image, write_yolo


def store_turned(path: Path, pixels: np.ndarray, orientation: int = 6) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


# -- files that are left out


def test_voc_without_lists_counts_what_it_leaves_out(tmp_path: Path) -> None:
    put_images(tmp_path / "images")
    put_xml(tmp_path / "xml")
    image(tmp_path / "images" / "new.jpg", 8, 8)
    (tmp_path / "images" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "images" / "d.jpg").unlink()
    dataset = read_dataset(tmp_path, "train")
    assert len(dataset) == len(IMAGES) - 1
    expected = {
        cleaning.NO_IMAGE_FILE: "d.xml",
        cleaning.NO_ANNOTATION_FILE: "new.jpg",
        cleaning.UNREAD_HEIF.format(extension=".heic"): "phone.heic",
    }
    assert dataset.problems == dict.fromkeys(expected, 1)
    assert {text: Path(file).name for text, file in dataset.examples.items()} == expected


def test_hidden_folders_of_yolo_images_are_not_counted(tmp_path: Path) -> None:
    root = write_yolo(tmp_path).parent
    before = read_dataset(root, "train").problems
    for name in ("@eaDir", ".thumbnails"):
        for kind, file in (("images", "a.heic"), ("labels", "lost.txt")):
            folder = root / kind / "train" / name
            folder.mkdir(parents=True)
            (folder / file).write_text("0 0.5 0.5 0.1 0.1")
    assert read_dataset(root, "train").problems == before


def test_shapes_without_area_have_an_example_and_advice(tmp_path: Path) -> None:
    put_images(tmp_path)
    for name in IMAGES:
        content = labelme(name, "rectangle", f"{name}.jpg")
        content["shapes"].append({"label": "cat", "shape_type": "point", "points": [[1, 1]]})
        write_json(tmp_path / f"{name}.json", content)
    findings = fusedet.check_dataset(data={"path": tmp_path, "val": 0.5}, read_images=False).summarize()
    (finding,) = (f for f in findings if f.kind == cleaning.NO_REGION)
    assert Path(finding.example).name == "a.jpg"
    assert finding.advice in finding.message
    assert finding.advice


def test_doctor_counts_what_no_list_names_only_where_there_are_lists(tmp_path: Path) -> None:
    put_images(tmp_path / "images")
    put_xml(tmp_path / "Annotations")
    assert not fusedet.check_dataset(data={"path": tmp_path, "val": 0.5}, read_images=False).between


def test_doctor_knows_the_validation_json_beside_a_share(tmp_path: Path) -> None:
    """With data.val=0.5 the split `val` of the dataset is not used, but its images are listed."""
    whole = coco()
    for split, names in (("train", ("a.jpg", "b.jpg", "c.jpg")), ("val", ("d.jpg",))):
        images = [row for row in whole["images"] if row["file_name"] in names]
        ids = {row["id"] for row in images}
        annotations = [row for row in whole["annotations"] if row["image_id"] in ids]
        content = whole | {"images": images, "annotations": annotations}
        write_json(tmp_path / "annotations" / f"instances_{split}.json", content)
    put_images(tmp_path / "images")
    settings = {"path": tmp_path, "val": 0.5, "classes": ["dog"]}
    assert not fusedet.check_dataset(data=settings, read_images=False).between
    image(tmp_path / "images" / "new.jpg", 8, 8)
    (finding,) = fusedet.check_dataset(data=settings, read_images=False).between
    assert (finding.count, Path(finding.example).name) == (1, "new.jpg")


# -- data.range and data.exif


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_carries_range_and_exif(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout][1](tmp_path)
    data = Data(path=str(tmp_path), val=0.5, range=(0, 1023), exif=False)
    for split in ("train", "val"):
        dataset = read_split(data, split, need_images=False)
        assert (dataset.value_range, dataset.exif) == ((0, 1023), False)
    assert read_key(data) != read_key(data.replace(range=None))
    assert read_key(data) != read_key(data.replace(exif=True))


@pytest.mark.parametrize("is_color", [False, True])
def test_range_of_an_image_as_stored(tmp_path: Path, is_color: bool) -> None:
    """16 bits in gray and in color: data.range scales the same pixels, turned or as stored."""
    gray = (np.arange(6 * 4).reshape(6, 4) * 40).astype(np.uint16)
    path = tmp_path / "a.png"
    if is_color:
        content = png_16_bit(np.stack([gray] * 3, axis=2))
        exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
        path.write_bytes(insert_chunk(content, b"eXIf", exif))
    else:
        store_turned(path, gray)
    expected = torch.from_numpy(np.rint(gray * 255.0 / 1023).clip(0, 255).astype(np.uint8))
    stored = read_image(path, (0, 1023), exif=False)
    turned = read_image(path, (0, 1023))
    assert torch.equal(stored[1], expected)
    assert torch.equal(turned[1], expected.flip(0).T)
    assert read_image_size(path, value_range=(0, 1023), exif=False) == (6, 4)
    assert read_image_size(path, value_range=(0, 1023)) == (4, 6)


def insert_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    at = png.index(b"IDAT") - 4
    chunk = len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    return png[:at] + chunk + png[at:]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_read_as_stored_and_as_turned(tmp_path: Path, kind: str, orientation: int) -> None:
    """Also TIFF, which Pillow turns itself."""
    pixels = np.zeros((16, 32), dtype=np.uint8)
    pixels[:8, :16] = 240
    path = tmp_path / f"a.{kind.lower()}"
    store_turned(path, pixels, orientation)
    stored = read_image(path, exif=False)
    assert tuple(stored.shape[1:]) == read_image_size(path, exif=False) == (16, 32)
    assert np.abs(stored[0].numpy().astype(int) - pixels).max() < 16
    turned = read_image(path)
    assert tuple(turned.shape[1:]) == read_image_size(path) == ((32, 16) if orientation > 4 else (16, 32))
    right, bottom = int(orientation in (2, 3, 6, 7)), int(orientation in (3, 4, 7, 8))  # EXIF 2.3, table 4.6.4
    quarter = turned[0].unflatten(0, (2, -1)).unflatten(2, (2, -1)).float().mean(dim=(1, 3))
    assert (quarter > 200).nonzero().tolist() == [[bottom, right]]


def test_doctor_explains_boxes_on_stored_pixels_of_floats(tmp_path: Path) -> None:
    """The advice is data.exif=false, also for images that need data.range."""
    whole = coco(lambda name: f"{name}.tif")
    write_json(tmp_path / "train.json", whole)
    for name, (width, height, _) in IMAGES.items():
        pixels = np.random.default_rng(ord(name)).random((height, width)).astype(np.float32)
        store_turned(tmp_path / f"{name}.tif", pixels)
    settings = {"path": tmp_path, "val": 0.5, "range": [0, 1]}
    checked = fusedet.check_dataset(data=settings)
    (finding,) = (f for f in checked.summarize() if f.severity == "error")
    assert finding.count == sum(width != height for width, height, _ in IMAGES.values())
    assert finding.advice == "add data.exif=false"
    assert fusedet.check_dataset(data=settings | {"exif": False}).ok


# -- untrusted files


@pytest.mark.parametrize(
    "head",
    ["a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)), "a: &a [*a]"],
)
def test_bombs_in_the_head_of_an_imagefolder(tmp_path: Path, head: str) -> None:
    image(tmp_path / "1.png", 20, 10)
    line = {"file_name": "1.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": [0]}}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    with pytest.raises(InputError, match=r"README\.md: its head has more than"):
        read_dataset(tmp_path, "train")
