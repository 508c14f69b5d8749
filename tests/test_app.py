"""The app's JSON interface: detections, refusals, limits, the queue and the counters; and how the command starts it."""

import asyncio
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

import fusedet
from exporting import NAMES, ONE_LEVEL, TWO_LEVELS, save_run
from fusedet import cli
from fusedet.app import command, server
from fusedet.app.metrics import Metrics
from fusedet.app.prediction_queue import PredictionQueue, QueueFullError
from serving import make_image, serve_in_thread

PHOTO = make_image(120, 80)
MB = 10**6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("served")
    one = save_run(folder / "first", "retinanet", *TWO_LEVELS, data=scenes)
    return {"first": one, "masked": save_run(folder / "masked", "mask_rcnn", "model.pyramid.finest=4")}


@pytest.fixture(scope="module")
def app(runs: dict[str, Path]) -> Any:
    return fusedet.create_app(runs["first"], beside=runs["masked"], examples=None, max_size_mb=1, device="cpu", queue=3)


@pytest.fixture(scope="module")
def client(app: Any) -> Any:
    return connect(app)


def connect(app: Any) -> Any:
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def post(client: Any, route: str, content: bytes = PHOTO, **parameters: Any) -> Any:
    return client.post(route, files={"image": ("street.png", content)}, params=parameters)


def test_detections_are_those_of_the_model(client: Any, runs: dict[str, Path]) -> None:
    reply = post(client, "/predict").json()
    expected = fusedet.load(runs["first"], device="cpu", test={"score": 0.01}).predict(PHOTO)
    assert (reply["model"], reply["width"], reply["height"]) == ("first", 120, 80)
    rows = reply["detections"]
    assert len(rows) == len(expected) > 5
    np.testing.assert_allclose([row["box"] for row in rows], expected.boxes, atol=0.006)
    np.testing.assert_allclose([row["score"] for row in rows], expected.scores, atol=1e-6)
    assert [row["class_name"] for row in rows] == [NAMES[k] for k in expected.labels]
    assert set(reply["seconds"]) == {"wait", "decode", "detect"}


@pytest.mark.parametrize(("model", "share"), [("first", 0.2), ("masked", 0.6)])
def test_a_threshold_is_a_filter(client: Any, runs: dict[str, Path], model: str, share: float) -> None:
    """What the page shows at a threshold is what the model predicts with it."""
    rows = post(client, "/predict", model=model).json()["detections"]
    count = max(1, int(share * len(rows)))
    threshold = (rows[count - 1]["score"] + rows[count]["score"]) / 2
    expected = fusedet.load(runs[model], device="cpu", test={"score": threshold}).predict(PHOTO)
    np.testing.assert_allclose([row["box"] for row in rows[:count]], expected.boxes, atol=0.006)
    assert post(client, "/predict", model=model, score=threshold).json()["detections"] == rows[:count]


def test_tiles_of_a_request(client: Any, runs: dict[str, Path]) -> None:
    """They replace those of the model for one request."""
    large = make_image(300, 200)
    tiles = {"size": 96, "overlap": 0.25, "whole": False}
    expected = fusedet.load(runs["first"], device="cpu", test={"score": 0.01, "tiles": tiles}).predict(large)
    rows = post(client, "/predict", large, tiles=96, overlap=0.25, whole=False).json()["detections"]
    np.testing.assert_allclose([row["box"] for row in rows], expected.boxes, atol=0.006)
    whole = post(client, "/predict", large).json()["detections"]
    assert whole != rows
    assert post(client, "/predict", large, tiles=0).json()["detections"] == whole
    narrow = make_image(120, 80)
    assert post(client, "/predict", narrow, tiles=96, overlap=0.95).status_code == 200, "a config may say so too"


def test_masks(client: Any, runs: dict[str, Path]) -> None:
    from faster_coco_eval.core import mask as coco_mask

    rows = post(client, "/predict", model="masked").json()["detections"]
    expected = fusedet.load(runs["masked"], device="cpu", test={"score": 0.01}).predict(PHOTO)
    assert expected.masks is not None
    assert len(rows) == len(expected) > 0
    for row, mask in zip(rows, expected.masks, strict=True):
        decoded = coco_mask.decode({**row["mask"], "counts": row["mask"]["counts"].encode()})
        assert np.array_equal(decoded.astype(bool), mask.numpy())
    assert all(
        row["mask"] is None for row in post(client, "/predict", model="masked", masks=False).json()["detections"]
    )
    assert all(row["mask"] is None for row in post(client, "/predict").json()["detections"])


def test_models_and_limits(client: Any) -> None:
    content = client.get("/models").json()
    first, masked = content["models"]
    assert (first["name"], masked["name"]) == ("first", "masked")
    assert [own["name"] for own in first["classes"]] == NAMES
    assert all(re.fullmatch(r"#[0-9a-f]{6}", own["color"]) for own in first["classes"])
    assert (first["lowest_score"], first["heat_maps"], content["max_bytes"]) == (0.01, True, MB)
    assert content["overlap_limit"] == 1
    assert client.get("/health").json() == {
        "status": "ok",
        "version": fusedet.__version__,
        "models": ["first", "masked"],
    }


def test_heat_maps(client: Any) -> None:
    """A layer per feature level and one for all, of the image's shape; the maximum is that of the color scale."""
    reply = post(client, "/heatmaps", **{"class": NAMES[0]}).json()
    assert (reply["kind"], reply["kinds"]) == ("classification", ["classification", "regression"])
    assert [row["caption"] for row in reply["rows"]][:2] == ["backbone", "after fpn"]
    assert [own["level"] for own in reply["rows"][1]["maps"]] == ["all levels", "stride 16", "stride 32"]
    import base64

    layers = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(own["png"])))) for row in reply["rows"] for own in row["maps"]
    ]
    assert {layer.shape for layer in layers} == {(213, 320, 4)}  # the longer side of 120 x 80 becomes 320
    assert max(int(layer[..., 3].max()) for layer in layers) == round(255 * 0.85)
    refused = post(client, "/heatmaps", **{"class": "unicorn"})
    assert (refused.status_code, refused.json()["detail"].startswith("unknown class 'unicorn'")) == (422, True)
    refused = post(client, "/heatmaps", kind="objectness", **{"class": NAMES[0]})
    assert refused.json()["detail"].startswith("unknown kind of heat map 'objectness'")


def test_previews_are_upright(client: Any) -> None:
    """Where a browser cannot show a file, the server sends what the model sees."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = post(client, "/preview", make_image(60, 40, format="TIFF", exif=exif))
    assert data.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(data.content)).size == (40, 60)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"no image", "the image of 8 bytes is empty or not an image in a format that Pillow reads"),
        (b"", "the image of 0 bytes is empty or not an image in a format that Pillow reads"),
        (make_image(200, 200)[:500], "is truncated or damaged"),
    ],
    ids=["text", "empty", "cut"],
)
@pytest.mark.parametrize("route", ["/predict", "/preview", f"/heatmaps?class={NAMES[0]}"])
def test_broken_files(client: Any, route: str, content: bytes, sentence: str) -> None:
    answer = client.post(route, files={"image": ("a.png", content)})
    assert answer.status_code == 422
    assert sentence in answer.json()["detail"]


def test_image_bombs(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file of many pixels is refused by its header."""
    monkeypatch.setenv("FUSEDET_MAX_PIXELS", "1000")
    answer = post(client, "/predict")
    assert (answer.status_code, "has more than 1000 pixels" in answer.json()["detail"]) == (422, True)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"score": 7}, "score: input should be less than or equal to 1"),
        ({"score": "high"}, "score: input should be a valid number, unable to parse string as a number"),
        ({"tiles": 10}, "test.tiles.size=10 must be 32 or more"),
        ({"tiles": 96, "overlap": 1}, "overlap: input should be less than 1"),
        ({"scor": 0.5}, "unknown parameter 'scor': did you mean 'score'?"),
        ({"model": "frist"}, "unknown model 'frist': did you mean 'first'? Known: first, masked"),
        ({"tiles": 32, "overlap": 0.9}, "make 9861 windows of this image, more than 400"),  # 116 x 85 + 1
    ],
)
def test_wrong_parameters(client: Any, parameters: dict[str, Any], sentence: str) -> None:
    content = make_image(400, 300) if "overlap" in parameters else PHOTO
    answer = post(client, "/predict", content, **parameters)
    assert answer.status_code == 422
    assert sentence in answer.json()["detail"]


def test_a_text_is_no_file(client: Any) -> None:
    answer = client.post("/predict", files={"image": (None, "street.jpg")})
    assert (answer.status_code, answer.json()["detail"]) == (422, "image: a file was expected, not a text")


def test_a_missing_file(client: Any) -> None:
    answer = client.post("/predict")
    assert (answer.status_code, answer.json()) == (422, {"detail": "image: field required"})


def test_large_files(app: Any, client: Any) -> None:
    """They are refused by their length, by their count of bytes without one, and by the file's own size."""
    sentence = {"detail": "the file is larger than 1 MB, the limit of this server"}
    for content in (bytes(2 * MB), bytes(MB + 1)):
        answer = post(client, "/predict", content)
        assert (answer.status_code, answer.json()) == (413, sentence)

    def chunks() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        yield from [bytes(MB // 4)] * 8

    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = client.post("/predict", content=chunks(), headers=headers)
    assert (answer.status_code, answer.json()) == (413, sentence)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:8000", 200),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("localhost@evil.example", 400),
        ("[", 400),
        ("", 400),
    ],
)
def test_hosts(client: Any, host: str, status: int) -> None:
    assert client.get("/health", headers={"host": host}).status_code == status


def test_allowed_hosts(runs: dict[str, Path]) -> None:
    own = connect(fusedet.create_app(runs["first"], allowed_hosts=["Detect.example.com"], device="cpu"))
    assert own.get("/health", headers={"host": "detect.example.com"}).status_code == 200


@pytest.mark.parametrize(
    "host", ["a b", "https://detect.example.com", "detect.example.com:443", "detect.example.com/", ""]
)
def test_wrong_allowed_hosts(host: str) -> None:
    with pytest.raises(fusedet.InputError, match="must be a name or an address without scheme, port and path"):
        fusedet.create_app("no run is loaded", allowed_hosts=[host])


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://localhost:3000", 200), ("https://evil.example", 403), ("null", 403)],
)
def test_other_sites_send_nothing(client: Any, origin: str, status: int) -> None:
    answer = client.post("/predict", files={"image": ("a.png", PHOTO)}, headers={"origin": origin})
    assert answer.status_code == status


def test_security_headers(client: Any) -> None:
    for answer in (
        client.get("/"),
        client.get("/static/app.js"),
        client.get("/nowhere"),
        post(client, "/predict", b""),
    ):
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_pages_stand_alone() -> None:
    """No address of another host, no code or style inside the pages, and no text is set as HTML."""
    files = sorted(server.STATIC.iterdir())
    assert {file.suffix for file in files} == {".html", ".js", ".css", ".svg"}
    for file in files:
        text = file.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "//" not in re.sub(r"(?m)(^|[ ;])// .*$", "", text).replace("http://localhost", ""), file
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), file
        assert len(text.splitlines()) < 320
        if file.suffix == ".html":
            assert not re.search(
                r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=\"static/\w+\.js\"></script>)", text
            )


def test_routes_are_described(client: Any) -> None:
    """The OpenAPI description has every route, and its page loads nothing from elsewhere."""
    content = client.get("/openapi.json").json()
    assert set(content["paths"]) == {
        "/models",
        "/examples",
        "/examples/{number}",
        "/examples/{number}/thumbnail",
        "/predict",
        "/heatmaps",
        "/preview",
        "/health",
        "/metrics",
    }
    assert {"200", "413", "422", "429"} <= set(content["paths"]["/predict"]["post"]["responses"])
    page = client.get("/docs")
    assert (page.status_code, "http" in page.text) == (200, False)


def test_examples_are_validation_images(client: Any, scenes: Path) -> None:
    rows = client.get("/examples").json()
    names = sorted(file.name for file in (scenes / "val").glob("*.jpg"))
    assert sorted(row["name"] for row in rows) == names
    first = client.get(f"/examples/{rows[0]['number']}")
    assert first.content == (scenes / "val" / rows[0]["name"]).read_bytes()
    small = Image.open(io.BytesIO(client.get("/examples/0/thumbnail").content))
    assert max(small.size) <= 160
    for number in (-1, 99):
        assert client.get(f"/examples/{number}").status_code == 404


def test_examples_of_a_folder(runs: dict[str, Path], tmp_path: Path) -> None:
    for i in range(15):
        (tmp_path / f"{i:02}.png").write_bytes(PHOTO)
    (tmp_path / "00.png").write_bytes(b"broken")
    own = connect(fusedet.create_app(runs["first"], examples=[str(tmp_path)], device="cpu"))
    assert [row["name"] for row in own.get("/examples").json()] == [f"{i:02}.png" for i in range(12)]
    assert own.get("/examples/0/thumbnail").status_code == 404  # the page leaves it out
    with pytest.raises(fusedet.InputError, match="there is no image"):
        fusedet.create_app(runs["first"], examples=[str(tmp_path / "no")], device="cpu")


def test_no_path_is_shown(client: Any, runs: dict[str, Path], scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither answers nor refusals hold a path of the server, also after a fault of the program."""
    answers = [
        client.get(route) for route in ("/", "/models", "/examples", "/examples/0/thumbnail", "/health", "/metrics")
    ]
    answers += [client.get("/static/../../command.py"), client.get("/static/%2e%2e/command.py")]
    answers += [post(client, "/predict"), post(client, "/predict", b"x"), post(client, "/predict", model="x")]
    monkeypatch.setattr(server, "choose_model", lambda *_: Path("/root/secret").read_text())
    answers.append(post(client, "/predict"))
    assert answers[-1].status_code == 500
    assert answers[-1].json() == {"detail": "the server failed at this request; its log says why"}
    assert answers[-1].headers["x-content-type-options"] == "nosniff"
    assert 'path="/predict",status="500"} 1' in client.get("/metrics").text
    assert [answer.status_code for answer in answers[6:8]] == [404, 404]
    for answer in answers:
        assert not re.search(rf"{runs['first'].parent}|{scenes}|/root|/src/|Traceback", answer.text)


def test_metrics(runs: dict[str, Path]) -> None:
    own = connect(fusedet.create_app(runs["first"], device="cpu"))
    post(own, "/predict")
    post(own, "/predict")
    post(own, "/predict", b"x")
    own.get("/nowhere")
    text = own.get("/metrics").text
    assert 'fusedet_http_requests_total{method="POST",path="/predict",status="200"} 2' in text
    assert 'fusedet_http_requests_total{method="POST",path="/predict",status="422"} 1' in text
    assert 'fusedet_http_requests_total{method="GET",path="other",status="404"} 1' in text
    assert 'fusedet_prediction_seconds_count{model="first"} 2' in text
    assert "fusedet_queue_pending 0" in text


def test_metrics_text() -> None:
    """Buckets are cumulative, and labels are escaped."""
    metrics = Metrics()
    for seconds in (0.03, 0.2, 100.0):
        metrics.count_prediction('a"b\\c\n', seconds)
    lines = [line for line in metrics.format(2, 3).splitlines() if not line.startswith("#")]
    label = 'model="a\\"b\\\\c\\n"'
    counts = [int(line.split()[-1]) for line in lines if "_bucket" in line]
    assert counts == [0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3]
    assert f"fusedet_prediction_seconds_sum{{{label}}} 100.23" in lines
    assert lines[-2:] == ["fusedet_queue_pending 2", "fusedet_queue_refused_total 3"]


def test_queue() -> None:
    """Turns come one at a time and in order; beyond the limit they are refused with the time to wait."""
    order: list[int] = []

    async def run() -> None:
        queue = PredictionQueue(2)
        active = 0

        async def work(number: int) -> None:
            nonlocal active
            async with queue.turn():
                active += 1
                assert active == 1
                await asyncio.sleep(0.01)
                order.append(number)
                active -= 1

        tasks = [asyncio.create_task(work(i)) for i in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="2 requests are waiting already: try again in 3 s") as refused:
            await work(3)
        assert refused.value.retry_after == 3
        await asyncio.gather(*tasks)
        assert (queue.pending, queue.refused) == (0, 1)
        await work(4)

    asyncio.run(run())
    assert order == [0, 1, 2, 4]


def send(address: str, content: bytes) -> tuple[int, dict[str, str], Any]:
    """Post an image over a connection of its own."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    connection.request("POST", "/predict", head + content + b"\r\n--x--\r\n", headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), json.loads(content)


def test_full_queue(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One is computed, one waits, the others get 429 with Retry-After, and nothing is stuck afterwards."""
    app = fusedet.create_app(runs["first"], device="cpu", queue=1)
    model = next(iter(app.state.served.models.values()))
    is_open, began = threading.Event(), threading.Event()
    detect = type(model).detect

    def wait(*arguments: Any) -> Any:
        began.set()
        assert is_open.wait(30)
        return detect(*arguments)

    monkeypatch.setattr(type(model), "detect", wait)
    with serve_in_thread(app) as address, ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(send, address, PHOTO)]
        assert began.wait(30)
        answers += [pool.submit(send, address, PHOTO) for _ in range(4)]
        while app.state.served.queue.refused < 3:
            assert not is_open.wait(0.01)
        is_open.set()
        done = [answer.result(60) for answer in answers]
        assert sorted(status for status, *_ in done) == [200, 200, 429, 429, 429]
        assert all(int(headers["retry-after"]) >= 1 for status, headers, _ in done if status == 429)
        assert send(address, PHOTO)[0] == 200


@pytest.mark.slow
def test_load(runs: dict[str, Path]) -> None:
    """200 requests, 8 at a time: none is lost, and each gets the detections of its own image."""
    app = fusedet.create_app(runs["first"], device="cpu")
    images = [make_image(120, 80, seed) for seed in range(8)]
    predictor = fusedet.load(runs["first"], device="cpu", test={"score": 0.01})
    expected = [predictor.predict(image).scores.tolist() for image in images]
    assert all(a != b for a, b in pairwise(expected))
    with serve_in_thread(app) as address, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: send(address, images[i % 8]), range(200)))
    assert [status for status, *_ in answers] == [200] * 200
    for i, (*_, content) in enumerate(answers):
        np.testing.assert_allclose([row["score"] for row in content["detections"]], expected[i % 8], atol=1e-5)


@pytest.mark.slow
def test_an_exported_model(runs: dict[str, Path], tmp_path: Path) -> None:
    """It is served like a run, beside its run too; it has no heat maps, and says so."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    run = save_run(tmp_path / "small", "retinanet", *ONE_LEVEL)
    folder = fusedet.export(run, formats=["onnx"]).out
    own = connect(fusedet.create_app(run, beside=folder, device="cpu"))
    names = [model["name"] for model in own.get("/models").json()["models"]]
    assert names == ["small", "small (ONNX)"]
    exported = own.get("/models").json()["models"][1]
    assert (exported["lowest_score"], exported["heat_maps"]) == (0.005, False)
    rows = post(own, "/predict", model="small (ONNX)", score=0.01).json()["detections"]
    expected = post(own, "/predict", model="small").json()["detections"]
    assert len(rows) == len(expected) > 0
    np.testing.assert_allclose([row["box"] for row in rows], [row["box"] for row in expected], atol=0.1)
    refused = post(own, "/heatmaps", model="small (ONNX)", **{"class": NAMES[0]})
    assert (refused.status_code, refused.json()["detail"]) == (
        422,
        "small (ONNX) is an exported model, whose layers cannot be seen: serve the run that it is from",
    )
    with pytest.raises(fusedet.InputError, match="exported model"):
        fusedet.create_app(folder, "test.score=0.1")


def test_names_of_models(runs: dict[str, Path]) -> None:
    app = fusedet.create_app(runs["first"], beside=runs["first"] / "best.safetensors", device="cpu")
    assert list(app.state.served.models) == ["first", "best.safetensors"]
    twice = fusedet.create_app(runs["first"], "test.score=0.2", beside=runs["first"], device="cpu")
    assert [(name, model.lowest) for name, model in twice.state.served.models.items()] == [
        ("first", 0.2),
        ("first #2", 0.2),
    ]


# ------------------------------------------------------------------------------------------------------------ command


def test_command(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It serves on this machine only, with both models and the settings, until it is stopped."""
    import uvicorn

    served: dict[str, Any] = {}

    def run_once(self: Any, sockets: list[socket.socket]) -> None:
        served.update(app=self.config.app, address=sockets[0].getsockname())
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", run_once)
    attempts: list[Any] = []
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, lambda _, *arguments: attempts.append(arguments))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: attempts.append(arguments) or [])
    arguments = ["app", str(runs["first"]), str(runs["masked"]), "test.score=0.07", "device=cpu", "--port", "0"]
    assert cli.run([*arguments, "--max-size-mb", "2", "--queue", "5"]) == 0
    assert attempts == []  # it starts without internet
    state = served["app"].state.served
    assert served["address"][0] == "127.0.0.1"
    assert [model.lowest for model in state.models.values()] == [0.07, 0.07]
    assert (state.max_bytes, state.queue.limit) == (2 * MB, 5)
    assert f"http://127.0.0.1:{served['address'][1]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("host", "allowed", "expected", "has_examples"),
    [
        ("127.0.0.1", (), {"127.0.0.1", "localhost", "::1"}, True),
        ("0.0.0.0", ("gpu.local",), {"127.0.0.1", "localhost", "::1", "gpu.local"}, False),
    ],
)
def test_bound_address(
    runs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    allowed: tuple[str, ...],
    expected: set[str],
    has_examples: bool,
) -> None:
    """Images of the dataset are examples only where nobody else can reach them."""
    import uvicorn

    served: list[Any] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: served.append(self.config.app))
    lines: list[str] = []
    fusedet.serve_app(runs["first"], host=host, port=0, allowed_hosts=allowed, device="cpu", say=lines.append)
    (guard,) = [own for own in served[0].user_middleware if own.cls.__name__ == "RequestGuard"]
    assert {name.lower() for name in guard.kwargs["hosts"]} == expected
    assert bool(served[0].state.served.examples.files) == has_examples


def test_errors_of_the_command(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = str(runs["first"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.run(["app", run, "--port", str(port)]) == 2
    assert f"port={port} is taken by another program" in capsys.readouterr().err
    for arguments, sentence in [
        (["app", str(tmp_path / "none"), "--port", "0"], "none"),
        (
            ["app", "retinanet_r50", "--port", "0"],
            "retinanet_r50 is a config, which has no weights: give a run directory",
        ),
        (["app", run, run, run], "is one too many: app takes one model or two"),
        (["app", run, "train.epochs=3", "--port", "0"], "train.epochs=3 changes nothing for a trained model"),
        (["app", run, "--port", "0", "--host", "192.0.2.1"], "host=192.0.2.1 is no address of this machine"),
        (["app", run, "--port", "0", "--host", "no such host"], "host=no such host is no address of this machine"),
        (["app", run, "--port", "0", "--host", ""], "host is empty: use 127.0.0.1"),
        (["app", run, "--port", "0", "--examples", "nowhere"], "there is no image, folder or pattern nowhere"),
    ]:
        assert cli.run(arguments) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    monkeypatch.setitem(command.PACKAGES, "no_such_module", "fastapi-and-more")
    assert cli.run(["app", run]) == 2
    assert 'the app needs fastapi-and-more: pip install "fusedet[app]"' in capsys.readouterr().err


@pytest.mark.slow
def test_a_served_process(runs: dict[str, Path]) -> None:
    """The command itself answers over HTTP, and Ctrl-C ends it without a traceback."""
    command_line = [sys.executable, "-m", "fusedet.cli", "app", str(runs["first"]), "--port", "0", "device=cpu"]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        assert send(address, PHOTO)[0] == 200
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
