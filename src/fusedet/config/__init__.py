"""Configs: what they hold (`schema`) and how YAML, bases and overrides become one (`loading`)."""

from fusedet.config.loading import load, names, overridden
from fusedet.config.schema import Config, Data, Model, Pyramid, Test, Train, parse

__all__ = ["Config", "Data", "Model", "Pyramid", "Test", "Train", "load", "names", "overridden", "parse"]
