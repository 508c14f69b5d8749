"""Check of a dataset before a training: the command `doctor`."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.text import Text

from fusedet.api.dataset_page import write_dataset_page
from fusedet.api.progress import track
from fusedet.api.results import CommandResult
from fusedet.api.settings import Settings, Source, refuse_other_keys, resolve_config, to_overrides
from fusedet.api.tables import dataset_table
from fusedet.config import Data
from fusedet.data import validation
from fusedet.data.dataset import DetectionDataset
from fusedet.data.findings import Finding, summarize_findings
from fusedet.data.image_files import is_image_name, is_unread_image_name, list_files
from fusedet.data.readers.auto import detect_format, list_splits, read_dataset
from fusedet.data.split_checks import compare_splits
from fusedet.data.splits import read_split
from fusedet.errors import InputError

SETTABLE = ("data", "train.schedule", "test.max_det", "test.tiles")
"""What can be set where data are checked."""
MOST_LINES = 10
"""Lines of the summary."""


@dataclass(frozen=True)
class DatasetCheck(CommandResult):
    """What was checked.

    Attributes:
        reports: Contents, errors and warnings by split.
        between: What does not agree between the splits, the images that are in both, and those that are in none.
        splits: The splits that could be read.
    """

    reports: dict[str, validation.DatasetReport]
    between: list[Finding]
    splits: dict[str, DetectionDataset] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        """Whether nothing would stop a training."""
        findings = [*self.between, *(finding for report in self.reports.values() for finding in report.findings)]
        return not any(finding.severity == "error" for finding in findings)

    def summarize(self) -> list[Finding]:
        """Return at most `MOST_LINES` findings, the worst first, those of one kind as one."""
        return summarize_findings({split: r.findings for split, r in self.reports.items()}, self.between, MOST_LINES)

    def to_dict(self) -> dict[str, Any]:
        """Return the reports by split, what is `between` them, the `summary`, and `ok`."""
        reports: dict[str, Any] = {split: report.to_dict() for split, report in self.reports.items()}
        between = [finding.message for finding in self.between]
        return reports | {"between": between, "summary": [vars(f) for f in self.summarize()], "ok": self.ok}

    def __rich__(self) -> RenderableType:
        tables = [dataset_table(split, report) for split, report in self.reports.items()]
        text = [_mark(finding, finding.message) for finding in self.between]
        if summary := self.summarize():
            text.append("[bold]summary[/], the worst first")
            text += [f"  {_mark(finding, finding.message)}" for finding in summary]
        text.append("[green]this data can be trained on[/]" if self.ok else "[red]this data would stop a training[/]")
        return Group(*tables, *map(Text.from_markup, text))


def _mark(finding: Finding, text: str) -> str:
    color = "red" if finding.severity == "error" else "yellow"
    return f"[{color}]{finding.severity}[/] {escape(text)}"


def check_dataset(
    *overrides: str,
    config: Source | None = None,
    read_images: bool = True,
    report: str | Path | None = None,
    progress: Console | None = None,
    **settings: Unpack[Settings],
) -> DatasetCheck:
    """Check the splits that a training would use, and that they agree.

    >>> fusedet.check_dataset(data="data/coco").ok  # doctest: +SKIP

    Args:
        overrides: "key=value" texts, such as "data=PATH".
        config: A config's name, a YAML file, a run directory or a `Config`, whose `data` section is used.
        read_images: Whether every image is decoded, not only the annotations read.
        report: An HTML file to write: histograms of classes and sizes, the smallest and largest objects, suspects with
            thumbnails.
        progress: Shows how many images of a split are done, if it is a terminal.
        settings: The same settings as `overrides`, by keyword.

    Returns:
        A report by split. A split that cannot be read has an error; the others are checked all the same.

    Raises:
        InputError: `data` is not given or is no dataset, or `report` exists or does not end in .html.
        StorageError: `report` cannot be written.
    """
    texts = refuse_other_keys(to_overrides(overrides, settings), *SETTABLE, of="this command")
    options = resolve_config(config, texts)
    if options.data.path is None:
        raise InputError("no data: write fusedet doctor data=PATH")
    if report is not None and Path(report).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{report} must end in .html")
    if report is not None and Path(report).exists():
        raise InputError(f"{report} exists: nothing is overwritten, choose another file")
    detect_format(options.data.path)
    reports: dict[str, validation.DatasetReport] = {}
    splits: dict[str, DetectionDataset] = {}
    for split in dict.fromkeys((options.data.train, options.data.val_split)):
        try:
            splits[split] = read_split(options.data, split, need_images=False)
        except InputError as error:
            finding = Finding("error", str(error), "splits that cannot be read", 1, options.data.path, str(error))
            reports[split] = validation.DatasetReport([finding])
            continue
        bar = partial(track, label=split, console=progress)
        reports[split] = validation.validate_split(
            splits[split],
            options.data.size,
            read_images=read_images,
            progress=bar,
            max_det=options.test.max_det,
            for_training=split == options.data.train,
            tile=(options.data.tiles if split == options.data.train else options.test.tiles).size,
        )
    between = _find_unlisted_files(options.data, splits)
    if len(splits) == 2:
        train, val = splits
        between = [*compare_splits(splits[train], splits[val], reports[train].prints, reports[val].prints), *between]
    elif options.data.train == options.data.val_split and splits:
        kind, advice = "one split to train and to validate on", "choose another split as data.val"
        message = f"data.train and data.val are both '{options.data.train}', so that metrics are too high"
        count, example = len(splits[options.data.train]), splits[options.data.train].source
        between.append(Finding("warning", message, kind, count, example, advice))
    result = DatasetCheck(reports, between, splits)
    if report is not None:
        Path(report).parent.mkdir(parents=True, exist_ok=True)
        write_dataset_page(
            Path(report),
            f"Dataset {options.data.path}",
            ok=result.ok,
            reports=reports,
            between=between,
            splits=splits,
            summary=result.summarize(),
        )
    return result


def _find_unlisted_files(data: Data, splits: Mapping[str, DetectionDataset]) -> list[Finding]:
    """Find the files that no split lists: images beside COCO's, annotations of VOC; YOLO's reader counts its own."""
    formats = {dataset.dataset_format for dataset in splits.values()}
    if formats == {"coco"}:
        folders = {os.path.dirname(dataset.path(i)) for dataset in splits.values() for i in range(len(dataset))}
        present = {
            os.path.join(folder, entry.name)
            for folder in map(os.path.normpath, folders)
            if os.path.isdir(folder)
            for entry in os.scandir(folder)
            if is_image_name(entry.name) or is_unread_image_name(entry.name)
        }
        kind, advice = "images in the data folder that no json lists", "add them to a json if they show objects"
    elif formats == {"voc"} and any((Path(data.path or "") / "ImageSets" / "Main").glob("[!.]*.txt")):
        present = {os.path.normpath(file) for file in list_files(Path(data.path or "") / "Annotations")}
        present = {file for file in present if file.endswith(".xml")}
        kind, advice = "annotation files that no list names", "add their names to a list in ImageSets/Main"
    else:
        return []

    def list_listed(dataset: DetectionDataset) -> set[str]:
        paths = {os.path.normpath(dataset.path(i)) for i in range(len(dataset))}
        if formats == {"coco"}:
            return paths
        root = os.path.normpath(data.path or "")
        names = (os.path.splitext(os.path.relpath(path, os.path.join(root, "JPEGImages")))[0] for path in paths)
        return {os.path.join(root, "Annotations", f"{name}.xml") for name in names}

    unlisted = present.difference(*map(list_listed, splits.values()))
    for split in list_splits(data.path or "") if unlisted else ():
        if split not in splits or isinstance(data.val, float):
            with suppress(InputError):
                unlisted -= list_listed(read_dataset(data.path or "", split, images=data.images, need_images=False))
    if not unlisted:
        return []
    first = min(unlisted)
    return [Finding("warning", f"{kind}: {len(unlisted)}, first {first}", kind, len(unlisted), first, advice)]
