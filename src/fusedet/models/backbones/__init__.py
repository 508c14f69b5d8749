"""Backbones from timm, with frozen, deformable and trident stages, and the insertion of plug-ins into their blocks."""

from fusedet.models.backbones.plugin_insertion import insert_plugin
from fusedet.models.backbones.stages import LastStage
from fusedet.models.backbones.timm_backbone import TimmBackbone

__all__ = ["LastStage", "TimmBackbone", "insert_plugin"]
