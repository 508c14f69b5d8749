"""Transforms: boxes, masks and pixels follow the resize and the flip."""

from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedet.data.dataset import ImageAnnotations
from fusedet.data.transforms import MIN_SIDE, EvalTransform, TrainTransform, keep_ratio_size
from fusedet.errors import InputError


def annotate(height, width, boxes, ignore=None, segmentations=None):
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    n = len(boxes)
    ignore = np.zeros(n, bool) if ignore is None else np.array(ignore)
    return ImageAnnotations(
        1, Path("x.jpg"), height, width, boxes, np.arange(n), ignore, np.ones(n), segmentations or [None] * n, ignore
    )


def rectangle(x1, y1, x2, y2):
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


@pytest.mark.parametrize(
    ("height", "width", "short", "long", "expected"),
    [
        (480, 640, 800, 1333, (800, 1067)),  # scale 1.6667; 640 * 1.6667 = 1066.67
        (640, 480, 800, 1333, (1067, 800)),
        (427, 640, 800, 1333, (800, 1199)),  # scale 1.8735; 1199.06
        (300, 900, 800, 1333, (444, 1333)),  # the long side limits: scale 1.4811; 444.33
        (800, 1333, 800, 1333, (800, 1333)),
        (1000, 1000, 640, 640, (640, 640)),
        (5, 1000, 800, 1333, (7, 1333)),
        (1, 5000, 800, 1333, (1, 1333)),
    ],
)
def test_keep_ratio(height, width, short, long, expected):
    assert keep_ratio_size(height, width, short, long) == expected


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1000), st.integers(0, 1000))
def test_keep_ratio_bounds(height, width, short, more):
    h, w = keep_ratio_size(height, width, short, short + more)
    assert 1 <= min(h, w) <= short
    assert max(h, w) <= short + more
    assert min(h, w) == short or max(h, w) == short + more or max(height, width) == 1 or max(h, w) >= short


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_boxes_and_masks_follow_the_image(data):
    height, width = data.draw(st.integers(40, 120)), data.draw(st.integers(40, 120))
    x1, y1 = data.draw(st.integers(0, width - 17)), data.draw(st.integers(0, height - 17))
    x2, y2 = data.draw(st.integers(x1 + 16, width)), data.draw(st.integers(y1 + 16, height))
    size, flip = data.draw(st.integers(40, 160)), data.draw(st.booleans())
    source = torch.zeros(3, height, width, dtype=torch.uint8)
    source[:, y1:y2, x1:x2] = 255

    annotated = annotate(height, width, [[x1, y1, x2, y2]], segmentations=[rectangle(x1, y1, x2, y2)])
    image, (sx, sy), target = TrainTransform([size], 2 * size, flip=float(flip))(source, annotated, masks=True)

    assert tuple(image.shape[1:]) == keep_ratio_size(height, width, size, 2 * size)
    assert (sx, sy) == (image.shape[2] / width, image.shape[1] / height)
    exact = [(width - x2 if flip else x1) * sx, y1 * sy, (width - x1 if flip else x2) * sx, y2 * sy]
    assert target.boxes[0].tolist() == pytest.approx(exact, abs=1e-4)
    bright = image[0] > 127
    rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
    bounds = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    # half a pixel, and a little more where the image's border cuts the filter
    assert torch.tensor(bounds).tolist() == pytest.approx(exact, abs=0.75)

    mask = target.masks[0]
    assert mask.shape == image.shape[1:]
    overlap = (mask & bright).sum() / (mask | bright).sum()
    border = 2 * (bright.any(1).sum() + bright.any(0).sum())
    assert (1 - overlap) * (mask | bright).sum() <= 0.75 * border


def test_half_size_is_the_mean_of_four_pixels():
    source = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    image, _, _ = EvalTransform(32, 48)(source, annotate(64, 96, []))
    # antialiasing widens the triangle filter to two input pixels on each side: weights 1 3 3 1
    inner = source[:, 1:-1, 1:-1].float().unfold(1, 4, 2).unfold(2, 4, 2)
    weight = torch.tensor([1.0, 3, 3, 1]) / 8
    expected = torch.einsum("chwij,i,j->chw", inner, weight, weight)
    assert (image[:, 1:-1, 1:-1] - expected).abs().max() <= 1


@pytest.mark.parametrize("short", [13, 32, 50])
def test_without_antialiasing_a_pixel_is_interpolated_from_its_four_nearest(short):
    source = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    image, _, _ = EvalTransform(short, 2 * short, antialias=False)(source, annotate(64, 96, []))

    def nearest(size, old):
        place = (torch.arange(size) + 0.5) * old / size - 0.5  # pixel centers are at halves
        low = place.floor().long()
        return low.clamp(0, old - 1), (low + 1).clamp(0, old - 1), place - low

    top, bottom, down = nearest(image.shape[1], 64)
    left, right, across = nearest(image.shape[2], 96)
    rows = source[:, top] * (1 - down)[:, None] + source[:, bottom] * down[:, None]
    expected = rows[:, :, left] * (1 - across) + rows[:, :, right] * across
    assert (image - expected).abs().max() <= 1.001  # rounded along each axis


def test_antialiasing_changes_nothing_in_larger_images():
    source = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    with_, without = (
        EvalTransform(100, 150, antialias=flag)(source, annotate(64, 96, []))[0].int() for flag in (True, False)
    )
    assert (with_ - without).abs().max() <= 1
    mine = TrainTransform([32], 48, flip=0, antialias=False)(source, annotate(64, 96, []))[0]
    assert torch.equal(mine, EvalTransform(32, 48, antialias=False)(source, annotate(64, 96, []))[0])
    assert not torch.equal(mine, EvalTransform(32, 48)(source, annotate(64, 96, []))[0])


def test_same_size_changes_nothing():
    source = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    before = source.clone()
    image, scale, target = EvalTransform(50, 70)(source, annotate(50, 70, [[1.25, 2.5, 30, 40]]))
    assert torch.equal(image, source)
    assert scale == (1, 1)
    assert target.boxes.tolist() == [[1.25, 2.5, 30, 40]]
    TrainTransform([50], 70, photometric=True, flip=1)(source, annotate(50, 70, []))
    assert torch.equal(source, before), "the input was modified"


def test_clipped_dropped_and_ignored():
    boxes = [
        [-10, -5, 30, 20],  # clipped
        [100, 10, 130, 40],  # wholly to the right
        [10, 10, 10, 40],  # no width
        [99.9999, 0, 140, 50],  # less than MIN_SIDE is left inside
        [20, 20, 60, 70],  # ignored and clipped
        [-9, -9, -1, -1],  # ignored and outside
        [50, 10, 60, 30],
    ]
    ignore = [False, False, False, False, True, True, False]
    _, _, target = EvalTransform(50, 100)(torch.zeros(3, 50, 100, dtype=torch.uint8), annotate(50, 100, boxes, ignore))
    assert MIN_SIDE > 100 - 99.9999
    assert target.boxes.tolist() == [[0, 0, 30, 20], [50, 10, 60, 30]]
    assert target.labels.tolist() == [0, 6]
    assert target.ignore.tolist() == [[20, 20, 60, 50]]
    assert target.masks is None
    assert (target.boxes.dtype, target.labels.dtype) == (torch.float32, torch.int64)


def test_annotations_are_not_modified():
    boxes = [[-10, -5, 300, 200]]
    r = annotate(50, 100, boxes)
    TrainTransform([25], 100, flip=1)(torch.zeros(3, 50, 100, dtype=torch.uint8), r)
    assert r.boxes.tolist() == boxes


@pytest.mark.parametrize("masks", [False, True])
def test_image_without_annotations(masks):
    _, _, target = TrainTransform([25], 100)(torch.zeros(3, 50, 100, dtype=torch.uint8), annotate(50, 100, []), masks)
    assert target.boxes.shape == target.ignore.shape == (0, 4)
    assert target.labels.shape == (0,)
    assert (target.masks is None) if not masks else target.masks.shape == (0, 25, 50)


def test_all_kinds_of_segmentations():
    inside = np.zeros((60, 80), np.uint8)
    inside[10:30, 20:50] = 1
    rle = coco_mask.encode(np.asfortranarray(inside))
    text = {"size": [60, 80], "counts": rle["counts"].decode()}
    runs = np.diff(
        np.flatnonzero(np.diff(np.concatenate([[2], inside.T.ravel(), [2]])))
    ).tolist()  # starts with a run of zeros
    two = rectangle(20, 10, 35, 30) + rectangle(35, 10, 50, 30)
    segmentations = [rectangle(20, 10, 50, 30), text, {"size": [60, 80], "counts": runs}, two]
    r = annotate(60, 80, [[20, 10, 50, 30]] * 4, segmentations=segmentations)
    _, _, target = EvalTransform(60, 80)(torch.zeros(3, 60, 80, dtype=torch.uint8), r, masks=True)
    assert target.masks.dtype == torch.bool
    assert torch.equal(target.masks, torch.from_numpy(inside).bool().expand(4, -1, -1))


def test_masks_of_kept_annotations_only():
    segmentations = [rectangle(0, 0, 10, 10), None, rectangle(5, 5, 20, 20)]
    r = annotate(
        60,
        80,
        [[0, 0, 10, 10], [0, 0, 50, 50], [5, 5, 20, 20]],
        ignore=[False, True, False],
        segmentations=segmentations,
    )
    _, _, target = EvalTransform(60, 80)(torch.zeros(3, 60, 80, dtype=torch.uint8), r, masks=True)
    assert target.masks.sum((1, 2)).tolist() == [100, 225]


@pytest.mark.parametrize("segmentation", [None, [], {"size": [5, 5], "counts": "04"}, {"counts": 3}])
def test_bad_segmentations(segmentation):
    r = annotate(60, 80, [[0, 0, 10, 10]], segmentations=[segmentation])
    with pytest.raises(InputError, match=r"x\.jpg.*annotation 0"):
        EvalTransform(60, 80)(torch.zeros(3, 60, 80, dtype=torch.uint8), r, masks=True)


def test_image_of_another_size_than_annotated():
    with pytest.raises(InputError, match=r"x\.jpg is 80x60 pixels, but its annotation says 60x80"):
        EvalTransform(60, 80)(torch.zeros(3, 60, 80, dtype=torch.uint8), annotate(80, 60, []))


def test_sizes_are_drawn():
    choice, span = TrainTransform([40, 50, 60], 1000), TrainTransform([40, 60], 1000, resize="range")
    assert {choice.network_size(100, 200)[0] for _ in range(200)} == {40, 50, 60}
    assert {span.network_size(100, 200)[0] for _ in range(1000)} == set(range(40, 61))


def test_network_size_is_the_first_draw():
    source = torch.zeros(3, 100, 200, dtype=torch.uint8)
    for transform in (
        TrainTransform([40, 60], 1000, resize="range", photometric=True),
        TrainTransform([40, 50, 60, 70], 100),
    ):
        for seed in range(10):
            torch.manual_seed(seed)
            size = transform.network_size(100, 200)
            torch.manual_seed(seed)
            assert tuple(transform(source, annotate(100, 200, []))[0].shape[1:]) == size


def test_flip_and_photometric_are_drawn():
    source = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    flips = [
        torch.equal(TrainTransform([40], 40)(source, annotate(40, 40, []))[0], source.flip(-1)) for _ in range(200)
    ]
    assert 60 < sum(flips) < 140
    distorted = TrainTransform([40], 40, flip=0, photometric=True)
    different = [not torch.equal(distorted(source, annotate(40, 40, []))[0], source) for _ in range(30)]
    assert sum(different) > 20


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: TrainTransform([], 10),
        lambda: TrainTransform([0], 10),
        lambda: TrainTransform([20], 10),
        lambda: TrainTransform([5, 8, 9], 10, resize="range"),
        lambda: TrainTransform([8, 5], 10, resize="range"),
        lambda: TrainTransform([8], 10, resize="stretch"),
        lambda: TrainTransform([8], 10, flip=2),
        lambda: EvalTransform(20, 10),
    ],
)
def test_wrong_options(wrong):
    with pytest.raises(InputError):
        wrong()
