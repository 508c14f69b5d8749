"""Bodies from timm, with frozen and deformable stages, and the insertion of plug-ins into their blocks."""

from fusedet.backbones.body import Backbone
from fusedet.backbones.insertion import insert

__all__ = ["Backbone", "insert"]
