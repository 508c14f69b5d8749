"""Serve an exported model over HTTP, with neither fusedet nor torch.

pip install fastapi uvicorn onnxruntime numpy pillow
fusedet export runs/a --format onnx                        (where fusedet is installed)
MODEL=runs/a/export uvicorn serve:app --workers 1
curl --data-binary @street.jpg "http://127.0.0.1:8000/detect?score=0.3"
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image, ImageOps

LARGEST = 20 * 2**20
"""Bytes of an image file; larger ones are refused. Pillow itself refuses images of too many pixels."""

folder = Path(os.environ.get("MODEL", "runs/a/export"))
meta = json.loads((folder / "model.json").read_text(encoding="utf-8"))["model"]
session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
app = FastAPI(title=meta["name"])


def prepare(image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize and pad an RGB image as model.json says: (N, 3, H, W) uint8, the image first, and its height and width."""
    rule, canvas, (width, height) = meta["resize"], meta["size"], image.size
    scale = min(rule["short"] / min(height, width), rule["long"] / max(height, width))
    h, w = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    if canvas and (h > canvas[0] or w > canvas[1]):
        shrink = min(canvas[0] / h, canvas[1] / w)
        h, w = max(1, int(h * shrink)), max(1, int(w * shrink))
    if rule["antialias"]:
        resized = image.resize((w, h), Image.Resampling.BILINEAR)
    else:
        matrix = (width / w, 0, 0, 0, height / h, 0)
        resized = image.transform((w, h), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    rows, columns = canvas or (-(-side // meta["multiple"]) * meta["multiple"] for side in (h, w))
    images = np.zeros((meta["batch"] or 1, 3, rows, columns), np.uint8)
    images[0, :, :h, :w] = np.asarray(resized).transpose(2, 0, 1)
    return images, (h, w)


def detect(data: bytes, score: float) -> list[dict]:
    """Detect the objects of an image file: name, score and box (xyxy in pixels of the image), best first."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")  # upright, as fusedet reads it
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(415, f"the request must hold an image file: {error}") from error
    images, (h, w) = prepare(image)
    inputs = {"images": images, "sizes": np.array([[h, w]] * len(images), np.int64)}
    outputs = dict(zip(meta["outputs"], session.run(meta["outputs"], inputs), strict=True))
    back = np.array([image.width / w, image.height / h] * 2)
    rows = zip(*(outputs[key][0][: int(outputs["counts"][0])] for key in ("boxes", "scores", "labels")), strict=True)
    return [
        {"name": meta["names"][label], "score": float(value), "box": (box * back).round(2).tolist()}
        for box, value, label in rows
        if value >= score
    ]


@app.post("/detect")
async def post_image(request: Request, score: float = 0.3) -> list[dict]:
    """Take the bytes of an image file; return its detections of at least `score`."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > LARGEST:
            raise HTTPException(413, f"the image file must have at most {LARGEST} bytes")
    return await run_in_threadpool(detect, bytes(data), score)


@app.get("/health")
def health() -> dict:
    """Return the model's name and classes."""
    return {"name": meta["name"], "classes": meta["names"]}
