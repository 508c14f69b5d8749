"""The notebooks run from the first to the last cell, with less data than a reader uses."""

from pathlib import Path

import pytest

from shared_fixtures import SMALL

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples/notebooks").glob("*.ipynb"))
# what a reader sets for minutes, as a test can afford it
LESS = {
    "IMAGES, EPOCHS = ": "IMAGES, EPOCHS = 20, 1",
    "IMAGES, EPOCHS, SEEDS = ": "IMAGES, EPOCHS, SEEDS = 20, 1, 2",
    "SETTINGS = ": f"SETTINGS = {[word for word in SMALL if not word.startswith('train.epochs')]!r}",
}


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["ablation", "train_predict_export"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "%pip install" in cells[0].source  # so that it also runs in an empty environment
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]  # stored without outputs
    changed = 0
    for cell in cells:
        lines = cell.source.splitlines()
        for i, line in enumerate(lines):
            for beginning, replacement in LESS.items():
                if line.startswith(beginning):
                    lines[i], changed = replacement, changed + 1
        cell.source = "\n".join(lines)
    assert changed == 2
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in cells)
