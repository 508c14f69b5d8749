"""The benchmark of engines: turns, percentiles, processes that fail, rows for what cannot run here, and its files."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import exporting
import fusedet
from fusedet import cli, exporters
from fusedet.api import benchmark_plan, engines
from fusedet.api.benchmark import BenchmarkResult, measure_engines
from fusedet.api.benchmark_plan import Candidate, plan_engines
from fusedet.api.engine_process import EngineProcess, serve
from fusedet.api.engines import Task, open_engine
from fusedet.api.exported import Exported
from fusedet.api.timing import Span, compute_percentiles, interleave, read_peak_memory, summarize_spans, time_call
from fusedet.errors import InputError
from fusedet.exporters.metadata import License, Metadata, Resize, Thresholds, write_description
from fusedet.file_hash import hash_file

pytestmark = pytest.mark.usefixtures("unrendered")

SIZE = (64, 96)
SCRIPT = """
import json, sys
print(json.dumps({"open_seconds": 0.5, "imports_MiB": 100.0}), flush=True)
for line in sys.stdin:
    n = json.loads(line)
    answer = {"spans": {"network": [n, 2 * n], "file": [2 * n, 3 * n]}, "peak_MiB": 100.0 + n}
    exec(%r)
    print(json.dumps(answer), flush=True)
"""


def program(change: str = "") -> list[str]:
    """The command line of an engine that takes as many seconds as there are images; `change` may alter its answer."""
    return [sys.executable, "-c", SCRIPT % change]


# -- timing


def test_sides_take_turns_after_the_warmup() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    assert interleave(sides, 2, warmup=1) == {"a": [4, 7], "b": [5, 8], "c": [6, 9]}
    assert "".join(calls) == "abcabcabc"


def test_percentiles_by_hand() -> None:
    assert compute_percentiles([100, 10, 40, 20, 30]) == {"p50_ms": 30, "p95_ms": pytest.approx(40 + 0.8 * 60)}


def test_spans_become_latency_and_throughput() -> None:
    spans = [Span(0.1, 0.5), Span(0.2, 0.3), Span(0.4, 0.4)]
    summary = summarize_spans(spans, 8)
    expected = {"p50_ms": 200, "p95_ms": 380, "processor_ms": 400, "images_per_second": 8 / 0.2}
    assert summary == pytest.approx(expected)


def test_waiting_is_wall_time_and_work_is_processor_time() -> None:
    assert time_call(lambda: "result")[0] == "result"
    waiting = time_call(lambda: time.sleep(0.1))[1]
    assert waiting.wall >= 0.1
    assert waiting.processor < 0.05
    working = time_call(lambda: sum(range(2_000_000)))[1]
    assert 0.5 * working.processor <= working.wall


def test_peak_memory_is_at_least_that_of_now_and_never_falls() -> None:
    before = read_peak_memory()
    if before is None:
        pytest.skip("this system does not count peak memory by process")
    held = np.ones(2**22)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    now = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    del held
    after = read_peak_memory()
    assert after is not None
    assert after >= before
    assert after >= now - 1


# -- processes


def test_serve_answers_until_an_error() -> None:
    def open_engine() -> Callable[[int], dict[str, Span]]:
        def run(batch: int) -> dict[str, Span]:
            if batch > 2:
                raise RuntimeError("not enough\n  memory")
            return {"network": Span(batch, 0.5)}

        return run

    answers: list[str] = []
    serve(open_engine, io.StringIO("1\n2\n3\n4\n"), answers.append)
    opened, *rest = map(json.loads, answers)
    assert opened["open_seconds"] >= 0
    assert [row.get("spans") for row in rest] == [{"network": [1, 0.5]}, {"network": [2, 0.5]}, None]
    assert rest[-1] == {"error": "RuntimeError: not enough memory"}


def test_a_sentence_for_the_user_is_answered_without_its_type() -> None:
    answers: list[str] = []

    def refuse() -> Any:
        raise InputError("format onnx needs onnx")

    serve(refuse, [], answers.append)
    assert [json.loads(line) for line in answers] == [{"error": "format onnx needs onnx"}]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "its process was ended by SIGKILL, maybe because memory ran out"),
        ("raise SystemExit('no such instruction')", "its process ended with code 1: no such instruction"),
        ("import os; os._exit(3)", "its process ended with code 3: no message"),
        ("answer = {'error': 'too large'}", "too large"),
    ],
)
def test_a_process_that_fails_says_why(change: str, reason: str) -> None:
    with EngineProcess(program(f"if n > 1: {change}")) as engine:
        first = engine.measure(1)
        assert first is not None
        assert first.spans == {"network": Span(1, 2), "file": Span(2, 3)}
        assert engine.start_seconds == 2.5
        assert engine.measure(2) is None
        assert engine.error == reason
        assert engine.measure(1) is None


def test_rows_of_engines_that_run_that_fail_and_that_are_absent() -> None:
    calls: list[int] = []
    rows = measure_engines(
        [
            Candidate("a", "eager", "fp32", program(), megabytes=2.0, ap=0.5),
            Candidate("a", "bf16", "bf16", program("if n > 1: raise SystemExit('no bf16')")),
            Candidate("a", "onnx", "fp32", reason="format onnx needs onnx: pip install 'fusedet[export]'"),
        ],
        [1, 8],
        3,
        calls.append,
    )
    fine, broken, absent = rows
    assert fine["error"] is None
    assert (fine["start_seconds"], fine["imports_MiB"], fine["megabytes"], fine["ap"]) == (2.5, 100, 2, 0.5)
    assert [part["batch"] for part in fine["batches"]] == [1, 8]
    part = fine["batches"][1]
    assert part["peak_MiB"] == 108
    assert part["network"] == {"p50_ms": 8000, "p95_ms": 8000, "processor_ms": 16000, "images_per_second": 1}
    assert part["file"] == {"p50_ms": 16000, "p95_ms": 16000, "processor_ms": 24000, "images_per_second": 0.5}
    assert [part["batch"] for part in broken["batches"]] == [1], "what was measured before the failure stays"
    assert broken["error"] == "its process ended with code 1: no bf16"
    assert (absent["batches"], absent["start_seconds"]) == ([], None)
    assert absent["error"].endswith("pip install 'fusedet[export]'")
    assert len(calls) == 2 * 2 * 5, "two engines, two numbers of images, two warm-up turns and three measured ones"


def test_the_fastest_engine_of_each_number_of_images() -> None:
    def row(engine: str, *latencies: float) -> dict[str, Any]:
        batches = [{"batch": n, "file": {"p50_ms": p50}} for n, p50 in zip((1, 8), latencies)]
        return {"engine": engine, "model": "a", "precision": "fp32", "batches": batches}

    rows = [row("eager", 30, 90), row("onnx", 10, 99), row("openvino")]
    result = BenchmarkResult(SIZE, 3, {}, rows, {}, Path("x"))
    assert {n: best["engine"] for n, best in result.fastest.items()} == {1: "onnx", 8: "eager"}
    assert result.to_dict()["fastest"][8] == {"model": "a", "engine": "eager", "precision": "fp32"}


# -- engines


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights that has detections."""
    return exporting.save_run(tmp_path_factory.mktemp("benchmarked") / "run", "retinanet")


@pytest.fixture
def task(run: Path, tmp_path: Path) -> Callable[[str], Task]:
    """Return a function of the engine's name to a task on the run and an image of 64 x 96 pixels."""
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(image)
    threads, file = torch.get_num_threads(), str(run / "best.safetensors")
    return lambda engine: Task(engine, file, str(image), SIZE, ("test.max_det=7",), threads)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the engine's predictor last predicted, and the layout of its backbone's input."""
    content: dict[str, Any] = {}
    load = engines.load

    def spy(*arguments: Any, **options: Any) -> Any:
        predictor = load(*arguments, **options)
        predict = predictor.predict
        detector: Any = predictor.detector

        def note(module: Any, inputs: Any) -> None:
            content.setdefault("shapes", []).append(tuple(inputs[0].shape))
            content["layout"] = inputs[0].is_contiguous()
            content["dtype"] = inputs[0].dtype

        detector.backbone.register_forward_pre_hook(note)

        def spied(*images: Any) -> Any:
            content["predictions"] = predict(*images)
            return content["predictions"]

        predictor.predict = spied
        return predictor

    monkeypatch.setattr(engines, "load", spy)
    return content


def test_engines_of_pytorch_differ_in_layout_and_type_only(task: Callable[[str], Task], seen: dict[str, Any]) -> None:
    layouts, boxes = {}, {}
    for name in ("eager", "channels_last", "bf16"):
        spans = open_engine(task(name))(2)
        assert list(spans) == ["network", "file"]
        assert 0 < spans["network"].wall < spans["file"].wall
        layouts[name] = seen["layout"], seen["dtype"]
        assert len(seen["predictions"]) == 2
        boxes[name] = seen["predictions"][1].boxes
        assert len(boxes[name]) == 7, "the task's settings hold"
    assert layouts == {
        "eager": (True, torch.float32),
        "channels_last": (False, torch.float32),
        "bf16": (False, torch.bfloat16),
    }
    torch.testing.assert_close(boxes["eager"], boxes["channels_last"], atol=1e-3, rtol=0)


def test_a_run_with_tiles_is_measured_and_has_no_ap(task: Callable[[str], Task], seen: dict[str, Any]) -> None:
    tiled = ("test.tiles.size=64", "test.tiles.whole=false", "test.tiles.ios=0.5")
    open_engine(replace(task("eager"), settings=tiled))(2)
    assert seen["shapes"] == [(2, 3, *SIZE)], "the network is measured on the whole images, once"
    config = fusedet.resolve_config("retinanet_tiny", ["data.size=[64,96]"])
    assert benchmark_plan._is_as_validated(config, SIZE)
    assert not benchmark_plan._is_as_validated(fusedet.resolve_config(config, tiled), SIZE)


def test_a_machine_without_compiler_gives_a_row(task: Callable[[str], Task], monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda function: compiled)
    answers: list[str] = []
    serve(lambda: open_engine(task("compile")), ["1"], answers.append)
    assert json.loads(answers[-1]) == {"error": "RuntimeError: InvalidCxxCompiler: no working C++ compiler"}


def test_the_command_of_a_task_holds_all_of_it(task: Callable[[str], Task]) -> None:
    command = task("bf16").command
    assert command[:3] == [sys.executable, "-m", "fusedet.api.engines"]
    assert engines.parse_task(command[3]) == task("bf16")


# -- exported models


def describe(**changes: Any) -> Metadata:
    """The description of an exported model of fixed size."""
    known: dict[str, Any] = {
        "fusedet": "0.1.0",
        "name": "a",
        "names": ["x"],
        "category_ids": [1],
        "size": [64, 64],
        "batch": 1,
        "multiple": 32,
        "smallest": 32,
        "resize": Resize(short=64, long=96, antialias=False),
        "thresholds": Thresholds(score=0.1, nms=0.5, max_det=5, pre_nms=10),
        "strides": [8],
        "mask_size": None,
        "precision": "fp32",
        "raw": False,
        "opset": 18,
        "outputs": list(exporters.OUTPUTS[:4]),
        "weights_sha256": None,
        "training_data": None,
        "license": License(code="Apache-2.0", weights=None),
        "versions": {},
        "config": {"data": {"size": [64, 96]}},
    }
    return Metadata(**known | changes)


def write_export(folder: Path, **changes: Any) -> Path:
    """Write an exported directory whose models are a few bytes."""
    folder.mkdir(parents=True)
    files = {"onnx": ["model.onnx"], "openvino": ["model.xml", "model.bin"]}
    for names in files.values():
        for name in names:
            (folder / name).write_bytes(b"x" * 500_000)
    paths = {kind: [folder / name for name in names] for kind, names in files.items()}
    write_description(folder, describe(**changes), paths)
    return folder


def test_an_exported_directory_has_an_engine_per_format(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export", precision="fp32", size=None)
    with plan_engines([folder], engines.ENGINES) as (rows, size):
        assert size == (64, 96), "that of its resize rule"
        assert [(row.engine, row.precision, row.megabytes, row.ap) for row in rows] == [
            ("onnx", "fp32", 0.5, None),
            ("openvino", "fp32", 1.0, None),
        ]
        assert all(Path(json.loads(row.command[3])["path"]).is_file() for row in rows if row.command)
    with plan_engines([folder / "model.xml"], engines.ENGINES, (32, 64)) as (rows, size):
        assert [row.engine for row in rows] == ["openvino"]
        assert size == (32, 64)


def test_a_format_that_the_export_lacks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_export(tmp_path / "export", precision="fp32", size=None)
    assert cli.run(["benchmark", str(folder), "--format", "torch,eager"]) == 2
    assert f"nothing to measure: no format of {folder} is among eager, torch" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.name == "benchmark"]


def test_the_ap_of_an_exported_model_is_its_own_or_that_of_its_run(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "run"
    weights = own / "best.safetensors"
    own.mkdir()
    weights.write_bytes((run / "best.safetensors").read_bytes())
    (own / "metrics.json").write_text('{"AP": 0.5}')
    same = write_export(own / "export", weights_sha256=hash_file(weights))
    other = write_export(own / "other", weights_sha256="0" * 64)
    with plan_engines([own], ["eager"], texts=["test.score=0.5"]) as (rows, _):
        assert [row.ap for row in rows] == [None], "its AP was measured with another threshold"
    with plan_engines([own, same, other], ["eager", "bf16", "onnx"]) as (rows, _):
        known = [(row.engine, row.precision, row.ap) for row in rows]
    assert known == [("eager", "fp32", 0.5), ("bf16", "bf16", None), ("onnx", "fp32", 0.5), ("onnx", "fp32", None)]
    with plan_engines([own, same], ["eager", "onnx"], (32, 32)) as (rows, _):
        assert [row.ap for row in rows] == [None, None], "its AP was measured at another size"
    (same / "val-val").mkdir()
    (same / "val-val" / "metrics.json").write_text('{"AP": 0.25}')
    with plan_engines([same], ["onnx"]) as (rows, _):
        assert [row.ap for row in rows] == [0.25]


def test_validations_on_other_images_are_no_ap_of_an_exported_model(tmp_path: Path) -> None:
    def write(folder: Path, ap: float, data: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps({"AP": ap, "stamp": {"data": data}}))
        times = 1_000 + len(list(tmp_path.rglob("metrics.json")))
        os.utime(folder / "metrics.json", (times, times))

    export = write_export(tmp_path / "run" / "export")
    write(export / "val-val", 0.25, "a")
    write(export / "val-train", 0.9, "b")
    assert benchmark_plan._read_exported_ap(export, "val") == 0.25, "of the run's split"
    write(export / "val-val-2", 0.75, "other")
    assert benchmark_plan._read_exported_ap(export, "annotations/val.json") == 0.75, "the run's data are not known"
    write(tmp_path / "run", 0.5, "a")
    assert benchmark_plan._read_exported_ap(export, "val") == 0.25, "of the run's data"


def test_an_exported_model_that_is_too_small_for_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = exporters.ExportedDetector(lambda images, sizes: {}, describe())
    config = fusedet.resolve_config("retinanet_tiny")
    monkeypatch.setattr(engines, "load_exported", lambda *_: Exported(detector, config, ["x"], [1], tmp_path))
    with pytest.raises(InputError, match="it takes images up to 64x64, not 64x96"):
        open_engine(Task("onnx", "a/model.onnx", "image.jpg", SIZE, (), 1))


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without the packages of ONNX."""
    find = exporters.formats.importlib.util.find_spec
    monkeypatch.setattr(
        exporters.formats.importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name)
    )


@pytest.mark.usefixtures("without_onnx")
def test_what_cannot_be_exported_has_a_row_that_says_why(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def refuse(file: Path, *texts: str, formats: list[str], **options: Any) -> None:
        asked.append(formats)
        raise InputError("model.pt2 differs from PyTorch; nothing was written")

    monkeypatch.setattr(fusedet, "export", refuse, raising=False)
    with plan_engines([run], ["torch", "onnx", "openvino"], SIZE) as (rows, _):
        reasons = {row.engine: row.reason or "" for row in rows}
    assert asked == [["torch"]]
    assert reasons["torch"] == "model.pt2 differs from PyTorch; nothing was written"
    assert reasons["onnx"] == "format onnx needs onnx and onnxscript and onnxruntime: pip install 'fusedet[export]'"
    assert reasons["openvino"].startswith("format openvino needs onnx and onnxscript")


def test_formats_are_exported_together_or_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def export(file: Path, *texts: str, formats: list[str], **options: Any) -> None:
        asked.append(formats)
        if "openvino" in formats:
            raise InputError("it differs")

    monkeypatch.setattr(fusedet, "export", export, raising=False)
    monkeypatch.setattr(benchmark_plan, "check_packages", lambda *_: None)
    results = benchmark_plan._export(Path("x"), ["torch", "openvino"], [], tmp_path, False)
    assert sorted(asked) == [["openvino"], ["torch"], ["torch", "openvino"]]
    assert results == {"torch": tmp_path / "torch", "openvino": "it differs"}


# -- the command


@pytest.mark.usefixtures("without_onnx", "rendered")
@pytest.mark.parametrize("engine", ["a program", pytest.param("PyTorch", marks=pytest.mark.slow)])
def test_a_run_is_measured(
    engine: str, run_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command; a process that imports PyTorch takes most of the time, so a program may stand in for it."""
    if engine == "a program":
        monkeypatch.setattr(Task, "command", property(lambda task: program()))
    arguments = ["benchmark", str(run_copy), "--format", "channels_last,onnx", "--runs", "1", "--batch", "1", "--json"]
    assert cli.run(arguments) == 0
    content = json.loads(capsys.readouterr().out)
    out = run_copy / "benchmark"
    assert content["out"] == str(out)
    assert json.loads((out / "benchmark.json").read_text()) == content
    assert (content["size"], content["runs"]) == ([64, 96], 1)
    assert content["machine"]["threads"] == torch.get_num_threads()
    measured, absent = content["rows"]
    ap = json.loads((run_copy / "metrics.json").read_text())["AP"]
    assert (measured["engine"], measured["precision"], measured["error"], measured["ap"]) == (
        "channels_last",
        "fp32",
        None,
        ap,
    )
    assert measured["megabytes"] == (run_copy / "best.safetensors").stat().st_size / 1e6
    (part,) = measured["batches"]
    assert 0 < part["network"]["p50_ms"] < part["file"]["p50_ms"] <= part["file"]["p95_ms"]
    assert part["network"]["processor_ms"] > 0
    assert part["peak_MiB"] is None or part["peak_MiB"] >= measured["imports_MiB"]
    assert 1000 * measured["start_seconds"] > part["file"]["p50_ms"] / 2
    assert absent["batches"] == []
    assert "pip install" in absent["error"]
    assert content["fastest"]["1"]["engine"] == "channels_last"
    with Image.open(content["files"]["latency against AP"]) as plot:
        assert plot.format == "PNG"
        assert np.asarray(plot.convert("L")).std() > 5, "something is drawn"


def test_the_table_names_threads_and_reasons() -> None:
    rows = measure_engines(
        [
            Candidate("a", "eager", "fp32", program(), megabytes=1.0),
            Candidate("b", "onnx", "fp32", reason="not [here]"),
        ],
        [1],
        2,
    )
    text = str(BenchmarkResult(SIZE, 2, {"threads": 3, "cores": 4}, rows, {}, Path("x")))
    assert "threads: 3 on 4 cores" in text
    assert "onnx (b): not [here]" in text
    assert "fastest with 1 at once: eager fp32 (a)" in text
    assert "2,000.0" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["retinanet_tiny", "--format", "eager,openvin"], "unknown format 'openvin': did you mean 'openvino'?"),
        (
            ["retinanet_tiny", "--size", "800,1200"],
            "size=800,1200 must be height,width in multiples of 32, such as 800",
        ),
        (["retinanet_tiny", "--size", "800"], "size=800 must be height,width in multiples of 32"),
        (["retinanet_tiny", "--batch", "1,x"], "--batch 1,x: write numbers of images, such as 1,8"),
        (["retinanet_tiny", "--batch", "0"], "batch=0 must be 1 or more"),
        (["retinanet_tniy"], "unknown run, checkpoint or config 'retinanet_tniy': did you mean 'retinanet_tiny'?"),
        (["runs/none"], "no checkpoint exists at runs/none"),
        (["retinanet_tiny", "data.size=[64,96]"], "data.size=[64,96] changes nothing for a benchmark"),
        (["retinanet_tiny", "device=cuda"], "device=cuda changes nothing for a benchmark"),
        ([], "name at least one run, checkpoint, config or exported model"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fusedet.api.benchmark.measure_engines", lambda *_: pytest.fail("measured"))
    assert cli.run(["benchmark", *arguments, "test.score=0.1"]) == 2
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "of_run", "of_export"),
    [
        ("test.score=7", "test.score=7 must be 0 to 1", "test.score=7 changes nothing for exported models"),
        ("tset.score=0.1", "unknown config key 'tset", "unknown config key 'tset"),
    ],
)
def test_wrong_settings_are_refused(text: str, of_run: str, of_export: str, run: Path, tmp_path: Path) -> None:
    for source, sentence in ((run, of_run), (write_export(tmp_path / "export"), of_export)):
        with pytest.raises(InputError, match=sentence), plan_engines([source], engines.ENGINES, texts=[text]):
            pytest.fail("planned")


def test_an_existing_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="exists and is not empty"):
        fusedet.benchmark("retinanet_tiny", out=tmp_path)


def test_the_size_must_fit_before_a_run_is_read() -> None:
    with pytest.raises(InputError, match="runs=0 must be 1 or more"):
        fusedet.benchmark("nowhere", runs=0)


@pytest.mark.slow
def test_every_engine_measures_a_run(trained: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'fusedet[export]'")
    run = exporting.save_run(tmp_path / "run", "retinanet", *exporting.ONE_LEVEL)
    result = fusedet.benchmark(run, runs=2, batch=[1, 2], out=tmp_path / "out")
    assert [row["engine"] for row in result.rows] == list(engines.ENGINES)
    assert all(len(row["batches"]) == 2 for row in result.rows if row["engine"] != "compile")
    fixed = fusedet.export(run, formats="onnx", size=(64, 64)).out
    rows = fusedet.benchmark([run, fixed], formats="eager,onnx", runs=1, batch=[1], out=tmp_path / "fixed").rows
    assert [(row["engine"], bool(row["batches"])) for row in rows] == [("eager", True), ("onnx", False)]
    assert rows[1]["error"] == "it takes images up to 64x64, not 64x96"
