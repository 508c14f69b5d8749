"""Check of a dataset before a training: the command `doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Unpack

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from fusedet.api.progress import ShowProgress, no_progress, track
from fusedet.api.results import Result
from fusedet.api.settings import Settings, Source, resolve_config
from fusedet.api.tables import dataset_table
from fusedet.data import validation
from fusedet.data.dataset import DetectionDataset
from fusedet.data.readers.auto import detect_format
from fusedet.data.splits import read_split
from fusedet.errors import InputError


@dataclass(frozen=True)
class DatasetCheck(Result):
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
    progress: ShowProgress = no_progress,
    **settings: Unpack[Settings],
) -> DatasetCheck:
    """Check the splits that a training would use, and that they agree.

    >>> fusedet.check_dataset(data="data/coco").ok  # doctest: +SKIP

    Args:
        overrides: "key=value" texts, such as "data=PATH".
        config: A config's name, a YAML file, a run directory or a `Config`, whose `data` section is used.
        read_images: Whether every image is decoded, not only the annotations read.
        progress: Shows how many images of a split are done.
        settings: The same settings as `overrides`, by keyword.

    Returns:
        A report by split. A split that cannot be read has an error; the others are checked all the same.

    Raises:
        InputError: `data` is not given or is no dataset.
    """
    options = resolve_config(config, overrides, settings)
    if options.data.path is None:
        raise InputError("no data: write fusedet doctor data=PATH")
    path = options.data.path
    detect_format(path)
    reports: dict[str, validation.DatasetReport] = {}
    splits: dict[str, DetectionDataset] = {}
    for split in dict.fromkeys((options.data.train, options.data.val_split)):
        try:
            splits[split] = read_split(options.data, split, need_images=False)
        except InputError as error:
            reports[split] = validation.DatasetReport(errors=[str(error)])
            continue

        def wrap(items: Iterable[Any], total: int, split: str = split) -> Iterable[Any]:
            return track(progress, items, total, split)

        reports[split] = validation.validate_split(
            splits[split], options.data.size, read_images=read_images, progress=wrap
        )
    return DatasetCheck(reports, validation.compare_class_names(*splits.values()) if len(splits) == 2 else [])
