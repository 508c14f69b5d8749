"""Ablation tables: rows of configs with the metrics that papers publish for them, from shipped or own YAML files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

from fusedet import config
from fusedet.api.validate import BOX_METRICS, MASK_METRICS
from fusedet.config import Config
from fusedet.data.synthetic import generate_dataset
from fusedet.errors import InputError, unknown
from fusedet.evaluation import bootstrap
from fusedet.models.detectors import build_meta_detector

METRICS = (*BOX_METRICS, *MASK_METRICS, "VOC_AP", "VOC_AP_11_point")
"""The metrics of `fusedet val`, measured and published."""
RESAMPLED = (*bootstrap.METRICS, *(f"mask_{name}" for name in bootstrap.METRICS))
"""The metrics that have a confidence interval over images."""
DELTA = "delta_"


@dataclass(frozen=True)
class Row:
    """One row: a label and the differences of its config from the table's, or results that a paper cites.

    Attributes:
        label: Unique name of the row.
        overrides: "key=value" overrides on top of the table's.
        base: Name or file of a config that replaces the table's base.
        reference: Label of the row to compare with, instead of the table's; its own label if it is a reference itself.
        published: Metrics of the paper in percent, by the names of `METRICS`, or "delta_AP" and the like for the
            difference to the reference row.
        params_M: Published number of trainable parameters, in millions.
        time_ms: Published inference time per image, on the paper's machine.
        split: Split of the published metrics, as the paper names it.
        cited: Whether the published metrics are cited from the literature. Without a base the row is only shown; with
            one it is run like the others, and compared with another row only if `reference` names it.
        note: Remark for the reader of the table.
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

    @property
    def is_only_cited(self) -> bool:
        """Whether the row is only shown: its metrics are cited, and it has no config."""
        return self.cited and self.base is None

    def config(self, table: Table, *more: str) -> Config:
        """Resolve the row's config: base, the table's overrides, its own, then `more`, each on top of the one before.

        A schedule is applied first within its layer, so that a schedule in `more` replaces the table's epochs.

        Args:
            table: Table of the row.
            more: Further "key=value" overrides.

        Raises:
            InputError: The row is only cited, or the config refuses a value; the message names file and row.
        """
        if self.is_only_cited:
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
            tree = config.load(base, table.overrides, kind="base", folder=table.folder).tree()
        except InputError as error:
            raise InputError(f"{where if self.base else table.source}: {error}") from error
        tree = _apply_overrides(tree, self.overrides, where)
        return config.parse(_apply_overrides(tree, more, f"{' '.join(more)} does not fit {where}"))


@dataclass(frozen=True)
class Table:
    """Rows of configs on a common base.

    Attributes:
        name: Name of the shipped table, or the file's name without suffix.
        source: Name of the table in messages.
        folder: Folder of the file; a base in this folder takes precedence over a shipped one.
        rows: The rows, in order.
        title: Title of the report; by default the name.
        paper: Citation of the paper.
        base: Name or file of the config of all rows.
        overrides: "key=value" overrides of all rows.
        reference: Label of the row that the others are compared with.
        metric: Metric that differences and conclusions are about, one of `METRICS`.
        split: Split of the published metrics of all rows.
        note: Remark for the reader of the table.
        synthetic: Arguments of `data.synthetic.generate_dataset`, for the data of an ablation without data=PATH.
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
    metric: str = "AP"
    split: str | None = None
    note: str | None = None
    synthetic: Mapping[str, Any] | None = None

    @property
    def content(self) -> str:
        """Fingerprint of what the rows run: unchanged when the file is moved or renamed, or when its texts change."""
        rows = [(row.label, row.base, row.overrides, row.is_only_cited) for row in self.rows]
        return sha256(repr((self.base, self.overrides, rows)).encode()).hexdigest()[:16]

    def configs(self, *more: str, num_classes: int = 80) -> dict[str, Config]:
        """Resolve the configs of all rows that are not only cited, and build each distinct model without memory.

        Errors in any row are reported before the first row runs. Rows may be equal: the papers' tables repeat some of
        them under another label.

        Args:
            more: Further "key=value" overrides.
            num_classes: Number of classes of the models.

        Returns:
            The configs by label.

        Raises:
            InputError: A row's config or model is invalid; the message names file and row.
        """
        configs: dict[str, Config] = {}
        built = set()
        for row in self.rows:
            if row.is_only_cited:
                continue
            configs[row.label] = options = row.config(self, *more)
            if (key := repr(options.model)) in built:
                continue
            built.add(key)
            try:
                build_meta_detector(options, num_classes)
            except InputError as error:
                raise InputError(f"{self.source}, row '{row.label}': {error}") from error
        return configs


def list_tables() -> list[str]:
    """List the names of the shipped tables."""
    return config.names("ablations")


def load_table(name: str | Path) -> Table:
    """Load a shipped table or a YAML file.

    A file has `rows`, each with a `label` and a list of `overrides`, and usually a `base`. The keys are those of `Row`
    and of `Table`, except name, source and folder.

    Args:
        name: Name of a shipped table, or path of a YAML file.

    Raises:
        InputError: The table or a key is unknown (the message offers the nearest name), a value has the wrong type,
            there are no rows, or labels are missing or not unique.
    """
    path = config.find_file(name, "ablations", "ablation table")
    stem = Path(path.name).stem
    source = stem if str(name) == stem else str(path)
    tree = config.read_yaml(path, "base and rows")
    specs = tree.pop("rows", None)
    if not isinstance(specs, list) or not specs:
        raise InputError(
            f"{source}: rows must be a list of rows, such as [{{label: fpn, overrides: [model.neck=fpn]}}], "
            f"got {specs!r}"
        )
    rows = tuple(_read_row(spec, i, source) for i, spec in enumerate(specs, start=1))
    keys = {"name": stem, "source": source, "folder": path.parent, "rows": rows}
    table = Table(**keys, **{"title": stem} | _typed(Table, tree, source, hidden=keys))
    arguments = signature(generate_dataset).parameters
    for name in table.synthetic or ():
        if name not in arguments or name == "folder":
            raise unknown("key", name, [key for key in arguments if key != "folder"], of=f"synthetic in {source}")
    labels = [row.label for row in rows]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise InputError(
                f"{source}: rows {labels.index(label) + 1} and {i + 1} both have the label '{label}': "
                "labels must be unique"
            )
    _check_reference(table, labels)
    return table


def _read_row(spec: Any, number: int, source: str) -> Row:
    """Read a row; its number, from 1, names a row without label."""
    where = f"{source}, row {number}"
    if not isinstance(spec, Mapping):
        raise InputError(f"{where} must be a mapping with label and overrides, got {spec!r}")
    if isinstance(spec.get("label"), str):
        where = f"{source}, row '{spec['label']}'"
    row = Row(**_typed(Row, spec, where))
    if not row.label:
        raise InputError(f"{where}: label must not be empty")
    for name in row.published:
        if name.removeprefix(DELTA) not in METRICS:
            raise unknown("metric", name, METRICS, of=f"published in {where}")
    if row.is_only_cited and row.overrides:
        raise InputError(f"{where}: a cited row without a base is not run, leave out overrides, or write base: MODEL")
    if row.cited and not row.published:
        raise InputError(f"{where}: a cited row needs published metrics, such as published: {{AP: 36.4}}")
    return row


def _typed(schema: Any, tree: Mapping[str, Any], where: str, hidden: Iterable[str] = ()) -> dict[str, Any]:
    """Check a mapping against the types of a dataclass; `hidden` fields must not be in the file."""
    hints = {key: hint for key, hint in get_type_hints(schema).items() if key not in hidden}
    for key in tree:
        if key not in hints:
            raise unknown("key", key, hints, of=where)
    for entry in fields(schema):
        is_required = entry.name in hints and entry.default is MISSING and entry.default_factory is MISSING
        if is_required and entry.name not in tree:
            raise InputError(f"{where} has no {entry.name}")
    return {key: config.validate_value(value, hints[key], f"{where}: {key}") for key, value in tree.items()}


def _check_reference(table: Table, labels: Sequence[str]) -> None:
    if table.reference is not None and table.reference not in labels:
        raise unknown("reference", table.reference, labels, of=table.source)
    if table.metric not in METRICS:
        raise unknown("metric", table.metric, METRICS, of=table.source)
    for row in table.rows:
        if row.reference is not None and row.reference not in labels:
            raise unknown("reference", row.reference, labels, of=f"{table.source}, row '{row.label}'")
        if table.reference is row.reference is None and any(name.startswith(DELTA) for name in row.published):
            raise InputError(
                f"{table.source}, row '{row.label}': a published difference needs reference: LABEL, above the rows or "
                "in the row"
            )


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str], where: str) -> dict[str, Any]:
    """Apply overrides to a resolved config and resolve it again; errors name the row."""
    try:
        return config.parse(config.apply_overrides(tree, overrides)).tree()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
