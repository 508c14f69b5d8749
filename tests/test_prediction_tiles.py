"""Validation and prediction in tiles: windows, detections shifted and merged, cut objects joined, partial reading."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fusedet
from exporting import ONE_LEVEL, TWO_LEVELS, save_run
from fusedet import cli
from fusedet.api.detection import detect_images
from fusedet.api.predictor import Prediction, Predictor, load
from fusedet.api.tiles_help import conclude_tiles
from fusedet.api.train_inputs import check_config
from fusedet.config import apply_overrides, parse
from fusedet.config import load as load_config
from fusedet.config.schema import PredictionTiles
from fusedet.data import dataset_images, large_images
from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.image_decoding import read_image
from fusedet.data.image_windows import decodes_windows
from fusedet.data.large_images import LargeImage, open_large_image, resize_image
from fusedet.data.loader import build_eval_loader
from fusedet.data.readers.auto import read_dataset
from fusedet.data.synthetic import generate_dataset
from fusedet.data.tiling import list_windows, view_dataset
from fusedet.data.transforms import EvalTransform
from fusedet.errors import InputError
from fusedet.exporters import ExportedDetector
from fusedet.models.detectors.cut_objects import find_cut, join_cut_objects
from fusedet.models.detectors.tta import ImageDetections
from fusedet.models.roi.mask import paste_masks, stretch_masks
from fusedet.types import BatchDetections
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered")

CPU = torch.device("cpu")
BRIGHT = 128


class Rectangles:
    """A detector of one bright rectangle per channel: its exact box, full masks, and a score of its height."""

    def __init__(self, **selection: Any) -> None:
        self.selection = selection
        self.neck = SimpleNamespace(levels=SimpleNamespace(strides=(8, 16, 32)))
        self.backbone = SimpleNamespace(scale=torch.zeros(1))
        self.counts: list[int] = []

    def detect(self, images: Tensor, sizes: Tensor, padded: bool = True) -> BatchDetections:
        self.counts.append(len(images))
        boxes, scores = torch.zeros(len(images), 3, 4), torch.zeros(len(images), 3)
        labels, counts = torch.zeros(len(images), 3).long(), torch.zeros(len(images)).long()
        for i, image in enumerate(images):
            rows = []
            for k, channel in enumerate(image):
                y, x = (channel > BRIGHT).nonzero().unbind(1)
                if len(y):
                    rows.append((int(y.max() - y.min()) / 1000, k, [x.min(), y.min(), x.max() + 1, y.max() + 1]))
            for j, (score, k, box) in enumerate(sorted(rows, key=lambda row: -row[0])):
                boxes[i, j], scores[i, j], labels[i, j] = torch.tensor(box).float(), score, k
            counts[i] = len(rows)
        return BatchDetections(boxes, scores, labels, counts, torch.ones(len(images), 3, 4, 4))


def draw(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """An image (H, W, 3) with a bright rectangle per channel."""
    pixels = np.full((*size, 3), 20, np.uint8)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        pixels[y1:y2, x1:x2, k] = 250
    return pixels


def make_predictor(size: int = 100, *overrides: str, **selection: Any) -> Predictor:
    """A predictor that sees tiles of `size` pixels at their own scale."""
    texts = ["data.size=[100,1000]", f"test.tiles.size={size}", "data.antialias=false", *overrides]
    detector: Any = Rectangles(**selection)
    return Predictor(detector, parse(apply_overrides({}, texts)), ["r", "g", "b"], [1, 2, 3], Path())


def only(prediction: Any) -> Prediction:
    assert isinstance(prediction, Prediction)
    return prediction


# -- the windows and the config


def test_windows_by_hand() -> None:
    """The whole image, then 2 rows of 3 tiles; an image no longer than a tile is seen once."""
    whole, tiles = [[0, 0, 220, 150]], [[x, y, x + 100, y + 100] for y in (0, 50) for x in (0, 60, 120)]
    assert list_windows(150, 220, PredictionTiles(size=100)).tolist() == whole + tiles
    assert list_windows(150, 220, PredictionTiles(size=100, whole=False)).tolist() == tiles
    for settings in (PredictionTiles(), PredictionTiles(size=220), PredictionTiles(size=220, whole=False)):
        assert list_windows(150, 220, settings).tolist() == whole


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("test.tiles={size: 640, overlap: 1}", "test.tiles.overlap=1 must be 0 or more and below 1"),
        ("test.tiles={size: 640, overlap: -0.1}", "test.tiles.overlap=-0.1 must be 0 or more and below 1"),
        ("test.tiles={size: 16}", "test.tiles.size=16 must be 32 or more"),
        ("test.tiles=640", "test.tiles must be a mapping with size, overlap, whole, ios, got 640"),
        ("test.tiles.whole=false", "test.tiles.whole=false needs tiles: set test.tiles.size, such as 640"),
        ("test.tiles.ios=0.5", "test.tiles.ios=0.5 needs tiles: set test.tiles.size, such as 640"),
        ("test.tiles={size: 640, ios: 1.5}", "test.tiles.ios=1.5 must be above 0 and at most 1"),
        ("test.tiles={sice: 640}", "did you mean 'test.tiles.size'"),
    ],
)
def test_wrong_settings(override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse(apply_overrides({}, [override]))
    assert message in str(error.value)


def test_tiles_smaller_than_the_stride(trained: Path) -> None:
    text = r"test\.tiles\.size=32 is smaller than the largest stride of the feature pyramid, 128 pixels: take tiles of"
    with pytest.raises(InputError, match=text):
        check_config(load_config("retinanet_tiny", ["test.tiles.size=32", "model.pyramid.coarsest=7"]))
    with pytest.raises(InputError, match=r"test\.tiles\.size=32 is smaller than the largest stride"):
        load(trained, "test.tiles.size=32")
    assert cli.run(["val", str(trained), "test.tiles.size=32"]) == 2


# -- detections of tiles


def test_an_object_at_a_border_is_found_once() -> None:
    """Tiles at x = 0, 60, 120 of 220. An object of 30 at 85..115 is cut by the first and whole in the second."""
    image = draw((100, 220), (85, 10, 115, 70))
    parts = [[60 + 25, 10, 60 + 55, 70], [85, 10, 100, 70]]
    for ios, expected in (("null", parts), ("0.5", parts[:1])):
        predictor = make_predictor(100, "test.tiles.whole=false", f"test.tiles.ios={ios}")
        detections = only(predictor.predict(image))
        assert sorted(detections.boxes.tolist()) == sorted(expected)
        assert detections.scores[0] == pytest.approx(0.059)
    with_whole = only(make_predictor(100, "test.tiles.ios=0.5").predict(image))
    assert with_whole.boxes.tolist() == parts[:1]


def test_an_object_larger_than_the_overlap_is_joined() -> None:
    """110 pixels at 50..160: 50..100 of it, 60..160 and 120..160 lie in the tiles."""
    image = draw((100, 220), (50, 10, 160, 70))
    (box,) = only(make_predictor(100, "test.tiles={whole: false, ios: 0.5}").predict(image)).boxes.tolist()
    assert box == [50, 10, 160, 70]
    boxes = only(make_predictor(100, "test.tiles={whole: false, ios: 0.9}").predict(image)).boxes.tolist()
    assert sorted(boxes) == [[50, 10, 100, 70], [60, 10, 160, 70]], "the last part lies in the second: IoS 1"


def test_masks_are_shifted_exactly() -> None:
    boxes = [(90, 20, 130, 80), (5, 100, 35, 140), (180, 5, 219, 149)]
    image = draw((150, 220), *boxes)
    detections = only(make_predictor(100, "test.tiles.whole=false").predict(image))
    assert detections.masks is not None
    assert len(detections) > len(boxes), "parts in several tiles"
    for box, mask in zip(detections.boxes, detections.masks):
        assert torch.equal(mask, paste_masks(torch.ones(1, 4, 4), box[None], (150, 220))[0])
    detections = only(make_predictor(100, "test.tiles={whole: false, ios: 0.3}").predict(image))
    assert detections.masks is not None
    for (x1, y1, x2, y2), mask in zip(detections.boxes.int().tolist(), detections.masks):
        assert int(mask[y1:y2, x1:x2].sum()) == int(mask.sum()) > 0.95 * (y2 - y1) * (x2 - x1)
    rows = sorted(zip(detections.labels.tolist(), detections.boxes.tolist()))
    assert rows == [(k, list(box)) for k, box in enumerate(boxes)]


def test_tiles_at_once_and_many_images() -> None:
    """Images in a row share batches of tiles; sizes that differ are kept apart."""
    predictor = make_predictor(100, "test.tiles.ios=0.5")
    images = [draw((100, 220), (85, 10, 115, 70)), draw((100, 100), (5, 5, 20, 30)), draw((150, 100), (5, 60, 45, 110))]
    expected = [only(predictor.predict(image)) for image in images]
    predictor.detector.counts.clear()  # type: ignore[union-attr]
    for one, wanted in zip(predictor.stream(images, batch=3), expected, strict=True):
        assert torch.equal(one.boxes, wanted.boxes)
        assert torch.equal(one.labels, wanted.labels)
    # 1 + 3 tiles, 1 image, 1 + 2 tiles
    assert predictor.detector.counts == [3, 3, 2]  # type: ignore[union-attr]
    assert [p.boxes.tolist() for p in expected[1:]] == [[[5, 5, 20, 30]], [[5, 60, 45, 110]]]


def test_max_det_counts_the_image() -> None:
    image = draw((100, 220), (85, 10, 115, 70), (0, 0, 20, 20), (200, 0, 210, 30))
    for ios in ("null", "0.5"):
        predictor = make_predictor(100, f"test.tiles.ios={ios}", max_det=2, iou=0.5)
        assert only(predictor.predict(image)).labels.tolist() == [0, 2 if ios == "0.5" else 0]


def rows(*values: tuple[float, ...], masks: Tensor | None = None) -> ImageDetections:
    """Rows (x1, y1, x2, y2, score, label, cut by)."""
    table = torch.tensor(values)
    return ImageDetections(table[:, :4], table[:, 4], table[:, 5].long(), masks, table[:, 6].long())


def test_cut_by_hand() -> None:
    """A window at 100..200 of an image of 200 x 50: its left border lies inside of the image."""
    boxes = torch.tensor([[100.0, 5, 140, 45], [103, 5, 143, 45], [104, 5, 143, 45], [150, 0, 200, 50]])
    low, high, size = torch.tensor([[100.0, 0], [200, 50], [200, 50]])
    assert find_cut(boxes, low, high, size).tolist() == [True, True, False, False], "within 1 + 5 % of 40 = 3 pixels"


def test_joining_by_hand() -> None:
    whole, left, right = (0, 0, 100, 40, 0.6, 0, -1), (0, 0, 60, 40, 0.9, 0, 1), (40, 0, 100, 40, 0.5, 0, 2)
    joined = join_cut_objects(rows(whole, left, right), 0.5)
    assert joined.boxes.tolist() == [[0, 0, 100, 40]]
    assert joined.scores.tolist() == pytest.approx([0.9]), "the best score of the parts"
    for unrelated in ((0, 0, 60, 40, 0.9, 1, 1), (200, 0, 260, 40, 0.9, 0, 1)):  # of another class, elsewhere
        assert len(join_cut_objects(rows(whole, unrelated), 0.5).boxes) == 2
    small = (10, 10, 20, 20, 0.95, 0, -1)
    assert len(join_cut_objects(rows(left, small), 0.5).boxes) == 2, "a part does not join a smaller object"
    same_tile = (*left[:6], 2)
    assert len(join_cut_objects(rows(same_tile, right), 0.3).boxes) == 2, "two objects of one tile"
    pair = join_cut_objects(rows(left, right), 0.3)  # 20 of 60
    assert pair.boxes.tolist() == [[0, 0, 100, 40]]
    assert len(join_cut_objects(rows(left, right), 0.34).boxes) == 2
    assert len(join_cut_objects(rows(whole)._replace(cut_by=torch.tensor([-1])), 0.5).boxes) == 1


def test_joining_masks() -> None:
    """Two full parts of 50 with 10 in common: the joined mask is full, and a lone left half stays a left half."""
    masks = torch.ones(2, 20, 20)
    left, right = (0, 0, 50, 20, 0.9, 0, 1), (40, 0, 90, 20, 0.5, 0, 2)
    joined = join_cut_objects(rows(left, right, masks=masks), 0.2)
    assert joined.masks is not None
    assert paste_masks(joined.masks, joined.boxes, (30, 120))[0].sum() == 90 * 20
    half = stretch_masks(masks[:1], torch.tensor([[0.0, 0, 50, 20]]), torch.tensor([0.0, 0, 100, 20]))
    assert half[0].mean(dim=0).round().tolist() == [1] * 10 + [0] * 10
    same = torch.rand(3, 6, 6)
    boxes = torch.tensor([[3.0, 4, 15, 20]]).repeat(3, 1)
    assert torch.allclose(stretch_masks(same, boxes, boxes[0]), same, atol=1e-5)


# -- validation


def write_images(folder: Path, suffix: str = "png") -> tuple[DetectionDataset, list[list[int]]]:
    """Three images of 1, 4 and 3 windows, each with a red object at the border of a tile."""
    boxes, sizes = [[5, 5, 20, 30], [85, 10, 115, 70], [5, 60, 45, 110]], [(100, 100), (100, 220), (150, 100)]
    records = []
    for i, (box, size) in enumerate(zip(boxes, sizes)):
        path = folder / f"{i}.{suffix}"
        Image.fromarray(draw(size, tuple(box))).save(path)  # type: ignore[arg-type]
        corners, flags = np.array([box], float), np.array([False])
        x1, y1, x2, y2 = box
        polygon = [[[x1, y1, x2, y1, x2, y2, x1, y2]]]
        records.append(ImageAnnotations(10 + i, path, *size, corners, np.array([0]), flags, np.ones(1), polygon, flags))
    names = ["r", "g", "b"]
    return DetectionDataset.build(names, [1, 2, 3], records, source=folder, dataset_format="coco"), boxes


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("workers", [0, 1])
def test_validation_equals_prediction(tmp_path: Path, suffix: str, workers: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(large_images, "LARGE", 0)
    dataset, boxes = write_images(tmp_path, suffix)
    predictor = make_predictor(100, "test.tiles.ios=0.5")
    tiles = predictor.config.test.tiles
    for world in (1, 2):
        by_id = {}
        for rank in range(world):
            loader = build_eval_loader(
                dataset,
                predictor.transforms[0],
                batch=2 * world,
                workers=workers if world == 1 else 0,
                rank=rank,
                world=world,
                tiles=tiles,
            )
            by_id |= dict(detect_images(predictor.detector, loader, CPU, tiles.ios))
        assert sorted(by_id) == [10, 11, 12]
        for i, box in enumerate(boxes):
            prediction = only(predictor.predict(dataset.path(i)))
            assert torch.equal(by_id[10 + i].boxes, prediction.boxes)
            assert torch.equal(by_id[10 + i].scores, prediction.scores)
            assert prediction.boxes.tolist() == [box]


def test_an_image_is_decoded_once(tmp_path: Path, monkeypatch: Any) -> None:
    dataset, _ = write_images(tmp_path)
    decoded: list[Path] = []
    monkeypatch.setattr(
        dataset_images,
        "read_image",
        lambda path, *args, **options: (decoded.append(path), read_image(path, *args, **options))[1],
    )
    loader = build_eval_loader(dataset, EvalTransform(100, 1000), batch=2, tiles=PredictionTiles(size=100))
    assert [len(batch) for batch in loader] == [2, 2, 2, 2]
    assert sorted(decoded) == sorted(dataset.path(i) for i in range(3))


def test_targets_of_windows(tmp_path: Path) -> None:
    """They serve the loss of a validation: 15 of 30 pixels of an object at 85..115 lie in the first tile."""
    dataset, _ = write_images(tmp_path)
    for share, count in ((0.4, 3), (0.6, 2)):
        tiled = view_dataset(dataset, PredictionTiles(size=100), share)
        own = [tiled[i] for i in range(len(tiled)) if tiled[i].image_id == 11]
        assert [len(record.boxes) for record in own] == [1, 1, 1, 0]
        assert sum(int((~record.ignore).sum()) for record in own) == count
    (batch, *_) = build_eval_loader(
        dataset, EvalTransform(100, 1000), batch=8, tiles=PredictionTiles(size=100), masks=True
    )
    assert batch.targets is not None
    assert batch.windows is not None
    for target, window in zip(batch.targets, batch.windows.tolist(), strict=True):
        assert target.masks is not None
        for box, mask in zip(target.boxes.int().tolist(), target.masks):
            assert int(mask.sum()) == (box[2] - box[0]) * (box[3] - box[1]), window


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    dataset, _ = write_images(tmp_path)
    Image.new("RGB", (90, 80)).save(dataset.path(1))
    with pytest.raises(InputError, match=r"1\.png is 90x80 pixels, but its annotation says 220x100: correct"):
        list(build_eval_loader(dataset, EvalTransform(100, 1000), batch=2, tiles=PredictionTiles(size=100)))


# -- one tile is the whole image


def test_one_tile_changes_nothing(trained: Path, scenes: Path) -> None:
    files = sorted((scenes / "val").glob("*.*"))[:4]
    files = [file for file in files if file.suffix != ".json"]
    plain = load(trained, device="cpu").predict(files, batch=2)
    for overrides in ("test.tiles.size=128", "test.tiles={size: 200, whole: false, ios: 0.5}"):
        tiled = load(trained, overrides, device="cpu").predict(files, batch=2)
        for one, other in zip(plain, tiled, strict=True):
            assert torch.equal(one.boxes, other.boxes)
            assert torch.equal(one.scores, other.scores)


def test_one_tile_is_the_same_batch(scenes: Path) -> None:
    dataset = read_dataset(scenes, "val")
    transform = EvalTransform(64, 96)
    loaders = [
        build_eval_loader(dataset, transform, batch=3, tiles=tiles) for tiles in (None, PredictionTiles(size=96))
    ]
    for plain, tiled in zip(*loaders, strict=True):
        assert torch.equal(plain.images, tiled.images)
        assert plain.ids == tiled.ids
        assert tiled.is_last == (True,) * len(tiled)


# -- files that are too large for memory

RAW = ("tiff", "npy")


@pytest.mark.parametrize("suffix", [*RAW, "bmp", "png", "jpg", "deflate.tiff"])
def test_large_files(tmp_path: Path, suffix: str, monkeypatch: Any) -> None:
    """Windows and the resized image equal those of the decoded file."""
    path = tmp_path / f"image.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (150, 211, 3), dtype=np.uint8)
    if suffix == "npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path, **({"compression": "tiff_adobe_deflate"} if "deflate" in suffix else {}))
    assert open_large_image(path, 3) is None, "small files are decoded at once"
    monkeypatch.setattr(large_images, "LARGE", 0)
    large = open_large_image(path, 3)
    assert (large is not None) == (suffix in (*RAW, "deflate.tiff"))
    if large is None:
        return
    whole = torch.from_numpy(pixels).permute(2, 0, 1)
    assert large.shape == whole.shape
    assert torch.equal(large.read(), whole)
    assert torch.equal(large.crop((13, 7, 50, 20)), whole[:, 7:20, 13:50])
    monkeypatch.setattr(large_images, "_STRIP", 211 * 40)  # four strips, the last one smaller
    for antialias in (True, False):
        for size in ((40, 57), (150, 300), (75, 211)):
            off = (large.resize(size, antialias).int() - resize_image(whole, size, antialias).int()).abs()
            assert off.max() <= 1
            assert (off > 0).float().mean() < 0.02, "rounded between the axes, as torch does where the CPU has AVX2"


def write_strips(path: Path, pixels: np.ndarray, rows: int) -> None:
    """An uncompressed TIFF file with as many rows per strip, which Pillow does not write."""
    height, width = pixels.shape[:2]
    count = -(-height // rows)
    start = 8 + 2 + 12 * 9 + 4
    bits, offsets, lengths = start, start + 6, start + 6 + 4 * count
    data, strip = lengths + 4 * count, width * rows * 3
    tags = [(256, 1, width), (257, 1, height), (258, 3, bits), (259, 1, 1), (262, 1, 2), (273, count, offsets)]
    tags += [(277, 1, 3), (278, 1, rows), (279, count, lengths)]
    content = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, n, value in tags:
        content += struct.pack("<HHII", tag, 3 if tag == 258 else 4, n, value)
    content += struct.pack("<I3H", 0, 8, 8, 8)
    content += struct.pack(f"<{count}I", *[data + i * strip for i in range(count)])
    content += struct.pack(f"<{count}I", *[min(strip, width * 3 * (height - i * rows)) for i in range(count)])
    path.write_bytes(content + pixels.tobytes())


def test_windows_of_a_file_in_strips(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 70, 3), dtype=np.uint8)
    write_strips(tmp_path / "image.tiff", pixels, 16)
    whole = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "image.tiff"), whole)
    for left, top, right, bottom in ((0, 0, 70, 150), (5, 20, 30, 90), (0, 140, 70, 150), (60, 3, 70, 4)):
        part = read_image(tmp_path / "image.tiff", window=(left, top, right, bottom))
        assert torch.equal(part, whole[:, top:bottom, left:right])


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_turned_files_are_decoded_at_once(tmp_path: Path, orientation: int) -> None:
    path, exif = tmp_path / "image.tiff", Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 60)).save(path, exif=exif)
    assert decodes_windows(path) == (orientation == 1)


def test_a_large_file_is_predicted_and_written(tmp_path: Path, monkeypatch: Any) -> None:
    dataset, _ = write_images(tmp_path, "tiff")
    monkeypatch.setattr(large_images, "LARGE", 0)
    prediction = only(make_predictor(100, "test.tiles.ios=0.5").predict(dataset.path(1)))
    assert isinstance(prediction.image, LargeImage)
    assert prediction.plot(score=0).size == (220, 100)
    from fusedet.api.prediction_exports import write_crops, write_yolo_labels

    write_yolo_labels(prediction, tmp_path / "labels.txt", 0)
    assert (tmp_path / "labels.txt").read_text() == f"0 {100 / 220:.6f} 0.400000 {30 / 220:.6f} 0.600000\n"
    write_crops(prediction, tmp_path, "a", 0)
    assert Image.open(tmp_path / "r" / "a-1.jpg").size == (30, 60)


# -- exported models and the commands


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer images than `scenes`, since each is seen in 7 windows: 3 to train on, 3 to validate on."""
    folder = tmp_path_factory.mktemp("few") / "data"
    return generate_dataset(folder, images=6, seed=0, size=(64, 96), splits={"train": 0.5, "val": 0.5})


def test_an_exported_model_of_fixed_size(tmp_path: Path) -> None:
    """A file of one image of 64 x 64 pixels sees tiles as PyTorch does; its session is PyTorch's detector here."""
    path, tiles = save_run(tmp_path / "run", "retinanet", *TWO_LEVELS), "test.tiles={size: 64, ios: 0.5}"
    run = load(path, tiles, "data.size=[64,64]", device="cpu")
    detector: Any = run.detector
    shapes = set()

    def session(images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        shapes.add(images.shape)
        outputs = detector.detect(torch.from_numpy(images), torch.from_numpy(sizes))
        return {name: outputs[i].numpy() for i, name in enumerate(("boxes", "scores", "labels", "counts"))}

    metadata: Any = SimpleNamespace(
        size=[64, 64],
        batch=1,
        thresholds=run.config.test,
        names=run.names,
        strides=detector.neck.levels.strides,
        mask_size=None,
    )
    exported = ExportedDetector(session, metadata)
    image = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    predictor = Predictor(exported, run.config, run.names, run.category_ids, path)
    ours = only(predictor.predict([image], 2)[0])  # type: ignore[index]
    wanted = only(run.predict(image))
    assert shapes == {(1, 3, 64, 64)}
    assert len(wanted) > 0
    assert torch.allclose(ours.boxes, wanted.boxes, atol=1e-3)
    assert torch.allclose(ours.scores, wanted.scores, atol=1e-5)
    few = parse(apply_overrides({}, ["test.tiles.size=32"]))
    metadata.strides = [8, 64]
    with pytest.raises(InputError, match=r"test\.tiles\.size=32 is smaller than the largest stride"):
        Predictor(exported, few, run.names, run.category_ids, path)


def test_train_val_and_predict_agree(few_scenes: Path, tmp_path: Path) -> None:
    """The validations of a training, with their loss, `val` and `predict` see the same tiles."""
    out = tmp_path / "run"
    tiles = ["test.tiles={size: 48, ios: 0.6}", "test.batch=1", "train.validation_loss=true"]
    tiles.append("model.pyramid.coarsest=5")
    assert cli.run(["train", "retinanet_tiny", f"data={few_scenes}", f"out={out}", *SMALL, *tiles]) == 0
    assert "val_loss" in (out / "metrics.csv").read_text()
    assert cli.run(["val", str(out), f"out={tmp_path / 'val'}"]) == 0
    metrics = [json.loads((f / "metrics.json").read_text()) for f in (out, tmp_path / "val")]
    assert metrics[0]["AP"] == pytest.approx(metrics[1]["AP"], abs=1e-6)
    dataset = read_dataset(few_scenes, "val")
    results = json.loads((tmp_path / "val" / "val.bbox.json").read_text())
    tiled, plain = (
        fusedet.load(out, device="cpu"),
        fusedet.load(out, "test.tiles={size: null, ios: null}", device="cpu"),
    )
    for i in range(3):
        scored = [r["score"] for r in results if r["image_id"] == int(dataset.image_ids[i])]
        detections, other = (only(predictor.predict(dataset.path(i))) for predictor in (tiled, plain))
        assert detections.scores.tolist() == pytest.approx(scored, abs=1e-5)
        assert scored != other.scores.tolist()
    arguments = ["predict", str(out), str(dataset.path(0)), f"out={tmp_path / 'predicted'}", "test.batch=2"]
    assert cli.run(arguments) == 0
    written = json.loads((tmp_path / "predicted" / "predictions.json").read_text())
    scored = [r["score"] for r in results if r["image_id"] == int(dataset.image_ids[0])]
    assert sorted(a["score"] for a in written["annotations"]) == pytest.approx(sorted(scored), abs=1e-4)


def test_tiles_help(tmp_path: Path, capsys: Any) -> None:
    splits = {"train": 0.5, "val": 0.5}
    data = generate_dataset(tmp_path / "data", images=4, seed=0, size=(64, 96), splits=splits)
    run = save_run(tmp_path / "run", "retinanet", *ONE_LEVEL, data=data)
    arguments = ["val", str(run), "--tiles-help", "--resamples", "40", "test.tiles.size=48", "device=cpu", "--json"]
    assert cli.run([*arguments, "test.size_bins=[0,16,1000]"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["metrics"]) >= {"AP", "APs", "APm", "APl", "AP 0-16 px"}
    assert report["tiles"]["per_image"] > 2
    assert report["seconds_per_image"]["b"] > 0
    assert "an image takes" in report["conclusion"]
    for side, tiles, name in (("a", "{size: null}", "whole"), ("b", "{size: 48}", "tiles")):
        assert cli.run(["val", str(run), f"out={tmp_path / side}", f"test.tiles={tiles}", "device=cpu"]) == 0
        metrics = json.loads((tmp_path / side / "metrics.json").read_text())
        assert report["metrics"]["AP"][side] == pytest.approx(metrics["AP"], abs=1e-9)
        stored = json.loads((run / "val-tiles" / f"{name}.bbox.json").read_text())
        assert len(stored) == len(json.loads((tmp_path / side / "val.bbox.json").read_text()))
    capsys.readouterr()
    for wrong, message in (
        (["test.tiles.size=200"], "is longer than a tile of test.tiles.size=200: the longest has"),
        (["test.tiles.size=32", "--voc"], "--tiles-help does not use --voc: leave out --voc"),
    ):
        assert cli.run(["val", str(run), "--tiles-help", *wrong]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_conclusions() -> None:
    def row(low: float, high: float) -> dict[str, float]:
        return {"difference": (low + high) / 2, "low": low, "high": high}

    sizes = {"APs": row(0.1, 0.3), "APm": row(-0.1, 0.1), "APl": row(-0.3, -0.1)}
    for bounds, begin in (
        (
            (0.1, 0.2),
            "Tiles help here: AP +0.150, 95 % interval over the 9 images +0.100 to +0.200; an image takes 5.0",
        ),
        ((-0.2, -0.1), "Tiles harm here: AP -0.150"),
        ((-0.1, 0.2), "It is open whether tiles help here: AP +0.050"),
    ):
        text = conclude_tiles({"AP": row(*bounds)} | sizes, 5, 9)
        assert text.startswith(begin)
        assert text.endswith("times as long. Small objects gain. Large objects lose.") or "holds 0" in text
    nothing = row(float("nan"), float("nan"))
    assert conclude_tiles({"AP": nothing}, 2, 9).startswith(
        "Nothing can be concluded about tiles: the data hold no object"
    )


@pytest.mark.slow
def test_an_onnx_file(tmp_path: Path, scenes: Path) -> None:
    pytest.importorskip("onnxruntime")
    run = save_run(tmp_path / "run", "retinanet", *TWO_LEVELS, data=scenes)
    fusedet.export(run, out=str(tmp_path / "exported"))
    image = np.asarray(Image.open(next((scenes / "val").glob("*.jpg"))).convert("RGB").resize((150, 100)))
    texts = "test.tiles={size: 64, ios: 0.5}"
    ours, file = (only(load(path, texts, device="cpu").predict(image)) for path in (run, tmp_path / "exported"))
    assert len(ours) > 0
    assert torch.allclose(ours.boxes, file.boxes, atol=1e-2)
    assert torch.allclose(ours.scores, file.scores, atol=1e-4)
    assert cli.run(["val", str(tmp_path / "exported"), texts, f"out={tmp_path / 'val'}"]) == 0
