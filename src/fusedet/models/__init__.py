"""Every `nn.Module` of a detector and what it computes with."""
