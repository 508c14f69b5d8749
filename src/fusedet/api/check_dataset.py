"""Check of a dataset before a training: the command `doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.text import Text

from fusedet.api.progress import track
from fusedet.api.results import CommandResult
from fusedet.api.settings import Settings, Source, refuse_other_keys, resolve_config, to_overrides
from fusedet.api.tables import dataset_table
from fusedet.data import validation
from fusedet.data.dataset import DetectionDataset
from fusedet.data.readers.auto import detect_format, read_dataset
from fusedet.errors import InputError

SETTABLE = ("data", "train.schedule")
"""What can be set where data are checked."""


@dataclass(frozen=True)
class DatasetCheck(CommandResult):
    """What was checked.

    Attributes:
        reports: Contents, errors and warnings by split.
        mismatches: What does not agree between the splits.
    """

    reports: dict[str, validation.DatasetReport]
    mismatches: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing would stop a training."""
        return not self.mismatches and not any(report.errors for report in self.reports.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the reports by split, `between` with the mismatches, and `ok`."""
        reports = {split: vars(report) for split, report in self.reports.items()}
        return reports | {"between": self.mismatches, "ok": self.ok}

    def __rich__(self) -> RenderableType:
        tables = [dataset_table(split, report) for split, report in self.reports.items()]
        text = [f"[red]error[/] {escape(mismatch)}" for mismatch in self.mismatches]
        text.append("[green]this data can be trained on[/]" if self.ok else "[red]this data would stop a training[/]")
        return Group(*tables, *map(Text.from_markup, text))


def check_dataset(
    *overrides: str,
    config: Source | None = None,
    read_images: bool = True,
    progress: Console | None = None,
    **settings: Unpack[Settings],
) -> DatasetCheck:
    """Check the splits that a training would use, and that they agree.

    >>> fusedet.check_dataset(data="data/coco").ok  # doctest: +SKIP

    Args:
        overrides: "key=value" texts, such as "data=PATH".
        config: A config's name, a YAML file, a run directory or a `Config`, whose `data` section is used.
        read_images: Whether every image is decoded, not only the annotations read.
        progress: Shows how many images of a split are done, if it is a terminal.
        settings: The same settings as `overrides`, by keyword.

    Returns:
        A report by split. A split that cannot be read has an error; the others are checked all the same.

    Raises:
        InputError: `data` is not given or is no dataset.
    """
    texts = refuse_other_keys(to_overrides(overrides, settings), *SETTABLE, of="this command")
    options = resolve_config(config, texts)
    if options.data.path is None:
        raise InputError("no data: write fusedet doctor data=PATH")
    path = options.data.path
    detect_format(path)
    reports: dict[str, validation.DatasetReport] = {}
    splits: dict[str, DetectionDataset] = {}
    for split in dict.fromkeys((options.data.train, options.data.val)):
        try:
            splits[split] = read_dataset(path, split, images=options.data.images, need_images=False)
        except InputError as error:
            reports[split] = validation.DatasetReport(errors=[str(error)])
            continue
        bar = partial(track, label=split, console=progress)
        reports[split] = validation.validate_split(
            splits[split], options.data.size, read_images=read_images, progress=bar
        )
    return DatasetCheck(reports, validation.compare_class_names(*splits.values()) if len(splits) == 2 else [])
