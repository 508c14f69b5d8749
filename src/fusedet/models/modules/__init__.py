"""Modules that plug into other parts: block plug-ins of a backbone, interactions of a head's branches.

A block plug-in satisfies `protocols.BlockPlugin`, an interaction `protocols.BranchInteraction`. The tables are the
whole registry.
"""

from fusedet.models.modules.context_block import ContextBlock, ContextBlockPlugin
from fusedet.models.modules.msfm import MSFM, MSFMPlugin
from fusedet.models.modules.msil import MSIL
from fusedet.models.protocols import BlockPlugin, BranchInteraction

PLUGINS: dict[str, type[BlockPlugin]] = {"msfm": MSFMPlugin, "context_block": ContextBlockPlugin}
INTERACTIONS: dict[str, type[BranchInteraction]] = {"msil": MSIL}

__all__ = ["INTERACTIONS", "MSFM", "MSIL", "PLUGINS", "ContextBlock", "ContextBlockPlugin", "MSFMPlugin"]
