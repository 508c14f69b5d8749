"""What an ablation will run: every row's config checked, its data read, its folders looked at, before anything is trained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fusedet import config
from fusedet.ablation.spec import Table
from fusedet.api.predict import pick_device
from fusedet.api.run_dir import data_prints
from fusedet.api.train import check_monitor, learns_masks, open_data
from fusedet.api.validate import has_mask_branch
from fusedet.config import Config
from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError, unknown
from fusedet.models.detectors import build_meta_detector

Split = tuple[DetectionDataset, DetectionDataset]
State = Literal["absent", "begun", "failed", "finished"]
ELSEWHERE = ("out", "device", "data.path", "data.images", "data.workers", "train.loggers")
"""Keys of a config that do not change what a run learns; the data are compared by their fingerprints."""
FAILED, TIMES, MARKER = "failed.json", "time.json", "ablation.json"


@dataclass(frozen=True)
class Run:
    """One run: a row with a seed. config: complete, with its seed and `out`, the run's folder.

    trained: None for a training; else the folder of the one whose weights are scored anew, as this row's test section says.
    """

    label: str
    config: Config
    trained: Path | None = None

    @property
    def seed(self) -> int:
        """What everything random in the training follows from."""
        return self.config.train.seed

    @property
    def folder(self) -> Path:
        """Where the run is or will be."""
        return Path(str(self.config.out))

    def state(self, data: Split) -> State:
        """How far the run is. Raises InputError where its folder holds another config or was made on other data.

        absent: no step of it is kept; begun: it goes on from its last checkpoint; failed: it diverged.
        """
        folder, file = self.folder, self.folder / "config.yaml"
        if self.trained and (self.trained / FAILED).is_file():
            return "failed"
        if not folder.exists() or not any(folder.iterdir()):
            return "absent"
        if not file.is_file():
            raise InputError(
                f"{folder} is where the run of row '{self.label}' belongs, but holds other files: choose another out=FOLDER"
            )
        there, asked = (_flatten(one.tree()) for one in (config.load(file), self.config))
        for key in sorted(there.keys() | asked.keys()):
            if key not in ELSEWHERE and there.get(key) != asked.get(key):
                raise InputError(
                    f"{folder} holds a run with {key}={there.get(key)}, but row '{self.label}' is asked for with {key}={asked.get(key)}: "
                    "choose another out=FOLDER, or ask for the same"
                )
        prints = [split.fingerprint() for split in data]
        known = data_prints(folder)
        if known is not None and list(known.values()) != prints:
            raise InputError(
                f"{folder} was trained on other data than {data[0].source} and {data[1].source}: choose another out=FOLDER"
            )
        if (folder / FAILED).is_file():
            return "failed"
        if read_json(folder / "metrics.json") is not None:
            return "finished"
        return "begun" if (folder / "last.ckpt").is_file() else "absent"


@dataclass(frozen=True)
class Plan:
    """A table with its rows resolved.

    configs: of every row that can run, by label. owners: the row whose runs a row shares, its own label, or that of the first one with
    an equal config. trainers: the row whose weights a row is scored with, likewise, of configs that are equal but for their test
    section. chosen: the labels to run. data: training and validation split of every row with a config; empty without data.
    """

    table: Table
    overrides: tuple[str, ...]
    configs: Mapping[str, Config]
    owners: Mapping[str, str]
    trainers: Mapping[str, str]
    chosen: tuple[str, ...]
    seeds: int
    out: Path
    data: Mapping[str, Split]

    @property
    def classes(self) -> int:
        """Of the data, else COCO's."""
        return len(self.val.names) if self.data else 80

    @property
    def val(self) -> DetectionDataset:
        """The images that all rows are scored on."""
        return next(iter(self.data.values()))[1]

    @property
    def baseline(self) -> str | None:
        """The row that the others are compared with: the table's reference, else its first; None where that one is only cited."""
        label = self.table.reference or next(iter(self.configs), None)
        return label if label in self.configs else None

    def reference(self, label: str) -> str | None:
        """The row that a row is compared with: its own reference, else the baseline; None where that one is only cited."""
        own = next(row.reference for row in self.table.rows if row.label == label)
        return self.baseline if own is None else own if own in self.configs else None

    def runs(self, label: str) -> list[Run]:
        """The runs of a row, one per seed."""
        owner, trainer = self.owners[label], self.trainers[label]
        one, slugs = self.configs[owner], self._slugs()
        found = []
        for seed in range(one.train.seed, one.train.seed + self.seeds):
            folder, seeded = (
                self.out / slugs[trainer] / f"seed{seed}",
                replace(one, train=replace(one.train, seed=seed)),
            )
            if owner == trainer:
                found.append(Run(owner, replace(seeded, out=str(folder))))
            else:
                found.append(Run(owner, replace(seeded, out=str(folder / f"test-{slugs[owner]}")), folder))
        return found

    def to_run(self) -> list[list[Run]]:
        """The runs of the chosen rows, row by row, equal ones once; those that others are compared or scored with before these."""
        base = self.owners.get(self.baseline or "")
        wanted: dict[str, None] = {}
        for label in sorted(self.chosen, key=lambda label: self.owners[label] != base):
            reference = self.reference(label)
            for one in (reference, label) if reference in self.chosen else (label,):
                wanted |= {self.trainers[one]: None, self.owners[one]: None}
        return [self.runs(owner) for owner in wanted]

    def states(self) -> dict[Path, State]:
        """How far every run of the table is, by its folder. Raises InputError as `Run.state` does."""
        return {cell.folder: cell.state(self.data[label]) for label in self.configs for cell in self.runs(label)}

    def _slugs(self) -> dict[str, str]:
        """A folder's name per label, different for different labels, the same whichever rows are chosen."""
        found: dict[str, str] = {}
        for row in self.table.rows:
            slug = re.sub(r"[^a-z0-9.]+", "_", row.label.lower()).strip("_.") or "row"
            names = (slug if i == 1 else f"{slug}-{i}" for i in range(1, len(self.table.rows) + 1))
            found[row.label] = next(name for name in names if name not in found.values())
        return found


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
    """A table's plan, with every row checked: its config built without memory, its data read, both splits there and of like classes.

    overrides: over all rows, such as data=PATH. rows: labels, several joined by commas, of those to run; by default all that have a
    config. need_data=False: a plan to look at. Raises InputError, one sentence, for whatever is wrong with any of the rows.
    """
    asked = _parse_labels(table, rows)
    resolved = {row.label: row.config(table, *overrides) for row in table.rows if not row.cited}
    if not resolved:
        raise InputError(f"{table.source}: all rows are cited from the literature, there is nothing to run")
    chosen = tuple(asked or resolved)
    data: dict[str, Split] = {}
    if any(one.data.path for one in resolved.values()):
        data = _read_splits(table, resolved, say)
    elif need_data:
        raise InputError("no data: add data=PATH, a folder or file in COCO, VOC or YOLO form")
    classes = len(next(iter(data.values()))[1].names) if data else 80
    configs = table.configs(*overrides, num_classes=classes)
    for label, one in configs.items():
        try:
            check_monitor(one)
            if data:
                learns_masks(one, build_meta_detector(one, classes), *data[label])
            if table.figure.startswith("mask_") and not has_mask_branch(build_meta_detector(one, classes)):
                raise InputError(f"the table is about {table.figure}, but this row's detector finds no masks")
        except InputError as error:
            raise InputError(f"{table.source}, row '{label}': {error}") from error
        pick_device(one.device)
    owners = {label: next(first for first, other in configs.items() if other == one) for label, one in configs.items()}
    trainers = {
        label: next(first for first, other in configs.items() if replace(other, test=one.test) == one)
        for label, one in configs.items()
    }
    return Plan(table, tuple(overrides), configs, owners, trainers, chosen, seeds, Path(out), data)


def read_json(file: Path) -> Any:
    """What a file holds; None for one that is absent or was cut off."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _read_splits(table: Table, configs: Mapping[str, Config], say: Callable[[str], None]) -> dict[str, Split]:
    """Each row's splits; what several rows have in common is read once."""
    read: dict[tuple[Any, ...], Split] = {}
    found = {}
    for label, one in configs.items():
        key = (one.data.path, one.data.images, one.data.train, one.data.val)
        try:
            if one.data.path is None:
                raise InputError("it has no data: add data=PATH")
            found[label] = read[key] if key in read else read.setdefault(key, open_data(one, say))
        except InputError as error:
            raise InputError(f"{table.source}, row '{label}': {error}") from error
    first = next(iter(found))
    for label, (_, val) in found.items():
        if val is not found[first][1] and val.fingerprint() != found[first][1].fingerprint():
            raise InputError(
                f"{table.source}: row '{label}' is scored on {val.source}, but row '{first}' on {found[first][1].source}: "
                "rows are compared on the same images, set data.val alike"
            )
    return found


def _parse_labels(table: Table, rows: Iterable[str]) -> list[str]:
    """The labels in texts that join them by commas, which labels hold themselves."""
    known = {row.label: row for row in table.rows}
    found: list[str] = []
    for text in rows:
        while text:
            starts = [label for label in known if f"{text},".startswith(f"{label},")]
            if not starts:
                raise unknown(f"row of {table.source}", text, known)
            label = max(starts, key=len)
            text = text[len(label) + 1 :]
            if known[label].cited:
                raise InputError(f"{table.source}, row '{label}' is cited from the literature: it has no config to run")
            found.append(label)
    return list(dict.fromkeys(found))


def _flatten(tree: Any, key: str = "") -> dict[str, Any]:
    """A nested mapping by dotted keys; lists stay values."""
    if not isinstance(tree, Mapping) or not tree:
        return {key: tree}
    return {
        inner: value
        for name, part in tree.items()
        for inner, value in _flatten(part, f"{key}.{name}" if key else str(name)).items()
    }
