"""Convert checkpoints of MMDetection and torchvision; they are read as data and never executed."""

from fusedet.interop.conversion import ConvertedCheckpoint, convert_checkpoint

__all__ = ["ConvertedCheckpoint", "convert_checkpoint"]
