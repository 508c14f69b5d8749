"""Ablation tables: rows of configs with the metrics that papers publish for them, from shipped or own YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Self, get_type_hints

from pydantic import Field, PrivateAttr, model_validator

from fusedet import config
from fusedet.api.detector_evaluation import BOX_METRICS, MASK_METRICS
from fusedet.config import Config
from fusedet.config.fields import Texts
from fusedet.config.section import Declaration, text_keys
from fusedet.config.validation import accept_sequences
from fusedet.data.synthetic import generate_dataset
from fusedet.errors import InputError, make_unknown_error, prefix_errors
from fusedet.evaluation import bootstrap
from fusedet.models.detectors import build_meta_detector

METRICS = (*BOX_METRICS, *MASK_METRICS, "VOC_AP", "VOC_AP_11_point")
"""The metrics of `fusedet val`, measured and published."""
RESAMPLED = (*bootstrap.METRICS, *(f"mask_{name}" for name in bootstrap.METRICS))
"""The metrics that have a confidence interval over images."""
DELTA = "delta_"
SYNTHETIC = {name: hint for name, hint in get_type_hints(generate_dataset).items() if name not in ("folder", "return")}
"""The arguments of a table's synthetic dataset, with their types."""


class Row(Declaration):
    """One row: a label and the differences of its config from the table's, or results that a paper cites."""

    label: str
    """The unique name of the row."""
    overrides: Texts = ()
    """Overrides "key=value" on top of the table's."""
    base: str | None = None
    """The name or file of a config that replaces the table's base."""
    reference: str | None = None
    """The label of the row to compare with, instead of the table's; its own label if it is a reference itself."""
    published: dict[str, float] = Field(default_factory=dict)
    """Metrics of the paper in percent, such as {AP: 36.4}; delta_AP and the like are differences to the reference."""
    params_M: float | None = None  # noqa: N815 - the unit
    """The published number of trainable parameters, in millions."""
    time_ms: float | None = None
    """The published inference time per image, on the paper's machine."""
    split: str | None = None
    """The split of the published metrics, as the paper names it."""
    cited: bool = False
    """Whether `published` comes from elsewhere: the row runs only with a `base`, is compared only by `reference`."""
    note: str | None = None
    """A remark for the reader of the table."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.label:
            raise InputError("label must not be empty")
        for name in self.published:
            if name.removeprefix(DELTA) not in METRICS:
                raise make_unknown_error("metric", name, METRICS, of="published")
        if self.is_only_cited and self.overrides:
            raise InputError("a cited row without a base is not run, leave out overrides, or write base: CONFIG")
        if self.cited and not self.published:
            raise InputError("a cited row needs published metrics, such as published: {AP: 36.4}")
        return self

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
                f"{table.source}, row '{self.label}' has no config: write base: CONFIG in the row or above the rows"
            )
        where = f"{table.source}, row '{self.label}'"
        with prefix_errors(where if self.base else table.source):
            tree = config.load(base, table.overrides, kind="base", folder=table.folder).tree()
        with prefix_errors(where):
            tree = config.parse(config.apply_overrides(tree, self.overrides)).tree()
        with prefix_errors(f"{' '.join(more)} does not fit {where}"):
            return config.parse(config.apply_overrides(tree, more))


class Table(Declaration):
    """Rows of configs on a common base."""

    title: str = ""
    """The title of the report; by default the file's name."""
    paper: str | None = None
    """The citation of the paper."""
    base: str | None = None
    """The name or file of the config of all rows; a file beside the table takes precedence over a shipped config."""
    overrides: Texts = ()
    """Overrides "key=value" of all rows."""
    reference: str | None = None
    """The label of the row that the others are compared with; by default the first that is not cited."""
    metric: str = "AP"
    """The metric that differences and conclusions are about: AP, AP50, mask_AP, VOC_AP, ..."""
    split: str | None = None
    """The split of the published metrics of all rows."""
    note: str | None = None
    """A remark for the reader of the table."""
    synthetic: dict[str, Any] | None = None
    """Arguments of `fusedet.data.synthetic.generate_dataset`, for the data of an ablation without data=PATH."""
    rows: Annotated[tuple[Row, ...], accept_sequences(tuple)]
    """The rows, in order."""
    _source: str = PrivateAttr("table")
    _path: Any = PrivateAttr(Path())

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, value in (self.synthetic or {}).items():
            if name not in SYNTHETIC:
                raise make_unknown_error("key", name, SYNTHETIC, of="synthetic")
            config.validate_value(value, SYNTHETIC[name], f"synthetic.{name}")
        if self.metric not in METRICS:
            raise make_unknown_error("metric", self.metric, METRICS)
        labels = [row.label for row in self.rows]
        for i, label in enumerate(labels, start=1):
            if (first := labels.index(label) + 1) < i:
                raise InputError(f"rows {first} and {i} both have the label '{label}': labels must be unique")
        if self.reference is not None and self.reference not in labels:
            raise make_unknown_error("reference", self.reference, labels)
        for row in self.rows:
            if row.reference is not None and row.reference not in labels:
                raise make_unknown_error("reference", row.reference, labels, of=f"row '{row.label}'")
            if self.reference is row.reference is None and any(name.startswith(DELTA) for name in row.published):
                raise InputError(
                    f"row '{row.label}': a published difference needs reference: LABEL, above the rows or in the row"
                )
        return self

    @property
    def source(self) -> str:
        """Name of the table in messages."""
        return self._source

    @property
    def name(self) -> str:
        """Name of the shipped table, or the file's name without suffix."""
        return Path(self._path.name).stem

    @property
    def folder(self) -> Any:
        """Folder of the file."""
        return self._path.parent

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
            with prefix_errors(f"{self.source}, row '{row.label}'"):
                build_meta_detector(options, num_classes)
        return configs


def list_tables() -> list[str]:
    """List the names of the shipped tables."""
    return config.names("ablations")


def load_table(name: str | Path) -> Table:
    """Load a shipped table or a YAML file.

    A file has `rows`, each with a `label` and a list of `overrides`, and usually a `base`. The keys are those of
    `Table` and `Row`.

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
    specs = tree.get("rows")
    if not isinstance(specs, list) or not specs:
        raise InputError(
            f"{source}: rows must be a list of rows, such as [{{label: fpn, overrides: [model.neck=fpn]}}], "
            f"got {specs!r}"
        )
    rows = [_read_row(spec, i, source) for i, spec in enumerate(specs, start=1)]
    with prefix_errors(source):
        table = Table(**text_keys({"title": stem} | tree | {"rows": rows}))
    table._source, table._path = source, path
    return table


def _read_row(spec: Any, number: int, source: str) -> Row:
    """Read a row; its number, from 1, names a row without label."""
    where = f"{source}, row {number}"
    if not isinstance(spec, Mapping):
        raise InputError(f"{where} must be a mapping with label and overrides, got {spec!r}")
    label = spec.get("label")
    with prefix_errors(f"{source}, row '{label}'" if isinstance(label, str) else where):
        return Row(**text_keys(spec))
