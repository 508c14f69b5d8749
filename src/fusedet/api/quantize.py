"""int8: calibration on images of the training split, and its price in AP on the validation split."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fusedet import evaluation
from fusedet.api.detector_evaluation import build_val_loader, evaluate_detector, require_class_names
from fusedet.config import Config
from fusedet.data.dataset import DetectionDataset
from fusedet.data.splits import read_split, take_images
from fusedet.data.tiling import count_windows
from fusedet.errors import InputError
from fusedet.evaluation.bootstrap import METRICS
from fusedet.evaluation.confidence_intervals import LEVEL
from fusedet.evaluation.results import Result
from fusedet.exporters import ExportedDetector, open_session
from fusedet.exporters.formats import save_onnx, save_openvino
from fusedet.exporters.graph import INPUTS
from fusedet.exporters.metadata import Metadata
from fusedet.exporters.quantization import (
    Inputs,
    choose_exclusions,
    quantize_onnx,
    quantize_openvino,
    rank_convolutions,
)
from fusedet.exporters.runtime import Session
from fusedet.exporters.verification import compute_similarity

CALIBRATION_IMAGES = 300
"""Images that the ranges are taken from by default."""
MAX_DROP = 0.01
"""The largest loss of AP that is accepted by default."""
SEED = 0
"""Seed of the choice of the images."""
SHARES = (0.0, 0.1, 0.2, 0.4)
"""Shares of the convolutions, the most sensitive ones, that stay in floating point, until AP is kept."""
RANKED = 4
"""Images by which the convolutions are ranked."""


@dataclass
class CalibrationData:
    """The data of int8, and what AP it has in fp32.

    Attributes:
        config: The run's config, without test-time augmentation.
        images: The images that the ranges are taken from.
        val: The images that AP is computed on.
        max_drop: The largest loss of AP that is accepted, in 0..1.
        progress: Shows how far the evaluation is, if it is a terminal.
        results: Detections of the fp32 file on `val`.
        ap: Their AP.
        ranking: The convolutions of each weight, the most sensitive first, once it is needed.
    """

    config: Config
    images: DetectionDataset
    val: DetectionDataset
    max_drop: float
    progress: Console | None = None
    results: list[Result] = field(default_factory=list)
    ap: float = 0.0
    ranking: list[list[str]] | None = None

    def describe(self) -> dict[str, Any]:
        """Return what the report says of the data."""
        return {
            "data": str(self.config.data.path),
            "images": len(self.images),
            "split": self.config.data.train,
            "seed": SEED,
            "val": str(self.config.data.val_split),
            "val_images": len(self.val),
            "max_drop": self.max_drop,
            "level": LEVEL,
            "AP": self.ap,
        }

    def evaluate_fp32(self, session: Session, metadata: Metadata) -> None:
        """Evaluate the fp32 file, to which the price of int8 is relative."""
        self.results, self.ap = self.evaluate(session, metadata)

    def evaluate(self, session: Session, metadata: Metadata) -> tuple[list[Result], float]:
        """Return the detections of a file on the validation split, and their AP."""
        detector = ExportedDetector(session, metadata)
        cpu = torch.device("cpu")
        evaluated = evaluate_detector(detector, self.config, self.val, cpu, progress=self.progress)
        return evaluated.results, float(evaluated.metrics["AP"])

    def inputs(self, metadata: Metadata) -> CalibrationInputs:
        """Return the images as inputs of the file."""
        return CalibrationInputs(self.config, self.images, metadata)


class CalibrationInputs:
    """Images as inputs of a file, read in every pass.

    Args:
        config: Says how images are resized.
        images: The images.
        metadata: Says what sizes the file takes.
    """

    def __init__(self, config: Config, images: DetectionDataset, metadata: Metadata) -> None:
        self.batch = metadata.batch or 1
        self.config, self.images = config.replace(test=config.test.replace(batch=self.batch)), images
        self.detector = ExportedDetector(lambda *_: {}, metadata)

    def __len__(self) -> int:
        return -(-sum(count_windows(self.images, self.config.test.tiles)) // self.batch)

    def __iter__(self) -> Iterator[Inputs]:
        for batch in build_val_loader(self.config, self.images, canvas=self.detector.canvas):
            for arrays in self.detector.split_batch(batch.images, batch.sizes):
                yield dict(zip(INPUTS, arrays))


def read_calibration_data(
    config: Config, names: list[str], source: str, count: int | None, max_drop: float | None, progress: Console | None
) -> CalibrationData:
    """Read the data of int8: a seeded choice of images of `data.train`, and all of `data.val`.

    Args:
        config: Its `data` names the splits.
        names: Class names of the model.
        source: The model, for messages.
        count: Images to calibrate on; None for `CALIBRATION_IMAGES`.
        max_drop: Largest accepted loss of AP, in 0..1; None for `MAX_DROP`.
        progress: Shows the progress of the validations.

    Raises:
        InputError: The data cannot be read, have other classes than the model, or the validation split has no objects.
    """
    config = config.replace(test=config.test.replace(scales=None, flip=False))
    train, val = (read_split(config.data, split) for split in (config.data.train, config.data.val_split))
    for dataset in (train, val):
        require_class_names(dataset, names, source)
    if not len(val.labels):
        raise InputError(f"{val.source} has no objects, so that the loss of AP by int8 cannot be measured")
    order = np.random.default_rng(SEED).permutation(len(train))[: count or CALIBRATION_IMAGES]
    drop = MAX_DROP if max_drop is None else max_drop
    return CalibrationData(config, take_images(train, np.sort(order), train.source), val, drop, progress)


def quantize_format(
    name: str, source: Path, folder: Path, metadata: Metadata, data: CalibrationData
) -> tuple[list[Path], dict[str, Any]]:
    """Write an int8 file whose loss of AP is at most `data.max_drop`.

    Where the loss is larger, more and more of the convolutions stay in floating point, in the order of what quantizing
    only them changes in the detections of a few images.

    Args:
        name: "onnx" or "openvino".
        source: The ONNX file in fp32.
        folder: Where the file goes.
        metadata: The description of the int8 file.
        data: The data; the fp32 file was evaluated on it.

    Returns:
        The files, and for the report: `price`, rows of the metrics with interval, and `floating_point`, the names of
        the convolutions that stay in floating point, besides those of `find_regression`.

    Raises:
        InputError: The loss is larger with all numbers of convolutions.
    """
    drop, excluded, convolutions = 0.0, list[str](), 0
    for share in SHARES:
        if share:
            data.ranking = data.ranking or _rank(source, data, metadata)
            excluded = choose_exclusions(data.ranking, share)
            convolutions = sum(map(len, data.ranking))
        files = _quantize(name, source, folder, metadata, data.inputs(metadata), excluded)
        results, ap = data.evaluate(open_session(name, files[0], metadata), metadata)
        drop = data.ap - ap
        if drop <= data.max_drop:
            price = evaluation.paired_bootstrap(data.val, data.results, results)
            return files, {"price": {metric: price[metric] for metric in METRICS}, "floating_point": excluded}
    raise InputError(
        f"{files[0].name} in int8 loses {drop:.4f} AP of {data.ap:.4f} on {data.val.source}, more than "
        f"max_drop={data.max_drop:g}, even with {len(excluded)} of {convolutions} convolutions in floating point: "
        "calibrate on more images, raise max_drop, or export fp32 or bf16; nothing was written"
    )


def _quantize(
    name: str, source: Path, folder: Path, metadata: Metadata, inputs: CalibrationInputs, excluded: list[str]
) -> list[Path]:
    if name == "openvino":
        return save_openvino(quantize_openvino(source, inputs, excluded), folder / "model.xml", metadata)
    import onnx

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        raw = Path(scratch) / "model.onnx"
        quantize_onnx(source, raw, inputs, excluded)
        save_onnx(onnx.load(raw), folder / "model.onnx", metadata)
    return [folder / "model.onnx"]


def _rank(source: Path, data: CalibrationData, metadata: Metadata) -> list[list[str]]:
    inputs = data.inputs(metadata)
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        quantized = Path(scratch) / "model.onnx"
        quantize_onnx(source, quantized, inputs, [])
        return rank_convolutions(source, quantized, list(itertools.islice(inputs, RANKED)), compute_similarity)
