"""Configs: what they hold (`schema`) and how YAML, bases and overrides become one (`loading`)."""

from fusedet.config.interval import Interval, interval
from fusedet.config.loading import BACKBONES, find, load, mapping, names, overridden, read, refuse_outside
from fusedet.config.schema import Config, Data, Model, Pyramid, Test, Train, parse

__all__ = [
    "BACKBONES",
    "Config",
    "Data",
    "Interval",
    "Model",
    "Pyramid",
    "Test",
    "Train",
    "find",
    "interval",
    "load",
    "mapping",
    "names",
    "overridden",
    "parse",
    "read",
    "refuse_outside",
]
