"""The server: routes of the page and of the JSON interface, and how its errors become answers."""

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, File, HTTPException, Query, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles

from fusedet import __version__
from fusedet.app import replies
from fusedet.app.examples import Examples, encode_image, make_thumbnail
from fusedet.app.heat_maps import draw_heat_maps
from fusedet.app.metrics import Metrics
from fusedet.app.prediction_queue import PredictionQueue, QueueFullError
from fusedet.app.request_guard import RequestGuard, describe_size_limit
from fusedet.app.served_model import ServedModel, choose_model
from fusedet.config.schema import PredictionTiles
from fusedet.config.section import get_limits
from fusedet.errors import InputError, make_unknown_error
from fusedet.visualization.annotators import to_pil_image

STATIC = Path(__file__).parent / "static"
PREVIEW = 4096
"""The longer side of a preview in pixels."""
T = TypeVar("T")
Upload = Annotated[UploadFile, File(description="An image file, as fusedet predict reads it.")]
ModelName = Annotated[str | None, Query(description="A name of /models; by default the first.")]
TileSize = Annotated[
    int | None,
    Query(ge=0, le=100_000, description="Side of overlapping tiles in pixels; 0 for the whole image only."),
]
OVERLAP = PredictionTiles.model_fields["overlap"]
Overlap = Annotated[float | None, Query(description=OVERLAP.description, **get_limits(OVERLAP))]
Whole = Annotated[bool | None, Query(description="Whether the whole image is seen beside its tiles.")]
Score = Annotated[float, Query(ge=0, le=1, description="The lowest score to return.")]
HasMasks = Annotated[bool, Query(alias="masks", description="Whether masks are returned, where the model has them.")]
Kind = Annotated[str, Query(description="classification, regression; of two-stage detectors objectness, proposals.")]
ClassName = Annotated[str, Query(alias="class", description="The class to explain.")]
REFUSED: dict[int | str, dict[str, Any]] = {
    413: {"model": replies.Problem, "description": "The file is larger than the limit."},
    422: {"model": replies.Problem, "description": "The image or a parameter is wrong."},
    429: {
        "model": replies.Problem,
        "description": "Too many requests are waiting.",
        "headers": {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}},
    },
}
UNKNOWN: dict[int | str, dict[str, Any]] = {
    404: {"model": replies.Problem, "description": "There is no such example."},
    422: {"model": replies.Problem, "description": "The number is wrong."},
}


def _refuse_unknown_parameters(request: Request) -> None:
    """Raise InputError for a query parameter that the route does not have; FastAPI ignores it."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            raise make_unknown_error("parameter", name, known)


router = APIRouter()
checked = APIRouter(dependencies=[Depends(_refuse_unknown_parameters)])


class State:
    """What the routes share.

    Args:
        models: The models by name.
        examples: The example images.
        max_bytes: The largest file in bytes.
        waiting: Requests that may wait beside the one that is computed.
    """

    def __init__(self, models: dict[str, ServedModel], examples: Examples, max_bytes: int, waiting: int) -> None:
        self.models, self.examples, self.max_bytes = models, examples, max_bytes
        self.queue, self.metrics = PredictionQueue(waiting), Metrics()

    async def compute(self, request: Request, upload: UploadFile, work: Callable[[bytes], T]) -> tuple[T, float]:
        """Read a file and compute with it in the request's turn; return the result and the seconds of waiting.

        Raises:
            HTTPException: The file is larger than `max_bytes` (413), or the client has closed the connection (499).
        """
        if (upload.size or 0) > self.max_bytes:
            raise HTTPException(413, describe_size_limit(self.max_bytes))
        start = time.perf_counter()
        async with self.queue.turn():
            waited = time.perf_counter() - start
            if await request.is_disconnected():
                raise HTTPException(499, "the client has closed the connection")
            return await run_in_threadpool(work, await upload.read()), waited


def build_server(state: State, hosts: Collection[str]) -> FastAPI:
    """Return the ASGI application.

    Args:
        state: Models, limits and counters.
        hosts: Names and addresses under which it may be called, in lower case.
    """
    app = FastAPI(
        title="fusedet",
        version=__version__,
        summary="Object detection in images.",
        docs_url=None,  # FastAPI's pages load scripts from another host; /docs is a page of our own
        redoc_url=None,
    )
    app.state.served = state
    app.include_router(router)
    app.include_router(checked)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_exception_handler(InputError, _answer_input_error)
    app.add_exception_handler(QueueFullError, _answer_full_queue)
    app.add_exception_handler(RequestValidationError, _answer_wrong_parameter)
    app.add_middleware(RequestGuard, hosts=hosts, max_bytes=state.max_bytes, metrics=state.metrics)
    return app


@router.get("/", include_in_schema=False)
def show_page() -> FileResponse:
    """Return the page."""
    return FileResponse(STATIC / "index.html")


@router.get("/docs", include_in_schema=False)
def show_docs() -> FileResponse:
    """Return the page that shows the interface."""
    return FileResponse(STATIC / "docs.html")


@router.get("/models", summary="List the models and limits")
def list_models(request: Request) -> replies.ServerReply:
    """List the models with their classes, and the limits of the server."""
    state = _get_state(request)
    models = [replies.describe_model(model) for model in state.models.values()]
    limit = get_limits(OVERLAP)["lt"]
    return replies.ServerReply(version=__version__, max_bytes=state.max_bytes, overlap_limit=limit, models=models)


@router.get("/examples", summary="List the example images")
def list_examples(request: Request) -> list[replies.ExampleReply]:
    """List the example images by number and file name."""
    files = _get_state(request).examples.files
    names = [file.name.encode(errors="replace").decode() for file in files]  # a name may be no valid Unicode
    return [replies.ExampleReply(number=i, name=name) for i, name in enumerate(names)]


@router.get("/examples/{number}", summary="Get an example image", responses=UNKNOWN, response_class=FileResponse)
def get_example(request: Request, number: int) -> Response:
    """Return an example image file."""
    return Response(_get_example(request, number).read_bytes(), media_type="application/octet-stream")


@router.get("/examples/{number}/thumbnail", summary="Get a thumbnail", responses=UNKNOWN, response_class=FileResponse)
def get_thumbnail(request: Request, number: int) -> Response:
    """Return a small JPEG of an example image."""
    try:
        return Response(make_thumbnail(_get_example(request, number)), media_type="image/jpeg")
    except InputError:  # its text has the path of the file
        raise HTTPException(404, f"example {number} cannot be read") from None


@checked.post("/predict", summary="Detect instances in an image", responses=REFUSED)
async def predict(
    request: Request,
    image: Upload,
    model: ModelName = None,
    score: Score = 0.0,
    tiles: TileSize = None,
    overlap: Overlap = None,
    whole: Whole = None,
    has_masks: HasMasks = True,
) -> replies.PredictionReply:
    """Detect instances in an image file, sent as the form field `image`.

    The answer holds all detections of at least the model's lowest score, so that a higher threshold is a filter.
    """
    state = _get_state(request)
    served = choose_model(state.models, model)
    own = _choose_tiles(served.predictor.config.test.tiles, tiles, overlap, whole)

    def work(content: bytes) -> replies.PredictionReply:
        prediction, seconds = served.detect(content, own)
        return replies.make_prediction_reply(served, prediction, {"wait": 0.0} | seconds, score, has_masks)

    reply, waited = await state.compute(request, image, work)
    state.metrics.count_prediction(served.name, reply.seconds.decode + reply.seconds.detect)
    reply.seconds.wait = round(waited, 4)
    return reply


@checked.post("/heatmaps", summary="Explain a class in an image", responses=REFUSED)
async def explain(
    request: Request, image: Upload, class_name: ClassName, model: ModelName = None, kind: Kind = "classification"
) -> replies.HeatMapReply:
    """Compute which features contribute to a class in an image file, level by level.

    Of runs and checkpoints only: the layers of exported models cannot be seen.
    """
    state = _get_state(request)
    served = choose_model(state.models, model)
    if served.is_exported:
        raise InputError(
            f"{served.name} is an exported model, whose layers cannot be seen: serve the run that it is from"
        )
    reply, _ = await state.compute(
        request,
        image,
        lambda content: draw_heat_maps(served.predictor, served.decode(content), class_name, kind),
    )
    return reply


@checked.post("/preview", summary="Get an image as the model sees it", responses=REFUSED, response_class=Response)
async def preview(request: Request, image: Upload, model: ModelName = None) -> Response:
    """Return an image file as JPEG of at most 4096 pixels, upright and in colors, for browsers that cannot show it."""
    state = _get_state(request)
    served = choose_model(state.models, model)
    data, _ = await state.compute(
        request, image, lambda content: encode_image(to_pil_image(served.decode(content)), PREVIEW, 92)
    )
    return Response(data, media_type="image/jpeg")


@router.get("/health", summary="Check that the server runs")
def check_health(request: Request) -> replies.Health:
    """Return the version and the names of the models."""
    return replies.Health(status="ok", version=__version__, models=list(_get_state(request).models))


@router.get("/metrics", summary="Get counters for Prometheus", response_class=PlainTextResponse)
def get_metrics(request: Request) -> PlainTextResponse:
    """Return counters of requests, a histogram of prediction times, and the length of the queue."""
    state = _get_state(request)
    text = state.metrics.format(state.queue.pending, state.queue.refused)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _get_state(request: Request) -> State:
    state: State = request.app.state.served
    return state


def _get_example(request: Request, number: int) -> Path:
    file = _get_state(request).examples.get_file(number)
    if file is None:
        raise HTTPException(404, f"there is no example {number}")
    return file


def _choose_tiles(
    default: PredictionTiles, size: int | None, overlap: float | None, whole: bool | None
) -> PredictionTiles:
    """Return the tiles of a request: those of the model where it does not say otherwise."""
    if size == 0:
        return PredictionTiles()
    given = {"size": size, "overlap": overlap, "whole": whole}
    return default.replace(**{name: value for name, value in given.items() if value is not None})


async def _answer_input_error(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)


async def _answer_full_queue(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, QueueFullError)
    return JSONResponse({"detail": str(error)}, 429, {"Retry-After": str(error.retry_after)})


async def _answer_wrong_parameter(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["loc"][0] != "query" and isinstance(first.get("input"), str):
        return JSONResponse({"detail": f"{first['loc'][-1]}: a file was expected, not a text"}, 422)
    return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg'][:1].lower()}{first['msg'][1:]}"}, 422)
