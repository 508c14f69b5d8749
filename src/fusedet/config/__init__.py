"""Configs: what they hold (`schema`) and how YAML, bases and overrides become one (`loading`)."""

from fusedet.config.interval import Interval, parse_interval, to_seconds
from fusedet.config.loading import BACKBONES, apply_overrides, find_file, load, names, read_schema
from fusedet.config.schema import Config, Data, Model, Pyramid, Test, Train, parse
from fusedet.config.settings import Setting, settings
from fusedet.config.validation import validate_value
from fusedet.config.yaml_text import parse_yaml, read_yaml, refuse_foreign_classes

__all__ = [
    "BACKBONES",
    "Config",
    "Data",
    "Interval",
    "Model",
    "Pyramid",
    "Setting",
    "Test",
    "Train",
    "apply_overrides",
    "find_file",
    "load",
    "names",
    "parse",
    "parse_interval",
    "parse_yaml",
    "read_schema",
    "read_yaml",
    "refuse_foreign_classes",
    "settings",
    "to_seconds",
    "validate_value",
]
