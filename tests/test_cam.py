"""Activation maps: LayerCAM by hand, recorded tensors, identities, and the command line."""

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fusedet
from fusedet import cli
from fusedet.api.predictor import Predictor
from fusedet.models.modules import MSIL
from fusedet.models.necks import SMSL
from fusedet.models.necks.gates import CAG, CAM, GCG, CoordinateAttention
from fusedet.types import Batch
from fusedet.visualization.activation_maps import (
    KINDS,
    PARTS,
    ActivationMaps,
    MapRow,
    compute_activation_maps,
    heat_share_inside,
    layer_cam,
    resize_map,
)
from fusedet.visualization.module_calls import record_calls
from shared_fixtures import SMALL
from small import DETECTORS, ONE_STAGE, TWO_STAGE, make

pytestmark = pytest.mark.usefixtures("unrendered")

HEIGHT, WIDTH = 90, 120
DISTINCT = ("retinanet", "reppoints", "grid_rcnn", "cascade_rcnn")
"""Detectors of anchors, of points, without box regression, and of several stages."""


@pytest.fixture(scope="module")
def batch() -> Batch:
    """One image inside padding, with a textured rectangle."""
    torch.manual_seed(1)
    image = torch.zeros(1, 3, 96, 128, dtype=torch.uint8)
    image[..., :HEIGHT, :WIDTH] = 90
    image[..., 30:60, 40:80] = torch.randint(0, 255, (1, 3, 30, 40), dtype=torch.uint8)
    return Batch(image, torch.tensor([[HEIGHT, WIDTH]]), (0,), torch.ones(1, 2))


def by_key(seen: ActivationMaps, kind: str) -> dict[str, MapRow]:
    return {row.key: row for row in seen.heat[kind]}


# -- LayerCAM


def test_layer_cam_by_hand() -> None:
    """Two channels of 1 x 3 cells: negative gradients do not count, nor do negative sums."""
    feature = torch.tensor([[[[1.0, 2.0, -3.0]], [[4.0, -1.0, 1.0]]]])
    gradient = torch.tensor([[[[2.0, -1.0, 1.0]], [[0.5, 3.0, 1.0]]]])
    assert layer_cam(feature, gradient).tolist() == [[[2 * 1 + 0.5 * 4, 0.0, 0.0]]]  # 0 - 3 and -3 + 1 are below 0


class _Linear(nn.Module):
    """Linear predictor: the logit of a cell is a weighted sum over its channels."""

    def __init__(self, head: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight[:, None, None]).sum(dim=1, keepdim=True).expand(-1, 3, -1, -1)


def test_linear_head(batch: Batch) -> None:
    """With logits linear in the branch's features, heat is score times the sum of positive parts, per area."""
    detector = make("retinanet", "model.head.scales_per_octave=1", "model.head.ratios=[1.0]").eval()
    weight = torch.randn(32)
    detector.head.cls = _Linear(detector.head, weight)
    features: list[Tensor] = []
    detector.head.towers.register_forward_hook(lambda module, args, given: features.append(given[0].detach()))
    row = by_key(compute_activation_maps(detector, batch, 1), "classification")["branch"]
    outputs = detector(batch.images, batch.sizes)
    boxes = detector.head.decode(outputs).boxes[0].detach()
    seen = (boxes[:, 2] > 0) & (boxes[:, 3] > 0) & (boxes[:, 0] < WIDTH) & (boxes[:, 1] < HEIGHT)
    for (stride, heat), x, counted in zip(row.maps.items(), features, seen.split(list(outputs.priors.counts))):
        scores = (x[0] * weight[:, None, None]).sum(dim=0).sigmoid() * counted.view(heat.shape)
        expected = scores * (weight.clamp(min=0)[:, None, None] * x[0]).sum(dim=0).clamp(min=0) / stride**2
        torch.testing.assert_close(heat, expected, rtol=1e-4, atol=1e-8)
        assert heat.max() > 0


def test_best_candidate_only(batch: Batch) -> None:
    """A 3x3 predictor of one candidate sees nine cells of one level."""
    seen = compute_activation_maps(make("retinanet").eval(), batch, 0, best_only=True)
    for kind in KINDS[:2]:
        maps = by_key(seen, kind)["branch"].maps.values()
        hot = [int((x > 0).sum()) for x in maps]
        assert 0 < max(hot) <= 9
        assert sum(n > 0 for n in hot) == 1


def test_classes_differ(batch: Batch) -> None:
    detector = make("fcos").eval()
    heats = [by_key(compute_activation_maps(detector, batch, k), "classification")["branch"].maps[8] for k in (0, 1)]
    assert not torch.allclose(*heats)


@pytest.mark.parametrize(
    "name", [name if name in DISTINCT else pytest.param(name, marks=pytest.mark.slow) for name in DETECTORS]
)
def test_every_detector(name: str, batch: Batch) -> None:
    """With all modules, every part has maps, they are finite and 0 or more, and detections stay the same."""
    modules = ["model.neck=[mse_fpn,smsl]", "model.plugin=msfm"] + (
        ["model.interact=msil"] if name in ONE_STAGE else []
    )
    detector = make(name, *modules).eval()
    with torch.no_grad():
        before = detector.detect(batch.images, batch.sizes)
    seen = compute_activation_maps(detector, batch, 2)
    has = [part for part in PARTS if part != "msil" or name in ONE_STAGE]
    regresses = name != "grid_rcnn"  # its boxes come from point heat maps
    assert sorted(seen.parts) == sorted(has)
    assert seen.missing == (["msil"] if name in TWO_STAGE else []) + ([] if regresses else ["regression"])
    assert set(seen.heat) == set(KINDS if name in TWO_STAGE else KINDS[:2]) - (set() if regresses else {"regression"})
    for rows in seen.heat.values():
        assert {"backbone", "neck #0", "pyramid"} < {row.key for row in rows}
        assert any(x.max() > 0 for row in rows for x in row.maps.values())
        assert all(x.isfinite().all() and (x >= 0).all() for row in rows for x in row.maps.values())
    assert all((x > 0).all() and (x < 1).all() for row in seen.gates for x in row.maps.values())
    with torch.no_grad():
        after = detector.detect(batch.images, batch.sizes)
    assert all(a is b or torch.equal(a, b) for a, b in zip(before, after))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in detector.modules())


def test_missing_parts_are_not_shown(batch: Batch) -> None:
    seen = compute_activation_maps(make("fcos").eval(), batch, 0)
    assert seen.missing == ["msfm", "msil", "gate", "smsl"]
    assert [row.key for row in seen.heat["regression"]] == ["backbone", "pyramid", "branch"]
    assert list(by_key(seen, "regression")["backbone"].maps) == [8, 16, 32], "the neck does not use C2"
    assert not seen.gates
    assert not seen.level_weights


# -- before and after


def test_msil_without_gates_changes_nothing(batch: Batch) -> None:
    seen = compute_activation_maps(
        make("fcos", "model.interact={type: msil, to_cls: false, to_reg: false}").eval(), batch, 0
    )
    for kind in KINDS[:2]:
        rows = by_key(seen, kind)
        assert rows["branch"].maps.keys() == rows["branch before"].maps.keys()
        assert all(torch.equal(x, rows["branch before"].maps[s]) for s, x in rows["branch"].maps.items())
    assert "msil" in seen.missing


def test_smsl_that_adds_nothing_changes_nothing(batch: Batch) -> None:
    """An SMSL that is the identity has the heat maps of its input."""
    detector = make("retinanet", "model.neck=[fpn,smsl]").eval()
    smsl = detector.neck.necks[1]
    smsl.forward = lambda features: [x + 0 for x in features]
    rows = by_key(compute_activation_maps(detector, batch, 0), "classification")
    assert all(torch.equal(x, rows["neck #0"].maps[s]) for s, x in rows["pyramid"].maps.items())


def test_level_weights_and_gates_come_from_the_modules(batch: Batch) -> None:
    detector = make("fcos", "model.neck=[fpn,smsl]", "model.interact=msil").eval()
    taken: dict[nn.Module, list[tuple[Tensor, ...]]] = {}
    smsl, msil = (next(m for m in detector.modules() if isinstance(m, kind)) for kind in (SMSL, MSIL))
    for module in (smsl, msil):
        module.register_forward_pre_hook(lambda m, args: taken.setdefault(m, []).append(args))
    seen = compute_activation_maps(detector, batch, 0)
    (weights,) = seen.level_weights
    assert weights.weights.shape == (6, 5, 32)
    torch.testing.assert_close(weights.weights.sum(dim=1), torch.ones(6, 32))
    assert torch.equal(weights.weights, smsl.weights(taken[smsl][0][0])[0])
    gates = {row.key: list(row.maps.values()) for row in seen.gates}
    for level, args in enumerate(taken[msil]):
        for side, gate in zip(KINDS, msil.gates(*args)):
            assert torch.equal(gates[f"msil {side}"][level], gate[0].mean(dim=0))


@pytest.mark.parametrize("kind", [GCG, CAG, CoordinateAttention, CAM])
def test_gate_weights_scale_the_features(kind: type[nn.Module]) -> None:
    gate, x = kind(32).eval(), torch.randn(2, 32, 5, 7)
    weights = gate.weights(x)
    assert torch.equal(gate(x), weights * x)
    assert ((weights > 0) & (weights < 1)).all()


@pytest.mark.parametrize("source", ["lateral", "backbone"])
@pytest.mark.parametrize(("place", "strides"), [("lateral", [8, 16, 32]), ("topdown", [16, 32])])
def test_gates_have_their_levels(place: str, strides: list[int], source: str, batch: Batch) -> None:
    neck = f"model.neck={{type: mse_fpn, gate_place: {place}, gate_source: {source}}}"
    seen = compute_activation_maps(make("retinanet", neck).eval(), batch, 0)
    (row,) = seen.gates
    assert list(row.maps) == strides
    assert all(x.shape == (96 // s, 128 // s) for s, x in row.maps.items())


def test_recorded_tensors_are_not_overwritten() -> None:
    """In-place operations do not change recorded tensors, and an input's gradient passed through its module only."""
    first, second = nn.Linear(2, 2), nn.ReLU(inplace=True)
    x = torch.tensor([[1.0, -2.0]], requires_grad=True)
    with record_calls([first, second]) as calls:
        y = first(x)
        total = (second(y) + x).sum()
    (one,), (two,) = calls[first], calls[second]
    torch.testing.assert_close(one.outputs[0], first(x))
    assert torch.equal(two.inputs[0], one.outputs[0])
    (gradient,) = torch.autograd.grad(total, one.inputs[0])
    torch.testing.assert_close(gradient, (first(x) > 0).float() @ first.weight)


# -- maps on the image


def test_resized_map_keeps_positions() -> None:
    """4 x 6 cells of stride 8 over an image of 30 x 44 pixels: cells keep their values away from edges."""
    heat = torch.zeros(4, 6)
    heat[:, 3:] = 1.0
    whole = resize_map(heat, 8, (30, 44), (30, 44))
    assert whole.shape == (30, 44)
    assert (whole[:, :20] == 0).all()
    assert (whole[:, 28:] == 1).all()
    assert resize_map(torch.full((2, 2), 0.5), 16, (20, 30), (10, 15)).unique().tolist() == pytest.approx([0.5])


def test_heat_share_inside_by_hand() -> None:
    heat = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 0.0, 10.0]])
    assert heat_share_inside(heat, torch.tensor([[0.0, 0.0, 2.0, 1.0], [1.0, 0.0, 2.0, 2.0]])) == (
        pytest.approx(7 / 20),
        3 / 8,
    )
    share, area = heat_share_inside(torch.zeros(2, 4), torch.tensor([[0.0, 0.0, 4.0, 2.0]]))
    assert math.isnan(share)
    assert area == 1


# -- the command


@pytest.fixture(scope="module")
def runs(scenes: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plain run, and one with three of the four modules."""
    out = tmp_path_factory.mktemp("cam") / "all"
    neck = "model.neck=[{type: mse_fpn, sim_groups: 4}, smsl]"
    arguments = [neck, "model.interact={type: msil, norm: none}"]
    assert cli.run(["train", "retinanet_tiny", f"data={scenes}", f"out={out}", *SMALL, *arguments]) == 0
    return trained, out


@pytest.fixture(scope="module")
def image(scenes: Path) -> Path:
    return sorted((scenes / "val").glob("*"))[0]


def error_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the error line of a refused command."""
    capsys.readouterr()
    assert cli.run(["cam", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.slow
@pytest.mark.usefixtures("rendered")
def test_two_runs_side_by_side(
    capsys: pytest.CaptureFixture[str], runs: tuple[Path, Path], image: Path, tmp_path: Path
) -> None:
    a, b = map(str, runs)
    arguments = ["--beside", b, "--class", "circle", "--score", "0.001", f"out={tmp_path / 'out'}", "--json"]
    assert cli.run(["cam", a, str(image), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    (one,) = result["images"].values()
    assert one["class"] == "circle"
    assert set(one["files"]) == {"classification", "regression", "gates", "level weights"}
    for file in one["files"].values():
        assert Path(file).is_relative_to(tmp_path / "out")
        assert min(Image.open(file).size) > 300
    assert one["runs"][a]["missing"] == ["msfm", "msil", "gate", "smsl"]
    assert one["runs"][b]["missing"] == ["msfm"]
    assert one["runs"][a]["level_weights"] == []
    (weights,) = one["runs"][b]["level_weights"]
    assert weights["strides"] == [8, 16, 32, 64, 128]
    assert [sum(row) for row in weights["weights"]] == pytest.approx([1.0] * 6, abs=1e-5)
    assert {"branch before", "branch", "neck #0"} <= set(one["runs"][b]["heat"]["classification"])
    assert 0 < one["area"] <= 1
    inside = [row["inside"] for run in one["runs"].values() for rows in run["heat"].values() for row in rows.values()]
    assert all(x is None or 0 <= x <= 1 for x in inside)
    assert json.loads((tmp_path / "out" / "cam.json").read_text()) == result["images"]


def test_many_images(trained: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is in memory at a time, and each has its own files."""
    copies = [tmp_path / folder / f"img[1]{image.suffix}" for folder in "abc"]
    for path in copies:
        path.parent.mkdir()
        path.write_bytes(image.read_bytes())
    decoded: list[weakref.ref[Tensor]] = []
    decode = Predictor.decode_image

    def decode_one(self: Predictor, source: Any) -> Tensor:
        assert sum(ref() is not None for ref in decoded) <= 1, "the one before"
        pixels = decode(self, source)
        decoded.append(weakref.ref(pixels))
        return pixels

    monkeypatch.setattr(Predictor, "decode_image", decode_one)
    monkeypatch.setattr("fusedet.api.cam.draw_figures", lambda *args: ({"gates": Path(f"{args[-1]}-gates.png")}, {}))
    result = fusedet.cam(trained, copies, class_name="circle", out=tmp_path / "out")
    files = [Path(one["files"]["gates"]).name for one in result.images.values()]
    assert files == ["img[1]-gates.png", "img[1]-2-gates.png", "img[1]-3-gates.png"]


def test_parts_and_output_directories(capsys: pytest.CaptureFixture[str], runs: tuple[Path, Path], image: Path) -> None:
    """--only selects parts, and each call has its own output directory in the run directory."""
    for folder, part, files in (("cam", "smsl", ["level weights"]), ("cam-2", "msil", ["gates"])):
        assert cli.run(["cam", str(runs[1]), str(image), "--class", "star", "--only", part, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["out"] == str(runs[1] / folder)
        assert [list(one["files"]) for one in result["images"].values()] == [files]


def test_bad_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], runs: tuple[Path, Path], image: Path, tmp_path: Path
) -> None:
    plain, _ = runs
    out = tmp_path / "out"
    assert "unknown class" in (text := error_line(capsys, plain, image, "--class", "circl", f"out={out}"))
    assert "did you mean 'circle'" in text
    assert f"{image}: {plain} detects nothing with a score of 1 or more" in error_line(
        capsys, plain, image, "--score", "1", f"out={out}"
    )
    assert f"--only msil: {plain} has only neck, branches" in error_line(
        capsys, plain, image, "--class", "star", "--only", "msil", f"out={out}"
    )
    assert "unknown part 'mssl'" in error_line(capsys, plain, image, "--only", "mssl", f"out={out}")
    assert "which images?" in error_line(capsys, plain)
    assert "changes nothing for a trained model" in error_line(capsys, plain, image, "model.neck=bfp")
    assert not out.exists()
