"""The documented adapters for the slicers of supervision and sahi call our predictor, tile by tile."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fusedet
from test_prediction_tiles import draw, make_predictor

PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"


def read_example(package: str) -> str:
    """The documented code that imports a package."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if re.search(rf"^(import|from) {package}\b", block, re.MULTILINE)]
    return str(code).replace("640", "100").replace("128", "20")


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An image of 220 pixels with an object in the second tile; the predictor has no tiles of its own."""
    predictor = make_predictor(100, "test.tiles.size=null")
    monkeypatch.setattr(fusedet, "load", lambda path: predictor)
    return {"fusedet": fusedet, "image": draw((100, 220), (85, 10, 115, 70))}


@pytest.mark.filterwarnings("ignore")
def test_supervision(scene: dict[str, Any]) -> None:
    pytest.importorskip("supervision")
    exec(compile(read_example("supervision"), "supervision", "exec"), scene)
    boxes = scene["detections"].xyxy.round().tolist()
    assert [85, 10, 115, 70] in boxes
    assert set(scene["detections"].class_id.tolist()) == {0}


class DetectionModel:
    """sahi's base class, as far as the example uses it."""

    def __init__(self, model_path: str, confidence_threshold: float) -> None:
        self.model_path, self.confidence_threshold = model_path, confidence_threshold
        self.load_model()  # type: ignore[attr-defined]


def slice_image(image: np.ndarray, model: Any, slice_height: int, slice_width: int) -> list[Any]:
    """What sahi's function does with a model: each tile is predicted, and converted with its shift."""
    rows: list[Any] = []
    for left in range(0, image.shape[1] - slice_width + 1, 60):
        model.perform_inference(np.ascontiguousarray(image[:slice_height, left : left + slice_width]))
        model._create_object_prediction_list_from_original_predictions([[left, 0]], [list(image.shape[:2])])
        rows += model._object_prediction_list_per_image[0]
    return rows


def test_sahi(scene: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for sahi, whose own package brings OpenCV."""
    names = ("sahi", "sahi.models", "sahi.models.base", "sahi.predict", "sahi.prediction")
    modules = {name: ModuleType(name) for name in names}
    modules["sahi.models.base"].DetectionModel = DetectionModel  # type: ignore[attr-defined]
    modules["sahi.predict"].get_sliced_prediction = slice_image  # type: ignore[attr-defined]
    modules["sahi.prediction"].ObjectPrediction = SimpleNamespace  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    exec(compile(read_example("sahi").replace("0.3", "0"), "sahi", "exec"), scene)
    rows = [(row.shift_amount[0], row.bbox, row.category_name, row.full_shape) for row in scene["result"]]
    assert rows == [
        (0, [85, 10, 100, 70], "r", [100, 220]),
        (60, [25, 10, 55, 70], "r", [100, 220]),
    ]
