"""The doctor's round: every split that a training would use, and what must agree between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fusedet.config import Config
from fusedet.data import validation
from fusedet.data.dataset import DetectionDataset
from fusedet.data.readers.auto import detect_format, read_dataset
from fusedet.errors import InputError


def check_dataset(
    config: Config, read_images: bool, progress: Callable[[Iterable[Any], int, str], Iterable[Any]]
) -> tuple[dict[str, validation.DatasetReport], list[str]]:
    """A report by split, and what is wrong between the splits.

    progress: wraps an iterable, given its length and what it is. A split that cannot be read is an error of its own report, the
    others are looked at all the same. Raises InputError where config.data.path is no dataset at all.
    """
    path = config.data.path or ""
    detect_format(path)
    reports: dict[str, validation.DatasetReport] = {}
    splits: dict[str, DetectionDataset] = {}
    for split in dict.fromkeys((config.data.train, config.data.val)):
        try:
            splits[split] = read_dataset(path, split, images=config.data.images, need_images=False)
        except InputError as error:
            reports[split] = validation.DatasetReport(errors=[str(error)])
            continue

        def wrap(items: Iterable[Any], total: int, split: str = split) -> Iterable[Any]:
            return progress(items, total, split)

        reports[split] = validation.validate_split(splits[split], config.data.size, read=read_images, progress=wrap)
    return reports, validation.compare_class_names(*splits.values()) if len(splits) == 2 else []
