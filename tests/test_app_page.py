"""The app's page in a browser: upload, threshold, classes, boxes, heat maps, downloads, errors, keys and widths."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fusedet
from exporting import NAMES, TWO_LEVELS, save_run
from serving import make_image, serve_in_thread


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    return save_run(tmp_path_factory.mktemp("page") / "first", "mask_rcnn", "model.pyramid.finest=4", data=scenes)


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    app = fusedet.create_app(run, examples=None, max_size_mb=1, device="cpu")
    with serve_in_thread(app) as own:
        yield own


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, on which no script fails and which asks no other host for anything."""
    own = browser.new_page(viewport={"width": 1280, "height": 900})
    faults: list[str] = []
    own.on("pageerror", lambda error: faults.append(str(error)))
    # a refused request is reported on the console too, and shown to the user
    own.on(
        "console",
        lambda line: faults.append(line.text) if "status of 4" not in line.text and line.type == "error" else None,
    )
    own.on(
        "request", lambda request: None if request.url.startswith((address, "blob:")) else faults.append(request.url)
    )
    own.goto(address)
    own.wait_for_selector("#examples button")
    yield own
    own.close()
    assert faults == []


def upload(page: Any, content: bytes, name: str = "street.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})
    page.wait_for_selector("#tables table, #error:not([hidden])")


def set_value(page: Any, selector: str, value: float) -> None:
    page.eval_on_selector(selector, "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", str(value))


def read_table(page: Any) -> list[list[str]]:
    return page.eval_on_selector_all("#tables tbody tr", "rows => rows.map(r => [...r.cells].map(c => c.textContent))")


def canvas_pixels(page: Any) -> np.ndarray:
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    text = page.eval_on_selector("canvas", "canvas => canvas.toDataURL('image/png')")
    import base64
    import io

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))).convert("RGB"))


def test_upload_and_threshold(page: Any, run: Path) -> None:
    """The table and the counts are the model's detections; the threshold filters them without a request."""
    content = make_image(120, 80)
    expected = fusedet.load(run, device="cpu", test={"score": 0.01}).predict(content)
    scores = expected.scores.tolist()
    upload(page, content)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    for count in (len(scores), 3, 1):
        threshold = 0.01 if count == len(scores) else (scores[count - 1] + scores[count]) / 2
        page.eval_on_selector("#threshold", "e => { e.step = 'any'; }")
        set_value(page, "#threshold", threshold)
        rows = read_table(page)
        assert [row[0] for row in rows] == [NAMES[k] for k in expected.labels[:count]]
        np.testing.assert_allclose([float(row[1]) for row in rows], scores[:count], atol=6e-4)
        boxes = [[float(cell) for cell in row[2:]] for row in rows]
        np.testing.assert_allclose(boxes, expected.boxes[:count], atol=0.51)
        counts = page.eval_on_selector_all("#classes .count", "all => all.map(e => Number(e.textContent))")
        assert sum(counts) == count
        assert page.inner_text("#status").startswith(f"{count} detections with a score of {threshold:.2f}")
    assert requests == []
    assert re.search(r"\d\.\d\d s \(read", page.inner_text(".time"))


@pytest.mark.slow
def test_classes_and_layers(page: Any) -> None:
    """A class that is switched off leaves table and image; so do boxes, tags and masks."""
    upload(page, make_image(120, 80))
    set_value(page, "#threshold", 0.01)
    rows = read_table(page)
    name = rows[0][0]
    page.click(f"#classes input[value='{name}']")
    assert [row for row in rows if row[0] != name] == read_table(page)
    page.click("#no-class")
    assert read_table(page) == []
    empty = canvas_pixels(page)
    page.click("#all-classes")
    assert read_table(page) == rows
    full = canvas_pixels(page)
    assert not np.array_equal(full, empty)
    for layer in ("#show-tags", "#show-boxes", "#show-masks"):
        before = canvas_pixels(page)
        page.click(layer)
        assert not np.array_equal(canvas_pixels(page), before), layer
    assert np.array_equal(canvas_pixels(page), empty)


def test_boxes_are_drawn_where_they_are(page: Any) -> None:
    """In the image at its own size, the chosen box's edge has the color of its class."""
    upload(page, make_image(120, 80))
    set_value(page, "#threshold", 0.01)
    for layer in ("#show-tags", "#show-masks"):
        page.click(layer)
    page.click("#tables tbody tr:first-child button")
    page.click("[data-do=full]")
    pixels, (name, _, *corners) = canvas_pixels(page), read_table(page)[0]
    x1, y1, x2, _ = map(float, corners)
    height, width = pixels.shape[:2]
    color = page.eval_on_selector(f"#classes li:has(input[value='{name}']) .swatch", "e => e.style.background")
    middle = (round(width / 2 - 60 + (x1 + x2) / 2), round(height / 2 - 40 + y1))
    near = pixels[middle[1] - 2 : middle[1] + 3, middle[0]]
    wanted = np.array([int(value) for value in re.findall(r"\d+", color)])
    assert np.abs(near.astype(int) - wanted).sum(axis=1).min() < 30


@pytest.mark.slow
def test_tiles_predict_again(page: Any, run: Path) -> None:
    content = make_image(300, 200)
    upload(page, content)
    set_value(page, "#threshold", 0.01)
    page.fill("#tiles", "96")
    for overlap, is_valid in (("1.5", False), ("0.95", True), ("0.33", True), ("0.2", True)):
        page.fill("#overlap", overlap)
        assert page.eval_on_selector("#tiles-form", "form => form.checkValidity()") == is_valid
    with page.expect_response("**/predict?**") as reply:
        page.click("#predict-again")
    assert "tiles=96&overlap=0.2&whole=true" in reply.value.url
    tiles = {"size": 96, "overlap": 0.2, "whole": True}
    expected = fusedet.load(run, device="cpu", test={"score": 0.01, "tiles": tiles}).predict(content)
    page.wait_for_function("count => document.querySelectorAll('#tables tbody tr').length === count", arg=len(expected))


@pytest.mark.slow
def test_heat_maps(page: Any) -> None:
    """They are computed on request, chosen by level without a request, and can be removed."""
    upload(page, make_image(120, 80))
    page.click("#no-class")
    before = canvas_pixels(page)
    with page.expect_response("**/heatmaps?**"):
        page.click("#heat-button")
    page.wait_for_selector("#heat-result:not([hidden])")
    every = canvas_pixels(page)
    assert not np.array_equal(every, before)
    levels = page.eval_on_selector_all("#heat-level option", "all => all.map(e => e.value)")
    assert levels == ["all levels", "stride 16", "stride 32", "stride 64"]
    page.select_option("#heat-row", "backbone")
    row = canvas_pixels(page)
    page.select_option("#heat-level", "stride 32")
    assert not np.array_equal(canvas_pixels(page), row)
    page.click("#heat-clear")
    assert np.array_equal(canvas_pixels(page), before)


@pytest.mark.slow
def test_downloads(page: Any) -> None:
    """JSON has what is shown; the PNG has the size of the image."""
    upload(page, make_image(120, 80))
    set_value(page, "#threshold", 0.02)
    with page.expect_download() as saved:
        page.click("#save-json")
    assert saved.value.suggested_filename == "street.json"
    content = json.loads(Path(saved.value.path()).read_text())
    assert (content["image"], content["width"], content["threshold"]) == ("street.png", 120, 0.02)
    (model,) = content["models"]
    assert [row["class_name"] for row in model["detections"]] == [row[0] for row in read_table(page)]
    with page.expect_download() as saved:
        page.click("#save-png")
    assert Image.open(saved.value.path()).size == (120, 80)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"no image", "The image of 8 bytes is empty or not an image in a format that Pillow reads."),
        pytest.param(make_image(200, 200)[:500], "is truncated or damaged", marks=pytest.mark.slow),
        pytest.param(
            bytes(2 * 10**6), "street.png is larger than 1 MB, the limit of this server.", marks=pytest.mark.slow
        ),
    ],
    ids=["text", "cut", "large"],
)
def test_errors(page: Any, content: bytes, sentence: str) -> None:
    """A sentence is announced, and the next image works."""
    upload(page, content)
    assert sentence in page.inner_text("#error")
    assert page.inner_text("#status") == "No detections."
    upload(page, make_image(120, 80))
    page.wait_for_selector("#tables table")
    assert page.is_hidden("#error")


@pytest.mark.slow
def test_examples_and_files_that_browsers_cannot_show(page: Any) -> None:
    page.click("#examples li:first-child button")
    page.wait_for_selector("#tables table")
    assert ".jpg" in page.inner_text("#status")
    blank = canvas_pixels(page)
    with page.expect_response("**/preview?**"):
        page.set_input_files(
            "#file", {"name": "a.tif", "mimeType": "image/tiff", "buffer": make_image(90, 60, format="TIFF")}
        )
    page.wait_for_function("() => document.querySelector('#status').textContent.includes('a.tif')")
    assert not np.array_equal(canvas_pixels(page), blank)


@pytest.mark.slow
def test_keys_and_labels(page: Any) -> None:
    """All controls have names, the file field and the zoom work by keyboard, and the wheel zooms at the pointer."""
    upload(page, make_image(120, 80))
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, canvas')].filter(e =>
            !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim() || e.querySelector('img[alt]')))
            .map(e => e.outerHTML)"""
    )
    assert unnamed == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "A"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    fitted = canvas_pixels(page)
    page.focus("canvas")
    for keys in (["+"], ["ArrowLeft"], ["-", "-"], ["1"]):
        before = canvas_pixels(page)
        for key in keys:
            page.keyboard.press(key)
        assert not np.array_equal(canvas_pixels(page), before), keys
    page.keyboard.press("0")
    assert np.array_equal(canvas_pixels(page), fitted)
    page.hover("canvas")
    page.mouse.wheel(0, -300)
    page.wait_for_timeout(50)
    assert not np.array_equal(canvas_pixels(page), fitted)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_schemes_and_narrow_windows(browser: Any, address: str, scheme: str) -> None:
    """The page fits 390 pixels, follows the reader's color scheme, and its text contrasts with its background."""
    own = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    own.goto(address)
    own.wait_for_selector(".view")
    upload(own, make_image(120, 80))
    assert own.evaluate("document.documentElement.scrollWidth") == 390
    colors = own.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    back, text = (sum(map(int, re.findall(r"\d+", color)[:3])) / 3 for color in colors)
    assert (back < text) == (scheme == "dark")
    assert abs(back - text) > 150
    own.close()


@pytest.mark.slow
def test_two_models(browser: Any, run: Path, tmp_path: Path) -> None:
    """Both see the image, with their own tables, the same colors of classes, and one zoom."""
    other = save_run(tmp_path / "second", "retinanet", *TWO_LEVELS)
    app = fusedet.create_app(run, beside=other, device="cpu")
    with serve_in_thread(app) as own:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(own)
        page.wait_for_selector("canvas >> nth=1")
        upload(page, make_image(120, 80))
        page.wait_for_selector("#tables table >> nth=1")
        set_value(page, "#threshold", 0.01)
        captions = page.eval_on_selector_all("caption", "all => all.map(e => e.textContent)")
        assert [text.partition(":")[0] for text in captions] == ["first", "second"]
        assert " | " in page.inner_text("#classes .count >> nth=0")
        page.close()


@pytest.mark.slow
def test_reference(browser: Any, address: str) -> None:
    """/docs shows every route of the OpenAPI description, without another host."""
    page = browser.new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"{address}/docs")
    page.wait_for_selector("#types section")
    routes = page.eval_on_selector_all("#routes h2 code", "all => all.map(e => e.textContent)")
    assert {"/predict", "/heatmaps", "/health", "/metrics", "/models"} <= set(routes)
    assert f'curl -F image=@street.jpg "{address}/predict?score=0.3"' in page.inner_text("#example")
    assert all(url.startswith(address) for url in requests)
    page.close()
