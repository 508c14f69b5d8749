"""Data augmentation: boxes and masks follow drawn images through every operation, and samples repeat."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fusedet.api import browse
from fusedet.api.train_inputs import train_transform
from fusedet.config import parse
from fusedet.data.augmentation import AugmentedTransform
from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.labeled_image import LabeledImage, mask_bounds, to_boxes
from fusedet.data.loader import build_train_loader
from fusedet.data.mixing import blend, join_quadrants, paste
from fusedet.errors import InputError

COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


def draw(height, width, boxes, shade=0):
    """A gray image with filled rectangles, the object k in the color k, and its annotations with polygons."""
    image = np.full((height, width, 3), shade, np.uint8)
    for (x1, y1, x2, y2), color in zip(boxes, COLORS):
        image[y1:y2, x1:x2] = color
    n = len(boxes)
    polygons = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes]
    annotated = ImageAnnotations(
        1,
        Path("x.png"),
        height,
        width,
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.arange(n),
        np.zeros(n, bool),
        np.ones(n),
        polygons,
        np.zeros(n, bool),
    )
    return torch.from_numpy(image).permute(2, 0, 1), annotated


def bounds_of(image, k):
    """The box of what has the color k, or None; pixels that the resize has blended count from one half on."""
    has_color = ((image.permute(1, 2, 0).float() - torch.tensor(COLORS[k]).float()).abs() < 128).all(2)
    if not has_color.any():
        return None
    rows, columns = has_color.any(1).nonzero()[:, 0], has_color.any(0).nonzero()[:, 0]
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def assert_follows(image, target, tolerance=1.0):
    """Every box encloses its color, and with masks the mask is what has that color."""
    for i, k in enumerate(target.labels.tolist()):
        box = target.boxes[i]
        if min(box[2:] - box[:2]) < 2:
            continue  # the resize blends the whole object with its neighborhood
        assert box.tolist() == pytest.approx(bounds_of(image, k), abs=tolerance)
        if target.masks is not None:
            assert mask_bounds(target.masks[i : i + 1])[0].tolist() == pytest.approx(box.tolist(), abs=tolerance)


@st.composite
def rectangles(draw_from, height, width):
    """Up to three rectangles side by side, so that none covers another."""
    count = draw_from(st.integers(1, 3))
    boxes = []
    for k in range(count):
        left, right = k * width // count, (k + 1) * width // count
        x1 = draw_from(st.integers(left, right - 9))
        y1 = draw_from(st.integers(0, height - 9))
        x2, y2 = draw_from(st.integers(x1 + 8, right)), draw_from(st.integers(y1 + 8, height))
        boxes.append([x1, y1, x2, y2])
    return boxes


OPTIONS = {
    "scale_jitter": {"scale_jitter": (0.3, 2.0)},
    "crop": {"crop": (0.3, 0.9)},
    "crop of several scales": {"crop": (0.5, 1.0), "sizes": (40, 70), "resize": "range"},
    "right_angles": {"right_angles": True},
    "all": {"scale_jitter": (0.3, 2.0), "right_angles": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=20)
@given(st.data())
def test_boxes_and_masks_follow_the_image(name, data):
    height, width = data.draw(st.integers(50, 90)), data.draw(st.integers(50, 90))
    image, annotated = draw(height, width, data.draw(rectangles(height, width)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    options = {"sizes": (60,), "max_size": 80, "min_visible": 0} | OPTIONS[name]
    changed, _, target = AugmentedTransform(**options)(image, annotated, masks=True)
    assert changed.dtype == torch.uint8
    assert target.masks.shape[1:] == changed.shape[1:]
    assert_follows(changed, target)
    seen = {k for k in range(3) if bounds_of(changed, k)}
    assert set(target.labels.tolist()) >= {k for k in seen if min_side(bounds_of(changed, k)) > 2}, "none is lost"


def min_side(box):
    return min(box[2] - box[0], box[3] - box[1])


@settings(max_examples=40)
@given(st.data())
def test_network_size_is_the_first_draw(data):
    height, width = data.draw(st.integers(8, 90)), data.draw(st.integers(8, 90))
    image, annotated = draw(height, width, [[1, 1, 7, 7]])
    options = {"sizes": (60,), "max_size": 80, "mosaic": 0.5, "right_angles": True}
    kind = data.draw(st.sampled_from([{}, {"scale_jitter": (0.1, 2)}, {"crop": (0.1, 1)}]))
    transform = AugmentedTransform(**options, **kind, read_other=lambda: (image, annotated))
    seed = data.draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    size = transform.network_size(height, width)
    torch.manual_seed(seed)
    assert tuple(transform(image, annotated)[0].shape[1:]) == size
    assert max(size) <= 80
    assert min(size) <= 60


def test_scale_jitter_by_hand():
    """Factor 2 of an image of 40 x 80 at [40, 80]: a window of 20 x 40 becomes the canvas; factor 1/2 shrinks it."""
    image, annotated = draw(40, 80, [[0, 0, 80, 40]])
    changed, scale, target = AugmentedTransform([40], 80, scale_jitter=(2, 2), flip=0)(image, annotated)
    assert changed.shape == (3, 40, 80)
    assert scale == (2, 2)
    assert target.boxes.tolist() == [[0, 0, 80, 40]], "a quarter of the object is visible"
    changed, scale, target = AugmentedTransform([40], 80, scale_jitter=(0.5, 0.5), flip=0)(image, annotated)
    assert changed.shape == (3, 20, 40)
    assert scale == (0.5, 0.5)
    assert target.boxes.tolist() == [[0, 0, 40, 20]]


@settings(max_examples=40)
@given(st.data())
def test_a_crop_keeps_an_object(data):
    height, width = 70, 90
    boxes = data.draw(rectangles(height, width))
    image, annotated = draw(height, width, boxes)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    transform = AugmentedTransform([70], 90, crop=(0.4, 0.8), flip=0, min_visible=1)
    changed, (sx, sy), target = transform(image, annotated)
    window = [changed.shape[2] / sx, changed.shape[1] / sy]
    fits = [
        k for k, (x1, y1, x2, y2) in enumerate(boxes) if x2 - x1 <= window[0] + 1e-6 and y2 - y1 <= window[1] + 1e-6
    ]
    assert target.labels.tolist() or not fits
    for k, box in zip(target.labels.tolist(), target.boxes):
        x1, y1, x2, y2 = boxes[k]
        assert (box[2:] - box[:2]).tolist() == pytest.approx([(x2 - x1) * sx, (y2 - y1) * sy], abs=1e-3)


def label(image, annotated, masks=True):
    return LabeledImage.load(image, annotated, masks)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_right_angles_are_exact(turns):
    boxes = [[3, 5, 20, 11], [25, 20, 31, 38]]
    turned = label(*draw(40, 60, boxes)).turn(turns)
    assert turned.size == ((60, 40) if turns % 2 else (40, 60))
    for k in range(2):
        assert turned.boxes[k].tolist() == bounds_of(turned.image, k)
        assert mask_bounds(turned.masks)[k].tolist() == bounds_of(turned.image, k)


@settings(max_examples=25)
@given(st.floats(-180, 180), st.floats(-30, 30), st.integers(0, 1))
def test_boxes_of_warped_objects_are_those_of_their_masks(angle, shear, k):
    box = [[40, 30, 70, 42], [50, 60, 58, 80]][k]
    warped = label(*draw(100, 110, [box])).warp(angle, shear)
    mask = warped.masks[0].bool()
    red = ((warped.image.permute(1, 2, 0).float() - torch.tensor(COLORS[0]).float()).abs() < 128).all(2)
    edge = 2 * (box[2] - box[0] + box[3] - box[1])
    assert (mask ^ red).sum() <= 0.75 * edge * (1 + abs(shear) / 45), "image and mask warp alike"
    rows, columns = mask.nonzero().unbind(1)
    assert warped.boxes[0].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert float(warped.visible[0]) == pytest.approx(1, abs=0.1)


def test_a_rotation_by_hand():
    """A bar of 60 x 10 about the center, turned by 90 degrees, stands upright; by 45 degrees its box is a square."""
    bar = draw(100, 100, [[20, 45, 80, 55]])
    assert label(*bar).warp(90, 0).boxes.tolist() == [pytest.approx([45, 20, 55, 80], abs=1)]
    half = (60 + 10) / 2 / 2**0.5
    assert label(*bar).warp(45, 0).boxes.tolist() == [
        pytest.approx([50 - half, 50 - half, 50 + half, 50 + half], abs=1)
    ]


def test_objects_that_leave_the_image_by_a_rotation():
    warped = label(*draw(100, 40, [[0, 0, 10, 10], [15, 45, 25, 55]])).warp(90, 0)
    assert warped.labels.tolist() == [1], "the corner is outside now"


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_mosaic(seed):
    """Four images of four shades: each fills one quadrant, and its object lies in that quadrant."""
    scenes = [draw(50, 60, [[10, 12, 40, 44]], shade=40 + 50 * k) for k in range(4)]
    for k, (image, annotated) in enumerate(scenes):
        image[:, 12:44, 10:40] = torch.tensor(COLORS[k], dtype=torch.uint8)[:, None, None]
        annotated.labels[:] = k
    others = iter(scenes[1:])
    torch.manual_seed(seed)
    transform = AugmentedTransform([60], 80, mosaic=1, min_visible=0, read_other=lambda: next(others))
    image, _, target = transform(*scenes[0], masks=True)
    assert image.shape == (3, 60, 80)
    assert target.masks.shape[1:] == (60, 80)
    assert_follows(image, target, tolerance=1.5)
    assert sorted(target.labels.tolist()) == [0, 1, 2, 3], "every image shows its object"
    assert not (image == 0).all(0).any(), "nothing is left unfilled"


def test_quadrants_by_hand():
    sizes = ((10, 20), (10, 30), (40, 20), (40, 30))
    parts = [label(*draw(h, w, [[1, 2, 9, 8]], shade=50)) for h, w in sizes]
    joined = join_quadrants(parts)
    assert joined.size == (50, 50)
    assert joined.boxes.tolist() == [[1, 2, 9, 8], [21, 2, 29, 8], [1, 12, 9, 18], [21, 12, 29, 18]]
    assert torch.equal(mask_bounds(joined.masks), joined.boxes.as_subclass(torch.Tensor))


def test_blend_by_hand():
    first, second = label(*draw(8, 8, [[0, 0, 4, 4]])), label(*draw(8, 8, [[4, 4, 8, 8]], shade=100))
    mixed = blend(first, second, 0.75)
    assert mixed.image[:, 0, 0].tolist() == [int(0.75 * 255 + 25), 25, 25]
    assert mixed.image[:, 5, 5].tolist() == [int(0.25 * 255), 0, 0]
    assert mixed.boxes.tolist() == [[0, 0, 4, 4], [4, 4, 8, 8]]
    assert len(mixed.masks) == 2


def test_paste_by_hand():
    """An object that covers the right half and one that covers all but a strip."""
    onto = label(*draw(20, 20, [[0, 0, 8, 8], [10, 10, 20, 20]]))
    source = label(*draw(20, 20, [[4, 0, 8, 8], [11, 10, 20, 20]], shade=9))
    source.image[:, 0:8, 4:8] = 200
    source.image[:, 10:20, 11:20] = 201
    pasted = paste(onto, source)
    assert pasted.boxes.tolist() == [[0, 0, 4, 8], [10, 10, 11, 20], [4, 0, 8, 8], [11, 10, 20, 20]]
    assert pasted.visible.tolist() == pytest.approx([0.5, 0.1, 1, 1])
    assert pasted.masks.sum((1, 2)).tolist() == [32, 10, 32, 90]
    assert pasted.image[0, 2, 5] == 200
    assert pasted.image[:, 2, 2].tolist() == [255, 0, 0]
    assert pasted.image[:, 9, 9].tolist() == [0, 0, 0], "the background below stays"
    target = pasted.to_target(0.25, masks=True)
    assert target.boxes.tolist() == [[0, 0, 4, 8], [4, 0, 8, 8], [11, 10, 20, 20]]
    assert target.ignore.tolist() == [[10, 10, 11, 20]]
    assert onto.masks.sum((1, 2)).tolist() == [64, 100], "the input stays"


def test_the_rule_of_leftovers():
    """Crop to x in 10..: 1/4 of the first, 1/5 of the second, half a pixel of the third, all of the fourth is left."""
    image, annotated = draw(60, 60, [[2, 5, 12, 25], [6, 30, 11, 40], [4, 45, 10, 55], [40, 5, 50, 15]])
    annotated.boxes[0, 2], annotated.boxes[0, 0] = 12, 4  # 8 wide, of which 2 remain: a quarter
    annotated.boxes[2, 2] = 10.5
    target = label(image, annotated, masks=False).crop(0, 10, 60, 50).to_target(0.25, masks=False)
    assert target.boxes.tolist() == [[0, 5, 2, 25], [30, 5, 40, 15]]
    assert target.ignore.tolist() == [[0, 30, 1, 40]]


def test_copy_paste_pastes_whole_objects():
    onto, source = draw(60, 60, []), draw(60, 60, [[5, 5, 25, 25], [30, 30, 55, 50]], shade=77)
    transform = AugmentedTransform([60], 60, copy_paste=1, read_other=lambda: source)
    counts = []
    for seed in range(20):
        torch.manual_seed(seed)
        image, _, target = transform(*onto, masks=True)
        assert_follows(image, target, tolerance=1.5)
        assert not (image == 77).all(0).any(), "the background is not pasted"
        counts.append(len(target))
    assert set(counts) == {0, 1, 2}


def test_mixing_ends():
    transform = AugmentedTransform([60], 60, mosaic=1, mixup=1, mixing_epochs=3)
    assert [transform.in_epoch(i, None).mosaic for i in range(5)] == [1, 1, 1, 0, 0]
    assert [transform.in_epoch(i, None).mixup for i in range(5)] == [1, 1, 1, 0, 0]


def write_dataset(folder, count=7, masks=True):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        height, width = [(40, 60), (60, 40), (50, 50)][i % 3]
        x, y = rng.integers(0, 20, 2).tolist()
        image, annotated = draw(height, width, [[x, y, x + 15, y + 12]], shade=20 * i)
        path = folder / f"{i}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        segmentations = annotated.segmentations if masks else [None]
        rows.append(replace(annotated, image_id=i, path=path, segmentations=segmentations))
    return DetectionDataset.build(["a"], [1], rows, source=folder, dataset_format="coco")


EVERYTHING = AugmentedTransform(
    [48],
    64,
    photometric=True,
    scale_jitter=(0.3, 2),
    rotate=20,
    shear=5,
    right_angles=True,
    mosaic=0.5,
    mixup=0.5,
    mixing_epochs=2,
)


def assert_equal(first, second):
    assert first.ids == second.ids
    assert torch.equal(first.images, second.images)
    for a, b in zip(first.targets, second.targets, strict=True):
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.ignore, b.ignore)
        assert torch.equal(a.masks, b.masks)


@pytest.mark.parametrize("transform", [EVERYTHING, replace(EVERYTHING, mixup=0.0, copy_paste=0.7)])
def test_samples_depend_on_seed_epoch_and_index_only(tmp_path, transform):
    dataset = write_dataset(tmp_path)
    whole = list(build_train_loader(dataset, transform, batch=4, seed=5, masks=True).epoch(1))
    loader = build_train_loader(dataset, transform, batch=4, seed=5, masks=True, workers=2)
    for a, b in zip(whole, loader.epoch(1), strict=True):
        assert_equal(a, b)
    for a, b in zip(whole[1:], loader.epoch(1, start=1), strict=True):
        assert_equal(a, b)
    for rank in (0, 1):
        loader = build_train_loader(dataset, transform, batch=4, seed=5, masks=True, rank=rank, world=2)
        for a, b in zip(whole, loader.epoch(1), strict=True):
            own = slice(2 * rank, 2 * rank + 2)
            assert a.ids[own] == b.ids
            assert torch.equal(a.images[own], b.images), "padded like the joint batch"
    other = next(build_train_loader(dataset, transform, batch=4, seed=6, masks=True).epoch(1))
    assert other.images.shape != whole[0].images.shape or not torch.equal(other.images, whole[0].images)


def test_an_unreadable_image_of_a_mosaic(tmp_path):
    dataset = write_dataset(tmp_path, 3)
    (tmp_path / "2.png").write_bytes(b"gone")
    transform = AugmentedTransform([48], 64, mosaic=1)
    with pytest.raises(InputError, match=r"2\.png is empty or not an image"):
        list(build_train_loader(dataset, transform, batch=1).epoch(0))


def test_objects_without_masks_are_refused(tmp_path):
    dataset = write_dataset(tmp_path, masks=False)
    for options, text in (
        (
            {"rotate": 10.0},
            r"data\.rotate=10 needs the mask of every object, but 7 of the 7 .* data\.right_angles=true",
        ),
        ({"shear": 5.0}, r"data\.shear=5 needs the mask"),
        ({"copy_paste": 0.5}, r"data\.copy_paste=0\.5 needs the mask .*: use data with masks$"),
    ):
        with pytest.raises(InputError, match=text):
            build_train_loader(dataset, AugmentedTransform([48], 64, **options), batch=1)
    build_train_loader(dataset, AugmentedTransform([48], 64, mosaic=1), batch=1)


def test_ignored_objects_need_no_mask():
    image, annotated = draw(60, 60, [[5, 5, 25, 25], [30, 30, 50, 50]])
    annotated.segmentations[1], annotated.ignore[1] = None, True
    target = AugmentedTransform([60], 60, rotate=10, flip=0)(image, annotated, masks=True)[2]
    assert target.labels.tolist() == [0]
    assert len(target.ignore) == 1


def test_boxes_of_another_size():
    """`to_boxes` keeps the numbers and notes the size."""
    boxes = to_boxes(torch.tensor([[1.0, 2, 3, 4]]), (30, 20))
    assert boxes.canvas_size == (30, 20)
    assert boxes.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"scale_jitter": [0.1, 2], "multi_scale": [480, 800]},
            r"scale_jitter=\[0\.1, 2\.0\] and data\.multi_scale=\[480",
        ),
        ({"scale_jitter": [0.1, 2], "crop": [0.5, 1]}, r"data\.scale_jitter=.* and data\.crop=.* both crop the image"),
        ({"mixup": 0.1, "copy_paste": 0.5}, r"data\.mixup=0\.1 and data\.copy_paste=0\.5 exclude each other"),
        ({"scale_jitter": [2, 1]}, r"data\.scale_jitter=\[2\.0, 1\.0\] must be"),
        ({"scale_jitter": [0, 1]}, r"data\.scale_jitter=\[0\.0, 1\.0\] must be"),
        ({"crop": [0.5, 1.5]}, r"data\.crop=\[0\.5, 1\.5\] must be"),
        ({"mosaic": 2}, r"data\.mosaic=2 must be 0 to 1"),
        ({"mosiac": 0.5}, r"data\.mosiac.*data\.mosaic"),
    ],
)
def test_wrong_settings(settings, text):
    with pytest.raises(InputError, match=text):
        parse({"data": settings})


def test_settings_become_the_transform():
    settings = {"size": [64, 96], "mosaic": 0.5, "rotate": 10, "min_visible": 0.5, "mosaic_until": 0.5, "flip": 0.25}
    transform = train_transform(parse({"data": settings, "train": {"epochs": 5}}))
    assert (transform.sizes, transform.max_size, transform.mixing_epochs) == ((64,), 96, 3)
    assert (transform.mosaic, transform.rotate, transform.min_visible, transform.flip) == (0.5, 10, 0.5, 0.25)
    plain = train_transform(parse({"data": {"size": [64, 96], "min_visible": 0.5}}))
    assert not isinstance(plain, AugmentedTransform), "a config of before trains as before"


def test_browse_shows_the_augmentation(scenes, tmp_path):
    shown = [
        browse.browse(
            f"data={scenes}", f"out={tmp_path / name}.png", f"data.mosaic={mosaic}", "data.size=[64,96]", images=2
        )
        for name, mosaic in (("plain", 0), ("mosaic", 1))
    ]
    plain, mosaic = (np.asarray(Image.open(result.image)) for result in shown)
    assert plain.shape != mosaic.shape or (plain != mosaic).mean() > 0.2
