"""Tables whose rows are configs, with the figures that papers print for them: YAML, shipped or one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, get_type_hints

from fusedet import config
from fusedet.api.validate import FIGURES, MASK_FIGURES
from fusedet.config import Config
from fusedet.errors import InputError, checked, unknown
from fusedet.models.detectors import build_meta_detector

PUBLISHED = (*FIGURES, *MASK_FIGURES, "VOC_AP", "VOC_AP_11_point")
"""The figures of `fusedet val` that a paper can print."""
DELTA = "delta_"


@dataclass(frozen=True)
class Row:
    """A label and how the row's config differs from the table's, or what a paper cites of other people's detectors.

    overrides: "key=value" texts over the table's. base: a config's name or file, in place of the table's.
    reference: the label of the row that this one is compared with, in place of the table's; its own label where it is such a row itself.
    published: what the paper prints, in percent, by the names of `PUBLISHED`; "delta_AP": the difference to the reference row.
    params_M: trainable parameters in 1e6. time_ms: of one image, on the paper's machine. split: where this was measured, as it says.
    cited: the figures are shown, and nothing is run. note: what whoever compares has to know.
    """

    label: str
    overrides: tuple[str, ...] = ()
    base: str | None = None
    reference: str | None = None
    published: Mapping[str, float] = field(default_factory=dict)
    params_M: float | None = None  # noqa: N815 - the unit
    time_ms: float | None = None
    split: str | None = None
    cited: bool = False
    note: str | None = None

    def config(self, table: Table, *more: str) -> Config:
        """The config that the row is run with: its base, the table's overrides, its own, then `more`, each layer over the one before.

        A schedule goes first within its layer, so that one in `more` replaces what the table says of epochs.
        Raises InputError for a row that is only cited, and for what the config refuses, with file and row.
        """
        if self.cited:
            raise InputError(
                f"{table.source}, row '{self.label}' is cited from the literature: it has no config to run"
            )
        base = self.base or table.base
        if base is None:
            raise InputError(
                f"{table.source}, row '{self.label}' has no config: write base: MODEL in the row or above the rows"
            )
        where = f"{table.source}, row '{self.label}'"
        try:
            tree = config.load(base, table.overrides, kind="base:", folder=table.folder).tree()
        except InputError as error:
            raise InputError(f"{where if self.base else table.source}: {error}") from error
        tree = _apply_overrides(tree, self.overrides, where)
        return config.parse(_apply_overrides(tree, more, f"{' '.join(more)} does not fit {where}"))


@dataclass(frozen=True)
class Table:
    """Rows of configs on a common base.

    name: of the shipped table or the file, without its suffix; the title where there is none. source: what messages call it.
    folder: where it lies; a base beside it wins over a shipped one. title, paper: what it shows and whose it is. base, overrides: of
    all rows. reference: the label of the row that the others are compared with. figure: what the table is about, one of `PUBLISHED`.
    split, note: as in Row, of all rows.
    """

    name: str
    source: str
    folder: Any
    rows: tuple[Row, ...]
    title: str = ""
    paper: str | None = None
    base: str | None = None
    overrides: tuple[str, ...] = ()
    reference: str | None = None
    figure: str = "AP"
    split: str | None = None
    note: str | None = None

    @property
    def content(self) -> str:
        """A fingerprint of what the rows run: the same for a file that was moved, renamed or given other words."""
        rows = [(row.label, row.base, row.overrides, row.cited) for row in self.rows]
        return sha256(repr((self.base, self.overrides, rows)).encode()).hexdigest()[:16]

    def configs(self, *more: str, num_classes: int = 80) -> dict[str, Config]:
        """Every row's config by its label, cited rows left out; each different model is built once, without memory.

        What is wrong with any row is told before the first is run: raises InputError with file and row. Rows may be equal:
        the papers' tables repeat some under another label.
        """
        found: dict[str, Config] = {}
        seen = set()
        for row in self.rows:
            if row.cited:
                continue
            found[row.label] = made = row.config(self, *more)
            if (key := repr(made.model)) in seen:
                continue
            seen.add(key)
            try:
                build_meta_detector(made, num_classes)
            except InputError as error:
                raise InputError(f"{self.source}, row '{row.label}': {error}") from error
        return found


def list_tables() -> list[str]:
    """The names of the shipped tables."""
    return config.names("ablations")


def load_table(name: str | Path) -> Table:
    """The table of that name (shipped) or YAML file.

    A file has `rows`, each with a `label` and a list of `overrides`, mostly a `base`, a config's name or file; all keys of Row and,
    but for name, source and folder, of Table are allowed. Rows are resolved by `Row.config` and `Table.configs`.
    Raises InputError for an unknown table (the nearest is offered), an unknown key, a value of the wrong type, no rows, a row without
    a label, and two rows of one label.
    """
    path = config.find(name, "ablations", "ablation table")
    stem = Path(path.name).stem
    source = stem if str(name) == stem else str(path)
    tree = config.read(path, "base and rows")
    specs = tree.pop("rows", None)
    if not isinstance(specs, list) or not specs:
        raise InputError(
            f"{source}: rows must be a list of rows, such as [{{label: fpn, overrides: [model.neck=fpn]}}], got {specs!r}"
        )
    rows = tuple(_read_row(spec, i, source) for i, spec in enumerate(specs, start=1))
    keys = {"name": stem, "source": source, "folder": path.parent, "rows": rows}
    table = Table(**keys, **{"title": stem} | _typed(Table, tree, source, hidden=keys))
    labels = [row.label for row in rows]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise InputError(
                f"{source}: rows {labels.index(label) + 1} and {i + 1} both have the label '{label}': a label names one row"
            )
    _check_reference(table, labels)
    return table


def _read_row(spec: Any, number: int, source: str) -> Row:
    """A row from its mapping; number: from 1, names the row that has no label."""
    where = f"{source}, row {number}"
    if not isinstance(spec, Mapping):
        raise InputError(f"{where} must be a mapping with label and overrides, got {spec!r}")
    if isinstance(spec.get("label"), str):
        where = f"{source}, row '{spec['label']}'"
    row = Row(**_typed(Row, spec, where))
    if not row.label:
        raise InputError(f"{where}: label must not be empty")
    for figure in row.published:
        if figure.removeprefix(DELTA) not in PUBLISHED:
            raise unknown(f"figure in {where}: published", figure, PUBLISHED)
    if row.cited and (row.overrides or row.base):
        raise InputError(
            f"{where}: a cited row is not run, leave out {'overrides' if row.overrides else 'base'}, or cited"
        )
    if row.cited and not row.published:
        raise InputError(f"{where}: a cited row needs published figures, such as published: {{AP: 36.4}}")
    return row


def _typed(schema: Any, tree: Mapping[str, Any], where: str, hidden: Mapping[str, Any] = {}) -> dict[str, Any]:
    """A mapping as a dataclass's values, each of its type; hidden: what the file does not say."""
    hints = {key: hint for key, hint in get_type_hints(schema).items() if key not in hidden}
    for key in tree:
        if key not in hints:
            raise unknown(f"key in {where}:", key, hints)
    for one in fields(schema):
        if one.name in hints and one.default is MISSING and one.default_factory is MISSING and one.name not in tree:
            raise InputError(f"{where} has no {one.name}")
    return {key: checked(value, hints[key], f"{where}: {key}") for key, value in tree.items()}


def _check_reference(table: Table, labels: Sequence[str]) -> None:
    if table.reference is not None and table.reference not in labels:
        raise unknown(f"row in {table.source}: reference", table.reference, labels)
    if table.figure not in PUBLISHED:
        raise unknown(f"figure in {table.source}: figure", table.figure, PUBLISHED)
    for row in table.rows:
        if row.reference is not None and row.reference not in labels:
            raise unknown(f"row in {table.source}, row '{row.label}': reference", row.reference, labels)
        if table.reference is row.reference is None and any(figure.startswith(DELTA) for figure in row.published):
            raise InputError(
                f"{table.source}, row '{row.label}': a published difference needs reference: LABEL above the rows or in the row"
            )


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str], where: str) -> dict[str, Any]:
    """A resolved config with overrides over it, resolved again. Raises InputError with the row."""
    try:
        return config.parse(config.overridden(tree, overrides)).tree()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
