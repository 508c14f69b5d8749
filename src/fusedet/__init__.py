"""fusedet: object detection with feature pyramids on plain PyTorch."""
