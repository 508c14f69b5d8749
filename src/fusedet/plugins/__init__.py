"""Block plug-ins: small modules inside a body's blocks; the table is the whole registry.

A plug-in is a set of options with `positions` (where in a block, None for the block's usual ones), `stages` (ResNet's layer numbers) and
`make(channels, stage, position)`, the module (N, channels, H, W) -> the same shape that `backbones.insert` puts there.
"""

from fusedet.plugins.msfm import MSFM, MSFMPlugin

PLUGINS = {"msfm": MSFMPlugin}

__all__ = ["MSFM", "PLUGINS", "MSFMPlugin"]
