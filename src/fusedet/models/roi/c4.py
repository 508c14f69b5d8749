"""The RoI stage of C4 detectors, with the semantics of MMDetection 3.x.

References:
    "Deep Residual Learning for Image Recognition", He et al., 2016, appendix A: the backbone's last
    stage, conv5_x, runs on the features pooled from C4.
"""

from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.protocols import BackboneStage, RoIPooling
from fusedet.models.roi.box import BoxStage, RegressionLossName, Sampling
from fusedet.models.roi.pooling import LevelPooling, PoolingFactory
from fusedet.types import Features, Levels


class C4Stage(BoxStage):
    """The backbone's last stage on the pooled features of an RoI, then class logits and box deltas of their mean.

    Args:
        levels: As in `BoxStage`; the one level that the backbone ends with.
        num_classes: As in `BoxStage`.
        last_stage: The backbone's last stage.
        pooling: As in `BoxStage`.
        size: Size of the pooled features, in cells per side; the last stage halves it.
        class_agnostic: As in `BoxStage`.
        stds: As in `BoxStage`.
        positive: As in `BoxStage`.
        num: As in `BoxStage`.
        fraction: As in `BoxStage`.
        sampling: As in `BoxStage`.
        loss: As in `BoxStage`.
        beta: As in `BoxStage`.
        weight: As in `BoxStage`.
        ground_truth: As in `BoxStage`.

    Raises:
        InputError: An option is unknown or out of its range, or the level has other channels than the last stage takes.
    """

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        last_stage: BackboneStage,
        pooling: PoolingFactory | None = None,
        size: int = 14,
        class_agnostic: bool = False,
        stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2),
        positive: float = 0.5,
        num: int = 512,
        fraction: float = 0.25,
        sampling: Sampling = "random",
        loss: RegressionLossName = "l1",
        beta: float = 1.0,
        weight: float = 1.0,
        ground_truth: bool = True,
    ) -> None:
        if levels.channels[0] != last_stage.inputs:
            raise InputError(
                f"the backbone's last stage takes {last_stage.inputs} channels and gets {levels.channels[0]}: set "
                f"model.neck=identity or model.pyramid.channels={last_stage.inputs}"
            )
        super().__init__(
            Levels((last_stage.channels,), (levels.strides[0] * last_stage.stride,)),
            num_classes,
            lambda cells: StagePooling(pooling(cells) if pooling else LevelPooling(levels, cells), last_stage),
            size=size,
            layers=0,
            class_agnostic=class_agnostic,
            stds=stds,
            positive=positive,
            num=num,
            fraction=fraction,
            sampling=sampling,
            loss=loss,
            beta=beta,
            weight=weight,
            ground_truth=ground_truth,
        )


class StagePooling(nn.Module):
    """A pooling, then a stage of the backbone."""

    pooling: RoIPooling
    last_stage: BackboneStage

    def __init__(self, pooling: RoIPooling, last_stage: BackboneStage) -> None:
        super().__init__()
        self.pooling, self.last_stage = pooling, last_stage

    def forward(self, features: Features, rois: Tensor, sized_by: Tensor | None = None) -> Tensor:
        """Pool the features of every RoI, as the pooling does, and run the stage: (M, C, H, W)."""
        return self.last_stage(self.pooling(features, rois, sized_by))
