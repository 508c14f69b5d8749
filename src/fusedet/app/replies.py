"""What the server answers, as the types of its OpenAPI description."""

from typing import Any

from pydantic import BaseModel, Field

from fusedet.api.predictor import Prediction
from fusedet.app.served_model import ServedModel
from fusedet.errors import format_count
from fusedet.visualization import colors


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str = Field(description="One sentence.")


class ClassReply(BaseModel):
    """A class of a model."""

    name: str
    color: str = Field(description="Its color in drawings, #rrggbb.")
    text_color: str = Field(description="Black or white, whichever is readable on the color.")


class TilesReply(BaseModel):
    """The tiles in which a model sees images unless a request says otherwise."""

    size: int | None = Field(description="Side of a tile in pixels of the image; null for whole images.")
    overlap: float
    whole: bool


class ModelReply(BaseModel):
    """A model of the server."""

    name: str
    classes: list[ClassReply]
    lowest_score: float = Field(description="The lowest score of its detections.")
    tiles: TilesReply
    heat_maps: bool = Field(description="Whether /heatmaps takes it: exported models show no layers.")


class ServerReply(BaseModel):
    """The models and limits of the server."""

    version: str
    max_bytes: int = Field(description="The largest file in bytes.")
    overlap_limit: float = Field(description="The overlap of tiles is a share below this.")
    models: list[ModelReply]


class ExampleReply(BaseModel):
    """An example image: GET /examples/NUMBER, and /examples/NUMBER/thumbnail."""

    number: int
    name: str


class Mask(BaseModel):
    """A mask in COCO's compressed run-length encoding."""

    size: list[int] = Field(description="Height and width of the image.")
    counts: str


class DetectionReply(BaseModel):
    """A detected instance."""

    class_name: str
    label: int = Field(description="Index of the class.")
    score: float
    box: list[float] = Field(description="x1, y1, x2, y2 in pixels of the image.")
    mask: Mask | None = None


class Seconds(BaseModel):
    """Where the time went."""

    wait: float = Field(description="For other requests.")
    decode: float = Field(description="From the file to pixels.")
    detect: float = Field(description="From pixels to detections.")


class PredictionReply(BaseModel):
    """The detections in an image."""

    model: str
    width: int
    height: int
    detections: list[DetectionReply] = Field(description="Highest score first.")
    seconds: Seconds


class HeatMap(BaseModel):
    """A layer to lay over the image."""

    level: str
    png: str = Field(description="A PNG with colors and opacity, in base64.")


class HeatMapRow(BaseModel):
    """The maps of one point of the network."""

    caption: str
    maps: list[HeatMap]


class HeatMapReply(BaseModel):
    """Heat maps of an image for a class."""

    class_name: str
    kind: str
    kinds: list[str] = Field(description="All kinds of this model.")
    unit: str
    peak: float = Field(description="The highest value, at the end of the color scale.")
    rows: list[HeatMapRow] = Field(description="From the backbone to the head.")


class Health(BaseModel):
    """That the server runs."""

    status: str
    version: str
    models: list[str]


def describe_model(model: ServedModel) -> ModelReply:
    """Return what the page knows of a model."""
    predictor = model.predictor
    tiles = predictor.config.test.tiles
    return ModelReply(
        name=model.name,
        classes=[_describe_class(k, name) for k, name in enumerate(predictor.names)],
        lowest_score=model.lowest,
        tiles=TilesReply(size=tiles.size, overlap=tiles.overlap, whole=tiles.whole),
        heat_maps=not model.is_exported,
    )


def make_prediction_reply(
    model: ServedModel, prediction: Prediction, seconds: dict[str, float], score: float, has_masks: bool
) -> PredictionReply:
    """Describe the detections of an image as the reply of the HTTP API.

    Args:
        model: The model that detected.
        prediction: With its image.
        seconds: Durations of the steps.
        score: Least score of a detection, in 0..1.
        has_masks: Whether the reply holds the masks, of models that have a mask branch.
    """
    keep = prediction.scores >= score
    assert prediction.image is not None
    rows: list[dict[str, Any]] = prediction.to_coco()
    return PredictionReply(
        model=model.name,
        width=prediction.image.shape[2],
        height=prediction.image.shape[1],
        seconds=Seconds(**{name: round(value, 4) for name, value in seconds.items()}),
        detections=[
            DetectionReply(
                class_name=prediction.names[label],
                label=label,
                score=row["score"],
                box=[round(value, 2) for value in box],
                mask=row.get("segmentation") if has_masks else None,
            )
            for row, label, box, is_kept in zip(
                rows, prediction.labels.tolist(), prediction.boxes.tolist(), keep.tolist(), strict=True
            )
            if is_kept
        ],
    )


def _describe_class(label: int, name: str) -> ClassReply:
    color = colors.class_color(label)
    return ClassReply(name=name, color=_to_hex(color), text_color=_to_hex(colors.text_color(color)))


def _to_hex(color: colors.Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def summarize_models(models: dict[str, ServedModel]) -> str:
    """Return the models and their numbers of classes in words."""
    return ", ".join(f"{name} ({format_count(len(model.predictor.names), 'class')})" for name, model in models.items())
