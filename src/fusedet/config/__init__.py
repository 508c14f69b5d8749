"""Configs: what they hold (`schema`) and how YAML, bases and overrides become one (`loading`)."""

from fusedet.config.loading import find, load, names, overridden, read
from fusedet.config.schema import Config, Data, Model, Pyramid, Test, Train, parse

__all__ = ["Config", "Data", "Model", "Pyramid", "Test", "Train", "find", "load", "names", "overridden", "parse", "read"]
