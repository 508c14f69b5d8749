"""Functions and small layers on tensors: boxes, assignment, losses."""
