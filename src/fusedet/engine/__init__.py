"""Training: the loop, its options and its checkpoints."""
