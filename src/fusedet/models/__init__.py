"""The parts of a detector: every `nn.Module` and the functions that it computes with."""
