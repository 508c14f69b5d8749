"""MMDetection's published models: which convert is known, and the others are refused in a sentence."""

import gzip
import json
import runpy
from pathlib import Path

import pytest

run = runpy.run_path(str(Path(__file__).with_name("run.py")))["run"]


@pytest.mark.usefixtures("no_initialization")
@pytest.mark.parametrize(("step", "least"), [(20, 7), pytest.param(1, 187, marks=pytest.mark.slow)])
def test_published_models(shared: Path, step: int, least: int) -> None:
    """Every model of the list, or each 20th."""
    verdicts = dict(run(shared / "zoo" / "zoo.jsonl.gz", step))
    refused = {name: verdict for name, verdict in verdicts.items() if verdict != "ok"}
    assert len(verdicts) - len(refused) >= least
    for name, verdict in refused.items():
        starts = ("MMDetection's ", "unknown bbox_head of MMDetection ", f"{name} does not match: ")
        assert verdict.removeprefix("refused: ").startswith(starts), name
        assert "\n" not in verdict


@pytest.mark.usefixtures("no_initialization")
@pytest.mark.parametrize("step", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_the_table_in_the_wheel(shared: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The table has the models that convert, as the script writes them; all or each 40th is compared."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    script = runpy.run_path(str(Path(__file__).with_name("write_table.py")))
    shipped = [json.loads(line) for line in gzip.decompress(script["TABLE"].read_bytes()).splitlines()]
    names = [row["name"] for row in shipped]
    with gzip.open(shared / "zoo" / "zoo.jsonl.gz", "rt", encoding="utf-8") as lines:
        listed = list(dict.fromkeys(json.loads(line)["name"] for line in lines))
    assert set(names) <= set(listed)
    chosen = {*listed[::step], *names[::step]}
    made = list(script["make_rows"](shared / "zoo" / "zoo.jsonl.gz", chosen))
    assert made == [row for row in shipped if row["name"] in chosen], "write it again: python tests/zoo/write_table.py"
