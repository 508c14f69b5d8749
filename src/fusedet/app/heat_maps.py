"""Heat maps of an image as PNG layers that a page lays over it, level by level."""

import base64
import io

import numpy as np
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from fusedet.api.cam import compute_maps
from fusedet.api.cam_figures import UNITS, order_rows, sum_levels
from fusedet.api.predictor import Predictor
from fusedet.app.replies import HeatMap, HeatMapReply, HeatMapRow
from fusedet.errors import InputError, make_unknown_error
from fusedet.visualization.heat_maps import COLORS


def draw_heat_maps(predictor: Predictor, image: Tensor, class_name: str, kind: str) -> HeatMapReply:
    """Compute the contributions of each feature level to a class and draw them.

    All layers have one color scale, by the square root of the value as in `fusedet cam`.

    Args:
        predictor: A loaded run, not an exported model.
        image: uint8 (C, H, W).
        class_name: The class to explain.
        kind: One of the detector's `KINDS` of maps.

    Raises:
        InputError: The class or the kind is unknown, or the detector has no map.
    """
    if class_name not in predictor.names:
        raise make_unknown_error("class", class_name, predictor.names)
    heat = compute_maps(predictor, image, class_name).heat
    if kind not in heat:
        raise make_unknown_error("kind of heat map", kind, heat)
    rows = {row.key: row for row in heat[kind]}
    layers = {
        key: {"all levels": sum_levels(rows[key])}
        | {f"stride {stride}": rows[key].maps[stride] for stride in sorted(rows[key].maps)}
        for key in order_rows(rows)
    }
    peak = max((float(x.max()) for own in layers.values() for x in own.values()), default=0.0)
    if not peak:
        raise InputError(f"no feature of this model contributes to the class '{class_name}' in this image")
    return HeatMapReply(
        class_name=class_name,
        kind=kind,
        kinds=list(heat),
        unit=f"{UNITS[kind]}, per pixel",
        peak=peak,
        rows=[
            HeatMapRow(
                caption=rows[key].caption,
                maps=[
                    HeatMap(level=level, png=_encode_layer((x / peak).clamp(0, 1).sqrt())) for level, x in own.items()
                ],
            )
            for key, own in layers.items()
        ],
    )


def _encode_layer(heat: Tensor) -> str:
    """Return a map (h, w) in 0..1 as a PNG of colors in base64; heat hides what is beneath, as in `fusedet cam`."""
    values = heat.numpy()
    layer = colormaps[COLORS](values, bytes=True)
    layer[..., 3] = np.rint(255 * (0.45 + 0.4 * values))
    data = io.BytesIO()
    Image.fromarray(layer).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()
