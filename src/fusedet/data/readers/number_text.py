"""Numbers as annotation files write them."""


def parse_number(value: str | float) -> float:
    """Return a number or its text as a float.

    Raises:
        ValueError: The text is no number. One with underscores, which Python's own literals have, is none either:
            `0_4` is a typing error for 0.4, not 4.
        OverflowError: A whole number exceeds the range of floats.
    """
    if isinstance(value, str) and "_" in value:
        raise ValueError(f"{value!r} is not a number")
    return float(value)
