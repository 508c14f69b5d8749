"""Read MMDetection's configs and checkpoints as data."""
