"""The plan of an ablation: check every row's config, data and output folder before anything is trained."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fusedet import config
from fusedet.ablation.spec import Table
from fusedet.api.detector_evaluation import has_mask_branch
from fusedet.api.predictor import pick_device
from fusedet.api.run_dir import choose_unused_name, read_fingerprints, read_json
from fusedet.api.train_inputs import check_monitor, learns_masks, open_data
from fusedet.config import Config
from fusedet.data.dataset import DetectionDataset
from fusedet.data.shape_drawing import name_classes
from fusedet.data.splits import NO_DATA, read_key, select_names
from fusedet.errors import InputError, make_unknown_error, prefix_errors
from fusedet.models.detectors import build_meta_detector

Split = tuple[DetectionDataset, DetectionDataset]
State = Literal["absent", "resumable", "failed", "finished"]
IRRELEVANT_KEYS = ("out", "device", "data.path", "data.images", "data.workers", "train.loggers")
"""Config keys that do not change what a run learns; datasets are compared by their fingerprints."""
FAILED, TIMES, MARKER, DATA = "failed.json", "time.json", "ablation.json", "data"


@dataclass(frozen=True)
class Run:
    """One run: a row with a seed.

    Attributes:
        label: Label of the row.
        config: Complete config with seed and `out`, the run directory.
        weights_from: Run directory whose weights are scored with this row's test section; None for a training.
    """

    label: str
    config: Config
    weights_from: Path | None = None

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return self.config.train.seed

    @property
    def folder(self) -> Path:
        """Run directory."""
        return Path(str(self.config.out))

    def state(self, data: Split) -> State:
        """Read the state of the run from its run directory.

        Returns:
            absent: no step was saved; resumable: it continues from its last checkpoint; failed: the training diverged;
            finished: its metrics are stored.

        Raises:
            InputError: The run directory has another config or other files, or was trained on other data.
        """
        folder, file = self.folder, self.folder / "config.yaml"
        if self.weights_from and (self.weights_from / FAILED).is_file():
            return "failed"
        if not folder.exists() or not any(folder.iterdir()):
            return "absent"
        if not file.is_file():
            raise InputError(
                f"{folder} is the run directory of row '{self.label}', but has other files: choose another out=DIR"
            )
        stored, wanted = (_flatten(options.tree()) for options in (config.load(file), self.config))
        for key in sorted(stored.keys() | wanted.keys()):
            if key not in IRRELEVANT_KEYS and stored.get(key) != wanted.get(key):
                raise InputError(
                    f"{folder} has a run with {key}={stored.get(key)}, but row '{self.label}' needs "
                    f"{key}={wanted.get(key)}: choose another out=DIR, or use the same settings"
                )
        prints = read_fingerprints(folder)
        if prints is not None and list(prints.values()) != [split.fingerprint() for split in data]:
            raise InputError(
                f"{folder} was trained on other data than {data[0].source} and {data[1].source}: choose another out=DIR"
            )
        if (folder / FAILED).is_file():
            return "failed"
        if read_json(folder / "metrics.json") is not None:
            return "finished"
        return "resumable" if (folder / "last.ckpt").is_file() else "absent"


@dataclass(frozen=True)
class Plan:
    """A table with its rows resolved.

    Attributes:
        table: The table.
        overrides: "key=value" overrides of all rows.
        configs: Config of every row that can run, by label.
        runs_of: By label, the row whose runs a row uses: the first row with an equal config.
        weights_of: By label, the row whose weights a row uses: the first row whose config is equal except for `test`.
        selected: Labels of the rows to run.
        seeds: Number of runs per row.
        out: Output directory.
        data: Training and validation split by label; empty without data.
    """

    table: Table
    overrides: tuple[str, ...]
    configs: Mapping[str, Config]
    runs_of: Mapping[str, str]
    weights_of: Mapping[str, str]
    selected: tuple[str, ...]
    seeds: int
    out: Path
    data: Mapping[str, Split]

    @property
    def classes(self) -> int:
        """Number of classes of the data, or without data of the table's synthetic dataset or of COCO."""
        return len(self.val.names) if self.data else _count_classes(self.table, self.configs)

    @property
    def val(self) -> DetectionDataset:
        """Split that all rows are scored on."""
        return next(iter(self.data.values()))[1]

    @property
    def size_bins(self) -> tuple[float, ...]:
        """Edges of the size bins that all rows are scored in; empty for a mask metric or without common bins."""
        edges = {options.test.size_bins for options in self.configs.values()}
        return () if self.table.metric.startswith("mask_") or len(edges) > 1 else edges.pop() or ()

    @property
    def baseline(self) -> str | None:
        """Label of the table's reference, or of its first row whose metrics are not cited; None if it has no config."""
        own = (row.label for row in self.table.rows if row.label in self.configs and not row.cited)
        label = self.table.reference or next(own, None)
        return label if label in self.configs else None

    def reference(self, label: str) -> str | None:
        """Return the label of the row to compare with, its own reference or the baseline; None if that is only cited.

        A row with cited metrics and without a reference is compared with itself only: it is another detector.
        """
        row = next(row for row in self.table.rows if row.label == label)
        own = label if row.cited and row.reference is None else row.reference
        return self.baseline if own is None else own if own in self.configs else None

    def runs(self, label: str) -> list[Run]:
        """List the runs of a row, one per seed."""
        row, trained = self.runs_of[label], self.weights_of[label]
        options, slugs = self.configs[row], self._slugs()
        runs = []
        for seed in range(options.train.seed, options.train.seed + self.seeds):
            folder = self.out / slugs[trained] / f"seed{seed}"
            seeded = options.replace(train=options.train.replace(seed=seed))
            if row == trained:
                runs.append(Run(row, seeded.replace(out=str(folder))))
            else:
                runs.append(Run(row, seeded.replace(out=str(folder / f"test-{slugs[row]}")), folder))
        return runs

    def selected_runs(self) -> list[list[Run]]:
        """List the distinct runs of the selected rows, row by row, each row after its reference and its weights."""
        baseline = self.runs_of.get(self.baseline or "")
        rows: dict[str, None] = {}
        for label in sorted(self.selected, key=lambda label: self.runs_of[label] != baseline):
            reference = self.reference(label)
            for name in (reference, label) if reference in self.selected else (label,):
                rows |= {self.weights_of[name]: None, self.runs_of[name]: None}
        return [self.runs(row) for row in rows]

    def states(self) -> dict[Path, State]:
        """Read the states of all runs of the table, by run directory.

        Raises:
            InputError: As `Run.state` does.
        """
        return {run.folder: run.state(self.data[label]) for label in self.configs for run in self.runs(label)}

    def _slugs(self) -> dict[str, str]:
        """Return a unique folder name per label, the same whichever rows are selected."""
        slugs: dict[str, str] = {}
        for row in self.table.rows:
            slug = re.sub(r"[^a-z0-9.]+", "_", row.label.lower()).strip("_.") or "row"
            slugs[row.label] = choose_unused_name(slug, lambda name: name in slugs.values())
        return slugs


def make_plan(
    table: Table,
    overrides: Sequence[str] = (),
    *,
    seeds: int = 3,
    rows: Iterable[str] = (),
    out: str | Path = "",
    need_data: bool = True,
    say: Callable[[str], None] = print,
) -> Plan:
    """Plan an ablation and check every row: build its model without memory and read its splits.

    Args:
        table: The table.
        overrides: "key=value" overrides of all rows, such as data=PATH.
        seeds: Number of runs per row.
        rows: Labels of the rows to run, several joined by commas; by default all rows that have a config.
        out: Output directory.
        need_data: False for a plan that is only previewed.
        say: Receives progress messages.

    Raises:
        InputError: Any row is invalid.
    """
    labels = _parse_labels(table, rows)
    resolved = {row.label: row.config(table, *overrides) for row in table.rows if not row.is_only_cited}
    if not resolved:
        raise InputError(f"{table.source}: all rows are cited from the literature, there is nothing to run")
    data: dict[str, Split] = {}
    if any(options.data.path for options in resolved.values()):
        data = _read_splits(table, resolved, say)
    elif need_data:
        raise InputError(NO_DATA)
    classes = len(next(iter(data.values()))[1].names) if data else _count_classes(table, resolved)
    configs = table.configs(*overrides, num_classes=classes)
    for label, options in configs.items():
        with prefix_errors(f"{table.source}, row '{label}'"):
            if options.train.batch == "auto":
                raise InputError(
                    "train.batch=auto may choose another number in every run, and only rows of equal batches are "
                    "comparable: set a number, such as train.batch=16"
                )
            check_monitor(options)
            if data:
                learns_masks(options, build_meta_detector(options, classes), *data[label])
            if table.metric.startswith("mask_") and not has_mask_branch(build_meta_detector(options, classes)):
                raise InputError(f"the table's metric is {table.metric}, but this row's detector predicts no masks")
        pick_device(options.device)
    runs_of = {label: next(first for first, c in configs.items() if c == own) for label, own in configs.items()}
    weights_of = {
        label: next(first for first, c in configs.items() if c.replace(test=own.test) == own)
        for label, own in configs.items()
    }
    selected = tuple(labels or resolved)
    return Plan(table, tuple(overrides), configs, runs_of, weights_of, selected, seeds, Path(out), data)


def _count_classes(table: Table, configs: Mapping[str, Config]) -> int:
    """Return the number of classes without data: those that the rows select of the synthetic dataset, or of COCO."""
    data = next(iter(configs.values())).data
    if table.synthetic is None:
        return len(data.classes) or 80
    return len(select_names(name_classes(table.synthetic.get("frequencies")), data.classes, data.rename or {}))


def _read_splits(table: Table, configs: Mapping[str, Config], say: Callable[[str], None]) -> dict[str, Split]:
    """Read each row's splits; data that several rows share is read once."""
    known: dict[tuple[Any, ...], Split] = {}
    splits = {}
    for label, options in configs.items():
        key = read_key(options.data)
        with prefix_errors(f"{table.source}, row '{label}'"):
            if options.data.path is None:
                raise InputError("it has no data: add data=PATH")
            splits[label] = known[key] if key in known else known.setdefault(key, open_data(options, say))
    first = next(iter(splits))
    common = splits[first][1]
    for label, (_, val) in splits.items():
        if val is not common and val.fingerprint() != common.fingerprint():
            raise InputError(
                f"{table.source}: row '{label}' is scored on {val.source}, but row '{first}' on {common.source}: "
                "rows are compared on the same images, use the same data.val"
            )
    return splits


def _parse_labels(table: Table, rows: Iterable[str]) -> list[str]:
    """Split texts of labels joined by commas, where labels may contain commas themselves."""
    known = {row.label: row for row in table.rows}
    labels: list[str] = []
    for text in rows:
        while text:
            starts = [label for label in known if f"{text},".startswith(f"{label},")]
            if not starts:
                raise make_unknown_error(f"row of {table.source}", text, known)
            label = max(starts, key=len)
            text = text[len(label) + 1 :]
            if known[label].is_only_cited:
                raise InputError(f"{table.source}, row '{label}' is cited from the literature: it has no config to run")
            labels.append(label)
    return list(dict.fromkeys(labels))


def _flatten(tree: Any, key: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to dotted keys; lists stay values."""
    if not isinstance(tree, Mapping) or not tree:
        return {key: tree}
    return {
        inner: value
        for name, part in tree.items()
        for inner, value in _flatten(part, f"{key}.{name}" if key else str(name)).items()
    }
