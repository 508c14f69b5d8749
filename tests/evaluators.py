"""The evaluators of COCO metrics that can run here."""

from importlib.util import find_spec

from fusedet import evaluation

INSTALLED = tuple(name for name in evaluation.EVALUATORS if name != "hotcoco" or find_spec("hotcoco"))
"""All but hotcoco, an optional package, where it is not installed."""
