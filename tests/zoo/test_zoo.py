"""MMDetection's published models: the table of the wheel has those that convert, the others are refused."""

import gzip
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from fusedet.errors import InputError

AGAIN = "write the table again: python tests/zoo/write_table.py ../shared/zoo/zoo.jsonl.gz"


@pytest.mark.parametrize(
    ("step", "least"),
    [(160, 1), pytest.param(8, 30, marks=pytest.mark.slow), pytest.param(1, 308, marks=pytest.mark.soak)],
)
def test_published_models(shared: Path, monkeypatch: pytest.MonkeyPatch, step: int, least: int) -> None:
    """Every model of the list, or each 8th or 160th: the table has exactly those that convert, as the script writes."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    script = runpy.run_path(str(Path(__file__).with_name("write_table.py")))
    shipped = [json.loads(line) for line in gzip.decompress(script["TABLE"].read_bytes()).splitlines()]
    converted = 0
    names: set[str] = set()
    rows: dict[str, dict[str, Any]] = {}
    for model, made in script["run"](shared / "zoo" / "zoo.jsonl.gz", step):
        name = model["name"]
        names.add(name)
        if isinstance(made, InputError):
            assert str(made).startswith(("MMDetection's ", f"{name} does not match: ")), name
            assert "\n" not in str(made)
        else:
            converted += 1
            if name not in rows:  # of two with one name the first
                rows[name] = script["make_row"](model, *made)
    expected = {row["name"]: row for row in shipped if row["name"] in names}
    assert converted >= least
    assert list(rows) == list(expected), AGAIN
    assert rows == expected, AGAIN
    assert step > 1 or len(rows) == len(shipped), AGAIN
