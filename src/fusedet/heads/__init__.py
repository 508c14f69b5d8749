"""Dense heads: a pyramid in, raw maps out; loss and decode are methods that forward never calls."""

from fusedet.heads.retina import RetinaHead

HEADS = {"retina": RetinaHead}

__all__ = ["HEADS", "RetinaHead"]
