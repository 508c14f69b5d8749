"""Ablation tables: what a file may contain, how a row becomes a config, and the errors of wrong tables."""

import re
import subprocess
from itertools import product
from pathlib import Path

import pytest

from fusedet import ablation, config
from fusedet.ablation import Table, spec
from fusedet.errors import InputError
from fusedet.models.detectors import build_meta_detector
from fusedet.models.necks import NECKS

MINE = """
base: retinanet_tiny
overrides: [train.epochs=3, "model.neck={type: mse_fpn, gate: none}"]
rows:
  - {label: plain, overrides: [model.neck=fpn]}
  - {label: all}
  - {label: gate, overrides: [model.neck.gate=cag, train.epochs=5]}
  - {label: long, overrides: [train.schedule=2x]}
  - {label: other, base: fcos_tiny, overrides: [model.interact=msil]}
  - {label: theirs, cited: true, published: {AP: 41, AP50: 60.5}, split: test-dev, note: "from elsewhere"}
"""


def write(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def with_rows(folder: Path, rows: str, head: str = "base: retinanet_tiny\n") -> Path:
    return write(folder, f"{head}rows:\n" + "".join(f"  - {row}\n" for row in rows.split(" | ")))


@pytest.fixture
def mine(tmp_path: Path) -> Table:
    return ablation.load_table(write(tmp_path, MINE))


# -- files


def test_own_table_file(mine: Table) -> None:
    assert (mine.name, mine.title, mine.base, mine.reference) == ("mine", "mine", "retinanet_tiny", None)
    assert [row.label for row in mine.rows] == ["plain", "all", "gate", "long", "other", "theirs"]
    assert mine.rows[1].overrides == ()
    theirs = mine.rows[-1]
    assert (theirs.cited, theirs.published, theirs.split, theirs.note) == (
        True,
        {"AP": 41.0, "AP50": 60.5},
        "test-dev",
        "from elsewhere",
    )


def test_overrides_are_applied_in_layers(mine: Table) -> None:
    plain, whole, gate, long, other = (row.config(mine) for row in mine.rows[:-1])
    assert plain.model.neck == {"type": "fpn"}  # another type replaces the whole slot
    assert whole.model.neck == {"type": "mse_fpn", "gate": "none"}
    assert gate.model.neck == {"type": "mse_fpn", "gate": "cag"}
    assert [c.train.epochs for c in (plain, whole, gate)] == [3, 3, 5]
    assert (long.train.epochs, long.train.milestones) == (
        24,
        (16, 22),
    )  # a row's schedule replaces the table's epochs
    assert other == config.load("fcos_tiny", [*mine.overrides, "model.interact=msil"])


def test_further_overrides_are_applied_on_top_of_the_row(mine: Table) -> None:
    gate = mine.rows[2]
    more = gate.config(mine, "data=/images", "train.epochs=1", "model.neck=bifpn", "model.backbone=resnet18")
    assert (more.data.path, more.train.epochs, more.model.neck) == ("/images", 1, {"type": "bifpn"})
    assert more.model.backbone["name"] == "resnet18"
    assert gate.config(mine).data.path is None


def test_base_in_the_tables_folder_takes_precedence(tmp_path: Path) -> None:
    write(tmp_path, "base: retinanet_tiny\ntrain: {epochs: 2}\n", "retinanet_r50")
    for base in ("retinanet_r50", "retinanet_r50.yaml"):
        table = ablation.load_table(with_rows(tmp_path, "{label: a}", f"base: {base}\n"))
        assert table.rows[0].config(table).train.epochs == 2


def test_configs_of_all_rows_that_are_not_cited(mine: Table) -> None:
    table = mine.configs("train.seed=7")
    assert list(table) == ["plain", "all", "gate", "long", "other"]
    assert {c.train.seed for c in table.values()} == {7}
    assert table["gate"] == mine.rows[2].config(mine, "train.seed=7")
    assert (
        table["gate"].model.backbone == mine.rows[2].config(mine).model.backbone
    )  # building the model does not change the config


# -- wrong tables: one sentence each


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{overrides: [train.epochs=1]}", "mine.yaml, row 1: label is missing"),
        ("{label: a} | {label: b} | {label: a}", "mine.yaml: rows 1 and 3 both have the label 'a'"),
        ("{label: ''}", "label must not be empty"),
        ("{label: 3}", "mine.yaml, row 1: label must be str, got 3"),
        ("a", "mine.yaml, row 1 must be a mapping with label and overrides, got 'a'"),
        ("{label: a, override: [x=1]}", "mine.yaml, row 'a': unknown key 'override': did you mean 'overrides'"),
        (
            "{label: a, overrides: train.epochs=1}",
            r"mine.yaml, row 'a': overrides must be a list, such as \[train.epochs=1\]",
        ),
        ("{label: a, overrides: [{train.epochs: 1}]}", r"mine.yaml, row 'a': overrides.0 must be str"),
        (
            "{label: a, published: {Ap50: 3}}",
            "mine.yaml, row 'a': unknown metric 'Ap50' of published: did you mean 'AP50'",
        ),
        ("{label: a, published: {AP: high}}", "row 'a': published.AP must be float, got 'high'"),
        ("{label: a, published: {delta_AP: 1.2}}", "row 'a': a published difference needs reference"),
        ("{label: a, cited: true}", "row 'a': a cited row needs published metrics"),
        (
            "{label: a, cited: true, overrides: [train.epochs=1], published: {AP: 3}}",
            "row 'a': a cited row without a base is not run, leave out overrides",
        ),
    ],
)
def test_wrong_rows(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ablation.load_table(with_rows(tmp_path, rows))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: retinanet_tiny\n", "mine.yaml: rows must be a list of rows.*got None"),
        ("base: retinanet_tiny\nrows: []\n", r"mine.yaml: rows must be a list of rows.*got \[\]"),
        ("rows: {a: 1}\n", "mine.yaml: rows must be a list of rows"),
        ("- a\n", "mine.yaml must be a mapping with base and rows"),
        ("rows: [\n", "mine.yaml is not YAML"),
        ("bases: x\nrows: [{label: a}]\n", "mine.yaml: unknown key 'bases': did you mean 'base'"),
        ("source: x\nrows: [{label: a}]\n", "mine.yaml: unknown key 'source'"),
        ("self: x\nrows: [{label: a}]\n", "mine.yaml: unknown key 'self'"),
        ("base: [x]\nrows: [{label: a}]\n", "mine.yaml: base must be str"),
        ("synthetic: {images: many}\nrows: [{label: a}]\n", "mine.yaml: synthetic.images must be int, got 'many'"),
        (
            "reference: b\nrows: [{label: aa}, {label: bb}]\n",
            "mine.yaml: unknown reference 'b': did you mean 'bb'",
        ),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ablation.load_table(write(tmp_path, text))


def test_unknown_tables(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown ablation table 'neks': did you mean 'necks'"):
        ablation.load_table("neks")
    with pytest.raises(
        InputError, match=r"there is no table file .*other\.yaml: give a YAML file, or one of modules_together"
    ):
        ablation.load_table(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("row", "head", "message"),
    [
        (
            "{label: a, overrides: [train.epoch=1]}",
            "base: retinanet_tiny\n",
            r"mine.yaml, row 'a': unknown config key 'train.epoch'",
        ),
        (
            "{label: a, overrides: [train.epochs=x]}",
            "base: retinanet_tiny\n",
            r"mine.yaml, row 'a': train.epochs must be int",
        ),
        (
            "{label: a, base: retinanet_tny}",
            "",
            r"mine.yaml, row 'a': unknown base 'retinanet_tny': did you mean 'retinanet_tiny'",
        ),
        (
            "{label: a}",
            "base: retinanet_tny\n",
            r"mine.yaml: unknown base 'retinanet_tny': did you mean 'retinanet_tiny'",
        ),
        (
            "{label: a}",
            "base: retinanet_tiny\noverrides: [train.epoch=1]\n",
            r"mine.yaml: unknown config key 'train.epoch'",
        ),
        ("{label: a}", "", r"mine.yaml, row 'a' has no config: write base: CONFIG"),
    ],
)
def test_overrides_and_bases_refused_by_the_config(tmp_path: Path, row: str, head: str, message: str) -> None:
    table = ablation.load_table(with_rows(tmp_path, row, head))
    with pytest.raises(InputError, match=message):
        table.rows[0].config(table)
    with pytest.raises(InputError, match=message):
        table.configs()


def test_wrong_override_of_the_command_line_is_named(mine: Table) -> None:
    with pytest.raises(
        InputError, match=r"^train.epoch=1 does not fit .*mine.yaml, row 'plain': unknown config key 'train.epoch'"
    ):
        mine.configs("train.epoch=1")


def test_options_of_parts_are_checked_before_anything_runs(tmp_path: Path) -> None:
    """The config accepts any option of a slot; the part refuses it when it is built."""
    table = ablation.load_table(
        with_rows(tmp_path, "{label: a} | {label: b, overrides: [model.neck.gait=cag]}", MINE.split("rows:")[0])
    )
    assert table.rows[1].config(table).model.neck["gait"] == "cag"
    with pytest.raises(
        InputError, match=r"mine.yaml, row 'b': unknown option 'gait' of model.neck 'mse_fpn': did you mean 'gate'"
    ):
        table.configs()


def test_cited_rows_are_not_run(mine: Table) -> None:
    with pytest.raises(InputError, match=r"mine.yaml, row 'theirs' is cited"):
        mine.rows[-1].config(mine)


def test_cited_rows_with_a_base_are_run(tmp_path: Path) -> None:
    """They keep the published metrics; the table's base, first row and differences are those of the other rows."""
    cited = "{label: theirs, cited: true, base: fcos_tiny, overrides: [train.epochs=2], published: {AP: 41}}"
    named = "{label: named, cited: true, base: fcos_tiny, reference: plain, published: {AP: 43}}"
    rows = f"{cited} | {{label: plain, published: {{AP: 40}}}} | {named} | {{label: shown, cited: true, published: {{AP: 1}}}}"
    table = ablation.load_table(with_rows(tmp_path, rows))
    configs = table.configs()
    assert {label: (c.model.head["type"], c.train.epochs) for label, c in configs.items()} == {
        "theirs": ("fcos", 2),
        "plain": ("retina", 7),
        "named": ("fcos", 10),
    }
    assert (table.rows[0].cited, table.rows[0].published) == (True, {"AP": 41.0})
    plan = ablation.make_plan(table, need_data=False)
    assert plan.selected == ("theirs", "plain", "named")
    assert (plan.baseline, [plan.reference(label) for label in plan.selected]) == (
        "plain",
        ["theirs", "plain", "plain"],
    )
    assert table.content == ablation.load_table(with_rows(tmp_path, rows.replace("AP: 41", "AP: 42"))).content


# -- shipped


@pytest.mark.parametrize("name", ablation.list_tables())
def test_shipped_tables_load(name: str) -> None:
    table = ablation.load_table(name)
    assert table.name == table.source == name
    assert table.title not in ("", name)
    assert all(
        set(row.published) <= set(spec.METRICS) | {f"delta_{name}" for name in spec.METRICS} for row in table.rows
    )
    # Shipped files and files of users are read alike.
    assert ablation.load_table(Path(table.folder) / f"{name}.yaml").rows == table.rows


def test_necks_has_every_neck_and_one_detector() -> None:
    table = ablation.load_table("necks")
    configs = [row.config(table) for row in table.rows]
    chains = [c.model.neck if isinstance(c.model.neck, list) else [c.model.neck] for c in configs]
    assert {part["type"] for chain in chains for part in chain} == set(NECKS)
    assert len({(str(c.model.head), str(c.model.backbone), str(c.train), str(c.data)) for c in configs}) == 1


def test_modules_together_has_every_combination_once() -> None:
    table = ablation.load_table("modules_together")
    configs = [row.config(table) for row in table.rows if "split" not in row.label]  # the other reading of MSE-FPN
    plain = configs[0].model
    switched = [
        (c.model.plugin != plain.plugin, c.model.neck != plain.neck, c.model.interact != plain.interact)
        for c in configs
    ]
    assert len(switched) == 8
    assert set(switched) == set(product((False, True), repeat=3))
    assert (plain.plugin, plain.interact) == (None, None)


# -- documented commands

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "README.md"
ARGUMENTS = """fusedet() { printf '%s\\x1f' "$@"; printf '\\x1e'; }"""
"""A shell function that prints the arguments of a documented call, separated by control characters."""


def list_documented_ablations() -> list[list[str]]:
    """The arguments of every `fusedet ablate` on the page of the evidence, as a shell passes them."""
    blocks = re.findall(r"^```console\n(.*?)^```", EVIDENCE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    script = "\n".join([ARGUMENTS, *blocks]).replace("\n$ ", "\n")
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    return [call.split("\x1f")[1:-1] for call in printed.split("\x1e") if call.startswith("ablate\x1f")]


@pytest.mark.parametrize("name", ["necks", "smsl_table1", "msil_table2", "modules_together"])
def test_every_row_of_a_documented_ablation_can_be_built(name: str) -> None:
    calls = {
        tuple(o for o in call if "=" in o and "weights=" not in o)
        for call in list_documented_ablations()
        if call[0] == name
    }
    table = ablation.load_table(name)
    assert calls
    for overrides in calls:
        for row in table.rows:
            build_meta_detector(row.config(table, *overrides), 3)
