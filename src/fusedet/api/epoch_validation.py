"""The validation after an epoch of a training."""

from lightning_fabric import Fabric

from fusedet import evaluation
from fusedet.api.detector_evaluation import build_val_loader, compute_mask_metrics, detect
from fusedet.config import Config
from fusedet.data.dataset import DetectionDataset
from fusedet.engine.validation_loss import ValidationLoss
from fusedet.evaluation.results import Result
from fusedet.models.detectors import DetectorModule


class EpochValidation:
    """Computes the metrics of a validation, with the losses if the config asks for them.

    Attributes:
        results: Detections of the last epoch, once it is validated, in COCO's result format; else None.
    """

    def __init__(self, fabric: Fabric, config: Config, val: DetectionDataset, masks: bool) -> None:
        self.device, self.config, self.dataset, self.masks = fabric.device, config, val, masks
        self.results: list[Result] | None = None
        self.loader = build_val_loader(
            config,
            val,
            fabric.global_rank,
            fabric.world_size,
            masks=masks and config.train.validation_loss,
            pin=fabric.device.type == "cuda",
        )

    def __call__(self, detector: DetectorModule, epoch: int) -> dict[str, float]:
        """Return the metrics by name; every process calls it."""
        has_loss, test = self.config.train.validation_loss, self.config.test
        losses = ValidationLoss(detector, self.device)
        batches = losses.watch(self.loader) if has_loss else self.loader
        results = detect(detector, batches, self.dataset, self.device, test.tiles.ios)
        self.results = results if epoch == self.config.train.epochs else None
        metrics = evaluation.evaluate_coco(self.dataset, results, per_class=False, max_det=test.max_det)
        if self.masks:
            metrics |= compute_mask_metrics(self.dataset, results, max_det=test.max_det)
        metrics |= losses.means() if has_loss else {}
        return {name: value for name, value in metrics.items() if name != "mask_classes"}
