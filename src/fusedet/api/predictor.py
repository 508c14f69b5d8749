"""Prediction in memory: a checkpoint becomes a model that takes images of any kind."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from fusedet.api import exported
from fusedet.api.detection import AnyDetector, build_tta_transforms, check_tile_size, detect_images, get_strides
from fusedet.api.load_model import rebuild_detector, weights_file
from fusedet.api.prediction import Prediction as Prediction
from fusedet.api.settings import Sections, refuse_other_keys, resolve_config, to_overrides
from fusedet.api.video_stream import predict_frames
from fusedet.config import Config
from fusedet.data.channel_decoding import is_array_file, read_channels
from fusedet.data.collate import collate_tta_samples, make_samples
from fusedet.data.dataset import ImageAnnotations
from fusedet.data.image_decoding import to_tensor
from fusedet.data.large_images import LargeImage, crop_image, open_large_image
from fusedet.data.tiling import list_windows
from fusedet.data.video_parts import Part
from fusedet.data.videos import Frame, Video
from fusedet.errors import InputError
from fusedet.exporters import ExportedDetector
from fusedet.models.detectors import prepare_for_inference, selection_options
from fusedet.types import Batch

Precision = Literal["fp32", "bf16"]
DetectorT = TypeVar("DetectorT", bound=AnyDetector)
SETTABLE = ("test", "data.size", "data.antialias", "data.range")
"""What can be set for a trained detector; all else follows from its weights."""


class Predictor:
    """A trained detector that takes images; `fusedet.load` returns it.

    Args:
        detector: Ready for inference: in eval mode, with its thresholds (`prepare_detector`), or exported.
        config: The config of the run.
        names: Class names of the training data.
        category_ids: Category ids of the training data.
        source: The run directory or file that the detector comes from.

    Attributes:
        names: (K,) class names of the training data.
        category_ids: (K,) category ids of the training data.
        config: The config of the run, with the settings of `load`.
        detector: The detector, or the exported model.
        source: The file of the weights or of the exported model.
        transforms: The resizing of an image, and those of the further copies of test-time augmentation.

    Raises:
        InputError: `test.tiles.size` is below the largest stride of the detector.
    """

    def __init__(
        self,
        detector: AnyDetector,
        config: Config,
        names: Sequence[str],
        category_ids: Sequence[int],
        source: Path,
    ) -> None:
        self.detector, self.config, self.source = detector, config, source
        self.names, self.category_ids = tuple(names), tuple(category_ids)
        self.transforms = build_tta_transforms(config, self.canvas)
        check_tile_size("test.tiles.size", config.test.tiles.size, get_strides(detector))

    @property
    def device(self) -> torch.device:
        """The device of the weights; an exported model runs on the CPU."""
        if isinstance(self.detector, ExportedDetector):
            return self.detector.device
        return self.detector.backbone.scale.device

    @property
    def categories(self) -> list[dict[str, Any]]:
        """Id and name of each class, as COCO lists them."""
        return [{"id": number, "name": name} for number, name in zip(self.category_ids, self.names)]

    @property
    def canvas(self) -> tuple[int, int] | None:
        """Height and width that an image must fit, of an exported model of fixed size."""
        return self.detector.canvas if isinstance(self.detector, ExportedDetector) else None

    def predict(self, source: Any, batch: int = 1) -> Prediction | list[Prediction]:
        """Predict an image, or each image of a list, `batch` of them at once.

        Args:
            source: A path, bytes of a file, a PIL image, an RGB array (H, W, 3) or (H, W) of uint8, or a tensor
                (3, H, W) of uint8 or of floats in 0..1; or a list of these.
            batch: Images at once; with `test.tiles`, tiles at once.

        Raises:
            InputError: An image cannot be read.
        """
        if isinstance(source, (list, tuple)):
            return list(self.stream(source, batch))
        return next(self.stream([source], 1))

    @overload
    def stream(
        self,
        sources: str | Path,
        batch: int = 1,
        *,
        every: int = 1,
        start: float | str = 0,
        end: float | str | None = None,
        track: float | None = None,
    ) -> Iterator[tuple[Frame, Prediction]]: ...

    @overload
    def stream(self, sources: Iterable[Any], batch: int = 1) -> Iterator[Prediction]: ...

    def stream(self, sources: Any, batch: int = 1, **options: Any) -> Iterator[Any]:
        """Yield the predictions of any number of images, or of the frames of a video, in their order.

        >>> for frame, detections in model.stream("video.mp4", every=5):  # doctest: +SKIP
        ...     print(frame.index, float(frame.time), detections.boxes)

        Args:
            sources: Images as `predict` takes them; or a video file, the number of a camera ("0") or an address such as
                "rtsp://...", whose predictions come in pairs with a `Frame`: `index`, `time` in seconds, `image`.
            batch: Images at once; with `test.tiles`, tiles at once.
            options: Of a video. `every`: of each `every` frames, the first one is predicted. `start`, `end`: the part
                of the video, in seconds or as "1:30". `track`: the least score of a detection that starts a track
                (ByteTrack), by default nothing is tracked.

        Raises:
            InputError: An image or video cannot be read; what comes before it is predicted.
        """
        if not isinstance(sources, (str, Path)):
            return self._stream_images(sources, batch)
        return self._stream_video(sources, batch, **options)

    def _stream_video(
        self,
        source: str | Path,
        batch: int,
        every: int = 1,
        start: float | str = 0,
        end: float | str | None = None,
        track: float | None = None,
    ) -> Iterator[tuple[Frame, Prediction]]:
        part = Part.parse(every, start, end)
        with Video(source) as video:
            yield from predict_frames(video, self.predict_batch, part, batch, track)

    def _stream_images(self, sources: Iterable[Any], batch: int) -> Iterator[Prediction]:
        group: list[tuple[Tensor | LargeImage, Path | None]] = []
        for source in sources:
            try:
                group.append((self.open_image(source), Path(source) if isinstance(source, (str, Path)) else None))
            except InputError:
                yield from self.predict_batch(group, batch)  # the earlier images are not lost
                raise
            if len(group) == batch:
                yield from self.predict_batch(group, batch)
                group = []
        yield from self.predict_batch(group, batch)

    def open_image(self, source: Any) -> Tensor | LargeImage:
        """Decode an image; with `test.tiles`, a file too large for memory is read tile by tile."""
        is_path = isinstance(source, (str, os.PathLike))
        if is_path and self.config.test.tiles.size is not None:
            data = self.config.data
            if (large := open_large_image(Path(source), data.channels, data.range)) is not None:
                return large
        return self.decode_image(source)

    def decode_image(self, source: Any) -> Tensor:
        """Decode an image as `predict` takes it to uint8 (C, H, W).

        Raises:
            InputError: A file cannot be read, or an array or tensor has another shape or type than `predict` takes.
        """
        channels, value_range = self.config.data.channels, self.config.data.range
        is_file = isinstance(source, (str, os.PathLike, bytes))
        if channels == 3 and not (is_file and is_array_file(source)):
            return to_tensor(source, value_range)
        if is_file:
            return read_channels(source, channels, value_range)
        image = torch.from_numpy(source).permute(2, 0, 1) if isinstance(source, np.ndarray) else source
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != channels:
            raise InputError(
                f"an image of {channels} channels must be a path, a numpy array (H, W, {channels}) or a tensor "
                f"({channels}, H, W) of uint8, got {type(source).__name__}"
            )
        return image

    def preprocess(self, images: Sequence[Tensor | LargeImage]) -> Batch:
        """Return images (C, H, W) uint8 preprocessed for the network, with their augmented copies of TTA."""
        return collate_tta_samples(
            [make_samples(image, _empty(image), self.transforms) for image in images], self.transforms[1:]
        )

    def iterate_tiles(self, images: Iterable[Tensor | LargeImage], batch: int) -> Iterator[Batch]:
        """Cut images into the tiles of `test.tiles` and yield these in batches, preprocessed as by `preprocess`."""
        windows = (
            (image, window, is_last)
            for image in images
            for own in [list_windows(image.shape[1], image.shape[2], self.config.test.tiles)]
            for window, is_last in zip(own.tolist(), [False] * (len(own) - 1) + [True])
        )
        while group := list(islice(windows, batch)):
            tiles = self.preprocess([crop_image(image, tuple(window)) for image, window, _ in group])
            corners = torch.tensor([[*window[:2], *image.shape[1:]] for image, window, _ in group])
            yield replace(tiles, windows=corners, is_last=tuple(is_last for *_, is_last in group))

    def predict_batch(
        self, group: Sequence[tuple[Tensor | LargeImage, Path | None]], batch: int | None = None
    ) -> Iterator[Prediction]:
        """Yield the predictions of images (3, H, W) uint8, given with their paths, computed in one batch.

        With `test.tiles`, `batch` tiles are computed at once, by default as many as there are images.
        """
        if not group:
            return
        images, tiles = [image for image, _ in group], self.config.test.tiles
        batches = [self.preprocess(images)] if tiles.size is None else self.iterate_tiles(images, batch or len(images))
        detected = detect_images(self.detector, batches, self.device, tiles.ios)
        for (_, detections), (image, path) in zip(detected, group):
            yield Prediction(
                **vars(detections), image=image, names=self.names, category_ids=self.category_ids, path=path
            )


def load(
    path: str | Path,
    *overrides: str,
    device: str = "auto",
    precision: Precision = "fp32",
    which: Literal["best", "last"] = "best",
    trust: bool = False,
    **settings: Unpack[Sections],
) -> Predictor:
    """Load a trained detector, ready to predict.

    >>> fusedet.load("runs/a", test={"score": 0.3}).predict("street.jpg")  # doctest: +SKIP

    Args:
        path: A run directory (its best weights, or the last where there are no best), best.safetensors or last.ckpt;
            a name of published weights (`fusedet.list_weights`), which are fetched once; or a directory of
            `fusedet.export`, or one of its files, which then runs in its own runtime on the CPU.
        overrides: "key=value" texts for the run's config; what follows from the weights (all but `SETTABLE`) stays.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: "fp32" or "bf16".
        which: Which weights of a run directory.
        trust: Whether the checkpoint's config may name classes of other packages, whose code then runs.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: The file is not a checkpoint, is cut short, or holds code.
    """
    if (model := exported.load_exported(path, trust)) is not None:
        texts = refuse_other_keys(to_overrides(overrides, settings), "test.batch", "test.tiles", of="an exported model")
        exported.check_device(device)
        if precision != "fp32":
            raise InputError(f"precision={precision}: an exported model has its own precision, leave it out")
        return Predictor(model.detector, resolve_config(model.config, texts), *model[2:])
    file = weights_file(path, which)
    detector, config, names, category_ids = rebuild_detector(file, trust)
    texts = refuse_other_keys(to_overrides(overrides, settings), *SETTABLE)
    config = resolve_config(config, texts)
    ready = prepare_detector(detector.to(pick_device(device)), config, precision, names)
    return Predictor(ready, config, names, category_ids, file)


def pick_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is a GPU if this machine has one.

    Raises:
        InputError: This machine does not have the device.
    """
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise InputError(f"device={name} is not a device: write auto, cpu, cuda, cuda:1 or mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise InputError(f"device={name} is not there ({reason}): use device=cpu or device=auto") from error
    return device


def prepare_detector(
    detector: DetectorT, config: Config, precision: Precision = "fp32", names: Sequence[str] = ()
) -> DetectorT:
    """Return the detector prepared for inference, with the thresholds of `config.test`, which may name classes.

    An exported model stays as it is: its thresholds are part of the file.

    Args:
        detector: The detector.
        config: Its `test` has the thresholds.
        precision: Of the weights and feature maps.
        names: Class names, for thresholds by class.
    """
    if isinstance(detector, ExportedDetector):
        return detector
    ready = prepare_for_inference(detector, precision)
    ready.selection = selection_options(config.test, names)
    return ready


def _empty(image: Tensor | LargeImage) -> ImageAnnotations:
    none = np.zeros(0)
    height, width = image.shape[1:]
    flags = none.astype(bool)
    return ImageAnnotations(0, Path(), height, width, np.zeros((0, 4)), none.astype(int), flags, none, [], flags)
