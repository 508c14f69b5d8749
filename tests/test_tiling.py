"""Tiles: windows that cover an image, their objects, and files that are decoded only where a tile lies."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fusedet import check_dataset, cli
from fusedet.api.train_inputs import check_config
from fusedet.config import load
from fusedet.data.augmentation import AugmentedTransform
from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.image_decoding import read_image
from fusedet.data.loader import build_train_loader
from fusedet.data.tiling import tile_dataset, tile_windows
from fusedet.data.transforms import TrainTransform, decode_mask
from fusedet.errors import InputError
from tiny import write_coco

pytestmark = pytest.mark.usefixtures("unrendered")


@pytest.mark.parametrize(
    ("length", "size", "overlap", "starts"),
    [
        (100, 100, 0.2, [0]),
        (60, 100, 0.2, [0]),
        (101, 100, 0.2, [0, 1]),
        (180, 100, 0.2, [0, 80]),  # (180 - 100) / 80 = 1 more
        (181, 100, 0.2, [0, 40, 81]),  # two more, evenly: 40.5 and 81
        (300, 100, 0, [0, 100, 200]),
        (2048, 640, 0.2, [0, 469, 939, 1408]),  # 1408 / 512 = 2.75, three more: 469.3, 938.7
    ],
)
def test_windows_by_hand(length, size, overlap, starts):
    windows = tile_windows(50, length, size, overlap)
    assert windows[:, 0].tolist() == starts
    assert (windows[:, 2] - windows[:, 0] == min(size, length)).all()
    assert windows[:, [1, 3]].tolist() == [[0, 50]] * len(starts)
    assert tile_windows(length, 50, size, overlap)[:, 1].tolist() == starts


@settings(max_examples=40)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 200), st.floats(0, 0.9))
def test_windows_cover_the_image(height, width, size, overlap):
    windows = tile_windows(height, width, size, overlap)
    covered = np.zeros((height, width), bool)
    for x1, y1, x2, y2 in windows.tolist():
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert (x2 - x1, y2 - y1) == (min(size, width), min(size, height))
        covered[y1:y2, x1:x2] = True
    assert covered.all()
    starts = np.unique(windows[:, 0])
    assert (np.diff(starts) <= max(1, size * (1 - overlap)) + 1).all(), "neighbors overlap by the share, to a pixel"


COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def make_dataset(folder, boxes, size=(100, 220), suffix="png", ignored=(), **options):
    """One image with filled rectangles, each of its own class, and their polygons."""
    pixels = np.full((*size, 3), 30, np.uint8)
    for (x1, y1, x2, y2), color in zip(boxes, COLORS):
        pixels[y1:y2, x1:x2] = color
    path = folder / f"image.{suffix}"
    Image.fromarray(pixels).save(path, **options)
    n = len(boxes)
    polygons = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes]
    ignore = np.isin(np.arange(n), ignored)
    corners = np.array(boxes, float).reshape(-1, 4)
    row = ImageAnnotations(7, path, *size, corners, np.arange(n), ignore, np.ones(n), polygons, ignore)
    return DetectionDataset.build(["a", "b", "c"], [1, 2, 3], [row], source=folder, dataset_format="coco")


def test_objects_of_tiles_by_hand(tmp_path):
    """Tiles at x = 0, 60, 120. An object of 40 at 90..130: 10 of 40 (a quarter) in the first, all in the second."""
    dataset = make_dataset(tmp_path, [[90, 10, 130, 30], [205, 50, 215, 60], [55, 70, 63, 78]], ignored=[1])
    tiles = tile_dataset(dataset, 100, 0.2, 0.3)
    assert tiles.sizes.tolist() == [[100, 100]] * 3
    assert tiles.list_image_ids() == [7] * 3
    expected = [
        ([[90, 10, 100, 30], [55, 70, 63, 78]], [0, 2], [True, False]),
        ([[30, 10, 70, 30], [0, 70, 3, 78]], [0, 2], [False, False]),  # 3 of 8 is more than 0.3
        ([[0, 10, 10, 30], [85, 50, 95, 60]], [0, 1], [True, True]),
    ]
    for tile, (boxes, labels, ignore) in zip(tiles, expected, strict=True):
        assert tile.boxes.tolist() == boxes
        assert tile.labels.tolist() == labels
        assert tile.ignore.tolist() == ignore
    assert tiles[1].tile == (60, 0, 100, 220)
    assert tile_dataset(dataset, 100, 0.2, 0.25)[0].ignore.tolist() == [False, False], "a quarter is enough now"
    assert len(tile_dataset(dataset, 640, 0.2, 0.3)) == 1
    assert decode_mask(tiles[1], 0).flags.owndata, "a view would keep the mask of the whole image"


def test_doctor_measures_objects_in_tiles(tmp_path):
    """The smallest object is 3.25 pixels wide in an image of 40 x 30, which is resized to 32 x 24 as a whole."""
    for split in ("train", "val"):
        write_coco(tmp_path, split=split)

    def measure(*tiles):
        reports = check_dataset(f"data={tmp_path}", "data.size=[32,32]", *tiles, read_images=False).reports
        return [reports[split].statistics["smallest"]["network_side"] for split in ("train", "val")]

    assert measure() == pytest.approx([2.6, 2.6])
    assert measure("data.tiles.size=32") == pytest.approx([3.25, 2.6])
    assert measure("test.tiles.size=32") == pytest.approx([2.6, 3.25])


def bounds_of(image, k):
    has_color = ((image.permute(1, 2, 0).float() - torch.tensor(COLORS[k]).float()).abs() < 100).all(2)
    rows, columns = has_color.any(1).nonzero()[:, 0], has_color.any(0).nonzero()[:, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_tiles_show_their_objects(tmp_path, suffix):
    dataset = make_dataset(tmp_path, [[90, 10, 130, 30], [205, 50, 215, 60], [50, 70, 63, 78]], suffix=suffix)
    tiles = tile_dataset(dataset, 100, 0.2, 0)
    for batch in build_train_loader(tiles, TrainTransform([100], 100, flip=0.5), batch=1, masks=True).epoch(0):
        image, target = batch.images[0, :, :100, :100], batch.targets[0]
        assert len(target)
        for box, k, mask in zip(target.boxes, target.labels.tolist(), target.masks):
            assert box.tolist() == bounds_of(image, k)
            assert int(mask.sum()) == (box[2] - box[0]) * (box[3] - box[1])
            assert mask[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])].all()


def test_tiles_are_augmented_like_images(tmp_path):
    dataset = make_dataset(tmp_path, [[90, 10, 130, 30], [205, 50, 215, 60], [55, 70, 63, 78]])
    tiles = tile_dataset(dataset, 100, 0.2, 0.3)
    transform = AugmentedTransform([96], 96, mosaic=0.5, rotate=10, right_angles=True)
    whole, parallel = (
        list(build_train_loader(tiles, transform, batch=2, workers=workers).epoch(0)) for workers in (0, 1)
    )
    for a, b in zip(whole, parallel, strict=True):
        assert torch.equal(a.images, b.images)
        assert all(torch.equal(x.boxes, y.boxes) for x, y in zip(a.targets, b.targets))


def test_an_image_of_another_size(tmp_path):
    dataset = make_dataset(tmp_path, [[90, 10, 130, 30]])
    Image.new("RGB", (90, 80)).save(dataset.path(0))
    with pytest.raises(InputError, match=r"image\.png is 90x80 pixels, but its annotation says 220x100: correct"):
        list(build_train_loader(tile_dataset(dataset, 100, 0.2, 0.3), TrainTransform([96], 96), batch=1).epoch(0))


ENCODINGS = {
    "jpg": {"quality": 90},
    "png": {},
    "bmp": {},
    "tiff": {},
    "deflate.tiff": {"compression": "tiff_adobe_deflate"},
    "webp": {"lossless": True},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16"])
@pytest.mark.parametrize("suffix", ENCODINGS)
def test_a_window_is_a_part_of_the_image(tmp_path, suffix, mode):
    if (mode in ("P", "RGBA", "I;16") and suffix == "jpg") or (mode == "I;16" and suffix in ("bmp", "webp")):
        pytest.skip("the format has no such pixels")
    rng = np.random.default_rng(0)
    path = tmp_path / f"image.{suffix}"
    pixels = rng.integers(0, 65536, (300, 200)).astype(np.uint16) if mode == "I;16" else None
    noise = rng.integers(0, 256, (300, 200, 4), dtype=np.uint8)
    image = Image.fromarray(pixels) if mode == "I;16" else Image.fromarray(noise).convert("RGB").convert(mode)
    if mode == "RGBA":
        image = Image.fromarray(noise)
    image.save(path, **ENCODINGS[suffix])
    whole = read_image(path)
    for left, top, right, bottom in ((0, 0, 200, 300), (13, 7, 50, 20), (150, 250, 200, 300), (0, 120, 1, 121)):
        part = read_image(path, window=(left, top, right, bottom))
        assert torch.equal(part, whole[:, top:bottom, left:right])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_a_window_of_a_turned_image(tmp_path, suffix, orientation):
    path, exif = tmp_path / f"image.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, exif=exif)
    for applied in (True, False):
        whole = read_image(path, exif=applied)
        assert torch.equal(read_image(path, exif=applied, window=(5, 6, 30, 20)), whole[:, 6:20, 5:30])


def test_rows_outside_of_the_window_are_not_read(tmp_path):
    """The end of an uncompressed file may be missing, as long as the window lies before it."""
    path = tmp_path / "image.tiff"
    rows = np.arange(3000) % 251
    Image.fromarray(np.repeat(rows.astype(np.uint8)[:, None, None], 100, axis=1).repeat(3, axis=2)).save(path)
    path.write_bytes(path.read_bytes()[:-400_000])
    part = read_image(path, window=(10, 1000, 60, 1100))
    assert (part == torch.from_numpy(rows[1000:1100])[None, :, None]).all()
    for window in (None, (0, 2900, 100, 3000)):
        with pytest.raises(InputError, match="truncated or damaged"):
            read_image(path, window=window)


def test_tiles_smaller_than_the_stride():
    config = load("retinanet_tiny", ["data.tiles={size: 32, overlap: 0.2}", "model.pyramid.coarsest=7"])
    with pytest.raises(InputError, match=r"data\.tiles\.size=32 is smaller than the largest stride .*, 128 pixels"):
        check_config(config)
    check_config(load("retinanet_tiny", ["data.tiles.size=128"]))
    for text in ("data.tiles={size: 8}", "data.tiles={size: 640, overlap: 1}", "data.tiles=640"):
        with pytest.raises(InputError, match=r"data\.tiles"):
            load("retinanet_tiny", [text])


def test_browse_shows_tiles(scenes, tmp_path, capsys):
    arguments = ["browse", f"data={scenes}", f"out={tmp_path / 'tiles.png'}", "data.size=[48,48]", "data.tiles.size=48"]
    assert cli.run([*arguments, "--images", "20"]) == 0
    assert "20 images" in capsys.readouterr().out, "8 images of at least 64 pixels have 4 tiles each"


def test_ids_as_texts_follow(tmp_path):
    dataset = make_dataset(tmp_path, [[90, 10, 130, 30]])
    named = replace(dataset, image_id_texts=type(dataset.paths).pack([b"scan"]))
    assert tile_dataset(named, 100, 0.2, 0.3).list_image_ids() == ["scan"] * 3
