"""Double-Head stage, with the semantics of MMDetection 3.x.

References:
    "Rethinking Classification and Localization for Object Detection", Wu et al., 2020.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.ops.layers import conv_norm
from fusedet.models.protocols import StageOutputs
from fusedet.models.roi.box import BoxStage, RegressionLossName, Sampling
from fusedet.models.roi.pooling import LevelPooling, PoolingFactory
from fusedet.types import Features, Levels


class DoubleHeadStage(BoxStage):
    """Fully connected layers classify an RoI, residual convolutions on an enlarged RoI refine its box.

    Args:
        levels: As in `BoxStage`.
        num_classes: As in `BoxStage`.
        pooling: As in `BoxStage`.
        size: As in `BoxStage`.
        channels: As in `BoxStage`.
        layers: As in `BoxStage`.
        blocks: Number of bottleneck blocks in the box branch, behind the one that widens.
        box_channels: Channels of the box branch, a multiple of 4.
        enlarge: Factor of the sides of the RoIs that the box branch pools; their level is that of the RoIs themselves.
        class_agnostic: As in `BoxStage`.
        stds: As in `BoxStage`.
        positive: As in `BoxStage`.
        num: As in `BoxStage`.
        fraction: As in `BoxStage`.
        sampling: As in `BoxStage`.
        loss: As in `BoxStage`.
        beta: As in `BoxStage`.
        cls_weight: Weight of the classification loss.
        box_weight: Weight of the box loss.
        weight: As in `BoxStage`.

    Raises:
        InputError: An option is unknown or out of its range.
    """

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        pooling: PoolingFactory | None = None,
        size: int = 7,
        channels: int = 1024,
        layers: int = 2,
        blocks: int = 4,
        box_channels: int = 1024,
        enlarge: float = 1.3,
        class_agnostic: bool = False,
        stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2),
        positive: float = 0.5,
        num: int = 512,
        fraction: float = 0.25,
        sampling: Sampling = "random",
        loss: RegressionLossName = "smooth_l1",
        beta: float = 1.0,
        cls_weight: float = 2.0,
        box_weight: float = 2.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(
            levels,
            num_classes,
            pooling,
            size=size,
            channels=channels,
            layers=layers,
            class_agnostic=class_agnostic,
            stds=stds,
            positive=positive,
            num=num,
            fraction=fraction,
            sampling=sampling,
            loss=loss,
            beta=beta,
            weight=weight,
        )
        if blocks < 0 or box_channels < 4 or box_channels % 4 or not enlarge > 0:
            raise InputError(
                f"blocks={blocks} must be 0 or more, box_channels={box_channels} a multiple of 4, enlarge={enlarge} "
                "above 0"
            )
        if cls_weight < 0 or box_weight < 0:
            raise InputError(f"cls_weight={cls_weight}, box_weight={box_weight} must be 0 or more")
        self.loss_weights = {"loss_cls": weight * cls_weight, "loss_box": weight * box_weight}
        self.enlarge = enlarge
        self.box_pooling = pooling(size) if pooling else LevelPooling(levels, size)
        inputs = levels.channels[0]
        quarter = box_channels // 4
        self.widen = Residual(
            [conv_norm(inputs, inputs, 3, "bn"), conv_norm(inputs, box_channels, 1, "bn")],
            conv_norm(inputs, box_channels, 1, "bn"),
        )
        self.blocks = nn.Sequential(
            *(
                Residual(
                    [
                        conv_norm(box_channels, quarter, 1, "bn"),
                        conv_norm(quarter, quarter, 3, "bn"),
                        conv_norm(quarter, box_channels, 1, "bn"),
                    ]
                )
                for _ in range(blocks)
            )
        )
        self.reg = nn.Linear(box_channels, 4 if class_agnostic else 4 * num_classes)
        nn.init.normal_(self.reg.weight, std=0.001)
        nn.init.zeros_(self.reg.bias)

    def forward(self, features: Features, rois: Tensor) -> StageOutputs:
        """Compute logits and box deltas of every RoI, as `BoxStage.forward` does."""
        x = self.pooling(features, rois).flatten(1)
        for layer in self.shared:
            x = F.relu(layer(x))
        center, half = (rois[:, 1:3] + rois[:, 3:]) * 0.5, (rois[:, 3:] - rois[:, 1:3]) * self.enlarge * 0.5
        enlarged = torch.cat([rois[:, :1], center - half, center + half], dim=1)
        boxes = self.box_pooling(features, enlarged, sized_by=rois)
        assert self.reg is not None
        return self.cls(x), self.reg(self.blocks(self.widen(boxes)).mean(dim=(2, 3)))


class Residual(nn.Module):
    """ReLU of x, or its projection, plus layers of convolution and BatchNorm with ReLUs between them."""

    def __init__(self, layers: Sequence[nn.Module], shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Compute x (M, C, H, W) to (M, C', H, W)."""
        y = self.layers[0](x)
        for layer in self.layers[1:]:
            y = layer(F.relu(y))
        return F.relu(y + self.shortcut(x))
