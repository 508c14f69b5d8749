"""MMDetection's published models: which convert is known, and the others are refused in a sentence."""

import runpy
from pathlib import Path

import pytest

run = runpy.run_path(str(Path(__file__).with_name("run.py")))["run"]


@pytest.mark.usefixtures("no_initialization")
@pytest.mark.parametrize(("step", "least"), [(20, 12), pytest.param(1, 289, marks=pytest.mark.slow)])
def test_published_models(shared: Path, step: int, least: int) -> None:
    """Every model of the list, or each 20th."""
    verdicts = dict(run(shared / "zoo" / "zoo.jsonl.gz", step))
    refused = {name: verdict for name, verdict in verdicts.items() if verdict != "ok"}
    assert len(verdicts) - len(refused) >= least
    for name, verdict in refused.items():
        starts = ("MMDetection's ", "unknown bbox_head of MMDetection ", f"{name} does not match: ")
        assert verdict.removeprefix("refused: ").startswith(starts), name
        assert "\n" not in verdict
