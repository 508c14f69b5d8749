"""The page of a run: its numbers by hand and by the evaluation, its text, its size, and its script in a browser."""

import json
import math
import re
import sys
import webbrowser
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fusedet import cli, config, evaluation
from fusedet.api import detector_evaluation, run_report
from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.errors import StorageError
from fusedet.evaluation.bootstrap import draw_image_weights
from fusedet.evaluation.calibration import compute_calibration
from fusedet.evaluation.image_matching import FALSE_POSITIVE, IGNORED, match_images
from fusedet.evaluation.results import DetectionTable, Result
from fusedet.evaluation.score_thresholds import find_best_thresholds
from fusedet.report import gallery, write_report_page
from fusedet.report.analysis import analyze_run, summarize_failures
from fusedet.report.counts import KINDS, classify, count_by_threshold, count_from, fill_matrix
from test_evaluate import GUESSES, OBJECTS, dataset, result

NAMES = ("</script><script>alert(1)</script>", 'a & "b" <i>')


def score(data: DetectionDataset, results: list[Result]) -> dict[str, Any]:
    """The metrics of results, as `val` computes them by default."""
    return detector_evaluation.evaluate_results(data, results, config.Test()).metrics


def read_counts(text: str) -> dict[str, Any]:
    """The numbers that a page embeds."""
    return dict(json.loads(text.split('<script type="application/json" id="counts">')[1].split("</script>")[0]))


# -- matching


def match_greedily(
    boxes: np.ndarray,
    labels: np.ndarray,
    gt_boxes: np.ndarray,
    gt_labels: np.ndarray,
    ignored_boxes: np.ndarray,
    ignored_labels: np.ndarray,
    iou: float,
) -> np.ndarray:
    """What `match_images` does in one image, detection by detection; the index of an instance is that in `gt_boxes`."""

    def intersect(other_boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sides = np.minimum(boxes[:, None, 2:], other_boxes[:, 2:]) - np.maximum(boxes[:, None, :2], other_boxes[:, :2])
        areas = ((own[:, 2:] - own[:, :2]).prod(axis=1) for own in (boxes, other_boxes))
        return sides.clip(min=0).prod(axis=2), *areas

    matches = np.full(len(boxes), FALSE_POSITIVE)
    inner, area, gt_area = intersect(gt_boxes)
    overlap = np.divide(inner, area[:, None] + gt_area - inner, out=np.zeros_like(inner), where=inner > 0)
    for d in range(len(boxes) if len(gt_boxes) else 0):
        g = int(np.lexsort((gt_labels == labels[d], overlap[d]))[-1])
        if overlap[d, g] >= iou:
            matches[d] = g
            overlap[:, g] = 0  # taken
    inner, area, _ = intersect(ignored_boxes)
    inside = (inner >= iou * area[:, None]) & (inner > 0) & (labels[:, None] == ignored_labels)
    matches[(matches == FALSE_POSITIVE) & inside.any(axis=1)] = IGNORED
    return matches


@given(st.lists(st.tuples(OBJECTS, GUESSES), min_size=1, max_size=3))
@settings(max_examples=100)
def test_matches_are_those_of_each_image(images: Any) -> None:
    """Of any class, with ties and ignored objects; and a threshold leaves the better detections as they are."""
    ids = (4, 1, 9)
    data = dataset([objects for objects, _ in images], names=("a", "b", "c"), ids=ids)
    results = [result(i + 1, ids[k], box, s) for i, (_, guesses) in enumerate(images) for box, k, s in guesses]
    pairs = match_images(data, results)
    for i, record in enumerate(data):
        own = pairs.images == i
        keep = ~record.eval_ignore
        expected = match_greedily(
            pairs.boxes[own],
            pairs.labels[own],
            record.boxes[keep],
            record.labels[keep],
            record.boxes[~keep],
            record.labels[~keep],
            0.5,
        )
        first = int(data.offsets[i])
        matches = np.where(expected >= 0, first + np.append(np.flatnonzero(keep), -1)[expected.clip(min=-1)], expected)
        assert pairs.matches[own].tolist() == matches.tolist()
    above = match_images(data, results, score=0.5)
    assert above.matches.tolist() == pairs.matches[pairs.scores >= 0.5].tolist()


@given(st.lists(st.tuples(OBJECTS, GUESSES), min_size=1, max_size=3))
@settings(max_examples=50)
def test_matrix_is_the_confusion_matrix_at_every_threshold(images: Any) -> None:
    data = dataset([objects for objects, _ in images], names=("a", "b", "c"), ids=(4, 1, 9))
    results = [result(i + 1, (4, 1, 9)[k], box, s) for i, (_, guesses) in enumerate(images) for box, k, s in guesses]
    pairs = match_images(data, results)
    counts = count_by_threshold(pairs, classify(pairs), data.names)
    for threshold in (0, 29, 30, 31, 50, 51, 90, 91, 100):
        matrix = evaluation.compute_confusion_matrix(data, results, score=threshold / 100)
        assert fill_matrix(counts, threshold) == matrix.tolist()
        kinds = {kind: count_from(own, threshold) for kind, own in counts.kinds.items()}
        assert kinds["correct"] == np.trace(matrix) == sum(count_from(own, threshold) for own in counts.true_positives)
        assert kinds["classification"] == matrix[:-1, :-1].sum() - np.trace(matrix)
        assert kinds["localization"] + kinds["duplicate"] + kinds["background"] == matrix[-1].sum()
        predicted = [
            count_from(a, threshold) + count_from(b, threshold)
            for a, b in zip(counts.true_positives, counts.false_positives)
        ]
        assert predicted == matrix[:, :-1].sum(axis=0).tolist()


# -- by hand

A, B, C, FAR = (0, 0, 40, 40), (50, 50, 90, 90), (20, 0, 60, 40), (0, 50, 30, 90)


def by_hand(**options: Any) -> tuple[DetectionDataset, list[dict[str, Any]]]:
    """Two images: a true positive, errors of classification, background and localization, and an ignored object."""
    data = dataset([[(A, 0, False), (B, 1, False)], [(A, 0, False), (B, 1, True)]], size=(96, 96), **options)
    cat, dog = data.category_ids
    first = [result(1, cat, A, 0.9), result(1, cat, B, 0.6), result(1, dog, FAR, 0.4)]
    return data, [*first, result(2, cat, C, 0.8), result(2, dog, B, 0.7)]


def test_counts_by_hand() -> None:
    data, results = by_hand()
    pairs = match_images(data, results)
    assert (pairs.matches == IGNORED).sum() == 1
    assert pairs.same_class_iou.max() == 1
    kinds = classify(pairs)
    assert [KINDS[k] if k >= 0 else "" for k in kinds] == [
        "correct",
        "classification",
        "background",
        "localization",
        "",
    ]
    counts = count_by_threshold(pairs, kinds, data.names)
    assert fill_matrix(counts, 30) == [[1, 0, 1], [1, 0, 0], [1, 1, 0]]
    assert fill_matrix(counts, 41) == [[1, 0, 1], [1, 0, 0], [1, 0, 0]]
    assert fill_matrix(counts, 61) == [[1, 0, 1], [0, 0, 1], [1, 0, 0]]
    assert fill_matrix(counts, 81) == [[1, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert fill_matrix(counts, 91) == [[0, 0, 2], [0, 0, 1], [0, 0, 0]]
    assert (counts.objects, counts.true_positives, counts.false_positives) == (
        [2, 1],
        [[90, 1], []],
        [[60, 1, 80, 1], [40, 1]],
    )


def test_a_second_box_is_a_duplicate() -> None:
    """It overlaps a matched object of its class by 0.5 or more; by less, it is a localization error."""
    data = dataset([[(A, 0, False)]], size=(96, 96))
    boxes = [(A, 0.9), ((0, 0, 40, 20), 0.8), ((0, 0, 40, 19), 0.7)]
    results = [result(1, data.category_ids[0], box, score) for box, score in boxes]
    kinds = classify(match_images(data, results))
    assert [KINDS[k] for k in kinds] == ["correct", "duplicate", "localization"]


def test_best_thresholds_by_hand() -> None:
    """F1 of cats: 2 / 3 above 0.8, 1 / 2 above 0.6, then 2 / 5; no dog is right."""
    data, results = by_hand()
    cat, dog, both = find_best_thresholds(data, match_images(data, results), draw_image_weights(2, 200, 0))
    assert (cat.threshold, cat.f1, cat.precision, cat.recall) == (0.85, pytest.approx(2 / 3), 1, 0.5)
    assert math.isnan(dog.threshold)
    assert dog.f1 == 0
    assert (both.threshold, both.f1, both.recall) == (0.85, 0.5, pytest.approx(1 / 3))
    assert 0 <= cat.low <= cat.threshold <= cat.high <= 1


def test_best_threshold_of_a_resample_is_that_of_repeated_images() -> None:
    """The interval's resamples weigh images as a dataset does that holds them as often."""
    images = [[(A, 0, False)], [(A, 0, False)], [(A, 0, False)]]
    scores, boxes = (0.9, 0.5, 0.3), (A, FAR, A)

    def thresholds(which: list[int]) -> Any:
        data = dataset([images[i] for i in which])
        results = [result(n + 1, 7, boxes[i], scores[i]) for n, i in enumerate(which)]
        return data, match_images(data, results)

    data, pairs = thresholds([0, 1, 2])
    _, own = np.unique([0, 0, 2], return_counts=True)
    weights = np.array([[own[0], 0, own[1]]], dtype=np.int16)
    data_twice, pairs_twice = thresholds([0, 0, 2])
    weighted, _, _ = find_best_thresholds(data, pairs, np.concatenate([weights, weights]))
    repeated, _, _ = find_best_thresholds(data_twice, pairs_twice, np.ones((2, 3), dtype=np.int16))
    assert (weighted.threshold, weighted.f1) == (repeated.threshold, repeated.f1) == (0.15, 1)


def test_calibration_by_hand() -> None:
    """Of four bins, gaps of 0.2, 0.1 and 0.35 with 1, 2 and 1 detections."""
    own = compute_calibration(np.array([0.2, 0.6, 0.6, 0.65 + 0.1]), np.array([False, True, False, True]), bins=4)
    assert own.count.tolist() == [1, 0, 2, 1]
    assert own.precision[[0, 2, 3]].tolist() == [0, 0.5, 1]
    assert math.isnan(own.score[1])
    assert own.ece == pytest.approx((0.2 + 2 * 0.1 + 0.25) / 4)
    assert math.isnan(compute_calibration(np.zeros(0), np.zeros(0, dtype=bool)).ece)
    assert compute_calibration(np.array([0.6]), np.array([True])).count.tolist() == [0] * 6 + [1] + [0] * 3


def test_bins_of_calibration_hold_their_lower_edge() -> None:
    own = compute_calibration(np.arange(11) / 10, np.zeros(11, dtype=bool))
    assert own.count.tolist() == [1] * 9 + [2]
    assert own.ece == pytest.approx(0.5)


def test_sentences_name_the_worst() -> None:
    data, results = by_hand()
    own = analyze_run(data, results * 1, score(data, results))
    most = max(own.errors.items(), key=lambda item: item[1]["dAP"])
    assert f"would rise from {own.metrics['AP50']:.3f} by {most[1]['dAP']:.3f}" in summarize_failures(own)[0]
    assert len(summarize_failures(own)) == 1, "ten objects at least name a size or a class"
    many = dataset([[(A, 0, False), (B, 1, False)]] * 12)
    perfect_cats = [result(i + 1, 7, A, 0.9) for i in range(12)]
    lines = summarize_failures(analyze_run(many, perfect_cats, score(many, perfect_cats)))
    assert "By class, AP is lowest for dog: 0.000 (0.000 to 0.000) on 12 instances." in lines
    assert lines[0].startswith("Missed instances cost the most: without these 12 errors AP50 would rise from 0.500 by")


# -- the page


def with_images(folder: Path, names: tuple[str, ...] = NAMES) -> tuple[DetectionDataset, list[dict[str, Any]]]:
    """The dataset by hand with its two images, whose class names are HTML."""
    data, results = by_hand(names=names)
    rng = np.random.default_rng(0)
    records = []
    for i, record in enumerate(data):
        path = folder / f"{i} <b>&.png"
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(path)
        records.append(ImageAnnotations(**{**vars(record), "path": path}))
    made = DetectionDataset.build(names, data.category_ids, records, source="<u>made</u>", dataset_format="coco")
    return made, results


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all sections."""
    folder = tmp_path_factory.mktemp("page")
    data, results = with_images(folder)
    table = folder / "metrics.csv"
    lines = [f"1,{step},0.01,{2 / step},{1 / step},," for step in range(1, 7)]
    table.write_text("epoch,step,lr,loss,loss_box,val_loss,AP\n" + "\n".join([*lines, "1,6,,,,0.7,0.4"]) + "\n")
    write_report_page(
        folder / "report.html",
        data,
        results,
        score(data, results),
        title="run <em>&",
        metrics_csv=table,
        origin=[("annotations", data.source)],
        commands=[("The evaluation:", "fusedet val 'a <b>'")],
    )
    return folder / "report.html"


class Elements(HTMLParser):
    """Tags, addresses and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_page_stands_alone(page: Path) -> None:
    text = page.read_text()
    elements = Elements(text)
    assert {"svg", "table", "img", "input", "details"} <= set(elements.tags)
    assert not {"iframe", "object", "embed", "base", "b", "em", "u", "i"} & set(elements.tags)
    assert elements.tags.count("script") == 2
    assert [address for address in elements.addresses if not address.startswith(("data:", "#"))] == []
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket|innerHTML|outerHTML|insertAdjacent", text)
    assert {NAMES[0], NAMES[1], "run <em>&", "fusedet val 'a <b>'", "<u>made</u>"} <= set(elements.texts)


def test_page_embeds_the_counts(page: Path) -> None:
    counts = read_counts(page.read_text())
    assert counts["cells"] == [[0, 0, [90, 1]], [1, 0, [60, 1]], [2, 0, [80, 1]], [2, 1, [40, 1]]]
    assert counts["totals"] == [2, 1, 0]
    assert counts["kinds"] == {
        "background": [40, 1],
        "duplicate": [],
        "localization": [80, 1],
        "classification": [60, 1],
        "correct": [90, 1],
    }


def test_page_has_all_sections(page: Path) -> None:
    text = page.read_text()
    names = ["fails", "per-class", "matrix", "gallery", "curves", "calibration", "training", "metrics", "origin"]
    assert re.findall(r'<section id="([\w-]+)">', text) == names
    assert "validation loss" in text
    assert "Expected calibration error: 0.475 (4 detections)" in text  # gaps of 0.1, 0.6, 0.4 and 0.8
    assert text.count("<figure") == 5 + 7, (
        "a thumbnail of each kind; two of the overview, three of training, two curves"
    )


def test_page_without_images_or_training(tmp_path: Path) -> None:
    """Scores outside 0..1, detections of one class, and results without the images."""
    data, results = by_hand()
    results = [row | {"score": 10 * row["score"]} for row in results]
    write_report_page(tmp_path / "a.html", data, results, score(data, results), title="a")
    text = (tmp_path / "a.html").read_text()
    assert "The images cannot be read here" in text
    assert "they say nothing about precision" in text
    assert 'id="training"' not in text
    write_report_page(tmp_path / "b.html", data, [], score(data, []), title="no detections")
    assert read_counts((tmp_path / "b.html").read_text())["cells"] == []


def test_many_classes_share_a_row() -> None:
    rng = np.random.default_rng(0)
    names = tuple(f"c{k}" for k in range(60))
    images = [[(A, int(k), False)] for k in rng.integers(60, size=200)]
    data = dataset(images, names=names, ids=tuple(range(60)))
    results = [result(i + 1, int(k), A, 0.5) for i, k in enumerate(rng.integers(60, size=200))]
    pairs = match_images(data, results)
    counts = count_by_threshold(pairs, classify(pairs), names)
    assert len(counts.rows) == 24
    assert counts.rows[-1] == "other classes"
    whole = evaluation.compute_confusion_matrix(data, results)
    group = [counts.rows.index(name) if name in counts.rows else 23 for name in names] + [24]
    expected = np.zeros((25, 25), dtype=int)
    np.add.at(expected, np.ix_(group, group), whole)
    assert fill_matrix(counts, 30) == expected.tolist()


def test_gallery_follows_its_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, results = with_images(tmp_path)
    pairs = match_images(data, results)
    items = gallery.choose_items(data, pairs, classify(pairs))
    kinds = {own.kind: (own.kind_at(30), own.kind_at(95)) for own in items}
    assert kinds == {
        "missed": ("missed", "missed"),
        "background": ("background", ""),
        "localization": ("localization", ""),
        "classification": ("classification", "missed"),
        "correct": ("correct", "missed"),
    }
    thumbnails, unread = gallery.make_thumbnails(data, pairs, items)
    assert (len(thumbnails), unread) == (5, 0)
    for own in thumbnails:
        sides = (own.width, own.height)
        shown = own.detection or own.ground_truth
        assert shown is not None
        assert all(-1e-6 <= v <= max(sides) + 1e-6 for v in shown)
        wanted = data.boxes[own.item.annotation] if own.ground_truth else None
        assert (
            wanted is None
            or own.ground_truth is None
            or own.ground_truth[2] - own.ground_truth[0] == float(wanted[2] - wanted[0])
        )
    monkeypatch.setattr(gallery, "MOST_BYTES", len(thumbnails[0].data) + len(thumbnails[1].data))
    assert len(gallery.make_thumbnails(data, pairs, items)[0]) == 2
    monkeypatch.setattr(gallery, "MOST_PIXELS", 96 * 96)
    shown_images = {own.item.image for own in gallery.make_thumbnails(data, pairs, items)[0]}
    assert shown_images == {items[0].image}
    data.path(0).write_bytes(b"no image")
    monkeypatch.undo()
    thumbnails, unread = gallery.make_thumbnails(data, pairs, items)
    assert ({own.item.image for own in thumbnails}, unread) == ({1}, 1)


@pytest.mark.slow
def test_page_of_5000_images_is_small(tmp_path: Path) -> None:
    """Images of noise, which compress worst, 80 classes, and detections of every score."""
    rng, n, k = np.random.default_rng(0), 5000, 80
    Image.fromarray(rng.integers(0, 255, (240, 240, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    corners = rng.uniform(0, 120, (7 * n, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(40, 120, (7 * n, 2))], axis=1)
    data = DetectionDataset.from_arrays(
        [f"class number {i}" for i in range(k)],
        range(k),
        image_ids=np.arange(n),
        sizes=np.full((n, 2), 240),
        paths=[str(tmp_path / "noise.png")] * n,
        image_indices=np.repeat(np.arange(n), 7),
        boxes=boxes,
        labels=(labels := rng.integers(k, size=7 * n)),
        ignore=np.zeros(7 * n, dtype=bool),
        eval_ignore=np.zeros(7 * n, dtype=bool),
        area=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        segmentations=[b""] * 7 * n,
        source="made",
        dataset_format="coco",
    )
    chosen = rng.integers(7 * n, size=10 * n)
    moved = boxes[chosen] + rng.normal(0, 15, (10 * n, 4))
    moved[:, 2:] = np.maximum(moved[:, 2:] - moved[:, :2], 1)
    is_right = rng.random(10 * n) < 0.7
    guesses = np.where(is_right, labels[chosen], rng.integers(k, size=10 * n))
    table = DetectionTable(np.repeat(np.arange(n), 7)[chosen], guesses, rng.random(10 * n), moved)
    metrics = evaluation.evaluate_coco(data, table)  # type: ignore[arg-type]
    write_report_page(tmp_path / "report.html", data, table, metrics, title="5,000 images")
    text = (tmp_path / "report.html").read_text()
    assert 100_000 < len(text.encode()) < 3_000_000
    assert text.count("<img") > 80


# -- the commands


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that are opened in the browser."""
    addresses: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: addresses.append(address) or True)
    return addresses


def test_val_writes_and_opens_the_page(
    run_copy: Path, capsys: Any, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (run_copy / "report.html").is_file(), "train writes it too"
    about = json.loads((run_copy / "run.json").read_text())
    about["command"] = ["/usr/bin/fusedet", "train", "retinanet_tiny"]
    (run_copy / "run.json").write_text(json.dumps(about))
    command = ["val", str(run_copy), "--open", "--json", "device=cpu", "test.size_bins=[0,16,64]"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fusedet", *command])
    assert cli.run(command) == 0
    written = json.loads(capsys.readouterr().out)["files"]
    file = Path(written["report"])
    assert opened == [file.resolve().as_uri()]
    assert {"precision_recall.png", "confusion.png", "sizes.png"} <= {path.name for path in file.parent.iterdir()}
    text = file.read_text()
    for line in (f"fusedet val {run_copy} --open", "The training:", "versions, training", "0 to 16 px", "loss_box"):
        assert line in text, line
    assert cli.run(["val", str(run_copy), "--open", "--tiles-help"]) == 2
    assert "--tiles-help does not use --open: leave out --open" in capsys.readouterr().err


def test_no_browser_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    cli.common.open_in_browser(tmp_path / "report.html")
    cli.common.open_in_browser(None)
    said = capsys.readouterr().err
    assert f"no browser can be started here: open {tmp_path / 'report.html'}" in said
    assert "no report.html to open" in said


def test_a_page_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, results = by_hand()
    evaluated, said = detector_evaluation.evaluate_results(data, results, config.Test()), []
    options: dict[str, Any] = {"title": "a", "scored": "a", "device": "cpu", "say": said.append}
    (tmp_path / "run.json").write_text("{")
    assert run_report.write_run_page(tmp_path, data, evaluated, **options, run=tmp_path) == {}
    assert said[0].startswith(f"warning: {tmp_path / 'report.html'} is not written: JSONDecodeError: ")

    def fill_disk(*_: Any, **__: Any) -> None:
        raise StorageError("full")

    monkeypatch.setattr(run_report, "write_report_page", fill_disk)
    with pytest.raises(StorageError):
        run_report.write_run_page(tmp_path, data, evaluated, **options)


# -- in a browser


@pytest.fixture
def view(browser: Any, page: Path) -> Any:
    """The page in a window, what it logged and what it asked for."""
    own = SimpleNamespace(messages=[], requests=[])
    window = browser.new_page(viewport={"width": 1280, "height": 800})
    window.on("console", lambda message: own.messages.append(message.text))
    window.on("pageerror", lambda error: own.messages.append(str(error)))
    window.on("dialog", lambda dialog: own.messages.append("dialog"))
    window.on("request", lambda request: own.requests.append(request.url))
    window.goto(page.as_uri())
    own.window = window
    yield own
    assert own.messages == []
    assert [url for url in own.requests if not url.startswith(("data:", page.as_uri()))] == []
    window.close()


def read_rows(window: Any, selector: str) -> list[list[str]]:
    cells = "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
    return list(window.eval_on_selector_all(selector, cells))


def test_matrix_and_gallery_follow_the_slider(view: Any) -> None:
    window = view.window
    groups = "groups => Object.fromEntries(groups.map(g => [g.dataset.group, g.querySelectorAll('figure').length]))"
    kinds = ("missed", "background", "duplicate", "localization", "classification", "correct")
    for threshold, numbers in (
        (30, (1, 1, 0, 1, 1, 1)),
        (70, (2, 0, 0, 1, 0, 1)),
        (95, (3, 0, 0, 0, 0, 0)),
        (0, (1, 1, 0, 1, 1, 1)),
    ):
        shown = dict(zip(kinds, numbers, strict=True))
        window.fill("#threshold", str(threshold))
        assert window.text_content("#at") == f"{threshold / 100:.2f}"
        assert window.eval_on_selector_all("[data-group]", groups) == shown
        for kind, count in shown.items():  # the gallery holds all of these few
            assert set(window.locator(f'[data-count="{kind}"]').all_text_contents()) == {str(count)}
        data, results = by_hand()
        matrix = evaluation.compute_confusion_matrix(data, results, score=threshold / 100).tolist()
        cells = [[int(text or 0) for text in row[1:]] for row in read_rows(window, "#confusion tbody tr")]
        assert cells == matrix
        rows = {row[0]: row[-2:] for row in read_rows(window, "#classes tbody tr")}
        predicted = sum(row[0] for row in matrix)
        assert rows[NAMES[0]] == [f"{matrix[0][0] / predicted:.3f}" if predicted else "-", f"{matrix[0][0] / 2:.3f}"]
    window.click("[data-jump]")
    assert window.text_content("#at") == "0.85"
    window.focus("#threshold")
    window.keyboard.press("ArrowRight")
    assert window.text_content("#at") == "0.86"


def test_classes_sort(view: Any) -> None:
    window = view.window

    def column(i: int) -> list[str]:
        return [row[i] for row in read_rows(window, "#classes tbody tr")]

    assert column(0) == [NAMES[1], NAMES[0]], "the lowest AP first"
    heads = window.locator("#classes thead button")
    assert heads.count() == 11
    heads.nth(2).click()
    assert column(2) == ["2", "1"]
    heads.nth(2).press("Enter")
    assert column(2) == ["1", "2"]
    assert window.get_attribute("#classes thead th:nth-child(3)", "aria-sort") == "ascending"
    heads.nth(6).click()
    assert column(6) == ["0.85", "-"], "what has no value is last"
    heads.nth(6).click()
    assert column(6) == ["0.85", "-"]


def test_page_fits_narrow_windows_and_needs_no_script(browser: Any, page: Path) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 390, "height": 844})
    window = context.new_page()
    window.goto(page.as_uri())
    assert window.locator("#confusion tbody tr").first.text_content() == NAMES[0] + "11"
    assert window.locator("figure img:visible").count() == 4, "true positives are folded"
    assert not window.locator("#threshold").is_visible()
    assert window.locator("#fails").bounding_box()["width"] <= 390
    context.close()
    window = browser.new_page(viewport={"width": 390, "height": 844})
    window.goto(page.as_uri())
    assert window.evaluate("document.documentElement.scrollWidth") == 390
    window.close()
