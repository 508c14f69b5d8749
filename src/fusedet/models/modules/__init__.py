"""Modules of the papers that plug into other parts: block plug-ins of a backbone and interactions between a head's branches.

A block plug-in is a set of options with `positions` (where in a block, None for the block's usual ones), `stages` (ResNet's layer numbers)
and `make(channels, stage, position)`, the module (N, channels, H, W) -> the same shape that `backbones.insert_plugin` puts there.
An interaction takes the two branches' feature maps and returns two maps of the same shapes. The tables are the whole registry.
"""

from fusedet.models.modules.msfm import MSFM, MSFMPlugin
from fusedet.models.modules.msil import MSIL

PLUGINS = {"msfm": MSFMPlugin}
INTERACTIONS = {"msil": MSIL}

__all__ = ["INTERACTIONS", "MSFM", "MSIL", "PLUGINS", "MSFMPlugin"]
