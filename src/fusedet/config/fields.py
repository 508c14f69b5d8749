"""Types of settings that several sections share."""

from typing import Annotated, Any, Literal

from pydantic import WithJsonSchema

from fusedet.config.section import Section, to_builtins
from fusedet.config.validation import accept_sequences
from fusedet.errors import InputError

Floats = Annotated[tuple[float, ...], accept_sequences(tuple)]
Integers = Annotated[tuple[int, ...], accept_sequences(tuple)]
Loggers = Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], accept_sequences(tuple)]
Pair = Annotated[tuple[int, int], accept_sequences(tuple)]
FloatPair = Annotated[tuple[float, float], accept_sequences(tuple)]
Texts = Annotated[tuple[str, ...], accept_sequences(tuple)]
Part = Annotated[Any, WithJsonSchema({"type": ["string", "object", "array", "null"]})]
"""A slot: a name, {type: NAME, options}, for the neck also a list of these; checked when the part is built."""


def need(condition: bool, section: Section, name: str, right: str) -> None:
    """Raise InputError for a setting unless a condition on it holds; the sentence says what would be right."""
    if not condition:
        raise InputError(f"{section.key}.{name}={to_builtins(getattr(section, name))} must be {right}")
