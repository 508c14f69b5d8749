"""Detect objects with an exported program, without fusedet: python example.py IMAGE [LEAST SCORE]."""

import json
import sys
from pathlib import Path

import torch
import torchvision  # noqa: F401  (registers the operators)
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import resize

folder = Path(__file__).parent
meta = json.loads((folder / "model.json").read_text(encoding="utf-8"))["model"]
model = torch.export.load(folder / "model.pt2").module()

image = decode_image(sys.argv[1], ImageReadMode.RGB, apply_exif_orientation=True)
least = float(sys.argv[2]) if len(sys.argv) > 2 else 0.3
height, width = image.shape[1:]
rule, canvas = meta["resize"], meta["size"]
scale = min(rule["short"] / min(height, width), rule["long"] / max(height, width))
h, w = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
if canvas and (h > canvas[0] or w > canvas[1]):
    shrink = min(canvas[0] / h, canvas[1] / w)
    h, w = max(1, int(h * shrink)), max(1, int(w * shrink))
rows, columns = canvas or (-(-max(side, meta["smallest"]) // 32) * 32 for side in (h, w))
images = torch.zeros(meta["batch"] or 1, 3, rows, columns, dtype=torch.uint8)
images[0, :, :h, :w] = resize(image, [h, w], antialias=rule["antialias"])
boxes, scores, labels, counts = model(images, torch.tensor([[h, w]] * len(images)))[:4]
for i in range(int(counts[0])):
    if scores[0, i] >= least:
        box = boxes[0, i] / torch.tensor([w / width, h / height]).repeat(2)
        print(meta["names"][labels[0, i]], round(float(scores[0, i]), 3), *(round(x, 1) for x in box.tolist()))
