"""Bodies from timm, with frozen and deformable stages, and the insertion of plug-ins into their blocks."""

from fusedet.models.backbones.plugin_insertion import insert
from fusedet.models.backbones.timm_backbone import Backbone

__all__ = ["Backbone", "insert"]
