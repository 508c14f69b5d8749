"""Detectors: parts in one row; and the way from a config's names to one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fusedet import config as configs
from fusedet.backbones import Backbone, insert
from fusedet.build import build
from fusedet.errors import InputError
from fusedet.heads import HEADS
from fusedet.interact import INTERACTIONS
from fusedet.necks import NECKS
from fusedet.ops.boxes import Selected, select
from fusedet.ops.layers import fold_batch_norm
from fusedet.plugins import PLUGINS
from fusedet.types import Batch, Detections, Features, Losses, Outputs

BACKBONES = {"timm": Backbone}


class OneStage(nn.Module):
    """Body, neck and dense head: RetinaNet and all that is built like it.

    selection: options of `ops.boxes.select` (score, iou, pre_nms, max_det), its defaults where there are none.
    """

    def __init__(self, backbone: Any, neck: Any, head: Any, selection: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head
        self.selection = dict(selection or {})
        self.to(memory_format=torch.channels_last)

    @property
    def num_classes(self) -> int:
        """K, the number of classes that it tells apart."""
        return self.head.num_classes

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> Outputs:
        """Pictures uint8 (N, 3, H, W), of sizes (N, 2) inside their padding (all of it by default), to raw outputs."""
        return self.head(self.neck(self.backbone(self.normalise(images, sizes))))

    def normalise(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """uint8 pictures to what the body was trained on, in channels_last; the padding is 0 after it."""
        scale, shift = self.backbone.scale, self.backbone.shift
        x = torch.addcmul(shift, images.to(scale.dtype, memory_format=torch.channels_last), scale)
        x = x.to(next(self.backbone.parameters()).dtype)
        if sizes is None:
            return x
        rows = torch.arange(x.shape[2], device=x.device) < sizes[:, :1]  # (N, H)
        columns = torch.arange(x.shape[3], device=x.device) < sizes[:, 1:]
        return x * (rows[:, None, :, None] & columns[:, None, None, :])

    @property
    def loss_weights(self) -> dict[str, float]:
        """What each term of `loss` counts in the total."""
        weights: dict[str, float] = self.head.loss_weights
        extra = getattr(self.neck, "auxiliary_weight", 0.0)
        return weights | ({f"auxiliary_{name}": extra * weight for name, weight in weights.items()} if extra else {})

    def loss(self, batch: Batch) -> Losses:
        """The head's losses on a batch with targets, unweighted; on the neck's auxiliary pyramid too, where it has one."""
        if not getattr(self.neck, "auxiliary_weight", 0.0):
            return self.head.loss(self(batch.images, batch.sizes), batch.targets)
        features = self.backbone(self.normalise(batch.images, batch.sizes))
        pyramid, unfused = self.neck.with_auxiliary(features)
        losses = self.head.loss(self.head(pyramid), batch.targets)
        extra = self.head.loss(self.head(unfused), batch.targets)
        return losses | {f"auxiliary_{name}": value for name, value in extra.items()}

    def detect(self, images: Tensor, sizes: Tensor) -> Selected:
        """Final detections as padded tensors, in pixels of the network's input: the form that exports."""
        outputs = self(images, sizes)
        return select(self.head.decode(outputs), sizes, outputs.priors.counts, **self.selection)

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Detections]:
        """What is in each picture of a batch, in pixels of the network's input, best first."""
        found = self.detect(batch.images, batch.sizes)
        return [Detections(b[:n], s[:n], k[:n]) for b, s, k, n in zip(found.boxes, found.scores, found.labels, found.counts.tolist())]


class Chain(nn.Module):
    """Necks one after the other; each takes what the one before promises. The first may have an auxiliary pyramid (AugFPN's)."""

    def __init__(self, necks: list[Any]) -> None:
        super().__init__()
        self.necks: Any = nn.ModuleList(necks)
        self.levels = necks[-1].levels
        self.auxiliary_weight = getattr(necks[0], "auxiliary_weight", 0.0)

    def forward(self, features: Features) -> Features:
        """Through all of them."""
        for neck in self.necks:
            features = neck(features)
        return features

    def with_auxiliary(self, features: Features) -> tuple[Features, Features]:
        """The pyramid, and the first neck's auxiliary one."""
        features, auxiliary = self.necks[0].with_auxiliary(features)
        for neck in self.necks[1:]:
            features = neck(features)
        return features, auxiliary


def for_inference(detector: OneStage, precision: Literal["fp32", "bf16"] = "fp32") -> OneStage:
    """A copy for prediction: in eval mode, batch norms folded into their convolutions, weights in bfloat16 where asked.

    With bf16, pictures are still normalised, and boxes and scores decoded, in float32.
    """
    detector = copy.deepcopy(detector).eval()
    try:
        detector.backbone = fold_batch_norm(detector.backbone, torch.rand(1, 3, 64, 96, device=detector.backbone.scale.device))
    except RuntimeError as error:
        warnings.warn(f"{error}; prediction is the same without, only slower", stacklevel=2)
    if precision == "bf16":
        for parameter in detector.parameters():  # buffers (normalisation, anchors) keep float32
            parameter.data = parameter.data.to(torch.bfloat16)
    return detector


def selection(test: configs.Test) -> dict[str, Any]:
    """The config's thresholds as options of `ops.boxes.select`."""
    return {"score": test.score, "iou": test.nms, "pre_nms": test.pre_nms, "max_det": test.max_det}


def create_model(name: str, *overrides: str, num_classes: int = 80, **sections: Mapping[str, Any]) -> OneStage:
    """A detector by the name of its config (or a YAML file), as the command line makes it.

    >>> create_model("retinanet_r50", "model.backbone.pretrained=false", num_classes=3)  # doctest: +SKIP
    >>> create_model("retinanet_r50", model={"backbone": {"pretrained": False}})  # doctest: +SKIP
    """
    return from_config(configs.load(name, overrides, sections), num_classes)


def from_config(config: configs.Config, num_classes: int) -> OneStage:
    """A detector from a resolved config."""
    model = config.model
    if num_classes < 1:
        raise InputError(f"num_classes={num_classes}: a detector needs at least one class")
    if model.roi:
        raise InputError(f"model.roi={model.roi}: this version has no two-stage detectors yet, leave it null")
    backbone = build("model.backbone", {"type": "timm"} | model.backbone, BACKBONES, {})
    if model.plugin:
        insert(backbone, build("model.plugin", model.plugin, PLUGINS, {}))
    if model.neck == []:
        raise InputError("model.neck=[]: a chain needs at least one neck, such as fpn")
    necks: list[Any] = []
    for i, spec in enumerate(model.neck if isinstance(model.neck, list) else [model.neck]):
        levels = necks[-1].levels if necks else backbone.levels
        slot = f"model.neck.{i}" if isinstance(model.neck, list) else "model.neck"
        necks.append(build(slot, spec, NECKS, {"levels": levels}, {"model.pyramid": vars(model.pyramid)}))
    neck = Chain(necks) if len(necks) > 1 else necks[0]

    def interact(channels: int) -> nn.Module:
        return build("model.interact", model.interact, INTERACTIONS, {"channels": channels})

    given = {"levels": neck.levels, "num_classes": num_classes, "interact": interact if model.interact else None}
    head = build("model.head", model.head, HEADS, given)
    return OneStage(backbone, neck, head, selection(config.test))
