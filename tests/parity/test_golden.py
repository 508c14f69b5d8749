"""Reference numbers of MMDetection: every case agrees, and a wrong number is detected."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

compare = runpy.run_path(str(Path(__file__).with_name("run.py")))["run"]
PRESENT = {
    "fpn_rcnn",
    "fpn_retina",
    "fpn_fcos",
    "pafpn",
    "bfp",
    "retina_head",
    "vfnet_head",
    "fcos_head",
    "fcos_head_tricks",
    "reppoints_head",
    "mask_roi_head",
    "grid_roi_head",
    "rpn_head",
    "faster_roi_head",
    "cascade_roi_head",
    "dynamic_roi_head",
    "libra_roi_head",
}


def test_golden_numbers_agree(shared: Path) -> None:
    verdicts = compare(shared / "golden")
    assert {k for k, v in verdicts.items() if v == "ok"} == PRESENT
    assert "FAIL" not in verdicts.values()
    assert set(verdicts) == {p.stem for p in (shared / "golden").glob("*.json")}


ABSENT = {"pisa_roi_head", "sabl_retina_head", "sabl_roi_head"}
"""Cases of parts that are not in this version."""


def test_more_golden_numbers_agree(shared: Path) -> None:
    folder = shared / "golden_more"
    names = {p.stem for p in folder.glob("*.json")}
    assert compare(folder) == dict.fromkeys(names - ABSENT, "ok") | dict.fromkeys(names & ABSENT, "absent")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("retina_head", "out.head.0.1"),
        ("retina_head", "out.grad.features.0"),
        ("retina_head", "out.pred.1.bboxes"),
        ("retina_head", "state.retina_reg.bias"),
        ("rpn_head", "out.head.0.1"),
        ("rpn_head", "out.grad.features.0"),
        ("rpn_head", "out.pred.1.bboxes"),
        ("rpn_head", "state.rpn_reg.bias"),
        ("faster_roi_head", "out.grad.features.0"),
        ("faster_roi_head", "out.pred.1.bboxes"),
        ("faster_roi_head", "state.bbox_head.fc_reg.bias"),
        ("faster_roi_head", "in.proposals.0.bboxes"),
    ],
)
def test_one_wrong_number_fails(shared: Path, tmp_path: Path, name: str, key: str) -> None:
    shutil.copy(shared / "golden" / f"{name}.json", tmp_path)
    tensors = load_file(shared / "golden" / f"{name}.safetensors")
    tensors[key].view(-1)[0] += 0.05 * max(1.0, float(tensors[key].abs().max()))
    save_file(tensors, tmp_path / f"{name}.safetensors")
    assert compare(tmp_path) == {name: "FAIL"}


def test_a_wrong_loss_fails(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "golden" / "retina_head.safetensors", tmp_path)
    spec = json.loads((shared / "golden" / "retina_head.json").read_text())
    spec["losses"]["loss_bbox"][0] *= 1.001
    (tmp_path / "retina_head.json").write_text(json.dumps(spec))
    assert compare(tmp_path) == {"retina_head": "FAIL"}
