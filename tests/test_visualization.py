"""Drawings have the right colors in the right places, and every plot is written."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fusedet import visualization
from fusedet.errors import InputError, StorageError
from fusedet.visualization import colors, training_curves
from fusedet.visualization.annotators import BoxAnnotation, LineStyle, draw_annotations, truncate_text

NAMES = ("cat", "dog", "кошка")
PLAIN = torch.full((3, 240, 320), 128, dtype=torch.uint8)


def pixels(source, color, near=0):
    return np.abs(np.asarray(source).astype(int) - np.array(color)).max(axis=2) <= near


def test_class_colors_are_stable_and_distinct():
    first = [visualization.class_color(k) for k in range(200)]
    assert first[:2] == [(86, 180, 233), (230, 159, 0)]
    assert len(set(first)) == 200
    assert first == [visualization.class_color(k) for k in range(200)]


@pytest.mark.parametrize("k", range(40))
def test_text_is_readable_on_every_color(k):
    def luminance(color):
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted(
        [luminance(visualization.class_color(k)), luminance(colors.text_color(visualization.class_color(k)))]
    )
    assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2, level AA


def test_box_is_drawn_at_its_edge_and_empty_inside():
    image = PLAIN.clone()
    source = visualization.draw_boxes(image, torch.tensor([[100.0, 80, 220, 200]]), torch.tensor([1]), NAMES)
    line = pixels(source, visualization.class_color(1))
    assert source.size == (320, 240)
    assert line[79:81, 100:220].any(axis=0).all()
    assert line[199:201, 100:220].any(axis=0).all()
    assert line[80:200, 99:101].any(axis=1).all()
    assert pixels(source, (128, 128, 128))[84:196, 104:216].all()
    assert torch.equal(image, PLAIN)


def test_small_object_stays_visible():
    source = visualization.draw_boxes(
        PLAIN, torch.tensor([[100.0, 100, 106, 106]]), torch.tensor([0]), NAMES, scores=torch.tensor([0.9])
    )
    assert pixels(source, (128, 128, 128))[100:106, 100:106].all()
    assert pixels(source, visualization.class_color(0))[98:109, 98:109].any()


@pytest.mark.parametrize(
    "box",
    [(0, 0, 9, 9), (311, 0, 320, 9), (0, 231, 9, 240), (311, 231, 320, 240), (0, 0, 320, 240), (-50, -50, 400, 300)],
)
def test_tags_stay_inside_the_image(box):
    def tag(corners):
        source = visualization.draw_boxes(
            PLAIN, torch.tensor([corners], dtype=torch.float32), torch.tensor([0]), NAMES, scores=torch.tensor([0.5])
        )
        return int(pixels(source, (0, 0, 0), near=60).sum())  # the letters

    assert tag(box) == pytest.approx(tag((150, 100, 159, 109)), rel=0.15)


def test_tags_do_not_hide_each_other():
    apart = visualization.draw_boxes(
        PLAIN, torch.tensor([[20.0, 100, 60, 140], [200, 100, 240, 140]]), torch.tensor([0, 1]), NAMES
    )
    close = visualization.draw_boxes(
        PLAIN, torch.tensor([[20.0, 100, 60, 140], [22, 102, 62, 142]]), torch.tensor([0, 1]), NAMES
    )
    letters = [int(pixels(source, (0, 0, 0), near=60).sum()) for source in (apart, close)]
    assert letters[1] == pytest.approx(letters[0], rel=0.2)


def test_best_score_lies_on_top():
    two = torch.tensor([[50.0, 50, 150, 150], [50, 50, 150, 150]])
    for scores, best in (((0.9, 0.1), 0), ((0.1, 0.9), 1)):
        source = visualization.draw_boxes(PLAIN, two, torch.tensor([0, 1]), NAMES, scores=torch.tensor(scores))
        assert pixels(source, visualization.class_color(best))[149:151, 80:150].any(axis=0).all()


def test_line_width_follows_the_image_or_the_argument():
    def width(side, **options):
        image = torch.zeros(3, side, side, dtype=torch.uint8)
        box = torch.tensor([[0.2, 0.2, 0.8, 0.8]]) * side
        column = pixels(
            visualization.draw_boxes(image, box, torch.tensor([0]), [""], **options), visualization.class_color(0)
        )[side // 4 : side // 2]
        return int(column[side // 8, : side // 2].sum())

    assert width(300) == 1
    assert width(1300) == 5
    assert width(300, width=5) == 5


@pytest.mark.parametrize("names", [("血小板", "ζ", "кошка"), ("🐱", "a\u0301", ""), ("x" * 500, " ", "\u202eabc")])
def test_any_class_name_and_image_size(names):
    for height, width in ((1, 1), (7, 300), (200, 40)):
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        corners = torch.tensor([[0.0, 0, 1, 1], [0, 0, width, height], [0.2, 0.2, 0.2, 0.2]])
        assert visualization.draw_boxes(image, corners, torch.arange(3), names, scores=torch.rand(3)).size == (
            width,
            height,
        )


def test_fonts_for_other_scripts():
    assert {"DejaVu Sans"} == set(colors.font_families(["cat", "кошка", "γάτα"]))
    assert colors.load_font("кошка", 12).getname()[0] == "DejaVu Sans"
    assert "Last Resort" not in colors.load_font("血小板", 12).getname()[0]


def test_no_boxes_leave_the_image_unchanged():
    empty = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert np.array_equal(visualization.draw_boxes(PLAIN, *empty, NAMES), PLAIN.permute(1, 2, 0))
    boxes, none = np.zeros((0, 4)), np.zeros(0, int)
    assert visualization.draw_comparison(PLAIN, (boxes, none, none), (boxes, *[none] * 3), none, NAMES).height > 240


def test_masks_are_blended_and_ignored_boxes_are_gray():
    mask = torch.zeros(1, 240, 320, dtype=torch.bool)
    mask[0, 50:100, 50:100] = True
    source = visualization.draw_boxes(
        PLAIN,
        torch.tensor([[50.0, 50, 100, 100]]),
        torch.tensor([0]),
        NAMES,
        masks=mask,
        ignore=torch.tensor([[200.0, 100, 260, 160]]),
    )
    blended = np.array([0.6 * 128 + 0.4 * c for c in visualization.class_color(0)])
    assert np.asarray(source)[75, 75] == pytest.approx(blended, abs=1)
    assert pixels(source, colors.GRAY)[98:162, 198:262].any()
    assert not pixels(source, colors.GRAY)[:, :190].any()


def test_wrong_input_is_refused():
    box, label = torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([3])
    with pytest.raises(InputError, match=r"labels must lie in 0\.\.2"):
        visualization.draw_boxes(PLAIN, box, label, NAMES)
    with pytest.raises(InputError, match="uint8"):
        visualization.draw_boxes(PLAIN.float(), box, torch.tensor([0]), NAMES)
    with pytest.raises(InputError, match="masks must be as large"):
        visualization.draw_boxes(PLAIN, box, torch.tensor([0]), NAMES, masks=torch.zeros(1, 5, 5))
    with pytest.raises(InputError, match=r"boxes must be \(N, 4\)"):
        visualization.draw_boxes(PLAIN, box, torch.tensor([0, 1]), NAMES)


def test_comparison_distinguishes_correct_false_missed_and_wrong_class():
    ground_truth = (
        np.array([[20.0, 60, 60, 100], [250, 55, 290, 95], [100, 60, 140, 100], [180, 60, 220, 100]]),
        np.array([0, 2, 0, 1]),
        np.array([False, True, False, False]),
    )
    detections = (
        np.array([[22.0, 64, 62, 104], [100, 60, 140, 100], [250, 150, 290, 190], [255, 60, 265, 70]]),
        np.array([0, 1, 1, 2]),
        np.array([0.9, 0.8, 0.7, 0.9]),
        np.array([False, False, False, True]),
    )
    matches = np.array([0, 2, -1, -1])
    source = visualization.draw_comparison(PLAIN, ground_truth, detections, matches, NAMES)

    def has(color, x, y):
        return bool(pixels(source, color)[y - 4 : y + 44, x - 4 : x + 44].any())

    assert has(colors.TRUE_POSITIVE, 20, 60)
    assert has(colors.WRONG_CLASS, 100, 60)
    assert has(colors.FALSE_NEGATIVE, 180, 60)
    assert has(colors.FALSE_POSITIVE, 250, 150)
    assert has(colors.GRAY, 250, 60)
    assert not has(colors.FALSE_POSITIVE, 250, 60)
    assert has(colors.WHITE, 20, 60)
    assert all(
        pixels(source, color)[240:].any()
        for color in (colors.TRUE_POSITIVE, colors.WRONG_CLASS, colors.FALSE_NEGATIVE, colors.FALSE_POSITIVE)
    )


def test_grid_contains_every_image():
    palette = [visualization.class_color(k) for k in range(5)]
    images = [
        Image.new("RGB", size, c)
        for size, c in zip([(64, 32), (32, 64), (900, 900), (1, 1), (50, 40)], palette, strict=True)
    ]
    sheet = visualization.draw_image_grid(images, captions=["a", "b" * 300, "ж", "", "e"], cell=100)
    assert all(pixels(sheet, c, near=2).sum() >= 4900 for c in palette)
    assert sheet.width == 3 * 104 + 4
    assert visualization.draw_image_grid(images, columns=2, cell=100).width == 2 * 104 + 4
    assert visualization.draw_image_grid(images[:1], columns=9, cell=100).size == (108, 58)
    with pytest.raises(InputError, match="at least one"):
        visualization.draw_image_grid([])
    with pytest.raises(InputError, match="as many captions"):
        visualization.draw_image_grid(images, captions=["a"])


def test_long_text_is_truncated():
    font = colors.load_font("x", 12)
    assert truncate_text("short", font, 100) == "short"
    assert truncate_text("x" * 99, font, 60).endswith("…")
    assert font.getlength(truncate_text("x" * 99, font, 60)) <= 60


def test_annotations_outside_of_the_image():
    source = Image.new("RGB", (40, 30))
    annotations = [
        BoxAnnotation((-90, -90, -50, -50), colors.WHITE, "far"),
        BoxAnnotation((50, 50, 90, 90), colors.WHITE, "far", dashed=True),
    ]
    assert draw_annotations(source, annotations, LineStyle(2, 10)).size == (40, 30)


def precision_recall(classes):
    recall = np.linspace(0, 1, 101)
    rows = [
        {
            "name": f"{NAMES[k % 3]} {k}",
            "recall": recall,
            "precision": np.where(recall < 0.9, 1 - recall * k / classes, 0),
            "AP": 0.9 - k / 200,
        }
        for k in range(classes)
    ]
    rows.append({"name": "none", "recall": recall, "precision": np.full(101, np.nan), "AP": math.nan})
    return {"recall": recall, "mean": np.full(101, 0.5), "AP": 0.5, "classes": rows}


def is_drawn(path):
    """Whether a written image is not blank."""
    with Image.open(path) as source:
        return len(set(source.convert("L").resize((64, 64)).getdata())) > 8


@pytest.mark.parametrize(("iou", "named", "classes"), [(0.5, "AP50", 3), (0.75, "AP75", 80)])
def test_curves_name_the_iou(tmp_path, classes, iou, named):
    visualization.plot_precision_recall(precision_recall(classes), tmp_path / "curves.svg", iou=iou)
    svg = (tmp_path / "curves.svg").read_text()
    assert f"precision at IoU {iou}" in svg
    assert f"{named}: 5 best, 5 worst" in svg if classes > 10 else f"<!-- {named} -->" in svg


@pytest.mark.parametrize("classes", [1, 10, pytest.param(80, marks=pytest.mark.slow)])
def test_plots_of_few_and_many_classes(tmp_path, classes):
    visualization.plot_precision_recall(precision_recall(classes), tmp_path / "curves.png")
    matrix = np.diag(np.arange(classes + 1))
    matrix[-1, -1] = 0
    visualization.plot_confusion_matrix(
        matrix, [f"{NAMES[k % 3]} {k}" for k in range(classes)], tmp_path / "confusion.png"
    )
    assert is_drawn(tmp_path / "curves.png")
    assert is_drawn(tmp_path / "confusion.png")


def test_confusion_matrix_of_wrong_shape_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must be \(4, 4\)"):
        visualization.plot_confusion_matrix(np.zeros((3, 3)), NAMES, tmp_path / "c.png")


SIZES = {"AP": 0.4, "APs": 0.1, "APm": 0.4, "APl": 0.6}
ABSENT_SIZES = {"AP": 0.0, "APs": math.nan, "APm": None, "APl": 0.0}


@pytest.mark.parametrize(("metrics", "suffix"), [(SIZES, "png"), (ABSENT_SIZES, "pdf"), (SIZES, "svg")])
def test_ap_by_size_in_every_format(tmp_path, metrics, suffix):
    file = tmp_path / f"sizes.{suffix}"
    visualization.plot_ap_by_size(metrics, file)
    assert file.stat().st_size > 1000


def test_unwritable_files_are_named(tmp_path):
    metrics = SIZES
    with pytest.raises(InputError, match="unknown format of the plot"):
        visualization.plot_ap_by_size(metrics, tmp_path / "sizes.gif")
    with pytest.raises(StorageError, match="cannot be written"):
        visualization.plot_ap_by_size(metrics, tmp_path / "absent" / "sizes.png")


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


LOGS = {
    "validation in separate rows": (
        ["epoch", "step", "lr", "loss", "loss_cls", "loss_box", "AP", "AP50"],
        [[1, s, 0.1, 2 / s, 1 / s, 1 / s, "", ""] for s in range(1, 200)] + [[1, 200, "", "", "", "", 0.3, 0.5]],
    ),
    "validation in the same rows": (["epoch", "lr", "loss", "AP"], [[1, 0.1, 3.0, 0.1], [2, 0.1, 2.0, 0.2]]),
    "no validation": (["step", "loss"], [[1, 3.0], [2, "nan"], [3, "inf"], [4, 1.0]]),
    "one row": (["epoch", "step", "lr", "loss"], [[1, 1, 0.1, 3.0]]),
    "truncated line": (["epoch", "step", "lr", "loss"], [[1, 1, 0.1, 3.0], [1, 2]]),
    "VOC metrics and text": (["epoch", "loss", "note", "mAP"], [[1, 1, "first", 0.2], [2, 0.5, "", 0.3]]),
}


@pytest.mark.parametrize("name", LOGS)
def test_training_plot_of_any_log(tmp_path, name):
    visualization.plot_training(write(tmp_path / "metrics.csv", *LOGS[name]), tmp_path / "training.png")
    assert is_drawn(tmp_path / "training.png")


@pytest.mark.parametrize(
    ("header", "rows"), [([], []), (["epoch", "loss"], []), (["epoch", "loss"], [["", ""]]), (["epoch"], [[1]])]
)
def test_training_plot_without_numbers(tmp_path, header, rows):
    with pytest.raises(InputError, match=r"metrics\.csv"):
        visualization.plot_training(write(tmp_path / "metrics.csv", header, rows), tmp_path / "training.png")
    with pytest.raises(InputError, match="cannot be read"):
        visualization.plot_training(tmp_path / "absent.csv", tmp_path / "training.png")


def test_plots_do_not_touch_matplotlibs_global_state():
    files = Path(visualization.__file__).parent.glob("*.py")
    assert not [file.name for file in files if "pyplot" in file.read_text() or "rcParams" in file.read_text()]


def test_loss_terms_exclude_speeds_and_norms() -> None:
    columns = ["epoch", "step", "lr", "loss", "loss_cls", "loss_box", "grad_norm", "images_per_second", "AP"]
    assert training_curves.loss_terms(columns) == ["loss_cls", "loss_box"]
