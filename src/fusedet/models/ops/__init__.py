"""Functions and small layers on tensors: boxes, label assignment, sampling, losses."""
