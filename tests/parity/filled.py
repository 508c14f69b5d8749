"""Deterministic weights and images: functions of their names and sizes, the same on any machine."""

from __future__ import annotations

import zlib

import numpy as np


def fill(name: str, shape: tuple[int, ...], stem: float) -> np.ndarray:
    """Fill a weight of MMDetection's so that activations keep order one and few classes have high scores.

    Args:
        name: MMDetection's name of the weight.
        shape: Its shape.
        stem: Gain of the first convolution, small where images are not divided by a standard deviation.
    """
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith(("running_mean", "running_var")):
        return np.full(shape, float(name.endswith("var")), np.float32)
    values = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape).astype(np.float32)
    layer = name.split(".")[-2]
    if len(shape) > 1:
        gain = 0.3 if "offset" in name else 2.0 if layer == "fc_cls" else 0.8 if "cls" in layer else 1.0
        return values * np.float32((stem if name == "backbone.conv1.weight" else gain) / np.sqrt(np.prod(shape[1:])))
    if name.endswith(("weight", "scale")):
        last = name.endswith(
            ("bn3.weight", "layer1.1.bn2.weight", "layer2.1.bn2.weight", "layer3.1.bn2.weight", "layer4.1.bn2.weight")
        )
        return np.float32(0.3 if last else 1.0) * (1 + np.float32(0.1) * values)
    return np.float32(0.1) * values - np.float32(2.0 if "cls" in layer and "convs" not in name else 0.0)


def image(height: int, width: int) -> np.ndarray:
    """Draw an RGB image (height, width, 3) of smooth waves and hard edges."""
    y, x = np.mgrid[:height, :width]
    waves = [
        (x * a + y * b) % 251 + ((x // c + y // (c + 3)) % 2) * 60 for a, b, c in ((3, 1, 17), (1, 2, 29), (5, 7, 41))
    ]
    return np.clip(np.stack(waves, axis=2) * 0.8, 0, 255).astype(np.uint8)
