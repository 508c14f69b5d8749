"""MMDetection's configs and checkpoints, read as data."""
