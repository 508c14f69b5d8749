"""Exported files: equal to PyTorch or not written, read back only as they were written, and used without fusedet."""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from timm.layers import Conv2dSame, padding
from timm.layers.pool2d_same import MaxPool2dSame
from torchvision.ops import nms

import exporting
import fusedet
from fusedet import cli, exporters
from fusedet.api import quantize
from fusedet.api.exported import Exported
from fusedet.api.quantize import CalibrationData, quantize_format, read_calibration_data
from fusedet.api.validate import open_model
from fusedet.config import parse
from fusedet.data.synthetic import generate_dataset
from fusedet.engine.checkpoint import load_weights, save_weights
from fusedet.errors import InputError, StorageError
from fusedet.exporters import compare_outputs, make_cases, quantization, read_export
from fusedet.exporters.formats import FORMATS, keep_boxes_at_threshold
from fusedet.exporters.graph import constant_padding, example_size, smallest_side
from fusedet.exporters.metadata import Metadata
from fusedet.exporters.verification import Case, Tolerance, compute_similarity
from fusedet.models.ops.boxes import nms_keep_mask
from fusedet.models.ops.exporting import average_pool_to, max_pool_windows, nms_over_images
from fusedet.models.ops.exporting import exporting as export_forms

QUICK = ("onnx,openvino", *exporting.TWO_LEVELS, "model.backbone.name=resnet10t")
"""The export that tests share; with random weights, a smaller backbone in int8 differs by more than they allow."""
DETECTORS = [
    "retinanet",
    "fcos",
    "vfnet",
    "reppoints",
    "faster_rcnn",
    "mask_rcnn",
    "cascade_rcnn",
    "dynamic_rcnn",
    "grid_rcnn",
    "libra_rcnn",
    "ota",
    "dw",
    "borderdet",
]

OTHERS = [
    "atss",
    "autoassign",
    "ddod",
    "double_head_rcnn",
    "foveabox",
    "freeanchor",
    "fsaf",
    "gfl",
    "gflv2",
    "paa",
    "tood",
    "yolof",
]
"""Detectors that `make test-all` exports with one size; benchmarks/export.py exports them with all sizes too."""
EXPORTED = ("retinanet", "fcos", "vfnet", "mask_rcnn")
"""Detectors that `make test` exports: anchors and points, a deformable convolution, two stages with masks."""
LARGE = ("vfnet", "mask_rcnn")
STAGE = "{type: box, channels: 32}"
DOUBLE_HEAD = "{type: double_head, channels: 32, box_channels: 32, blocks: 1}"
MASK = "{type: mask, convs: 1, channels: 8}"
GRID = "{type: grid, convs: 1, point_channels: 4, groups: 9}"
OPTIONS = {
    "foveabox": ["model.head.ranges=[[1,512]]"],
    "faster_rcnn": [f"model.roi.stages=[{STAGE}]"],
    "double_head_rcnn": [f"model.roi.stages=[{DOUBLE_HEAD}]"],
    "mask_rcnn": [f"model.roi.stages=[{STAGE}]", f"model.roi.branches=[{MASK}]", "test.max_det=10"],
    "grid_rcnn": [
        "model.roi.stages=[{type: box, channels: 32, regress: false}]",
        f"model.roi.branches=[{GRID}]",
        "test.max_det=10",
    ],
    "libra_rcnn": [f"model.roi.stages=[{STAGE}]", "model.neck=[fpn,{type: bfp, refine_level: 0}]"],
    "cascade_rcnn": [f"model.roi.stages={[{'type': 'box', 'channels': 32, 'class_agnostic': True}] * 2}"],
    "reppoints": ["model.head.point_channels=32"],
    "fcos": ["test.max_det=5"],
}
"""Fewer operators and weights; of FCOS, fewer detections than there are in every image with any."""


def need(*formats: str) -> None:
    """Skip a test whose packages are absent; in CI they must be there."""
    if os.environ.get("CI") == "true":
        return
    for package in dict.fromkeys(package for name in formats for package in FORMATS[name]):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'fusedet[export]'")


@pytest.fixture(scope="session")
def make_export(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Return a function that exports a detector once for all workers to ONNX and OpenVINO; its run is the parent."""
    base, patch = tmp_path_factory.getbasetemp(), pytest.MonkeyPatch()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    folder.mkdir(exist_ok=True)

    def make(name: str, formats: str = "onnx,openvino", *overrides: str, **options: Any) -> Path:
        need(*formats.split(","))
        key = repr((name, formats, overrides, sorted(options.items())))
        run = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        out = run / "export"
        with FileLock(f"{run}.lock"):
            if not out.exists():  # it appears when all of it is written
                shutil.rmtree(run, ignore_errors=True)
                exporting.save_run(run, name, *overrides, data=scenes)
                if formats != "torch":
                    keep_translations(patch)
                assert fusedet.export(run, formats=formats, trust=True, **options).out == out
        return out

    yield make
    patch.undo()


@functools.cache
def keep_translations(patch: pytest.MonkeyPatch) -> None:
    """Let torch parse onnxscript's translations of operators once, not in every export: a tenth of its time."""
    from torch.onnx._internal.exporter import _registration

    scripts = _registration.onnxscript_apis
    patch.setattr(scripts, "get_torchlib_ops", functools.cache(scripts.get_torchlib_ops))


@pytest.fixture
def exported(make_export: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of an export, to be changed."""
    return Path(shutil.copytree(make_export("retinanet", *QUICK, size=(64, 96)), tmp_path / "copied"))


# -- forms of operations


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 4), (13, 17)])
def test_pooling_forms_are_adaptive_pooling(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 13, 17)
    torch.testing.assert_close(average_pool_to(x, size), torch.nn.functional.adaptive_avg_pool2d(x, size))
    assert torch.equal(max_pool_windows(x, size), torch.nn.functional.adaptive_max_pool2d(x, size))


def test_nms_forms_are_nms_of_each_image() -> None:
    corners = torch.rand(3, 40, 2) * 80
    boxes, scores = torch.cat([corners, corners + 5 + 40 * torch.rand(3, 40, 2)], dim=2), torch.rand(3, 40)
    scores[0, :7], scores[2] = -1, -1
    expected = torch.zeros(3, 40, dtype=torch.bool)
    for i in range(3):
        real = (scores[i] >= 0).nonzero().squeeze(1)
        expected[i, real[nms(boxes[i, real], scores[i, real], 0.4)]] = True
    assert torch.equal(torch.ops.fusedet.nms_keep_mask(boxes, scores, 0.4), expected)
    assert torch.equal(nms_over_images(boxes, scores, 0.4), expected)
    assert torch.equal(nms_keep_mask(boxes, scores, 0.4) & (scores >= 0), expected)
    with export_forms():
        assert torch.equal(nms_keep_mask(boxes, scores, 0.4), expected)


def test_openvino_keeps_boxes_at_the_threshold_of_nms() -> None:
    """Of the second box, half of the first, the IoU is 1 / 2; of the third it is larger."""
    need("openvino")
    import openvino
    from openvino import opset13 as ops

    boxes = np.array([[[0, 0, 2, 2], [0, 0, 2, 1], [0, 0, 2, 1.75]]], np.float32)
    scores, limits = np.array([[[0.9, 0.8, 0.7]]], np.float32), [np.int64(3), np.float32(0.5), np.float32(0)]
    inputs = ops.parameter(boxes.shape, np.float32), ops.parameter(scores.shape, np.float32)
    model = openvino.Model([ops.non_max_suppression(*inputs, *map(ops.constant, limits)).output(0)], list(inputs))
    keep_boxes_at_threshold(model)
    assert openvino.Core().compile_model(model, "CPU")((boxes, scores))[0].tolist() == [[0, 0, 0], [0, 0, 1]]
    expected = nms(torch.from_numpy(boxes[0]), torch.from_numpy(scores[0, 0]), 0.5)
    assert expected.tolist() == [0, 1]


def test_constant_padding_is_that_of_timm() -> None:
    convolution, pool = Conv2dSame(3, 4, 5, stride=2), MaxPool2dSame(3, stride=2)
    x = torch.randn(1, 3, 32, 96)
    with torch.no_grad():
        expected = convolution(x), pool(x)
        with constant_padding():
            torch.testing.assert_close((convolution(x), pool(x)), expected)
            assert padding.get_same_padding(31, 3, 2, 1) == 1, "for 31 it would be 2"
    assert padding.get_same_padding(31, 3, 2, 1) == 2


def test_detectors_without_a_pyramid_are_traced_at_multiples_of_32() -> None:
    """C4 has a stride of 16."""
    with torch.device("meta"):
        detector = fusedet.create_model("faster_rcnn_r18_c4", "model.backbone.pretrained=false")
    assert (detector.neck.levels.strides, example_size(detector)) == ((16,), (96, 128))


class Halves(torch.nn.Module):
    """A program of its inputs that branches on their number of columns."""

    def forward(self, images: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (images[..., : images.shape[3] // 2] if images.shape[3] >= 128 else images, sizes)


def export_halves(sides: dict[int, Any]) -> torch.export.ExportedProgram:
    inputs = torch.zeros(2, 3, 160, 192, dtype=torch.uint8), torch.zeros(2, 2)
    return torch.export.export(Halves(), inputs, dynamic_shapes={"images": sides, "sizes": {}})


def test_the_smallest_side_is_that_of_the_traced_branch() -> None:
    rows, columns = (32 * torch.export.Dim(name) for name in ("rows", "columns"))
    assert smallest_side(export_halves({2: rows, 3: columns})) == 128
    assert smallest_side(export_halves({})) == 32


# -- equal or not written


SAME_FILES = {"dynamic_rcnn": "faster_rcnn"}
"""Detectors that only their training tells from another one."""


def list_exports() -> list[Any]:
    """Name and formats of each export; VFNet and Mask R-CNN have so many operators that OpenVINO is slow too."""
    slow = [name for name in [*DETECTORS, *OTHERS] if name not in (*EXPORTED, *SAME_FILES)]
    return [
        *((name, "onnx" if name in LARGE else "onnx,openvino") for name in EXPORTED),
        *(pytest.param(name, "onnx,openvino", marks=pytest.mark.slow) for name in [*LARGE, *slow]),
    ]


@pytest.mark.parametrize(("name", "formats"), list_exports())
def test_every_detector_exports(name: str, formats: str, make_export: Callable[..., Path]) -> None:
    """As few operators as the detector has: converting them to ONNX takes most of the time."""
    parts = QUICK[1:] if name == "retinanet" else exporting.PATCHES  # the former is used further below
    folder = make_export(name, formats, *parts, *OPTIONS.get(name, []), size=(64, 96))
    check_export(folder, keeps_empty_boxes=name in ("foveabox", "tood"))
    if name == "fcos":
        report = json.loads((folder / "report.json").read_text())
        cases = [case for row in report["formats"].values() for case in row["cases"] if case["detections"]]
        assert [case["case"] for case in cases if not case["reached_limit"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME_FILES)
def test_detectors_of_one_program_export_alike(name: str, tmp_path: Path) -> None:
    """The same operators in the same order: only names of weights and thresholds differ."""
    programs = []
    for kind in (name, SAME_FILES[name]):
        run = exporting.save_run(tmp_path / kind, kind, *exporting.PATCHES)
        program, *_ = exporters.trace(fusedet.load(run, trust=True).detector, exporters.Shapes((64, 96), 1))
        graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
        programs.append([str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"])
    assert "torchvision.roi_align.default" in programs[0]
    assert programs[0] == programs[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", exporting.choose(("retinanet", "faster_rcnn"), DETECTORS))
def test_every_detector_exports_at_all_levels(name: str, make_export: Callable[..., Path]) -> None:
    check_export(make_export(name, size=(64, 96)))


DYNAMIC = ("retinanet", "faster_rcnn", "mask_rcnn")
"""Exported with dynamic sizes by make test-all; the others by make soak, half a minute or more each."""


@pytest.mark.slow
@pytest.mark.parametrize("name", exporting.choose(DYNAMIC, [name for name in DETECTORS if name not in SAME_FILES]))
def test_dynamic_export_equals_pytorch(name: str, make_export: Callable[..., Path]) -> None:
    formats = "torch,onnx,openvino" if name in ("retinanet", "faster_rcnn") else "onnx,openvino"
    check_export(make_export(name, formats, *exporting.TWO_LEVELS, *OPTIONS.get(name, [])))


MODULES = {
    "all modules": (
        "retinanet",
        "model.plugin=msfm",
        "model.neck=[mse_fpn,smsl]",
        "model.interact=msil",
        "model.backbone={name: resnet18, pretrained: false}",
    ),
    "modules of two stages": ("faster_rcnn", "model.neck=[mse_fpn,smsl]", "model.backbone.name=resnet10t"),
    "deformable stages": (
        "retinanet",
        "model.backbone={name: test_resnet, pretrained: false, deformable_stages: [2, 3, 4], modulated: true}",
        *exporting.TWO_LEVELS,
    ),
    "AugFPN": ("retinanet", "model.neck=aug_fpn", "model.backbone.name=resnet10t"),
    "BFP": ("faster_rcnn", "model.neck=[fpn,bfp]", "model.backbone.name=resnet10t"),
    "BiFPN": ("retinanet", "model.neck=bifpn", "model.backbone.name=resnet10t"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", exporting.choose(("deformable stages",), MODULES))
def test_modules_export_with_dynamic_sizes(case: str, make_export: Callable[..., Path]) -> None:
    name, *overrides = MODULES[case]
    formats = "torch,onnx,openvino" if case in ("all modules", "AugFPN") else "onnx,openvino"
    check_export(make_export(name, formats, *overrides))


def check_export(folder: Path, keeps_empty_boxes: bool = False) -> None:
    """The report is whole, and nothing is detected in an image without an area, where boxes have none either."""
    report = json.loads((folder / "report.json").read_text())
    for row in report["formats"].values():
        assert len(row["cases"]) == 8
        detections, undecided = (sum(case[key] for case in row["cases"]) for key in ("detections", "undecided"))
        assert detections > 20
        assert undecided <= max(2, 0.02 * detections)
        assert max(case["box"] for case in row["cases"]) < 0.05
        (none,) = [case for case in row["cases"] if case["case"] == "no detection"]
        assert none["detections"] == 0 or keeps_empty_boxes
    assert set(report["formats"]) == set(read_export(folder)[1])


def detections(**changes: Any) -> dict[str, np.ndarray]:
    boxes = np.array([[[0, 0, 10, 10], [20, 20, 40, 40]]], np.float32)
    scores, labels, counts = np.array([[0.9, 0.5]], np.float32), np.array([[0, 1]]), np.array([2])
    return {"boxes": boxes, "scores": scores, "labels": labels, "counts": counts} | changes


def test_differences_are_refused() -> None:
    case, tolerance, expected = Case("noise", np.zeros((1, 3, 32, 32)), np.zeros((1, 2))), Tolerance(), detections()
    swapped = {name: value[:, ::-1].copy() if value.ndim > 1 else value for name, value in expected.items()}
    assert compare_outputs(case, expected, swapped, tolerance, "a.onnx").box == 0, "the order does not count"
    moved = expected["boxes"] + np.float32(0.04)
    assert compare_outputs(case, expected, detections(boxes=moved), tolerance, "f").box == pytest.approx(0.04, abs=1e-5)
    wrong = {
        "boxes": expected["boxes"] + np.float32([0, 0, 0, 1]),
        "scores": np.array([[0.9, 0.498]], np.float32),
        "labels": np.array([[0, 2]]),
        "counts": np.array([1]),
    }
    for name, value in wrong.items():
        with pytest.raises(InputError, match=r"a.onnx differs from PyTorch in 'noise', image 0: .*has no partner"):
            compare_outputs(case, expected, detections(**{name: value}), tolerance, "a.onnx")
    with pytest.raises(InputError, match="by one too many"):
        compare_outputs(case, detections(counts=np.array([1])), expected, tolerance, "a.onnx")


def test_what_rounding_decides_is_counted() -> None:
    """PyTorch itself loses the second detection in one of two runs with noise."""
    case, expected, fewer = Case("noise", np.zeros((1, 3, 32, 32)), np.zeros((1, 2))), detections(), detections()
    fewer["counts"] = np.array([1])
    result = compare_outputs(case, expected, fewer, Tolerance(), "f", lambda: [expected, fewer])
    assert result.undecided == 1
    with pytest.raises(InputError, match="has no partner"):
        compare_outputs(case, expected, fewer, Tolerance(), "f", lambda: [expected, expected])


@pytest.fixture(scope="module")
def small_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one level with random weights. Not to be changed."""
    return exporting.save_run(tmp_path_factory.mktemp("small") / "run", "retinanet", *exporting.ONE_LEVEL, data=scenes)


def test_nothing_is_written_where_a_file_differs(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is one whose boxes are all a pixel off."""
    detector = fusedet.load(small_run).detector

    def session(images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = detector.detect(torch.from_numpy(images), torch.from_numpy(sizes))
        return dict(zip(("boxes", "scores", "labels", "counts"), (x.numpy() for x in outputs[:4]))) | {
            "boxes": outputs.boxes.numpy() + 1
        }

    def write(name: str, program: Any, outputs: Any, folder: Path, metadata: Any) -> list[Path]:
        (folder / "model.pt2").write_bytes(b"written")
        return [folder / "model.pt2"]

    monkeypatch.setattr(exporters, "trace", lambda *_: (None, ("boxes", "scores", "labels", "counts"), 32))
    monkeypatch.setattr(exporters, "write_format", write)
    monkeypatch.setattr(exporters, "open_session", lambda *_: session)
    with pytest.raises(InputError, match=r"model.pt2 differs from PyTorch in .*nothing was written"):
        fusedet.export(small_run, formats="torch", size=(64, 96), out=tmp_path / "out" / "a")
    assert not list((tmp_path / "out").iterdir())


def test_the_conversion_to_openvino_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter by itself sends events where the user consents."""
    need("onnx", "openvino")
    telemetry = pytest.importorskip("openvino_telemetry")
    import onnx
    import openvino
    from onnx import TensorProto, helper

    sent: list[Any] = []
    monkeypatch.setattr("openvino_telemetry.utils.sender.TelemetrySender.send", lambda *message: sent.append(message))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "model.onnx")
    openvino.convert_model(tmp_path / "model.onnx")
    monkeypatch.setattr(telemetry.Telemetry(), "consent", True)
    openvino.convert_model(tmp_path / "model.onnx")
    assert sent
    sent.clear()
    metadata: Any = SimpleNamespace(precision="fp32", to_json=lambda: "{}")
    files = exporters.write_format("openvino", None, (), tmp_path, metadata)
    assert [file.name for file in files] == ["model.xml", "model.bin"]
    assert sent == []


def test_cases() -> None:
    cases = {case.name: case for case in make_cases(64, 96)}
    assert len(cases) == 8
    assert {case.images.shape[1] for case in cases.values()} == {3}
    assert all(side % 32 == 0 for case in cases.values() for side in case.images.shape[2:])
    assert len({case.images.shape[2:] for case in cases.values()}) >= 3
    assert len(cases["batch of three"].images) == 3
    assert not cases["black"].images.any()
    assert not cases["no detection"].sizes.any()
    for case in make_cases(64, 96, canvas=(64, 64), batch=2):
        assert case.images.shape == (2, 3, 64, 64)
        assert (case.sizes <= 64).all()


# -- number formats


def test_similarity_of_detections() -> None:
    expected = detections()
    assert compute_similarity(expected, expected) == pytest.approx(1)
    assert compute_similarity(expected, detections(counts=np.array([0]))) == 0
    assert compute_similarity(detections(counts=np.array([0])), expected) == 1
    # the first box has an IoU of 1 / 3, the second half of its score: (0.9 / 3 + 0.5 / 2) / 1.4
    changed = detections(scores=np.array([[0.9, 0.25]], np.float32))
    changed["boxes"] = expected["boxes"] + np.float32([[[5, 0, 5, 0], [0, 0, 0, 0]]])
    assert compute_similarity(expected, changed) == pytest.approx((0.9 / 3 + 0.25) / 1.4)
    relabeled = detections(labels=np.array([[0, 0]]))
    assert compute_similarity(expected, relabeled) == pytest.approx(0.9 / 1.4)


@pytest.fixture
def calibration(make_export: Callable[..., Path]) -> tuple[Path, Metadata, CalibrationData]:
    """An fp32 ONNX file, the description of its int8 form, and data."""
    need("onnx", "openvino")
    pytest.importorskip("nncf", reason="needs nncf: pip install 'fusedet[export]'")
    folder = make_export("retinanet", *QUICK, size=(64, 96))
    metadata = read_export(folder)[0].model_copy(update={"precision": "int8"})
    data = read_calibration_data(parse(metadata.config), metadata.names, "run", 6, 1.0, None)
    session = exporters.open_session("onnx", folder / "model.onnx", read_export(folder)[0])
    data.evaluate_fp32(session, metadata)
    return folder / "model.onnx", metadata, data


INT8 = ["onnx", pytest.param("openvino", marks=pytest.mark.slow)]
"""NNCF takes ten seconds and more."""


@pytest.mark.parametrize("format_", INT8)
def test_int8_detects_as_fp32(
    format_: str, calibration: tuple[Path, Metadata, CalibrationData], tmp_path: Path
) -> None:
    """Detections of random weights are alike, less in OpenVINO with sums in int8; box decoding stays in fp32."""
    source, metadata, data = calibration
    files, row = quantize_format(format_, source, tmp_path, metadata, data)
    assert row["floating_point"] == []
    assert set(row["price"]) == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    plain, int8 = (
        exporters.open_session("onnx", source, read_export(source.parent)[0]),
        exporters.open_session(format_, files[0], metadata),
    )
    cases = make_cases(64, 96, (64, 96), 1)
    alike = [compute_similarity(plain(case.images, case.sizes), int8(case.images, case.sizes)) for case in cases]
    assert min(alike) > {"onnx": 0.75, "openvino": 0.65}[format_]
    assert min(alike) < 1, "something was quantized"
    if format_ == "onnx":
        import onnx

        nodes = onnx.load(files[0]).graph.node
        quantized = {tensor for node in nodes if node.op_type == "DequantizeLinear" for tensor in node.output}
        users = {node.op_type for node in nodes if quantized & set(node.input)}
        assert "Conv" in users
        fp32 = quantization.find_regression(onnx.load(source))
        assert len(fp32) == 2, "one per level"
        assert {node.name for node in nodes if node.op_type == "Conv" and node.input[1] not in quantized} == set(fp32)
        assert not users & {"Exp", "Sub", "Concat", "NonMaxSuppression", "TopK", "Sigmoid"}
    else:
        import openvino

        model = openvino.Core().read_model(files[0])
        fake = [node for node in model.get_ops() if node.get_type_name() == "FakeQuantize"]
        users = [use.get_node() for node in fake for use in node.output(0).get_target_inputs()]
        kinds = {node.get_type_name() for node in users}
        assert "Convolution" in kinds
        assert kinds & set(quantization.FLOATING_POINT) <= {"Add"}
        sums = quantization.find_map_operations(openvino.convert_model(source))
        assert {node.get_friendly_name() for node in users if node.get_type_name() == "Add"} <= set(sums)


def test_sums_of_maps_are_those_that_convolutions_read() -> None:
    """A residual sum, a sum of a pyramid, and what is none of them: a bias, and the moves of boxes."""
    need("openvino")
    import openvino
    from openvino import opset13 as ops

    def convolve(x: Any) -> Any:
        weight = ops.constant(np.ones((4, 4, 1, 1), np.float32))
        return ops.convolution(x, weight, [1, 1], [0, 0], [0, 0], [1, 1])

    x = ops.parameter([1, 4, 8, 8], np.float32)
    bias = ops.add(convolve(x), np.ones((1, 4, 1, 1), np.float32), name="bias")
    residual = ops.add(ops.relu(bias), x, name="residual")
    deeper = convolve(ops.relu(residual))
    pyramid = ops.add(deeper, convolve(residual), name="pyramid")
    moves = convolve(ops.relu(pyramid))
    boxes = ops.add(moves, x, name="boxes")
    model = openvino.Model([boxes], [x])
    assert sorted(quantization.find_map_operations(model)) == ["pyramid", "residual"]
    layers = [node.get_friendly_name() for node in model.get_ops() if node.get_type_name() == "Convolution"]
    assert quantization.find_map_operations(model, layers) == []


class PricedData(CalibrationData):
    """Data on which int8 loses 0.03 AP, and 0.01 less with every convolution in floating point."""

    def inputs(self, metadata: Metadata) -> Any:
        return ()

    def evaluate(self, session: Any, metadata: Metadata) -> tuple[list[Any], float]:
        return [], 0.5 - 0.03 + 0.01 * len(session)


@pytest.mark.parametrize(("max_drop", "kept"), [(0.031, 0), (0.025, 1), (0.015, 2), (0.0, 4)])
def test_sensitive_convolutions_go_back_until_ap_is_kept(
    max_drop: float, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten convolutions 1, 2 and 4 stay in floating point, no more than AP needs."""
    made: list[list[str]] = []

    def quantize_file(*arguments: Any) -> list[Path]:
        made.append(arguments[-1])
        return [tmp_path / "model.onnx"]

    ranking = [[f"conv {i}"] for i in range(10)]
    monkeypatch.setattr(quantize, "_rank", lambda *_: ranking)
    monkeypatch.setattr(quantize, "_quantize", quantize_file)
    monkeypatch.setattr(quantize, "open_session", lambda *_: made[-1])
    monkeypatch.setattr(quantize.evaluation, "paired_bootstrap", lambda *_: dict.fromkeys(quantize.METRICS))
    data, anything = PricedData(*[None] * 3, max_drop=max_drop, ap=0.5), Any  # type: ignore[arg-type]
    files, row = quantize_format("onnx", tmp_path, tmp_path, anything, data)  # type: ignore[arg-type]
    assert files == [tmp_path / "model.onnx"]
    assert row["floating_point"] == [f"conv {i}" for i in range(kept)]
    assert made == [[f"conv {i}" for i in range(count)] for count in (0, 1, 2, 4) if count <= kept]


@pytest.mark.slow
def test_int8_that_loses_too_much_is_refused(
    calibration: tuple[Path, Metadata, CalibrationData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, metadata, data = calibration
    monkeypatch.setattr(quantize, "SHARES", (0.0, 0.4))
    data.ap, data.max_drop = 0.9, 0.01
    with pytest.raises(InputError, match=r"model.onnx in int8 loses 0.\d+ AP of 0.9000 .* max_drop=0.01, even with"):
        quantize_format("onnx", source, tmp_path, metadata, data)
    assert data.ranking is not None
    import onnx

    names = {node.name for node in onnx.load(source).graph.node if node.op_type == "Conv"}
    assert sorted(name for group in data.ranking for name in group) == sorted(names)


@pytest.mark.parametrize("format_", INT8)
def test_convolutions_in_floating_point_are_restored(
    format_: str, calibration: tuple[Path, Metadata, CalibrationData], tmp_path: Path
) -> None:
    """With all convolutions excluded, the quantizer returns the fp32 detections."""
    import onnx

    source, metadata, data = calibration
    names = [node.name for node in onnx.load(source).graph.node if node.op_type == "Conv"]
    case = make_cases(64, 96, (64, 96), 1)[0]
    plain = exporters.open_session("onnx", source, read_export(source.parent)[0])(case.images, case.sizes)
    files = quantize._quantize(format_, source, tmp_path, metadata, data.inputs(metadata), names)
    outputs = exporters.open_session(format_, files[0], metadata)(case.images, case.sizes)
    assert compute_similarity(plain, outputs) > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_half_precision_keeps_its_tolerance(name: str, make_export: Callable[..., Path]) -> None:
    folders = [
        make_export(name, "onnx,openvino", *exporting.ONE_LEVEL, size=(64, 96), precision=precision)
        for precision in ("fp16", "fp32")
    ]
    report, plain = (json.loads((folder / "report.json").read_text()) for folder in folders)
    for format_, row in report["formats"].items():
        assert row["megabytes"] < 0.6 * plain["formats"][format_]["megabytes"] + 0.2
        assert max(case["score"] for case in row["cases"]) <= report["tolerance"]["score"]


@pytest.mark.slow
def test_bf16_is_a_hint_of_openvino(make_export: Callable[..., Path]) -> None:
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU does not compute in bf16")
    folder = make_export("retinanet", "openvino", *QUICK[1:], precision="bf16")
    report = json.loads((folder / "report.json").read_text())
    assert max(case["score"] for case in report["formats"]["openvino"]["cases"]) > 1e-5, "bf16 rounds"


@pytest.mark.slow
def test_compiled_package(make_export: Callable[..., Path], scenes: Path) -> None:
    folder = make_export("retinanet", "torch", *QUICK[1:], size=(64, 96), aot=True)
    assert {path.name for path in read_export(folder)[1]["aot"]} == {"model.aot.pt2"}
    image = next((scenes / "val").glob("*.jpg"))
    ours, theirs = (fusedet.load(folder / name, trust=True).predict(image) for name in ("model.pt2", "model.aot.pt2"))
    torch.testing.assert_close(theirs.scores, ours.scores, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_int8_command(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = exporting.save_run(tmp_path / "run", "faster_rcnn", *QUICK[1:])
    arguments = [
        "export",
        str(run),
        "--format",
        "onnx,openvino",
        "--precision",
        "int8",
        "--calibrate",
        f"data={scenes}",
    ]
    assert cli.run([*arguments, "--calibration-images", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["calibration"]["images"] == 4
    for row in report["formats"].values():
        assert row["price"]["AP"]["a"] == pytest.approx(report["calibration"]["AP"])
        assert row["price"]["AP"]["a"] - row["price"]["AP"]["b"] <= 0.01
    assert fusedet.validate(report["out"]).metrics["AP"] == pytest.approx(
        report["formats"]["openvino"]["price"]["AP"]["b"], abs=1e-6
    )


# -- use of exported files


def test_metadata(make_export: Callable[..., Path]) -> None:
    folder = make_export("retinanet", *QUICK, size=(64, 96))
    metadata, files = read_export(folder)
    assert {name: [path.name for path in paths] for name, paths in files.items()} == {
        "onnx": ["model.onnx"],
        "openvino": ["model.xml", "model.bin"],
    }
    assert metadata.names == exporting.NAMES
    assert (metadata.size, metadata.batch, metadata.strides) == ([64, 96], 1, [16, 32])
    assert metadata.outputs == ["boxes", "scores", "labels", "counts"]
    assert metadata.thresholds.max_det == 100
    assert metadata.training_data == "data"
    assert len(metadata.weights_sha256 or "") == 64
    import onnx

    inside = onnx.load(folder / "model.onnx").metadata_props[0]
    assert inside.key == "fusedet"
    assert json.loads(inside.value) == json.loads(metadata.to_json())


@pytest.mark.parametrize("file", ["model.onnx", "model.xml"])
def test_predictions_are_those_of_the_run(file: str, make_export: Callable[..., Path], scenes: Path) -> None:
    folder = make_export("retinanet", *QUICK, size=(64, 96))
    images = [path for path in sorted((scenes / "val").glob("*.jpg")) if landscape(path)][:3]  # padded as in the run
    ours, theirs = (fusedet.load(source).predict(images, batch=2) for source in (folder.parent, folder / file))
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b)
        assert b.names == a.names
        assert b.category_ids == a.category_ids
        torch.testing.assert_close(b.scores, a.scores, atol=1e-4, rtol=0)


def landscape(path: Path) -> bool:
    """Whether an image of short side 64 is padded to 64x96."""
    width, height = Image.open(path).size
    return height <= width


BLOCK = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "fusedet", "timm"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("format_", ["onnx", "openvino"])
def test_example_needs_neither_torch_nor_fusedet(format_: str, exported: Path, scenes: Path) -> None:
    """The image is stored as a camera that was held upright stores it."""
    assert len((exported / "example.py").read_text().splitlines()) <= 40
    upright = Image.open(min(path for path in (scenes / "val").glob("*.jpg") if landscape(path)))
    orientation, image = Image.Exif(), exported / "image.png"
    orientation[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(image, exif=orientation)
    ours = fusedet.load(exported).predict(image)
    if format_ == "openvino":
        (exported / "model.onnx").unlink()
    command = [sys.executable, "-c", BLOCK, str(exported / "example.py"), str(image), "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows
    assert {row[0] for row in rows} <= set(exporting.NAMES)
    assert all(float(row[1]) >= 0.01 and len(row) == 6 for row in rows)
    assert len(rows) == pytest.approx(int((ours.scores >= 0.01).sum()), abs=2), "Pillow rounds pixels differently"
    assert float(rows[0][1]) == pytest.approx(float(ours.scores[0]), abs=0.01)


# -- bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": (60, 96)}, r"size=60,96 must be height,width in multiples of 32, such as 64,96"),
        ({"size": (64,)}, r"size=64 must be height,width in multiples of 32, such as 800,1344"),
        ({"size": (64, 96), "dynamic": True}, "size=64,96 is a fixed size"),
        ({"formats": "onxx"}, "unknown format 'onxx': did you mean 'onnx'"),
        ({"formats": "torch", "batch": 0}, "batch=0 must be at least 1"),
        ({"formats": "torch", "opset": 12}, "opset=12 must be 18 to 23"),
        ({"formats": "torch", "precision": "int3"}, "unknown precision 'int3'"),
        ({"precision": "fp16"}, "precision=fp16 does not exist for the format torch: it is for onnx and openvino"),
        ({"formats": "openvino", "precision": "int8"}, "int8 needs images to calibrate on: add --calibrate data=PATH"),
        ({"formats": "openvino", "calibrate": True}, "--calibrate is for --precision int8, not for fp32"),
        ({"formats": "openvino", "max_drop": 0.01}, "--max-drop is for --precision int8, not for fp32"),
        (
            {"formats": "onnx", "precision": "bf16"},
            "ONNX Runtime does not compute in bf16 on a CPU; it is for openvino",
        ),
        ({"formats": "onnx", "aot": True}, "--aot compiles the format torch: add --format torch"),
        ({"formats": "onnx", "precision": "int8", "calibrate": True, "raw": True}, "leave out --raw or int8"),
        ({"formats": "onnx", "precision": "int8", "calibrate": True, "max_drop": 2.0}, "max_drop=2 must be 0 to 1"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str, trained: Path) -> None:
    need("onnx", "openvino")
    with pytest.raises(InputError, match=sentence):
        fusedet.export(trained, **({"formats": "torch"} | options))


def test_a_misspelt_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="unknown run, checkpoint or config 'retinanet_tinny': did you mean 'retinanet_tiny'"
    ):
        fusedet.export("retinanet_tinny", out=tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_run_of_another_version_is_named(tmp_path: Path) -> None:
    file = exporting.save_run(tmp_path / "run", "retinanet", *exporting.PATCHES) / "best.safetensors"
    state, meta = load_weights(file)
    for old, new, sentence in (
        ("convs: 1", "depth: 1", r"unknown option 'depth' of model.head 'retina'"),
        ("pre_nms:", "before_nms:", "unknown config key 'test.before_nms'"),
    ):
        save_weights(file, state, meta | {"config": meta["config"].replace(old, new)})
        with pytest.raises(InputError, match=rf"best.safetensors does not fit this version of fusedet.*{sentence}"):
            fusedet.export(file.parent, formats="torch", trust=True)


def test_a_file_is_no_output_directory(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("keep me")
    with pytest.raises(InputError, match=r"file is a file: choose another directory"):
        fusedet.export(trained, formats="torch", out=file)
    assert file.read_text() == "keep me"


@pytest.mark.parametrize("out", [".", "../link", "../empty", "../new/a"])
def test_an_empty_directory_is_filled(
    out: str, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current directory and a link cannot be replaced."""

    def write(*arguments: Any) -> dict[str, Any]:
        for name in ("model.json", "model.pt2"):
            (arguments[5] / name).write_text("written")
        return {}

    monkeypatch.setattr("fusedet.api.export.write_files", write)
    monkeypatch.setattr(exporters, "trace", lambda *_: (None, ("boxes", "scores", "labels", "counts"), 32))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    assert fusedet.export(small_run, formats="torch", out=out).out == Path(out)
    assert sorted(path.name for path in Path(out).iterdir()) == ["model.json", "model.pt2"]
    assert (tmp_path / "link").is_symlink()


def test_a_missing_compiler_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"--aot needs a C\+\+ compiler, but g\+\+, clang\+\+, c\+\+ are not on PATH"):
        fusedet.export(trained, formats="torch", aot=True)


def test_a_cpu_without_bf16_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("openvino")
    import openvino

    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(InputError, match="precision=bf16: this CPU does not compute in bf16"):
        fusedet.export(trained, formats="openvino", precision="bf16")


def test_int8_needs_the_classes_of_the_model(trained: Path, tmp_path: Path) -> None:
    need("onnx")
    other = generate_dataset(tmp_path / "data", images=4, seed=0, size=(64, 96), splits={"train": 0.5, "val": 0.5})
    for file in other.rglob("*.json"):
        file.write_text(file.read_text().replace(exporting.NAMES[0], "other"))
    with pytest.raises(InputError, match="use data with the same class names"):
        fusedet.export(trained, formats="onnx", precision="int8", calibrate=True, data=str(other))


def test_a_missing_package_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "onnx", ("onnx_that_is_absent",))
    with pytest.raises(InputError, match=r"needs onnx_that_is_absent: pip install 'fusedet\[export\]'"):
        fusedet.export(trained)


def test_int8_names_a_missing_quantizer(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("openvino")
    monkeypatch.setitem(quantization.PACKAGES, "openvino", ("nncf_that_is_absent",))
    with pytest.raises(
        InputError, match=r"openvino in int8 needs nncf_that_is_absent: pip install 'fusedet\[export\]'"
    ):
        fusedet.export(trained, formats="openvino", precision="int8", calibrate=True)


def test_settings_of_the_training_are_refused(trained: Path) -> None:
    with pytest.raises(InputError, match=r"train.epochs=3 changes nothing for a trained model"):
        fusedet.export(trained, "train.epochs=3", formats="torch")


def edit(folder: Path, key: str, value: Any) -> None:
    content = json.loads((folder / "model.json").read_text())
    content["model"][key] = value
    (folder / "model.json").write_text(json.dumps(content))


def test_tampered_files_are_refused(exported: Path, tmp_path: Path) -> None:
    def fails(sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            fusedet.load(exported)

    whole = (exported / "model.json").read_text()
    for key, value, sentence in (
        ("names", exporting.NAMES[::-1], r"describe different models"),
        ("names", 3, r"model.json: names is not as exported"),
        ("extra", 3, r"model.json: extra is not as exported"),
        ("version", 2, r"has version 2, but this fusedet reads version 1"),
    ):
        edit(exported, key, value)
        fails(sentence)
        (exported / "model.json").write_text(whole)
    (exported / "model.json").write_text(whole[:-30])
    fails("model.json is damaged")
    (exported / "model.json").write_text(whole)
    file = exported / "model.bin"
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    fails("model.bin was changed after the export")
    file.unlink()
    fails("model.bin is missing")
    with pytest.raises(InputError, match="is exported already"):
        fusedet.export(exported)


def test_settings_inside_the_file_are_refused(make_export: Callable[..., Path]) -> None:
    folder = make_export("retinanet", *QUICK, size=(64, 96))
    for arguments in (("test.score=0.5",), ("data.size=[64,64]",)):
        with pytest.raises(InputError, match="changes nothing for an exported model"):
            fusedet.load(folder, *arguments)
    with pytest.raises(InputError, match="an exported model runs on the CPU"):
        fusedet.load(folder, device="cuda")


@pytest.mark.parametrize(
    ("text", "own"), [("data.size=[64, 64]", "[64, 96]"), ("data.antialias=false", "true"), ("data.channels=4", "3")]
)
def test_the_resize_rule_inside_the_file_is_kept(text: str, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = fusedet.resolve_config("retinanet_tiny", ["data.size=[64,96]", "data.path=own"])
    model = Exported(SimpleNamespace(), config, ["x"], [1], Path("model.onnx"))
    monkeypatch.setattr("fusedet.api.exported.load_exported", lambda *_: model)
    kept = ["data.size=[64,96]", "data.path=other", "data.val=test", "data.range=[0,1000]", "test.tiles.size=128"]
    assert open_model("export", kept, trust=False).options.data.path == "other"
    with pytest.raises(
        InputError, match=re.escape(f"{text} cannot be set for an exported model, whose file has {own}")
    ):
        open_model("export", [text], trust=False)


def test_a_failure_of_the_exporter_is_one_sentence(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("operator x is unknown\nand more")

    monkeypatch.setattr(exporters, "trace", fail)
    with pytest.raises(
        InputError, match=r"cannot be traced by torch.export: operator x is unknown; nothing was written"
    ):
        fusedet.export(small_run, formats="torch", out=tmp_path / "out" / "a")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_leaves_nothing(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporters, "trace", lambda *_: (None, ("boxes", "scores", "labels", "counts"), 32))
    monkeypatch.setattr(exporters, "write_format", fail)
    with pytest.raises(StorageError, match="cannot be written: No space left on device"):
        fusedet.export(small_run, formats="torch", out=tmp_path / "out" / "a")
    assert not list((tmp_path / "out").iterdir())


def test_command(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", str(trained), "--format", "torch", "--size", "64,9x"]) == 2
    assert "--size 64,9x: write height,width, such as 800,1216" in capsys.readouterr().err


@pytest.mark.slow
def test_metrics_of_an_export_are_those_of_the_run(make_export: Callable[..., Path], tmp_path: Path) -> None:
    """With a threshold per class, and compared as stored results."""
    score = f"test.score={{default: 0.005, {exporting.NAMES[0]}: 0.02}}"
    folder = make_export("retinanet", *QUICK, score)
    assert read_export(folder)[0].thresholds.score == {"default": 0.005, exporting.NAMES[0]: 0.02}
    run, metrics = folder.parent, {}
    for name, source in {"run": run, "onnx": folder / "model.onnx", "openvino": folder}.items():
        out = tmp_path / name if name != "openvino" else None
        metrics[name] = fusedet.validate(source, out=out).metrics
    for name in ("onnx", "openvino"):
        for key in ("AP", "AP50", "APs", "APm", "AR100"):
            assert metrics[name][key] == pytest.approx(metrics["run"][key], abs=1e-4, nan_ok=True)
    compared = fusedet.compare(tmp_path / "run", folder, data=str(parse(read_export(folder)[0].config).data.path))
    assert compared.report["metrics"]["AP"]["difference"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_torch_format_needs_trust(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = exporting.save_run(tmp_path / "run", "retinanet", *QUICK[1:], data=scenes)
    arguments = ["export", str(run), "--format", "torch", "--size", "64,96", "--json", f"out={tmp_path / 'a'}"]
    assert cli.run(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["formats"]) == ["torch"]
    with pytest.raises(InputError, match="add --trust"):
        fusedet.load(report["out"])
    predictor = fusedet.load(report["out"], trust=True)
    image = next((scenes / "val").glob("*.jpg"))
    assert len(predictor.predict(image)) == len(fusedet.load(run).predict(image)) > 0
    done = subprocess.run(
        [sys.executable, tmp_path / "a" / "example.py", image, "0.01"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcos", "faster_rcnn"])
def test_raw_outputs_are_the_candidates(name: str, make_export: Callable[..., Path]) -> None:
    folder = make_export(name, "torch,onnx", *exporting.TWO_LEVELS, size=(64, 96), raw=True)
    quality = ["quality"] if name == "fcos" else []
    assert read_export(folder)[0].outputs == ["boxes", "scores", *quality]
    assert not (folder / "example.py").exists()
    with pytest.raises(InputError, match="was exported with --raw"):
        fusedet.load(folder)
