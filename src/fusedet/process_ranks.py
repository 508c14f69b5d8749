"""Which of several processes this one is. It imports no torch, so that the command line can ask at once."""

import os

from fusedet.errors import InputError


def get_ranks() -> tuple[int, int, int]:
    """Return this process's rank, the world size, and its rank on its machine, from torchrun's variables.

    Raises:
        InputError: The variables are not such numbers.
    """
    texts = {
        name: os.environ.get(name, default)
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    }
    if not all(text.isdecimal() for text in texts.values()) or not int(texts["RANK"]) < int(texts["WORLD_SIZE"]):
        raise InputError(
            f"{', '.join(f'{k}={v}' for k, v in texts.items())}: these must be whole numbers with RANK below WORLD_SIZE"
        )
    return int(texts["RANK"]), int(texts["WORLD_SIZE"]), int(texts["LOCAL_RANK"])
