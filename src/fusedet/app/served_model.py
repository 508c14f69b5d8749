"""The models behind the page: their names for the reader, and their detections in uploaded images."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fusedet.api.predictor import SETTABLE, Prediction, Predictor, load
from fusedet.api.run_dir import choose_unused_name
from fusedet.api.settings import refuse_other_keys, split_overrides
from fusedet.config.schema import PredictionTiles
from fusedet.data.tiling import list_windows
from fusedet.errors import InputError, make_unknown_error
from fusedet.exporters import ExportedDetector, find_export
from fusedet.interop.published_weights import is_published_name

LOWEST_SCORE = 0.01
"""The lowest score of the detections that the page receives and filters, unless `test.score` sets another one."""
MAX_TILES = 400
"""Most windows of one image: each is one pass through the network, while all other requests wait."""


@dataclass(frozen=True)
class ServedModel:
    """A model with its name on the page.

    Attributes:
        name: Name of the run, of the published weights, or of the run that an exported file is from; never a path.
        predictor: The loaded model.
        lowest: The lowest score of its detections.
    """

    name: str
    predictor: Predictor
    lowest: float

    @property
    def is_exported(self) -> bool:
        """Whether the model is an exported file, whose layers cannot be seen."""
        return isinstance(self.predictor.detector, ExportedDetector)

    def decode(self, content: bytes) -> Tensor:
        """Decode the bytes of an image file, uint8 (C, H, W).

        Raises:
            InputError: They are no image, or one of too many pixels.
        """
        return self.predictor.decode_image(content)

    def detect(self, content: bytes, tiles: PredictionTiles) -> tuple[Prediction, dict[str, float]]:
        """Detect instances in the bytes of an image file.

        Returns:
            The detections of at least `lowest`, and the seconds of "decode" and "detect".

        Raises:
            InputError: The image cannot be decoded, or the tiles do not fit the model or are too many.
        """
        predictor = with_tiles(self.predictor, tiles)
        start = time.perf_counter()
        image = predictor.decode_image(content)
        decoded = time.perf_counter()
        count = len(list_windows(image.shape[1], image.shape[2], tiles))
        if count > MAX_TILES:
            raise InputError(
                f"tiles of {tiles.size} pixels make {count} windows of this image, more than {MAX_TILES}: take larger "
                "tiles"
            )
        (prediction,) = predictor.predict_batch([(image, None)], predictor.config.test.batch or 1)
        return prediction, {"decode": decoded - start, "detect": time.perf_counter() - decoded}


def with_tiles(predictor: Predictor, tiles: PredictionTiles) -> Predictor:
    """Return a predictor with the same weights and other `test.tiles`.

    Raises:
        InputError: The tiles are smaller than the largest stride.
    """
    config = predictor.config
    own = config.replace(test=config.test.replace(tiles=tiles))
    return Predictor(predictor.detector, own, predictor.names, predictor.category_ids, predictor.source)


def load_models(sources: Sequence[str | Path], overrides: Sequence[str], trust: bool = False) -> dict[str, ServedModel]:
    """Load models by their names on the page.

    Args:
        sources: Run directories, checkpoints, names of published weights or exported models.
        overrides: "key=value" texts for `api.predictor.SETTABLE` and `device`.
        trust: As `fusedet.load` takes it.

    Raises:
        InputError: As `fusedet.load`.
    """
    texts = refuse_other_keys(overrides, *SETTABLE, "device")
    options, of_model = split_overrides(texts, "device")
    has_score = any(text.partition("=")[0].startswith("test.score") for text in of_model)
    models: dict[str, ServedModel] = {}
    for source in sources:
        own = of_model if has_score or find_export(source) else [f"test.score={LOWEST_SCORE}", *of_model]
        predictor = load(source, *own, device=options.device, trust=trust)
        name = choose_unused_name(_name_model(source, predictor), models.__contains__, " #")
        models[name] = ServedModel(name, predictor, _get_lowest_score(predictor))
    return models


def choose_model(models: Mapping[str, ServedModel], name: str | None) -> ServedModel:
    """Return the model of a name, the first one without a name.

    Raises:
        InputError: The name is unknown.
    """
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise make_unknown_error("model", name, models)
    return models[name]


def _name_model(source: str | Path, predictor: Predictor) -> str:
    if isinstance(predictor.detector, ExportedDetector):
        kinds = {".onnx": "ONNX", ".xml": "OpenVINO"}
        return f"{predictor.detector.metadata.name} ({kinds.get(predictor.source.suffix, 'torch.export')})"
    return str(source) if is_published_name(source) else Path(source).resolve().name


def _get_lowest_score(predictor: Predictor) -> float:
    if isinstance(predictor.detector, ExportedDetector):
        score = predictor.detector.metadata.thresholds.score
    else:
        score = predictor.config.test.score
    return min(score.values()) if isinstance(score, dict) else float(score)
