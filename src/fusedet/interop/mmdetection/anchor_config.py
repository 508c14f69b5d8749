"""Convert what MMDetection's heads share: anchors, the encoding and loss of boxes, and the focal loss."""

import math
from typing import Any

from fusedet.errors import InputError
from fusedet.interop.mmdetection.config_reader import ConfigReader

Tree = dict[str, Any]
MAX_CONVS = 100
"""Most convolutions of a head; it bounds the size of the model that an untrusted config builds."""
FOCAL_LOSS = {"alpha": ("loss_cls.alpha", 0.25), "gamma": ("loss_cls.gamma", 2.0)}
BOX_STDS = [0.1, 0.1, 0.2, 0.2]
"""Standard deviations of the box deltas of an RoI head, of ATSS and the heads built on it, and of FreeAnchor."""
_BOX_LOSSES = {"L1Loss": "l1", "SmoothL1Loss": "smooth_l1", "BalancedL1Loss": "balanced_l1"}


def convert_anchors(reader: ConfigReader, pyramid: Tree, kind: str) -> Tree:
    """Convert an AnchorGenerator to a head's sizes of anchors.

    Args:
        reader: Reader of the head.
        pyramid: `model.pyramid` of the converted config.
        kind: "octaves" (base_scale, scales_per_octave), "scale", a single one, or "scales", any.

    Raises:
        InputError: The anchors cannot be converted; the sentence names their key.
    """
    generator, prefix, legacy, offset = reader, "anchor_", True, 0.5  # 1.x has them in the head
    if section := reader.get_section("anchor_generator"):
        generator, prefix = section, ""
        legacy = section.require_type("AnchorGenerator", "LegacyAnchorGenerator") == "LegacyAnchorGenerator"
        offset = section.get_float("center_offset", 0.0)
        for key, value in (("base_sizes", None), ("centers", None), ("scale_major", True)):
            section.require_value(key, value)
    check_strides(generator, f"{prefix}strides", pyramid)
    options: Tree = {"ratios": generator.get_floats(f"{prefix}ratios", (0.5, 1.0, 2.0))}
    scales = generator.get_floats(f"{prefix}scales")
    base = generator.get_float("octave_base_scale", scales[0] if scales else 4.0)
    count = generator.get_int("scales_per_octave", len(scales) or 3, 1, 100)
    if kind == "scales" and len(scales) > 1:
        return options | {"scale": scales} | _convert_placement(offset, legacy)
    octaves = [base * 2 ** (i / count) for i in range(count)]
    if any(abs(a - b) > 1e-4 * b for a, b in zip(scales, octaves)) or (kind != "octaves" and count != 1):
        supported = (
            "one scale" if kind != "octaves" else "the scales of octaves, octave_base_scale * 2^(i / scales_per_octave)"
        )
        raise InputError(f"MMDetection's {generator.path} has the scales {scales}: only {supported} can be converted")
    options |= {"base_scale": base, "scales_per_octave": count} if kind == "octaves" else {"scale": base}
    return options | _convert_placement(offset, legacy)


def _convert_placement(offset: float, legacy: bool) -> Tree:
    return ({"offset": offset} if offset else {}) | ({"round_anchors": True} if legacy else {})


def read_box_stds(reader: ConfigReader, stds: list[float] | None) -> list[float]:
    """Return the standard deviations of a head's box deltas, which must be `stds` if given.

    Raises:
        InputError: The box coder is another one or does not clip, its means are not 0, or its standard deviations are
            not `stds`.
    """
    if coder := reader.get_section("bbox_coder"):
        coder.require_type("DeltaXYWHBBoxCoder", "LegacyDeltaXYWHBBoxCoder")
        coder.require_value("add_ctr_clamp", False)
        coder.require_value("clip_border", True)
    source = coder or reader
    means = source.get_floats("target_means", [0.0] * 4)
    values = source.get_floats("target_stds", stds or BOX_STDS)
    if any(means):
        raise InputError(f"MMDetection's {reader.path} has target_means={means}: only zeros are supported")
    if stds and values != stds:
        raise InputError(f"MMDetection's {reader.path} has target_stds={values}: only {stds} is supported")
    return values


def convert_box_loss(reader: ConfigReader, *kinds: str) -> Tree:
    """Convert the loss of box deltas to the options loss and beta; another loss gives a note and the first kind."""
    loss, theirs = reader.get_section("loss_bbox"), reader.get_type("loss_bbox", "L1Loss")
    ours = _BOX_LOSSES.get(theirs)
    if ours not in kinds:
        reader.notes.append(
            f"further training has the box loss {kinds[0]} where MMDetection's {reader.path} has {theirs}"
        )
        ours = kinds[0]
    shape = loss.get_options({"alpha": ("alpha", 0.5), "gamma": ("gamma", 1.5), "beta": ("beta", 1.0)})
    if ours == "balanced_l1" and tuple(shape.values()) != (0.5, 1.5, 1.0):
        given = ", ".join(f"{name}={value}" for name, value in shape.items())
        reader.notes.append(
            "further training has the balanced L1 loss with alpha=0.5, gamma=1.5, beta=1.0 where MMDetection's "
            f"{reader.path} has {given}"
        )
    return {} if len(kinds) == 1 else {"loss": ours} | ({"beta": shape["beta"]} if ours == "smooth_l1" else {})


def convert_square_anchors(reader: ConfigReader, pyramid: Tree, plain: bool = True) -> Tree:
    """Convert the single square anchor of each cell.

    Args:
        reader: Reader of the head.
        pyramid: `model.pyramid` of the converted config.
        plain: Whether the anchor is at the cell's corner and the predictions are 3x3 convolutions.

    Raises:
        InputError: The cells have other anchors, or more than one.
    """
    anchors = convert_anchors(reader, pyramid, "scale")
    refused = ("offset", "round_anchors") if plain else ("round_anchors",)
    if unsupported := {key: anchors[key] for key in refused if key in anchors}:
        raise InputError(f"MMDetection's {reader.path}.anchor_generator has {unsupported}: this head has neither")
    if anchors["ratios"] != [1.0]:
        raise InputError(
            f"MMDetection's {reader.path} has anchors of the ratios {anchors['ratios']}: only [1.0] is supported"
        )
    if plain:
        reader.require_value("pred_kernel_size", 3)
    return {"base_scale": anchors["scale"]} | ({"offset": anchors["offset"]} if "offset" in anchors else {})


def check_strides(reader: ConfigReader, key: str, pyramid: Tree) -> list[float]:
    """Return a head's strides, which must be those of the pyramid.

    Raises:
        InputError: They are others.
    """
    expected = [2.0**i for i in range(pyramid["finest"], pyramid["coarsest"] + 1)]
    strides = reader.get_floats(key, expected)
    if len(strides) != len(expected) or not all(map(math.isclose, strides, expected)):
        raise InputError(f"MMDetection's {reader.path}.{key}={strides} must be the neck's strides {expected}")
    return expected
