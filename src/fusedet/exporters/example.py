"""Detect objects with an exported model, without torch and fusedet: python example.py IMAGE [LEAST SCORE]."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

folder = Path(__file__).parent
meta = json.loads((folder / "model.json").read_text(encoding="utf-8"))["model"]
if (folder / "model.onnx").is_file():
    import onnxruntime  # pip install onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    run = lambda inputs: dict(zip(meta["outputs"], session.run(meta["outputs"], inputs)))  # noqa: E731
else:
    import openvino  # pip install openvino

    hint = {"INFERENCE_PRECISION_HINT": "bf16" if meta["precision"] == "bf16" else "f32"}
    run = openvino.Core().compile_model(openvino.Core().read_model(folder / "model.xml"), "CPU", hint)

image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")  # upright, as a camera meant it
least = float(sys.argv[2]) if len(sys.argv) > 2 else 0.3
width, height = image.size
rule, canvas = meta["resize"], meta["size"]
scale = min(rule["short"] / min(height, width), rule["long"] / max(height, width))
h, w = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
if canvas and (h > canvas[0] or w > canvas[1]):
    h, w = (max(1, int(side * min(canvas[0] / h, canvas[1] / w))) for side in (h, w))
matrix = (width / w, 0, 0, 0, height / h, 0)  # plain bilinear, as without antialiasing
resized = image.resize((w, h), 2) if rule["antialias"] else image.transform((w, h), Image.Transform.AFFINE, matrix, 2)
rows, columns = canvas or (-(-side // meta["multiple"]) * meta["multiple"] for side in (h, w))
images = np.zeros((meta["batch"] or 1, 3, rows, columns), np.uint8)
images[0, :, :h, :w] = np.asarray(resized).transpose(2, 0, 1)
outputs = run({"images": images, "sizes": np.array([[h, w]] * len(images), np.int64)})
for i in range(int(outputs["counts"][0])):
    if outputs["scores"][0][i] >= least:
        box = outputs["boxes"][0][i] / [w / width, h / height, w / width, h / height]
        print(meta["names"][outputs["labels"][0][i]], round(float(outputs["scores"][0][i]), 3), *box.round(1))
