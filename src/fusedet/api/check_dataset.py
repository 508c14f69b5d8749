"""Checking a dataset before a training: both splits, and what must agree between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fusedet.config import Config
from fusedet.data.dataset import DetectionDataset
from fusedet.data.readers.auto import detect_format, read_dataset
from fusedet.data.validation import DatasetReport, compare_class_names, validate_split
from fusedet.errors import InputError


@dataclass(frozen=True)
class DatasetCheck:
    """The result of `check_dataset`.

    Attributes:
        splits: The report of each split, by its name.
        mismatches: What differs between the splits, but must not.
    """

    splits: dict[str, DatasetReport]
    mismatches: list[str]

    @property
    def passed(self) -> bool:
        """Whether a training can use the dataset."""
        return not self.mismatches and not any(report.errors for report in self.splits.values())


def check_dataset(
    config: Config,
    *,
    read_images: bool = True,
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None,
) -> DatasetCheck:
    """Check the training and validation splits of `config.data`.

    A split that cannot be read is an error in its own report; the other split is checked all the same.

    Args:
        config: The configuration; only its `data` section is used.
        read_images: Whether to decode every image.
        progress: Wraps the iterable over a split's images, given their number and the split's name.

    Raises:
        InputError: `config.data.path` is no dataset in a known format.
    """
    path = config.data.path or ""
    detect_format(path)
    reports: dict[str, DatasetReport] = {}
    datasets: list[DetectionDataset] = []
    for split in dict.fromkeys((config.data.train, config.data.val)):
        try:
            dataset = read_dataset(path, split, images=config.data.images, need_images=False)
        except InputError as error:
            reports[split] = DatasetReport(errors=[str(error)])
            continue
        datasets.append(dataset)

        def wrap(items: Iterable[Any], total: int, split: str = split) -> Iterable[Any]:
            return progress(items, total, split) if progress else items

        reports[split] = validate_split(dataset, config.data.size, read_images=read_images, progress=wrap)
    return DatasetCheck(reports, compare_class_names(*datasets) if len(datasets) == 2 else [])
