"""Configs: what they hold (`schema`) and how YAML, bases and overrides become one (`loading`)."""

from fusedet.config.interval import Interval, interval
from fusedet.config.loading import BACKBONES, find, load, mapping, names, overridden, read, refuse_outside
from fusedet.config.schema import Config, Data, Model, Pyramid, Test, Train, parse
from fusedet.config.settings import Setting, json_schema, settings
from fusedet.config.validation import validate_value

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
    "find",
    "interval",
    "json_schema",
    "load",
    "mapping",
    "names",
    "overridden",
    "parse",
    "read",
    "refuse_outside",
    "settings",
    "validate_value",
]
