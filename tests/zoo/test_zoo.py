"""MMDetection's published models: which convert is known, and the others are refused in a sentence."""

import gzip
import json
import runpy
from pathlib import Path

import pytest

run = runpy.run_path(str(Path(__file__).with_name("run.py")))["run"]


@pytest.mark.usefixtures("no_initialization")
@pytest.mark.parametrize(("step", "least"), [(40, 6), pytest.param(1, 308, marks=pytest.mark.slow)])
def test_published_models(shared: Path, step: int, least: int) -> None:
    """Every model of the list, or each 40th."""
    verdicts = dict(run(shared / "zoo" / "zoo.jsonl.gz", step))
    refused = {name: verdict for name, verdict in verdicts.items() if verdict != "ok"}
    assert len(verdicts) - len(refused) >= least
    for name, verdict in refused.items():
        starts = ("MMDetection's ", f"{name} does not match: ")
        assert verdict.removeprefix("refused: ").startswith(starts), name
        assert "\n" not in verdict


@pytest.mark.usefixtures("no_initialization")
@pytest.mark.parametrize("step", [104, pytest.param(1, marks=pytest.mark.slow)])
def test_the_table_in_the_wheel(shared: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The table is what the script writes: no other model converts, and all of its rows, or each 104th, are equal."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    script = runpy.run_path(str(Path(__file__).with_name("write_table.py")))
    models = shared / "zoo" / "zoo.jsonl.gz"
    shipped = [json.loads(line) for line in gzip.decompress(script["TABLE"].read_bytes()).splitlines()]
    names = [row["name"] for row in shipped]
    with gzip.open(models, "rt", encoding="utf-8") as lines:
        absent = {json.loads(line)["name"] for line in lines} - set(names)
    command = "python tests/zoo/write_table.py ../shared/zoo/zoo.jsonl.gz"
    made = list(script["make_rows"](models, absent | set(names[::step])))
    assert [row["name"] for row in made] == names[::step], f"write the table again: {command}"
    assert made == shipped[::step], f"write the table again: {command}"
